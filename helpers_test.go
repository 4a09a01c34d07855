package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"raftstarter/test/link"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue { // tests mostly wait, for timeouts
		_ = f.Value.Set("4")
	}
	os.Exit(m.Run())
}

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

// testNode is a node in this process: a Store, and the server on it.
type testNode struct {
	*Store
	machine StateMachine
	client  *testClient // nil unless the node runs a testMachine
	server  *server
	cfg     *Config
	url     string // of its HTTP API
	web     *httptest.Server
	running bool

	certs *reloaded[*certificates]

	open func(*Config, hclog.Logger, *metrics, storageNode) (*storage, error) // nil for openStorage
	deaf bool                                                                 // it gets none of Raft's observations
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
	t       testing.TB
	service testService
	nodes   []*testNode
	links   map[[2]int]*link.Link
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
	c.startAll()
	return c
}

// startAll starts all nodes and waits until they are ready.
func (c *testCluster) startAll() {
	c.t.Helper()
	for i := range c.nodes {
		c.start(i)
	}
	for _, node := range c.nodes {
		waitFor(c.t, node.cfg.NodeID+" to be ready", func() bool { return node.Ready() == nil })
	}
}

func unstartedCluster(t testing.TB, n int, store string) *testCluster {
	t.Helper()
	c := &testCluster{t: t, service: tinyService{}, nodes: make([]*testNode, n), links: make(map[[2]int]*link.Link)}
	addrs := make([]string, n)
	for i := range addrs {
		addrs[i] = freeAddr(t)
	}
	for i := range n {
		cfg := mustConfig(t, map[string]string{"NODE_ID": fmt.Sprintf("node%d", i+1), "KV_STORE": store, "STATE_DIR": t.TempDir()})
		cfg.RaftAddr, cfg.RaftAdvertise = addrs[i], addrs[i]
		cfg.Peers = nil
		for j := range n {
			addr := addrs[j]
			if i != j {
				l := link.New(t, addr, isRaft)
				c.links[[2]int{i, j}] = l
				addr = l.Addr
			}
			cfg.Peers = append(cfg.Peers, Peer{ID: fmt.Sprintf("node%d", j+1), Addr: addr})
		}
		c.nodes[i] = &testNode{cfg: cfg}
	}
	t.Cleanup(func() {
		for _, l := range c.links {
			l.Set(linkOpen)
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
	node.machine = c.service.newMachine()
	m := newMetrics()
	node.Store = NewStore(node.cfg, node.machine, m, log)
	var err error
	if node.certs, err = openCertificates(node.cfg, m, log); err != nil {
		c.t.Fatalf("certificates: %v", err)
	}
	if node.deaf {
		node.observations = nil
	}
	if machine, tiny := node.machine.(*testMachine); tiny {
		node.client = &testClient{node.Store, machine}
	}
	node.server = newServer(node.cfg, node.Store, nil, m, log, c.service.routes(node.cfg, node.Store, node.machine))
	if err := node.openAll(); err != nil {
		c.t.Fatalf("open: %v", err)
	}
	node.web = httptest.NewUnstartedServer(nil)
	node.web.Config = node.server.httpServer()
	node.web.Listener = node.server.limitListener(node.web.Listener, nil)
	node.web.Start()
	node.url = node.web.URL
	node.running = true
}

// openAll is Store.Open with the node's own storage, if it has one.
func (n *testNode) openAll() error {
	if n.open == nil {
		return n.Open(n.certs)
	}
	p, err := listenForPeers(n.cfg.RaftAddr)
	if err != nil {
		return err
	}
	st, err := n.open(n.cfg, n.log, n.metrics, n)
	if err != nil {
		return errors.Join(err, p.Close())
	}
	return n.start(p, st, n.certs)
}

// rounds returns how many rounds for linearizable reads the node has begun.
func (n *testNode) roundsBegun(t testing.TB) uint64 {
	t.Helper()
	families, err := n.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "raftstarter_read_round") {
			return f.GetMetric()[0].GetHistogram().GetSampleCount()
		}
	}
	t.Fatal("no metric of rounds")
	return 0
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
			if s := c.nodes[i].State(); s.State == "leader" && c.nodes[i].ready.load() == s.Term {
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
func (c *testCluster) cut(i int, mode link.Mode) {
	for pair, l := range c.links {
		if pair[0] == i || pair[1] == i {
			l.Set(mode)
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

// answer has a server answer a request that no connection has brought.
func (s *server) answer(w http.ResponseWriter, r *http.Request) {
	s.ServeHTTP(w, r.WithContext(s.withClient(r.Context(), &limitedConn{limiter: new(connLimiter)})))
}

// header is what a message of Raft's from a node begins with.
func header(n *testNode) raft.RPCHeader {
	server := []byte(n.membership.server())
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: server, Addr: server}
}
