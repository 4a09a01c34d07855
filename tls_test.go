package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// testCA is an authority that signs certificates for tests.
type testCA struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newTestCA(t testing.TB) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca := &testCA{t: t, key: key, file: filepath.Join(t.TempDir(), "ca.pem")}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	writePEM(t, ca.file, "CERTIFICATE", der)
	return ca
}

func writePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// node makes a certificate with these names and returns the environment of a node with it.
func (ca *testCA) node(names ...string) map[string]string {
	return ca.issue(func(*x509.Certificate) {}, names...)
}

// issue is node for a certificate that is changed before it is signed.
func (ca *testCA) issue(change func(*x509.Certificate), names ...string) map[string]string {
	ca.t.Helper()
	dir := ca.t.TempDir()
	env := map[string]string{
		"TLS_CERT_FILE": filepath.Join(dir, "cert.pem"), "TLS_KEY_FILE": filepath.Join(dir, "key.pem"), "TLS_CA_FILE": filepath.Join(dir, "ca.pem"),
	}
	ca.renew(env, change, names...)
	return env
}

// renew puts another certificate into the files of a node.
func (ca *testCA) renew(env map[string]string, change func(*x509.Certificate), names ...string) {
	ca.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		ca.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: names[0]},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(12 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.t.Fatal(err)
	}
	writePEM(ca.t, env["TLS_KEY_FILE"], "PRIVATE KEY", keyDER)
	writePEM(ca.t, env["TLS_CERT_FILE"], "CERTIFICATE", der)
	writePEM(ca.t, env["TLS_CA_FILE"], "CERTIFICATE", ca.cert.Raw)
}

// client returns what a client needs that trusts the authority, and shows the certificate of env if that is not nil.
func (ca *testCA) client(env map[string]string) *tls.Config {
	ca.t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	c.RootCAs.AddCert(ca.cert)
	if env != nil {
		pair, err := tls.LoadX509KeyPair(env["TLS_CERT_FILE"], env["TLS_KEY_FILE"])
		if err != nil {
			ca.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

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
	ca, other := newTestCA(t), newTestCA(t)
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
		{"a peer", ca.client(ca.node("node1")), hello1, ""},
		{"a peer's calls", ca.client(ca.node("node1")), testHello, ""},
		{"a peer's questions", ca.client(ca.node("node1")), asks, ""},
		{"no tls", nil, hello1, "TLS handshake"},
		{"no certificate", ca.client(nil), hello1, "didn't provide a certificate"},
		{"another authority", ca.client(other.node("node1")), hello1, "unknown authority"},
		{"an expired certificate", ca.client(ca.issue(expired, "node1")), hello1, "expired"},
		{"a server's certificate", ca.client(ca.issue(only(x509.ExtKeyUsageServerAuth), "node1")), hello1, "incompatible key usage"},
		{"a client's certificate of the same authority", ca.client(ca.issue(only(x509.ExtKeyUsageClientAuth), "someone")), hello1, "someone"},
		{"another peer's certificate", ca.client(ca.node("node3")), hello1, `not of node \"node1\"`},
		{"another peer's certificate, to ask", ca.client(ca.node("node3")), asks, `not of node \"node1\"`},
		{"another peer's certificate with the host of all", ca.client(ca.node("node3", "127.0.0.1")), hello1, "node3"},
		{"a certificate of the server's name", ca.client(ca.node("node1#1")), hello1, `not of node \"node1\"`},
		{"a peer's certificate with its host alone", ca.client(ca.node("127.0.0.1")), hello1, ""},
		{"a wildcard", ca.client(ca.node("*", "*.0.0.1")), hello1, `not of node \"node1\"`},
		{"a stranger", ca.client(ca.node("node9")), hello{kindRaft, "node9#1", "node2#1", "CLUSTER"}, "node9"},
		{"ourselves", ca.client(ca.node("node2")), hello{kindRaft, "node2#1", "node2#1", "CLUSTER"}, "node2"},
		{"another cluster", ca.client(ca.node("node1")), hello{kindRaft, "node1#1", "node2#1", "OTHER"}, `of cluster \"OTHER\"`},
		{"another node is meant", ca.client(ca.node("node1")), hello{kindRaft, "node1#1", "node3#1", "CLUSTER"}, "this is node"},
		{"a lost server is meant", ca.client(ca.node("node1")), hello{kindRaft, "node1#1", "node2#0", "CLUSTER"}, "is server"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			all, nodes := newTestNet(t, "node1", "node2", "node3")
			server := nodes[1]
			server.secureWith(t, ca.node("node2"))
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
	ca := newTestCA(t)
	for name, impostor := range map[string]map[string]string{
		"a client's certificate":  ca.node("someone"),
		"another peer's":          ca.node("node3"),
		"of another authority":    newTestCA(t).node("node2"),
		"a client's, with our id": ca.issue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, "node2"),
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			all, nodes := newTestNet(t, "node1")
			nodes[0].secureWith(t, ca.node("node1"))
			all.startEcho(nodes...)
			l, err := tls.Listen("tcp", "127.0.0.1:0", func() *tls.Config {
				c := ca.client(impostor)
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
	nodes[0].secureWith(t, newTestCA(t).node("node1"))
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
	ca := newTestCA(t)
	all, nodes := newTestNet(t, "node1", "node2")
	envs := []map[string]string{ca.node("node1"), ca.node("node2")}
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
	ca.renew(envs[1], func(*x509.Certificate) {}, "node2")
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
		{"no PEM", func() { writePEM(t, envs[1]["TLS_CERT_FILE"], "NOTHING", nil) }},
		{"expired", func() {
			ca.renew(envs[1], func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) }, "node2")
		}},
		{"another node's", func() { ca.renew(envs[1], func(*x509.Certificate) {}, "node3") }},
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
	next := newTestCA(t)
	next.renew(envs[1], func(*x509.Certificate) {}, "node2")
	nodes[1].certs.reload(false)
	waitClosed(t, old)
	if conn, err := nodes[0].dial(t.Context(), "node2#1", kindCall); err == nil {
		_ = conn.Close()
		t.Error("got a connection with a certificate of the old authority; want none")
	}
	next.renew(envs[0], func(*x509.Certificate) {}, "node1")
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

// A cluster under TLS does what it does without, through connections that are cut as through those that are not.
func TestClusterUnderTLS(t *testing.T) {
	ca := newTestCA(t)
	c := unstartedCluster(t, 3, storeMemory)
	for i, node := range c.nodes {
		env := ca.node(node.cfg.NodeID)
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
	term, another := c.nodes[leader].State().Term, newTestCA(t)
	for _, node := range c.nodes {
		both := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
		both = append(both, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: another.cert.Raw})...)
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
	env := newTestCA(t).node("node2")
	nodes[1].secureWith(t, env)
	all.startEcho(nodes...)
	conn := dialRaw(t, nodes[1]) // that says nothing yet
	waitFor(t, "the connection to be accepted", func() bool {
		nodes[1].mu.Lock()
		defer nodes[1].mu.Unlock()
		return len(nodes[1].conns) == 1
	})
	newTestCA(t).renew(env, func(*x509.Certificate) {}, "node2")
	nodes[1].certs.reload(false)
	began := time.Now()
	waitClosed(t, conn)
	if took := time.Since(began); took > helloTimeout/2 {
		t.Errorf("got the connection closed after %v; want it at once", took)
	}
}
