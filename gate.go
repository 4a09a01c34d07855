package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// A node that has lost its log and votes is of no use to an election, and dangerous in one: it would vote twice in a
// term, or help a candidate that lacks what this node had acknowledged. So it is gated: it takes the leader's entries,
// but neither votes nor stands for election nor confirms a leader, until it has all that the leader had when the node
// came. See "Coming back with nothing" in DESIGN.md.

// handleAdmit tells a gated node what it must have before it may vote. The index is that of the newest entry and not the
// newest committed one: what the node acknowledged before it lost its log may be committed by just that.
func (s *Store) handleAdmit(ctx context.Context, from string, _ []byte) ([]byte, error) {
	r := s.raft.Load()
	if r == nil {
		return nil, ErrNotLeader
	}
	term, _, err := s.confirmLeadership(ctx, r, from)
	if err != nil {
		return nil, err
	}
	index := r.LastIndex()
	if d := s.storage.disk; d != nil { // what a crash may still take must not be what the other waits for
		if err := d.await(index); err != nil {
			return nil, err
		}
	}
	return json.Marshal(admission{Cluster: s.form.id(), Term: term, Index: index})
}

func (s *Store) askAdmission(ctx context.Context, leader string) (a admission, err error) {
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	answer, err := s.peers.call(ctx, leader, opAdmit, nil)
	if err == nil {
		err = json.Unmarshal(answer, &a)
	}
	if err == nil {
		err = checkClusterID(a.Cluster)
	}
	return a, err
}

// passGate returns when this node may vote.
func (s *Store) passGate() {
	goal := s.form.current().index
	for s.form.gated() && s.pause(formInterval) {
		// The end of what the first leader had may have been lost with it; what a later one has is enough.
		if a, err := s.askAdmission(s.ctx, s.Leader()); err == nil && a.Cluster == s.form.id() {
			goal = min(goal, a.Index)
		}
		have := s.raft.Load().CommitIndex()
		s.form.waits(fmt.Sprintf("the node has come back without its state: it has %d of the %d log entries that it needs to vote", have, goal))
		if have < goal {
			continue
		}
		if err := s.form.become(standing{kind: standMember, cluster: s.form.id()}, ""); err != nil {
			s.log.Debug("the node may not vote yet", "error", err)
		}
	}
}

// startOver ends this Store for a new one that begins with storage, or without state if that is nil.
type startOver struct{ storage *storage }

func (*startOver) Error() string { return "the node starts over in another cluster" }

// candidacy is longer than a candidate can know of a leader whose messages it gets. Raft lets a node that was told to
// stand for election hear of another one's, and go on standing. If that leader dies at once, nobody tells the node, which
// for its sake grants no pre-vote to anybody, and may get none. To stand again makes it forget.
const candidacy = 3 * heartbeatTimeout

// stay watches over a node that is of a cluster but sees no leader, or none that a majority confirms: the others may have
// formed another cluster without it, or be without state and in need of what it has.
func (s *Store) stay() {
	var ripe, stuck patience
	for s.pause(stayInterval) {
		now := s.State()
		if stuck.over(now.State == "candidate" && now.Leader != "", candidacy) {
			s.transport.campaign(s.ctx.Done())
		}
		if now.Leader != "" && (now.Leader != s.cfg.NodeID || s.confirmed()) {
			ripe = patience{}
			continue
		}
		c, err := s.form.census(s.ctx)
		if err != nil || s.Leader() != now.Leader {
			continue
		}
		s.form.waits("no leader is known; " + s.form.advice(c))
		stance := c.stance(s.cfg.NodeID, s.cfg.KVStore)
		patient := ripe.over(stance == isSurvivor || stance == isBlank, s.form.patience)
		switch {
		case stance == isOutdone:
			s.outranked(c.ruling)
			return
		case stance == forgets, stance == isBlank && patient:
			s.forget()
			return
		case patient:
			if id, granted := s.form.seekGrants(s.ctx, c); granted && s.Leader() == now.Leader {
				s.takeOver(id)
				return
			}
		}
	}
}

// confirmed says whether this node, which leads, can be confirmed. If a majority has lost its state it may go on with the
// acknowledgements of gated nodes; but these confirm nobody, so it can bring up no other node, and answers no read.
func (s *Store) confirmed() bool {
	_, _, err := s.confirmLeadership(s.ctx, s.raft.Load(), "")
	return err == nil
}

// outranked stops a node whose cluster is no more: a majority is of another one. What this node holds may be all that
// is left of the older cluster, so its files stay.
func (s *Store) outranked(ruling string) {
	err := fmt.Errorf("node %s is of cluster %s, but a majority of the nodes is of cluster %s, formed while they were without state; "+
		"this node does not serve any more", s.cfg.NodeID, s.form.id(), ruling)
	if s.cfg.KVStore == storeMemory {
		s.end(fmt.Errorf("%w: start it again to join the others", err))
		return
	}
	err = fmt.Errorf("%w; nothing was deleted: if its data are not needed, move STATE_DIR %q away and start it again to join the others",
		err, s.cfg.StateDir)
	s.log.Error("outranked", "error", err)
	s.halted.Store(&err)
	s.raft.Load().Shutdown()
}

// forget gives up a cluster in which this node has no part to lose: it has no entry, or was gated.
func (s *Store) forget() {
	s.log.Warn("the node's cluster is no more; it begins again without state", "cluster", s.form.id())
	s.leave(func(st *storage) (*storage, error) {
		h, err := s.form.holds()
		switch {
		case err != nil:
			return nil, err
		case s.cfg.KVStore == storeMemory && (h.Lost || h.nothing()):
			return nil, nil
		case s.cfg.KVStore == storeMemory: // it has got something at the last moment
			return st, nil
		case !h.nothing():
			return nil, nil // likewise: what is on the disk stays
		}
		first, err := st.logs.FirstIndex()
		if err == nil && first > 0 { // a founder's first entry
			err = st.logs.DeleteRange(first, first)
		}
		return nil, errors.Join(err, st.stable.Set(keyCluster, nil))
	})
}

// takeOver makes this node, which has the most complete log of those that survived, the founder of a cluster that goes
// on with what it has.
func (s *Store) takeOver(cluster string) {
	s.log.Warn("a majority has lost its state; this node goes on with what it has, and acknowledged writes may be lost",
		"old-cluster", s.form.id(), "cluster", cluster)
	s.leave(func(st *storage) (*storage, error) {
		last, _, err := st.lastEntry()
		st.survivor, st.executed = true, s.replica.applied.load()
		return st, errors.Join(err, st.stable.Set(keyCluster, standing{kind: standFounder, index: last, cluster: cluster}.encode()))
	})
}

// leave stops Raft and has the process begin again with the storage that prepare returns.
func (s *Store) leave(prepare func(*storage) (*storage, error)) {
	stopped := make(chan error, 1)
	stop := s.raft.Load().Shutdown()
	go func() { stopped <- stop.Error() }()
	var next *storage
	var err error
	select {
	case err = <-stopped:
	case <-s.ctx.Done():
		return
	}
	if err == nil {
		next, err = prepare(s.storage)
	}
	if err == nil {
		err = &startOver{next}
	}
	s.end(err)
}

// end has the process end, or start over, for the given reason.
func (s *Store) end(err error) {
	select {
	case s.failed <- err:
	default: // it does so for another reason
	}
}

// pause returns false when the Store shuts down.
func (s *Store) pause(interval time.Duration) bool { return s.form.pause(s.ctx, interval) }

// handleVoted says whether this node's vote in a term is the caller's. A candidate asks when a majority has voted for
// it: a voter that has lost its state meanwhile does not count.
func (s *Store) handleVoted(_ context.Context, from string, request []byte) ([]byte, error) {
	r := s.raft.Load()
	if r == nil || len(request) != 8 || s.form.gated() || r.CurrentTerm() != binary.BigEndian.Uint64(request) {
		return []byte{0}, nil
	}
	vote, err := s.storage.stable.Get(keyVote)
	if err != nil || string(vote) != string(request)+from {
		return []byte{0}, nil
	}
	return []byte{1}, nil
}

// standsBy asks a voter whether it stands by its vote for this node.
func (s *Store) standsBy(voter string, term uint64) bool {
	ctx, cancel := context.WithTimeout(s.ctx, askTimeout)
	defer cancel()
	return s.peers.agrees(ctx, voter, opVoted, binary.BigEndian.AppendUint64(nil, term))
}

// ballot gathers the votes that this node gets in one term.
type ballot struct {
	term    uint64
	missing int           // votes of other nodes until a majority has voted
	enough  chan struct{} // closed then; no later vote counts
}

// ballots is the newest ballot. Its zero value is ready.
type ballots struct {
	mu     sync.Mutex // guards newest
	newest *ballot
}

// granted notes a vote and returns the channel that is closed when there are enough; nil when the vote does not count: its
// term has passed, or there were enough without it, so that a voter may have been asked before this vote was given. needed is
// how many other nodes make a majority with this one.
func (b *ballots) granted(term uint64, needed int) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.newest == nil || b.newest.term < term {
		b.newest = &ballot{term, needed, make(chan struct{})}
	}
	if b.newest.term > term || b.newest.missing == 0 {
		return nil
	}
	if b.newest.missing--; b.newest.missing == 0 {
		close(b.newest.enough)
	}
	return b.newest.enough
}

// RequestVote asks a node for its vote, and when a majority has voted asks once more: only a vote that its voter still
// stands by then counts.
func (t *transport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if t.gated() {
		return nil
	}
	if err := t.NetworkTransport.RequestVote(id, target, args, resp); err != nil || !resp.Granted {
		return err
	}
	resp.Granted = false
	timer := time.NewTimer(2 * heartbeatTimeout) // the election is over by then
	defer timer.Stop()
	select {
	case <-t.ballots.granted(args.Term, t.needed()):
		resp.Granted = t.standsBy(string(id), args.Term)
	case <-timer.C:
	case <-t.closing:
	}
	return nil
}

// RequestPreVote asks nobody while this node may not be elected: the answer is no.
func (t *transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if t.gated() {
		return nil
	}
	return t.NetworkTransport.RequestPreVote(id, target, args, resp)
}

// refuse answers in Raft's stead what a gated node must not say yes to. It returns false for all other messages.
func (t *transport) refuse(rpc raft.RPC) bool {
	if !t.gated() {
		return false
	}
	switch rpc.Command.(type) {
	case *raft.RequestVoteRequest:
		rpc.Respond(&raft.RequestVoteResponse{}, nil)
	case *raft.RequestPreVoteRequest:
		rpc.Respond(&raft.RequestPreVoteResponse{}, nil)
	case *raft.TimeoutNowRequest:
		rpc.Respond(nil, errors.New("this node may not vote yet"))
	default:
		return false
	}
	return true
}
