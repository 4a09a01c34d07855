package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxLogLines    = 1024                   // that wait until they are written
	flushTimeout   = 250 * time.Millisecond // for those that wait when the process ends
	repeatInterval = 30 * time.Second       // between two lines of Raft's that say the same about the same node
)

// openLog returns a log that is written to w, and never waits for w. flush waits for a moment until all of it is written: it
// is for the end of the process. dropped counts lines that were not written.
func openLog(cfg *Config, w io.Writer, dropped prometheus.Counter) (log hclog.Logger, flush func()) {
	q := &logQueue{lines: make(chan []byte, maxLogLines), ended: make(chan struct{}), dropped: dropped}
	log = hclog.New(&hclog.LoggerOptions{
		Name: "raftstarter", Output: q, Level: hclog.LevelFromString(cfg.LogLevel), JSONFormat: cfg.LogFormat == "json",
	})
	ctx, stop := context.WithCancel(context.Background())
	go q.run(ctx, w, log)
	return log, func() {
		stop()
		select {
		case <-q.ended:
		case <-time.After(flushTimeout):
		}
	}
}

// logQueue holds lines until they are written. A write to stderr waits for whoever reads it; all that log something would
// wait as well, Raft among them. A line that finds the queue full, or cannot be written, is dropped.
type logQueue struct {
	lines   chan []byte
	ended   chan struct{} // closed when run has ended
	dropped prometheus.Counter
	untold  atomic.Int64 // lines dropped since the log last said so
}

// Write queues a line.
func (q *logQueue) Write(line []byte) (int, error) {
	select {
	case q.lines <- bytes.Clone(line):
	default:
		q.drop()
	}
	return len(line), nil
}

func (q *logQueue) drop() {
	q.dropped.Inc()
	q.untold.Add(1)
}

// run writes lines to w, until ctx has ended and none are left.
func (q *logQueue) run(ctx context.Context, w io.Writer, log hclog.Logger) {
	defer close(q.ended)
	for {
		select {
		case line := <-q.lines:
			if _, err := w.Write(line); err != nil {
				q.drop()
			} else if len(q.lines) < maxLogLines { // there is room for one that tells of dropped ones
				if n := q.untold.Swap(0); n > 0 {
					log.Warn("lines of this log were dropped, since stderr did not take them", "lines", n)
				}
			}
		case <-ctx.Done():
			if len(q.lines) == 0 {
				return
			}
		}
	}
}

// repeatLogger shows a line about a node once in an interval. It logs repetitions at debug level, and adds to the next line
// that it shows how many there were.
type repeatLogger struct {
	hclog.Logger
	interval time.Duration

	mu    sync.Mutex // guards shown
	shown map[aboutNode]*repetitions
}

type aboutNode struct{ node, msg string }

type repetitions struct {
	since time.Time // when the line was last shown
	count int
}

func newRepeatLogger(log hclog.Logger, interval time.Duration) *repeatLogger {
	return &repeatLogger{Logger: log, interval: interval, shown: make(map[aboutNode]*repetitions)}
}

// logAbout logs a line about a node, "" for none. It returns true if it shows it. Levels below warn are not limited.
func (l *repeatLogger) logAbout(node string, level hclog.Level, msg string, args ...any) (shown bool) {
	if level >= hclog.Warn {
		l.mu.Lock()
		r := l.shown[aboutNode{node, msg}]
		if r == nil {
			r = new(repetitions)
			l.shown[aboutNode{node, msg}] = r
		}
		if shown = time.Since(r.since) >= l.interval; !shown {
			r.count++
			level = hclog.Debug
		} else {
			if r.count > 0 {
				args = append(slices.Clip(args), "left-out", r.count)
			}
			*r = repetitions{since: time.Now()}
		}
		l.mu.Unlock()
	}
	l.Log(level, msg, args...)
	return shown
}

// raftLogger is the logger for Raft, which warns at every attempt to reach a node that is down.
type raftLogger struct {
	*repeatLogger

	mu          sync.Mutex      // guards unreachable
	unreachable map[string]bool // nodes that Raft was shown to complain about, until they are reached again
}

func newRaftLogger(log hclog.Logger) *raftLogger {
	return &raftLogger{repeatLogger: newRepeatLogger(log, repeatInterval), unreachable: make(map[string]bool)}
}

const failedHeartbeat = "failed to heartbeat to" // Raft's words for a node that it does not reach

// routine is what Raft warns of while all is well, and at each attempt to be elected. It is logged at debug level: the node's
// own lines say who leads, or why nobody does.
var routine = []string{
	"failed to get previous log", "appendEntries rejected, sending older logs", "no known peers, aborting election",
	"found temporary snapshot",
	"entering candidate state", "pre-vote campaign failed, waiting for election timeout",
	"Election timeout reached, restarting election",
}

// Info, Warn and Error are all that Raft calls above debug level.

func (l *raftLogger) Info(msg string, args ...any)  { l.logRaft(hclog.Info, msg, args) }
func (l *raftLogger) Warn(msg string, args ...any)  { l.logRaft(hclog.Warn, msg, args) }
func (l *raftLogger) Error(msg string, args ...any) { l.logRaft(hclog.Error, msg, args) }

func (l *raftLogger) logRaft(level hclog.Level, msg string, args []any) {
	starting := strings.Contains(fmt.Sprint(args...), errNoRaft.Error()) // the other node runs no Raft yet
	if starting || slices.Contains(routine, msg) {
		level = hclog.Debug
	}
	node := peerIn(args)
	if l.logAbout(node, level, msg, args...) && msg == failedHeartbeat {
		l.mu.Lock()
		l.unreachable[node] = true
		l.mu.Unlock()
	}
}

// peerIn returns the node that a line of Raft's is about, "" for none. Raft names it first.
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

// reached is called when a server has answered a heartbeat. It logs that its node is reachable again, if it was not.
func (l *raftLogger) reached(server string) {
	node := nodeOf(server)
	l.mu.Lock()
	again := l.unreachable[node]
	delete(l.unreachable, node)
	l.mu.Unlock()
	if again {
		l.Logger.Info("reachable again", "node", node)
	}
}
