package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// fakeFuture is what became of a log entry.
type fakeFuture struct {
	index   uint64
	err     error
	results any
	wait    chan struct{} // closed when it is known; nil for at once
}

func (f *fakeFuture) Error() error {
	if f.wait != nil {
		<-f.wait
	}
	return f.err
}
func (f *fakeFuture) Response() any { return f.results }
func (f *fakeFuture) Index() uint64 { return f.index }

// newTestWrites returns writes that run until the test ends.
func newTestWrites(t *testing.T) *writes {
	t.Helper()
	w := newWrites(&testProposer{}, newMetrics(), hclog.NewNullLogger())
	at := proposerOf(w)
	at.onPropose, at.leads = func([][]byte) raft.ApplyFuture { return nil }, func() bool { return true }
	at.onCall = func(byte, []byte, time.Duration) ([]byte, error) { return nil, ErrNoLeader }
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	go func() {
		defer close(ended)
		w.run(ctx)
	}()
	return w
}

func TestOutcomeOfAWrite(t *testing.T) {
	never := make(chan struct{})
	one := [][]byte{[]byte("result")}
	leads := func(f *fakeFuture) func([][]byte) raft.ApplyFuture {
		return func([][]byte) raft.ApplyFuture { return f }
	}
	answers := func(answer []byte, err error) func(byte, []byte, time.Duration) ([]byte, error) {
		return func(byte, []byte, time.Duration) ([]byte, error) { return answer, err }
	}
	tests := []struct {
		name       string
		propose    func([][]byte) raft.ApplyFuture
		callLeader func(byte, []byte, time.Duration) ([]byte, error)
		want       error
		index      uint64
	}{
		{name: "executed", propose: leads(&fakeFuture{index: 7, results: one}), index: 7},
		{name: "refused before it was in the log", propose: leads(&fakeFuture{err: raft.ErrNotLeader}), want: ErrNotLeader},
		{name: "leadership is being handed over", propose: leads(&fakeFuture{err: raft.ErrLeadershipTransferInProgress}), want: ErrNotLeader},
		{name: "raft did not take it in time", propose: leads(&fakeFuture{err: raft.ErrEnqueueTimeout}), want: ErrNotLeader},
		{name: "raft was shut down before", propose: leads(&fakeFuture{err: raft.ErrRaftShutdown}), want: ErrNotLeader},
		{name: "leadership lost with the entry in the log", propose: leads(&fakeFuture{index: 7, err: raft.ErrLeadershipLost}), want: ErrUnknownOutcome},
		{name: "raft shut down with the entry in the log", propose: leads(&fakeFuture{index: 7, err: raft.ErrRaftShutdown}), want: ErrUnknownOutcome},
		{name: "storage failed under the entry", propose: leads(&fakeFuture{index: 7, err: errors.New("EIO")}), want: ErrUnknownOutcome},
		{name: "aborted by a restore", propose: leads(&fakeFuture{index: 7, err: raft.ErrAbortedByRestore}), want: ErrUnknownOutcome},
		{name: "the state machine gave no results", propose: leads(&fakeFuture{index: 7}), want: ErrUnknownOutcome},
		{name: "no answer in time", propose: leads(&fakeFuture{wait: never}), want: ErrUnknownOutcome},
		{name: "passed on and executed", callLeader: answers(encodeOutcome(outcome{index: 9, results: one}), nil), index: 9},
		{name: "passed on and refused", callLeader: answers(encodeOutcome(outcome{err: ErrNotLeader}), nil), want: ErrNotLeader},
		{name: "passed on and too many", callLeader: answers(encodeOutcome(outcome{err: ErrOverloaded}), nil), want: ErrOverloaded},
		{name: "passed on and withdrawn", callLeader: answers(encodeOutcome(outcome{err: ErrNotInTime}), nil), want: ErrNotInTime},
		{name: "passed on and unknown", callLeader: answers(encodeOutcome(outcome{err: ErrUnknownOutcome}), nil), want: ErrUnknownOutcome},
		{name: "passed on and an error that has no number", callLeader: answers(encodeOutcome(outcome{err: errors.New("new")}), nil), want: ErrUnknownOutcome},
		{name: "no leader to pass it on to", callLeader: answers(nil, ErrNoLeader), want: ErrNoLeader},
		{name: "the leader was not reached", callLeader: answers(nil, ErrNotLeader), want: ErrNotLeader},
		{name: "the leader was cut off", callLeader: answers(nil, ErrUnknownOutcome), want: ErrUnknownOutcome},
		{name: "the leader answers nonsense", callLeader: answers([]byte{77}, nil), want: ErrUnknownOutcome},
		{name: "the leader answers for too few", callLeader: answers(encodeOutcome(outcome{index: 9}), nil), want: ErrUnknownOutcome},
		{name: "the leader answers nothing", callLeader: answers(nil, nil), want: ErrUnknownOutcome},
		{
			name: "the leader answers for too many", want: ErrUnknownOutcome,
			callLeader: answers(encodeOutcome(outcome{index: 9, results: append(one, one...)}), nil),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newTestWrites(t)
			if tt.propose != nil {
				proposerOf(w).onPropose = tt.propose
			}
			if tt.callLeader != nil {
				proposerOf(w).onCall = tt.callLeader
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			o := w.submit(ctx, []byte("command"))
			if !errors.Is(o.err, tt.want) || o.index != tt.index {
				t.Errorf("got index %d, error %v; want index %d, error %v", o.index, o.err, tt.index, tt.want)
			}
		})
	}
}

// A peer is told "not executed" only of a call that never reached its service, and of one it refused.
func TestCallLeaderTellsUnsentFromUnknown(t *testing.T) {
	c := newTestCluster(t, 2, storeMemory)
	leader := c.leader()
	follower := c.followers(leader)[0]
	s := c.nodes[follower].Store
	if _, err := s.callLeader(99, nil, time.Second); !errors.Is(err, ErrNotLeader) {
		t.Errorf("a call that was refused: got %v; want %v", err, ErrNotLeader)
	}
	c.links[[2]int{follower, leader}].Set(linkHold)
	if _, err := s.callLeader(opTerm, make([]byte, 8), 50*time.Millisecond); !errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("a call that was not answered: got %v; want %v", err, ErrUnknownOutcome)
	}
	c.links[[2]int{follower, leader}].Set(linkCut)
	waitFor(t, "a dial to fail", func() bool {
		_, err := s.callLeader(opTerm, make([]byte, 8), time.Second)
		return errors.Is(err, ErrNotLeader)
	})
}

func TestWritesGatherWhileOthersAreCommitted(t *testing.T) {
	w := newTestWrites(t)
	release := make(chan struct{})
	var mu sync.Mutex
	var sizes []int
	proposerOf(w).onPropose = func(commands [][]byte) raft.ApplyFuture {
		mu.Lock()
		defer mu.Unlock()
		sizes = append(sizes, len(commands))
		return &fakeFuture{index: uint64(len(sizes)), results: commands, wait: release}
	}
	const first, rest = 1, 100
	var wg sync.WaitGroup
	submit := func(i int) {
		wg.Go(func() {
			command := fmt.Sprint(i)
			if o := w.submit(t.Context(), []byte(command)); o.err != nil || string(o.results[0]) != command {
				t.Errorf("got %q, %v; want its own result %q", o.results, o.err, command)
			}
		})
	}
	submit(0)
	waitFor(t, "the entry", func() bool { mu.Lock(); defer mu.Unlock(); return len(sizes) == first })
	for i := range rest {
		submit(first + i)
	}
	waitFor(t, "all to wait", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.waiting) == rest })
	close(release)
	wg.Wait()
	if len(sizes) != first+1 || sizes[first] != rest {
		t.Errorf("got entries of %v commands; want the last one to hold %d", sizes, rest)
	}
}

// A leader's entry has no other beside it, and idle waits for it.
func TestEntryIsAlone(t *testing.T) {
	w := newTestWrites(t)
	release, begun := make(chan struct{}), make(chan struct{}, 100)
	proposerOf(w).onPropose = func(commands [][]byte) raft.ApplyFuture {
		begun <- struct{}{}
		return &fakeFuture{index: 1, results: commands, wait: release}
	}
	var wg sync.WaitGroup
	wg.Go(func() { w.submit(t.Context(), []byte("first")) })
	<-begun
	wg.Go(func() { w.submit(t.Context(), []byte("second")) })
	idle := make(chan bool, 1)
	waitFor(t, "it to wait", func() bool { return w.queued() > 0 })
	go func() { idle <- w.idle(t.Context()) }()
	select {
	case <-begun:
		t.Error("got a second entry beside the first")
	case <-idle:
		t.Error("got idle; want it to wait")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if !<-idle {
		t.Error("got not idle; want it to wait until it is")
	}
	wg.Wait()
}

// What a node has passed on to a leader that does not answer bounds what it passes on, but not what it does as the leader.
func TestPassedOnHoldsUpNoEntry(t *testing.T) {
	w := newTestWrites(t)
	var leads atomic.Bool
	release, calls := make(chan struct{}), make(chan struct{}, 100)
	proposerOf(w).leads = leads.Load
	proposerOf(w).onPropose = func(commands [][]byte) raft.ApplyFuture {
		if !leads.Load() {
			return nil
		}
		return &fakeFuture{index: 1, results: commands}
	}
	proposerOf(w).onCall = func(byte, []byte, time.Duration) ([]byte, error) {
		calls <- struct{}{}
		<-release
		return nil, ErrUnknownOutcome
	}
	var wg sync.WaitGroup
	wg.Go(func() { w.submit(t.Context(), []byte("passed on")) })
	<-calls
	done := make(chan error, 1)
	go func() { done <- w.submit(t.Context(), []byte("own")).err }()
	waitFor(t, "it to wait", func() bool { return w.queued() > 0 })
	select {
	case <-calls:
		t.Error("got two batches passed on at once")
	case <-time.After(50 * time.Millisecond):
	}
	leads.Store(true)
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the leader's own entry waits for what was passed on")
	}
	close(release)
	wg.Wait()
}

// Clients that come back at once are all in one entry, and not in two that take turns. Commands that come at any time do not
// wait for others, but once in a while.
func TestLingerWaitsForThoseWhoComeBack(t *testing.T) {
	const (
		clients = 5
		commit  = 4 * time.Millisecond
		apart   = commit / 2
	)
	gathers := func(t *testing.T, client func(w *writes)) (sizes []int, took time.Duration) {
		t.Helper()
		synctest.Test(t, func(t *testing.T) {
			w := newTestWrites(t)
			proposerOf(w).onPropose = func(commands [][]byte) raft.ApplyFuture {
				sizes = append(sizes, len(commands))
				wait := make(chan struct{})
				time.AfterFunc(commit, func() { close(wait) })
				return &fakeFuture{index: 1, results: commands, wait: wait}
			}
			began := time.Now()
			client(w)
			took = time.Since(began)
		})
		return sizes, took
	}
	t.Run("come back", func(t *testing.T) {
		const rounds = 40
		sizes, _ := gathers(t, func(w *writes) {
			var wg sync.WaitGroup
			for i := range clients {
				wg.Go(func() {
					for n := range rounds {
						w.submit(context.Background(), []byte("command"))
						if i == 0 && n%10 == 9 { // one is away for a while
							time.Sleep(commit * 3)
						}
						time.Sleep(commit / 4)
					}
				})
				time.Sleep(commit / 8)
			}
			wg.Wait()
		})
		if most := rounds + 12; len(sizes) > most {
			t.Errorf("got %d entries of %v commands; want at most %d", len(sizes), sizes, most)
		}
	})
	t.Run("come at any time", func(t *testing.T) {
		const commands = 1000
		var waited atomic.Int64
		gathers(t, func(w *writes) {
			var wg sync.WaitGroup
			for range commands {
				wg.Go(func() {
					began := time.Now()
					w.submit(context.Background(), []byte("command"))
					waited.Add(int64(time.Since(began)))
				})
				time.Sleep(apart)
			}
			wg.Wait()
		})
		// Each waits for the entry before, for half of it in the mean, and for its own.
		if mean := time.Duration(waited.Load() / commands); mean > commit*8/5 {
			t.Errorf("got %v in the mean; want about %v", mean, commit*3/2)
		}
	})
	t.Run("go away", func(t *testing.T) {
		_, took := gathers(t, func(w *writes) {
			var wg sync.WaitGroup
			for range clients {
				wg.Go(func() { w.submit(context.Background(), []byte("command")) })
			}
			wg.Wait()
			w.submit(context.Background(), []byte("the only one that is left"))
		})
		if want := 4 * commit; took > want {
			t.Errorf("got %v; want it to wait for nobody for longer than an entry takes, so at most %v", took, want)
		}
	})
}

// Only a batch that would have waited counts for how long none does.
func TestPauseIsForBatchesThatWouldWait(t *testing.T) {
	b := newWrites(&testProposer{}, newMetrics(), hclog.NewNullLogger())
	b.expected, b.credit = 1, -7
	b.linger(t.Context()) // nothing to take
	if err := b.add(newWrite([]byte("as many as expected"))); err != nil {
		t.Fatal(err)
	}
	b.linger(t.Context())
	if b.credit != -7 {
		t.Errorf("got credit %d; want it unchanged at -7", b.credit)
	}
	b.expected = 2
	b.linger(t.Context())
	if b.credit != -6 {
		t.Errorf("got credit %d after a batch that would have waited; want -6", b.credit)
	}
}

// What a batch teaches is learned before its clients can send their next commands, which would be expected twice.
func TestLearnsBeforeItAnswers(t *testing.T) {
	results := [][]byte{[]byte("result")}
	for _, leads := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			b := newTestWrites(t)
			proposerOf(b).onPropose = func([][]byte) raft.ApplyFuture {
				if !leads {
					return nil
				}
				return &fakeFuture{index: 1, results: results}
			}
			proposerOf(b).onCall = func(byte, []byte, time.Duration) ([]byte, error) {
				return encodeOutcome(outcome{index: 1, results: results}), nil
			}
			w := newWrite([]byte("command"))
			w.done = make(chan outcome) // so that it is not answered until somebody listens
			go b.commit(t.Context(), []entry{{w}})
			synctest.Wait()
			if b.expected != 1 {
				t.Errorf("leads %v: got %d commands expected before the answer; want 1", leads, b.expected)
			}
			if o := <-w.done; o.err != nil {
				t.Error(o.err)
			}
		})
	}
}

func TestBatchHasABound(t *testing.T) {
	w := newWrites(&testProposer{}, newMetrics(), hclog.NewNullLogger())
	add := func(sizes ...int) {
		t.Helper()
		for _, size := range sizes {
			if err := w.add(newWrite(make([]byte, size))); err != nil {
				t.Fatal(err)
			}
		}
	}
	take := func(most int, want ...int) {
		t.Helper()
		var got []int
		for _, e := range w.take(most) {
			got = append(got, len(e))
		}
		if !slices.Equal(got, want) {
			t.Errorf("got a batch of entries with %v commands; want %v", got, want)
		}
	}
	add(maxEntryBytes-1, 1, 1, maxEntryBytes*2, 1)
	take(3, 2, 1, 1)
	take(3, 1)
	take(3)
	const fit = maxBatchBytes / maxEntryBytes
	add(slices.Repeat([]int{maxEntryBytes}, fit+1)...)
	take(fit+1, slices.Repeat([]int{1}, fit)...)
	add(maxBatchBytes, maxBatchBytes*2)
	take(2, 1)
	take(2, 1)
	take(2, 1)
	if w.bytes != 0 {
		t.Errorf("got %d bytes waiting; want none", w.bytes)
	}
	if err := w.add(newWrite(make([]byte, maxWaiting), make([]byte, maxBodyBytes))); err != nil {
		t.Errorf("the first of any size: got %v; want it to be taken", err)
	}
	if err := w.add(newWrite(make([]byte, 1))); !errors.Is(err, ErrOverloaded) {
		t.Errorf("one too many: got %v; want %v", err, ErrOverloaded)
	}
}

// The entries of a batch are committed one by one, and so they may end.
func TestEntriesOfABatchHaveOutcomesOfTheirOwn(t *testing.T) {
	// The first byte of a command says what becomes of it.
	futures := map[byte]*fakeFuture{
		'a': {index: 7, results: [][]byte{[]byte("result")}},
		'b': {index: 8, err: raft.ErrLeadershipLost},
		'c': {err: raft.ErrNotLeader},
	}
	want := map[byte]error{'a': nil, 'b': ErrUnknownOutcome, 'c': ErrNotLeader}
	for _, leads := range []bool{true, false} {
		b := newWrites(&testProposer{}, newMetrics(), hclog.NewNullLogger())
		proposerOf(b).onPropose = func(commands [][]byte) raft.ApplyFuture {
			if !leads {
				return nil
			}
			return futures[commands[0][0]]
		}
		proposerOf(b).onCall = func(_ byte, request []byte, _ time.Duration) ([]byte, error) {
			commands, err := decodeCommands(request)
			if err != nil {
				return nil, err
			}
			return encodeOutcome(b.await(t.Context(), futures[commands[0][0]])), nil
		}
		var writes []*write
		for command := range want {
			w := newWrite(append([]byte{command}, make([]byte, maxEntryBytes)...))
			if err := b.add(w); err != nil {
				t.Fatal(err)
			}
			writes = append(writes, w)
		}
		b.commit(t.Context(), b.take(len(want)))
		for _, w := range writes {
			command := w.commands[0][0]
			if o := <-w.done; !errors.Is(o.err, want[command]) || o.err == nil && o.index != futures[command].index {
				t.Errorf("leads %v, command %c: got index %d, error %v; want index %d, error %v",
					leads, command, o.index, o.err, futures[command].index, want[command])
			}
		}
	}
}

func TestWithdrawnWriteIsNeverExecuted(t *testing.T) {
	w := newTestWrites(t)
	release := make(chan struct{})
	executed := make(chan string, 10)
	proposerOf(w).onPropose = func(commands [][]byte) raft.ApplyFuture {
		for _, c := range commands {
			executed <- string(c)
		}
		return &fakeFuture{index: 1, results: commands, wait: release}
	}
	var wg sync.WaitGroup
	wg.Go(func() { w.submit(t.Context(), []byte("first")) })
	<-executed
	ctx, cancel := context.WithCancel(t.Context())
	withdrawn := make(chan outcome)
	go func() { withdrawn <- w.submit(ctx, []byte("withdrawn")) }()
	waitFor(t, "it to wait", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.waiting) == 1 })
	cancel()
	if o := <-withdrawn; !errors.Is(o.err, ErrNotInTime) {
		t.Errorf("got %v; want %v", o.err, ErrNotInTime)
	}
	close(release)
	w.submit(t.Context(), []byte("last"))
	wg.Wait()
	if got := <-executed; got != "last" {
		t.Errorf("got %q executed; want %q", got, "last")
	}
}

func TestForwardedCommandsGoNoFurther(t *testing.T) {
	w := newTestWrites(t)
	proposerOf(w).onCall = func(byte, []byte, time.Duration) ([]byte, error) {
		t.Error("commands that were passed on were passed on again")
		return nil, ErrNoLeader
	}
	answer, err := w.handleApply(t.Context(), "node2", appendCommands(nil, [][]byte{[]byte("a"), []byte("b")}))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeOutcome(answer); err != nil || !errors.Is(got.err, ErrNotLeader) {
		t.Errorf("got %v, %v; want %v", got, err, ErrNotLeader)
	}
	if _, err := w.handleApply(t.Context(), "node2", []byte{200}); err == nil {
		t.Error("malformed commands were accepted")
	}
}

// What is passed on is a batch, or one large command. Bytes that are neither are not made into a million commands.
func TestMoreThanABatchIsNotTaken(t *testing.T) {
	node := newTestNode(t, storeMemory)
	empty := make([]byte, maxCallBytes)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // such commands stop a node that takes them
	defer cancel()
	checkMemory(t, 0, 1<<20, func() {
		if answer, err := node.writes.handleApply(ctx, "node2", empty); err == nil {
			t.Errorf("got answer %q; want an error", answer)
		}
	})
	large := testSet(testPair{"k", strings.Repeat("x", 2*maxBatchBytes)})
	answer, err := node.writes.handleApply(t.Context(), "node2", appendCommands(nil, [][]byte{large}))
	if o, err2 := decodeOutcome(answer); err != nil || err2 != nil || o.err != nil || len(o.results) != 1 {
		t.Errorf("got outcome %+v, errors %v and %v", o, err, err2)
	}
}

// testProposer is a node without Raft, which does what a test says.
type testProposer struct {
	onPropose func(commands [][]byte) raft.ApplyFuture
	leads     func() bool
	onCall    func(op byte, request []byte, timeout time.Duration) ([]byte, error)
}

func (p *testProposer) propose(batch []entry) (futures []raft.ApplyFuture) {
	for _, e := range batch {
		if future := p.onPropose(e.commands()); future != nil {
			futures = append(futures, future)
		}
	}
	return futures
}
func (p *testProposer) leadsNow() bool { return p.leads() }
func (p *testProposer) callLeader(op byte, request []byte, timeout time.Duration) ([]byte, error) {
	return p.onCall(op, request, timeout)
}

func proposerOf(w *writes) *testProposer { return w.node.(*testProposer) }
