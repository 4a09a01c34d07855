package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

const (
	deleteStep   = 512 // log entries that one transaction deletes
	checksumSize = 4   // bytes of a CRC-32C in our formats
)

// diskStore is the database on the disk: a raft.LogStore and a raft.StableStore that stop the process when the
// database fails. Raft itself goes on after an error with a wrong idea of what is stored, and after a failed fsync
// nobody can know what reached the disk (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
// So any error but "not found" goes to node.fail, which does not return: Raft never answers from broken storage. The
// watchdog stops the process when a call to the database hangs.
//
// While this node leads, StoreLogs returns before the entries are on the disk. So the followers get them while the
// leader's own disk is at work, and not after (10.2.1 in Ongaro's dissertation). Such entries are pending. Nobody may
// rely on them before they are stored: see "Storing while sending" in DESIGN.md.
type diskStore struct {
	db       database
	path     string // of db, for messages
	watchdog *watchdog
	metrics  *metrics
	node     storageNode

	open   sync.RWMutex // held for reading by each call to db, for writing to set closed
	closed bool         // the caller is about to close db, or has

	mu      sync.Mutex  // guards what follows
	pending []*raft.Log // consecutive; storePending may be storing the first of them
	failed  bool        // nothing more will be stored
	stored  *sync.Cond  // of mu; signals that pending or failed has changed
}

// database is what a diskStore needs of raftboltdb.BoltStore.
type database interface {
	raft.LogStore
	raft.StableStore
}

// newDiskStore returns a store over db, which the caller opened at path and closes.
func newDiskStore(db database, path string, w *watchdog, m *metrics, node storageNode) *diskStore {
	d := &diskStore{db: db, path: path, watchdog: w, metrics: m, node: node}
	d.stored = sync.NewCond(&d.mu)
	return d
}

// do makes a call to the database, and stops the process if that fails. The call does little, so it has a time limit.
// The op names it in messages.
func (d *diskStore) do(op string, call func() error) error {
	d.open.RLock()
	defer d.open.RUnlock()
	if d.closed {
		return errClosed
	}
	err := d.watchdog.watch(op, lostTicks, func() error { return recovered(d.path, call) })
	if err != nil && !isNotFound(err) {
		d.node.fail(fmt.Errorf("storage: %s: %w", op, err))
	}
	return err
}

// errClosed is what a call gets after close: of somebody who was reading when the node stopped.
var errClosed = errors.New("the storage is closed")

// close waits until all log entries are on the disk, and ends all calls. Raft must have stopped.
func (d *diskStore) close() error {
	err := d.waitAllStored()
	d.open.Lock()
	defer d.open.Unlock()
	d.closed = true
	return err
}

// isNotFound says whether a store has no such entry or key. For a key each store has an error of its own, but always
// with the same text, since Raft compares that.
func isNotFound(err error) bool {
	return errors.Is(err, raft.ErrLogNotFound) || err != nil && err.Error() == raftboltdb.ErrKeyNotFound.Error()
}

// waitStored waits until all log entries up to index are on the disk.
func (d *diskStore) waitStored(index uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.pending) > 0 && d.pending[0].Index <= index {
		if d.failed {
			return errors.New("the storage has failed")
		}
		d.stored.Wait()
	}
	return nil
}

// waitAllStored waits until all log entries that there are now are on the disk.
func (d *diskStore) waitAllStored() error {
	var last uint64
	d.mu.Lock()
	if n := len(d.pending); n > 0 {
		last = d.pending[n-1].Index
	}
	d.mu.Unlock()
	return d.waitStored(last)
}

func (d *diskStore) FirstIndex() (uint64, error) { return d.index("first index", d.db.FirstIndex) }

func (d *diskStore) LastIndex() (uint64, error) { return d.index("last index", d.db.LastIndex) }

// index reads the first or last index of the log when no entry is pending any more: whoever asks must not hear of an
// entry that a crash can still take away.
func (d *diskStore) index(op string, read func() (uint64, error)) (index uint64, err error) {
	if err := d.waitAllStored(); err != nil {
		return 0, err
	}
	err = d.do(op, func() error { index, err = read(); return err })
	return index, err
}

// GetLog reads an entry from the disk. Each command was checksummed when it was encoded, so a damaged one is found
// here.
func (d *diskStore) GetLog(index uint64, l *raft.Log) error {
	if err := d.waitStored(index); err != nil {
		return err
	}
	return d.do("get log", func() error {
		var stored raft.Log
		err := d.db.GetLog(index, &stored)
		if isNotFound(err) {
			return err
		}
		if err == nil && stored.Index != index {
			err = fmt.Errorf("log entry %d says that it is entry %d", index, stored.Index)
		}
		if err == nil {
			err = checkStored(&stored) // else it might be sent to others, and all would stop
		}
		if err != nil {
			return damaged(d.path, err)
		}
		*l = stored
		return nil
	})
}

// checkStored says whether an entry can be what was stored: a command has a checksum, and what Raft itself writes into
// the log to begin a term or to wait for an index has no data, as a command with a damaged type would.
func checkStored(l *raft.Log) error {
	switch {
	case l.Type == raft.LogCommand:
		return checkEntry(l.Data)
	case l.Type == raft.LogConfiguration, len(l.Data) == 0 && (l.Type == raft.LogNoop || l.Type == raft.LogBarrier):
		return nil
	}
	return fmt.Errorf("log entry %d of type %d has %d bytes", l.Index, l.Type, len(l.Data))
}

func (d *diskStore) StoreLog(l *raft.Log) error {
	return d.StoreLogs([]*raft.Log{l})
}

// StoreLogs stores entries. On a leader it returns at once and the entries are pending, unless one changes the
// membership: Raft uses a new configuration as soon as this returns.
func (d *diskStore) StoreLogs(l []*raft.Log) error {
	changesMembers := slices.ContainsFunc(l, func(l *raft.Log) bool { return l.Type == raft.LogConfiguration })
	if changesMembers || !d.node.commitsWithOthers() {
		if err := d.waitAllStored(); err != nil {
			return err
		}
		return d.store(l)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.pending) == 0 {
		go d.storePending()
	}
	d.pending = append(d.pending, l...)
	return nil
}

func (d *diskStore) store(l []*raft.Log) error {
	return d.do("store logs", func() error {
		began := time.Now()
		err := d.db.StoreLogs(l)
		d.metrics.stored.Observe(time.Since(began).Seconds())
		return err
	})
}

// storePending stores entries until none is pending, or the database fails.
func (d *diskStore) storePending() {
	allStored := false
	defer func() {
		if !allStored { // where node.fail returns, as in tests: entries after those that failed must not be stored
			d.mu.Lock()
			defer d.mu.Unlock()
			d.failed = true
			d.stored.Broadcast()
		}
	}()
	for batch := d.removePending(0); len(batch) > 0; batch = d.removePending(len(batch)) {
		if d.store(batch) != nil {
			return
		}
	}
	allStored = true
}

// removePending removes the first n pending entries, which are stored now, and returns the others.
func (d *diskStore) removePending(n int) []*raft.Log {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pending = d.pending[n:]; len(d.pending) == 0 {
		d.pending = nil // frees the memory of the entries
	}
	d.stored.Broadcast()
	return d.pending
}

// DeleteRange deletes entries. The oldest go in several transactions, as new entries must wait for each. The newest,
// which the leader does not have, go in one: after a crash between two, the log would be neither the old one nor the
// leader's.
func (d *diskStore) DeleteRange(first, last uint64) error {
	end, err := d.LastIndex()
	if err != nil {
		return err
	}
	for last < end && last-first >= deleteStep {
		err := d.do("delete logs", func() error { return d.db.DeleteRange(first, first+deleteStep-1) })
		if err != nil {
			return err
		}
		first += deleteStep
	}
	return d.do("delete logs", func() error { return d.db.DeleteRange(first, last) })
}

// Set stores a value when no entry is pending any more. Raft stores a new term before it follows another leader or
// votes, and then this node's entries of the last term count as stored.
func (d *diskStore) Set(key, val []byte) error {
	if err := d.waitAllStored(); err != nil {
		return err
	}
	return d.do("set", func() error { return d.db.Set(key, appendChecksum(key, val)) })
}

func (d *diskStore) Get(key []byte) (val []byte, err error) {
	err = d.do("get", func() error {
		stored, err := d.db.Get(key)
		if err != nil {
			return err
		}
		if val, err = checkChecksum(key, stored); err != nil {
			return damaged(d.path, err)
		}
		return nil
	})
	return val, err
}

func (d *diskStore) SetUint64(key []byte, val uint64) error {
	return d.Set(key, binary.BigEndian.AppendUint64(nil, val))
}

func (d *diskStore) GetUint64(key []byte) (uint64, error) {
	val, err := d.Get(key)
	if err == nil && len(val) != 8 {
		err = fmt.Errorf("value of %q is not a number", key)
	}
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(val), nil
}

// The format of a value in the stable store, such as a vote: the value, then the CRC-32C of key and value. bbolt has
// checksums on its meta pages only, and a vote that reads otherwise than it was written would let a node vote twice.

func appendChecksum(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(slices.Clip(value), checksum(key, value))
}

// checkChecksum returns the value without its checksum.
func checkChecksum(key, stored []byte) ([]byte, error) {
	n := len(stored) - checksumSize
	if n < 0 || binary.BigEndian.Uint32(stored[n:]) != checksum(key, stored[:n]) {
		return nil, fmt.Errorf("value of %q: checksum mismatch", key)
	}
	return stored[:n], nil
}

func checksum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}
