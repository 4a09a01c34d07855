package main

import (
	"context"
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

// transport is Raft's own transport, with corrections to some of the messages that it sends and receives.
type transport struct {
	*raft.NetworkTransport
	node     localNode
	storage  *storage
	log      *raftLogger
	streams  streamLayer
	received chan raft.RPC   // corrected messages, for Raft's main thread
	ctx      context.Context // the network's
}

// localNode is what the transport must know of its node. The Store is one.
type localNode interface {
	self() (server, cluster string)
	leadsIn(term uint64) bool
	isIn(term uint64) bool                       // its term is this one
	appliedIndex() uint64                        // Raft's
	members() []member                           // of its newest configuration
	isMember(server string) (member, votes bool) // of its newest configuration
}

// newTransport sends and receives Raft's messages through n, until n closes.
func newTransport(n *network, st *storage, node localNode, log *raftLogger) *transport {
	streams := streamLayer{n}
	t := &transport{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: streams, Logger: log, MaxPool: connsPerPeer, Timeout: rpcTimeout,
			// A pipeline can stop for ever (hashicorp/raft issue 612), and would not call AppendEntries below.
			MaxRPCsInFlight:       1,
			ServerAddressProvider: idsAreAddresses{},
		}),
		node: node, storage: st, log: log, streams: streams,
		received: make(chan raft.RPC),
		ctx:      n.ctx,
	}
	t.TimeoutScale = math.MaxInt // a snapshot gets no time of its own: largeWriteConn gives it enough
	context.AfterFunc(n.ctx, func() { _ = t.NetworkTransport.Close() })
	go t.receive() // until n closes
	return t
}

// receive corrects the messages of other nodes and passes them on to Raft, until the network closes.
func (t *transport) receive() {
	for {
		select {
		case rpc := <-t.NetworkTransport.Consumer():
			if t.correct(&rpc) {
				continue
			}
			select {
			case t.received <- rpc:
			case <-t.ctx.Done():
				return
			}
		case <-t.ctx.Done():
			return
		}
	}
}

// correct changes what Raft would take wrongly in a message. It returns true if it has answered the message itself,
// which Raft must not see then.
func (t *transport) correct(rpc *raft.RPC) (answered bool) {
	switch req := rpc.Command.(type) {
	case *raft.TimeoutNowRequest:
		return t.answerTimeoutNow(rpc)
	case *raft.RequestVoteRequest:
		req.ID = t.voterID(req.ID)
	case *raft.RequestPreVoteRequest:
		req.ID = t.voterID(req.ID)
	case *raft.InstallSnapshotRequest:
		if t.answerOldSnapshot(rpc, req) {
			return true
		}
		rpc.Reader = &newerSnapshot{Reader: rpc.Reader, index: req.LastLogIndex, applied: t.node.appliedIndex}
	case *raft.AppendEntriesRequest:
		limitCommitIndex(req)
		t.skipSnapshotEntries(req)
	}
	return false
}

// answerTimeoutNow refuses to stand for election without a vote. Raft would stand when the leader asks for it: node3, a
// non-voter that catches up, would disturb a leader, and could not win.
func (t *transport) answerTimeoutNow(rpc *raft.RPC) bool {
	server, _ := t.node.self()
	if _, votes := t.node.isMember(server); votes {
		return false
	}
	rpc.Respond(nil, errors.New("this server has no vote"))
	return true
}

// answerOldSnapshot reports success for a snapshot that this node has applied already. Raft would set its state back
// to the snapshot: node1, the leader, sends node3 a snapshot up to entry 100, the answer is lost, node3 goes on to
// entry 120, and node1 sends the snapshot again.
func (t *transport) answerOldSnapshot(rpc *raft.RPC, req *raft.InstallSnapshotRequest) bool {
	if !t.node.isIn(req.Term) || t.node.appliedIndex() < req.LastLogIndex {
		return false
	}
	go func() { // until the snapshot has been read off its connection, or that ends
		_, err := io.Copy(io.Discard, rpc.Reader)
		rpc.Respond(&raft.InstallSnapshotResponse{Term: req.Term, Success: err == nil}, err)
	}()
	return true
}

// newerSnapshot is a snapshot that cannot be read when this node has applied more than it holds. It repeats the check
// of answerOldSnapshot, since entries may have been applied after that. Raft reads the snapshot on its main thread,
// where nothing is applied meanwhile. It discards what it reads after the error.
type newerSnapshot struct {
	io.Reader
	index   uint64
	applied func() uint64
	checked bool
}

func (s *newerSnapshot) Read(p []byte) (int, error) {
	if !s.checked {
		s.checked = true
		if applied := s.applied(); s.index < applied {
			return 0, fmt.Errorf("a snapshot up to entry %d comes too late: entry %d is applied", s.index, applied)
		}
	}
	return s.Reader.Read(p)
}

// limitCommitIndex limits the leader's commit index to the entries that the message compares with the leader's log.
// Raft would commit all that this node has up to that index: node3 has entry 8 from node1, a fallen leader; node2,
// the leader, has committed another entry 8, and its message that ends at entry 7 says so.
func limitCommitIndex(req *raft.AppendEntriesRequest) {
	req.LeaderCommitIndex = min(req.LeaderCommitIndex, req.PrevLogEntry+uint64(len(req.Entries)))
}

// skipSnapshotEntries leaves out the entries that this node's snapshot covers. They are committed, so the leader has
// the same. Raft would look for them in the log, where they may be gone, and then refuse all that the leader sends:
// node3 has a snapshot up to entry 10 and no log below it, and node2, the leader, sends the entries after entry 8.
func (t *transport) skipSnapshotEntries(req *raft.AppendEntriesRequest) {
	newest := t.storage.log.snapshotIndex.Load()
	if req.PrevLogEntry > newest || req.PrevLogEntry == 0 && len(req.Entries) == 0 {
		return
	}
	req.Entries = req.Entries[min(newest-req.PrevLogEntry, uint64(len(req.Entries))):]
	req.PrevLogEntry, req.PrevLogTerm = 0, 0 // Raft does not compare entry 0
}

// voterID returns the id of some voter in this node's newest configuration, id if there is none. Raft refuses a vote
// to a candidate that is no voter there, and uses the id for nothing else. A vote must depend on the candidate's log
// and term alone (Ongaro's dissertation, 4.2.1), for this configuration may be an old one: node1 is replaced while
// node3 is slow and does not hear of it; the leader, node2, dies. Now only the new node1 can lead, with node3's vote.
func (t *transport) voterID(id []byte) []byte {
	members := t.node.members()
	if i := slices.IndexFunc(members, isVoter); i >= 0 {
		return []byte(members[i].Server)
	}
	return id
}

// Consumer returns the messages for Raft's main thread.
func (t *transport) Consumer() <-chan raft.RPC { return t.received }

// Close does nothing. Raft calls it when it stops, but the Raft port stays open: other nodes may still ask who this
// one is.
func (t *transport) Close() error { return nil }

// SetHeartbeatHandler does nothing, so heartbeats go through Raft's main thread as all messages do. Raft's short cut
// would change term and state beside that thread, unsafely (hashicorp/raft issue 695).
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) {}

// AppendEntries sends log entries or a heartbeat. It differs from Raft's own in four ways.
//
// It sends nothing but heartbeats when this node has another term by now. Raft gathers a message beside its main
// thread, in several reads of the log. If the main thread replaces entries between two of them, what comes before the
// message's entries is of this node's term, and they are another leader's: the receiver would have a mix of two logs
// that looks right. Raft stores a new term before it replaces anything, so a message that was gathered in its term is
// of one log.
//
// It sends at most maxAppendBytes. It shortens args, where Raft looks for what was sent.
//
// While the other node cannot be reached it dials again every redialInterval. Raft would wait up to 10 s after repeated
// failures, and a node that comes back would be behind for as long.
//
// It returns success only when this node has stored the entries as well. Raft counts this node before that; but it
// commits nothing before another node has it.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest,
	resp *raft.AppendEntriesResponse,
) error {
	heartbeat := args.PrevLogEntry == 0 && len(args.Entries) == 0 && args.LeaderCommitIndex == 0
	if !heartbeat && !t.node.isIn(args.Term) {
		return errors.New("this node has a newer term")
	}
	size := 0
	for i, entry := range args.Entries {
		if size += len(entry.Data); size > maxAppendBytes && i > 0 {
			args.Entries = args.Entries[:i]
			break
		}
	}
	for {
		err := t.NetworkTransport.AppendEntries(id, target, args, resp)
		if heartbeat && err == nil {
			t.log.reached(string(id))
		}
		if n := len(args.Entries); err == nil && resp.Success && n > 0 && t.storage.disk != nil {
			return t.storage.disk.waitStored(args.Entries[n-1].Index)
		}
		if heartbeat || !errors.As(err, new(*dialError)) || !t.dialAgain(id, args.Term) {
			return err
		}
	}
}

// InstallSnapshot sends a snapshot. While the other node cannot be reached it dials again, as AppendEntries does, and
// then returns the error: Raft tries again at once, with what is the newest snapshot by then.
func (t *transport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest,
	resp *raft.InstallSnapshotResponse, data io.Reader,
) error {
	err := t.NetworkTransport.InstallSnapshot(id, target, args, resp, data)
	if errors.As(err, new(*dialError)) {
		if snapshot, ok := data.(io.Closer); ok {
			_ = snapshot.Close() // in memory it would keep an old state
		}
		t.dialAgain(id, args.Term)
	}
	return err
}

// dialAgain dials a server until it can be reached, as long as this node leads and the server is a member.
func (t *transport) dialAgain(id raft.ServerID, term uint64) (reached bool) {
	for {
		time.Sleep(redialInterval)
		if member, _ := t.node.isMember(string(id)); !member || !t.node.leadsIn(term) {
			return false
		}
		if conn, err := t.streams.Dial(raft.ServerAddress(id), rpcTimeout); err == nil {
			_ = conn.Close()
			return true
		}
	}
}

// campaign makes this node stand for election at once, as if the leader had handed over to it. It gives up when stop
// closes.
func (t *transport) campaign(stop <-chan struct{}) {
	rpc := raft.RPC{
		Command:  &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}},
		RespChan: make(chan raft.RPCResponse, 1),
	}
	select {
	case t.received <- rpc:
	case <-stop:
	}
}

// idsAreAddresses makes Raft know every server by its name alone. So no address gets into a vote or into who leads,
// and a node may move.
type idsAreAddresses struct{}

func (idsAreAddresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	return raft.ServerAddress(id), nil
}

// streamLayer is the network as Raft's transport sees it. A server's "address" is its name.
type streamLayer struct{ network *network }

// Accept returns the next connection that carries Raft's messages.
func (l streamLayer) Accept() (net.Conn, error) {
	select {
	case conn := <-l.network.raftConns:
		return conn, nil
	case <-l.network.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close does nothing: the network is the Store's.
func (l streamLayer) Close() error { return nil }

// Addr returns this server's name.
func (l streamLayer) Addr() net.Addr {
	server, _ := l.network.directory.self()
	return nodeAddr(server)
}

// Dial connects to the server with the given name.
func (l streamLayer) Dial(server raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := l.network.dial(ctx, string(server), kindRaft)
	if err != nil {
		return nil, err
	}
	return &largeWriteConn{Conn: conn}, nil
}

// nodeAddr is a node's id or a server's name where net wants an address.
type nodeAddr string

func (nodeAddr) Network() string  { return "node" }
func (a nodeAddr) String() string { return string(a) }

// largeWriteConn gives large messages more time. Raft's transport gives all messages the same: an entry that a slow
// link cannot carry in that time would be sent again and again, and nothing after it would be committed.
type largeWriteConn struct {
	net.Conn
	deadline time.Time // set before each message; a connection is used by one goroutine at a time
}

func (c *largeWriteConn) SetDeadline(t time.Time) error {
	c.deadline = t
	return c.Conn.SetDeadline(t)
}

func (c *largeWriteConn) Write(p []byte) (int, error) {
	if len(p) > slowestLink/8 { // what is smaller has time enough
		more := time.Duration(len(p)) * time.Second / slowestLink
		if err := c.SetDeadline(c.deadline.Add(more)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}
