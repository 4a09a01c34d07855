package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The simulation: clusters of real Stores in one process, on a network in memory (simnet_test.go) and on a clock that
// jumps to whatever happens next (testing/synctest), so that hours pass in seconds. Nodes crash between any two calls to
// their storage and come back with it or with nothing (simnode_test.go); links are cut, or hold messages back
// (simfault_test.go). Clients write and read meanwhile (simclient_test.go). A seed decides which faults come, and no more
// than that: Raft's timeouts, the delays of messages and the order in which goroutines run differ from run to run, so a
// seed that fails may pass the next time.

var (
	simSeed = flag.Uint64("sim.seed", 1, "seed of the first simulated cluster of each kind")
	simRuns = flag.Int("sim.runs", 1, "how many seeds of each kind are simulated")
	simTime = flag.Duration("sim.time", 2*time.Minute, "how long faults strike each cluster, by its own clock")
	simLog  = flag.Bool("sim.log", false, "write what the nodes log to standard error")
)

// simTotals is what all simulations came to.
var simTotals struct{ clusters, crashes, losses, faults, deaths, cures, unexecuted, ops, elapsed atomic.Int64 }

func reportTotals(t *testing.T) {
	t.Helper()
	s := &simTotals
	t.Logf("%d clusters lived for %v; %d faults, %d crashes, %d of them with all state lost; %d operations checked", s.clusters.Load(),
		time.Duration(s.elapsed.Load()).Round(time.Second), s.faults.Load(), s.crashes.Load(), s.losses.Load(), s.ops.Load())
	t.Logf("%d clusters lost a majority, and people brought %d back; the nodes that they saved had %d acknowledged writes in the log that "+
		"they did not serve", s.deaths.Load(), s.cures.Load(), s.unexecuted.Load())
}

func TestSimulation(t *testing.T) {
	t.Cleanup(func() { reportTotals(t) })
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

	striking  atomic.Bool // faults come
	stillborn atomic.Bool // when the cluster was begun, a majority of those that it names had lost its state already

	lists *simLists // in use; nil where all nodes are in the list all the time

	losing sync.Mutex // held from the decision that a node may lose its state until it has

	mu       sync.Mutex        // guards what follows
	random   *rand.Rand        // of the faults
	commands map[uint64]string // executed
	deaths   map[string]int64
	restored map[string]bool // keys that people have written back
	over     bool
}

// simulate runs a simulation and judges what clients saw.
func simulate(t *testing.T, store string, n int, seed uint64, run func(s *sim)) {
	t.Helper()
	s := &sim{
		store: store, log: &simLogWriter{}, random: rand.New(rand.NewPCG(seed, uint64(n))),
		commands: make(map[uint64]string), deaths: make(map[string]int64), restored: make(map[string]bool),
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

// watchLeaders makes sure that in each term of a cluster one server alone leads. It looks at terms in which a majority
// has followed the leader.
func (s *sim) watchLeaders(ctx context.Context) {
	leaders := make(map[string]string) // by cluster and term
	for ctx.Err() == nil {
		for _, n := range s.nodes {
			r := n.run.Load()
			if r == nil || r.store.ready.load() == 0 {
				continue
			}
			server, cluster := r.store.self()
			term := fmt.Sprintf("%s, %d", cluster, r.store.ready.load())
			if other := leaders[term]; other != "" && other != server {
				s.t.Errorf("both %s and %s have led in %s", other, server, term)
			}
			leaders[term] = server
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// leads says whether the node leads and has executed all that was acknowledged before.
func (n *simNode) leads() bool {
	r := n.run.Load()
	return r != nil && r.store.leadsReady()
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

func (s *sim) allReady() bool {
	return !slices.ContainsFunc(s.nodes, func(n *simNode) bool { return n.belongs() && !n.ready() })
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
			s.t.Logf("%s: ready: %v; %+v; %+v", n.id, r.store.Ready(), r.store.State(), r.store.members())
		}
	}
}

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
