package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
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
// failed for good, which is the case that Raft's own proof covers. The leader puts the new server in the old one's
// place by Raft's membership changes. People see node ids only.
//
// A server moves through these stages, never back:
//
//	starting  the storage is being opened
//	forming   it runs no Raft: it is in no cluster, or in one of which nobody that answers holds an entry yet
//	running   it is in a cluster that has begun, and runs Raft
//	caught up since this start it has executed all that a leader had committed
//
// Nothing is decided about a node that does not answer. "Membership" in DESIGN.md has the rules and why they are safe.
type stage int

const (
	stageStarting stage = iota
	stageForming
	stageRunning
	stageCaughtUp
)

func (s stage) String() string {
	return [...]string{"starting", "forming", "running", "running"}[s]
}

// How often a node asks the others who they are.
const (
	formInterval   = 200 * time.Millisecond // while it is forming
	manageInterval = 500 * time.Millisecond // while it leads, or sees no leader
	changeInterval = 100 * time.Millisecond // while it leads and a server is being replaced
)

const (
	changeTimeout  = 5 * time.Second  // for a change of the configuration to be committed
	reasonInterval = 10 * time.Second // between two log lines about what a node waits for

	// maxCandidacy is longer than a candidate can know of a leader whose messages it gets. Raft lets a server that was
	// told to stand for election hear of another leader, and go on standing. If that leader dies at once, nobody tells
	// the server. It grants no pre-vote to anybody, for the sake of that leader, and may get none. To stand again makes
	// it forget.
	maxCandidacy = 3 * heartbeatTimeout
)

// newServerName returns a name for a new state of a node. Node ids hold no '#'.
func newServerName(node string) string { return node + "#" + rand.Text()[:13] }

// nodeOf returns the node whose state a server is. A name without '#' is a node's own.
func nodeOf(server string) string {
	node, _, _ := strings.Cut(server, "#")
	return node
}

// identity says which server the state is. Format: JSON, under one key of the stable store, so that a crash never
// leaves a part of it.
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

func isVoter(m member) bool { return m.Voter }

// voting returns the members that vote.
func voting(members []member) []member {
	return slices.DeleteFunc(slices.Clone(members), func(m member) bool { return !m.Voter })
}

// nodesOf returns the nodes of members, in the order of their ids.
func nodesOf(members []member) []string {
	nodes := make([]string, 0, len(members))
	for _, m := range members {
		nodes = append(nodes, nodeOf(m.Server))
	}
	slices.Sort(nodes)
	return slices.Compact(nodes)
}

// isMajority says whether n are more than half of so many.
func isMajority(n, of int) bool { return n > of/2 }

// count returns of how many of s something is so.
func count[T any](s []T, so func(T) bool) (n int) {
	for _, one := range s {
		if so(one) {
			n++
		}
	}
	return n
}

func raftAddress(server, address string) raft.ServerAddress {
	return raft.ServerAddress(server + "@" + address)
}

// membership is which server this node is, in which cluster, and how far it has come.
type membership struct {
	cfg    *Config
	log    hclog.Logger
	stable raft.StableStore
	stage  atomic.Int32 // asked for by each read

	seen  sight // of this leader; for manageMembers alone
	found atomic.Pointer[findings]

	mu       sync.Mutex // guards what follows
	id       identity
	waitsFor string    // for people
	logged   time.Time // when waitsFor was last logged
}

// sight is when a leader first saw the configuration that there is. A server that has executed what was committed then
// has all that was committed before it became a member.
type sight struct {
	term      uint64 // of the leader
	config    uint64 // index of the configuration
	committed uint64 // index up to which the leader had committed the log
}

// findings are what a leader has made of the last answers of all nodes, for those who ask it. What it found in an
// earlier term may be wrong. Example: node1 leads, node2 takes over, node3 goes back to an older binary, and node1
// leads again.
type findings struct {
	term   uint64
	lowest byte   // the newest version of commands that all voters know; 0 if one did not answer
	behind string // a node that knows no more than that
	resize string // for people: what keeps the configuration from being what the list says, "" for nothing
}

func newMembership(cfg *Config, log hclog.Logger) *membership {
	m := &membership{cfg: cfg, log: log, waitsFor: "the storage is being opened"}
	m.found.Store(new(findings))
	return m
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
		return m.store(identity{Server: newServerName(m.cfg.NodeID)})
	}
	var id identity
	if err := json.Unmarshal(stored, &id); err != nil {
		return fmt.Errorf("STATE_DIR %q: the server's name is damaged: %w", m.cfg.StateDir, err)
	}
	if id.Version != identityVersion {
		return fmt.Errorf("STATE_DIR %q is of another version of this service (%d, and this one reads %d); "+
			"nothing was changed", m.cfg.StateDir, id.Version, identityVersion)
	}
	if node := nodeOf(id.Server); node != m.cfg.NodeID {
		return fmt.Errorf("STATE_DIR %q holds the state of node %q, and this is node %q: set NODE_ID back to %q, "+
			"or start without state (another STATE_DIR) and restore a backup; nothing was changed",
			m.cfg.StateDir, node, m.cfg.NodeID, node)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.id = id
	m.advance(stageForming)
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
		return fmt.Errorf("STATE_DIR %q holds the state of the first version of this service, or of another program, "+
			"which this version does not read; nothing was changed: move it away, or set another STATE_DIR",
			cfg.StateDir)
	}
	return nil
}

// store stores which server this is, and only then lets it be known.
func (m *membership) store(id identity) error {
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
	m.advance(stageForming)
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

// setReason says, to people, what this node is waiting for: in /readyz, and now and then in the log.
func (m *membership) setReason(reason string) {
	m.mu.Lock()
	m.waitsFor = reason
	due := time.Since(m.logged) > reasonInterval
	if due {
		m.logged = time.Now()
	}
	m.mu.Unlock()
	if due {
		m.log.Info("waiting", "reason", reason)
	}
}

func (m *membership) reason() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waitsFor
}

// Methods of directory and localNode: what network.go and transport.go must know of their node.

// address says where a node listens.
func (s *Store) address(node string) (addr string, known bool) {
	addr, known = s.addresses()[node]
	return addr, known
}

// self returns which server this node is, and in which cluster: "" for none.
func (s *Store) self() (server, cluster string) {
	id := s.membership.identity()
	return id.Server, id.Cluster
}

// authorize lets Raft's messages and calls in only while Raft runs.
func (s *Store) authorize(h hello) error {
	if h.kind != kindAsk && s.raft.Load() == nil {
		return errNoRaft
	}
	return nil
}

// form returns once this server is in a cluster that has begun. Until then it asks all nodes of PEERS again and again,
// and joins a cluster or begins one as soon as their answers allow it.
func (s *Store) form() error {
	m := s.membership
	for ; s.ctx.Err() == nil; sleep(s.ctx, formInterval) {
		id := m.identity()
		if id.Bootstrap != nil {
			return nil
		}
		v := s.askAll(s.ctx)
		switch cluster, bootstrap := v.toJoin(), v.toBootstrap(); {
		case v.hasBegun():
			return nil
		case id.Cluster == "" && cluster != "":
			s.log.Info("joins the cluster", "cluster", cluster)
			if err := m.store(identity{Server: id.Server, Cluster: cluster}); err != nil {
				return err
			}
		case bootstrap != nil:
			s.log.Info("bootstraps the cluster", "cluster", id.Server, "nodes", v.peers)
			return m.store(identity{Server: id.Server, Cluster: id.Server, Bootstrap: bootstrap})
		}
		m.setReason(v.String())
	}
	return s.ctx.Err()
}

// bootstrap begins a log with the cluster's first configuration, if it is empty, as raft.BootstrapCluster does. That
// one however refuses to go on where a crash between its two writes has left it.
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
		server := raft.Server{ID: raft.ServerID(m.Server), Address: raftAddress(m.Server, m.Address)}
		c.Servers = append(c.Servers, server)
	}
	entry := &raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c)}
	return true, st.logs.StoreLog(entry)
}

// firstElection has the server that has begun the cluster stand for election, when the others have had time to see
// that, and to run Raft. Raft tries again where they have not.
func (s *Store) firstElection() {
	if len(s.members()) > 1 {
		sleep(s.ctx, 2*formInterval)
	}
	s.transport.campaign(s.ctx.Done())
}

// manageMembers looks after the membership until the Store shuts down. A leader replaces servers that have lost their
// state, and a node without a leader finds out why there is none. It begins before Raft runs: while this node reads a
// large state, those that it asks hear that it is there (see holdsBack).
func (s *Store) manageMembers() {
	candidate := time.Now() // since when this node has been a candidate that knows of a leader
	for interval := manageInterval; sleep(s.ctx, interval); {
		interval = manageInterval
		state := s.State()
		if state.State != "candidate" || state.Leader == "" {
			candidate = time.Now()
		}
		switch {
		case time.Since(candidate) > maxCandidacy:
			s.transport.campaign(s.ctx.Done())
			candidate = time.Now()
		case s.leadsReady():
			if s.replaceNext(state.Term) {
				interval = changeInterval
			}
		case state.Leader == "":
			if v := s.askAll(s.ctx); s.Leader() == "" && s.raft.Load() != nil {
				s.membership.setReason(v.String())
			}
		}
		if members := s.members(); len(members) > 0 {
			s.network.closeOthers(members, s.State().server)
		}
	}
}

// replaceNext has this leader of a term take the next step by which servers are replaced, if one is due. It returns
// true if the one after may be due soon.
func (s *Store) replaceNext(term uint64) (soon bool) {
	m, v := s.membership, s.askAll(s.ctx)
	snapshot, err := s.storage.snapshots.newest()
	mine, answers := v.answers[v.self]
	if err != nil || !answers { // its disk hangs
		return false
	}
	now := sight{term, max(snapshot.ConfigurationIndex, s.replica.config.load()), s.raft.Load().CommitIndex()}
	if now.term != m.seen.term || now.config != m.seen.config {
		m.seen = now
	}
	mine.Members = s.members() // read after now.config: if it has changed since, Raft refuses the step
	v.answers[v.self] = mine
	p := v.plan(s.list.removes(), m.seen.committed)
	m.note(p, term)
	step, due := p.next()
	switch {
	case due:
		err := s.changeMembers(step, now.config)
		s.log.Info("membership", "change", step.command, "server", step.Server, "error", err)
	case p.handsOver():
		s.log.Info("this leader is to leave the cluster, and hands leadership over")
		s.handOver(s.ctx, s.raft.Load())
	}
	return due || len(voting(mine.Members)) < len(mine.Members)
}

// note takes note of what this leader has found, and logs what is new to people.
func (m *membership) note(p plan, term uint64) {
	f := &findings{term: term, resize: p.waitsFor()}
	f.lowest, f.behind = p.lowestVersion()
	switch before := m.found.Swap(f); f.resize {
	case before.resize:
	case "":
		m.log.Info("the membership is what the list of nodes says")
	default:
		m.log.Info("the membership is not what the list of nodes says", "waits-for", f.resize)
	}
}

// changeMembers returns when a change of the configuration that has index prevIndex is committed. After an error it may
// be so later.
func (s *Store) changeMembers(step change, prevIndex uint64) error {
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
	ctx, cancel := context.WithTimeout(s.ctx, changeTimeout)
	defer cancel()
	return within(ctx, future.Error)
}
