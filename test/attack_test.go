package test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

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
			mb := p.peakMemory() >> 20
			if mb > 250 || slowest > 5*time.Second {
				t.Errorf("got %d MB resident at most and %v for the slowest write; want 250 and 5s", mb, slowest)
			}
			t.Logf("%d MB resident at most, slowest write %v", mb, slowest)
		})
	}
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
				hello := append([]byte("RSTRAFT\x02"), kind)
				for _, s := range []string{"node2#X", cluster, cluster} {
					hello = append(append(hello, byte(len(s))), s...)
				}
				return func(conn net.Conn) {
					_, _ = conn.Write(append(slices.Clone(hello), 0, 0xff, 0xff, 0xff, 0xff, 0xdd, 0xff, 0xff, 0xff, 0xff))
					var refusal [1]byte // its length
					if _, err := io.ReadFull(conn, refusal[:]); !secure && err == nil && refusal[0] > 0 {
						t.Error("got the hello refused; want the bomb let in")
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
				"length bombs for raft":  {100, peer, bomb('R')},
				"length bombs for peers": {100, peer, bomb('C')},
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
					if mb := victim.peakMemory() >> 20; mb > 200 {
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
	const members, deepest = 150_000, 128
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
	mb := p.peakMemory() >> 20
	t.Logf("%d MB resident at most, of which the keys take about 30", mb)
	if mb > 900 {
		t.Errorf("got %d MB resident; want 900 at most", mb)
	}
}

// 3,000 listings at once, at the manifests' limit of memory, beside 800 clients that do not read a large value: those that
// get no turn are refused, and who reads one key is answered in time.
func TestProcessManyListings(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	p := newProc(t, map[string]string{"GOMEMLIMIT": "384MiB", "KV_STORE": storeMemory})
	startAll(p)
	value := `"` + strings.Repeat("x", 400) + `"`
	for i := range 10 {
		body := make([]string, 1000)
		for j := range body {
			body[j] = fmt.Sprintf(`"k%d%03d":%s`, i, j, value)
		}
		p.expect(http.StatusOK, http.MethodPost, "/key", "{"+strings.Join(body, ",")+"}")
	}
	p.put("large", `"`+strings.Repeat("x", 500<<10)+`"`)
	ask := func(target string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", p.env["HTTP_ADDR"]+":"+p.env["HTTP_PORT"])
		if err != nil {
			return nil, err
		}
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = io.WriteString(conn, "GET "+target+" HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
		return conn, err
	}
	for range 800 { // who do not read what they have asked for
		conn, err := ask("/key/large")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	list := func() (status int, size int64, err error) { // of a client that keeps nothing, for there are many of them
		conn, err := ask("/key?prefix=k&limit=10000")
		if err != nil {
			return 0, 0, err
		}
		defer conn.Close()
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return 0, 0, err
		}
		defer response.Body.Close()
		size, err = io.Copy(io.Discard, response.Body)
		return response.StatusCode, size, err
	}
	var answered, refused, failed atomic.Int64
	var listings, reads sync.WaitGroup
	done := make(chan struct{})
	reads.Go(func() {
		for ended := false; !ended; {
			began := time.Now()
			a, err := p.ask(http.MethodGet, "/key/k0000", "")
			if took := time.Since(began); err != nil || a.status != http.StatusOK || took > 5*time.Second {
				t.Errorf("a read of one key: got %d, %v, after %v; want it within 5 s", a.status, err, took)
			}
			select {
			case <-done:
				ended = true
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	for range 3000 {
		listings.Go(func() {
			switch status, size, err := list(); {
			case err == nil && status == http.StatusOK && size > 1<<20:
				answered.Add(1)
			case err == nil && status == http.StatusServiceUnavailable:
				refused.Add(1)
			default:
				failed.Add(1)
				t.Logf("a listing: got %d, %d bytes, %v", status, size, err)
			}
		})
	}
	listings.Wait()
	close(done)
	reads.Wait()
	mb := p.peakMemory() >> 20
	t.Logf("%d listings answered, %d refused; at most %d MB resident", answered.Load(), refused.Load(), mb)
	if mb > 450 || failed.Load() > 0 || answered.Load() < 100 {
		t.Errorf("got %d MB, %d answered, %d failed; want at most 450 MB, hundreds answered and none failed", mb, answered.Load(), failed.Load())
	}
	p.end(syscall.SIGTERM, exitOK)
}
