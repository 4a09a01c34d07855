package test

import (
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A node that waits for its database is asked already: by load balancers, if by nobody else.
func TestProcessStopsWhileItOpens(t *testing.T) {
	t.Parallel()
	running := startAll(newProc(t, nil))[0]
	p := newProc(t, map[string]string{"STATE_DIR": running.env["STATE_DIR"]}) // locked for as long as it waits
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/livez", "")
	answers := askAll(p, 4)
	p.end(syscall.SIGTERM, 0)
	checkRefused(t, answers, 4)
	p.logs(`stopped while the storage was being opened`)
}

// Requests that wait for a leader get their answer, however short SHUTDOWN_TIMEOUT is.
func TestProcessStopsWithoutALeader(t *testing.T) {
	t.Parallel()
	for _, timeout := range []string{"1s", "2s", "8s"} {
		t.Run(timeout, func(t *testing.T) {
			t.Parallel()
			p := newProcs(t, map[string]string{"SHUTDOWN_TIMEOUT": timeout, "KV_STORE": storeMemory})[0] // it stops at once
			p.start()
			p.await(http.StatusOK, http.MethodGet, "/livez", "")
			answers := askAll(p, 4)
			p.end(syscall.SIGTERM, 0)
			checkRefused(t, answers, 4)
		})
	}
}

// askAll sends n writes at once, which have to wait, and returns what they are answered with. 0 is no answer.
func askAll(p *proc, n int) <-chan int {
	answers := make(chan int, n)
	for range n {
		go func() {
			a, _ := p.ask(http.MethodPut, "/key/k", "1")
			answers <- a.status
		}()
	}
	time.Sleep(300 * time.Millisecond) // they are under way then
	return answers
}

func checkRefused(t *testing.T, answers <-chan int, n int) {
	t.Helper()
	for range n {
		if got := <-answers; got != http.StatusServiceUnavailable {
			t.Errorf("got %d for a write under way; want 503", got)
		}
	}
}

func TestProcessStopUnderLoad(t *testing.T) {
	t.Parallel()
	signals := []os.Signal{syscall.SIGTERM, syscall.SIGINT}
	for i, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			nodes := startAll(newProcs(t, map[string]string{"KV_STORE": store})...)
			for j, role := range []string{"leader", "follower"} {
				stopped, others := pick(nodes, role == "leader")
				finishPut := beginPut(stopped, role)
				l := startLoad("load-"+role, others...)
				l.flow(t)
				began := time.Now()
				stopped.signal(signals[(i+j)%2])
				stopped.awaitStopping()
				if got := finishPut(); got != http.StatusOK {
					t.Errorf("got %d for a request under way in the %s; want 200", got, role)
				}
				stopped.exits(exitOK, stopLimit-time.Since(began))
				l.flow(t)
				for _, p := range others {
					if gap := l.gap(p, began); gap > 2*time.Second {
						t.Errorf("no write went through %s for %v after the %s was told to stop; want at most 2s", p.name, gap, role)
					}
				}
				startAll(stopped)
				if n := l.check(t, nodes); n > 0 {
					t.Errorf("%d writes got no answer; want one for each", n)
				}
				stopped.has(role, `"ab"`, "")
			}
		})
	}
}

func TestProcessAllEnd(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGINT} {
		l := startLoad(sig.String(), nodes...)
		l.flow(t)
		began := time.Now()
		for _, p := range nodes { // all at the same time
			p.signal(sig)
		}
		for _, p := range nodes {
			p.exits(map[bool]int{true: -1}[sig == syscall.SIGKILL], stopLimit-time.Since(began))
		}
		l.end()
		startAll(nodes...)
		l.check(t, nodes)
	}
	for _, leads := range []bool{true, false} { // one after the other: the last has no quorum
		last, others := pick(nodes, leads)
		last.put("k", "1")
		for _, p := range append(others, last) {
			p.end(syscall.SIGTERM, exitOK)
		}
		startAll(nodes...)[2].has("k", "1", "")
	}
}

func TestProcessSingleNodeEnds(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, timeout string
		signals       []os.Signal
		gap           time.Duration // between them
		slow          string        // what comes of a request under way: "ab" when it is brought to its end
		code          int
		limit         time.Duration
	}{
		{"by sigterm", "8s", []os.Signal{syscall.SIGTERM}, 0, `"ab"`, exitOK, 2 * time.Second},
		{"by sigint", "8s", []os.Signal{syscall.SIGINT}, 0, `"ab"`, exitOK, 2 * time.Second},
		{"by kill -9", "8s", []os.Signal{syscall.SIGKILL}, 0, "null", -1, slack},
		{"in time, while a request hangs", "1s", []os.Signal{syscall.SIGTERM}, 0, "null", exitOK, time.Second + slack},
		{"by a second signal", "1m", []os.Signal{syscall.SIGTERM, syscall.SIGTERM}, 2 * sameSignal, "null", exitFailed, slack},
		{"by a second signal of another kind", "1m", []os.Signal{syscall.SIGINT, syscall.SIGTERM}, 2 * sameSignal, "null", exitFailed, slack},
		{"by one signal that comes twice", "8s", []os.Signal{syscall.SIGINT, syscall.SIGTERM}, 20 * time.Millisecond, `"ab"`, exitOK, 2 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := startAll(newProc(t, map[string]string{"SHUTDOWN_TIMEOUT": tc.timeout}))[0]
			p.signal(syscall.SIGHUP)
			waitFor(t, "the log to tell of SIGHUP", func() bool { return regexp.MustCompile(`(?i)reload|sighup`).MatchString(p.read(p.stderr)) })
			p.put("k", `{"n":1.0}`)
			finishPut := beginPut(p, "slow")
			var began time.Time
			for i, sig := range tc.signals {
				if i > 0 {
					time.Sleep(tc.gap)
				}
				began = time.Now()
				p.signal(sig)
			}
			p.awaitStopping()
			if tc.slow != "null" {
				if got := finishPut(); got != http.StatusOK {
					t.Errorf("got %d for a request under way; want 200", got)
				}
			}
			p.exits(tc.code, tc.limit-time.Since(began))
			startAll(p)
			p.has("k", `{"n":1.0}`, "")
			p.has("slow", tc.slow, "")
		})
	}
}

// A client that keeps its connection loses no request when the node stops: an answer says that it is the connection's last.
func TestProcessStopsBetweenRequests(t *testing.T) {
	t.Parallel()
	p := newProc(t, map[string]string{"NODE_ID": "n1", "KV_STORE": storeMemory})
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/readyz", "")

	var wg sync.WaitGroup
	var answers atomic.Int64
	for range 20 {
		transport := &http.Transport{}
		t.Cleanup(transport.CloseIdleConnections)
		wg.Go(func() {
			for last := false; !last; answers.Add(1) {
				// net/http would repeat a GET by itself, but no PUT.
				request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, p.url()+"/key/k", strings.NewReader("1"))
				if err != nil {
					t.Error(err)
					return
				}
				response, err := transport.RoundTrip(request)
				if err != nil {
					t.Errorf("a request was lost: %v", err)
					return
				}
				_ = response.Body.Close()
				last = response.Close
			}
		})
	}
	waitFor(t, "requests on all connections", func() bool { return answers.Load() > 1000 })
	p.end(syscall.SIGTERM, exitOK)
	wg.Wait()
}
