package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	formInterval = 100 * time.Millisecond // between two looks at the other nodes
	formPatience = 30 * time.Second       // a majority without state waits so long for nodes that do not answer
	grantHold    = 5 * time.Second        // a node that has let one peer form the cluster lets no other do so for so long
	askTimeout   = 1 * time.Second
	sayInterval  = 10 * time.Second // between two log lines about what is being waited for
)

// keyCluster is where the stable store has the cluster's id, and behind it a byte that is 1 on the node that formed it.
var keyCluster = []byte("Cluster")

// formation makes a node without state a member of a cluster, once: from then on its cluster id stands in its storage.
// Raft runs only after that, so nothing that Raft stores was ever said under another id. DESIGN.md has the argument why
// at most one cluster can come of it.
type formation struct {
	cfg     *Config
	log     hclog.Logger
	storage *storage
	peers   *peers
	running chan struct{}  // closed when Raft runs
	joining chan clusterID // holds the id of a cluster that formed with our consent

	mu        sync.Mutex // guards what follows
	id        clusterID
	founder   bool
	lastIndex uint64 // in the storage when it was opened
	granted   clusterID
	grantee   string
	grantedAt time.Time
	waitsFor  string // for people
}

// newFormation reads what the storage knows of a cluster.
func newFormation(cfg *Config, log hclog.Logger, st *storage, p *peers) (*formation, error) {
	f := &formation{
		cfg: cfg, log: log, storage: st, peers: p,
		running: make(chan struct{}), joining: make(chan clusterID, 1), waitsFor: "not looked yet",
	}
	var err error
	if f.lastIndex, err = st.lastIndex(); err != nil {
		return nil, err
	}
	stored, err := st.stable.Get(keyCluster)
	switch {
	case isNotFound(err) && f.lastIndex > 0:
		return nil, fmt.Errorf("STATE_DIR %q holds a Raft log or snapshot but no cluster id: it is of another program, or damaged; "+
			"nothing was changed: set another STATE_DIR", cfg.StateDir)
	case isNotFound(err):
		return f, nil
	case err != nil:
		return nil, fmt.Errorf("read the cluster id: %w", err)
	case len(stored) != len(f.id)+1:
		return nil, fmt.Errorf("the cluster id in STATE_DIR %q has %d bytes; it should have %d", cfg.StateDir, len(stored), len(f.id)+1)
	}
	f.founder = stored[len(f.id)] == 1
	copy(f.id[:], stored)
	return f, nil
}

// cluster returns the id of this node's cluster, zero while it has none.
func (f *formation) cluster() clusterID {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.id
}

// state names what a node does whose Raft is not running.
func (f *formation) state() string {
	if f.cluster() == (clusterID{}) {
		return "forming"
	}
	return "starting"
}

// reason says what a node waits for whose Raft is not running.
func (f *formation) reason() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id != (clusterID{}) {
		return "the node is reading its snapshot and log"
	}
	return "the node has no state and is looking for its cluster: " + f.waitsFor
}

// find returns once this node is of a cluster, with whether it is the one that formed it.
func (f *formation) find(ctx context.Context) (founder bool, err error) {
	if f.cluster() != (clusterID{}) {
		return f.founder, nil
	}
	if len(f.cfg.Peers) == 1 {
		return true, f.record(newClusterID(), true)
	}
	var ripe time.Time // when a majority without state was first seen
	var said time.Time
	for {
		answers := f.askAll(ctx, f.others())
		v := f.judge(answers, !ripe.IsZero() && time.Since(ripe) >= formPatience)
		if !v.majority {
			ripe = time.Time{}
		} else if ripe.IsZero() {
			ripe = time.Now()
		}
		switch {
		case v.join != clusterID{}:
			return false, f.record(v.join, false)
		case v.found:
			if id, ok := f.seekGrants(ctx, answers); ok {
				return true, f.record(id, true)
			}
		}
		f.mu.Lock()
		f.waitsFor = v.reason
		f.mu.Unlock()
		if time.Since(said) > sayInterval {
			f.log.Info("looking for the cluster", "waits-for", v.reason)
			said = time.Now()
		}
		timer := time.NewTimer(formInterval)
		select {
		case id := <-f.joining:
			timer.Stop()
			return false, f.record(id, false)
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false, ctx.Err()
		}
	}
}

// verdict is what the answers of the other nodes mean for one without state.
type verdict struct {
	join     clusterID // of this cluster it is
	found    bool      // it should form the cluster
	majority bool      // a majority, itself included, has answered that it holds nothing
	reason   string    // what it waits for, for people
}

// judge applies the contract's rules for a node without state. A node that holds no more than the entry with which a
// cluster begins holds nothing that could have been acknowledged: it is one that formed a cluster and got no further.
func (f *formation) judge(answers map[string]Status, patient bool) verdict {
	total := len(f.cfg.Peers)
	empty := []string{f.cfg.NodeID}
	members := make(map[string]int) // nodes of a cluster, by its id
	begun := ""
	holders := 0
	for id, a := range answers {
		if a.Cluster != "" {
			members[a.Cluster]++
		}
		switch {
		case a.LastIndex > 1:
			holders++
		case a.Cluster != "":
			if begun == "" || a.Cluster < begun {
				begun = a.Cluster
			}
			fallthrough
		default:
			empty = append(empty, id)
		}
	}
	for id, n := range members {
		if n > total/2 { // a majority without this node
			return verdict{join: parseClusterID(id)}
		}
	}
	v := verdict{
		majority: holders == 0 && len(empty) > total/2,
		reason:   fmt.Sprintf("%d of %d nodes answer, %d of them have state", len(answers)+1, total, holders),
	}
	switch {
	case holders > 0:
		v.reason += "; a majority of nodes with state must answer, for none of what they acknowledged to be lost"
	case len(empty) < total && !(v.majority && patient):
		if v.majority {
			v.reason += fmt.Sprintf("; a majority forms the cluster after %v", formPatience)
		}
	case begun != "":
		v.join = parseClusterID(begun)
	case slices.Min(empty) == f.cfg.NodeID:
		v.found = true
	default:
		v.reason += "; node " + slices.Min(empty) + " forms the cluster"
	}
	return v
}

// seekGrants asks the nodes without state to let this one form the cluster. It returns the new cluster's id when a
// majority does, this node included.
func (f *formation) seekGrants(ctx context.Context, answers map[string]Status) (clusterID, bool) {
	id := newClusterID()
	if f.grant(f.cfg.NodeID, id) != nil {
		return id, false
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	granted := 1
	for node := range answers {
		if _, err := f.peers.call(ctx, node, opGrant, id[:]); err == nil {
			granted++
		} else {
			f.log.Debug("a node does not let this one form the cluster", "node", node, "error", err)
		}
	}
	return id, granted > len(f.cfg.Peers)/2
}

// grant lets a node form a cluster with this one. It is not a vote, only good manners, and so is kept nowhere: two
// nodes that both form one harm nothing, but one of them will have to be emptied by hand.
func (f *formation) grant(to string, id clusterID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id != (clusterID{}) {
		return errors.New("this node is of a cluster already")
	}
	if f.grantee != "" && f.grantee != to && time.Since(f.grantedAt) < grantHold {
		return fmt.Errorf("node %s is forming the cluster", f.grantee)
	}
	f.granted, f.grantee, f.grantedAt = id, to, time.Now()
	return nil
}

func (f *formation) handleGrant(_ context.Context, from string, request []byte) ([]byte, error) {
	id, err := clusterIDOf(request)
	if err != nil {
		return nil, err
	}
	return nil, f.grant(from, id)
}

// announce tells the others that the cluster has formed and waits for those that hear it to have Raft running.
func (f *formation) announce(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	id := f.cluster()
	var wg sync.WaitGroup
	for _, node := range f.others() {
		wg.Go(func() { _, _ = f.peers.call(ctx, node, opJoin, id[:]) })
	}
	wg.Wait()
}

func (f *formation) handleJoin(ctx context.Context, _ string, request []byte) ([]byte, error) {
	id, err := clusterIDOf(request)
	if err != nil {
		return nil, err
	}
	f.hear(id)
	select {
	case <-f.running:
	case <-ctx.Done():
	}
	return nil, nil
}

// hear takes note of a cluster that speaks to this node: if it formed with this node's consent, this node is of it.
func (f *formation) hear(id clusterID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id == (clusterID{}) && id != (clusterID{}) && id == f.granted {
		select {
		case f.joining <- id:
		default:
		}
	}
}

// record makes this node one of the cluster, for good.
func (f *formation) record(id clusterID, founder bool) error {
	value := append(id[:], 0)
	if founder {
		value[len(id)] = 1
	}
	if err := f.storage.stable.Set(keyCluster, value); err != nil {
		return fmt.Errorf("store the cluster id: %w", err)
	}
	f.mu.Lock()
	f.id, f.founder = id, founder
	f.mu.Unlock()
	f.log.Info("this node is of a cluster", "cluster", id, "formed-it", founder)
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

// askAll asks nodes for their status, all at once, and returns what answered in time.
func (f *formation) askAll(ctx context.Context, nodes []string) map[string]Status {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex // guards answers
		answers = make(map[string]Status)
	)
	for _, node := range nodes {
		wg.Go(func() {
			var status Status
			answer, err := f.peers.call(ctx, node, opStatus, nil)
			if err == nil {
				err = json.Unmarshal(answer, &status)
			}
			if err != nil {
				f.log.Debug("a node gives no status", "node", node, "error", err)
				return
			}
			mu.Lock()
			answers[node] = status
			mu.Unlock()
		})
	}
	wg.Wait()
	return answers
}

func newClusterID() (id clusterID) {
	_, _ = rand.Read(id[:]) // never fails: crypto/rand
	return id
}

func clusterIDOf(b []byte) (id clusterID, err error) {
	if len(b) != len(id) {
		return id, fmt.Errorf("%d bytes are no cluster id", len(b))
	}
	return clusterID(b), nil
}

// parseClusterID reads what String wrote; anything else is no cluster.
func parseClusterID(s string) (id clusterID) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return clusterID{}
	}
	return clusterID(b)
}
