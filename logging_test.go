package main

import (
	"fmt"
	"io"
	"strconv"
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

// Who leads is told by the node itself, and that a node is a little late is not worth a line. A change of the members is,
// as often as it happens.
func TestRaftLoggerInElections(t *testing.T) {
	lines := new(logLines)
	log := newRaftLogger(hclog.New(&hclog.LoggerOptions{Output: lines}))
	log.Error("failed to make requestVote RPC", "target", raft.Server{ID: "node2#2"}, "error", fmt.Errorf("refused: %w", errNoRaft), "term", 2)
	for term := range 10 {
		for _, request := range []string{"vote", "pre-vote"} { // one that comes after the new leader's first entry
			for _, why := range []string{"we have a leader", "our last term is greater", "our last index is greater"} {
				log.Warn("rejecting "+request+" request since "+why, "candidate", raft.ServerAddress("node2#2"))
			}
		}
		log.Info("election won", "term", term, "tally", 2)
		log.Info("entering leader state", "leader", "Node at node1#1 [Leader]")
		log.Info("entering follower state", "follower", "Node at node1#1 [Follower]")
		log.Info("updating configuration", "command", "AddVoter", "server-id", "node2#3")
	}
	if got, all := lines.count("[INFO]"), lines.count(); got != 10 || all != 10 {
		t.Errorf("got %d lines, %d of them at info; want 10", all, got)
	}
}
