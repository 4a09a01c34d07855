package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

// keyCluster is where the stable store has the cluster's id, behind a byte that is foundedHere or foundedElsewhere.
var keyCluster = []byte("Cluster")

const (
	foundedHere      = '+'
	foundedElsewhere = '-'
)

// formation makes a node without state a member of a cluster, once: from then on its cluster id stands in its storage.
// Raft runs only after that, so nothing that Raft stores was ever said under another id. DESIGN.md has the argument why
// at most one cluster can come of it.
type formation struct {
	cfg   *Config
	log   hclog.Logger
	store *storage // set by open, as is peers
	peers *peers
	look  chan struct{} // holds one token: a peer has spoken, so another look at the others is worth it

	mu        sync.Mutex // guards what follows
	cluster   string     // the id, "" while this node is of no cluster
	founder   bool       // it was this node that formed the cluster
	granted   string     // the id under which grantee may form the cluster
	grantee   string
	grantedAt time.Time
	waitsFor  string // for people
}

func newFormation(cfg *Config, log hclog.Logger) *formation {
	return &formation{cfg: cfg, log: log, look: make(chan struct{}, 1), waitsFor: "the storage to open"}
}

// open reads what the storage knows of a cluster.
func (f *formation) open(st *storage, p *peers) error {
	f.store, f.peers = st, p
	stored, err := st.stable.Get(keyCluster)
	switch {
	case err == nil && len(stored) > 1:
		f.mu.Lock()
		f.founder, f.cluster = stored[0] == foundedHere, string(stored[1:])
		f.mu.Unlock()
		return nil
	case err != nil && !isNotFound(err):
		return fmt.Errorf("read the cluster id: %w", err)
	}
	last, err := st.lastIndex()
	if err == nil && last > 0 {
		err = fmt.Errorf("STATE_DIR %q holds a Raft log or snapshot but no cluster id: it is of another program, or damaged; "+
			"nothing was changed: set another STATE_DIR", f.cfg.StateDir)
	}
	return err
}

// id returns the id of this node's cluster, "" while it has none.
func (f *formation) id() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cluster
}

// reason says what a node waits for whose Raft is not running.
func (f *formation) reason() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cluster != "" {
		return "the node is reading its snapshot and log"
	}
	return "the node is not of a cluster yet: " + f.waitsFor
}

// find returns once this node is of a cluster, with whether it is the one that formed it.
func (f *formation) find(ctx context.Context) (founder bool, err error) {
	if f.id() != "" {
		return f.founder, nil
	}
	if len(f.cfg.Peers) == 1 {
		return true, f.join(rand.Text(), true)
	}
	var ripe, said time.Time // since when a majority without state has been there; when that was last logged
	for {
		answers := f.askAll(ctx, f.others())
		v := f.judge(answers, !ripe.IsZero() && time.Since(ripe) >= formPatience)
		switch {
		case v.join != "":
			return false, f.join(v.join, false)
		case v.form:
			if id, granted := f.seekGrants(ctx, answers); granted {
				return true, f.join(id, true)
			}
		}
		if !v.majority {
			ripe = time.Time{}
		} else if ripe.IsZero() {
			ripe = time.Now()
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
		case <-f.look:
		case <-timer.C:
		case <-ctx.Done():
			return false, ctx.Err()
		}
		timer.Stop()
	}
}

// verdict is what the answers of the other nodes mean for one without state.
type verdict struct {
	join     string // the cluster this node is of
	form     bool   // it should form the cluster
	majority bool   // a majority, itself included, holds nothing, and nobody that answers holds anything
	reason   string // what it waits for, for people
}

// judge applies the contract's rules for a node without state. A node that has a cluster but no more in its log than
// the entry with which a log begins counts as holding nothing: it formed that cluster and got no further, so nothing
// was ever acknowledged in it.
func (f *formation) judge(answers map[string]holding, patient bool) verdict {
	f.mu.Lock()
	granted := f.granted
	f.mu.Unlock()
	total := len(f.cfg.Peers)
	empty := []string{f.cfg.NodeID}
	nodesOf := make(map[string]int) // by cluster
	begun, holders := "", 0
	for node, h := range answers {
		if h.Cluster != "" {
			nodesOf[h.Cluster]++
		}
		if h.LastIndex > 1 {
			holders++
			continue
		}
		empty = append(empty, node)
		if h.Cluster != "" && (begun == "" || h.Cluster < begun) {
			begun = h.Cluster
		}
	}
	for cluster, n := range nodesOf {
		if n > total/2 || holders == 0 && cluster == granted {
			return verdict{join: cluster} // a majority without this node is of it, or it formed with our consent
		}
	}
	v := verdict{
		majority: holders == 0 && len(empty) > total/2,
		reason:   fmt.Sprintf("%d of %d nodes answer, %d of them hold state", len(answers)+1, total, holders),
	}
	switch {
	case holders > 0:
		v.reason += "; a majority that holds state must answer, for nothing that was acknowledged to be lost"
	case !v.majority || len(empty) < total && !patient:
		v.reason += fmt.Sprintf("; all must answer, or a majority for %v", formPatience)
	case begun != "":
		v.join = begun
	default:
		v.form = slices.Min(empty) == f.cfg.NodeID
		v.reason += "; node " + slices.Min(empty) + " is to form the cluster"
	}
	return v
}

// seekGrants asks the nodes that answered to let this one form the cluster. It returns the new cluster's id, and
// whether a majority, this node included, lets it.
func (f *formation) seekGrants(ctx context.Context, answers map[string]holding) (cluster string, granted bool) {
	cluster = rand.Text()
	if f.grant(f.cfg.NodeID, cluster) != nil {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return cluster, majority(ctx, slices.Collect(maps.Keys(answers)), len(f.cfg.Peers)/2, func(ctx context.Context, node string) bool {
		_, err := f.peers.call(ctx, node, opGrant, []byte(cluster))
		return err == nil
	})
}

// grant lets a node form a cluster with this one. It is good manners and no vote, so it is kept nowhere: if two nodes
// form one each nothing is lost, but one of the two will have to be emptied by hand.
func (f *formation) grant(to, cluster string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cluster != "" {
		return errors.New("this node is of a cluster already")
	}
	if f.grantee != "" && f.grantee != to && time.Since(f.grantedAt) < grantHold {
		return fmt.Errorf("node %s is forming the cluster", f.grantee)
	}
	f.granted, f.grantee, f.grantedAt = cluster, to, time.Now()
	return nil
}

func (f *formation) handleGrant(_ context.Context, from string, request []byte) ([]byte, error) {
	return nil, f.grant(from, string(request))
}

// hear is called when a peer speaks to this node in a cluster's name.
func (f *formation) hear() {
	select {
	case f.look <- struct{}{}:
	default:
	}
}

// join makes this node one of the cluster, for good.
func (f *formation) join(cluster string, founder bool) error {
	by := byte(foundedElsewhere)
	if founder {
		by = foundedHere
	}
	if err := f.store.stable.Set(keyCluster, append([]byte{by}, cluster...)); err != nil {
		return fmt.Errorf("store the cluster id: %w", err)
	}
	f.mu.Lock()
	f.cluster, f.founder = cluster, founder
	f.mu.Unlock()
	f.log.Info("this node is of a cluster", "cluster", cluster, "formed-it", founder)
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

// holding is what a node tells another that it has.
type holding struct {
	Cluster   string `json:"cluster"`
	LastIndex uint64 `json:"last_index"` // of its log or snapshot
}

func (f *formation) handleHolding(context.Context, string, []byte) ([]byte, error) {
	last, err := f.store.lastIndex()
	if err != nil {
		return nil, err
	}
	return json.Marshal(holding{f.id(), last})
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
