package main

import (
	"bytes"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxLogBuffer = 256 << 10              // bytes of lines that wait while others are being written, which are at most as many
	flushTimeout = 250 * time.Millisecond // for what waits when the process ends
)

// openLog returns the log, which goes to w and never waits for it, and what writes the rest of it when the process ends.
func openLog(cfg *Config, w io.Writer, dropped prometheus.Counter) (log hclog.Logger, flush func()) {
	b := &logBuffer{dropped: dropped, ended: make(chan struct{})}
	b.change = sync.NewCond(&b.mu)
	log = hclog.New(&hclog.LoggerOptions{
		Name: "raftstarter", Output: b, Level: hclog.LevelFromString(cfg.LogLevel), JSONFormat: cfg.LogFormat == "json",
		Exclude: isRoutine,
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

// isRoutine says whether a line is of Raft finding out how much of the log a follower has: it warns of that at each start.
func isRoutine(_ hclog.Level, msg string, _ ...any) bool {
	return msg == "failed to get previous log" || msg == "appendEntries rejected, sending older logs"
}
