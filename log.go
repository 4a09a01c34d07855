package main

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// These bound the log in bytes, on the disk and in memory. A snapshot is due when the log since the last one is larger
// than half the state: then snapshots write two to three times as much as the log. After a snapshot some of the log
// stays, since a follower that is a little behind catches up from it with less than the whole state.
const (
	maxLogBytes   = 16 << 20 // a larger log makes a snapshot due, if it is larger than half the state, too
	maxMemoryLog  = 8 << 20  // does so in memory, whatever the state's size: there a snapshot costs little
	maxTailBytes  = 4 << 20  // of the log stay after a snapshot, or a quarter of the state's size if that is more
	cachedEntries = 16       // the newest, of 2 MiB at most, are also in memory: more than a batch has
	entryOverhead = 128      // bytes of an entry beside its data
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

	started atomic.Bool   // Raft has begun to change the log
	last    atomic.Uint64 // last entry whose size is in written
	written atomic.Int64  // bytes of the entries that were stored since the start, or read when Raft started
	covered atomic.Int64  // of these, what the newest snapshot covers
}

// newLogStore returns the log in store. Before Raft uses it newSnapshotStore must have told it the newest snapshot.
func newLogStore(store raft.LogStore, cfg *Config, node storageNode) *logStore {
	cache, _ := raft.NewLogCache(cachedEntries, store) // fails only without a capacity
	return &logStore{
		LogStore: cache, node: node, trailingLogs: cfg.TrailingLogs, inMemory: cfg.KVStore == storeMemory,
		due: make(chan struct{}, 1),
	}
}

func sizeOf(l *raft.Log) int64 { return int64(len(l.Data) + len(l.Extensions) + entryOverhead) }

func (s *logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

func (s *logStore) StoreLogs(l []*raft.Log) error {
	s.started.Store(true)
	if err := s.LogStore.StoreLogs(l); err != nil {
		return err
	}
	for _, entry := range l {
		s.written.Add(sizeOf(entry))
		s.last.Store(entry.Index)
	}
	if s.isSnapshotDue(0) {
		select {
		case s.due <- struct{}{}:
		default:
		}
	}
	return nil
}

// GetLog counts the sizes of the entries after the newest snapshot when Raft starts: it reads all of them, in order,
// before it changes any.
func (s *logStore) GetLog(index uint64, l *raft.Log) error {
	err := s.LogStore.GetLog(index, l)
	if err == nil && !s.started.Load() && index == max(s.last.Load(), s.snapshotIndex.Load())+1 {
		s.written.Add(sizeOf(l))
		s.last.Store(index)
	}
	return err
}

// isSnapshotDue says whether a snapshot is due: the log since the newest snapshot has too many bytes, or at least
// threshold entries (0 is no threshold), or any where it replaces a second copy of the state. In memory, where the
// newest snapshot keeps what was deleted since, any entry will do when a threshold is asked for.
func (s *logStore) isSnapshotDue(threshold uint64) bool {
	limit := max(maxLogBytes, s.stateSize.Load()/2)
	if s.inMemory {
		limit = maxMemoryLog
	}
	last, covered := s.last.Load(), s.snapshotIndex.Load()
	return s.written.Load()-s.covered.Load() > limit || threshold > 0 && last >= covered+threshold ||
		last > covered && (s.received.Load() || s.inMemory && threshold > 0)
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
	return s.LogStore.DeleteRange(first, min(index, last))
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
		if last = min(last, s.beforeTail(end, max(maxTailBytes, s.stateSize.Load()/4))); last < first {
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
	return s.LogStore.DeleteRange(first, last)
}

// beforeTail returns the last entry before those that stay: the newest, at most trailingLogs and so many bytes of them.
func (s *logStore) beforeTail(end uint64, bytes int64) uint64 {
	index := end
	for ; end-index < s.trailingLogs; index-- {
		var entry raft.Log
		if s.LogStore.GetLog(index, &entry) != nil { // here the log begins
			break
		}
		if bytes -= sizeOf(&entry); bytes < 0 {
			break
		}
	}
	return index
}
