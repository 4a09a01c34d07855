package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	staleAfter     = 10 * time.Second // after its start a node answers stale reads even if it has not caught up
	watchInterval  = 100 * time.Millisecond
	hurryTurns     = 5                      // watchIntervals, within which followers notice that their leader is silent
	handoverWait   = 2 * time.Second        // for another node to become leader
	handoverLinger = 200 * time.Millisecond // for the others to hear of it, while we still answer them
	retrySnapshot  = time.Second            // after one that failed
)

// Raft's timing. A leader steps down when no majority has answered for leaseTimeout, a follower looks for a new one when
// it has heard nothing for heartbeatTimeout. Heartbeats wait behind a follower's fsyncs (see SetHeartbeatHandler), so
// the two are equal, and above what a slow disk takes.
const (
	heartbeatTimeout = 1 * time.Second
	leaseTimeout     = heartbeatTimeout
	electionTimeout  = heartbeatTimeout + time.Millisecond // no shorter than any heartbeat timeout that hurry sets
	commitTimeout    = 100 * time.Millisecond              // within twice that an idle leader repeats what is committed
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

	list       *peerList
	membership *membership
	replica    *replica
	storage    *storage
	network    *network
	peers      *peers
	leadership *leadership
	writes     *writes
	rounds     *readRounds

	raft         atomic.Pointer[raft.Raft] // nil until the server is of a cluster that has begun
	transport    *transport
	observations chan raft.Observation // from Raft, lossy
	lastLeader   string                // that was known. Only for watch
	ready        atomic.Uint64         // the term in which this node, as leader, has executed all of earlier terms
	handing      atomic.Bool           // leadership is being handed over: no more entries
	current      chan struct{}         // closed when this node has caught up
	commits      commits
	versions     voterVersions
	stuck        atomic.Bool // this node leads and cannot get its entries to a majority

	learned atomic.Pointer[map[string]string] // addresses of nodes, from answers of others; not changed once stored

	looking sync.Mutex // guards what follows, and is held while the others are asked
	seen    view
	seenAt  time.Time

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
		observations: make(chan raft.Observation, 16),
		current:      make(chan struct{}),
		failed:       make(chan error, 1),
	}
	s.learned.Store(new(map[string]string))
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.list = newPeerList(cfg, log.Named("membership"))
	s.membership = newMembership(cfg, log.Named("membership"))
	s.replica = &replica{machine: machine, metrics: m, fail: s.fail, released: make(chan struct{}, 1)}
	s.rounds = newReadRounds(m, s.findReadIndex)
	s.export()
	s.writes = newWrites(s, m, log.Named("writes"))
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
	s.storage.rules.applied = s.replica.applied.load
	if d := s.storage.disk; d != nil {
		d.early, d.took = s.commitsWithOthers, s.metrics.stored.Observe
	}
	s.exportStorage()
	if err := s.membership.open(s.storage); err != nil {
		return errors.Join(err, s.storage.close(), s.port.Close())
	}
	s.network = newNetwork(s.cfg.NodeID, s.port, s.certs, s, s.metrics.refusals, s.log.Named("network"))
	s.peers = newPeers(s.network, map[byte]handler{
		opApply:     s.writes.handleApply,
		opReadIndex: s.handleReadIndex,
		opTerm:      s.handleTerm,
		opWho:       s.handleWho,
	})
	s.wg.Go(func() { s.writes.run(s.ctx) })
	s.wg.Go(func() { s.rounds.run(s.ctx) })
	s.wg.Go(s.watch)
	go s.list.follow(s.ctx)
	s.wg.Go(func() {
		if err := s.join(); err != nil && s.ctx.Err() == nil {
			s.end(err)
		}
	})
	return nil
}

// end has the process end for the given reason.
func (s *Store) end(err error) {
	select {
	case s.failed <- err:
	default: // it does so for another reason
	}
}

// join waits until this server is of a cluster that has begun, runs Raft, and returns when it has caught up.
func (s *Store) join() error {
	if err := s.begin(); err != nil {
		return err
	}
	if err := s.startRaft(); err != nil {
		return err
	}
	s.wg.Go(s.tend)
	if s.drift() {
		s.log.Warn("PEERS names other nodes than the stored membership", "peers", peerIDs(s.list.get()), "membership", s.members())
	}
	for s.membership.at() < stageCurrent && s.ctx.Err() == nil {
		if s.Read(s.ctx, Linearizable, func() {}) == nil {
			s.membership.advance(stageCurrent)
			close(s.current)
		}
	}
	return nil
}

// startRaft starts Raft from what is stored.
func (s *Store) startRaft() (err error) {
	defer func() {
		if cause := recover(); cause != nil { // bbolt and raft panic on damaged data
			err = fmt.Errorf("start raft from %s: %v; nothing was changed", s.cfg.StateDir, cause)
		}
	}()
	id := s.membership.identity()
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(id.Server)
	log := newRaftLog(s.log.Named("raft"))
	conf.Logger = log
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = heartbeatTimeout, electionTimeout, leaseTimeout
	conf.MaxAppendEntries, conf.CommitTimeout = maxAppendEntries, commitTimeout
	// When to take a snapshot, and what stays of the log, is decided by bytes as well: see compact, and entries. Raft by
	// itself would take the same snapshot again and again when the log is empty.
	conf.SnapshotThreshold, conf.TrailingLogs = math.MaxUint64, 0
	conf.ShutdownOnRemove = false
	conf.NoLegacyTelemetry = true
	s.membership.waits("the node is reading its snapshot and log")
	st := s.storage
	begins, err := bootstrap(st, id.Bootstrap)
	if err != nil {
		return fmt.Errorf("begin the log: %w", err)
	}
	s.transport = newTransport(s.network, st, s, log)
	r, err := raft.NewRaft(conf, s.replica, st.logs, st.stable, st.snapshots, s.transport)
	if err != nil {
		return fmt.Errorf("start raft from %s: %w; nothing was changed", s.cfg.StateDir, err)
	}
	r.RegisterObserver(raft.NewObserver(s.observations, false, nil))
	s.membership.waits("no leader is known yet")
	s.membership.advance(stageRunning)
	s.raft.Store(r)
	s.wg.Go(func() { s.compact(r) })
	if begins || len(s.members()) == 1 {
		s.wg.Go(s.campaign) // nobody else can be the leader yet, so there is nobody to wait for
	}
	return nil
}

// compact takes a snapshot when one is due, until the Store shuts down.
func (s *Store) compact(r *raft.Raft) {
	rules := s.storage.rules
	for {
		select {
		case <-rules.due:
		case <-time.After(s.cfg.SnapshotInterval + rand.N(s.cfg.SnapshotInterval)):
		case <-s.ctx.Done():
			return
		}
		before := rules.newest()
		if !rules.isDue(s.cfg.SnapshotThreshold) || s.replica.applied.load() <= before {
			continue
		}
		r.Snapshot() // returns when Raft has begun. It may leave the future unanswered when it shuts down
		select {
		case <-s.replica.released:
		case <-s.ctx.Done():
			return
		}
		if rules.newest() == before { // it failed, and Raft has logged why
			select {
			case <-time.After(retrySnapshot):
			case <-s.ctx.Done():
			}
		}
	}
}

// bootstrap begins a log with the cluster's first configuration, if it is empty, as raft.BootstrapCluster does. That one
// however refuses to go on where a crash between its two writes has left it.
func bootstrap(st *storage, members []member) (begins bool, err error) {
	last, _, err := st.lastEntry()
	if err != nil || len(members) == 0 || last > 0 {
		return false, err
	}
	term, err := st.stable.GetUint64(keyCurrentTerm)
	if err != nil && !isNotFound(err) {
		return false, err
	}
	if err := st.stable.SetUint64(keyCurrentTerm, max(term, 1)); err != nil {
		return false, err
	}
	var c raft.Configuration
	for _, m := range members {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(m.Server), Address: raftAddress(m.Server, m.Address)})
	}
	return true, st.logs.StoreLog(&raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c)})
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

// follows says whether this node's term is the given one.
func (s *Store) follows(term uint64) bool { return s.raft.Load().CurrentTerm() == term }

func (s *Store) appliedIndex() uint64 { return s.raft.Load().AppliedIndex() }

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
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, requestTimeout)
		defer cancel()
	}
	if err := s.checkVersion(ctx, command); err != nil {
		return Result{}, err
	}
	var o outcome
	err := s.leadership.try(ctx, func() error {
		o = s.writes.submit(ctx, command)
		return o.err
	})
	if applied, ok := ctx.Value(appliedKey{}).(*atomic.Bool); ok && (err == nil || errors.Is(err, ErrUnknownOutcome)) {
		applied.Store(true)
	}
	if err != nil {
		return Result{}, err
	}
	return Result{Index: o.index, Data: o.results[0]}, nil
}

type appliedKey struct{} // of a *atomic.Bool in a context

// withApplied returns a context in which Apply notes that it has had a command executed, or may have: whoever answers a request
// must not say then that nothing was done.
func withApplied(ctx context.Context, applied *atomic.Bool) context.Context {
	return context.WithValue(ctx, appliedKey{}, applied)
}

// Read calls f, which reads the state machine, while no command is executed. With Linearizable, f sees every command
// that was acknowledged, anywhere, before Read was called; with Stale it sees what this node has.
func (s *Store) Read(ctx context.Context, consistency Consistency, f func()) error {
	if consistency == Stale {
		if at := s.membership.at(); at < stageCurrent && time.Since(s.started) < staleAfter {
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
	if err := s.executed(ctx, index); err != nil {
		return err
	}
	s.replica.read(f)
	return nil
}

// Capture calls f while neither a command is executed nor a Read's func runs, to make a copy of the state machine that
// shares memory with it. What f sees is this node's, and at least as new as what a Read before it has seen.
func (s *Store) Capture(f func()) { s.replica.capture(f) }

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
	leader := s.State().server
	if leader == "" || leader == s.membership.server() {
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
		return s.confirmLeadership(s.ctx, r)
	}
	answer, err := s.callLeader(opReadIndex, binary.BigEndian.AppendUint64(nil, r.CommitIndex()), confirmTimeout)
	if err != nil || len(answer) != 8 {
		return 0, ErrNotLeader
	}
	return binary.BigEndian.Uint64(answer), nil
}

// confirmLeadership returns the index of the last entry that this leader has executed, once a majority of the voters has
// said that it still is in this leader's term. See "Linearizable reads" in DESIGN.md.
func (s *Store) confirmLeadership(ctx context.Context, r *raft.Raft) (index uint64, err error) {
	term := r.CurrentTerm()
	if s.ready.Load() != term || !leads(r, term) {
		return 0, ErrNotLeader
	}
	index = s.replica.applied.load()
	self := s.membership.server()
	voters, needed := 0, 0 // needed: of the others, for a majority
	var others []string
	for _, m := range s.members() { // once a round: an entry that changes them meanwhile is not in it
		switch {
		case m.Voter && m.Server != self:
			others = append(others, m.Server)
			voters++
		case m.Voter:
			voters++
			needed-- // it says yes itself
		}
	}
	needed += voters/2 + 1
	request := binary.BigEndian.AppendUint64(nil, term)
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	confirmed := majority(ctx, others, needed, func(ctx context.Context, server string) bool {
		return s.peers.agrees(ctx, server, opTerm, request)
	})
	if !confirmed || !leads(r, term) {
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
	self := []byte(s.membership.server())
	err := s.transport.NetworkTransport.AppendEntries(raft.ServerID(id), raft.ServerAddress(id), &raft.AppendEntriesRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:         term,
		PrevLogEntry: index, PrevLogTerm: entry.Term, LeaderCommitIndex: index,
	}, new(raft.AppendEntriesResponse))
	if err != nil {
		s.log.Debug("telling a follower what is committed failed", "node", id, "error", err)
	}
}

// watch notices every change of state: at once when Raft says so, and else at the next look, since what Raft says may
// get lost.
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
		silence := time.Duration(0)
		if r != nil && r.State() == raft.Follower && s.Leader() != "" {
			silence = time.Since(r.LastContact())
		}
		switch {
		case silence < heartbeatTimeout:
			silent, turn = 0, 1+rand.IntN(hurryTurns)
		case silent == turn:
			s.hurry(r)
			fallthrough
		default:
			silent++
		}
		timer.Reset(watchInterval)
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
		now = RaftState{State: stateNames[r.State()], Leader: nodeOf(string(leader)), Term: r.CurrentTerm(), server: string(leader)}
		now.left = now.Leader == "" && s.hasLeft()
		s.noticeStuck(now.State == "leader", now.Term, r.CommitIndex(), r.LastIndex())
	} else if s.membership.at() == stageBlank {
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

// State returns where this node stands.
func (s *Store) State() RaftState { return s.leadership.now.Load().RaftState }

// Leader returns the leader's id, "" when this node knows of none.
func (s *Store) Leader() string { return s.State().Leader }

// CaughtUp says whether since its start this node has once had all that a leader had committed. Until then what it holds
// may be an old snapshot.
func (s *Store) CaughtUp() bool { return s.membership.at() == stageCurrent }

// Current returns a channel that is closed when, for the first time since its start, this node has had all that a leader
// had committed.
func (s *Store) Current() <-chan struct{} { return s.current }

// leadsReady says whether this node leads and has executed all that leaders before it have acknowledged.
func (s *Store) leadsReady() bool { return s.ready.Load() > 0 && s.leadsIn(s.ready.Load()) }

// Ready returns nil when this node can do its part: it knows the leader, has caught up since it started, and votes.
func (s *Store) Ready() error {
	switch {
	case !s.isListed():
		return errors.New("this node is not in PEERS_FILE: it leaves the cluster, or has left it")
	case s.raft.Load() == nil || s.Leader() == "":
		return errors.New(s.membership.reason())
	case !s.CaughtUp():
		return errors.New("this node has not caught up with the leader since it started")
	case !slices.ContainsFunc(s.members(), func(m member) bool { return m.Voter && m.Server == s.membership.server() }):
		return errors.New("this node has no vote yet: the leader is still bringing it up, or has not removed the server that was here before")
	case s.stuck.Load():
		return errors.New(s.stuckReason())
	}
	return nil
}

// members returns Raft's newest configuration, empty before there is one.
func (s *Store) members() []member {
	if r := s.raft.Load(); r != nil {
		return membersOf(r.GetConfiguration().Configuration())
	}
	return nil
}

// isMember says whether a server is in the newest configuration, and whether it votes there.
func (s *Store) isMember(server string) (member, votes bool) {
	for _, m := range s.members() {
		if m.Server == server {
			return true, m.Voter
		}
	}
	return false, false
}

// voters returns the number of voting servers.
func (s *Store) voters() (n int) {
	for _, m := range s.members() {
		if m.Voter {
			n++
		}
	}
	return n
}

// drift says whether ids or voters of the membership are others than those of PEERS. Addresses do not count.
func (s *Store) drift() bool {
	members := s.members()
	voters := make(map[string]bool) // by node
	for _, m := range members {
		voters[nodeOf(m.Server)] = voters[nodeOf(m.Server)] || m.Voter
	}
	return len(members) > 0 && (len(voters) != len(s.list.get()) ||
		slices.ContainsFunc(s.list.get(), func(p Peer) bool { return !voters[p.ID] }))
}

// addresses says where each node listens: where the list has it, else where the configuration has it or, for a server
// that has no configuration yet, that of the nodes of the list.
func (s *Store) addresses() map[string]string {
	addresses := make(map[string]string)
	maps.Copy(addresses, *s.learned.Load())
	for _, m := range s.members() {
		addresses[nodeOf(m.Server)] = m.Address
	}
	for _, p := range s.list.get() {
		addresses[p.ID] = p.Addr
	}
	if addresses[s.cfg.NodeID] == "" { // it is in no list any more
		addresses[s.cfg.NodeID] = s.cfg.RaftAdvertise
	}
	return addresses
}

// address says where a node listens.
func (s *Store) address(node string) (addr string, known bool) {
	addr, known = s.addresses()[node]
	return addr, known
}

// self returns which server this node is, and of which cluster: "" for none.
func (s *Store) self() (server, cluster string) {
	id := s.membership.identity()
	return id.Server, id.Cluster
}

// welcome lets Raft's messages and calls in only while Raft runs.
func (s *Store) welcome(h hello) error {
	if h.kind != kindAsk && (s.raft.Load() == nil || s.membership.at() == stageRetired) {
		return errNoRaft
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
	var stop raft.Future // of the first call to Raft's Shutdown: no other waits for anything
	if r := s.raft.Load(); r != nil {
		s.handOver(ctx, r)
		stop = r.Shutdown()
	}
	s.cancel()
	s.peers.close()
	stopped := make(chan error, 1)
	go func() { // each step of it may hang with the disk
		err := s.network.Close()
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

// mostAdvanced returns the other voter with the longest log among those that answer, "" if none does.
func (s *Store) mostAdvanced(ctx context.Context) (best string) {
	v, longest := s.lookAround(ctx), uint64(0)
	for _, m := range s.members() {
		info := v.answers[nodeOf(m.Server)]
		stays := !s.list.removes() || v.named(nodeOf(m.Server))
		if m.Voter && stays && m.Server != s.membership.server() && info.Server == m.Server && info.LastIndex > longest {
			best, longest = m.Server, info.LastIndex
		}
	}
	return best
}
