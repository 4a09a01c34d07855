package main

import (
	"bytes"
	"fmt"
	"raftstarter/test/history"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// readyLimit is how long nodes may take to be ready, or one to lead, where a test sets the scene.
const readyLimit = 30 * time.Second

// Chance rarely brings about what the protocol is there for. So each of these simulations plays one such danger, with the
// details left to chance; TestSimulation has all of it mixed. simmember_test.go has those of the membership.
func TestSimulationOfDangers(t *testing.T) {
	for _, d := range []struct {
		name  string
		store string
		nodes int

		wholeLog bool // there are no snapshots but those that are asked for
		unborn   bool // the nodes are not started yet

		play func(s *sim) (came bool) // to the point at which it would go wrong
	}{
		{"an acknowledgement outlives its server", storeBolt, 3, true, false, (*sim).lateAcknowledgement},
		{"a request for a vote is held back", storeMemory, 5, true, false, (*sim).lateVoteRequest},
		{"a crash within a vote", storeBolt, 3, true, false, (*sim).halfAVote},
		{"a candidate hears of a leader that dies", storeMemory, 3, true, false, (*sim).leaderOfACandidate},
		{"an entry follows a snapshot and is replaced", storeMemory, 5, false, false, (*sim).conflictAfterSnapshot},
		{"a snapshot comes late", storeBolt, 3, false, false, (*sim).lateSnapshot},
		{"a stale log lies below a snapshot", storeMemory, 5, true, false, (*sim).staleLogBelowSnapshot},
		{"a leader falls silent", storeMemory, 3, true, false, (*sim).silentLeader},
		{"a deposed leader gets answers to old questions", storeMemory, 3, true, false, (*sim).deposedLeaderReads},
		{"a server is paused while its cluster begins", storeMemory, 3, true, true, (*sim).pausedAcrossBootstrap},
		{"crashes while a cluster begins, in memory", storeMemory, 3, true, true, (*sim).crashesInBootstrap},
		{"crashes while a cluster begins, on disk", storeBolt, 3, true, true, (*sim).crashesInBootstrap},
		{"a cluster is lost as it begins", storeMemory, 3, true, true, (*sim).lostAsItBegins},
		{"a leader changes within a replacement, in memory", storeMemory, 5, false, false, (*sim).leaderChangesInReplacement},
		{"a leader changes within a replacement, on disk", storeBolt, 5, false, false, (*sim).leaderChangesInReplacement},
		{"a new voter that not all know of must lead", storeMemory, 3, true, false, (*sim).newestVoterMustLead},
		{"a deposed leader adds a server", storeMemory, 3, true, false, (*sim).deposedLeaderAdds},
		{"two of five lose their state at once", storeMemory, 5, false, false, (*sim).twoOfFive},
		{"what lost servers have sent and were to hear comes late", storeBolt, 5, true, false, (*sim).lateFromTheLost},
	} {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			came := 0
			for i := range 10 * *simRuns {
				simulate(t, d.store, d.nodes, *simSeed+uint64(i), func(s *sim) {
					for _, n := range s.nodes {
						if d.wholeLog {
							n.cfg.SnapshotThreshold, n.cfg.TrailingLogs = 1<<20, 60
						}
						if !d.unborn {
							n.start(nil)
						}
					}
					if !d.unborn {
						s.await(readyLimit, "all nodes to be ready", s.allReady)
						s.put(s.nodes[0])
					}
					there := d.play(s)
					s.heal()
					for tries := 0; tries < 2 && !there && !d.unborn && !t.Failed(); tries++ {
						there = d.play(s)
						s.heal()
					}
					if there {
						came++
					}
					s.await(5*time.Second, "a write", func() bool { return s.put(s.nodes[0]) })
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
	s.await(readyLimit, n.id+" to lead", func() bool {
		s.stand(n)
		return s.soon(2*time.Second, func() bool { return s.leader() == n })
	})
	s.soon(5*time.Second, s.allReady)
	return s.others(n)
}

// others returns the other nodes in some order.
func (s *sim) others(n *simNode) (others []*simNode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.random.Perm(len(s.nodes)) {
		if s.nodes[i] != n {
			others = append(others, s.nodes[i])
		}
	}
	return others
}

// unique returns a value that is put once, as JSON.
func (s *sim) unique(text string) string { return fmt.Sprintf("\"%s, %d\"", text, s.value.Add(1)) }

// begins writes a value that can be told from others, and returns what tells whether that was acknowledged.
func (s *sim) writes(n *simNode, key, value string) (acknowledged func() bool) {
	done := make(chan bool, 1)
	go func() {
		out, ok := s.do(99, n, history.Op{Kind: "put", Key: key, Value: value})
		done <- ok && !out.Failed
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
	return &simDisk{InmemStore: raft.NewInmemStore(), snapshots: &memorySnapshots{}}
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

// votedFor says whether the node's stored vote is for the server that another one is now, in a term of its own.
func (n *simNode) votedFor(candidate *simNode) bool {
	r := n.run.Load()
	if r == nil || r.store.raft.Load() == nil {
		return false
	}
	term, _ := r.store.storage.stable.GetUint64(keyLastVoteTerm)
	who, _ := r.store.storage.stable.Get(keyLastVoteCand)
	return term == r.store.raft.Load().CurrentTerm() && bytes.Equal(who, []byte(candidate.disk.Load().identity().Server))
}

func (n *simNode) state() (state RaftState) {
	if r := n.run.Load(); r != nil {
		state = r.store.State()
	}
	return state
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
	c.start(nil)
	if !s.soon(5*time.Second, c.ready) {
		return false
	}
	value := s.unique("what e does not have")
	s.net.set(leader.id, e.id, linkState{hold: entryWith(value)})
	acknowledged := s.soon(time.Second, s.writes(leader, "k", value))
	s.net.set(d.id, e.id, linkState{})
	time.Sleep(time.Second) // for e to hear it
	return acknowledged
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
	if !s.soon(time.Second, s.writes(y, "k", s.unique("what x does not have"))) {
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

// Node x stands for election in a term, because it was told to, when it hears that y leads in that term. That y dies at
// once. Node z has what x lacks, so only z can be elected, if x does not stick to y.
func (s *sim) leaderOfACandidate() (came bool) {
	z := s.nodes[s.rand(3)]
	others := s.lead(z)
	x, y := others[0], others[1]
	value := s.unique("what x does not have")
	s.net.set(z.id, x.id, linkState{hold: entryWith(value)})
	if !s.soon(time.Second, s.writes(z, "k", value)) {
		return false
	}
	s.links(func(from, to *simNode) bool { return from == x }, linkState{hold: votesOnly})
	s.net.set(y.id, x.id, linkState{hold: entryWith(value)})
	s.standBy(x, z)
	s.soon(100*time.Millisecond, func() bool { return x.state().State == "candidate" })
	s.standBy(y, z)
	if !s.soon(time.Second, func() bool {
		return x.state() == RaftState{"candidate", y.id, y.state().Term, y.disk.Load().identity().Server, false}
	}) {
		return false
	}
	y.run.Load().crash(true, false)
	y.comeBack(0)
	s.links(func(from, to *simNode) bool { return from == x || to == x }, linkState{})
	return true
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
	x.start(nil)
	s.soon(3*time.Second, x.ready)
	apart := s.links(func(from, to *simNode) bool { return from == leader && to != x || from == x && to != leader }, linkState{hold: raftOnly})
	s.writes(leader, "k", s.unique("what x alone has"))
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
	x.start(nil)
	time.Sleep(time.Second)
	s.net.set(leader.id, x.id, linkState{hold: sentBefore(time.Now())})
	if !s.soon(10*time.Second, s.allReady) {
		return false
	}
	first := x.snapshot()
	write()
	s.net.set(leader.id, x.id, linkState{})
	for range 100 {
		s.do(98, x, history.Op{Kind: "get", Key: "k"})
	}
	return x.snapshot() > first
}

// A leader dies, and writes are possible again soon. Now and then two stand at once and split the vote, which costs
// another election timeout.
func (s *sim) silentLeader() (came bool) {
	const limit = 3 * time.Second
	took := make([]time.Duration, 7)
	for i := range took {
		leader := s.nodes[s.rand(3)]
		others := s.lead(leader)
		time.Sleep(500*time.Millisecond + s.upTo(time.Second)) // all have heard of it
		leader.run.Load().crash(true, true)
		began := time.Now()
		s.await(10*time.Second, "a write", func() bool { return s.put(others[0]) })
		took[i] = time.Since(began)
		leader.start(nil)
		s.await(readyLimit, "all to be ready", s.allReady)
	}
	if slices.Sort(took); took[len(took)-2] > limit {
		s.t.Errorf("writes are possible %v after the leader's death; want all but one within %v", took, limit)
	}
	return true
}

// Node x acknowledges an entry of the leader's and loses its state before the acknowledgement arrives, which then
// commits the entry. Only the leader has it, and falls silent. So nobody else may be elected.
func (s *sim) lateAcknowledgement() (came bool) {
	leader := s.nodes[s.rand(3)]
	others := s.lead(leader)
	x, third := others[0], others[1]
	value := s.unique("a value that is nowhere else")
	for leader.lastIndex()%maxAppendEntries != 0 || leader.lastIndex() == 0 { // so that the entry comes in a message of its own
		s.put(leader)
	}
	s.await(time.Second, "the log to be everywhere", func() bool { return x.lastIndex() == leader.lastIndex() && third.lastIndex() == leader.lastIndex() })
	s.net.set(leader.id, third.id, linkState{hold: entryWith(value)})
	s.net.set(x.id, leader.id, linkState{hold: answerToEntryWith(value)})
	acknowledged := s.writes(leader, "late", value)
	s.await(time.Second, "x to store the entry", func() bool { return x.lastIndex() == leader.lastIndex() })
	time.Sleep(s.upTo(20 * time.Millisecond))
	x.run.Load().crash(true, true)
	s.net.set(leader.id, x.id, linkState{hold: raftOnly})
	time.Sleep(s.upTo(100 * time.Millisecond))
	x.start(nil)
	time.Sleep(s.upTo(500 * time.Millisecond))
	s.net.set(x.id, leader.id, linkState{})
	if !s.soon(time.Second, acknowledged) {
		return false
	}
	resume := s.pause(leader)
	for range 3 {
		s.stand(third)
		s.stand(x)
		time.Sleep(time.Second)
	}
	resume()
	return true
}

// A leader has been replaced and does not know it yet, as the answers to what it asked before are under way to it. They
// say nothing of a read that began later.
func (s *sim) deposedLeaderReads() (came bool) {
	old := s.nodes[s.rand(3)]
	others := s.lead(old)
	leader, third := others[0], others[1]
	value := s.unique("what the old leader does not have")
	s.links(func(from, to *simNode) bool { return to == old }, linkState{hold: raftOnly})
	time.Sleep(heartbeatTimeout / 4) // by now it has asked both once more
	s.links(func(from, to *simNode) bool { return from == old }, linkState{hold: raftOnly})
	s.standBy(leader, third)
	if !s.soon(2*heartbeatTimeout/5, leader.leads) || !s.soon(heartbeatTimeout/4, s.writes(leader, "read", value)) || !old.leads() {
		return false
	}
	read := make(chan history.Answer, 1)
	go func() {
		out, _ := s.do(98, old, history.Op{Kind: "get", Key: "read"})
		read <- out
	}()
	time.Sleep(10 * time.Millisecond)
	s.links(func(from, to *simNode) bool { return to == old }, linkState{hold: func(m simMessage) bool { return raftOnly(m) && !answers(m) }})
	time.Sleep(20 * time.Millisecond)
	s.links(func(from, to *simNode) bool { return from == old || to == old }, linkState{})
	if out := <-read; out.Known && out.Value != value {
		s.t.Errorf("a leader that has been replaced read %s; want %s", out.Value, value)
	}
	return true
}

// Node a alone has many entries of a leader that dies with them. It is cut off while others are committed in their place,
// and then gets a snapshot that ends among them, with what follows it. What it has below the snapshot is of the old leader
// still. When it leads, a server that begins with nothing must not get that.
func (s *sim) staleLogBelowSnapshot() (came bool) {
	old := s.nodes[s.rand(5)]
	others := s.lead(old)
	a, b, f := others[0], others[1], others[2]
	s.links(func(from, to *simNode) bool { return from == old && to != a }, linkState{hold: requests})
	s.writes(old, "k", s.unique("never committed"))
	const stale = 20
	before := old.lastIndex()
	for range stale {
		old.run.Load().store.raft.Load().Apply(encodeEntry(time.Now(), nil), 0)
	}
	if !s.soon(500*time.Millisecond, func() bool { return a.lastIndex() >= before+stale && a.lastIndex() == old.lastIndex() }) {
		return false
	}
	apart := s.links(func(from, to *simNode) bool { return from == a || to == a }, linkState{cut: true})
	old.run.Load().crash(true, false)
	s.soon(5*time.Second, func() bool { s.standBy(b, f); time.Sleep(time.Second); return b.leads() })
	for range stale / 2 {
		s.put(b)
	}
	b.lag.Store(int64(5 * time.Second))
	done := b.run.Load().store.raft.Load().Snapshot()
	time.Sleep(time.Second)
	for range 2 * b.cfg.TrailingLogs {
		s.put(b)
	}
	if done.Error() != nil || b.snapshot() > a.lastIndex() {
		return false
	}
	b.lag.Store(0)
	term := b.state().Term
	s.standBy(b, f) // once more, so that it does not go on with what it had for a
	s.soon(5*time.Second, func() bool { return b.leads() && b.state().Term > term })
	apart()
	if !s.soon(10*time.Second, func() bool { return a.snapshot() > 0 && a.lastIndex() == b.lastIndex() }) {
		return false
	}
	s.soon(5*time.Second, a.ready)
	s.await(readyLimit, "a to lead", func() bool { s.standBy(a, b); return s.soon(2*time.Second, a.leads) })
	f.run.Load().crash(true, false)
	f.start(nil)
	s.soon(5*time.Second, f.ready)
	s.do(98, f, history.Op{Kind: "get", Key: "k"})
	old.start(nil)
	return true
}
