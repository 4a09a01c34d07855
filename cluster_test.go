package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"raftstarter/test/link"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
)

func (n *testNode) put(t *testing.T, key, value string) {
	t.Helper()
	if a := request(t, http.MethodPut, n.url+"/value/"+key, value); a.status != http.StatusOK {
		t.Fatalf("put %s through %s: got %v; want 200", key, n.cfg.NodeID, a)
	}
}

// get returns what a linearizable read through the node answers.
func (n *testNode) get(t *testing.T, key string) string {
	t.Helper()
	a := request(t, http.MethodGet, n.url+"/value/"+key, "")
	if a.status != http.StatusOK {
		t.Fatalf("get %s through %s: got %v; want 200", key, n.cfg.NodeID, a)
	}
	return a.body
}

func TestAnyNodeTakesAnyRequest(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			c := newTestCluster(t, 3, store)
			for i, writer := range c.nodes {
				value := fmt.Sprint(i)
				writer.put(t, "k", value)
				for _, reader := range c.nodes {
					if got, want := reader.get(t, "k"), value; got != want {
						t.Errorf("got %s through %s; want %s, put through %s", got, reader.cfg.NodeID, want, writer.cfg.NodeID)
					}
				}
			}
		})
	}
}

// A leader that is cut off does not know for a while that another was elected. It must not answer from what it has
// meanwhile missed, not even when late answers to what it asked before the election reach it: they deceive
// raft.VerifyLeader. An attempt counts when they have deceived it while the read was under way.
func TestDeposedLeaderAnswersNoRead(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	const enough, most = 2, 20
	deceived := 0
	for i := range most {
		if readFromDeposedLeader(t, c, i) {
			deceived++
		}
		if deceived == enough {
			return
		}
	}
	t.Errorf("late answers have deceived Raft in %d of %d attempts; want %d, else nothing was tested", deceived, most, enough)
}

// readFromDeposedLeader has another leader elected and write what the old one does not get, then reads from the old one.
// It returns true if late answers that came during the read had raft.VerifyLeader confirm the old one.
func readFromDeposedLeader(t *testing.T, c *testCluster, i int) (deceived bool) {
	t.Helper()
	leader := c.leader()
	old, others := c.nodes[leader], c.followers(leader)
	defer c.cut(leader, linkOpen)
	before, after := fmt.Sprintf(`"before %d"`, i), fmt.Sprintf(`"after %d"`, i)
	old.put(t, "k", before)
	var early []int // by the index in others: how many of the answers held are from before the election
	for _, other := range others {
		c.links[[2]int{leader, other}].Set(linkHoldRaft)
		c.links[[2]int{other, leader}].Set(linkCut)
	}
	for _, other := range others {
		l := c.links[[2]int{leader, other}]
		waitFor(t, "an answer to be held", func() bool { return l.Held() > 0 })
		early = append(early, l.Held())
	}
	next := c.nodes[others[0]]
	next.transport.campaign(nil) // elected at once, not only when the old leader has given up
	c.leader(others...)
	if _, err := next.client.set(t.Context(), "k", after); err != nil {
		t.Fatal(err)
	}
	begun := old.roundsBegun(t)
	answered := make(chan string, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	go func() {
		item, _ := old.client.get(ctx, "k", Linearizable)
		answered <- item.Value
	}()
	waitFor(t, "the read to have begun", func() bool { return old.roundsBegun(t) > begun || len(answered) > 0 })
	asked := time.Now() // then the read asks Raft whatever it asks
	waitFor(t, "the read to have asked", func() bool { return time.Since(asked) > leaseTimeout/5 })
	verified := make(chan error, 1)
	verify := old.raft.Load().VerifyLeader() // after the read
	go func() { verified <- verify.Error() }()
	waitFor(t, "that to be asked", func() bool { return time.Since(asked) > leaseTimeout*3/10 })
	for i, other := range others {
		c.links[[2]int{leader, other}].LetThrough(early[i])
	}
	if value := <-answered; value == before {
		t.Errorf("a linearizable read gave a value that had been overwritten before it began")
	}
	return <-verified == nil
}

// A follower may execute an entry before the leader does. What a read has seen there, a later read at the leader must not
// miss.
func TestReadsDoNotGoBack(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	at := c.leader()
	leader, follower := c.nodes[at], c.nodes[c.followers(at)[0]]
	leader.put(t, "k", "0")
	hold := make(chan struct{})
	machine := leader.machine.(*testMachine)
	leader.Capture(func() { machine.hold = hold })
	var batch []entry
	for _, value := range []string{"1", "2"} {
		batch = append(batch, entry{newWrite(testSet(testPair{"k", value}))})
	}
	if leader.propose(batch) == nil {
		t.Fatal("the leader leads no more")
	}
	waitFor(t, "a read through the follower to see the newest value", func() bool { return follower.get(t, "k") == "2" })
	answered := make(chan string, 1)
	go func() { // a read that was only confirmed sees what is executed next, before the one after that
		item, _ := leader.client.get(t.Context(), "k", Linearizable)
		answered <- item.Value
	}()
	time.Sleep(200 * time.Millisecond) // for the read to be confirmed
	hold <- struct{}{}                 // the first entry is executed,
	time.Sleep(200 * time.Millisecond)
	close(hold) // and now the second
	if value := <-answered; value != "2" {
		t.Errorf("got %s at the leader after 2 had been read through a follower", value)
	}
}

func TestReadThroughFollowerOfIdleClusterIsQuick(t *testing.T) {
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	reader := c.nodes[c.followers(leader)[0]]
	const rounds = 40
	slow := 0
	for i := range rounds {
		c.nodes[leader].put(t, "k", fmt.Sprint(i))
		began := time.Now()
		if got, want := reader.get(t, "k"), fmt.Sprint(i); got != want {
			t.Fatalf("got %s; want %s", got, want)
		}
		// Without being told at once a follower would hear of it after commitTimeout, at the earliest.
		if time.Since(began) > commitTimeout*4/10 {
			slow++
		}
	}
	if slow > rounds/2 {
		t.Errorf("%d of %d reads took as long as if the follower had not been told", slow, rounds)
	}
}

// Stale reads through followers are not old for long when nothing is written any more.
func TestFollowersOfIdleClusterHearOfCommits(t *testing.T) {
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	const rounds = 20
	slow := 0
	for i := range rounds {
		c.nodes[leader].put(t, "k", fmt.Sprint(i))
		began := time.Now()
		for _, f := range c.followers(leader) {
			waitFor(t, "a follower to have it", func() bool {
				item, err := c.nodes[f].client.get(t.Context(), "k", Stale)
				return err == nil && item.Value == fmt.Sprint(i)
			})
		}
		if time.Since(began) > 2*commitTimeout { // Raft tells them after one to two of these
			slow++
		}
	}
	if slow > rounds/2 {
		t.Errorf("%d of %d writes took the followers longer than %v to hear of", slow, rounds, 2*commitTimeout)
	}
}

func TestLeaderWithoutMajorityPromisesNothing(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	node := c.nodes[leader]
	node.put(t, "k", `"before"`)
	c.cut(leader, linkCut)
	a := request(t, http.MethodPut, node.url+"/value/k", `"after"`)
	if a.status != http.StatusGatewayTimeout && a.status != http.StatusServiceUnavailable {
		t.Errorf("write: got %v; want 504 or 503", a)
	}
	if a := request(t, http.MethodGet, node.url+"/value/k", ""); a.status != http.StatusServiceUnavailable {
		t.Errorf("linearizable read: got %v; want 503", a)
	}
	if a := request(t, http.MethodGet, node.url+"/value/k?consistency=stale", ""); a.status != http.StatusOK {
		t.Errorf("stale read: got %v; want 200", a)
	}
	if a := request(t, http.MethodGet, node.url+"/readyz", ""); a.status != http.StatusServiceUnavailable {
		t.Errorf("/readyz: got %v; want 503", a)
	}
}

// Every acknowledged write is there after leaders have come and gone under load, and no write hangs.
func TestLeadershipChangesUnderLoad(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	acked := make([]map[string]bool, 12)
	for w := range acked {
		acked[w] = make(map[string]bool)
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("%d-%d", w, i)
				began := time.Now()
				_, err := c.nodes[w%3].client.set(t.Context(), key, "1")
				if err == nil {
					acked[w][key] = true
				}
				if took := time.Since(began); took > requestTimeout+time.Second {
					t.Errorf("a write took %v", took)
				}
			}
		})
	}
	for range 3 {
		leader := c.leader()
		c.cut(leader, linkCut)
		c.leader(c.followers(leader)...)
		c.cut(leader, linkOpen)
	}
	c.leader()
	cancel()
	wg.Wait()
	total := 0
	for _, keys := range acked {
		for key := range keys {
			for _, node := range c.nodes {
				if item, err := node.client.get(t.Context(), key, Linearizable); err != nil || item.Version == 0 {
					t.Fatalf("acknowledged key %s through %s: got %v, %v; want it to be there", key, node.cfg.NodeID, item, err)
				}
			}
			if total++; total%97 == 0 {
				break // a sample of each writer's is enough
			}
		}
	}
	t.Logf("checked %d acknowledged writes", total)
}

func TestFollowerThatWasAwayIsBroughtUp(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			c := unstartedCluster(t, 3, store)
			for i, node := range c.nodes {
				node.cfg.SnapshotThreshold, node.cfg.TrailingLogs, node.cfg.SnapshotInterval = 20, 5, 10*time.Millisecond
				c.start(i)
			}
			leader := c.leader()
			away := c.followers(leader)[0]
			c.stop(away)
			const keys = 200
			for i := range keys {
				c.nodes[leader].put(t, fmt.Sprint(i), fmt.Sprint(i))
			}
			waitFor(t, "a snapshot", func() bool {
				list, err := c.nodes[leader].storage.snapshots.List()
				return err == nil && len(list) > 0 && list[0].Index > keys/2
			})
			c.start(away)
			for i := range keys {
				if got, want := c.nodes[away].get(t, fmt.Sprint(i)), fmt.Sprint(i); got != want {
					t.Fatalf("got %s; want %s", got, want)
				}
			}
			for i := range c.nodes {
				c.stop(i)
			}
			if store == storeMemory {
				return
			}
			for i := range c.nodes {
				c.start(i)
			}
			for _, node := range c.nodes {
				if got, want := node.get(t, "199"), "199"; got != want {
					t.Errorf("after a restart of all: got %s through %s; want %s", got, node.cfg.NodeID, want)
				}
			}
		})
	}
}

// Raft would try again later and later, and leave a follower that is back waiting for up to ten seconds.
func TestUnreachableFollowerIsTriedUntilItIsBack(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	node := c.nodes[leader]
	away := c.followers(leader)[0]
	c.cut(away, linkCut)
	id, term := raft.ServerID(c.nodes[away].membership.server()), node.State().Term
	send := func(previous uint64) chan error { // 0 for a heartbeat
		done := make(chan error, 1)
		request := &raft.AppendEntriesRequest{
			RPCHeader: header(node), Term: term, PrevLogEntry: previous, PrevLogTerm: 1,
		}
		go func() {
			done <- node.transport.AppendEntries(id, raft.ServerAddress(id), request, new(raft.AppendEntriesResponse))
		}()
		return done
	}
	// The connections there were break first; then there is nothing but failing to dial.
	waitFor(t, "a dial to fail", func() bool { return errors.As(<-send(0), new(*dialError)) })
	done := send(1)
	failed := make(chan raft.Observation, 4)
	node.raft.Load().RegisterObserver(raft.NewObserver(failed, false, func(o *raft.Observation) bool {
		_, is := o.Data.(raft.FailedHeartbeatObservation)
		return is
	}))
	waitFor(t, "heartbeats to fail", func() bool { return len(failed) == cap(failed) })
	select {
	case err := <-done:
		t.Fatalf("while the follower is away: got %v; want it to be tried on", err)
	default:
	}
	c.cut(away, linkOpen)
	waitFor(t, "an answer", func() bool { return len(done) > 0 })
	if err := <-done; err != nil {
		t.Errorf("when the follower is back: got %v; want an answer", err)
	}
}

// Heartbeats must not change term and state beside Raft's main thread.
func TestHeartbeatsTakeTheWayOfAllMessages(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	follower := c.nodes[c.followers(c.leader())[0]]
	shortCut := new(atomic.Int32)
	follower.transport.SetHeartbeatHandler(func(rpc raft.RPC) {
		shortCut.Add(1)
		rpc.Respond(nil, errors.New("not here"))
	})
	began := time.Now()
	waitFor(t, "some heartbeats", func() bool { return follower.raft.Load().LastContact().Sub(began) > time.Second || shortCut.Load() > 0 })
	if n := shortCut.Load(); n > 0 {
		t.Errorf("got %d heartbeats on the short cut; want none", n)
	}
}

// slowLogs is a disk whose every write takes a while.
type slowLogs struct {
	raft.LogStore
	delay *atomic.Int64
}

func (s slowLogs) StoreLogs(l []*raft.Log) error {
	time.Sleep(time.Duration(s.delay.Load()))
	return s.LogStore.StoreLogs(l)
}

// slowCluster starts three nodes whose disks are as slow as delay says, in nanoseconds.
func slowCluster(t *testing.T) (c *testCluster, delay *atomic.Int64) {
	t.Helper()
	c, delay = unstartedCluster(t, 3, storeMemory), new(atomic.Int64)
	for i, node := range c.nodes {
		node.open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
			st, err := openStorage(cfg, log, m, n)
			if err == nil {
				st.logs = slowLogs{st.logs, delay}
			}
			return st, err
		}
		c.start(i)
	}
	return c, delay
}

// Not in parallel: on a machine without time to spare, 700 ms can become a second.
func TestSlowDisksCostNoLeadership(t *testing.T) {
	c, delay := slowCluster(t)
	const attempts = 3
	for attempt := range attempts {
		leader := c.nodes[c.leader()]
		before := leader.State()
		delay.Store(int64(700 * time.Millisecond))
		for i := range 3 {
			if _, err := c.nodes[i].client.set(t.Context(), "k", fmt.Sprint(i)); err != nil {
				t.Logf("attempt %d: %v", attempt, err)
			}
		}
		delay.Store(0)
		if leader.State() == before {
			return
		}
	}
	t.Errorf("slow writes cost the leadership in each of %d attempts", attempts)
}

// A new leader has what was acknowledged in its log, but does not know at once that it is committed.
func TestNewLeaderReadsWhatWasAcknowledged(t *testing.T) {
	t.Parallel()
	c, delay := slowCluster(t)
	came := 0
	for i := range 5 {
		old := c.leader()
		next := c.nodes[c.followers(old)[0]]
		before, err := c.nodes[old].client.set(t.Context(), "k", "before")
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the next leader to execute it", func() bool { return next.lastApplied() == before.Index })
		awaitEqualLogs(t, c.nodes...)
		w, err := c.nodes[old].client.set(t.Context(), "k", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		c.cut(old, linkCut)
		if next.raft.Load().CommitIndex() < w.Index {
			came++
		}
		delay.Store(int64(300 * time.Millisecond)) // so long nothing more is committed
		next.transport.campaign(nil)
		if item, err := next.client.get(t.Context(), "k", Linearizable); err != nil || item.Value != fmt.Sprint(i) {
			t.Errorf("got %q, error %v; want %d, which was acknowledged", item.Value, err, i)
		}
		delay.Store(0)
		c.cut(old, linkOpen)
	}
	if came == 0 {
		t.Error("each time the new leader knew already what is committed, so nothing was tested")
	}
}

// What Raft says of its state may get lost; the Store looks for itself as well.
func TestStateIsSeenWithoutObservations(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeMemory)
	for i, node := range c.nodes {
		node.deaf = true
		c.start(i)
	}
	leader := c.leader()
	c.cut(leader, linkCut)
	next := c.leader(c.followers(leader)...)
	r := c.nodes[next].raft.Load()
	if leads := r.State() == raft.Leader; !leads {
		t.Errorf("got %v for the new leader; want %v", r.State(), raft.Leader)
	}
}

func TestStorageFailureStopsTheNode(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 1, storeMemory)
	broken := new(atomic.Bool)
	node := c.nodes[0]
	node.open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
		st, err := openStorage(cfg, log, m, n)
		if err == nil {
			mem := raft.NewInmemStore()
			st.logs = newDiskStore(failingStore{mem, broken}, "", nil, m, n)
		}
		return st, err
	}
	c.start(0)
	c.leader()
	node.put(t, "k", "1")
	broken.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := node.client.set(ctx, "k", "2"); !errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("a write on broken storage: got %v; want %v", err, ErrUnknownOutcome)
	}
	select {
	case err := <-node.Failed():
		t.Logf("the reason: %v", err)
	case <-t.Context().Done():
		t.Error("the node was not told to stop")
	}
	node.running = false // its Raft hangs for good, as it should
	node.web.CloseClientConnections()
	node.web.Close()
}

type failingStore struct {
	*raft.InmemStore
	broken *atomic.Bool
}

func (b failingStore) StoreLogs(l []*raft.Log) error {
	if b.broken.Load() {
		return io.ErrShortWrite
	}
	return b.InmemStore.StoreLogs(l)
}

// Not in parallel: what other tests do would look like left behind.
func TestShutdownLeavesNothingBehind(t *testing.T) {
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			c := newTestCluster(t, 3, store)
			leader := c.leader()
			var wg sync.WaitGroup
			loaded := func() bool { return c.nodes[leader].replica.applied.load() > 20 }
			for i := range 30 { // under load, and with requests that will not be answered in time
				wg.Go(func() {
					for first := true; first || !loaded(); first = false {
						ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*10*time.Millisecond)
						for ctx.Err() == nil {
							_, _ = c.nodes[i%3].client.set(ctx, "k", "1")
							_, _ = c.nodes[i%3].client.get(ctx, "k", Linearizable)
						}
						cancel()
					}
				})
			}
			waitFor(t, "some load", loaded)
			c.cut(leader, linkCut)
			c.stop(leader) // without anybody to hand over to
			wg.Wait()
			for _, i := range c.followers(leader) {
				c.stop(i)
			}
			for _, l := range c.links {
				l.Close()
			}
			http.DefaultTransport.(*http.Transport).CloseIdleConnections()
			goleak.VerifyNone(t, before, unansweredFuture)
		})
	}
}

// An entry that a slow link cannot carry in the time that a small message has must not stop all writes.
func TestLargeEntryGetsThroughASlowLink(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	for _, follower := range c.followers(leader) {
		c.links[[2]int{leader, follower}].Set(linkSlow)
	}
	value := `"` + strings.Repeat("v", link.SlowRate*int(rpcTimeout/time.Second)*4/3) + `"`
	if _, err := c.nodes[leader].client.set(t.Context(), "k", value); err != nil {
		t.Errorf("got %v; want it written", err)
	}
	if state := c.nodes[leader].State(); state.State != "leader" {
		t.Errorf("got %v for the leader; want it in office", state)
	}
}
