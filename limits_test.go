package main

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// endless is a listener to which somebody connects whenever it accepts.
type endless struct{ net.Listener }

func (endless) Accept() (net.Conn, error) {
	conn, other := net.Pipe()
	return &piped{Conn: conn, other: other}, nil
}

type piped struct {
	net.Conn
	other  net.Conn
	closed bool
}

func (p *piped) Close() error {
	p.closed = true
	return p.Conn.Close()
}

// hear has n bytes arrive on a connection of a limiter, and reads them.
func hear(t *testing.T, c *limitedConn, n int) error {
	t.Helper()
	go func() { _, _ = c.Conn.(*piped).other.Write(make([]byte, n)) }()
	got, err := c.Read(make([]byte, n))
	if got != n {
		t.Errorf("got %d bytes; want %d", got, n)
	}
	return err
}

func newTestLimiter(conns int, memory int64) *connLimiter {
	return newConnLimiter(endless{}, conns, memory, newMetrics().overLimit)
}

// come has n clients connect, the first of which keeps us waiting for longest.
func (l *connLimiter) come(t *testing.T, n int) (all []*limitedConn) {
	t.Helper()
	for i := range n {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c := conn.(*limitedConn)
		c.waitingSince.Store(time.Now().Add(time.Duration(i-n) * time.Minute).UnixNano())
		all = append(all, c)
	}
	return all
}

func isClosed(c *limitedConn) bool { return c.Conn.(*piped).closed }

func checkClosed(t *testing.T, l *connLimiter, all []*limitedConn, want ...bool) {
	t.Helper()
	count := 0
	for i, c := range all {
		if isClosed(c) != want[i] {
			t.Errorf("connection %d: got closed %v; want %v", i, isClosed(c), want[i])
		}
		if want[i] {
			count++
		}
	}
	if got := int(testutil.ToFloat64(l.overLimit)); got != count {
		t.Errorf("got %d counted; want %d", got, count)
	}
	var held int64
	for c := range l.open {
		held += c.memory.Load()
	}
	if held != l.usedMemory {
		t.Errorf("got %d bytes taken; want %d, what is held", l.usedMemory, held)
	}
}

func TestLimiterClosesWhoKeepsItWaitingForLongest(t *testing.T) {
	l := newTestLimiter(3, 0)
	all := l.come(t, 3)
	all[0].endWait() // it came first, but we are at work for it
	all = append(all, l.come(t, 1)...)
	checkClosed(t, l, all, false, true, false, false)
	all[2].endWait()
	all[3].endWait()
	all = append(all, l.come(t, 1)...) // nobody else can go
	checkClosed(t, l, all, false, true, false, false, true)
	_ = all[0].Close()
	_ = all[0].Close() // it is counted once
	newest := l.come(t, 1)
	if isClosed(newest[0]) || len(l.open) != 3 {
		t.Errorf("got %d open, the newest closed %v; want the newest in for one that left", len(l.open), isClosed(newest[0]))
	}
}

// With one client more than the limit, each of which sends its next request at once, a node that closed one of them for
// the other as fast as it can would do nothing else. Silent clients hold up nobody.
func TestLimiterPausesWhenItClosesWhoComesBack(t *testing.T) {
	l := newTestLimiter(3, 0)
	l.pause = time.Minute
	at := func(ago time.Duration, answered bool) *limitedConn {
		conn, _ := l.Listener.Accept()
		c := &limitedConn{Conn: conn, limiter: l}
		c.expect(time.Now().Add(-ago), headerWeight)
		c.answered.Store(answered)
		return c
	}
	for _, tt := range []struct {
		what     string
		ago      time.Duration
		answered bool
		want     time.Duration
	}{
		{"silent since it came", 2 * silentFor, false, 0},
		{"just come", silentFor / 2, false, time.Minute},
		{"answered, and silent since", time.Hour, true, time.Minute},
	} {
		clear(l.open)
		oldest := at(tt.ago, tt.answered)
		for _, c := range []*limitedConn{oldest, at(0, true), at(0, false)} {
			if got := l.add(c); got != 0 {
				t.Errorf("got a pause of %v below the limit; want none", got)
			}
		}
		if got := l.add(at(0, false)); got != tt.want || !isClosed(oldest) {
			t.Errorf("%s: got a pause of %v, closed %v; want %v, true", tt.what, got, isClosed(oldest), tt.want)
		}
	}
}

// Who announces takes nothing, who sends does, and who sends and stops goes first.
func TestLimiterBoundsMemory(t *testing.T) {
	const part = 10 << 10
	l := newTestLimiter(100, 2*part)
	all := l.come(t, 5)
	for _, c := range all {
		c.expect(time.Unix(0, c.waitingSince.Load()), 1)
	}
	for _, i := range []int{1, 2} {
		if err := hear(t, all[i], freeBytes+part); err != nil {
			t.Fatal(err)
		}
	}
	checkClosed(t, l, all, false, false, false, false, false)
	if l.usedMemory != 2*part {
		t.Errorf("got %d bytes taken; want %d", l.usedMemory, 2*part)
	}
	if err := hear(t, all[3], freeBytes+part); err != nil {
		t.Errorf("got %v; want the oldest that holds something closed for it", err)
	}
	checkClosed(t, l, all, false, true, false, false, false)
	all[2].endWait() // all of its body is here, and it is worked on
	all[3].endWait()
	if err := hear(t, all[4], freeBytes+1); !errors.Is(err, errMemoryLimit) {
		t.Errorf("got %v; want %v", err, errMemoryLimit)
	}
	checkClosed(t, l, all, false, true, false, false, false)
	all[2].releaseMemory()
	if err := hear(t, all[4], part); err != nil {
		t.Errorf("got %v after memory was given back", err)
	}
	if l.usedMemory != 2*part {
		t.Errorf("got %d bytes taken; want %d", l.usedMemory, 2*part)
	}
	for _, c := range all {
		_ = c.Close()
	}
	if l.usedMemory != 0 || len(l.open) != 0 {
		t.Errorf("got %d bytes and %d connections kept; want none", l.usedMemory, len(l.open))
	}
}

// A byte of a header costs more than one of a body.
func TestLimiterWeighsHeaders(t *testing.T) {
	l := newTestLimiter(100, 1<<20)
	c := l.come(t, 1)[0]
	if err := hear(t, c, freeBytes+100); err != nil {
		t.Fatal(err)
	}
	if want := int64(100 * headerWeight); l.usedMemory != want {
		t.Errorf("got %d bytes taken; want %d", l.usedMemory, want)
	}
}
