package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
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
			t.Fatalf("got %q, %v; want a line", r.line, r.err)
		}
		return r.line
	case <-time.After(5 * time.Second):
		t.Fatal("waited 5 s for a line in vain")
		return ""
	}
}

// streamNode serves the node's API once more, with streams that are as configure has them.
func streamNode(t testing.TB, n *testNode, configure func(*streams, *server, *httptest.Server)) (*server, *httptest.Server) {
	t.Helper()
	s := newStreams(n.Store, n.kv.machine.feed)
	server := newServer(n.cfg, n.Store, n.metrics, testLogger(t, "http"), []route{{path: "/changes", get: s.get}})
	web := httptest.NewUnstartedServer(nil)
	web.Config = server.listener()
	configure(s, server, web)
	web.Start()
	t.Cleanup(func() {
		web.CloseClientConnections()
		web.Close()
	})
	return server, web
}

// written is a write as the model has it.
type writtenChange struct {
	tag     uint64
	changes []keyChange
}

// modelWriter makes writes of all kinds to keys of its own.
func modelWriter(ctx context.Context, kv *KV, name string, count int) (writes []writtenChange, err error) {
	there := make(map[string]bool)
	for i := range count {
		key, value := fmt.Sprintf("%s/%c", name, 'a'+rand.IntN(3)), fmt.Sprintf(`"%s-%d"`, name, i)
		var written Written
		w := writtenChange{changes: []keyChange{{key: key, value: value}}}
		switch rand.IntN(4) {
		case 0: // deletes of what is not there are no changes
			written, err = kv.Delete(ctx, key, Condition{})
			w.changes = nil
			if there[key] {
				w.changes = []keyChange{{key: key, deleted: true}}
			}
			there[key] = false
		case 1:
			other := name + "/other"
			written, err = kv.Set(ctx, []Pair{{key, value}, {other, value}}, Condition{})
			w.changes = append(w.changes, keyChange{key: other, value: value})
			there[key], there[other] = true, true
		case 2:
			other := name + "/other"
			written, err = kv.Txn(ctx, Txn{Set: []Pair{{key, value}}, Delete: []Pair{{Key: other}}})
			if there[other] {
				w.changes = append(w.changes, keyChange{key: other, deleted: true})
			}
			there[key], there[other] = true, false
		default:
			written, err = kv.Set(ctx, []Pair{{key, value}}, Condition{})
			there[key] = true
		}
		if err != nil {
			return nil, err
		}
		w.tag = uint64(written.Tag)
		writes = append(writes, w)
	}
	return writes, nil
}

// modelReader follows from a tag on until it has seen all up to a tag that comes later, through any node, and returns its lines.
func modelReader(ctx context.Context, c *testCluster, since uint64, prefix string, until func() (uint64, bool)) (lines []feedLine, err error) {
	for {
		if last, known := until(); known && since >= last {
			return lines, nil
		}
		query := url.Values{"since": {fmt.Sprint(since)}, "prefix": {prefix}, "wait": {fmt.Sprint(rand.IntN(200), "ms")}}
		if rand.IntN(2) == 0 {
			query.Set("limit", fmt.Sprint(1+rand.IntN(20)))
		}
		target := c.nodes[rand.IntN(len(c.nodes))].url + "/changes?" + query.Encode()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, target, http.NoBody)
		if err != nil {
			return nil, err
		}
		a, err := roundTrip(http.DefaultClient, r)
		if err != nil || a.status != http.StatusOK {
			return nil, fmt.Errorf("%s: got %d %.200s, %w", target, a.status, a.body, err)
		}
		text := strings.Split(strings.TrimSuffix(a.body, "\n"), "\n")
		for i, line := range text {
			var l feedLine
			if err := json.Unmarshal([]byte(line), &l); err != nil {
				return nil, fmt.Errorf("%q: %w", line, err)
			}
			if ends := i == 0 || i == len(text)-1; len(text) < 2 || ends && l.Changes != nil || i == 0 && l.Tag != since {
				return nil, fmt.Errorf("%s: got line %d of %d: %s", target, i, len(text), line)
			}
			if since = l.Tag; l.Changes != nil {
				lines = append(lines, l)
			}
		}
	}
}

// Every reader is told of every write once, in order, and whole, whatever node it asks and wherever it begins, while all write.
func TestChangesAgainstAModel(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	var mu sync.Mutex // guards what follows
	var all []writtenChange
	writing := 4
	until := func() (last uint64, known bool) {
		mu.Lock()
		defer mu.Unlock()
		for _, w := range all {
			last = max(last, w.tag)
		}
		return last, writing == 0
	}
	type reading struct {
		since  uint64
		prefix string
		lines  []feedLine
	}
	var readings []*reading
	var writers, readers sync.WaitGroup
	read := func(since uint64, prefix string) {
		r := &reading{since: since, prefix: prefix}
		readings = append(readings, r)
		readers.Go(func() {
			var err error
			if r.lines, err = modelReader(t.Context(), c, r.since, r.prefix, until); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range writing {
		writers.Go(func() {
			writes, err := modelWriter(t.Context(), c.nodes[i%3].kv, fmt.Sprintf("w%d", i), 300)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, writes...)
			writing--
		})
	}
	for _, prefix := range []string{"", "w1", "w2/a", "w3/other", "none"} {
		read(0, prefix)
	}
	writers.Wait()
	slices.SortFunc(all, func(a, b writtenChange) int { return cmp.Compare(a.tag, b.tag) })
	for range 6 {
		read(all[rand.IntN(len(all))].tag, []string{"", "w0/"}[rand.IntN(2)])
	}
	readers.Wait()
	for _, r := range readings {
		var want []feedLine
		for _, w := range all {
			if line, any := told(w.tag, w.changes, r.prefix); any && w.tag > r.since {
				want = append(want, line)
			}
		}
		if diff := gocmp.Diff(want, r.lines); diff != "" {
			t.Errorf("since %d, prefix %q: got %d lines; want %d (-want +got)\n%.2000s", r.since, r.prefix, len(r.lines), len(want), diff)
		}
	}
}

// Listing page by page while others write, and following from the lowest Raft-Tag, leads to what there is in the end.
func TestListThenFollow(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			if _, err := modelWriter(t.Context(), n.kv, fmt.Sprint("w", i), 400); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond) // so that some are there; any other time would do
	copied, from, next := make(map[string]string), uint64(0), "?prefix=&limit=2"
	tags := make(map[string]uint64) // the page that a key is from had all up to there
	for next != "" {
		a := request(t, http.MethodGet, n.url+"/key"+next, "")
		var page map[string]json.RawMessage
		var tag uint64
		if _, err := fmt.Sscan(a.header.Get("Raft-Tag"), &tag); err != nil || json.Unmarshal([]byte(a.body), &page) != nil {
			t.Fatalf("got %v; want a page and its tag", a)
		}
		if from == 0 {
			from = tag
		}
		for key, value := range page {
			copied[key], tags[key] = string(value), tag
		}
		next, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
	}
	wg.Wait()
	a := request(t, http.MethodGet, fmt.Sprintf("%s/changes?since=%d&wait=0", n.url, from), "")
	for _, line := range parseLines(t, a.body) {
		for _, c := range line.Changes {
			switch {
			case line.Tag <= tags[c.Key]: // the page had it
			case c.Deleted:
				delete(copied, c.Key)
			default:
				copied[c.Key] = string(c.Value)
			}
		}
	}
	if diff := gocmp.Diff(all(n), copied); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestChangesParameters(t *testing.T) {
	n := newTestNode(t, storeMemory)
	for _, query := range []string{
		"since=", "since=-1", "since=x", "since=%2217%22", "wait=", "wait=5", "wait=-1s", "wait=10m1s", "limit=0", "limit=-1", "limit=x", "since=1&since=1",
	} {
		want(t, n, 400, http.MethodGet, "/changes?"+query, "")
	}
	for _, header := range []string{"If-Match", "If-None-Match"} {
		want(t, n, 400, http.MethodGet, "/changes?wait=0", "", header, `"1"`)
	}
	body := func(query string) string {
		t.Helper()
		a := want(t, n, 200, http.MethodGet, "/changes?"+query, "")
		if h := a.header; h.Get("Content-Type") != ndjsonType || h.Get("X-Accel-Buffering") != "no" || h.Get("Content-Length") != "" {
			t.Errorf("%s: got %v; want a stream's headers", query, h)
		}
		return a.body
	}
	if got := body("wait=0"); got != "{\"tag\":0}\n{\"tag\":0}\n" {
		t.Errorf("got %q where nothing was written", got)
	}
	tag := put(t, n, "a", "1")
	put(t, n, "b", "2")
	first, second := fmt.Sprintf(`{"tag":%d,"changes":[{"key":"a","value":1}]}`+"\n", tag), fmt.Sprintf(`{"tag":%d,"changes":[{"key":"b","value":2}]}`+"\n", tag+1)
	end := func(tag uint64) string { return fmt.Sprintf("{\"tag\":%d}\n", tag) }
	for query, want := range map[string]string{
		"since=0&wait=0":                              end(0) + first + second + end(tag+1),
		"since=0&wait=0&limit=1":                      end(0) + first + end(tag),
		"since=0&wait=10m&limit=2":                    end(0) + first + second + end(tag+1),
		"since=0&wait=0s&prefix=b":                    end(0) + second + end(tag+1),
		"since=0&wait=1ms&prefix=none":                end(0) + end(tag+1),
		fmt.Sprintf("since=%d&wait=0", tag):           end(tag) + second + end(tag+1),
		fmt.Sprintf("since=%d&wait=10ms", tag+1):      end(tag+1) + end(tag+1),
		"wait=0":                                      end(tag+1) + end(tag+1),
		fmt.Sprintf("since=%d&wait=0&prefix=a", tag):  end(tag) + end(tag+1),
		fmt.Sprintf("since=%d&wait=0&limit=1", tag-0): end(tag) + second + end(tag+1),
	} {
		if got := body(query); got != want {
			t.Errorf("%s: got %q; want %q", query, got, want)
		}
	}
	want(t, n, 410, http.MethodGet, fmt.Sprintf("/changes?since=%d", tag-1), "")
	want(t, n, 410, http.MethodGet, fmt.Sprintf("/changes?since=%d", tag+2), "")
	began := time.Now()
	if a := want(t, n, 200, http.MethodHead, "/changes?wait=10m", ""); a.body != "" || time.Since(began) > time.Second {
		t.Errorf("got %v for HEAD after %v; want it at once", a, time.Since(began))
	}
	if a := want(t, n, 405, http.MethodPost, "/changes", ""); a.header.Get("Allow") != "GET, HEAD" {
		t.Errorf("got %v; want Allow", a.header)
	}
	for target, tag := range map[string]uint64{"/key/a": tag + 1, "/key/none": tag + 1, "/key?prefix=": tag + 1, "/key?prefix=none": tag + 1} {
		if got := want(t, n, 200, http.MethodGet, target, "").header.Get("Raft-Tag"); got != fmt.Sprint(tag) {
			t.Errorf("%s: got Raft-Tag %q; want %d", target, got, tag)
		}
	}
}

// Cursors beyond what a node has executed: the leader decides, and without one it cannot be known.
func TestChangesAheadOfANode(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	cut := c.followers(leader)[0]
	set := func() uint64 {
		t.Helper()
		written, err := c.nodes[leader].kv.Set(t.Context(), []Pair{{"k", "1"}}, Condition{})
		if err != nil {
			t.Fatal(err)
		}
		return uint64(written.Tag)
	}
	old := set()
	waitFor(t, "the follower to have it", func() bool { return c.nodes[cut].kv.machine.feed.newest() == old })
	c.cut(cut, linkCut)
	tag := set()
	get := func(node int, since uint64) answerTo {
		return request(t, http.MethodGet, fmt.Sprintf("%s/changes?since=%d&wait=0", c.nodes[node].url, since), "")
	}
	if a := get(cut, old); a.status != 200 {
		t.Errorf("a tag that a node without a quorum has: got %v; want 200", a)
	}
	began := time.Now()
	if a := get(cut, tag); a.status != 503 || time.Since(began) > 8*time.Second {
		t.Errorf("a tag that a node without a leader has not: got %v after %v; want 503 within 5 s", a, time.Since(began))
	}
	if a := get(leader, tag+1); a.status != 410 || !strings.Contains(a.body, "list the keys") {
		t.Errorf("a tag beyond the leader's: got %v; want 410", a)
	}
	c.cut(cut, linkOpen)
	waitFor(t, "the follower to be back", func() bool { return c.nodes[cut].Leader() != "" })
	for range 10 {
		tag = set()
		if a := get(cut, tag); a.status != 200 {
			t.Errorf("a tag that the leader has just given: got %v; want 200", a)
		}
	}
	if a := get(cut, tag+1); a.status != 410 {
		t.Errorf("a tag beyond the leader's, at a follower: got %v; want 410", a)
	}
}

// When a snapshot takes the place of the state, streams end with how far they had seen, and what was before is not known.
func TestChangesWhenASnapshotIsInstalled(t *testing.T) {
	n := newTestNode(t, storeMemory)
	tag := put(t, n, "a", "1")
	stream := follow(t, n.url, "wait=1m")
	end := fmt.Sprintf("{\"tag\":%d}\n", tag)
	if got := nextLine(t, stream); got != end {
		t.Fatalf("got %q; want %q", got, end)
	}
	var snapshot bytes.Buffer
	n.Capture(func() {
		if err := n.kv.machine.Snapshot()(&snapshot); err != nil {
			t.Error(err)
		}
	})
	install, err := n.kv.machine.Restore(&snapshot)
	if err != nil {
		t.Fatal(err)
	}
	n.Capture(install)
	if rest, err := io.ReadAll(stream); err != nil || string(rest) != end {
		t.Errorf("got %q, %v; want the end of the stream with %q", rest, err, end)
	}
	want(t, n, 200, http.MethodGet, fmt.Sprintf("/changes?wait=0&since=%d", tag), "")
	want(t, n, 410, http.MethodGet, "/changes?wait=0&since=0", "")
}

// A stream outlives the server's limits on requests, says now and then how far it is, and has lines at once.
func TestStreamsOutliveTimeouts(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	_, web := streamNode(t, n, func(s *streams, server *server, web *httptest.Server) {
		s.beat = 100 * time.Millisecond
		web.Config.ReadTimeout, web.Config.WriteTimeout = 200*time.Millisecond, 300*time.Millisecond
		web.Listener = server.door(web.Listener, nil)
	})
	began := time.Now()
	stream := follow(t, web.URL, "wait=1500ms")
	nextLine(t, stream)
	beats := 0
	for time.Since(began) < time.Second {
		if line := nextLine(t, stream); line == "{\"tag\":0}\n" {
			beats++
		}
	}
	tag := put(t, n, "k", "1")
	wrote := time.Now()
	if got := nextLine(t, stream); !strings.Contains(got, fmt.Sprint(tag)) && nextLine(t, stream) == "" || time.Since(wrote) > time.Second {
		t.Errorf("got %q after %v; want the change at once", got, time.Since(wrote))
	}
	rest, err := io.ReadAll(stream)
	if took := time.Since(began); err != nil || took < 1400*time.Millisecond || took > 4*time.Second || beats < 5 || !strings.HasSuffix(string(rest), fmt.Sprintf("{\"tag\":%d}\n", tag)) {
		t.Errorf("got %q, %v after %v and %d beats; want an end after 1.5 s", rest, err, took, beats)
	}
}

// Quiet streams are not what a full port closes.
func TestStreamsKeepNobodyWaiting(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	_, web := streamNode(t, n, func(_ *streams, _ *server, web *httptest.Server) {
		web.Listener = newLimiter(web.Listener, 5, requestBytes, n.metrics.crowded)
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
	waitFor(t, "a crowd", func() bool { return request(t, http.MethodGet, web.URL+"/livez", "").status == 200 })
	tag := put(t, n, "k", "1")
	if got := nextLine(t, stream); !strings.Contains(got, fmt.Sprint(tag)) {
		t.Errorf("got %q; want the change", got)
	}
}

// Readers that do not read are ended, hold up no write and keep no history in memory; those that read slowly are told all or ended.
func TestStreamsThatAreNotRead(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	const patience = 700 * time.Millisecond
	turns := make(chan struct{}, 100)
	_, web := streamNode(t, n, func(s *streams, server *server, web *httptest.Server) {
		s.patience, s.turns = patience, turns
		web.Listener = server.door(web.Listener, nil)
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
	waitFor(t, "all streams to be open", func() bool { return len(turns) == 50 })
	reader := follow(t, web.URL, "since=0&wait=10m")
	nextLine(t, reader)
	value := `"` + strings.Repeat("x", 400<<10) + `"`
	began := time.Now()
	for i := range 100 { // 40 MB: the history holds the last of them
		if _, err := n.kv.Set(t.Context(), []Pair{{"k", value}}, Condition{}); err != nil {
			t.Fatal(err)
		}
		if line := nextLine(t, reader); len(line) < len(value) {
			t.Fatalf("write %d: got %.100q; want it told", i, line)
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("100 writes took %v beside readers that do not read", took)
	}
	waitFor(t, "silent readers to be ended", func() bool { return len(turns) == 1 })
	var s runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&s)
	t.Logf("%d MB in use", s.HeapAlloc>>20)
}

// When the node stops, streams end within a second: quiet ones with their last line, and those that are not read.
func TestStreamsEndWithTheNode(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, storeMemory)
	turns := make(chan struct{}, 10)
	server, web := streamNode(t, n, func(s *streams, server *server, web *httptest.Server) {
		s.turns = turns
		web.Listener = server.door(web.Listener, nil)
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
	waitFor(t, "both to be open", func() bool { return len(turns) == 2 })
	for range 10 {
		put(t, n, "k", `"`+strings.Repeat("x", 400<<10)+`"`)
	}
	time.Sleep(100 * time.Millisecond) // for the one that is not read to be stuck
	began := time.Now()
	server.stopping.Store(true)
	server.stop()
	if rest, err := io.ReadAll(quiet); err != nil || !strings.HasPrefix(string(rest), `{"tag":`) {
		t.Errorf("got %q, %v; want the last line", rest, err)
	}
	waitFor(t, "both to have ended", func() bool { return len(turns) == 0 })
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

// crowd opens so many streams and reads them until the test ends.
func crowd(t testing.TB, base string, count int, query string) {
	t.Helper()
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
		wg.Go(func() { // until ctx ends
			defer response.Body.Close()
			_, _ = io.Copy(io.Discard, response.Body)
		})
	}
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
	without := measure()
	crowd(t, n.url, maxStreams, "")
	if a := request(t, http.MethodGet, n.url+"/changes?wait=0", ""); a.status != 503 || a.header.Get("Retry-After") == "" {
		t.Errorf("got %v for one stream more; want 503", a)
	}
	with := measure()
	t.Logf("%v of processor time in 2 s without streams, %v with %d", without, with, maxStreams)
	if with > without+100*time.Millisecond {
		t.Errorf("%d idle streams took %v of processor time in 2 s; want none", maxStreams, with-without)
	}
}

// BenchmarkWritesWithStreams measures durable writes beside a thousand streams that are told of none, of each tenth, or of all of them.
func BenchmarkWritesWithStreams(b *testing.B) {
	value := `"` + strings.Repeat("x", 256) + `"`
	for _, bm := range []struct {
		name, query string
		streams     int
	}{{"none", "", 0}, {"other prefix", "prefix=other", maxStreams}, {"a tenth", "prefix=k0", maxStreams}, {"all", "", maxStreams}} {
		for _, clients := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d", bm.name, clients), func(b *testing.B) {
				n := newTestNode(b, storeBolt)
				crowd(b, n.url, bm.streams, bm.query)
				b.SetParallelism(max(1, clients/runtime.GOMAXPROCS(0)))
				b.ResetTimer()
				began := time.Now()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if _, err := n.kv.Set(b.Context(), []Pair{{fmt.Sprint("k", rand.IntN(1000)%10), value}}, Condition{}); err != nil {
							b.Error(err)
						}
					}
				})
				b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "writes/s")
				f, open := n.kv.machine.feed, 0
				f.mu.RLock()
				for _, g := range f.groups {
					open += g.readers
				}
				f.mu.RUnlock()
				b.ReportMetric(float64(open), "streams") // those that could not keep up have ended
			})
		}
	}
}
