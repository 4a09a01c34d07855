package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCommitsThatAreStuck(t *testing.T) {
	var c replication
	began := time.Now()
	for _, step := range []struct {
		seconds               int
		leads                 bool
		term, committed, last uint64
		want                  bool
	}{
		{0, false, 3, 7, 9, false},
		{20, false, 3, 7, 9, false},
		{21, true, 4, 7, 9, false}, // elected
		{30, true, 4, 7, 9, false},
		{31, true, 4, 7, 10, true},
		{40, true, 4, 7, 12, true},
		{41, true, 4, 8, 12, false}, // one got through
		{50, true, 4, 8, 12, false},
		{51, true, 4, 8, 12, true},
		{52, true, 5, 8, 13, false}, // elected again
		{53, true, 5, 13, 13, false},
		{90, true, 5, 13, 13, false}, // idle
		{91, true, 5, 13, 14, false},
		{99, true, 5, 13, 14, false},
		{100, true, 5, 13, 14, true},
		{101, false, 5, 13, 14, false},
	} {
		if got := c.stuck(began.Add(time.Duration(step.seconds)*time.Second), step.leads, step.term, step.committed, step.last); got != step.want {
			t.Errorf("after %d s: got %v; want %v", step.seconds, got, step.want)
		}
	}
}

// Heartbeats pass and an entry does not: the leader stays in office, and nothing but this tells why no write is answered.
func TestStuckReplicationIsTold(t *testing.T) {
	t.Parallel()
	simulate(t, storeMemory, 3, 1, func(s *sim) {
		for _, n := range s.nodes {
			n.start(nil)
		}
		s.await(readyLimit, "all nodes to be ready", s.allReady)
		leader := s.leader()
		var others []string
		for _, n := range s.others(leader) {
			others = append(others, n.id+" at "+n.id)
		}
		slices.Sort(others)
		s.await(5*time.Second, "a write", func() bool { return s.put(leader) })
		store := leader.run.Load().store
		metric := func() float64 {
			families, err := store.metrics.registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				if f.GetName() == "raftstarter_replication_stuck" {
					return f.GetMetric()[0].GetGauge().GetValue()
				}
			}
			return -1
		}
		large := func(m simMessage) bool { return m.isRequest(rpcAppendEntries) && len(m.data) > 2000 }
		pass := s.links(func(from, _ *simNode) bool { return from == leader }, linkState{hold: large})
		s.writes(leader, "k", `"`+strings.Repeat("v", 3000)+`"`)
		time.Sleep(replicationStuckAfter - time.Second)
		if err := store.Ready(); err != nil || metric() != 0 {
			t.Errorf("got ready: %v, metric %v after less than the limit; want neither", err, metric())
		}
		time.Sleep(2 * time.Second)
		err := store.Ready()
		if err == nil || !strings.Contains(err.Error(), "replication is stuck") || !strings.Contains(err.Error(), strings.Join(others, ", ")) {
			t.Errorf("got ready: %v; want a reason that names both followers", err)
		}
		if !leader.leads() || metric() != 1 || !strings.Contains(s.log.last(), "[ERROR] "+leader.id+": replication is stuck: log entry") {
			t.Errorf("got a leader %v, metric %v; want it in office, 1, and a line in the log", leader.leads(), metric())
		}
		pass()
		s.await(5*time.Second, "the node to be ready again", func() bool { return store.Ready() == nil && metric() == 0 })
		s.await(5*time.Second, "a write", func() bool { return s.put(leader) })
	})
}
