package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newPipe returns the two ends of a pipe.
func newPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(r.Close(), w.Close()) })
	return r, w
}

func TestProcessStderrIsNotRead(t *testing.T) {
	t.Parallel()
	nodes := newProcs(t, map[string]string{"SHUTDOWN_TIMEOUT": "3s"})
	for _, p := range nodes {
		_, p.pipe = newPipe(t)
	}
	leader, others := pick(startAll(nodes...), true)
	go func() { // until the pipe is closed: it is full by then
		_, _ = leader.pipe.Write(make([]byte, 2<<20))
	}()
	others[0].end(syscall.SIGKILL, -1)
	for began := time.Now(); time.Since(began) < 3*time.Second; time.Sleep(10 * time.Millisecond) {
		leader.put("k", "1")
		others[1].put("k", "2")
	}
	leader.signal(syscall.SIGTERM)
	leader.exits(exitOK, 3*time.Second+slack)
}

func TestProcessStderrIsGone(t *testing.T) {
	t.Parallel()
	p := newProc(t, nil)
	r, w := newPipe(t)
	p.pipe = w
	startAll(p)
	_ = r.Close()
	dropped := func() float64 {
		a := p.expect(http.StatusOK, http.MethodGet, "/metrics", "")
		n := regexp.MustCompile(`(?m)^raftstarter_log_lines_dropped_total (\d+)$`).FindStringSubmatch(a.body)
		if n == nil {
			t.Fatal("no metric tells of dropped lines")
		}
		v, _ := strconv.ParseFloat(n[1], 64)
		return v
	}
	p.signal(syscall.SIGHUP) // which it logs
	waitFor(t, "a line to be dropped", func() bool { return dropped() > 0 })
	p.put("k", "1")
	p.end(syscall.SIGTERM, exitOK)
}

func TestProcessOneOfThreeIsDown(t *testing.T) {
	t.Parallel()
	leader, others := pick(startAll(newProcs(t, nil)...), true)
	down := others[0]
	complaints := func() int {
		return len(regexp.MustCompile(`(?m)\[(WARN|ERROR)\]`).FindAllString(leader.read(leader.stderr), -1))
	}
	before := complaints()
	down.end(syscall.SIGKILL, -1)
	waitFor(t, "the leader to say so", func() bool {
		return strings.Contains(leader.read(leader.stderr), `failed to heartbeat to: peer="`+down.name)
	})
	time.Sleep(6 * time.Second) // for so long it could go on and on
	if got := complaints() - before; got > 4 {
		t.Errorf("got %d warnings and errors in some seconds; want a handful", got)
	}
	startAll(down)
	again := "reachable again: node=" + down.name + "\n"
	waitFor(t, "the leader to say so", func() bool { return strings.Count(leader.read(leader.stderr), again) == 1 })
	others[1].logs(`^(.*\[INFO\].*\n)*$`) // whom it does not concern
}

func TestProcessFirstStart(t *testing.T) {
	t.Parallel()
	for _, atOnce := range []bool{true, false} {
		t.Run(fmt.Sprintf("at once: %v", atOnce), func(t *testing.T) {
			nodes := newProcs(t, nil)
			for _, p := range nodes {
				if p.start(); !atOnce {
					p.await(http.StatusOK, http.MethodGet, "/livez", "")
				}
			}
			for _, p := range nodes {
				ready := regexp.MustCompile(`\[INFO\] .*ready: ` + p.url() + `\n$`)
				waitFor(t, p.name+" to say last that it is ready", func() bool { return ready.MatchString(p.read(p.stderr)) })
			}
			for _, p := range nodes {
				p.logs(`^(.*(\[INFO\]|\[WARN\].*open ports:).*\n)*$`)
				p.logs(`ready: ` + p.url() + `\n$`) // nothing has come after it
			}
		})
	}
}

func TestProcessLogIsJSON(t *testing.T) {
	t.Parallel()
	running := startAll(newProc(t, nil))[0]
	damaged := filepath.Join(t.TempDir(), "state")
	if err := errors.Join(os.Mkdir(damaged, 0o700), os.WriteFile(filepath.Join(damaged, "raft.db"), []byte("garbage"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		env     map[string]string
		signals []os.Signal
		code    int
		reason  string // in the last line
	}{
		{"a port in use", map[string]string{"HTTP_ADDR": running.env["HTTP_ADDR"], "HTTP_PORT": running.env["HTTP_PORT"]}, nil, exitFailed, "HTTP_PORT"},
		{"with the log off", map[string]string{
			"LOG_LEVEL": "off", "HTTP_ADDR": running.env["HTTP_ADDR"], "HTTP_PORT": running.env["HTTP_PORT"],
		}, nil, exitFailed, "HTTP_PORT"},
		{"a damaged database", map[string]string{"STATE_DIR": damaged}, nil, exitFailed, damaged},
		{"a signal", nil, []os.Signal{syscall.SIGTERM}, exitOK, "stopped"},
		{"a second signal", nil, []os.Signal{syscall.SIGTERM, syscall.SIGINT}, exitFailed, "second signal"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newProc(t, tt.env)
			p.env["LOG_FORMAT"], p.env["SHUTDOWN_TIMEOUT"] = "json", "5s"
			p.start()
			if tt.signals != nil {
				p.await(http.StatusOK, http.MethodGet, "/readyz", "")
				beginPut(p, "slow") // so that it does not stop too early
			}
			for i, sig := range tt.signals {
				if i > 0 {
					time.Sleep(sameSignal + 300*time.Millisecond) // else it would be taken for the first
				}
				p.signal(sig)
				p.awaitStopping()
			}
			p.exits(tt.code, stopLimit)
			last := struct {
				Level   string `json:"@level"`
				Message string `json:"@message"`
			}{}
			for line := range strings.Lines(p.read(p.stderr)) {
				if err := json.Unmarshal([]byte(line), &last); err != nil {
					t.Errorf("got %q on stderr; want JSON", line)
				}
			}
			if !strings.Contains(last.Message, tt.reason) || (last.Level == "error") != (tt.code == exitFailed) {
				t.Errorf("got %+v at the end; want %q, as an error if it is one", last, tt.reason)
			}
		})
	}
}
