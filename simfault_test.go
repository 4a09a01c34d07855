package main

import (
	"context"
	"fmt"
	"raftstarter/test/history"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// How nodes lose their state, and what else befalls them.

const simReadyLimit = 20 * time.Second // for all nodes to be ready, when nothing stands in their way any more

// node returns the node whose state a server is.
func (s *sim) node(server string) *simNode {
	return s.nodes[slices.IndexFunc(s.nodes, func(n *simNode) bool { return n.id == nodeOf(server) })]
}

// isGone says whether a server's state is lost.
func (s *sim) isGone(m member) bool {
	return s.node(m.Server).disk.Load().identity().Server != m.Server
}

// begun says whether a cluster has begun: a node has stored that it bootstraps it, or holds an entry of it.
func (s *sim) begun() bool {
	return slices.ContainsFunc(s.nodes, func(n *simNode) bool {
		d := n.disk.Load()
		return d != nil && (d.identity().Bootstrap != nil || len(d.configurations()) > 0)
	})
}

// begins takes note of the servers with which a cluster begins. It is called with losing held.
func (s *sim) begins(members []member) {
	lost := 0
	for _, m := range members {
		if s.isGone(m) {
			lost++
		} else {
			s.node(m.Server).disk.Load().full.Store(true)
		}
	}
	s.stillborn.Store(2*lost > len(members))
}

// bury takes note of clusters that can commit nothing any more, whichever of the configurations that the nodes have stored
// is the one that counts, and whatever a leader may still append to it. It is called with losing held.
func (s *sim) bury() {
	alive := make(map[string]bool) // by cluster
	for _, n := range s.nodes {
		d := n.disk.Load()
		if d == nil {
			continue
		}
		for _, members := range d.configurations() {
			voters := slices.DeleteFunc(members, func(m member) bool { return !m.Voter })
			there := slices.DeleteFunc(slices.Clone(voters), s.isGone)
			cluster := d.identity().Cluster
			alive[cluster] = alive[cluster] || 2*len(there) >= len(voters)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for cluster, is := range alive {
		if _, known := s.deaths[cluster]; !is && !known {
			s.deaths[cluster] = s.clock.Load()
			simTotals.deaths.Add(1)
		}
	}
}

// mayLose says whether the node may lose its state now. Before a cluster begins there is nothing to be lost. It is called
// with losing held.
func (s *sim) mayLose(n *simNode) bool {
	if s.lists != nil {
		return s.mayLoseInResize(n)
	}
	without := 1
	for _, other := range s.nodes {
		if other != n && !other.hasState() {
			without++
		}
	}
	return s.lossy || without <= (len(s.nodes)-1)/2 || !s.begun()
}

// strike crashes a process now, if its state may be lost, or if it may keep it.
func (s *sim) strike(r *simRun) {
	s.losing.Lock()
	defer s.losing.Unlock()
	loses := s.mayLose(r.node) && (s.store == storeMemory || s.rand(4) == 0)
	if loses || s.store == storeBolt {
		if r.crashes(loses, s.rand(2) == 0) {
			r.node.comeBack(s.upTo(time.Second << s.rand(4)))
		}
	}
}

// fault injects a fault, and mends most of those that are no crashes after a while.
func (s *sim) fault() {
	simTotals.faults.Add(1)
	victim := s.nodes[s.rand(len(s.nodes))]
	if leader := s.leader(); leader != nil && s.rand(3) == 0 {
		victim = leader
	}
	var mended func()
	kind := s.rand(10)
	s.log.note(victim.id, fmt.Sprintf("fault %d", kind))
	switch kind {
	case 0: // a crash
		if r := victim.run.Load(); r != nil {
			s.strike(r)
		}
	case 1: // crashes of several nodes
		for _, n := range s.nodes {
			if r := n.run.Load(); r != nil && s.rand(2) == 0 {
				s.strike(r)
			}
		}
	case 2, 3: // a crash at some step to come
		if r := victim.run.Load(); r != nil {
			r.crashAt(1 + int64(s.rand(1+s.rand(200))))
		}
	case 4: // a node that is told to stand for election: the leader that told it so may be none any more
		s.stand(victim)
	case 5: // a node cut off
		mended = s.links(func(from, to *simNode) bool { return from == victim || to == victim }, linkState{cut: true})
	case 6: // messages of one node, or to it, held back
		from := s.rand(2) == 0
		mended = s.links(func(a, b *simNode) bool { return from && a == victim || !from && b == victim }, linkState{hold: s.some()})
	case 7: // some links
		mended = s.links(func(*simNode, *simNode) bool { return s.rand(3) == 0 }, linkState{hold: s.some()})
	case 8: // votes
		mended = s.links(func(*simNode, *simNode) bool { return s.rand(2) == 0 }, linkState{hold: votesOnly})
		if s.rand(2) == 0 {
			s.stand(victim)
		}
	case 9: // a node is paused, as far as the others can see
		mended = s.pause(victim)
	}
	time.Sleep(s.upTo(3 * time.Second >> s.rand(5)))
	if mended != nil && s.rand(4) > 0 {
		mended()
	}
}

// some returns what a link holds back.
func (s *sim) some() func(simMessage) bool {
	return []func(simMessage) bool{anything, raftOnly, votesOnly, requests}[s.rand(4)]
}

// pause holds back all that a node says and hears.
func (s *sim) pause(n *simNode) (resume func()) {
	return s.links(func(from, to *simNode) bool { return from == n || to == n }, linkState{hold: anything})
}

// links changes links, and returns what opens them again.
func (s *sim) links(which func(from, to *simNode) bool, state linkState) (open func()) {
	var changed [][2]string
	for _, from := range s.nodes {
		for _, to := range s.nodes {
			if from != to && which(from, to) {
				s.net.set(from.id, to.id, state)
				changed = append(changed, [2]string{from.id, to.id})
			}
		}
	}
	return func() {
		for _, link := range changed {
			s.net.set(link[0], link[1], linkState{})
		}
	}
}

// runsRaft says whether a process of the node runs Raft.
func (n *simNode) runsRaft() bool {
	r := n.run.Load()
	return r != nil && r.store.raft.Load() != nil
}

// stand has a node stand for election at once: it gets the message with which a leader hands over.
func (s *sim) stand(n *simNode) {
	for _, from := range s.nodes {
		if from != n && from.runsRaft() {
			s.standBy(n, from)
			return
		}
	}
}

// standBy is stand with a message from the given node.
func (s *sim) standBy(n, from *simNode) {
	r, target := from.run.Load(), n.disk.Load().identity().Server
	if !from.runsRaft() || target == "" {
		return
	}
	go func() {
		id := []byte(r.store.membership.server())
		_ = r.store.transport.TimeoutNow(raft.ServerID(target), raft.ServerAddress(target),
			&raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: id, Addr: id}}, new(raft.TimeoutNowResponse))
	}()
}

// heal ends all faults and makes sure that all nodes are ready in time, with the help of people only where a majority has
// lost its state.
func (s *sim) heal() {
	s.striking.Store(false)
	s.links(func(*simNode, *simNode) bool { return true }, linkState{})
	for _, n := range s.nodes {
		if r := n.run.Load(); r != nil {
			r.steps.trap.Store(nil)
		}
	}
	for slices.ContainsFunc(s.nodes, func(n *simNode) bool { return n.run.Load() == nil && n.belongs() }) {
		time.Sleep(10 * time.Millisecond)
	}
	if s.lossy || s.stillborn.Load() {
		s.soon(simReadyLimit, func() bool { return s.allReady() || s.advised() != nil })
		if !s.allReady() && s.advised() != nil {
			time.Sleep(2 * time.Second) // people do not hurry
			s.cure()
		}
	}
	s.soon(simReadyLimit, func() bool { return s.allReady() || len(s.unbegun()) > 0 })
	if !s.allReady() && len(s.unbegun()) > 0 {
		time.Sleep(2 * time.Second)
		for _, r := range s.unbegun() {
			r.crash(true, false)
			r.node.comeBack(s.upTo(time.Second))
		}
	}
	s.await(simReadyLimit, "all nodes to be ready", s.allReady)
}

// unbegun returns the nodes that people are told to start without their state, as they have joined a cluster that never
// began.
func (s *sim) unbegun() (told []*simRun) {
	for _, n := range s.nodes {
		if r := n.run.Load(); r != nil {
			if err := r.store.Ready(); err != nil && strings.Contains(err.Error(), "else start "+n.id+" without its state") {
				told = append(told, r)
			}
		}
	}
	return told
}

var simAdvice = regexp.MustCompile(`a majority of the nodes has lost its state, .* Node (\w+) has the most complete log`)

// advised returns the node whose state people are told to save, by all nodes alike; nil while that is not so.
func (s *sim) advised() (named *simNode) {
	for _, n := range s.nodes {
		r := n.run.Load()
		if r == nil {
			return nil
		}
		ready := r.store.Ready()
		if ready == nil {
			return nil
		}
		m := simAdvice.FindStringSubmatch(ready.Error())
		if m == nil || named != nil && named.id != m[1] {
			return nil
		}
		named = s.node(m[1])
	}
	return named
}

// cure does what the nodes advise people to do when a majority has lost its state: save what the named node still
// answers, start all anew without state, and write back what was saved.
func (s *sim) cure() {
	named := s.advised()
	if named == nil {
		return
	}
	r := named.run.Load()
	s.log.note(named.id, "is saved")
	unexecuted := r.disk.valuesAfter(r.store.replica.applied.load())
	for _, op := range s.h.all() {
		if out := op.Output.(history.Answer); out.Known && !out.Failed && unexecuted[op.Input.(history.Op).Value] {
			simTotals.unexecuted.Add(1)
		}
	}
	copied, err := copyAll(context.Background(), r.store, r.client.machine)
	if err != nil {
		s.t.Errorf("%s, whose state is to be saved, cannot be: %v", named.id, err)
	}
	var saved []testPair
	for key, item := range copied.items {
		saved = append(saved, testPair{key, item.Value})
	}
	s.mu.Lock()
	for _, p := range saved {
		s.restored[p.Key] = true
	}
	s.mu.Unlock()
	for _, n := range s.nodes {
		n.run.Load().crash(true, false)
	}
	s.stillborn.Store(false)
	for _, n := range s.nodes {
		n.comeBack(s.upTo(time.Second))
	}
	s.await(simReadyLimit, "all nodes to be ready without state", s.allReady)
	for _, p := range saved { // one by one, as each value of the history has a tag of its own
		if _, err := s.nodes[s.rand(len(s.nodes))].run.Load().client.set(context.Background(), p.Key, p.Value); err != nil {
			s.t.Errorf("restore: %v", err)
		}
	}
	client := s.nodes[s.rand(len(s.nodes))].run.Load().client
	for _, p := range saved {
		if item, err := client.get(context.Background(), p.Key, Linearizable); err != nil || item.Value != p.Value {
			s.t.Errorf("%s is %q, %v after it was restored; want %s", p.Key, item.Value, err, p.Value)
		}
	}
	simTotals.cures.Add(1)
}

// valuesAfter returns the values of the commands that the log holds after an entry.
func (d *simDisk) valuesAfter(index uint64) map[string]bool {
	values := make(map[string]bool)
	last, _ := d.LastIndex()
	for i := index + 1; i <= last; i++ {
		l := new(raft.Log)
		if d.GetLog(i, l) != nil || l.Type != raft.LogCommand {
			continue
		}
		_, commands, _ := decodeEntry(l.Data)
		for _, encoded := range commands {
			if c, err := decodeTestCommand(encoded); err == nil {
				values[c.pairs[0].Value] = true
			}
		}
	}
	return values
}
