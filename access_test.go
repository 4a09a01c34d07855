package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

func TestTokensAdmit(t *testing.T) {
	all, err := parseTokens("file", []byte("\n first-token \r\nsecond.token==\n\n"))
	if err != nil || len(all) != 2 {
		t.Fatalf("got %d tokens, %v; want 2", len(all), err)
	}
	const missing, form, wrong = "a token is needed here", "must come once, and be Bearer <token>", "this token is not good"
	for _, tt := range []struct {
		headers []string
		want    string // what the refusal says, "" for none
	}{
		{[]string{"Bearer first-token"}, ""},
		{[]string{"bearer second.token=="}, ""},
		{[]string{"BEARER   first-token "}, ""},
		{nil, missing},
		{[]string{""}, form},
		{[]string{"Bearer"}, wrong},
		{[]string{"Bearer "}, wrong},
		{[]string{"first-token"}, form},
		{[]string{"Basic first-token"}, form},
		{[]string{"Bearer first-toke"}, wrong},
		{[]string{"Bearer first-tokens"}, wrong},
		{[]string{"Bearer first-token second.token=="}, wrong},
		{[]string{"Bearer first-token", "Bearer first-token"}, form},
	} {
		got := fmt.Sprint(all.check(&http.Request{Header: http.Header{"Authorization": tt.headers}}))
		if (got == "<nil>") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%q: got %v; want %q", tt.headers, got, tt.want)
		}
	}
	if _, err := parseTokens("file", []byte("good\nsecret token\n")); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v; want an error that does not tell what the file holds", err)
	}
}

// Every path needs a token, but those of probes and metrics; a write without one is certainly not applied.
func TestTokensAreAskedFor(t *testing.T) {
	n := newTestNode(t, storeMemory)
	file := filepath.Join(t.TempDir(), "tokens")
	write := func(content string) {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		n.server.tokens.reload(false)
	}
	write("old\n")
	n.cfg.HTTPTokenFile = file
	var err error
	lines := new(logLines)
	if n.server.tokens, err = openTokens(n.cfg, hclog.New(&hclog.LoggerOptions{Output: lines})); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		method, path string
		open         bool
	}{
		{"GET", "/livez", true},
		{"HEAD", "/readyz", true},
		{"GET", "/metrics", true},
		{"POST", "/livez", true}, // 405 to anybody
		{"GET", "/status", false},
		{"GET", "/value/a", false},
		{"HEAD", "/value/a", false},
		{"PUT", "/value/a", false},
		{"DELETE", "/value/a", false},
		{"POST", "/value", false},
		{"GET", "/value?prefix=", false},
		{"OPTIONS", "/value/a", false},
		{"GET", "/nowhere", false},
		{"GET", "/livez/more", false},
		{"GET", "/value/../livez", false},
	} {
		for _, headers := range [][]string{{}, {"Authorization", "Bearer wrong"}} {
			a := ask(t, n, tt.method, tt.path, "", headers...)
			if asked := a.status == 401 && a.header.Get("WWW-Authenticate") == `Bearer realm="raftstarter"`; asked == tt.open {
				t.Errorf("%s %s %q: got %d %v; want a token asked for: %v", tt.method, tt.path, headers, a.status, a.header, !tt.open)
			}
		}
		if a := ask(t, n, tt.method, tt.path, "", "Authorization", "Bearer old"); a.status == 401 {
			t.Errorf("%s %s with a token: got 401", tt.method, tt.path)
		}
	}
	if a := want(t, n, 401, "PUT", "/value/a", "1"); !strings.Contains(a.body, "a token is needed here") {
		t.Errorf("got %s without a token", a.body)
	}
	if a := want(t, n, 401, "PUT", "/value/a", "1", "Authorization", "Bearer wrong"); !strings.Contains(a.body, "this token is not good") {
		t.Errorf("got %s with a wrong token", a.body)
	}
	want(t, n, 200, "PUT", "/value/a", "2", "Authorization", "Bearer old")

	write("old\nnew\n") // rotation: both, then only the new one
	want(t, n, 200, "PUT", "/value/a", "3", "Authorization", "Bearer new")
	want(t, n, 200, "PUT", "/value/a", "4", "Authorization", "Bearer old")
	write("new\n")
	want(t, n, 401, "PUT", "/value/a", "5", "Authorization", "Bearer old")
	want(t, n, 200, "PUT", "/value/a", "6", "Authorization", "Bearer new")
	write("") // worse: what was there stays
	want(t, n, 200, "PUT", "/value/a", "7", "Authorization", "Bearer new")
	want(t, n, 401, "PUT", "/value/a", "8")
	if lines.count("[ERROR]", "is empty", "stays in use") != 1 {
		t.Error("got no error in the log about the empty file; want one")
	}
	for _, token := range []string{"old", "new", "wrong"} {
		if lines.count(" "+token+"\n")+lines.count(`"`+token+`"`) > 0 {
			t.Errorf("the log holds the token %q", token)
		}
	}
}

// A page of another origin that a browser shows cannot write; other clients say nothing of an origin.
func TestCrossOriginWrites(t *testing.T) {
	n := newTestNode(t, storeMemory)
	for _, tt := range []struct {
		name, method, path string
		headers            []string
		want               int
	}{
		{"no browser", "PUT", "/value/a", nil, 200},
		{"the same origin", "PUT", "/value/a", []string{"Sec-Fetch-Site", "same-origin"}, 200},
		{"typed by the user", "PUT", "/value/a", []string{"Sec-Fetch-Site", "none"}, 200},
		{"another site", "PUT", "/value/a", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"another port", "POST", "/value", []string{"Sec-Fetch-Site", "same-site"}, 403},
		{"another origin in an old browser", "POST", "/value", []string{"Origin", "http://evil.example"}, 403},
		{"the same origin in an old browser", "POST", "/value", []string{"Origin", "http://test"}, 200},
		{"a file", "DELETE", "/value/a", []string{"Origin", "null"}, 403},
		{"a read", "GET", "/value/a", []string{"Sec-Fetch-Site", "cross-site", "Origin", "http://evil.example"}, 200},
		{"a preflight", "OPTIONS", "/value/a", []string{"Origin", "http://evil.example", "Access-Control-Request-Method", "PUT"}, 405},
	} {
		a := want(t, n, tt.want, tt.method, tt.path, map[bool]string{true: "{}", false: "1"}[tt.path == "/value"], tt.headers...)
		if a.header.Get("X-Content-Type-Options") != "nosniff" || a.header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: got %v; want nosniff, and no other origin allowed", tt.name, a.header)
		}
	}
}

// Bodies that have come in part share a bounded memory. Who sends the rest slowly goes when others need it.
func TestSlowBodiesKeepNobodyOut(t *testing.T) {
	n := newTestNode(t, storeMemory)
	l := n.web.Listener.(*connLimiter)
	taken := func() int64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.usedMemory
	}
	const part = 300 << 10
	l.maxMemory = 500 << 10
	large := `"` + strings.Repeat("x", 400<<10) + `"`
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = fmt.Fprintf(conn, "PUT /value/slow HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%s", len(large), large[:part])
	waitFor(t, "the body to arrive", func() bool { return taken() >= part-2*freeBytes })
	want(t, n, 200, "PUT", "/value/small", "1")
	want(t, n, 200, "PUT", "/value/large", large)
	if a := want(t, n, 200, "GET", "/value/large", ""); a.body != large {
		t.Errorf("got %d bytes; want the %d of the large value", len(a.body), len(large))
	}
	_, _ = io.WriteString(conn, large[part:])
	if said, _ := io.ReadAll(conn); strings.Contains(string(said), " 200 ") {
		t.Errorf("got %.40q for the slow body; want its connection closed", said)
	}
	if a := want(t, n, 200, "GET", "/value/slow", ""); a.body != "" {
		t.Errorf("got %d bytes of the slow value; want none", len(a.body))
	}
	waitFor(t, "the memory to be given back", func() bool { return taken() == 0 })

	// Where all bodies are here and worked on, none can go.
	l.maxMemory = 1
	a := want(t, n, 503, http.MethodPut, "/value/large", large[:10<<10]+`"`)
	if a.header.Get("Retry-After") == "" {
		t.Errorf("got %v; want Retry-After", a.header)
	}
	want(t, n, 200, "PUT", "/value/small", "2")
	waitFor(t, "the memory to be given back", func() bool { return taken() == 0 })
}
