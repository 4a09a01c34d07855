package main

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

type linkMode int

const (
	linkOpen        linkMode = iota
	linkCut                  // refuses connections and resets those there are
	linkHold                 // passes the bytes on only once it is open again, like a network that delays
	linkHoldAnswers          // likewise, but only what comes back from the target
	linkHoldRaft             // likewise, but only answers to Raft's messages; letThrough passes them on one by one
	linkSlow                 // passes slowLink bytes a second to the target, on each connection
)

const slowLink = 300 << 10

// link2 is one direction of calls between two nodes: a TCP proxy to addr.
type link2 struct {
	addr     string
	target   string
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex // guards what follows
	change *sync.Cond
	mode   linkMode
	held   int // how often Raft's answers have been held since mode was set
	passed int // how many of them were let through
	closed bool
	conns  map[net.Conn]struct{}
}

func newLink(t testing.TB, target string) *link2 {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link2{addr: listener.Addr().String(), target: target, listener: listener, conns: make(map[net.Conn]struct{})}
	l.change = sync.NewCond(&l.mu)
	l.wg.Go(func() { l.accept(&l.wg) })
	t.Cleanup(l.close)
	return l
}

func (l *link2) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.set(linkCut)
	_ = l.listener.Close()
	l.wg.Wait()
}

func (l *link2) set(mode linkMode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode, l.held, l.passed = mode, 0, 0
	if mode == linkCut {
		for conn := range l.conns {
			_ = conn.Close()
		}
	}
	l.change.Broadcast()
}

func (l *link2) isSlow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mode == linkSlow
}

// heldAnswers returns how many answers linkHoldRaft has held.
func (l *link2) heldAnswers() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// letThrough passes on the first n answers that linkHoldRaft has held, and goes on holding the others.
func (l *link2) letThrough(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.passed = n
	l.change.Broadcast()
}

func (l *link2) accept(wg *sync.WaitGroup) {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer near.Close()
			if !l.pass(near, false, false) {
				return
			}
			far, err := new(net.Dialer).DialContext(context.Background(), "tcp", l.target)
			if err != nil || !l.pass(far, false, false) {
				return
			}
			defer far.Close()
			var both sync.WaitGroup
			var isRaft atomic.Bool // so says the hello, which comes first
			both.Go(func() { l.copy(far, near, false, &isRaft) })
			both.Go(func() { l.copy(near, far, true, &isRaft) })
			both.Wait()
			l.mu.Lock()
			delete(l.conns, near)
			delete(l.conns, far)
			l.mu.Unlock()
		})
	}
}

// pass takes note of a connection and waits while the link holds what comes on it. It returns false when the link is cut.
func (l *link2) pass(conn net.Conn, answers, isRaft bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[conn] = struct{}{}
	number := 0 // among the answers held
	holds := func() bool {
		switch {
		case l.mode == linkHoldRaft && answers && isRaft && number == 0:
			l.held++
			number = l.held
		case l.mode != linkHoldRaft:
			number = 0
		}
		return l.mode == linkHold || l.mode == linkHoldAnswers && answers || number > l.passed
	}
	for !l.closed && holds() {
		l.change.Wait()
	}
	return l.mode != linkCut && !l.closed
}

// copy passes on what comes on one connection, the answers or what they answer, to another.
func (l *link2) copy(to, from net.Conn, answers bool, isRaft *atomic.Bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for first := true; ; first = false {
		n, err := from.Read(buf)
		if first && !answers && n > len(helloMagic) {
			isRaft.Store(buf[len(helloMagic)] == kindRaft)
		}
		if n > 0 && l.pass(from, answers, isRaft.Load()) {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
			if l.isSlow() && !answers {
				time.Sleep(time.Duration(n) * time.Second / slowLink)
			}
		}
		if err != nil {
			return
		}
	}
}
