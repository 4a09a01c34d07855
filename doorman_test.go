package main

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// pretender is a listener whose connections come from any address that a test makes up.
type pretender struct {
	net.Listener
	next chan net.Conn
}

func (p *pretender) Accept() (net.Conn, error) {
	conn, ok := <-p.next
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

type pretended struct {
	net.Conn
	from   net.Addr
	mu     sync.Mutex
	closed bool
}

func (p *pretended) RemoteAddr() net.Addr { return p.from }

func (p *pretended) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	return nil
}

func (p *pretended) isClosed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// hall is a doorman and those who came to it.
type hall struct {
	t *testing.T
	*doorman
	next    chan net.Conn
	crowded int
}

func newHall(t *testing.T, most, each int) *hall {
	t.Helper()
	h := &hall{t: t, next: make(chan net.Conn, 1)}
	h.doorman = newDoorman(&pretender{next: h.next}, most, each, func() { h.crowded++ })
	return h
}

// come makes a connection from an address and returns both ends of it; the guest is nil if it was turned away.
func (h *hall) come(from string) (*pretended, *guest) {
	h.t.Helper()
	p := &pretended{from: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 1))}
	h.next <- p
	if h.wouldTurnAway(p) {
		close(h.next)
		if _, err := h.Accept(); !errors.Is(err, net.ErrClosed) {
			h.t.Fatalf("got %v; want the connection turned away and the listener's end", err)
		}
		h.next = make(chan net.Conn, 1)
		h.Listener.(*pretender).next = h.next
		return p, nil
	}
	conn, err := h.Accept()
	if err != nil {
		h.t.Fatal(err)
	}
	return p, conn.(*guest)
}

// wouldTurnAway says whether nobody is there to go for the next one.
func (h *hall) wouldTurnAway(p *pretended) bool {
	from := netip.MustParseAddrPort(p.from.String()).Addr()
	if same := h.guests[from]; len(same) >= h.each {
		return longest(same) == nil
	}
	return h.count >= h.most && longest(h.largest()) == nil
}

func TestDoormanClosesWhoWaitsLongest(t *testing.T) {
	h := newHall(t, 100, 3)
	began := time.Now()
	var came []*pretended
	var guests []*guest
	for i := range 3 {
		p, g := h.come("10.0.0.1")
		g.waits(began.Add(time.Duration(i) * time.Second))
		came, guests = append(came, p), append(guests, g)
	}
	guests[0].served() // it came first, but we are at work for it
	_, fourth := h.come("10.0.0.1")
	if came[0].isClosed() || !came[1].isClosed() || came[2].isClosed() || h.crowded != 1 {
		t.Errorf("got closed %v %v %v; want the second only", came[0].isClosed(), came[1].isClosed(), came[2].isClosed())
	}
	if _, g := h.come("10.0.0.2"); g == nil || h.crowded != 1 {
		t.Error("another address had to suffer")
	}
	guests[2].served()
	fourth.served()
	if p, g := h.come("10.0.0.1"); g != nil || !p.isClosed() {
		t.Error("got one more than may be, where none can go; want it turned away")
	}
	_ = fourth.Close()
	if _, g := h.come("10.0.0.1"); g == nil {
		t.Error("got nobody in after one had left; want the next")
	}
	_ = fourth.Close() // again: it is counted once
	if got := len(h.guests[netip.MustParseAddr("10.0.0.1")]); got != 3 {
		t.Errorf("got %d from one address; want 3", got)
	}
}

// When there are too many in all, one from the address with the most has to go.
func TestDoormanInAll(t *testing.T) {
	h := newHall(t, 10, 8)
	single, _ := h.come("10.0.0.2")
	for range 8 {
		h.come("10.0.0.1")
	}
	other, _ := h.come("::ffff:10.0.0.2") // the same address in another spelling
	for i := range 20 {
		if _, g := h.come(netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}).String()); g == nil && i < 7 {
			t.Errorf("newcomer %d was turned away; want one of the many gone for it", i)
		}
		if i == 5 && (single.isClosed() || other.isClosed()) {
			t.Error("got one of two from an address closed; want one of the eight from another")
		}
	}
	if h.count != 10 {
		t.Errorf("got %d; want 10", h.count)
	}
}

func TestDoormanForgets(t *testing.T) {
	h := newHall(t, 10, 10)
	var guests []*guest
	for i := range 10 {
		_, g := h.come(netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}).String())
		guests = append(guests, g)
	}
	for _, g := range guests {
		_ = g.Close()
	}
	if h.count != 0 || len(h.guests) != 0 {
		t.Errorf("got %d connections and %d addresses kept; want none", h.count, len(h.guests))
	}
}
