package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

const (
	rpcTimeout     = 3 * time.Second // for an answer to one of Raft's messages, and more as it is larger
	slowestLink    = 64 << 10        // bytes a second that a large message must get through
	connsPerPeer   = 3               // idle connections kept for Raft's messages
	maxAppendBytes = 2 << 20         // of log entries in one message, but for a single larger one
)

// transport is Raft's own transport, but for what this service does differently.
type transport struct {
	*raft.NetworkTransport
	node    localNode
	storage *storage
	log     *raftLog
	rpcs    chan raft.RPC
	closing <-chan struct{}
}

// localNode is what the transport must know of its node. The Store is one.
type localNode interface {
	self() (server, cluster string)
	leadsIn(term uint64) bool
	follows(term uint64) bool                    // its term is this one
	appliedIndex() uint64                        // Raft's
	members() []member                           // of its newest configuration
	isMember(server string) (member, votes bool) // of its newest configuration
}

func newTransport(n *network, st *storage, node localNode, log *raftLog) *transport {
	t := &transport{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: patientNetwork{n}, Logger: log, MaxPool: connsPerPeer, Timeout: rpcTimeout,
			// A pipeline can wedge a follower (hashicorp/raft issue 612), and would go past AppendEntries below.
			MaxRPCsInFlight:       1,
			ServerAddressProvider: idsAreAddresses{},
		}),
		node: node, storage: st, log: log,
		rpcs:    make(chan raft.RPC),
		closing: n.closing,
	}
	t.TimeoutScale = math.MaxInt // what patientConn adds is enough for snapshots, too
	go func() {                  // it ends with the network, also when Raft never gets to run on it
		<-n.closing
		_ = t.NetworkTransport.Close()
	}()
	n.goUnlessClosed(func() {
		for {
			select {
			case rpc := <-t.NetworkTransport.Consumer():
				if t.refuse(rpc) || t.spare(rpc) {
					continue
				}
				t.mend(&rpc)
				select {
				case t.rpcs <- rpc:
				case <-n.closing:
					return
				}
			case <-n.closing:
				return
			}
		}
	})
	return t
}

// patientNetwork gives large messages more time than Raft's transport does: with the same for all, an entry that a slow
// link cannot carry in that time would be sent again and again, and nothing after it would be committed.
type patientNetwork struct{ *network }

func (n patientNetwork) Dial(id raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	conn, err := n.network.Dial(id, timeout)
	if err != nil {
		return nil, err
	}
	return &patientConn{Conn: conn}, nil
}

// patientConn is a connection of which the deadline, set before a message, moves as the message is written.
type patientConn struct {
	net.Conn
	deadline time.Time // the transport has a connection used by one goroutine at a time
}

func (c *patientConn) SetDeadline(t time.Time) error {
	c.deadline = t
	return c.Conn.SetDeadline(t)
}

func (c *patientConn) Write(p []byte) (int, error) {
	if len(p) > slowestLink/8 { // what is smaller has time enough
		more := time.Duration(len(p)) * time.Second / slowestLink
		if err := c.SetDeadline(c.deadline.Add(more)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}

// idsAreAddresses makes Raft know every server by its name alone, so no address ends up in a vote or in the log's idea of
// who leads.
type idsAreAddresses struct{}

func (idsAreAddresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	return raft.ServerAddress(id), nil
}

// refuse answers the leader that tells a server without a vote to stand for election: Raft would do so. It returns true
// when it has answered.
func (t *transport) refuse(rpc raft.RPC) bool {
	if _, ok := rpc.Command.(*raft.TimeoutNowRequest); !ok {
		return false
	}
	server, _ := t.node.self()
	if _, votes := t.node.isMember(server); votes {
		return false
	}
	rpc.Respond(nil, errors.New("this server has no vote"))
	return true
}

// spare answers a leader that sends a snapshot of which this node has applied all: it has heard no answer to it, or takes
// the node for empty. Raft would go back to the snapshot. It returns true when it has answered.
func (t *transport) spare(rpc raft.RPC) bool {
	req, ok := rpc.Command.(*raft.InstallSnapshotRequest)
	if !ok || !t.node.follows(req.Term) || t.node.appliedIndex() < req.LastLogIndex {
		return false
	}
	go func() { // until the snapshot has been read off its connection, or that ends
		_, err := io.Copy(io.Discard, rpc.Reader)
		rpc.Respond(&raft.InstallSnapshotResponse{Term: req.Term, Success: err == nil}, err)
	}()
	return true
}

// mend saves Raft from messages that it takes wrongly.
//
// A snapshot that the network has held back would set the state back to what it was, and the node would go on serving it.
//
// Entries up to the leader's commit index would be taken for committed, also those that this node has from another leader
// and that the message does not compare with the leader's.
//
// What this node's snapshot covers is left out: it is committed, so the leader's is the same, and so is what is left of it in
// the log (see logStore.setSnapshot). Raft would look for it in the log alone, and where it is not there refuse all that the leader
// sends.
//
// And who asks for a vote is judged by its log alone, as in Ongaro's dissertation (4.2.1). Raft refuses whom this server does
// not know as a voter; but the change that made it one may be committed without this server: node1 is replaced while node3 is
// slow, the leader, node2, dies, and then only node1 can lead, with node3's vote. The id serves that check alone.
func (t *transport) mend(rpc *raft.RPC) {
	switch req := rpc.Command.(type) {
	case *raft.RequestVoteRequest:
		req.ID = t.knownVoter(req.ID)
	case *raft.RequestPreVoteRequest:
		req.ID = t.knownVoter(req.ID)
	case *raft.InstallSnapshotRequest:
		rpc.Reader = &newerSnapshot{Reader: rpc.Reader, index: req.LastLogIndex, applied: t.node.appliedIndex}
	case *raft.AppendEntriesRequest:
		end := req.PrevLogEntry + uint64(len(req.Entries))
		req.LeaderCommitIndex = min(req.LeaderCommitIndex, end)
		if newest := t.storage.log.snapshotIndex.Load(); end > 0 && req.PrevLogEntry <= newest {
			req.Entries = req.Entries[min(newest-req.PrevLogEntry, uint64(len(req.Entries))):]
			req.PrevLogEntry, req.PrevLogTerm = 0, 0 // which Raft does not ask about
		}
	}
}

// knownVoter returns the id of a voter in this server's newest configuration; the given one if there is none.
func (t *transport) knownVoter(id []byte) []byte {
	members := t.node.members()
	if i := slices.IndexFunc(members, isVoter); i >= 0 {
		return []byte(members[i].Server)
	}
	return id
}

// newerSnapshot fails to be read when the node has applied more than is in it, if only since spare looked. Raft reads it on
// its main thread, so nothing is applied meanwhile; what it reads after that failure goes nowhere.
type newerSnapshot struct {
	io.Reader
	index   uint64
	applied func() uint64
	judged  bool
}

func (s *newerSnapshot) Read(p []byte) (int, error) {
	if applied := s.applied(); !s.judged && s.index < applied {
		s.judged = true
		return 0, fmt.Errorf("a snapshot up to entry %d comes late: the node has applied entry %d", s.index, applied)
	}
	s.judged = true
	return s.Reader.Read(p)
}

// Consumer returns the channel on which Raft's main thread hears its peers.
func (t *transport) Consumer() <-chan raft.RPC { return t.rpcs }

// Close does nothing: Raft calls it when it stops, but the port is the Store's, and other nodes may go on asking.
func (t *transport) Close() error { return nil }

// SetHeartbeatHandler does nothing: heartbeats take the way of all messages, through Raft's main thread. The short cut
// would change term and state beside that thread, unsafely (hashicorp/raft issue 695).
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) {}

// AppendEntries sends log entries or a heartbeat. It differs from Raft's own in three ways. It sends at most
// maxAppendBytes at once; Raft looks at args to see what was sent. While a node cannot be reached it goes on trying
// as long as this node leads and the other is a member: Raft would wait longer after each failure, up to 10 s, and a node that comes back would
// be left behind for as long. And it comes back with the other node's success only when this node has stored the entries, too:
// Raft counts this node before that, but commits nothing that no other node is known to have.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest,
	resp *raft.AppendEntriesResponse,
) error {
	size := 0
	for i, entry := range args.Entries {
		if size += len(entry.Data); size > maxAppendBytes && i > 0 {
			args.Entries = args.Entries[:i]
			break
		}
	}
	heartbeat := args.PrevLogEntry == 0 && len(args.Entries) == 0 && args.LeaderCommitIndex == 0
	for {
		err := t.NetworkTransport.AppendEntries(id, target, args, resp)
		if heartbeat && err == nil {
			t.log.reached(string(id))
		}
		if n := len(args.Entries); err == nil && resp.Success && n > 0 && t.storage.disk != nil {
			return t.storage.disk.waitStored(args.Entries[n-1].Index)
		}
		member, _ := t.node.isMember(string(id))
		if unreachable := new(dialError); heartbeat || !errors.As(err, &unreachable) || !member || !t.node.leadsIn(args.Term) {
			return err
		}
		time.Sleep(redialInterval)
	}
}

// campaign makes this node stand for election at once, as if the leader had handed over to it.
func (t *transport) campaign(stop <-chan struct{}) {
	rpc := raft.RPC{
		Command:  &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}},
		RespChan: make(chan raft.RPCResponse, 1),
	}
	select {
	case t.rpcs <- rpc:
	case <-stop:
	}
}
