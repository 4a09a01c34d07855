package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// What can become of an Apply or a Read. After any error of Apply but ErrUnknownOutcome the command was certainly not
// executed and never will be.
var (
	ErrNoLeader       = errors.New("the cluster has no leader that this node knows of")
	ErrNotLeader      = errors.New("the node that was taken for the leader is not the leader")
	ErrOverloaded     = errors.New("too many commands are waiting")
	ErrNotInTime      = errors.New("the command did not get its turn in time")
	ErrUnknownOutcome = errors.New("the command may or may not have been executed")
	ErrNotConfirmed   = errors.New("no majority confirmed the leader in time")
	ErrStarting       = errors.New("this node has not heard of a leader since it started")
)

const (
	requestTimeout = 10 * time.Second // for an Apply or a Read, from beginning to end
	leaderWait     = 5 * time.Second  // of it, for a leader to be there
	staleAfter     = 10 * time.Second // after its start a node answers stale reads even if it has not heard of a leader
	watchInterval  = 50 * time.Millisecond
	retryInterval  = 20 * time.Millisecond
	leaderGrace    = 500 * time.Millisecond // for a leader that was followed by another to answer what it was asked
	handoverWait   = 2 * time.Second        // for another node to become leader
	handoverLinger = 200 * time.Millisecond // for the others to hear of it, while we still answer them
)

// Raft's timing. A leader steps down when for leaseTimeout no majority answered, a follower looks for a new one when
// for heartbeatTimeout it heard nothing. Heartbeats wait behind a follower's fsyncs (see SetHeartbeatHandler), so the
// two are equal and above what a slow disk takes.
const (
	heartbeatTimeout = 1 * time.Second
	leaseTimeout     = heartbeatTimeout
	maxAppendEntries = 64
)

// Result is what a command came to: the index of the log entry that holds it, and what StateMachine.Apply returned.
type Result struct {
	Index uint64
	Data  []byte
}

// RaftState is where this node stands, as far as it knows.
type RaftState struct {
	State  string // "starting", "forming", "follower", "candidate", "leader" or "shutdown"
	Leader string // the leader's id, "" when there is none
	Term   uint64
}

// Store replicates a state machine: commands go through Raft's log and are executed on every node in the same order.
// It knows nothing of what commands and state mean. Any node's Store takes any call; what only the leader can do is
// passed on to it.
type Store struct {
	cfg     *Config
	log     hclog.Logger
	replica *replica

	storage *storage
	network *network
	peers   *peers
	form    *formation

	batches   *batcher
	rounds    *readRounds
	confirmer *confirmer

	raft      atomic.Pointer[raft.Raft] // nil until the node is of a cluster and its snapshot is read
	transport *transport                // set before raft is
	ready     atomic.Uint64             // the term in which this node, as leader, has executed all earlier terms' commands
	caughtUp  atomic.Bool               // since it started, this node has once had all that was committed
	handing   atomic.Bool               // leadership is being handed over: no more commands
	started   time.Time

	observations chan raft.Observation // from Raft, lossy

	ctx    context.Context // of every goroutine, ended by Shutdown
	cancel context.CancelFunc
	wg     sync.WaitGroup
	failed chan error // receives what must stop the process

	state    atomic.Pointer[moment] // set by watch alone
	onChange func(RaftState)
}

// moment is a state and a channel that is closed when it is over.
type moment struct {
	RaftState
	over chan struct{}
}

// NewStore returns a Store that Open starts. The Store owns machine from then on: see StateMachine.
func NewStore(cfg *Config, machine StateMachine, log hclog.Logger) *Store {
	s := &Store{
		cfg: cfg, log: log, started: time.Now(),
		failed:       make(chan error, 1),
		observations: make(chan raft.Observation, 16),
	}
	s.state.Store(&moment{RaftState{State: "starting"}, make(chan struct{})})
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.replica = &replica{machine: machine, fail: s.fail}
	s.batches = newBatcher(s.commit)
	s.rounds = newReadRounds(s.findReadIndex)
	s.confirmer = newConfirmer(s.askTerm)
	return s
}

// OnChange calls f with every new state of this node, one call at a time; short-lived states may be left out. It must
// be set before Open.
func (s *Store) OnChange(f func(RaftState)) { s.onChange = f }

// Failed returns a channel that receives the reason when this node must stop at once. Nothing it did since has been
// acknowledged; Shutdown is not for it.
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
	if s.network, err = newNetwork(s.cfg.NodeID, s.cfg.RaftAddr, s.log.Named("network")); err != nil {
		return err
	}
	if s.storage, err = openStorage(s.cfg, s.log, s.fail); err != nil {
		return errors.Join(err, s.network.Close())
	}
	s.peers = newPeers(s.network)
	if s.form, err = newFormation(s.cfg, s.log.Named("forming"), s.storage, s.peers); err != nil {
		return errors.Join(err, s.storage.close(), s.network.Close())
	}
	s.peers.handlers = map[byte]handler{
		opApply:     s.handleApply,
		opReadIndex: s.handleReadIndex,
		opTerm:      s.handleTerm,
		opStatus:    s.handleStatus,
		opGrant:     s.form.handleGrant,
		opJoin:      s.form.handleJoin,
	}
	s.network.address = s.address
	s.network.cluster = s.form.cluster
	s.network.welcome = s.welcome
	s.network.servePeer = s.peers.serve
	s.network.start()
	s.wg.Go(func() { s.batches.run(s.ctx) })
	s.wg.Go(func() { s.rounds.run(s.ctx) })
	s.wg.Go(s.watch)
	s.wg.Go(func() {
		if err := s.join(); err != nil && s.ctx.Err() == nil {
			s.fail(err)
		}
	})
	return nil
}

// join makes this node a member of its cluster and starts Raft.
func (s *Store) join() error {
	founder, err := s.form.find(s.ctx)
	if err != nil {
		return err
	}
	s.network.disconnect() // what was said before was said under no cluster id
	if err := s.startRaft(founder); err != nil {
		return err
	}
	for _, id := range s.others() {
		s.wg.Go(func() { s.confirmer.serve(s.ctx, id) })
	}
	if founder {
		s.form.announce(s.ctx)
	}
	if founder || len(s.members()) == 1 {
		s.transport.campaign(s.ctx.Done()) // nobody else can be leader, so there is nobody to wait for
	}
	for !s.caughtUp.Load() && s.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(s.ctx, requestTimeout)
		err := s.Read(ctx, Linearizable, func() {})
		cancel()
		s.caughtUp.Store(err == nil)
	}
	return nil
}

// startRaft bootstraps the log if this node is the founder of its cluster, and starts Raft's own goroutines.
func (s *Store) startRaft(founder bool) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("start raft: %v", cause)
		}
	}()
	t := newTransport(s.network, s.log.Named("transport"))
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(s.cfg.NodeID)
	conf.Logger = s.log.Named("raft")
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = heartbeatTimeout, heartbeatTimeout, leaseTimeout
	conf.MaxAppendEntries = maxAppendEntries
	conf.SnapshotThreshold = s.cfg.SnapshotThreshold
	conf.SnapshotInterval = s.cfg.SnapshotInterval
	conf.TrailingLogs = s.cfg.TrailingLogs
	conf.NoLegacyTelemetry = true
	has, err := raft.HasExistingState(s.storage.logs, s.storage.stable, s.storage.snapshots)
	if err != nil {
		return fmt.Errorf("read the stored state: %w", err)
	}
	if founder && !has {
		err := raft.BootstrapCluster(conf, s.storage.logs, s.storage.stable, s.storage.snapshots, t, membership(s.cfg.Peers))
		if err != nil {
			return fmt.Errorf("bootstrap: %w", err)
		}
	}
	r, err := raft.NewRaft(conf, s.replica, s.storage.logs, s.storage.stable, s.storage.snapshots, t)
	if err != nil {
		return fmt.Errorf("start raft from %s: %w; nothing was changed", s.cfg.StateDir, err)
	}
	t.leading = func(term uint64) bool { return r.State() == raft.Leader && r.CurrentTerm() == term }
	r.RegisterObserver(raft.NewObserver(s.observations, false, nil))
	s.transport = t
	s.raft.Store(r)
	close(s.form.running)
	return nil
}

func membership(peers []Peer) raft.Configuration {
	var c raft.Configuration
	for _, p := range peers {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(p.ID), Address: raft.ServerAddress(p.Addr)})
	}
	return c
}

// Apply has the state machine execute command, and returns once a majority has it and the leader has executed it, or
// with one of the errors above. The Store owns command from then on.
func (s *Store) Apply(ctx context.Context, command []byte) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var o outcome
	err := s.whileLed(ctx, func() error {
		w := &write{command: command, done: make(chan outcome, 1)}
		if o.err = s.batches.add(w); o.err == nil {
			o = s.batches.wait(ctx, w)
		}
		return o.err
	})
	return o.Result, err
}

// Read calls f, which reads the state machine, while no command is executed. With Linearizable, f sees every command
// that was acknowledged, anywhere, before Read was called; with Stale it sees what this node has.
func (s *Store) Read(ctx context.Context, consistency Consistency, f func()) error {
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
	err := s.whileLed(ctx, func() (err error) {
		index, err = s.rounds.next(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if err := s.replica.applied.wait(ctx, index); err != nil {
		return ErrNotConfirmed
	}
	s.replica.read(f)
	return nil
}

// whileLed calls f when there is a leader, and again as long as f finds that the leader is not the leader any more: it
// moves, and we hear of it a moment later.
func (s *Store) whileLed(ctx context.Context, f func() error) error {
	giveUp := time.Now().Add(leaderWait)
	for {
		state, changed := s.current()
		err := ErrNoLeader
		if state.Leader != "" {
			if err = f(); !errors.Is(err, ErrNotLeader) && !errors.Is(err, ErrNoLeader) {
				return err
			}
		}
		if time.Now().After(giveUp) {
			return err
		}
		timer := time.NewTimer(retryInterval)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
		timer.Stop()
	}
}

// commit gives every write of a batch its outcome: the leader appends one log entry, any other node passes on to the
// leader what it has not been passed on itself.
func (s *Store) commit(batch []*write) {
	r := s.raft.Load()
	if r != nil && r.State() == raft.Leader && !s.handing.Load() {
		s.propose(r, batch)
		return
	}
	own := batch[:0]
	for _, w := range batch {
		if w.hop {
			w.done <- outcome{err: ErrNotLeader}
		} else {
			own = append(own, w)
		}
	}
	if len(own) > 0 {
		s.forward(own)
	}
}

// propose appends a batch to Raft's log as one entry and waits until it is committed and executed.
func (s *Store) propose(r *raft.Raft, batch []*write) {
	future := r.Apply(encodeEntry(time.Now(), commandsOf(batch)), requestTimeout)
	done := make(chan error, 1)
	go func() { done <- future.Error() }()
	var err error
	select {
	case err = <-done:
	case <-s.ctx.Done(): // Raft may leave the future unanswered when it shuts down
		finish(batch, ErrUnknownOutcome)
		return
	}
	if err != nil {
		s.log.Debug("a log entry failed", "index", future.Index(), "commands", len(batch), "error", err)
		// An entry without an index was never in the log; any other may still be committed by the next leader.
		if future.Index() == 0 {
			finish(batch, ErrNotLeader)
		} else {
			finish(batch, ErrUnknownOutcome)
		}
		return
	}
	results, _ := future.Response().([][]byte)
	if len(results) != len(batch) {
		finish(batch, ErrUnknownOutcome) // the state machine failed, and the process with it
		return
	}
	for i, w := range batch {
		w.done <- outcome{Result: Result{Index: future.Index(), Data: results[i]}}
	}
}

// forward passes the commands of a batch on to the leader.
func (s *Store) forward(batch []*write) {
	leader := s.Leader()
	if leader == "" || leader == s.cfg.NodeID {
		finish(batch, ErrNotLeader)
		return
	}
	ctx, cancel := s.ledBy(leader, requestTimeout)
	defer cancel()
	answer, err := s.peers.call(ctx, leader, opApply, appendCommands(nil, commandsOf(batch)))
	if err != nil {
		s.log.Debug("passing commands on failed", "leader", leader, "commands", len(batch), "error", err)
		if unsent := new(dialError); errors.As(err, &unsent) || errors.Is(err, errRemote) {
			finish(batch, ErrNotLeader)
		} else {
			finish(batch, ErrUnknownOutcome)
		}
		return
	}
	outcomes, err := decodeOutcomes(answer, len(batch))
	if err != nil {
		s.log.Error("the leader's answer makes no sense", "leader", leader, "error", err)
		finish(batch, ErrUnknownOutcome)
		return
	}
	for i, w := range batch {
		w.done <- outcomes[i]
	}
}

// ledBy returns a context for a call to the leader. It ends soon after this node hears that another leads: what hangs
// in a leader that has stopped answering must not hold up what the next one could do.
func (s *Store) ledBy(leader string, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	go func() {
		for {
			state, changed := s.current()
			if state.Leader != leader {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
		timer := time.NewTimer(leaderGrace)
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

func commandsOf(batch []*write) [][]byte {
	commands := make([][]byte, len(batch))
	for i, w := range batch {
		commands[i] = w.command
	}
	return commands
}

// handleApply executes commands that another node passed on to this one. It answers with an error only before any of
// them can have been executed.
func (s *Store) handleApply(ctx context.Context, _ string, request []byte) ([]byte, error) {
	commands, err := decodeCommands(request)
	if err != nil {
		return nil, err
	}
	writes := make([]*write, len(commands))
	for i, c := range commands {
		writes[i] = &write{command: c, hop: true, done: make(chan outcome, 1)}
	}
	addErr := s.batches.add(writes...)
	var answer []byte
	for _, w := range writes {
		o := outcome{err: addErr}
		if addErr == nil {
			o = s.batches.wait(ctx, w)
		}
		answer = appendOutcome(answer, o)
	}
	return answer, nil
}

// findReadIndex runs one round for linearizable reads: the leader confirms that it still leads, any other node asks the
// leader to.
func (s *Store) findReadIndex(context.Context) (uint64, error) {
	r := s.raft.Load()
	if r == nil {
		return 0, ErrNoLeader
	}
	if r.State() == raft.Leader {
		return s.confirmLeadership(r)
	}
	leader := s.Leader()
	if leader == "" || leader == s.cfg.NodeID {
		return 0, ErrNoLeader
	}
	ctx, cancel := s.ledBy(leader, confirmTimeout)
	defer cancel()
	request := binary.BigEndian.AppendUint64(nil, r.CommitIndex())
	answer, err := s.peers.call(ctx, leader, opReadIndex, request)
	if err != nil || len(answer) != 8 {
		s.log.Debug("the leader confirmed no read", "leader", leader, "error", err)
		return 0, ErrNotLeader
	}
	return binary.BigEndian.Uint64(answer), nil
}

// confirmLeadership returns the index of the last entry this node has executed, once a majority has said that it still
// is in the term in which this node leads. See "Linearizable reads" in DESIGN.md.
func (s *Store) confirmLeadership(r *raft.Raft) (uint64, error) {
	term := r.CurrentTerm()
	leading := func() bool { return r.State() == raft.Leader && r.CurrentTerm() == term }
	if !leading() || s.ready.Load() != term {
		return 0, ErrNotLeader
	}
	index := s.replica.applied.load()
	var voters []string
	for _, m := range s.members() {
		if m.Suffrage == raft.Voter && string(m.ID) != s.cfg.NodeID {
			voters = append(voters, string(m.ID))
		}
	}
	needed := (len(voters)+1)/2 + 1 - 1 // a majority of the voters, less this one
	if !s.confirmer.confirm(term, voters, needed, func() bool { return !leading() }) {
		if leading() {
			return 0, ErrNotConfirmed
		}
		return 0, ErrNotLeader
	}
	if !leading() {
		return 0, ErrNotLeader
	}
	return index, nil
}

// handleReadIndex confirms leadership for the reads of another node. If that node does not know yet that the index is
// committed it is told now, since Raft would tell it only with the next entry or after CommitTimeout.
func (s *Store) handleReadIndex(ctx context.Context, from string, request []byte) ([]byte, error) {
	r := s.raft.Load()
	if r == nil || r.State() != raft.Leader || len(request) != 8 {
		return nil, ErrNotLeader
	}
	term := r.CurrentTerm()
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
	request := &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:      term, Leader: self,
		PrevLogEntry: index, PrevLogTerm: entry.Term, LeaderCommitIndex: index,
	}
	err := s.transport.AppendEntries(raft.ServerID(id), raft.ServerAddress(id), request, new(raft.AppendEntriesResponse))
	if err != nil {
		s.log.Debug("telling a follower what is committed failed", "node", id, "error", err)
	}
}

func (s *Store) askTerm(ctx context.Context, id string, term uint64) (bool, error) {
	answer, err := s.peers.call(ctx, id, opTerm, binary.BigEndian.AppendUint64(nil, term))
	return err == nil && len(answer) == 1 && answer[0] == 1, err
}

// handleTerm says whether this node's term is the one asked about. Raft persists a new term before it votes in it, so
// after a yes a newer leader may be elected with this node's vote, but was not before.
func (s *Store) handleTerm(_ context.Context, _ string, request []byte) ([]byte, error) {
	if r := s.raft.Load(); r != nil && len(request) == 8 && r.CurrentTerm() == binary.BigEndian.Uint64(request) {
		return []byte{1}, nil
	}
	return []byte{0}, nil
}

// watch notices every change of state: at once when Raft says so, and else at the next look, since what Raft says may
// get lost.
func (s *Store) watch() {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		s.update(s.raft.Load())
		select {
		case <-s.observations:
		case <-ticker.C:
		case <-s.ctx.Done():
			return
		}
	}
}

// update publishes this node's state if it has changed.
func (s *Store) update(r *raft.Raft) {
	now := RaftState{State: s.form.state()}
	if r != nil {
		_, leader := r.LeaderWithID()
		now = RaftState{State: stateName(r.State()), Leader: string(leader), Term: r.CurrentTerm()}
	}
	before := s.state.Load()
	if now == before.RaftState {
		return
	}
	s.state.Store(&moment{now, make(chan struct{})})
	close(before.over)
	s.confirmer.wakeUp()
	if now.State == "leader" && (before.State != "leader" || before.Term != now.Term) {
		s.wg.Go(func() { s.lead(r, now.Term) })
	}
	if s.onChange != nil {
		s.onChange(now)
	}
}

func stateName(state raft.RaftState) string {
	switch state {
	case raft.Follower:
		return "follower"
	case raft.Candidate:
		return "candidate"
	case raft.Leader:
		return "leader"
	default:
		return "shutdown"
	}
}

// lead makes this node ready for linearizable reads in a term: before that it may not have executed all that leaders
// before it acknowledged.
func (s *Store) lead(r *raft.Raft, term uint64) {
	for s.ctx.Err() == nil && r.State() == raft.Leader && r.CurrentTerm() == term {
		done := make(chan error, 1)
		barrier := r.Barrier(requestTimeout)
		go func() { done <- barrier.Error() }()
		select {
		case err := <-done:
			if err == nil && r.State() == raft.Leader && r.CurrentTerm() == term {
				s.ready.Store(term)
				return
			}
		case <-s.ctx.Done():
			return
		}
	}
}

// current returns this node's state and a channel that is closed when it changes.
func (s *Store) current() (RaftState, <-chan struct{}) {
	m := s.state.Load()
	return m.RaftState, m.over
}

// State returns where this node stands.
func (s *Store) State() RaftState {
	state, _ := s.current()
	return state
}

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
	state := s.State()
	switch {
	case s.raft.Load() == nil:
		return errors.New(s.form.reason())
	case state.Leader == "":
		return errors.New("no leader is known")
	case !s.caughtUp.Load():
		return errors.New("this node has not caught up with the leader since it started")
	case !slices.ContainsFunc(s.members(), func(m raft.Server) bool {
		return string(m.ID) == s.cfg.NodeID && m.Suffrage == raft.Voter
	}):
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
	Peers           []PeerStatus `json:"peers"`
	PeersDrift      bool         `json:"peers_drift"` // ids or voters of the membership are not what PEERS says
	WritesMayBeLost bool         `json:"writes_may_be_lost"`
	Cluster         string       `json:"cluster_id"` // "" while the node is of none
	LastIndex       uint64       `json:"last_index"` // of the log
	CaughtUp        bool         `json:"caught_up"`  // since it started, the node has once had all that was committed
}

// PeerStatus is one member of the cluster, at the address where this node looks for it.
type PeerStatus struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	Voter   bool   `json:"voter"`
}

// Status returns what /status shows.
func (s *Store) Status() Status {
	state := s.State()
	status := Status{
		ID: s.cfg.NodeID, State: state.State, Leader: state.Leader, Term: state.Term,
		KVStore: s.cfg.KVStore, Version: version, LastContactMS: -1, Peers: []PeerStatus{},
		CaughtUp: s.caughtUp.Load(),
	}
	if id := s.form.cluster(); id != (clusterID{}) {
		status.Cluster = id.String()
	}
	r := s.raft.Load()
	if r == nil {
		status.LastIndex = s.form.lastIndex
		return status
	}
	status.CommitIndex, status.AppliedIndex, status.LastIndex = r.CommitIndex(), r.AppliedIndex(), r.LastIndex()
	if contact := r.LastContact(); state.State == "leader" {
		status.LastContactMS = 0
	} else if !contact.IsZero() {
		status.LastContactMS = time.Since(contact).Milliseconds()
	}
	for _, m := range s.members() {
		addr, _ := s.address(string(m.ID))
		status.Peers = append(status.Peers, PeerStatus{ID: string(m.ID), Address: addr, Voter: m.Suffrage == raft.Voter})
	}
	status.PeersDrift = s.drift()
	return status
}

func (s *Store) handleStatus(context.Context, string, []byte) ([]byte, error) {
	return json.Marshal(s.Status())
}

// members returns the membership as Raft has stored it, empty until it has one.
func (s *Store) members() []raft.Server {
	if r := s.raft.Load(); r != nil {
		return r.GetConfiguration().Configuration().Servers
	}
	return nil
}

// others returns the ids of all nodes but this one, in PEERS or in the membership.
func (s *Store) others() []string {
	var ids []string
	for _, p := range s.cfg.Peers {
		ids = append(ids, p.ID)
	}
	for _, m := range s.members() {
		ids = append(ids, string(m.ID))
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	return slices.DeleteFunc(ids, func(id string) bool { return id == s.cfg.NodeID })
}

// drift says whether the stored membership is another than PEERS. Addresses do not count: those in PEERS are used.
func (s *Store) drift() bool {
	members := s.members()
	if len(members) == 0 {
		return false // nothing is stored yet
	}
	inPeers := func(m raft.Server) bool {
		return m.Suffrage == raft.Voter &&
			slices.ContainsFunc(s.cfg.Peers, func(p Peer) bool { return p.ID == string(m.ID) })
	}
	return len(members) != len(s.cfg.Peers) || slices.ContainsFunc(members, func(m raft.Server) bool { return !inPeers(m) })
}

// address says where a node listens: where PEERS has it, else where the stored membership has it.
func (s *Store) address(id string) (string, bool) {
	for _, p := range s.cfg.Peers {
		if p.ID == id {
			return p.Addr, true
		}
	}
	for _, m := range s.members() {
		if string(m.ID) == id {
			return string(m.Address), true
		}
	}
	return "", false
}

// errStarting refuses Raft's messages while this node's Raft is not running.
var errStarting = errors.New("this node is starting; try again")

// welcome has Raft's messages wait until this node is of the sender's cluster and its Raft runs.
func (s *Store) welcome(h hello) error {
	if h.kind != kindRaft {
		return nil
	}
	s.form.hear(h.cluster)
	timer := time.NewTimer(helloTimeout / 2)
	defer timer.Stop()
	select {
	case <-s.form.running:
	case <-s.ctx.Done():
		return errStarting
	case <-timer.C:
		return errStarting
	}
	if mine := s.form.cluster(); h.cluster != mine {
		return fmt.Errorf("node %q speaks for cluster %v, node %q is of cluster %v", h.sender, h.cluster, s.cfg.NodeID, mine)
	}
	return nil
}

// Shutdown hands leadership over if this node has it, stops Raft and closes the storage. It gives up waiting when ctx
// ends; what was acknowledged is safe all the same.
func (s *Store) Shutdown(ctx context.Context) error {
	var err error
	if r := s.raft.Load(); r != nil {
		s.handOver(ctx, r)
		stopped := make(chan error, 1)
		shutdown := r.Shutdown()
		s.closeConnections()
		go func() { stopped <- shutdown.Error() }()
		select {
		case err = <-stopped:
		case <-ctx.Done():
			return fmt.Errorf("raft did not stop in time: %w", ctx.Err())
		}
	} else {
		s.closeConnections()
	}
	s.wg.Wait()
	return errors.Join(err, s.storage.close())
}

// closeConnections ends everything that other nodes want of this one, and all that runs here but Raft itself.
func (s *Store) closeConnections() {
	s.cancel()
	s.confirmer.close()
	s.peers.close()
	if err := s.network.Close(); err != nil {
		s.log.Warn("close the Raft port", "error", err)
	}
}

// handOver makes the most advanced of the other nodes the leader, if this one leads and there is one.
func (s *Store) handOver(ctx context.Context, r *raft.Raft) {
	if r.State() != raft.Leader || len(s.members()) < 2 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, handoverWait)
	defer cancel()
	s.handing.Store(true)
	defer s.handing.Store(false)
	if !s.batches.idle(ctx) {
		return
	}
	best := s.mostAdvanced(ctx)
	if best == "" {
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
func (s *Store) mostAdvanced(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, handoverWait/2)
	defer cancel()
	best, bestIndex := "", uint64(0)
	for id, status := range s.form.askAll(ctx, s.others()) {
		voter := slices.ContainsFunc(s.members(), func(m raft.Server) bool {
			return string(m.ID) == id && m.Suffrage == raft.Voter
		})
		if voter && status.Cluster == s.form.cluster().String() && status.LastIndex > bestIndex {
			best, bestIndex = id, status.LastIndex
		}
	}
	return best
}
