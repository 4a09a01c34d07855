package main

import (
	"context"
	"encoding/json"
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
	cfg := &Config{NodeID: id, KVStore: storeMemory}
	for i := range total {
		cfg.Peers = append(cfg.Peers, Peer{ID: fmt.Sprintf("node%d", i+1)})
	}
	f := newFormation(cfg, hclog.NewNullLogger(), func() bool { return false })
	err := f.open(openTestStorage(t, storeMemory, ""))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// What a node can answer.
func nothingHeld() holding              { return holding{Lost: true} }
func joinedOnly(cluster string) holding { return holding{Cluster: cluster, Votes: true} }
func founded(cluster string) holding {
	return holding{Cluster: cluster, LastTerm: 1, LastIndex: 1, Fresh: true, Votes: true}
}

func holdsUpTo(cluster string, term, index uint64) holding {
	return holding{Cluster: cluster, LastTerm: term, LastIndex: index, Votes: true}
}

func gatedAt(cluster string, index uint64, lost bool) holding {
	return holding{Cluster: cluster, LastTerm: 2, LastIndex: index, Lost: lost}
}

func TestWhoFormsACluster(t *testing.T) {
	type answers map[string]holding
	empty, holds := nothingHeld(), holdsUpTo("A", 2, 500)
	tests := []struct {
		name          string
		total         int
		answers       answers
		at1, after30s string
	}{
		// (a) All say they have none, or it is alone.
		{"one", 1, answers{"node1": empty}, "node1", "node1"},
		{"three, all empty", 3, answers{"node1": empty, "node2": empty, "node3": empty}, "node1", "node1"},
		// (b) A majority says so and nobody with state answers.
		{"three, one silent", 3, answers{"node2": empty, "node3": empty}, "", "node2"},
		{"five, two silent", 5, answers{"node2": empty, "node3": empty, "node5": empty}, "", "node2"},
		{"five, one silent", 5, answers{"node2": empty, "node3": empty, "node4": empty, "node5": empty}, "", "node2"},
		{
			"three, one was being brought up and had got nothing, on disk", 3,
			answers{"node1": empty, "node2": empty, "node3": gatedAt("A", 0, false)},
			"", "node1",
		},
		// (d), (e) Somebody holds something, or too few answer.
		{"three, one silent, one holds state", 3, answers{"node1": empty, "node2": holds}, "", ""},
		{"three, one holds state", 3, answers{"node1": empty, "node2": empty, "node3": holds}, "", ""},
		{
			"three, one was being brought up, in memory", 3,
			answers{"node1": empty, "node2": empty, "node3": gatedAt("A", 7, true)},
			"", "",
		},
		{
			"three, one was being brought up, on disk", 3,
			answers{"node1": empty, "node2": empty, "node3": gatedAt("A", 7, false)},
			"", "",
		},
		{"three, alone", 3, answers{"node1": empty}, "", ""},
		{"two, one silent", 2, answers{"node1": empty}, "", ""},
		{"four, a half", 4, answers{"node1": empty, "node2": empty}, "", ""},
		{"three, one of a cluster with nothing in it", 3, answers{"node1": empty, "node2": joinedOnly("A")}, "", ""},
	}
	for _, tt := range tests {
		c := newCensus(tt.total, tt.answers)
		if at1, after30s := c.forms(false), c.forms(true); at1 != tt.at1 || after30s != tt.after30s {
			t.Errorf("%s: got %q at once, %q after a while; want %q, %q", tt.name, at1, after30s, tt.at1, tt.after30s)
		}
	}
}

// A founder whose cluster has had no leader is joined only when nobody has more.
func TestWhichFounderIsJoined(t *testing.T) {
	type answers map[string]holding
	survivor := holding{Cluster: "C", LastTerm: 2, LastIndex: 500, Fresh: true, Votes: true}
	for _, tt := range []struct {
		name    string
		answers answers
		want    string
	}{
		{"one", answers{"node1": nothingHeld(), "node2": founded("A")}, "node2"},
		{"of two, the first cluster's", answers{"node1": nothingHeld(), "node2": founded("B"), "node3": founded("A")}, "node3"},
		{"one from long ago, beside state", answers{"node1": founded("A"), "node2": holdsUpTo("B", 2, 500), "node3": nothingHeld()}, ""},
		{"a survivor", answers{"node1": nothingHeld(), "node2": survivor}, "node2"},
		{"a survivor before one with nothing", answers{"node1": founded("A"), "node2": survivor, "node3": nothingHeld()}, "node2"},
		{"a survivor beside one that has more", answers{"node1": holdsUpTo("B", 2, 501), "node2": survivor, "node3": nothingHeld()}, ""},
	} {
		if got := newCensus(3, tt.answers).founder; got != tt.want {
			t.Errorf("%s: got %q; want %q", tt.name, got, tt.want)
		}
	}
}

// A vote in a cluster that is no more must not count in another.
func TestVotesEndWithTheirCluster(t *testing.T) {
	f := newTestFormation(t, "node1", 3)
	castVote(t, f.store.stable, 5, "node2")
	if err := f.become(standing{kind: standGated, index: 7, cluster: "B"}, ""); err != nil {
		t.Fatal(err)
	}
	term, err1 := f.store.stable.GetUint64(keyLastVoteTerm)
	candidate, err2 := f.store.stable.Get(keyLastVoteCand)
	if err := errors.Join(err1, err2); err != nil || term != 0 || len(candidate) > 0 {
		t.Errorf("got a vote for %q in term %d, error %v; want none", candidate, term, err)
	}
}

func TestStanceOfANodeWithoutALeader(t *testing.T) {
	type answers map[string]holding // of node1, about which it is, and others
	empty, holds := nothingHeld(), holdsUpTo("A", 2, 500)
	tests := []struct {
		name         string
		total        int
		answers      answers
		memory, bolt stance
	}{
		{"alone", 3, answers{"node1": holds}, staysOn, staysOn},
		{"with another that has state", 3, answers{"node1": holds, "node2": holds}, staysOn, staysOn},
		{"a minority has lost its state", 5, answers{"node1": holds, "node2": empty, "node3": empty}, staysOn, staysOn},
		{"a majority has lost its state", 3, answers{"node1": holds, "node2": empty, "node3": empty}, isSurvivor, staysOn},
		{
			"a majority has, and another survivor has a longer log", 5,
			answers{"node1": holds, "node2": holdsUpTo("A", 2, 501), "node3": empty, "node4": empty, "node5": empty},
			staysOn, staysOn,
		},
		{
			"a majority has, and another survivor has a log of a later term", 5,
			answers{"node1": holds, "node2": holdsUpTo("A", 3, 400), "node3": empty, "node4": empty, "node5": empty},
			staysOn, staysOn,
		},
		{
			"a majority has, and another survivor has a shorter log", 5,
			answers{"node1": holds, "node2": holdsUpTo("A", 2, 499), "node3": empty, "node4": empty, "node5": empty},
			isSurvivor, staysOn,
		},
		{
			"it was being brought up, and the rest of a majority has lost its state", 3,
			answers{"node1": gatedAt("A", 400, true), "node2": empty},
			isSurvivor, isSurvivor,
		},
		{"a majority is of another cluster", 3, answers{"node1": holds, "node2": joinedOnly("B"), "node3": founded("B")}, isOutdone, isOutdone},
		{"a minority is of another cluster", 3, answers{"node1": holds, "node2": founded("B")}, staysOn, staysOn},
		{
			"it was being brought up, and a majority is of another cluster", 3,
			answers{"node1": gatedAt("A", 400, true), "node2": holdsUpTo("B", 2, 9), "node3": holdsUpTo("B", 2, 9)},
			forgets, forgets,
		},
		{
			"it was being brought up and has got nothing, and another cluster forms", 3,
			answers{"node1": gatedAt("A", 0, true), "node2": founded("B")},
			forgets, forgets,
		},
		{
			"it was being brought up, and another cluster forms that has less", 3,
			answers{"node1": gatedAt("A", 400, true), "node2": founded("B")},
			staysOn, staysOn,
		},
		{
			"it was being brought up, and a survivor goes on", 3,
			answers{"node1": gatedAt("A", 400, true), "node2": {Cluster: "B", LastTerm: 2, LastIndex: 500, Fresh: true, Votes: true}},
			forgets, forgets,
		},
		{
			"it founded a cluster long ago, and another has state", 3,
			answers{"node1": founded("A"), "node2": holdsUpTo("B", 2, 500), "node3": empty},
			forgets, forgets,
		},
		{
			"it founded a cluster, and one of that has state already", 3,
			answers{"node1": founded("A"), "node2": holdsUpTo("A", 2, 2), "node3": holdsUpTo("B", 2, 500)},
			staysOn, staysOn,
		},
		{
			"it joined a cluster of which another has state", 3,
			answers{"node1": joinedOnly("A"), "node2": holdsUpTo("A", 2, 2)},
			staysOn, staysOn,
		},
		{
			"it joined a cluster that has nothing, and another has state", 3,
			answers{"node1": joinedOnly("A"), "node2": founded("A"), "node3": holdsUpTo("B", 2, 500)},
			forgets, forgets,
		},
		{
			"it was being brought up on disk, and another cluster forms", 3,
			answers{"node1": gatedAt("A", 400, false), "node2": founded("B")},
			staysOn, staysOn,
		},
		{
			"it founded a cluster, and a majority is of another", 3,
			answers{"node1": founded("A"), "node2": joinedOnly("B"), "node3": founded("B")},
			forgets, forgets,
		},
		{
			"its founder is without state, and nobody has anything", 3,
			answers{"node1": joinedOnly("A"), "node2": joinedOnly("A"), "node3": empty},
			forgets, forgets,
		},
		{
			"its founder is silent, and nobody has anything", 3,
			answers{"node1": joinedOnly("A"), "node2": joinedOnly("A")},
			isBlank, isBlank,
		},
		{
			"its founder has had no leader yet", 3,
			answers{"node1": joinedOnly("A"), "node2": founded("A"), "node3": empty},
			staysOn, staysOn,
		},
	}
	for _, tt := range tests {
		c := newCensus(tt.total, tt.answers)
		if memory, bolt := c.stance("node1", storeMemory), c.stance("node1", storeBolt); memory != tt.memory || bolt != tt.bolt &&
			!tt.answers["node1"].Lost { // which no node with files says of itself
			t.Errorf("%s: got %v in memory, %v on disk; want %v, %v", tt.name, memory, bolt, tt.memory, tt.bolt)
		}
	}
}

// However the answers come out, a node with state gives it up only when a majority has none or has another cluster, and
// none forms a cluster while somebody that answers has state.
func TestNoStanceCostsAnAcknowledgedWrite(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	all := []holding{
		nothingHeld(), joinedOnly("A"), joinedOnly("B"), founded("A"), founded("B"), holdsUpTo("A", 2, 7), holdsUpTo("A", 3, 6),
		holdsUpTo("B", 2, 9), gatedAt("A", 5, true), gatedAt("B", 0, true),
	}
	for range 50_000 {
		total := 3 + 2*random.IntN(2)
		answers := map[string]holding{"node1": all[random.IntN(len(all))]}
		lost, ofOther, holders := 0, 0, 0
		for i := 2; i <= total; i++ {
			if random.IntN(4) > 0 { // else it is silent
				answers[fmt.Sprintf("node%d", i)] = all[random.IntN(len(all))]
			}
		}
		mine := answers["node1"]
		for _, h := range answers {
			if h.Lost {
				lost++
			}
			if h.Cluster != "" && h.Cluster != mine.Cluster {
				ofOther++
			}
			if h.LastIndex > 1 {
				holders++
			}
		}
		c := newCensus(total, answers)
		if c.forms(true) != "" && (holders > 0 || 2*lost <= total) {
			t.Fatalf("%d nodes, answers %+v: %s forms a cluster; want none", total, answers, c.forms(true))
		}
		got := c.stance("node1", storeMemory)
		toLose := mine.LastIndex > 1 && !mine.Lost
		if got == isOutdone && 2*ofOther <= total || got == isSurvivor && 2*lost <= total || got == forgets && toLose {
			t.Fatalf("%d nodes, answers %+v: got stance %v of node1", total, answers, got)
		}
	}
}

func TestGrants(t *testing.T) {
	f := newTestFormation(t, "node3", 3)
	for _, step := range []struct {
		name  string
		to    string
		after time.Duration // since the grant before
		fails error
	}{
		{"the first", "node1", 0, nil},
		{"another node at once", "node2", 0, errPromised},
		{"itself at once", "node3", 0, errPromised},
		{"another node a little later", "node2", grantHold - time.Second, errPromised},
		{"the same node again", "node1", 0, nil},
		{"another node when that is over", "node2", grantHold, nil},
		{"the former node", "node1", 0, errPromised},
	} {
		f.grantedAt = f.grantedAt.Add(-step.after)
		if _, err := f.handleGrant(t.Context(), step.to, nil); !errors.Is(err, step.fails) {
			t.Errorf("%s: got error %v; want %v", step.name, err, step.fails)
		}
		f.grantedAt = f.grantedAt.Add(step.after)
	}
	member := standing{kind: standMember, cluster: "X"}
	if err := f.become(member, "node1"); !errors.Is(err, errPromised) {
		t.Errorf("got error %v for a cluster of another node than the promise was to; want %v", err, errPromised)
	}
	if err := f.become(standing{kind: standGated, cluster: "X"}, "node2"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.handleGrant(t.Context(), "node2", nil); err != nil {
		t.Errorf("being brought up, in memory: got error %v; want none", err)
	}
	if err := f.become(member, ""); !errors.Is(err, errPromised) {
		t.Errorf("got error %v for passing the gate within the promise; want %v", err, errPromised)
	}
	f.grantedAt = f.grantedAt.Add(-grantHold)
	if err := f.become(member, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := f.handleGrant(t.Context(), "node2", nil); err == nil {
		t.Error("a full member: got no error; want one")
	}
}

func TestFormationFindsWhatItStored(t *testing.T) {
	cfg := &Config{NodeID: "node1", KVStore: storeBolt, Peers: []Peer{{ID: "node1"}, {ID: "node2"}, {ID: "node3"}}}
	open := func(dir string) (*formation, error) {
		f := newFormation(cfg, hclog.NewNullLogger(), func() bool { return false })
		return f, f.open(openTestStorage(t, storeBolt, dir))
	}
	for _, want := range []standing{
		{kind: standFounder, index: 1, cluster: "CLUSTER"}, {kind: standMember, cluster: "CLUSTER"}, {kind: standGated, index: 7, cluster: "CLUSTER"},
	} {
		dir := t.TempDir()
		f, err := open(dir)
		if err != nil || f.id() != "" {
			t.Fatalf("got cluster %q, error %v; want none", f.id(), err)
		}
		if err := errors.Join(f.become(want, ""), f.store.close()); err != nil {
			t.Fatal(err)
		}
		f, err = open(dir)
		if err != nil || f.current() != want {
			t.Errorf("got %v, error %v; want %v", f.current(), err, want)
		}
		if err := f.find(t.Context(), nil); err != nil { // without asking anybody
			t.Errorf("got error %v; want none", err)
		}
	}
	for _, damaged := range []string{"+", "+1234567", "+12345678", "-", "~", "~12345678", "?", "?12345678CLUSTER"} {
		if s, err := decodeStanding([]byte(damaged)); err == nil {
			t.Errorf("got %+v from %q; want an error", s, damaged)
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
		"a snapshot": func(t *testing.T, s *storage) { t.Helper(); writeSnapshot(t, s.snapshots, 1, framed("state")) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := openTestStorage(t, storeBolt, dir)
			write(t, s)
			err := newFormation(&Config{StateDir: dir}, hclog.NewNullLogger(), nil).open(s)
			if err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("got error %v; want one that names %s", err, dir)
			}
		})
	}
}

func TestFormationOfABrokenStorage(t *testing.T) {
	broken := errors.New("input/output error")
	s := &storage{stable: &brokenStore{err: broken}, logs: &brokenStore{err: broken}, snapshots: &checkedSnapshots{SnapshotStore: &memorySnapshots{}}}
	if err := newFormation(&Config{}, hclog.NewNullLogger(), nil).open(s); !errors.Is(err, broken) {
		t.Errorf("got error %v; want %v", err, broken)
	}
	f := newTestFormation(t, "node1", 1)
	f.store = s
	if err := f.find(t.Context(), nil); !errors.Is(err, broken) || f.id() != "" {
		t.Errorf("got cluster %q, error %v; want none and %v", f.id(), err, broken)
	}
	if _, err := f.handleHolding(t.Context(), "node2", nil); !errors.Is(err, broken) {
		t.Errorf("got error %v; want %v: a node that cannot read its state must not say that it has none", err, broken)
	}
}

// checkOneCluster waits until all nodes are ready, and makes sure that all are members of one cluster, which it returns.
func checkOneCluster(t *testing.T, c *testCluster) string {
	t.Helper()
	for _, node := range c.nodes {
		waitFor(t, node.cfg.NodeID+" to be ready", func() bool { return node.Ready() == nil })
	}
	id := c.nodes[0].form.id()
	if id == "" {
		t.Error("got no cluster id; want one")
	}
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
		if got := node.form.current().kind; got != standMember {
			t.Errorf("got %s as %q; want it a member", node.cfg.NodeID, got)
		}
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
	const founder = 0 // by its id
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
			return s.stable.Set(keyCluster, standing{kind: standFounder, index: 1, cluster: cluster}.encode())
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
				s, err := openStorage(cfg, hclog.NewNullLogger(), nil)
				if err != nil {
					t.Fatal(err)
				}
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
		waitLooking(t, c.nodes[i], "without state, 1 with it")
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
	if got := c.nodes[wiped].form.id(); got != want || c.nodes[wiped].form.current().kind != standMember {
		t.Errorf("got %+v; want a member of %s", c.nodes[wiped].form.current(), want)
	}
	if item, err := c.nodes[wiped].kv.Get(t.Context(), "k", Linearizable); err != nil || item.Value != "1" {
		t.Errorf("got %q, error %v; want 1 and none", item.Value, err)
	}
}

// Whoever speaks in a cluster's name makes a node look again at once, and never blocks.
// No hello could carry such an id, so a node that took it would never be heard again.
func TestClusterIDThatIsTooLongIsNotTaken(t *testing.T) {
	t.Parallel()
	_, nodes := newPeerNodes(t, "a", "b")
	f, s := &formation{log: hclog.NewNullLogger(), peers: nodes[0].peers}, &Store{peers: nodes[0].peers}
	for _, length := range []int{255, 256} {
		answer := func(context.Context, string, []byte) ([]byte, error) {
			return fmt.Appendf(nil, `{"cluster":%q,"leads":true}`, strings.Repeat("c", length)), nil
		}
		nodes[1].handlers = map[byte]handler{opHolding: answer, opAdmit: answer}
		if answers := f.askAll(t.Context(), []string{"b"}); len(answers) != 256-length {
			t.Errorf("got %v with an id of %d bytes", answers, length)
		}
		if a, err := s.askAdmission(t.Context(), "b"); (err == nil) != (length == 255) {
			t.Errorf("got %v, error %v with an id of %d bytes", a, err, length)
		}
	}
}

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
		want holding
	}{
		{"nothing", func() error { return nil }, holding{Lost: true}},
		{"a cluster that it founds", func() error {
			return f.become(standing{kind: standFounder, index: 1, cluster: "A"}, "")
		}, holding{Cluster: "A", Fresh: true, Votes: true}},
		{
			"its first entry", func() error { return f.store.logs.StoreLog(&raft.Log{Index: 1, Term: 1}) },
			holding{Cluster: "A", LastTerm: 1, LastIndex: 1, Fresh: true, Votes: true},
		},
		{"entries", func() error {
			f.store.rules.settle = f.settle
			return f.store.logs.StoreLog(&raft.Log{Index: 7, Term: 3})
		}, holdsUpTo("A", 3, 7)},
		{"a snapshot", func() error { writeSnapshot(t, f.store.snapshots, 9, framed("")); return nil }, holdsUpTo("A", 2, 9)},
		{
			"a gate", func() error { return f.become(standing{kind: standGated, cluster: "A"}, "") },
			holding{Cluster: "A", LastTerm: 2, LastIndex: 9, Lost: true},
		},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		answer, err := f.handleHolding(t.Context(), "node2", nil)
		got := holding{}
		if err = errors.Join(err, json.Unmarshal(answer, &got)); err != nil || got != step.want {
			t.Errorf("%s: got %+v, error %v; want %+v and none", step.name, got, err, step.want)
		}
	}
}
