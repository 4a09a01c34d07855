package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// stuckReplication is how long a leader takes entries that reach no majority for a matter of moments.
const stuckReplication = 10 * time.Second

// commits is how far this node has come as a leader. It is for Store.watch alone.
type commits struct {
	term, index uint64
	since       time.Time // when that came about, or when there was last nothing to commit
}

// stuck says whether the leader of a term has committed nothing for stuckReplication, and has something to.
func (c *commits) stuck(now time.Time, leads bool, term, committed, last uint64) bool {
	if !leads || term != c.term || committed != c.index || last <= committed {
		*c = commits{term, committed, now}
	}
	return now.Sub(c.since) >= stuckReplication
}

// noticeStuck tells people when this node becomes a leader that cannot get its entries to a majority, or is none any more.
// That it leads says that heartbeats pass: without them Raft would have it step down.
func (s *Store) noticeStuck(leads bool, term, committed, last uint64) {
	stuck := s.commits.stuck(time.Now(), leads, term, committed, last)
	if s.stuck.Swap(stuck) == stuck {
		return
	}
	if !stuck {
		s.log.Info("replication is not stuck any more")
		return
	}
	s.wg.Go(func() { s.log.Error(s.stuckReason()) })
}

// stuckReason says what is known of why this leader cannot commit its entries.
func (s *Store) stuckReason() string {
	next, v := s.raft.Load().CommitIndex()+1, s.recent()
	var lacking []string
	for _, m := range s.members() {
		if node := nodeOf(m.Server); m.Voter && v.answers[node].LastIndex < next {
			lacking = append(lacking, node+" at "+v.addresses[node])
		}
	}
	slices.Sort(lacking)
	return fmt.Sprintf("replication is stuck: log entry %d has not reached a majority for %v, though heartbeats do, and no write gets past it; "+
		"nodes without it: [%s]: is the link to them or their disk too slow, or are large packets lost (MTU)?",
		next, stuckReplication, strings.Join(lacking, ", "))
}
