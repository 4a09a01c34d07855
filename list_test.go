package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tidwall/btree"
)

func TestListing(t *testing.T) {
	t.Parallel()
	c := newKVCluster(t, 3)
	pairs := []Pair{{"b", "1"}, {"a", "2"}, {"ab", "3"}, {"a/b", "4"}, {"a c", "5"}, {"é", "6"}, {`q"\`, "7"}, {"ab\x00", "[1.0]"}, {"a&b=+", "8"}}
	if err := kvOf(c.nodes[0]).set(t.Context(), pairs...); err != nil {
		t.Fatal(err)
	}
	const all = `{"a":2,"a c":5,"a&b=+":8,"a/b":4,"ab":3,"ab\u0000":[1.0],"b":1,"q\"\\":7,"é":6}`
	tests := []struct{ name, query, want, next string }{
		{"all", "prefix=", all, ""},
		{"all, by a limit", "limit=9", all, ""},
		{"all, by an empty after", "after=", all, ""},
		{"a prefix", "prefix=ab", `{"ab":3,"ab\u0000":[1.0]}`, ""},
		{"a prefix that no key has", "prefix=x", `{}`, ""},
		{"after a key", "after=ab", `{"ab\u0000":[1.0],"b":1,"q\"\\":7,"é":6}`, ""},
		{"after no key", "after=aa", `{"ab":3,"ab\u0000":[1.0],"b":1,"q\"\\":7,"é":6}`, ""},
		{"after the last", "after=%C3%A9", `{}`, ""},
		{"a prefix, after a key before it", "prefix=ab&after=a", `{"ab":3,"ab\u0000":[1.0]}`, ""},
		{"a prefix, after a key in it", "prefix=ab&after=ab", `{"ab\u0000":[1.0]}`, ""},
		{"a prefix, after a key behind it", "prefix=ab&after=b", `{}`, ""},
		{"a page", "limit=2", `{"a":2,"a c":5}`, `<?after=a+c&limit=2>; rel="next"`},
		{"a page that is the last", "limit=2&after=b", `{"q\"\\":7,"é":6}`, ""},
		{
			"a page with all there is to say", "prefix=a&limit=1&after=a+c&consistency=stale", `{"a&b=+":8}`,
			`<?after=a%26b%3D%2B&consistency=stale&limit=1&prefix=a>; rel="next"`,
		},
	}
	for _, node := range c.nodes {
		if _, err := kvOf(node).get(t.Context(), "a"); err != nil { // so that stale reads see all, too
			t.Fatal(err)
		}
		for _, tt := range tests {
			a := request(t, http.MethodGet, node.url+"/key?"+tt.query, "")
			if a.status != http.StatusOK || a.body != tt.want || a.header.Get("Link") != tt.next {
				t.Errorf("%s, through %s: got %d %s, Link %q; want 200 %s, Link %q", tt.name, node.cfg.NodeID,
					a.status, a.body, a.header.Get("Link"), tt.want, tt.next)
			}
			if got := a.header.Get("Content-Type"); got != jsonType {
				t.Errorf("%s: got Content-Type %q; want %q", tt.name, got, jsonType)
			}
			head := request(t, http.MethodHead, node.url+"/key?"+tt.query, "")
			if head.body != "" || head.header.Get("Content-Length") != fmt.Sprint(len(tt.want)) {
				t.Errorf("%s: HEAD got %v; want no body and its length", tt.name, head)
			}
		}
	}
	for _, query := range []string{
		"", "consistency=stale", "limit=0", "limit=10001", "limit=-1", "limit=", "limit=x", "limit=1&limit=2", "prefix=a&prefix=b",
		"after=%ff", "prefix=%zz", "prefix=a&consistency=x", "other=1",
	} {
		if a := request(t, http.MethodGet, c.nodes[0].url+"/key?"+query, ""); a.status != http.StatusBadRequest {
			t.Errorf("%q: got %v; want 400", query, a)
		}
	}
	for _, header := range []string{"If-Match", "If-None-Match"} {
		if a := request(t, http.MethodGet, c.nodes[0].url+"/key?prefix=", "", header, "*"); a.status != http.StatusBadRequest {
			t.Errorf("with %s: got %v; want 400", header, a)
		}
	}
}

// Following Link from page to page gives every key once, whatever the pages' sizes.
func TestListingPageByPage(t *testing.T) {
	t.Parallel()
	node := newKVNode(t)
	want := make(map[string]string)
	var pairs []Pair
	for i := range 40 {
		key := fmt.Sprintf("%d&=+ %%", i)
		want[key] = strings.Repeat("x", 400<<10)
		pairs = append(pairs, Pair{key, `"` + want[key] + `"`})
	}
	if err := kvOf(node).set(t.Context(), pairs...); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int{1, 7, 40, 1000} {
		got := make(map[string]string)
		pages := 0
		for next := fmt.Sprintf("?limit=%d", limit); next != ""; pages++ {
			a := request(t, http.MethodGet, node.url+"/key"+next, "")
			page := make(map[string]string)
			if err := json.Unmarshal([]byte(a.body), &page); err != nil {
				t.Fatal(err)
			}
			if len(page) > limit || len(a.body) > maxPageBytes+500<<10 {
				t.Errorf("got a page of %d keys, %d bytes; want at most %d keys and about %d bytes", len(page), len(a.body), limit, maxPageBytes)
			}
			for key, value := range page {
				if _, twice := got[key]; twice {
					t.Errorf("limit %d: %q is on two pages", limit, key)
				}
				got[key] = value
			}
			next, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("limit %d: (-want +got)\n%.300s", limit, diff)
		}
		if limit == 1000 && pages != 14 { // of three values each
			t.Errorf("got %d pages of 16 MB; want them to end after 1 MiB", pages)
		}
	}
}

// A listing is of one moment, and neither holds up what is written meanwhile nor sees it.
func TestListingOfAStateThatChanges(t *testing.T) {
	t.Parallel()
	kv := kvOf(newKVNode(t))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	set := func(value string) {
		t.Helper()
		if err := kv.set(ctx, Pair{"a", value}, Pair{"b", value}, Pair{"c" + value, value}); err != nil {
			t.Fatal(err)
		}
	}
	set("1")
	var got []string
	var items *btree.Map[string, Item]
	kv.store.Capture(func() { items = kv.machine.items.Copy() })
	items.Scan(func(key string, item Item) bool {
		set("2")
		got = append(got, key+item.Value)
		return true
	})
	if diff := cmp.Diff([]string{"a1", "b1", "c11"}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if item, err := kv.get(ctx, "a"); err != nil || item.Value != "2" {
		t.Errorf("got %v, %v; want what was written meanwhile", item, err)
	}
}

// A thousand listings of one state cost no more than one: all share the tree, and so does the next state, but for what
// differs in it.
func TestListingsShareTheState(t *testing.T) {
	m := newMachine()
	for i := range 100_000 {
		m.items.Set(fmt.Sprintf("key-%08d", i), Item{Value: "1", Tag: 1})
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 1000 {
		listing{query: make(url.Values), limit: 1}.page(m.items.Copy())
	}
	m.items.Set("key-00050000", Item{Value: "2", Tag: 2})
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
		t.Errorf("got %d bytes allocated for 1,000 listings and a write; want less than 1 MiB", got)
	}
}

// A listing that gets no turn is refused in time, and one that nobody waits for at once.
func TestListingWithoutATurn(t *testing.T) {
	t.Parallel()
	node := newKVNode(t)
	a := &api{node.Store, node.machine.(*kvMachine), make(chan struct{}), nil} // which nobody takes a turn from
	for _, patience := range []time.Duration{100 * time.Millisecond, time.Minute} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		began, w := time.Now(), httptest.NewRecorder()
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/key?prefix=", http.NoBody)
		err := a.listKeys(w, r)
		node.server.writeError(&response{ResponseWriter: w, server: node.server, client: new(client)}, r, err)
		if took := time.Since(began); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || took > 5*time.Second {
			t.Errorf("got %v, %d, after %v; want 503 within 5 s", err, w.Code, took)
		}
		cancel()
	}
}

// Readers that do not read are ended, and hold up nobody: not even other listings, nor large values.
func TestReadersThatDoNotRead(t *testing.T) {
	t.Parallel()
	node := newKVNode(t)
	value := `"` + strings.Repeat("x", 400<<10) + `"`
	for i := range 10 {
		put(t, node, fmt.Sprint("k", i), value)
	}
	a := &api{node.Store, node.machine.(*kvMachine), make(chan struct{}, maxListings), nil}
	routes := []route{{path: "/key", get: a.listKeys}, {path: keyPrefix, get: a.getKey}}
	server := newServer(node.cfg, node.Store, nil, node.metrics, testLogger(t, "http"), routes)
	web := httptest.NewUnstartedServer(nil)
	web.Config = server.httpServer()
	web.Listener = server.limitListener(web.Listener, nil)
	web.Start()
	t.Cleanup(web.Close)
	var silent []net.Conn
	for i := range 48 {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", web.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		target := "/key?prefix=k&limit=10000"
		if i%6 == 0 {
			target = "/key/k0"
		}
		if _, err := io.WriteString(conn, requestText(http.MethodGet, target, "")); err != nil {
			t.Fatal(err)
		}
		silent = append(silent, conn)
	}
	for _, target := range []string{"/key/k1", "/key?prefix=k"} {
		began := time.Now()
		got := request(t, http.MethodGet, web.URL+target, "")
		if took := time.Since(began); got.status != http.StatusOK || len(got.body) < len(value) || took > 4*time.Second {
			t.Errorf("%s: got %d, %d bytes, after %v; want it answered", target, got.status, len(got.body), took)
		}
	}
	waitFor(t, "all listings to end", func() bool { return len(a.listings) == 0 })
	for _, conn := range silent {
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, err := io.Copy(io.Discard, conn); n >= int64(len(value)) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("got %d bytes, %v, of an answer that nobody read; want its connection closed", n, err)
		}
	}
}

func BenchmarkListPageOf1000In1M(b *testing.B) {
	m := newMachine()
	for i := range 1_000_000 {
		key := fmt.Sprintf("key-%08d", i)
		m.items.Set(key, Item{Value: "1", Tag: 1})
	}
	for b.Loop() {
		l := listing{query: make(url.Values), prefix: "key-", after: "key-00500000", limit: defaultPage}
		if _, next := l.page(m.items.Copy()); next == "" {
			b.Fatal("got the last page; want the first of many")
		}
	}
}
