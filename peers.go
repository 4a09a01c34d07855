package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// What nodes ask one another, beside Raft's own messages.
const (
	opApply     byte = iota + 1 // execute these commands, if you are the leader
	opReadIndex                 // which index must I have applied to read linearizably, if you are the leader?
	opTerm                      // is this your current term?
	opWho                       // who are you?
)

const (
	maxCallBytes  = maxBodyBytes + 1<<20 // the largest command there can be, and what goes with it
	callsPerPeer  = 8                    // under way at once, so there are no more connections to one peer than that
	writeTimeout  = 3 * time.Second      // for the other end to take an answer from us
	callFrameHead = 4 + 1
)

// errRemote marks an error that the other node answered with: it heard the call and refused it.
var errRemote = errors.New("peer")

// handler answers the calls of one kind. What it returns as an error reaches the caller as text.
type handler func(ctx context.Context, from string, request []byte) (answer []byte, err error)

// peers carries calls between nodes. A connection carries one call at a time and then waits in a pool for the next.
// Format, both ways: 4 bytes of length of what follows; a byte, which in a call is its op, in an answer 0 or, for an
// error, 1; then the payload.
type peers struct {
	network  *network
	handlers map[byte]handler
	ctx      context.Context // of every call, made and served; ended by close
	cancel   context.CancelFunc

	mu    sync.Mutex // guards what follows, and the fields of each peer
	peers map[string]*peer
}

// peer is a node that this one calls.
type peer struct {
	underWay int         // calls
	idle     []*callConn // the one used last is the last
	dialErr  error       // of the last dial, if it failed
	dialed   time.Time   // when it did
}

// newPeers answers calls that come by n, by their op, until n closes.
func newPeers(n *network, handlers map[byte]handler) *peers {
	ctx, cancel := context.WithCancel(context.Background())
	p := &peers{network: n, handlers: handlers, ctx: ctx, cancel: cancel, peers: make(map[string]*peer)}
	n.goUnlessClosed(func() {
		for {
			select {
			case conn := <-n.peerConns:
				n.goUnlessClosed(func() { p.serve(conn) })
			case <-n.closing:
				return
			}
		}
	})
	return p
}

// close ends all calls. Those that are being served are answered with an error.
func (p *peers) close() { p.cancel() }

// call asks a server by its name, or with opWho a node by its id, and returns the answer. An error that is a *dialError or
// wraps errRemote says that the call was not made or was answered with that error; after any other the call may or may not
// have had its effect.
//
// When ctx is canceled before there is an answer, the call goes on without its caller until ctx's deadline, or for
// requestTimeout if it has none, and its connection is kept: a node that is slower than others is not dialed again each
// time that they were faster.
func (p *peers) call(ctx context.Context, id string, op byte, request []byte) ([]byte, error) {
	deadline, bounded := ctx.Deadline()
	if !bounded {
		deadline = time.Now().Add(requestTimeout)
	}
	var decided atomic.Bool     // that the call is sent, or that its caller has gone before
	done := make(chan struct{}) // closed when answer and err are set
	var answer []byte
	var err error
	go func() { // until the deadline at most, or close
		defer close(done)
		ctx, cancel := context.WithDeadline(p.ctx, deadline)
		defer cancel()
		answer, err = p.exchange(ctx, id, op, request, &decided)
	}()
	select {
	case <-done:
		return answer, err
	case <-ctx.Done():
		if decided.CompareAndSwap(false, true) {
			return nil, &dialError{id, ctx.Err()}
		}
		return nil, fmt.Errorf("call node %q: %w", id, ctx.Err())
	}
}

// exchange makes a call on a connection of its own, unless decided is set before there is one.
func (p *peers) exchange(ctx context.Context, id string, op byte, request []byte, decided *atomic.Bool) ([]byte, error) {
	c, err := p.take(id)
	if err != nil {
		return nil, err
	}
	defer func() { p.giveBack(id, c) }()
	if c == nil {
		if c, err = p.dial(ctx, id); err != nil {
			return nil, err
		}
	}
	if !decided.CompareAndSwap(false, true) {
		return nil, nil // nobody waits for it
	}
	f, err := c.call(ctx, op, request)
	if err != nil {
		_ = c.Close()
		c = nil
		return nil, fmt.Errorf("call node %q: %w", id, err)
	}
	if f.op != 0 {
		return nil, fmt.Errorf("%w %q: %s", errRemote, id, f.payload)
	}
	return f.payload, nil
}

// peer returns what is known of a node. It is called with p.mu held.
func (p *peers) peer(id string) *peer {
	if p.peers[id] == nil {
		p.peers[id] = new(peer)
	}
	return p.peers[id]
}

// take counts one more call to a node and returns an idle connection for it, nil where one must be dialed. After a dial
// that failed the next is made only when redialInterval is over, so a node that is down costs little. Errors are
// *dialError.
func (p *peers) take(id string) (c *callConn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.peer(id)
	if n.underWay == callsPerPeer {
		return nil, &dialError{id, fmt.Errorf("%d calls to it are under way", callsPerPeer)}
	}
	for c == nil && len(n.idle) > 0 {
		last := len(n.idle) - 1
		c, n.idle = n.idle[last], n.idle[:last]
		if !c.usable() {
			_ = c.Close()
			c = nil
		}
	}
	if c == nil && n.dialErr != nil && time.Since(n.dialed) < redialInterval {
		return nil, n.dialErr
	}
	n.underWay++
	return c, nil
}

// giveBack counts one call less and keeps its connection, if it has one that is still good, for the next.
func (p *peers) giveBack(id string, c *callConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.peer(id)
	n.underWay--
	if c != nil {
		n.idle = append(n.idle, c)
	}
}

// dial makes a connection to a node. Errors are *dialError.
func (p *peers) dial(ctx context.Context, id string) (*callConn, error) {
	kind := kindCall
	if nodeOf(id) == id { // no server's name
		kind = kindAsk
	}
	conn, err := p.network.dial(ctx, id, kind)
	p.mu.Lock()
	n := p.peer(id)
	n.dialErr, n.dialed = err, time.Now()
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	c := &callConn{Conn: conn, frames: make(chan frame, 1)}
	go c.receive() // until the connection closes
	return c, nil
}

// callConn is a connection on which this node calls another.
type callConn struct {
	net.Conn
	frames chan frame // what the other end says; closed when it says no more
	err    error      // why it says no more; set before frames is closed
}

// frame is a call or an answer on the wire.
type frame struct {
	op      byte // of a call; 0 in an answer, 1 in one that is an error
	payload []byte
}

// receive reads what the other end says, also while no call is under way: so a connection that the other end has closed
// is known to be lost before a call is sent on it.
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
	close(c.frames) // before c is closed, lest a call be sent meanwhile and fail
	_ = c.Close()
}

// usable says whether a call can be sent on c: nothing has come since the last answer.
func (c *callConn) usable() bool {
	select {
	case <-c.frames:
		return false
	default:
		return true
	}
}

// call sends a call and waits for the answer. After an error c is of no more use.
func (c *callConn) call(ctx context.Context, op byte, request []byte) (frame, error) {
	deadline, _ := ctx.Deadline()
	if err := writeFrame(c, frame{op, request}, deadline); err != nil {
		return frame{}, err
	}
	select {
	case f, more := <-c.frames:
		if !more {
			return frame{}, fmt.Errorf("connection lost: %w", c.err)
		}
		return f, nil
	case <-ctx.Done():
		return frame{}, ctx.Err()
	}
}

// majority asks all nodes at once and returns true as soon as needed of them have said yes, false as soon as too many
// have not.
func majority(ctx context.Context, nodes []string, needed int, ask func(ctx context.Context, node string) bool) bool {
	ctx, cancel := context.WithCancel(ctx) // ends what is still being asked when the answer is known
	defer cancel()
	answers := make(chan bool, len(nodes))
	for _, node := range nodes {
		go func() { answers <- ask(ctx, node) }()
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

// agrees asks a node a question that it answers with yes or no. No answer is a no.
func (p *peers) agrees(ctx context.Context, id string, op byte, request []byte) bool {
	answer, err := p.call(ctx, id, op, request)
	return err == nil && len(answer) == 1 && answer[0] == 1
}

// serve answers the calls that arrive on conn until it closes.
func (p *peers) serve(conn accepted) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		called, err := readFrame(r)
		if err != nil {
			return
		}
		if writeFrame(conn, p.handle(conn.hello, called), time.Now().Add(writeTimeout)) != nil {
			return
		}
	}
}

// handle answers one call.
func (p *peers) handle(h hello, called frame) frame {
	op := called.op
	if (op == opWho) != (h.kind == kindAsk) {
		return frame{1, []byte("this call is not for a connection of this kind")}
	}
	ctx, cancel := context.WithTimeout(p.ctx, requestTimeout)
	defer cancel()
	serve := p.handlers[op]
	if serve == nil {
		return frame{1, fmt.Appendf(nil, "call %d is not known to this node's version", op)}
	}
	reply, err := serve(ctx, h.sender, called.payload)
	if err != nil {
		return frame{1, []byte(err.Error())}
	}
	return frame{0, reply}
}

func writeFrame(conn net.Conn, f frame, deadline time.Time) error {
	b := make([]byte, callFrameHead, callFrameHead+len(f.payload))
	binary.BigEndian.PutUint32(b, uint32(len(f.payload)+callFrameHead-4))
	b[4] = f.op
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := conn.Write(append(b, f.payload...))
	return err
}

func readFrame(r *bufio.Reader) (f frame, err error) {
	var head [callFrameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return f, err
	}
	size := int64(binary.BigEndian.Uint32(head[:])) - (callFrameHead - 4)
	if size < 0 || size > maxCallBytes {
		return f, fmt.Errorf("a message of %d bytes is not allowed", size)
	}
	f.op = head[4]
	f.payload, err = readN(r, size)
	return f, err
}

// readN reads n bytes. It takes memory as they come, not as they are announced.
func readN(r io.Reader, n int64) ([]byte, error) {
	if n <= 64<<10 {
		b := make([]byte, n)
		_, err := io.ReadFull(r, b)
		return b, err
	}
	b, err := io.ReadAll(io.LimitReader(r, n))
	if err == nil && int64(len(b)) < n {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}
