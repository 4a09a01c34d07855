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
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

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

// Whoever can reach the port cannot fill the log: a load balancer that only looks whether the port is open is worth no
// warning. A node that was removed and runs on, or one that starts before the others have it in their list, is worth a
// handful, and then one an hour. They hide nothing of a node that belongs here.
func TestRefusalsAreLoggedNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		log := hclog.New(&hclog.LoggerOptions{Output: lines, Level: hclog.Debug})
		n := &network{
			refusalLog: newRepeatLogger(log, warnInterval, maxWarnInterval), refusals: newMetrics().refusals,
			directory: &testNetNode{all: &testNet{addrs: map[string]string{"node2": "host2:12000"}}},
		}
		stranger, foreign := errors.New("no such node"), errors.New("another cluster")
		refused, all := 0, 0
		say := func(sender string, errs ...error) {
			for _, err := range errs {
				n.logRefusal("10.0.0.1:1", sender, err)
				all++
				if errors.Is(err, stranger) || errors.Is(err, foreign) || errors.Is(err, errNoRaft) {
					refused++
				}
			}
			time.Sleep(time.Second)
		}
		warned := func(err error) int { return lines.count("[WARN]", err.Error()) }
		for began := time.Now(); time.Since(began) < 5*time.Hour; {
			say([]string{"node8", "node9#1", ""}[all%3], stranger, io.EOF, fmt.Errorf("TLS: %w", io.ErrUnexpectedEOF),
				os.ErrDeadlineExceeded, syscall.ECONNRESET, errNoRaft)
			if time.Since(began) == 2*time.Hour {
				if got := warned(stranger); got != 6 {
					t.Errorf("got %d warnings of strangers in 2 hours; want 6", got)
				}
				say("node2#1", foreign, foreign)
				if got := warned(foreign); got != 1 {
					t.Errorf("got %d warnings of a node that is known; want 1", got)
				}
			}
		}
		if got := int(testutil.ToFloat64(n.refusals)); got != refused {
			t.Errorf("got %d counted; want %d", got, refused)
		}
		if got := lines.count("refused a connection"); got != all {
			t.Errorf("got %d lines; want %d", got, all)
		}
		if got, later := warned(stranger), lines.count("[WARN]", "left-out=3599"); got != 9 || later < 3 {
			t.Errorf("got %d warnings of strangers, %d that leave an hour's out; want 9, 3", got, later)
		}
		time.Sleep(forgetAfter) // whatever it was, it is over
		for range 3 {
			say("node8", stranger)
		}
		if got := warned(stranger); got != 10 {
			t.Errorf("got %d warnings of strangers after a quiet time; want 10", got)
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
