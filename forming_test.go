package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// newTestFormation returns the formation of the node with the given id in a cluster of total nodes: node1, node2, ...
func newTestFormation(t *testing.T, id string, total int) *formation {
	t.Helper()
	cfg := &Config{NodeID: id, KVStore: storeBolt} // although the storage is in memory, which is quicker
	for i := range total {
		cfg.Peers = append(cfg.Peers, Peer{ID: fmt.Sprintf("node%d", i+1)})
	}
	f := newFormation(cfg, hclog.NewNullLogger())
	err := f.open(openTestStorage(t, storeMemory, ""), nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestJudgeOfWhatOthersHold(t *testing.T) {
	// What a node can answer.
	empty := holding{}
	joined := func(cluster string) holding { return holding{cluster, 0} } // and got nothing yet
	begun := func(cluster string) holding { return holding{cluster, 1} }  // with the entry that the log begins with
	holds := func(cluster string) holding { return holding{cluster, 500} }
	barely := func(cluster string) holding { return holding{cluster, 2} }

	type answers map[string]holding
	waits := verdict{}
	forms := verdict{form: true, majority: true}
	ripens := verdict{majority: true} // it waits, and the time until it does not runs
	joins := func(cluster string) verdict { return verdict{join: cluster} }
	joinsBegun := func(cluster string) verdict { return verdict{join: cluster, majority: true} }
	tests := []struct {
		name    string
		self    string
		total   int
		granted string
		patient bool
		answers answers
		want    verdict
	}{
		// (a) All say they have none: the first of them forms the cluster at once.
		{"three, all empty, the first", "node1", 3, "", false, answers{"node2": empty, "node3": empty}, forms},
		{"three, all empty, the second", "node2", 3, "", false, answers{"node1": empty, "node3": empty}, ripens},
		{"three, all empty, the last", "node3", 3, "", false, answers{"node1": empty, "node2": empty}, ripens},
		{"five, all empty, the first", "node1", 5, "", false, answers{"node2": empty, "node3": empty, "node4": empty, "node5": empty}, forms},
		{"five, all empty, the last", "node5", 5, "", false, answers{"node1": empty, "node2": empty, "node3": empty, "node4": empty}, ripens},
		{"two, both empty", "node1", 2, "", false, answers{"node2": empty}, forms},

		// (b) A majority says so and nobody with state answers: they form it, but only after a while.
		{"three, one silent, at first", "node1", 3, "", false, answers{"node2": empty}, ripens},
		{"three, one silent, for long", "node1", 3, "", true, answers{"node2": empty}, forms},
		{"three, the first silent, for long", "node2", 3, "", true, answers{"node3": empty}, forms},
		{"three, the first silent, for long, the last", "node3", 3, "", true, answers{"node2": empty}, ripens},
		{"five, two silent, at first", "node1", 5, "", false, answers{"node3": empty, "node5": empty}, ripens},
		{"five, two silent, for long", "node1", 5, "", true, answers{"node3": empty, "node5": empty}, forms},
		{"five, one silent, at first", "node1", 5, "", false, answers{"node2": empty, "node3": empty, "node5": empty}, ripens},
		{"five, one silent, for long", "node2", 5, "", true, answers{"node3": empty, "node4": empty, "node5": empty}, forms},

		// (e) No majority answers: it waits for ever.
		{"three, alone", "node1", 3, "", false, answers{}, waits},
		{"three, alone for long", "node1", 3, "", true, answers{}, waits},
		{"two, alone for long", "node1", 2, "", true, answers{}, waits},
		{"four, a half for long", "node1", 4, "", true, answers{"node2": empty}, waits},
		{"five, two for long", "node1", 5, "", true, answers{"node2": empty}, waits},

		// (c) A majority without it is of one cluster: it is of that, whatever the rest says.
		{"three, the others hold state", "node1", 3, "", false, answers{"node2": holds("A"), "node3": holds("A")}, joins("A")},
		{"three, the others hold state, one of them nothing yet", "node1", 3, "", false, answers{"node2": holds("A"), "node3": joined("A")}, joins("A")},
		{"three, the others have begun", "node3", 3, "", false, answers{"node1": begun("A"), "node2": joined("A")}, joins("A")},
		{"three, the others hold state, another was granted", "node1", 3, "B", false, answers{"node2": holds("A"), "node3": holds("A")}, joins("A")},
		{"five, three hold state, one is silent", "node1", 5, "", false, answers{"node2": holds("A"), "node3": holds("A"), "node5": holds("A")}, joins("A")},
		{"five, three hold state, one is empty", "node1", 5, "", false, answers{"node2": holds("A"), "node3": holds("A"), "node4": empty, "node5": holds("A")}, joins("A")},
		{"five, three hold state, one of another cluster", "node1", 5, "", true, answers{"node2": holds("A"), "node3": holds("A"), "node4": holds("B"), "node5": holds("A")}, joins("A")},

		// (e) Somebody holds state and no majority does: the silent ones may hold what was acknowledged.
		{"three, one holds state, one is silent", "node1", 3, "", false, answers{"node2": holds("A")}, waits},
		{"three, one holds state, one is silent for long", "node1", 3, "", true, answers{"node2": holds("A")}, waits},
		{"three, one holds state, one is empty", "node1", 3, "", false, answers{"node2": holds("A"), "node3": empty}, waits},
		{"three, one holds state, one is empty for long", "node1", 3, "", true, answers{"node2": holds("A"), "node3": empty}, waits},
		{"three, one holds a single entry of its own", "node1", 3, "", true, answers{"node2": barely("A"), "node3": empty}, waits},
		{"three, two clusters", "node1", 3, "", true, answers{"node2": holds("A"), "node3": holds("B")}, waits},
		{"three, one holds state and had the grant", "node1", 3, "A", true, answers{"node2": holds("A"), "node3": empty}, waits},
		{"four, a half holds state", "node1", 4, "", true, answers{"node2": holds("A"), "node3": holds("A")}, waits},
		{"five, one holds state, a majority is empty", "node1", 5, "", true, answers{"node2": holds("A"), "node3": empty, "node4": empty, "node5": empty}, waits},
		{"five, two hold state, two are silent", "node1", 5, "", true, answers{"node2": holds("A"), "node3": holds("A")}, waits},
		{"five, two hold state, two are empty", "node1", 5, "", true, answers{"node2": holds("A"), "node3": holds("A"), "node4": empty, "node5": empty}, waits},
		{"five, two clusters", "node1", 5, "", true, answers{"node2": holds("A"), "node3": holds("A"), "node4": holds("B"), "node5": holds("B")}, waits},

		// A cluster that was formed and got no further counts as nothing, but there need be no second.
		{"three, one has formed a cluster", "node2", 3, "", false, answers{"node1": begun("A"), "node3": empty}, joinsBegun("A")},
		{"three, one has stored its id alone", "node2", 3, "", false, answers{"node1": joined("A"), "node3": empty}, joinsBegun("A")},
		{"three, one has formed it, one is silent, at first", "node2", 3, "", false, answers{"node1": begun("A")}, ripens},
		{"three, one has formed it, one is silent, for long", "node2", 3, "", true, answers{"node1": begun("A")}, joinsBegun("A")},
		{"three, two have formed one each", "node3", 3, "", false, answers{"node1": begun("B"), "node2": begun("A")}, joinsBegun("A")},
		{"five, two are of it", "node5", 5, "", false, answers{"node1": begun("A"), "node2": joined("A"), "node3": empty, "node4": empty}, joinsBegun("A")},
		{"five, it formed, and no majority answers", "node5", 5, "", true, answers{"node1": begun("A")}, waits},

		// One that was let form the cluster by this node has done so.
		{"three, the grantee formed it, one is silent", "node2", 3, "A", false, answers{"node1": begun("A")}, joins("A")},
		{"three, the grantee stored its id alone", "node2", 3, "A", false, answers{"node1": joined("A"), "node3": empty}, joins("A")},
		{"five, the grantee formed it, the rest is silent", "node2", 5, "A", false, answers{"node1": begun("A")}, joins("A")},
		{"three, the grantee has not formed it yet", "node2", 3, "A", false, answers{"node1": empty, "node3": empty}, ripens},
		{"three, another formed one than the grantee", "node2", 3, "A", false, answers{"node1": begun("B")}, ripens},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newTestFormation(t, tt.self, tt.total)
			f.granted = tt.granted
			for range 5 { // the answers come in any order
				got := f.judge(tt.answers, tt.patient)
				if got.join == "" && !got.form && got.reason == "" {
					t.Error("got no reason for waiting; want one")
				}
				got.reason = ""
				if got != tt.want {
					t.Fatalf("got %+v; want %+v", got, tt.want)
				}
			}
		})
	}
}

// However the answers come out, and whatever was granted, a node forms no cluster and takes up no lesser one while any
// node that answers holds state.
func TestNoVerdictCostsAnAcknowledgedWrite(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for range 20_000 {
		total := 3 + 2*random.IntN(2)
		f := newTestFormation(t, fmt.Sprintf("node%d", 1+random.IntN(total)), total)
		f.granted = []string{"", "A", "B"}[random.IntN(3)]
		answers, holders := make(map[string]holding), 0
		ofCluster := make(map[string]int)
		for _, node := range f.others() {
			h := holding{[]string{"", "A", "B"}[random.IntN(3)], []uint64{0, 1, 2, 500}[random.IntN(4)]}
			if h.Cluster == "" {
				h.LastIndex = 0
			}
			if random.IntN(3) == 0 {
				continue // silent
			}
			answers[node] = h
			if h.Cluster != "" {
				ofCluster[h.Cluster]++
			}
			if h.LastIndex > 1 {
				holders++
			}
		}
		v := f.judge(answers, random.IntN(2) == 0)
		if holders > 0 && (v.form || v.join != "" && ofCluster[v.join] <= total/2) {
			t.Fatalf("%d nodes, answers %+v: got %+v; want it to wait", total, answers, v)
		}
		if v.form && (v.join != "" || 2*(len(answers)+1) <= total) {
			t.Fatalf("%d nodes, answers %+v: got %+v; want a majority to form a cluster, and no other", total, answers, v)
		}
	}
}

func TestGrants(t *testing.T) {
	f := newTestFormation(t, "node3", 3)
	steps := []struct {
		name  string
		to    string
		id    string
		after time.Duration // since the grant before
		fails string
	}{
		{"the first", "node1", "A", 0, ""},
		{"another node at once", "node2", "B", 0, "node node1 is forming the cluster"},
		{"itself at once", "node3", "C", 0, "node node1 is forming the cluster"},
		{"another node a little later", "node2", "B", grantHold - time.Second, "node node1 is forming the cluster"},
		{"the same node again", "node1", "D", 0, ""},
		{"another node when that is over", "node2", "B", grantHold, ""},
		{"the former node", "node1", "A", 0, "node node2 is forming the cluster"},
	}
	granted := ""
	for _, step := range steps {
		f.grantedAt = f.grantedAt.Add(-step.after)
		answer, err := f.handleGrant(t.Context(), step.to, []byte(step.id))
		if step.fails == "" {
			granted = step.id
		}
		if (err == nil) != (step.fails == "") || err != nil && err.Error() != step.fails || len(answer) > 0 {
			t.Errorf("%s: got answer %q, error %v; want none and %q", step.name, answer, err, step.fails)
		}
		if f.granted != granted {
			t.Errorf("%s: got %q granted; want %q", step.name, f.granted, granted)
		}
		f.grantedAt = f.grantedAt.Add(step.after)
	}
	if err := f.join("X", false); err != nil {
		t.Fatal(err)
	}
	if _, err := f.handleGrant(t.Context(), "node2", []byte("B")); err == nil {
		t.Error("of a cluster already: got no error; want one")
	}
}

func TestFormationFindsWhatItStored(t *testing.T) {
	peers := []Peer{{ID: "node1"}, {ID: "node2"}, {ID: "node3"}}
	for _, founder := range []bool{true, false} {
		dir := t.TempDir()
		cfg := &Config{NodeID: "node1", KVStore: storeBolt, StateDir: dir, Peers: peers}
		s := openTestStorage(t, storeBolt, dir)
		f := newFormation(cfg, hclog.NewNullLogger())
		err := f.open(s, nil)
		if err != nil || f.id() != "" {
			t.Fatalf("got cluster %q, error %v; want none", f.id(), err)
		}
		if err := errors.Join(f.join("CLUSTER", founder), s.close()); err != nil {
			t.Fatal(err)
		}
		f = newFormation(cfg, hclog.NewNullLogger())
		err = f.open(openTestStorage(t, storeBolt, dir), nil)
		if err != nil || f.id() != "CLUSTER" {
			t.Fatalf("got cluster %q, error %v; want CLUSTER and none", f.id(), err)
		}
		if got, err := f.find(t.Context()); err != nil || got != founder { // without asking anybody
			t.Errorf("got founder %v, error %v; want %v and none", got, err, founder)
		}
	}
}

func TestFormationRefusesStateWithoutACluster(t *testing.T) {
	for name, write := range map[string]func(*testing.T, *storage){
		"a log": func(t *testing.T, s *storage) {
			t.Helper()
			if err := s.logs.StoreLog(&raft.Log{Index: 1}); err != nil {
				t.Fatal(err)
			}
		},
		"a snapshot": func(t *testing.T, s *storage) { t.Helper(); writeSnapshot(t, s.snapshots, 1, "state") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := openTestStorage(t, storeBolt, dir)
			write(t, s)
			err := newFormation(&Config{StateDir: dir}, hclog.NewNullLogger()).open(s, nil)
			if err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("got error %v; want one that names %s", err, dir)
			}
		})
	}
}

func TestFormationOfABrokenStorage(t *testing.T) {
	broken := errors.New("input/output error")
	s := &storage{stable: &brokenStore{err: broken}, logs: &brokenStore{err: broken}, snapshots: &memorySnapshots{}}
	if err := newFormation(&Config{}, hclog.NewNullLogger()).open(s, nil); !errors.Is(err, broken) {
		t.Errorf("got error %v; want %v", err, broken)
	}
	f := newTestFormation(t, "node1", 1)
	f.store = s
	if _, err := f.find(t.Context()); !errors.Is(err, broken) || f.id() != "" {
		t.Errorf("got cluster %q, error %v; want none and %v", f.id(), err, broken)
	}
	if _, err := f.handleHolding(t.Context(), "node2", nil); !errors.Is(err, broken) {
		t.Errorf("got error %v; want %v: a node that cannot read its state must not say that it has none", err, broken)
	}
}

// checkOneCluster waits until all nodes are ready, and makes sure that all are of one cluster, which it returns, formed
// by one of them.
func checkOneCluster(t *testing.T, c *testCluster) string {
	t.Helper()
	for _, node := range c.nodes {
		waitFor(t, node.cfg.NodeID+" to be ready", func() bool { return node.Ready() == nil })
	}
	id := c.nodes[0].form.id()
	if id == "" {
		t.Error("got no cluster id; want one")
	}
	var founders []string
	for _, node := range c.nodes {
		if got := node.Status().Cluster; got != id {
			t.Errorf("got cluster %q of %s; want %q", got, node.cfg.NodeID, id)
		}
		var members []string
		for _, m := range node.members() {
			members = append(members, string(m.ID))
		}
		slices.Sort(members)
		if diff := cmp.Diff([]string{"node1", "node2", "node3"}, members); diff != "" {
			t.Errorf("members of %s differ (-want +got):\n%s", node.cfg.NodeID, diff)
		}
		if node.form.founder {
			founders = append(founders, node.cfg.NodeID)
		}
	}
	if len(founders) != 1 {
		t.Errorf("got founders %v; want one", founders)
	}
	return id
}

// waitLooking waits until the node has asked the others in vain and says so with the given words.
func waitLooking(t *testing.T, n *testNode, words string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%s to say %q", n.cfg.NodeID, words), func() bool {
		err := n.Ready()
		return err != nil && strings.Contains(err.Error(), words) && n.Status().State == "forming"
	})
	if got := n.Status(); got.Cluster != "" {
		t.Errorf("got cluster %q of %s; want none", got.Cluster, n.cfg.NodeID)
	}
}

func TestNodesStartedAtDifferentMomentsFormOneCluster(t *testing.T) {
	for _, store := range []string{storeBolt, storeMemory} {
		for _, order := range [][]int{{0, 1, 2}, {2, 0, 1}, {1, 2, 0}} {
			t.Run(fmt.Sprint(store, order), func(t *testing.T) {
				t.Parallel()
				c := unstartedCluster(t, 3, store)
				c.start(order[0])
				waitLooking(t, c.nodes[order[0]], "1 of 3 nodes answer")
				c.start(order[1])
				waitLooking(t, c.nodes[order[0]], "2 of 3 nodes answer")
				waitLooking(t, c.nodes[order[1]], "2 of 3 nodes answer")
				c.start(order[2])
				checkOneCluster(t, c)
			})
		}
	}
}

func TestTwoClustersHaveTwoIDs(t *testing.T) {
	t.Parallel()
	one, other := newTestNode(t, storeMemory).form.id(), newTestNode(t, storeMemory).form.id()
	if one == "" || one == other {
		t.Errorf("got cluster ids %q and %q; want two", one, other)
	}
}

func TestRestartOfAllNodesKeepsTheCluster(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	want := checkOneCluster(t, c)
	founder := slices.IndexFunc(c.nodes, func(n *testNode) bool { return n.form.founder })
	if _, err := c.nodes[0].kv.Set(t.Context(), []Pair{{"k", "1"}}, Condition{}); err != nil {
		t.Fatal(err)
	}
	for i := range c.nodes {
		c.stop(i)
	}
	for _, i := range c.followers(founder) { // they need the founder no more
		c.start(i)
	}
	c.leader(c.followers(founder)...)
	c.start(founder)
	if got := checkOneCluster(t, c); got != want {
		t.Errorf("got cluster %s after the restart; want %s", got, want)
	}
	for _, node := range c.nodes {
		if item, err := node.kv.Get(t.Context(), "k", Linearizable); err != nil || item.Value != "1" {
			t.Errorf("got %q, error %v through %s; want 1 and none", item.Value, err, node.cfg.NodeID)
		}
	}
}

// A founder may stop at any moment before anybody has joined; the cluster forms all the same when all are there.
func TestFounderThatStoppedBeforeAnybodyJoined(t *testing.T) {
	const cluster = "FOUNDEDBEFORE"
	steps := []struct {
		name string
		do   func(*Config, *storage) error
	}{
		{"stored the cluster's id", func(_ *Config, s *storage) error {
			return s.stable.Set(keyCluster, append([]byte{foundedHere}, cluster...))
		}},
		// The two writes of raft.BootstrapCluster.
		{"stored the first term", func(_ *Config, s *storage) error {
			return s.stable.SetUint64([]byte("CurrentTerm"), 1)
		}},
		{"stored the log's first entry", func(cfg *Config, s *storage) error {
			return s.logs.StoreLog(&raft.Log{
				Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(membership(cfg.Peers)),
			})
		}},
		{"voted for itself", func(cfg *Config, s *storage) error {
			return errors.Join(s.stable.SetUint64([]byte("CurrentTerm"), 2), s.stable.SetUint64(keyLastVoteTerm, 2),
				s.stable.Set(keyLastVoteCand, []byte(cfg.NodeID)))
		}},
	}
	for i, last := range steps {
		for _, order := range [][]int{{0, 1, 2}, {1, 2, 0}} {
			t.Run(fmt.Sprint(last.name, order), func(t *testing.T) {
				t.Parallel()
				c := unstartedCluster(t, 3, storeBolt)
				cfg := c.nodes[0].cfg
				s := openTestStorage(t, storeBolt, cfg.StateDir)
				for _, step := range steps[:i+1] {
					if err := step.do(cfg, s); err != nil {
						t.Fatal(err)
					}
				}
				if err := s.close(); err != nil {
					t.Fatal(err)
				}
				for _, node := range order {
					c.start(node)
				}
				if got := checkOneCluster(t, c); got != cluster {
					t.Errorf("got cluster %s; want %s", got, cluster)
				}
			})
		}
	}
}

// Two of three lost their disks, and what was acknowledged may be on the third or gone: that is for people to decide.
func TestMajorityWithoutStateWaitsBesideASurvivor(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	want := checkOneCluster(t, c)
	for i := range c.nodes {
		c.stop(i)
	}
	const survivor = 0
	for _, i := range c.followers(survivor) {
		c.nodes[i].cfg.StateDir = t.TempDir()
		c.start(i)
	}
	for _, i := range c.followers(survivor) {
		waitLooking(t, c.nodes[i], "2 of 3 nodes answer")
	}
	c.start(survivor)
	for _, i := range c.followers(survivor) {
		waitLooking(t, c.nodes[i], "hold state")
	}
	if got := c.nodes[survivor].form.id(); got != want {
		t.Errorf("got cluster %s; want %s", got, want)
	}
	waitFor(t, "the survivor to be running", func() bool { return c.nodes[survivor].State().State != "starting" })
}

// A node that has stopped has no thread left that could use its storage or answer a peer.
func TestStoppedNodeLeavesNothingRunning(t *testing.T) {
	checkLeaks(t)
	c := unstartedCluster(t, 1, storeBolt)
	c.start(0)
	waitFor(t, "the node to be ready", func() bool { return c.nodes[0].Ready() == nil })
	c.stop(0)
	select {
	case err := <-c.nodes[0].Failed():
		t.Errorf("got failure %v; want none", err)
	default:
	}
}

// slowWrites holds up each write to the log while slow is set.
type slowWrites struct {
	raft.LogStore
	slow  atomic.Bool
	begun chan struct{} // receives when a slow write has begun
	under atomic.Int32  // slow writes under way
}

func (s *slowWrites) StoreLogs(entries []*raft.Log) error {
	if s.slow.Load() {
		s.under.Add(1)
		defer s.under.Add(-1)
		s.begun <- struct{}{}
		time.Sleep(300 * time.Millisecond) // long enough for a shutdown that does not wait to be over
	}
	return s.LogStore.StoreLogs(entries)
}

func TestStorageIsClosedOnlyWhenRaftHasStopped(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 1, storeMemory)
	logs := &slowWrites{begun: make(chan struct{}, 1)}
	closed := make(chan int32, 1)
	c.nodes[0].open = func(cfg *Config, log hclog.Logger, fail func(error)) (*storage, error) {
		s, err := openStorage(cfg, log, fail)
		if err == nil {
			logs.LogStore, s.logs = s.logs, logs
			s.close = func() error { closed <- logs.under.Load(); return nil }
		}
		return s, err
	}
	c.start(0)
	waitFor(t, "the node to be ready", func() bool { return c.nodes[0].Ready() == nil })
	logs.slow.Store(true)
	var write sync.WaitGroup
	defer write.Wait()
	write.Go(func() { _, _ = c.nodes[0].kv.Set(t.Context(), []Pair{{"k", "1"}}, Condition{}) }) // its outcome is unknown
	<-logs.begun
	c.stop(0)
	if under := <-closed; under != 0 {
		t.Errorf("got the storage closed during %d writes; want none", under)
	}
}

func TestNodeStoppedWhileItStarts(t *testing.T) {
	checkLeaks(t)
	stop := func(c *testCluster) {
		defer func() {
			if cause := recover(); cause != nil {
				t.Errorf("got panic %v; want none", cause)
			}
		}()
		c.stop(0)
	}
	for round := range 30 {
		c := unstartedCluster(t, 1, storeMemory)
		c.start(0)
		for range round { // stop it at another moment each time
			runtime.Gosched()
		}
		stop(c)
	}
	for range 30 {
		c := unstartedCluster(t, 1, storeMemory)
		c.start(0)
		for c.nodes[0].form.id() == "" {
			runtime.Gosched()
		}
		stop(c)
	}
}

// A node that comes back with nothing takes up the cluster of the others, and is brought up by their leader.
func TestWipedNodeIsBroughtBack(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	want := checkOneCluster(t, c)
	const wiped = 0 // it formed the cluster, and is as little entitled to form one now as any other
	if _, err := c.nodes[wiped].kv.Set(t.Context(), []Pair{{"k", "1"}}, Condition{}); err != nil {
		t.Fatal(err)
	}
	c.stop(wiped)
	c.nodes[wiped].cfg.StateDir = t.TempDir()
	c.start(wiped)
	waitFor(t, "the wiped node to be ready", func() bool { return c.nodes[wiped].Ready() == nil })
	if got := c.nodes[wiped].form.id(); got != want || c.nodes[wiped].form.founder {
		t.Errorf("got cluster %s, founder %v; want %s, false", got, c.nodes[wiped].form.founder, want)
	}
	if item, err := c.nodes[wiped].kv.Get(t.Context(), "k", Linearizable); err != nil || item.Value != "1" {
		t.Errorf("got %q, error %v; want 1 and none", item.Value, err)
	}
}

// Whoever speaks in a cluster's name makes a node look again at once, and never blocks.
func TestHearNeverBlocks(t *testing.T) {
	f := newTestFormation(t, "node1", 3)
	for range 3 {
		f.hear()
	}
	if got := len(f.look); got != 1 {
		t.Errorf("got %d looks due; want 1", got)
	}
}

func TestHolding(t *testing.T) {
	f := newTestFormation(t, "node1", 3)
	steps := []struct {
		name string
		do   func() error
		want string
	}{
		{"nothing", func() error { return nil }, `{"cluster":"","last_index":0}`},
		{"a cluster", func() error { return f.join("A", false) }, `{"cluster":"A","last_index":0}`},
		{"entries", func() error { return f.store.logs.StoreLog(&raft.Log{Index: 7}) }, `{"cluster":"A","last_index":7}`},
		{"a snapshot", func() error { writeSnapshot(t, f.store.snapshots, 9, ""); return nil }, `{"cluster":"A","last_index":9}`},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		got, err := f.handleHolding(t.Context(), "node2", nil)
		if err != nil || !bytes.Equal(got, []byte(step.want)) {
			t.Errorf("%s: got %s, error %v; want %s and none", step.name, got, err, step.want)
		}
	}
}
