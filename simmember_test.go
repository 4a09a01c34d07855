package main

import (
	"raftstarter/test/history"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// The dangers of the membership: while a cluster begins, and while servers that are gone are replaced.

// first returns the node that bootstraps the cluster.
func (s *sim) first() *simNode { return s.nodes[0] }

// membersOf returns what the newest configuration on a node's disk says of another node: the servers of it.
func (n *simNode) membersOf(other *simNode) (members []member) {
	if c := n.storedDisk().configurations(); len(c) > 0 {
		members = slices.DeleteFunc(c[len(c)-1], func(m member) bool { return nodeOf(m.Server) != other.id })
	}
	return members
}

// loses crashes a process now, with its state if it may lose that. In memory it crashes only if it may.
func (s *sim) loses(r *simRun, wanted bool) (crashed bool) {
	s.losing.Lock()
	defer s.losing.Unlock()
	wanted = wanted && s.mayLose(r.node)
	return (wanted || s.store == storeBolt) && r.crashes(wanted, s.rand(2) == 0)
}

// A node is paused at the moment at which the cluster is begun. The others begin without it, unless it is the one that
// begins, and it comes back much later.
func (s *sim) pausedAcrossBootstrap() (came bool) {
	victim := s.nodes[s.rand(len(s.nodes))]
	step := []string{"after set " + string(keyIdentity), "before store logs", "after store logs"}[s.rand(3)]
	paused := make(chan func(), 1)
	s.first().start(func(*simRun) func(string, int64) bool {
		return func(what string, _ int64) bool {
			if what != step || s.first().disk.Load().identity().Bootstrap == nil {
				return false
			}
			paused <- s.pause(victim)
			return true
		}
	})
	for _, n := range s.nodes[1:] {
		n.comeBack(s.upTo(time.Second))
	}
	resume := <-paused
	time.Sleep(s.upTo(5 * time.Second))
	came = victim == s.first() && s.leader() == nil || s.put(s.others(victim)[0])
	resume()
	return came
}

// Two nodes crash while the cluster is begun, each at some step of it, with or without their state: the one that begins it,
// and one that joins.
func (s *sim) crashesInBootstrap() (came bool) {
	identity := "set " + string(keyIdentity)
	trap := func(r *simRun) func(string, int64) bool {
		steps := []string{"before " + identity, "after " + identity, "before " + identity, "after " + identity}
		if r.node == s.first() {
			steps = append(steps, "before set "+string(keyCurrentTerm), "after set "+string(keyCurrentTerm), "before store logs", "storing", "after store logs")
		}
		at := s.random.IntN(len(steps)) // start holds mu
		times := 1
		if at == 2 || at == 3 {
			times = 2 // for its name, and for its cluster
		}
		loses := s.random.IntN(2) == 0 || s.store == storeMemory
		return func(what string, _ int64) bool {
			if what != steps[at] {
				return false
			}
			if times--; times > 0 || !s.loses(r, loses) {
				return false
			}
			came = true
			r.node.comeBack(s.upTo(2 * time.Second))
			return true
		}
	}
	joiner := s.nodes[1+s.rand(len(s.nodes)-1)]
	for _, n := range s.nodes {
		if n == joiner || n == s.first() {
			n.start(trap)
		} else {
			n.comeBack(s.upTo(time.Second))
		}
	}
	s.soon(readyLimit, s.allReady)
	return came
}

// Node x has lost its state and is replaced. When the leader has stored one of the changes for that, it falls silent, or
// crashes, or loses its state, and in the first two cases another node loses its own.
func (s *sim) leaderChangesInReplacement() (came bool) {
	leader := s.nodes[s.rand(5)]
	others := s.lead(leader)
	x, y := others[0], others[1]
	lost := x.disk.Load().identity().Server
	x.run.Load().crash(true, s.rand(2) == 0)
	x.comeBack(s.upTo(200 * time.Millisecond))
	after := []raft.ConfigurationChangeCommand{raft.AddNonvoter, raft.RemoveServer, raft.AddVoter}[s.rand(3)]
	stored := func() bool {
		members := leader.membersOf(x)
		switch {
		case len(members) == 0 || members[0].Server == lost && len(members) == 1:
			return false
		case after == raft.AddNonvoter:
			return true
		}
		return len(members) == 1 && (after == raft.RemoveServer || members[0].Voter)
	}
	acted := make(chan bool, 1)
	process := leader.run.Load()
	trap := func(what string, _ int64) bool {
		if !strings.HasPrefix(what, "after store logs") || !stored() {
			return false
		}
		acted <- true
		return true
	}
	process.steps.trap.Store(&trap)
	if !s.soon(10*time.Second, func() bool { return len(acted) > 0 || stored() && s.store == storeBolt }) {
		return false
	}
	time.Sleep(s.upTo(10 * time.Millisecond >> s.rand(4)))
	switch how := s.rand(3); {
	case how == 0 || s.store == storeMemory && how == 1: // the second of five
		process.crash(true, s.rand(2) == 0)
		leader.comeBack(s.upTo(5 * time.Second))
	case how == 1:
		process.crash(false, s.rand(2) == 0)
		y.run.Load().crash(true, false)
		leader.comeBack(s.upTo(5 * time.Second))
		y.comeBack(s.upTo(5 * time.Second))
	default:
		s.pause(leader)
		y.run.Load().crash(true, s.rand(2) == 0)
		y.comeBack(s.upTo(2 * time.Second))
	}
	for range s.rand(5) {
		s.stand(others[2+s.rand(2)])
		time.Sleep(s.upTo(time.Second))
		s.put(others[2])
	}
	return true
}

// Node x has lost its state and been replaced, and is ready. The third node does not know yet that x votes, when the leader
// loses its state. Only x can lead, and only if the third votes for it.
func (s *sim) newestVoterMustLead() (came bool) {
	leader := s.nodes[s.rand(3)]
	others := s.lead(leader)
	x, third := others[0], others[1]
	x.run.Load().crash(true, false)
	x.start(nil)
	if !s.soon(5*time.Second, func() bool {
		return len(third.membersOf(x)) == 1 && third.membersOf(x)[0].Server == x.disk.Load().identity().Server
	}) {
		return false
	}
	s.net.set(leader.id, third.id, linkState{hold: requests})
	if !s.soon(2*time.Second, x.ready) {
		return false
	}
	came = !slices.ContainsFunc(third.membersOf(x), isVoter)
	leader.run.Load().crash(true, false)
	s.net.set(leader.id, third.id, linkState{cut: true}) // what it has sent is lost
	leader.comeBack(s.upTo(3 * time.Second))
	return came
}

// Two of five nodes lose their state at once, the leader among them or not, while clients write.
func (s *sim) twoOfFive() (came bool) {
	victims := s.others(s.nodes[s.rand(5)])[:2]
	if leader := s.leader(); leader != nil && s.rand(2) == 0 {
		victims = []*simNode{leader, s.others(leader)[0]}
	}
	for range s.rand(3 * 60) {
		s.put(s.nodes[s.rand(5)])
	}
	for _, n := range victims {
		n.run.Load().crash(true, s.rand(2) == 0)
		n.comeBack(s.upTo(time.Second << s.rand(3)))
	}
	healthy := slices.DeleteFunc(slices.Clone(s.nodes), func(n *simNode) bool { return slices.Contains(victims, n) })
	for range 10 {
		came = s.put(healthy[s.rand(3)]) || came
	}
	s.await(readyLimit, "both to be replaced", s.allReady)
	return came
}

// A leader loses its state while its entries, and a candidate while its requests for votes, are under way to node t, which
// loses its own or not. All of it arrives when others have gone on.
func (s *sim) lateFromTheLost() (came bool) {
	old := s.nodes[s.rand(5)]
	others := s.lead(old)
	t, candidate := others[0], others[1]
	held := s.links(func(from, to *simNode) bool { return to == t && (from == old || from == candidate) }, linkState{hold: requests})
	s.writes(old, "k", s.unique("by the lost leader"))
	time.Sleep(s.upTo(100 * time.Millisecond))
	s.stand(candidate)
	time.Sleep(20*time.Millisecond + s.upTo(100*time.Millisecond))
	victims := []*simNode{old, candidate, t}
	keeps := s.rand(len(victims))
	for i, n := range victims {
		if i != keeps && n.run.Load() != nil {
			n.run.Load().crash(true, true)
			n.comeBack(s.upTo(time.Second))
		}
	}
	came = s.soon(10*time.Second, func() bool { return s.put(others[2]) })
	time.Sleep(s.upTo(2 * time.Second))
	held()
	return came
}

// A leader has been replaced and does not know it yet. Node x, which helped to replace it and to commit a write since,
// loses its state and hears of the old leader alone, which adds its new server as a non-voter. That confirms no reads, and
// commits nothing.
func (s *sim) deposedLeaderAdds() (came bool) {
	old := s.nodes[s.rand(3)]
	others := s.lead(old)
	leader, x := others[0], others[1]
	s.links(func(from, to *simNode) bool { return from == old || from == leader && to == old }, linkState{hold: raftOnly})
	s.standBy(leader, x)
	value := s.unique("what the old leader does not have")
	if !s.soon(500*time.Millisecond, leader.leads) || !s.soon(200*time.Millisecond, s.writes(leader, "read", value)) {
		return false
	}
	x.run.Load().crash(true, false)
	s.links(func(from, to *simNode) bool { return from == leader || to == leader }, linkState{cut: true})
	s.net.set(old.id, x.id, linkState{})
	s.net.set(x.id, old.id, linkState{})
	x.start(nil)
	came = s.soon(time.Second, func() bool {
		return old.leads() && slices.ContainsFunc(old.membersOf(x), func(m member) bool { return !m.Voter }) && x.runsRaft()
	})
	s.writes(old, "k", s.unique("by the old leader"))
	if out, ok := s.do(98, old, history.Op{Kind: "get", Key: "read"}); ok && out.Value != value {
		s.t.Errorf("a leader that has been replaced read %s; want %s", out.Value, value)
	}
	return came
}

// The node that has begun the cluster loses its state when another has seen that the cluster has begun, and runs Raft, but
// nobody has got an entry. All must begin anew.
func (s *sim) lostAsItBegins() (came bool) {
	first := s.first()
	s.links(func(from, _ *simNode) bool { return from == first }, linkState{hold: requests})
	for _, n := range s.nodes {
		n.comeBack(s.upTo(time.Second))
	}
	came = s.soon(readyLimit, func() bool { return slices.ContainsFunc(s.nodes[1:], (*simNode).runsRaft) })
	came = came && s.loses(first.run.Load(), true)
	s.net.set(first.id, s.nodes[1].id, linkState{cut: true}) // what it has sent is lost
	s.net.set(first.id, s.nodes[2].id, linkState{cut: true})
	first.comeBack(s.upTo(time.Second))
	time.Sleep(s.upTo(2 * time.Second))
	return came
}
