// Package link has the network between nodes in tests, where no real one can be cut: a TCP proxy for each direction of calls.
package link

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Mode is what becomes of what is sent one way between two nodes.
type Mode int

// The modes of a link.
const (
	Open        Mode = iota
	Cut              // refuses connections and resets those there are
	Hold             // passes the bytes on only once it is open again, like a network that delays
	HoldAnswers      // likewise, but only what comes back from the target
	HoldChosen       // likewise, but only on chosen connections; LetThrough passes the answers on one by one
	Slow             // passes SlowRate bytes a second to the target, on each connection
)

// SlowRate is how many bytes a second a slow link passes.
const SlowRate = 300 << 10

// Link is one direction of calls between two nodes. Who connects to Addr is connected to its target.
type Link struct {
	Addr     string
	target   string
	chooses  func(first []byte) bool // by what a connection begins with; nil chooses none
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex // guards what follows
	change *sync.Cond
	mode   Mode
	held   int // how often answers on chosen connections have been held since mode was set
	passed int // how many of them were let through
	closed bool
	conns  map[net.Conn]struct{}
}

// New returns a link that is open, and closes it when the test ends. chooses says for HoldChosen, by the first bytes of a
// connection, whether it is chosen; nil chooses none.
func New(t testing.TB, target string, chooses func(first []byte) bool) *Link {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &Link{
		Addr: listener.Addr().String(), target: target, chooses: chooses, listener: listener,
		conns: make(map[net.Conn]struct{}),
	}
	l.change = sync.NewCond(&l.mu)
	l.wg.Go(l.accept)
	t.Cleanup(l.Close)
	return l
}

// Close ends the link for good.
func (l *Link) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.Set(Cut)
	_ = l.listener.Close()
	l.wg.Wait()
}

// Set says what becomes of what is sent from now on, and of what is held.
func (l *Link) Set(mode Mode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode, l.held, l.passed = mode, 0, 0
	if mode == Cut {
		for conn := range l.conns {
			_ = conn.Close()
		}
	}
	l.change.Broadcast()
}

func (l *Link) isSlow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mode == Slow
}

// Held returns how many answers HoldChosen has held.
func (l *Link) Held() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// LetThrough passes on the first n answers that HoldChosen has held, and goes on holding the others.
func (l *Link) LetThrough(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.passed = n
	l.change.Broadcast()
}

func (l *Link) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.wg.Go(func() { l.carry(near) })
	}
}

// carry passes on what comes on a connection and what comes back, until either end closes.
func (l *Link) carry(near net.Conn) {
	defer func() { _ = near.Close() }()
	if !l.pass(near, false, false) {
		return
	}
	far, err := new(net.Dialer).DialContext(context.Background(), "tcp", l.target)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	if !l.pass(far, false, false) {
		return
	}
	var both sync.WaitGroup
	var chosen atomic.Bool
	both.Go(func() { l.copy(far, near, false, &chosen) })
	both.Go(func() { l.copy(near, far, true, &chosen) })
	both.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, near)
	delete(l.conns, far)
}

// pass takes note of a connection and waits while the link holds what comes on it. It returns false when the link is cut.
func (l *Link) pass(conn net.Conn, answers, chosen bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[conn] = struct{}{}
	number := 0 // among the answers held
	holds := func() bool {
		switch {
		case l.mode == HoldChosen && answers && chosen && number == 0:
			l.held++
			number = l.held
		case l.mode != HoldChosen:
			number = 0
		}
		return l.mode == Hold || l.mode == HoldAnswers && answers || number > l.passed
	}
	for !l.closed && holds() {
		l.change.Wait()
	}
	return l.mode != Cut && !l.closed
}

// copy passes on what comes on one connection, the answers or what they answer, to another.
func (l *Link) copy(to, from net.Conn, answers bool, chosen *atomic.Bool) {
	defer func() { _, _ = to.Close(), from.Close() }()
	buf := make([]byte, 64<<10)
	for first := true; ; first = false {
		n, err := from.Read(buf)
		if first && !answers && l.chooses != nil {
			chosen.Store(l.chooses(buf[:n]))
		}
		if n > 0 && l.pass(from, answers, chosen.Load()) {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
			if l.isSlow() && !answers {
				time.Sleep(time.Duration(n) * time.Second / SlowRate)
			}
		}
		if err != nil {
			return
		}
	}
}
