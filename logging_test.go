package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// stderrFake fails or stalls as it is told.
type stderrFake struct {
	logLines
	gate chan error // receives what becomes of each write: it waits for that
}

func (s *stderrFake) Write(p []byte) (int, error) {
	if err := <-s.gate; err != nil {
		return 0, err
	}
	return s.logLines.Write(p)
}

func TestLogThatNobodyReads(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, w := newMetrics(), &stderrFake{gate: make(chan error)}
				log, flush := openLog(mustConfig(t, map[string]string{"LOG_FORMAT": format}), w, m.dropped)
				log.Info("the first")
				synctest.Wait() // it is being written, and never will be
				const lines = 2 * maxLogLines
				for i := range lines {
					log.Info("one of many", "number", i)
				}
				dropped := int(testutil.ToFloat64(m.dropped))
				if dropped != lines-maxLogLines {
					t.Errorf("got %d lines dropped of %d; want all but %d", dropped, lines, maxLogLines)
				}
				began := time.Now()
				flush() // though it has no hope
				if took := time.Since(began); took != flushTimeout {
					t.Errorf("got %v for a flush to nobody; want %v", took, flushTimeout)
				}
				close(w.gate) // now somebody reads
				flush()
				if got := w.count("the first") + w.count("one of many"); got != 1+lines-dropped {
					t.Errorf("got %d lines written; want %d", got, 1+lines-dropped)
				}
				if w.count("were dropped", strconv.Itoa(dropped)) != 1 || w.count("were dropped") != 1 {
					t.Errorf("got %d lines that tell of drops; want one, of %d lines", w.count("were dropped"), dropped)
				}
			})
		})
	}
}

func TestLogThatCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, w := newMetrics(), &stderrFake{gate: make(chan error)}
		log, flush := openLog(mustConfig(t, nil), w, m.dropped)
		for range 3 { // one write each; were there more, the next would get the wrong answer
			log.Info("lost")
			w.gate <- syscall.EPIPE
			synctest.Wait()
		}
		if got := testutil.ToFloat64(m.dropped); got != 3 {
			t.Errorf("got %v lines dropped; want 3", got)
		}
		log.Info("written")
		close(w.gate)
		flush()
		if w.count("lost") != 0 || w.count("written") != 1 || w.count("were dropped", "lines=3") != 1 {
			t.Errorf("got %d, %d and %d lines; want none lost, and one each that was written and that tells of three",
				w.count("lost"), w.count("written"), w.count("were dropped", "lines=3"))
		}
	})
}

// raftSays has Raft log what it does at each attempt while peers are down, twice a second.
func raftSays(log *raftLogger, peers []raft.Server, took time.Duration) {
	for began := time.Now(); time.Since(began) < took; time.Sleep(500 * time.Millisecond) {
		log.Warn("Election timeout reached, restarting election")
		log.Info("entering candidate state", "node", "Node at node1#1 [Candidate]", "term", 7)
		for _, peer := range peers {
			log.Error("failed to heartbeat to", "peer", peer.Address, "backoff time", time.Second, "error", io.EOF)
			log.Error("failed to make requestVote RPC", "target", peer, "error", io.EOF, "term", 7)
			log.Warn("failed to contact", "server-id", peer.ID, "time", time.Second)
		}
	}
}

func TestRaftLogger(t *testing.T) {
	peers := []raft.Server{{ID: "node2#2", Address: "node2#2@10.0.0.2:1"}, {ID: "node22#3", Address: "node22#3@10.0.0.3:1"}}
	for _, tt := range []struct {
		level   string
		minutes int
		want    int // lines
	}{{"info", 1, 12}, {"info", 10, 120}, {"debug", 1, 8 * 120}} {
		t.Run(fmt.Sprintf("%s, %d minutes", tt.level, tt.minutes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lines := new(logLines)
				log := newRaftLogger(hclog.New(&hclog.LoggerOptions{Output: lines, Level: hclog.LevelFromString(tt.level)}))
				log.reached("node2#2")
				raftSays(log, peers, time.Duration(tt.minutes)*time.Minute)
				if got := lines.count(); got != tt.want {
					t.Errorf("got %d lines; want %d", got, tt.want)
				}
				for _, msg := range []string{"failed to heartbeat to", "failed to make requestVote RPC", "failed to contact"} {
					for _, peer := range []string{"node2#", "node22#"} {
						if got, want := lines.count("[ERROR]", msg, peer)+lines.count("[WARN]", msg, peer), 2*tt.minutes; got != want {
							t.Errorf("got %d lines that say %q of %s; want %d", got, msg, peer, want)
						}
						if got, want := lines.count(msg, peer, "left-out=59"), 2*tt.minutes-1; got != want {
							t.Errorf("got %d lines that say %q of %s with 59 left out; want %d", got, msg, peer, want)
						}
					}
				}
				for range 2 {
					log.reached("node2#4") // as another server, now
				}
				if all, it := lines.count("reachable again"), lines.count("reachable again: node=node2\n"); all != 1 || it != 1 {
					t.Errorf("got %d lines of a node that is reachable again, %d of the right one; want 1", all, it)
				}
			})
		})
	}
}

// What tells who leads comes as often as it happens. That a node is a little late is not worth a line.
func TestRaftLoggerInElections(t *testing.T) {
	lines := new(logLines)
	log := newRaftLogger(hclog.New(&hclog.LoggerOptions{Output: lines}))
	log.Error("failed to make requestVote RPC", "target", raft.Server{ID: "node2#2"}, "error", fmt.Errorf("refused: %w", errNoRaft), "term", 2)
	for term := range 10 {
		log.Info("election won", "term", term, "tally", 2)
		log.Info("entering leader state", "leader", "Node at node1#1 [Leader]")
		log.Info("entering follower state", "follower", "Node at node1#1 [Follower]")
	}
	if got, all := lines.count("[INFO]"), lines.count(); got != 30 || all != 30 {
		t.Errorf("got %d lines, %d of them at info; want 30", all, got)
	}
}

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
