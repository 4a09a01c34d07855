package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// forked is a server with one route, as somebody's own code may have it.
type forked struct {
	*testNode
	web   *httptest.Server
	lines *logLines
}

// fork serves a node's Store at /fork with handle.
func fork(t *testing.T, n *testNode, handle handlerFunc) *forked {
	t.Helper()
	return forkWithin(t, n, 15*time.Second, handle)
}

// forkWithin is fork with a timeout for requests and answers.
func forkWithin(t *testing.T, n *testNode, timeout time.Duration, handle handlerFunc) *forked {
	t.Helper()
	f := &forked{testNode: n, lines: new(logLines), web: httptest.NewUnstartedServer(nil)}
	log := hclog.New(&hclog.LoggerOptions{Output: f.lines})
	s := newServer(n.cfg, n.Store, nil, n.metrics, log, []route{{path: "/fork", get: handle, post: handle}})
	f.web.Config = s.httpServer()
	f.web.Config.ReadTimeout, f.web.Config.WriteTimeout = timeout, timeout
	f.web.Listener = s.limitListener(f.web.Listener, nil)
	f.web.Start()
	t.Cleanup(f.web.Close)
	return f
}

func (f *forked) ask(t *testing.T, method, body string) (answerTo, error) {
	t.Helper()
	text := requestText(method, "/fork", body)
	return exchange(t.Context(), f.web.Listener.Addr().String(), method, text)
}

func (f *forked) counts(t *testing.T, method string, status int) float64 {
	t.Helper()
	return f.metric(t, fmt.Sprintf(`http_requests_total{method="%s",route="/fork",status="%d"}`, method, status))
}

func TestHandlerThatPanics(t *testing.T) {
	n := newTestNode(t, storeMemory)
	f := fork(t, n, func(http.ResponseWriter, *http.Request) error { panic("secret reason") })
	for i, method := range []string{http.MethodGet, http.MethodPost} {
		a, err := f.ask(t, method, "body")
		if err != nil || a.status != http.StatusInternalServerError || strings.Contains(a.body, "secret") {
			t.Fatalf("got %v, %v; want 500 that does not tell the reason", a, err)
		}
		checkProblem(t, method, a, "unknown")
		if f.lines.count("[ERROR]") != i+1 || f.lines.count("secret reason") == 0 || f.lines.count("TestHandlerThatPanics.func1") == 0 {
			t.Error("the log does not have the panic and its stack")
		}
		if got := f.counts(t, method, http.StatusInternalServerError); got != 1 {
			t.Errorf("got %v counted as 500; want 1", got)
		}
	}
	for name, handle := range map[string]handlerFunc{
		"panic":       func(http.ResponseWriter, *http.Request) error { panic("late") },
		"error":       func(http.ResponseWriter, *http.Request) error { return errors.New("late") },
		"own abort":   func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) },
		"known error": func(http.ResponseWriter, *http.Request) error { return badRequest("late") },
	} {
		t.Run(name+" after the answer has begun", func(t *testing.T) {
			f := fork(t, n, func(w http.ResponseWriter, r *http.Request) error {
				_, _ = io.WriteString(w, strings.Repeat("x", 10_000))
				return handle(w, r)
			})
			if a, err := f.ask(t, http.MethodGet, ""); err == nil {
				t.Errorf("got %d and %d bytes, no error; want an answer that is seen to be cut short", a.status, len(a.body))
			}
			if got, want := f.lines.count("[ERROR]"), map[string]int{"panic": 1}[name]; got != want {
				t.Errorf("got %d errors in the log; want %d", got, want)
			}
		})
	}
	t.Run("own abort before the answer", func(t *testing.T) {
		f := fork(t, n, func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) })
		before := f.counts(t, http.MethodGet, http.StatusInternalServerError)
		if a, err := f.ask(t, http.MethodGet, ""); err == nil {
			t.Errorf("got %v; want no answer", a)
		}
		if got := f.lines.count("[ERROR]"); got != 0 {
			t.Errorf("got %d errors in the log; want none", got)
		}
		waitFor(t, "it to be counted", func() bool { return f.counts(t, http.MethodGet, http.StatusInternalServerError) == before+1 })
	})
}

// Whatever a handler comes to after Apply, its answer does not say that nothing was done.
func TestNeverNotAppliedAfterApply(t *testing.T) {
	n := newTestNode(t, storeMemory)
	for name, fails := range map[string]func(r *http.Request) error{
		"another write that had no chance": func(*http.Request) error { return ErrNoLeader },
		"a read that is not confirmed":     func(*http.Request) error { return fmt.Errorf("read back: %w", ErrNotConfirmed) },
		"an error of its own":              func(*http.Request) error { return errors.New("own") },
		"a status of its own":              func(*http.Request) error { return statusError(http.StatusServiceUnavailable, "full") },
		"a conflict of its own":            func(*http.Request) error { return statusError(http.StatusConflict, "no") },
		"a precondition of its own":        func(*http.Request) error { return statusError(http.StatusPreconditionFailed, "no") },
		"a refusal of another write": func(r *http.Request) error {
			if _, err := n.Apply(r.Context(), testSet(testPair{"second", "1"})); err != nil {
				return err
			}
			return refused(http.StatusConflict, "no")
		},
		"a panic": func(*http.Request) error { panic("own") },
		"a body that is too large": func(r *http.Request) error {
			_, err := readBody(r)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := fork(t, n, func(_ http.ResponseWriter, r *http.Request) error {
				if _, err := n.client.set(r.Context(), "applied", "1"); err != nil {
					t.Error(err)
				}
				return fails(r)
			})
			body := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", n.cfg.MaxBodyBytes+1, strings.Repeat("1", int(n.cfg.MaxBodyBytes)+1))
			text := requestText(http.MethodPost, "/fork", body, "Transfer-Encoding", "chunked")
			a, err := exchange(t.Context(), f.web.Listener.Addr().String(), http.MethodPost, text)
			if err != nil || a.status < 400 {
				t.Fatalf("got %v, %v; want an error", a, err)
			}
			checkProblem(t, http.MethodPost, a, "unknown")
		})
	}
	// The next request on the connection has nothing to do with it.
	f := fork(t, n, func(w http.ResponseWriter, r *http.Request) error {
		if r.Method == http.MethodGet {
			_, err := n.client.set(r.Context(), "applied", "1")
			return err
		}
		return badRequest("no")
	})
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", f.web.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET /fork HTTP/1.1\r\nHost: test\r\n\r\nPOST /fork HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
	answers := bufio.NewReader(conn)
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		response, err := http.ReadResponse(answers, &http.Request{Method: method})
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if method == http.MethodPost && !strings.Contains(string(text), `"outcome":"not-applied"`) {
			t.Errorf("got %s; want not-applied", text)
		}
	}
}

// A command that the state machine has refused has changed nothing, with whichever status the handler says so.
func TestRefusedByTheStateMachine(t *testing.T) {
	n := newTestNode(t, storeMemory)
	for _, status := range []int{http.StatusConflict, http.StatusPreconditionFailed, http.StatusNotFound} {
		f := fork(t, n, func(w http.ResponseWriter, r *http.Request) error {
			if _, err := applyCommand(w, r, n.Store, testSet(testPair{"k", "1"})); err != nil {
				return err
			}
			return fmt.Errorf("wrapped: %w", refused(status, "100 %d is not allowed", 1))
		})
		a, err := f.ask(t, http.MethodPost, "body")
		if err != nil || a.status != status || a.header["Raft-Index"] != nil || !strings.Contains(a.body, "100 1 is not allowed") {
			t.Errorf("got %v, %v; want %d with its detail and without Raft-Index", a, err, status)
		}
		checkProblem(t, http.MethodPost, a, "not-applied")
	}
}

// A body that is announced as too large is refused before it is sent.
func TestTooLargeBodiesAreNotAskedFor(t *testing.T) {
	n := newTestNode(t, storeMemory)
	for _, method := range []string{http.MethodPut, http.MethodPost} {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", n.web.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		target := map[string]string{http.MethodPut: "/value/a", http.MethodPost: "/value"}[method]
		_, _ = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n",
			method, target, n.cfg.MaxBodyBytes+1)
		response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if response.StatusCode != http.StatusRequestEntityTooLarge || !strings.Contains(string(body), "MAX_BODY_BYTES") {
			t.Errorf("%s: got %d %s; want 413 at once", method, response.StatusCode, body)
		}
		checkProblem(t, method, answerTo{response.StatusCode, response.Header, string(body)}, "not-applied")
	}
}

// A request that waits for a leader names the one that it found.
func TestLeaderIsAsKnownAtTheAnswer(t *testing.T) {
	c := unstartedCluster(t, 2, storeMemory)
	for i := range c.nodes {
		c.start(i)
	}
	node := c.nodes[0]
	if leader := node.Leader(); leader != "" {
		t.Fatalf("got leader %s at the start; want none yet", leader)
	}
	// It asks before there is a leader.
	a := request(t, http.MethodPut, node.url+"/value/k", "1")
	if got := a.header.Get("Raft-Leader"); a.status != http.StatusOK || got == "" {
		t.Errorf("got %d, Raft-Leader %q; want 200 and who led", a.status, got)
	}
}

// A handler can flush what it has, and go on for longer than the server's timeouts when it clears them.
func TestHandlersCanStream(t *testing.T) {
	n := newTestNode(t, storeMemory)
	const timeout = 200 * time.Millisecond
	f := forkWithin(t, n, timeout, func(w http.ResponseWriter, r *http.Request) error {
		control := http.NewResponseController(w)
		if err := errors.Join(control.SetReadDeadline(time.Time{}), control.SetWriteDeadline(time.Time{})); err != nil {
			return err
		}
		_, plain := w.(http.Flusher)
		if err := control.Flush(); err != nil || !plain {
			return fmt.Errorf("flush: %w, as a Flusher: %v", err, plain)
		}
		for i := range 5 {
			select {
			case <-time.After(timeout / 2):
			case <-r.Context().Done():
				return context.Cause(r.Context())
			}
			_, _ = fmt.Fprintln(w, i)
			if err := control.Flush(); err != nil {
				return err
			}
		}
		return nil
	})
	response, err := http.Get(f.web.URL + "/fork") //nolint:noctx // it ends by itself
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if got := response.Header.Get("Raft-Leader"); got != "node1" {
		t.Errorf("got Raft-Leader %q; want node1, also when the first thing is a flush", got)
	}
	lines := bufio.NewScanner(response.Body)
	began, count := time.Now(), 0
	for ; lines.Scan(); count++ {
		if count == 0 && time.Since(began) > 4*timeout/2 {
			t.Error("the first line came with the last; want each as it is flushed")
		}
	}
	if lines.Err() != nil || count != 5 {
		t.Errorf("got %d lines, error %v; want 5", count, lines.Err())
	}
}

func TestErrorsHaveTheirStatus(t *testing.T) {
	statuses := map[error]int{
		ErrUnknownOutcome: 504, ErrNoLeader: 503, ErrNotLeader: 503, ErrOverloaded: 503, ErrNotInTime: 503, ErrNotConfirmed: 503,
		ErrStarting: 503, ErrLeft: 503, badRequest("what?"): 400, errNotFound: 404, errors.New("node7 is broken"): 500,
	}
	for _, row := range statusOf {
		if _, tested := statuses[row.err]; !tested {
			t.Errorf("no test for %v", row.err)
		}
	}
	n := newTestNode(t, storeMemory)
	for tested, status := range statuses {
		t.Run(tested.Error(), func(t *testing.T) {
			outcome := "not-applied"
			if status == 500 || status == 504 {
				outcome = "unknown"
			}
			for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete} {
				for _, err := range []error{tested, fmt.Errorf("in /secret: %w", tested)} {
					recorder := httptest.NewRecorder()
					a := &response{ResponseWriter: recorder, server: n.server, client: new(client)}
					n.server.writeError(a, httptest.NewRequestWithContext(t.Context(), method, "/value/k", nil), err)
					got := answerTo{recorder.Code, recorder.Header(), recorder.Body.String()}
					if got.status != status || strings.Contains(got.body, "secret") || strings.Contains(got.body, "node7") {
						t.Errorf("%s: got %v; want %d and nothing of what is inside", method, got, status)
					}
					checkProblem(t, method, got, outcome)
					retry, err := strconv.Atoi(got.header.Get("Retry-After"))
					if status == 503 && (err != nil || retry < 1) || status != 503 && got.header["Retry-After"] != nil {
						t.Errorf("%s: got %v; want Retry-After only with 503", method, got.header)
					}
				}
			}
		})
	}
}
