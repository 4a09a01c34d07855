package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

const (
	deleteStep   = 512 // log entries
	checksumSize = 4   // of a value in the stable store
)

// guard makes the database fail-stop. Raft goes on after an error of its stores with a wrong idea of what is in them,
// and after a failed fsync nobody can know what reached the disk (Rebello et al., "Can Applications Recover from fsync
// Failures?", ATC 2020). So any error but "not found" goes to fail, which does not return while the process stops:
// raft is never told and so never answers on broken storage. For calls that do not come back at all see watchdog.
type guard struct {
	db   database
	dog  *watchdog
	fail func(error)
	path string                // of the database, for messages
	took func(seconds float64) // called when entries have been stored; nil for nobody

	// early says whether entries may count as stored before they are, as what pending says; nil for never.
	early   func() bool
	pending pending
}

type database interface {
	raft.LogStore
	raft.StableStore
}

// pending are the entries that Raft takes for stored and that are not on the disk yet. A leader has some, so that its
// followers get them while its own disk is at work and not after (10.2.1 in Ongaro's dissertation). Nobody else may
// take them for stored: see "Storing while sending" in DESIGN.md. (A progress would not do: the log's indexes go back
// when its end is cut off.)
type pending struct {
	mu      sync.Mutex    // guards what follows
	entries []*raft.Log   // the first of them may be being stored
	stored  chan struct{} // closed when some of them are stored, or never will be
	failed  bool          // they never will be
}

// add adds entries, and says whether somebody must begin to store them.
func (p *pending) add(l []*raft.Log) (first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stored == nil {
		p.stored = make(chan struct{})
	}
	first = len(p.entries) == 0
	p.entries = append(p.entries, l...)
	return first
}

// next takes note that the first done entries are stored, and returns those that are now to be.
func (p *pending) next(done int) []*raft.Log {
	p.mu.Lock()
	defer p.mu.Unlock()
	if done > 0 {
		close(p.stored)
		p.stored = make(chan struct{})
	}
	if p.entries = p.entries[done:]; len(p.entries) == 0 {
		p.entries = nil
	}
	return p.entries
}

// fail takes note that nothing more will be stored.
func (p *pending) fail() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed = true
	close(p.stored)
}

// last returns the index of the last entry, 0 if there is none.
func (p *pending) last() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.entries) == 0 {
		return 0
	}
	return p.entries[len(p.entries)-1].Index
}

// wait returns when no entry up to index is left.
func (p *pending) wait(index uint64) error {
	for {
		p.mu.Lock()
		stored, failed, left := p.stored, p.failed, len(p.entries) > 0 && p.entries[0].Index <= index
		p.mu.Unlock()
		switch {
		case !left:
			return nil
		case failed:
			return errors.New("the storage has failed")
		}
		<-stored
	}
}

// await returns when all that was in the log up to index is on the disk.
func (g *guard) await(index uint64) error { return g.pending.wait(index) }

// drain returns when all that is in the log so far is on the disk.
func (g *guard) drain() error { return g.pending.wait(g.pending.last()) }

// do makes a call to the database.
func (g *guard) do(op string, f func() error) error {
	err := g.dog.briefly(op, func() error { return g.recovered(f) })
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) && !isNotFound(err) {
		g.fail(fmt.Errorf("storage: %s: %w", op, err))
	}
	return err
}

// recovered calls f. bbolt panics on many kinds of damage, and a page that cannot be read faults where it is mapped.
func (g *guard) recovered(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if cause := recover(); cause != nil {
			err = damaged(g.path, cause)
		}
	}()
	return f()
}

// isNotFound says whether a StableStore has no such key. The raft package goes by the text, so any store must.
func isNotFound(err error) bool {
	return err != nil && err.Error() == raftboltdb.ErrKeyNotFound.Error()
}

func (g *guard) FirstIndex() (index uint64, err error) {
	if err := g.drain(); err != nil {
		return 0, err
	}
	err = g.do("first index", func() error { index, err = g.db.FirstIndex(); return err })
	return index, err
}

func (g *guard) LastIndex() (index uint64, err error) {
	if err := g.drain(); err != nil {
		return 0, err
	}
	err = g.do("last index", func() error { index, err = g.db.LastIndex(); return err })
	return index, err
}

func (g *guard) GetLog(index uint64, l *raft.Log) error {
	if err := g.await(index); err != nil {
		return err
	}
	return g.do("get log", func() error {
		var stored raft.Log
		err := g.db.GetLog(index, &stored)
		if errors.Is(err, raft.ErrLogNotFound) || isNotFound(err) {
			return err
		}
		if err == nil && stored.Index != index {
			err = fmt.Errorf("log entry %d says that it is entry %d", index, stored.Index)
		}
		if err == nil && stored.Type == raft.LogCommand {
			err = checkEntry(stored.Data) // before it is sent to others, who would all stop
		}
		if err != nil { // it is read from memory that is mapped: what can fail is to make sense of it
			return damaged(g.path, err)
		}
		*l = stored
		return nil
	})
}

func (g *guard) StoreLog(l *raft.Log) error {
	return g.StoreLogs([]*raft.Log{l})
}

// StoreLogs stores entries, or has them stored soon where early allows it. Of a change of the membership it never does:
// Raft goes by that from then on.
func (g *guard) StoreLogs(l []*raft.Log) error {
	changes := slices.ContainsFunc(l, func(l *raft.Log) bool { return l.Type == raft.LogConfiguration })
	if g.early != nil && g.early() && !changes {
		if g.pending.add(l) {
			go g.storePending()
		}
		return nil
	}
	if err := g.drain(); err != nil {
		return err
	}
	return g.store(l)
}

func (g *guard) store(l []*raft.Log) error {
	return g.do("store logs", func() error {
		began := time.Now()
		err := g.db.StoreLogs(l)
		if g.took != nil {
			g.took(time.Since(began).Seconds())
		}
		return err
	})
}

// storePending stores entries as long as some are pending.
func (g *guard) storePending() {
	done := 0
	defer func() {
		if done == 0 { // it ended in the middle: nothing comes after what is missing
			g.pending.fail()
		}
	}()
	for batch := g.pending.next(0); len(batch) > 0; batch = g.pending.next(done) {
		done = 0
		if g.store(batch) != nil {
			return
		}
		done = len(batch)
	}
}

// DeleteRange deletes the oldest entries in steps, for new ones must wait meanwhile. A conflicting end of the log goes
// at once: a part of it would be another log.
func (g *guard) DeleteRange(first, last uint64) error {
	end, err := g.LastIndex()
	if err != nil {
		return err
	}
	for ; err == nil && last < end && last-first >= deleteStep; first += deleteStep {
		err = g.do("delete logs", func() error { return g.db.DeleteRange(first, first+deleteStep-1) })
	}
	if err != nil {
		return err
	}
	return g.do("delete logs", func() error { return g.db.DeleteRange(first, last) })
}

// Set stores a value after all that is in the log so far: a new term, say, in which this node may follow and what it
// has from the last in which it led counts as stored.
func (g *guard) Set(key, val []byte) error {
	if err := g.drain(); err != nil {
		return err
	}
	return g.do("set", func() error { return g.db.Set(key, seal(key, val)) })
}

func (g *guard) Get(key []byte) (val []byte, err error) {
	err = g.do("get", func() error {
		sealed, err := g.db.Get(key)
		if err != nil {
			return err
		}
		if val, err = unseal(key, sealed); err != nil {
			return damaged(g.path, err)
		}
		return nil
	})
	return val, err
}

func (g *guard) SetUint64(key []byte, val uint64) error {
	return g.Set(key, binary.BigEndian.AppendUint64(nil, val))
}

func (g *guard) GetUint64(key []byte) (uint64, error) {
	val, err := g.Get(key)
	if err == nil && len(val) != 8 {
		err = g.do("get", func() error { return damaged(g.path, fmt.Sprintf("value of %q is not a number", key)) })
	}
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(val), nil
}

// A value in the stable store, such as a vote, has a checksum of ours: bbolt has one over its meta pages and over
// nothing else, and a vote that reads otherwise than it was written loses data without a word. Entries have theirs.

// seal returns value followed by a CRC-32C over key and value.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(slices.Clip(value), valueSum(key, value))
}

// unseal returns what was sealed.
func unseal(key, sealed []byte) ([]byte, error) {
	n := len(sealed) - checksumSize
	if n < 0 || binary.BigEndian.Uint32(sealed[n:]) != valueSum(key, sealed[:n]) {
		return nil, fmt.Errorf("value of %q: checksum mismatch", key)
	}
	return sealed[:n], nil
}

func valueSum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}
