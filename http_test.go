package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wantValue checks that a key that needs no escaping has a value, given as JSON; it may be null.
func wantValue(t *testing.T, n *testNode, key, value string) answerTo {
	t.Helper()
	a := want(t, n, 200, http.MethodGet, "/key/"+key, "")
	if body := `{"` + key + `":` + value + `}`; a.body != body {
		t.Errorf("value of %s: got %.200s; want %.200s", key, a.body, body)
	}
	return a
}

// put sets a key and returns its tag.
func put(t *testing.T, n *testNode, key, value string) uint64 {
	t.Helper()
	return tagOf(t, want(t, n, 200, http.MethodPut, "/key/"+key, value))
}

func quoted(tag uint64) string { return fmt.Sprintf(`"%d"`, tag) }

func tagOf(t *testing.T, a answerTo) uint64 {
	t.Helper()
	etag := a.header.Get("ETag")
	tag, err := strconv.ParseUint(strings.Trim(etag, `"`), 10, 64)
	if err != nil || etag != quoted(tag) {
		t.Errorf("ETag: got %q; want a quoted number", etag)
	}
	return tag
}

func indexOf(t *testing.T, a answerTo) uint64 {
	t.Helper()
	index, err := strconv.ParseUint(a.header.Get("Raft-Index"), 10, 64)
	if err != nil || index == 0 {
		t.Errorf("Raft-Index: got %q; want a number", a.header.Get("Raft-Index"))
	}
	return index
}

func nested(open, end string, depth int) string {
	return strings.Repeat(open, depth) + strings.Repeat(end, depth)
}

func TestValuesComeBackByteForByte(t *testing.T) {
	n := newKVNode(t)
	values := map[string]string{
		"object": `{"a":{},"b":[]}`, "array": `[1,"2",null,true]`, "string": `"text"`, "empty string": `""`,
		"true": `true`, "false": `false`, "null": `null`, "zero": `0`, "negative zero": `-0`,
		"big integer": `9007199254740993`, "huge integer": strings.Repeat("1234567890", 40),
		"fraction of zero": `1.0`, "number beyond a double": `1e400`, "exponent with plus and capital": `1E+02`,
		"order of members": `{"z":1,"a":2,"m":3}`, "duplicate nested members": `{"a":1,"a":2,"\u0061":3}`,
		"html": `"<b>&'</b>"`, "escapes": `"\u0041\/\"\\\b\f\n\r\t\u003c\u2028"`,
		"surrogate pairs": `"\ud83d\uDE00 \\ud800"`, "line separators as they are": "\"\u2028\u2029\"",
		"delete and other odd characters": "\"\x7f\u0080\ufeff\ufffd😀\"", "brackets and quotes in strings": `["]}\"","{[\\",":,"]`,
		"white space in strings": `[" a  b "]`, "white space between tokens": " \t\r\n{ \"a\" : [ 1 ,\n2 ] , \"b\" : { } } \r\n",
		"as deep as allowed":  nested("[", "]", maxDepth),
		"many brackets":       "[" + strings.Repeat(`[[["[[{"]],{"{":{}}],`, 200) + "1]",
		"as large as allowed": `"` + strings.Repeat("x", int(n.cfg.MaxBodyBytes)-2) + `"`,
	}
	for name, sent := range values {
		t.Run(name, func(t *testing.T) {
			kept := sent
			if name == "white space between tokens" {
				kept = `{"a":[1,2],"b":{}}`
			}
			tag := put(t, n, "put", sent)
			a := wantValue(t, n, "put", kept)
			if tagOf(t, a) != tag || a.header.Get("Content-Type") != "application/json" {
				t.Errorf("got %v; want tag %d, as the put had, and application/json", a.header, tag)
			}
			if len(sent) > 1<<18 {
				return // no room for the rest of an object
			}
			want(t, n, 200, http.MethodPost, "/key", ` { "before" : 1 , "post" : `+sent+` , "after":[] } `)
			wantValue(t, n, "post", kept)
			wantValue(t, n, "after", "[]")
		})
	}
}

func TestReadAndDelete(t *testing.T) {
	n := newKVNode(t)
	t.Run("missing or null", func(t *testing.T) {
		if a := wantValue(t, n, "null", "null"); a.header["Etag"] != nil {
			t.Errorf("missing: got %v; want no ETag", a.header)
		}
		want(t, n, 200, http.MethodPost, "/key", `{"null":null}`)
		tagOf(t, wantValue(t, n, "null", "null"))
	})
	t.Run("delete twice", func(t *testing.T) {
		put(t, n, "twice", "1")
		first := indexOf(t, want(t, n, 200, http.MethodDelete, "/key/twice", ""))
		second := indexOf(t, want(t, n, 200, http.MethodDelete, "/key/twice", ""))
		if a := wantValue(t, n, "twice", "null"); a.header["Etag"] != nil || second <= first {
			t.Errorf("got %v after Raft-Index %d and %d; want no ETag, and growing numbers", a.header, first, second)
		}
	})
	t.Run("any content type and a chunked body will do", func(t *testing.T) {
		want(t, n, 200, http.MethodPost, "/key", `{"curl":1}`, "Content-Type", "application/x-www-form-urlencoded")
		wantValue(t, n, "curl", "1")
		want(t, n, 200, http.MethodPut, "/key/curl", "2\r\n[1\r\n1\r\n]\r\n0\r\n\r\n", "Content-Type", "x", "Transfer-Encoding", "chunked")
		wantValue(t, n, "curl", "[1]")
	})
	t.Run("head is get without the body", func(t *testing.T) {
		put(t, n, "head", `"<value>"`)
		for _, target := range []string{"/key/head", "/key/none", "/key", "/key/", "/nowhere", "/livez", "/readyz", "/key/x?consistency=x"} {
			get, head := ask(t, n, http.MethodGet, target, ""), ask(t, n, http.MethodHead, target, "")
			if length := get.header.Get("Content-Length"); length != strconv.Itoa(len(get.body)) || get.body == "" {
				t.Errorf("%s: got Content-Length %q for %q", target, length, get.body)
			}
			get.body = ""
			get.header.Del("Date")
			head.header.Del("Date")
			if diff := cmp.Diff(get, head, cmp.AllowUnexported(answerTo{})); diff != "" {
				t.Errorf("%s: -get +head:\n%s", target, diff)
			}
		}
	})
}

func TestTagsAndIndexesGrow(t *testing.T) {
	before := uint64(time.Now().UnixMicro())
	n := newKVNode(t)
	first := put(t, n, "a", "1")
	if after := uint64(time.Now().UnixMicro()); first < before || first > after {
		t.Errorf("first tag: got %d; want the wall clock in microseconds, from %d to %d", first, before, after)
	}
	if got := put(t, n, "a", "1"); got != first+1 {
		t.Errorf("tag of the same value again: got %d; want %d", got, first+1)
	}
	post := want(t, n, 200, http.MethodPost, "/key", `{"b":1,"c":2}`)
	for _, key := range []string{"b", "c"} {
		if got := tagOf(t, want(t, n, 200, http.MethodGet, "/key/"+key, "")); got != first+2 {
			t.Errorf("tag of %s: got %d; want %d, that of the post", key, got, first+2)
		}
	}
	for _, empty := range []string{`{}`, " { \n } "} {
		if a := want(t, n, 200, http.MethodPost, "/key", empty); a.header["Raft-Index"] != nil {
			t.Errorf("post of %q: got %v; want no Raft-Index", empty, a)
		}
	}
	want(t, n, 412, http.MethodPut, "/key/b", "2", "If-None-Match", "*")
	want(t, n, 400, http.MethodPut, "/key/b", "x")
	deleted := want(t, n, 200, http.MethodDelete, "/key/a", "")
	again := want(t, n, 200, http.MethodPut, "/key/a", "1")
	if got := tagOf(t, again); got != first+4 {
		t.Errorf("tag after post, no-ops, failures and delete: got %d; want %d", got, first+4)
	}
	if i, j, k := indexOf(t, post), indexOf(t, deleted), indexOf(t, again); i >= j || j >= k {
		t.Errorf("Raft-Index: got %d, %d, %d; want growing numbers", i, j, k)
	}
}

func TestBadBodies(t *testing.T) {
	n := newKVNode(t)
	notJSON := map[string]string{
		"empty": "", "white space": " \n", "bare word": "nil", "unfinished": `{"k":1`, "trailing garbage": `{"k":1}x`,
		"second value": `{"k":1} {"k":2}`, "trailing comma": `{"k":1,}`, "name without quotes": `{k:1}`,
		"leading zero": `{"k":01}`, "not a number": `{"k":NaN}`, "control character in a string": "{\"k\":\"\x01\"}",
		"unknown escape": `{"k":"\x41"}`, "comment": `{"k":1}//`, "byte order mark": "\ufeff{\"k\":1}",
		"invalid utf-8": "{\"k\":\"\xff\"}", "surrogate as utf-8": "{\"k\":\"\xed\xa0\x80\"}",
		"first surrogate alone in a value": `{"k":"\ud800"}`, "second surrogate alone in a value": `{"k":["\uDFFF"]}`,
		"surrogates in the wrong order": `{"k":{"a":"\udc00\ud800"}}`, "surrogate alone in a nested name": `{"k":{"\ud83d":1}}`,
		"value nested too deeply": `{"k":` + nested("[", "]", maxDepth+1) + `}`, "nested too deeply for any parser": nested(`{"k":`, "", 1<<16),
	}
	notKeys := map[string]string{
		"null": "null", "array": `[{"k":1}]`, "number": "1", "string": `"k"`, "empty key": `{"k":1,"":2}`,
		"duplicate members": `{"k":1,"other":2,"k":1}`, "duplicate members, one escaped": `{"k":1,"\u006B":2}`,
		"duplicate members, escaped differently": `{"k":1,"\u0061":1,"other":2,"a":2}`,
		"long key":                               `{"k":1,"` + strings.Repeat("x", 1025) + `":2}`,
		"long key of long characters":            `{"k":1,"` + strings.Repeat("é", 513) + `":2}`,
		"first surrogate alone in a key":         `{"k":1,"\ud800":2}`, "second surrogate alone in a key": `{"k":1,"\udc00":2}`,
		"surrogates in the wrong order in a key":         `{"k":1,"\udc00\ud800":2}`,
		"two first surrogates in a key":                  `{"k":1,"\ud800\ud800\udc00":2}`,
		"surrogate before another escape in a key":       `{"k":1,"\ud83d\u0041":2}`,
		"surrogate before an escaped backslash in a key": `{"k":1,"\ud83d\\ude00":2}`,
	}
	for _, bodies := range []map[string]string{notJSON, notKeys} {
		for name, body := range bodies {
			t.Run(name, func(t *testing.T) {
				want(t, n, 200, http.MethodDelete, "/key/k", "")
				want(t, n, 400, http.MethodPost, "/key", body)
				if notJSON[name] == body {
					want(t, n, 400, http.MethodPut, "/key/k", body)
				}
				wantValue(t, n, "k", "null") // none is set, not even those before the bad one
			})
		}
	}
	t.Run("too large", func(t *testing.T) {
		limit := strconv.FormatInt(n.cfg.MaxBodyBytes, 10)
		body := fmt.Sprintf(`{"l":"%s"}`, strings.Repeat("x", int(n.cfg.MaxBodyBytes)+backupSlack))
		chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
		for method, target := range map[string]string{http.MethodPost: "/key", http.MethodPut: "/key/l"} {
			a := want(t, n, 413, method, target, body)
			b := want(t, n, 413, method, target, chunked, "Transfer-Encoding", "chunked")
			if !strings.Contains(a.body, limit) || !strings.Contains(a.body, "MAX_BODY_BYTES") || a.body != b.body {
				t.Errorf("got %s and %s; want %s and MAX_BODY_BYTES named", a.body, b.body, limit)
			}
			wantValue(t, n, "l", "null")
		}
	})
	t.Run("malformed chunks", func(t *testing.T) {
		want(t, n, 400, http.MethodPut, "/key/c", "what?\r\n", "Transfer-Encoding", "chunked")
		wantValue(t, n, "c", "null")
	})
	t.Run("the object of a post is no level of its values", func(t *testing.T) {
		body := `{"k":` + nested("[", "]", maxDepth) + `}`
		want(t, n, 200, http.MethodPost, "/key", body)
		if a := want(t, n, 400, http.MethodPut, "/key/k", body); !strings.Contains(a.body, strconv.Itoa(maxDepth)) {
			t.Errorf("got %s; want the limit named", a.body)
		}
	})
	t.Run("what is wrong is said, and where, at no length", func(t *testing.T) {
		a := want(t, n, 400, http.MethodPut, "/key/k", `[`+strings.Repeat(`{"`+strings.Repeat("x", 1000)+`":`, 100)+`"\ud800"`)
		if !strings.Contains(a.body, "ud800") || !strings.Contains(a.body, "byte 100") || len(a.body) > 400 {
			t.Errorf("got %.1000s; want what is wrong, and where", a.body)
		}
	})
}

func TestKeys(t *testing.T) {
	n := newKVNode(t)
	long := strings.Repeat("k", maxKeyBytes)
	tests := []struct{ name, path, json, key string }{
		{"slash", "a/b", `a/b`, "a/b"},
		{"escaped slash is the same key", "a%2Fb", `a\/b`, "a/b"},
		{"two slashes", "a//b", `a//b`, "a//b"},
		{"only a slash", "/", `/`, "/"},
		{"slash at the end", "a/", `a/`, "a/"},
		{"dot", ".", `.`, "."},
		{"dots", "..", `..`, ".."},
		{"escaped dots", "%2e%2E", `\u002e.`, ".."},
		{"path that leads out", "../livez", `../livez`, "../livez"},
		{"prefix again", "key/x", `key/x`, "key/x"},
		{"percent sign", "%25", `%`, "%"},
		{"decoded only once", "%2541", `%41`, "%41"},
		{"decoded at all", "%41%c3%bc", `A\u00fc`, "Aü"},
		{"utf-8 not escaped", "ü", `ü`, "ü"},
		{"utf-8 not escaped beside an escaped slash", "ü%2Fü", `ü/ü`, "ü/ü"},
		{"plus and other marks", "a+b;c=d&e,f:@!$'()*~", `a+b;c=d&e,f:@!$'()*~`, "a+b;c=d&e,f:@!$'()*~"},
		{"space", "%20", ` `, " "},
		{"question mark and number sign", "%3F%23?", `?#`, "?#"},
		{"quote and backslash", "%22%5C", `\"\\`, `"\`},
		{"brackets", "%7B%5D%2C%3A", `{],:`, "{],:"},
		{"control characters", "%01%0A%0D%09%1F", `\u0001\n\r\t\u001F`, "\x01\n\r\t\x1f"},
		{"nul", "a%00b", `a\u0000b`, "a\x00b"},
		{"delete", "%7F", `\u007f`, "\x7f"},
		{"html", "%3Cb%3E%26", `<b>&`, "<b>&"},
		{"html and a quote", "%3C%22%3E", `<\">`, `<">`},
		{"line separators", "%E2%80%A8%E2%80%A9", `\u2028\u2029`, "\u2028\u2029"},
		{"line separator and a quote", "%22%E2%80%A8", `\"\u2028`, "\"\u2028"},
		{"surrogate pair", "%F0%9F%98%80", `\ud83d\uDE00`, "😀"},
		{"two surrogate pairs", "%F0%9F%98%80%F0%9F%98%80a", `\uD83D\ude00\ud83d\ude00a`, "😀😀a"},
		{"replacement character", "%EF%BF%BD", `\ufffd`, "\ufffd"},
		{"noncharacter", "%EF%BF%BF", `\uffff`, "\uffff"},
		{"escaped backslash before what looks like a surrogate", "%5Cud800", `\\ud800`, `\ud800`},
		{"1024 bytes", long, long, long},
		{"1024 bytes, all escaped", strings.Repeat("%4B", 1024), strings.Repeat(`\u004b`, 1024), strings.Repeat("K", 1024)},
		{"1024 bytes of long characters", strings.Repeat("%C3%A9", 512), strings.Repeat("é", 512), strings.Repeat("é", 512)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantMember := func(target, value string) {
				a := want(t, n, 200, http.MethodGet, target, "")
				var object map[string]string
				err := json.Unmarshal([]byte(a.body), &object)
				exact := strings.HasPrefix(a.body, `{"`) && (strings.HasSuffix(a.body, `":"`+value+`"}`) || strings.HasSuffix(a.body, `":null}`))
				if object[tt.key] != value || len(object) != 1 || err != nil || !exact {
					t.Errorf("%.200s: got %.200q; want %.200q: %q", target, a.body, tt.key, value)
				}
			}
			target := "/key/" + tt.path
			want(t, n, 200, http.MethodPost, "/key", `{"`+tt.json+`":"posted"}`)
			wantMember(target, "posted")
			want(t, n, 200, http.MethodPut, target, `"put"`)
			wantMember("/key/"+url.PathEscape(tt.key), "put")
			want(t, n, 200, http.MethodDelete, target, "")
			wantMember("/key/"+url.PathEscape(tt.key), "") // null
		})
	}
	refused := map[string]string{
		"empty": "", "1025 bytes": long + "k", "1025 bytes, one escaped": long + "%6B", "not utf-8": "%ff", "not utf-8, not escaped": "\xff",
		"513 long characters": strings.Repeat("%C3%A9", 513), "unfinished character": "a%C3",
		"overlong character": "%C0%80", "surrogate as utf-8": "%ED%A0%80",
	}
	for name, path := range refused {
		t.Run("refused: "+name, func(t *testing.T) {
			for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete} {
				want(t, n, 400, method, "/key/"+path, "1")
			}
		})
	}
	for _, path := range []string{"%", "a%", "%2", "%zz", "%25%"} {
		t.Run("refused: malformed escape "+path, func(t *testing.T) { // by net/http, before it reaches a handler
			text := requestText(http.MethodGet, "/key/"+path, "")
			if a, err := exchange(t.Context(), n.web.Listener.Addr().String(), http.MethodGet, text); err != nil || a.status != 400 {
				t.Errorf("got %v, %v; want 400", a, err)
			}
		})
	}
}

func TestRoutes(t *testing.T) {
	n := newKVNode(t)
	methods := []string{
		http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete,
		http.MethodPatch, http.MethodOptions, http.MethodTrace, http.MethodConnect, "get", "PROPFIND",
	}
	for target, allow := range map[string]string{
		"/key": "GET, HEAD, POST", "/key?x=1": "GET, HEAD, POST",
		"/key/routes": "GET, HEAD, PUT, DELETE", "/key/a/b": "GET, HEAD, PUT, DELETE",
		"/livez": "GET, HEAD", "/readyz": "GET, HEAD", "/status": "GET, HEAD", "/txn": "POST",
		"/changes?wait=0": "GET, HEAD", "/backup": "GET, HEAD",
	} {
		t.Run("methods of "+target, func(t *testing.T) {
			for _, method := range methods {
				if slices.Contains(strings.Split(allow, ", "), method) {
					if a := ask(t, n, method, target, "{}"); a.status == 405 || a.status == 404 || a.header["Allow"] != nil {
						t.Errorf("%s: got %v; want it allowed", method, a)
					}
				} else if a := want(t, n, 405, method, target, "{}"); !slices.Equal(a.header["Allow"], []string{allow}) {
					t.Errorf("%s: got Allow %q; want %q", method, a.header["Allow"], allow)
				}
			}
		})
	}
	put(t, n, "foo", "1")
	for _, target := range []string{
		"/", "/keyfoo", "/keys", "/Key/foo", "//key/foo", "/./key/foo", "/x/../key/foo", "/key%2Ffoo", "/key%2Fü", "/livez/", "/livezz", "/status/",
	} {
		t.Run("nothing at "+target, func(t *testing.T) {
			for _, method := range methods {
				if a := want(t, n, 404, method, target, "{}"); a.header["Location"] != nil || a.header["Allow"] != nil {
					t.Errorf("%s: got %v; want neither Location nor Allow", method, a.header)
				}
			}
		})
	}
	for _, target := range []string{"/key", "/key/", "/key?", "/key/?", "/key?consistency=stale"} {
		t.Run("no key in "+target, func(t *testing.T) { want(t, n, 400, http.MethodGet, target, "") })
	}
}

func TestPreconditions(t *testing.T) {
	n := newKVNode(t)
	const match, none = "If-Match", "If-None-Match"
	type test struct {
		name              string
		headers           []string // TAG stands for the key's tag, or its last before it was deleted; NUMBER for what it quotes
		existing, missing int      // of PUT and DELETE; GET has 304 where they have 412, and 400 to any If-Match
	}
	tests := []test{
		{"no precondition", nil, 200, 200},
		{"match any", []string{match, `*`}, 200, 412},
		{"match", []string{match, `TAG`}, 200, 412},
		{"match other", []string{match, `"1"`}, 412, 412},
		{"match weak", []string{match, `W/TAG`}, 412, 412},
		{"match what is no tag of ours", []string{match, `"xNUMBER", "", "0", "a,NUMBER"`}, 412, 412},
		{"match number written otherwise", []string{match, `"0NUMBER", "+NUMBER", "NUMBER.0"`}, 412, 412},
		{"match list", []string{match, `"1" ,"a,b",TAG`}, 200, 412},
		{"match list of others", []string{match, `"1", "2", W/TAG`}, 412, 412},
		{"match lines", []string{match, `"1"`, match, `"2", TAG`}, 200, 412},
		{"match with empty elements", []string{match, `TAG,, "1",`}, 200, 412},
		{"match with an empty first element", []string{match, `, TAG`}, 200, 412},
		{"match with an empty first line", []string{match, ``, match, `TAG`}, 200, 412},
		{"none match any", []string{none, `*`}, 412, 200},
		{"none match", []string{none, `TAG`}, 412, 200},
		{"none match other", []string{none, `"1"`}, 200, 200},
		{"none match weak", []string{none, `W/TAG`}, 412, 200},
		{"none match what is no tag of ours", []string{none, `"x", "", "0", "a,NUMBER", "0NUMBER"`}, 200, 200},
		{"none match list", []string{none, `"1",W/"2",TAG`}, 412, 200},
		{"none match list of others", []string{none, `"1", "2"`}, 200, 200},
		{"none match lines", []string{none, `"1"`, none, `TAG`}, 412, 200},
		{"both hold", []string{match, `TAG`, none, `"1"`}, 200, 412},
		{"any and other", []string{match, `*`, none, `"1"`}, 200, 412},
		{"only match holds", []string{none, `*`, match, `TAG`}, 412, 412},
		{"only none match holds", []string{match, `"1"`, none, `"2"`}, 412, 412},
		{"neither holds", []string{match, `"1"`, none, `TAG`}, 412, 412},
		{"match holds, none match cannot be parsed", []string{match, `TAG`, none, `'1'`}, 400, 400},
		{"match any twice", []string{match, `*`, match, `*`}, 400, 400},
		{"second line cannot be parsed", []string{none, `"1"`, none, `x`}, 400, 400},
	}
	for _, bad := range []string{
		``, ` `, `17`, `"17`, `17"`, `'17'`, `*, TAG`, `TAG, *`, `TAG "1"`, `TAG;`, `"1 2", TAG`, `w/TAG`, `W/*`, `W/ TAG`,
	} {
		tests = append(tests, test{"match " + bad, []string{match, bad}, 400, 400}, test{"none match " + bad, []string{none, bad}, 400, 400})
	}
	check := func(t *testing.T, tt test, key, method, after string, exists bool) {
		t.Helper()
		tag, status, value := put(t, n, key, "1"), tt.existing, "1"
		if !exists {
			want(t, n, 200, http.MethodDelete, "/key/"+key, "")
			status, value = tt.missing, "null"
		}
		headers := slices.Clone(tt.headers)
		for i := range headers {
			headers[i] = strings.NewReplacer("TAG", quoted(tag), "NUMBER", fmt.Sprint(tag)).Replace(headers[i])
		}
		readStatus := status
		if slices.Contains(headers, match) {
			readStatus = 400
		} else if status == 412 {
			readStatus = 304
		}
		for _, read := range []string{http.MethodGet, http.MethodHead} {
			for _, query := range []string{"", "?consistency=stale"} {
				a := want(t, n, readStatus, read, "/key/"+key+query, "", headers...)
				if a.status < 400 && exists && tagOf(t, a) != tag || a.status == 304 && a.body+a.header.Get("Content-Length") != "" {
					t.Errorf("%s: got %v; want tag %d, and no body with 304", read, a, tag)
				}
			}
		}
		a := want(t, n, status, method, "/key/"+key, "2", headers...)
		if status == 200 {
			indexOf(t, a)
			wantValue(t, n, key, after)
		} else if b := wantValue(t, n, key, value); exists && tagOf(t, b) != tag || a.header["Raft-Index"] != nil {
			t.Errorf("got ETag %s and %v; want %d still and no Raft-Index", b.header.Get("ETag"), a.header, tag)
		}
	}
	for i, tt := range tests {
		for _, exists := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, key exists %v", tt.name, exists), func(t *testing.T) {
				check(t, tt, fmt.Sprintf("put%d%v", i, exists), http.MethodPut, "2", exists)
				check(t, tt, fmt.Sprintf("delete%d%v", i, exists), http.MethodDelete, "null", exists)
			})
		}
	}
	t.Run("a tag that never matches", func(t *testing.T) {
		tag := quoted(put(t, n, "never", "1"))
		for header, never := range map[string]bool{
			"W/" + tag: true, `"x"`: true, `"1", W/"2"`: true, `"01"`: true, `"1"`: false, `"1", "2"`: false,
		} {
			for _, method := range []string{http.MethodPut, http.MethodDelete} {
				if a := want(t, n, 412, method, "/key/never", "2", match, header); strings.Contains(a.body, "never matches") != never {
					t.Errorf("%s with %s: got %s; want it said that a tag never matches: %v", method, header, a.body, never)
				}
			}
		}
		want(t, n, 412, http.MethodPut, "/key/gone", "2", match, "*")
	})
	t.Run("dates and ranges", func(t *testing.T) {
		put(t, n, "dated", "1")
		for _, header := range []string{"If-Modified-Since", "If-Unmodified-Since"} {
			for method, target := range map[string]string{http.MethodPut: "/key/dated", http.MethodDelete: "/key/dated", http.MethodPost: "/key"} {
				want(t, n, 400, method, target, `{"dated":2}`, header, "Sun, 06 Nov 1994 08:49:37 GMT")
			}
			for _, target := range []string{"/key/dated", "/key?prefix="} {
				status := map[string]int{"If-Modified-Since": 200, "If-Unmodified-Since": 400}[header]
				want(t, n, status, http.MethodGet, target, "", header, "Sun, 06 Nov 1994 08:49:37 GMT")
				want(t, n, status, http.MethodHead, target, "", header, "Sun, 06 Nov 1994 08:49:37 GMT")
			}
		}
		want(t, n, 400, http.MethodPut, "/key/dated", "2", "Content-Range", "bytes 0-0/1")
		wantValue(t, n, "dated", "1")
	})
	t.Run("on post", func(t *testing.T) {
		tag := quoted(put(t, n, "post", "1"))
		for _, headers := range [][]string{{match, `*`}, {none, `*`}, {match, tag}, {none, tag}, {match, `x`}, {match, ``}, {none, `"1"`}} {
			want(t, n, 400, http.MethodPost, "/key", `{"post":2}`, headers...)
			want(t, n, 400, http.MethodPost, "/key", `{}`, headers...)
		}
		wantValue(t, n, "post", "1")
	})
}

func TestWritesAtOnce(t *testing.T) {
	n := newKVNode(t)
	const writers = 16
	for _, tt := range []struct {
		name, header, tag string
		succeed           int
	}{
		{"one creates", "If-None-Match", `*`, 1},
		{"one changes", "If-Match", quoted(put(t, n, "one%20changes", "0")), 1},
		{"all write", "X", "", writers},
	} {
		t.Run(tt.name, func(t *testing.T) {
			statuses, tags := make(map[int]int), make(map[string]bool)
			var mu sync.Mutex // guards both
			var wg sync.WaitGroup
			for range writers {
				wg.Go(func() {
					text := requestText(http.MethodPut, "/key/"+url.PathEscape(tt.name), "1", tt.header, tt.tag)
					a, err := exchange(t.Context(), n.web.Listener.Addr().String(), http.MethodPut, text)
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					defer mu.Unlock()
					statuses[a.status]++
					tags[a.header.Get("ETag")] = true
				})
			}
			wg.Wait()
			delete(tags, "")
			if statuses[200] != tt.succeed || statuses[412] != writers-tt.succeed || len(tags) != tt.succeed {
				t.Errorf("got statuses %v, tags %v; want %d to succeed, each with its tag, and 412 else", statuses, tags, tt.succeed)
			}
		})
	}
}

func TestConsistencyParameter(t *testing.T) {
	n := newKVNode(t)
	put(t, n, "k", "1")
	for query, status := range map[string]int{
		"": 200, "?": 200, "?consistency=linearizable": 200, "?consistency=stale": 200, "?%63onsistency=%73tale": 200,
		"?consistency": 400, "?consistency=": 400, "?consistency=strong": 400, "?consistency=STALE": 400, "?consistency=stale%20": 400,
		"?consistency=stale,linearizable": 400, "?consistency=stale&consistency=stale": 400,
		"?consistency=stale&consistency=linearizable": 400, "?consistency=stale&consistency=": 400,
		"?consistency=%zz": 400, "?consistency=stale&%": 400, "?%zz": 400, "?a;b&consistency=stale": 400,
	} {
		t.Run("query "+query, func(t *testing.T) {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				if a := want(t, n, status, method, "/key/k"+query, ""); status == 200 && method == http.MethodGet && a.body != `{"k":1}` {
					t.Errorf("got %s; want the value", a.body)
				}
				want(t, n, status, method, "/key/missing"+query, "")
			}
		})
	}
}

// A parameter that is not known is no request for what is known: the write does not happen, the listing is not another.
func TestUnknownParameters(t *testing.T) {
	n := newKVNode(t)
	put(t, n, "k", "1")
	tests := []struct {
		method, target, body string
		knows                []string
	}{
		{http.MethodPut, "/key/k?cas=0", "2", []string{"cas", "knows none"}},
		{http.MethodPut, "/key/k?1", "2", []string{"knows none"}},
		{http.MethodPut, "/key/k?consistency=stale", "2", []string{"knows none"}},
		{http.MethodPut, "/key/k?%zz", "2", nil},
		{http.MethodDelete, "/key/k?ttl=3", "", []string{"ttl", "knows none"}},
		{http.MethodPost, "/key?prefix=", `{"k":2}`, []string{"prefix", "knows none"}},
		{http.MethodPost, "/key?x", `{}`, []string{"knows none"}},
		{http.MethodGet, "/key/k?consistancy=stale", "", []string{"consistancy", "knows consistency"}},
		{http.MethodGet, "/key/k?consistency=stale&Consistency=stale", "", []string{"knows consistency"}},
		{http.MethodGet, "/key/k?prefix=k", "", []string{"knows consistency"}},
		{http.MethodGet, "/key?prefix=k&limt=1", "", []string{"limt", "prefix", "after", "limit", "consistency"}},
		{http.MethodGet, "/key?limt=1", "", []string{"limt", "limit"}},
		{http.MethodHead, "/key?prefix=&=", "", nil},
		{http.MethodGet, "/backup?limit=1", "", []string{"limit", "knows prefix, consistency"}},
		{http.MethodGet, "/changes?from=1", "", []string{"from", "knows since, prefix, wait, limit"}},
		{http.MethodPost, "/txn?consistency=stale", "{}", []string{"consistency", "knows none"}},
		{http.MethodGet, "/key?prefix=&" + strings.Repeat("x", 10_000), "", []string{"limit"}},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %.40s", tt.method, tt.target), func(t *testing.T) {
			a := want(t, n, 400, tt.method, tt.target, tt.body)
			for _, word := range tt.knows {
				if !strings.Contains(a.body, word) || len(a.body) > 400 {
					t.Errorf("got %.1000s; want %s named", a.body, word)
				}
			}
			wantValue(t, n, "k", "1")
		})
	}
	for _, target := range []string{"/livez?x=1", "/readyz?t=2", "/status?_=3", "/metrics?name[]=x", "/livez?%zz", "/key/k?&", "/key?prefix=&&limit=1"} {
		want(t, n, 200, http.MethodGet, target, "")
	}
	want(t, n, 200, http.MethodPut, "/key/k?", "1")
}

// TestWithoutLeader asks a node that was started long ago, or just now, and has not heard of a leader.
func TestWithoutLeader(t *testing.T) {
	tests := []struct {
		name, byDefault      string
		early                bool
		method, target, body string
		want                 int
	}{
		{"default read", "", false, "GET", "/key/k", "", 503},
		{"stale read", "", false, "GET", "/key/k?consistency=stale", "", 200},
		{"default read where that is stale", "stale", false, "GET", "/key/k", "", 200},
		{"read with an unknown parameter", "stale", false, "GET", "/key/k?x=1", "", 400},
		{"linearizable read where stale is default", "stale", false, "GET", "/key/k?consistency=linearizable", "", 503},
		{"early stale read", "", true, "GET", "/key/k?consistency=stale", "", 503},
		{"put", "stale", false, "PUT", "/key/k", "2", 503},
		{"delete", "", false, "DELETE", "/key/k", "", 503},
		{"post", "", false, "POST", "/key", `{"k":2}`, 503},
		{"post of nothing", "", false, "POST", "/key", `{}`, 200},
		{"bad post", "", false, "POST", "/key", `{`, 400},
		{"bad method", "", false, "PATCH", "/key/k", ``, 405},
		{"bad path", "", false, "DELETE", "/", ``, 404},
		{"livez", "", true, "GET", "/livez", "", 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := mustConfig(t, map[string]string{"NODE_ID": "alone", "KV_STORE": storeMemory, "READ_CONSISTENCY": tt.byDefault})
			machine, log := newMachine(), testLogger(t, "alone")
			machine.items.Set("k", Item{Value: "1", Tag: 7})
			store := NewStore(cfg, machine, newMetrics(), log)
			if !tt.early {
				store.started = time.Now().Add(-time.Minute)
			}
			handler := newServer(cfg, store, nil, store.metrics, log, routes(store, machine))
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // a leader is not waited for
			recorder := httptest.NewRecorder()
			handler.answer(recorder, httptest.NewRequestWithContext(ctx, tt.method, tt.target, strings.NewReader(tt.body)))
			a := answerTo{recorder.Code, recorder.Header(), recorder.Body.String()}
			if a.status != tt.want || a.header.Get("Raft-Served-By") != "alone" || a.header["Raft-Leader"] != nil {
				t.Fatalf("got %v; want %d, served by alone and no leader", a, tt.want)
			}
			if a.status >= 400 {
				checkProblem(t, tt.method, a, "not-applied")
			} else if strings.HasPrefix(tt.target, "/key/k") && (a.body != `{"k":1}` || a.header.Get("Raft-Stale") != "since-start") {
				t.Errorf("got %v; want the value, and Raft-Stale: since-start", a)
			}
			if (a.status == 503) != (a.header.Get("Retry-After") != "") {
				t.Errorf("%d: got Retry-After %q", a.status, a.header.Get("Retry-After"))
			}
		})
	}
}

func TestStatusAndHealth(t *testing.T) {
	n := newKVNode(t)
	want(t, n, 200, http.MethodGet, "/livez", "")
	want(t, n, 200, http.MethodGet, "/readyz", "")
	put(t, n, "a", "1")
	want(t, n, 200, http.MethodPost, "/key", `{"b":1,"c":2}`)
	index := indexOf(t, want(t, n, 200, http.MethodDelete, "/key/b", ""))

	a := want(t, n, 200, http.MethodGet, "/status", "")
	if got := a.header.Get("Content-Type"); got != "application/json" || strings.ContainsAny(a.body, " \n") {
		t.Errorf("got %s %q; want application/json without white space", got, a.body)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(a.body), &got); err != nil {
		t.Fatal(err)
	}
	for name, least := range map[string]float64{"term": 1, "commit_index": float64(index), "applied_index": float64(index)} {
		if v, ok := got[name].(float64); !ok || v < least {
			t.Errorf("%s: got %v; want a number from %v on", name, got[name], least)
		}
	}
	if v, ok := got["version"].(string); !ok || v == "" {
		t.Errorf("version: got %v; want a text", got["version"])
	}
	expected := map[string]any{
		"id": "node1", "state": "leader", "leader": "node1", "last_contact_ms": 0.0, "kv_store": "memory", "keys": 2.0,
		"peers": []any{map[string]any{
			"id": "node1", "address": n.cfg.Peers[0].Addr, "voter": true, "reachable": true, "applied_index": float64(index),
		}},
		"peers_drift": false,
	}
	maps.DeleteFunc(got, func(name string, _ any) bool { _, known := expected[name]; return !known }) // more may be there
	if diff := cmp.Diff(expected, got); diff != "" {
		t.Errorf("status, -want +got:\n%s", diff)
	}

	n.server.stop()
	a = want(t, n, 503, http.MethodGet, "/readyz", "")
	if a.header.Get("Retry-After") == "" || !strings.Contains(a.body, "shutting down") {
		t.Errorf("readyz while stopping: got %v; want Retry-After and the reason", a)
	}
	want(t, n, 200, http.MethodGet, "/livez", "")
}

func TestSlowRequestsAreCutOff(t *testing.T) {
	n := newKVNode(t)
	server := n.server.httpServer()
	header, all := server.ReadHeaderTimeout, server.ReadTimeout
	if header <= 0 || header > 30*time.Second || all <= 0 || all > 15*time.Second {
		t.Errorf("got ReadHeaderTimeout %v, ReadTimeout %v; want up to 30 s and 15 s", header, all)
	}
	server.ReadHeaderTimeout, server.ReadTimeout = 300*time.Millisecond, 300*time.Millisecond
	web := httptest.NewUnstartedServer(nil)
	web.Config = server
	web.Listener = n.server.limitListener(web.Listener, nil)
	web.Start()
	t.Cleanup(web.Close)
	addr := web.Listener.Addr().String()
	for _, text := range []string{"", "PUT /key/k HT", "PUT /key/k HTTP/1.1\r\nHost: test\r\nX: "} {
		t.Run(fmt.Sprintf("header %q", text), func(t *testing.T) {
			var timeout net.Error
			if a, err := exchange(t.Context(), addr, http.MethodPut, text); err == nil && a.status < 400 || errors.As(err, &timeout) {
				t.Errorf("got %v, %v; want the connection closed", a, err)
			}
		})
	}
	t.Run("body", func(t *testing.T) {
		text := requestText(http.MethodPut, "/key/k", "1234")
		a, err := exchange(t.Context(), addr, http.MethodPut, strings.TrimSuffix(text, "34"))
		if err != nil || a.status != 400 && a.status != 408 {
			t.Fatalf("got %v, %v; want 400 or 408", a, err)
		}
		checkProblem(t, http.MethodPut, a, "not-applied")
		wantValue(t, n, "k", "null")
	})
}
