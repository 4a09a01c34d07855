package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// strangerWait is how long a node under PEERS_FILE waits for nodes that are in no list to ask for it.
const strangerWait = 3 * time.Second

// change is one change of Raft's configuration.
type change struct {
	command raft.ConfigurationChangeCommand
	member
}

// plan is what the leader makes of the configuration and of the answers of all nodes.
type plan struct {
	view
	agreed  bool                // enough nodes name the same nodes as this leader
	removes bool                // a node that is not named is to leave
	byNode  map[string][]member // the configuration
	// caughtUp says whether a server has executed what this leader had committed when it found the server in the
	// configuration.
	caughtUp func(server string, applied uint64) bool
}

func (v view) plan(removes bool, caughtUp func(server string, applied uint64) bool) plan {
	p := plan{view: v, agreed: v.agreed(), removes: removes, byNode: make(map[string][]member), caughtUp: caughtUp}
	for _, m := range v.mine().Members {
		p.byNode[nodeOf(m.Server)] = append(p.byNode[nodeOf(m.Server)], m)
	}
	return p
}

// named says whether a node is in PEERS or PEERS_FILE, as this node has it.
func (v view) named(node string) bool { return slices.Contains(v.mine().Peers, node) }

// agreed says whether a majority of the voters, each asked as the server that votes, and a majority of the nodes in
// this node's list name the same nodes as this one. So a slip in the list of a minority changes nothing.
func (v view) agreed() bool {
	same := func(info nodeInfo) bool { return slices.Equal(info.Peers, v.mine().Peers) }
	voters, agree := 0, 0
	for _, m := range v.mine().Members {
		if !m.Voter {
			continue
		}
		voters++
		if info := v.answers[nodeOf(m.Server)]; info.Server == m.Server && same(info) {
			agree++
		}
	}
	named := 0
	for _, node := range v.mine().Peers {
		info, answers := v.answers[node]
		if answers && same(info) && (info.Cluster == "" || info.Cluster == v.mine().Cluster) {
			named++
		}
	}
	return isMajority(agree, voters) && isMajority(named, len(v.mine().Peers))
}

// leaves says whether a node is to leave the cluster.
func (p plan) leaves(node string) bool { return p.removes && p.agreed && !p.named(node) }

// next returns the next change by which this leader replaces servers that are gone, and brings the configuration to the
// list of nodes; false if there is none. A server is gone when its node answers as another server of this cluster.
//
// The steps for one node are: add the new server as a non-voter; when it has caught up, remove the old voter; make the
// new one a voter. In this order no step needs more live servers for a majority than the one before. What another
// leader has begun, and what was itself lost half-way, is finished first. Nodes are added one after the other, and all
// of them before any is removed.
func (p plan) next() (change, bool) {
	for _, step := range []func(node string) (change, bool){p.promote, p.removeOld, p.addReplacement} {
		for _, node := range slices.Sorted(maps.Keys(p.byNode)) {
			if c, there := step(node); there {
				return c, true
			}
		}
	}
	if c, there := p.addNode(); there {
		return c, true
	}
	return p.removeNode()
}

// present returns the member that a node of the configuration answers as, and its other members; false if it answers
// as none.
func (p plan) present(node string) (m member, others []member, is bool) {
	info, answers := p.answers[node]
	if !answers || info.Cluster != p.mine().Cluster {
		return m, p.byNode[node], false
	}
	for _, one := range p.byNode[node] {
		if one.Server == info.Server {
			m, is = one, true
		} else {
			others = append(others, one)
		}
	}
	return m, others, is
}

// promote makes a non-voter that has caught up a voter, unless its node has one.
func (p plan) promote(node string) (change, bool) {
	m, others, is := p.present(node)
	due := is && !m.Voter && !p.leaves(node) && !slices.ContainsFunc(others, isVoter) &&
		p.caughtUp(m.Server, p.answers[node].Applied)
	return change{raft.AddVoter, m}, due
}

// removeOld removes a server that is gone: a non-voter at once, a voter when the one in its place may become one. A
// non-voter of a node that is to leave goes, too.
func (p plan) removeOld(node string) (change, bool) {
	m, others, is := p.present(node)
	if p.leaves(node) {
		i := slices.IndexFunc(p.byNode[node], func(m member) bool { return !m.Voter })
		if i < 0 {
			return change{}, false
		}
		return change{raft.RemoveServer, p.byNode[node][i]}, true
	}
	if !is {
		return change{}, false
	}
	mayVote := m.Voter || p.caughtUp(m.Server, p.answers[node].Applied)
	for _, other := range others {
		if !other.Voter || mayVote {
			return change{raft.RemoveServer, other}, true
		}
	}
	return change{}, false
}

// addReplacement adds the server that a node of the configuration answers as, if it is not there. To one that is there
// but has moved the same change gives its new address, and nothing else: if this node leaves the list, those that do
// not know it find it there.
func (p plan) addReplacement(node string) (change, bool) {
	info, answers := p.answers[node]
	m, _, is := p.present(node)
	due := !p.leaves(node)
	if is {
		due = info.Address != "" && info.Address != m.Address
	}
	return change{raft.AddNonvoter, member{Server: info.Server, Address: p.address(node)}},
		due && answers && info.Cluster == p.mine().Cluster
}

// addNode adds a node that is in the list and not in the configuration, when each node there has a voter.
func (p plan) addNode() (change, bool) {
	for node, members := range p.byNode {
		if !slices.ContainsFunc(members, isVoter) && !p.leaves(node) {
			return change{}, false
		}
	}
	for _, node := range p.mine().Peers {
		info, answers := p.answers[node]
		if p.agreed && p.byNode[node] == nil && answers && info.Cluster == p.mine().Cluster {
			return change{raft.AddNonvoter, member{Server: info.Server, Address: p.address(node)}}, true
		}
	}
	return change{}, false
}

// complete says whether each node of the list has a voter that is not gone.
func (p plan) complete() bool {
	return !slices.ContainsFunc(p.mine().Peers, func(node string) bool {
		info, answers := p.answers[node]
		return !slices.ContainsFunc(p.byNode[node], func(m member) bool {
			return m.Voter && (!answers || m.Server == info.Server)
		})
	})
}

// removeNode removes a node that is not in the list, but not this leader. One that does not answer as its voter goes
// first: to remove another could leave too few live voters for a majority. Example: of node1 to node5 node3 and node5
// are down, and the list is node1 to node3. Without node4 two of four would be left, and nothing could be committed.
func (p plan) removeNode() (change, bool) {
	if !p.complete() {
		return change{}, false
	}
	var c change
	due := false
	for _, node := range slices.Sorted(maps.Keys(p.byNode)) {
		if !p.leaves(node) || node == p.self {
			continue
		}
		_, _, answers := p.present(node)
		if !due || !answers {
			c, due = change{raft.RemoveServer, p.byNode[node][0]}, true
		}
		if !answers {
			break
		}
	}
	return c, due
}

// handsOver says whether this leader is all that is left to leave. A voter of the list, which leads next, removes it.
func (p plan) handsOver() bool { return p.complete() && p.leaves(p.self) }

// waitsFor says, to people, what keeps the configuration from being what the list says; "" if it is.
func (p plan) waitsFor() string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	for _, node := range p.mine().Peers {
		info, answers := p.answers[node]
		switch {
		case slices.ContainsFunc(p.byNode[node], isVoter):
		case !answers:
			add("%s", p.whySilent(node))
		case info.Cluster != "" && info.Cluster != p.mine().Cluster:
			add("%s is of another cluster, %s", node, info.Cluster)
		case p.byNode[node] != nil:
			add("%s is catching up", node)
		default:
			add("%s is to be added", node)
		}
	}
	for _, node := range slices.Sorted(maps.Keys(p.byNode)) {
		switch {
		case p.named(node):
		case p.removes:
			add("%s is to be removed", node)
		default:
			add("%s is not in PEERS: only PEERS_FILE removes a node", node)
		}
	}
	if len(parts) == 0 || p.agreed {
		return strings.Join(parts, "; ")
	}
	for _, node := range slices.Sorted(maps.Keys(p.answers)) {
		if other := p.answers[node].Peers; !slices.Equal(other, p.mine().Peers) {
			add("%s names %s", node, strings.Join(other, ", "))
		}
	}
	return "no majority of the voters and of the list answers and names the same nodes: " + strings.Join(parts, "; ")
}

// setResizing takes note of what keeps the configuration from being what the list says, and logs what is new.
func (m *membership) setResizing(reason string) {
	m.mu.Lock()
	before := m.resizing
	m.resizing = reason
	m.mu.Unlock()
	switch reason {
	case before:
	case "":
		m.log.Info("the membership is what the list of nodes says")
	default:
		m.log.Info("the membership is not what the list of nodes says", "waits-for", reason)
	}
}

func (m *membership) waitsToResize() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resizing
}

// maybeMember says whether there may be a cluster that knows this node, and that this node's PEERS_FILE does not name.
// Its members ask for this node twice a second. Example: node1 to node3 are a cluster in memory, and all lists become
// node1, node4 and node5. Now node1 restarts without its state. All nodes of its list answer and hold nothing, but
// node2 and node3 hold the data.
func (s *Store) maybeMember() bool {
	asked := time.Unix(0, s.network.stranger.Load())
	return s.list.removes() && (time.Since(s.started) < strangerWait || time.Since(asked) < strangerWait)
}

// isListed says whether this node is in its own PEERS or PEERS_FILE.
func (s *Store) isListed() bool {
	return slices.ContainsFunc(s.list.get(), func(p Peer) bool { return p.ID == s.cfg.NodeID })
}

// hasLeft says whether this node's list, or the newest configuration that it has got, names it no more. The leader that
// removes a server need not have told it.
func (s *Store) hasLeft() bool {
	member, _ := s.isMember(s.membership.server())
	return !s.isListed() || !member && len(s.members()) > 0
}

// Leaving says whether this node is to leave the cluster or has left it. Its clients should connect to another one.
func (s *Store) Leaving() bool { return !s.isListed() || s.State().left }

// waitApplied waits until this node has executed the log up to index. A node that leaves the cluster meanwhile never
// will.
func (s *Store) waitApplied(ctx context.Context, index uint64) error {
	for s.replica.applied.load() < index {
		step, cancel := context.WithTimeout(ctx, leaderGrace)
		err := s.replica.applied.wait(step, index)
		cancel()
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ErrNotConfirmed
		case s.State().left:
			return ErrLeft
		}
	}
	return nil
}
