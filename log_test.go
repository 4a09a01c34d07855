package main

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/raft"
)

// storeBytes stores n entries of so many bytes each from index on.
func storeBytes(t *testing.T, e *logStore, index uint64, n, size int) {
	t.Helper()
	for i := range n {
		if err := e.StoreLog(&raft.Log{Index: index + uint64(i), Term: 2, Data: make([]byte, size)}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSnapshotIsDueByBytesAndEntries(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		name     string
		inMemory bool
		state    int64
		entries  int // of 1 MiB each, of which a snapshot covers the first
		count    uint64
		want     bool
	}{
		{"little", false, 0, 16, 0, false},
		{"more than 16 MiB", false, 0, 18, 0, true},
		{"more than 16 MiB, less than half the state", false, 40 * mib, 18, 0, false},
		{"more than half the state", false, 40 * mib, 22, 0, true},
		{"less than half the state, in memory", true, 40 * mib, 18, 0, true},
		{"fewer entries", false, 0, 8, 8, false},
		{"so many entries", false, 0, 9, 8, true},
		{"fewer entries, in memory", true, 0, 2, 8, true}, // so that what they deleted goes
		{"none", false, 0, 1, 8, false},
		{"none, in memory", true, 0, 1, 8, false},
	} {
		e := newLogStore(raft.NewInmemStore(), &Config{TrailingLogs: 100}, nil)
		e.inMemory = tt.inMemory
		e.stateSize.Store(tt.state)
		storeBytes(t, e, 1, 1, mib)
		if err := e.setSnapshot(1, 2); err != nil {
			t.Fatal(err)
		}
		e.covered.Store(e.written.Load())
		storeBytes(t, e, 2, tt.entries-1, mib)
		if got := e.isSnapshotDue(tt.count); got != tt.want {
			t.Errorf("%s: got %v; want %v", tt.name, got, tt.want)
		}
		if got := len(e.due) > 0; got != (tt.want && tt.count == 0) {
			t.Errorf("%s: got a token %v; want one when there are too many bytes", tt.name, got)
		}
		again := newLogStore(e.LogStore, &Config{TrailingLogs: 100}, nil) // a restart
		again.inMemory = tt.inMemory
		again.stateSize.Store(tt.state)
		err := again.setSnapshot(1, 2)
		for i := 2; i <= tt.entries; i++ { // as Raft does
			err = errors.Join(err, again.GetLog(uint64(i), new(raft.Log)))
		}
		if err != nil || again.isSnapshotDue(tt.count) != tt.want {
			t.Errorf("%s: got due %v, error %v after a restart; want %v", tt.name, !tt.want, err, tt.want)
		}
		e.covered.Store(e.written.Load())
		if err := e.setSnapshot(uint64(tt.entries), 2); err != nil || e.isSnapshotDue(1) {
			t.Errorf("%s: got due %v, error %v with a snapshot of all; want neither", tt.name, e.isSnapshotDue(1), err)
		}
	}
}

// With an empty log, as after the leader's snapshot, Raft would take itself for full of entries.
func TestNoSnapshotIsDueOfAnEmptyLog(t *testing.T) {
	e := newLogStore(raft.NewInmemStore(), &Config{TrailingLogs: 0}, nil)
	storeBytes(t, e, 1, 3, 100)
	if err := e.setSnapshot(50, 2); err != nil {
		t.Fatal(err)
	}
	if last, err := e.LastIndex(); last != 0 || err != nil || e.isSnapshotDue(1) {
		t.Errorf("got last index %d, error %v, due %v; want an empty log and none", last, err, e.isSnapshotDue(1))
	}
}

func TestWhatStaysOfTheLogIsBounded(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		name      string
		tail      uint64
		state     int64
		size      int // of each of 20 entries
		wantFirst uint64
	}{
		{"by entries", 5, 0, 100, 16},
		{"by bytes", 100, 0, mib, 18},
		{"by a large state's size", 100, 40 * mib, mib, 12},
		{"not at all", 100, 0, 100, 1},
		{"to nothing", 0, 0, 100, 0},
		{"to nothing, by bytes", 100, 0, 5 * mib, 0},
	} {
		e := newLogStore(raft.NewInmemStore(), &Config{TrailingLogs: tt.tail}, nil)
		e.stateSize.Store(tt.state)
		storeBytes(t, e, 1, 20, tt.size)
		if err := errors.Join(e.setSnapshot(20, 2), e.DeleteRange(1, 20)); err != nil {
			t.Fatal(err)
		}
		if first, err := e.FirstIndex(); err != nil || first != tt.wantFirst {
			t.Errorf("%s: got a log from %d on, error %v; want %d", tt.name, first, err, tt.wantFirst)
		}
		storeBytes(t, e, 21, 1, tt.size)
		if err := e.GetLog(21, new(raft.Log)); err != nil {
			t.Errorf("%s: got error %v for the next entry; want none", tt.name, err)
		}
	}
	e := newLogStore(raft.NewInmemStore(), &Config{TrailingLogs: 0}, nil) // what the snapshot does not cover stays
	storeBytes(t, e, 1, 20, 5*mib)
	err := errors.Join(e.setSnapshot(10, 2), e.DeleteRange(1, 10))
	if first, _ := e.FirstIndex(); err != nil || first != 11 {
		t.Errorf("got a log from %d on, error %v; want 11", first, err)
	}
}

// In memory a snapshot of this node's own takes no room, and can be sent to several nodes at once.
func TestMemorySnapshotIsKeptAsItWasCaptured(t *testing.T) {
	st := openTestStorage(t, storeMemory, t.TempDir())
	machine := newTestMachine()
	r := newTestReplica(t, machine)
	applySet(r, 1, testPair{"a", "1"}, testPair{"b", "2"})
	want := snapshotOf(t, r)
	captured, err := r.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	sink := newSnapshot(t, st.snapshots, 1, "")
	if err := captured.Persist(sink); err != nil {
		t.Fatal(err)
	}
	applySet(r, 2, testPair{"a", "3"})
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			meta, source, err := st.snapshots.Open(sink.ID())
			if err != nil {
				t.Error(err)
				return
			}
			defer source.Close()
			if got, err := io.ReadAll(source); err != nil || !bytes.Equal(got, want) || meta.Size != int64(len(want)) {
				t.Errorf("got %q of %d bytes, error %v; want %q", got, meta.Size, err, want)
			}
		})
	}
	readers.Wait()
	if kept := st.snapshots.store.(*memorySnapshots).newest; kept.meta.Size > 0 {
		t.Errorf("got %d bytes kept; want none, but what was captured", kept.meta.Size)
	}
	_, source, err := st.snapshots.Open(sink.ID())
	if err != nil || source.Close() != nil { // whoever writes it ends, as goleak would tell
		t.Errorf("got error %v; want none", err)
	}
}

// What the leader has sent is a second copy of the state in memory. The next entry has this node take its own, which is none.
func TestReceivedSnapshotIsReplaced(t *testing.T) {
	for _, store := range []string{storeMemory, storeBolt} {
		st := openTestStorage(t, store, t.TempDir())
		r := newTestReplica(t, newTestMachine())
		sink := newSnapshot(t, st.snapshots, 1, "sent by the leader")
		if err := sink.Close(); err != nil || st.log.isSnapshotDue(0) {
			t.Errorf("%s: got error %v, due %v before there is another entry; want neither", store, err, st.log.isSnapshotDue(0))
		}
		storeBytes(t, st.log, 2, 1, 100)
		if got, want := st.log.isSnapshotDue(0), store == storeMemory; got != want {
			t.Errorf("%s: got due %v; want %v", store, got, want)
		}
		applySet(r, 2, testPair{"a", "1"})
		captured, err := r.Snapshot()
		if err == nil {
			err = captured.Persist(newSnapshot(t, st.snapshots, 2, ""))
		}
		storeBytes(t, st.log, 3, 1, 100)
		if err != nil || st.log.isSnapshotDue(0) {
			t.Errorf("%s: got error %v, due %v after one of its own; want neither", store, err, st.log.isSnapshotDue(0))
		}
	}
}

// Each node of a cluster bounds its own log, whatever the others do.
func TestEveryNodeBoundsItsLog(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeMemory, storeBolt} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			c := newTestCluster(t, 3, store)
			value := `"` + strings.Repeat("v", 1_000_000) + `"`
			for range 2 * maxLogBytes / len(value) {
				c.nodes[0].set(t, value)
			}
			for _, node := range c.nodes {
				waitFor(t, node.cfg.NodeID+" to have shortened its log", func() bool {
					log := node.storage.log
					first, err := log.FirstIndex()
					return err == nil && first > 1 && log.written.Load()-log.covered.Load() < maxLogBytes+maxTailBytes+2*int64(len(value))
				})
			}
		})
	}
}
