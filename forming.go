package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	formInterval = 100 * time.Millisecond // between two looks at the other nodes, by one that has no cluster
	stayInterval = 500 * time.Millisecond // by one that has a cluster but no leader
	formPatience = 30 * time.Second       // a majority without state waits so long for nodes that do not answer
	grantHold    = 5 * time.Second        // what a node promises to one founder holds for so long
	askTimeout   = 1 * time.Second
	sayInterval  = 10 * time.Second // between two log lines about what is being waited for
)

// keyCluster is where the stable store has this node's standing: a byte that says which, for all but members an index (8
// bytes), and the cluster's id. A crash may leave anything else beside it: what it says holds.
var keyCluster = []byte("Cluster")

const (
	standFounder = '+' // it formed the cluster, and has nothing yet but what its log began with
	standMember  = '-' // a full member
	standGated   = '~' // the leader is bringing it up: see gate.go
)

// standing says of which cluster a node is, and as what.
type standing struct {
	kind    byte
	index   uint64 // that a founder's log began with; that a gated node must reach to vote
	cluster string // the id, "" while the node is of none
}

func (s standing) encode() []byte {
	b := []byte{s.kind}
	if s.kind != standMember {
		b = binary.BigEndian.AppendUint64(b, s.index)
	}
	return append(b, s.cluster...)
}

func decodeStanding(b []byte) (s standing, err error) {
	if len(b) == 0 {
		return standing{}, nil
	}
	s.kind, b = b[0], b[1:]
	if (s.kind == standFounder || s.kind == standGated) && len(b) > 8 {
		s.index, b = binary.BigEndian.Uint64(b), b[8:]
	} else if s.kind != standMember || len(b) == 0 {
		return standing{}, errors.New("the cluster id is damaged")
	}
	s.cluster = string(b)
	return s, nil
}

// formation knows of which cluster this node is. For a node without state it finds that out, or forms a cluster; Raft
// runs only after that, so nothing that Raft stores was ever said under another id. "Coming back with nothing" in
// DESIGN.md has the argument why no acknowledged write is lost for it.
type formation struct {
	cfg   *Config
	log   hclog.Logger
	store *storage      // set by open
	peers *peers        // set before find
	look  chan struct{} // holds one token: a peer has spoken, so another look at the others is worth it
	leads func() bool   // this node is the leader

	patience time.Duration // formPatience

	mu        sync.Mutex // guards what follows
	standing  standing
	granted   string // the node that may form a cluster with this one
	grantedAt time.Time
	waitsFor  string // for people
}

func newFormation(cfg *Config, log hclog.Logger, leads func() bool) *formation {
	return &formation{cfg: cfg, log: log, leads: leads, patience: formPatience, look: make(chan struct{}, 1), waitsFor: "the storage is being opened"}
}

// open reads what the storage knows of a cluster.
func (f *formation) open(st *storage) error {
	f.store = st
	stored, err := st.stable.Get(keyCluster)
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("read the cluster id: %w", err)
	}
	s, err := decodeStanding(stored)
	if err != nil {
		return err
	}
	if s.cluster == "" {
		last, _, err := st.lastEntry()
		if err == nil && last > 0 {
			err = fmt.Errorf("STATE_DIR %q holds a Raft log or snapshot but no cluster id: it is of another program, or damaged; "+
				"nothing was changed: set another STATE_DIR", f.cfg.StateDir)
		}
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.standing = s
	return nil
}

func (f *formation) current() standing {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.standing
}

// id returns the id of this node's cluster, "" while it has none.
func (f *formation) id() string { return f.current().cluster }

// gated says whether this node has come back without its state and may not vote yet.
func (f *formation) gated() bool { return f.current().kind == standGated }

// become stores this node's standing, and only then lets it be known. founder is the node that has formed the cluster
// just now, "" for a cluster that has had leaders.
func (f *formation) become(s standing, founder string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.promised() && f.granted != founder {
		return errPromised
	}
	if f.standing.cluster == "" { // terms begin anew, and a vote of another cluster must not count in this one
		if err := f.store.stable.Set(keyVote, make([]byte, 8)); err != nil {
			return fmt.Errorf("clear the vote: %w", err)
		}
	}
	if err := f.store.stable.Set(keyCluster, s.encode()); err != nil {
		return fmt.Errorf("store the cluster id: %w", err)
	}
	f.standing = s
	f.log.Info("this node is of a cluster", "cluster", s.cluster, "formed-it", s.kind == standFounder, "votes", s.kind != standGated)
	return nil
}

// settle makes a founder a member, before it stores an entry beyond those that its log began with.
func (f *formation) settle(last uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.standing.kind != standFounder || last <= f.standing.index {
		return nil
	}
	s := standing{kind: standMember, cluster: f.standing.cluster}
	if err := f.store.stable.Set(keyCluster, s.encode()); err != nil {
		return err
	}
	f.standing = s
	return nil
}

// waits says, to people, what this node is waiting for.
func (f *formation) waits(reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waitsFor = reason
}

func (f *formation) reason() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waitsFor
}

// holding is what a node tells another that it has.
type holding struct {
	Cluster   string `json:"cluster"`
	LastTerm  uint64 `json:"last_term"` // of the newest entry in its log or snapshot
	LastIndex uint64 `json:"last_index"`
	// Lost says that the node counts as one without state: it has no cluster, or had lost all and has not been brought up.
	Lost bool `json:"lost"`
	// Fresh says that it formed its cluster and has stored nothing since: the cluster has had no leader yet.
	Fresh bool `json:"fresh"`
	Leads bool `json:"leads"`
	Votes bool `json:"votes"`
}

// nothing says whether, if h is all there is, nothing was ever acknowledged.
func (h holding) nothing() bool { return h.LastIndex == 0 || h.Fresh && h.LastIndex == 1 }

// beyond says whether h has the more complete log.
func (h holding) beyond(o holding) bool {
	return h.LastTerm > o.LastTerm || h.LastTerm == o.LastTerm && h.LastIndex > o.LastIndex
}

// holds returns what this node has.
func (f *formation) holds() (holding, error) {
	s := f.current()
	index, term, err := f.store.lastEntry()
	return holding{
		Cluster: s.cluster, LastTerm: term, LastIndex: index,
		// A gated node's files are not given up for another cluster: with them on disk it waits.
		Lost:  s.cluster == "" || s.kind == standGated && f.cfg.KVStore == storeMemory,
		Fresh: s.kind == standFounder,
		Leads: f.leads(),
		Votes: s.cluster != "" && s.kind != standGated,
	}, err
}

func (f *formation) handleHolding(context.Context, string, []byte) ([]byte, error) {
	h, err := f.holds()
	if err != nil {
		return nil, err
	}
	return json.Marshal(h)
}

// askAll asks nodes what they hold, all at once, and returns what was answered in time.
func (f *formation) askAll(ctx context.Context, nodes []string) map[string]holding {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex // guards answers
		answers = make(map[string]holding)
	)
	for _, node := range nodes {
		wg.Go(func() {
			var h holding
			answer, err := f.peers.call(ctx, node, opHolding, nil)
			if err == nil {
				err = json.Unmarshal(answer, &h)
			}
			if err == nil {
				err = checkClusterID(h.Cluster)
			}
			if err != nil {
				f.log.Debug("a node does not say what it holds", "node", node, "error", err)
				return
			}
			mu.Lock()
			answers[node] = h
			mu.Unlock()
		})
	}
	wg.Wait()
	return answers
}

// checkClusterID refuses what another node has made up and no hello could carry: with it this one would be left alone.
func checkClusterID(id string) error {
	if len(id) > 255 {
		return fmt.Errorf("a cluster id of %d bytes is too long", len(id))
	}
	return nil
}

// others returns the ids of the other nodes in PEERS.
func (f *formation) others() []string {
	var ids []string
	for _, p := range f.cfg.Peers {
		if p.ID != f.cfg.NodeID {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

// census is what nodes say that they hold, those that answer and this one.
type census struct {
	total    int // in PEERS
	answers  map[string]holding
	lost     []string // in order
	unfit    int      // nodes without a vote, those that are lost among them
	complete string   // the node with the most complete log, "" when none holds anything
	leader   string   // a node that says it leads
	founder  string   // a node whose cluster has had no leader yet, and with it all that there is; the first cluster's if there are several
	ruling   string   // the cluster that a majority is of
}

// census asks the other nodes.
func (f *formation) census(ctx context.Context) (census, error) {
	answers := f.askAll(ctx, f.others())
	mine, err := f.holds()
	answers[f.cfg.NodeID] = mine
	return newCensus(len(f.cfg.Peers), answers), err
}

func newCensus(total int, answers map[string]holding) census {
	c := census{total: total, answers: answers}
	members := make(map[string]int)
	for _, node := range slices.Sorted(maps.Keys(answers)) {
		h := answers[node]
		if h.Lost {
			c.lost = append(c.lost, node)
		}
		if !h.Votes {
			c.unfit++
		}
		if h.Leads {
			c.leader = node
		}
		if f := answers[c.founder]; h.Fresh && (c.founder == "" || h.beyond(f) || !f.beyond(h) && h.Cluster < f.Cluster) {
			c.founder = node
		}
		if !h.nothing() && h.beyond(answers[c.complete]) {
			c.complete = node
		}
		if members[h.Cluster]++; h.Cluster != "" && members[h.Cluster] > total/2 {
			c.ruling = h.Cluster
		}
	}
	if c.leader != "" && c.complete != "" && !answers[c.complete].beyond(answers[c.leader]) {
		c.complete = c.leader // of nodes that have as much, the one that need not change
	}
	if c.complete != "" && c.complete != c.founder {
		c.founder = ""
	}
	return c
}

// holds says whether anybody that answers has something of a cluster.
func (c census) holds(cluster string) bool {
	for _, h := range c.answers {
		if h.Cluster == cluster && !h.nothing() {
			return true
		}
	}
	return false
}

// majorityLost says whether a majority of all nodes is without state.
func (c census) majorityLost() bool { return len(c.lost) > c.total/2 }

// forms returns the node that is to form a cluster from nothing, "" if none may: a majority must be without state, and
// nobody hold any. It may be a majority only when that has been so for long.
func (c census) forms(patient bool) string {
	if c.complete == "" && c.majorityLost() && (patient || len(c.lost) == c.total) {
		return c.lost[0]
	}
	return ""
}

// What a node does that is of a cluster and sees no leader.
type stance int

const (
	staysOn    stance = iota
	isOutdone         // a majority has formed another cluster: it must not serve any more
	forgets           // it gives its cluster up, in which it has nothing to lose
	isBlank           // likewise, but others may yet answer
	isSurvivor        // it has the most complete log there is, and a majority has none
)

// stance returns what the given node should do.
func (c census) stance(node string, store string) stance {
	mine := c.answers[node]
	toLose := !mine.Lost && !mine.nothing()
	switch {
	case c.ruling != "" && c.ruling != mine.Cluster && toLose:
		return isOutdone
	case c.ruling != "" && c.ruling != mine.Cluster,
		len(c.answers) == c.total && c.complete == "" && c.founder == "", // its founder has lost all before anybody got anything
		mine.Lost && c.founder != "" && c.answers[c.founder].Cluster != mine.Cluster,
		mine.nothing() && c.complete != "" && !c.holds(mine.Cluster):
		return forgets
	case mine.nothing() && c.complete == "" && c.founder == "" && len(c.answers) > c.total/2:
		return isBlank
	case store == storeMemory && c.majorityLost() && c.complete == node:
		return isSurvivor
	}
	return staysOn
}

// String says what there is, to people.
func (c census) String() string {
	holders := 0
	for _, h := range c.answers {
		if !h.Lost && !h.nothing() {
			holders++
		}
	}
	return fmt.Sprintf("%d of %d nodes answer, %d of them without state, %d with it", len(c.answers), c.total, len(c.lost), holders)
}

// patience is how long something has been so without a break. Its zero value is ready.
type patience struct{ since time.Time }

// over says whether so has been true, in each call, for that long.
func (p *patience) over(so bool, long time.Duration) bool {
	if !so {
		p.since = time.Time{}
	} else if p.since.IsZero() {
		p.since = time.Now()
	}
	return so && time.Since(p.since) >= long
}

// admission is the answer of a leader, confirmed by a majority without the node that asks, to a node without state.
type admission struct {
	Cluster string `json:"cluster"`
	Term    uint64 `json:"term"`
	Index   uint64 `json:"index"` // with all entries up to here the node may vote
}

// find returns once this node is of a cluster. admit asks a leader to bring this node up.
func (f *formation) find(ctx context.Context, admit func(ctx context.Context, leader string) (admission, error)) error {
	var ripe patience
	var said time.Time // when the log was last told what is being waited for
	for f.id() == "" {
		c, err := f.census(ctx)
		if err != nil {
			return err
		}
		patient := ripe.over(c.majorityLost() && c.complete == "", f.patience)
		switch {
		case c.leader != "" && f.joinLeader(ctx, c.leader, admit):
		case c.founder != "":
			// That cluster had had no leader when its founder answered, so nothing that this node could have said in it and
			// forgotten counts.
			err = f.become(standing{kind: standMember, cluster: c.answers[c.founder].Cluster}, c.founder)
		case c.forms(patient) == f.cfg.NodeID:
			if id, granted := f.seekGrants(ctx, c); granted {
				err = f.become(standing{kind: standFounder, index: 1, cluster: id}, f.cfg.NodeID)
			}
		}
		if err != nil && !errors.Is(err, errPromised) {
			return err
		}
		f.waits("the node is of no cluster yet: " + f.advice(c))
		if time.Since(said) > sayInterval && f.id() == "" {
			f.log.Info("looking for the cluster", "waits-for", f.advice(c))
			said = time.Now()
		}
		if !f.pause(ctx, formInterval) {
			return ctx.Err()
		}
	}
	return nil
}

// joinLeader makes this node one that a leader brings up, if that leader is confirmed. Whatever this node acknowledged
// or voted for before it lost it was in this term or an earlier one, so it must not listen to earlier leaders.
func (f *formation) joinLeader(ctx context.Context, leader string,
	admit func(ctx context.Context, leader string) (admission, error),
) bool {
	a, err := admit(ctx, leader)
	if err == nil {
		err = f.store.stable.SetUint64(keyCurrentTerm, a.Term)
	}
	if err == nil {
		err = f.become(standing{kind: standGated, index: a.Index, cluster: a.Cluster}, "")
	}
	if err != nil {
		f.log.Debug("a node that says it leads does not bring this one up", "node", leader, "error", err)
	}
	return err == nil
}

// keyCurrentTerm is where Raft keeps its term.
var keyCurrentTerm = []byte("CurrentTerm")

// advice says what a node without a leader waits for, and what people can do about it.
func (f *formation) advice(c census) string {
	switch {
	case c.majorityLost() && c.complete == "":
		return fmt.Sprintf("%v; all must answer, or a majority for %v; then node %s forms the cluster", c, f.patience, c.lost[0])
	case c.majorityLost() && f.cfg.KVStore == storeMemory:
		return fmt.Sprintf("%v; when this has been so for %v, node %s, whose log is the most complete, leads with what it has",
			c, f.patience, c.complete)
	case c.unfit > c.total/2 && c.complete != "":
		return fmt.Sprintf("%v; a majority has lost its state, so what was acknowledged may be lost: start the missing nodes with their "+
			"state directories; if those are gone, stop node %s, whose log is the most complete, copy its STATE_DIR to other nodes, in the "+
			"place of what they have, until a majority has it, remove the file "+nodeIDName+" from each copy, and start them", c, c.complete)
	case c.leader != "":
		return c.String() + "; node " + c.leader + ", which leads, must be confirmed by a majority without this node"
	}
	return c.String() + "; more nodes must answer, so that nothing that was acknowledged is lost"
}

// pause waits for a while or until a peer has spoken. It returns false when ctx has ended.
func (f *formation) pause(ctx context.Context, interval time.Duration) bool {
	timer := time.NewTimer(interval)
	defer timer.Stop()
	select {
	case <-f.look:
	case <-timer.C:
	case <-ctx.Done():
		return false
	}
	return true
}

// hear is called when a peer speaks to this node in a cluster's name.
func (f *formation) hear() {
	select {
	case f.look <- struct{}{}:
	default:
	}
}

// seekGrants asks the nodes without state to let this node form a cluster with them. It returns an id for that, and
// whether at this moment a majority of all nodes is without state and will be for the rest of grantHold: what a majority
// of an older cluster acknowledged is lost by then, and the older cluster will never get anything done again.
func (f *formation) seekGrants(ctx context.Context, c census) (cluster string, granted bool) {
	began := time.Now()
	others, needed := slices.Clone(c.lost), c.total/2+1
	if i := slices.Index(others, f.cfg.NodeID); i >= 0 {
		if f.grant(f.cfg.NodeID) != nil {
			return "", false
		}
		others, needed = slices.Delete(others, i, i+1), needed-1
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	granted = majority(ctx, others, needed, func(ctx context.Context, node string) bool {
		_, err := f.peers.call(ctx, node, opGrant, nil)
		return err == nil
	})
	return rand.Text(), granted && time.Since(began) < grantHold/2 // this process may have been paused
}

var errPromised = errors.New("this node has promised another one to form a cluster with it")

// promised is called with f.mu held.
func (f *formation) promised() bool {
	return f.granted != "" && time.Since(f.grantedAt) < grantHold
}

// grant promises a node that this one is without state, and stays so for grantHold, but for a cluster which that node
// forms.
func (f *formation) grant(to string) error {
	h, err := f.holds()
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err != nil:
		return err
	case !h.Lost || f.standing.kind == standMember || f.standing.kind == standFounder:
		return errors.New("this node is of a cluster")
	case f.promised() && f.granted != to:
		return errPromised
	}
	f.granted, f.grantedAt = to, time.Now()
	return nil
}

func (f *formation) handleGrant(_ context.Context, from string, _ []byte) ([]byte, error) {
	return nil, f.grant(from)
}

// lastEntry returns the index and term of the newest entry that is stored, or that a stored snapshot covers.
func (s *storage) lastEntry() (index, term uint64, err error) {
	snapshots, err := s.snapshots.List()
	if err != nil {
		return 0, 0, fmt.Errorf("list snapshots: %w", err)
	}
	if len(snapshots) > 0 {
		index, term = snapshots[0].Index, snapshots[0].Term
	}
	last, err := s.logs.LastIndex()
	if err != nil || last <= index {
		return index, term, err
	}
	var entry raft.Log
	if err := s.logs.GetLog(last, &entry); err != nil {
		if errors.Is(err, raft.ErrLogNotFound) { // it has been replaced at this moment
			return s.lastEntry()
		}
		return 0, 0, fmt.Errorf("read log entry %d: %w", last, err)
	}
	return last, entry.Term, nil
}
