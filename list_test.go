package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestListing(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	pairs := []Pair{{"b", "1"}, {"a", "2"}, {"ab", "3"}, {"a/b", "4"}, {"a c", "5"}, {"é", "6"}, {`q"\`, "7"}, {"ab\x00", "[1.0]"}, {"a&b=+", "8"}}
	if _, err := c.nodes[0].kv.Set(t.Context(), pairs, Condition{}); err != nil {
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
		{"a page", "limit=2", `{"a":2,"a c":5}`, `</key?after=a+c&limit=2>; rel="next"`},
		{"a page that is the last", "limit=2&after=b", `{"q\"\\":7,"é":6}`, ""},
		{
			"a page with all there is to say", "prefix=a&limit=1&after=a+c&consistency=stale", `{"a&b=+":8}`,
			`</key?after=a%26b%3D%2B&consistency=stale&limit=1&prefix=a>; rel="next"`,
		},
	}
	for _, node := range c.nodes {
		node.get(t, "a") // so that stale reads see all, too
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
	node := newTestNode(t, storeMemory)
	want := make(map[string]string)
	var pairs []Pair
	for i := range 40 {
		key := fmt.Sprintf("%d&=+ %%", i)
		want[key] = strings.Repeat("x", 400<<10)
		pairs = append(pairs, Pair{key, `"` + want[key] + `"`})
	}
	if _, err := node.kv.Set(t.Context(), pairs, Condition{}); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int{1, 7, 40, 1000} {
		got := make(map[string]string)
		pages := 0
		for next := fmt.Sprintf("/key?limit=%d", limit); next != ""; pages++ {
			a := request(t, http.MethodGet, node.url+next, "")
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
		if limit == 1000 && pages < 4 {
			t.Errorf("got %d pages of 16 MB; want them to end after 4 MiB", pages)
		}
	}
}

func BenchmarkListPageOf1000In1M(b *testing.B) {
	m := newMachine()
	for i := range 1_000_000 {
		key := fmt.Sprintf("key-%08d", i)
		m.items.Set(key, Item{Value: "1", Tag: 1})
	}
	kv := &KV{&Store{replica: &replica{machine: m}}, m} // started so long ago that it answers stale reads
	for b.Loop() {
		n := 0
		err := kv.List(b.Context(), "key-", "key-00500000", Stale, func(string, Item) bool { n++; return n < defaultPage })
		if err != nil || n != defaultPage {
			b.Fatalf("got %d keys, %v; want %d", n, err, defaultPage)
		}
	}
}
