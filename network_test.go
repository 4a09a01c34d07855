package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
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

func TestHelloRoundTrip(t *testing.T) {
	long := strings.Repeat("n", 255)
	tests := []struct {
		name  string
		hello hello
	}{
		{"of a call", testHello},
		{"of a question", hello{kind: kindAsk, sender: "node1", target: "node2"}},
		{"of raft", hello{kind: kindRaft, sender: "a", target: "b", cluster: "c"}},
		{"with nothing", hello{kind: kindRaft}},
		{"with the longest names", hello{kind: kindRaft, sender: long, target: long, cluster: long}},
		{"with names that are not text", hello{kind: 0, sender: "\x00\xff", target: "\x01", cluster: "\n"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := bytes.NewReader(append(tt.hello.encode(), "what follows"...))
			got, err := readHello(r)
			if err != nil || got != tt.hello {
				t.Errorf("got %+v, error %v; want %+v and none", got, err, tt.hello)
			}
			if rest, _ := io.ReadAll(r); string(rest) != "what follows" {
				t.Errorf("got %q left to read; want what follows the hello", rest)
			}
		})
	}
}

func TestReadHelloOfOtherBytes(t *testing.T) {
	good := testHello.encode()
	for size := range good {
		if h, err := readHello(bytes.NewReader(good[:size])); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut to %d of %d bytes: got %+v, error %v; want an early end", size, len(good), h, err)
		}
	}
	// Not a byte more is read than shows that it is no hello.
	endless := strings.NewReader(strings.Repeat("\xff", 1<<20))
	for name, r := range map[string]io.Reader{
		"http":              strings.NewReader("GET /key/a HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"tls":               bytes.NewReader(append([]byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc}, make([]byte, 512)...)),
		"another version":   strings.NewReader("RSTRAFT\x01" + string(good[8:])),
		"endless":           endless,
		"zeros":             bytes.NewReader(make([]byte, 1000)),
		"another program's": strings.NewReader("RSTSNAP\x01" + string(good[8:])),
	} {
		if h, err := readHello(r); err == nil || !strings.Contains(err.Error(), "no hello") {
			t.Errorf("%s: got %+v, error %v; want one that says no hello", name, h, err)
		}
	}
	if read := 1<<20 - endless.Len(); read > 16 {
		t.Errorf("got %d bytes read of garbage; want no more than a hello's head", read)
	}
}

func TestCheckHello(t *testing.T) {
	unauthorized := errors.New("unauthorized")
	long := strings.Repeat("x", 200)
	const lost = `node "node2" is server "node2#1" now, not "node2#0"`
	type check struct {
		name    string
		hello   hello
		cluster string // of the one that checks, node2#1
		auth    error  // what authorize returns
		want    string // in the refusal, "" for none
	}
	tests := []check{
		{"a call", testHello, "CLUSTER", nil, ""},
		{"raft", hello{kindRaft, "node1#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, ""},
		{"another peer", hello{kindRaft, "node3#7", "node2#1", "CLUSTER"}, "CLUSTER", nil, ""},
		{"a question", hello{kindAsk, "node1", "node2", ""}, "CLUSTER", nil, ""},
		{"a question to a server of no cluster", hello{kindAsk, "node1", "node2", ""}, "", nil, ""},
		{"a question out of another cluster", hello{kindAsk, "node1", "node2", "OTHER"}, "CLUSTER", nil, ""},

		{"a call to a lost server", hello{kindCall, "node1#1", "node2#0", "CLUSTER"}, "CLUSTER", nil, lost},
		{"raft for a lost server", hello{kindRaft, "node1#1", "node2#0", "CLUSTER"}, "CLUSTER", nil, lost},
		{"raft for a lost server, of no cluster now", hello{kindRaft, "node1#1", "node2#0", "CLUSTER"}, "", nil, lost},
		{"a call to a node", hello{kindCall, "node1#1", "node2", "CLUSTER"}, "CLUSTER", nil, `node "node2" is server "node2#1" now, not "node2"`},
		{"another node is meant", hello{kindCall, "node1#1", "node3#1", "CLUSTER"}, "CLUSTER", nil, `this is node "node2", not "node3"`},
		{"another node is asked", hello{kindAsk, "node1", "node3", ""}, "CLUSTER", nil, `this is node "node2", not "node3"`},
		{"nobody is meant", hello{kindCall, "node1#1", "", "CLUSTER"}, "CLUSTER", nil, `this is node "node2", not ""`},
		{"a stranger", hello{kindCall, "node9#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "node9" is neither in the PEERS`},
		{"a stranger's question", hello{kindAsk, "node9", "node2", ""}, "CLUSTER", nil, `node "node9" is neither in the PEERS`},
		{"a stranger without a name", hello{kindCall, "", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "" is neither in the PEERS`},
		{"the server itself", hello{kindCall, "node2#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "node2" is neither in the PEERS`},
		{"another state of its node", hello{kindCall, "node2#0", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "node2" is neither in the PEERS`},
		{"an unknown kind", hello{'X', "node1#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, "connection kind 'X' is not known"},
		{"kind 0", hello{0, "node1#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, "connection kind"},
		{"not authorized", testHello, "CLUSTER", unauthorized, "unauthorized"},
		{"a question that is not authorized", hello{kindAsk, "node1", "node2", ""}, "CLUSTER", unauthorized, "unauthorized"},
		{"a reason longer than the answer may be", hello{kindCall, long, long, "CLUSTER"}, "CLUSTER", nil, "this is node"},
	}
	for _, kind := range []byte{kindRaft, kindCall} {
		for _, clusters := range [][2]string{{"CLUSTER", "OTHER"}, {"CLUSTER", ""}, {"", "CLUSTER"}, {"", ""}} {
			says, is := clusters[0], clusters[1]
			tests = append(tests, check{
				fmt.Sprintf("kind %c of cluster %q at one of %q", kind, says, is),
				hello{kind, "node1#1", "node2#1", says},
				is, nil,
				fmt.Sprintf(`server "node1#1" is of cluster %q, server "node2#1" of cluster %q`, says, is),
			})
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			all, nodes := newTestNet(t, "node1", "node2", "node3")
			server := nodes[1]
			server.refusal = tt.auth
			server.cluster = tt.cluster
			all.startEcho(server)
			err := server.checkHello(tt.hello, nil)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got error %v; want %q", err, tt.want)
			}
			if tt.auth != nil && !errors.Is(err, tt.auth) {
				t.Errorf("got error %v; want %v", err, tt.auth)
			}
			// The one who is refused hears why.
			err = sendHello(dialRaw(t, server), tt.hello)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), "refused: "+tt.want)) {
				t.Errorf("got answer %v; want %q", err, tt.want)
			}
		})
	}
}

func TestNetworkCarriesConnections(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	type served struct {
		hello hello
		said  string
	}
	peers := make(chan served, 1)
	all.start(nodes...)
	nodes[1].servePeers(func(conn *peerConn) {
		said, _ := io.ReadAll(conn)
		peers <- served{conn.hello, string(said)}
	})

	for to, says := range map[string]hello{"node2#1": testHello, "node2": {kind: kindAsk, sender: "node1", target: "node2"}} {
		conn, err := nodes[0].dial(t.Context(), to, says.kind)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("to a peer")); err != nil {
			t.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		if got, want := <-peers, (served{says, "to a peer"}); got != want {
			t.Errorf("got %+v; want %+v", got, want)
		}
	}

	conn, err := streamLayer{nodes[0].network}.Dial("node2#1", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := streamLayer{nodes[1].network}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	go func() { _, _ = conn.Write([]byte("to raft")) }()
	got := make([]byte, len("to raft"))
	if _, err := io.ReadFull(accepted, got); err != nil || string(got) != "to raft" {
		t.Errorf("got %q, error %v; want to raft and none", got, err)
	}
	if got := (streamLayer{nodes[1].network}).Addr(); got.String() != "node2#1" || got.Network() != "node" {
		t.Errorf("got address %v of %v; want the server's name", got, got.Network())
	}
}

// answerDNS answers one question on conn, over TCP, with the addresses, if it is for those of IPv4.
func answerDNS(conn net.Conn, addrs ...netip.Addr) {
	defer conn.Close()
	var size [2]byte
	_, _ = io.ReadFull(conn, size[:])
	query := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, _ = io.ReadFull(conn, query)
	question := query[12 : 12+bytes.IndexByte(query[12:], 0)+5]
	if question[len(question)-3] != 1 { // not for an A record
		addrs = nil
	}
	answer := append(append(query[:2:2], 0x81, 0x80, 0, 1, 0, byte(len(addrs)), 0, 0, 0, 0), question...)
	for _, addr := range addrs {
		answer = append(append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4), addr.AsSlice()...)
	}
	_, _ = conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
}

// A name is reached by any of its addresses, also when those before it swallow packets.
func TestAllAddressesOfANameAreTried(t *testing.T) {
	checkLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	good, refuses, swallows := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.9"), netip.MustParseAddr("127.0.0.2")
	swallows2 := netip.MustParseAddr("127.0.0.3")
	for _, tt := range []struct {
		name  string
		addrs []netip.Addr
		err   string // "" for none
	}{
		{"the only one", []netip.Addr{good}, ""},
		{"the last of several", []netip.Addr{swallows, refuses, swallows2, good}, ""},
		{"the first of two", []netip.Addr{good, swallows}, ""},
		{"one refuses, one swallows", []netip.Addr{refuses, swallows}, "connection refused"},
		{"no address", nil, "no such host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &tcpPort{dialer: net.Dialer{
				Resolver: &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
					near, far := net.Pipe()
					go answerDNS(far, tt.addrs...)
					return near, nil
				}},
				ControlContext: func(ctx context.Context, _, addr string, _ syscall.RawConn) error {
					if strings.HasPrefix(addr, "127.0.0.2:") || strings.HasPrefix(addr, "127.0.0.3:") {
						<-ctx.Done()
						return ctx.Err()
					}
					return nil
				},
			}}
			ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
			defer cancel()
			conn, err := p.DialContext(ctx, "tcp", net.JoinHostPort("node2.example.", port))
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("got error %v; want %q", err, tt.err)
			}
			if conn != nil {
				_ = conn.Close()
			}
		})
	}
}

func TestNetworkThatCannotListen(t *testing.T) {
	_, nodes := newTestNet(t, "node1")
	p, err := listenForPeers(nodes[0].addr())
	if err == nil {
		_ = p.Close()
	}
	for _, want := range []string{nodes[0].addr(), "RAFT_PORT"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v; want one with %q", err, want)
		}
	}
}

// A connection has helloTimeout to say who it is, however busy it looks meanwhile.
func TestConnectionThatDoesNotSayWhoItIs(t *testing.T) {
	t.Parallel()
	all, nodes := newTestNet(t, "node1", "node2")
	all.startEcho(nodes...)
	silent, slow := dialRaw(t, nodes[1]), dialRaw(t, nodes[1])
	began := time.Now()
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := make(chan struct{})
	defer close(stop)
	wg.Go(func() { // a byte at a time, and more of them than there is time for
		ticker := time.NewTicker(helloTimeout / 10)
		defer ticker.Stop()
		for _, b := range testHello.encode() {
			if _, err := slow.Write([]byte{b}); err != nil {
				return
			}
			select {
			case <-ticker.C:
			case <-stop:
				return
			}
		}
	})
	for name, conn := range map[string]net.Conn{"silent": silent, "slow": slow} {
		if said := waitClosed(t, conn); len(said) > 0 {
			t.Errorf("%s: got answer %q; want none", name, said)
		}
		if open := time.Since(began); open < helloTimeout/2 || open > helloTimeout*2 {
			t.Errorf("%s: closed after %v; want about %v", name, open, helloTimeout)
		}
	}
	checkEcho(t, nodes[0], nodes[1])
}

// receiveHello takes the same time for one that says hello but does not hear the answer.
func TestConnectionThatDoesNotHearTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		directory := &testNetNode{server: "node2#1", cluster: "CLUSTER", all: &testNet{addrs: map[string]string{"node1": ""}}}
		n := &network{node: "node2", directory: directory}
		near, far := net.Pipe() // without a buffer, so the answer is not written before it is read
		defer near.Close()
		defer far.Close()
		go func() { _, _ = far.Write(testHello.encode()) }()
		began := time.Now()
		err := n.receiveHello(&peerConn{Conn: near, raw: near})
		if took := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || took != helloTimeout {
			t.Errorf("got error %v after %v; want %v after %v", err, took, os.ErrDeadlineExceeded, helloTimeout)
		}
	})
}

func TestNetworkGoesOnServingAfterGarbage(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	all.startEcho(nodes...)
	for name, garbage := range map[string][]byte{
		"http":           []byte("GET /key/a HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"zeros":          make([]byte, 1<<20),
		"another kind":   hello{kind: 'X', sender: "node1#1", target: "node2#1"}.encode(),
		"half a hello":   testHello.encode()[:12],
		"many megabytes": bytes.Repeat([]byte{0xff}, 8<<20),
	} {
		conn := dialRaw(t, nodes[1])
		_, _ = conn.Write(garbage) // it may be cut off while it writes
		_ = conn.(*net.TCPConn).CloseWrite()
		if said := waitClosed(t, conn); len(said) > 0 && name != "another kind" {
			t.Errorf("%s: got answer %q; want none", name, said)
		}
		checkEcho(t, nodes[0], nodes[1])
	}
	// What comes after a good hello goes to whoever serves it, so that may be anything.
	conn, err := nodes[0].dial(t.Context(), "node2#1", kindCall)
	if err != nil {
		t.Fatal(err)
	}
	checkEchoOn(t, conn)
	_ = conn.Close()
}

func TestTooManyConnectionsThatDoNotSayWhoTheyAre(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	all.startEcho(nodes...)
	established, err := nodes[0].dial(t.Context(), "node2#1", kindCall)
	if err != nil {
		t.Fatal(err)
	}
	defer established.Close()
	most := nodes[1].listener.maxConns
	idle := make([]net.Conn, most+500)
	for i := range idle {
		idle[i] = dialRaw(t, nodes[1])
	}
	waitFor(t, "all to be taken", func() bool { return nodes[1].refused() == len(idle)+1-most })
	if got := nodes[1].unheard(); got != most-1 {
		t.Errorf("got %d connections that have not said who they are; want %d, and the one that has", got, most-1)
	}
	checkEchoOn(t, established)      // those that have said who they are do not suffer
	checkEcho(t, nodes[0], nodes[1]) // nor who comes and says so
	for _, conn := range idle {
		_ = conn.Close()
	}
	waitFor(t, "room for others", func() bool { return nodes[1].unheard() == 0 })
	checkEcho(t, nodes[0], nodes[1])
}

// Whoever can reach the port cannot fill the log with its own failures: a load balancer that only looks whether the port is
// open is worth no warning, and all else one each warnInterval.
func TestRefusalsAreLoggedNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		log := hclog.New(&hclog.LoggerOptions{Output: lines, Level: hclog.Debug})
		n := &network{refusalLog: newRepeatLogger(log, warnInterval), refusals: newMetrics().refusals}
		worth := errors.New("no such node")
		began := time.Now()
		refused, all := 0, 0
		for time.Since(began) < time.Minute {
			for _, err := range []error{
				worth, io.EOF, fmt.Errorf("TLS: %w", io.ErrUnexpectedEOF), os.ErrDeadlineExceeded, syscall.ECONNRESET, errNoRaft,
			} {
				n.logRefusal("10.0.0.1:1", "node1#1", err)
				all++
				if errors.Is(err, worth) || errors.Is(err, errNoRaft) {
					refused++
				}
			}
			time.Sleep(time.Second)
		}
		if got := int(testutil.ToFloat64(n.refusals)); got != refused {
			t.Errorf("got %d counted; want %d", got, refused)
		}
		if got := lines.count("refused a connection"); got != all {
			t.Errorf("got %d lines; want %d", got, all)
		}
		if warned, first, later := lines.count("[WARN]"), lines.count("[WARN]", worth.Error()+"\"\n"),
			lines.count("[WARN]", worth.Error(), "left-out=9"); warned != 6 || first != 1 || later != 5 {
			t.Errorf("got %d warnings, of them %d with none left out and %d with nine; want 6, 1 and 5", warned, first, later)
		}
	})
}

func TestRefusalsAreCounted(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2", "node3")
	all.startEcho(nodes...)
	server := nodes[1]
	for name, h := range map[string]hello{
		"another cluster":       {kindRaft, "node1#1", "node2#1", "OTHER"},
		"a lost server":         {kindRaft, "node1#1", "node2#0", "CLUSTER"},
		"another node is meant": {kindRaft, "node3#1", "node1#1", "CLUSTER"},
		"a stranger":            {kindAsk, "node8", "node2", ""},
	} {
		if err := sendHello(dialRaw(t, server), h); err == nil {
			t.Errorf("%s: got no refusal; want one", name)
		}
	}
	conn := dialRaw(t, server)
	_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	waitClosed(t, conn)
	conn = dialRaw(t, server)
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // it is reset, not closed
		t.Fatal(err)
	}
	waitFor(t, "it to be taken", func() bool { return server.unheard() == 1 })
	_ = conn.Close()
	waitFor(t, "all to be logged", func() bool { return server.lines.count("refused a connection") == 6 })
	if got := server.refused(); got != 5 {
		t.Errorf("got %d counted; want all but the one that went away, 5", got)
	}
	waitFor(t, "all to be gone", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return len(server.conns) == 0
	})
}

func TestDialErrors(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	nodes[1].refusal = errNoRaft
	all.startEcho(nodes...)
	all.set("nobody listens", freeAddr(t))
	all.set("has another id", nodes[1].addr())
	all.set("no address", "no port here")
	silent, err := net.Listen("tcp", "127.0.0.1:0") // connections to it are made, and nobody takes them
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	all.set("is silent", silent.Addr().String())
	hangsUp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var hanging sync.WaitGroup
	defer hanging.Wait()
	defer hangsUp.Close()
	hanging.Go(func() {
		for {
			conn, err := hangsUp.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	})
	all.set("hangs up", hangsUp.Addr().String())
	ended, end := context.WithCancel(t.Context())
	end()

	for _, tt := range []struct {
		name, to, want string
		ctx            context.Context
		within         time.Duration
	}{
		{"an id that is not known", "node9#1", "address is not known", t.Context(), 0},
		{"nobody listens", "nobody listens#1", "refused", t.Context(), 0},
		{"an address that is none", "no address#1", "missing port", t.Context(), 0},
		{"another node is there", "has another id#1", `this is node "node2"`, t.Context(), 0},
		{"another server lives there", "node2#0", `node "node2" is server "node2#1" now`, t.Context(), 0},
		{"the node refuses", "node2#1", errNoRaft.Error(), t.Context(), 0},
		{"the node hangs up", "hangs up#1", "", t.Context(), 0},
		{"the context has ended", "node2#1", "cancel", ended, 0},
		{"the context ends while it waits for an answer", "is silent#1", "deadline exceeded", t.Context(), 50 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := tt.ctx
			if tt.within > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, tt.within)
				defer cancel()
			}
			began := time.Now()
			conn, err := nodes[0].dial(ctx, tt.to, kindRaft)
			unmade := new(dialError)
			if !errors.As(err, &unmade) || !strings.Contains(err.Error(), tt.want) || conn != nil {
				t.Errorf("got connection %v, error %v; want a *dialError with %q", conn, err, tt.want)
			} else if unmade.id != tt.to || !strings.Contains(err.Error(), tt.to) {
				t.Errorf("got error %v; want it to name node %q", err, tt.to)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("took %v; want it at once", took)
			}
		})
	}
	nodes[0].mu.Lock()
	defer nodes[0].mu.Unlock()
	if diff := cmp.Diff(0, len(nodes[0].conns)); diff != "" {
		t.Errorf("got %d connections left after dials that failed; want none", len(nodes[0].conns))
	}
}

func TestCloseEndsEverything(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	all.startEcho(nodes...)
	server := nodes[1]
	silent := dialRaw(t, server)
	waitFor(t, "the silent connection to be taken", func() bool { return server.unheard() == 1 })
	conns := map[string]net.Conn{"silent": silent}
	for name, kind := range map[string]byte{"served by peers": kindCall, "not yet taken by raft": kindRaft, "of raft": kindRaft} {
		conn, err := nodes[0].dial(t.Context(), "node2#1", kind)
		if err != nil {
			t.Fatal(err)
		}
		conns[name] = conn
	}
	ofRaft, err := streamLayer{server.network}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	own, err := server.dial(t.Context(), "node1#1", kindCall)
	if err != nil {
		t.Fatal(err)
	}
	conns["accepted by raft"], conns["made by it"] = ofRaft, own

	accepting := make(chan error, 1)
	began := time.Now()
	if err := server.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	go func() {
		conn, err := streamLayer{server.network}.Accept()
		if err == nil {
			_ = conn.Close()
		}
		accepting <- err
	}()
	if took := time.Since(began); took > helloTimeout/2 {
		t.Errorf("close took %v; want it at once", took)
	}
	for name, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: got error %v; want the connection closed", name, err)
		}
		_ = conn.Close()
	}
	if err := <-accepting; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: got error %v; want %v", err, net.ErrClosed)
	}
	unmade := new(dialError)
	if _, err := server.dial(t.Context(), "node1#1", kindCall); !errors.As(err, &unmade) || !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: got error %v; want a *dialError with %v", err, net.ErrClosed)
	}
	if _, err := nodes[0].dial(t.Context(), "node2#1", kindCall); !errors.As(err, &unmade) {
		t.Errorf("dial to it: got error %v; want a *dialError", err)
	}
	if err := server.Close(); err != nil {
		t.Errorf("close again: got error %v; want none", err)
	}
}
