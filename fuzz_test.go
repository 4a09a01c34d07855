package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Run one of these with go test -fuzz 'FuzzCommand$'; without -fuzz they run over their seeds.

func FuzzCommand(f *testing.F) {
	for _, c := range []command{
		{op: opSet, pairs: []Pair{{"k", "1"}, {"", ""}}},
		{op: opDelete, pairs: []Pair{{Key: "k"}}, condition: Condition{Match: &Tags{Any: true}}},
		{op: opSet, pairs: []Pair{{"k", "1"}}, condition: Condition{Match: &Tags{List: []Tag{1, 1 << 60}}, NoneMatch: &Tags{}}},
	} {
		f.Add(c.encode())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCommand(b)
		if err != nil {
			return
		}
		again, err := decodeCommand(c.encode())
		if diff := cmp.Diff(c, again, cmp.AllowUnexported(command{})); err != nil || diff != "" {
			t.Errorf("decoded, encoded and decoded again: %v (-want +got)\n%s", err, diff)
		}
		if _, err := newMachine().Apply(b, time.UnixMicro(1)); err != nil {
			t.Errorf("a command that can be read cannot be executed: %v", err)
		}
	})
}

func FuzzEntry(f *testing.F) {
	f.Add(encodeEntry(time.UnixMicro(1), [][]byte{[]byte("a"), nil, []byte("b")})[entryHeader:])
	f.Fuzz(func(t *testing.T, b []byte) {
		commands, err := decodeCommands(b)
		if err != nil {
			return
		}
		_, again, err := decodeEntry(encodeEntry(time.UnixMicro(1), commands))
		if diff := cmp.Diff(commands, again); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	})
}

func FuzzOutcome(f *testing.F) {
	f.Add(encodeOutcome(outcome{index: 7, results: [][]byte{[]byte("x"), nil}}))
	f.Add(encodeOutcome(outcome{err: ErrUnknownOutcome}))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := decodeOutcome(b)
		if err != nil {
			return
		}
		again, err := decodeOutcome(encodeOutcome(o))
		if diff := cmp.Diff(o, again, cmp.AllowUnexported(outcome{}), cmpopts.EquateErrors()); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	})
}

// A snapshot's content, behind the checksums that would keep most foreign bytes out.
func FuzzSnapshot(f *testing.F) {
	m := newMachine()
	m.items.Set("k", Item{Value: "1", Tag: 1})
	var b bytes.Buffer
	if err := m.Snapshot()(&b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m := newMachine()
		install, err := m.Restore(bytes.NewReader(b))
		if m.items.Len() != 0 {
			t.Error("the state was touched before all was read")
		}
		if err != nil {
			return
		}
		install()
		var again bytes.Buffer
		if err := m.Snapshot()(&again); err != nil {
			t.Error(err)
		}
	})
}

func FuzzSnapshotFrames(f *testing.F) {
	var b bytes.Buffer
	w := frameWriter{w: &b}
	_ = w.header(7)
	_, _ = w.Write([]byte("content"))
	_ = w.end()
	f.Add(b.Bytes())
	f.Fuzz(func(_ *testing.T, b []byte) {
		r := &frameReader{r: bufio.NewReader(bytes.NewReader(b))}
		if _, err := r.header(); err == nil {
			_, _ = bufio.NewReader(r).ReadString(0)
			_ = r.end()
		}
	})
}

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

func FuzzPostBody(f *testing.F) {
	for _, body := range []string{
		`{}`, `{"a":1}`, ` { "a" : [ 1.0 , {"b":"}"} ] , "\u0061b":"\\\"" } `, `{"a":1,"\u0061":2}`, `{"\ud800":1}`, `{"\ud83d\ude00":-1e400}`,
		`null`, `[1]`, `"s"`, `{"":1}`, `{"a":tru}`, "{\"\xff\":1}", `{"a":1}x`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/key", bytes.NewReader(b))
		object, err := readJSON(r)
		var want map[string]json.RawMessage
		if err != nil {
			return
		}
		pairs, err := splitObject(object)
		if err != nil {
			return
		}
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatalf("accepted what encoding/json does not: %v", err)
		}
		if len(pairs) != len(want) {
			t.Fatalf("got %v; want %d members", pairs, len(want))
		}
		for _, p := range pairs {
			var compact bytes.Buffer
			if err := json.Compact(&compact, want[p.Key]); err != nil || compact.String() != p.Value {
				t.Errorf("%q: got %s; want %s", p.Key, p.Value, compact.String())
			}
		}
	})
}

func FuzzTags(f *testing.F) {
	for _, s := range []string{`*`, `"1"`, `"1", W/"2" ,"x"`, `,"1",`, `"`, `W/`, `"1""2"`, ``} {
		f.Add(s)
	}
	f.Fuzz(func(_ *testing.T, s string) {
		r := &http.Request{Header: http.Header{"If-Match": {s}}}
		_, _ = tags(r, "If-Match", false)
	})
}

func FuzzHello(f *testing.F) {
	f.Add(hello{kindRaft, "node1", "node2", "cluster"}.encode())
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHello(bytes.NewReader(b))
		if err == nil && !bytes.HasPrefix(b, h.encode()) {
			t.Errorf("got %v out of %q", h, b)
		}
	})
}

func FuzzCallFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 6, 0, 0, 0, 1, opTerm, 'x'})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, opTerm})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, payload, err := readFrame(bufio.NewReader(bytes.NewReader(b))); err == nil && len(payload) > len(b) {
			t.Errorf("got %d bytes out of %d", len(payload), len(b))
		}
	})
}

func FuzzPeers(f *testing.F) {
	for _, s := range []string{"a@h:1", "a@10.0.0.1:1,b@[::1]:2", "a@::1:5,", "@:", "a@h:0", "a@1.2.3:4", "a@h:1,a@h:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		cfg, err := loadConfig(func(name string) string {
			return map[string]string{"PEERS": s, "NODE_ID": "a"}[name]
		}, system{hostname: "a", hostIPv4: func() string { return "127.0.0.1" }})
		if err != nil {
			return
		}
		for _, p := range cfg.Peers {
			if host, port, err := net.SplitHostPort(p.Addr); err != nil || host == "" || port == "" || !validID(p.ID) {
				t.Errorf("got peer %v out of %q", p, s)
			}
		}
	})
}
