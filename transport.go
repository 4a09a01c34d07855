package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	rpcTimeout     = 3 * time.Second // for an answer to one of Raft's messages; a snapshot's time grows with its size
	connsPerPeer   = 3               // idle connections kept for Raft's messages
	maxAppendBytes = 2 << 20         // of log entries in one message, but for a single larger one
)

// transport is Raft's own transport, but for what this service does differently.
type transport struct {
	*raft.NetworkTransport
	transportHooks
	rpcs    chan raft.RPC
	closing <-chan struct{}
	ballots ballots
}

// transportHooks is what transport must know of the node.
type transportHooks struct {
	leading   func(term uint64) bool               // this node is the leader of the term
	gated     func() bool                          // see gate.go
	needed    func() int                           // so many others make a majority with this node
	standsBy  func(voter string, term uint64) bool // the voter's vote in the term is for this node
	applied   func() uint64                        // raft's
	following func(term uint64) bool               // this node is in that term
	newest    func() uint64                        // index up to which the newest snapshot here covers the log
	doubtful  func() bool                          // this node follows a leader that has been silent for doubtAfter
	last      func() (index, term uint64, err error)
	stored    func(index uint64) error // waits until this node has stored its log up to there; nil where it always has
}

func newTransport(n *network, log hclog.Logger, hooks transportHooks) *transport {
	t := &transport{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: n, Logger: log, MaxPool: connsPerPeer, Timeout: rpcTimeout,
			// A pipeline can wedge a follower (hashicorp/raft issue 612), and would go past AppendEntries below.
			MaxRPCsInFlight:       1,
			ServerAddressProvider: idsAreAddresses{},
		}),
		transportHooks: hooks,
		rpcs:           make(chan raft.RPC),
		closing:        n.closing,
	}
	go func() { // it ends with the network, also when Raft never gets to run on it
		<-n.closing
		_ = t.Close()
	}()
	n.goUnlessClosed(func() {
		for {
			select {
			case rpc := <-t.NetworkTransport.Consumer():
				if t.refuse(rpc) || t.doubt(rpc) || t.spare(rpc) {
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

// idsAreAddresses makes Raft know every node by its id alone, so no address ends up in a vote or in the log's idea of
// who leads.
type idsAreAddresses struct{}

func (idsAreAddresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	return raft.ServerAddress(id), nil
}

// doubt lets a node vote whose leader has been silent for a while. Raft refuses all candidates until the node itself has run
// out of patience. By then the candidate, if it has the longer log, does not vote for this node either, and waits for
// another election timeout. It returns true when it has answered.
func (t *transport) doubt(rpc raft.RPC) bool {
	switch req := rpc.Command.(type) {
	case *raft.RequestVoteRequest:
		req.LeadershipTransfer = req.LeadershipTransfer || t.doubtful()
	case *raft.RequestPreVoteRequest:
		if !t.doubtful() {
			return false
		}
		index, term, err := t.last()
		if err != nil || req.LastLogTerm < term || req.LastLogTerm == term && req.LastLogIndex < index {
			return false
		}
		rpc.Respond(&raft.RequestPreVoteResponse{Term: req.Term, Granted: true}, nil) // the vote itself is Raft's
		return true
	}
	return false
}

// spare answers a leader that sends a snapshot of which this node has applied all: it has heard no answer to it, or takes
// the node for empty. Raft would go back to the snapshot. It returns true when it has answered.
func (t *transport) spare(rpc raft.RPC) bool {
	req, ok := rpc.Command.(*raft.InstallSnapshotRequest)
	if !ok || !t.following(req.Term) || t.applied() < req.LastLogIndex {
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
// And what this node's snapshot covers is left out: it is committed, so the leader's is the same, and so is what is left of
// it in the log (see entries.cover). Raft would look for it in the log alone, and where it is not there refuse all that the
// leader sends.
func (t *transport) mend(rpc *raft.RPC) {
	switch req := rpc.Command.(type) {
	case *raft.InstallSnapshotRequest:
		rpc.Reader = &newerSnapshot{Reader: rpc.Reader, index: req.LastLogIndex, applied: t.applied}
	case *raft.AppendEntriesRequest:
		end := req.PrevLogEntry + uint64(len(req.Entries))
		req.LeaderCommitIndex = min(req.LeaderCommitIndex, end)
		if newest := t.newest(); end > 0 && req.PrevLogEntry <= newest {
			req.Entries = req.Entries[min(newest-req.PrevLogEntry, uint64(len(req.Entries))):]
			req.PrevLogEntry, req.PrevLogTerm = 0, 0 // which Raft does not ask about
		}
	}
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

// SetHeartbeatHandler does nothing: heartbeats take the way of all messages, through Raft's main thread. The short cut
// would change term and state beside that thread, unsafely (hashicorp/raft issue 695).
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) {}

// AppendEntries sends log entries or a heartbeat. It differs from Raft's own in three ways. It sends at most
// maxAppendBytes at once; Raft looks at args to see what was sent. While a node cannot be reached it goes on trying
// as long as this node leads: Raft would wait longer after each failure, up to 10 s, and a node that comes back would
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
		if n := len(args.Entries); err == nil && resp.Success && n > 0 && t.stored != nil {
			return t.stored(args.Entries[n-1].Index)
		}
		if unreachable := new(dialError); heartbeat || !errors.As(err, &unreachable) || !t.leading(args.Term) {
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
