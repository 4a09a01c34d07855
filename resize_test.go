package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// What the leader node1 does for a list of nodes. Servers are <node>#<number of its state>; those with "-" have no vote.
func TestNextChangeForAList(t *testing.T) {
	const c = testCluster1
	one, three := []string{"node1#1"}, []string{"node1#1", "node2#1", "node3#1"}
	five := append(slices.Clone(three), "node4#1", "node5#1")
	for _, tt := range []struct {
		name     string
		members  []string
		list     string   // of node1 and, unless said, of all who answer
		answers  []string // servers of this cluster; "node4#1 blank", "node2#1 of x#1", "node2#1 names node1,node2", "node2#1 at host:1"
		caughtUp []string
		keeps    bool // the list is from PEERS
		want     string
	}{
		{"one more, which has joined", one, "node1,node2", []string{"node2#1"}, nil, true, "AddNonvoter node2#1"},
		{"one more, blank yet", one, "node1,node2", []string{"node2#1 blank"}, nil, true, ""},
		{"one more, silent", one, "node1,node2", nil, nil, true, ""},
		{"one more, of another cluster", one, "node1,node2,node3", []string{"node2#1 of x#1", "node3#1 blank"}, nil, true, ""},
		{"only this leader names more", three, "node1,node2,node3,node4", []string{"node2#1 names node1,node2,node3", "node3#1 names node1,node2,node3", "node4#1"}, nil, true, ""},
		{"two of three voters name more, and three of four named", three, "node1,node2,node3,node4", []string{"node2#1", "node3#1 names node1,node2,node3", "node4#1"}, nil, true, "AddNonvoter node4#1"},
		{"the new ones alone name more", three, "node1,node2,node3,node4,node5", []string{"node2#1 names node1,node2,node3", "node3#1 names node1,node2,node3", "node4#1", "node5#1"}, nil, true, ""},
		{"a voter that has lost its state does not count", three, "node1,node2,node3,node4", []string{"node2#2", "node4#1"}, nil, true, "AddNonvoter node2#2"},
		{"one after the other", append(slices.Clone(three), "node4#1-"), "node1,node2,node3,node4,node5", []string{"node2#1", "node3#1", "node4#1", "node5#1"}, nil, true, ""},
		{"the first has caught up", append(slices.Clone(three), "node4#1-"), "node1,node2,node3,node4,node5", []string{"node2#1", "node3#1", "node4#1", "node5#1"}, []string{"node4#1"}, true, "AddVoter node4#1"},
		{"the second", append(slices.Clone(three), "node4#1"), "node1,node2,node3,node4,node5", []string{"node2#1", "node3#1", "node4#1", "node5#1"}, nil, true, "AddNonvoter node5#1"},

		{"PEERS removes nobody", five, "node1,node2,node3", five, nil, true, ""},
		{"fewer", five, "node1,node2,node3", five, nil, false, "RemoveServer node4#1"},
		{"fewer, and the leaver is silent", five, "node1,node2,node3", []string{"node2#1", "node3#1"}, nil, false, "RemoveServer node4#1"},
		{"fewer, and no more than a majority answers", five, "node1,node2,node3", []string{"node2#1", "node4#1"}, nil, false, "RemoveServer node5#1"},
		{"fewer, and a leaver that has lost its state votes no more", five, "node1,node2,node3", []string{"node2#1", "node4#1", "node5#2"}, nil, false, "RemoveServer node5#1"},
		{"fewer, and one of those that stay has lost its state", five, "node1,node2,node3", []string{"node2#2", "node3#1", "node4#1", "node5#1"}, nil, false, "AddNonvoter node2#2"},
		{"likewise, and it is not back yet", append(slices.Clone(five), "node2#2-"), "node1,node2,node3", []string{"node2#2", "node3#1", "node4#1", "node5#1"}, nil, false, ""},
		{"the leavers do not agree", five, "node1,node2,node3", []string{"node4#1 names node1,node2,node3,node4,node5", "node5#1 names node1,node2,node3,node4,node5", "node2#1", "node3#1"}, nil, false, "RemoveServer node4#1"},
		{"no majority agrees", five, "node1,node2,node3", []string{"node2#1", "node3#1 names node1,node2", "node4#1 names node1,node2,node3,node4,node5", "node5#1 names node1"}, nil, false, ""},
		{"most of those that stay are silent", five, "node1,node2,node3", []string{"node4#1", "node5#1"}, nil, false, ""},
		{"the leader leaves last", three, "node2,node3", three, nil, false, "hand over"},
		{"the leader leaves after another", five, "node3,node4,node5", five, nil, false, "RemoveServer node2#1"},
		{"replaced by a node of another name", three, "node1,node2,node4", []string{"node2#1", "node3#1", "node4#1"}, nil, false, "AddNonvoter node4#1"},
		{"likewise, and the old one is gone for good", three, "node1,node2,node4", []string{"node2#1", "node4#1"}, nil, false, "AddNonvoter node4#1"},
		{"the new one is in", append(slices.Clone(three), "node4#1"), "node1,node2,node4", []string{"node2#1", "node4#1"}, nil, false, "RemoveServer node3#1"},
		{"a non-voter that is not wanted any more", append(slices.Clone(three), "node4#1-"), "node1,node2,node3", []string{"node2#1", "node3#1", "node4#1"}, []string{"node4#1"}, false, "RemoveServer node4#1"},
		{"one more says where it is", one, "node1,node2", []string{"node2#1 at elsewhere:1"}, nil, true, "AddNonvoter node2#1 at elsewhere:1"},
		{"a leaver that has lost its state is not replaced", five, "node1,node2,node3", []string{"node2#1", "node3#1", "node4#2", "node5#1"}, nil, false, "RemoveServer node4#1"},
	} {
		v := view{self: "node1", answers: make(map[string]nodeInfo), silent: make(map[string]error), addresses: make(map[string]string)}
		for _, node := range []string{"node1", "node2", "node3", "node4", "node5"} {
			v.addresses[node], v.silent[node] = node+":12000", context.DeadlineExceeded
		}
		list := strings.Split(tt.list, ",")
		for _, answer := range append(tt.answers, "node1#1") {
			f := append(strings.Fields(answer), "")
			info := naming(holds(f[0], c, 2, 5), list...)
			for i, word := range f[1:] {
				switch word {
				case "blank":
					info = naming(blank(f[0]), list...)
				case "of":
					info.Cluster = f[i+2]
				case "names":
					info.Peers = strings.Split(f[i+2], ",")
				case "at":
					info.Address = f[i+2]
				}
			}
			v.answers[nodeOf(f[0])] = info
		}
		mine := v.answers["node1"]
		mine.Ready, mine.Members = true, configured(tt.members...)
		v.answers["node1"], v.peers = mine, list
		p := v.plan(!tt.keeps, catchUp(v, tt.caughtUp))
		got := ""
		if step, there := p.next(); there {
			got = fmt.Sprintf("%v %s", step.command, step.Server)
			if step.Address == "elsewhere:1" {
				got += " at " + step.Address
			}
		} else if p.handsOver() {
			got = "hand over"
		}
		if got != tt.want {
			t.Errorf("%s: got %q; want %q (%s)", tt.name, got, tt.want, p.waitsFor())
		}
		if moved := len(tt.members) != len(list); moved && p.waitsFor() == "" {
			t.Errorf("%s: no word on why the membership is not what the list says", tt.name)
		}
	}
}

// rename gives nodes of a cluster a list, as a change of PEERS_FILE does.
func (c *testCluster) rename(list []int, nodes ...int) {
	c.t.Helper()
	for _, n := range nodes {
		var peers []Peer
		for _, i := range list {
			id, addr := fmt.Sprintf("node%d", i+1), c.nodes[i].cfg.RaftAddr
			if l := c.links[[2]int{n, i}]; l != nil {
				addr = l.Addr
			}
			peers = append(peers, Peer{id, addr})
		}
		c.nodes[n].cfg.Peers, c.nodes[n].cfg.PeersFile = peers, "some-file"
		if c.nodes[n].running {
			c.nodes[n].list.now.Store(&peers)
		}
	}
}

func votersOf(n *testNode) (nodes []string) {
	for _, m := range n.members() {
		if m.Voter {
			nodes = append(nodes, nodeOf(m.Server))
		}
	}
	slices.Sort(nodes)
	return nodes
}

// The cluster grows from one node to three and five and shrinks again, to other nodes than it began with, while clients
// write. The two nodes that lead on the way leave it.
func TestClusterIsResized(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 5, storeBolt)
	c.rename([]int{0}, 0)
	c.start(0)
	waitFor(t, "the first node", func() bool { return c.nodes[0].Ready() == nil })
	var acknowledged atomic.Int64
	stop := make(chan struct{})
	var serving atomic.Int64 // the node that clients use
	done := make(chan error, 1)
	go func() {
		for n := 1; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			node := c.nodes[serving.Load()]
			if _, err := node.client.set(t.Context(), fmt.Sprint("k", n), "1"); err != nil {
				done <- fmt.Errorf("write %d through %s: %w", n, node.cfg.NodeID, err)
				return
			}
			acknowledged.Store(int64(n))
		}
	}()
	for _, step := range []struct {
		list  []int
		start []int
		use   int64
	}{
		{[]int{0, 1, 2}, []int{1, 2}, 1},
		{[]int{0, 1, 2, 3, 4}, []int{3, 4}, 4},
		{[]int{2, 3, 4}, nil, 4},
		{[]int{4}, nil, 4},
	} {
		for _, i := range step.start {
			c.rename(step.list, i)
			c.start(i)
		}
		c.rename(step.list, []int{4, 3, 2, 1, 0}...) // the one that leads hears last
		var want []string
		for _, i := range step.list {
			want = append(want, fmt.Sprintf("node%d", i+1))
		}
		serving.Store(step.use)
		waitFor(t, fmt.Sprint("the voters ", want), func() bool {
			node := c.nodes[step.list[0]]
			return slices.Equal(votersOf(node), want) && node.Ready() == nil
		})
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	last := c.nodes[4]
	for n := int64(1); n <= acknowledged.Load(); n++ {
		if item, err := last.client.get(t.Context(), fmt.Sprint("k", n), Linearizable); err != nil || item.Version == 0 {
			t.Fatalf("key %d of %d: got %+v, %v; want what was acknowledged", n, acknowledged.Load(), item, err)
		}
	}
	t.Logf("%d writes", acknowledged.Load())
	if err := c.nodes[0].Ready(); err == nil || !strings.Contains(err.Error(), "not in PEERS_FILE") {
		t.Errorf("got %v from a node that has left; want that it is not in PEERS_FILE", err)
	}
	wantLeft(t, c.nodes[0])
	if got := last.Status().Membership; !slices.Equal(got.Wanted, []string{"node5"}) || !slices.Equal(got.Actual, got.Wanted) || got.WaitsFor != "" {
		t.Errorf("got %+v in /status; want node5 alone", got)
	}
}

// wantLeft checks that a node which has left the cluster keeps no client waiting, and that clients connect anew.
func wantLeft(t *testing.T, n *testNode) {
	t.Helper()
	waitFor(t, "the node to know that it has left", func() bool { return n.State().left })
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := n.client.get(ctx, "k1", Linearizable); !errors.Is(err, ErrLeft) {
		t.Errorf("got %v from a read; want ErrLeft", err)
	}
	if _, err := n.client.set(ctx, "k1", "2"); !errors.Is(err, ErrLeft) {
		t.Errorf("got %v from a write; want ErrLeft", err)
	}
	if err := n.waitApplied(ctx, n.replica.applied.load()+1); !errors.Is(err, ErrLeft) {
		t.Errorf("got %v from a read that waits for an entry; want ErrLeft", err)
	}
	response := httptest.NewRecorder()
	n.server.answer(response, httptest.NewRequestWithContext(ctx, http.MethodGet, "/value/k1", http.NoBody))
	if response.Code != http.StatusServiceUnavailable || response.Header().Get("Connection") != "close" {
		t.Errorf("got %d, %v; want 503 and that the connection closes", response.Code, response.Header())
	}
}

// A change that was decided from an older configuration is refused: two leaders could else make two changes from the same.
func TestChangeOfAnOldConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.nodes[c.leader()]
	before := leader.replica.config.load()
	add := change{raft.AddNonvoter, member{Server: "node4#1", Address: "127.0.0.1:1"}}
	if err := leader.changeMembers(add, before); err != nil {
		t.Fatal(err)
	}
	add.Server = "node5#1"
	if err := leader.changeMembers(add, before); err == nil {
		t.Error("a change was made from a configuration that is not the newest any more")
	}
}

func TestListOnAMinorityChangesNothing(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	c.rename([]int{leader, c.followers(leader)[0]}, leader)
	waitFor(t, "the leader to say why it does not remove a node", func() bool {
		return strings.Contains(c.nodes[leader].Status().Membership.WaitsFor, "no majority")
	})
	time.Sleep(2 * time.Second)
	if got := votersOf(c.nodes[leader]); len(got) != 3 {
		t.Errorf("got voters %v; want all three", got)
	}

	// The leader has not heard of a list that the others have: they say so.
	c.rename([]int{0, 1, 2}, leader)
	others := c.followers(leader)
	c.rename([]int{0, 1}, others...)
	for _, other := range others {
		waitFor(t, "a follower to say that the leader has another list", func() bool {
			return strings.Contains(c.nodes[other].Status().Membership.WaitsFor, "which leads, names other nodes")
		})
	}
}

// The leader is not in the list of the nodes that it has to add. They learn from others where it is, and must not
// forget it while they run Raft and have no configuration yet.
func TestNodesAreAddedByALeaderThatLeaves(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 5, storeBolt)
	for i := range 3 {
		c.rename([]int{0, 1, 2}, i)
		c.start(i)
	}
	leader := c.leader(0, 1, 2)
	others := c.followers(leader)
	stays, stopped := others[0], others[1]
	c.stop(stopped)
	list := []int{stays, stopped, 3, 4}
	c.rename(list, 0, 1, 2, 3, 4)
	c.start(4)
	node5 := c.nodes[4]
	waitFor(t, "node5 to join", func() bool { return node5.raft.Load() != nil })
	time.Sleep(3 * manageInterval) // it is not added before node4 answers: two nodes of the list are no majority
	if len(node5.members()) > 0 {
		t.Fatal("node5 has a configuration already: nothing is tested")
	}
	c.start(3)
	waitFor(t, "the list to be the membership", func() bool {
		return !c.nodes[stays].drift() && node5.Ready() == nil
	})
}

// The lists leave most of a cluster out, and the one node that they keep has lost its state. It and the new ones must not be a
// cluster of their own, whichever of them would begin it: the others hold what was acknowledged.
func TestListWithoutMostOfTheCluster(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ old, list []int }{ // the first of both is kept
		"the one that is kept would begin it": {[]int{0, 1, 2}, []int{0, 3, 4}},
		"a new one would begin it":            {[]int{4, 2, 3}, []int{4, 0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := unstartedCluster(t, 5, storeMemory)
			c.rename(tt.old, tt.old...)
			for _, i := range tt.old {
				c.start(i)
			}
			for _, i := range tt.old {
				waitFor(t, "the first three", func() bool { return c.nodes[i].Ready() == nil })
			}
			kept, holder := tt.old[0], c.nodes[tt.old[1]]
			if _, err := holder.client.set(t.Context(), "k", "1"); err != nil {
				t.Fatal(err)
			}
			c.stop(kept)
			c.rename(tt.list, tt.list...)
			for _, i := range tt.list {
				c.start(i)
			}
			began := time.Now()
			waitFor(t, "twice the time in which a node waits for strangers", func() bool { return time.Since(began) > 2*strangerWait })
			for _, i := range tt.list {
				n := c.nodes[i]
				if got := n.membership.identity(); got.Cluster != "" || n.Leader() != "" {
					t.Errorf("%s: got %+v, leader %q; want that no cluster begins", n.cfg.NodeID, got, n.Leader())
				}
				awaitReason(t, n, fmt.Sprintf("%s waits: node", c.nodes[kept].cfg.NodeID))
			}
			if item, err := holder.client.get(t.Context(), "k", Linearizable); err != nil || item.Value != "1" {
				t.Errorf("got %q, %v from the cluster that there is; want 1", item.Value, err)
			}
		})
	}
}

// heldService has state machines that wait before they do anything.
type heldService struct {
	tinyService
	hold <-chan struct{}
}

func (s heldService) newMachine() StateMachine {
	m := newTestMachine()
	m.hold = s.hold
	return m
}

// threeOfFive starts the first three of five nodes, under a list of these, and waits until they are ready.
func threeOfFive(t *testing.T) *testCluster {
	t.Helper()
	c := unstartedCluster(t, 5, storeBolt)
	c.rename([]int{0, 1, 2}, 0, 1, 2)
	for i := range 3 {
		c.start(i)
	}
	awaitReady(t, c.nodes[:3]...)
	return c
}

// A member that reads a large state asks for the others meanwhile. Else one that has lost its state would begin another cluster
// with the nodes of a newer list.
func TestMemberThatReadsItsStateIsHeard(t *testing.T) {
	t.Parallel()
	c := threeOfFive(t)
	c.nodes[1].put(t, "k", "1")
	if err := c.nodes[1].raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		c.stop(i)
	}
	c.wipe(0)
	c.rename([]int{0, 3, 4}, 0)
	hold := make(chan struct{})
	c.service = heldService{hold: hold}
	c.start(1)
	awaitReason(t, c.nodes[1], "reading its snapshot")
	c.start(0)
	began := time.Now()
	waitFor(t, "twice the time in which a node waits for strangers", func() bool { return time.Since(began) > 2*strangerWait })
	if got := c.nodes[0].holdsBack(); !strings.HasPrefix(got, "node2 asks for it") {
		t.Errorf("got %q; want that node2 asks for it", got)
	}
	close(hold)
}

// A node that its own list leaves out, and that does not know where it listens, runs on with what it has: with another it is
// a majority here.
func TestLeaversGoOn(t *testing.T) {
	t.Parallel()
	c := threeOfFive(t)
	for i := range 3 {
		c.stop(i)
	}
	c.rename([]int{0, 3, 4}, 1, 2)
	for _, i := range []int{1, 2} {
		c.nodes[i].cfg.RaftAdvertise = ""
		c.start(i)
	}
	c.nodes[c.leader(1, 2)].put(t, "k", "1")
}

// A node that was removed last holds a configuration of one member, which is not itself. It asks nobody for a vote.
func TestRemovedNodeDoesNotStand(t *testing.T) {
	c := unstartedCluster(t, 2, storeBolt)
	node := c.nodes[1]
	node.open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
		st, err := openStorage(cfg, log, m, n)
		if err != nil {
			return nil, err
		}
		id := []byte(`{"version":1,"server":"node2#1","cluster":"node1#1"}`)
		_, err = bootstrap(st, []member{{"node1#1", c.nodes[0].cfg.RaftAddr, true}})
		return st, errors.Join(err, st.stable.Set(keyIdentity, id))
	}
	c.start(1)
	waitFor(t, "Raft to run", func() bool { return node.raft.Load() != nil })
	time.Sleep(time.Second)
	if got := node.State(); got.Term != 1 || got.State != "follower" {
		t.Errorf("got %+v; want a follower in term 1", got)
	}
}

// gatedLogs is a log of which only the newest entry can be read before the gate opens.
type gatedLogs struct {
	raft.LogStore
	gate chan struct{}
}

func (g gatedLogs) GetLog(index uint64, l *raft.Log) error {
	if last, _ := g.LastIndex(); index < last {
		<-g.gate
	}
	return g.LogStore.GetLog(index, l)
}

// A node that reads its log after a restart has all of it, and could not lead for as long.
func TestLeadershipGoesToWhoRunsRaft(t *testing.T) {
	c := newTestCluster(t, 3, storeBolt)
	leader := c.leader()
	c.nodes[leader].put(t, "k", "1")
	awaitEqualLogs(t, c.nodes...)
	reads, other := c.followers(leader)[0], c.followers(leader)[1]
	c.stop(reads)
	gate := make(chan struct{})
	c.nodes[reads].open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
		st, err := openStorage(cfg, log, m, n)
		if err == nil {
			st.logs = gatedLogs{st.logs, gate}
		}
		return st, err
	}
	started := make(chan struct{})
	go func() {
		c.start(reads)
		close(started)
	}()
	defer func() {
		close(gate)
		<-started
	}()
	node := c.nodes[leader]
	waitFor(t, "the node to answer", func() bool {
		return node.askAll(t.Context()).answers[c.nodes[reads].cfg.NodeID].Server != ""
	})
	if got, want := node.mostAdvanced(t.Context()), c.nodes[other].membership.server(); got != want {
		t.Errorf("got %s; want %s", got, want)
	}
}
