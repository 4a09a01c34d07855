package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A node that has come back without its state helps nobody to become leader, and confirms none, before it has what the
// leader had.
func TestGatedNodeHasNoVote(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	followers := c.followers(leader)
	kept, gated := followers[0], followers[1]
	if _, err := c.nodes[leader].kv.Set(t.Context(), []Pair{{"k", "1"}}, Condition{}); err != nil {
		t.Fatal(err)
	}
	c.stop(gated)
	c.links[[2]int{leader, gated}].set(linkHold) // it can ask the leader, but gets no entry
	c.start(gated)
	node := c.nodes[gated]
	waitFor(t, "the leader to admit the node", node.form.gated)
	waitFor(t, "the node to say what it waits for", func() bool {
		err := node.Ready()
		return err != nil && strings.Contains(err.Error(), "needs to vote")
	})
	term := node.raft.Load().CurrentTerm()
	if want := c.nodes[leader].State().Term; term != want {
		t.Errorf("got term %d; want %d, the leader's", term, want)
	}
	// What a candidate or a leader asks.
	for name, call := range map[string]func() (bool, error){
		"vote": func() (bool, error) {
			var resp raft.RequestVoteResponse
			err := c.nodes[kept].transport.NetworkTransport.RequestVote(raft.ServerID(node.cfg.NodeID), raft.ServerAddress(node.cfg.NodeID),
				&raft.RequestVoteRequest{RPCHeader: header(c.nodes[kept]), Term: term + 1, LastLogIndex: 1000, LastLogTerm: term, LeadershipTransfer: true}, &resp)
			return resp.Granted, err
		},
		"pre-vote": func() (bool, error) {
			var resp raft.RequestPreVoteResponse
			err := c.nodes[kept].transport.NetworkTransport.RequestPreVote(raft.ServerID(node.cfg.NodeID), raft.ServerAddress(node.cfg.NodeID),
				&raft.RequestPreVoteRequest{RPCHeader: header(c.nodes[kept]), Term: term + 1, LastLogIndex: 1000, LastLogTerm: term}, &resp)
			return resp.Granted, err
		},
		"confirmation": func() (bool, error) {
			return c.nodes[kept].peers.agrees(t.Context(), node.cfg.NodeID, opTerm, []byte{0, 0, 0, 0, 0, 0, 0, byte(term)}), nil
		},
	} {
		if got, err := call(); got || err != nil {
			t.Errorf("%s: got %v, error %v; want no and none", name, got, err)
		}
	}
	c.cut(leader, linkCut)
	began := time.Now()
	waitFor(t, "the others to have had time for elections", func() bool {
		if c.nodes[kept].State().State == "leader" || node.State().State == "leader" {
			t.Fatal("got a leader without a majority that has its state; want none")
		}
		return time.Since(began) > 5*time.Second
	})
	c.cut(leader, linkOpen)
	waitFor(t, "the node to be ready", func() bool { return node.Ready() == nil })
	if item, err := node.kv.Get(t.Context(), "k", Linearizable); err != nil || item.Value != "1" || node.form.gated() {
		t.Errorf("got %q, error %v, gated %v; want 1, none, false", item.Value, err, node.form.gated())
	}
}

func header(n *testNode) raft.RPCHeader {
	id := []byte(n.cfg.NodeID)
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: id, Addr: id}
}

// A vote counts only when its voter stands by it after a majority has voted.
func TestVotesAreConfirmed(t *testing.T) {
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	voter, other := c.nodes[c.followers(leader)[0]], c.nodes[c.followers(leader)[1]]
	term := voter.State().Term
	stands := func(asking *testNode, term uint64) bool { return asking.standsBy(voter.cfg.NodeID, term) }
	if vote, err := voter.storage.stable.Get(keyVote); err == nil && len(vote) > 8 {
		votedFor := string(vote[8:])
		for _, n := range []*testNode{c.nodes[leader], other} {
			if got, want := stands(n, term), n.cfg.NodeID == votedFor; got != want {
				t.Errorf("got %v for the vote of %s for %s in term %d; want %v", got, voter.cfg.NodeID, n.cfg.NodeID, term, want)
			}
		}
	} else if stands(c.nodes[leader], term) || stands(other, term) {
		t.Error("a node that has not voted stands by a vote")
	}
	if stands(c.nodes[leader], term+1) || stands(c.nodes[leader], term-1) {
		t.Error("a node stands by a vote of another term")
	}
	// A ballot is open when as many have voted as are needed, and no other term's votes count.
	var b ballots
	first := b.granted(5, 2)
	select {
	case <-first:
		t.Error("a ballot was open with one vote of two")
	default:
	}
	if b.granted(4, 1) != nil {
		t.Error("a vote of an earlier term counts")
	}
	<-b.granted(5, 2)
	<-first
	if b.granted(5, 2) != nil {
		t.Error("a vote counts that was given when others had been confirmed already")
	}
	if <-b.granted(6, 1); b.granted(5, 2) != nil {
		t.Error("a vote of an earlier term counts")
	}
}

// What becomes of a cluster when a majority of its nodes lose their state. All of it takes half a minute, so the cases
// begin together: each begins with a func that returns how it ends.
func TestProcessMajorityWithoutState(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name  string
		begin func(t *testing.T) (end func(t *testing.T))
	}{
		{"in memory, the leader survives", func(t *testing.T) func(t *testing.T) { t.Helper(); return oneSurvives(t, true) }},
		{"in memory, a follower survives", func(t *testing.T) func(t *testing.T) { t.Helper(); return oneSurvives(t, false) }},
		{"in memory, the third is away", func(t *testing.T) func(t *testing.T) { t.Helper(); return oneIsAway(t, storeMemory) }},
		{"on disk, the third is away", func(t *testing.T) func(t *testing.T) { t.Helper(); return oneIsAway(t, storeBolt) }},
		{"on disk, one survives", oneSurvivesOnDisk},
	}
	ends := make([]func(t *testing.T), len(cases))
	for i, tc := range cases {
		ends[i] = tc.begin(t)
	}
	for i, tc := range cases {
		t.Run(tc.name, ends[i])
	}
}

// lose kills nodes, deletes what they have, and starts them again.
func lose(t *testing.T, nodes []*proc) {
	t.Helper()
	for _, p := range nodes {
		p.end(syscall.SIGKILL, -1)
		if err := os.RemoveAll(p.env["STATE_DIR"]); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range nodes {
		p.start()
		p.await(http.StatusOK, http.MethodGet, "/livez", "")
	}
}

// awaitMajority waits until a write through p goes through again, and checks that nobody was hasty.
func awaitMajority(t *testing.T, p *proc, since time.Time) {
	t.Helper()
	var at time.Time
	waitLong(t, 45*time.Second, "a majority without state to go on", func() bool {
		a, _ := p.ask(http.MethodPut, "/key/new", "2")
		at = time.Now()
		return a.status == http.StatusOK
	})
	if took := at.Sub(since); took < formPatience {
		t.Errorf("a majority without state went on after %v; want it to wait for %v", took, formPatience)
	}
}

// Two of three nodes lose their memory: what the third has goes on, and it says so.
func oneSurvives(t *testing.T, leads bool) (end func(t *testing.T)) {
	t.Helper()
	nodes := startAll(newProcs(t, map[string]string{"KV_STORE": storeMemory})...)
	survivor, lost := pick(nodes, leads)
	var etag string
	for i := range 50 {
		etag = nodes[i%3].put("k"+strconv.Itoa(i), strconv.Itoa(i)).header.Get("ETag")
	}
	survivor.has("k49", "49", "") // it has all
	before := survivor.status().ClusterID
	began := time.Now()
	lose(t, lost)
	return func(t *testing.T) {
		t.Helper()
		awaitMajority(t, lost[0], began)
		for _, p := range nodes {
			p.await(http.StatusOK, http.MethodGet, "/readyz", "")
			for i := range 50 {
				p.has("k"+strconv.Itoa(i), strconv.Itoa(i), "")
			}
			s := p.status()
			if s.MayBeLost != (p == survivor) || s.ClusterID == before {
				t.Errorf("got %+v of %s; want another cluster than %s, in which the survivor alone says that writes may be lost", s, p.name, before)
			}
		}
		if now := survivor.put("k0", "2").header.Get("ETag"); len(now) < len(etag) || len(now) == len(etag) && now <= etag {
			t.Errorf("got ETag %s; want one above %s, the last before", now, etag)
		}
		survivor.end(syscall.SIGKILL, -1)
		startAll(survivor)
		if survivor.has("k1", "1", ""); survivor.status().MayBeLost {
			t.Error("writes may be lost, says the survivor after a restart; want no more")
		}
	}
}

// While the third is away, two of three nodes lose their state and form a cluster. The third is then outranked.
func oneIsAway(t *testing.T, store string) (end func(t *testing.T)) {
	t.Helper()
	nodes := startAll(newProcs(t, map[string]string{"KV_STORE": store})...)
	away, lost := nodes[0], nodes[1:]
	away.put("k", "1")
	away.has("k", "1", "")
	away.signal(syscall.SIGSTOP)
	began := time.Now()
	lose(t, lost)
	return func(t *testing.T) {
		t.Helper()
		awaitMajority(t, lost[0], began)
		away.signal(syscall.SIGCONT)
		if store == storeMemory {
			away.exits(exitFailed, 15*time.Second)
			away.logs("a majority of the nodes is of cluster")
		} else {
			waitFor(t, "the third to say that it is outranked", func() bool {
				a, _ := away.ask(http.MethodGet, "/readyz", "")
				return a.status == http.StatusServiceUnavailable && strings.Contains(a.body, "a majority of the nodes is of cluster")
			})
			away.expect(http.StatusServiceUnavailable, http.MethodGet, "/key/k?consistency=stale", "")
			outcomeOf(t, away.expect(http.StatusServiceUnavailable, http.MethodPut, "/key/k", "3"))
			away.end(syscall.SIGTERM, exitOK)
			if err := os.Rename(away.env["STATE_DIR"], away.env["STATE_DIR"]+"-kept"); err != nil { // as it advises
				t.Fatal(err)
			}
		}
		startAll(away)
		for _, p := range nodes {
			p.has("new", "2", "")
			p.has("k", "null", "")
		}
	}
}

// With disks, people decide what becomes of a cluster whose majority has lost them. What they are advised to do works.
func oneSurvivesOnDisk(t *testing.T) (end func(t *testing.T)) {
	t.Helper()
	nodes := startAll(newProcs(t, nil)...)
	survivor, lost := nodes[0], nodes[1:]
	survivor.put("k", "1")
	survivor.has("k", "1", "")
	began := time.Now()
	lose(t, lost)
	return func(t *testing.T) {
		t.Helper()
		waitLong(t, 45*time.Second, "more than the patience of those who may form a cluster", func() bool {
			for _, p := range nodes {
				p.expect(http.StatusServiceUnavailable, http.MethodPut, "/key/new", "2")
			}
			return time.Since(began) > formPatience+5*time.Second
		})
		for _, p := range nodes {
			if a := p.expect(http.StatusServiceUnavailable, http.MethodGet, "/readyz", ""); !strings.Contains(a.body, "copy its STATE_DIR") {
				t.Errorf("got %v from %s; want advice", a, p.name)
			}
		}
		for _, p := range []*proc{survivor, lost[0]} {
			p.end(syscall.SIGTERM, exitOK)
		}
		if err := os.RemoveAll(lost[0].env["STATE_DIR"]); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(lost[0].env["STATE_DIR"], os.DirFS(survivor.env["STATE_DIR"])); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(lost[0].env["STATE_DIR"], nodeIDName)); err != nil {
			t.Fatal(err)
		}
		startAll(survivor, lost[0])
		for _, p := range nodes {
			p.await(http.StatusOK, http.MethodGet, "/readyz", "")
			p.has("k", "1", "")
		}
	}
}
