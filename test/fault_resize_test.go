package test

import (
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The class of faults in which the list of nodes changes.

// listInFile has a node take its list from PEERS_FILE, which setPeers writes.
func listInFile(t *testing.T, p *proc) {
	t.Helper()
	p.env["PEERS_FILE"] = filepath.Join(t.TempDir(), "peers")
}

// resize shrinks a cluster of five to three nodes, puts another node in the place of one of these, and has it grow to five
// again. Each node's file is written at a moment of its own. Meanwhile the leader is killed, or another node loses its
// state, or with boltdb both. Three nodes can spare one, so the next is lost when all that are listed are ready.
func resize(f *faulty, random *rand.Rand, leader int) {
	full := make([][]string, len(f.nodes)) // each node's entries for all
	for i, p := range f.nodes {
		full[i] = strings.Split(strings.TrimSpace(p.read(p.env["PEERS_FILE"])), "\n")
	}
	nodes := random.Perm(len(f.nodes))
	first, replaced := nodes[:3], slices.Concat(nodes[:2], nodes[3:4])
	all := slices.Clone(nodes)
	for _, list := range [][]int{first, replaced, all} {
		slices.Sort(list)
		f.resizeTo(random, full, list, leader)
		if f.Violations.Load() > 0 {
			return
		}
		leader = f.leader()
	}
}

// resizeTo brings a cluster to a list of nodes. full has each node's entries for all nodes.
func (f *faulty) resizeTo(random *rand.Rand, full [][]string, list []int, leader int) {
	f.t.Logf("after %v: the list becomes %v", f.Now(), list)
	for _, i := range random.Perm(len(f.nodes)) {
		var lines []string
		for _, j := range list {
			lines = append(lines, full[i][j])
		}
		if err := os.WriteFile(f.nodes[i].env["PEERS_FILE"], []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			f.t.Error(err)
		}
		if f.isDown(i) && slices.Contains(list, i) {
			f.start(i)
		}
		f.sleep(random, 1, 800)
	}
	f.sleep(random, 500, 2500) // a file counts after two seconds
	wiped := f.follower(random, leader)
	kills, wipes := random.IntN(2) == 0, random.IntN(2) == 0
	if kills && !f.isDown(leader) {
		f.end(os.Kill, leader)
	}
	if wipes && !f.isDown(wiped) && (f.store == storeBolt || !kills) {
		f.wipe(wiped)
	}
	f.sleep(random, 1, 1500)
	for i, p := range f.nodes { // a node that is in no list starts only with state
		_, err := os.Stat(filepath.Join(p.env["STATE_DIR"], dbName))
		if f.isDown(i) && (slices.Contains(list, i) || err == nil) {
			f.start(i)
		}
	}
	since := f.Now()
	f.await("the membership to be the list", since, readyLimit, func() bool { return f.isResized(list) })
	f.awaitReady(since, list...)
}

// isDown says whether a node does not run.
func (f *faulty) isDown(i int) bool {
	select {
	case <-f.nodes[i].ended:
		return true
	default:
		return false
	}
}

// isResized says whether all nodes of a list say that the list is the membership.
func (f *faulty) isResized(list []int) bool {
	var names []string
	for _, i := range list {
		names = append(names, f.nodes[i].name)
	}
	return !slices.ContainsFunc(list, func(i int) bool {
		var s struct {
			Membership struct{ Wanted, Actual []string }
		}
		a, err := f.ask(i, http.MethodGet, "/status", "")
		return err != nil || json.Unmarshal([]byte(a.body), &s) != nil ||
			!slices.Equal(s.Membership.Wanted, names) || !slices.Equal(s.Membership.Actual, names)
	})
}
