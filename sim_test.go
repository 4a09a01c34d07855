package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// The simulation: clusters of real Stores in one process, on a network in memory (simnet_test.go) and on a clock that
// jumps to whatever happens next (testing/synctest), so that hours pass in seconds. Nodes crash between any two calls to
// their storage and come back with it or with nothing; links are cut, or hold messages back. Clients write and read
// meanwhile. A seed decides which faults come, and no more than that: Raft's timeouts, the delays of messages and the
// order in which goroutines run differ from run to run, so a seed that fails may pass the next time.

var (
	simSeed = flag.Uint64("sim.seed", 1, "seed of the first simulated cluster of each kind")
	simRuns = flag.Int("sim.runs", 1, "how many seeds of each kind are simulated")
	simTime = flag.Duration("sim.time", 2*time.Minute, "how long faults strike each cluster, by its own clock")
	simLog  = flag.Bool("sim.log", false, "write what the nodes log to standard error")
)

// simTotals is what all simulations came to.
var simTotals struct{ clusters, crashes, losses, faults, ops, elapsed atomic.Int64 }

func TestSimulation(t *testing.T) {
	if !flag.Parsed() {
		flag.Parse()
	}
	t.Cleanup(func() {
		s := &simTotals
		t.Logf("%d clusters lived for %v; %d faults, %d crashes, %d of them with all state lost; %d operations checked", s.clusters.Load(),
			time.Duration(s.elapsed.Load()).Round(time.Second), s.faults.Load(), s.crashes.Load(), s.losses.Load(), s.ops.Load())
	})
	for _, store := range []string{storeMemory, storeBolt} {
		for _, n := range []int{3, 5} {
			for _, lossy := range []bool{false, true} {
				name := fmt.Sprintf("%s, %d nodes, a majority keeps its state: %v", store, n, !lossy)
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					for i := range *simRuns {
						simulate(t, store, n, *simSeed+uint64(i), func(s *sim) {
							s.lossy = lossy
							s.live(*simTime)
						})
					}
				})
			}
		}
	}
}

// sim is a simulated cluster.
type sim struct {
	t     *testing.T
	net   *simNet
	store string
	nodes []*simNode
	lossy bool // a majority may lose its state
	log   *simLogWriter
	h     simHistory
	clock atomic.Int64 // counts calls and answers of clients
	value atomic.Int64 // the last one written
	cures atomic.Int64 // how often people had to help

	striking atomic.Bool // faults come
	settled  atomic.Bool // the cluster has formed

	mu       sync.Mutex     // guards what follows
	random   *rand.Rand     // of the faults
	commands map[Tag]string // executed
	over     bool
}

// simulate runs a simulation and judges what clients saw.
func simulate(t *testing.T, store string, n int, seed uint64, run func(s *sim)) {
	t.Helper()
	s := &sim{
		store: store, log: &simLogWriter{}, random: rand.New(rand.NewPCG(seed, uint64(n))),
		commands: make(map[Tag]string),
	}
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		began := time.Now()
		s.net = newSimNet()
		for i := range n {
			cfg := &Config{NodeID: fmt.Sprintf("node%d", i+1), KVStore: store, SnapshotThreshold: 60, SnapshotInterval: 500 * time.Millisecond, TrailingLogs: 20}
			cfg.RaftAddr = cfg.NodeID
			for j := range n {
				id := fmt.Sprintf("node%d", j+1)
				cfg.Peers = append(cfg.Peers, Peer{ID: id, Addr: id})
			}
			s.nodes = append(s.nodes, &simNode{sim: s, id: cfg.NodeID, cfg: cfg})
			s.nodes[i].empty.Store(true)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.watchLeaders(ctx)
		run(s)
		cancel()
		s.mu.Lock()
		s.over = true
		s.mu.Unlock()
		for _, node := range s.nodes {
			if r := node.run.Load(); r != nil {
				r.crash(false, false)
			}
		}
		simTotals.elapsed.Add(int64(time.Since(began)))
		time.Sleep(time.Minute) // all goroutines must have ended by then
		s.judge()
		simTotals.clusters.Add(1)
		simTotals.ops.Add(int64(len(s.h.all())))
		if t.Failed() {
			t.Logf("seed %d of %q; the nodes' last words:\n%s", seed, t.Name(), s.log.last())
		}
	})
}

func (s *sim) rand(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.random.IntN(n)
}

func (s *sim) upTo(d time.Duration) time.Duration {
	return time.Duration(s.rand(int(d/time.Microsecond))) * time.Microsecond
}

// simNode is a node, whatever becomes of its processes.
type simNode struct {
	sim   *sim
	id    string
	cfg   *Config
	run   atomic.Pointer[simRun]  // nil while it is down
	disk  atomic.Pointer[simDisk] // what outlives a crash; nil while there is nothing
	empty atomic.Bool             // it is not, or not yet again, a full member
}

// simDisk is where a node stores things.
type simDisk struct {
	*raft.InmemStore
	snapshots *memorySnapshots
}

// simRun is a process of a node, from its start to its crash.
type simRun struct {
	node    *simNode
	host    *simHost
	store   *Store
	kv      *KV
	disk    *simDisk
	steps   *simSteps
	goesOn  bool          // as the survivor of a majority
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

// step is called before and after everything that is done to the storage. When the process has crashed, whoever calls
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
		if string(key) == string(keyCluster) {
			s.run.Load().node.empty.Store(len(val) <= checksumSize || val[0] == standGated)
		}
		return s.simDisk.Set(key, val)
	})
}

func (s simStore) SetUint64(key []byte, val uint64) error {
	return s.around("set "+string(key), func() error { return s.simDisk.SetUint64(key, val) })
}

func (s simStore) GetLog(index uint64, l *raft.Log) error {
	return s.around("get log", func() error { return s.simDisk.GetLog(index, l) })
}

// simSnapshots are the snapshots of one process.
type simSnapshots struct {
	*memorySnapshots
	*simSteps
}

type simSink struct {
	raft.SnapshotSink
	*simSteps
}

func (s simSnapshots) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, ci uint64, t raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.memorySnapshots.Create(v, index, term, c, ci, t)
	return simSink{sink, s.simSteps}, err
}

func (s simSink) Close() error { return s.around("snapshot", s.SnapshotSink.Close) }

// storage returns what openStorage would, on this process's disk.
func (r *simRun) storage(fail func(error)) (*storage, error) {
	db := simStore{r.disk, r.steps}
	rules := &entries{LogStore: db, fail: fail}
	st := &storage{logs: rules, stable: &stableStore{StableStore: db}, rules: rules, close: func() error { return nil }}
	if r.node.cfg.KVStore == storeBolt {
		st.disk = &guard{db: db, fail: fail, path: "disk"}
		cache, err := raft.NewLogCache(logCacheEntries, st.disk)
		if err != nil {
			return nil, err
		}
		rules.LogStore, st.stable = cache, &stableStore{StableStore: st.disk}
	}
	var err error
	st.snapshots, err = newCheckedSnapshots(simSnapshots{r.disk.snapshots, r.steps}, rules)
	return st, err
}

// start starts a process of the node, with the disk that it has. If kept is not nil, it goes on with that instead, and
// with the steps of the process before. It does nothing when the node runs already, or the simulation is over.
func (n *simNode) start(kept *storage, steps *simSteps) {
	s := n.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || n.run.Load() != nil {
		return
	}
	n.disk.CompareAndSwap(nil, &simDisk{raft.NewInmemStore(), &memorySnapshots{}})
	r := &simRun{
		node: n, disk: n.disk.Load(), host: s.net.listen(n.id), steps: steps, goesOn: kept != nil,
		opened: make(chan struct{}), gone: make(chan struct{}),
	}
	if kept == nil {
		r.steps = &simSteps{}
	}
	r.steps.run.Store(r)
	machine := newMachine()
	log := hclog.New(&hclog.LoggerOptions{Name: n.id, Output: s.log, Level: hclog.Info, TimeFormat: "04:05.000"})
	r.store = NewStore(n.cfg, &simMachine{machine, n}, newMetrics(), log)
	r.kv = &KV{r.store, machine}
	r.store.port = r.host
	r.store.open = func(*Config, hclog.Logger, func(error)) (*storage, error) {
		if kept != nil {
			return kept, nil
		}
		return r.storage(func(err error) {
			r.stops(err)
			runtime.Goexit()
		})
	}
	if s.striking.Load() && s.random.IntN(2) == 0 {
		r.crashAt(1 + int64(s.random.IntN(1+s.random.IntN(100))))
	}
	n.run.Store(r)
	go r.open()
}

func (r *simRun) open() {
	defer close(r.opened)
	if err := r.store.Open(); err != nil {
		r.node.sim.t.Errorf("open %s: %v", r.node.id, err)
		return
	}
	r.running = true
	go r.supervise()
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

// supervise does what main does when the Store fails.
func (r *simRun) supervise() {
	var err error
	select {
	case err = <-r.store.Failed():
	case <-r.gone:
		return
	}
	again, n := new(startOver), r.node
	if !errors.As(err, &again) {
		r.stops(err)
		return
	}
	if !r.dead.CompareAndSwap(false, true) {
		return
	}
	n.sim.log.note(n.id, "starts over")
	n.run.Store(nil)
	close(r.gone)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = r.store.Shutdown(ctx)
	if again.storage == nil {
		n.empty.Store(true)
		if n.cfg.KVStore == storeMemory {
			n.disk.Store(nil)
		}
	}
	n.start(again.storage, r.steps)
}

// stops is called when the node stops by itself. People start it without state. Where a majority has lost its disks, a
// node may have executed what the others have lost.
func (r *simRun) stops(err error) {
	if !strings.Contains(err.Error(), "start it again to join the others") && r.node.sim.cures.Load() == 0 {
		r.node.sim.t.Errorf("%s stops: %v", r.node.id, err)
	}
	r.node.sim.log.note(r.node.id, err.Error())
	if r.crash(true, false) {
		r.node.comeBack(time.Second)
	}
}

// crash ends the process at once: its peers hear no more of it, and it stores no more.
func (r *simRun) crash(loses, silently bool) (crashed bool) {
	if !r.dead.CompareAndSwap(false, true) {
		return false // it has already
	}
	n := r.node
	r.host.crash(silently)
	n.sim.log.note(n.id, fmt.Sprintf("crashes; loses %v, silently %v", loses, silently))
	if loses || n.cfg.KVStore == storeMemory {
		n.disk.Store(nil)
		n.empty.Store(true)
		simTotals.losses.Add(1)
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
		} else {
			r.store.cancel()
		}
	}()
	return true
}

// comeBack starts a node that has crashed, after a while.
func (n *simNode) comeBack(after time.Duration) {
	go func() {
		time.Sleep(after)
		n.start(nil, nil)
	}()
}

// mayLose says whether the node may lose its state now.
func (s *sim) mayLose(n *simNode) bool {
	without := 1
	for _, other := range s.nodes {
		if other != n && other.empty.Load() {
			without++
		}
	}
	return s.lossy || without <= (len(s.nodes)-1)/2 || s.store == storeMemory && !s.settled.Load()
}

// strike crashes a process now, if its state may be lost, or if it may keep it.
func (s *sim) strike(r *simRun) {
	loses := s.mayLose(r.node) && (s.store == storeMemory || s.rand(4) == 0)
	if loses || s.store == storeBolt {
		if r.crash(loses, s.rand(2) == 0) {
			r.node.comeBack(s.upTo(time.Second << s.rand(4)))
		}
	}
}

// simMachine is a state machine that takes note of what it executes.
type simMachine struct {
	*kvMachine
	node *simNode
}

func (m *simMachine) Apply(encoded []byte, at time.Time) ([]byte, error) {
	result, err := m.kvMachine.Apply(encoded, at)
	if err != nil {
		return nil, err
	}
	if tag := Tag(binary.BigEndian.Uint64(result)); tag != 0 {
		s := m.node.sim
		s.mu.Lock()
		before, known := s.commands[tag]
		s.commands[tag] = string(encoded)
		s.mu.Unlock()
		if known && before != string(encoded) {
			s.t.Errorf("%s executes %q with tag %d, which was that of %q", m.node.id, encoded, tag, before)
		}
	}
	return result, nil
}

// watchLeaders makes sure that in each term of a cluster one node alone leads. It looks at terms in which a majority
// has followed the leader.
func (s *sim) watchLeaders(ctx context.Context) {
	leaders := make(map[string]string) // by cluster and term
	for ctx.Err() == nil {
		for _, n := range s.nodes {
			r := n.run.Load()
			if r == nil || r.store.ready.Load() == 0 {
				continue
			}
			term := fmt.Sprintf("%s, %d", s.cluster(r), r.store.ready.Load())
			if other := leaders[term]; other != "" && other != n.id {
				s.t.Errorf("both %s and %s have led in %s", other, n.id, term)
			}
			leaders[term] = n.id
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// cluster names the cluster that a process is of. What people have made of an older one is another.
func (s *sim) cluster(r *simRun) string {
	return fmt.Sprintf("%s, %d", r.store.form.id(), s.cures.Load())
}

// simHistory is all that clients did.
type simHistory struct {
	mu      sync.Mutex // guards what follows
	ops     []porcupine.Operation
	refused []string // values of which the Store said that they were certainly not written
}

func (h *simHistory) add(op porcupine.Operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

func (h *simHistory) all() []porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ops)
}

func (h *simHistory) refuse(value string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = append(h.refused, value)
}

// client makes operations until ctx ends, on a few keys that change every second, so that histories stay short.
func (s *sim) client(ctx context.Context, id int) {
	tags := make(map[string]uint64) // last seen, by key
	for ctx.Err() == nil {
		time.Sleep(rand.N(200 * time.Millisecond))
		op := kvOp{key: fmt.Sprintf("%d-%d", time.Now().Unix(), rand.IntN(3))}
		switch op.kind = []string{"put", "put", "put", "get", "get", "get", "get", "delete"}[rand.IntN(8)]; {
		case op.kind == "get":
		case rand.IntN(2) == 0:
			op.match = tags[op.key]
		}
		if out, ok := s.do(id, s.nodes[rand.IntN(len(s.nodes))], op); ok && !out.failed && out.tag != 0 {
			tags[op.key] = out.tag
		}
	}
}

// put writes a new value to the key k through a node, and says whether that was acknowledged.
func (s *sim) put(n *simNode) bool {
	out, ok := s.do(99, n, kvOp{kind: "put", key: "k"})
	return ok && !out.failed
}

// do makes an operation through a node and writes it down, unless it certainly did not happen. What a process says when
// it has crashed was never heard.
func (s *sim) do(id int, n *simNode, op kvOp) (out kvAnswer, ok bool) {
	r := n.run.Load()
	if r == nil {
		return out, false
	}
	if op.kind == "put" && op.value == "" {
		op.value = strconv.FormatInt(s.value.Add(1), 10)
	}
	done := porcupine.Operation{ClientId: id, Input: op, Call: s.clock.Add(1), Return: math.MaxInt64}
	type answer struct {
		kvAnswer
		err error
	}
	heard := make(chan answer, 1)
	go func() {
		out, err := r.do(op)
		heard <- answer{out, err}
	}()
	a := answer{err: ErrUnknownOutcome}
	select {
	case a = <-heard:
	case <-r.gone:
	}
	if r.dead.Load() {
		a = answer{err: ErrUnknownOutcome}
	}
	switch {
	case a.err == nil:
		a.known, done.Return = true, s.clock.Add(1)
	case op.kind == "put" && !errors.Is(a.err, ErrUnknownOutcome):
		s.h.refuse(op.value)
		return out, false
	case op.kind == "get" || !errors.Is(a.err, ErrUnknownOutcome):
		return out, false
	}
	done.Output, done.Metadata = a.kvAnswer, s.cluster(r)
	s.h.add(done)
	return a.kvAnswer, a.known
}

func (r *simRun) do(op kvOp) (out kvAnswer, err error) {
	var condition Condition
	if op.match != 0 {
		condition.Match = &Tags{List: []Tag{Tag(op.match)}}
	}
	var w Written
	switch op.kind {
	case "get":
		item, err := r.kv.Get(context.Background(), op.key, Linearizable)
		return simItem(item), err
	case "put":
		if w, err = r.kv.Set(context.Background(), []Pair{{op.key, op.value}}, condition); err == nil {
			out.tag = uint64(w.Tag)
		}
	case "delete":
		_, err = r.kv.Delete(context.Background(), op.key, condition)
	}
	if errors.Is(err, ErrCondition) {
		return kvAnswer{failed: true}, nil
	}
	return out, err
}

func simItem(item Item) kvAnswer {
	if item.Tag == 0 {
		return kvAnswer{value: "null"}
	}
	return kvAnswer{value: item.Value, tag: uint64(item.Tag)}
}

// live forms a cluster under faults, and then has clients use it under faults for some time.
func (s *sim) live(d time.Duration) {
	began := time.Now()
	s.striking.Store(true)
	for _, n := range s.nodes {
		n.comeBack(s.upTo(2 * time.Second))
	}
	for range s.rand(20) {
		s.fault()
	}
	s.heal()
	s.settled.Store(true)
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() { s.client(ctx, i) })
	}
	for time.Since(began) < d && !s.t.Failed() {
		s.striking.Store(true)
		for range 1 + s.rand(8) {
			s.fault()
		}
		s.heal()
	}
	cancel()
	clients.Wait()
	s.compare()
}

// fault injects a fault, and mends most of those that are no crashes after a while.
func (s *sim) fault() {
	simTotals.faults.Add(1)
	victim := s.nodes[s.rand(len(s.nodes))]
	if leader := s.leader(); leader != nil && s.rand(3) == 0 {
		victim = leader
	}
	var mended func()
	kind := s.rand(9)
	s.log.note(victim.id, fmt.Sprintf("fault %d", kind))
	switch kind {
	case 0: // a crash
		if r := victim.run.Load(); r != nil {
			s.strike(r)
		}
	case 1: // crashes of several nodes
		for _, n := range s.nodes {
			if r := n.run.Load(); r != nil && s.rand(2) == 0 {
				s.strike(r)
			}
		}
	case 2, 3: // a crash at some step to come
		if r := victim.run.Load(); r != nil {
			r.crashAt(1 + int64(s.rand(1+s.rand(200))))
		}
	case 4: // a node that is told to stand for election: the leader that told it so may be none any more
		s.stand(victim)
	case 5: // a node cut off
		mended = s.links(func(from, to *simNode) bool { return from == victim || to == victim }, linkState{cut: true})
	case 6: // messages of one node, or to it, held back
		from := s.rand(2) == 0
		mended = s.links(func(a, b *simNode) bool { return from && a == victim || !from && b == victim }, linkState{hold: s.some()})
	case 7: // some links
		mended = s.links(func(*simNode, *simNode) bool { return s.rand(3) == 0 }, linkState{hold: s.some()})
	case 8: // votes
		mended = s.links(func(*simNode, *simNode) bool { return s.rand(2) == 0 }, linkState{hold: votesOnly})
		if s.rand(2) == 0 {
			s.stand(victim)
		}
	}
	time.Sleep(s.upTo(3 * time.Second >> s.rand(5)))
	if mended != nil && s.rand(4) > 0 {
		mended()
	}
}

// some returns what a link holds back.
func (s *sim) some() func(simMessage) bool {
	return []func(simMessage) bool{anything, raftOnly, votesOnly, func(m simMessage) bool { return m.isRequest(rpcAppendEntries) }}[s.rand(4)]
}

// links changes links, and returns what opens them again.
func (s *sim) links(which func(from, to *simNode) bool, state linkState) (open func()) {
	var changed [][2]string
	for _, from := range s.nodes {
		for _, to := range s.nodes {
			if from != to && which(from, to) {
				s.net.set(from.id, to.id, state)
				changed = append(changed, [2]string{from.id, to.id})
			}
		}
	}
	return func() {
		for _, link := range changed {
			s.net.set(link[0], link[1], linkState{})
		}
	}
}

// stand has a node stand for election at once: it gets the message with which a leader hands over.
func (s *sim) stand(n *simNode) {
	for _, from := range s.nodes {
		if r := from.run.Load(); from != n && r != nil && r.store.raft.Load() != nil {
			s.standBy(n, from)
			return
		}
	}
}

// standBy is stand with a message from the given node.
func (s *sim) standBy(n, from *simNode) {
	r := from.run.Load()
	if r == nil || r.store.raft.Load() == nil {
		return
	}
	go func() {
		id := []byte(from.id)
		_ = r.store.transport.TimeoutNow(raft.ServerID(n.id), raft.ServerAddress(n.id),
			&raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: id, Addr: id}}, new(raft.TimeoutNowResponse))
	}()
}

// leads says whether the node leads and has executed all that was acknowledged before.
func (n *simNode) leads() bool {
	r := n.run.Load()
	return r != nil && r.store.State().State == "leader" && r.store.ready.Load() == r.store.State().Term
}

// leader returns a node that leads, nil if there is none.
func (s *sim) leader() *simNode {
	for _, n := range s.nodes {
		if n.leads() {
			return n
		}
	}
	return nil
}

// heal ends all faults and makes sure that all nodes are ready in time.
func (s *sim) heal() {
	s.striking.Store(false)
	s.links(func(*simNode, *simNode) bool { return true }, linkState{})
	for _, n := range s.nodes {
		if r := n.run.Load(); r != nil {
			r.steps.trap.Store(nil)
		}
	}
	for slices.ContainsFunc(s.nodes, func(n *simNode) bool { return n.run.Load() == nil }) {
		time.Sleep(10 * time.Millisecond)
	}
	limit := 10 * time.Second
	if s.store == storeMemory && (s.lossy || !s.settled.Load()) {
		limit += formPatience
	}
	if s.store == storeBolt && s.lossy {
		for range 3 { // what is lost may be so for several reasons, one after the other
			if s.soon(limit+formPatience, s.allReady) {
				break
			}
			s.cure()
		}
	}
	s.await(limit, "all nodes to be ready", s.allReady)
	for _, n := range s.nodes {
		if r := n.run.Load(); r != nil && r.goesOn && !r.store.Status().WritesMayBeLost {
			s.t.Errorf("%s goes on as the survivor of a majority, but does not say that writes may be lost", n.id)
		}
	}
}

func (s *sim) allReady() bool {
	return !slices.ContainsFunc(s.nodes, func(n *simNode) bool {
		r := n.run.Load()
		return r == nil || r.store.Ready() != nil
	})
}

// soon waits until something is so, and says whether it came about in time.
func (s *sim) soon(limit time.Duration, so func() bool) bool {
	for deadline := time.Now().Add(limit); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// await is soon for what must be so in time.
func (s *sim) await(limit time.Duration, what string, so func() bool) {
	if s.soon(limit, so) {
		return
	}
	s.t.Errorf("waited %v in vain for %s", limit, what)
	for _, n := range s.nodes {
		if r := n.run.Load(); r != nil {
			s.t.Logf("%s: ready: %v; %+v", n.id, r.store.Ready(), r.store.State())
		}
	}
}

var simAdvice = regexp.MustCompile(`stop node (\w+), .* copy its STATE_DIR`)

// cure does what the nodes advise people to do when a majority has lost its disks. Nobody tells the cluster, so it may
// give out the tags of lost writes again.
func (s *sim) cure() {
	s.cures.Add(1)
	s.mu.Lock()
	clear(s.commands)
	s.mu.Unlock()
	copies := len(s.nodes)/2 + 1
	var source *simDisk
	for _, n := range s.nodes {
		r := n.run.Load()
		if r == nil || r.store.Ready() == nil {
			continue
		}
		reason := r.store.Ready().Error()
		if strings.Contains(reason, "move STATE_DIR") {
			r.crash(true, false)
		} else if m := simAdvice.FindStringSubmatch(reason); m != nil && source == nil {
			i := slices.IndexFunc(s.nodes, func(n *simNode) bool { return n.id == m[1] })
			source = s.nodes[i].disk.Load()
			s.nodes[i].run.Load().crash(false, false)
			copies--
		}
	}
	for _, n := range s.nodes {
		if r := n.run.Load(); r != nil && source != nil && r.store.form.id() == "" && copies > 0 {
			r.crash(true, false)
			n.disk.Store(source.copy())
			copies--
		}
		if n.run.Load() == nil {
			n.start(nil, nil)
		}
	}
}

func (d *simDisk) copy() *simDisk {
	c := &simDisk{raft.NewInmemStore(), &memorySnapshots{newest: d.snapshots.newest}}
	for _, key := range [][]byte{keyCluster, keyCurrentTerm, keyVote} {
		if val, err := d.Get(key); err == nil {
			_ = c.Set(key, val)
		}
	}
	first, _ := d.FirstIndex()
	last, _ := d.LastIndex()
	for i := first; i <= last; i++ {
		if l := new(raft.Log); d.GetLog(i, l) == nil {
			_ = c.StoreLogs([]*raft.Log{l})
		}
	}
	return c
}

// compare has every node tell all it has. That ends the history.
func (s *sim) compare() {
	keys := make(map[string]bool)
	for _, op := range s.h.all() {
		keys[op.Input.(kvOp).key] = true
	}
	for _, n := range s.nodes {
		r := n.run.Load()
		if r == nil {
			continue
		}
		if err := r.store.Read(context.Background(), Linearizable, func() {
			for key := range keys {
				item, _ := r.kv.machine.items.Get(key)
				s.h.add(porcupine.Operation{
					Input: kvOp{kind: "get", key: key}, Output: func() kvAnswer { a := simItem(item); a.known = true; return a }(),
					Call: s.clock.Add(1), Return: s.clock.Add(1), Metadata: s.cluster(r),
				})
			}
		}); err != nil {
			s.t.Errorf("%s cannot be read at the end: %v", n.id, err)
		}
	}
}

// judge looks for an order in which all answers are right, key by key. A key whose history goes on in another cluster,
// after a majority had lost its state, is not judged.
func (s *sim) judge() {
	keys := make(map[string][]porcupine.Operation)
	cluster := make(map[string]string) // by key
	first := make(map[string]int64)    // when a cluster acknowledged its first write
	var writes []porcupine.Operation
	h := newHistory(s.t.Errorf)
	h.lossy = s.lossy
	if s.cures.Load() > 0 { // people have set the state back, tags with it
		h.report = s.t.Logf
	}
	for _, value := range s.h.refused {
		h.refuse(value, "the Store said so")
	}
	for _, op := range s.h.all() {
		in, out := op.Input.(kvOp), op.Output.(kvAnswer)
		h.add(op.ClientId, in, out, time.Duration(op.Call), time.Duration(op.Return))
		keys[in.key] = append(keys[in.key], op)
		if !out.known {
			continue
		}
		of := op.Metadata.(string)
		if was, known := cluster[in.key]; known && was != of {
			of = "several"
		}
		cluster[in.key] = of
		if in.kind == "put" && !out.failed {
			writes = append(writes, op)
			if at, known := first[op.Metadata.(string)]; !known || op.Return < at {
				first[op.Metadata.(string)] = op.Return
			}
		}
	}
	if len(first) > 1 && !s.lossy {
		s.t.Errorf("%d clusters have acknowledged writes; want one", len(first))
	}
	slices.SortFunc(writes, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	byReturn := slices.Clone(writes)
	slices.SortFunc(byReturn, func(a, b porcupine.Operation) int { return int(a.Return - b.Return) })
	newest := uint64(0)
	for _, op := range writes {
		for ; len(byReturn) > 0 && byReturn[0].Return < op.Call; byReturn = byReturn[1:] {
			newest = max(newest, simTag(byReturn[0]))
		}
		if simTag(op) <= newest && s.cures.Load() == 0 {
			s.t.Errorf("%+v got tag %d, after tag %d had been given out", op.Input, simTag(op), newest)
		}
		for other, at := range first {
			if of := op.Metadata.(string); other != of && at < op.Call && first[of] < at {
				s.t.Errorf("cluster %s acknowledged %+v, which began when cluster %s had acknowledged another write", of, op.Input, other)
			}
		}
	}
	for key, ops := range keys {
		if cluster[key] == "several" {
			continue
		}
		if got := check(h.refine(ops)); got != porcupine.Ok {
			s.t.Errorf("the history of %s, with %d operations, is %v; want it linearizable:%s", key, len(ops), got, describe(ops))
		}
	}
}

func simTag(op porcupine.Operation) uint64 { return op.Output.(kvAnswer).tag }

// simLogWriter keeps the end of what the nodes log.
type simLogWriter struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (w *simLogWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lines = append(w.lines, string(p)); len(w.lines) > 2000 {
		w.lines = slices.Clone(w.lines[1000:])
	}
	if *simLog {
		_, _ = os.Stderr.Write(p)
	}
	return len(p), nil
}

func (w *simLogWriter) note(node, what string) {
	_, _ = fmt.Fprintf(w, "%s %s %s\n", time.Now().Format("04:05.000"), node, what)
}

func (w *simLogWriter) last() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.lines[max(0, len(w.lines)-400):], "")
}
