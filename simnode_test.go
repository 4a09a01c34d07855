package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// simNode is a node, whatever becomes of its processes.
type simNode struct {
	sim  *sim
	id   string
	cfg  *Config
	run  atomic.Pointer[simRun]  // nil while it is down
	disk atomic.Pointer[simDisk] // what outlives a crash; nil while there is nothing
	lag  atomic.Int64            // how long, in nanoseconds, it takes to write a snapshot
}

// simDisk is where a node stores things. It is one state of the node, so one server's.
type simDisk struct {
	*raft.InmemStore
	snapshots *memorySnapshots
	full      atomic.Bool // the cluster was begun with this server, or it was ready once
}

// identity returns which server's state this is.
func (d *simDisk) identity() (id identity) {
	if d != nil {
		if stored, err := d.Get(keyIdentity); err == nil {
			_ = json.NewDecoder(bytes.NewReader(stored)).Decode(&id) // a checksum may follow
		}
	}
	return id
}

// configurations returns the newest configuration that is stored, and the one before it, if they are there.
func (d *simDisk) configurations() (newest [][]member) {
	list, _ := d.snapshots.List()
	if len(list) > 0 {
		newest = append(newest, membersOf(list[0].Configuration))
	}
	first, _ := d.FirstIndex()
	last, _ := d.LastIndex()
	for i := max(first, 1); i <= last; i++ {
		if l := new(raft.Log); d.GetLog(i, l) == nil && l.Type == raft.LogConfiguration {
			newest = append(newest, membersOf(raft.DecodeConfiguration(l.Data)))
		}
	}
	return newest[max(0, len(newest)-2):]
}

// simRun is a process of a node, from its start to its crash.
type simRun struct {
	node    *simNode
	host    *simHost
	store   *Store
	client  *testClient
	disk    *simDisk
	steps   *simSteps
	opened  chan struct{} // closed when Open has returned, or ended in a crash
	running bool          // Open has returned nil; to be read after opened
	gone    chan struct{} // closed by the crash
	dead    atomic.Bool
}

// simSteps counts what a process does to its storage, and lets it crash at one of the steps.
type simSteps struct {
	run   atomic.Pointer[simRun]
	count atomic.Int64
	trap  atomic.Pointer[func(step string, count int64) bool] // crashes the process, or returns false
}

// step is called before and after everything that is written to the storage. When the process has crashed, whoever calls
// ends: nothing more is stored.
func (s *simSteps) step(what string) {
	r := s.run.Load()
	count := s.count.Add(1)
	if trap := s.trap.Load(); trap != nil && !r.dead.Load() && (*trap)(what, count) {
		s.trap.Store(nil)
	}
	if r.dead.Load() {
		runtime.Goexit()
	}
}

func (s *simSteps) around(what string, f func() error) error {
	s.step("before " + what)
	defer func() { s.step("after " + what) }()
	return f()
}

// simStore is the log and stable store of one process.
type simStore struct {
	*simDisk
	*simSteps
}

func (s simStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }
func (s simStore) StoreLogs(l []*raft.Log) error {
	return s.around("store logs", func() error {
		time.Sleep(simDelay()) // no lock is held here, so the clock can go on
		s.step("storing")
		return s.simDisk.StoreLogs(l)
	})
}

func (s simStore) DeleteRange(first, last uint64) error {
	return s.around("delete logs", func() error { return s.simDisk.DeleteRange(first, last) })
}

func (s simStore) Set(key, val []byte) error {
	return s.around("set "+string(key), func() error {
		if !bytes.Equal(key, keyIdentity) {
			return s.simDisk.Set(key, val)
		}
		sim := s.run.Load().node.sim
		sim.losing.Lock()
		defer sim.losing.Unlock()
		err := s.simDisk.Set(key, val)
		if members := s.identity().Bootstrap; members != nil {
			sim.begins(members)
		}
		return err
	})
}

func (s simStore) SetUint64(key []byte, val uint64) error {
	return s.around("set "+string(key), func() error { return s.simDisk.SetUint64(key, val) })
}

// simSnapshots are the snapshots of one process.
type simSnapshots struct {
	*memorySnapshots
	*simSteps
	node *simNode
}

type simSink struct {
	raft.SnapshotSink
	*simSteps
	node *simNode
}

func (s simSnapshots) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, ci uint64, t raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.memorySnapshots.Create(v, index, term, c, ci, t)
	return simSink{sink, s.simSteps, s.node}, err
}

func (s simSink) writeLater(write func(io.Writer) error) bool {
	return s.node.cfg.KVStore == storeMemory && s.SnapshotSink.(lateSink).writeLater(write)
}

func (s simSink) Close() error {
	time.Sleep(time.Duration(s.node.lag.Load()))
	return s.around("snapshot", s.SnapshotSink.Close)
}

// simStorageNode is a Store that ends its process in the simulation.
type simStorageNode struct {
	*Store
	run *simRun
}

func (n *simStorageNode) fail(err error) {
	n.run.stops(err)
	runtime.Goexit()
}

// storage returns what openStorage would, on this process's disk.
func (r *simRun) storage() (*storage, error) {
	db := simStore{r.disk, r.steps}
	node := &simStorageNode{r.store, r}
	snapshots := simSnapshots{r.disk.snapshots, r.steps, r.node}
	if r.node.cfg.KVStore == storeMemory {
		return newStorage(r.node.cfg, db, db, snapshots, nil, node)
	}
	disk := newDiskStore(db, "disk", nil, r.store.metrics, node)
	st, err := newStorage(r.node.cfg, disk, disk, snapshots, nil, node)
	st.disk = disk
	return st, err
}

// start starts a process of the node, with the disk that it has. It does nothing when the node runs already, or the
// simulation is over. The trap, if there is one, is set before the first step.
func (n *simNode) start(trap func(r *simRun) func(step string, count int64) bool) {
	s := n.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || n.run.Load() != nil || !n.mayStart() {
		return
	}
	n.disk.CompareAndSwap(nil, &simDisk{InmemStore: raft.NewInmemStore(), snapshots: &memorySnapshots{}})
	r := &simRun{
		node: n, disk: n.disk.Load(), host: s.net.listen(n.id), steps: &simSteps{},
		opened: make(chan struct{}), gone: make(chan struct{}),
	}
	r.steps.run.Store(r)
	machine := newTestMachine()
	log := hclog.New(&hclog.LoggerOptions{Name: n.id, Output: s.log, Level: hclog.Info, TimeFormat: "04:05.000"})
	cfg := *n.cfg // the list may change while the process runs
	r.store = NewStore(&cfg, &simMachine{machine, n}, newMetrics(), log)
	r.client = &testClient{r.store, machine}
	if trap != nil {
		f := trap(r)
		r.steps.trap.Store(&f)
	} else if s.striking.Load() && s.random.IntN(2) == 0 {
		r.crashAt(1 + int64(s.random.IntN(1+s.random.IntN(100))))
	}
	n.run.Store(r)
	go r.open()
}

func (r *simRun) open() {
	defer close(r.opened)
	st, err := r.storage()
	if err == nil {
		err = r.store.start(r.host, st, nil)
	}
	if err != nil {
		r.node.sim.t.Errorf("open %s: %v", r.node.id, err)
		return
	}
	r.running = true
	go func() {
		select {
		case err := <-r.store.Failed():
			r.stops(err)
		case <-r.gone:
		}
	}()
}

// crashAt has the process crash when it has done so many steps more.
func (r *simRun) crashAt(steps int64) {
	last := r.steps.count.Load() + steps
	trap := func(_ string, count int64) bool {
		if count >= last {
			r.node.sim.strike(r)
		}
		return count >= last
	}
	r.steps.trap.Store(&trap)
}

// stops is called when the node stops by itself, which it may not.
func (r *simRun) stops(err error) {
	if !r.dead.Load() {
		r.node.sim.t.Errorf("%s stops: %v", r.node.id, err)
	}
	r.node.sim.log.note(r.node.id, err.Error())
	if r.crash(false, false) {
		r.node.comeBack(time.Second)
	}
}

// crash ends the process at once: its peers hear no more of it, and it stores no more.
func (r *simRun) crash(loses, silently bool) (crashed bool) {
	r.node.sim.losing.Lock()
	defer r.node.sim.losing.Unlock()
	return r.crashes(loses, silently)
}

// crashes is crash with losing held.
func (r *simRun) crashes(loses, silently bool) (crashed bool) {
	if !r.dead.CompareAndSwap(false, true) {
		return false // it has already
	}
	n := r.node
	r.host.crash(silently)
	n.sim.log.note(n.id, fmt.Sprintf("crashes; loses %v, silently %v", loses, silently))
	if loses || n.cfg.KVStore == storeMemory {
		n.disk.Store(nil)
		simTotals.losses.Add(1)
		n.sim.bury()
	}
	simTotals.crashes.Add(1)
	close(r.gone)
	n.run.Store(nil)
	go func() {
		<-r.opened
		time.Sleep(time.Millisecond) // Raft leaves futures unanswered that it has handed to the state machine already
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if r.running {
			_ = r.store.Shutdown(ctx)
			time.Sleep(time.Millisecond) // until nobody is at work any more
			answerEntries(r.store.raft.Load())
		} else {
			r.store.cancel()
		}
	}()
	return true
}

// answerEntries answers the entries that Raft has not taken from its queue (raft.Config.BatchApplyCh) before it shut
// down. A process that ends has no use for the answers; here somebody would wait for them for ever.
func answerEntries(r *raft.Raft) {
	if r == nil {
		return
	}
	entries := unexported(reflect.ValueOf(r).Elem(), "applyCh")
	for entry, taken := entries.TryRecv(); taken; entry, taken = entries.TryRecv() {
		unexported(entry.Elem(), "errCh").TrySend(reflect.ValueOf(&raft.ErrRaftShutdown).Elem())
	}
}

// unexported returns a field of a struct of another package.
func unexported(v reflect.Value, field string) reflect.Value {
	f := v.FieldByName(field)
	return reflect.NewAt(f.Type(), f.Addr().UnsafePointer()).Elem()
}

// comeBack starts a node that has crashed, after a while.
func (n *simNode) comeBack(after time.Duration) {
	go func() {
		time.Sleep(after)
		n.start(nil)
	}()
}

// ready says whether the node is ready.
func (n *simNode) ready() bool {
	r := n.run.Load()
	if r == nil || r.store.Ready() != nil {
		return false
	}
	r.disk.full.Store(true)
	return true
}

// hasState says whether the node counts as one that has its state: it was ready since it began with nothing, or is one of
// those with which the cluster was begun. Before that, none has.
func (n *simNode) hasState() bool {
	n.ready()
	d := n.disk.Load()
	return d != nil && d.full.Load()
}
