package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// heldDisk is a database whose writes of log entries can be held up.
type heldDisk struct {
	database
	mu     sync.Mutex // held while writes are
	failed error      // what writes come to; nil for success
	stores int        // how many there have been
}

func (h *heldDisk) StoreLogs(l []*raft.Log) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stores++
	if h.failed != nil {
		return h.failed
	}
	return h.database.StoreLogs(l)
}

// heldCluster starts n nodes whose disks can be held up.
func heldCluster(t *testing.T, n int) (*testCluster, []*heldDisk) {
	t.Helper()
	c, disks := unstartedCluster(t, n, storeBolt), make([]*heldDisk, n)
	for i, node := range c.nodes {
		node.open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
			st, err := openStorage(cfg, log, m, n)
			if err == nil {
				disks[i] = &heldDisk{database: st.disk.db}
				st.disk.db = disks[i]
			}
			return st, err
		}
		c.start(i)
	}
	for _, node := range c.nodes {
		waitFor(t, "the node to be ready", func() bool { return node.Ready() == nil })
	}
	return c, disks
}

// What is acknowledged is on the leader's disk and on those of as many others as make a majority, whichever is late.
func TestAcknowledgedIsStored(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		nodes int
		held  func(leader int, followers []int) []int
	}{
		{"the leader is late", 3, func(leader int, _ []int) []int { return []int{leader} }},
		{"the followers are late", 3, func(_ int, followers []int) []int { return followers }},
		{"three of five are late", 5, func(leader int, followers []int) []int { return []int{leader, followers[1], followers[2]} }},
		{"a node alone", 1, func(leader int, _ []int) []int { return []int{leader} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, disks := heldCluster(t, tt.nodes)
			leader := c.leader()
			c.nodes[leader].put(t, "k", "1")
			held := tt.held(leader, c.followers(leader))
			for _, i := range held {
				disks[i].mu.Lock()
			}
			before := c.nodes[leader].raft.Load().LastIndex()
			done := make(chan error, 1)
			go func() {
				defer close(done)
				_, err := c.nodes[leader].client.set(t.Context(), "k", "2")
				done <- err
			}()
			for i, node := range c.nodes { // nobody waits for another's disk
				if !slices.Contains(held, i) {
					waitFor(t, "the others to have the entry", func() bool { last, _, err := node.storage.lastEntry(); return err == nil && last > before })
				}
			}
			select {
			case err := <-done:
				t.Errorf("got an answer (error %v) before a majority had stored the entry", err)
			case <-time.After(200 * time.Millisecond):
			}
			for _, i := range held {
				disks[i].mu.Unlock()
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// pend makes the leader have an entry that is not stored.
func pend(t *testing.T, leader *testNode, disk *heldDisk) {
	t.Helper()
	disk.mu.Lock()
	before := leader.raft.Load().LastIndex()
	go func() { _, _ = leader.client.set(t.Context(), "k", "1") }()
	waitFor(t, "the entry", func() bool { return leader.raft.Load().LastIndex() > before })
}

// Whoever asks what a leader holds is told of nothing that a crash of the leader may still take.
func TestNobodyIsToldOfPendingEntries(t *testing.T) {
	t.Parallel()
	c, disks := heldCluster(t, 3)
	i := c.leader()
	pend(t, c.nodes[i], disks[i])
	told := make(chan error, 1)
	go func() {
		_, err := c.nodes[i].info()
		told <- err
	}()
	select {
	case err := <-told:
		t.Errorf("got an answer (error %v) before the newest entry was stored", err)
	case <-time.After(100 * time.Millisecond):
	}
	disks[i].mu.Unlock()
	if err := <-told; err != nil {
		t.Error(err)
	}
}

// A leader whose disk hangs can be shut down, or given up.
func TestShutdownWithPendingEntries(t *testing.T) {
	t.Parallel()
	c, disks := heldCluster(t, 3)
	i := c.leader()
	leader := c.nodes[i]
	for _, other := range c.followers(i) {
		c.stop(other)
	}
	pend(t, leader, disks[i])
	leader.running = false
	leader.web.CloseClientConnections()
	leader.web.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- leader.Shutdown(ctx) }()
	select {
	case err := <-stopped:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v; want %v", err, context.DeadlineExceeded)
		}
	case <-time.After(4 * time.Second):
		t.Error("it has not come back when its context had ended")
	}
	disks[i].mu.Unlock()
}

// Whatever the node writes or says of its log comes after the entries that count as stored already.
func TestNothingOvertakesPendingEntries(t *testing.T) {
	t.Parallel()
	entry := func(index uint64, kind raft.LogType) []*raft.Log {
		return []*raft.Log{{Index: index, Term: 1, Type: kind, Data: encodeEntry(time.Now(), nil)}}
	}
	for name, call := range map[string]func(d *diskStore) error{
		"the term is set":    func(d *diskStore) error { return d.SetUint64(keyCurrentTerm, 2) },
		"the vote is set":    func(d *diskStore) error { return d.Set(keyVote, []byte("vote")) },
		"waitStored":         func(d *diskStore) error { return d.waitStored(3) },
		"waitAllStored":      (*diskStore).waitAllStored,
		"the entry is read":  func(d *diskStore) error { return d.GetLog(3, new(raft.Log)) },
		"the end is deleted": func(d *diskStore) error { return d.DeleteRange(3, 3) },
		"the last index": func(d *diskStore) error {
			last, err := d.LastIndex()
			if err == nil && last != 3 {
				t.Errorf("got %d for the last index; want 3", last)
			}
			return err
		},
		"a membership is stored": func(d *diskStore) error { return d.StoreLogs(entry(4, raft.LogConfiguration)) },
		"entries of a follower": func(d *diskStore) error {
			d.node.(*testStorageNode).leads = false
			return d.StoreLogs(entry(4, raft.LogCommand))
		},
	} {
		for _, broken := range []error{nil, errors.New("the disk is broken")} {
			disk := &heldDisk{database: raft.NewInmemStore()}
			node := &testStorageNode{}
			d := newDiskStore(disk, "", nil, newMetrics(), node)
			if err := d.StoreLogs(append(entry(1, raft.LogCommand), entry(2, raft.LogCommand)...)); err != nil {
				t.Fatal(err)
			}
			node.leads = true
			disk.mu.Lock()
			disk.failed = broken
			if err := d.StoreLogs(entry(3, raft.LogCommand)); err != nil {
				t.Fatalf("%s: got %v; want the entry to count as stored", name, err)
			}
			if err := errors.Join(d.waitStored(2), d.GetLog(2, new(raft.Log))); err != nil {
				t.Errorf("%s: got %v for entries that are stored", name, err)
			}
			done := make(chan error, 1)
			go func() {
				defer close(done)
				done <- call(d)
			}()
			select {
			case err := <-done:
				t.Errorf("%s: got an answer (error %v) before the entry was stored", name, err)
			case <-time.After(10 * time.Millisecond):
			}
			disk.mu.Unlock()
			if err := <-done; (err == nil) != (broken == nil) {
				t.Errorf("%s, the disk's error %v: got error %v", name, broken, err)
			}
		}
	}
}

// Entries that come while others are being stored go together, in order.
func TestPendingEntriesGather(t *testing.T) {
	t.Parallel()
	disk := &heldDisk{database: raft.NewInmemStore()}
	d := newDiskStore(disk, "", nil, newMetrics(), &testStorageNode{t: t, leads: true})
	disk.mu.Lock()
	for i := range uint64(100) {
		if err := d.StoreLogs([]*raft.Log{{Index: i + 1, Term: 1}}); err != nil {
			t.Fatal(err)
		}
	}
	disk.mu.Unlock()
	if last, err := d.LastIndex(); err != nil || last != 100 || disk.stores > 3 {
		t.Errorf("got entry %d for the last, stored in %d steps, error %v; want 100 in very few", last, disk.stores, err)
	}
	if len(d.pending) > 0 {
		t.Errorf("got %d entries still pending", len(d.pending))
	}
}

// A command whose type is damaged must not be taken for an entry of Raft's own, which nobody executes, nor reach Raft, which
// panics on a type that it does not know.
func TestEntryWithADamagedType(t *testing.T) {
	command := encodeEntry(time.Now(), [][]byte{testSet(testPair{"k", "1"})})
	for _, tt := range []struct {
		logType raft.LogType
		data    []byte
		ok      bool
	}{
		{raft.LogCommand, command, true},
		{raft.LogNoop, nil, true},
		{raft.LogBarrier, nil, true},
		{raft.LogConfiguration, []byte("members"), true},
		{raft.LogCommand, nil, false},
		{raft.LogNoop, command, false},
		{raft.LogBarrier, command, false},
		{raft.LogAddPeerDeprecated, command, false},
		{0x40, command, false},
	} {
		node, store := &testStorageNode{}, raft.NewInmemStore()
		d := newDiskStore(store, "raft.db", nil, newMetrics(), node)
		if err := store.StoreLog(&raft.Log{Index: 1, Term: 1, Type: tt.logType, Data: tt.data}); err != nil {
			t.Fatal(err)
		}
		err := d.GetLog(1, new(raft.Log))
		if (err == nil) != tt.ok || (len(node.failed) == 0) != tt.ok {
			t.Errorf("type %d with %d bytes: got error %v, failures %v; want none: %v", tt.logType, len(tt.data), err, node.failed, tt.ok)
		}
	}
}
