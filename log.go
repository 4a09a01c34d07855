package main

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// These bound the log in bytes, on the disk and in memory. A snapshot is due when the log since the last one is larger
// than half the state: then snapshots write two to three times as much as the log. After a snapshot some of the log
// stays, since a follower that is a little behind catches up from it with less than the whole state.
const (
	maxLogBytes    = 16 << 20 // a larger log makes a snapshot due, if it is larger than half the state, too
	maxTailBytes   = 4 << 20  // of the log stay after a snapshot, or a quarter of the state's size if that is more
	maxCachedBytes = 4 << 20  // of the newest entries are also in memory
	entryOverhead  = 128      // bytes of an entry beside its data
)

// logStore is the log that Raft uses, over a store on the disk or in memory. It holds no entry that contradicts the
// newest snapshot: all that the snapshot covers was committed.
type logStore struct {
	raft.LogStore
	node         storageNode
	trailingLogs uint64 // number of entries that stay after a snapshot, at most
	inMemory     bool   // KV_STORE=memory: a snapshot shares its memory with the state, so it costs little

	snapshotIndex atomic.Uint64 // last entry that the newest snapshot covers
	stateSize     atomic.Int64  // bytes of the state when it was last written, sent or received
	received      atomic.Bool   // in memory, the newest snapshot is what a leader sent: a second copy of the state
	due           chan struct{} // holds a token when the log has become too large

	started atomic.Bool // Raft has begun to change the log

	mu    sync.Mutex // guards sizes
	sizes logSizes
}

// newLogStore returns the log in store. Before Raft uses it newSnapshotStore must have told it the newest snapshot.
func newLogStore(store raft.LogStore, cfg *Config, node storageNode) *logStore {
	return &logStore{
		LogStore: store, node: node, trailingLogs: cfg.TrailingLogs, inMemory: cfg.KVStore == storeMemory,
		due: make(chan struct{}, 1),
	}
}

func (s *logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

func (s *logStore) StoreLogs(l []*raft.Log) error {
	s.started.Store(true)
	if err := s.LogStore.StoreLogs(l); err != nil {
		return err
	}
	s.mu.Lock()
	for _, entry := range l {
		s.sizes.add(entry)
	}
	s.mu.Unlock()
	if s.isSnapshotDue(0) {
		select {
		case s.due <- struct{}{}:
		default:
		}
	}
	return nil
}

// GetLog reads the newest entries from memory. On a leader some of them are not on the disk yet.
//
// When Raft starts it reads, in order, all entries after the newest snapshot, before it changes any. So their sizes
// become known. Those of entries before them count for nothing: they can only be deleted.
func (s *logStore) GetLog(index uint64, l *raft.Log) error {
	s.mu.Lock()
	cached := s.sizes.cachedEntry(index)
	s.mu.Unlock()
	if cached != nil {
		*l = *cached
		return nil
	}
	if err := s.LogStore.GetLog(index, l); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.started.Load() && index == max(s.sizes.next, s.snapshotIndex.Load()+1) {
		entry := *l
		s.sizes.add(&entry)
	}
	return nil
}

// isSnapshotDue says whether a snapshot is due: the log since the newest snapshot has too many bytes, or at least
// threshold entries (0 is no threshold), or any where it replaces a second copy of the state.
func (s *logStore) isSnapshotDue(threshold uint64) bool {
	limit := int64(maxLogBytes)
	if !s.inMemory {
		limit = max(limit, s.stateSize.Load()/2)
	}
	after := s.snapshotIndex.Load() + 1
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sizes.bytesFrom(after) > limit || threshold > 0 && s.sizes.next >= after+threshold ||
		s.received.Load() && s.sizes.next > after
}

// setSnapshot records the newest snapshot by its last entry, and deletes entries that contradict it. Raft itself would
// keep them when it installs a snapshot. Example: node1 holds entries 8 to 10 of a leader that nobody else heard. It
// installs a snapshot up to entry 50, and leads later. node3 comes back without its state, and Raft on node1 would
// send it entries 8 to 10, which were never committed.
//
// If entry index has the snapshot's term it is the same entry, and so all before it are the same. If not, all up to
// index go. What comes after index stays: it is from older terms, and Raft replaces it when the leader's entries come.
func (s *logStore) setSnapshot(index, term uint64) error {
	s.snapshotIndex.Store(index)
	var entry raft.Log
	err := s.GetLog(index, &entry)
	if err == nil && entry.Term == term {
		return nil
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil || last == 0 || first > index {
		return err
	}
	return s.deleteEntries(first, min(index, last))
}

// DeleteRange is how Raft deletes the oldest entries after a snapshot, and the newest where the leader has others.
//
// Of the oldest it asks to delete all that the snapshot covers; those that are to stay are chosen here, by number and
// by bytes. Of the newest none may go that has been executed: then this node has executed what the leader does not
// have, and must stop.
func (s *logStore) DeleteRange(first, last uint64) error {
	s.started.Store(true)
	end, err := s.LastIndex()
	if err != nil || end == 0 || last == 0 { // an empty log. raft.InmemStore would count its indexes below 0
		return err
	}
	if last <= s.snapshotIndex.Load() {
		s.mu.Lock()
		last = min(last, s.sizes.tail(s.trailingLogs, max(maxTailBytes, s.stateSize.Load()/4))-1)
		s.mu.Unlock()
		if last < first {
			return nil
		}
	} else if applied := s.node.lastApplied(); last >= end && first <= applied {
		err := fmt.Errorf("the leader's log differs from entry %d on, but this node has executed its own up to %d: "+
			"a node of the cluster has lost what it had stored; nothing was changed: compare the nodes' data, then "+
			"move the state directory of each that is wrong away and start it without state, to be filled by the "+
			"others", first, applied)
		s.node.fail(err)
		return err
	}
	return s.deleteEntries(first, last)
}

// deleteEntries deletes entries at the beginning of the log or at its end.
func (s *logStore) deleteEntries(first, last uint64) error {
	if err := s.LogStore.DeleteRange(first, last); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sizes.remove(first, last)
	return nil
}

// logSizes knows the sizes of the entries from some index to the end of the log, and holds the newest entries
// themselves. Its zero value is that of an empty log.
type logSizes struct {
	next   uint64      // index of the entry that comes next
	before []int64     // for each entry, the bytes of all entries before it since logSizes began
	total  int64       // likewise, for the entry that comes next
	cached []*raft.Log // the newest entries
}

// first returns the index of the first entry whose size is known, or next if there is none.
func (s *logSizes) first() uint64 { return s.next - uint64(len(s.before)) }

func (s *logSizes) firstCached() uint64 { return s.next - uint64(len(s.cached)) }

// add adds the entry at the end of the log. The newest entry is always in memory, however large it is; others are while
// they and all after them have at most maxCachedBytes.
func (s *logSizes) add(l *raft.Log) {
	if l.Index != s.next { // the first entry, or the first after a snapshot that covers more than the log held
		*s = logSizes{next: l.Index}
	}
	s.before = append(s.before, s.total)
	s.total += int64(len(l.Data) + len(l.Extensions) + entryOverhead)
	s.next++
	s.cached = append(s.cached, l)
	for len(s.cached) > 1 && s.bytesFrom(s.firstCached()) > maxCachedBytes {
		s.cached[0] = nil // frees its memory
		s.cached = s.cached[1:]
	}
}

// bytesFrom returns the size of the entries from index to the end.
func (s *logSizes) bytesFrom(index uint64) int64 {
	index = max(index, s.first())
	if index >= s.next {
		return 0
	}
	return s.total - s.before[index-s.first()]
}

// cachedEntry returns an entry that is in memory, or nil.
func (s *logSizes) cachedEntry(index uint64) *raft.Log {
	if index < s.firstCached() || index >= s.next {
		return nil
	}
	return s.cached[index-s.firstCached()]
}

// tail returns the first index of the longest end of the log that has at most count entries and so many bytes.
func (s *logSizes) tail(count uint64, bytes int64) uint64 {
	from := s.next - min(count, uint64(len(s.before)))
	for from < s.next && s.bytesFrom(from) > bytes {
		from++
	}
	return from
}

// remove forgets entries at the beginning or at the end.
func (s *logSizes) remove(first, last uint64) {
	begin := s.first()
	if first >= s.next || last < begin {
		return
	}
	if first <= begin {
		s.before = s.before[min(last+1, s.next)-begin:]
		cached := max(len(s.cached)-len(s.before), 0)
		clear(s.cached[:cached]) // frees their memory
		s.cached = s.cached[cached:]
		return
	}
	s.total = s.before[first-begin]
	s.before = s.before[:first-begin]
	s.cached = s.cached[:max(s.firstCached(), first)-s.firstCached()]
	s.next = first
}
