package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

const (
	leaderWait    = 5 * time.Second        // for a leader to be known, within requestTimeout
	leaderGrace   = 500 * time.Millisecond // for a leader that was replaced to answer the calls that it has
	retryInterval = 20 * time.Millisecond

	watchInterval = 50 * time.Millisecond
	electionTurn  = 300 * time.Millisecond // between two followers that notice a silent leader

	handoverWait   = 2 * time.Second        // for another node to become leader
	handoverLinger = 200 * time.Millisecond // for the others to hear of it, while we still answer them

	replicationStuckAfter = 10 * time.Second // without a commit by a leader that has something to commit
)

// RaftState is where this node stands, as far as it knows.
type RaftState struct {
	State  string // "starting", "forming", "follower", "candidate", "leader" or "shutdown"
	Leader string // the leader's node id, "" when there is none
	Term   uint64

	server string // the leader
	left   bool   // it is to leave the cluster or has left it, and knows no leader
}

// leadership is the newest RaftState, for all who wait for a change of it.
type leadership struct {
	ctx context.Context // ends with the Store
	now atomic.Pointer[publishedState]
}

type publishedState struct {
	RaftState
	changed     chan struct{}   // closed when there is another state
	calls       context.Context // of the calls to this leader: ends leaderGrace after it is the leader no more
	cancelCalls context.CancelFunc
}

// newLeadership returns one in which calls to leaders end with ctx.
func newLeadership(ctx context.Context) *leadership {
	l := &leadership{ctx: ctx}
	p := &publishedState{RaftState: RaftState{State: "starting"}, changed: make(chan struct{})}
	p.calls, p.cancelCalls = context.WithCancel(ctx) //nolint:gosec // set calls it
	l.now.Store(p)
	return l
}

// set publishes a state, and returns the one before. Only one goroutine, which ends with ctx, may call it.
func (l *leadership) set(ctx context.Context, state RaftState) (before RaftState) {
	last := l.now.Load()
	if last.RaftState == state {
		return state
	}
	next := &publishedState{state, make(chan struct{}), last.calls, last.cancelCalls}
	if state.server != last.server {
		time.AfterFunc(leaderGrace, last.cancelCalls)
		next.calls, next.cancelCalls = context.WithCancel(ctx) //nolint:gosec // set calls it, for the next leader
	}
	l.now.Store(next)
	close(last.changed)
	return last.RaftState
}

// retry calls f when a leader is known, and again as long as f returns ErrNotLeader or ErrNoLeader, for up to
// leaderWait: when the leadership moves, this node hears of it a little later.
func (l *leadership) retry(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(leaderWait)
	for {
		state := l.now.Load()
		if state.left {
			return ErrLeft
		}
		err := ErrNoLeader
		if state.Leader != "" {
			if err = f(); !errors.Is(err, ErrNotLeader) && !errors.Is(err, ErrNoLeader) {
				return err
			}
		}
		if time.Now().After(deadline) {
			return err
		}
		timer := time.NewTimer(retryInterval)
		select {
		case <-state.changed:
		case <-timer.C:
		case <-ctx.Done():
			return err
		case <-l.ctx.Done():
			return err
		}
		timer.Stop()
	}
}

// callLeader sends the leader a call and returns its answer. The error is ErrNoLeader or ErrNotLeader when the call
// certainly had no effect, else ErrUnknownOutcome. A call to a leader that has stopped answering ends when another
// leader is known, so that it does not hold up what could be sent to that one.
func (s *Store) callLeader(op byte, request []byte, timeout time.Duration) ([]byte, error) {
	state := s.leadership.now.Load()
	leader := state.server
	if leader == "" || leader == s.membership.server() {
		return nil, ErrNoLeader
	}
	ctx, cancel := context.WithTimeout(state.calls, timeout)
	defer cancel()
	answer, err := s.peers.call(ctx, leader, op, request)
	if err == nil {
		return answer, nil
	}
	s.log.Debug("a call to the leader failed", "leader", leader, "call", op, "error", err)
	if unsent := new(dialError); errors.As(err, &unsent) || errors.Is(err, errRemote) {
		return nil, ErrNotLeader
	}
	return nil, ErrUnknownOutcome
}

// State returns where this node stands.
func (s *Store) State() RaftState { return s.leadership.now.Load().RaftState }

// Leader returns the leader's node id, "" when this node knows of none.
func (s *Store) Leader() string { return s.State().Leader }

// leadsIn says whether this node is the leader of term.
func (s *Store) leadsIn(term uint64) bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
}

// leadsNow says whether this node is the leader, as far as it knows.
func (s *Store) leadsNow() bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader
}

// leadsReady says whether this node leads and has executed all that leaders before it have acknowledged.
func (s *Store) leadsReady() bool {
	term := s.ready.load()
	return term > 0 && s.leadsIn(term)
}

// isIn says whether this node's term is the given one.
func (s *Store) isIn(term uint64) bool {
	r := s.raft.Load()
	return r != nil && r.CurrentTerm() == term
}

// lastApplied returns the index of the last log entry that the state machine has executed.
func (s *Store) lastApplied() uint64 { return s.replica.applied.load() }

func (s *Store) appliedIndex() uint64 { return s.raft.Load().AppliedIndex() }

// commitsWithOthers says whether this node leads and nothing is committed by what it has stored alone. Raft's main
// thread must ask, as that is where this changes.
func (s *Store) commitsWithOthers() bool { return s.leadsNow() && len(voting(s.members())) > 1 }

// watch publishes every change of Raft's state until the Store shuts down: at once when Raft tells of it, and at the
// latest after watchInterval, since Raft may leave out what it tells.
func (s *Store) watch() {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	var (
		replication replication
		lastLeader  string // that was known
	)
	for {
		r := s.raft.Load()
		now := s.publishState(r)
		if now.Leader != "" && now.Leader != lastLeader {
			lastLeader = now.Leader
			s.metrics.leaderChanges.Inc()
		}
		if r != nil {
			s.setStuck(replication.stuck(time.Now(), now.State == "leader", now.Term, r.CommitIndex(), r.LastIndex()))
		}
		select {
		case <-s.observations:
			continue
		case <-ticker.C:
		case <-s.ctx.Done():
			return
		}
		if r == nil || r.State() != raft.Follower || s.Leader() == "" {
			continue
		}
		turn := heartbeatTimeout + time.Duration(s.followersBefore())*electionTurn
		if time.Since(r.LastContact()) > turn {
			s.checkHeartbeats(r)
		}
	}
}

// followersBefore returns how many followers notice a silent leader before this one. They do so in the order of their
// names: two that stand at the same time split the votes, and both wait for more than a second. A turn is longer than
// what their last heartbeats may be apart.
func (s *Store) followersBefore() int {
	leader, self := s.State().server, s.membership.server()
	return count(voting(s.members()), func(m member) bool { return m.Server != leader && m.Server < self })
}

// checkHeartbeats makes a follower see that its leader is silent, so that it stands for election. Raft by itself checks
// every one to two heartbeatTimeouts whether the last of them passed in silence, so three can go by before anybody
// stands. It checks at once when that timeout becomes shorter than it was.
func (s *Store) checkHeartbeats(r *raft.Raft) {
	conf := r.ReloadableConfig()
	for _, conf.HeartbeatTimeout = range []time.Duration{electionTimeout, heartbeatTimeout} {
		if err := r.ReloadConfig(conf); err != nil {
			s.log.Error("set raft's heartbeat timeout", "error", err)
		}
	}
}

// publishState publishes this node's state, and starts what a change of it asks for. r is nil before Raft runs.
func (s *Store) publishState(r *raft.Raft) RaftState {
	now := RaftState{State: s.membership.at().String()}
	if r != nil {
		_, leader := r.LeaderWithID()
		now.Leader, now.Term, now.server = nodeOf(string(leader)), r.CurrentTerm(), string(leader)
		now.left = now.Leader == "" && s.hasLeft()
		if now.State == "running" {
			now.State = strings.ToLower(r.State().String())
		}
	}
	before := s.leadership.set(s.ctx, now)
	if now.State == "leader" && (before.State != "leader" || before.Term != now.Term) {
		s.wg.Go(func() { s.lead(r, now.Term) })
	}
	if now != before && s.onChange != nil {
		s.onChange(now)
	}
	return now
}

// lead makes this leader of a term ready for linearizable reads: it may not yet have executed all that the leaders
// before it acknowledged. It has when it has executed an entry of its own, without a command. (A barrier of Raft's
// never reaches the state machine, and a read that waits for its index would wait for ever. After this entry none of
// Raft's own comes in the term.) lead returns when this leader is ready, or leads no more.
func (s *Store) lead(r *raft.Raft, term uint64) {
	for s.ctx.Err() == nil && s.leadsIn(term) {
		first := r.Apply(encodeEntry(time.Now(), nil), requestTimeout)
		if within(s.ctx, first.Error) == nil && s.leadsIn(term) {
			s.ready.advance(term)
			return
		}
		sleep(s.ctx, retryInterval) // while it hands leadership over, Raft refuses the entry at once
	}
}

// handOver makes the most advanced of the other voters the leader, if this node leads and another one answers that is
// not to leave the cluster.
func (s *Store) handOver(ctx context.Context, r *raft.Raft) {
	if r.State() != raft.Leader || len(s.members()) < 2 {
		return
	}
	transfer, cancel := context.WithTimeout(ctx, handoverWait)
	defer cancel()
	s.handingOver.Store(true) // from here on writes get ErrNotLeader, and are retried on the next leader
	defer s.handingOver.Store(false)
	best := s.mostAdvanced(transfer)
	if best == "" || !s.writes.idle(transfer) {
		s.log.Info("no other node can take the leadership over")
		return
	}
	future := r.LeadershipTransferToServer(raft.ServerID(best), raft.ServerAddress(best))
	err := within(transfer, future.Error)
	s.log.Info("hand leadership over", "to", best, "error", err)
	sleep(transfer, handoverLinger)
}

// mostAdvanced returns the other voter with the longest log among those that answer, "" if none does.
func (s *Store) mostAdvanced(ctx context.Context) (best string) {
	v, longest := s.askAll(ctx), uint64(0)
	for _, m := range voting(s.members()) {
		node := nodeOf(m.Server)
		info := v.answers[node]
		runsRaft := len(info.Members) > 0 // it may be reading its log
		can := node != v.self && v.present(m) && runsRaft && (v.listed(node) || !s.list.removes())
		if can && info.LastIndex > longest {
			best, longest = m.Server, info.LastIndex
		}
	}
	return best
}

// replication is how far this node has committed as a leader. It is for one goroutine alone.
type replication struct {
	term, committed uint64
	since           time.Time // when it came that far, or had last nothing to commit
}

// stuck takes note of where this node is, and says whether it leads, has entries to commit, and has committed none for
// replicationStuckAfter.
func (p *replication) stuck(now time.Time, leads bool, term, committed, last uint64) bool {
	if !leads || term != p.term || committed != p.committed || last <= committed {
		*p = replication{term, committed, now}
	}
	return now.Sub(p.since) >= replicationStuckAfter
}

// setStuck tells people when this leader begins to be stuck, or is so no more. That it still leads says that heartbeats
// pass: without them Raft would have it step down.
func (s *Store) setStuck(stuck bool) {
	if s.stuck.Swap(stuck) == stuck {
		return
	}
	if !stuck {
		s.log.Info("replication is not stuck any more")
		return
	}
	s.wg.Go(func() { s.log.Error(s.stuckReason()) })
}

// stuckReason says what is known of why this leader cannot commit its entries.
func (s *Store) stuckReason() string {
	next, v := s.raft.Load().CommitIndex()+1, s.recentView()
	var lacking []string
	for _, node := range nodesOf(voting(s.members())) {
		if v.answers[node].LastIndex < next {
			lacking = append(lacking, node+" at "+v.addresses[node])
		}
	}
	return fmt.Sprintf("replication is stuck: log entry %d has not reached a majority for %v, though heartbeats do, "+
		"and no write gets past it; nodes without it: [%s]: is the link to them or their disk too slow, "+
		"or are large packets lost (MTU)?", next, replicationStuckAfter, strings.Join(lacking, ", "))
}
