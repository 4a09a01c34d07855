package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

// writtenChange is a write as the model has it.
type writtenChange struct {
	tag     uint64
	changes []keyChange
}

// modelWriter makes writes of all kinds to keys of its own.
func modelWriter(ctx context.Context, kv *kvClient, name string, count int) (writes []writtenChange, err error) {
	there := make(map[string]bool)
	other := name + "/other"
	for i := range count {
		key, value := fmt.Sprintf("%s/%c", name, 'a'+rand.IntN(3)), fmt.Sprintf(`"%s-%d"`, name, i)
		set := Pair{key, value}
		w := writtenChange{changes: []keyChange{{key: key, value: value}}}
		switch rand.IntN(4) {
		case 0: // deletes of what is not there are no changes
			w.tag, err = kv.write(ctx, deleteCommand(key))
			w.changes = nil
			if there[key] {
				w.changes = []keyChange{{key: key, deleted: true}}
			}
			there[key] = false
		case 1:
			w.tag, err = kv.write(ctx, setCommand(set, Pair{other, value}))
			w.changes = append(w.changes, keyChange{key: other, value: value})
			there[key], there[other] = true, true
		case 2:
			w.tag, err = kv.txn(ctx, txn{set: []Pair{set}, remove: []Pair{{Key: other}}})
			if there[other] {
				w.changes = append(w.changes, keyChange{key: other, deleted: true})
			}
			there[key], there[other] = true, false
		default:
			w.tag, err = kv.write(ctx, setCommand(set))
			there[key] = true
		}
		if err != nil {
			return nil, err
		}
		writes = append(writes, w)
	}
	return writes, nil
}

// getBody returns the body of an answer, whose status must be 200.
func getBody(ctx context.Context, url string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("got %s %.200s", response.Status, body)
	}
	return string(body), err
}

// modelReader follows from a tag on until it has seen all up to a tag that comes later, through any node, and
// returns its lines.
func modelReader(
	ctx context.Context, c *testCluster, since uint64, prefix string, until func() (uint64, bool),
) (lines []feedLine, err error) {
	for {
		if last, known := until(); known && since >= last {
			return lines, nil
		}
		query := url.Values{"since": {fmt.Sprint(since)}, "prefix": {prefix}, "wait": {fmt.Sprint(rand.IntN(200), "ms")}}
		if rand.IntN(2) == 0 {
			query.Set("limit", fmt.Sprint(1+rand.IntN(20)))
		}
		target := c.nodes[rand.IntN(len(c.nodes))].url + "/changes?" + query.Encode()
		body, err := getBody(ctx, target)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", target, err)
		}
		text := strings.Split(strings.TrimSuffix(body, "\n"), "\n")
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

// Every reader is told of every write once, in order, and whole, whatever node it asks and wherever it begins, while
// all write.
func TestChangesAgainstAModel(t *testing.T) {
	t.Parallel()
	c := newKVCluster(t, 3)
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
			writes, err := modelWriter(t.Context(), kvOf(c.nodes[i%3]), fmt.Sprintf("w%d", i), 300)
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
	n := newKVNode(t)
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			if _, err := modelWriter(t.Context(), kvOf(n), fmt.Sprint("w", i), 400); err != nil {
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
	if diff := gocmp.Diff(valuesOf(n), copied); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestChangesParameters(t *testing.T) {
	n := newKVNode(t)
	for _, query := range []string{
		"since=", "since=-1", "since=x", "since=%2217%22", "wait=", "wait=5", "wait=-1s", "wait=10m1s", "limit=0",
		"limit=-1", "limit=x", "since=1&since=1",
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
	first := fmt.Sprintf(`{"tag":%d,"changes":[{"key":"a","value":1}]}`+"\n", tag)
	second := fmt.Sprintf(`{"tag":%d,"changes":[{"key":"b","value":2}]}`+"\n", tag+1)
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
	for _, target := range []string{"/key/a", "/key/none", "/key?prefix=", "/key?prefix=none", "/backup"} {
		if got := want(t, n, 200, http.MethodGet, target, "").header.Get("Raft-Tag"); got != fmt.Sprint(tag+1) {
			t.Errorf("%s: got Raft-Tag %q; want %d", target, got, tag+1)
		}
	}
}

// Cursors beyond what a node has executed: the leader decides, and without one it cannot be known.
func TestChangesAheadOfANode(t *testing.T) {
	t.Parallel()
	c := newKVCluster(t, 3)
	leader := c.leader()
	cut := c.followers(leader)[0]
	set := func() uint64 {
		t.Helper()
		tag, err := kvOf(c.nodes[leader]).write(t.Context(), setCommand(Pair{"k", "1"}))
		if err != nil {
			t.Fatal(err)
		}
		return tag
	}
	old := set()
	waitFor(t, "the follower to have it", func() bool { return kvOf(c.nodes[cut]).machine.feed.newest() == old })
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

// When a snapshot takes the place of the state, streams end with how far they had seen, and what was before is not
// known.
func TestChangesWhenASnapshotIsInstalled(t *testing.T) {
	n := newKVNode(t)
	tag := put(t, n, "a", "1")
	stream := follow(t, n.url, "wait=1m")
	end := fmt.Sprintf("{\"tag\":%d}\n", tag)
	if got := nextLine(t, stream); got != end {
		t.Fatalf("got %q; want %q", got, end)
	}
	newer, snapshot := newMachine(), new(bytes.Buffer)
	newer.lastTag = Tag(tag)
	newer.write([]Pair{{"b", "2"}}, nil, time.Now())
	if err := newer.Snapshot()(snapshot); err != nil {
		t.Fatal(err)
	}
	install, err := kvOf(n).machine.Restore(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	n.Capture(install)
	if rest, err := io.ReadAll(stream); err != nil || string(rest) != end {
		t.Errorf("got %q, %v; want the end of the stream with %q", rest, err, end)
	}
	want(t, n, 200, http.MethodGet, fmt.Sprintf("/changes?wait=0&since=%d", tag+1), "")
	want(t, n, 410, http.MethodGet, fmt.Sprintf("/changes?wait=0&since=%d", tag), "")
	want(t, n, 410, http.MethodGet, "/changes?wait=0&since=0", "")
}

// BenchmarkWritesWithStreams measures durable writes to a node with a thousand streams, which are told of none, of each
// tenth, or of all of them, and to one without, turn by turn, since the machine may be busy with other things. The ratio is
// how many it is with streams for each one without.
func BenchmarkWritesWithStreams(b *testing.B) {
	for _, bm := range []struct{ name, query string }{{"other prefix", "prefix=other"}, {"a tenth", "prefix=k0"}, {"all", ""}} {
		for _, clients := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d", bm.name, clients), func(b *testing.B) {
				var nodes []*testNode
				for range 2 {
					c := unstartedCluster(b, 1, storeBolt)
					c.service = kvService{}
					c.startAll()
					nodes = append(nodes, c.nodes[0])
				}
				open := openStreams(b, nodes[1].url, maxStreams, bm.query)
				var writes [2]float64
				var took [2]time.Duration
				for i := 0; b.Loop(); i++ {
					before := cpuTime(b)
					writes[i%2] += writeFor(b, kvOf(nodes[i%2]), clients, 250*time.Millisecond)
					took[i%2] += cpuTime(b) - before
				}
				b.ReportMetric(writes[1]/writes[0], "ratio")
				b.ReportMetric(writes[0]/float64(b.N)*8, "writes/s")
				b.ReportMetric(float64(took[0].Microseconds())/writes[0], "cpu-µs/write")
				b.ReportMetric(float64(took[1].Microseconds())/writes[1], "cpu-µs/write-with-streams")
				b.ReportMetric(float64(open.Load()), "streams") // those that could not keep up have ended
			})
		}
	}
}

// writeFor has clients write for some time, and returns how many writes that were.
func writeFor(b *testing.B, kv *kvClient, clients int, d time.Duration) float64 {
	b.Helper()
	value := `"` + strings.Repeat("x", 256) + `"`
	var writes atomic.Int64
	var wg sync.WaitGroup
	for began, i := time.Now(), 0; i < clients; i++ {
		wg.Go(func() {
			for ; time.Since(began) < d; writes.Add(1) {
				if err := kv.set(b.Context(), Pair{fmt.Sprint("k", rand.IntN(10)), value}); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	return float64(writes.Load())
}
