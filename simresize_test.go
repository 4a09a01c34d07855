package main

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// The list of nodes changes in the simulation, as a change of PEERS_FILE on one node after another does ("Resizing" in
// DESIGN.md). A cluster of three of five nodes grows and shrinks to any other of them, while nodes crash, lose their state
// and are cut off: those that are to leave and those that are to be added, too.
func TestSimulationOfResizing(t *testing.T) {
	for _, store := range []string{storeMemory, storeBolt} {
		t.Run(store+", all faults", func(t *testing.T) {
			t.Parallel()
			var lists atomic.Int64
			for i := range *simRuns {
				simulate(t, store, 5, *simSeed+uint64(i), func(s *sim) {
					s.beginsWithThree()
					s.resize(*simTime)
					lists.Add(int64(s.lists.newest))
				})
			}
			t.Logf("%d lists", lists.Load())
		})
		t.Run(store+", the leader falls out between two steps", func(t *testing.T) {
			t.Parallel()
			came, plays := 0, 0
			for i := range 5 * *simRuns {
				simulate(t, store, 5, *simSeed+uint64(i), func(s *sim) {
					for _, n := range s.nodes {
						n.cfg.SnapshotThreshold, n.cfg.TrailingLogs = 1<<20, 60
					}
					s.beginsWithThree()
					for range 4 {
						if plays++; s.leaderFallsOutInResize() {
							came++
						}
					}
					s.compare()
				})
			}
			if t.Logf("%d of %d came to the point", came, plays); came == 0 {
				t.Error("none came to the point; want most to")
			}
		})
	}
}

// simLists are the lists of nodes that a simulation goes through. sim.mu guards it.
type simLists struct {
	newest    int              // number of the newest list, which is the last one in use
	inUse     [][]Peer         // lists that nodes have, or are about to get
	heard     map[*simNode]int // number of the list that a node has
	committed uint64           // index of a configuration that is known to be committed
}

// beginsWithThree starts the first three nodes. They are the whole list.
func (s *sim) beginsWithThree() {
	three := s.nodes[0].cfg.Peers[:3]
	s.mu.Lock()
	s.lists = &simLists{inUse: [][]Peer{three}, heard: make(map[*simNode]int)}
	for _, n := range s.nodes {
		n.cfg.Peers, n.cfg.PeersFile = three, "none" // it cannot be read, and so changes nothing
	}
	s.mu.Unlock()
	for _, n := range s.nodes {
		n.start(nil)
	}
	s.await(readyLimit, "the first three nodes to be ready", s.allReady)
}

// resize has clients use the cluster for some time, while the list of nodes changes and faults strike.
func (s *sim) resize(d time.Duration) {
	stop := s.runClients()
	for began := time.Now(); time.Since(began) < d && !s.t.Failed(); {
		s.striking.Store(true)
		for range 2 + s.rand(8) {
			if s.rand(2) == 0 {
				s.changeList(5 * time.Second >> s.rand(6))
			}
			s.fault()
		}
		s.settle()
	}
	stop()
	s.compare()
}

// runClients runs clients until stop is called, which waits for them.
func (s *sim) runClients() (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() { s.client(ctx, i) })
	}
	return func() {
		cancel()
		clients.Wait()
	}
}

// changeList makes a new list of some of the nodes, which reaches all of them within some time. As a new list must, it
// has a node that holds something.
func (s *sim) changeList(within time.Duration) {
	s.losing.Lock()
	defer s.losing.Unlock()
	s.mu.Lock()
	size := []int{1, 2, 3, 3, 3, 4, 5, 5}[s.random.IntN(8)]
	var list []Peer
	for _, i := range s.random.Perm(len(s.nodes))[:size] {
		list = append(list, Peer{ID: s.nodes[i].id, Addr: s.nodes[i].id})
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b Peer) int { return strings.Compare(a.ID, b.ID) })
	if !s.isHeld(list, nil) {
		return
	}
	s.mu.Lock()
	s.lists.inUse = append(s.lists.inUse, list)
	s.lists.newest++
	number := s.lists.newest
	s.mu.Unlock()
	s.log.note("all nodes", "are to be "+strings.Join(peerIDs(list), ", "))
	for _, n := range s.nodes {
		after := s.upTo(within)
		go func() { // ends when the node has the list
			time.Sleep(after)
			s.hear(n, number, list)
		}()
	}
}

// hear gives a node a list, unless it has a newer one, and starts it if it was in none before.
func (s *sim) hear(n *simNode, number int, list []Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lists.heard[n] >= number {
		return
	}
	was := n.isListed()
	s.lists.heard[n], n.cfg.Peers = number, list
	if r := n.run.Load(); r != nil {
		r.store.list.now.Store(&list)
	}
	if !was && n.isListed() {
		n.comeBack(time.Duration(s.random.Int64N(int64(3 * time.Second))))
	}
}

// isListed says whether a node is in the list that it has. It is called with mu held.
func (n *simNode) isListed() bool {
	return slices.ContainsFunc(n.cfg.Peers, func(p Peer) bool { return p.ID == n.id })
}

// mayStart says whether the service would start: a node that is not in its list does so only with state. It is called
// with mu held.
func (n *simNode) mayStart() bool {
	return n.isListed() || n.cfg.KVStore == storeBolt && n.disk.Load() != nil
}

// belongs says whether a node is in the list that it has.
func (n *simNode) belongs() bool {
	n.sim.mu.Lock()
	defer n.sim.mu.Unlock()
	return n.isListed()
}

// isHeld says whether a node of a list holds something, other than the given one. Nodes that all hold nothing and name
// one another begin a cluster of their own. It is called with losing held.
func (s *sim) isHeld(list []Peer, but *simNode) bool {
	return slices.ContainsFunc(list, func(p Peer) bool {
		n := s.node(p.ID)
		return n != but && (n.lastIndex() > 0 || n.snapshot() > 0)
	})
}

// mayLoseInResize is mayLose while the list changes: whichever configuration is the one that counts, a majority of its
// voters keeps its state, and each list has a node that holds something. The leader may be about to remove a voter that
// has its state, and not know yet that this one loses its own. It is called with losing held.
func (s *sim) mayLoseInResize(n *simNode) bool {
	s.mu.Lock()
	for _, other := range s.nodes {
		if r := other.run.Load(); r != nil {
			s.lists.committed = max(s.lists.committed, r.store.replica.config.load())
		}
	}
	committed, lists := s.lists.committed, slices.Clone(s.lists.inUse)
	s.mu.Unlock()
	for _, members := range s.configurations(committed) {
		voters := slices.DeleteFunc(slices.Clone(members), func(m member) bool { return !m.Voter })
		kept := slices.DeleteFunc(slices.Clone(voters), func(m member) bool { return s.node(m.Server) == n || s.isGone(m) })
		removed := 0
		if slices.ContainsFunc(lists, func(list []Peer) bool { return leaves(voters, list) }) {
			removed = 1
		}
		if !isMajority(len(kept)-removed, len(voters)-removed) {
			return false
		}
	}
	return !slices.ContainsFunc(lists, func(list []Peer) bool { return !s.isHeld(list, n) })
}

// leaves says whether the node of one of the voters is not in a list.
func leaves(voters []member, list []Peer) bool {
	return slices.ContainsFunc(voters, func(m member) bool {
		return !slices.ContainsFunc(list, func(p Peer) bool { return p.ID == nodeOf(m.Server) })
	})
}

// configurations returns what all nodes have stored of the configurations from an index on.
func (s *sim) configurations(from uint64) (all [][]member) {
	for _, n := range s.nodes {
		all = append(all, n.storedDisk().configurationsFrom(from)...)
	}
	return all
}

// configurationsFrom returns the stored configurations from an index on.
func (d *simDisk) configurationsFrom(from uint64) (all [][]member) {
	if list, _ := d.snapshots.List(); len(list) > 0 && list[0].ConfigurationIndex >= from {
		all = append(all, membersOf(list[0].Configuration))
	}
	first, _ := d.FirstIndex()
	last, _ := d.LastIndex()
	for i := max(first, from, 1); i <= last; i++ {
		if l := new(raft.Log); d.GetLog(i, l) == nil && l.Type == raft.LogConfiguration {
			all = append(all, membersOf(raft.DecodeConfiguration(l.Data)))
		}
	}
	return all
}

// settle ends all faults, gives all nodes the newest list, and makes sure that it becomes the membership in time.
func (s *sim) settle() {
	s.mu.Lock()
	number, list := s.lists.newest, s.lists.inUse[len(s.lists.inUse)-1]
	s.mu.Unlock()
	for _, n := range s.nodes {
		s.hear(n, number, list)
	}
	s.heal()
	s.await(simReadyLimit, "the membership to be "+strings.Join(peerIDs(list), ", "), func() bool {
		leader := s.leader()
		return leader != nil && slices.Equal(leader.voters(), peerIDs(list)) && leader.run.Load().store.Status().Membership.WaitsFor == ""
	})
	s.mu.Lock()
	s.lists.inUse = [][]Peer{list}
	s.mu.Unlock()
}

// voters returns the nodes of the voters in the newest configuration of a node that runs, nil if it has non-voters too.
func (n *simNode) voters() (nodes []string) {
	r := n.run.Load()
	if r == nil {
		return nil
	}
	for _, m := range r.store.members() {
		if !m.Voter {
			return nil
		}
		nodes = append(nodes, nodeOf(m.Server))
	}
	slices.Sort(nodes)
	return nodes
}

// The list changes once. When the leader has stored one of the changes for that, it crashes, loses its state or falls
// silent, and now and then another node loses its own. Nodes are added before others are removed, so the cluster has never
// fewer voters than in the shorter one of the two lists, but for those that are being replaced.
func (s *sim) leaderFallsOutInResize() (came bool) {
	stop := s.runClients()
	defer stop()
	before, since, last := s.leader().voters(), s.leader().lastIndex()+1, s.lists.newest
	for s.lists.newest == last {
		s.changeList(2 * time.Second >> s.rand(6))
	}
	list := s.lists.inUse[len(s.lists.inUse)-1]
	var acted atomic.Bool
	var crashes atomic.Int64
	step, pauses := 1+s.rand(6), s.rand(3) == 0
	for _, n := range s.nodes {
		r := n.run.Load()
		if r == nil {
			continue
		}
		trap := func(what string, _ int64) bool {
			if what != "after store logs" || !n.leads() || len(n.storedDisk().configurationsFrom(since)) < step || !acted.CompareAndSwap(false, true) {
				return false
			}
			if pauses || !s.loses(r, s.rand(2) == 0 || s.store == storeMemory) {
				s.pause(n)
				return true
			}
			crashes.Add(1)
			n.comeBack(s.upTo(4 * time.Second))
			return true
		}
		r.steps.trap.Store(&trap)
	}
	if r := s.nodes[s.rand(5)].run.Load(); r != nil && s.rand(2) == 0 {
		time.Sleep(s.upTo(3 * time.Second))
		if s.loses(r, true) {
			crashes.Add(1)
			r.node.comeBack(s.upTo(2 * time.Second))
		}
	}
	s.soon(5*time.Second, acted.Load)
	time.Sleep(s.upTo(4 * time.Second))
	s.settle()
	least := min(len(before), len(list)) - int(crashes.Load())
	for _, members := range s.configurations(since) {
		if voters := len(slices.DeleteFunc(slices.Clone(members), func(m member) bool { return !m.Voter })); voters < least {
			s.t.Errorf("the configuration was %v on the way from %v to %v, with %d crashes; want %d voters at least",
				members, before, peerIDs(list), crashes.Load(), least)
		}
	}
	return acted.Load()
}
