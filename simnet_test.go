package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

// simNet is the network of a simulation, in memory. Each direction between two nodes can be cut, and can hold back
// messages of some kind for as long as one likes. What a node has sent still arrives after the node has crashed.
type simNet struct {
	mu      sync.Mutex // guards what follows, and all hosts and connections
	hosts   map[string]*simHost
	links   map[simLink]linkState
	changed chan struct{} // closed when links or hosts change
}

type simLink struct{ from, to string }

// linkState is what happens to what one node sends to another.
type linkState struct {
	cut  bool                  // no connection can be made, and those there are break
	hold func(simMessage) bool // what is held back, and all that follows it on the same connection; nil for nothing
}

// simMessage is what one call of Write sends.
type simMessage struct {
	kind    byte   // of the connection: kindRaft, kindCall or kindAsk
	data    []byte // nil for the connection's end
	request []byte // for an answer, what the other end has sent last; else nil
	at      time.Time
	begun   bool // a part of it has been read
}

// The first byte of Raft's requests.
const (
	rpcAppendEntries byte = iota
	rpcRequestVote
	rpcInstallSnapshot
)

func anything(simMessage) bool    { return true }
func raftOnly(m simMessage) bool  { return m.kind == kindRaft }
func votesOnly(m simMessage) bool { return m.isRequest(rpcRequestVote) }
func answers(m simMessage) bool   { return m.kind == kindRaft && m.request != nil }

// requests are those of Raft's messages that say something, be it to whoever hears it: a vote is asked for, or entries come.
func requests(m simMessage) bool { return m.isRequest(rpcRequestVote) || m.isRequest(rpcAppendEntries) }

func (m simMessage) isRequest(rpc byte) bool {
	return m.kind == kindRaft && m.request == nil && len(m.data) > 0 && m.data[0] == rpc
}

// entryWith holds messages that carry a log entry with the given value.
func entryWith(value string) func(simMessage) bool {
	return func(m simMessage) bool { return m.isRequest(rpcAppendEntries) && bytes.Contains(m.data, []byte(value)) }
}

// answerToEntryWith holds the answers to such messages.
func answerToEntryWith(value string) func(simMessage) bool {
	return func(m simMessage) bool {
		return m.kind == kindRaft && m.request != nil && bytes.Contains(m.request, []byte(value))
	}
}

func newSimNet() *simNet {
	return &simNet{hosts: make(map[string]*simHost), links: make(map[simLink]linkState), changed: make(chan struct{})}
}

// set changes what happens on a link.
func (n *simNet) set(from, to string, state linkState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links[simLink{from, to}] = state
	for _, h := range n.hosts {
		for c := range h.conns {
			if peer := c.peer.host.id; state.cut && c.dialed && h.id == from && peer == to {
				c.breakUp()
			} else if h.id == to && peer == from {
				c.poke()
			}
		}
	}
	n.notify()
}

// notify is called with n.mu held.
func (n *simNet) notify() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// simHost is where one incarnation of a node is in the network: its port, and its connections.
type simHost struct {
	net      *simNet
	id       string
	accepted chan net.Conn
	closed   chan struct{}
	dead     bool
	conns    map[*simConn]struct{} // this host's ends
}

// listen begins a new incarnation. Connections to the one before break now if they have not already; only requests that
// are being held back on them go to the new one, behind the hello with which their connection began.
func (n *simNet) listen(id string) *simHost {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := &simHost{net: n, id: id, accepted: make(chan net.Conn, 1024), closed: make(chan struct{}), conns: make(map[*simConn]struct{})}
	if before := n.hosts[id]; before != nil {
		before.kill(false, h)
	}
	n.hosts[id] = h
	n.notify()
	return h
}

// crash ends this incarnation: from here on it neither speaks nor hears. If it goes silently, like a machine without
// power, its peers do not notice before the next incarnation is there.
func (h *simHost) crash(silently bool) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.kill(silently, nil)
}

// kill is called with net.mu held. next is the host that goes on where this one was, if it is there already.
func (h *simHost) kill(silently bool, next *simHost) {
	if !h.dead {
		h.dead = true
		close(h.closed)
	}
	for c := range h.conns {
		c.err = net.ErrClosed
		c.poke()
		if !c.inherit(next) && !silently && (next != nil || !c.holdsRequest()) {
			c.peer.receive(simMessage{kind: c.kind})
			delete(h.conns, c)
		}
	}
}

func (h *simHost) Accept() (net.Conn, error) {
	select {
	case c := <-h.accepted:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *simHost) Close() error {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if !h.dead {
		h.dead = true
		close(h.closed)
	}
	return nil
}

func (h *simHost) Addr() net.Addr { return nodeAddr(h.id) }

// DialContext connects to another node.
func (h *simHost) DialContext(ctx context.Context, _, to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	time.Sleep(simDelay())
	n := h.net
	for {
		n.mu.Lock()
		there, back, changed := n.links[simLink{h.id, to}], n.links[simLink{to, h.id}], n.changed
		target := n.hosts[to]
		held := there.hold != nil && there.hold(simMessage{}) || back.hold != nil && back.hold(simMessage{})
		if h.dead || there.cut || target == nil || target.dead && !held {
			n.mu.Unlock()
			return nil, errors.New("connection refused")
		}
		if !held {
			near := &simConn{host: h, dialed: true, wake: make(chan struct{}, 1)}
			near.accept(target, nil)
			h.conns[near] = struct{}{}
			n.mu.Unlock()
			return near, nil
		}
		n.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// simDelay is how long a message takes.
func simDelay() time.Duration {
	if rand.IntN(50) == 0 {
		return rand.N(50 * time.Millisecond)
	}
	return 100*time.Microsecond + rand.N(3*time.Millisecond)
}

// simConn is one end of a connection. Its fields are guarded by the network's mu.
type simConn struct {
	host   *simHost
	peer   *simConn
	dialed bool // by this end
	kind   byte
	hello  []byte       // the first message to the end that was dialed
	sent   []byte       // the last message of this end
	in     []simMessage // sent to this end, not yet read
	wake   chan struct{}
	err    error // why this end can do nothing more
	until  time.Time
	mute   bool // what this end writes next goes nowhere
}

// accept gives a dialed end its other end, at target.
func (c *simConn) accept(target *simHost, in []simMessage) {
	c.peer = &simConn{host: target, peer: c, kind: c.kind, in: in, wake: make(chan struct{}, 1)}
	target.conns[c.peer] = struct{}{}
	target.accepted <- c.peer
}

func (c *simConn) holdsRequest() bool {
	hold := c.host.net.links[simLink{c.peer.host.id, c.host.id}].hold
	return !c.dialed && c.peer.err == nil && len(c.in) > 0 && requests(c.in[0]) && hold != nil && hold(c.in[0])
}

// inherit has the next incarnation get the request that is held back on this connection. No TCP connection does that; a
// network that copies messages may. The hello says for which server the request is, so where the state was lost between
// the two, the connection must be refused.
func (c *simConn) inherit(next *simHost) bool {
	if next == nil || !c.holdsRequest() {
		return false
	}
	c.peer.accept(next, append([]simMessage{{kind: c.kind, data: c.hello}}, c.in...))
	c.peer.peer.hello, c.peer.peer.mute = c.hello, true // the dialer has heard an answer to its hello already
	return true
}

func (c *simConn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// receive takes a message that the peer has sent.
func (c *simConn) receive(m simMessage) {
	m.at = time.Now().Add(simDelay())
	if k := len(c.in); k > 0 && c.in[k-1].at.After(m.at) {
		m.at = c.in[k-1].at
	}
	c.in = append(c.in, m)
	c.poke()
}

func (c *simConn) breakUp() {
	for _, end := range []*simConn{c, c.peer} {
		if end.err == nil {
			end.err = errors.New("connection reset")
		}
		end.poke()
	}
}

func (c *simConn) Read(p []byte) (int, error) {
	for {
		c.host.net.mu.Lock()
		n, wait, err := c.take(p)
		c.host.net.mu.Unlock()
		if n > 0 || err != nil {
			return n, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-c.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// take reads what is there, or says how long to wait for it at most.
func (c *simConn) take(p []byte) (n int, wait time.Duration, err error) {
	if c.err != nil {
		return 0, 0, c.err
	}
	now := time.Now()
	wait = time.Hour
	if len(c.in) > 0 {
		first := &c.in[0]
		hold := c.host.net.links[simLink{c.peer.host.id, c.host.id}].hold
		switch {
		case hold != nil && !first.begun && hold(*first):
		case first.at.After(now):
			wait = first.at.Sub(now)
		case first.data == nil:
			return 0, 0, io.EOF
		default:
			n = copy(p, first.data)
			first.begun = true
			if first.data = first.data[n:]; len(first.data) == 0 {
				c.in = c.in[1:]
			}
			return n, 0, nil
		}
	}
	if c.until.IsZero() {
		return 0, wait, nil
	}
	if !now.Before(c.until) {
		return 0, 0, os.ErrDeadlineExceeded
	}
	return 0, min(wait, c.until.Sub(now)), nil
}

func (c *simConn) Write(p []byte) (int, error) {
	c.host.net.mu.Lock()
	defer c.host.net.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	m := simMessage{data: bytes.Clone(p)}
	if c.dialed && c.kind == 0 {
		c.kind, c.peer.kind, c.peer.hello = p[len(helloMagic)], p[len(helloMagic)], m.data
	}
	if !c.dialed {
		m.request = c.peer.sent
	}
	m.kind, c.sent = c.kind, m.data
	if !c.mute {
		c.peer.receive(m)
	}
	c.mute = false
	return len(p), nil
}

func (c *simConn) Close() error {
	c.host.net.mu.Lock()
	defer c.host.net.mu.Unlock()
	if c.err == nil {
		c.peer.receive(simMessage{kind: c.kind})
	}
	c.err = net.ErrClosed
	c.poke()
	if !c.host.dead {
		delete(c.host.conns, c)
	}
	return nil
}

func (c *simConn) SetDeadline(t time.Time) error {
	c.host.net.mu.Lock()
	defer c.host.net.mu.Unlock()
	c.until = t
	c.poke()
	return nil
}

func (c *simConn) SetReadDeadline(t time.Time) error { return c.SetDeadline(t) }
func (c *simConn) SetWriteDeadline(time.Time) error  { return nil } // writing never waits
func (c *simConn) LocalAddr() net.Addr               { return nodeAddr(c.host.id) }
func (c *simConn) RemoteAddr() net.Addr              { return nodeAddr(c.peer.host.id) }
