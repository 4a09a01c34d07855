package main

import (
	"cmp"
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
	maxViewAge = time.Second            // of what /status shows
)

// nodeInfo is what a node answers when another asks who it is.
type nodeInfo struct {
	Server  string   `json:"server"`
	Cluster string   `json:"cluster"`
	Address string   `json:"address"` // where it listens, "" if it does not know
	Peers   []string `json:"peers"`   // ids in its PEERS, sorted

	LastTerm  uint64 `json:"last_term"` // of its newest log entry or snapshot
	LastIndex uint64 `json:"last_index"`
	Applied   uint64 `json:"applied"` // index up to which its state machine has executed the log

	HoldsBack string `json:"holds_back,omitempty"` // see Store.holdsBack

	Ready   bool     `json:"ready"`   // it leads, and has executed all of earlier terms
	Members []member `json:"members"` // of its newest configuration, where it looks for them

	Commands byte   `json:"commands"`  // newest version of commands that it knows
	Lowest   byte   `json:"lowest"`    // from the leader: see findings
	Behind   string `json:"behind"`    // likewise
	Resize   string `json:"resize"`    // likewise
	WaitsFor string `json:"waits_for"` // for people: what keeps it from being of use
}

// votes says whether it is a voter, by its own configuration.
func (i nodeInfo) votes() bool {
	return slices.ContainsFunc(i.Members, func(m member) bool { return m.Server == i.Server && m.Voter })
}

// view is what a node sees when it has asked the others, and itself.
type view struct {
	self      string              // this node
	peers     []string            // ids in this node's PEERS or PEERS_FILE
	answers   map[string]nodeInfo // by node
	silent    map[string]error    // why a node that was asked did not answer, or not as it should
	addresses map[string]string   // where each node was asked
	listens   string              // this node's RAFT_ADDR:RAFT_PORT
}

func (v view) mine() nodeInfo { return v.answers[v.self] }

// present says whether the node of a member answers as this member.
func (v view) present(m member) bool { return v.answers[nodeOf(m.Server)].Server == m.Server }

// hasVoter says whether a node has a voter among members that is not gone: that answers, or whose node does not.
func (v view) hasVoter(members []member, node string) bool {
	_, answers := v.answers[node]
	return slices.ContainsFunc(members, func(m member) bool {
		return m.Voter && nodeOf(m.Server) == node && (!answers || v.present(m))
	})
}

// address returns where a node that answers says it listens or, if it does not know, where it was asked.
func (v view) address(node string) string { return cmp.Or(v.answers[node].Address, v.addresses[node]) }

// mostComplete returns the node whose log is the most complete of those in this server's cluster, or in any if it has
// none; "" if none holds anything.
func (v view) mostComplete() (best string) {
	for _, node := range slices.Sorted(maps.Keys(v.answers)) {
		info, most := v.answers[node], v.answers[best]
		if mine := v.mine().Cluster; mine != "" && info.Cluster != mine {
			continue
		}
		more := cmp.Or(cmp.Compare(info.LastTerm, most.LastTerm), cmp.Compare(info.LastIndex, most.LastIndex))
		if more > 0 || more == 0 && info.votes() && !most.votes() { // who does not vote may have lost its own state
			best = node
		}
	}
	return best
}

// allEmpty says whether every node of PEERS answers, names the same PEERS, holds nothing, and may be in a new cluster.
func (v view) allEmpty() bool {
	return !slices.ContainsFunc(v.peers, func(node string) bool {
		info := v.answers[node]
		return !v.sameList(node) || info.LastIndex > 0 || info.HoldsBack != ""
	})
}

// bootstrapper returns the node that bootstraps the cluster.
func (v view) bootstrapper() string { return slices.Min(v.peers) }

// toJoin returns the cluster that a server of none is to join, "" while there is none. If every node of PEERS answers
// and holds nothing, it is that of the node that bootstraps. Else it is that of a leader in whose configuration this
// node is, or which has the same list of nodes and so is about to add this one.
func (v view) toJoin() string {
	for node, info := range v.answers {
		isMember := slices.Contains(nodesOf(info.Members), v.self)
		willBe := v.listed(v.self) && v.sameList(node)
		if info.Ready && (isMember || willBe) {
			return info.Cluster
		}
	}
	if v.self == v.bootstrapper() || !v.allEmpty() || slices.ContainsFunc(v.peers, v.joinedAnother) {
		return ""
	}
	return v.answers[v.bootstrapper()].Server
}

// joinedAnother says whether a node has joined a cluster that the bootstrapper will not begin, if that one answers.
func (v view) joinedAnother(node string) bool {
	cluster := v.answers[node].Cluster
	return cluster != "" && cluster != v.answers[v.bootstrapper()].Server
}

// toBootstrap returns the configuration with which this server is to begin a cluster, nil while it is not: every other
// node of PEERS must have joined that cluster.
func (v view) toBootstrap() []member {
	if v.self != v.bootstrapper() || v.mine().Cluster != "" || !v.allEmpty() {
		return nil
	}
	var members []member
	for _, node := range v.peers {
		info := v.answers[node]
		if node != v.self && info.Cluster != v.mine().Server {
			return nil
		}
		members = append(members, member{info.Server, v.address(node), true})
	}
	return members
}

// hasBegun says whether somebody that answers holds an entry of this server's cluster.
func (v view) hasBegun() bool {
	for _, info := range v.answers {
		if info.Cluster != "" && info.Cluster == v.mine().Cluster && info.LastIndex > 0 {
			return true
		}
	}
	return false
}

// lost returns the nodes of the voters in a node's configuration that are gone, and whether so many are that no
// majority can be left. A node that holds something of another cluster says nothing of what it held before.
func (v view) lost(node string) (nodes []string, majority bool) {
	of := v.answers[node]
	voters := voting(of.Members)
	for _, m := range voters {
		info, answers := v.answers[nodeOf(m.Server)]
		if answers && !v.present(m) && (info.LastIndex == 0 || info.Cluster == of.Cluster) {
			nodes = append(nodes, nodeOf(m.Server))
		}
	}
	return nodes, len(nodes) > 0 && !isMajority(len(voters)-len(nodes), len(voters))
}

// hasMajority says whether a majority of the voters among members answers.
func (v view) hasMajority(members []member) bool {
	voters := voting(members)
	return isMajority(count(voters, v.present), len(voters))
}

// leader returns a node, other than this one, that leads and is ready; "" if there is none.
func (v view) leader() string {
	for _, node := range slices.Sorted(maps.Keys(v.answers)) {
		if v.answers[node].Ready && node != v.self {
			return node
		}
	}
	return ""
}

// String says, to people, what keeps this node from being of use, and what they can do about it.
func (v view) String() string {
	if leader := v.leader(); leader != "" {
		return v.whyNotFollowing(leader)
	}
	best := v.mostComplete()
	if best == "" {
		return "the cluster has not begun: " + v.problems()
	}
	// A node that is no member knows the others as they were when they went on without it.
	info := v.answers[best]
	isMember := slices.ContainsFunc(info.Members, func(m member) bool { return m.Server == info.Server })
	if !isMember || v.hasMajority(info.Members) {
		return "no leader is known: " + v.problems()
	}
	most := "the most complete log"
	if len(v.silent) > 0 {
		most += " of those that answer"
	}
	advice := fmt.Sprintf("Node %s has %s (entry %d of term %d): save its backup, which is what it answers with "+
		"?consistency=stale; stop all nodes, move their state directories away, start all nodes, and restore the backup",
		best, most, info.LastIndex, info.LastTerm)
	if _, lost := v.lost(best); !lost {
		return "no leader is known: " + v.problems() + ". Only if a majority will never come back: " + advice +
			"; PEERS may name other nodes then"
	}
	return "a majority of the nodes has lost its state, and nothing can be written or confirmed any more: " +
		v.problems() + ". " + advice
}

// whyNotFollowing says why this node does not follow a leader that it sees.
func (v view) whyNotFollowing(node string) string {
	leader, mine := v.answers[node], v.mine()
	nodes := nodesOf(leader.Members)
	here := slices.IndexFunc(leader.Members, func(m member) bool { return nodeOf(m.Server) == v.self })
	isMember := here >= 0
	belongs := isMember || slices.Contains(leader.Peers, v.self)
	switch {
	case belongs && mine.Cluster != "" && !v.isOurs(node):
		return fmt.Sprintf("%s is of another cluster, which it leads (%s; this node is of %s): to have this node join "+
			"it, stop this node, move its STATE_DIR away and start it", node, leader.Cluster, mine.Cluster)
	case isMember && leader.Members[here].Address != mine.Address && mine.Address != "":
		return fmt.Sprintf("%s, which leads, looks for this node at %s, and this node is at %s: correct PEERS where it "+
			"is wrong", node, leader.Members[here].Address, mine.Address)
	case slices.ContainsFunc(leader.Members, func(m member) bool { return m.Server == mine.Server }):
		return fmt.Sprintf("the leader %s does not reach this node at %s", node, leader.Members[here].Address)
	case !belongs && len(nodes) == 1:
		return fmt.Sprintf("the cluster that %s leads has only the member %s", node, nodes[0])
	case !belongs:
		return fmt.Sprintf("the cluster that %s leads has only the members %s", node, strings.Join(nodes, ", "))
	case !isMember && !v.sameList(node):
		return v.otherList(node)
	}
	return node + ", which leads, is about to add this node"
}

// otherList says that the leader has another list than this node.
func (v view) otherList(leader string) string {
	return fmt.Sprintf("%s, which leads, names other nodes than this one: %s", leader,
		strings.Join(v.answers[leader].Peers, ", "))
}

// problems says what is wrong with each node.
func (v view) problems() string {
	best := v.mostComplete() // "" before the cluster has begun
	lost, _ := v.lost(best)
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	for _, node := range slices.Sorted(maps.Keys(v.addresses)) {
		info, answers := v.answers[node]
		listens, named := portOf(v.listens), portOf(v.addresses[node])
		switch {
		case slices.Contains(lost, node):
			add("%s has lost its state", node)
		case !answers:
			add("%s", v.whySilent(node))
		case node == v.self && listens != named:
			add("%s listens on %s, PEERS says %s", node, listens, named)
		case info.LastIndex > 0 && info.Cluster != v.answers[best].Cluster:
			add("%s is of another cluster, %s", node, info.Cluster)
		case best == "" && info.HoldsBack != "":
			add("%s waits: %s", node, info.HoldsBack)
		case v.allEmpty() && v.joinedAnother(node):
			add("%s has joined a cluster that %s was to begin and has not: correct PEERS if it named other nodes then, "+
				"else start %[1]s without its state", node, nodeOf(info.Cluster))
		case node == v.self:
		case best == "" && !v.sameList(node):
			add("%s names other PEERS: %s", node, strings.Join(info.Peers, ", "))
		}
	}
	first := v.bootstrapper()
	if len(parts) == 0 && best == "" && first != v.self && v.answers[first].WaitsFor != "" {
		add("%s, which begins the cluster, says: %s", first, v.answers[first].WaitsFor)
	}
	if len(parts) == 0 {
		return "all nodes answer"
	}
	return strings.Join(parts, "; ")
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// whySilent says why a node does not answer.
func (v view) whySilent(node string) string {
	if dns := new(net.DNSError); errors.As(v.silent[node], &dns) {
		return fmt.Sprintf("%s (%s): %s", node, v.addresses[node], dns.Err)
	}
	return fmt.Sprintf("%s at %s: %v", node, v.addresses[node], causeOf(v.silent[node]))
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
	id, addresses := s.membership.identity(), s.addresses()
	info := nodeInfo{
		Server: id.Server, Cluster: id.Cluster, Address: addresses[s.cfg.NodeID], Peers: peerIDs(s.list.get()),
		Applied: s.replica.applied.load(), WaitsFor: s.membership.reason(),
		Commands: s.replica.knownVersion(), HoldsBack: s.holdsBack(),
	}
	var err error
	if info.LastIndex, info.LastTerm, err = s.storage.lastEntry(); err != nil {
		return info, err
	}
	if r := s.raft.Load(); r != nil {
		info.Ready, info.Members = s.leadsReady(), s.members()
		for i, m := range info.Members {
			info.Members[i].Address = addresses[nodeOf(m.Server)]
		}
		if f := s.membership.found.Load(); f.term == r.CurrentTerm() {
			info.Lowest, info.Behind, info.Resize = f.lowest, f.behind, f.resize
		}
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

// handleWho answers a node that asks who this one is, and that says where it listens.
func (s *Store) handleWho(_ context.Context, from string, address []byte) ([]byte, error) {
	if host, port, err := net.SplitHostPort(string(address)); err == nil && len(host) < 256 && len(port) < 6 {
		s.told.Store(from, string(address))
	}
	info, err := s.info()
	if err != nil {
		return nil, err
	}
	return json.Marshal(info)
}

// askAll asks all nodes of PEERS and of the configuration who they are, this one among them. It takes askTimeout at
// most.
func (s *Store) askAll(ctx context.Context) view {
	v := view{
		self: s.cfg.NodeID, peers: peerIDs(s.list.get()), addresses: s.addresses(), listens: s.cfg.RaftAddr,
		answers: make(map[string]nodeInfo), silent: make(map[string]error),
	}
	if v.addresses[v.self] == "" { // it is in no list, and runs no Raft yet
		v.addresses[v.self] = s.cfg.RaftAddr
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

// learn takes note, while this server has no configuration or knows of no leader, of where the members of the others'
// listen: the leader of a cluster that is to have this node may be about to leave it, and then it is in no list. Nor is
// it in the configuration of a node that has left the cluster long ago, and is to come back.
func (s *Store) learn(v view) {
	learned := make(map[string]string)
	if len(s.members()) == 0 || s.Leader() == "" {
		for _, info := range v.answers {
			if cluster := v.mine().Cluster; cluster != "" && info.Cluster != cluster {
				continue
			}
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
		var own nodeInfo // read only when info has returned: it waits for a disk that may hang
		if err := within(ctx, func() (err error) { own, err = s.info(); return err }); err != nil {
			return info, err
		}
		return own, nil
	}
	answer, err := s.peers.call(ctx, node, opWho, []byte(s.addresses()[s.cfg.NodeID]))
	if err == nil {
		err = json.Unmarshal(answer, &info)
	}
	isNamed := strings.HasPrefix(info.Server, node+"#") && len(info.Server) <= maxName && len(info.Cluster) <= maxName
	if err == nil && !isNamed {
		err = fmt.Errorf("it calls itself server %q of cluster %q, which no node %q can be",
			info.Server, info.Cluster, node)
	}
	return info, err
}

// recentView returns a view of the others that is no older than maxViewAge.
func (s *Store) recentView() view {
	s.viewMu.Lock()
	defer s.viewMu.Unlock()
	if time.Since(s.viewedAt) > maxViewAge {
		s.lastView, s.viewedAt = s.askAll(s.ctx), time.Now()
	}
	return s.lastView
}
