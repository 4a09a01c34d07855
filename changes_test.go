package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// follow opens a stream, which is closed when the test ends.
func follow(t testing.TB, base, query string) *bufio.Reader {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/changes?"+query, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = response.Body.Close() })
	return bufio.NewReader(response.Body)
}

// nextLine reads a line within 5 s.
func nextLine(t testing.TB, r *bufio.Reader) string {
	t.Helper()
	type result struct {
		line string
		err  error
	}
	got := make(chan result, 1)
	go func() { // ends with the response's body
		line, err := r.ReadString('\n')
		got <- result{line, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			t.Fatalf("got %.100q, %v; want a line", r.line, r.err)
		}
		return r.line
	case <-time.After(5 * time.Second):
		t.Fatal("waited 5 s for a line in vain")
		return ""
	}
}

// streamNode serves a feed of its own from a node, with streams that are as configure has them.
func streamNode(
	t testing.TB, n *testNode, configure func(*streams, *server, *httptest.Server),
) (*feed, *server, *httptest.Server) {
	t.Helper()
	s := newStreams(n.Store, newFeed())
	server := newServer(n.cfg, n.Store, nil, n.metrics, testLogger(t, "http"), []route{{path: "/changes", get: s.get}})
	web := httptest.NewUnstartedServer(nil)
	web.Config = server.httpServer()
	configure(s, server, web)
	web.Start()
	t.Cleanup(func() {
		web.CloseClientConnections()
		web.Close()
	})
	return s.feed, server, web
}

func oneChange(value string) []keyChange { return []keyChange{{key: "k", value: value}} }

// A stream outlives the server's limits on requests, says now and then how far it is, and has lines at once.
func TestStreamsOutliveTimeouts(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	f, _, web := streamNode(t, n, func(s *streams, server *server, web *httptest.Server) {
		s.tagEvery = 100 * time.Millisecond
		web.Config.ReadTimeout, web.Config.WriteTimeout = 200*time.Millisecond, 300*time.Millisecond
		web.Listener = server.limitListener(web.Listener, nil)
	})
	began := time.Now()
	stream := follow(t, web.URL, "wait=1500ms")
	nextLine(t, stream)
	tags := 0
	for time.Since(began) < time.Second {
		if line := nextLine(t, stream); line == "{\"tag\":0}\n" {
			tags++
		}
	}
	f.add(17, oneChange("1"))
	wrote := time.Now()
	got := nextLine(t, stream)
	for got == "{\"tag\":0}\n" {
		got = nextLine(t, stream)
	}
	if took := time.Since(wrote); !strings.Contains(got, `"changes"`) || took > time.Second {
		t.Errorf("got %q after %v; want the change at once", got, took)
	}
	rest, err := io.ReadAll(stream)
	took := time.Since(began)
	if err != nil || took < 1400*time.Millisecond || took > 4*time.Second || !strings.HasSuffix(string(rest), "{\"tag\":17}\n") {
		t.Errorf("got %q, error %v after %v; want an end after 1.5 s", rest, err, took)
	}
	if tags < 5 {
		t.Errorf("got %d tags in a second; want one each 100 ms", tags)
	}
}

// Quiet streams are not what a full port closes.
func TestStreamsKeepNobodyWaiting(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	f, _, web := streamNode(t, n, func(_ *streams, _ *server, web *httptest.Server) {
		web.Listener = newConnLimiter(web.Listener, 5, requestBytes, n.metrics.overLimit)
	})
	stream := follow(t, web.URL, "wait=1m")
	nextLine(t, stream)
	for range 30 {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", web.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	waitFor(t, "an answer", func() bool { return request(t, http.MethodGet, web.URL+"/livez", "").status == 200 })
	f.add(17, oneChange("1"))
	if got := nextLine(t, stream); !strings.Contains(got, `"tag":17`) {
		t.Errorf("got %q; want the change", got)
	}
}

// Readers that do not read are ended, hold up no write and keep no history in memory; those that read slowly are
// told all or ended.
func TestStreamsThatAreNotRead(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	running := make(chan struct{}, 100)
	f, _, web := streamNode(t, n, func(s *streams, server *server, web *httptest.Server) {
		s.streamWait, s.running = 2*time.Second, running
		web.Listener = server.limitListener(web.Listener, nil)
	})
	for range 50 {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", web.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
		_, _ = io.WriteString(conn, requestText(http.MethodGet, "/changes?since=0&wait=10m", ""))
	}
	waitFor(t, "all streams to be open", func() bool { return len(running) == 50 })
	reader := follow(t, web.URL, "since=0&wait=10m")
	nextLine(t, reader)
	value := `"` + strings.Repeat("x", 400<<10) + `"`
	var took time.Duration
	for i := range uint64(100) { // 40 MB: the history holds the last of them
		began := time.Now()
		f.add(17+i, oneChange(value))
		took += time.Since(began)
		if line := nextLine(t, reader); len(line) < len(value) {
			t.Fatalf("write %d: got %.100q; want it told", i, line)
		}
	}
	if took > 5*time.Second {
		t.Errorf("100 writes took %v beside readers that do not read", took)
	}
	waitFor(t, "silent readers to be ended", func() bool { return len(running) == 1 })
}

// A reader gets what is there without a pause, also where each piece ends with a line.
func TestStreamsCatchUp(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	f, _, web := streamNode(t, n, func(_ *streams, server *server, web *httptest.Server) {
		web.Listener = server.limitListener(web.Listener, nil)
	})
	const lines, size = 6400, 128
	for i := range uint64(lines) {
		line := newRecord(1e15+i, oneChange(`""`)).line
		f.add(1e15+i, oneChange(`"`+strings.Repeat("x", size-len(line))+`"`))
	}
	began := time.Now()
	all, err := io.ReadAll(follow(t, web.URL, "since=0&wait=0"))
	if took := time.Since(began); err != nil || bytes.Count(all, []byte("\n")) != lines+2 || took > lines*size/pieceBytes*wakeEvery/2 {
		t.Errorf("got %d bytes, error %v after %v; want %d lines at once", len(all), err, took, lines)
	}
}

// A stream ends in time, and with its last line, although the reader is slow and there is more.
func TestStreamsEndInTheMiddle(t *testing.T) {
	t.Parallel()
	for name, stops := range map[string]bool{"after the time that it has": false, "with the node": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, storeMemory)
			f, server, web := streamNode(t, n, func(_ *streams, server *server, web *httptest.Server) {
				web.Listener = server.limitListener(web.Listener, nil)
			})
			for i := range uint64(160) {
				f.add(17+i, oneChange(`"`+strings.Repeat("x", 50<<10)+`"`))
			}
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", web.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.(*net.TCPConn).SetReadBuffer(32 << 10)
			wait := "1s"
			if stops {
				wait = "1m"
				time.AfterFunc(time.Second, server.stop)
			}
			began := time.Now()
			_, _ = io.WriteString(conn, requestText(http.MethodGet, "/changes?since=0&wait="+wait, ""))
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			var all []byte
			for piece := make([]byte, 16<<10); err == nil; time.Sleep(10 * time.Millisecond) { // 1.5 MB a second
				var size int
				size, err = io.ReadFull(response.Body, piece)
				all = append(all, piece[:size]...)
			}
			took := time.Since(began)
			if errors.Is(err, io.ErrUnexpectedEOF) { // of the last piece
				_, err = response.Body.Read(nil)
			}
			last := all[bytes.LastIndexByte(bytes.TrimSuffix(all, []byte("\n")), '\n')+1:]
			if !errors.Is(err, io.EOF) || took > 1900*time.Millisecond || !regexp.MustCompile(`^{"tag":\d+}\n$`).Match(last) {
				t.Errorf("got %d bytes that end in %.40q, error %v after %v; want a last line after 1 s", len(all), last, err, took)
			}
		})
	}
}

// When the node stops, streams end within a second: quiet ones with their last line, and those that are not read.
func TestStreamsEndWithTheNode(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	running := make(chan struct{}, 10)
	f, server, web := streamNode(t, n, func(s *streams, server *server, web *httptest.Server) {
		s.running = running
		web.Listener = server.limitListener(web.Listener, nil)
	})
	quiet := follow(t, web.URL, "wait=10m&prefix=none")
	nextLine(t, quiet)
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", web.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	_, _ = io.WriteString(conn, requestText(http.MethodGet, "/changes?since=0&wait=10m", ""))
	waitFor(t, "both to be open", func() bool { return len(running) == 2 })
	for i := range uint64(10) {
		f.add(17+i, oneChange(`"`+strings.Repeat("x", 400<<10)+`"`))
	}
	time.Sleep(100 * time.Millisecond) // for the one that is not read to be stuck
	began := time.Now()
	server.stop()
	if rest, err := io.ReadAll(quiet); err != nil || !strings.HasPrefix(string(rest), `{"tag":`) {
		t.Errorf("got %q, %v; want the last line", rest, err)
	}
	waitFor(t, "both to have ended", func() bool { return len(running) == 0 })
	if took := time.Since(began); took > 900*time.Millisecond {
		t.Errorf("streams ended %v after the node began to stop; want within a second", took)
	}
}

func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// openStreams opens so many streams and reads them until the test ends. It returns how many have not ended.
func openStreams(t testing.TB, base string, count int, query string) *atomic.Int64 {
	t.Helper()
	open := new(atomic.Int64)
	client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 0}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		client.CloseIdleConnections()
	})
	for range count {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/changes?wait=10m&"+query, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(r)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("got %v, %v; want a stream", response, err)
		}
		open.Add(1)
		wg.Go(func() { // until ctx ends
			defer response.Body.Close()
			_, _ = io.Copy(io.Discard, response.Body)
			open.Add(-1)
		})
	}
	return open
}

// A thousand quiet streams take no processor time, and the next one is refused.
func TestAThousandStreams(t *testing.T) {
	if maxFiles() < 4*maxStreams {
		t.Skipf("needs %d open files", 4*maxStreams)
	}
	n := newTestNode(t, storeMemory)
	measure := func() time.Duration {
		before := cpuTime(t)
		time.Sleep(2 * time.Second)
		return cpuTime(t) - before
	}
	_, _, web := streamNode(t, n, func(_ *streams, server *server, web *httptest.Server) {
		web.Listener = server.limitListener(web.Listener, nil)
	})
	without := measure()
	openStreams(t, web.URL, maxStreams, "")
	if a := request(t, http.MethodGet, web.URL+"/changes?wait=0", ""); a.status != 503 || a.header.Get("Retry-After") == "" {
		t.Errorf("got %v for one stream more; want 503", a)
	}
	with := measure()
	t.Logf("%v of processor time in 2 s without streams, %v with %d", without, with, maxStreams)
	if with > without+100*time.Millisecond {
		t.Errorf("%d idle streams took %v of processor time in 2 s; want none", maxStreams, with-without)
	}
}

// A request for a stream may have a body, as some proxies send one with every request. It has no less time for that.
func TestStreamForARequestWithABody(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	var bounded bool
	s := newServer(n.cfg, n.Store, nil, n.metrics, testLogger(t, "http"), []route{{
		path: "/changes", get: func(w http.ResponseWriter, r *http.Request) error {
			_, bounded = r.Context().Deadline()
			return nil
		},
	}})
	web := httptest.NewUnstartedServer(nil)
	web.Config, web.Listener = s.httpServer(), s.limitListener(web.Listener, nil)
	web.Start()
	defer web.Close()
	if a := request(t, http.MethodGet, web.URL+"/changes", "x"); a.status != http.StatusOK || bounded {
		t.Errorf("got %v, a deadline: %v; want 200 and none", a, bounded)
	}
}
