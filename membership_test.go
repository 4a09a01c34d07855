package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
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

func TestServerNames(t *testing.T) {
	one, other := newServerName("node1"), newServerName("node1")
	if one == other || nodeOf(one) != "node1" || nodeOf("node1") != "node1" || len(one) > maxName {
		t.Errorf("got %q and %q; want two short names, each of node1", one, other)
	}
	members := []member{{one, "host1:12000", true}, {"node2#A", "[::1]:12000", false}}
	var c raft.Configuration
	for _, m := range members {
		s := raft.Server{ID: raft.ServerID(m.Server), Address: raftAddress(m.Server, m.Address), Suffrage: raft.Nonvoter}
		if m.Voter {
			s.Suffrage = raft.Voter
		}
		c.Servers = append(c.Servers, s)
	}
	if diff := cmp.Diff(members, membersOf(c)); diff != "" {
		t.Errorf("in raft's configuration and back (-want +got):\n%s", diff)
	}
}

// openMembership opens the membership of a node over a storage.
func openMembership(node string, st *storage) (*membership, error) {
	m := newMembership(&Config{NodeID: node, StateDir: "/state"}, hclog.NewNullLogger())
	return m, m.open(st)
}

func TestMembershipIsFoundAgain(t *testing.T) {
	dir := t.TempDir()
	want := identity{Version: identityVersion, Cluster: "node1#A", Bootstrap: []member{{"node1#A", "host1:12000", true}}}
	for start := range 3 {
		st := openTestStorage(t, storeBolt, dir)
		m, err := openMembership("node1", st)
		if err != nil || m.at() != stageForming || nodeOf(m.server()) != "node1" {
			t.Fatalf("start %d: got server %q at stage %v, error %v; want a blank one of node1", start, m.server(), m.at(), err)
		}
		if start == 0 {
			want.Server = m.server()
			if m.cluster() != "" {
				t.Errorf("got cluster %q of a new server; want none", m.cluster())
			}
			if err := m.store(want); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff(want, m.identity()); diff != "" {
			t.Errorf("start %d (-want +got):\n%s", start, diff)
		}
		if start == 1 { // what Raft writes changes nothing about that
			entry := &raft.Log{Index: 1, Term: 7, Type: raft.LogNoop}
			if err := errors.Join(st.stable.SetUint64(keyCurrentTerm, 7), st.logs.StoreLog(entry)); err != nil {
				t.Fatal(err)
			}
		}
		if err := st.close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMembershipIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name  string
		write func(*testing.T, *storage) error
		want  []string // parts of the error
	}{
		{"another node's", func(_ *testing.T, st *storage) error {
			return st.stable.Set(keyIdentity, []byte(`{"version":1,"server":"node2#A","cluster":"node2#A"}`))
		}, []string{`state of node "node2"`, `this is node "node1"`, `set NODE_ID back to "node2"`, "restore a backup"}},
		{
			"no json",
			func(_ *testing.T, st *storage) error { return st.stable.Set(keyIdentity, []byte(`{"version":1`)) },
			[]string{"damaged"},
		},
		{"of another version", func(_ *testing.T, st *storage) error {
			return st.stable.Set(keyIdentity, []byte(`{"version":2,"server":"node1#A"}`))
		}, []string{"another version", "2", "reads 1"}},
		{
			"a term without a name",
			func(_ *testing.T, st *storage) error { return st.stable.SetUint64(keyCurrentTerm, 1) },
			[]string{"first version"},
		},
		{
			"an entry without a name",
			func(_ *testing.T, st *storage) error {
				return st.logs.StoreLog(&raft.Log{Index: 1, Term: 1, Type: raft.LogNoop})
			},
			[]string{"first version"},
		},
		{"a snapshot without a name", func(t *testing.T, st *storage) error {
			t.Helper()
			writeSnapshot(t, st.snapshots, 1, framed("state"))
			return nil
		}, []string{"first version"}},
	} {
		st := openTestStorage(t, storeMemory, "")
		if err := tt.write(t, st); err != nil {
			t.Fatal(err)
		}
		before, _ := st.stable.Get(keyIdentity)
		_, err := openMembership("node1", st)
		for _, part := range append(tt.want, `STATE_DIR "/state"`) {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: got error %v; want one that says %s", tt.name, err, part)
			}
		}
		if after, _ := st.stable.Get(keyIdentity); string(after) != string(before) {
			t.Errorf("%s: got %q stored; want what was there, %q", tt.name, after, before)
		}
	}
	broken := errors.New("input/output error")
	st := openTestStorage(t, storeMemory, "")
	st.stable = &brokenStore{err: broken}
	if _, err := openMembership("node1", st); !errors.Is(err, broken) {
		t.Errorf("from a broken storage: got error %v; want %v", err, broken)
	}
	m := newMembership(&Config{NodeID: "node1"}, hclog.NewNullLogger())
	m.stable = st.stable
	err := m.store(identity{Server: "node1#A", Cluster: "c"})
	if !errors.Is(err, broken) || m.cluster() != "" {
		t.Errorf("on a broken storage: got cluster %q, error %v; want none and %v", m.cluster(), err, broken)
	}
}

func TestBootstrapBeginsALogOnce(t *testing.T) {
	members := []member{{"node1#A", "host1:12000", true}, {"node2#A", "host2:12000", true}}
	for _, tt := range []struct {
		name    string
		members []member
		write   func(*testing.T, *storage) error
		begins  bool
	}{
		{"an empty log", members, func(*testing.T, *storage) error { return nil }, true},
		{"after a crash between the two writes", members, func(_ *testing.T, st *storage) error {
			return st.stable.SetUint64(keyCurrentTerm, 1)
		}, true},
		{"a server that did not bootstrap", nil, func(*testing.T, *storage) error { return nil }, false},
		{"a log", members, func(_ *testing.T, st *storage) error {
			return errors.Join(st.stable.SetUint64(keyCurrentTerm, 7), st.logs.StoreLog(&raft.Log{Index: 5, Term: 7, Type: raft.LogNoop}))
		}, false},
		{"a snapshot", members, func(t *testing.T, st *storage) error {
			t.Helper()
			writeSnapshot(t, st.snapshots, 9, framed("state"))
			return nil
		}, false},
	} {
		st := openTestStorage(t, storeMemory, "")
		if err := tt.write(t, st); err != nil {
			t.Fatal(err)
		}
		index, term, _ := st.lastEntry()
		for _, again := range []bool{false, true} {
			if begins, err := bootstrap(st, tt.members); err != nil || begins != (tt.begins && !again) {
				t.Errorf("%s, again %v: got %v, error %v; want %v and none", tt.name, again, begins, err, tt.begins && !again)
			}
		}
		if tt.begins {
			var entry raft.Log
			if err := st.logs.GetLog(1, &entry); err != nil || entry.Type != raft.LogConfiguration || entry.Term != 1 {
				t.Fatalf("%s: got entry %v, error %v; want a configuration of term 1", tt.name, entry, err)
			}
			if diff := cmp.Diff(members, membersOf(raft.DecodeConfiguration(entry.Data))); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.name, diff)
			}
			index, term = 1, 1
			if stored, err := st.stable.GetUint64(keyCurrentTerm); err != nil || stored != 1 {
				t.Errorf("%s: got term %d, error %v; want 1", tt.name, stored, err)
			}
		}
		if i, tm, err := st.lastEntry(); i != index || tm != term || err != nil {
			t.Errorf("%s: got last entry %d of term %d, error %v; want %d of term %d", tt.name, i, tm, err, index, term)
		}
	}
}

// checkMembers waits until all nodes are ready and agree that the servers that live there are the voters, and returns
// their cluster.
func checkMembers(t *testing.T, c *testCluster) string {
	t.Helper()
	for _, node := range c.nodes {
		waitLong(t, 30*time.Second, node.cfg.NodeID+" to be ready", func() bool { return node.Ready() == nil })
	}
	var want []string
	for _, node := range c.nodes {
		want = append(want, node.membership.server())
	}
	cluster := c.nodes[0].membership.cluster()
	for _, node := range c.nodes {
		waitFor(t, fmt.Sprintf("%s to have exactly %v as voters", node.cfg.NodeID, want), func() bool {
			var got []string
			for _, m := range node.members() {
				if m.Voter {
					got = append(got, m.Server)
				}
			}
			slices.Sort(got)
			return slices.Equal(got, want) && len(node.members()) == len(want)
		})
		if got := node.Status().Cluster; got != cluster || nodeOf(cluster) == cluster {
			t.Errorf("got cluster %q of %s; want %q, a server's name", got, node.cfg.NodeID, cluster)
		}
	}
	return cluster
}

// awaitReason waits until the node is not ready for a reason with these words.
func awaitReason(t *testing.T, n *testNode, words string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%s to say %q", n.cfg.NodeID, words), func() bool {
		err := n.Ready()
		return err != nil && strings.Contains(err.Error(), words)
	})
}

// wipe has the node start without its state.
func (c *testCluster) wipe(i int) {
	c.nodes[i].cfg.StateDir = c.t.TempDir()
}

// prepare writes into the directory of node i before it starts.
func (c *testCluster) prepare(i int, write func(*storage) error) {
	c.t.Helper()
	st, err := openStorage(c.nodes[i].cfg, hclog.NewNullLogger(), newMetrics(), &testStorageNode{})
	if err == nil {
		err = errors.Join(write(st), st.close())
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// is stores which server a node is.
func is(id identity) func(*storage) error {
	return func(st *storage) error {
		m := &membership{stable: st.stable}
		return m.store(id)
	}
}

func TestClusterBeginsWhenAllAnswer(t *testing.T) {
	t.Parallel()
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			t.Parallel()
			c := unstartedCluster(t, 3, storeMemory)
			for started, i := range order {
				c.start(i)
				for _, waits := range order[:started+1] {
					for _, missing := range order[started+1:] {
						p := c.nodes[waits].cfg.Peers[missing]
						awaitReason(t, c.nodes[waits], p.ID+" at "+p.Addr+": ")
						if got := c.nodes[waits].Status(); got.Cluster != "" || got.State != "forming" {
							t.Errorf("got %+v while %s is missing; want no cluster", got, p.ID)
						}
					}
				}
			}
			checkMembers(t, c)
		})
	}
}

func TestClusterOfOne(t *testing.T) {
	t.Parallel()
	for store, keeps := range map[string]bool{storeBolt: true, storeMemory: false} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			c := newTestCluster(t, 1, store)
			cluster := checkMembers(t, c)
			c.nodes[0].put(t, "k", "1")
			c.stop(0)
			c.start(0)
			if got := checkMembers(t, c); (got == cluster) != keeps {
				t.Errorf("got cluster %s after a restart, %s before; want the same: %v", got, cluster, keeps)
			}
			if got, want := c.nodes[0].get(t, "k"), map[bool]string{true: "1", false: ""}[keeps]; got != want {
				t.Errorf("got %s after a restart; want %s", got, want)
			}
		})
	}
}

// Whatever was stored when the node that bootstraps the cluster crashed, the cluster begins once all are there.
func TestCrashWhileAClusterBegins(t *testing.T) {
	t.Parallel()
	const cluster = "node1#A"
	servers := []string{"node1#A", "node2#A", "node3#A"}
	steps := []struct {
		name string
		do   func(*testCluster, *storage) error
	}{
		{"all have joined", func(_ *testCluster, st *storage) error { return is(identity{Server: servers[0]})(st) }},
		{"the cluster is stored", func(c *testCluster, st *storage) error {
			var members []member
			for i, p := range c.nodes[0].cfg.Peers {
				members = append(members, member{servers[i], p.Addr, true})
			}
			return is(identity{Server: servers[0], Cluster: cluster, Bootstrap: members})(st)
		}},
		{"the term is stored", func(_ *testCluster, st *storage) error { return st.stable.SetUint64(keyCurrentTerm, 1) }},
		{"the log has begun", func(_ *testCluster, st *storage) error {
			_, err := bootstrap(st, newIdentity(st).Bootstrap)
			return err
		}},
		{"it has voted for itself", func(_ *testCluster, st *storage) error {
			return errors.Join(st.stable.SetUint64(keyCurrentTerm, 2), st.stable.SetUint64(keyLastVoteTerm, 2),
				st.stable.Set(keyLastVoteCand, []byte(servers[0])))
		}},
	}
	for last := range steps {
		t.Run(steps[last].name, func(t *testing.T) {
			t.Parallel()
			c := unstartedCluster(t, 3, storeBolt)
			for _, step := range steps[:last+1] {
				c.prepare(0, func(st *storage) error { return step.do(c, st) })
			}
			for _, i := range []int{1, 2} {
				c.prepare(i, is(identity{Server: servers[i], Cluster: cluster}))
				c.start(i)
			}
			c.start(0)
			if got := checkMembers(t, c); got != cluster {
				t.Errorf("got cluster %s; want %s", got, cluster)
			}
			for i, node := range c.nodes {
				if got := node.membership.server(); got != servers[i] {
					t.Errorf("got server %s; want %s", got, servers[i])
				}
			}
		})
	}
}

// newIdentity returns what is stored of which server a node is.
func newIdentity(st *storage) identity {
	m := newMembership(&Config{NodeID: "node1"}, hclog.NewNullLogger())
	_ = m.open(st)
	return m.identity()
}

// The node that was to bootstrap the cluster comes back without its disk, after the others have joined. They hold nothing,
// and say so to people, but give nothing up by themselves.
func TestClusterThatNeverBegan(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeBolt)
	joined := []int{1, 2}
	for _, i := range joined {
		c.prepare(i, is(identity{Server: fmt.Sprintf("node%d#A", i+1), Cluster: "node1#A"}))
		c.start(i)
	}
	awaitReason(t, c.nodes[2], "node1 at ")
	c.start(0)
	for _, node := range c.nodes {
		for _, i := range joined {
			awaitReason(t, node, fmt.Sprintf("start node%d without its state", i+1))
		}
	}
	for _, i := range joined {
		if got, want := c.nodes[i].membership.server(), fmt.Sprintf("node%d#A", i+1); got != want {
			t.Errorf("got server %s; want %s still", got, want)
		}
		c.stop(i)
		c.wipe(i)
		c.start(i)
	}
	if cluster := checkMembers(t, c); cluster != c.nodes[0].membership.server() {
		t.Errorf("got cluster %s; want that of node1's server", cluster)
	}
}

func TestNodesWithOtherPEERSBeginNothing(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeMemory)
	odd := c.nodes[2].cfg
	all := odd.Peers
	odd.Peers = []Peer{all[0], all[2]}
	for i := range c.nodes {
		c.start(i)
	}
	awaitReason(t, c.nodes[0], "node3 names other PEERS: node1, node3")
	awaitReason(t, c.nodes[1], `node "node2" is neither in the PEERS of node "node3"`)
	awaitReason(t, c.nodes[2], "node1 names other PEERS: node1, node2, node3")
	for _, node := range c.nodes {
		if got := node.membership.cluster(); got != "" {
			t.Errorf("got cluster %s of %s; want none", got, node.cfg.NodeID)
		}
	}
	c.stop(2)
	odd.Peers = all
	c.start(2)
	checkMembers(t, c)
}

func TestNodesWithoutTheirStateAreReplaced(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			c := newTestCluster(t, 3, store)
			cluster := checkMembers(t, c)
			for i, node := range c.nodes { // the one that bootstrapped the cluster, too, and whoever leads
				node.put(t, "k", fmt.Sprint(i))
				before := node.membership.server()
				c.stop(i)
				c.wipe(i)
				c.start(i)
				<-node.WasReady()
				if err := node.Ready(); err != nil {
					t.Errorf("was ready, and is not: %v", err)
				}
				if got := checkMembers(t, c); got != cluster || node.membership.server() == before {
					t.Errorf("got server %s of cluster %s; want another than %s, of %s",
						node.membership.server(), got, before, cluster)
				}
				if got, want := node.get(t, "k"), fmt.Sprint(i); got != want {
					t.Errorf("got %s; want %s", got, want)
				}
			}
			for _, node := range c.nodes { // people see nodes
				for _, p := range node.Status().Peers {
					if strings.Contains(p.ID, "#") {
						t.Errorf("got %q in /status; want a node", p.ID)
					}
				}
			}
		})
	}
}

// Another leader goes on with what it finds.
func TestTwoOfFiveAreReplacedUnderTwoLeaders(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 5, storeMemory)
	leader := c.leader()
	others := c.followers(leader)
	next, wiped := c.nodes[others[0]], others[2:]
	c.nodes[leader].put(t, "k", "1")
	for _, i := range wiped {
		c.stop(i)
	}
	for _, i := range wiped {
		c.start(i)
	}
	waitFor(t, "a change under way", func() bool {
		return slices.ContainsFunc(next.members(), func(m member) bool { return !m.Voter })
	})
	term := next.raft.Load().CurrentTerm()
	next.transport.campaign(nil)
	checkMembers(t, c)
	if next.raft.Load().CurrentTerm() == term {
		t.Error("the leader did not change, so nothing was tested")
	}
	for _, node := range c.nodes {
		if got := node.get(t, "k"); got != "1" {
			t.Errorf("got %s through %s; want what was written before", got, node.cfg.NodeID)
		}
	}
}

// refusingLogs takes no entries while refuses is set.
type refusingLogs struct {
	raft.LogStore
	refuses *atomic.Bool
}

func (l refusingLogs) StoreLogs(entries []*raft.Log) error {
	if l.refuses.Load() {
		return io.ErrShortWrite
	}
	return l.LogStore.StoreLogs(entries)
}

// A server that is being brought up has no say, whatever it answers.
func TestServerWithoutAVote(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 4, storeMemory)
	c.nodes[0].put(t, "k", "1")
	const newcomer = 3
	refuses := new(atomic.Bool)
	refuses.Store(true)
	node := c.nodes[newcomer]
	c.stop(newcomer)
	node.open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
		st, err := openStorage(cfg, log, m, n)
		if err == nil {
			st.logs = refusingLogs{st.logs, refuses}
		}
		return st, err
	}
	c.start(newcomer)
	for attempt := 0; ; attempt++ { // the leader is to be one still when it has asked
		i := c.leader(0, 1, 2)
		leader := c.nodes[i]
		awaitReason(t, node, "has not caught up")
		waitFor(t, "the server to be a non-voter and to say yes to the leader's term", func() bool {
			server := node.membership.server()
			member, votes := leader.isMember(server)
			term := binary.BigEndian.AppendUint64(nil, leader.raft.Load().CurrentTerm())
			return member && !votes && leader.peers.agrees(server, opTerm, term, confirmTimeout)
		})
		server := node.membership.server()
		var resp raft.TimeoutNowResponse
		err := leader.transport.TimeoutNow(raft.ServerID(server), raft.ServerAddress(server),
			&raft.TimeoutNowRequest{RPCHeader: header(leader)}, &resp)
		if err == nil || !strings.Contains(err.Error(), "no vote") || node.raft.Load().State() != raft.Follower {
			t.Errorf("told to stand for election: got error %v, state %v; want a refusal", err, node.raft.Load().State())
		}
		down := (i + 1) % newcomer // of four voters, two and the newcomer are left
		c.cut(down, linkCut)
		r := leader.raft.Load()
		term := r.CurrentTerm()
		_, err = leader.confirmLeadership(r)
		led := leader.leadsIn(term)
		if err == nil {
			t.Error("a read was confirmed by two voters of four and a server without a vote; want that it is not")
		}
		if led {
			waitFor(t, "/status to show who is there", func() bool {
				var got []string
				for _, p := range leader.Status().Peers {
					got = append(got, fmt.Sprint(p.Voter, p.Reachable, p.AppliedIndex > 0))
				}
				want := []string{"true true true", "true true true", "true true true", "false true false"}
				want[down] = "true false false"
				return slices.Equal(got, want)
			})
		}
		c.cut(down, linkOpen)
		if led {
			break
		}
		if attempt == 9 {
			t.Fatal("the leader had always stepped down already, so nothing was tested")
		}
	}
	refuses.Store(false)
	checkMembers(t, c)
	if got := node.get(t, "k"); got != "1" {
		t.Errorf("got %s; want what was written before", got)
	}
}

func TestServerOfAnotherClusterStaysOut(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeBolt)
	node := c.nodes[2]
	all, foreignDir := node.cfg.Peers, node.cfg.StateDir
	node.cfg.Peers = all[2:]
	c.start(2) // once, alone
	node.put(t, "k", `"foreign"`)
	foreign := node.membership.cluster()
	c.stop(2)
	for i := range c.nodes { // node3 still names itself alone
		c.start(i)
	}
	for _, i := range []int{0, 1} {
		awaitReason(t, c.nodes[i], fmt.Sprintf("%q is neither in the PEERS of node %q", c.nodes[i].cfg.NodeID, "node3"))
	}
	if s := node.Status(); s.PeersDrift || s.Cluster != foreign || len(s.Peers) != 1 {
		t.Errorf("got %+v of the node that was alone; want its own cluster", s)
	}
	c.stop(2)
	c.wipe(2)
	node.cfg.Peers = all
	c.start(2)
	cluster := checkMembers(t, c)
	if got := node.get(t, "k"); got != "" {
		t.Errorf("got %s; want nothing of the other cluster", got)
	}

	// It comes back beside a cluster that runs.
	c.stop(2)
	node.cfg.StateDir = foreignDir
	c.start(2)
	leader := c.nodes[c.leader(0, 1)]
	before := leader.members()
	waitFor(t, "the leader to see it", func() bool {
		p := leader.Status().Peers[2]
		return !p.Voter && p.Reachable
	})
	saw := time.Now()
	waitFor(t, "the leader to have looked twice more", func() bool { return time.Since(saw) > 2*manageInterval })
	if diff := cmp.Diff(before, leader.members()); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
	if got, want := leader.Status().Membership.WaitsFor, "node3 is of another cluster, "+foreign; got != want {
		t.Errorf("the leader says %q; want %q", got, want)
	}
	if got := node.membership.cluster(); got != foreign || got == cluster || node.Leader() == leader.cfg.NodeID {
		t.Errorf("got cluster %s, leader %s; want its own", got, node.Leader())
	}
}

// What a majority has lost, people bring back: nothing happens by itself, and every node says what to do.
func TestMajorityWithoutItsState(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	c.nodes[0].put(t, "k", "1")
	awaitEqualLogs(t, c.nodes...)
	const survivor = 1
	for i := range c.nodes {
		c.stop(i)
	}
	for i := range c.nodes {
		if i != survivor {
			c.wipe(i)
		}
		c.start(i)
	}
	kept := c.nodes[survivor]
	stale := func() answerTo { return request(t, http.MethodGet, kept.url+"/value/k?consistency=stale", "") }
	if a := stale(); a.status != http.StatusServiceUnavailable {
		t.Errorf("a stale read at once: got %v; want 503", a)
	}
	for _, node := range c.nodes {
		awaitReason(t, node, "node1 has lost its state; node3 has lost its state. Node node2 has the most complete log")
	}
	var writes sync.WaitGroup
	for _, node := range c.nodes {
		writes.Go(func() {
			a, err := http.DefaultClient.Do(newRequest(t, http.MethodPut, node.url+"/value/k", "2"))
			if err != nil || a.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("a write through %s: got %v, error %v; want 503", node.cfg.NodeID, a, err)
				return
			}
			_ = a.Body.Close()
		})
	}
	writes.Wait()
	saved, err := copyAll(t.Context(), kept.Store, kept.machine.(*testMachine))
	if got := saved.items["k"].Value; got != "1" || err != nil {
		t.Errorf("got %q, error %v to be saved; want 1", got, err)
	}
	a := stale() // at once, though it has just started: it says when it will never have more
	if a.status != http.StatusOK || a.header.Get("Raft-Stale") != "since-start" {
		t.Errorf("a stale read without a majority: got %v; want 200 and since-start", a)
	}
	for _, node := range c.nodes {
		if got := node.Status(); got.Leader != "" || (got.Cluster == "") != (node != kept) {
			t.Errorf("got %+v of %s; want no leader, and a cluster where state is left only", got, node.cfg.NodeID)
		}
	}
}

func newRequest(t *testing.T, method, url, body string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// Raft notes a vote as a contact. A node that was started has heard of no leader by it, nor of what is committed.
func TestVoteIsNoContact(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	c.nodes[0].put(t, "k", `"acknowledged"`)
	awaitEqualLogs(t, c.nodes...)
	for i := range c.nodes {
		c.stop(i)
	}
	voter, candidate := c.nodes[0], c.nodes[1]
	for _, l := range c.links { // so nobody is elected
		l.Set(linkCut)
	}
	c.start(0)
	c.start(1)
	for _, n := range []*testNode{voter, candidate} {
		waitFor(t, "raft to run", func() bool { return n.raft.Load() != nil })
	}
	index, lastTerm, err := candidate.storage.lastEntry()
	if err != nil {
		t.Fatal(err)
	}
	way := c.links[[2]int{1, 0}]
	way.Set(linkOpen)
	id := raft.ServerID(voter.membership.server())
	waitFor(t, "the vote", func() bool {
		var resp raft.RequestVoteResponse
		err := candidate.transport.RequestVote(id, raft.ServerAddress(id), &raft.RequestVoteRequest{
			RPCHeader: header(candidate), Term: voter.raft.Load().CurrentTerm() + 1, LastLogIndex: index, LastLogTerm: lastTerm,
		}, &resp)
		return err == nil && resp.Granted
	})
	way.Set(linkCut)
	if contact := voter.raft.Load().LastContact(); contact.IsZero() || voter.Leader() != "" {
		t.Errorf("got leader %q, last contact %v; want none, and that of the vote", voter.Leader(), contact)
	}
	stale := func() answerTo { return request(t, http.MethodGet, voter.url+"/value/k?consistency=stale", "") }
	if a := stale(); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("a stale read after a vote: got %v; want 503 with Retry-After", a)
	}
	waitFor(t, "a stale read", func() bool { return stale().status == http.StatusOK })
	if took := time.Since(voter.started); took < staleAfter {
		t.Errorf("got a stale read %v after the start; want none before %v", took, staleAfter)
	}
	if a := stale(); a.header.Get("Raft-Stale") != "since-start" {
		t.Errorf("got %v; want Raft-Stale: since-start", a)
	}
}

func TestRestartOfAllNodesKeepsTheCluster(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeBolt)
	want := checkMembers(t, c)
	c.nodes[0].put(t, "k", "1")
	for i := range c.nodes {
		c.stop(i)
	}
	const bootstrapper = 0
	for _, i := range c.followers(bootstrapper) { // they need it no more
		c.start(i)
	}
	c.leader(c.followers(bootstrapper)...)
	c.start(bootstrapper)
	if got := checkMembers(t, c); got != want {
		t.Errorf("got cluster %s after the restart; want %s", got, want)
	}
	for _, node := range c.nodes {
		if got := node.get(t, "k"); got != "1" {
			t.Errorf("got %s through %s; want what was written before", got, node.cfg.NodeID)
		}
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
	c.nodes[0].open = func(cfg *Config, log hclog.Logger, m *metrics, n storageNode) (*storage, error) {
		s, err := openStorage(cfg, log, m, n)
		if err == nil {
			logs.LogStore, s.logs = s.logs, logs
		}
		return s, err
	}
	c.start(0)
	waitFor(t, "the node to be ready", func() bool { return c.nodes[0].Ready() == nil })
	logs.slow.Store(true)
	var write sync.WaitGroup
	defer write.Wait()
	write.Go(func() { _, _ = c.nodes[0].client.set(t.Context(), "k", "1") }) // its outcome is unknown
	<-logs.begun
	c.stop(0)
	if under := logs.under.Load(); under != 0 {
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
		for c.nodes[0].membership.cluster() == "" {
			runtime.Gosched()
		}
		stop(c)
	}
}
