package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// The way of a write. A client sends it to node2; node1 leads.
//
//  1. Store.Apply (store.go) on node2 waits until a leader is known: leadership.retry (leadership.go).
//  2. writes.submit (writes.go) queues the command. writes.run takes all that wait as one batch. node2 does not lead,
//     so it forwards the batch: writes.forward, Store.callLeader (leadership.go), peers.call (peers.go).
//  3. On node1 writes.handleApply queues them beside node1's own, and the next batch becomes one log entry:
//     Store.propose.
//  4. Raft stores the entry and sends it to node2 and node3 (transport.go). When one of them has stored it, too, it is
//     committed, and replica.Apply (machine.go) has the state machine execute each command on every node.
//  5. node1 answers node2 with the entry's index and the results, and node2 answers the client.
//
// The way of a linearizable read, also sent to node2.
//
//  1. Store.Read waits until a leader is known, and then for a read index: readRounds.next (reads.go).
//  2. readRounds.run takes all reads that wait. node2 does not lead, so it asks node1: Store.findReadIndex.
//  3. node1 notes what it has committed, and asks node2 and node3 whether its term is still theirs:
//     Store.confirmLeadership. With one yes, and its own, it answers with the index.
//  4. node2 waits until it has executed the log up to that index, and reads its own state machine.
//
// The way of a start.
//
//  1. Store.Open listens on the Raft port and opens the storage (storage.go). From then on other nodes may ask this one
//     who it is (view.go), and all wait until there is a leader.
//  2. Store.form (membership.go) returns when this node is in a cluster that has begun: the nodes of PEERS have begun
//     it together, or a leader has let this node join, or the storage says so.
//  3. Store.startRaft runs Raft. Store.watch (leadership.go) publishes each change of its state.
//  4. As long as this node leads, Store.manageMembers (membership.go) replaces servers that have lost their state, and
//     brings the members to the list of nodes (resize.go).
//  5. When a first linearizable read succeeds, this node has caught up and is ready.

const (
	// requestTimeout is how long a command or a read may take in all, on whichever nodes; a command that comes with a
	// deadline of its own goes by that.
	requestTimeout = 10 * time.Second

	staleAfter    = 10 * time.Second // after its start a node answers stale reads even if it has not caught up
	retrySnapshot = time.Second      // after one that failed
)

// Raft's timing. A leader steps down when no majority has answered for leaseTimeout, a follower looks for a new one
// when it has heard nothing for heartbeatTimeout. Heartbeats wait behind a follower's fsyncs (see SetHeartbeatHandler),
// so the two are equal, and above what a slow disk takes.
const (
	heartbeatTimeout = 1 * time.Second
	leaseTimeout     = heartbeatTimeout
	electionTimeout  = heartbeatTimeout + time.Millisecond // no shorter than any that checkHeartbeats sets
	commitTimeout    = 100 * time.Millisecond              // within twice that an idle leader repeats what is committed
	maxAppendEntries = 64
)

// Store replicates a state machine: commands go through Raft's log and are executed on every node in the same order. It
// knows nothing of what commands and state mean. Any node's Store takes any call, and forwards to the leader what only
// the leader can do.
type Store struct {
	cfg      *Config
	log      hclog.Logger
	metrics  *metrics
	started  time.Time
	onChange func(RaftState) // set before Open; may be nil

	list       *peerList
	learned    atomic.Pointer[map[string]string] // addresses that other nodes have of others; not changed once stored
	told       sync.Map                          // by node, the address that it has last said it is at
	membership *membership
	replica    *replica
	leadership *leadership
	writes     *writes
	rounds     *readRounds

	storage *storage // this and the next two are set by start
	network *network
	peers   *peers

	raft         atomic.Pointer[raft.Raft] // nil until this server is in a cluster that has begun
	transport    *transport                // set before raft
	observations chan raft.Observation     // from Raft, which leaves out what finds no room
	ready        progress                  // the last term in which this node, as leader, executed all of earlier terms
	handingOver  atomic.Bool               // this leader is about to hand over: it takes no more commands
	stuck        atomic.Bool               // this leader cannot get its entries to a majority
	wasReady     chan struct{}             // closed when this node is ready for the first time

	viewMu   sync.Mutex // guards what follows, and is held while the others are asked
	lastView view
	viewedAt time.Time

	ctx    context.Context // of every goroutine, ended by Shutdown
	cancel context.CancelFunc
	wg     sync.WaitGroup
	failed chan error // receives what must stop the process
}

// NewStore returns a Store that Open starts. The Store owns machine from then on: see StateMachine.
func NewStore(cfg *Config, machine StateMachine, m *metrics, log hclog.Logger) *Store {
	s := &Store{
		cfg: cfg, log: log, metrics: m, started: time.Now(),
		list:         newPeerList(cfg, log.Named("membership")),
		membership:   newMembership(cfg, log.Named("membership")),
		rounds:       newReadRounds(m),
		observations: make(chan raft.Observation, 16),
		wasReady:     make(chan struct{}),
		failed:       make(chan error, 1),
	}
	s.learned.Store(&map[string]string{})
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.leadership = newLeadership(s.ctx)
	s.replica = &replica{machine: machine, metrics: m, fail: s.fail, released: make(chan struct{}, 1)}
	s.writes = newWrites(s, m, log.Named("writes"))
	s.export()
	return s
}

// OnChange calls f with every new state of this node, one call at a time; short-lived states may be left out. It must
// be called before Open.
func (s *Store) OnChange(f func(RaftState)) { s.onChange = f }

// Failed returns a channel that receives the reason when this node must stop at once. Nothing that it did since has
// been acknowledged, and Shutdown cannot help.
func (s *Store) Failed() <-chan error { return s.failed }

// stopProcess has main end the process for the given reason, unless it does so already.
func (s *Store) stopProcess(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// fail is stopProcess for a caller that must not go on, such as Raft after a failed fsync: it never returns.
func (s *Store) fail(err error) {
	s.stopProcess(err)
	select {}
}

// Open listens on the Raft port and opens the storage, then returns while the node finds or begins its cluster. certs
// secure all connections between nodes; nil for none. After an error nothing is open.
func (s *Store) Open(certs *reloaded[*certificates]) error {
	p, err := listenForPeers(s.cfg.RaftAddr)
	if err != nil {
		return err
	}
	st, err := openStorage(s.cfg, s.log, s.metrics, s)
	if err != nil {
		return errors.Join(err, p.Close())
	}
	return s.start(p, st, certs)
}

// start is Open after it has opened port and storage, which the Store owns from then on.
func (s *Store) start(p port, st *storage, certs *reloaded[*certificates]) error {
	s.storage = st
	s.exportStorage()
	if err := s.membership.open(st); err != nil {
		return errors.Join(err, st.close(), p.Close())
	}
	s.network = newNetwork(s.cfg.NodeID, p, certs, s, s.metrics.refusals, s.log.Named("network"))
	s.peers = newPeers(s.network, map[byte]handler{
		opApply:     s.writes.handleApply,
		opReadIndex: s.handleReadIndex,
		opTerm:      s.handleTerm,
		opWho:       s.handleWho,
	})
	s.wg.Go(func() { s.writes.run(s.ctx) })
	s.wg.Go(func() { s.rounds.run(s.ctx, s.findReadIndex) })
	s.wg.Go(s.watch)
	go s.list.follow(s.ctx)
	s.wg.Go(func() {
		if err := s.join(); err != nil && s.ctx.Err() == nil {
			s.stopProcess(err)
		}
	})
	return nil
}

// join waits until this server is in a cluster that has begun, runs Raft, and returns when the node is ready.
func (s *Store) join() error {
	if err := s.form(); err != nil {
		return err
	}
	s.wg.Go(s.manageMembers)
	if err := s.startRaft(); err != nil {
		return err
	}
	if s.drift() {
		s.log.Warn("PEERS names other nodes than the stored membership", "peers", peerIDs(s.list.get()),
			"membership", s.members())
	}
	for s.membership.at() < stageCaughtUp && s.ctx.Err() == nil {
		if s.Read(s.ctx, Linearizable, func() {}) == nil {
			s.membership.advance(stageCaughtUp)
		} else {
			sleep(s.ctx, retryInterval) // a node that has left gets its error at once
		}
	}
	for s.Ready() != nil { // it may have no vote yet
		if !sleep(s.ctx, retryInterval) {
			return nil
		}
	}
	close(s.wasReady)
	return nil
}

// startRaft starts Raft from what is stored.
func (s *Store) startRaft() (err error) {
	defer func() {
		if cause := recover(); cause != nil { // bbolt and raft panic on damaged data
			err = fmt.Errorf("start raft from %s: %v; nothing was changed", s.cfg.StateDir, cause)
			if failure, _ := cause.(error); errors.Is(failure, raft.ErrLogNotFound) {
				err = damaged(s.cfg.StateDir, errors.New("its log does not follow on from its newest snapshot: is one missing?"))
			}
		}
	}()
	id := s.membership.identity()
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(id.Server)
	log := newRaftLogger(s.log.Named("raft"))
	conf.Logger = log
	conf.HeartbeatTimeout, conf.LeaderLeaseTimeout = heartbeatTimeout, leaseTimeout
	conf.ElectionTimeout = electionTimeout
	conf.MaxAppendEntries, conf.CommitTimeout = maxAppendEntries, commitTimeout
	conf.BatchApplyCh = true // so that the entries of a batch are stored and sent together
	// When to take a snapshot, and what stays of the log, is decided by bytes as well: see compact, and log.go. Raft by
	// itself would take the same snapshot again and again when the log is empty.
	conf.SnapshotThreshold, conf.TrailingLogs = math.MaxUint64, 0
	conf.ShutdownOnRemove = false
	conf.NoLegacyTelemetry = true
	s.membership.setReason("the node is reading its snapshot and log")
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
	s.membership.setReason("no leader is known yet")
	s.raft.Store(r)
	s.membership.advance(stageRunning)
	s.wg.Go(func() { s.compact(r) })
	// Where nobody else can be the leader yet there is nobody to wait for. The one member may be another node, which has
	// removed this one.
	if _, votes := s.isMember(id.Server); begins || votes && len(s.members()) == 1 {
		s.wg.Go(s.firstElection)
	}
	return nil
}

// compact takes a snapshot when one is due, until the Store shuts down.
func (s *Store) compact(r *raft.Raft) {
	log := s.storage.log
	for {
		select {
		case <-log.due:
		case <-time.After(s.cfg.SnapshotInterval + rand.N(s.cfg.SnapshotInterval)):
		case <-s.ctx.Done():
			return
		}
		before := log.snapshotIndex.Load()
		if !log.isSnapshotDue(s.cfg.SnapshotThreshold) || s.replica.applied.load() <= before {
			continue
		}
		r.Snapshot() // returns when Raft has begun. It may leave the future unanswered when it shuts down
		select {
		case <-s.replica.released:
		case <-s.ctx.Done():
			return
		}
		if log.snapshotIndex.Load() == before { // it failed, and Raft has logged why
			sleep(s.ctx, retrySnapshot)
		}
	}
}

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
	err := s.leadership.retry(ctx, func() error {
		o = s.writes.submit(ctx, command)
		return o.err
	})
	if count, ok := ctx.Value(countKey{}).(*atomic.Int32); ok && (err == nil || errors.Is(err, ErrUnknownOutcome)) {
		count.Add(1)
	}
	if err != nil {
		return Result{}, err
	}
	return Result{Index: o.index, Data: o.results[0]}, nil
}

type countKey struct{} // of a *atomic.Int32 in a context

// withCount returns a context in which Apply counts the commands that it has had executed, or may have. A request that
// then ends in an error must not be answered as if nothing was done.
func withCount(ctx context.Context, count *atomic.Int32) context.Context {
	return context.WithValue(ctx, countKey{}, count)
}

// propose appends entries to Raft's log; it returns nil when this node does not lead. Raft stores and sends together
// what it gets at once.
func (s *Store) propose(batch []entry) []raft.ApplyFuture {
	if !s.leadsNow() || s.handingOver.Load() {
		return nil
	}
	encoded := make([][]byte, len(batch))
	for i, e := range batch {
		encoded[i] = encodeEntry(time.Now(), e.commands())
	}
	futures := make([]raft.ApplyFuture, len(batch))
	for i := range batch {
		futures[i] = s.raft.Load().Apply(encoded[i], requestTimeout)
	}
	return futures
}

// Read calls f, which reads the state machine, while no command is executed. With Linearizable, f sees every command
// that was acknowledged, on any node, before Read was called; with Stale it sees what this node has. The error is one
// of those in errors.go, and f was not called then.
func (s *Store) Read(ctx context.Context, consistency Consistency, f func()) error {
	if consistency == Stale {
		if s.isStarting() {
			return ErrStarting
		}
		s.replica.read(f)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var index uint64
	err := s.leadership.retry(ctx, func() (err error) {
		index, err = s.rounds.next(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if err := s.waitApplied(ctx, index); err != nil {
		return err
	}
	s.replica.read(f)
	return nil
}

// isStarting says whether this node may soon have more than it has now: it has not caught up since its start, which was
// a moment ago, and no majority has lost its state.
func (s *Store) isStarting() bool {
	if s.membership.at() == stageCaughtUp || time.Since(s.started) >= staleAfter {
		return false
	}
	if s.raft.Load() == nil {
		return true
	}
	_, lost := s.recentView().lost(s.cfg.NodeID)
	return !lost
}

// Capture calls f while neither a command is executed nor a Read's func runs, to make a copy of the state machine that
// shares memory with it. What f sees is this node's, and at least as new as what a Read before it has seen.
func (s *Store) Capture(f func()) { s.replica.capture(f) }

// CaptureAll is Capture. Where this node sees no majority it then calls execute with each command that is in the log
// and not in what was captured: it may be all that is left of a command that was acknowledged. Nobody can say which of
// the last ones were, so a write of unknown outcome may be among them. The error is execute's, ErrStarting while Raft
// does not run, ErrNotInTime when ctx ends, or ErrNoLeader if the log may have changed meanwhile: there is a leader
// again, or the node stops.
func (s *Store) CaptureAll(
	ctx context.Context, capture func(), execute func(command []byte, at time.Time) error,
) error {
	r := s.raft.Load()
	if r == nil {
		return ErrStarting
	}
	contact := r.LastContact()
	snapshot := s.storage.log.snapshotIndex.Load()
	// A snapshot of an older version may end with an entry of Raft's own, which is not executed.
	index := max(s.replica.capture(capture), snapshot)
	if s.seesMajority() {
		return nil
	}
	last, err := s.storage.logs.LastIndex()
	if err != nil {
		return ErrNoLeader
	}
	for ; err == nil && index < last; index++ {
		if ctx.Err() != nil {
			return ErrNotInTime
		}
		var entry raft.Log
		if s.storage.logs.GetLog(index+1, &entry) != nil { // another has taken its place; other errors end the process
			return ErrNoLeader
		}
		if entry.Type == raft.LogCommand {
			err = executeEntry(entry.Data, execute)
		}
	}
	if _, leader := r.LeaderWithID(); err == nil && (leader != "" || r.LastContact() != contact) {
		return ErrNoLeader
	}
	return err
}

// seesMajority says whether this node sees a leader or a majority of the voters, or is not one of the members itself.
func (s *Store) seesMajority() bool {
	v := s.recentView()
	leader := v.leader()
	member, _ := s.isMember(s.membership.server())
	return s.Leader() != "" || leader != "" && v.isOurs(leader) || !member || v.hasMajority(s.members())
}

// WasReady returns a channel that is closed when Ready returns nil for the first time.
func (s *Store) WasReady() <-chan struct{} { return s.wasReady }

// Abandon closes the port and all connections to other nodes, and waits for nothing: it is for a node that has failed.
func (s *Store) Abandon() {
	s.peers.close()
	_ = s.network.closeNow()
}

// Cancel ends what waits for a leader, in a Store that Open has not opened yet.
func (s *Store) Cancel() { s.cancel() }

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
	err := within(ctx, func() error { // each step of it may hang with the disk
		err := s.network.Close()
		s.wg.Wait()
		if r := s.raft.Load(); stop == nil && r != nil { // it started just before s.cancel
			stop = r.Shutdown()
		}
		if stop != nil {
			err = errors.Join(err, stop.Error())
		}
		return errors.Join(err, s.storage.close())
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("the node did not stop in time: %w", err)
	}
	return err
}

// within calls f and returns its error, or ctx's if that ends first. Then f goes on in a goroutine that ends when f
// returns: Raft may leave a future unanswered when it shuts down, and a disk may hang.
func within(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sleep waits for d, or until ctx ends. It returns false when ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
