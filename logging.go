package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxLogBuffer   = 256 << 10              // bytes of lines that wait while others are being written, which are at most as many
	flushTimeout   = 250 * time.Millisecond // for what waits when the process ends
	repeatInterval = 30 * time.Second       // between two lines of Raft's that say the same of the same node
)

// openLog returns the log, which goes to w and never waits for it, and what writes the rest of it when the process ends.
func openLog(cfg *Config, w io.Writer, dropped prometheus.Counter) (log hclog.Logger, flush func()) {
	b := &logBuffer{dropped: dropped, ended: make(chan struct{})}
	b.change = sync.NewCond(&b.mu)
	log = hclog.New(&hclog.LoggerOptions{
		Name: "raftstarter", Output: b, Level: hclog.LevelFromString(cfg.LogLevel), JSONFormat: cfg.LogFormat == "json",
	})
	go b.run(w, log)
	return log, b.flush
}

// logBuffer keeps lines until they are written. A write waits for whoever reads stderr, and would make all wait that have
// something to log, Raft among them. What finds no room in the buffer, or cannot be written, is dropped and counted.
type logBuffer struct {
	dropped prometheus.Counter // lines
	ended   chan struct{}      // closed when run has ended

	mu      sync.Mutex // guards what follows
	change  *sync.Cond // of waiting and closed
	waiting []byte
	untold  int // lines dropped since the log last told of that
	closed  bool
}

// Write takes a line over.
func (b *logBuffer) Write(line []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiting)+len(line) > maxLogBuffer {
		b.drop(line)
	} else {
		b.waiting = append(b.waiting, line...)
		b.change.Signal()
	}
	return len(line), nil
}

// drop counts lines that nobody will see. The caller holds the lock.
func (b *logBuffer) drop(lines []byte) {
	n := bytes.Count(lines, []byte("\n"))
	b.untold += n
	b.dropped.Add(float64(n))
}

// run writes lines to w until flush is called and there are none left. Once writing works it has the log tell of what was
// dropped before.
func (b *logBuffer) run(w io.Writer, log hclog.Logger) {
	defer close(b.ended)
	var lines []byte
	for works := true; ; {
		untold := 0
		b.mu.Lock()
		for len(b.waiting) == 0 && !b.closed {
			b.change.Wait()
		}
		lines, b.waiting = b.waiting, lines[:0]
		if works {
			untold, b.untold = b.untold, 0
		}
		b.mu.Unlock()
		if untold > 0 { // now there is room
			log.Warn("lines of this log were dropped, since stderr did not take them", "lines", untold)
		} else if len(lines) == 0 {
			return
		}
		n, err := w.Write(lines)
		works = err == nil
		b.mu.Lock()
		b.drop(lines[n:])
		b.mu.Unlock()
	}
}

// flush ends run when all is written, and waits for that, but not for long.
func (b *logBuffer) flush() {
	b.mu.Lock()
	b.closed = true
	b.change.Signal()
	b.mu.Unlock()
	select {
	case <-b.ended:
	case <-time.After(flushTimeout):
	}
}

// raftLog is the log for Raft, which warns at every attempt to reach a node that is down. A warning or error that says the
// same of the same node comes once in a repeatInterval, with how many were left out; those are for debugging. Who leads, and
// who is a member, is told in lines of the node's own.
type raftLog struct {
	hclog.Logger

	mu   sync.Mutex // guards said
	said map[saying]said
}

type saying struct{ msg, node string }

type said struct {
	at      time.Time
	leftOut int  // since then
	open    bool // it may still be so
}

func newRaftLog(log hclog.Logger) *raftLog { return &raftLog{Logger: log, said: make(map[saying]said)} }

const failedHeartbeat = "failed to heartbeat to" // with that Raft says that a node cannot be reached

// routine is what Raft says when all is well, at the start of a node and when it finds out how much of the log a follower
// has; and at each attempt to be elected, of which the node's own lines tell the outcome and the reason. It is for debugging,
// as is that another node does not run Raft yet.
var routine = []string{
	"failed to get previous log", "appendEntries rejected, sending older logs", "no known peers, aborting election",
	"found temporary snapshot",
	"entering candidate state", "pre-vote campaign failed, waiting for election timeout",
	"Election timeout reached, restarting election",
}

// Info, Warn and Error are all that Raft calls for what is not for debugging anyway.

func (l *raftLog) Info(msg string, args ...any)  { l.say(hclog.Info, msg, args) }
func (l *raftLog) Warn(msg string, args ...any)  { l.say(hclog.Warn, msg, args) }
func (l *raftLog) Error(msg string, args ...any) { l.say(hclog.Error, msg, args) }

func (l *raftLog) say(level hclog.Level, msg string, args []any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	early := strings.Contains(fmt.Sprint(args...), errNoRaft.Error()) // the other node has answered that
	if early || slices.Contains(routine, msg) {
		level = hclog.Debug
	}
	if level >= hclog.Warn {
		about := saying{msg, peerIn(args)}
		last := l.said[about]
		if time.Since(last.at) < repeatInterval {
			last.leftOut++
			level = hclog.Debug
		} else {
			if last.leftOut > 0 {
				args = append(slices.Clip(args), "left-out", last.leftOut)
			}
			last = said{at: time.Now(), open: true}
		}
		l.said[about] = last
	}
	l.Log(level, msg, args...)
}

// peerIn returns the node that a line is about, "" if it is about none: where Raft names a server it does so first.
func peerIn(args []any) string {
	if len(args) < 2 {
		return ""
	}
	switch peer := args[1].(type) {
	case raft.Server:
		return nodeOf(string(peer.ID))
	case raft.ServerID, raft.ServerAddress:
		return nodeOf(fmt.Sprint(peer))
	}
	return ""
}

// reached takes note that a server has answered a heartbeat, and says so if its node could not be reached before.
func (l *raftLog) reached(server string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	about := saying{failedHeartbeat, nodeOf(server)}
	if last := l.said[about]; last.open {
		last.open = false
		l.said[about] = last
		l.Logger.Info("reachable again", "node", about.node)
	}
}
