package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// newView returns what self sees of the nodes node1 to node<total>, which are all of PEERS, when these answers come.
func newView(self string, total int, answers ...nodeInfo) view {
	v := view{
		self: self, answers: make(map[string]nodeInfo), silent: make(map[string]error), addresses: make(map[string]string),
		listens: "0.0.0.0:12000",
	}
	for i := range total {
		node := fmt.Sprintf("node%d", i+1)
		v.peers = append(v.peers, node)
		v.addresses[node] = fmt.Sprintf("host%d:12000", i+1)
		v.silent[node] = &dialError{node, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}}
	}
	for _, info := range answers {
		if info.Peers == nil {
			info.Peers = v.peers
		}
		v.answers[nodeOf(info.Server)] = info
		delete(v.silent, nodeOf(info.Server))
	}
	return v
}

// What a node can answer. Servers are named <node>#<number of its state>.

func blank(server string) nodeInfo { return nodeInfo{Server: server} }

func joined(server, cluster string) nodeInfo { return nodeInfo{Server: server, Cluster: cluster} }

func holds(server, cluster string, term, index uint64, members ...string) nodeInfo {
	return nodeInfo{
		Server: server, Cluster: cluster, LastTerm: term, LastIndex: index, Applied: index,
		Members: configured(members...),
	}
}

func leading(server, cluster string, members ...string) nodeInfo {
	info := holds(server, cluster, 2, 9, members...)
	info.Ready = true
	return info
}

func at(address string, info nodeInfo) nodeInfo {
	info.Address = address
	return info
}

func naming(info nodeInfo, peers ...string) nodeInfo {
	info.Peers = peers
	return info
}

// configured returns members, of which those that are named with a "-" have no vote.
func configured(servers ...string) (members []member) {
	for _, s := range servers {
		server, isNonvoter := strings.CutSuffix(s, "-")
		members = append(members, member{server, "old-" + nodeOf(server) + ":12000", !isNonvoter})
	}
	return members
}

// The cluster of all the tests below: that which the first state of node1 began.
const testCluster1 = "node1#1"

func TestWhichClusterIsJoined(t *testing.T) {
	const c = testCluster1
	node1, node2, node3 := blank("node1#1"), blank("node2#1"), blank("node3#1")
	for _, tt := range []struct {
		name    string
		self    string
		answers []nodeInfo
		want    string
	}{
		{"all are blank", "node2", []nodeInfo{node1, node2, node3}, c},
		{"all are blank, asks who bootstraps", "node1", []nodeInfo{node1, node2, node3}, ""},
		{"another has joined", "node2", []nodeInfo{node1, node2, joined("node3#1", c)}, c},
		{"another has joined an earlier cluster", "node2", []nodeInfo{node1, node2, joined("node3#1", "node1#0")}, ""},
		{"one is silent", "node2", []nodeInfo{node1, node2}, ""},
		{"who bootstraps is silent", "node2", []nodeInfo{node2, node3}, ""},
		{"one names other PEERS", "node2", []nodeInfo{node1, node2, naming(node3, "node1", "node3")}, ""},
		{"this one names other PEERS", "node2", []nodeInfo{node1, naming(node2, "node1", "node2"), node3}, ""},
		{"one holds an entry", "node2", []nodeInfo{node1, node2, holds("node3#1", "x#1", 1, 1)}, ""},
		{"who bootstraps holds an entry", "node2", []nodeInfo{holds(c, c, 1, 1), node2, joined("node3#1", c)}, ""},
		{
			"a ready leader has the node", "node3",
			[]nodeInfo{node3, leading("node2#1", c, "node1#1", "node2#1", "node3#0")},
			c,
		},
		{
			"likewise, asks who would bootstrap", "node1",
			[]nodeInfo{blank("node1#2"), leading("node2#1", c, "node1#1", "node2#1")},
			c,
		},
		{
			"a ready leader has not the node, and the same list", "node3",
			[]nodeInfo{node1, node3, leading("node2#1", c, "node1#1", "node2#1")},
			c,
		},
		{
			"a ready leader has not the node, and another list", "node3",
			[]nodeInfo{node1, node3, naming(leading("node2#1", c, "node1#1", "node2#1"), "node1", "node2")},
			"",
		},
		{
			"who has the node is not ready", "node3",
			[]nodeInfo{node3, holds("node2#1", c, 2, 9, "node1#1", "node2#1", "node3#0")},
			"",
		},
	} {
		if got := newView(tt.self, 3, tt.answers...).toJoin(); got != tt.want {
			t.Errorf("%s: got %q; want %q", tt.name, got, tt.want)
		}
	}
}

func TestWhenAClusterIsBootstrapped(t *testing.T) {
	const c = testCluster1
	node1, node2, node3 := blank("node1#1"), joined("node2#1", c), joined("node3#1", c)
	all := []member{{"node1#1", "host1:12000", true}, {"node2#1", "host2:12000", true}, {"node3#1", "host3:12000", true}}
	for _, tt := range []struct {
		name    string
		self    string
		answers []nodeInfo
		want    []member
	}{
		{"all have joined", "node1", []nodeInfo{node1, node2, node3}, all},
		{"another asks", "node2", []nodeInfo{node1, node2, node3}, nil},
		{"one has not joined", "node1", []nodeInfo{node1, node2, blank("node3#1")}, nil},
		{"one has joined an earlier cluster", "node1", []nodeInfo{node1, node2, joined("node3#1", "node1#0")}, nil},
		{"one is silent", "node1", []nodeInfo{node1, node2}, nil},
		{"one names other PEERS", "node1", []nodeInfo{node1, node2, naming(node3, "node1", "node3")}, nil},
		{"one holds an entry", "node1", []nodeInfo{node1, node2, holds("node3#1", c, 1, 1)}, nil},
		{"this one is of a cluster", "node1", []nodeInfo{joined("node1#1", "node2#1"), node2, node3}, nil},
	} {
		if diff := cmp.Diff(tt.want, newView(tt.self, 3, tt.answers...).toBootstrap()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	if diff := cmp.Diff(all[:1], newView("node1", 1, node1).toBootstrap()); diff != "" {
		t.Errorf("a cluster of one (-want +got):\n%s", diff)
	}
	v := newView("node1", 3, node1, node2, node3)
	slices.Reverse(v.peers) // PEERS may name nodes in any order
	slices.Reverse(all)
	if diff := cmp.Diff(all, v.toBootstrap()); diff != "" {
		t.Errorf("PEERS backwards (-want +got):\n%s", diff)
	}
}

func TestWhetherAClusterHasBegun(t *testing.T) {
	const c = testCluster1
	mine, other := joined("node2#1", c), joined("node3#1", c)
	for _, tt := range []struct {
		name    string
		answers []nodeInfo
		begun   bool
	}{
		{"of no cluster, all blank", []nodeInfo{blank("node1#1"), blank("node2#1"), blank("node3#1")}, false},
		{"of no cluster, one holds an entry", []nodeInfo{blank("node2#1"), holds("node3#1", c, 1, 1)}, false},
		{"nobody holds an entry yet", []nodeInfo{blank("node1#1"), mine, other}, false},
		{"this one holds an entry", []nodeInfo{holds("node2#1", c, 1, 1)}, true},
		{"another does", []nodeInfo{mine, holds("node3#1", c, 1, 1)}, true},
		{"another does, of another cluster", []nodeInfo{mine, holds("node3#1", "x#1", 1, 1)}, false},
	} {
		if got := newView("node2", 3, tt.answers...).hasBegun(); got != tt.begun {
			t.Errorf("%s: got %v; want %v", tt.name, got, tt.begun)
		}
	}
}

func TestNextChange(t *testing.T) {
	const c = testCluster1
	first := []string{"node1#1", "node2#1", "node3#1"}
	node := func(server string) nodeInfo { return holds(server, c, 2, 5) }
	for _, tt := range []struct {
		name     string
		members  []string
		answers  []nodeInfo
		caughtUp []string
		want     string
	}{
		{"all answer as themselves", first, []nodeInfo{node("node2#1"), node("node3#1")}, nil, ""},
		{"nobody answers", first, nil, nil, ""},
		// Whom nothing is decided about.
		{"one is blank", first, []nodeInfo{blank("node2#2")}, nil, ""},
		{"one is of another cluster", first, []nodeInfo{holds("node2#2", "x#1", 7, 100)}, nil, ""},
		{"a non-voter is silent", []string{"node1#1", "node2#1-"}, nil, []string{"node2#1"}, ""},
		{"beside an old voter, a non-voter is silent", append(first, "node2#2-"), nil, []string{"node2#2"}, ""},
		{
			"beside an old voter, the non-voter's node is blank", append(first, "node2#2-"),
			[]nodeInfo{blank("node2#3")},
			[]string{"node2#2"},
			"",
		},
		// 4a to 4d, in the order in which a server is replaced.
		{"one is new", first, []nodeInfo{node("node2#2"), node("node3#1")}, nil, "AddNonvoter node2#2 at host2:12000"},
		{
			"one is new and has joined only", first,
			[]nodeInfo{joined("node2#2", c)},
			nil,
			"AddNonvoter node2#2 at host2:12000",
		},
		{"it has not caught up", append(first, "node2#2-"), []nodeInfo{node("node2#2")}, nil, ""},
		{
			"it has, beside the old voter", append(first, "node2#2-"),
			[]nodeInfo{node("node2#2")},
			[]string{"node2#2"},
			"RemoveServer node2#1",
		},
		{
			"it has, and the old voter is removed",
			[]string{"node1#1", "node3#1", "node2#2-"},
			[]nodeInfo{node("node2#2")},
			[]string{"node2#2"},
			"AddVoter node2#2 at old-node2:12000",
		},
		{
			"it has not, and the old voter is removed",
			[]string{"node1#1", "node3#1", "node2#2-"},
			[]nodeInfo{node("node2#2")},
			nil, "",
		},
		{"it is a voter", []string{"node1#1", "node3#1", "node2#2"}, []nodeInfo{node("node2#2")}, nil, ""},
		// What was lost half-way, or left by another leader.
		{
			"the new one is lost, too", append(first, "node2#2-"),
			[]nodeInfo{node("node2#3")},
			[]string{"node2#2"},
			"AddNonvoter node2#3 at host2:12000",
		},
		{
			"it has a successor", append(first, "node2#2-", "node2#3-"),
			[]nodeInfo{node("node2#3")},
			nil,
			"RemoveServer node2#2",
		},
		{
			"the only non-voter of its node is lost",
			[]string{"node1#1", "node3#1", "node2#2-"},
			[]nodeInfo{node("node2#3")},
			nil, "AddNonvoter node2#3 at host2:12000",
		},
		{
			"likewise, and its successor is there",
			[]string{"node1#1", "node3#1", "node2#2-", "node2#3-"},
			[]nodeInfo{node("node2#3")},
			[]string{"node2#3"},
			"AddVoter node2#3 at old-node2:12000",
		},
		{
			"a gone voter beside a new voter", append(first, "node2#2"),
			[]nodeInfo{node("node2#2")},
			nil,
			"RemoveServer node2#1",
		},
		{
			"a lost non-voter beside the voter that lives", append(first, "node2#0-"),
			[]nodeInfo{node("node2#1")},
			nil, "RemoveServer node2#0",
		},
		// Two at once: what has begun is finished first, removals before additions of others.
		{"two are new", first, []nodeInfo{node("node2#2"), node("node3#2")}, nil, "AddNonvoter node2#2 at host2:12000"},
		{
			"one of them is added", append(first, "node2#2-"),
			[]nodeInfo{node("node2#2"), node("node3#2")},
			nil, "AddNonvoter node3#2 at host3:12000",
		},
		{
			"one of them has caught up", append(first, "node3#2-"),
			[]nodeInfo{node("node2#2"), node("node3#2")},
			[]string{"node3#2"},
			"RemoveServer node3#1",
		},
		{
			"both have caught up", append(first, "node2#2-", "node3#2-"),
			[]nodeInfo{node("node2#2"), node("node3#2")},
			[]string{"node2#2", "node3#2"},
			"RemoveServer node2#1",
		},
		{
			"the old voter of one is removed",
			[]string{"node1#1", "node2#1", "node2#2-", "node3#2-"},
			[]nodeInfo{node("node2#2"), node("node3#2")},
			[]string{"node2#2", "node3#2"},
			"AddVoter node3#2 at old-node3:12000",
		},
		{
			"a member that PEERS does not name", append(first, "node9#1"),
			[]nodeInfo{node("node9#2")},
			nil,
			"AddNonvoter node9#2 at host9:12000",
		},
	} {
		v := newView("node1", 3, append(tt.answers, leading("node1#1", c, tt.members...))...)
		v.addresses["node9"] = "host9:12000"
		step, there := v.plan(false, catchUp(v, tt.caughtUp)).next()
		got := ""
		if there {
			got = fmt.Sprintf("%v %s", step.command, step.Server)
			if step.command != raft.RemoveServer {
				got += " at " + step.Address
			}
		}
		if got != tt.want {
			t.Errorf("%s: got %q; want %q", tt.name, got, tt.want)
		}
	}
}

// catchUp has servers answer that they have executed what they must have for a vote, and the others that they have not. It
// returns the index of that.
func catchUp(v view, servers []string) (target uint64) {
	for node, info := range v.answers {
		if info.Applied = 4; slices.Contains(servers, info.Server) {
			info.Applied = 5
		}
		v.answers[node] = info
	}
	return 5
}

func TestMostComplete(t *testing.T) {
	const c = testCluster1
	for _, tt := range []struct {
		name    string
		answers []nodeInfo
		want    string
	}{
		{"nobody holds anything", []nodeInfo{blank("node1#1"), joined("node2#1", c)}, ""},
		{
			"the longest",
			[]nodeInfo{holds("node1#1", c, 2, 7), holds("node2#1", c, 2, 9), holds("node3#1", c, 2, 8)},
			"node2",
		},
		{
			"a later term",
			[]nodeInfo{holds("node1#1", c, 2, 7), holds("node2#1", c, 2, 9), holds("node3#1", c, 3, 1)},
			"node3",
		},
		{"two of a kind", []nodeInfo{holds("node1#1", c, 2, 7), holds("node2#1", c, 2, 7)}, "node1"},
		{
			"two of a kind, the first of which has lost its own state", []nodeInfo{
				holds("node1#2", c, 2, 7, "node1#1", "node2#1", "node1#2-"), holds("node2#1", c, 2, 7, "node1#1", "node2#1"),
			}, "node2",
		},
		{"of this server's cluster", []nodeInfo{holds("node1#1", c, 2, 7), holds("node2#1", "x#1", 9, 9)}, "node1"},
		{"of any, for a server of none", []nodeInfo{blank("node1#2"), holds("node2#1", c, 2, 7)}, "node2"},
	} {
		if got := newView("node1", 3, tt.answers...).mostComplete(); got != tt.want {
			t.Errorf("%s: got %q; want %q", tt.name, got, tt.want)
		}
	}
}

// recipe is what people are told when a majority has lost its state.
func recipe(lost, most string, index, term int) string {
	return "a majority of the nodes has lost its state, and nothing can be written or confirmed any more: " + lost + ". " +
		advice(most, index, term)
}

// recipeIf is what people are told when a majority is silent, or of another cluster.
func recipeIf(problems, most string, index, term int) string {
	return "no leader is known: " + problems + ". Only if a majority will never come back: " + advice(most, index, term) +
		"; PEERS may name other nodes then"
}

func advice(most string, index, term int) string {
	return fmt.Sprintf("Node %s (entry %d of term %d): save its backup, which is what it answers with "+
		"?consistency=stale; stop all nodes, move their state directories away, start all nodes, and restore the backup",
		most, index, term)
}

func TestReasonsForPeople(t *testing.T) {
	const c, refused = testCluster1, "connection refused"
	all := []string{"node1#1", "node2#1", "node3#1"}
	noHost := &dialError{"node3", &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "host3", IsNotFound: true}}}
	for _, tt := range []struct {
		name    string
		answers []nodeInfo
		silent  map[string]error
		want    string
	}{
		{
			"two do not answer",
			[]nodeInfo{blank("node1#1")},
			map[string]error{"node3": noHost},
			"the cluster has not begun: node2 at host2:12000: connection refused; node3 (host3:12000): no such host",
		},
		{
			"the name server does not answer",
			[]nodeInfo{blank("node1#1"), blank("node2#1")},
			map[string]error{"node3": &net.DNSError{Err: "server misbehaving", Name: "host3"}},
			"the cluster has not begun: node3 (host3:12000): server misbehaving",
		},
		{
			"one does not answer in time",
			[]nodeInfo{blank("node1#1"), blank("node2#1")},
			map[string]error{"node3": &dialError{"node3", context.DeadlineExceeded}},
			"the cluster has not begun: node3 at host3:12000: no answer",
		},
		{
			"one refuses",
			[]nodeInfo{blank("node1#1"), blank("node2#1")},
			map[string]error{"node3": &dialError{"node3", errors.New("refused: who?")}},
			"the cluster has not begun: node3 at host3:12000: connect to node \"node3\": refused: who?",
		},
		{
			"one names other PEERS",
			[]nodeInfo{blank("node1#1"), blank("node2#1"), naming(blank("node3#1"), "node1", "node3")},
			nil,
			"the cluster has not begun: node3 names other PEERS: node1, node3",
		},
		{
			"all are there",
			[]nodeInfo{blank("node1#1"), blank("node2#1"), blank("node3#1")},
			nil,
			"the cluster has not begun: all nodes answer",
		},
		{
			"who was to begin the cluster has left the list",
			[]nodeInfo{joined("node1#1", "node0#1"), blank("node2#1"), joined("node3#1", "node0#1")},
			nil,
			"the cluster has not begun: node1 has joined a cluster that node0 was to begin and has not: correct PEERS " +
				"if it named other nodes then, else start node1 without its state; node3 has joined a cluster that node0 was to begin " +
				"and has not: correct PEERS if it named other nodes then, else start node3 without its state",
		},
		{
			"who was to begin the cluster is not the first of the list any more",
			[]nodeInfo{blank("node1#1"), joined("node2#1", "node3#1"), blank("node3#1")},
			nil,
			"the cluster has not begun: node2 has joined a cluster that node3 was to begin and has not: correct PEERS " +
				"if it named other nodes then, else start node2 without its state",
		},
		{
			"who was to begin the cluster has lost its state",
			[]nodeInfo{blank("node1#2"), joined("node2#1", c), blank("node3#2")},
			nil,
			"the cluster has not begun: node2 has joined a cluster that node1 was to begin and has not: correct PEERS " +
				"if it named other nodes then, else start node2 without its state",
		},
		{
			"likewise, and one that may hold something is silent",
			[]nodeInfo{blank("node1#2"), joined("node2#1", c)},
			nil,
			"the cluster has not begun: node3 at host3:12000: connection refused",
		},
		{
			"all have joined",
			[]nodeInfo{blank("node1#1"), joined("node2#1", c), joined("node3#1", c)},
			nil,
			"the cluster has not begun: all nodes answer",
		},
		{
			"one is of another cluster",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...), holds("node2#1", "x#1", 2, 3), holds("node3#1", c, 2, 9)},
			nil,
			"no leader is known: node2 is of another cluster, x#1",
		},
		{
			"a majority holds the state of another cluster, which says nothing of what it held before",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...), holds("node2#9", "x#1", 2, 3), holds("node3#9", "x#1", 2, 3)},
			nil,
			recipeIf("node2 is of another cluster, x#1; node3 is of another cluster, x#1", "node1 has the most complete log", 9, 2),
		},
		{
			"one leads itself alone",
			[]nodeInfo{blank("node1#1"), naming(leading("node2#1", "x#1", "node2#1"), "node2"), blank("node3#1")},
			nil,
			"the cluster that node2 leads has only the member node2",
		},
		{
			"two are a cluster without this node",
			[]nodeInfo{
				blank("node1#1"),
				naming(leading("node2#1", "x#1", "node3#1", "node2#1", "node3#2-"), "node2", "node3"),
			},
			nil,
			"the cluster that node2 leads has only the members node2, node3",
		},
		{
			"a leader is about to add this node",
			[]nodeInfo{blank("node1#1"), leading("node2#1", "x#1", "node3#1", "node2#1")},
			nil,
			"node2, which leads, is about to add this node",
		},
		{
			"a leader names this node and others",
			[]nodeInfo{blank("node1#1"), naming(leading("node2#1", "x#1", "node2#1"), "node1", "node2")},
			nil,
			"node2, which leads, names other nodes than this one: node1, node2",
		},
		{
			"a leader is of another cluster",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...), leading("node2#1", "x#1", all...)},
			nil,
			"node2 is of another cluster, which it leads (x#1; this node is of node1#1): to have this node join it, stop " +
				"this node, move its STATE_DIR away and start it",
		},
		{
			"the leader knows this node",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...), leading("node2#1", c, all...)},
			nil,
			"the leader node2 does not reach this node at old-node1:12000",
		},
		{
			"the leader looks for this node elsewhere",
			[]nodeInfo{at("host1:12000", blank("node1#2")), leading("node2#1", c, all...)},
			nil,
			"node2, which leads, looks for this node at old-node1:12000, and this node is at host1:12000: correct PEERS where " +
				"it is wrong",
		},
		{
			"the leader knows the state before",
			[]nodeInfo{blank("node1#2"), leading("node2#1", c, all...)},
			nil,
			"node2, which leads, is about to add this node",
		},
		{
			"of no cluster, others are of two",
			[]nodeInfo{blank("node1#1"), holds("node2#1", "x#1", 2, 3), holds("node3#1", c, 2, 9)},
			nil,
			"no leader is known: node2 is of another cluster, x#1",
		},
		{
			"of a cluster that has not begun, another is of another",
			[]nodeInfo{joined("node1#2", "node1#2"), holds("node2#1", "x#1", 2, 3), joined("node3#1", "node1#2")},
			nil,
			"the cluster has not begun: node2 is of another cluster, x#1",
		},
		{
			"a majority is not there",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...)},
			nil,
			recipeIf("node2 at host2:12000: connection refused; node3 at host3:12000: connection refused", "node1 has the most complete log of those that answer", 9, 2),
		},
		{
			"one has lost its state, one is not there",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...), blank("node2#2")},
			nil,
			recipeIf("node2 has lost its state; node3 at host3:12000: connection refused", "node1 has the most complete log of those that answer", 9, 2),
		},
		{
			"a majority has lost its state",
			[]nodeInfo{holds("node1#1", c, 2, 9, all...), blank("node2#2"), blank("node3#2")},
			nil,
			recipe("node2 has lost its state; node3 has lost its state", "node1 has the most complete log", 9, 2),
		},
		{
			"a majority has, asks one of it",
			[]nodeInfo{blank("node1#2"), holds("node2#1", c, 3, 7, all...), blank("node3#2")},
			nil,
			recipe("node1 has lost its state; node3 has lost its state", "node2 has the most complete log", 7, 3),
		},
		{
			"two of three have, and one that may have more is silent",
			[]nodeInfo{holds("node1#1", c, 2, 9, append(all, "node4#1")...), blank("node2#2"), blank("node3#2")},
			map[string]error{"node4": &dialError{"node4", context.DeadlineExceeded}},
			recipe("node2 has lost its state; node3 has lost its state; node4 at host4:12000: no answer",
				"node1 has the most complete log of those that answer", 9, 2),
		},
		{
			"a node that has left, and the others are silent",
			[]nodeInfo{holds("node1#1", c, 2, 9, all[1:]...)},
			nil,
			"no leader is known: node2 at host2:12000: connection refused; node3 at host3:12000: connection refused",
		},
		{
			"an old server beside a new one is not lost",
			[]nodeInfo{holds("node1#1", c, 2, 9, "node1#1", "node2#2"), joined("node2#2", c)},
			nil,
			"no leader is known: node3 at host3:12000: connection refused",
		},
	} {
		v := newView("node1", 3, tt.answers...)
		for node, err := range tt.silent {
			v.silent[node], v.addresses[node] = err, "host"+strings.TrimPrefix(node, "node")+":12000"
		}
		if diff := cmp.Diff(tt.want, v.String()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestStatusOfPeers(t *testing.T) {
	const c = testCluster1
	v := newView("node1", 6, leading("node1#1", c), holds("node2#1", c, 2, 8), holds("node3#2", c, 2, 3),
		holds("node4#2", c, 2, 4), holds("node6#1", "x#1", 7, 100))
	got := v.status(configured("node1#1", "node2#1", "node3#1", "node3#2-", "node4#2-", "node5#1", "node6#0"))
	want := []PeerStatus{
		{"node1", "host1:12000", true, true, 9},
		{"node2", "host2:12000", true, true, 8},
		{"node3", "host3:12000", false, true, 3}, // being replaced: who lives there has no vote yet
		{"node4", "host4:12000", false, true, 4}, // likewise, and who was there before has none any more
		{"node5", "host5:12000", true, false, 0}, // nobody knows of another
		{"node6", "host6:12000", false, true, 100},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if b, err := json.Marshal(newView("node1", 1).status(nil)); err != nil || string(b) != "[]" {
		t.Errorf("without members: got %s, %v; want []", b, err)
	}
}

// No hello could carry longer names, and a node speaks for itself alone.
func TestAnswersThatNoNodeCanGive(t *testing.T) {
	all, nodes := newTestNet(t, "node1", "node2")
	all.start(nodes...)
	var says nodeInfo
	asking := newPeers(nodes[0].network, nil)
	newPeers(nodes[1].network, map[byte]handler{
		opWho: func(context.Context, string, []byte) ([]byte, error) { return json.Marshal(says) },
	})
	t.Cleanup(asking.close)
	store := NewStore(&Config{NodeID: "node1"}, newTestMachine(), newMetrics(), testLogger(t, "node1"))
	store.peers = asking
	long := strings.Repeat("x", maxName)
	for name, tt := range map[string]struct {
		says nodeInfo
		good bool
	}{
		"a blank server":                {blank("node2#1"), true},
		"the longest name of a cluster": {joined("node2#1", long), true},
		"a longer one":                  {joined("node2#1", long+"x"), false},
		"a longer one of a server":      {blank("node2#" + long), false},
		"another node's server":         {blank("node3#1"), false},
		"none":                          {blank(""), false},
	} {
		says = tt.says
		info, err := store.askWho(t.Context(), "node2")
		if diff := cmp.Diff(tt.says, info); diff != "" || (err == nil) != tt.good {
			t.Errorf("%s: got error %v, difference %s; want it taken: %v", name, err, diff, tt.good)
		}
	}
}
