package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	staleAfter     = 10 * time.Second // after its start a node answers stale reads even if it has heard of no leader
	watchInterval  = 50 * time.Millisecond
	restInterval   = 200 * time.Millisecond // instead, while there is nothing to see
	hurryTurns     = 10                     // watchIntervals, within which followers notice that their leader is silent
	handoverWait   = 2 * time.Second        // for another node to become leader
	handoverLinger = 200 * time.Millisecond // for the others to hear of it, while we still answer them
)

// Raft's timing. A leader steps down when no majority has answered for leaseTimeout, a follower looks for a new one when
// it has heard nothing for heartbeatTimeout. Heartbeats wait behind a follower's fsyncs (see SetHeartbeatHandler), so
// the two are equal, and above what a slow disk takes.
const (
	heartbeatTimeout = 1 * time.Second
	leaseTimeout     = heartbeatTimeout
	electionTimeout  = heartbeatTimeout + time.Millisecond   // no shorter than any heartbeat timeout that hurry sets
	doubtAfter       = heartbeatTimeout - heartbeatTimeout/5 // heartbeats to two nodes are so far apart at most
	commitTimeout    = 250 * time.Millisecond                // within twice that an idle leader repeats what is committed; see spread
	maxAppendEntries = 64
)

// Store replicates a state machine: commands go through Raft's log and are executed on every node in the same order.
// It knows nothing of what commands and state mean. Any node's Store takes any call; what only the leader can do is
// passed on to it.
type Store struct {
	cfg      *Config
	log      hclog.Logger
	metrics  *metrics
	started  time.Time
	onChange func(RaftState)
	open     func(*Config, hclog.Logger, func(error)) (*storage, error) // openStorage
	port     port                                                       // opened by Open, unless there is one
	certs    *reloaded[*certificates]                                   // nil for no TLS; set before Open

	replica    *replica
	storage    *storage
	network    *network
	peers      *peers
	form       *formation
	leadership *leadership
	writes     *writes
	rounds     *readRounds

	raft         atomic.Pointer[raft.Raft] // nil until the node is of a cluster and has read its snapshot
	running      chan struct{}             // closed when raft and transport are set
	transport    *transport
	observations chan raft.Observation // from Raft, lossy
	lastLeader   string                // that was known. Only for watch
	ready        atomic.Uint64         // the term in which this node, as leader, has executed all of earlier terms
	caughtUp     atomic.Bool           // since it started, this node has once had all that was committed
	handing      atomic.Bool           // leadership is being handed over: no more entries
	lossy        atomic.Bool           // this node goes on with what it has, after a majority has lost its state
	halted       atomic.Pointer[error] // why this node serves no more; nil while it does

	ctx    context.Context // of every goroutine, ended by Shutdown
	cancel context.CancelFunc
	wg     sync.WaitGroup
	failed chan error // receives what must stop the process
}

// NewStore returns a Store that Open starts. The Store owns machine from then on: see StateMachine.
func NewStore(cfg *Config, machine StateMachine, m *metrics, log hclog.Logger) *Store {
	s := &Store{
		cfg: cfg, log: log, metrics: m, started: time.Now(), open: openStorage,
		leadership:   newLeadership(RaftState{State: "starting"}),
		writes:       newWrites(m, log.Named("writes")),
		running:      make(chan struct{}),
		observations: make(chan raft.Observation, 16),
		failed:       make(chan error, 1),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.form = newFormation(cfg, log.Named("forming"), func() bool { return s.State().State == "leader" })
	s.replica = &replica{machine: machine, metrics: m, fail: s.fail}
	s.rounds = newReadRounds(m, s.findReadIndex)
	s.export()
	s.writes.propose, s.writes.leads, s.writes.callLeader = s.propose, s.leadsNow, s.callLeader
	return s
}

// OnChange calls f with every new state of this node, one call at a time; short-lived states may be left out. It must
// be set before Open.
func (s *Store) OnChange(f func(RaftState)) { s.onChange = f }

// Failed returns a channel that receives the reason when this node must stop at once. Nothing that it did since has
// been acknowledged, and Shutdown cannot help.
func (s *Store) Failed() <-chan error { return s.failed }

// fail stops the process: whoever called it does not go on.
func (s *Store) fail(err error) {
	select {
	case s.failed <- err:
	default: // another reason was first
	}
	select {} // until the process ends
}

// Open listens for peers and opens the storage, then returns while the node finds or forms its cluster.
func (s *Store) Open() error {
	var err error
	if s.port == nil {
		if s.port, err = listenForPeers(s.cfg.RaftAddr); err != nil {
			return err
		}
	}
	if s.storage, err = s.open(s.cfg, s.log, s.fail); err != nil {
		return errors.Join(err, s.port.Close())
	}
	s.storage.rules.applied, s.storage.rules.settle = s.replica.applied.load, s.form.settle
	if d := s.storage.disk; d != nil {
		d.early, d.took = s.commitsWithOthers, s.metrics.stored.Observe
	}
	s.exportStorage()
	s.lossy.Store(s.storage.survivor)
	if err := s.form.open(s.storage); err != nil {
		return errors.Join(err, s.storage.close(), s.port.Close())
	}
	s.network = newNetwork(s.cfg.NodeID, s.port, s.certs, s, s.metrics.refusals, s.log.Named("network"))
	s.peers = newPeers(s.network, map[byte]handler{
		opApply:     s.writes.handleApply,
		opReadIndex: s.handleReadIndex,
		opTerm:      s.handleTerm,
		opVoted:     s.handleVoted,
		opHolding:   s.form.handleHolding,
		opGrant:     s.form.handleGrant,
		opAdmit:     s.handleAdmit,
	})
	s.form.peers = s.peers
	s.wg.Go(func() { s.writes.run(s.ctx) })
	s.wg.Go(func() { s.rounds.run(s.ctx) })
	s.wg.Go(s.watch)
	s.wg.Go(s.spread)
	s.wg.Go(func() {
		if err := s.join(); err != nil && s.ctx.Err() == nil {
			s.end(err)
		}
	})
	return nil
}

// join makes this node one of a cluster, starts Raft, and waits until the node has caught up.
func (s *Store) join() error {
	if err := s.form.find(s.ctx, s.askAdmission); err != nil {
		return err
	}
	s.form.waits("the node is reading its snapshot and log")
	if err := s.startRaft(); err != nil {
		return err
	}
	if h, err := s.form.holds(); err == nil && h.Fresh || len(s.members()) == 1 {
		s.transport.campaign(s.ctx.Done()) // nobody else can be leader yet, so there is nobody to wait for
	}
	if s.drift() {
		s.log.Warn("PEERS names other nodes than the stored membership, which stays as it is", "peers", s.cfg.Peers,
			"membership", s.members())
	}
	s.wg.Go(s.stay)
	s.passGate()
	for !s.caughtUp.Load() && s.ctx.Err() == nil {
		s.caughtUp.Store(s.Read(s.ctx, Linearizable, func() {}) == nil)
	}
	return nil
}

// startRaft starts Raft from what is stored; a founder's log begins with PEERS, or with all that a survivor has.
func (s *Store) startRaft() (err error) {
	defer func() {
		if cause := recover(); cause != nil { // bbolt and raft panic on damaged data
			err = fmt.Errorf("start raft from %s: %v; nothing was changed", s.cfg.StateDir, cause)
		}
	}()
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(s.cfg.NodeID)
	conf.Logger = s.log.Named("raft")
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = heartbeatTimeout, electionTimeout, leaseTimeout
	conf.MaxAppendEntries, conf.CommitTimeout = maxAppendEntries, commitTimeout
	conf.SnapshotThreshold = s.cfg.SnapshotThreshold
	conf.SnapshotInterval = s.cfg.SnapshotInterval
	conf.TrailingLogs = s.cfg.TrailingLogs
	conf.NoLegacyTelemetry = true
	st, t := s.storage, newTransport(s.network, s.log.Named("transport"), transportHooks{
		leading: s.leadsIn, gated: s.form.gated, needed: func() int { return s.voters() / 2 }, standsBy: s.standsBy,
		applied: func() uint64 { return s.raft.Load().AppliedIndex() }, newest: s.storage.rules.newest,
		following: func(term uint64) bool { return s.raft.Load().CurrentTerm() == term },
		doubtful:  s.doubtful, last: s.storage.lastEntry,
	})
	if st.disk != nil {
		t.stored = st.disk.await
	}
	h, err := s.form.holds()
	switch {
	case err == nil && st.survivor && h.Fresh:
		err = raft.RecoverCluster(conf, &survivor{replica: s.replica, executed: st.executed}, st.logs, st.stable, st.snapshots, t, membership(s.cfg.Peers))
	case err == nil && h.Fresh && h.LastIndex == 0:
		err = writeFirstEntry(st, s.cfg.Peers)
	}
	if err != nil {
		return fmt.Errorf("begin the log: %w", err)
	}
	r, err := raft.NewRaft(conf, s.replica, st.logs, st.stable, st.snapshots, t)
	if err != nil {
		return fmt.Errorf("start raft from %s: %w; nothing was changed", s.cfg.StateDir, err)
	}
	r.RegisterObserver(raft.NewObserver(s.observations, false, nil))
	s.transport = t
	s.form.waits("no leader is known")
	s.raft.Store(r)
	close(s.running)
	return nil
}

// writeFirstEntry begins a log with the cluster's membership, as raft.BootstrapCluster does. That one however refuses to
// go on where a crash between its two writes has left it.
func writeFirstEntry(st *storage, peers []Peer) error {
	if err := st.stable.SetUint64(keyCurrentTerm, 1); err != nil {
		return err
	}
	return st.logs.StoreLog(&raft.Log{
		Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(membership(peers)),
	})
}

func membership(peers []Peer) (c raft.Configuration) {
	for _, p := range peers {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(p.ID), Address: raft.ServerAddress(p.Addr)})
	}
	return c
}

// leads says whether r is the leader of term.
func leads(r *raft.Raft, term uint64) bool {
	return r.State() == raft.Leader && r.CurrentTerm() == term
}

// leadsIn says whether this node is the leader of term.
func (s *Store) leadsIn(term uint64) bool {
	r := s.raft.Load()
	return r != nil && leads(r, term)
}

// leadsNow says whether this node is the leader, as far as it knows.
func (s *Store) leadsNow() bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader
}

// commitsWithOthers says whether this node leads and nothing is committed by what it has stored alone. Raft's main
// thread must ask, as that is where this changes.
func (s *Store) commitsWithOthers() bool { return s.leadsNow() && s.voters() > 1 }

// Apply has the state machine execute command, and returns once a majority has it and the leader has executed it, or
// with one of the errors in errors.go, at ctx's deadline or after requestTimeout if it has none. The Store owns command
// from then on.
func (s *Store) Apply(ctx context.Context, command []byte) (Result, error) {
	if s.halted.Load() != nil {
		return Result{}, ErrOutranked
	}
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, requestTimeout)
		defer cancel()
	}
	var o outcome
	err := s.leadership.try(ctx, func() error {
		o = s.writes.submit(ctx, command)
		return o.err
	})
	if err != nil {
		return Result{}, err
	}
	return Result{Index: o.index, Data: o.results[0]}, nil
}

// Read calls f, which reads the state machine, while no command is executed. With Linearizable, f sees every command
// that was acknowledged, anywhere, before Read was called; with Stale it sees what this node has.
func (s *Store) Read(ctx context.Context, consistency Consistency, f func()) error {
	if s.halted.Load() != nil {
		return ErrOutranked
	}
	if consistency == Stale {
		if !s.Contacted() && time.Since(s.started) < staleAfter {
			return ErrStarting
		}
		s.replica.read(f)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var index uint64
	err := s.leadership.try(ctx, func() (err error) {
		index, err = s.rounds.next(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if s.replica.applied.wait(ctx, index) != nil {
		return ErrNotConfirmed
	}
	s.replica.read(f)
	return nil
}

// propose appends an entry of these commands to Raft's log; it returns nil when this node does not lead.
func (s *Store) propose(commands [][]byte) raft.ApplyFuture {
	if !s.leadsNow() || s.handing.Load() {
		return nil
	}
	return s.raft.Load().Apply(encodeEntry(time.Now(), commands), requestTimeout)
}

// callLeader asks the leader. The error is ErrNoLeader or ErrNotLeader when the call certainly had no effect, else
// ErrUnknownOutcome.
func (s *Store) callLeader(op byte, request []byte, timeout time.Duration) ([]byte, error) {
	leader := s.Leader()
	if leader == "" || leader == s.cfg.NodeID {
		return nil, ErrNoLeader
	}
	ctx, cancel := s.leadership.during(s.ctx, leader, timeout)
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

// findReadIndex runs one round for linearizable reads: the leader confirms that it still leads, any other node asks the
// leader to.
func (s *Store) findReadIndex() (uint64, error) {
	r := s.raft.Load()
	if r == nil {
		return 0, ErrNoLeader
	}
	if r.State() == raft.Leader {
		_, index, err := s.confirmLeadership(s.ctx, r, "")
		return index, err
	}
	answer, err := s.callLeader(opReadIndex, binary.BigEndian.AppendUint64(nil, r.CommitIndex()), confirmTimeout)
	if err != nil || len(answer) != 8 {
		return 0, ErrNotLeader
	}
	return binary.BigEndian.Uint64(answer), nil
}

// confirmLeadership returns the term in which this node leads and the index of the last entry it has executed, once a
// majority has said that it still is in that term. The node that is left out is not asked. See "Linearizable reads" in
// DESIGN.md.
func (s *Store) confirmLeadership(ctx context.Context, r *raft.Raft, leftOut string) (term, index uint64, err error) {
	term = r.CurrentTerm()
	if s.ready.Load() != term || !leads(r, term) {
		return 0, 0, ErrNotLeader
	}
	index = s.replica.applied.load()
	var others []string
	for _, m := range s.members() {
		if m.Suffrage == raft.Voter && string(m.ID) != s.cfg.NodeID && string(m.ID) != leftOut {
			others = append(others, string(m.ID))
		}
	}
	request := binary.BigEndian.AppendUint64(nil, term)
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	confirmed := majority(ctx, others, s.voters()/2, func(ctx context.Context, id string) bool {
		return s.peers.agrees(ctx, id, opTerm, request)
	})
	if !confirmed || !leads(r, term) {
		return 0, 0, ErrNotLeader
	}
	return term, index, nil
}

// handleTerm says whether this node's term is the one asked about. Raft persists a new term before it votes in it, so
// after a yes a newer leader may be elected with this node's vote, but none was before. A gated node does not know what
// it has voted for.
func (s *Store) handleTerm(_ context.Context, _ string, request []byte) ([]byte, error) {
	if r := s.raft.Load(); r != nil && !s.form.gated() && len(request) == 8 && r.CurrentTerm() == binary.BigEndian.Uint64(request) {
		return []byte{1}, nil
	}
	return []byte{0}, nil
}

// handleReadIndex confirms leadership for the reads of another node. If that node does not know yet that the index is
// committed it is told now, since Raft would tell it only with the next entry or after CommitTimeout.
func (s *Store) handleReadIndex(ctx context.Context, from string, request []byte) ([]byte, error) {
	r := s.raft.Load()
	if r == nil || len(request) != 8 {
		return nil, ErrNotLeader
	}
	term := r.CurrentTerm()
	if !leads(r, term) {
		return nil, ErrNotLeader
	}
	index, err := s.rounds.next(ctx)
	if err != nil {
		return nil, err
	}
	if binary.BigEndian.Uint64(request) < index {
		go s.tellCommitted(from, term, index)
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
	self := []byte(s.cfg.NodeID)
	err := s.transport.NetworkTransport.AppendEntries(raft.ServerID(id), raft.ServerAddress(id), &raft.AppendEntriesRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:         term,
		PrevLogEntry: index, PrevLogTerm: entry.Term, LeaderCommitIndex: index,
	}, new(raft.AppendEntriesResponse))
	if err != nil {
		s.log.Debug("telling a follower what is committed failed", "node", id, "error", err)
	}
}

// spread has the leader tell the others what is committed when no entry has come for a watchInterval: stale reads through them
// should not be old for longer. Raft would do it by asking each of them all the time, which is most of an idle node's work.
func (s *Store) spread() {
	seen := uint64(0)
	for s.replica.applied.wait(s.ctx, seen+1) == nil {
		for now := s.replica.applied.load(); now != seen; now = s.replica.applied.load() {
			seen = now
			select {
			case <-time.After(watchInterval):
			case <-s.ctx.Done():
				return
			}
		}
		s.tellOthers()
	}
}

// tellOthers tells the others what is committed, if this node leads.
func (s *Store) tellOthers() {
	r := s.raft.Load()
	if r == nil {
		return
	}
	term, applied := r.CurrentTerm(), s.replica.applied.load()
	if !leads(r, term) {
		return
	}
	var all sync.WaitGroup
	for _, m := range s.members() {
		if id := string(m.ID); id != s.cfg.NodeID {
			all.Go(func() { s.tellCommitted(id, term, applied) })
		}
	}
	all.Wait()
}

// watch notices every change of state: at once when Raft says so, and else at the next look, since what Raft says may
// get lost. While all is well it does not look so often: that would be a third of what a follower does at rest.
func (s *Store) watch() {
	timer := time.NewTimer(watchInterval)
	defer timer.Stop()
	silent, turn := 0, 0 // looks since the leader fell silent, and at which of them this node hurries
	for {
		r := s.raft.Load()
		s.look(r)
		select {
		case <-s.observations:
			continue
		case <-timer.C:
		case <-s.ctx.Done():
			return
		}
		interval, silence := watchInterval, time.Duration(0)
		if r != nil && r.State() == raft.Follower && s.Leader() != "" {
			silence = time.Since(r.LastContact())
		}
		switch {
		case silence < heartbeatTimeout:
			silent, turn = 0, 1+rand.IntN(hurryTurns)
			if s.Leader() != "" && silence < heartbeatTimeout/4 {
				interval = restInterval
			}
		case silent == turn:
			s.hurry(r)
			fallthrough
		default:
			silent++
		}
		timer.Reset(interval)
	}
}

// hurry makes a follower see that its leader is silent. Raft by itself looks every one to two heartbeatTimeouts whether the
// last of them passed in silence, so three can go by before anybody stands for election. The only way to have it look is
// to make that timeout shorter than it was. Nodes hurry at different moments, lest their votes split.
func (s *Store) hurry(r *raft.Raft) {
	conf := r.ReloadableConfig()
	for _, conf.HeartbeatTimeout = range []time.Duration{electionTimeout, heartbeatTimeout} {
		if err := r.ReloadConfig(conf); err != nil {
			s.log.Error("hurry", "error", err)
		}
	}
}

// look publishes this node's state if it has changed.
func (s *Store) look(r *raft.Raft) {
	now := RaftState{State: "starting"}
	if r != nil {
		_, leader := r.LeaderWithID()
		now = RaftState{State: stateNames[r.State()], Leader: string(leader), Term: r.CurrentTerm()}
	} else if s.form.id() == "" {
		now.State = "forming"
	}
	before, changed := s.leadership.set(now)
	if now.State == "leader" && (before.State != "leader" || before.Term != now.Term) {
		s.wg.Go(func() { s.lead(r, now.Term) })
	}
	if now.Leader != "" && now.Leader != s.lastLeader {
		s.lastLeader = now.Leader
		s.metrics.leaderChanges.Inc()
	}
	if changed && s.onChange != nil {
		s.onChange(now)
	}
}

var stateNames = map[raft.RaftState]string{
	raft.Follower: "follower", raft.Candidate: "candidate", raft.Leader: "leader", raft.Shutdown: "shutdown",
}

// lead makes this node ready for linearizable reads in a term: before that it may not have executed all that leaders
// before it acknowledged.
func (s *Store) lead(r *raft.Raft, term uint64) {
	for s.ctx.Err() == nil && leads(r, term) {
		done := make(chan error, 1)
		barrier := r.Barrier(requestTimeout)
		go func() { done <- barrier.Error() }()
		select {
		case err := <-done:
			if err == nil && leads(r, term) {
				for before := s.ready.Load(); before < term && !s.ready.CompareAndSwap(before, term); before = s.ready.Load() {
				}
				return
			}
		case <-s.ctx.Done(): // Raft may leave the barrier unanswered when it shuts down
		}
	}
}

// doubtful says whether this node follows a leader of whom it has heard nothing for doubtAfter.
func (s *Store) doubtful() bool {
	r := s.raft.Load()
	if r == nil || r.State() != raft.Follower {
		return false
	}
	_, leader := r.LeaderWithID()
	return leader != "" && time.Since(r.LastContact()) > doubtAfter
}

// State returns where this node stands.
func (s *Store) State() RaftState { return s.leadership.now.Load().RaftState }

// Leader returns the leader's id, "" when this node knows of none.
func (s *Store) Leader() string { return s.State().Leader }

// Contacted says whether since it started this node has heard from a leader, or become one. Until then what it holds
// may be an old snapshot.
func (s *Store) Contacted() bool {
	r := s.raft.Load()
	return r != nil && (s.ready.Load() > 0 || !r.LastContact().IsZero())
}

// Ready returns nil when this node can do its part: it knows the leader, has caught up since it started, and votes.
func (s *Store) Ready() error {
	switch {
	case s.halted.Load() != nil:
		return *s.halted.Load()
	case s.raft.Load() == nil || s.Leader() == "" || s.form.gated():
		return errors.New(s.form.reason())
	case !s.caughtUp.Load():
		return errors.New("this node has not caught up with the leader since it started")
	case !s.votes(s.cfg.NodeID):
		return errors.New("this node is not a voting member of the cluster")
	}
	return nil
}

// Status is what this node knows of itself and the cluster.
type Status struct {
	ID              string       `json:"id"`
	State           string       `json:"state"`
	Leader          string       `json:"leader"`
	Term            uint64       `json:"term"`
	CommitIndex     uint64       `json:"commit_index"`
	AppliedIndex    uint64       `json:"applied_index"`
	LastContactMS   int64        `json:"last_contact_ms"` // 0 on the leader, -1 before the first contact
	KVStore         string       `json:"kv_store"`
	Version         string       `json:"version"`
	Cluster         string       `json:"cluster_id"` // its id, "" while the node is of none
	Keys            int          `json:"keys"`       // StateMachine.Len
	Peers           []PeerStatus `json:"peers"`
	PeersDrift      bool         `json:"peers_drift"` // ids or voters of the membership are not what PEERS says
	WritesMayBeLost bool         `json:"writes_may_be_lost"`
}

// PeerStatus is one member of the cluster, at the address where this node looks for it.
type PeerStatus struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	Voter   bool   `json:"voter"`
}

// Status returns what this node knows of itself and the cluster.
func (s *Store) Status() Status {
	state := s.State()
	status := Status{
		ID: s.cfg.NodeID, State: state.State, Leader: state.Leader, Term: state.Term, LastContactMS: -1,
		KVStore: s.cfg.KVStore, Version: version, Cluster: s.form.id(), Keys: s.replica.size(), Peers: []PeerStatus{}, PeersDrift: s.drift(),
		WritesMayBeLost: s.lossy.Load(),
	}
	r := s.raft.Load()
	if r == nil {
		return status
	}
	status.CommitIndex, status.AppliedIndex = r.CommitIndex(), r.AppliedIndex()
	if contact := r.LastContact(); state.State == "leader" {
		status.LastContactMS = 0
	} else if !contact.IsZero() {
		status.LastContactMS = time.Since(contact).Milliseconds()
	}
	for _, m := range s.members() {
		addr, _ := s.address(string(m.ID))
		status.Peers = append(status.Peers, PeerStatus{ID: string(m.ID), Address: addr, Voter: m.Suffrage == raft.Voter})
	}
	return status
}

// export makes metrics of what this node knows of itself and the cluster.
func (s *Store) export() {
	m := s.metrics
	m.labelled("build_info", "Always 1; the label has the version.", map[string]string{"version": version}, func() float64 { return 1 })
	m.flag("ready", "1 when this node can do its part, as /readyz says.", func() bool { return s.Ready() == nil })
	m.flag("is_leader", "1 on the leader.", s.leadsNow)
	m.flag("has_leader", "1 when this node knows a leader.", func() bool { return s.Leader() != "" })
	m.flag("peers_drift", "1 when ids or voters of the membership are not what PEERS says.", s.drift)
	m.flag("writes_may_be_lost", "1 when this node went on with what it had after a majority had lost its state.", s.lossy.Load)
	for name, kind := range map[string]byte{"none": 0, "gated": standGated, "founder": standFounder, "member": standMember} {
		m.labelled("standing", "1 for where this node stands: of no cluster yet (none), without a vote until it has its state back "+
			"(gated), the founder of a new cluster that has stored nothing yet, or a member.", map[string]string{"standing": name},
			zeroOrOne(func() bool { return s.form.current().kind == kind }))
	}
	m.gauge("voters", "Members of the cluster that vote.", func() float64 { return float64(s.voters()) })
	ofRaft := func(f func(*raft.Raft) uint64) func() float64 {
		return func() float64 {
			if r := s.raft.Load(); r != nil {
				return float64(f(r))
			}
			return 0
		}
	}
	m.gauge("term", "Raft's term; 0 before Raft runs.", ofRaft((*raft.Raft).CurrentTerm))
	m.gauge("commit_index", "Index of the last log entry that this node knows to be committed.", ofRaft((*raft.Raft).CommitIndex))
	m.gauge("applied_index", "Index of the last log entry that this node has executed.", ofRaft((*raft.Raft).AppliedIndex))
	m.gauge("keys", "Keys that this node has.", func() float64 { return float64(s.replica.size()) })
	m.gauge("waiting_write_bytes", fmt.Sprintf("Commands that wait to be put into a log entry or passed on; over %d more are refused.", maxWaiting),
		func() float64 { return float64(s.writes.queued()) })
}

// exportStorage does so of what the storage holds, once it is open.
func (s *Store) exportStorage() {
	m, stats, snapshots := s.metrics, s.storage.stats, s.storage.snapshots
	m.gauge("snapshot_timestamp_seconds", "When this node began to write its newest snapshot, in Unix time; 0 when it has none.",
		func() float64 { return float64(snapshots.begun.Load()) / 1000 })
	m.gauge("snapshot_size_bytes", "Size of the newest snapshot.", func() float64 { return float64(snapshots.size.Load()) })
	if stats == nil {
		return
	}
	m.gauge("db_size_bytes", "Size of "+dbName+", which never shrinks.", func() float64 {
		info, err := os.Stat(filepath.Join(s.cfg.StateDir, dbName))
		if err != nil {
			return math.NaN()
		}
		return float64(info.Size())
	})
	m.gauge("db_free_bytes", "Of "+dbName+", the free pages, which new entries will fill.", func() float64 {
		return float64(stats().FreeAlloc)
	})
}

// members returns the membership as Raft has stored it, empty until it has one.
func (s *Store) members() []raft.Server {
	if r := s.raft.Load(); r != nil {
		return r.GetConfiguration().Configuration().Servers
	}
	return nil
}

// voters returns the number of voting members.
func (s *Store) voters() (n int) {
	for _, m := range s.members() {
		if m.Suffrage == raft.Voter {
			n++
		}
	}
	return n
}

func (s *Store) votes(id string) bool {
	return slices.ContainsFunc(s.members(), func(m raft.Server) bool {
		return string(m.ID) == id && m.Suffrage == raft.Voter
	})
}

// drift says whether the stored membership is another than PEERS. Addresses do not count: those in PEERS are used.
func (s *Store) drift() bool {
	n := len(s.members())
	return n > 0 && (n != len(s.cfg.Peers) || slices.ContainsFunc(s.cfg.Peers, func(p Peer) bool { return !s.votes(p.ID) }))
}

// address says where a node listens: where PEERS has it, else where the stored membership has it.
func (s *Store) address(id string) (addr string, known bool) {
	for _, m := range s.members() {
		if string(m.ID) == id {
			addr, known = string(m.Address), true
		}
	}
	for _, p := range s.cfg.Peers {
		if p.ID == id {
			addr, known = p.Addr, true
		}
	}
	return addr, known
}

// cluster returns the id of this node's cluster, "" while it has none.
func (s *Store) cluster() string { return s.form.id() }

// welcome has Raft's messages wait until this node is of the sender's cluster and its Raft runs.
func (s *Store) welcome(h hello) error {
	if h.kind != kindRaft {
		return nil
	}
	s.form.hear()
	timer := time.NewTimer(helloTimeout / 2)
	defer timer.Stop()
	select {
	case <-s.running:
	case <-s.ctx.Done():
		return errStarting
	case <-timer.C:
		return errStarting
	}
	if mine := s.form.id(); h.cluster != mine {
		return fmt.Errorf("node %q speaks for cluster %q, node %q is of cluster %q", h.sender, h.cluster, s.cfg.NodeID, mine)
	}
	return nil
}

// Abandon closes the port and all connections to other nodes, and waits for nothing: it is for a node that has failed.
func (s *Store) Abandon() {
	s.peers.close()
	_ = s.network.sever()
}

// Shutdown hands leadership over if this node has it, stops Raft and closes the storage. It gives up waiting when ctx
// ends; what was acknowledged is safe all the same.
func (s *Store) Shutdown(ctx context.Context) error {
	closePort := s.network.Close
	var stop raft.Future // of the first call to Raft's Shutdown: no other waits for anything
	if r := s.raft.Load(); r != nil {
		s.handOver(ctx, r)
		stop = r.Shutdown()
		closePort = s.transport.Close // which closes the network, too
	}
	s.cancel()
	s.peers.close()
	stopped := make(chan error, 1)
	go func() { // each step of it may hang with the disk
		err := closePort()
		s.wg.Wait()
		if r := s.raft.Load(); stop == nil && r != nil { // it started just before s.cancel
			stop = r.Shutdown()
		}
		if stop != nil {
			err = errors.Join(err, stop.Error())
		}
		stopped <- errors.Join(err, s.storage.close())
	}()
	select {
	case err := <-stopped:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the node did not stop in time: %w", ctx.Err())
	}
}

// handOver makes the most advanced of the other nodes the leader, if this one leads and another answers.
func (s *Store) handOver(ctx context.Context, r *raft.Raft) {
	if r.State() != raft.Leader || len(s.members()) < 2 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, handoverWait)
	defer cancel()
	s.handing.Store(true) // from here on writes are told that this is not the leader, and go to the next
	defer s.handing.Store(false)
	best := s.mostAdvanced(ctx)
	if best == "" || !s.writes.idle(ctx) {
		s.log.Info("no other node can take the leadership over")
		return
	}
	done := make(chan error, 1)
	future := r.LeadershipTransferToServer(raft.ServerID(best), raft.ServerAddress(best))
	go func() { done <- future.Error() }()
	select {
	case err := <-done:
		s.log.Info("leadership handed over", "to", best, "error", err)
	case <-ctx.Done():
		s.log.Warn("leadership could not be handed over in time", "to", best)
		return
	}
	timer := time.NewTimer(handoverLinger)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// mostAdvanced returns the id of the voter with the longest log among those that answer, "" if none does.
func (s *Store) mostAdvanced(ctx context.Context) (best string) {
	longest := uint64(0)
	for id, has := range s.form.askAll(ctx, s.form.others()) {
		if s.votes(id) && has.Votes && has.Cluster == s.form.id() && has.LastIndex > longest {
			best, longest = id, has.LastIndex
		}
	}
	return best
}
