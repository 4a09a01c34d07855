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

// SECURITY.md has what these limits add up to.
const (
	maxWebConns  = 4096 // at once, less where the process may not open so many files
	maxRaftConns = 1024
	sampled      = 16       // connections compared to find the one that is waited for longest
	requestBytes = 32 << 20 // of memory for requests that are arriving on the HTTP port
	headerWeight = 16       // bytes of memory that net/http makes of one in a header of short lines
	freeBytes    = 2 << 10  // of each header, and of each body, are not counted
	sendBuffer   = 32 << 10 // bytes for each HTTP client, of which the kernel makes twice as many: with those of its own
	// choice, a client that does not read would take a megabyte, and the node would not notice that it does not read
)

// A client that was answered within the last activeFor is likely to send its next request at once. For a newcomer it is
// closed last, and then the next newcomer waits for churnPause: who was closed comes back in place of another, and with
// a few clients more than the limit the node would do little but accept and close connections.
const (
	activeFor  = time.Second
	churnPause = time.Millisecond
)

// errMemoryLimit is what reading a request returns when there is no memory for more of it.
var errMemoryLimit = errors.New("too many large requests are under way")

// maxFiles returns how many files and connections this process may have open at once.
func maxFiles() int {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 1024
	}
	return int(min(limit.Cur, 1<<20))
}

// connLimiter is a listener that limits two things: its open connections, and the memory for what is arriving on
// them. Each connection tells it since when the node has been waiting for the other end, to send or to read. When a
// limit is exceeded the connection is closed that the node has been waiting for longest. Newcomers are not refused:
// somebody who opens connections and sends nothing would keep all others out.
type connLimiter struct {
	net.Listener
	maxConns  int
	maxMemory int64              // bytes; 0 counts nothing
	overLimit prometheus.Counter // connections that the limiter has closed

	mu         sync.Mutex // guards what follows, and memory of each connection
	open       map[*limitedConn]struct{}
	usedMemory int64 // bytes: the sum over the open connections
}

// limitedConn is a connection of a connLimiter. Read counts the bytes of the header or body that is arriving, and
// takes memory for them; releaseMemory releases it when the request is done.
type limitedConn struct {
	net.Conn
	limiter      *connLimiter
	waitingSince atomic.Int64 // nanoseconds of Unix time; 0 while the node does not wait; see answered
	read         atomic.Int64 // bytes of the header or body that is arriving
	weight       atomic.Int64 // bytes of memory for each of them
	memory       atomic.Int64 // bytes: its part of the limiter's
}

func newConnLimiter(l net.Listener, maxConns int, maxMemory int64, overLimit prometheus.Counter) *connLimiter {
	return &connLimiter{
		Listener: l, maxConns: maxConns, maxMemory: maxMemory, overLimit: overLimit,
		open: make(map[*limitedConn]struct{}),
	}
}

// Accept returns the next connection, from which a request or a hello is expected. If there are too many then, it
// closes one: the new one only if the node waits for no other.
func (l *connLimiter) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &limitedConn{Conn: conn, limiter: l}
	c.expect(time.Now(), headerWeight)
	if l.add(c) {
		time.Sleep(churnPause)
	}
	return c, nil
}

// add says whether another client, an active one, had to be closed for c.
func (l *connLimiter) add(c *limitedConn) (closedActive bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[c] = struct{}{}
	if len(l.open) <= l.maxConns {
		return false
	}
	since := l.closeLongestWaiting(func(other *limitedConn) bool { return other != c })
	if since.IsZero() {
		l.drop(c)
	}
	return since.After(time.Now())
}

// acquireMemory counts n more bytes for c. It closes other connections with memory until there is enough, and returns
// false if that is not possible or c itself has been closed.
func (l *connLimiter) acquireMemory(c *limitedConn, n int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.usedMemory+n > l.maxMemory {
		since := l.closeLongestWaiting(func(other *limitedConn) bool { return other != c && other.memory.Load() > 0 })
		if since.IsZero() {
			return false
		}
	}
	if _, open := l.open[c]; !open {
		return false
	}
	l.usedMemory += n
	c.memory.Add(n)
	return true
}

// closeLongestWaiting closes the connection that the node has been waiting for longest, among some that match.
// Whoever reads from it gets an error. It returns since when it has waited, or zero if no connection matches. It is
// called with mu held.
func (l *connLimiter) closeLongestWaiting(match func(*limitedConn) bool) (since time.Time) {
	var longest *limitedConn
	compared, first := 0, int64(0)
	for c := range l.open { // in random order
		began := c.waitingSince.Load()
		if began == 0 || !match(c) {
			continue
		}
		if longest == nil || began < first {
			longest, first = c, began
		}
		if compared++; compared == sampled {
			break
		}
	}
	if longest == nil {
		return time.Time{}
	}
	l.drop(longest)
	return time.Unix(0, first)
}

// drop closes a connection for the sake of a limit. It is called with mu held.
func (l *connLimiter) drop(c *limitedConn) {
	l.overLimit.Inc()
	l.remove(c)
	_ = c.Conn.Close()
}

// remove is called with mu held.
func (l *connLimiter) remove(c *limitedConn) {
	delete(l.open, c)
	l.usedMemory -= c.memory.Swap(0)
}

// releaseMemory releases all memory that is counted for c: its request is done.
func (c *limitedConn) releaseMemory() {
	if c.memory.Load() > 0 {
		c.limiter.mu.Lock()
		c.limiter.usedMemory -= c.memory.Swap(0)
		c.limiter.mu.Unlock()
	}
}

// expect begins a wait for the other end to send a header or a body, each byte of which takes weight bytes of memory.
func (c *limitedConn) expect(now time.Time, weight int64) {
	c.read.Store(0)
	c.weight.Store(weight)
	c.beginWait(now)
}

// answered says that the client has its answer: the wait for its next request begins activeFor later.
func (c *limitedConn) answered(now time.Time) { c.expect(now.Add(activeFor), headerWeight) }

// beginWait says that the node waits for the other end from now on.
func (c *limitedConn) beginWait(now time.Time) { c.waitingSince.Store(now.UnixNano()) }

// endWait says that the other end waits for the node now.
func (c *limitedConn) endWait() { c.waitingSince.Store(0) }

func (c *limitedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	counted := min(int64(n), c.read.Add(int64(n))-freeBytes)
	if counted > 0 && c.limiter.maxMemory > 0 && !c.limiter.acquireMemory(c, counted*c.weight.Load()) {
		return n, errMemoryLimit
	}
	return n, err
}

// Close closes the connection.
func (c *limitedConn) Close() error {
	c.limiter.mu.Lock()
	c.limiter.remove(c)
	c.limiter.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite ends what this node sends. net/http calls it before Close, so that a last answer is not lost.
func (c *limitedConn) CloseWrite() error {
	if conn, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return nil
}
