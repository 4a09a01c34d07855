package main

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxWebConns  = 8192 // at once, in all; less where the process may not open so many files
	maxRaftConns = 2048
	sampled      = 16 // connections looked at for one to close
)

// doorman is a listener that bounds how many connections there are at once, in all and from one address. When there would
// be one more, the one that has kept us waiting for longest has to go, and not the newcomer: else whoever opens connections
// and is silent on them would keep all others out. Only when none keeps us waiting the newcomer is turned away.
type doorman struct {
	net.Listener
	most, each int    // connections, in all and from one address
	crowded    func() // called for each that had to go

	mu     sync.Mutex // guards what follows
	guests map[netip.Addr]map[*guest]struct{}
	count  int
}

func newDoorman(l net.Listener, most, each int, crowded func()) *doorman {
	return &doorman{Listener: l, most: most, each: each, crowded: crowded, guests: make(map[netip.Addr]map[*guest]struct{})}
}

// maxFiles returns how many files and connections this process may have open at once.
func maxFiles() int {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 1024
	}
	return int(min(limit.Cur, 1<<20))
}

// guest is a connection that came in by a doorman. A nil guest is one that nobody counts.
type guest struct {
	net.Conn
	door  *doorman
	from  netip.Addr
	since atomic.Int64 // when it began to keep us waiting, in nanoseconds of Unix time; 0 while it does not
}

// Accept returns the next connection that may stay.
func (d *doorman) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		g := &guest{Conn: conn, door: d}
		if addr, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
			g.from = addr.Addr().Unmap()
		}
		g.waits(time.Now())
		out := d.admit(g)
		if out != nil {
			_ = out.Close()
			d.crowded()
		}
		if out != g {
			return g, nil
		}
	}
}

// admit takes a guest in, and returns the one who has to go for it, or itself.
func (d *doorman) admit(g *guest) (out *guest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	same := d.guests[g.from]
	switch {
	case len(same) >= d.each:
		out = longest(same)
	case d.count >= d.most:
		out = longest(d.largest())
	default:
		d.add(g)
		return nil
	}
	if out == nil {
		return g
	}
	d.remove(out)
	d.add(g)
	return out
}

// largest returns the guests from the address that has most of them, of some that are looked at.
func (d *doorman) largest() (largest map[*guest]struct{}) {
	looks := 0
	for _, guests := range d.guests { // from anywhere on
		if len(guests) > len(largest) {
			largest = guests
		}
		if looks++; looks == sampled {
			break
		}
	}
	return largest
}

// longest returns the guest who has kept us waiting for longest, of some that are looked at; nil if none of those does.
func longest(guests map[*guest]struct{}) (longest *guest) {
	looks, first := 0, int64(0)
	for g := range guests { // from anywhere on
		if since := g.since.Load(); since != 0 && (longest == nil || since < first) {
			longest, first = g, since
		}
		if looks++; looks == sampled {
			break
		}
	}
	return longest
}

// add is called with mu held, as is remove.
func (d *doorman) add(g *guest) {
	if d.guests[g.from] == nil {
		d.guests[g.from] = make(map[*guest]struct{})
	}
	d.guests[g.from][g] = struct{}{}
	d.count++
}

func (d *doorman) remove(g *guest) {
	same := d.guests[g.from]
	if _, there := same[g]; !there {
		return
	}
	delete(same, g)
	d.count--
	if len(same) == 0 {
		delete(d.guests, g.from)
	}
}

// Close closes the connection.
func (g *guest) Close() error {
	g.door.mu.Lock()
	g.door.remove(g)
	g.door.mu.Unlock()
	return g.Conn.Close()
}

// CloseWrite closes the connection for what we say: net/http does so before it closes all of it, lest an answer be lost.
func (g *guest) CloseWrite() error {
	if conn, ok := g.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return nil
}

// waits says that from now on the other end keeps us waiting.
func (g *guest) waits(now time.Time) {
	if g != nil {
		g.since.Store(now.UnixNano())
	}
}

// served says that it is for us to do something.
func (g *guest) served() {
	if g != nil {
		g.since.Store(0)
	}
}
