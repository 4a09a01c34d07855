package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// restore posts the lines of a backup to a node, each within the limits of its server.
func restore(t *testing.T, n *testNode, backup string) {
	t.Helper()
	lines := strings.Split(backup, "\n")
	if n := len(lines); n < 2 || lines[n-1] != "" || lines[n-2] != "{}" {
		t.Fatalf("got a backup that ends in %.100q; want {} as its last line", lines[max(0, n-2):])
	}
	for line := range strings.Lines(backup) { // with its newline, as some tools send it
		want(t, n, 200, http.MethodPost, "/key", line)
	}
}

// What a backup holds comes back into an empty cluster, values at the limit under the longest of keys too.
func TestBackupAndRestore(t *testing.T) {
	from, to := newKVNode(t), newKVNode(t)
	limit := int(from.cfg.MaxBodyBytes)
	large := `"` + strings.Repeat("x", limit-2) + `"`
	worst := strings.Repeat("%01", maxKeyBytes)
	want(t, from, 200, http.MethodPut, "/key/"+worst, large)
	want(t, from, 200, http.MethodPut, "/key/large", large)
	for i := range 20 {
		var body []string
		for j := range 100 {
			body = append(body, fmt.Sprintf(`"k%02d%02d":"%0300d"`, i, j, i*j))
		}
		want(t, from, 200, http.MethodPost, "/key", "{"+strings.Join(body, ",")+"}")
	}
	a := want(t, from, 200, http.MethodGet, "/backup", "")
	if a.header.Get("Content-Type") != ndjsonType || a.header.Get("Raft-Tag") == "" {
		t.Errorf("got %v; want %s and a Raft-Tag", a.header, ndjsonType)
	}
	lines := strings.Split(strings.TrimSuffix(a.body, "\n"), "\n")
	for _, line := range lines {
		if many := strings.Contains(line, `","k`); many && len(line) > backupLine {
			t.Errorf("got a line of %d bytes; want at most %d", len(line), backupLine)
		}
	}
	if len(lines) != 6 { // two large ones, 620 KB of small ones, and {}
		t.Errorf("got %d lines; want 6", len(lines))
	}
	put(t, to, "other", "1")
	restore(t, to, a.body)
	was, is := valuesOf(from), valuesOf(to)
	was["other"] = "1"
	if fmt.Sprint(was) != fmt.Sprint(is) {
		t.Errorf("got %d keys back; want the %d that there were", len(is), len(was))
	}
	if got := want(t, from, 200, http.MethodGet, "/backup?prefix=k01&consistency=stale", "").body; strings.Count(got, `"k`) != 100 {
		t.Errorf("got %d keys with the prefix; want 100", strings.Count(got, `"k`))
	}
	if got := want(t, from, 200, http.MethodGet, "/backup?prefix=none", "").body; got != "{}\n" {
		t.Errorf("got %q for no key; want {} alone", got)
	}
	if a := want(t, from, 200, http.MethodHead, "/backup", ""); a.body != "" || a.header.Get("Content-Type") != ndjsonType {
		t.Errorf("got %v for HEAD; want headers", a)
	}
	want(t, from, 400, http.MethodGet, "/backup?consistency=none", "")
	want(t, from, 400, http.MethodGet, "/backup", "", "If-Match", `"1"`)
}

// With a small MAX_BODY_BYTES the lines are small, too.
func TestBackupWithSmallBodies(t *testing.T) {
	n := newKVNode(t)
	n.cfg.MaxBodyBytes = 100
	for i := range 50 {
		put(t, n, fmt.Sprintf("key%d", i), strings.Repeat("1", 1+i*2))
	}
	backup := want(t, n, 200, http.MethodGet, "/backup", "").body
	for line := range strings.Lines(backup) {
		if len(line) > 101 && strings.Count(line, ":") > 1 {
			t.Errorf("got a line of %d bytes with several members; want at most 100", len(line)-1)
		}
	}
	before := valuesOf(n)
	restore(t, n, backup)
	if fmt.Sprint(valuesOf(n)) != fmt.Sprint(before) {
		t.Error("got another state after the restore")
	}
}

func TestPostBeyondTheLimit(t *testing.T) {
	n := newKVNode(t)
	limit := int(n.cfg.MaxBodyBytes)
	x := func(n int) string { return strings.Repeat("x", n) }
	for name, tt := range map[string]struct {
		body   string
		status int
	}{
		"one member, as a backup has it":         {`{"` + strings.Repeat(`\u0001`, maxKeyBytes) + `":"` + x(limit-2) + `"}`, 200},
		"several members within the limit":       {`{"a":1,"b":"` + x(limit-14) + `"}`, 200},
		"several members, a byte too many":       {`{"a":1,"b":"` + x(limit-13) + `"}`, 413},
		"one member, its value a byte too large": {`{"b":"` + x(limit-1) + `"}`, 413},
		"no members, but white space":            {`{` + strings.Repeat(" ", limit) + `}`, 413},
		"more than what may exceed":              {`{"a":"` + x(limit-2) + `"` + strings.Repeat(" ", backupSlack) + `}`, 413},
	} {
		t.Run(name, func(t *testing.T) {
			want(t, n, tt.status, http.MethodPost, "/key", tt.body)
			chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(tt.body), tt.body)
			want(t, n, tt.status, http.MethodPost, "/key", chunked, "Transfer-Encoding", "chunked")
		})
	}
}

// A backup is of one instant, though all keys change while it is read.
func TestBackupIsOfOneInstant(t *testing.T) {
	n := newKVNode(t)
	set := func(value int) {
		pairs := make([]Pair, 3000)
		for i := range pairs {
			pairs[i] = Pair{fmt.Sprintf("k%04d", i), fmt.Sprintf(`"%0200d"`, value)}
		}
		if err := kvOf(n).set(t.Context(), pairs...); err != nil {
			t.Error(err)
		}
	}
	set(0)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 1; ; i++ {
			select {
			case <-done:
				return
			default:
				set(i)
			}
		}
	}()
	for range 10 {
		body := want(t, n, 200, http.MethodGet, "/backup", "").body
		first := body[strings.Index(body, `:"`) : strings.Index(body, `:"`)+202]
		if got := strings.Count(body, first); got != 3000 {
			t.Errorf("got %d keys of the first one's value; want all 3000", got)
		}
	}
	close(done)
	<-ended
}

// Two readers that do not read keep a third one out, and are ended, in a way that a client notices.
func TestBackupReadersThatDoNotRead(t *testing.T) {
	t.Parallel()
	n := newKVNode(t)
	for i := range 40 {
		put(t, n, fmt.Sprint("k", i), `"`+strings.Repeat("x", 500<<10)+`"`)
	}
	var silent []net.Conn
	for range maxBackups {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", n.web.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10)
		_, _ = io.WriteString(conn, requestText(http.MethodGet, "/backup", ""))
		silent = append(silent, conn)
	}
	waitFor(t, "a backup to be refused", func() bool {
		return request(t, http.MethodHead, n.url+"/backup", "").status == 200 &&
			request(t, http.MethodGet, n.url+"/backup?prefix=none", "").status == 503
	})
	began := time.Now()
	waitFor(t, "a backup to be served again", func() bool { return request(t, http.MethodGet, n.url+"/backup?prefix=none", "").status == 200 })
	if took := time.Since(began); took < 5*time.Second || took > backupGrace+3*time.Second {
		t.Errorf("silent readers were ended after %v; want about %v", took, backupGrace)
	}
	for _, conn := range silent {
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(response.Body); err == nil {
			t.Errorf("got the end of a backup after %d bytes; want an error", len(body))
		}
		_ = response.Body.Close()
	}
}

// slowWriter is a client that takes so long to read a line.
type slowWriter struct {
	discard
	deadline time.Time
	takes    func(line int) time.Duration
	lines    int
	written  int // bytes
}

func (w *slowWriter) SetWriteDeadline(t time.Time) error { //nolint:unparam // http.ResponseController wants an error
	w.deadline = t
	return nil
}

func (w *slowWriter) Write(p []byte) (int, error) {
	const pieces = backupLine / pieceBytes
	w.lines = w.written/backupLine + 1
	w.written += len(p)
	time.Sleep(min(w.takes(w.lines)/pieces, time.Until(w.deadline)))
	if !time.Now().Before(w.deadline) {
		return 0, os.ErrDeadlineExceeded
	}
	return len(p), nil
}

// A client that is too slow for long is ended, also one that was fast before.
func TestBackupPace(t *testing.T) {
	const enough, most = time.Second * backupLine / backupRate, 3 * backupGrace
	for name, tt := range map[string]struct {
		takes func(line int) time.Duration
		ends  time.Duration // after so long; 0 for never
	}{
		"fast enough":        {func(int) time.Duration { return enough * 9 / 10 }, 0},
		"slow now and then":  {func(line int) time.Duration { return time.Duration(1-min(line%20, 1)) * backupGrace / 2 }, 0},
		"half as fast":       {func(int) time.Duration { return 2 * enough }, 2 * backupGrace},
		"does not read":      {func(int) time.Duration { return time.Hour }, backupGrace},
		"stops after 100 MB": {func(line int) time.Duration { return time.Duration(line/400) * time.Hour }, backupGrace},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &slowWriter{discard: discard{make(http.Header)}, takes: tt.takes}
				out := &pacedWriter{w: w, control: http.NewResponseController(w)}
				var err error
				began := time.Now()
				for time.Since(began) < most && err == nil && w.lines < 1000 {
					err = out.writeLine(make([]byte, backupLine-2))
				}
				took := time.Since(began)
				if ended := tt.ends > 0; (err != nil) != ended || ended && (took-tt.ends).Abs() > backupGrace/10 {
					t.Errorf("got %v after %v; want an end after %v", err, took, tt.ends)
				}
			})
		})
	}
}

// A client on the same machine gets a backup as fast as it reads. Were a line one piece, each of the few segments that the
// send buffer holds would wait for an acknowledgement, which the client's system delays: 2 MB/s.
func TestBackupIsFastOverLoopback(t *testing.T) {
	n := newKVNode(t)
	value := `"` + strings.Repeat("x", 200_000) + `"`
	for i := range 100 {
		want(t, n, 200, http.MethodPut, fmt.Sprint("/key/", i), value)
	}
	began := time.Now()
	a := want(t, n, 200, http.MethodGet, "/backup", "")
	if took := time.Since(began); len(a.body) < 100*len(value) || took > 2*time.Second {
		t.Errorf("got %d bytes in %v; want 20 MB in less than 2s", len(a.body), took)
	}
}

// What such a POST stores, with the largest MAX_BODY_BYTES there can be, can be read from a snapshot.
func TestSnapshotOfTheLargestMember(t *testing.T) {
	n := newKVNode(t)
	n.cfg.MaxBodyBytes = maxBodyBytes
	key, value := strings.Repeat("\x01", maxKeyBytes), `"`+strings.Repeat("x", maxBodyBytes-2)+`"`
	body := `{"` + strings.Repeat(`\u0001`, maxKeyBytes) + `":` + value + `}`
	want(t, n, 200, http.MethodPost, "/key", body+strings.Repeat(" ", maxBodyBytes+backupSlack-len(body)))
	m := n.machine.(*kvMachine)
	restored := restoredFrom(t, m)
	if item, _ := restored.items.Get(key); item.Value != value {
		t.Errorf("got %d bytes back; want %d", len(item.Value), len(value))
	}
}
