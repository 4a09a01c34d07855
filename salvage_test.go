package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// What people save where no majority is left: Store.CaptureAll.

// hookedLogs calls a func before it reads an entry of the log, and one after that.
type hookedLogs struct {
	raft.LogStore
	before func(index uint64)
	after  func()
}

func (h *hookedLogs) GetLog(index uint64, l *raft.Log) error {
	if h.before != nil {
		h.before(index)
	}
	err := h.LogStore.GetLog(index, l)
	if h.after != nil {
		h.after()
	}
	return err
}

// saved returns the values that a node's copy has, by key.
func saved(t *testing.T, n *testNode) map[string]string {
	t.Helper()
	all, err := copyAll(t.Context(), n.Store, n.machine.(*testMachine))
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]string)
	for key, item := range all.items {
		values[key] = item.Value
	}
	return values
}

// awaitReady waits until all nodes are ready.
func awaitReady(t *testing.T, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		waitFor(t, n.cfg.NodeID+" to be ready", func() bool { return n.Ready() == nil })
	}
}

// What only the log of the node that is left holds is saved, also after a snapshot that ends with an entry of Raft's own, as
// those of an older version may. node1 and node2 take it while node3 is down; node3 has it from them.
func TestSavedWithTheLog(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	c.stop(2)
	for range 15 { // more than stays of the log after a snapshot
		c.nodes[c.leader(0, 1)].put(t, "big", strings.Repeat("x", 400<<10))
	}
	if err := c.nodes[c.leader(0, 1)].raft.Load().Barrier(0).Error(); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.nodes[:2] {
		waitFor(t, "a snapshot that ends with the barrier", func() bool {
			_ = n.raft.Load().Snapshot().Error() // there may be nothing new yet
			newest, err := n.storage.snapshots.newest()
			return err == nil && newest.Index > n.replica.applied.load()
		})
	}
	if err := c.nodes[c.leader(0, 1)].raft.Load().LeadershipTransfer().Error(); err != nil {
		t.Fatal(err) // one that leads anew has entries that can be waited for
	}
	c.start(2)
	awaitReady(t, c.nodes...)
	c.nodes[2].put(t, "k", "acknowledged")
	awaitEqualLogs(t, c.nodes...)
	for i := range c.nodes {
		c.stop(i)
	}
	c.wipe(0)
	c.wipe(1)
	for i := range c.nodes {
		c.start(i)
	}
	n := c.nodes[2]
	awaitReason(t, n, "Node node3 has the most complete log")
	if got := saved(t, n)["k"]; got != "acknowledged" {
		t.Errorf("got %q; want what was acknowledged", got)
	}
}

// While the log is read for a copy, a leader comes and has other entries: the copy would be a mix of both.
func TestSavedLogIsNotReplacedMeanwhile(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	l := c.leader()
	n := c.nodes[l]
	n.put(t, "k", "0")
	awaitEqualLogs(t, c.nodes...)
	c.cut(l, linkCut)
	for i := range 6 { // entries that only this node has
		n.raft.Load().Apply(encodeEntry(time.Now(), [][]byte{testSet(testPair{fmt.Sprint("lost", i), "x"})}), time.Second)
	}
	others := c.followers(l)
	o := c.nodes[c.leader(others...)]
	for i := range 6 {
		o.put(t, fmt.Sprint("k", i), "committed")
	}
	waitFor(t, "it to see no majority", func() bool { return !n.seesMajority() })
	if got := saved(t, n); len(got) != 7 {
		t.Errorf("got %v to be saved; want all that it has", got)
	}
	reads := 0
	err := n.CaptureAll(t.Context(), func() {}, func([]byte, time.Time) error {
		if reads++; reads == 1 {
			c.cut(l, linkOpen)
			waitFor(t, "the others' entries", func() bool { return n.replica.applied.load() >= o.replica.applied.load() })
		}
		return nil
	})
	if !errors.Is(err, ErrNoLeader) || reads == 0 {
		t.Errorf("got error %v after %d commands; want %v", err, reads, ErrNoLeader)
	}
	if got := saved(t, n); got["lost0"] != "" || got["k5"] != "committed" {
		t.Errorf("got %v of a node that sees a leader; want what is committed", got)
	}
}

// A node that still reads its snapshot and log has nothing to show yet, however long that takes; and who reads when it
// stops is no reason to take its storage for damaged.
func TestSavedWhileTheNodeStartsAndStops(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	for i := range 15 {
		c.nodes[0].put(t, fmt.Sprint("k", i), strings.Repeat("x", 400<<10)) // more than what is kept of the log in memory
	}
	awaitEqualLogs(t, c.nodes...)
	for i := range c.nodes {
		c.stop(i)
	}
	n, going := c.nodes[2], make(chan struct{})
	n.open = func(cfg *Config, log hclog.Logger, m *metrics, node storageNode) (*storage, error) {
		st, err := openStorage(cfg, log, m, node)
		if err == nil {
			st.logs = &hookedLogs{LogStore: st.logs, before: func(index uint64) {
				if index == 4 {
					<-going
				}
			}}
		}
		return st, err
	}
	c.start(2)
	if _, err := copyAll(t.Context(), n.Store, n.machine.(*testMachine)); !errors.Is(err, ErrStarting) {
		t.Errorf("got error %v of a node that runs no Raft yet; want %v", err, ErrStarting)
	}
	close(going)
	waitFor(t, "it to see no majority", func() bool { return n.raft.Load() != nil && !n.seesMajority() })
	if got := saved(t, n); len(got) != 15 {
		t.Errorf("got %d keys to be saved; want 15", len(got))
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := copyAll(ended, n.Store, n.machine.(*testMachine)); !errors.Is(err, ErrNotInTime) {
		t.Errorf("got error %v when the client has gone; want %v", err, ErrNotInTime)
	}
	stopped := false
	err := n.CaptureAll(t.Context(), func() {}, func([]byte, time.Time) error {
		if !stopped {
			stopped = true
			c.stop(2)
		}
		return nil
	})
	if !errors.Is(err, ErrNoLeader) {
		t.Errorf("got error %v when the node has stopped; want %v", err, ErrNoLeader)
	}
	select {
	case err := <-n.Failed():
		t.Errorf("got %v when the node has stopped; want nothing", err)
	default:
	}
}

// A cluster that starts, one node before the others, shows nothing that may yet be undone.
func TestNothingIsSavedWhileTheClusterStarts(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	c.nodes[0].put(t, "k", "1")
	awaitEqualLogs(t, c.nodes...)
	for i := range c.nodes {
		c.stop(i)
	}
	c.start(0)
	n := c.nodes[0]
	waitFor(t, "raft to run", func() bool { return n.raft.Load() != nil })
	a := request(t, http.MethodGet, n.url+"/value/k?consistency=stale", "")
	if a.status != http.StatusServiceUnavailable {
		t.Errorf("got %v; want 503", a)
	}
}

// A backup reads an entry in the moment in which Raft replaces it and all after it: the sizes of those before stay known.
func TestSizesOfALogThatIsReplacedWhileItIsRead(t *testing.T) {
	entry := func(i, term uint64) *raft.Log { return &raft.Log{Index: i, Term: term, Data: make([]byte, 1<<20)} }
	inner := &hookedLogs{LogStore: raft.NewInmemStore()}
	for i := range uint64(20) {
		if err := inner.StoreLog(entry(i+1, 1)); err != nil {
			t.Fatal(err)
		}
	}
	e := newLogStore(inner, &Config{TrailingLogs: 100}, &testStorageNode{})
	for i := range uint64(20) { // as Raft does at the start
		if err := e.GetLog(i+1, new(raft.Log)); err != nil {
			t.Fatal(err)
		}
	}
	inner.after = func() {
		inner.after = nil
		if err := e.DeleteRange(16, 20); err != nil {
			t.Error(err)
		}
	}
	if err := e.GetLog(16, new(raft.Log)); err != nil || inner.after != nil {
		t.Fatalf("got error %v, want none from the store below", err)
	}
	if err := e.StoreLogs([]*raft.Log{entry(16, 2), entry(17, 2)}); err != nil {
		t.Fatal(err)
	}
	if first := uint64(1); first != 1 || !e.isSnapshotDue(0) {
		t.Errorf("the sizes from entry %d on are known, due: %v; want all, and a snapshot of 17 MiB", first, e.isSnapshotDue(0))
	}
}

// A node that starts from a snapshot knows that all of it is committed, and says so if the snapshot is missing.
func TestStartFromASnapshot(t *testing.T) {
	c := newTestCluster(t, 3, storeBolt)
	l := c.leader()
	node := c.nodes[l]
	node.put(t, "k", "1")
	node.storage.log.trailingLogs = 0
	if err := node.raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	covered := node.storage.log.snapshotIndex.Load()
	node.put(t, "k", "2")
	for i := range c.nodes {
		c.stop(i)
	}
	c.start(l) // alone
	waitFor(t, "Raft to run", func() bool { return node.raft.Load() != nil })
	if got := node.Status().CommitIndex; got != covered {
		t.Errorf("got the commit index %d; want %d", got, covered)
	}
	c.stop(l)
	if err := os.RemoveAll(filepath.Join(node.cfg.StateDir, snapshotsDir)); err != nil {
		t.Fatal(err)
	}
	c.start(l)
	if err := <-node.Failed(); !strings.Contains(err.Error(), "newest snapshot: is one missing?") {
		t.Errorf("got %v; want that a snapshot is missing", err)
	}
}
