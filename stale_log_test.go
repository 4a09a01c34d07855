package main

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Raft keeps what is in the log when it installs a snapshot, be it of a fallen leader. Whoever then leads would send
// it to a follower that starts without state, as if it had been committed.
func TestLogOfAFallenLeaderGoesWithASnapshot(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	l := c.leader()
	a, b := c.followers(l)[0], c.followers(l)[1]
	c.nodes[l].set(t, `"first"`)
	awaitEqualLogs(t, c.nodes...)

	// A alone has three entries of the leader, who then loses its leadership to B without having them itself.
	last := c.nodes[l].raft.Load().LastIndex()
	stale := testSet(testPair{"k", "never committed"})
	sendEntries(t, c.nodes[l], c.nodes[a], c.nodes[l].State().Term, 0,
		&raft.Log{Type: raft.LogNoop}, &raft.Log{Type: raft.LogNoop},
		&raft.Log{Type: raft.LogCommand, Data: encodeEntry(time.Now(), [][]byte{stale})})
	c.cut(a, linkCut)
	elect := func(i int, among ...int) {
		t.Helper()
		term := c.nodes[i].State().Term
		c.nodes[i].transport.campaign(nil)
		waitFor(t, c.nodes[i].cfg.NodeID+" to be elected", func() bool {
			return c.nodes[i].State().Term > term && c.leader(among...) == i
		})
	}
	elect(b, b, l)

	// B commits others in their place, and has nothing but a snapshot of them when it looks what A needs: it is elected
	// once more.
	for c.nodes[b].raft.Load().LastIndex() < last+3 {
		c.nodes[b].set(t, `"acknowledged"`)
	}
	c.nodes[b].storage.log.trailingLogs = 0
	if err := c.nodes[b].raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	elect(b, b, l)
	heard := make(chan raft.RPCResponse, 1) // by A: it takes nothing any more that B still sends from the term before
	c.nodes[a].transport.received <- raft.RPC{
		Command: &raft.AppendEntriesRequest{RPCHeader: header(c.nodes[b]), Term: c.nodes[b].State().Term}, RespChan: heard,
	}
	<-heard
	c.cut(a, linkOpen)
	awaitEqualLogs(t, c.nodes...)
	if newest := c.nodes[a].storage.log.snapshotIndex.Load(); newest != last+3 {
		t.Fatalf("got a snapshot up to %d on A; want one up to %d, where its log ended", newest, last+3)
	}

	// A leads, and the third node comes back without state.
	elect(a)
	c.stop(l)
	c.wipe(l)
	c.start(l)
	waitFor(t, "the node without state to be ready", func() bool { return c.nodes[l].Ready() == nil })
	for _, node := range c.nodes {
		if item, err := node.client.get(t.Context(), "k", Linearizable); err != nil || item.Value != `"acknowledged"` {
			t.Errorf("got %s, error %v through %s; want what was acknowledged", item.Value, err, node.cfg.NodeID)
		}
	}
}

func TestSnapshotDropsWhatItDisproves(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name                string
		term                uint64 // of the entries 5 to 10; the snapshot's is 2
		snapshot            uint64
		wantFirst, wantLast uint64
	}{
		{"its last entry is there", 2, 7, 5, 10},
		{"another entry is there", 1, 7, 8, 10},
		{"another entry is there, the last", 1, 10, 0, 0},
		{"it covers more than there is", 1, 12, 0, 0},
		{"it covers more than there is, of its term", 2, 12, 0, 0},
		{"the log begins behind it", 2, 4, 5, 10},
		{"the log begins with another entry", 1, 5, 6, 10},
	} {
		for _, kind := range []string{storeBolt, storeMemory, "a crash in between"} {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				dir, kvStore := t.TempDir(), kind
				if kind != storeMemory {
					kvStore = storeBolt
				}
				s := openTestStorage(t, kvStore, dir)
				for i := uint64(5); i <= 10; i++ {
					if err := s.logs.StoreLog(&raft.Log{Type: raft.LogNoop, Index: i, Term: tt.term}); err != nil {
						t.Fatal(err)
					}
				}
				if kind == "a crash in between" {
					writeSnapshot(t, s.snapshots.store, tt.snapshot, framed("state")) // nobody takes note of it
					if err := s.close(); err != nil {
						t.Fatal(err)
					}
					s = openTestStorage(t, kvStore, dir)
				} else {
					writeSnapshot(t, s.snapshots, tt.snapshot, framed("state"))
				}
				first, err1 := s.logs.FirstIndex()
				last, err2 := s.logs.LastIndex()
				if err := errors.Join(err1, err2); err != nil || first != tt.wantFirst || last != tt.wantLast {
					t.Errorf("got entries %d to %d, error %v; want %d to %d", first, last, err, tt.wantFirst, tt.wantLast)
				}
				for i := uint64(5); i <= 10; i++ {
					err := s.logs.GetLog(i, new(raft.Log))
					if stays := first <= i && i <= last; stays != (err == nil) || !stays && !errors.Is(err, raft.ErrLogNotFound) {
						t.Errorf("got error %v for entry %d; want it to be there: %v", err, i, stays)
					}
				}
				if first > 0 {
					return
				}
				// Raft shortens the log next, and does not know that it is empty.
				if err := s.logs.DeleteRange(first, min(tt.snapshot, 10)); err != nil {
					t.Error(err)
				}
				if last, err := s.logs.LastIndex(); err != nil || last != 0 {
					t.Errorf("got last index %d, error %v when the empty log has been shortened; want 0", last, err)
				}
			})
		}
	}
}
