package main

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// SECURITY.md has what these add up to.
const (
	maxWebConns  = 4096 // at once, less where the process may not open so many files
	maxRaftConns = 1024
	sampled      = 16       // connections looked at for the one that has kept us waiting for longest
	requestBytes = 32 << 20 // of memory for requests that are arriving on the HTTP port
	headerWeight = 16       // bytes of memory that net/http makes of one in a header of short lines
	freeBytes    = 2 << 10  // of a header, and as many of a body, are not counted
)

// maxFiles returns how many files and connections this process may have open at once.
func maxFiles() int {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 1024
	}
	return int(min(limit.Cur, 1<<20))
}

// limiter bounds how many connections a port has at once, and how much memory holds what arrives on them. When that is too much
// it closes the connection that has kept us waiting for longest, and not the newcomer's: else whoever opens connections and is
// silent on them would keep all others out.
type limiter struct {
	net.Listener
	conns   int                // at most
	memory  int64              // at most, in bytes
	crowded prometheus.Counter // connections that were closed

	mu    sync.Mutex // guards what follows, and held of each connection
	open  map[*limited]struct{}
	taken int64 // of memory: the sum of what open connections hold
}

// limited is a connection of a limiter.
type limited struct {
	net.Conn
	limiter *limiter
	since   atomic.Int64 // when it began to keep us waiting, in nanoseconds of Unix time; 0 while it does not
	read    atomic.Int64 // bytes of the header, or of the body, that is arriving
	weight  atomic.Int64 // memory that each of them takes
	held    atomic.Int64 // of the limiter's memory
}

func newLimiter(l net.Listener, conns int, memory int64, crowded prometheus.Counter) *limiter {
	return &limiter{Listener: l, conns: conns, memory: memory, crowded: crowded, open: make(map[*limited]struct{})}
}

// Accept returns the next connection. It keeps us waiting. If there are too many now one is closed, and the new one only if no
// other keeps us waiting.
func (l *limiter) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &limited{Conn: conn, limiter: l}
	c.waits(time.Now(), headerWeight)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[c] = struct{}{}
	if len(l.open) > l.conns {
		l.closeOne(func(*limited) bool { return true })
	}
	return c, nil
}

// take counts n more bytes that c holds, and closes other connections until there is memory for them. It returns false if there
// is none to be had so, or c itself is closed.
func (l *limiter) take(c *limited, n int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.taken+n > l.memory {
		if !l.closeOne(func(other *limited) bool { return other != c && other.held.Load() > 0 }) {
			return false
		}
	}
	if _, open := l.open[c]; !open {
		return false
	}
	l.taken += n
	c.held.Add(n)
	return true
}

// closeOne closes the connection that has kept us waiting for longest, of some that suit; whoever reads from it hears of its end.
// It returns false if there is none. It is called with mu held.
func (l *limiter) closeOne(suits func(*limited) bool) bool {
	var longest *limited
	looked, first := 0, int64(0)
	for c := range l.open { // from anywhere on
		since := c.since.Load()
		if since == 0 || !suits(c) {
			continue
		}
		if longest == nil || since < first {
			longest, first = c, since
		}
		if looked++; looked == sampled {
			break
		}
	}
	if longest == nil {
		return false
	}
	l.crowded.Inc()
	l.forget(longest)
	_ = longest.Conn.Close()
	return true
}

// forget is called with mu held.
func (l *limiter) forget(c *limited) {
	delete(l.open, c)
	l.taken -= c.held.Swap(0)
}

// give gives back all memory that c holds.
func (c *limited) give() {
	if c.held.Load() > 0 {
		c.limiter.mu.Lock()
		c.limiter.taken -= c.held.Swap(0)
		c.limiter.mu.Unlock()
	}
}

// waits says that from now on the other end keeps us waiting, and how much memory each byte takes that comes then.
func (c *limited) waits(now time.Time, weight int64) {
	c.read.Store(0)
	c.weight.Store(weight)
	c.since.Store(now.UnixNano())
}

// served says that it is for us to do something.
func (c *limited) served() { c.since.Store(0) }

var errCrowded = errors.New("too many large requests are under way")

func (c *limited) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	counted := min(int64(n), c.read.Add(int64(n))-freeBytes)
	if counted > 0 && c.limiter.memory > 0 && !c.limiter.take(c, counted*c.weight.Load()) {
		return n, errCrowded
	}
	return n, err
}

// Close closes the connection.
func (c *limited) Close() error {
	c.limiter.mu.Lock()
	c.limiter.forget(c)
	c.limiter.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite closes the connection for what we say: net/http does so before it closes all of it, lest an answer be lost.
func (c *limited) CloseWrite() error {
	if conn, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return nil
}

// sendBuffer is how much the kernel keeps, twice, of what a client of the HTTP port does not read, in bytes.
const sendBuffer = 32 << 10

// sparing is a listener whose connections have the kernel keep little of what their clients do not read. It would else keep a
// megabyte for each of however many, and hide from us that they do not read.
type sparing struct{ net.Listener }

func (l sparing) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(sendBuffer)
	}
	return conn, err
}
