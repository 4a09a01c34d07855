package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// The fault suite: clients write and read through all nodes of a cluster of real processes while faults are injected;
// then it is checked that there is an order of the operations, each between its call and its answer, in which every
// answer is right (Herlihy and Wing's linearizability). A seed decides which faults come; when they strike is up to the
// machine. go test -run Fault -fault.seed=N -fault.time=60s replays one.

var (
	faultSeed = flag.Uint64("fault.seed", 1, "seed of the faults")
	faultTime = flag.Duration("fault.time", 8*time.Second, "how long faults are injected into each cluster")
)

func TestFaults(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		store string
		nodes int
	}{{storeBolt, 3}, {storeMemory, 3}, {storeMemory, 5}} {
		t.Run(fmt.Sprintf("%s, %d nodes", tc.store, tc.nodes), func(t *testing.T) { injectFaults(t, tc.store, tc.nodes) })
	}
}

// faulty is a cluster of processes in which every node reaches every other through a link of its own.
type faulty struct {
	t     *testing.T
	nodes []*proc
	links map[[2]int]*link2
	down  []atomic.Bool // by node: paused or dead, so clients leave it alone
	h     history
}

func newFaulty(t *testing.T, store string, n int) *faulty {
	t.Helper()
	f := &faulty{t: t, links: make(map[[2]int]*link2), down: make([]atomic.Bool, n)}
	for i := range n {
		f.nodes = append(f.nodes, newProc(t, map[string]string{
			"NODE_ID": fmt.Sprintf("node%d", i+1), "KV_STORE": store, "SNAPSHOT_THRESHOLD": "500", "SNAPSHOT_INTERVAL": "300ms", "TRAILING_LOGS": "50",
		}))
		f.nodes[i].name = f.nodes[i].env["NODE_ID"]
	}
	for i, p := range f.nodes {
		var peers []string
		for j, q := range f.nodes {
			addr := q.env["RAFT_ADDR"] + ":" + q.env["RAFT_PORT"]
			if i != j {
				l := newLink(t, addr)
				f.links[[2]int{i, j}], addr = l, l.addr
			}
			peers = append(peers, q.name+"@"+addr)
		}
		p.env["PEERS"] = strings.Join(peers, ",")
		_, port, _ := net.SplitHostPort(p.env["RAFT_ADDR"] + ":" + p.env["RAFT_PORT"])
		p.env["RAFT_ADVERTISE_ADDR"], p.env["RAFT_ADVERTISE_PORT"] = p.env["RAFT_ADDR"], port
	}
	startAll(f.nodes...)
	return f
}

func injectFaults(t *testing.T, store string, n int) {
	t.Helper()
	seed := *faultSeed
	t.Logf("replay with: go test -run 'TestFaults/%s' -fault.seed=%d -fault.time=%v", strings.ReplaceAll(t.Name(), "TestFaults/", ""), seed, *faultTime)
	f := newFaulty(t, store, n)
	random := rand.New(rand.NewPCG(seed, uint64(n)))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients sync.WaitGroup
	for i := range 8 * n {
		clients.Go(func() { f.client(ctx, i, rand.New(rand.NewPCG(seed, uint64(100+i)))) })
	}
	var recoveries []time.Duration
	faults := 0
	for began := time.Now(); time.Since(began) < *faultTime; faults++ {
		if took, measured := f.fault(random, store); measured {
			recoveries = append(recoveries, took)
		}
	}
	cancel()
	clients.Wait()
	f.check()
	slices.Sort(recoveries)
	if len(recoveries) > 0 {
		t.Logf("%d faults, %d operations checked; a write was acknowledged %v after a leader's death in the median, %v at most",
			faults, len(f.h.ops), recoveries[len(recoveries)/2], recoveries[len(recoveries)-1])
	}
}

// fault injects one fault, waits a little, mends it, and waits until all nodes are ready. It returns how long it took
// until a write was acknowledged after the death of the leader, if that was the fault.
func (f *faulty) fault(random *rand.Rand, store string) (recovery time.Duration, measured bool) {
	leader := -1
	waitFor(f.t, "a leader", func() bool {
		name := f.nodes[0].status().Leader
		leader = slices.IndexFunc(f.nodes, func(p *proc) bool { return p.name == name })
		return leader >= 0
	})
	victim := leader
	if random.IntN(2) == 0 {
		victim = random.IntN(len(f.nodes))
	}
	pause := time.Duration(500+random.IntN(2500)) * time.Millisecond
	mode := []linkMode{linkCut, linkHold, linkHoldAnswers}[random.IntN(3)]
	kind := random.IntN(6)
	f.t.Logf("fault %d on %s (leader %s) for %v, mode %d", kind, f.nodes[victim].name, f.nodes[leader].name, pause, mode)
	switch kind {
	case 0, 1: // death of a node
		f.down[victim].Store(true)
		began := time.Now()
		f.nodes[victim].end(syscall.SIGKILL, -1)
		if victim == leader {
			recovery, measured = f.recover(victim, began), true
		}
		f.start(victim)
	case 2: // death of all, where that is no loss of everything; else of one after the other
		victims := []int{victim}
		if store == storeBolt {
			victims = nil
			for i := range f.nodes {
				victims = append(victims, i)
			}
		}
		for _, i := range victims {
			f.down[i].Store(true)
			f.nodes[i].end(syscall.SIGKILL, -1)
		}
		for _, i := range victims {
			f.start(i)
		}
	case 3: // a pause, with requests under way
		f.nodes[victim].signal(syscall.SIGSTOP)
		time.Sleep(pause)
		f.nodes[victim].signal(syscall.SIGCONT)
	case 4: // a node cut off, or messages to and from it held back
		for pair, l := range f.links {
			if pair[0] == victim || pair[1] == victim {
				l.set(mode)
			}
		}
		time.Sleep(pause)
	case 5: // some links in one direction
		for pair, l := range f.links {
			if pair[0] == victim || random.IntN(4) == 0 {
				l.set(mode)
			}
		}
		time.Sleep(pause)
	}
	for _, l := range f.links {
		l.set(linkOpen)
	}
	for _, p := range f.nodes {
		f.awaitReady(p)
	}
	return recovery, measured
}

func (f *faulty) start(i int) {
	f.nodes[i].start()
	f.down[i].Store(false)
}

// awaitReady gives the node the ten seconds in which service must be back, and some for a busy machine.
func (f *faulty) awaitReady(p *proc) {
	f.t.Helper()
	waitFor(f.t, p.name+" to be ready", func() bool {
		a, _ := p.ask(http.MethodGet, "/readyz", "")
		return a.status == http.StatusOK
	})
}

// recover returns when a client that tries again and again gets a write acknowledged without the dead node.
func (f *faulty) recover(dead int, since time.Time) time.Duration {
	f.t.Helper()
	waitFor(f.t, "a write after the leader's death", func() bool {
		a, _ := f.nodes[(dead+1)%len(f.nodes)].ask(http.MethodPut, "/key/recovery", "1")
		return a.status == http.StatusOK
	})
	return time.Since(since)
}

// kvOp is an operation on a key, as the checker knows it. Every written value is written once.
type kvOp struct {
	kind  string // "put", "delete" or "get"
	key   string
	value string // that is put
	match string // If-Match, "" for none
}

// kvAnswer is what came of it.
type kvAnswer struct {
	known      bool   // false: it may or may not have happened
	failed     bool   // 412
	value, tag string // of a get; the tag of a put
}

type register struct{ value, tag string } // tag "" while nobody has heard it

var kvModel = porcupine.Model{
	Init: func() any { return register{value: "null"} },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(register), input.(kvOp), output.(kvAnswer)
		if in.kind == "get" {
			if s.value != out.value || s.tag != "" && s.tag != out.tag {
				return false, s
			}
			return true, register{out.value, out.tag}
		}
		holds := in.match == "" || in.match == s.tag
		if out.known && out.failed == holds {
			return false, s
		}
		switch {
		case !holds:
			return true, s
		case in.kind == "delete":
			return true, register{value: "null"}
		}
		return true, register{in.value, out.tag}
	},
}

// history is all that clients did.
type history struct {
	mu  sync.Mutex // guards ops
	ops []porcupine.Operation
}

func (h *history) add(op porcupine.Operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

// client makes operations until ctx ends, on a few keys that change every second, so that histories stay short.
func (f *faulty) client(ctx context.Context, id int, random *rand.Rand) {
	web := &http.Client{Timeout: 15*time.Second + slack, Transport: &http.Transport{}}
	defer web.CloseIdleConnections()
	tags := make(map[string]string) // last seen, by key
	for n := 0; ctx.Err() == nil; n++ {
		node := random.IntN(len(f.nodes))
		if f.down[node].Load() {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		op := kvOp{key: fmt.Sprintf("%d-%d", time.Now().Unix(), random.IntN(3)), value: strconv.Itoa(id*1_000_000 + n)}
		switch op.kind = []string{"put", "put", "put", "get", "get", "get", "get", "delete"}[random.IntN(8)]; {
		case op.kind == "get":
			op.value = ""
		case random.IntN(2) == 0:
			op.match = tags[op.key]
		}
		out, err := f.do(web, id, node, op)
		if err == nil && out.known && !out.failed && out.tag != "" {
			tags[op.key] = out.tag
		}
	}
}

// do makes an operation through a node and writes it down, unless it certainly did not happen.
func (f *faulty) do(web *http.Client, id, node int, op kvOp) (kvAnswer, error) {
	method := map[string]string{"put": http.MethodPut, "get": http.MethodGet, "delete": http.MethodDelete}[op.kind]
	req, err := http.NewRequestWithContext(context.Background(), method, f.nodes[node].url()+"/key/"+op.key, strings.NewReader(op.value))
	if err != nil {
		return kvAnswer{}, err
	}
	if op.match != "" {
		req.Header.Set("If-Match", op.match)
	}
	done := porcupine.Operation{ClientId: id, Input: op, Call: time.Now().UnixNano(), Return: math.MaxInt64}
	out := kvAnswer{}
	response, err := web.Do(req)
	body := ""
	if err == nil {
		data, readErr := io.ReadAll(response.Body)
		_ = response.Body.Close()
		body, err = string(data), readErr
	}
	took := time.Since(time.Unix(0, done.Call))
	if took > 15*time.Second+slack {
		f.t.Errorf("%v through %s took %v; want an answer within 15s", op, f.nodes[node].name, took)
	}
	switch unsent := new(net.OpError); {
	case errors.As(err, &unsent) && unsent.Op == "dial":
		return out, err
	case err != nil:
	case response.StatusCode == http.StatusOK && op.kind == "get":
		out = kvAnswer{known: true, value: strings.TrimSuffix(strings.TrimPrefix(body, `{"`+op.key+`":`), "}"), tag: response.Header.Get("ETag")}
	case response.StatusCode == http.StatusOK:
		out = kvAnswer{known: true, tag: response.Header.Get("ETag")}
		if op.kind == "delete" {
			out.tag = ""
		}
	case response.StatusCode == http.StatusPreconditionFailed:
		out = kvAnswer{known: true, failed: true}
	case response.StatusCode == http.StatusServiceUnavailable:
		if op.kind != "get" && !strings.Contains(body, `"outcome":"not-applied"`) {
			f.t.Errorf("got %s for %v; want it to say not-applied", body, op)
		}
		return out, nil
	case response.StatusCode != http.StatusGatewayTimeout || !strings.Contains(body, `"outcome":"unknown"`):
		f.t.Errorf("got %d %s for %v; want none of that", response.StatusCode, body, op)
	}
	if out.known {
		done.Return = time.Now().UnixNano()
	} else if op.kind == "get" {
		return out, err // it tells nothing
	}
	done.Output = out
	f.h.add(done)
	return out, err
}

// check reads everything once more through every node, and then judges the history.
func (f *faulty) check() {
	byKey := func() map[string][]porcupine.Operation {
		keys := make(map[string][]porcupine.Operation)
		for _, op := range f.h.ops {
			key := op.Input.(kvOp).key
			keys[key] = append(keys[key], op)
		}
		return keys
	}
	web := &http.Client{Timeout: 15 * time.Second}
	for key := range byKey() {
		for i := range f.nodes {
			if _, err := f.do(web, -1, i, kvOp{kind: "get", key: key}); err != nil {
				f.t.Errorf("read %s at the end: %v", key, err)
			}
		}
	}
	values := make(map[string]string) // by key and tag
	note := func(key, tag, value string) {
		if was, known := values[key+tag]; tag != "" && known && was != value {
			f.t.Errorf("tag %s of %s is on %s and on %s; want one value for each tag", tag, key, was, value)
		}
		values[key+tag] = value
	}
	unknown := 0
	for key, ops := range byKey() {
		for _, op := range ops {
			in, out := op.Input.(kvOp), op.Output.(kvAnswer)
			if in.kind == "get" {
				note(key, out.tag, out.value)
			} else if in.kind == "put" && out.known && !out.failed {
				note(key, out.tag, in.value)
			}
			if !out.known {
				unknown++
			}
		}
		if got := porcupine.CheckOperationsTimeout(kvModel, ops, 30*time.Second); got != porcupine.Ok {
			f.t.Errorf("the history of %s, with %d operations, is %v; want it linearizable:", key, len(ops), got)
			for _, op := range ops {
				f.t.Logf("  %d-%d %+v: %+v", op.Call, op.Return, op.Input, op.Output)
			}
		}
	}
	f.t.Logf("%d operations on %d keys, %d of them of unknown outcome", len(f.h.ops), len(byKey()), unknown)
	var first string
	for i, p := range f.nodes { // equal state, read from each node's own map
		page := p.expect(http.StatusOK, http.MethodGet, "/key?prefix=&limit=10000&consistency=stale", "").body
		if i == 0 {
			first = page
		} else if page != first {
			f.t.Errorf("%s holds another state than %s", p.name, f.nodes[0].name)
		}
	}
}
