package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	askTimeout = 500 * time.Millisecond // for a node to say who it is
	recentView = time.Second            // /status may be so old
)

// nodeInfo is what a node answers when another asks who it is.
type nodeInfo struct {
	Server  string   `json:"server"`
	Cluster string   `json:"cluster"`
	Peers   []string `json:"peers"` // ids in its PEERS, sorted

	LastTerm  uint64 `json:"last_term"` // of its newest log entry or snapshot
	LastIndex uint64 `json:"last_index"`
	Applied   uint64 `json:"applied"` // index up to which its state machine has executed the log

	Running bool     `json:"running"` // it runs Raft
	Ready   bool     `json:"ready"`   // it leads, and has executed all of earlier terms
	Leader  string   `json:"leader"`  // the server that it takes for the leader, "" for none
	Members []member `json:"members"` // of its newest configuration

	Commands byte   `json:"commands"` // newest version of commands that it knows
	Lowest   byte   `json:"lowest"`   // as the leader: the newest version that all voters know; 0 while it has not heard from one
	Behind   string `json:"behind"`   // as the leader: a node that knows no more than that

	WaitsFor string `json:"waits_for"` // for people
	Resize   string `json:"resize"`    // for people, from the leader: what keeps the membership from being what the list says
}

// view is what a node sees when it has asked the others, and itself.
type view struct {
	self      string              // this node
	peers     []Peer              // PEERS
	answers   map[string]nodeInfo // by node
	silent    map[string]error    // why a node that was asked did not answer, or not as it should
	addresses map[string]string   // where each node was asked
	listens   string              // this node's RAFT_ADDR:RAFT_PORT
}

func (v view) mine() nodeInfo { return v.answers[v.self] }

// mostComplete returns the node whose log is the most complete of those in this server's cluster, or in any if it has none;
// "" if none holds anything.
func (v view) mostComplete() (best string) {
	for _, node := range slices.Sorted(maps.Keys(v.answers)) {
		info, most := v.answers[node], v.answers[best]
		if mine := v.mine().Cluster; mine != "" && info.Cluster != mine {
			continue
		}
		if info.LastTerm > most.LastTerm || info.LastTerm == most.LastTerm && info.LastIndex > most.LastIndex {
			best = node
		}
	}
	return best
}

// String says, to people, what keeps this node from being of use, and what they can do about it.
func (v view) String() string {
	for _, node := range slices.Sorted(maps.Keys(v.answers)) {
		if v.answers[node].Ready && node != v.self {
			return v.besideLeader(node)
		}
	}
	best := v.mostComplete()
	if best == "" {
		return "the cluster has not begun: " + v.obstacles(false, nil)
	}
	lost, _, voters := v.voters(best)
	reason := v.obstacles(true, lost)
	if isMajority(voters-len(lost), voters) || len(lost) == 0 {
		return "no leader is known: " + reason
	}
	info := v.answers[best]
	reason = fmt.Sprintf("a majority of the nodes has lost its state, and nothing can be written or confirmed any more: %s. Node %s has the "+
		"most complete log (entry %d of term %d)", reason, best, info.LastIndex, info.LastTerm)
	if info.Applied < info.LastIndex {
		return reason + " and is about to execute all of it"
	}
	return reason + ": save its backup, which is what it answers with ?consistency=stale; stop all nodes, move their state directories " +
		"away, start all nodes, and restore the backup"
}

// voters returns, of the voters in the configuration of the given node, the nodes of those that are gone, how many answer as
// themselves, and how many there are.
func (v view) voters(node string) (lost []string, present, total int) {
	for _, m := range v.answers[node].Members {
		info, answers := v.answers[nodeOf(m.Server)]
		switch {
		case !m.Voter:
			continue
		case answers && info.Server == m.Server:
			present++
		case answers:
			lost = append(lost, nodeOf(m.Server))
		}
		total++
	}
	return lost, present, total
}

func isMajority(n, of int) bool { return n > of/2 }

// besideLeader says why this node does not follow a leader that it sees.
func (v view) besideLeader(node string) string {
	leader, here := v.answers[node], ""
	var nodes []string
	for _, m := range leader.Members {
		nodes = append(nodes, nodeOf(m.Server))
		if m.Server == v.mine().Server {
			here = m.Address
		}
	}
	slices.Sort(nodes)
	nodes = slices.Compact(nodes)
	switch {
	case !slices.Contains(nodes, v.self) && slices.Contains(leader.Peers, v.self):
		if !slices.Equal(leader.Peers, v.mine().Peers) {
			return fmt.Sprintf("%s, which leads, names other nodes than this one: %s", node, strings.Join(leader.Peers, ", "))
		}
	case !slices.Contains(nodes, v.self):
		noun := "members"
		if len(nodes) == 1 {
			noun = "member"
		}
		return fmt.Sprintf("the cluster that %s leads has only the %s %s", node, noun, strings.Join(nodes, ", "))
	case v.mine().Cluster != "" && v.mine().Cluster != leader.Cluster:
		return fmt.Sprintf("%s is of another cluster, which it leads (%s; this node is of %s): to have this node join it, stop this node, move "+
			"its STATE_DIR away and start it", node, leader.Cluster, v.mine().Cluster)
	case here != "":
		return fmt.Sprintf("the leader %s does not reach this node at %s", node, here)
	}
	return node + ", which leads, is about to add this node"
}

// obstacles says what is wrong with each node. The cluster has begun or not, and the nodes in lost have lost their state.
func (v view) obstacles(begun bool, lost []string) string {
	var parts []string
	for _, node := range slices.Sorted(maps.Keys(v.addresses)) {
		switch info, answers := v.answers[node]; {
		case slices.Contains(lost, node):
			parts = append(parts, node+" has lost its state")
		case node == v.self && answers && portOf(v.listens) != portOf(v.addresses[node]):
			parts = append(parts, fmt.Sprintf("%s listens on %s, PEERS says %s", node, portOf(v.listens), portOf(v.addresses[node])))
		case node == v.self && answers:
		case !answers && errors.As(v.silent[node], new(*net.DNSError)):
			parts = append(parts, fmt.Sprintf("%s (%s): no such host", node, v.addresses[node]))
		case !answers:
			parts = append(parts, fmt.Sprintf("%s at %s: %v", node, v.addresses[node], causeOf(v.silent[node])))
		case info.LastIndex > 0 && info.Cluster != v.answers[v.mostComplete()].Cluster:
			parts = append(parts, fmt.Sprintf("%s is of another cluster, %s", node, info.Cluster))
		case !begun && !slices.Equal(info.Peers, v.mine().Peers):
			parts = append(parts, fmt.Sprintf("%s names other PEERS: %s", node, strings.Join(info.Peers, ", ")))
		}
	}
	if first := v.bootstrapper(); !begun && first != v.self && v.answers[first].WaitsFor != "" {
		parts = append(parts, fmt.Sprintf("%s, which begins the cluster, says: %s", first, v.answers[first].WaitsFor))
	}
	if len(parts) == 0 {
		return "all nodes answer"
	}
	return strings.Join(parts, "; ")
}

// foreign lists the nodes that are of another cluster, and hold something of it.
func (v view) foreign() string {
	var parts []string
	for _, node := range slices.Sorted(maps.Keys(v.answers)) {
		if info := v.answers[node]; info.LastIndex > 0 && info.Cluster != v.mine().Cluster {
			parts = append(parts, node+" of cluster "+info.Cluster)
		}
	}
	return strings.Join(parts, "; ")
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// causeOf shortens what the net package says of a connection that could not be made.
func causeOf(err error) error {
	errno, op := syscall.Errno(0), new(net.OpError)
	switch {
	case errors.As(err, &errno):
		return errno
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("no answer")
	case errors.As(err, &op):
		return op.Err
	}
	return err
}

// info returns what this node says of itself.
func (s *Store) info() (nodeInfo, error) {
	id := s.membership.identity()
	info := nodeInfo{Server: id.Server, Cluster: id.Cluster, Peers: peerIDs(s.list.get()), Applied: s.replica.applied.load()}
	info.Commands = s.replica.knownVersion()
	info.WaitsFor = s.membership.reason()
	var err error
	if info.LastIndex, info.LastTerm, err = s.storage.lastEntry(); err != nil {
		return info, err
	}
	if r := s.raft.Load(); r != nil {
		_, leader := r.LeaderWithID()
		info.Lowest, info.Behind = s.versions.get()
		info.Resize = s.membership.resize()
		info.Running, info.Ready, info.Leader, info.Members = true, s.leadsReady(), string(leader), s.members()
	}
	return info, nil
}

func peerIDs(peers []Peer) (ids []string) {
	for _, p := range peers {
		ids = append(ids, p.ID)
	}
	slices.Sort(ids)
	return ids
}

// handleWho answers a node that asks who this one is. Whoever asks may be waiting for this node to look at it in turn.
func (s *Store) handleWho(context.Context, string, []byte) ([]byte, error) {
	info, err := s.info()
	if err != nil {
		return nil, err
	}
	s.membership.poke()
	return json.Marshal(info)
}

// lookAround asks all nodes of PEERS and of the configuration who they are, this one among them.
func (s *Store) lookAround(ctx context.Context) view {
	v := view{
		self: s.cfg.NodeID, peers: s.list.get(),
		answers: make(map[string]nodeInfo), silent: make(map[string]error), addresses: s.addresses(), listens: s.cfg.RaftAddr,
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var (
		wg sync.WaitGroup
		mu sync.Mutex // guards the maps of v
	)
	for node := range v.addresses {
		wg.Go(func() {
			info, err := s.askWho(ctx, node)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				v.silent[node] = err
			} else {
				v.answers[node] = info
			}
		})
	}
	wg.Wait()
	s.learn(v)
	return v
}

// learn takes note, while this server has no configuration, of where the members of the others' listen: the leader of a
// cluster that is to have this node may be about to leave it, and then it is in no list.
func (s *Store) learn(v view) {
	learned := make(map[string]string)
	if s.raft.Load() == nil {
		for _, info := range v.answers {
			for _, m := range info.Members {
				learned[nodeOf(m.Server)] = m.Address
			}
		}
	}
	s.learned.Store(&learned)
}

// askWho asks a node who it is.
func (s *Store) askWho(ctx context.Context, node string) (info nodeInfo, err error) {
	if node == s.cfg.NodeID {
		return s.infoInTime(ctx)
	}
	answer, err := s.peers.call(ctx, node, opWho, nil)
	if err == nil {
		err = json.Unmarshal(answer, &info)
	}
	if err == nil && (!strings.HasPrefix(info.Server, node+"#") || len(info.Server) > maxName || len(info.Cluster) > maxName) {
		err = fmt.Errorf("it calls itself server %q of cluster %q, which no node %q can be", info.Server, info.Cluster, node)
	}
	return info, err
}

// infoInTime returns info, or ctx's error if the storage does not answer in time.
func (s *Store) infoInTime(ctx context.Context) (nodeInfo, error) {
	var info nodeInfo
	done := make(chan error, 1)
	go func() { // until the storage answers
		var err error
		info, err = s.info()
		done <- err
	}()
	select {
	case err := <-done:
		return info, err
	case <-ctx.Done():
		return nodeInfo{}, ctx.Err()
	}
}

// recent returns what a look at the others has shown a moment ago.
func (s *Store) recent() view {
	s.looking.Lock()
	defer s.looking.Unlock()
	if time.Since(s.seenAt) > recentView {
		s.seen, s.seenAt = s.lookAround(s.ctx), time.Now()
	}
	return s.seen
}
