package main

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Status is what this node knows of itself and the cluster.
type Status struct {
	ID            string       `json:"id"`
	State         string       `json:"state"`
	Leader        string       `json:"leader"`
	Term          uint64       `json:"term"`
	CommitIndex   uint64       `json:"commit_index"`
	AppliedIndex  uint64       `json:"applied_index"`
	LastContactMS int64        `json:"last_contact_ms"` // 0 on the leader, -1 before the first contact
	KVStore       string       `json:"kv_store"`
	Version       string       `json:"version"`
	Cluster       string       `json:"cluster_id"` // "" while the node is of none
	Keys          int          `json:"keys"`       // StateMachine.Len
	Peers         []PeerStatus `json:"peers"`
	PeersDrift    bool         `json:"peers_drift"` // ids or voters of the membership are not what PEERS says

	Membership MembershipStatus `json:"membership"`
}

// MembershipStatus compares the nodes that there are with those that there should be.
type MembershipStatus struct {
	Wanted   []string `json:"wanted"`    // ids in this node's PEERS or PEERS_FILE
	Actual   []string `json:"actual"`    // of nodes that vote
	WaitsFor string   `json:"waits_for"` // what the leader says keeps the one from being the other, "" for nothing
}

// PeerStatus is one node of the cluster, at the address where this node looks for it.
type PeerStatus struct {
	ID           string `json:"id"`
	Address      string `json:"address"`
	Voter        bool   `json:"voter"` // the server that lives there has a vote
	Reachable    bool   `json:"reachable"`
	AppliedIndex uint64 `json:"applied_index"` // 0 where it is not reachable
}

// Status returns what this node knows of itself and the cluster. It asks the other nodes, for askTimeout at most.
func (s *Store) Status() Status {
	state := s.State()
	status := Status{
		ID: s.cfg.NodeID, State: state.State, Leader: state.Leader, Term: state.Term, LastContactMS: -1,
		KVStore: s.cfg.KVStore, Version: version, Cluster: s.membership.cluster(), Keys: s.replica.size(),
		Peers: []PeerStatus{}, PeersDrift: s.drift(),
	}
	members := s.members()
	status.Membership = MembershipStatus{Wanted: peerIDs(s.list.get()), Actual: nodesOf(voting(members))}
	r := s.raft.Load()
	if r == nil {
		return status
	}
	status.CommitIndex, status.AppliedIndex = commitIndex(r), r.AppliedIndex()
	if contact := r.LastContact(); state.State == "leader" {
		status.LastContactMS = 0
	} else if !contact.IsZero() {
		status.LastContactMS = time.Since(contact).Milliseconds()
	}
	v := s.recentView()
	status.Peers = v.status(members)
	if leader, answers := v.answers[state.Leader]; answers {
		status.Membership.WaitsFor = leader.Resize
		if !v.sameList(state.Leader) {
			status.Membership.WaitsFor = v.otherList(state.Leader)
		}
	}
	return status
}

// CaughtUp says whether since its start this node has once had all that a leader had committed. Until then what it
// holds may be an old snapshot.
func (s *Store) CaughtUp() bool { return s.membership.at() == stageCaughtUp }

// Ready returns nil when this node can do its part: it knows the leader, has caught up since it started, and votes.
// The error says, to people, what is missing.
func (s *Store) Ready() error {
	_, votes := s.isMember(s.membership.server())
	switch {
	case !s.isListed():
		return errors.New("this node is not in PEERS_FILE: it is to leave the cluster, or has left it")
	case s.raft.Load() == nil || s.Leader() == "":
		return errors.New(s.membership.reason())
	case !s.CaughtUp():
		return errors.New("this node has not caught up with the leader since it started")
	case !votes:
		return errors.New("this node has no vote yet: the leader is still bringing it up, " +
			"or has not removed the server that was here before")
	case s.stuck.Load():
		return errors.New(s.stuckReason())
	}
	return nil
}

// commitIndex returns the index up to which this node knows that the log is committed. Raft itself does not know it of
// a snapshot that it has read at its start.
func commitIndex(r *raft.Raft) uint64 { return max(r.CommitIndex(), r.AppliedIndex()) }

// members returns Raft's newest configuration, empty before there is one.
func (s *Store) members() []member {
	if r := s.raft.Load(); r != nil {
		return membersOf(r.GetConfiguration().Configuration())
	}
	return nil
}

// isMember says whether a server is in the newest configuration, and whether it votes there.
func (s *Store) isMember(server string) (member, votes bool) {
	for _, m := range s.members() {
		if m.Server == server {
			return true, m.Voter
		}
	}
	return false, false
}

// addresses says where each node listens: where the list has it, else where it has itself said that it is, else where
// the configuration has it or, for a server that has no configuration yet, that of the nodes in the list. Of itself a
// node that is in no list knows better.
func (s *Store) addresses() map[string]string {
	addresses := maps.Clone(*s.learned.Load())
	for _, m := range s.members() {
		addresses[nodeOf(m.Server)] = m.Address
	}
	for node := range addresses {
		if told, ok := s.told.Load(node); ok {
			addresses[node], _ = told.(string)
		}
	}
	if s.cfg.RaftAdvertise != "" {
		addresses[s.cfg.NodeID] = s.cfg.RaftAdvertise
	}
	for _, p := range s.list.get() {
		addresses[p.ID] = p.Addr
	}
	return addresses
}

// drift says whether ids or voters of the membership are others than those of PEERS. Addresses do not count.
func (s *Store) drift() bool {
	members, wanted := s.members(), peerIDs(s.list.get())
	same := slices.Equal(nodesOf(members), wanted) && slices.Equal(nodesOf(voting(members)), wanted)
	return len(members) > 0 && !same
}

// export makes metrics of what this node knows of itself and the cluster.
func (s *Store) export() {
	m := s.metrics
	m.labelled("build_info", "Always 1; the label has the version.", map[string]string{"version": version},
		func() float64 { return 1 })
	m.flag("ready", "1 when this node can do its part, as /readyz says.", func() bool { return s.Ready() == nil })
	m.flag("is_leader", "1 on the leader.", s.leadsNow)
	m.flag("replication_stuck",
		"1 on a leader that has not got a log entry to a majority for 10 s, though heartbeats pass.", s.stuck.Load)
	m.flag("has_leader", "1 when this node knows a leader.", func() bool { return s.Leader() != "" })
	m.flag("peers_drift", "1 when ids or voters of the membership are not what PEERS says.", s.drift)
	m.flag("peers_file_bad", "1 while PEERS_FILE cannot be used, and an older list is in use.", s.list.bad.Load)
	m.gauge("voters", "Members of the cluster that vote.", func() float64 { return float64(len(voting(s.members()))) })
	ofRaft := func(f func(*raft.Raft) uint64) func() float64 {
		return func() float64 {
			if r := s.raft.Load(); r != nil {
				return float64(f(r))
			}
			return 0
		}
	}
	m.gauge("term", "Raft's term; 0 before Raft runs.", ofRaft((*raft.Raft).CurrentTerm))
	m.gauge("commit_index", "Index of the last log entry that this node knows to be committed.",
		ofRaft(commitIndex))
	m.gauge("applied_index", "Index of the last log entry that this node has executed.",
		ofRaft((*raft.Raft).AppliedIndex))
	m.gauge("keys", "Keys that this node has.", func() float64 { return float64(s.replica.size()) })
	m.gauge("waiting_write_bytes",
		fmt.Sprintf("Commands that wait for a log entry or to be forwarded; over %d more are refused.", maxWaiting),
		func() float64 { return float64(s.writes.queued()) })
}

// exportStorage does so of what the storage holds, once it is open.
func (s *Store) exportStorage() {
	m, db, snapshots := s.metrics, s.storage.db, s.storage.snapshots
	m.gauge("snapshot_timestamp_seconds",
		"When this node began to write its newest snapshot, in Unix time; 0 when it has none.",
		func() float64 { return float64(snapshots.begun.Load()) / 1000 })
	m.gauge("snapshot_size_bytes", "Size of the newest snapshot; with memory, of the last that was sent or received.",
		func() float64 { return float64(s.storage.log.stateSize.Load()) })
	if db == nil {
		return
	}
	m.gauge("db_size_bytes", "Size of "+dbName+", which never shrinks.", func() float64 {
		info, err := os.Stat(filepath.Join(s.cfg.StateDir, dbName))
		if err != nil {
			return math.NaN()
		}
		return float64(info.Size())
	})
	m.gauge("db_free_bytes", "Of "+dbName+", the free pages, which new entries will fill.", func() float64 {
		return float64(db.Stats().FreeAlloc)
	})
}

// status returns what /status shows of each node of the configuration.
func (v view) status(members []member) []PeerStatus {
	peers := []PeerStatus{}
	for _, node := range nodesOf(members) {
		info, answers := v.answers[node]
		peers = append(peers, PeerStatus{node, v.addresses[node], v.hasVoter(members, node), answers, info.Applied})
	}
	return peers
}
