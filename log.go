package main

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// What bounds the log in bytes, on the disk and in memory. A snapshot is due when the log since the last one is larger
// than the state, since then writing it costs no more than what was written anyway. After it there stays what brings up
// a follower that is a little behind with less than the state.
const (
	dueBytes    = 16 << 20 // make a snapshot due, or the state's size if that is more
	tailBytes   = 4 << 20  // stay after a snapshot, or half the state's size if that is more
	cachedBytes = 4 << 20  // of the newest entries are in memory, too
	entryBytes  = 128      // of an entry beside its data
)

// entries is the log as Raft sees it, on disk or in memory. What it holds of what the newest snapshot covers is what was
// committed.
type entries struct {
	raft.LogStore
	fail     func(error)
	tail     uint64        // at most so many entries stay after a snapshot
	inMemory bool          // a snapshot takes neither time nor room
	applied  func() uint64 // index up to which the state machine has executed the log; set before Raft runs
	covered  progress      // index up to which the newest snapshot covers it
	state    atomic.Int64  // size of the state in bytes, when it was last written, sent or received
	due      chan struct{} // holds a token when the log has become too large

	mu   sync.Mutex // guards view
	view logView
}

// newEntries returns the log that store holds. Once its newest snapshot is known, load must be called.
func newEntries(store raft.LogStore, tail uint64, fail func(error)) *entries {
	return &entries{LogStore: store, tail: tail, fail: fail, due: make(chan struct{}, 1)}
}

// load looks at the entries that the newest snapshot does not cover. How large those before them are does not matter
// any more.
func (e *entries) load() error {
	first, err1 := e.FirstIndex()
	last, err2 := e.LastIndex()
	if err := errors.Join(err1, err2); err != nil || last == 0 {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.view.next = max(first, e.newest()+1)
	for i := e.view.next; i <= last; i++ {
		entry := new(raft.Log)
		if err := e.LogStore.GetLog(i, entry); err != nil {
			return fmt.Errorf("read log entry %d: %w", i, err)
		}
		e.view.add(entry)
	}
	return nil
}

func (e *entries) StoreLog(l *raft.Log) error { return e.StoreLogs([]*raft.Log{l}) }

func (e *entries) StoreLogs(l []*raft.Log) error {
	if err := e.LogStore.StoreLogs(l); err != nil {
		return err
	}
	e.mu.Lock()
	for _, entry := range l {
		e.view.add(entry)
	}
	e.mu.Unlock()
	if e.isDue(0) {
		select {
		case e.due <- struct{}{}:
		default:
		}
	}
	return nil
}

// GetLog finds the newest entries in memory: on a leader also those that are not on the disk yet.
func (e *entries) GetLog(index uint64, l *raft.Log) error {
	e.mu.Lock()
	cached := e.view.get(index)
	e.mu.Unlock()
	if cached == nil {
		return e.LogStore.GetLog(index, l)
	}
	*l = *cached
	return nil
}

// isDue says whether so many entries, 0 for any number, or too many bytes have come since the newest snapshot. In memory
// a snapshot shares what it has with the state, so there it may come sooner.
func (e *entries) isDue(count uint64) bool {
	bytes := int64(dueBytes)
	if !e.inMemory {
		bytes = max(bytes, e.state.Load())
	}
	covered := e.newest()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.view.since(covered) > bytes || count > 0 && e.view.next >= covered+1+count
}

// newest returns the index up to which the newest snapshot covers the log.
func (e *entries) newest() uint64 { return e.covered.load() }

// cover takes note of a snapshot whose last entry has that index and term, when it has been published or found, and
// drops from the log what it shows to be of a fallen leader. Raft itself only ever shortens the log when it has
// installed a snapshot, and would, once this node leads, send what is left to a follower that starts without state, as
// if it had been committed. What comes after the snapshot stays: Raft goes by where the log ended, and replaces it
// when the leader's entries come.
//
// An entry of the same term at that index is the leader's, and then so is all before it. That is so after each
// snapshot that this node has taken itself, unless the leader's, which was newer, has come meanwhile; then nothing is
// left to drop.
func (e *entries) cover(index, term uint64) error {
	e.covered.advance(index)
	var entry raft.Log
	if err := e.GetLog(index, &entry); err == nil && entry.Term == term {
		return nil
	} else if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	first, err1 := e.FirstIndex()
	last, err2 := e.LastIndex()
	if err := errors.Join(err1, err2); err != nil || last == 0 || first > index {
		return err
	}
	return e.drop(first, min(index, last))
}

// DeleteRange deletes the oldest entries, or the end of the log where the leader has other entries.
//
// Raft has all of what a snapshot covers deleted, since it would count what is to stay by entries, and not in bytes.
//
// An end that is executed in part does not go: this node has executed what the leader has not, and stops.
func (e *entries) DeleteRange(first, last uint64) error {
	end, err := e.LastIndex()
	if err != nil || end == 0 || last == 0 { // of an empty log raft.InmemStore would take itself for endless
		return err
	}
	if last <= e.newest() {
		e.mu.Lock()
		last = min(last, e.view.tail(e.tail, max(tailBytes, e.state.Load()/2))-1)
		e.mu.Unlock()
		if last < first {
			return nil
		}
	} else if e.applied != nil && last >= end && first <= e.applied() {
		err := fmt.Errorf("the leader's log differs from entry %d on, but this node has executed its own up to %d: a node "+
			"of the cluster has lost what it had stored; nothing was changed: compare the nodes' data, then move the state "+
			"directory of each that is wrong away and start it without state, to be filled by the others", first, e.applied())
		e.fail(err)
		return err
	}
	return e.drop(first, last)
}

// drop deletes entries at the beginning of the log or at its end.
func (e *entries) drop(first, last uint64) error {
	if err := e.LogStore.DeleteRange(first, last); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.view.drop(first, last)
	return nil
}

// logView is what is known of the log without reading it: how large its entries are, and the newest of them. It may
// begin later than the log.
type logView struct {
	next    uint64 // index of the entry that comes next
	entries []viewedEntry
	before  int64 // total of the entry before the first
	bare    int   // so many of entries, from the first on, are not in memory
}

type viewedEntry struct {
	total int64     // size in bytes of all entries up to this one, since some moment
	log   *raft.Log // nil unless it is in memory
}

func (v *logView) add(l *raft.Log) {
	if l.Index != v.next { // it is the first, or comes after a snapshot that covers all before it
		*v = logView{next: l.Index}
	}
	total := v.total(l.Index-1) + int64(len(l.Data)+len(l.Extensions)+entryBytes)
	v.entries = append(v.entries, viewedEntry{total, l})
	v.next++
	for v.bare < len(v.entries)-1 && v.since(v.first()+uint64(v.bare)-1) > cachedBytes {
		v.entries[v.bare].log = nil
		v.bare++
	}
}

func (v *logView) first() uint64 { return v.next - uint64(len(v.entries)) }

// total returns the total of the entry with that index, or of the nearest.
func (v *logView) total(index uint64) int64 {
	if index < v.first() || len(v.entries) == 0 {
		return v.before
	}
	return v.entries[min(index, v.next-1)-v.first()].total
}

// since returns the size in bytes of what comes after an index.
func (v *logView) since(index uint64) int64 { return v.total(v.next) - v.total(index) }

// get returns an entry if it is in memory, else nil.
func (v *logView) get(index uint64) *raft.Log {
	if index < v.first() || index >= v.next {
		return nil
	}
	return v.entries[index-v.first()].log
}

// tail returns the first index of the end of the log that has no more than so many entries and bytes.
func (v *logView) tail(count uint64, bytes int64) uint64 {
	from := v.next - min(count, uint64(len(v.entries)))
	for from < v.next && v.since(from-1) > bytes {
		from++
	}
	return from
}

// drop forgets entries at the beginning or at the end.
func (v *logView) drop(first, last uint64) {
	switch begin := v.first(); {
	case first >= v.next || last < begin:
	case first > begin:
		n := int(first - begin)
		clear(v.entries[n:])
		v.entries, v.next, v.bare = v.entries[:n], first, min(v.bare, n)
	default:
		n := int(min(last+1, v.next) - begin)
		v.before = v.entries[n-1].total
		clear(v.entries[:n])
		v.entries, v.bare = v.entries[n:], max(v.bare-n, 0)
	}
}
