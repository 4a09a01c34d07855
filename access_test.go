package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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
		got := fmt.Sprint(all.admit(&http.Request{Header: http.Header{"Authorization": tt.headers}}))
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
	l := n.web.Listener.(*limiter)
	taken := func() int64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.taken
	}
	const part = 300 << 10
	l.memory = 500 << 10
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
	l.memory = 1
	a := want(t, n, 503, http.MethodPut, "/value/large", large[:10<<10]+`"`)
	if a.header.Get("Retry-After") == "" {
		t.Errorf("got %v; want Retry-After", a.header)
	}
	want(t, n, 200, "PUT", "/value/small", "2")
	waitFor(t, "the memory to be given back", func() bool { return taken() == 0 })
}

// secureProcs returns three nodes under TLS, with one token.
func secureProcs(t *testing.T) (ca *testCA, tokenFile string, nodes []*proc) {
	t.Helper()
	ca, nodes = newTestCA(t), newProcs(t, nil)
	tokenFile = filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(tokenFile, []byte("the-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range nodes {
		for name, value := range ca.node(p.name, p.env["HTTP_ADDR"]) {
			p.env[name] = value
		}
		p.env["HTTP_TOKEN_FILE"] = tokenFile
		p.tls, p.token = ca.client(nil), "the-token"
	}
	return ca, tokenFile, nodes
}

func TestProcessTLSAndTokens(t *testing.T) {
	t.Parallel()
	ca, tokenFile, nodes := secureProcs(t)
	startAll(nodes...)
	for i, p := range nodes {
		p.put(fmt.Sprint("k", i), "1")
	}
	for _, p := range nodes {
		for i := range nodes {
			p.has(fmt.Sprint("k", i), "1", "")
		}
		check := *p
		check.start("--healthcheck")
		check.exits(0, 5*time.Second)
	}
	leader, others := pick(nodes, true)
	leader.end(syscall.SIGKILL, -1)
	others[0].await(http.StatusOK, http.MethodPut, "/key/k0", "2") // one that was just being passed on may be 504
	others[1].has("k0", "2", "")

	p := others[0]
	p.logs(`certificates read.*good until`)
	if strings.Contains(p.read(p.stderr), "the-token") {
		t.Error("the log holds the token")
	}
	if strings.Contains(p.read(p.stderr), "open ports") {
		t.Error("the log warns of open ports; want no such thing under TLS with tokens")
	}
	for name, config := range map[string]*tls.Config{
		"TLS 1.2":           {MaxVersion: tls.VersionTLS12, RootCAs: p.tls.RootCAs},
		"another authority": newTestCA(t).client(nil),
	} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
		if response, err := client.Get(p.url() + "/livez"); err == nil { //nolint:noctx // it does not get far
			_ = response.Body.Close()
			t.Errorf("%s: got an answer; want none", name)
		}
	}
	plain := &http.Client{}
	if response, err := plain.Get(strings.Replace(p.url(), "https", "http", 1) + "/livez"); err == nil { //nolint:noctx // as above
		_ = response.Body.Close()
		if response.StatusCode != http.StatusBadRequest {
			t.Errorf("without TLS: got %d; want 400", response.StatusCode)
		}
	}

	// SIGHUP has the files read again, and says so.
	if err := os.WriteFile(tokenFile, []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ca.renew(p.env, func(c *x509.Certificate) { c.NotAfter = time.Unix(2000000000, 0) }, p.name, p.env["HTTP_ADDR"])
	p.signal(syscall.SIGHUP)
	waitFor(t, "the log to tell of it", func() bool {
		return regexp.MustCompile(`(?s)certificates read again.*2033.*tokens read again: what="1 tokens"`).MatchString(p.read(p.stderr))
	})
	p.expect(http.StatusUnauthorized, http.MethodGet, "/key/k0", "")
	p.token = "another"
	p.has("k0", "2", "")
	p.client.CloseIdleConnections()
	if a := p.expect(http.StatusOK, http.MethodGet, "/metrics", ""); !strings.Contains(a.body, "\nraftstarter_tls_certificate_expiry_seconds 2e+09\n") {
		t.Error("/metrics does not have the new certificate's expiry")
	}
}

// Without TLS and tokens a node that others can reach says once what is open.
func TestProcessSaysWhatIsOpen(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]int{ownHost(): 0, "0.0.0.0": 1} {
		p := newProc(t, map[string]string{"HTTP_ADDR": host, "RAFT_ADDR": host, "RAFT_ADVERTISE_ADDR": "127.0.0.1"})
		p.env["KV_STORE"] = storeMemory
		p.start()
		p.await(http.StatusOK, http.MethodGet, "/readyz", "")
		if got := strings.Count(p.read(p.stderr), "open ports: "); got != want {
			t.Errorf("listening on %s: got %d lines about open ports; want %d", host, got, want)
		}
	}
}

// flood makes n connections to addr, and has each say something, and again whatever there is to say, until ctx ends.
func flood(ctx context.Context, wg *sync.WaitGroup, n int, addr string, say func(conn net.Conn)) {
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
				if err != nil {
					time.Sleep(10 * time.Millisecond)
					continue
				}
				_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
				stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
				say(conn)
				stop()
				_ = conn.Close()
			}
		})
	}
}

// standing makes n connections to addr, says text on each and leaves it at that until the test ends.
func standing(t *testing.T, n int, addr, text string) {
	t.Helper()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range n / 8 {
				conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				t.Cleanup(func() { _ = conn.Close() })
				_, _ = io.WriteString(conn, text) // it may be closed already
			}
		})
	}
	wg.Wait()
}

// Connections that announce bodies, send long headers or do not read answers, and stop there, take a bounded memory and keep nobody out, at the limit
// of the manifests.
func TestProcessSilentConnections(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	for _, tc := range []struct {
		name  string
		conns int
		text  string
	}{
		{"announced bodies", 6000, "PUT /key/a HTTP/1.1\r\nHost: test\r\nContent-Length: 65536\r\n\r\n"},
		{"bodies in part", 2000, "PUT /key/a HTTP/1.1\r\nHost: test\r\nContent-Length: 65536\r\n\r\n" + strings.Repeat("1", 60000)},
		{"long headers", 8000, "GET /key/a HTTP/1.1\r\nHost: test\r\nX: " + strings.Repeat("x", 31000)},
		{"answers not read", 2000, "GET /key/large HTTP/1.1\r\nHost: test\r\n\r\n"},
		{"headers of many lines", 4000, "GET /key/a HTTP/1.1\r\nHost: test\r\n" + strings.Repeat("X: 1\r\n", 2500)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := startAll(newProc(t, map[string]string{"KV_STORE": storeMemory, "GOMEMLIMIT": "384MiB"}))[0]
			p.put("large", `"`+strings.Repeat("x", 500_000)+`"`)
			standing(t, tc.conns, p.env["HTTP_ADDR"]+":"+p.env["HTTP_PORT"], tc.text)
			var slowest time.Duration
			for i := range 20 {
				p.client.CloseIdleConnections()
				asked := time.Now()
				p.put("served", `"`+strings.Repeat("x", 20000)+fmt.Sprint(i)+`"`)
				slowest = max(slowest, time.Since(asked))
			}
			mb := residentMB(t, p.cmd.Process.Pid)
			if mb > 250 || slowest > 5*time.Second {
				t.Errorf("got %d MB resident at most and %v for the slowest write; want 250 and 5s", mb, slowest)
			}
			t.Logf("%d MB resident at most, slowest write %v", mb, slowest)
		})
	}
}

// residentMB returns a process's resident memory, in megabytes.
func residentMB(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	var kb int
	if _, err := fmt.Sscan(string(regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)[1]), &kb); err != nil {
		t.Fatal(err)
	}
	return kb >> 10
}

// Floods on both ports neither end the process nor stop the cluster, and its memory stays bounded.
func TestProcessUnderAttack(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "tls"}[secure], func(t *testing.T) {
			nodes := newProcs(t, nil)
			if secure {
				_, _, nodes = secureProcs(t)
			}
			startAll(nodes...)
			cluster := nodes[0].status().ClusterID
			idle := func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }
			garbage := bytes.Repeat([]byte("\x00\xffGET \r\n"), 1<<12)
			drip := func(text string) func(net.Conn) {
				return func(conn net.Conn) {
					for i := range text {
						if _, err := io.WriteString(conn, text[i:i+1]); err != nil {
							return
						}
						time.Sleep(100 * time.Millisecond)
					}
				}
			}
			bomb := func(kind byte) func(net.Conn) { // it announces more than it could ever send
				// The first of the nodes began the cluster, which therefore has its server's name.
				head := hello{kind, "node2#X", cluster, cluster}
				return func(conn net.Conn) {
					_, _ = conn.Write(append(head.encode(), 0, 0xff, 0xff, 0xff, 0xff, 0xdd, 0xff, 0xff, 0xff, 0xff))
					if answer, err := readShort(conn); !secure && err == nil && answer != "" {
						t.Errorf("got refused: %s; want the bomb let in", answer)
					}
					_, _ = io.Copy(io.Discard, conn)
				}
			}
			victim := nodes[0]
			web, peer := strings.TrimPrefix(strings.TrimPrefix(victim.url(), "https://"), "http://"), victim.env["RAFT_ADDR"]+":"+victim.env["RAFT_PORT"]
			for name, attack := range map[string]struct {
				conns int
				addr  string
				say   func(net.Conn)
			}{
				"idle raft connections":  {1000, peer, idle},
				"garbage for raft":       {20, peer, func(conn net.Conn) { _, _ = conn.Write(garbage) }},
				"length bombs for raft":  {100, peer, bomb(kindRaft)},
				"length bombs for peers": {100, peer, bomb(kindCall)},
				"idle http connections":  {1000, web, idle},
				"slow headers":           {500, web, drip("GET /key/a HTTP/1.1\r\nHost: test\r\nX: " + strings.Repeat("x", 1<<10))},
				"endless headers": {50, web, func(conn net.Conn) {
					_, _ = io.WriteString(conn, "GET /key/a HTTP/1.1\r\nHost: test\r\n"+strings.Repeat("X: "+strings.Repeat("x", 1000)+"\r\n", 100))
					_, _ = io.Copy(io.Discard, conn)
				}},
				"garbage for http": {20, web, func(conn net.Conn) { _, _ = conn.Write(garbage) }},
				"large bodies": {20, web, func(conn net.Conn) {
					_, _ = io.WriteString(conn, "PUT /key/a HTTP/1.1\r\nHost: test\r\nContent-Length: 10485760\r\n\r\n")
					_, _ = conn.Write(make([]byte, 10<<20))
				}},
				"deep values": {20, web, func(conn net.Conn) {
					_, _ = fmt.Fprintf(conn, "PUT /key/deep HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%s", 200000, strings.Repeat("[", 200000))
					_, _ = io.Copy(io.Discard, conn)
				}},
			} {
				t.Run(name, func(t *testing.T) {
					ctx, cancel := context.WithCancel(t.Context())
					var wg sync.WaitGroup
					defer wg.Wait()
					defer cancel()
					flood(ctx, &wg, attack.conns, attack.addr, attack.say)
					var slowest time.Duration
					for began, i := time.Now(), 0; time.Since(began) < time.Second/2 || i < 10; i++ {
						asked := time.Now()
						victim.client.CloseIdleConnections() // the flood must not keep newcomers out
						a, err := victim.ask(http.MethodPut, "/key/served", fmt.Sprint(i))
						if err != nil || a.status != http.StatusOK {
							t.Fatalf("write %d: got %v, %v; want 200", i, a, err)
						}
						slowest = max(slowest, time.Since(asked))
					}
					if mb := residentMB(t, victim.cmd.Process.Pid); mb > 200 {
						t.Errorf("got %d MB resident; want 200 at most", mb)
					} else {
						t.Logf("slowest write %v, %d MB resident at most so far", slowest, mb)
					}
				})
			}
			// A node that comes while the Raft port is flooded finds its way in.
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			flood(ctx, &wg, 600, peer, idle)
			nodes[2].end(syscall.SIGTERM, 0)
			nodes[2].start()
			nodes[2].await(http.StatusOK, http.MethodGet, "/readyz", "")
			want := victim.expect(http.StatusOK, http.MethodGet, "/key/served", "").body
			if got := nodes[2].expect(http.StatusOK, http.MethodGet, "/key/served", "").body; got != want {
				t.Errorf("got %s through the newcomer; want %s", got, want)
			}
		})
	}
}

// The largest bodies that there may be cost a bounded memory, and so do the deepest values.
func TestProcessLargestBodies(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	p := newProc(t, map[string]string{"KV_STORE": storeMemory, "MAX_BODY_BYTES": fmt.Sprint(maxBodyBytes)})
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/readyz", "")
	const members, deepest = 150_000, maxDepth
	var object strings.Builder
	for i := range members {
		fmt.Fprintf(&object, `,"k%d":%d`, i, i%10)
	}
	p.expect(http.StatusOK, http.MethodPost, "/key", "{"+object.String()[1:]+"}")
	p.has("k149999", "9", "")
	p.expect(http.StatusBadRequest, http.MethodPost, "/key", "{"+object.String()[1:]+`,"k0":1}`)
	deep := strings.Repeat("[", deepest) + strings.Repeat("]", deepest)
	p.put("deep", deep)
	p.has("deep", deep, "")
	if a := p.expect(http.StatusBadRequest, http.MethodPut, "/key/deep", "["+deep+"]"); !strings.Contains(a.body, "levels") {
		t.Errorf("got %s; want it to name the levels", a.body)
	}
	p.expect(http.StatusBadRequest, http.MethodPost, "/key", strings.Repeat(`{"a":`, maxBodyBytes/5))
	p.expect(http.StatusRequestEntityTooLarge, http.MethodPut, "/key/large", strings.Repeat("1", maxBodyBytes+1))
	mb := residentMB(t, p.cmd.Process.Pid)
	t.Logf("%d MB resident at most, of which the keys take about 30", mb)
	if mb > 900 {
		t.Errorf("got %d MB resident; want 900 at most", mb)
	}
}
