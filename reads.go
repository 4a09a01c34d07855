package main

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Linearizable reads, by the read index of Ongaro's dissertation (6.4). "Linearizable reads" in DESIGN.md has the
// argument why the answers are right.

const confirmTimeout = 2 * time.Second // for a majority to confirm the leader's term

// readRounds finds the index up to which the log must be executed before a linearizable read. One round serves many
// reads: those that wait when it begins. Those that arrive while it is under way wait for the next.
type readRounds struct {
	metrics *metrics
	wake    chan struct{} // holds a token when there may be somebody waiting

	mu      sync.Mutex // guards waiting
	waiting []chan readIndex
}

// readIndex is an index, or the error that stands in its place.
type readIndex struct {
	index uint64
	err   error
}

func newReadRounds(m *metrics) *readRounds {
	return &readRounds{metrics: m, wake: make(chan struct{}, 1)}
}

// run runs rounds until ctx ends. Each calls find once.
func (r *readRounds) run(ctx context.Context, find func() (uint64, error)) {
	for {
		select {
		case <-r.wake:
		case <-ctx.Done():
			return
		}
		r.mu.Lock()
		batch := r.waiting
		r.waiting = nil
		r.mu.Unlock()
		if len(batch) == 0 {
			continue
		}
		r.metrics.round.Observe(float64(len(batch)))
		index, err := find()
		for _, done := range batch {
			done <- readIndex{index, err}
		}
	}
}

// next returns the index that the next round finds: every write acknowledged before the call is at or below it.
func (r *readRounds) next(ctx context.Context) (uint64, error) {
	done := make(chan readIndex, 1)
	r.mu.Lock()
	r.waiting = append(r.waiting, done)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
	select {
	case found := <-done:
		return found.index, found.err
	case <-ctx.Done():
		return 0, ErrNotConfirmed
	}
}

// findReadIndex runs one round for linearizable reads: the leader confirms that it still leads, any other node asks the
// leader to.
func (s *Store) findReadIndex() (uint64, error) {
	r := s.raft.Load()
	if r == nil {
		return 0, ErrNoLeader
	}
	if r.State() == raft.Leader {
		return s.confirmLeadership(r)
	}
	answer, err := s.callLeader(opReadIndex, binary.BigEndian.AppendUint64(nil, r.CommitIndex()), confirmTimeout)
	if err != nil || len(answer) != 8 {
		return 0, ErrNotLeader
	}
	return binary.BigEndian.Uint64(answer), nil
}

// confirmLeadership returns the index up to which this leader had committed the log, once a majority of the voters has
// said that it still is in this leader's term. What it has executed is not enough: a follower may have executed more,
// and shown it to an earlier read.
func (s *Store) confirmLeadership(r *raft.Raft) (index uint64, err error) {
	term := r.CurrentTerm()
	if s.ready.load() != term || !s.leadsIn(term) {
		return 0, ErrNotLeader
	}
	index = r.CommitIndex()
	voters, yes := 0, 0
	var others []string
	for _, m := range s.members() { // once a round: an entry that changes them meanwhile is not in it
		if !m.Voter {
			continue
		}
		voters++
		if m.Server == s.membership.server() {
			yes++
		} else {
			others = append(others, m.Server)
		}
	}
	needed := voters/2 + 1 - yes
	request := binary.BigEndian.AppendUint64(nil, term)
	confirmed := majority(others, needed, func(server string) bool {
		return s.peers.agrees(server, opTerm, request, confirmTimeout)
	})
	if !confirmed || !s.leadsIn(term) {
		return 0, ErrNotLeader
	}
	return index, nil
}

// handleTerm says whether this server's term is the one asked about. Raft persists a new term before it votes in it, so
// after a yes a newer leader may be elected with this server's vote, but none was before.
func (s *Store) handleTerm(_ context.Context, _ string, request []byte) ([]byte, error) {
	if r := s.raft.Load(); r != nil && len(request) == 8 && r.CurrentTerm() == binary.BigEndian.Uint64(request) {
		return []byte{1}, nil
	}
	return []byte{0}, nil
}

// handleReadIndex confirms leadership for the reads of another node. If that node does not know yet that the index is
// committed it is told now, since Raft would tell it only with the next entry or after commitTimeout.
func (s *Store) handleReadIndex(ctx context.Context, from string, request []byte) ([]byte, error) {
	r := s.raft.Load()
	if r == nil || len(request) != 8 {
		return nil, ErrNotLeader
	}
	term := r.CurrentTerm()
	if !s.leadsIn(term) {
		return nil, ErrNotLeader
	}
	index, err := s.rounds.next(ctx)
	if err != nil {
		return nil, err
	}
	// If this node has led since the round began it is its own index. Else another leader may have found it, and this
	// node may have another entry there.
	if binary.BigEndian.Uint64(request) < index && s.leadsIn(term) {
		go s.tellCommitted(from, term, index) // until the follower answers, or rpcTimeout
	}
	return binary.BigEndian.AppendUint64(nil, index), nil
}

// tellCommitted sends a follower the empty AppendEntries that Raft itself would send a little later. Its previous entry
// is the committed one, so a follower with another entry there refuses it, as it does when it has seen a newer term.
func (s *Store) tellCommitted(id string, term, index uint64) {
	var entry raft.Log
	if s.storage.logs.GetLog(index, &entry) != nil {
		return // compacted: the follower is far behind and gets a snapshot
	}
	self := []byte(s.membership.server())
	request := &raft.AppendEntriesRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:         term,
		PrevLogEntry: index, PrevLogTerm: entry.Term, LeaderCommitIndex: index,
	}
	var answer raft.AppendEntriesResponse
	err := s.transport.NetworkTransport.AppendEntries(raft.ServerID(id), raft.ServerAddress(id), request, &answer)
	if err != nil {
		s.log.Debug("telling a follower what is committed failed", "node", id, "error", err)
	}
}
