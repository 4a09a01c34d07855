package test

import (
	"context"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
)

// wires are what the nodes' messages to one another go through. set says what becomes of those from one node to another:
// for linkCut a connection that carries any is reset; with any other mode but linkOpen they are lost until TCP repeats them.
type wires interface {
	set(mode func(from, to int) linkMode)
}

// proxies are wires of a TCP proxy for each direction of calls, where there can be no network namespaces.
type proxies map[[2]int]*link

func newProxies(t *testing.T, nodes []*proc) proxies {
	t.Helper()
	links := make(proxies)
	setPeers(nodes, func(from, to int) string {
		addr := nodes[to].env["RAFT_ADDR"] + ":" + nodes[to].env["RAFT_PORT"]
		if from != to {
			l := newLink(t, addr)
			links[[2]int{from, to}], addr = l, l.addr
		}
		return addr
	})
	return links
}

func (p proxies) set(mode func(from, to int) linkMode) {
	for pair, l := range p {
		calls, answers := mode(pair[0], pair[1]), mode(pair[1], pair[0])
		switch {
		case calls == linkCut || answers == linkCut:
			l.set(linkCut)
		case calls != linkOpen:
			l.set(linkHold)
		case answers != linkOpen:
			l.set(linkHoldAnswers)
		default:
			l.set(linkOpen)
		}
	}
}

// setPeers gives every node its PEERS, or PEERS_FILE if it has one. addr is where one node reaches another.
func setPeers(nodes []*proc, addr func(from, to int) string) {
	for i, p := range nodes {
		var peers []string
		for j, q := range nodes {
			peers = append(peers, q.name+"@"+addr(i, j))
		}
		if path := p.env["PEERS_FILE"]; path == "" {
			p.env["PEERS"] = strings.Join(peers, ",")
		} else if err := os.WriteFile(path, []byte(strings.Join(peers, "\n")+"\n"), 0o600); err != nil {
			p.t.Error(err)
		}
		p.env["RAFT_ADVERTISE_ADDR"], p.env["RAFT_ADVERTISE_PORT"], _ = net.SplitHostPort(addr(i, i))
	}
}

// linkMode is what becomes of what is sent one way between two nodes.
type linkMode int

const (
	linkOpen        linkMode = iota
	linkCut                  // refuses connections and resets those there are
	linkHold                 // passes the bytes on only once it is open again, like a network that delays
	linkHoldAnswers          // likewise, but only what comes back from the target
)

// link is one direction of calls between two nodes: a TCP proxy to target.
type link struct {
	addr     string
	target   string
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex // guards what follows
	change *sync.Cond
	mode   linkMode
	closed bool
	conns  map[net.Conn]struct{}
}

func newLink(t testing.TB, target string) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{addr: listener.Addr().String(), target: target, listener: listener, conns: make(map[net.Conn]struct{})}
	l.change = sync.NewCond(&l.mu)
	l.wg.Go(l.accept)
	t.Cleanup(l.close)
	return l
}

func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.set(linkCut)
	_ = l.listener.Close()
	l.wg.Wait()
}

func (l *link) set(mode linkMode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = mode
	if mode == linkCut {
		for conn := range l.conns {
			_ = conn.Close()
		}
	}
	l.change.Broadcast()
}

func (l *link) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.wg.Go(func() { l.carry(near) })
	}
}

// carry passes on what comes on a connection and what comes back, until either end closes.
func (l *link) carry(near net.Conn) {
	defer near.Close()
	if !l.pass(near, false) {
		return
	}
	far, err := new(net.Dialer).DialContext(context.Background(), "tcp", l.target)
	if err != nil || !l.pass(far, false) {
		return
	}
	defer far.Close()
	var both sync.WaitGroup
	both.Go(func() { l.copy(far, near, false) })
	both.Go(func() { l.copy(near, far, true) })
	both.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, near)
	delete(l.conns, far)
}

// pass takes note of a connection and waits while the link holds what comes on it. It returns false when the link is cut.
func (l *link) pass(conn net.Conn, answers bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[conn] = struct{}{}
	for !l.closed && (l.mode == linkHold || l.mode == linkHoldAnswers && answers) {
		l.change.Wait()
	}
	return l.mode != linkCut && !l.closed
}

func (l *link) copy(to, from net.Conn, answers bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 && l.pass(from, answers) {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
