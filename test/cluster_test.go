package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestProcessKilledNodes(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			nodes := startAll(newProcs(t, map[string]string{"KV_STORE": store})...)
			for i, p := range nodes {
				p.put("k", strconv.Itoa(i))
				for _, reader := range nodes {
					reader.has("k", strconv.Itoa(i), "")
				}
			}
			for _, leads := range []bool{true, false} {
				victim, others := pick(nodes, leads)
				victim.end(syscall.SIGKILL, -1)
				began := time.Now()
				for i, p := range others {
					key := fmt.Sprintf("%v%d", leads, i)
					p.await(http.StatusOK, http.MethodPut, "/key/"+key, "1")
					for _, reader := range others {
						reader.has(key, "1", "")
					}
				}
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("the others took %v to go on; want at most 10s", took)
				}
				startAll(victim)
				for i := range others { // it says that it has caught up
					victim.has(fmt.Sprintf("%v%d", leads, i), "1", "?consistency=stale")
				}
				victim.has("k", "2", "")
				victim.put("back", "2")
				others[0].has("back", "2", "")
			}
		})
	}
}

func TestProcessNoQuorum(t *testing.T) {
	t.Parallel()
	for name, led := range map[string]bool{"the last node led": true, "the last node followed": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nodes := startAll(newProcs(t, nil)...)
			last, dead := pick(nodes, led)
			last.put("old", "1")
			last.has("old", "1", "")
			for _, p := range dead {
				p.end(syscall.SIGKILL, -1)
			}
			began := time.Now()
			var wg sync.WaitGroup
			var write, read answerTo
			wg.Go(func() { write, _ = last.ask(http.MethodPut, "/key/new", "2") })
			wg.Go(func() { read, _ = last.ask(http.MethodGet, "/key/old", "") })
			if a := last.has("old", "1", "?consistency=stale"); a.header.Get("Raft-Stale") != "" {
				t.Errorf("got %v; want no Raft-Stale from a node that had a leader", a)
			}
			last.await(http.StatusServiceUnavailable, http.MethodGet, "/readyz", "")
			last.expect(http.StatusOK, http.MethodGet, "/livez", "")
			wg.Wait()
			if took := time.Since(began); took > 15*time.Second {
				t.Errorf("the answers took %v; want at most 15s", took)
			}
			if read.status != http.StatusServiceUnavailable || read.header.Get("Retry-After") == "" {
				t.Errorf("got %v for a linearizable read; want 503 with Retry-After", read)
			}
			outcome := outcomeOf(t, write)
			outcomeOf(t, last.expect(http.StatusServiceUnavailable, http.MethodPut, "/key/later", "3")) // by now it knows of no leader
			last.has("old", "1", "?consistency=stale")
			startAll(dead...)
			last.await(http.StatusOK, http.MethodGet, "/readyz", "")
			last.has("later", "null", "")
			if outcome == "not-applied" {
				last.has("new", "null", "")
			}
		})
	}
}

func TestProcessForming(t *testing.T) {
	t.Parallel()
	nodes := newProcs(t, nil)
	for _, p := range nodes[:2] {
		p.start()
		p.await(http.StatusOK, http.MethodGet, "/livez", "")
	}
	began, reasons := time.Now(), make([]string, 2)
	waitFor(t, "three seconds to pass", func() bool {
		for i, p := range nodes[:2] {
			if s := p.status(); s.ClusterID != "" || s.Leader != "" {
				t.Fatalf("got %+v while one of three is missing; want no cluster", s)
			}
			reasons[i] = p.expect(http.StatusServiceUnavailable, http.MethodGet, "/readyz", "").body
		}
		return time.Since(began) > 3*time.Second
	})
	for i, p := range nodes[:2] {
		missing := "node3 at " + nodes[2].env["RAFT_ADDR"] + ":" + nodes[2].env["RAFT_PORT"] + ": connection refused"
		if !strings.Contains(reasons[i], missing) {
			t.Errorf("got %s from /readyz; want %s", reasons[i], missing)
		}
		p.logs(`\[INFO\].*waiting.*` + regexp.QuoteMeta(missing))
	}
	nodes[0].signal(syscall.SIGTERM)
	nodes[0].exits(exitOK, 2*time.Second)
	nodes[0].start()
	nodes[0].await(http.StatusOK, http.MethodGet, "/livez", "")
	nodes[2].start()
	nodes[2].await(http.StatusOK, http.MethodPut, "/key/k", "1")
	if took := time.Since(nodes[2].began); took > 3*time.Second {
		t.Errorf("forming took %v once all were there; want it at once", took)
	}
	ids := make(map[string]bool)
	for _, p := range nodes {
		p.await(http.StatusOK, http.MethodGet, "/readyz", "")
		p.has("k", "1", "")
		ids[p.status().ClusterID] = true
	}
	if len(ids) != 1 || ids[""] {
		t.Errorf("got cluster ids %v; want one", ids)
	}
}

func TestProcessPeersDrift(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	p, agreed := nodes[2], nodes[2].env["PEERS"]
	for _, drift := range []bool{true, false} {
		p.end(syscall.SIGTERM, exitOK)
		p.env["PEERS"] = agreed
		if drift {
			p.env["PEERS"] += ",node4@127.0.0.1:" + ownPort(t)
		}
		startAll(p)
		p.put("k", "1")
		nodes[0].has("k", "1", "")
		if drift {
			p.logs(`\[WARN\].*PEERS`)
		}
		for _, node := range nodes {
			s := node.status()
			if want := drift && node == p; s.PeersDrift != want {
				t.Errorf("got peers_drift %v on %s; want %v", s.PeersDrift, node.name, want)
			}
			if len(s.Peers) != 3 {
				t.Errorf("got members %v on %s; want what it was", s.Peers, node.name)
			}
		}
	}
}

func TestProcessAddressChange(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	moved := nodes[1]
	moved.end(syscall.SIGTERM, exitOK)
	was, port := moved.env["RAFT_ADDR"]+":"+moved.env["RAFT_PORT"], ownPort(t)
	is := moved.env["RAFT_ADDR"] + ":" + port
	moved.env["RAFT_PORT"], moved.env["PEERS"] = port, strings.Replace(moved.env["PEERS"], was, is, 1)
	for _, p := range []*proc{nodes[0], nodes[2]} {
		p.end(syscall.SIGTERM, exitOK)
		p.env["PEERS"] = moved.env["PEERS"]
		startAll(p)
	}
	nodes[0].put("k", "1")
	startAll(moved)
	for _, p := range nodes {
		p.has("k", "1", "")
		s := p.status()
		if s.PeersDrift || len(s.Peers) != 3 || s.Peers[1].Address != is {
			t.Errorf("got %+v; want no drift, and the new address of node2", s)
		}
	}
}

func TestProcessPausedFollower(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	paused, others := pick(nodes, false)
	paused.signal(syscall.SIGSTOP)
	began, n := time.Now(), 0
	waitFor(t, "three seconds of writes", func() bool {
		n++
		others[n%2].put("k", strconv.Itoa(n))
		return time.Since(began) > 3*time.Second
	})
	paused.signal(syscall.SIGCONT)
	paused.await(http.StatusOK, http.MethodGet, "/readyz", "")
	for _, p := range nodes {
		p.has("k", strconv.Itoa(n), "")
	}
	paused.put("k", "0")
	others[0].has("k", "0", "")
}

func TestProcessStaleSinceStart(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, map[string]string{"SNAPSHOT_THRESHOLD": "1", "SNAPSHOT_INTERVAL": "50ms"})...)
	p := nodes[0]
	index, err := strconv.Atoi(p.put("old", "1").header.Get("Raft-Index"))
	if err != nil {
		t.Fatalf("Raft-Index: %v", err)
	}
	waitFor(t, "a snapshot with the value", func() bool { // all that a node has before it hears of a leader
		files, _ := filepath.Glob(filepath.Join(p.env["STATE_DIR"], "snapshots", "*[0-9]", "meta.json"))
		return slices.ContainsFunc(files, func(file string) bool {
			var meta struct{ Index int }
			data, _ := os.ReadFile(file) // snapshots come and go
			return json.Unmarshal(data, &meta) == nil && meta.Index >= index
		})
	})
	for _, node := range nodes {
		node.end(syscall.SIGKILL, -1)
	}
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/livez", "")
	waitFor(t, "ten seconds to pass", func() bool {
		p.expect(http.StatusServiceUnavailable, http.MethodGet, "/key/old?consistency=stale", "")
		return time.Since(p.began) > 10*time.Second-slack
	})
	p.await(http.StatusOK, http.MethodGet, "/key/old?consistency=stale", "")
	if took := time.Since(p.began); took > 10*time.Second+slack {
		t.Errorf("got the first stale read %v after the start; want it after 10s", took)
	}
	if a := p.has("old", "1", "?consistency=stale"); a.header.Get("Raft-Stale") != "since-start" {
		t.Errorf("got %v; want Raft-Stale: since-start", a)
	}
	p.expect(http.StatusServiceUnavailable, http.MethodGet, "/readyz", "")
	nodes[1].start()
	p.await(http.StatusOK, http.MethodGet, "/readyz", "")
	if a := p.has("old", "1", "?consistency=stale"); a.header.Get("Raft-Stale") != "" {
		t.Errorf("got %v once there is a leader; want no Raft-Stale", a)
	}
}
