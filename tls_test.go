package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"raftstarter/test/authority"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// secureWith gives a test's network, which is yet to be started, its certificates.
func (n *testNetNode) secureWith(t *testing.T, env map[string]string) {
	t.Helper()
	cfg := &Config{
		NodeID: n.id, RaftAdvertise: n.addr(), Peers: make([]Peer, 2),
		TLSCertFile: env["TLS_CERT_FILE"], TLSKeyFile: env["TLS_KEY_FILE"], TLSCAFile: env["TLS_CA_FILE"],
	}
	var err error
	if n.certs, err = openCertificates(cfg, newMetrics(), n.log); err != nil {
		t.Fatal(err)
	}
}

func TestCertificateNames(t *testing.T) {
	cert := &x509.Certificate{
		DNSNames:    []string{"node1", "Host1.example", "*.wild.example", "10.0.0.9"},
		IPAddresses: []net.IP{net.ParseIP("10.0.0.1"), net.ParseIP("fd00::1")},
	}
	for _, tt := range []struct {
		id, host string
		want     bool
	}{
		{"node1", "elsewhere", true},
		{"node2", "host1.EXAMPLE", true},
		{"node2", "host1.example.", true},
		{"node2", "10.0.0.1", true},
		{"node2", "fd00:0::1", true},
		{"node2", "elsewhere", false},
		{"Node1", "elsewhere", false},
		{"node", "example", false},
		{"node2", "a.wild.example", false},
		{"node2", "10.0.0.9", false}, // an address is no name
		{"node2", "10.0.0.2", false},
		{"", "", false},
	} {
		if err := checkNode(cert, tt.id, net.JoinHostPort(tt.host, "12000"), func(string) bool { return false }); (err == nil) != tt.want {
			t.Errorf("node %q at %q: got %v; want it named: %v", tt.id, tt.host, err, tt.want)
		}
		// Ids go before hosts, which nodes may share.
		if err := checkNode(cert, tt.id, net.JoinHostPort(tt.host, "12000"), func(id string) bool { return id == "node1" }); (err == nil) != (tt.id == "node1") {
			t.Errorf("node %q at %q: got %v of the certificate of node1; want it for that node only", tt.id, tt.host, err)
		}
	}
}

// Whoever is no peer is kept out before a byte of what it says reaches Raft or the peers' calls.
func TestOnlyPeersGetIn(t *testing.T) {
	ca, other := authority.New(t), authority.New(t)
	only := func(usage x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{usage} }
	}
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }
	hello1 := hello{kind: kindRaft, sender: "node1#1", target: "node2#1", cluster: "CLUSTER"}
	asks := hello{kind: kindAsk, sender: "node1", target: "node2"}
	for _, tt := range []struct {
		name string
		tls  *tls.Config // nil for none
		says hello
		log  string // of the refusal, "" for none
	}{
		{"a peer", ca.Client(ca.Node("node1")), hello1, ""},
		{"a peer's calls", ca.Client(ca.Node("node1")), testHello, ""},
		{"a peer's questions", ca.Client(ca.Node("node1")), asks, ""},
		{"no tls", nil, hello1, "TLS handshake"},
		{"no certificate", ca.Client(nil), hello1, "didn't provide a certificate"},
		{"another authority", ca.Client(other.Node("node1")), hello1, "unknown authority"},
		{"an expired certificate", ca.Client(ca.Issue(expired, "node1")), hello1, "expired"},
		{"a server's certificate", ca.Client(ca.Issue(only(x509.ExtKeyUsageServerAuth), "node1")), hello1, "incompatible key usage"},
		{"a client's certificate of the same authority", ca.Client(ca.Issue(only(x509.ExtKeyUsageClientAuth), "someone")), hello1, "someone"},
		{"another peer's certificate", ca.Client(ca.Node("node3")), hello1, `not of node \"node1\"`},
		{"another peer's certificate, to ask", ca.Client(ca.Node("node3")), asks, `not of node \"node1\"`},
		{"another peer's certificate with the host of all", ca.Client(ca.Node("node3", "127.0.0.1")), hello1, "node3"},
		{"a certificate of the server's name", ca.Client(ca.Node("node1#1")), hello1, `not of node \"node1\"`},
		{"a peer's certificate with its host alone", ca.Client(ca.Node("127.0.0.1")), hello1, ""},
		{"a wildcard", ca.Client(ca.Node("*", "*.0.0.1")), hello1, `not of node \"node1\"`},
		{"a stranger", ca.Client(ca.Node("node9")), hello{kindRaft, "node9#1", "node2#1", "CLUSTER"}, "node9"},
		{"ourselves", ca.Client(ca.Node("node2")), hello{kindRaft, "node2#1", "node2#1", "CLUSTER"}, "node2"},
		{"another cluster", ca.Client(ca.Node("node1")), hello{kindRaft, "node1#1", "node2#1", "OTHER"}, `of cluster \"OTHER\"`},
		{"another node is meant", ca.Client(ca.Node("node1")), hello{kindRaft, "node1#1", "node3#1", "CLUSTER"}, "this is node"},
		{"a lost server is meant", ca.Client(ca.Node("node1")), hello{kindRaft, "node1#1", "node2#0", "CLUSTER"}, "is server"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			all, nodes := newTestNet(t, "node1", "node2", "node3")
			server := nodes[1]
			server.secureWith(t, ca.Node("node2"))
			all.startEcho(server)
			accepted := make(chan net.Conn, 1)
			go func() {
				if conn, err := (streamLayer{server.network}).Accept(); err == nil {
					accepted <- conn
				}
			}()

			conn := dialRaw(t, server)
			if tt.tls != nil {
				tt.tls.InsecureSkipVerify = true // what the attacker thinks of us is not what this is about
				conn = tls.Client(conn, tt.tls)
			}
			err := sendHello(conn, tt.says)
			if tt.log == "" {
				if err != nil {
					t.Fatalf("got error %v; want none", err)
				}
				if tt.says.kind != kindRaft {
					checkEchoOn(t, conn)
				} else {
					_ = (<-accepted).Close()
				}
				return
			}
			if err == nil {
				t.Fatal("got a welcome; want none")
			}
			_, _ = conn.Write([]byte("what follows"))
			waitClosed(t, conn)
			waitFor(t, "the refusal to be counted", func() bool { return server.refused() == 1 })
			waitFor(t, "the refusal to be logged", func() bool { return server.lines.count("[WARN]", "refused", tt.log) == 1 })
			select {
			case <-accepted:
				t.Error("Raft got the connection; want it closed before")
			default:
			}
		})
	}
}

// Whoever sits at a peer's address without the peer's certificate hears nothing from us.
func TestImpostorHearsNothing(t *testing.T) {
	ca := authority.New(t)
	for name, impostor := range map[string]map[string]string{
		"a client's certificate":  ca.Node("someone"),
		"another peer's":          ca.Node("node3"),
		"of another authority":    authority.New(t).Node("node2"),
		"a client's, with our id": ca.Issue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, "node2"),
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			all, nodes := newTestNet(t, "node1")
			nodes[0].secureWith(t, ca.Node("node1"))
			all.startEcho(nodes...)
			l, err := tls.Listen("tcp", "127.0.0.1:0", func() *tls.Config {
				c := ca.Client(impostor)
				c.ClientAuth = tls.RequireAnyClientCert
				return c
			}())
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			all.set("node2", "localhost:"+strings.Split(l.Addr().String(), ":")[1])
			heard := make(chan []byte, 1)
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					said, _ := io.ReadAll(conn)
					_ = conn.Close()
					heard <- said
				}
			}()
			for to, kind := range map[string]byte{"node2#1": kindRaft, "node2": kindAsk} {
				if conn, err := nodes[0].dial(t.Context(), to, kind); err == nil {
					_ = conn.Close()
					t.Errorf("kind %c: got a connection; want none", kind)
				}
				if said := <-heard; len(said) > 0 {
					t.Errorf("kind %c: the impostor heard %q; want nothing", kind, said)
				}
			}
		})
	}
}

// A node without TLS and one with it do not get along, and both say why.
func TestTLSOnOneSideOnly(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	nodes[0].secureWith(t, authority.New(t).Node("node1"))
	all.startEcho(nodes...)
	for i, j := range []int{1, 0} {
		if conn, err := nodes[i].dial(t.Context(), nodes[j].server, kindRaft); err == nil {
			_ = conn.Close()
			t.Errorf("got a connection from %s to %s; want none", nodes[i].id, nodes[j].id)
		}
	}
	waitFor(t, "the one with TLS to say so", func() bool { return nodes[0].lines.count("[WARN]", "refused", "TLS handshake") == 1 })
	waitFor(t, "the one without to say so", func() bool { return nodes[1].lines.count("[WARN]", "refused", "which this node has not") == 1 })
}

// leafOf returns the certificate that a network shows.
func leafOf(t *testing.T, n *testNetNode) *x509.Certificate {
	t.Helper()
	conn := tls.Client(dialRaw(t, n), &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	defer conn.Close()
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return conn.ConnectionState().PeerCertificates[0]
}

func TestCertificatesAreReadAgain(t *testing.T) {
	checkLeaks(t)
	ca := authority.New(t)
	all, nodes := newTestNet(t, "node1", "node2")
	envs := []map[string]string{ca.Node("node1"), ca.Node("node2")}
	for i, node := range nodes {
		node.secureWith(t, envs[i])
	}
	all.startEcho(nodes...)
	old, err := nodes[0].dial(t.Context(), "node2#1", kindCall)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()

	// A renewed certificate is shown at the next handshake; what is connected stays so.
	before := leafOf(t, nodes[1])
	ca.Renew(envs[1], func(*x509.Certificate) {}, "node2")
	nodes[1].certs.reload(false)
	renewed := leafOf(t, nodes[1])
	if renewed.Equal(before) {
		t.Error("got the old certificate; want the renewed one")
	}
	checkEchoOn(t, old)
	checkEcho(t, nodes[0], nodes[1])

	// What is written again as it was changes nothing.
	for name, file := range envs[1] {
		content, err := os.ReadFile(file)
		if err := errors.Join(err, os.WriteFile(file, content, 0o600)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	now := nodes[1].certs.get()
	if nodes[1].certs.reload(false); nodes[1].certs.get() != now {
		t.Error("got other certificates out of the same bytes")
	}

	// A change for the worse changes nothing, and is logged once.
	for _, tt := range []struct {
		name  string
		worse func()
	}{
		{"no PEM", func() { authority.WritePEM(t, envs[1]["TLS_CERT_FILE"], "NOTHING", nil) }},
		{"expired", func() {
			ca.Renew(envs[1], func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) }, "node2")
		}},
		{"another node's", func() { ca.Renew(envs[1], func(*x509.Certificate) {}, "node3") }},
		{"a file for all", func() { _ = os.Chmod(envs[1]["TLS_KEY_FILE"], 0o666) }},
		{"no file", func() { _ = os.Remove(envs[1]["TLS_KEY_FILE"]) }},
	} {
		errorsBefore := nodes[1].lines.count("[ERROR]", "stays in use")
		tt.worse()
		for range 3 {
			nodes[1].certs.reload(false)
			if got := leafOf(t, nodes[1]); !got.Equal(renewed) {
				t.Errorf("%s: got certificate %v; want the one before", tt.name, got.DNSNames)
			}
		}
		if got := nodes[1].lines.count("[ERROR]", "stays in use") - errorsBefore; got != 1 {
			t.Errorf("%s: got %d errors in the log; want 1", tt.name, got)
		}
	}

	// A new authority counts at once, also for who is connected already.
	next := authority.New(t)
	next.Renew(envs[1], func(*x509.Certificate) {}, "node2")
	nodes[1].certs.reload(false)
	waitClosed(t, old)
	if conn, err := nodes[0].dial(t.Context(), "node2#1", kindCall); err == nil {
		_ = conn.Close()
		t.Error("got a connection with a certificate of the old authority; want none")
	}
	next.Renew(envs[0], func(*x509.Certificate) {}, "node1")
	nodes[0].certs.reload(false)
	waitFor(t, "node1 to close its connections, and to make one that stays", func() bool {
		conn, err := nodes[0].dial(t.Context(), "node2#1", kindCall)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil && nodes[0].lines.count("TLS_CA_FILE has changed") > 0
	})
	checkEcho(t, nodes[0], nodes[1])
}

// A reader takes what there is while files are read that hang.
func TestReloadedIsNotHeldUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	reading, goOn, n := make(chan struct{}), make(chan struct{}), 0
	r, err := newReloaded("test", hclog.NewNullLogger(), func([][]byte) (tokens, error) {
		if n++; n > 1 {
			close(reading)
			<-goOn
			return nil, errors.New("no good")
		}
		return make(tokens, 7), nil
	}, path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		r.reload(true)
		close(done)
	}()
	<-reading
	if got := len(r.get()); got != 7 {
		t.Errorf("got %d tokens; want 7", got)
	}
	close(goOn)
	<-done
	if got := len(r.get()); got != 7 {
		t.Errorf("after a change for the worse: got %d tokens; want 7", got)
	}
}

// What could not be used yet is used when it can be, though the file is the same: a certificate may be of a clock that is ahead.
func TestReloadedWhenItBecomesGood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write := func(content string) {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("old")
	valid := false
	r, err := newReloaded("test", hclog.NewNullLogger(), func(contents [][]byte) (tokens, error) {
		if string(contents[0]) == "new" && !valid {
			return nil, errors.New("it is not valid yet")
		}
		return make(tokens, len(contents[0])-2), nil
	}, path)
	if err != nil {
		t.Fatal(err)
	}
	write("new")
	r.reload(false)
	r.reload(false)
	select {
	case <-r.changed:
		t.Error("it was taken before it was valid")
	default:
	}
	valid = true
	r.reload(false)
	select {
	case <-r.changed:
	default:
		t.Error("it is valid now, and was not taken")
	}
	r.reload(false)
	if len(r.changed) > 0 {
		t.Error("it was taken again")
	}
}

// A certificate ends while it is in use, and nobody has touched its file.
func TestReloadedWhenItBecomesBad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	expired := error(nil)
	r, err := newReloaded("test", hclog.New(&hclog.LoggerOptions{Output: &log}), func([][]byte) (tokens, error) {
		return nil, expired
	}, path)
	if err != nil {
		t.Fatal(err)
	}
	r.reload(false)
	expired = errors.New("it has expired")
	for range 3 {
		r.reload(false)
	}
	if got := log.String(); strings.Count(got, "it has expired") != 1 || !strings.Contains(got, "[ERROR]") {
		t.Errorf("got the log %q; want one error", got)
	}
}

// A cluster under TLS does what it does without, through connections that are cut as through those that are not.
func TestClusterUnderTLS(t *testing.T) {
	ca := authority.New(t)
	c := unstartedCluster(t, 3, storeMemory)
	for i, node := range c.nodes {
		env := ca.Node(node.cfg.NodeID)
		node.cfg.TLSCertFile, node.cfg.TLSKeyFile, node.cfg.TLSCAFile = env["TLS_CERT_FILE"], env["TLS_KEY_FILE"], env["TLS_CA_FILE"]
		c.start(i)
	}
	leader := c.leader()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	big := `"` + strings.Repeat("x", 1<<20) + `"`
	for i, node := range c.nodes {
		if _, err := node.client.set(ctx, node.cfg.NodeID, big); err != nil {
			t.Errorf("write through node %d: %v", i+1, err)
		}
	}
	for _, node := range c.nodes {
		for _, other := range c.nodes {
			if item, err := node.client.get(ctx, other.cfg.NodeID, Linearizable); err != nil || item.Value != big {
				t.Errorf("read through %s: got %d bytes, %v; want %d", node.cfg.NodeID, len(item.Value), err, len(big))
			}
		}
	}
	c.cut(leader, linkCut)
	next := c.leader(c.followers(leader)...)
	if _, err := c.nodes[next].client.set(ctx, "after", "1"); err != nil {
		t.Errorf("write after the leader was cut off: %v", err)
	}
	c.cut(leader, linkOpen)
	if item, err := c.nodes[leader].client.get(ctx, "after", Linearizable); err != nil || item.Value != "1" {
		t.Errorf("read through the old leader: got %q, %v; want 1", item.Value, err)
	}

	// A second authority beside the first has all connections made anew. A write that was being forwarded on one of them
	// has an unknown outcome; all others succeed.
	leader = c.leader()
	term, another := c.nodes[leader].State().Term, authority.New(t)
	for _, node := range c.nodes {
		both := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})
		both = append(both, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: another.Cert.Raw})...)
		if err := os.WriteFile(node.cfg.TLSCAFile, both, 0o600); err != nil {
			t.Fatal(err)
		}
		node.certs.reload(false)
	}
	began := time.Now()
	for i, node := range c.nodes {
		_, err := node.client.set(ctx, "rotated", "1")
		if errors.Is(err, ErrUnknownOutcome) {
			_, err = node.client.set(ctx, "rotated", "1")
		}
		if err != nil {
			t.Errorf("write through node %d under the new authority: %v", i+1, err)
		}
	}
	if took, now := time.Since(began), c.nodes[leader].State(); took > time.Second || now.Term != term {
		t.Errorf("got writes after %v in term %d; want them at once in term %d", took, now.Term, term)
	}
}

// A handshake that began under an authority that has been replaced since leads to nothing.
func TestAuthorityChangesDuringAHandshake(t *testing.T) {
	checkLeaks(t)
	all, nodes := newTestNet(t, "node1", "node2")
	env := authority.New(t).Node("node2")
	nodes[1].secureWith(t, env)
	all.startEcho(nodes...)
	conn := dialRaw(t, nodes[1]) // that says nothing yet
	waitFor(t, "the connection to be accepted", func() bool {
		nodes[1].mu.Lock()
		defer nodes[1].mu.Unlock()
		return len(nodes[1].conns) == 1
	})
	authority.New(t).Renew(env, func(*x509.Certificate) {}, "node2")
	nodes[1].certs.reload(false)
	began := time.Now()
	waitClosed(t, conn)
	if took := time.Since(began); took > helloTimeout/2 {
		t.Errorf("got the connection closed after %v; want it at once", took)
	}
}
