package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// waitFor waits until condition holds, and fails the test if it does not within 15 s.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	waitLong(t, 15*time.Second, what, condition)
}

// waitLong is waitFor with another limit.
func waitLong(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// testLogger writes to t's log, until the test is over.
func testLogger(t testing.TB, name string) hclog.Logger {
	t.Helper()
	if _, ok := t.(*testing.F); ok { // which may not be logged to while its target runs
		return hclog.NewNullLogger()
	}
	w := &testWriter{t: t}
	t.Cleanup(w.stop)
	return hclog.New(&hclog.LoggerOptions{Name: name, Output: w, Level: hclog.Info, TimeFormat: "05.000"})
}

type testWriter struct {
	mu   sync.Mutex // guards done
	t    testing.TB
	done bool
}

func (w *testWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.done {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func (w *testWriter) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
}

// testNode is a node in this process: a Store and the HTTP API on it.
type testNode struct {
	*Store
	kv      *KV
	machine StateMachine // nil for the service's own
	server  *server
	cfg     *Config
	url     string // of its HTTP API
	web     *httptest.Server
	running bool

	roundsBegun atomic.Int64 // of linearizable reads

	open func(*Config, hclog.Logger, func(error)) (*storage, error) // nil for openStorage
	deaf bool                                                       // it gets none of Raft's observations
}

// stop shuts the node down gracefully.
func (n *testNode) stop(t testing.TB) {
	t.Helper()
	if !n.running {
		return
	}
	n.running = false
	n.web.CloseClientConnections()
	n.web.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	if err := n.Shutdown(ctx); err != nil {
		t.Errorf("shut node %s down: %v", n.cfg.NodeID, err)
	}
}

// testCluster is a cluster of nodes in this process. Every node reaches every other through a link of its own.
type testCluster struct {
	t     testing.TB
	nodes []*testNode
	links map[[2]int]*link2
}

// newTestNode starts a cluster of one node.
func newTestNode(t testing.TB, store string) *testNode {
	t.Helper()
	return newTestCluster(t, 1, store).nodes[0]
}

// newTestCluster starts n nodes, waits until all of them are ready, and stops them when the test ends.
func newTestCluster(t testing.TB, n int, store string) *testCluster {
	t.Helper()
	c := unstartedCluster(t, n, store)
	for i := range n {
		c.start(i)
	}
	for _, node := range c.nodes {
		waitFor(t, node.cfg.NodeID+" to be ready", func() bool { return node.Ready() == nil })
	}
	return c
}

func unstartedCluster(t testing.TB, n int, store string) *testCluster {
	t.Helper()
	c := &testCluster{t: t, nodes: make([]*testNode, n), links: make(map[[2]int]*link2)}
	addrs := make([]string, n)
	for i := range addrs {
		addrs[i] = freeAddr(t)
	}
	for i := range n {
		cfg := mustConfig(t, map[string]string{"NODE_ID": fmt.Sprintf("node%d", i+1), "KV_STORE": store, "STATE_DIR": t.TempDir()})
		cfg.RaftAddr = addrs[i]
		cfg.Peers = nil
		for j := range n {
			addr := addrs[j]
			if i != j {
				l := newLink(t, addr)
				c.links[[2]int{i, j}] = l
				addr = l.addr
			}
			cfg.Peers = append(cfg.Peers, Peer{ID: fmt.Sprintf("node%d", j+1), Addr: addr})
		}
		c.nodes[i] = &testNode{cfg: cfg}
	}
	t.Cleanup(func() {
		for _, l := range c.links {
			l.set(linkOpen)
		}
		for _, node := range c.nodes {
			node.stop(t)
		}
	})
	return c
}

// start starts node i, with the state it had if its store keeps any.
func (c *testCluster) start(i int) {
	c.t.Helper()
	node := c.nodes[i]
	log := testLogger(c.t, node.cfg.NodeID)
	machine := newMachine()
	m := newMetrics()
	var replicated StateMachine = machine
	if node.machine != nil {
		replicated = node.machine
	}
	node.Store = NewStore(node.cfg, replicated, m, log)
	var err error
	if node.certs, err = openCertificates(node.cfg, m, log); err != nil {
		c.t.Fatalf("certificates: %v", err)
	}
	if node.open != nil {
		node.Store.open = node.open
	}
	find := node.rounds.find
	node.rounds.find = func() (uint64, error) {
		node.roundsBegun.Add(1)
		return find()
	}
	if node.deaf {
		node.observations = nil
	}
	node.kv = &KV{node.Store, machine}
	node.server = newServer(node.cfg, node.Store, m, log, routes(node.cfg, node.Store, machine))
	if err := node.Open(); err != nil {
		c.t.Fatalf("open: %v", err)
	}
	node.web = httptest.NewUnstartedServer(nil)
	node.web.Config = node.server.listener()
	node.web.Listener = node.server.door(node.web.Listener, nil)
	node.web.Start()
	node.url = node.web.URL
	node.running = true
}

func (c *testCluster) stop(i int) {
	c.t.Helper()
	c.nodes[i].stop(c.t)
}

// leader waits until the nodes that run, or those of them that are named, agree on a leader among them, and returns its
// index.
func (c *testCluster) leader(among ...int) int {
	c.t.Helper()
	if len(among) == 0 {
		for i, node := range c.nodes {
			if node.running {
				among = append(among, i)
			}
		}
	}
	leader := -1
	waitFor(c.t, "a leader", func() bool {
		leader = -1
		for _, i := range among {
			if s := c.nodes[i].State(); s.State == "leader" && c.nodes[i].ready.Load() == s.Term {
				leader = i
			}
		}
		for _, i := range among {
			if leader < 0 || c.nodes[i].Leader() != c.nodes[leader].cfg.NodeID {
				return false
			}
		}
		return true
	})
	return leader
}

// followers returns the indexes of the other nodes.
func (c *testCluster) followers(leader int) (followers []int) {
	for i := range c.nodes {
		if i != leader {
			followers = append(followers, i)
		}
	}
	return followers
}

// cut sets all links between node i and the others, in both directions.
func (c *testCluster) cut(i int, mode linkMode) {
	for pair, l := range c.links {
		if pair[0] == i || pair[1] == i {
			l.set(mode)
		}
	}
}

// lastPort is the port that freeAddr has given out last. It begins anywhere, for the sake of other runs on this machine.
var lastPort atomic.Uint32

func init() { lastPort.Store(uint32(os.Getpid())) }

// freeAddr returns a loopback address that nobody uses and that nobody gets by chance: the ports that the kernel gives to
// outgoing connections are higher.
func freeAddr(t testing.TB) string {
	t.Helper()
	const first, ports = 20000, 12000
	for range ports {
		addr := fmt.Sprintf("127.0.0.1:%d", first+lastPort.Add(1)%ports)
		if l, err := net.Listen("tcp", addr); err == nil {
			_ = l.Close()
			return addr
		}
	}
	t.Fatal("no port is free")
	return ""
}

func mustConfig(t testing.TB, env map[string]string) *Config {
	t.Helper()
	cfg, err := loadConfig(func(name string) string { return env[name] }, system{
		hostname: "test", hostIPv4: func() string { return "127.0.0.1" },
	})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// header is what a message of Raft's from a node begins with.
func header(n *testNode) raft.RPCHeader {
	server := []byte(n.membership.server())
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: server, Addr: server}
}

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

// answerTo is what an HTTP request came to.
type answerTo struct {
	status int
	header http.Header
	body   string
}

// request makes an HTTP request; headers are given as name, value, ...
func request(t testing.TB, method, url, body string, headers ...string) answerTo {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	response, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return answerTo{response.StatusCode, response.Header, string(data)}
}
