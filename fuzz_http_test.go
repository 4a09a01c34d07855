package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/go-cmp/cmp"
)

func FuzzKeyPath(f *testing.F) {
	for _, key := range []string{"a", "a/b", "a//b", "..", "a%2Fb", "%25", "é", "a b+c?d#e;", "\x00", "\xff", strings.Repeat("k", 1025)} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		u, err := url.ParseRequestURI(keyPrefix + url.PathEscape(key))
		if err != nil {
			t.Fatal(err)
		}
		r.URL = u
		got, err := pathKey(r)
		if valid := checkKey(key) == nil; valid != (err == nil) || valid && got != key {
			t.Errorf("got %q, %v; want %q", got, err, key)
		}
		if u, err := url.ParseRequestURI(keyPrefix + key); err == nil { // as a client might send it
			r.URL = u
			if got, err := pathKey(r); err == nil && !utf8.ValidString(got) {
				t.Errorf("got %q for a key", got)
			}
		}
	})
}

// plain says whether b has nothing for which a JSON value can be refused: few brackets, so no deep nesting, and no surrogates.
func plain(b []byte) bool {
	return bytes.Count(b, []byte("["))+bytes.Count(b, []byte("{")) <= maxDepth && !bytes.Contains(bytes.ToLower(b), []byte(`\ud`))
}

// readFuzzed is readJSON, with what it may allocate.
func readFuzzed(t *testing.T, b []byte) (value []byte, err error) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/key", bytes.NewReader(b))
	checkMemory(t, len(b), 1<<20, func() { value, err = readJSON(r) })
	return value, err
}

// readFuzzedObject is readObject, likewise.
func readFuzzedObject(t *testing.T, b []byte) (pairs []Pair, err error) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/key", bytes.NewReader(b))
	checkMemory(t, len(b), 1<<20, func() { pairs, _, err = readObject(r, maxDepth) })
	return pairs, err
}

// depth returns how many levels a JSON value has, as encoding/json sees it.
func depth(t *testing.T, value []byte) (deepest int) {
	t.Helper()
	d, level := json.NewDecoder(bytes.NewReader(value)), 0
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return deepest
		}
		if err != nil {
			t.Fatal(err)
		}
		switch token {
		case json.Delim('['), json.Delim('{'):
			level++
			deepest = max(deepest, level)
		case json.Delim(']'), json.Delim('}'):
			level--
		}
	}
}

// A value is taken when encoding/json says it is one, and is not changed but for white space.
func FuzzBody(f *testing.F) {
	for _, body := range []string{
		`1`, ` [ 1.0 , -0e+1 ] `, `"\ud800 <\u2028>"`, `"\uD83D\ude00"`, `"\\ud800"`, `{"a":1,"a":2}`, `nul`, `1 2`, `01`, `"` + "\xff" + `"`, ``, "\ufeff1", `[[[[[[[[`, `{"a":}`,
		nested("[", "]", maxDepth), nested("[", "]", maxDepth+1), nested(`{"":[`, "]}", maxDepth/2), `[` + strings.Repeat(`[["{"]],`, 99) + `1]`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		value, err := readFuzzed(t, b)
		if valid := json.Valid(b) && utf8.Valid(b); (err == nil) != valid && (err == nil || plain(b)) {
			t.Fatalf("got error %v; encoding/json says %v", err, valid)
		}
		if err == nil && depth(t, b) > maxDepth {
			t.Fatalf("got no error for %d levels", depth(t, b))
		}
		if text := ""; err == nil && json.Unmarshal(b, &text) == nil && strings.Count(text, "\ufffd") > strings.Count(string(b), "\ufffd")+
			strings.Count(strings.ToLower(string(b)), `\ufffd`) {
			t.Fatalf("got no error for half a surrogate pair in %q", b)
		}
		var compact bytes.Buffer
		if err == nil && (json.Compact(&compact, b) != nil || !bytes.Equal(compact.Bytes(), value)) {
			t.Errorf("got %s; want %s", value, compact.String())
		}
	})
}

func FuzzPostBody(f *testing.F) {
	for _, body := range []string{
		`{}`, `{"a":1}`, ` { "a" : [ 1.0 , {"b":"}"} ] , "\u0061b":"\\\"" } `, `{"a":1,"\u0061":2}`, `{"\ud800":1}`, `{"\ud83d\ude00":-1e400}`,
		`null`, `[1]`, `"s"`, `{"":1}`, `{"a":tru}`, "{\"\xff\":1}", `{"a":1}x`, `{"` + strings.Repeat("k", 1025) + `":1}`, `{"a\ufffd":1}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		pairs, err := readFuzzedObject(t, b)
		var want map[string]json.RawMessage
		isObject := utf8.Valid(b) && json.Unmarshal(b, &want) == nil && want != nil
		if err == nil && (!isObject || len(pairs) != len(want)) {
			t.Fatalf("got %v; want %d members", pairs, len(want))
		}
		if err != nil && isObject && plain(b) && len(want) == countMembers(t, b) {
			for key := range want {
				if checkKey(key) != nil {
					return
				}
			}
			t.Errorf("got error %v; want %d members", err, len(want))
		}
		for _, p := range pairs {
			var compact bytes.Buffer
			if err := json.Compact(&compact, want[p.Key]); err != nil || compact.String() != p.Value {
				t.Errorf("%q: got %s; want %s", p.Key, p.Value, compact.String())
			}
		}
	})
}

// countMembers counts the members of an object as encoding/json sees them, those that are named twice twice.
func countMembers(t *testing.T, object []byte) (n int) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(object))
	_, err := d.Token()
	for ; err == nil && d.More(); n++ {
		var value json.RawMessage
		if _, err = d.Token(); err == nil {
			err = d.Decode(&value)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What a header is understood as is understood as the same again, and is in the header.
func FuzzTags(f *testing.F) {
	for _, s := range []string{`*`, `"1"`, `"1", W/"2" ,"x"`, `,"1",`, `"`, `W/`, `"1""2"`, ``, `"18446744073709551616"`, `"01"`, `W/"7",*`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, weak := range []bool{false, true} {
			set, err := readTags(&http.Request{Header: http.Header{"If-Match": {s}}}, "If-Match", weak)
			if err != nil || set.Any {
				if err == nil && (strings.Trim(s, " \t,") != "*" || len(set.List) > 0) {
					t.Errorf("got any for %q", s)
				}
				continue
			}
			var again []string
			for _, tag := range set.List {
				quoted := `"` + strconv.FormatUint(uint64(tag), 10) + `"`
				if again = append(again, quoted); !strings.Contains(s, quoted) {
					t.Errorf("got %d out of %q", tag, s)
				}
			}
			if len(again) == 0 {
				continue
			}
			same, err := readTags(&http.Request{Header: http.Header{"If-Match": again}}, "If-Match", weak)
			if diff := cmp.Diff(set, same); err != nil || diff != "" {
				t.Errorf("%v (-want +got)\n%s", err, diff)
			}
		}
	})
}

// ask has a node's HTTP API answer a request, without a connection.
func (n *testNode) ask(t *testing.T, method string, u *url.URL, header http.Header, body []byte) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", bytes.NewReader(body))
	r.Method, r.URL, r.RequestURI, r.Header = method, u, u.RequestURI(), header
	w := httptest.NewRecorder()
	n.server.answer(w, r)
	return w
}

// Any request that net/http can have understood gets a well-formed answer that is not a defect's, and what was written is
// read back as it was sent.
func FuzzRequest(f *testing.F) {
	f.Add("PUT", "/key/a%2Fb", "", "", []byte(` {"x": [1.0]} `))
	f.Add("PUT", "/key/\x7f", "*", `"1"`, []byte(`"\ud800"`))
	f.Add("POST", "/key", "", "", []byte(`{"a":1,"\u0062":2}`))
	f.Add("GET", "/key?prefix=a&limit=1&consistency=stale", "", "", []byte{})
	f.Add("GET", "/key/k?consistency=soon", "", `W/"7"`, []byte{})
	f.Add("DELETE", "/key/k", `"1"`, "", []byte{})
	f.Add("BREW\r\nX: y", "//key/../status?%", "", "", []byte("x"))
	f.Add("HEAD", "/metrics", "", "", []byte{})
	node := newKVNode(f)
	f.Fuzz(func(t *testing.T, method, target, match, noneMatch string, body []byte) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return // net/http refuses it
		}
		header := make(http.Header)
		for name, value := range map[string]string{"If-Match": match, "If-None-Match": noneMatch} {
			if value != "" {
				header.Set(name, value)
			}
		}
		w := node.ask(t, method, u, header, body)
		checkAnswer(t, method, w)
		if w.Code != http.StatusOK || method != http.MethodPut && method != http.MethodPost {
			return
		}
		pairs, err := readFuzzedObject(t, body)
		if method == http.MethodPut {
			value, err1 := readFuzzed(t, body)
			key, err2 := pathKey(&http.Request{URL: u})
			pairs, err = []Pair{{key, string(value)}}, errors.Join(err1, err2)
		}
		if err != nil {
			t.Fatalf("a request was carried out that is wrong: %v", err)
		}
		for _, p := range pairs {
			at := &url.URL{Path: keyPrefix + p.Key, RawPath: keyPrefix + url.PathEscape(p.Key)}
			var got map[string]json.RawMessage
			a := node.ask(t, http.MethodGet, at, nil, nil)
			if err := json.Unmarshal(a.Body.Bytes(), &got); err != nil || len(got) != 1 || string(got[p.Key]) != p.Value {
				t.Errorf("got %s, error %v; want %q: %s", a.Body, err, p.Key, p.Value)
			}
			checkAnswer(t, http.MethodDelete, node.ask(t, http.MethodDelete, at, nil, nil))
		}
	})
}

// checkAnswer fails the test if what was answered to a request is not what any answer must be.
func checkAnswer(t *testing.T, method string, w *httptest.ResponseRecorder) {
	t.Helper()
	for name, values := range w.Header() {
		if strings.ContainsAny(name+strings.Join(values, ""), "\r\n\x00") {
			t.Errorf("got header %q: %q", name, values)
		}
	}
	isJSON := strings.HasSuffix(w.Header().Get("Content-Type"), "json")
	if body := w.Body.Bytes(); isJSON && (!json.Valid(body) || !utf8.Valid(body)) {
		t.Errorf("got status %d, and %q for JSON", w.Code, body)
	}
	if w.Code == http.StatusOK || w.Code == http.StatusNotModified {
		return
	}
	var p problem
	want := map[bool]string{false: "not-applied"}[method == http.MethodGet || method == http.MethodHead]
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Status != w.Code || p.Outcome != want || p.Detail == "" {
		t.Errorf("got %s, error %v, with status %d; want a problem, and outcome %q", w.Body, err, w.Code, want)
	}
	if w.Code >= 500 {
		t.Errorf("got status %d: %s", w.Code, w.Body)
	}
}

// A listing has what the query asks for, and the link leads on to the rest.
func FuzzListing(f *testing.F) {
	for _, query := range []string{"prefix=", "prefix=a&limit=2", "after=a%2Fb", "limit=3", "limit=0", "limit=1&limit=1", "prefix=a;after=b", "prefix=%ff", "%zz", "consistency=stale&after=é", "x=1"} {
		f.Add(query)
	}
	node := newKVNode(f)
	values := make(map[string]json.RawMessage)
	for i, key := range []string{"a", "a/b", "a/b/c", "a b", "b", "é", "\x00", `"`, "a+b", "a&b=c", "%", "zz"} {
		values[key] = json.RawMessage(strconv.Itoa(i))
	}
	body, err := json.Marshal(values)
	if err != nil {
		f.Fatal(err)
	}
	if a := request(f, http.MethodPost, node.url+"/key", string(body)); a.status != http.StatusOK {
		f.Fatal(a)
	}
	f.Fuzz(func(t *testing.T, query string) {
		w := node.ask(t, http.MethodGet, &url.URL{Path: "/key", RawQuery: query}, nil, nil)
		checkAnswer(t, http.MethodGet, w)
		if w.Code != http.StatusOK {
			return
		}
		asked, err := url.ParseQuery(query)
		if err != nil {
			t.Fatalf("got a listing for a query that cannot be read: %v", err)
		}
		limit := defaultPage
		if asked.Has("limit") {
			if limit, err = strconv.Atoi(asked.Get("limit")); err != nil {
				t.Fatal(err)
			}
		}
		want, rest := "{", 0
		for _, key := range slices.Sorted(maps.Keys(values)) {
			switch {
			case !strings.HasPrefix(key, asked.Get("prefix")) || asked.Has("after") && key <= asked.Get("after"):
			case limit == 0:
				rest++
			default:
				quoted, _ := jsontext.AppendQuote(nil, key)
				want += fmt.Sprintf("%s:%s,", quoted, values[key])
				limit--
			}
		}
		if got := w.Body.String(); got != strings.TrimSuffix(want, ",")+"}" {
			t.Errorf("got %s; want %s", got, want)
		}
		next, _, linked := strings.Cut(strings.TrimPrefix(w.Header().Get("Link"), "<"), ">")
		if linked != (rest > 0) {
			t.Fatalf("got Link %q with %d more", next, rest)
		}
		if !linked {
			return
		}
		u, err := (&url.URL{Path: "/key"}).Parse(next)
		if err != nil {
			t.Fatal(err)
		}
		var more map[string]json.RawMessage
		a := node.ask(t, http.MethodGet, u, nil, nil)
		if err := json.Unmarshal(a.Body.Bytes(), &more); err != nil || len(more) == 0 || len(more) > rest {
			t.Errorf("got %s, error %v, behind %s; want some of %d", a.Body, err, next, rest)
		}
	})
}

// A request is let in with a line of the file of tokens and with nothing else, and no complaint holds such a line.
func FuzzTokens(f *testing.F) {
	f.Add([]byte("first-token-0123\n\n second/token+== \r\n"), "Bearer second/token+==")
	f.Add([]byte("first-token-0123\n"), "bearer  first-token-0123")
	f.Add([]byte("first-token-0123\n"), "Basic first-token-0123")
	f.Add([]byte("first-token-0123\nfirst token 0123\n"), "Bearer ")
	f.Add([]byte("\n\n"), "")
	_, complaint := parseTokens("file", []byte("no token")) // the words that may be in it
	f.Fuzz(func(t *testing.T, content []byte, header string) {
		lines := make(map[string]bool)
		for line := range strings.SplitSeq(string(content), "\n") {
			lines[strings.TrimSpace(line)] = true
		}
		delete(lines, "")
		all, err := parseTokens("file", content)
		if err != nil {
			for line := range lines {
				if len(line) > 12 && strings.Contains(err.Error(), line) && !strings.Contains(complaint.Error(), line) {
					t.Errorf("got error %q, which holds the line %q", err, line)
				}
			}
			return
		}
		scheme, token, _ := strings.Cut(header, " ")
		want := strings.EqualFold(scheme, "Bearer") && lines[strings.TrimSpace(token)]
		if got := all.check(&http.Request{Header: http.Header{"Authorization": {header}}}) == nil; got != want || len(lines) == 0 {
			t.Errorf("got %v for %q with %q", got, header, content)
		}
	})
}
