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

// plan is what the leader makes of the configuration, which is mine().Members, and of the answers of all nodes.
type plan struct {
	view
	removes bool   // a node that is not in the list is to leave
	target  uint64 // the index up to which a server must have executed the log to get a vote
	agreed  bool   // enough nodes have the same list as this leader
}

func (v view) plan(removes bool, target uint64) plan { return plan{v, removes, target, v.agreed()} }

// listed says whether a node is in this node's list.
func (v view) listed(node string) bool { return slices.Contains(v.peers, node) }

// sameList says whether a node answers that it has the same list as this one.
func (v view) sameList(node string) bool { return slices.Equal(v.answers[node].Peers, v.peers) }

// isOurs says whether a node answers as a server of this server's cluster.
func (v view) isOurs(node string) bool { return v.answers[node].Cluster == v.mine().Cluster }

// agreed says whether a majority of the voters, each asked as the server that votes, and a majority of the nodes in
// this node's list have the same list as this one. So a slip in the list of a minority changes nothing.
func (v view) agreed() bool {
	voters := voting(v.mine().Members)
	agree := count(voters, func(m member) bool { return v.present(m) && v.sameList(nodeOf(m.Server)) })
	listed := count(v.peers, func(node string) bool {
		return v.sameList(node) && (v.answers[node].Cluster == "" || v.isOurs(node))
	})
	return isMajority(agree, len(voters)) && isMajority(listed, len(v.peers))
}

// leaves says whether a node is to leave the cluster.
func (p plan) leaves(node string) bool { return p.removes && p.agreed && !p.listed(node) }

// votes says whether a node has a voter, gone or not.
func (p plan) votes(node string) bool {
	return slices.ContainsFunc(p.mine().Members, func(m member) bool { return m.Voter && nodeOf(m.Server) == node })
}

// next returns the next change by which this leader replaces servers that are gone, and brings the configuration to the
// list of nodes; false if there is none.
//
// The steps for one node are: add the new server as a non-voter; when it has caught up, remove the old voter; make the
// new one a voter. In this order no step needs more live servers for a majority than the one before. What another
// leader has begun, and what was itself lost half-way, is finished first. Nodes are added one after the other, and all
// of them before any is removed.
func (p plan) next() (change, bool) {
	for _, step := range []func(m member) (change, bool){p.promote, p.removeOld, p.addPresent} {
		for _, m := range p.mine().Members {
			if c, due := step(m); due {
				return c, true
			}
		}
	}
	if c, due := p.addNode(); due {
		return c, true
	}
	return p.removeNode()
}

// promote makes a non-voter that has caught up a voter, unless its node has one.
func (p plan) promote(m member) (change, bool) {
	node := nodeOf(m.Server)
	return change{raft.AddVoter, m}, p.caughtUp(m) && !p.votes(node) && !p.leaves(node)
}

// caughtUp says whether a server answers, and has executed all that it must have for a vote.
func (p plan) caughtUp(m member) bool {
	return p.present(m) && p.answers[nodeOf(m.Server)].Applied >= p.target
}

// removeOld removes a server that is gone when the one in its place is in the configuration: a non-voter at once, a
// voter when that one may vote. A non-voter of a node that is to leave goes, too.
func (p plan) removeOld(m member) (change, bool) {
	node := nodeOf(m.Server)
	now, is := p.memberAt(node)
	due := is && now != m && (!m.Voter || now.Voter || p.caughtUp(now))
	if p.leaves(node) {
		due = !m.Voter
	}
	return change{raft.RemoveServer, m}, due
}

// memberAt returns the member that a node answers as; false if it answers as none.
func (p plan) memberAt(node string) (m member, is bool) {
	for _, m = range p.mine().Members {
		if nodeOf(m.Server) == node && p.present(m) {
			return m, true
		}
	}
	return member{}, false
}

// addPresent adds the server that a member's node answers as, if it is no member.
func (p plan) addPresent(m member) (change, bool) {
	node := nodeOf(m.Server)
	_, is := p.memberAt(node)
	return p.add(node), !is && p.isOurs(node) && !p.leaves(node)
}

func (p plan) add(node string) change {
	return change{raft.AddNonvoter, member{Server: p.answers[node].Server, Address: p.address(node)}}
}

// addNode adds a node that is in the list and not in the configuration, when each node there has a voter.
func (p plan) addNode() (change, bool) {
	waits := slices.ContainsFunc(nodesOf(p.mine().Members), func(node string) bool {
		return !p.votes(node) && !p.leaves(node)
	})
	i := slices.IndexFunc(p.peers, func(node string) bool { return !p.votes(node) && p.isOurs(node) })
	if waits || !p.agreed || i < 0 {
		return change{}, false
	}
	return p.add(p.peers[i]), true
}

// complete says whether each node of the list has a voter that is not gone.
func (p plan) complete() bool {
	return !slices.ContainsFunc(p.peers, func(node string) bool { return !p.hasVoter(p.mine().Members, node) })
}

// removeNode removes a node that is not in the list, but not this leader. One that does not answer as its voter goes
// first: to remove another could leave too few live voters for a majority. Example: of node1 to node5 node3 and node5
// are down, and the list is node1 to node3. Without node4 two of four would be left, and nothing could be committed.
func (p plan) removeNode() (change, bool) {
	leavers := slices.DeleteFunc(slices.Clone(p.mine().Members), func(m member) bool {
		return !p.leaves(nodeOf(m.Server)) || nodeOf(m.Server) == p.self
	})
	if len(leavers) == 0 || !p.complete() {
		return change{}, false
	}
	silent := slices.IndexFunc(leavers, func(m member) bool { return !p.present(m) })
	return change{raft.RemoveServer, leavers[max(silent, 0)]}, true
}

// handsOver says whether this leader is all that is left to leave. A voter of the list, which leads next, removes it.
func (p plan) handsOver() bool { return p.complete() && p.leaves(p.self) }

// waitsFor says, to people, what keeps the configuration from being what the list says; "" if it is.
func (p plan) waitsFor() string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	members := nodesOf(p.mine().Members)
	for _, node := range p.peers {
		info, answers := p.answers[node]
		switch {
		case info.Cluster != "" && !p.isOurs(node):
			add("%s is of another cluster, %s", node, info.Cluster)
		case p.votes(node):
		case !answers:
			add("%s", p.whySilent(node))
		case slices.Contains(members, node):
			add("%s is catching up", node)
		default:
			add("%s is to be added", node)
		}
	}
	for _, node := range members {
		switch {
		case p.listed(node):
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
		if !p.sameList(node) {
			add("%s names %s", node, strings.Join(p.answers[node].Peers, ", "))
		}
	}
	return "no majority of the voters and of the list answers and names the same nodes: " + strings.Join(parts, "; ")
}

// holdsBack says, to people, why this node takes part in no new cluster yet; "" if it may. There may be a cluster that
// knows this node and that its PEERS_FILE does not name, and whose members ask for it twice a second. Example: node1 to
// node3 are a cluster in memory, and all lists become node3, node4 and node5. Now node3 restarts without its state. All
// nodes of its list answer and hold nothing, but node1 and node2 hold the data.
func (s *Store) holdsBack() string {
	last := s.network.stranger.Load()
	switch {
	case !s.list.removes():
	case time.Since(last.at) < strangerWait:
		return fmt.Sprintf("%s asks for it, may hold data, and is not in PEERS_FILE: name it there, or stop it", last.node)
	case time.Since(s.started) < strangerWait:
		return "it has just started, and nodes that are not in PEERS_FILE may ask for it"
	}
	return ""
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
