package main

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// What Raft would take wrongly: messages that the network has held back, and what fallen leaders leave behind.

// sendEntries sends follower what leader might, the entry before being the last that follower has.
func sendEntries(t *testing.T, leader, follower *testNode, term, commit uint64, entries ...*raft.Log) raft.AppendEntriesResponse {
	t.Helper()
	last, lastTerm, err := leader.storage.lastEntry()
	if err != nil {
		t.Fatal(err)
	}
	for i, entry := range entries {
		entry.Index, entry.Term = last+1+uint64(i), term
	}
	var resp raft.AppendEntriesResponse
	id := follower.membership.server()
	err = leader.transport.NetworkTransport.AppendEntries(raft.ServerID(id), raft.ServerAddress(id), &raft.AppendEntriesRequest{
		RPCHeader: header(leader), Term: term, PrevLogEntry: last, PrevLogTerm: lastTerm, LeaderCommitIndex: commit, Entries: entries,
	}, &resp)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// awaitEqualLogs waits until all nodes have applied all that is in the log of the first.
func awaitEqualLogs(t *testing.T, nodes ...*testNode) {
	t.Helper()
	waitFor(t, "all nodes to have applied the same log", func() bool {
		for _, n := range nodes {
			if r := nodes[0].raft.Load(); r.LastIndex() != n.raft.Load().LastIndex() || r.LastIndex() != n.raft.Load().AppliedIndex() {
				return false
			}
		}
		return true
	})
}

// set sets the key k.
func (n *testNode) set(t *testing.T, value string) {
	t.Helper()
	if _, err := n.client.set(t.Context(), "k", value); err != nil {
		t.Fatal(err)
	}
}

func TestHeldSnapshotSetsNothingBack(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	l := c.leader()
	leader, follower := c.nodes[l], c.nodes[c.followers(l)[0]]
	leader.set(t, "1")
	if err := leader.raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	list, err := leader.storage.snapshots.List()
	if err != nil || len(list) == 0 {
		t.Fatalf("got %d snapshots, error %v; want one", len(list), err)
	}
	meta, state, err := leader.storage.snapshots.Open(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	leader.set(t, "2")
	awaitEqualLogs(t, c.nodes...)
	id := follower.membership.server()
	var resp raft.InstallSnapshotResponse
	err = leader.transport.InstallSnapshot(raft.ServerID(id), raft.ServerAddress(id), &raft.InstallSnapshotRequest{
		RPCHeader: header(leader), SnapshotVersion: meta.Version, Term: leader.State().Term, LastLogIndex: meta.Index, LastLogTerm: meta.Term,
		Size: meta.Size, Configuration: raft.EncodeConfiguration(meta.Configuration), ConfigurationIndex: meta.ConfigurationIndex,
	}, &resp, state)
	if err != nil || !resp.Success { // the leader would send it again for ever
		t.Errorf("got %+v, error %v; want success: the node has all of it", resp, err)
	}
	for _, consistency := range []Consistency{Stale, Linearizable} {
		if item, err := follower.client.get(t.Context(), "k", consistency); err != nil || item.Value != "2" {
			t.Errorf("got %q, error %v; want 2 as before", item.Value, err)
		}
	}
	leader.set(t, "3") // the connection is good for more
	awaitEqualLogs(t, c.nodes...)
}

// The last entries of a snapshot may be applied between answerOldSnapshot's check and Raft's read.
func TestSnapshotIsJudgedWhenItIsRead(t *testing.T) {
	for index, refused := range map[uint64]bool{4: true, 5: false, 6: false} {
		rest := strings.NewReader("the snapshot")
		s := &newerSnapshot{Reader: rest, index: index, applied: func() uint64 { return 5 }}
		_, err := s.Read(make([]byte, 3))
		if (err != nil) != refused {
			t.Errorf("a snapshot of %d: got error %v; want it refused: %v", index, err, refused)
		}
		if _, err := io.Copy(io.Discard, s); err != nil || rest.Len() > 0 { // the connection is good for more
			t.Errorf("a snapshot of %d: got error %v and %d bytes unread; want none", index, err, rest.Len())
		}
	}
}

// What a snapshot of this node covers reaches Raft neither as entries nor as a question about them.
func TestMessagesAboutWhatASnapshotCovers(t *testing.T) {
	tr := &transport{storage: &storage{log: &logStore{}}}
	tr.storage.log.snapshotIndex.Store(10)
	for _, tt := range []struct {
		name              string
		prev, n           uint64
		wantPrev, wantLen uint64
		wantCommit        uint64
	}{
		{"after the snapshot", 11, 2, 11, 2, 13},
		{"right after it", 10, 2, 0, 2, 12},
		{"across its end", 8, 4, 0, 2, 12},
		{"within it", 3, 4, 0, 0, 7},
		{"a question within it", 3, 0, 0, 0, 3},
		{"from the beginning", 0, 11, 0, 1, 11},
		{"a heartbeat", 0, 0, 0, 0, 0},
	} {
		req := &raft.AppendEntriesRequest{PrevLogEntry: tt.prev, PrevLogTerm: 2, LeaderCommitIndex: 100}
		for i := range tt.n {
			req.Entries = append(req.Entries, &raft.Log{Index: tt.prev + 1 + i})
		}
		tr.correct(&raft.RPC{Command: req})
		if req.PrevLogEntry != tt.wantPrev || uint64(len(req.Entries)) != tt.wantLen || req.LeaderCommitIndex != tt.wantCommit ||
			tt.wantLen > 0 && req.Entries[len(req.Entries)-1].Index != tt.prev+tt.n {
			t.Errorf("%s: got %d entries after %d, commit index %d; want %d, %d, %d", tt.name, len(req.Entries), req.PrevLogEntry,
				req.LeaderCommitIndex, tt.wantLen, tt.wantPrev, tt.wantCommit)
		}
	}
}

func TestNothingIsCommittedThatWasNotCompared(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	l := c.leader()
	leader, follower := c.nodes[l], c.nodes[c.followers(l)[0]]
	awaitEqualLogs(t, c.nodes...)
	term, last := leader.State().Term, leader.raft.Load().LastIndex()
	set := testSet(testPair{"k", "of a fallen leader"})
	sendEntries(t, leader, follower, term, last, &raft.Log{Type: raft.LogCommand, Data: encodeEntry(time.Now(), [][]byte{set})})
	// The next leader has committed another entry there, which it had not when it looked what it has to send.
	sendEntries(t, leader, follower, term+1, last+1)
	if commit := follower.raft.Load().CommitIndex(); commit != last {
		t.Errorf("got commit index %d; want %d", commit, last)
	}
}

// A follower has a snapshot and, right behind it, an entry that was never committed.
func TestFollowerOfAFallenLeaderCatchesUp(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeMemory)
	for i, node := range c.nodes {
		node.cfg.TrailingLogs = 0
		c.start(i)
	}
	l := c.leader()
	f, g := c.followers(l)[0], c.followers(l)[1]
	for _, node := range c.nodes {
		waitFor(t, node.cfg.NodeID+" to be ready", func() bool { return node.Ready() == nil })
	}
	c.nodes[l].set(t, "1")
	awaitEqualLogs(t, c.nodes...)
	for _, node := range c.nodes {
		if err := node.raft.Load().Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
	}
	entries := []*raft.Log{{Type: raft.LogNoop}, {Type: raft.LogNoop}}
	if resp := sendEntries(t, c.nodes[l], c.nodes[f], c.nodes[l].State().Term, 0, entries...); !resp.Success {
		t.Fatalf("got %+v; want the entries taken", resp)
	}
	c.cut(f, linkCut)
	c.cut(l, linkCut)
	waitFor(t, "the leader to fall", func() bool { return c.nodes[l].raft.Load().State() != raft.Leader })
	for _, pair := range [][2]int{{l, g}, {g, l}} {
		c.links[pair].Set(linkOpen)
	}
	c.leader(l, g)
	c.cut(f, linkOpen)
	awaitEqualLogs(t, c.nodes...)
}
