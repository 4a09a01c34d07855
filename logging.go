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

	waitGrowth  = 6                // of the time between two lines of a repeatLogger's
	forgetAfter = 10 * time.Minute // of silence a line is as new
)

// openLog returns a log that is written to w, and never waits for w. flush waits for a moment until all of it is
// written: it is for the end of the process. dropped counts lines that were not written.
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

// logQueue holds lines until they are written. A write to stderr waits for whoever reads it; all that log something
// would wait as well, Raft among them. A line that finds the queue full, or cannot be written, is dropped.
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

// repeatLogger shows a warning or error about a node, and the same about the same node again only when some time has
// passed: each time longer than the time before, up to most. It logs what it leaves out at debug level, and adds to the
// next line that it shows how many those were.
type repeatLogger struct {
	hclog.Logger
	least, most time.Duration

	mu    sync.Mutex // guards lines
	lines map[lineAbout]*repeatedLine
}

type lineAbout struct{ node, msg string }

type repeatedLine struct {
	said    time.Time     // when it was last logged, at whichever level
	next    time.Time     // when it may be shown again
	wait    time.Duration // from when it was shown to next
	leftOut int           // since it was shown
	solved  bool          // what it complains of is over
}

func newRepeatLogger(log hclog.Logger, least, most time.Duration) *repeatLogger {
	return &repeatLogger{Logger: log, least: least, most: most, lines: make(map[lineAbout]*repeatedLine)}
}

// logAbout logs a line about a node, "" for none.
func (l *repeatLogger) logAbout(node string, level hclog.Level, msg string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if level >= hclog.Warn {
		about, now := lineAbout{node, msg}, time.Now()
		line := l.lines[about]
		if line == nil {
			line = new(repeatedLine)
			l.lines[about] = line
		}
		if now.Sub(line.said) > forgetAfter {
			line.wait, line.next = 0, now
		}
		line.said = now
		if now.Before(line.next) {
			line.leftOut++
			level = hclog.Debug
		} else {
			if line.leftOut > 0 {
				args = append(slices.Clip(args), "left-out", line.leftOut)
			}
			line.wait = min(max(line.wait*waitGrowth, l.least), l.most)
			line.next, line.leftOut, line.solved = now.Add(line.wait), 0, false
		}
	}
	l.Log(level, msg, args...)
}

// raftLogger is the logger for Raft, which warns at every attempt to reach a node that is down.
type raftLogger struct{ *repeatLogger }

func newRaftLogger(log hclog.Logger) *raftLogger {
	return &raftLogger{newRepeatLogger(log, repeatInterval, repeatInterval)}
}

const failedHeartbeat = "failed to heartbeat to" // Raft's words for a node that it does not reach

// routine is what Raft logs while all is well: at a start, when a leader finds out how much of the log a follower has,
// at each attempt to be elected, when a vote is refused, and at the end. It is logged at debug level: the node's own
// lines say who leads, who is a member, or why there is no leader.
var routine = []string{
	"initial configuration", "added peer, starting replication", "found temporary snapshot",
	"entering follower state", "election won", "entering leader state", "pre-vote successful, starting election",
	"failed to get previous log", "appendEntries rejected, sending older logs",
	"no known peers, aborting election", "entering candidate state",
	"pre-vote campaign failed, waiting for election timeout", "Election timeout reached, restarting election",
	"failed to accept connection",
	"rejecting vote request since we have a leader", "rejecting pre-vote request since we have a leader",
	"rejecting vote request since our last term is greater", "rejecting pre-vote request since our last term is greater",
	"rejecting vote request since our last index is greater", "rejecting pre-vote request since our last index is greater",
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
	l.logAbout(peerIn(args), level, msg, args...)
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
	l.mu.Lock()
	defer l.mu.Unlock()
	node := nodeOf(server)
	if last := l.lines[lineAbout{node, failedHeartbeat}]; last != nil && !last.solved {
		last.solved = true
		l.Logger.Info("reachable again", "node", node)
	}
}
