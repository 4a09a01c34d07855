package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// What nodes ask one another, beside Raft's own messages. The values are a format.
const (
	opApply     byte = iota + 1 // execute these commands, if you are the leader
	opReadIndex                 // which index must I have applied to read linearizably, if you are the leader?
	opTerm                      // is this your current term?
	opWho                       // who are you?
)

const (
	maxCallBytes  = maxBodyBytes + 1<<20 // the largest command there can be, and what goes with it
	callsPerPeer  = 8                    // under way at once, so there are no more connections to one peer than that
	writeTimeout  = 3 * time.Second      // for the other node to read an answer of ours
	callFrameHead = 4 + 1
)

// errRemote marks an error that the other node answered with: it has received the call and refused it.
var errRemote = errors.New("peer")

// handler answers the calls of one op. The text of its error travels to the caller.
type handler func(ctx context.Context, from string, request []byte) (answer []byte, err error)

// peers makes calls to other nodes and answers theirs. A connection carries one call at a time and is kept for the
// next.
type peers struct {
	network  *network
	handlers map[byte]handler // by op
	ctx      context.Context  // of the calls that are served, and of those of agrees; ended by close
	cancel   context.CancelFunc

	mu    sync.Mutex // guards peers, and the fields of each peer
	peers map[string]*peer
}

// peer is what this node knows of a node or server that it calls.
type peer struct {
	slots  []*callConn // callsPerPeer less the calls under way; an idle connection each, or nil. The last is used first
	err    error       // of the last dial that failed
	failed time.Time   // when it did
}

// newPeers answers the calls that come by n with the handler for their op, until n closes.
func newPeers(n *network, handlers map[byte]handler) *peers {
	ctx, cancel := context.WithCancel(context.Background())
	p := &peers{network: n, handlers: handlers, ctx: ctx, cancel: cancel, peers: make(map[string]*peer)}
	n.wg.Go(func() {
		for {
			select {
			case conn := <-n.callConns:
				n.wg.Go(func() { p.serve(conn) })
			case <-n.ctx.Done():
				return
			}
		}
	})
	return p
}

// close ends the calls that are being served, which are answered with an error, and those of agrees.
func (p *peers) close() { p.cancel() }

// call asks a server by its name, or with opWho a node by its id, and returns the answer. It waits until ctx ends,
// for requestTimeout at most. A *dialError says that the call was not made, and errRemote that the other node refused
// it: it certainly had no effect. After any other error it may have had its effect.
func (p *peers) call(ctx context.Context, id string, op byte, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	conn, err := p.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	answer, err := conn.exchange(ctx, frame{op, request})
	if err != nil {
		p.release(id, nil)
		return nil, fmt.Errorf("call node %q: %w", id, err)
	}
	p.release(id, conn)
	if answer.op != 0 {
		return nil, fmt.Errorf("%w %q: %s", errRemote, id, answer.payload)
	}
	return answer.payload, nil
}

// acquire returns a connection for one call, and dials if none is idle. After a dial that failed it makes the next
// only when redialInterval is over, so calls to a node that is down cost little. Its errors are *dialError.
func (p *peers) acquire(ctx context.Context, id string) (*callConn, error) {
	p.mu.Lock()
	n := p.peers[id]
	if n == nil {
		n = &peer{slots: make([]*callConn, callsPerPeer)}
		p.peers[id] = n
	}
	last, err, failed := len(n.slots)-1, n.err, n.failed
	if last < 0 {
		p.mu.Unlock()
		return nil, &dialError{id, fmt.Errorf("%d calls to it are under way", callsPerPeer)}
	}
	conn := n.slots[last]
	n.slots = n.slots[:last]
	p.mu.Unlock()
	if conn != nil && conn.usable() {
		return conn, nil
	}
	if conn != nil {
		_ = conn.Close()
	}
	if time.Since(failed) >= redialInterval {
		conn, err = p.dial(ctx, id)
	}
	if err != nil {
		p.release(id, nil)
		return nil, err
	}
	return conn, nil
}

// release ends a call. A connection that is good for another call is kept for it; nil if it is not.
func (p *peers) release(id string, conn *callConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.peers[id]
	if conn != nil {
		n.slots = append(n.slots, conn)
	} else {
		n.slots = slices.Insert(n.slots, 0, nil)
	}
}

// dial connects to a server or node. Its errors are *dialError.
func (p *peers) dial(ctx context.Context, id string) (*callConn, error) {
	kind := kindCall
	if nodeOf(id) == id { // no server's name
		kind = kindAsk
	}
	conn, err := p.network.dial(ctx, id, kind)
	if err != nil {
		p.mu.Lock()
		p.peers[id].err, p.peers[id].failed = err, time.Now()
		p.mu.Unlock()
		return nil, err
	}
	c := &callConn{Conn: conn, frames: make(chan frame, 1)}
	go c.receive() // until the connection closes
	return c, nil
}

// callConn is a connection on which this node calls another.
type callConn struct {
	net.Conn
	frames chan frame // from the other node; closed when there are no more
	err    error      // why there are no more; set before frames is closed
}

// frame is a call or an answer. Its format is 4 bytes with the length of the rest, a byte for op, then the payload.
type frame struct {
	op      byte // of a call; 0 in an answer, 1 in one that is an error
	payload []byte
}

// receive reads what the other node sends, also while no call is under way. So this node notices that the other one has
// closed the connection before it sends the next call on it, which would be of unknown outcome.
func (c *callConn) receive() {
	r := bufio.NewReader(c)
	for c.err == nil {
		f, err := readFrame(r)
		if err == nil {
			select {
			case c.frames <- f:
			default:
				err = errors.New("an answer to no call")
			}
		}
		c.err = err
	}
	close(c.frames) // before the connection is closed: a call that is sent in between would fail
	_ = c.Close()
}

// usable says whether a call can be sent on c: the other node has neither closed it nor sent more than it was asked
// for.
func (c *callConn) usable() bool {
	select {
	case <-c.frames:
		return false
	default:
		return true
	}
}

// exchange sends a call and waits for the answer. After an error, of which the end of ctx is one, c is closed: a late
// answer must not be taken for that to the next call.
func (c *callConn) exchange(ctx context.Context, request frame) (frame, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // which ends what the next lines wait for
	err := writeFrame(c, request)
	answer, answered := frame{}, false
	if err == nil {
		if answer, answered = <-c.frames; !answered {
			err = fmt.Errorf("connection lost: %w", c.err)
		}
	}
	if !stop() { // ctx has ended
		err = ctx.Err()
	}
	if err != nil {
		_ = c.Close()
	}
	return answer, err
}

// majority asks all nodes at once and returns true as soon as needed of them have said yes, false as soon as too many
// have not. It does not wait for the others: each ask must end by a deadline of its own.
func majority(nodes []string, needed int, ask func(node string) bool) bool {
	answers := make(chan bool, len(nodes))
	for _, node := range nodes {
		go func() { answers <- ask(node) }()
	}
	for left := len(nodes); needed > 0; left-- {
		if left < needed {
			return false
		}
		if <-answers {
			needed--
		}
	}
	return true
}

// agrees asks a server a question that it answers with yes or no. No answer within timeout is a no. The majority of a
// read does not wait for a slow server, and its call goes on until timeout: were it canceled its connection would be
// lost, and dialed again for the next read. With callsPerPeer of them under way the next is a no at once.
func (p *peers) agrees(id string, op byte, request []byte, timeout time.Duration) bool {
	ctx, cancel := context.WithTimeout(p.ctx, timeout)
	defer cancel()
	answer, err := p.call(ctx, id, op, request)
	return err == nil && len(answer) == 1 && answer[0] == 1
}

// serve answers the calls that arrive on conn until it closes.
func (p *peers) serve(conn *peerConn) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		call, err := readFrame(r)
		if err != nil {
			return
		}
		answer := p.handle(conn.hello, call)
		if conn.SetWriteDeadline(time.Now().Add(writeTimeout)) != nil || writeFrame(conn, answer) != nil {
			return
		}
	}
}

// handle answers one call.
func (p *peers) handle(h hello, call frame) frame {
	if (call.op == opWho) != (h.kind == kindAsk) {
		return frame{1, []byte("this call is not for a connection of this kind")}
	}
	serve := p.handlers[call.op]
	if serve == nil {
		return frame{1, fmt.Appendf(nil, "call %d is not known to this node's version", call.op)}
	}
	ctx, cancel := context.WithTimeout(p.ctx, requestTimeout)
	defer cancel()
	answer, err := serve(ctx, h.sender, call.payload)
	if err != nil {
		return frame{1, []byte(err.Error())}
	}
	return frame{0, answer}
}

func writeFrame(w io.Writer, f frame) error {
	b := make([]byte, callFrameHead, callFrameHead+len(f.payload))
	binary.BigEndian.PutUint32(b, uint32(len(f.payload)+callFrameHead-4))
	b[4] = f.op
	_, err := w.Write(append(b, f.payload...))
	return err
}

// readFrame takes memory for a payload as it comes, not as it is announced.
func readFrame(r *bufio.Reader) (f frame, err error) {
	var head [callFrameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return f, err
	}
	size := int64(binary.BigEndian.Uint32(head[:])) - (callFrameHead - 4)
	if size < 0 || size > maxCallBytes {
		return f, fmt.Errorf("a message of %d bytes is not allowed", size)
	}
	var payload bytes.Buffer
	payload.Grow(int(min(size, 64<<10)) + bytes.MinRead)
	_, err = io.CopyN(&payload, r, size)
	return frame{head[4], payload.Bytes()}, err
}
