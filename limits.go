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

// A client that is closed for a newcomer comes back at once, in place of another. With a few clients more than the
// limit a node would do little but accept and close connections. So the next newcomer then has to wait for churnPause.
// It does not where the one that was closed was never answered and has been silent for longer than a client that works:
// floods of those keep nobody out.
const (
	churnPause = time.Millisecond
	silentFor  = 200 * time.Millisecond
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
	pause     time.Duration      // see churnPause
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
	waitingSince atomic.Int64 // nanoseconds of Unix time; 0 while the node does not wait for the other end
	read         atomic.Int64 // bytes of the header or body that is arriving
	weight       atomic.Int64 // bytes of memory for each of them
	memory       atomic.Int64 // bytes: its part of the limiter's
	answered     atomic.Bool  // it has had an answer
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
	time.Sleep(l.add(c))
	return c, nil
}

// add returns for how long the next connection has to wait.
func (l *connLimiter) add(c *limitedConn) (pause time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[c] = struct{}{}
	if len(l.open) <= l.maxConns {
		return 0
	}
	longest := l.longestWaiting(func(*limitedConn) bool { return true }) // c, if the node waits for no other
	if longest.answered.Load() || longest.waited() <= silentFor {
		pause = l.pause
	}
	l.drop(longest)
	return pause
}

// acquireMemory counts n more bytes for c. It closes other connections with memory until there is enough, and returns
// false if that is not possible or c itself has been closed.
func (l *connLimiter) acquireMemory(c *limitedConn, n int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.usedMemory+n > l.maxMemory {
		longest := l.longestWaiting(func(other *limitedConn) bool { return other != c && other.memory.Load() > 0 })
		if longest == nil {
			return false
		}
		l.drop(longest)
	}
	if _, open := l.open[c]; !open {
		return false
	}
	l.usedMemory += n
	c.memory.Add(n)
	return true
}

// longestWaiting returns the connection that the node has been waiting for longest, among some that match; nil if none
// does. It is called with mu held.
func (l *connLimiter) longestWaiting(match func(*limitedConn) bool) (longest *limitedConn) {
	compared, first := 0, int64(0)
	for c := range l.open { // in random order
		since := c.waitingSince.Load()
		if since == 0 || !match(c) {
			continue
		}
		if longest == nil || since < first {
			longest, first = c, since
		}
		if compared++; compared == sampled {
			break
		}
	}
	return longest
}

// drop closes a connection for the sake of a limit. Whoever reads from it gets an error. It is called with mu held.
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

// beginWait says that the node waits for the other end from now on.
func (c *limitedConn) beginWait(now time.Time) { c.waitingSince.Store(now.UnixNano()) }

// waited returns for how long the node has been waiting.
func (c *limitedConn) waited() time.Duration { return time.Since(time.Unix(0, c.waitingSince.Load())) }

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
