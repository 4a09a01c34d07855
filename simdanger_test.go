package main

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Chance rarely brings about what the protocol for nodes without state is there for. So each of these simulations plays
// one such danger, with the details left to chance; TestSimulation has all of it mixed.
func TestSimulationOfDangers(t *testing.T) {
	for _, d := range []struct {
		name  string
		store string
		nodes int

		wholeLog bool // there are no snapshots

		play func(s *sim) (came bool) // to the point at which it would go wrong
	}{
		{"an acknowledgement outlives its node", storeMemory, 3, true, (*sim).lateAcknowledgement},
		{"a request for a vote is held back", storeMemory, 5, true, (*sim).lateVoteRequest},
		{"a crash within a vote", storeBolt, 3, true, (*sim).halfAVote},
		{"a deposed leader reaches a newcomer", storeMemory, 5, true, (*sim).deposedReachesNewcomer},
		{"a deposed leader is asked for admission", storeMemory, 3, true, (*sim).deposedAdmits},
		{"a candidate hears of a leader that dies", storeMemory, 3, true, (*sim).leaderOfACandidate},
		{"an entry follows a snapshot and is replaced", storeMemory, 5, false, (*sim).conflictAfterSnapshot},
		{"a snapshot comes late", storeBolt, 3, false, (*sim).lateSnapshot},
		{"a survivor has an entry that was never committed", storeMemory, 3, true, (*sim).survivorWithATail},
		{"all that a survivor has is a snapshot", storeMemory, 3, false, (*sim).survivorWithASnapshot},
		{"a leader falls silent", storeMemory, 3, true, (*sim).silentLeader},
	} {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			came := 0
			for i := range 10 * *simRuns {
				simulate(t, d.store, d.nodes, *simSeed+uint64(i), func(s *sim) {
					for _, n := range s.nodes {
						if d.wholeLog {
							n.cfg.SnapshotThreshold = 1 << 20
						}
						n.start(nil, nil)
					}
					s.await(20*time.Second, "all nodes to be ready", s.allReady)
					s.settled.Store(true)
					s.put(s.nodes[0])
					if d.play(s) {
						came++
					}
					s.heal()
					s.compare()
				})
			}
			if t.Logf("%d of %d came to the point", came, 10**simRuns); came == 0 {
				t.Error("none came to the point; want most to")
			}
		})
	}
}

// lead makes a node the leader, and returns the others in some order.
func (s *sim) lead(n *simNode) (others []*simNode) {
	for s.leader() != n {
		s.stand(n)
		s.soon(2*time.Second, func() bool { return s.leader() == n })
	}
	s.await(5*time.Second, "all to follow", s.allReady)
	for _, i := range s.random.Perm(len(s.nodes)) {
		if s.nodes[i] != n {
			others = append(others, s.nodes[i])
		}
	}
	return others
}

// begins writes a value that can be told from others, and returns what tells whether that was acknowledged.
func (s *sim) begins(n *simNode, key, value string) (acknowledged func() bool) {
	done := make(chan bool, 1)
	go func() {
		out, ok := s.do(99, n, kvOp{kind: "put", key: key, value: value})
		done <- ok && !out.failed
	}()
	return func() bool {
		select {
		case ok := <-done:
			done <- ok
			return ok
		default:
			return false
		}
	}
}

// storedDisk returns the disk that the node has now; an empty one for none.
func (n *simNode) storedDisk() *simDisk {
	if d := n.disk.Load(); d != nil {
		return d
	}
	return &simDisk{raft.NewInmemStore(), &memorySnapshots{}}
}

// lastIndex returns the index of the node's newest log entry.
func (n *simNode) lastIndex() uint64 {
	index, _ := n.storedDisk().LastIndex()
	return index
}

// snapshot returns the index of the node's newest snapshot.
func (n *simNode) snapshot() (index uint64) {
	if list, _ := n.storedDisk().snapshots.List(); len(list) > 0 {
		index = list[0].Index
	}
	return index
}

// votedFor says whether the node's stored vote is for another one, in a term of its own.
func (n *simNode) votedFor(candidate *simNode) bool {
	r := n.run.Load()
	if r == nil || r.store.raft.Load() == nil {
		return false
	}
	term, _ := r.store.storage.stable.GetUint64(keyLastVoteTerm)
	who, _ := r.store.storage.stable.Get(keyLastVoteCand)
	return term == r.store.raft.Load().CurrentTerm() && bytes.Equal(who, []byte(candidate.id))
}

func (n *simNode) member() bool { return n.run.Load() != nil && !n.empty.Load() }

// node x acknowledges an entry of the leader's and loses its state before the acknowledgement arrives, which then
// commits the entry. Only the leader has it. x must not vote without it.
func (s *sim) lateAcknowledgement() (came bool) {
	leader := s.nodes[s.rand(3)]
	others := s.lead(leader)
	x, third := others[0], others[1]
	const value = `"a value that is nowhere else"`
	for leader.lastIndex()%maxAppendEntries != 0 || leader.lastIndex() == 0 { // so that the entry comes in a message of its own
		s.put(leader)
	}
	s.await(time.Second, "the log to be everywhere", func() bool { return x.lastIndex() == leader.lastIndex() && third.lastIndex() == leader.lastIndex() })
	s.net.set(leader.id, third.id, linkState{hold: entryWith(value)})
	s.net.set(x.id, leader.id, linkState{hold: answerToEntryWith(value)})
	acknowledged := s.begins(leader, "late", value)
	s.await(time.Second, "x to store the entry", func() bool { return x.lastIndex() == leader.lastIndex() })
	time.Sleep(s.upTo(20 * time.Millisecond))
	x.run.Load().crash(true, true)
	s.net.set(leader.id, x.id, linkState{hold: entryWith(value)})
	time.Sleep(s.upTo(100 * time.Millisecond))
	x.start(nil, nil)
	s.soon(2*time.Second, func() bool { return x.run.Load().store.Leader() == leader.id })
	time.Sleep(250*time.Millisecond + s.upTo(500*time.Millisecond))
	s.net.set(x.id, leader.id, linkState{})
	if s.soon(time.Second, func() bool { return acknowledged() && x.member() }) {
		leader.run.Load().crash(true, false)
		leader.comeBack(s.upTo(2 * time.Second))
		time.Sleep(2 * time.Second)
	}
	return acknowledged()
}

// node d stands for election and c votes for it, forgets that, and is brought up by the old leader, with whom it
// acknowledges a write. Then e gets the request for its vote that was held back (Michael et al., DISC 2017).
func (s *sim) lateVoteRequest() (came bool) {
	leader := s.nodes[s.rand(5)]
	others := s.lead(leader)
	b, c, d, e := others[0], others[1], others[2], others[3]
	s.net.set(leader.id, d.id, linkState{hold: raftOnly})
	s.net.set(d.id, leader.id, linkState{hold: raftOnly})
	s.net.set(d.id, b.id, linkState{hold: votesOnly})
	s.net.set(d.id, e.id, linkState{hold: votesOnly})
	s.stand(d)
	if !s.soon(time.Second, func() bool { return c.votedFor(d) }) {
		return false
	}
	time.Sleep(5*time.Millisecond + s.upTo(20*time.Millisecond))
	c.run.Load().crash(true, false)
	c.start(nil, nil)
	if !s.soon(1500*time.Millisecond, c.member) {
		return false
	}
	const value = `"what e does not have"`
	s.net.set(leader.id, e.id, linkState{hold: entryWith(value)})
	acknowledged := s.soon(time.Second, s.begins(leader, "k", value))
	s.net.set(d.id, e.id, linkState{})
	came = acknowledged && s.soon(time.Second, func() bool { return e.votedFor(d) })
	time.Sleep(time.Second)
	return came
}

// node v crashes between the two halves of a vote for y, while its last vote was for x, whose log is shorter than its own.
func (s *sim) halfAVote() (came bool) {
	x := s.nodes[s.rand(3)]
	others := s.lead(x)
	y, v := others[0], others[1]
	if !v.votedFor(x) {
		return false
	}
	s.net.set(y.id, v.id, linkState{hold: votesOnly})
	s.stand(y)
	if !s.soon(3*time.Second, func() bool { return s.leader() == y }) {
		return false
	}
	s.net.set(y.id, v.id, linkState{cut: true}) // and the request for v's vote is lost
	s.links(func(from, to *simNode) bool { return from == x && to == y || from == y && to == x }, linkState{hold: raftOnly})
	s.net.set(x.id, v.id, linkState{hold: votesOnly})
	s.net.set(y.id, v.id, linkState{})
	if !s.soon(time.Second, s.begins(y, "k", `"what x does not have"`)) {
		return false
	}
	s.standBy(x, v) // its request for v's vote will be heard by the next incarnation of v
	s.soon(time.Second, func() bool { return x.run.Load().store.State().State == "candidate" })
	process := v.run.Load()
	trap := func(step string, _ int64) bool {
		if step != "before set LastVoteCand" && step != "before set Vote" {
			return false
		}
		process.crash(false, false)
		v.comeBack(0)
		return true
	}
	process.steps.trap.Store(&trap)
	s.standBy(y, v)
	if !s.soon(time.Second, func() bool { return process.dead.Load() && v.run.Load() != nil }) {
		return false
	}
	s.net.set(x.id, v.id, linkState{})
	time.Sleep(time.Second)
	return true
}

// A leader has been replaced and does not know it yet; b has acknowledged an entry of its and then heard of the new term.
// Node x loses its state and is brought up by the new leader. If it then acknowledged that entry, too, the old leader had
// a majority for it, while the new one has had one for another entry in its place.
func (s *sim) deposedReachesNewcomer() (came bool) {
	old := s.nodes[0] // of those that say they lead, who looks for a leader takes the last
	others := s.lead(old)
	leader, voter, b, x := others[0], others[1], others[2], others[3]
	s.links(func(from, to *simNode) bool { return from == old && to != b || to == old && from != b }, linkState{hold: raftOnly})
	s.begins(old, "k", `"by the leader before"`)
	if !s.soon(500*time.Millisecond, func() bool { return b.lastIndex() == old.lastIndex() && b.lastIndex() > x.lastIndex() }) {
		return false
	}
	time.Sleep(10 * time.Millisecond)
	s.links(func(from, to *simNode) bool { return from == old && to == b || from == b && to == old }, linkState{hold: raftOnly})
	s.standBy(leader, voter)
	if !s.soon(500*time.Millisecond, leader.leads) || !s.put(leader) {
		return false
	}
	x.run.Load().crash(true, false)
	s.net.set(leader.id, x.id, linkState{hold: raftOnly})
	s.net.set(old.id, x.id, linkState{})
	s.net.set(x.id, old.id, linkState{})
	x.start(nil, nil)
	came = s.soon(500*time.Millisecond, func() bool { return x.run.Load().store.raft.Load() != nil && old.leads() })
	time.Sleep(time.Second)
	return came
}

// A leader has been replaced and does not know it yet. A node that helped to replace it, and to commit a write since,
// loses its state and asks the old leader to bring it up.
func (s *sim) deposedAdmits() (came bool) {
	old := s.nodes[s.rand(3)]
	others := s.lead(old)
	leader, x := others[0], others[1]
	s.links(func(from, to *simNode) bool { return from == old || from == leader && to == old }, linkState{hold: raftOnly})
	s.standBy(leader, x)
	if !s.soon(time.Second, leader.leads) || !s.put(leader) {
		return false
	}
	x.run.Load().crash(true, false)
	s.net.set(leader.id, x.id, linkState{cut: true})
	s.net.set(x.id, leader.id, linkState{cut: true})
	s.net.set(old.id, x.id, linkState{})
	x.start(nil, nil)
	s.soon(400*time.Millisecond, x.member)
	s.soon(time.Second, s.begins(old, "k", `"by the leader before"`))
	return true
}

// Node x stands for election in a term, because it was told to, when it hears that y leads in that term. That y dies at
// once. Node z has what x lacks, so only z can be elected, if x does not stick to y.
func (s *sim) leaderOfACandidate() (came bool) {
	z := s.nodes[s.rand(3)]
	others := s.lead(z)
	x, y := others[0], others[1]
	const value = `"what x does not have"`
	s.net.set(z.id, x.id, linkState{hold: entryWith(value)})
	if !s.soon(time.Second, s.begins(z, "k", value)) {
		return false
	}
	s.links(func(from, to *simNode) bool { return from == x }, linkState{hold: votesOnly})
	s.net.set(y.id, x.id, linkState{hold: entryWith(value)})
	s.standBy(x, z)
	s.standBy(y, z)
	if !s.soon(time.Second, func() bool { return x.state() == RaftState{"candidate", y.id, y.state().Term} }) {
		return false
	}
	y.run.Load().crash(true, false)
	y.comeBack(0)
	s.links(func(from, to *simNode) bool { return from == x || to == x }, linkState{})
	return true
}

func (n *simNode) state() (state RaftState) {
	if r := n.run.Load(); r != nil {
		state = r.store.State()
	}
	return state
}

// Node x got a snapshot and one entry after it, which nobody else has. The next leader has another one in its place.
func (s *sim) conflictAfterSnapshot() (came bool) {
	leader := s.nodes[s.rand(5)]
	others := s.lead(leader)
	x := others[0]
	for range 3 * int(leader.cfg.SnapshotThreshold) { // more than the log keeps
		s.put(leader)
	}
	covered := func() bool {
		return leader.snapshot() > 0 && leader.snapshot() == leader.lastIndex()
	}
	s.soon(2*time.Second, covered)
	x.run.Load().crash(true, false)
	x.start(nil, nil)
	s.soon(3*time.Second, x.member)
	apart := s.links(func(from, to *simNode) bool { return from == leader && to != x || from == x && to != leader }, linkState{hold: raftOnly})
	s.begins(leader, "k", `"what x alone has"`)
	came = s.soon(500*time.Millisecond, func() bool { return x.lastIndex() == leader.lastIndex() && x.lastIndex() > others[1].lastIndex() }) && x.snapshot() > 0
	leader.run.Load().crash(true, false)
	leader.comeBack(5 * time.Second)
	s.links(func(from, to *simNode) bool { return to == x }, linkState{hold: raftOnly})
	s.soon(5*time.Second, func() bool { l := s.leader(); return l != nil && l != x })
	apart()
	return came
}

// Node x gets a snapshot twice, and the first one arrives when x has executed much more.
func (s *sim) lateSnapshot() (came bool) {
	leader := s.nodes[s.rand(3)]
	x := s.lead(leader)[0]
	write := func() {
		for range 3 * int(leader.cfg.SnapshotThreshold) { // more than the log keeps
			s.put(leader)
		}
		time.Sleep(time.Second)
	}
	x.run.Load().crash(true, false)
	write()
	sentBefore := func(t time.Time) func(simMessage) bool {
		return func(m simMessage) bool { return m.isRequest(rpcInstallSnapshot) && m.at.Before(t) }
	}
	s.net.set(leader.id, x.id, linkState{hold: sentBefore(time.Now().Add(time.Hour))})
	x.start(nil, nil)
	time.Sleep(time.Second)
	s.net.set(leader.id, x.id, linkState{hold: sentBefore(time.Now())})
	if !s.soon(10*time.Second, s.allReady) {
		return false
	}
	first := x.snapshot()
	write()
	s.net.set(leader.id, x.id, linkState{})
	for range 100 {
		s.do(98, x, kvOp{kind: "get", key: "k"})
	}
	return x.snapshot() > first
}

// The survivor of a majority has an entry that was never committed. What the others committed in its place is lost with
// them, but its tag has been seen.
func (s *sim) survivorWithATail() (came bool) {
	s.lossy = true
	old := s.nodes[s.rand(3)]
	others := s.lead(old)
	s.links(func(from, to *simNode) bool { return from == old || to == old }, linkState{hold: raftOnly})
	s.begins(old, "k", `"nobody else has it"`)
	s.standBy(others[0], others[1])
	if !s.soon(time.Second, others[0].leads) || !s.put(others[0]) {
		return false
	}
	for _, n := range others {
		n.run.Load().crash(true, s.rand(2) == 0)
		n.comeBack(s.upTo(2 * time.Second))
	}
	return true
}

// A node was brought up by a snapshot, with no entry after it, when the others lose their state.
func (s *sim) survivorWithASnapshot() (came bool) {
	s.lossy = true
	leader := s.nodes[s.rand(3)]
	others := s.lead(leader)
	survivor := others[0]
	for range 2 * leader.cfg.TrailingLogs { // more than the log keeps
		s.put(leader)
	}
	if err := leader.run.Load().store.raft.Load().Snapshot().Error(); err != nil {
		s.t.Errorf("snapshot of %s: %v", leader.id, err)
	}
	survivor.run.Load().crash(true, false)
	survivor.start(nil, nil)
	s.soon(3*time.Second, survivor.member)
	came = survivor.snapshot() > 0 && survivor.lastIndex() == 0
	for _, n := range []*simNode{leader, others[1]} {
		n.run.Load().crash(true, s.rand(2) == 0)
		n.comeBack(s.upTo(2 * time.Second))
	}
	return came
}

// A leader dies, and those that follow it notice at different moments, none of them late. Now and then both stand at once
// and split the vote, which costs another election timeout.
func (s *sim) silentLeader() (came bool) {
	const limit = heartbeatTimeout + hurryTurns*watchInterval + 200*time.Millisecond
	took := make([]time.Duration, 7)
	for i := range took {
		leader := s.nodes[s.rand(3)]
		others := s.lead(leader)
		time.Sleep(500*time.Millisecond + s.upTo(time.Second)) // all have heard of it
		leader.run.Load().crash(true, true)
		began := time.Now()
		s.await(10*time.Second, "another leader", func() bool { return others[0].leads() || others[1].leads() })
		took[i] = time.Since(began)
		leader.start(nil, nil)
		s.await(10*time.Second, "all to be ready", s.allReady)
	}
	if slices.Sort(took); took[len(took)/2] > limit {
		s.t.Errorf("another leads %v after the leader's death; want half of them within %v", took, limit)
	}
	return true
}
