package main

import (
	"fmt"
	"raftstarter/test/link"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// What a leader that has been replaced may still send, while it has the other leader's entries in part.

// pausedLog is a log in which calls wait, as on a slow disk or in a goroutine that gets no processor time.
type pausedLog struct {
	raft.LogStore
	deleting *atomic.Pointer[chan struct{}] // DeleteRange waits until it is closed; nil for no wait
	reading  *atomic.Uint64                 // the next GetLog of this entry waits
	paused   chan struct{}                  // closed when it does
	resumed  chan struct{}                  // until this is closed
}

func (l pausedLog) DeleteRange(first, last uint64) error {
	if hold := l.deleting.Load(); hold != nil {
		<-*hold
	}
	return l.LogStore.DeleteRange(first, last)
}

func (l pausedLog) GetLog(index uint64, entry *raft.Log) error {
	if index > 0 && l.reading.CompareAndSwap(index, 0) {
		close(l.paused)
		<-l.resumed
	}
	return l.LogStore.GetLog(index, entry)
}

// pausedCluster returns five nodes that are ready, the leader first, and its log.
func pausedCluster(t *testing.T) (c *testCluster, order []int, log pausedLog) {
	t.Helper()
	c = unstartedCluster(t, 5, storeMemory)
	logs := make([]pausedLog, len(c.nodes))
	for i, node := range c.nodes {
		node.open = func(cfg *Config, l hclog.Logger, m *metrics, n storageNode) (*storage, error) {
			st, err := openStorage(cfg, l, m, n)
			if err == nil {
				logs[i] = pausedLog{
					st.logs, new(atomic.Pointer[chan struct{}]), new(atomic.Uint64), make(chan struct{}), make(chan struct{}),
				}
				st.logs = logs[i]
			}
			return st, err
		}
	}
	c.startAll()
	leader := c.leader()
	c.nodes[leader].put(t, "k", "before")
	awaitEqualLogs(t, c.nodes...)
	return c, append([]int{leader}, c.followers(leader)...), logs[leader]
}

// link sets what the links between a node and others do, both ways.
func (c *testCluster) link(node int, mode link.Mode, others ...int) {
	for _, other := range others {
		c.links[[2]int{node, other}].Set(mode)
		c.links[[2]int{other, node}].Set(mode)
	}
}

// proposeOnly has a leader append entries, each of which sets a key.
func proposeOnly(t *testing.T, n *testNode, keys ...string) {
	t.Helper()
	var batch []entry
	for _, key := range keys {
		batch = append(batch, entry{newWrite(testSet(testPair{key, "never committed"}))})
	}
	if n.propose(batch) == nil {
		t.Fatalf("%s leads no more", n.cfg.NodeID)
	}
}

// The leader has entries that one follower alone gets, and a new leader is elected by the others. A read through the follower
// waits at the old leader for the next round, while that one hears of the new leader and gets the index from it. It must not
// tell the follower that its own entry at that index is committed.
func TestDeposedLeaderTellsNobodyWhatIsCommitted(t *testing.T) {
	t.Parallel()
	c, order, log := pausedCluster(t)
	old, follower, next := c.nodes[order[0]], c.nodes[order[1]], c.nodes[order[2]]
	last := old.raft.Load().LastIndex()
	others := order[2:]
	for _, other := range others {
		c.links[[2]int{order[0], other}].Set(linkHold)
		c.links[[2]int{other, order[0]}].Set(linkCut)
	}
	c.link(order[1], linkCut, others...)
	proposeOnly(t, old, "k", "k", "k")
	waitFor(t, "the follower to have the entries", func() bool { return follower.raft.Load().LastIndex() == last+3 })
	next.transport.campaign(nil)
	waitFor(t, "the next leader", next.leadsReady)
	next.put(t, "k", "acknowledged") // after Raft's own entry, and that of a new leader
	if got := next.raft.Load().CommitIndex(); got != last+3 {
		t.Fatalf("entry %d is committed; want %d", got, last+3)
	}
	begun := old.roundsBegun(t)
	go func() { _, _ = old.client.get(t.Context(), "k", Linearizable) }()
	waitFor(t, "a round that hangs", func() bool { return old.roundsBegun(t) > begun })
	read := make(chan string, 1)
	go func() {
		item, err := follower.client.get(t.Context(), "k", Linearizable)
		read <- fmt.Sprint(item.Value, err)
	}()
	waitFor(t, "the follower's read to wait at the old leader", func() bool {
		old.rounds.mu.Lock()
		defer old.rounds.mu.Unlock()
		return len(old.rounds.waiting) > 0
	})
	deleted := make(chan struct{})
	log.deleting.Store(&deleted)
	c.link(order[0], linkOpen, order[2])
	waitFor(t, "the old leader to hear of the next one", func() bool { return old.State().Leader == next.cfg.NodeID })
	c.links[[2]int{order[0], order[3]}].Set(linkCut) // the round ends
	c.links[[2]int{order[0], order[4]}].Set(linkCut)
	time.Sleep(500 * time.Millisecond) // for the next round, and what it may tell
	if got := follower.client.list()["k"].Value; got == "never committed" {
		t.Error("the follower has executed what was never committed")
	}
	close(deleted)
	for _, l := range c.links {
		l.Set(linkOpen)
	}
	if got := <-read; strings.HasPrefix(got, "never committed") {
		t.Errorf("a linearizable read through the follower saw %s", got)
	}
	waitFor(t, "the follower to have what was acknowledged", func() bool {
		return follower.client.list()["k"].Value == "acknowledged"
	})
}

// The goroutine with which a leader sends entries to one follower is between two reads of the log, while the main thread
// follows the next leader and replaces the entries. What it then sends must not be of both.
func TestMessageIsOfOneLog(t *testing.T) {
	t.Parallel()
	c, order, log := pausedCluster(t)
	old, follower, next := c.nodes[order[0]], c.nodes[order[1]], c.nodes[order[2]]
	last := old.raft.Load().LastIndex()
	c.link(order[0], linkCut, order[2:]...)
	c.link(order[1], linkCut, order[2:]...)
	proposeOnly(t, old, "a", "b", "c")
	waitFor(t, "the follower to have the entries", func() bool { return follower.raft.Load().LastIndex() == last+3 })
	time.Sleep(50 * time.Millisecond) // for its answer
	log.reading.Store(last + 4)
	proposeOnly(t, old, "d")
	<-log.paused // the entry before has been read
	next.transport.campaign(nil)
	waitFor(t, "the next leader", next.leadsReady)
	for range 4 {
		next.put(t, "k", "acknowledged")
	}
	c.links[[2]int{order[2], order[0]}].Set(linkOpen)
	waitFor(t, "the old leader to have other entries", func() bool {
		var e raft.Log
		return old.storage.log.GetLog(last+4, &e) == nil && e.Term == next.State().Term
	})
	if follower.raft.Load().CurrentTerm() >= next.State().Term {
		t.Fatal("the follower knows of the next leader already: nothing is tested")
	}
	close(log.resumed)
	time.Sleep(500 * time.Millisecond)
	var e raft.Log
	if err := follower.storage.log.GetLog(last+4, &e); err == nil && e.Term == next.State().Term {
		t.Errorf("the follower has entry %d of the next leader behind entries of the old one", last+4)
	}
}

// A follower that was cut off until the leader had only a snapshot of what it lacks is tried at once when it is back.
func TestFollowerThatNeedsASnapshotIsTried(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	l := c.leader()
	away := c.followers(l)[0]
	leader, follower := c.nodes[l], c.nodes[away]
	c.cut(away, linkCut)
	for i := range 20 {
		leader.put(t, "k", fmt.Sprint(i))
	}
	leader.storage.log.trailingLogs = 0
	if err := leader.raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(6500 * time.Millisecond) // Raft would try again 3 s later
	c.cut(away, linkOpen)
	began := time.Now()
	waitFor(t, "it to have all", func() bool { return follower.lastApplied() >= leader.lastApplied() })
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it was tried again after %v", took)
	}
}
