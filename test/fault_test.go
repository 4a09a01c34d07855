package test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/http"
	"os"
	"raftstarter/test/history"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The fault suite: clients write and read through all nodes of a cluster of real processes while faults are injected, and
// the history of what they did is judged. A seed decides which faults come; when they strike is up to the machine.
// go test -v -run Fault -fault.seed=N -fault.time=60s replays one; _scripts/faults.sh runs many.
//
// A majority always keeps its state, for nothing is promised without it. A node is without state from the moment that
// it is wiped, or with memory ends in whatever way, until it is ready again; see lose.

var (
	faultSeed  = flag.Uint64("fault.seed", 1, "seed of the faults")
	faultTime  = flag.Duration("fault.time", 20*time.Second, "how long faults are injected into each cluster")
	faultName  = flag.String("fault.class", "mixed", "the class of faults, of those in fault_classes_test.go, or mixed")
	faultPace  = flag.Duration("fault.pace", 40*time.Millisecond, "how long a client rests between two operations")
	faultProxy = flag.Bool("fault.proxy", false, "cut links by proxies even where network namespaces may be made")
	faultClock = flag.Bool("fault.clock", false, "set this machine's clock, too, for moments; it needs root")
)

// readyLimit is how long nodes may take to be ready, on a busy machine, once nothing is in their way.
const readyLimit = 30 * time.Second

func TestFaults(t *testing.T) {
	t.Parallel()
	if names := classNames(); !slices.Contains(names, *faultName) {
		t.Fatalf("-fault.class=%s is none of: %s", *faultName, strings.Join(names, " "))
	}
	var clusters sync.WaitGroup // at once, for they mostly wait
	defer clusters.Wait()
	for _, tc := range []struct {
		store string
		nodes int
	}{{storeBolt, 3}, {storeBolt, 5}, {storeMemory, 3}, {storeMemory, 5}} {
		clusters.Go(func() {
			t.Run(fmt.Sprintf("%s-%d", tc.store, tc.nodes), func(t *testing.T) { injectFaults(t, tc.store, tc.nodes) })
		})
	}
}

// faulty is a cluster to which faults happen.
type faulty struct {
	*recorder
	t     *testing.T
	store string
	nodes []*proc
	asked []*atomic.Bool // by node: its newest process was told to end
	wires wires
	web   *http.Client
	teams []*team

	// Used by the only class at a time that stops processes, and between faults:
	lost   []bool // by node: it is without state
	rounds int

	measures  sync.WaitGroup
	mu        sync.Mutex // guards what follows
	recovered []time.Duration
	ready     time.Duration // the longest that a node took to be ready
	logs      [][]string    // by node: the files of its runs
}

func newFaulty(t *testing.T, prepare func(*testing.T, *proc), store string, n int) *faulty {
	t.Helper()
	f := &faulty{t: t, recorder: &recorder{history.New(t.Errorf)}, store: store}
	f.asked, f.lost, f.logs = make([]*atomic.Bool, n), make([]bool, n), make([][]string, n)
	for i := range n {
		p := newProc(t, map[string]string{
			"NODE_ID": fmt.Sprintf("node%d", i+1), "KV_STORE": store,
			"SNAPSHOT_THRESHOLD": "500", "SNAPSHOT_INTERVAL": "300ms", "TRAILING_LOGS": "50",
		})
		p.name = p.env["NODE_ID"]
		if prepare != nil {
			prepare(t, p)
		}
		f.nodes = append(f.nodes, p)
	}
	for i := range 2 * n {
		f.teams = append(f.teams, &team{name: strconv.Itoa(i), tags: make(map[string]uint64)})
	}
	err := errors.New("as asked")
	if !*faultProxy {
		f.wires, err = newNamespaces(t, f.nodes)
	}
	if err != nil {
		t.Logf("links are cut by proxies: %v", err)
		f.wires = newProxies(t, f.nodes)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 100, DialContext: f.nodes[0].dial}
	t.Cleanup(transport.CloseIdleConnections)
	f.web = &http.Client{Timeout: 15*time.Second + slack, Transport: transport}
	for i := range f.nodes {
		f.start(i)
	}
	return f
}

func injectFaults(t *testing.T, store string, n int) { //nolint:thelper // it is the test

	t.Logf("replay with: go test -v -run %s -fault.class=%s -fault.seed=%d -fault.time=%v", t.Name(), *faultName, *faultSeed, *faultTime)
	classes, prepare := choose(*faultName, store, n)
	if len(classes) == 0 {
		t.Skipf("%s does not apply to this cluster", *faultName)
	}
	f := newFaulty(t, prepare, store, n)
	defer func() { // all that runs is ended with the test
		for _, asked := range f.asked {
			asked.Store(true)
		}
	}()
	f.awaitReady(f.Now())
	feeds := f.follow()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients sync.WaitGroup
	for i := range 4 * len(f.teams) {
		clients.Go(func() { f.client(ctx, i, rand.New(rand.NewPCG(*faultSeed, uint64(100+i)))) })
	}
	for i := range f.nodes {
		clients.Go(func() { f.probe(ctx, i) })
	}
	faults, name := 0, fnv.New64()
	_, _ = name.Write([]byte(t.Name()))
	random := rand.New(rand.NewPCG(*faultSeed, name.Sum64()))
	for began := f.Now(); f.Now()-began < *faultTime && f.Violations.Load() == 0; {
		faults += f.round(rand.New(rand.NewPCG(random.Uint64(), 0)), classes)
	}
	cancel()
	clients.Wait()
	f.finish()
	lines, unseen := feeds.judge()
	f.Judge()
	slices.Sort(f.recovered)
	ms := make([]string, len(f.recovered))
	for i, took := range f.recovered {
		ms[i] = strconv.FormatInt(took.Milliseconds(), 10)
	}
	t.Logf("FAULTS class=%s cluster=%s-%d seed=%d faults=%d ops=%d unknown=%d keys=%d lines=%d gaps=%d unseen=%d violations=%d ready=%d recovery=%s",
		*faultName, store, n, *faultSeed, faults, f.Count, f.Unknown, len(f.Ops), lines, len(feeds.gaps), unseen,
		f.Violations.Load(), f.ready.Milliseconds(), strings.Join(ms, ","))
}

// round lets the cluster work in peace for a moment, injects faults of the classes, all at once, and waits until service
// is back and all nodes are ready.
func (f *faulty) round(random *rand.Rand, classes []faultClass) int {
	f.sleep(random, 200, 1000)
	leader := f.leader()
	if leader < 0 {
		return 0
	}
	if len(classes) > 1 { // mixed: one of those that stop processes, one of the others, or one of each
		pick := func(process bool) faultClass {
			some := slices.DeleteFunc(slices.Clone(classes), func(c faultClass) bool { return c.process != process })
			return some[random.IntN(len(some))]
		}
		classes = []faultClass{pick(true), pick(false)}
		if n := random.IntN(3); n < 2 {
			classes = classes[n : n+1]
		}
	}
	f.freshKeys()
	measured := len(f.recovered)
	var faults sync.WaitGroup
	for _, class := range classes {
		f.t.Logf("after %v: %s, while node%d leads", f.Now().Round(time.Millisecond), class.name, leader+1)
		random := rand.New(rand.NewPCG(random.Uint64(), 0))
		faults.Go(func() { class.inject(f, random, leader) })
	}
	faults.Wait()
	if f.Violations.Load() > 0 {
		return len(classes) // the faults may have been broken off
	}
	healed := f.Now()
	f.freshKeys()
	f.measures.Wait()
	if len(f.recovered) == measured { // else the class has measured from some moment before
		f.measure(healed)
		f.measures.Wait()
	}
	if took := f.Now() - healed; took > 10*time.Second {
		f.Violation("a write was acknowledged %v after healing; want 10s at most", took)
	}
	f.awaitReady(healed)
	f.agree(healed)
	return len(classes)
}

// agree checks that every node answers a linearizable read with what has just been written.
func (f *faulty) agree(since time.Duration) {
	f.rounds++
	key := fmt.Sprintf("round-%d", f.rounds) // a fresh one: an earlier try may still be under way
	want := fmt.Sprintf(`{%q:%d}`, key, f.rounds)
	f.await("a write when all are ready", since, readyLimit, func() bool {
		a, err := f.ask(f.rounds%len(f.nodes), http.MethodPut, "/key/"+key, strconv.Itoa(f.rounds))
		return err == nil && a.status == http.StatusOK
	})
	for i, p := range f.nodes {
		var a answerTo
		answered := f.await("a linearizable read through "+p.name, since, readyLimit, func() bool {
			var err error
			a, err = f.ask(i, http.MethodGet, "/key/"+key, "")
			return err == nil && a.status == http.StatusOK
		})
		if answered && a.body != want {
			f.Violation("got %s through %s after healing; want %s", a.body, p.name, want)
		}
	}
}

func (f *faulty) sleep(random *rand.Rand, least, most int) {
	time.Sleep(time.Duration(least+random.IntN(most-least)) * time.Millisecond)
}

func (f *faulty) freshKeys() {
	for _, team := range f.teams {
		team.fresh()
	}
}

// start starts nodes, which must run until they are told to end.
func (f *faulty) start(nodes ...int) {
	for _, i := range nodes {
		p, asked := f.nodes[i], new(atomic.Bool)
		f.mu.Lock()
		f.logs[i] = append(f.logs[i], "") // first, since the new process may answer at once
		f.mu.Unlock()
		p.start()
		f.mu.Lock()
		f.logs[i][len(f.logs[i])-1] = p.stderr
		f.mu.Unlock()
		f.asked[i] = asked
		ended := p.ended
		go func() {
			if <-ended; !asked.Load() {
				f.Violation("%s has ended; nobody told it to", p.name)
			}
		}()
	}
}

// runOf returns how often a node has been started.
func (f *faulty) runOf(node int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.logs[node])
}

// lose takes note that nodes are about to lose their state. It first waits until so many of those that lost theirs
// before are ready again that a majority keeps its own. If they are not in time, the class ends there.
func (f *faulty) lose(nodes ...int) {
	kept := f.await("nodes without state to be ready", f.Now(), readyLimit, func() bool {
		without := len(nodes)
		for i, lost := range f.lost {
			if lost && !slices.Contains(nodes, i) {
				if f.lost[i] = !f.isReady(i); f.lost[i] {
					without++
				}
			}
		}
		return without <= f.minority()
	})
	if !kept {
		runtime.Goexit()
	}
	for _, i := range nodes {
		f.lost[i] = true
	}
}

// minority is how many nodes may be without state, or away, at a time.
func (f *faulty) minority() int { return (len(f.nodes) - 1) / 2 }

// end ends nodes by a signal: SIGKILL, or SIGTERM, by which they must end as they should.
func (f *faulty) end(sig os.Signal, nodes ...int) {
	if f.store == storeMemory {
		f.lose(nodes...)
	}
	for _, i := range nodes {
		f.asked[i].Store(true)
		f.nodes[i].signal(sig)
	}
	for _, i := range nodes {
		f.nodes[i].exits(map[os.Signal]int{os.Kill: -1, syscall.SIGTERM: exitOK}[sig], stopLimit)
	}
}

// wipe kills nodes and removes all that they have stored.
func (f *faulty) wipe(nodes ...int) {
	f.lose(nodes...)
	f.end(os.Kill, nodes...)
	f.remove(nodes...)
}

// remove removes what nodes have stored, which do not run.
func (f *faulty) remove(nodes ...int) {
	for _, i := range nodes {
		if err := os.RemoveAll(f.nodes[i].env["STATE_DIR"]); err != nil {
			f.t.Error(err)
		}
	}
}

// ask makes a request that is no part of the history. It may be called from any goroutine.
func (f *faulty) ask(i int, method, path, body string) (answerTo, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, f.nodes[i].url()+path, strings.NewReader(body))
	if err != nil {
		return answerTo{}, err
	}
	return roundTrip(f.web, req)
}

// await waits until condition holds, no longer than limit after since, and returns whether it does.
func (f *faulty) await(what string, since, limit time.Duration, condition func() bool) bool {
	for !condition() {
		if f.Now()-since > limit {
			f.Violation("waited in vain for %s", what)
			return false
		}
		time.Sleep(5 * time.Millisecond)
	}
	return true
}

type faultyStatus struct {
	Leader  string
	Applied uint64 `json:"applied_index"`
}

func (f *faulty) status(i int) (s faultyStatus) {
	if a, err := f.ask(i, http.MethodGet, "/status", ""); err == nil {
		_ = json.Unmarshal([]byte(a.body), &s) // it stays empty
	}
	return s
}

// leader returns the node that most nodes take for the leader, or -1 when there is none for long.
func (f *faulty) leader() (leader int) {
	f.await("a leader", f.Now(), 15*time.Second, func() bool {
		votes := make(map[string]int)
		leader = -1
		for i := range f.nodes {
			name := f.status(i).Leader
			if votes[name]++; name != "" && votes[name] > len(f.nodes)/2 {
				leader = slices.IndexFunc(f.nodes, func(p *proc) bool { return p.name == name })
			}
		}
		return leader >= 0
	})
	return leader
}

// measure notes how long it takes from since until a client that tries the nodes in turn gets a write acknowledged.
func (f *faulty) measure(since time.Duration) {
	f.measures.Go(func() {
		i := 0
		f.await("a write to be acknowledged", since, 30*time.Second, func() bool {
			a, err := f.ask(i%len(f.nodes), http.MethodPut, "/key/recovery", strconv.Itoa(i))
			i++
			return err == nil && a.status == http.StatusOK
		})
		took := f.Now() - since
		f.mu.Lock()
		defer f.mu.Unlock()
		f.recovered = append(f.recovered, took)
	})
}

func (f *faulty) isReady(i int) bool {
	a, err := f.ask(i, http.MethodGet, "/readyz", "")
	return err == nil && a.status == http.StatusOK
}

// awaitReady waits until all nodes are ready, or those that are named.
func (f *faulty) awaitReady(since time.Duration, nodes ...int) {
	for i, p := range f.nodes {
		if len(nodes) > 0 && !slices.Contains(nodes, i) {
			continue
		}
		if f.await(p.name+" to be ready", since, readyLimit, func() bool { return f.isReady(i) }) {
			f.lost[i] = false
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ready = max(f.ready, f.Now()-since)
}

// client makes one operation after another, through one node as long as that serves.
func (f *faulty) client(ctx context.Context, id int, random *rand.Rand) {
	node, team := id, f.teams[id%len(f.teams)]
	for n := 0; ctx.Err() == nil; n++ {
		op := team.next(random, fmt.Sprintf(`"%d.%d"`, id, n))
		out, err := f.do(f.web, f.nodes[node%len(f.nodes)].url(), id, op)
		team.learn(op, out)
		if err != nil {
			f.sleep(random, 20, 60)
			node++
		}
		time.Sleep(time.Duration(random.Int64N(2*int64(*faultPace) + 1)))
	}
}

// probe reads through a node again and again without waiting for answers: where clients wait until a pause or a cut is
// over, reads still arrive, of what was written elsewhere in the meantime.
func (f *faulty) probe(ctx context.Context, node int) {
	slots := make(chan struct{}, 50)
	var reads sync.WaitGroup
	defer reads.Wait()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ctx.Err() == nil; n++ {
		<-tick.C
		select {
		case slots <- struct{}{}:
		default:
			continue
		}
		reads.Go(func() {
			_, _ = f.do(f.web, f.nodes[node].url(), -1, history.Op{Kind: "get", Key: f.teams[n%len(f.teams)].key(n / len(f.teams))})
			<-slots
		})
	}
}

// finish reads everything once more through every node, into the history, and then compares what the nodes have by
// themselves: all the same, once they have executed the same.
func (f *faulty) finish() {
	for _, p := range f.nodes {
		var err error
		f.await("a listing through "+p.name, f.Now(), 15*time.Second, func() bool {
			_, err = f.list(f.web, p.url(), "linearizable")
			return err == nil
		})
	}
	states, applied := make([]string, len(f.nodes)), make([]uint64, len(f.nodes))
	indexes := func() (at []uint64) {
		for i := range f.nodes {
			at = append(at, f.status(i).Applied)
		}
		return at
	}
	f.await("equal state on all nodes", f.Now(), 15*time.Second, func() bool {
		applied = indexes()
		for i, p := range f.nodes {
			states[i], _ = f.list(f.web, p.url(), "stale")
		}
		return len(slices.Compact(slices.Clone(states))) == 1 && states[0] != "" &&
			len(slices.Compact(slices.Clone(applied))) == 1 && slices.Equal(applied, indexes())
	})
}
