package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// Who is in the cluster, and how a node becomes part of it.
//
// A server, in Raft's sense, is one state of a node: its log, its term, its votes. Its name is <node id>#<random>, made
// together with the storage. A node that comes back without its state is a new server with a new name; the old one has
// failed for good, which is the case that Raft's own proof covers. The leader puts the new server in the old one's place
// by Raft's membership changes. People see node ids only.
//
// A server moves through these stages, never back:
//
//	opening  the storage is being opened
//	blank    it runs no Raft: it is of no cluster, or of one of which nobody that answers holds an entry yet
//	running  it is of a cluster that has begun, and runs Raft
//	current  since this start it has executed all that a leader had committed
//	retired  a majority of the voters is gone: it runs no Raft any more, and shows all that it has to those who save it
//
// Nothing is decided about a node that does not answer. "Membership" in DESIGN.md has the rules and why they are safe.
type stage int

const (
	stageOpening stage = iota
	stageBlank
	stageRunning
	stageCurrent
	stageRetired
)

const (
	lookInterval  = 500 * time.Millisecond // between two looks at the others, by a node that sees no leader
	tendInterval  = time.Second            // the same, by a leader
	lookPause     = 100 * time.Millisecond // at least, between two looks
	quickLooks    = 50                     // of a blank node that come sooner than lookInterval when others ask
	changeTimeout = 5 * time.Second        // for a change of the configuration to be committed
	sayInterval   = 10 * time.Second       // between two log lines about what a node waits for

	// candidacy is longer than a candidate can know of a leader whose messages it gets. Raft lets a server that was told to
	// stand for election hear of another one's, and go on standing. If that leader dies at once, nobody tells the server,
	// which for its sake grants no pre-vote to anybody, and may get none. To stand again makes it forget.
	candidacy = 3 * heartbeatTimeout
)

// newServerName returns a name for a new state of a node. Node ids hold no '#'.
func newServerName(node string) string { return node + "#" + rand.Text()[:13] }

// nodeOf returns the node whose state a server is. A name without '#' is a node's own.
func nodeOf(server string) string {
	node, _, _ := strings.Cut(server, "#")
	return node
}

// identity says which server the state is. Format: JSON, under one key of the stable store, so that a crash never leaves
// a part of it.
type identity struct {
	Version int    `json:"version"`
	Server  string `json:"server"`
	Cluster string `json:"cluster"` // the name of the server that bootstrapped it, "" for none

	// Bootstrap is, in the server that bootstrapped the cluster, the configuration with which the log begins.
	Bootstrap []member `json:"bootstrap,omitempty"`
}

const identityVersion = 1

var keyIdentity = []byte("Identity")

// keyCurrentTerm is where Raft keeps its term.
var keyCurrentTerm = []byte("CurrentTerm")

// member is a server of Raft's configuration.
type member struct {
	Server  string `json:"server"`
	Address string `json:"address"` // host:port
	Voter   bool   `json:"voter"`
}

// membersOf returns the servers of a configuration. Their addresses there are <server>@<host:port>: Raft refuses two
// servers with one address, and a new server stands beside the old one of its node for a moment.
func membersOf(c raft.Configuration) []member {
	var members []member
	for _, s := range c.Servers {
		_, address, _ := strings.Cut(string(s.Address), "@")
		members = append(members, member{string(s.ID), address, s.Suffrage == raft.Voter})
	}
	return members
}

func raftAddress(server, address string) raft.ServerAddress {
	return raft.ServerAddress(server + "@" + address)
}

// membership is which server this node is, of which cluster, and how far it has come.
type membership struct {
	cfg    *Config
	log    hclog.Logger
	stable raft.StableStore
	wake   chan struct{} // holds one token: another node has asked, so a look at the others is worth it
	stage  atomic.Int32  // asked for by each read

	mu       sync.Mutex // guards what follows
	id       identity
	waitsFor string    // for people
	said     time.Time // when the log was last told
	resizing string    // for people: why the configuration is not what the list says, as the leader sees it
}

func newMembership(cfg *Config, log hclog.Logger) *membership {
	return &membership{cfg: cfg, log: log, wake: make(chan struct{}, 1), waitsFor: "the storage is being opened"}
}

// open reads which server the storage is, or makes it a new one if it holds nothing.
func (m *membership) open(st *storage) error {
	m.stable = st.stable
	stored, err := st.stable.Get(keyIdentity)
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("read the server's name: %w", err)
	}
	if len(stored) == 0 {
		if err := checkEmpty(m.cfg, st); err != nil {
			return err
		}
		return m.become(identity{Server: newServerName(m.cfg.NodeID)})
	}
	var id identity
	if err := json.Unmarshal(stored, &id); err != nil {
		return fmt.Errorf("STATE_DIR %q: the server's name is damaged: %w", m.cfg.StateDir, err)
	}
	if id.Version != identityVersion {
		return fmt.Errorf("STATE_DIR %q is of another version of this service (%d, and this one reads %d); nothing was changed",
			m.cfg.StateDir, id.Version, identityVersion)
	}
	if node := nodeOf(id.Server); node != m.cfg.NodeID {
		return fmt.Errorf("STATE_DIR %q holds the state of node %q, and this is node %q: set NODE_ID back to %q, or start without "+
			"state (another STATE_DIR) and restore a backup; nothing was changed", m.cfg.StateDir, node, m.cfg.NodeID, node)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.id = id
	m.advance(stageBlank)
	return nil
}

// checkEmpty refuses a storage that holds something but no server's name.
func checkEmpty(cfg *Config, st *storage) error {
	last, _, err := st.lastEntry()
	if err != nil {
		return err
	}
	term, err := st.stable.GetUint64(keyCurrentTerm)
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("read the term: %w", err)
	}
	if last > 0 || term > 0 {
		return fmt.Errorf("STATE_DIR %q holds the state of the first version of this service, or of another program, which this version "+
			"does not read; nothing was changed: move it away, or set another STATE_DIR", cfg.StateDir)
	}
	return nil
}

// become stores which server this is, and only then lets it be known.
func (m *membership) become(id identity) error {
	id.Version = identityVersion
	b, err := json.Marshal(id)
	if err == nil {
		err = m.stable.Set(keyIdentity, b)
	}
	if err != nil {
		return fmt.Errorf("store the server's name: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.id = id
	m.advance(stageBlank)
	return nil
}

func (m *membership) identity() identity {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.id
}

func (m *membership) server() string { return m.identity().Server }

// cluster returns the id of this server's cluster, "" while it has none.
func (m *membership) cluster() string { return m.identity().Cluster }

func (m *membership) at() stage { return stage(m.stage.Load()) }

func (m *membership) advance(to stage) { m.stage.Store(int32(to)) }

// waits says, to people, what this node is waiting for: in /readyz, and now and then in the log.
func (m *membership) waits(reason string) {
	m.mu.Lock()
	m.waitsFor = reason
	say := time.Since(m.said) > sayInterval
	if say {
		m.said = time.Now()
	}
	m.mu.Unlock()
	if say {
		m.log.Info("waiting", "reason", reason)
	}
}

func (m *membership) reason() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waitsFor
}

// setResize takes note of why the configuration is not what the list says, and logs what is new.
func (m *membership) setResize(reason string) {
	m.mu.Lock()
	before := m.resizing
	m.resizing = reason
	m.mu.Unlock()
	if reason != before && reason != "" {
		m.log.Info("the membership is not what the list says", "reason", reason)
	} else if reason != before {
		m.log.Info("the membership is what the list says")
	}
}

func (m *membership) resize() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resizing
}

// poke has this node look at the others soon.
func (m *membership) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// pause waits for interval, or only for least if somebody pokes. It returns false when ctx has ended.
func (m *membership) pause(ctx context.Context, least, interval time.Duration) bool {
	rest, timer := time.NewTimer(least), time.NewTimer(interval)
	defer rest.Stop()
	defer timer.Stop()
	select {
	case <-rest.C:
	case <-ctx.Done():
		return false
	}
	select {
	case <-m.wake:
	case <-timer.C:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// allEmpty says whether every node of PEERS answers, names the same PEERS and holds nothing.
func (v view) allEmpty() bool {
	return !slices.ContainsFunc(v.peers, func(p Peer) bool {
		info, answers := v.answers[p.ID]
		return !answers || info.LastIndex > 0 || !slices.Equal(info.Peers, v.mine().Peers)
	})
}

// bootstrapper returns the node that bootstraps the cluster.
func (v view) bootstrapper() string { return peerIDs(v.peers)[0] }

// toJoin returns the cluster that a server of none is to join, "" while there is none. If every node of PEERS answers and
// holds nothing, it is that of the node that bootstraps; else that of a leader in whose configuration this node is.
func (v view) toJoin() string {
	for _, info := range v.answers {
		isMember := slices.ContainsFunc(info.Members, func(m member) bool { return nodeOf(m.Server) == v.self })
		willBe := slices.Equal(info.Peers, v.mine().Peers) && v.named(v.self)
		if info.Ready && (isMember || willBe) {
			return info.Cluster
		}
	}
	bootstrapped := v.answers[v.bootstrapper()].Server
	if v.self == v.bootstrapper() || !v.allEmpty() {
		return ""
	}
	for _, p := range v.peers {
		if c := v.answers[p.ID].Cluster; c != "" && c != bootstrapped {
			return ""
		}
	}
	return bootstrapped
}

// toBootstrap returns the configuration with which this server is to begin a cluster, nil while it is not: every other
// node of PEERS must have joined that cluster.
func (v view) toBootstrap() []member {
	if v.self != v.bootstrapper() || v.mine().Cluster != "" || !v.allEmpty() {
		return nil
	}
	var members []member
	for _, p := range v.peers {
		info := v.answers[p.ID]
		if p.ID != v.self && info.Cluster != v.mine().Server {
			return nil
		}
		members = append(members, member{info.Server, p.Addr, true})
	}
	return members
}

// hasBegun says whether somebody that answers holds an entry of this server's cluster.
func (v view) hasBegun() bool {
	for _, info := range v.answers {
		if info.Cluster != "" && info.Cluster == v.mine().Cluster && info.LastIndex > 0 {
			return true
		}
	}
	return false
}

// neverBegan says whether this server has joined a cluster that will never begin: every node of PEERS answers and holds
// nothing, and the server that would have begun it is gone.
func (v view) neverBegan() bool {
	bootstrapper, answers := v.answers[nodeOf(v.mine().Cluster)]
	return answers && bootstrapper.Server != v.mine().Cluster && v.allEmpty()
}

func isVoter(m member) bool { return m.Voter }

// begin returns once this server is of a cluster that has begun.
func (s *Store) begin() error {
	m := s.membership
	abandoned := false // in the last look it had joined a cluster that will never begin
	least := lookPause
	for looks := 0; looks == 0 || m.pause(s.ctx, least, lookInterval); looks++ {
		if looks == quickLooks {
			least = lookInterval
		}
		id := m.identity()
		if id.Bootstrap != nil {
			return nil
		}
		v := s.lookAround(s.ctx)
		before := abandoned
		abandoned = v.neverBegan()
		switch {
		case v.hasBegun():
			return nil
		case id.Cluster == "" && v.toJoin() != "":
			if err := m.become(identity{Server: id.Server, Cluster: v.toJoin()}); err != nil {
				return err
			}
			s.log.Info("joined the cluster", "cluster", v.toJoin())
			m.poke()
		case v.toBootstrap() != nil:
			if err := m.become(identity{Server: id.Server, Cluster: id.Server, Bootstrap: v.toBootstrap()}); err != nil {
				return err
			}
			s.log.Info("bootstraps the cluster", "cluster", id.Server, "nodes", v.mine().Peers)
		case abandoned && before:
			s.log.Warn("the cluster that this node had joined never began; the node goes on as a new server", "cluster", id.Cluster)
			if err := m.become(identity{Server: newServerName(s.cfg.NodeID)}); err != nil {
				return err
			}
		}
		m.waits(v.String())
	}
	return s.ctx.Err()
}

// tend looks after the membership while Raft runs: as the leader it replaces servers that are gone, and without a leader it
// finds out why there is none.
func (s *Store) tend() {
	var (
		m       = s.membership
		term    uint64                    // of found
		found   = make(map[string]uint64) // by server of the configuration: what was committed when this leader first saw it there
		foreign string                    // as last logged
		last    verdict                   // of the last look without a leader
		torn    = time.Now()              // since when this node has been a candidate that knows of a leader
	)
	for interval := lookInterval; m.pause(s.ctx, lookPause, interval); {
		interval = lookInterval
		state := s.State()
		if state.State != "candidate" || state.Leader == "" {
			torn = time.Now()
		}
		switch {
		case time.Since(torn) > candidacy:
			s.transport.campaign(s.ctx.Done())
			torn = time.Now()
		case s.leadsReady():
			if term != state.Term {
				term = state.Term
				clear(found)
			}
			interval = tendInterval
			v := s.lookAround(s.ctx)
			if now := v.foreign(); now != foreign {
				foreign = now
				s.log.Warn("nodes of other clusters", "nodes", foreign, "this-cluster", m.cluster())
			}
			if s.replace(v, found) {
				interval = lookPause
			}
		case state.Leader == "":
			v := s.lookAround(s.ctx)
			if s.Leader() != "" {
				continue
			}
			m.waits(v.String())
			before := last
			last = v.verdict()
			if err := s.heed(last, last == before); err != nil {
				s.end(err)
				return
			}
		default:
			last = mayGoOn
		}
		if members := s.members(); len(members) > 0 {
			s.network.closeOthers(members, s.State().server)
		}
	}
}

// verdict is what a node that sees no leader makes of its own server.
type verdict int

const (
	mayGoOn     verdict = iota
	neverBegan          // its cluster will never begin
	isRemainder         // a majority of the voters is gone, and it has the most complete log of those that are left
	isNeeded            // a majority of the voters answers
)

func (v view) verdict() verdict {
	if v.neverBegan() {
		return neverBegan
	}
	lost, present, voters := v.voters(v.self)
	switch {
	case isMajority(voters-len(lost), voters):
		if isMajority(present, voters) {
			return isNeeded
		}
	case len(lost) > 0 && v.mostComplete() == v.self:
		return isRemainder
	}
	return mayGoOn
}

// heed does what a verdict asks for, once it has been the same twice in a row. An error ends the process.
func (s *Store) heed(v verdict, again bool) error {
	retired := s.membership.at() == stageRetired
	switch {
	case v == isNeeded && retired:
		return errors.New("a majority of the nodes has its state again: start this node again, which had stopped taking part")
	case v == neverBegan && again:
		return errors.New("the cluster that this node had joined never began, and the node holds nothing: start it again")
	case v == isRemainder && again && !retired:
		return s.retire()
	}
	return nil
}

// retire stops Raft and executes all that the log holds, also what nobody may have committed: nothing can be committed any more,
// and what stale reads answer from now on is all there is to save. Nothing that is stored changes, so a restart undoes it.
func (s *Store) retire() error {
	s.log.Warn("a majority of the nodes has lost its state: this node takes part in nothing any more, and executes all of its log to be saved")
	s.membership.advance(stageRetired)
	stopped := make(chan error, 1)
	stop := s.raft.Load().Shutdown()
	go func() { stopped <- stop.Error() }() // until Raft has stopped
	select {
	case err := <-stopped:
		if err != nil {
			return fmt.Errorf("stop raft: %w", err)
		}
	case <-s.ctx.Done():
		return nil
	}
	last, err := s.storage.logs.LastIndex()
	for i := s.replica.applied.load() + 1; err == nil && i <= last; i++ {
		var entry raft.Log
		if err = s.storage.logs.GetLog(i, &entry); err == nil && entry.Type == raft.LogCommand {
			s.replica.Apply(&entry)
		}
	}
	if err != nil {
		return fmt.Errorf("execute the log: %w", err)
	}
	s.replica.applied.advance(last)
	return nil
}

// replace takes the next step of the membership, if there is one. It returns true if the next look should come soon.
func (s *Store) replace(v view, found map[string]uint64) (soon bool) {
	applied := s.replica.applied.load()
	prevIndex, err := s.storage.configurationIndex()
	if err != nil {
		return false
	}
	prevIndex = max(prevIndex, s.replica.config.load()) // a ready leader knows one
	info := v.mine()
	info.Members = s.members() // read after prevIndex: if it has changed since, Raft refuses the step
	v.answers[v.self] = info
	for _, m := range info.Members {
		if _, known := found[m.Server]; !known {
			found[m.Server] = applied
		}
		soon = soon || !m.Voter
	}
	s.versions.note(v, s.State().Term, info.Members)
	p := v.plan(s.list.removes(), func(server string, applied uint64) bool { return applied >= found[server] })
	s.membership.setResize(p.waitsFor())
	step, there := p.next()
	if !there && p.handsOver() {
		s.log.Info("this leader is not in the list: it hands its leadership over")
		s.handOver(s.ctx, s.raft.Load())
	}
	if !there {
		return soon
	}
	r := s.raft.Load()
	var future raft.IndexFuture
	id, address := raft.ServerID(step.Server), raftAddress(step.Server, step.Address)
	switch step.command {
	case raft.AddVoter:
		future = r.AddVoter(id, address, prevIndex, changeTimeout)
	case raft.AddNonvoter:
		future = r.AddNonvoter(id, address, prevIndex, changeTimeout)
	default:
		future = r.RemoveServer(id, prevIndex, changeTimeout)
	}
	done := make(chan error, 1)
	go func() { done <- future.Error() }() // until Raft has an answer, or has shut down
	select {
	case err = <-done:
	case <-time.After(changeTimeout):
		err = errors.New("no majority has it yet")
	case <-s.ctx.Done():
		return false
	}
	s.log.Info("membership", "change", step.command, "node", nodeOf(step.Server), "server", step.Server, "error", err)
	return true
}

// campaign has the server that has begun the cluster stand for election, once a majority of the nodes can vote.
func (s *Store) campaign() {
	for deadline := time.Now().Add(heartbeatTimeout); time.Now().Before(deadline); {
		running, v := 0, s.lookAround(s.ctx)
		for _, info := range v.answers {
			if info.Running {
				running++
			}
		}
		if running > len(v.peers)/2 || !s.membership.pause(s.ctx, lookPause, lookPause) {
			break
		}
	}
	s.transport.campaign(s.ctx.Done())
}
