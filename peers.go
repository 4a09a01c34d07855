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
	"time"
)

// What nodes ask one another, beside Raft's own messages.
const (
	opApply     byte = iota + 1 // execute these commands, if you are the leader
	opReadIndex                 // which index must I have applied to read linearizably, if you are the leader?
	opTerm                      // is this your current term?
	opVoted                     // is your vote in this term for me?
	opHolding                   // of which cluster are you, and how much of it do you hold?
	opGrant                     // may I form a cluster with you?
	opAdmit                     // I have no state: what must I have to vote, if you are the leader?
)

const (
	maxCallBytes  = maxBodyBytes + 1<<20 // the largest command there can be, and what goes with it
	callsPerLink  = 64                   // served at once for one peer; more wait unread
	writeTimeout  = 3 * time.Second      // for the other end to take a message from us
	linkFrameHead = 4 + 4 + 1
)

// errRemote marks an error that the other node answered with: it heard the call and refused it.
var errRemote = errors.New("peer")

// handler answers the calls of one kind. What it returns as an error reaches the caller as text.
type handler func(ctx context.Context, from string, request []byte) (answer []byte, err error)

// peers carries calls between nodes: one connection to each, on which calls and answers pass one another. Format, both
// ways: 4 bytes of length of what follows; 4 bytes that number the call; in a call its op, in an answer 0 or, for an
// error, 1; then the payload.
type peers struct {
	network  *network
	handlers map[byte]handler
	ctx      context.Context // of every call served, ended by Close
	cancel   context.CancelFunc

	mu    sync.Mutex // guards links
	links map[string]*link
}

func newPeers(n *network) *peers {
	ctx, cancel := context.WithCancel(context.Background())
	return &peers{network: n, ctx: ctx, cancel: cancel, links: make(map[string]*link)}
}

// close ends the calls that are being served, with an error to those who made them.
func (p *peers) close() { p.cancel() }

// call asks a node and returns its answer. An error that is a *dialError or wraps errRemote says that the call was not
// made or was answered with that error; after any other the call may or may not have had its effect.
func (p *peers) call(ctx context.Context, id string, op byte, request []byte) ([]byte, error) {
	l, err := p.link(ctx, id)
	if err != nil {
		return nil, err
	}
	a, err := l.call(ctx, op, request)
	if err != nil {
		if !errors.Is(err, context.Canceled) { // it is not the node's fault that nobody waits for it
			p.drop(id, l)
		}
		return nil, fmt.Errorf("call node %q: %w", id, err)
	}
	if a.failed {
		return nil, fmt.Errorf("%w %q: %s", errRemote, id, a.payload)
	}
	return a.payload, nil
}

// link returns the connection to a node, dialing where there is none. After a dial that failed the next is made only
// when redialInterval is over, so a node that is down costs little.
func (p *peers) link(ctx context.Context, id string) (*link, error) {
	p.mu.Lock()
	l := p.links[id]
	if l == nil || l.failed(redialInterval) {
		l = &link{id: id, ready: make(chan struct{}), calls: make(map[uint32]chan answer)}
		p.links[id] = l
		p.mu.Unlock()
		// Others wait for this dial, so it does not end with the caller that happened to be first.
		go func() {
			dialCtx, cancel := context.WithTimeout(p.ctx, dialTimeout)
			defer cancel()
			l.conn, l.dialErr = p.network.dial(dialCtx, id, kindPeer)
			l.dialed = time.Now()
			close(l.ready)
			if l.dialErr == nil {
				l.receive()
				p.drop(id, l)
			}
		}()
	} else {
		p.mu.Unlock()
	}
	select {
	case <-l.ready:
		return l, l.dialErr
	case <-ctx.Done():
		return nil, &dialError{id, ctx.Err()}
	}
}

// drop makes later calls dial anew. Calls under way on l are left to end as they may.
func (p *peers) drop(id string, l *link) {
	p.mu.Lock()
	if p.links[id] == l {
		delete(p.links, id)
	}
	p.mu.Unlock()
	l.retire()
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

// redial makes later calls to any node introduce this one anew, now that it is of a cluster.
func (p *peers) redial() {
	p.mu.Lock()
	links := p.links
	p.links = make(map[string]*link)
	p.mu.Unlock()
	for _, l := range links {
		<-l.ready
		l.retire()
	}
}

// link is one connection on which this node calls another.
type link struct {
	id      string        // of the other node
	ready   chan struct{} // closed when what follows is set, which then does not change
	conn    net.Conn
	dialErr error
	dialed  time.Time

	writing sync.Mutex // held while a call is written

	mu      sync.Mutex // guards what follows
	calls   map[uint32]chan answer
	last    uint32
	err     error // why no answer will come any more
	retired bool  // no new calls; the connection closes with the last answer
}

type answer struct {
	payload []byte
	failed  bool // payload is an error's text
	err     error
}

// failed says whether l could not be dialed, for at least so long ago.
func (l *link) failed(ago time.Duration) bool {
	select {
	case <-l.ready:
		return l.dialErr != nil && time.Since(l.dialed) >= ago
	default:
		return false
	}
}

func (l *link) call(ctx context.Context, op byte, request []byte) (answer, error) {
	done := make(chan answer, 1)
	l.mu.Lock()
	if l.err != nil { // the connection was lost before this call
		l.mu.Unlock()
		return answer{}, &dialError{l.id, l.err}
	}
	l.last++
	id := l.last
	l.calls[id] = done
	l.mu.Unlock()
	defer l.forget(id)

	l.writing.Lock()
	err := writeFrame(l.conn, id, op, request)
	l.writing.Unlock()
	if err != nil {
		_ = l.conn.Close()
		return answer{}, err
	}
	select {
	case a := <-done:
		return a, a.err
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
}

func (l *link) forget(id uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.calls, id)
	l.closeIfIdle()
}

func (l *link) retire() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retired = true
	l.closeIfIdle()
}

// closeIfIdle is called with l.mu held.
func (l *link) closeIfIdle() {
	if l.retired && len(l.calls) == 0 && l.conn != nil {
		_ = l.conn.Close()
	}
}

// receive hands answers to those who wait for them, until the connection ends.
func (l *link) receive() {
	r := bufio.NewReader(l.conn)
	for {
		id, status, payload, err := readFrame(r)
		l.mu.Lock()
		if err != nil {
			l.err = fmt.Errorf("connection lost: %w", err)
			for _, done := range l.calls {
				done <- answer{err: l.err}
			}
			clear(l.calls)
			l.mu.Unlock()
			_ = l.conn.Close()
			return
		}
		if done := l.calls[id]; done != nil {
			delete(l.calls, id)
			done <- answer{payload: payload, failed: status != 0}
		}
		l.mu.Unlock()
	}
}

// serve answers the calls that arrive on conn until it closes.
func (p *peers) serve(conn net.Conn, h hello) {
	var (
		r       = bufio.NewReader(conn)
		writing sync.Mutex
		slots   = make(chan struct{}, callsPerLink)
		wg      sync.WaitGroup
	)
	defer wg.Wait()
	for {
		id, op, request, err := readFrame(r)
		if err != nil {
			return
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			status, reply := p.handle(h, op, request)
			writing.Lock()
			defer writing.Unlock()
			if err := writeFrame(conn, id, status, reply); err != nil {
				_ = conn.Close()
			}
		})
	}
}

func (p *peers) handle(h hello, op byte, request []byte) (status byte, reply []byte) {
	if op != opHolding && op != opGrant && op != opAdmit && h.cluster != p.network.cluster() {
		return 1, []byte("this call is only for nodes of the same cluster")
	}
	ctx, cancel := context.WithTimeout(p.ctx, requestTimeout)
	defer cancel()
	serve := p.handlers[op]
	if serve == nil {
		return 1, fmt.Appendf(nil, "call %d is not known to this node's version", op)
	}
	reply, err := serve(ctx, h.sender, request)
	if err != nil {
		return 1, []byte(err.Error())
	}
	return 0, reply
}

func writeFrame(conn net.Conn, id uint32, op byte, payload []byte) error {
	b := make([]byte, linkFrameHead, linkFrameHead+len(payload))
	binary.BigEndian.PutUint32(b, uint32(len(payload)+linkFrameHead-4))
	binary.BigEndian.PutUint32(b[4:], id)
	b[8] = op
	if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := conn.Write(append(b, payload...))
	return err
}

func readFrame(r *bufio.Reader) (id uint32, op byte, payload []byte, err error) {
	var head [linkFrameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, nil, err
	}
	size := int64(binary.BigEndian.Uint32(head[:])) - (linkFrameHead - 4)
	if size < 0 || size > maxCallBytes {
		return 0, 0, nil, fmt.Errorf("a message of %d bytes is not allowed", size)
	}
	payload, err = readN(r, size)
	return binary.BigEndian.Uint32(head[4:]), head[8], payload, err
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
