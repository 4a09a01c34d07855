package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
)

// unansweredFuture is what Raft may leave behind: a future that it was given as it shut down, and never answers. The
// goroutine that asks it cannot be ended; whoever waits for that goroutine has another way out.
var unansweredFuture = goleak.IgnoreTopFunction("github.com/hashicorp/raft.(*deferError).Error")

// checkLeaks fails the test if goroutines of its own are left when all else of it has been cleaned up. Tests that use it
// must not be parallel.
func checkLeaks(t *testing.T) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before, unansweredFuture) })
}

// logLines is a logger's output for tests to look at.
type logLines struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// count returns how many lines hold all the given parts.
func (l *logLines) count(parts ...string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
lines:
	for line := range strings.Lines(l.buf.String()) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue lines
			}
		}
		n++
	}
	return n
}

// testNet is some networks on this machine that know of one another.
type testNet struct {
	mu    sync.Mutex        // guards what follows
	addrs map[string]string // by node
}

func (n *testNet) set(node, addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs[node] = addr
}

func (n *testNet) address(node string) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	addr, known := n.addrs[node]
	return addr, known
}

// testNetNode is a network, once it is started, and the directory that a test gives it.
type testNetNode struct {
	*network
	id      string // of the node
	server  string
	port    port
	lines   *logLines
	log     hclog.Logger
	certs   *reloaded[*certificates] // as is what follows, to be set before start
	all     *testNet
	cluster string
	refusal error        // what authorize returns
	calls   atomic.Int32 // accepted connections of kindCall
}

func (n *testNetNode) self() (server, cluster string)     { return n.server, n.cluster }
func (n *testNetNode) address(node string) (string, bool) { return n.all.address(node) }

func (n *testNetNode) authorize(h hello) error {
	if n.refusal == nil && h.kind == kindCall {
		n.calls.Add(1)
	}
	return n.refusal
}

// newTestNet returns networks of the nodes with the given ids, to be started, and closes them when the test ends. Their
// servers, node1#1 and so on, are of one cluster.
func newTestNet(t testing.TB, ids ...string) (all *testNet, nodes []*testNetNode) {
	t.Helper()
	all = &testNet{addrs: make(map[string]string)}
	for _, id := range ids {
		nodes = append(nodes, all.listen(t, id+"#1", "127.0.0.1:0"))
	}
	return all, nodes
}

func (n *testNet) listen(t testing.TB, server, addr string) *testNetNode {
	t.Helper()
	node := &testNetNode{id: nodeOf(server), server: server, cluster: "CLUSTER", all: n, lines: new(logLines)}
	node.log = hclog.New(&hclog.LoggerOptions{Output: node.lines, Level: hclog.Debug})
	var err error
	if node.port, err = listenForPeers(addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if node.network == nil {
			_ = node.port.Close()
		} else if err := node.Close(); err != nil {
			t.Errorf("close network %s: %v", server, err)
		}
	})
	n.set(node.id, node.addr())
	return node
}

// start starts networks. Nobody takes the connections that are made to them.
func (n *testNet) start(nodes ...*testNetNode) {
	for _, node := range nodes {
		node.network = newNetwork(node.id, node.port, node.certs, node, newMetrics().refusals, node.log)
	}
}

// startEcho starts networks that answer on connections of kindCall and kindAsk with what they read.
func (n *testNet) startEcho(nodes ...*testNetNode) {
	n.start(nodes...)
	for _, node := range nodes {
		node.servePeers(func(conn *peerConn) { _, _ = io.Copy(conn, conn) })
	}
}

// servePeers has f serve each connection of kindCall and kindAsk, until the network closes.
func (n *testNetNode) servePeers(f func(*peerConn)) {
	n.wg.Go(func() {
		for {
			select {
			case conn := <-n.callConns:
				n.wg.Go(func() {
					defer conn.Close()
					f(conn)
				})
			case <-n.ctx.Done():
				return
			}
		}
	})
}

// refused returns how many connections were refused.
func (n *testNetNode) refused() int { return int(testutil.ToFloat64(n.refusals)) }

// unheard returns how many connections have not said who they are.
func (n *testNetNode) unheard() (count int) {
	n.listener.mu.Lock()
	defer n.listener.mu.Unlock()
	for c := range n.listener.open {
		if c.waitingSince.Load() != 0 {
			count++
		}
	}
	return count
}

// breakOff closes every connection of n, as if it had died.
func (n *testNetNode) breakOff() {
	n.closeConns(func(string) bool { return true })
}

func (n *testNetNode) addr() string { return n.port.Addr().String() }

// dialRaw connects to a network without a hello.
func dialRaw(t *testing.T, n *testNetNode) net.Conn {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", n.addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// waitClosed waits until the other end has closed conn, and returns what it had said before.
func waitClosed(t *testing.T, conn net.Conn) []byte {
	t.Helper()
	said, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection was not closed within 10 s")
	}
	return said
}

// checkEcho makes sure that to serves a connection of kindCall from from.
func checkEcho(t *testing.T, from, to *testNetNode) {
	t.Helper()
	conn, err := from.dial(t.Context(), to.server, kindCall)
	if err != nil {
		t.Errorf("dial from %s to %s: %v", from.server, to.server, err)
		return
	}
	defer conn.Close()
	checkEchoOn(t, conn)
}

func checkEchoOn(t *testing.T, conn net.Conn) {
	t.Helper()
	got := make([]byte, 5)
	_, err := conn.Write([]byte("hallo"))
	if err == nil {
		_, err = io.ReadFull(conn, got)
	}
	if err != nil || string(got) != "hallo" {
		t.Errorf("got %q, error %v; want hallo and none", got, err)
	}
}

var testHello = hello{kind: kindCall, sender: "node1#1", target: "node2#1", cluster: "CLUSTER"}
