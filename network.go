package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	helloTimeout   = 3 * time.Second // for a connection to say who it is, and to be answered
	dialTimeout    = 2 * time.Second
	redialInterval = 100 * time.Millisecond
	warnInterval   = 10 * time.Second // between warnings of connections that were refused
)

// errNoRaft refuses Raft's messages and calls while this node runs no Raft.
var errNoRaft = errors.New("this node runs no Raft now; try again")

// Every connection to the Raft port begins with a hello, which says what it carries, who speaks, whom it is meant for and
// which cluster the speaker is of. Format: helloMagic, whose last byte is the version; the kind; sender, target and cluster
// id, each behind a byte of length. The answer is a byte of length and that many bytes of reason, none for welcome.
const helloMagic = "RSTRAFT\x02"

// What a connection carries. Raft's messages and calls pass only between servers of one cluster; nodes of any cluster, or of
// none, may ask one another who they are.
const (
	kindRaft byte = 'R' // Raft's own messages
	kindCall byte = 'C' // the calls of peers.go, all but opWho
	kindAsk  byte = 'A' // opWho
)

const maxName = 128 // bytes of a server's name or a cluster's id

type hello struct {
	kind           byte
	sender, target string // names of servers; for kindAsk ids of nodes
	cluster        string // of the sender; "" for kindAsk
}

func (h hello) encode() []byte {
	b := append([]byte(helloMagic), h.kind)
	for _, s := range []string{h.sender, h.target, h.cluster} {
		b = append(append(b, byte(len(s))), s...)
	}
	return b
}

// readHello takes exactly the bytes of the hello from r: what follows belongs to someone else.
func readHello(r io.Reader) (h hello, err error) {
	head := make([]byte, len(helloMagic)+1)
	if _, err := io.ReadFull(r, head); err != nil {
		return h, err
	}
	if head[0] == 0x16 { // that is how TLS begins
		return h, errors.New("no hello of this service, but TLS, which this node has not: set the TLS files on all nodes or on none")
	}
	if string(head[:len(helloMagic)]) != helloMagic {
		return h, errors.New("no hello of this service, or one of another version")
	}
	h.kind = head[len(helloMagic)]
	for _, s := range []*string{&h.sender, &h.target, &h.cluster} {
		if *s, err = readShort(r); err != nil {
			return h, err
		}
	}
	return h, nil
}

// readShort reads a byte of length and that many bytes.
func readShort(r io.Reader) (string, error) {
	var b [256]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return "", err
	}
	text := b[1 : 1+int(b[0])]
	_, err := io.ReadFull(r, text)
	return string(text), err
}

// port is where this node listens for its peers, and by which it connects to them.
type port interface {
	net.Listener
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
}

type tcpPort struct {
	net.Listener
	dialer net.Dialer
}

// DialContext tries all addresses of a name at once: net's own lets the first that swallows packets use up the time.
func (p *tcpPort) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	ips, err := p.dialer.Resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	conns, failed := make(chan net.Conn), make(chan error, len(ips))
	for _, ip := range ips {
		go func() { // until cancel at most
			conn, err := p.dialer.DialContext(ctx, network, net.JoinHostPort(ip.Unmap().String(), port))
			if err != nil {
				failed <- err
				return
			}
			select {
			case conns <- conn:
			case <-ctx.Done(): // another was quicker, or it comes too late
				_ = conn.Close()
				failed <- ctx.Err()
			}
		}()
	}
	var errs []error
	for range ips {
		select {
		case conn := <-conns:
			return conn, nil
		case err := <-failed:
			errs = append(errs, err)
		}
	}
	return nil, errors.Join(errs...)
}

// listenForPeers opens the Raft port; addr is host:port.
func listenForPeers(addr string) (port, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for peers on RAFT_ADDR:RAFT_PORT %s: %w", addr, err)
	}
	return &tcpPort{Listener: l}, nil
}

// directory is what network must know of this node and the others. Its methods are called by many goroutines.
type directory interface {
	// self returns which server this node is, and of which cluster: "" for none.
	self() (server, cluster string)
	// address says where a node listens, as host:port, and whether it is known at all.
	address(node string) (addr string, known bool)
	// welcome has the last word on a hello that is meant for this node and comes from a peer; an error refuses it.
	welcome(h hello) error
}

// network owns the Raft port and every connection between this node and its peers. It is the raft.StreamLayer of
// Raft's transport, in which a server's "address" is its name: where its node is now, the directory says at each dial.
type network struct {
	node      string
	port      port
	listener  *limiter // the port's; a connection keeps us waiting until it has said hello
	certs     *reloaded[*certificates]
	directory directory
	refusals  prometheus.Counter // of connections
	log       hclog.Logger

	raftConns chan accepted // for Raft's transport
	peerConns chan accepted // for peers
	closing   chan struct{} // closed by Close
	wg        sync.WaitGroup

	mu       sync.Mutex // guards what follows
	conns    map[*tracked]struct{}
	warned   time.Time // when a refusal was last logged as a warning
	unwarned int       // refusals since then that were worth one
}

// accepted is a connection that another node has made to this one, and the hello with which it did.
type accepted struct {
	net.Conn
	hello
}

// newNetwork takes connections at p, which it owns from then on, until Close. certs secure every connection; nil for
// none. Connections that are refused are counted by refusals.
func newNetwork(node string, p port, certs *reloaded[*certificates], d directory, refusals prometheus.Counter,
	log hclog.Logger,
) *network {
	n := &network{
		node: node, port: p, certs: certs, directory: d, refusals: refusals, log: log,
		listener:  newLimiter(p, min(maxRaftConns, maxFiles()/8), 0, refusals),
		raftConns: make(chan accepted),
		peerConns: make(chan accepted),
		closing:   make(chan struct{}),
		conns:     make(map[*tracked]struct{}),
	}
	if certs != nil {
		authority := certs.get().roots // of all connections that will be made, until followAuthority sees another
		n.wg.Go(func() { n.followAuthority(authority) })
	}
	n.wg.Go(n.run)
	return n
}

// run accepts connections until the listener is closed.
func (n *network) run() {
	for {
		conn, err := n.listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // out of file descriptors, say: it passes, or the operator sees it
			n.log.Error("accept on the Raft port", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		n.wg.Go(func() { n.receive(conn) })
	}
}

// receive hears the hello of an accepted connection and hands the connection to whom it is for.
func (n *network) receive(raw net.Conn) {
	conn, err := n.track(raw, "")
	if err != nil {
		return
	}
	conn, h, err := n.greet(conn)
	if err != nil {
		n.refuse(conn.RemoteAddr().String(), h, err)
		_ = conn.Close()
		return
	}
	raw.(*limited).served()
	takers := n.raftConns
	if h.kind != kindRaft {
		takers = n.peerConns
	}
	select {
	case takers <- accepted{conn, h}:
	case <-n.closing:
		_ = conn.Close()
	}
}

// greet reads the hello and answers it. It returns the connection to go on with.
func (n *network) greet(conn net.Conn) (net.Conn, hello, error) {
	if err := conn.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return conn, hello{}, err
	}
	var cert *x509.Certificate // the other node's
	if n.certs != nil {
		inner := tls.Server(conn, n.certs.get().toUs)
		if err := inner.HandshakeContext(context.Background()); err != nil { // the deadline ends it
			return conn, hello{}, fmt.Errorf("TLS: %w", err)
		}
		cert = inner.ConnectionState().PeerCertificates[0]
		conn = &secured{inner, conn}
	}
	h, err := readHello(conn)
	if err != nil {
		return conn, h, err
	}
	refused := n.judge(h, cert)
	reason := ""
	if refused != nil {
		reason = refused.Error()
		reason = reason[:min(len(reason), 255)]
	}
	if _, err := conn.Write(append([]byte{byte(len(reason))}, reason...)); err != nil {
		return conn, h, errors.Join(refused, err)
	}
	return conn, h, errors.Join(refused, conn.SetDeadline(time.Time{}))
}

// judge says why a hello is refused, if it is. Raft's messages carry neither target nor cluster, so what comes from a server
// of another cluster, what is meant for a state that this node has lost, and what is meant for whoever used to be at this
// address must be kept out here. Under TLS the sender must be the node that its certificate names: whoever else has one of
// the same authority is no peer.
func (n *network) judge(h hello, cert *x509.Certificate) error {
	server, cluster := n.directory.self()
	switch {
	case h.kind != kindRaft && h.kind != kindCall && h.kind != kindAsk:
		return fmt.Errorf("connection kind %q is not known", h.kind)
	case nodeOf(h.target) != n.node:
		return fmt.Errorf("this is node %q, not %q: does an address in PEERS belong to another node?", n.node, nodeOf(h.target))
	case h.kind != kindAsk && h.target != server:
		return fmt.Errorf("node %q is server %q now, not %q", n.node, server, h.target)
	}
	sender := nodeOf(h.sender)
	addr, known := n.directory.address(sender)
	if !known || sender == n.node {
		return fmt.Errorf("node %q is neither in the PEERS of node %q nor in its stored membership", sender, n.node)
	}
	if cert != nil {
		host, _, _ := net.SplitHostPort(addr)
		if err := names(cert, sender, host, n.knows); err != nil {
			return err
		}
	}
	if h.kind != kindAsk && (cluster == "" || h.cluster != cluster) {
		return fmt.Errorf("server %q is of cluster %q, server %q of cluster %q", h.sender, h.cluster, server, cluster)
	}
	return n.directory.welcome(h)
}

// knows says whether there is a node with this id.
func (n *network) knows(id string) bool {
	_, known := n.directory.address(id)
	return known
}

// refuse takes note of a connection that is refused, and warns of it, but not more often than each warnInterval:
// whoever can reach the port must not fill the log. Who comes a little early is for debugging, as is who says nothing or
// just goes away, which is no refusal.
func (n *network) refuse(remote string, h hello, err error) {
	gone := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, new(syscall.Errno))
	if !gone {
		n.refusals.Inc()
	}
	level, unwarned := hclog.Debug, 0
	if !gone && !errors.Is(err, errNoRaft) {
		n.mu.Lock()
		if time.Since(n.warned) >= warnInterval {
			level, unwarned = hclog.Warn, n.unwarned
			n.warned, n.unwarned = time.Now(), 0
		} else {
			n.unwarned++
		}
		n.mu.Unlock()
	}
	n.log.Log(level, "refused a connection to the Raft port", "remote", remote, "node", h.sender, "reason", err,
		"others-since-the-last-warning", unwarned)
}

// dialError is what dial returns: nothing has reached the peer's Raft or peer calls.
type dialError struct {
	id  string
	err error
}

func (e *dialError) Error() string { return fmt.Sprintf("connect to node %q: %v", e.id, e.err) }
func (e *dialError) Unwrap() error { return e.err }

// dial connects to a server by its name, or for kindAsk to a node by its id. Its host is looked up each time, so a node may
// move. Errors are *dialError.
func (n *network) dial(ctx context.Context, id string, kind byte) (net.Conn, error) {
	h := hello{kind: kind, sender: n.node, target: id}
	if kind != kindAsk {
		h.sender, h.cluster = n.directory.self()
	}
	conn, err := n.connect(ctx, h)
	if err != nil {
		return nil, &dialError{id, err}
	}
	return conn, nil
}

func (n *network) connect(ctx context.Context, h hello) (net.Conn, error) {
	addr, known := n.directory.address(nodeOf(h.target))
	if !known {
		return nil, errors.New("its address is not known")
	}
	raw, err := n.port.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	conn, err := n.track(raw, h.target)
	if err != nil {
		return nil, err
	}
	if n.certs != nil {
		host, _, _ := net.SplitHostPort(addr)
		inner := tls.Client(conn, n.certs.get().toPeer(nodeOf(h.target), host, n.knows))
		hurried, cancel := context.WithTimeout(ctx, helloTimeout)
		defer cancel()
		if err := inner.HandshakeContext(hurried); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("TLS: %w", err)
		}
		conn = &secured{inner, conn}
	}
	if err := introduce(ctx, conn, h); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// introduce says hello and hears whether it is welcome.
func introduce(ctx context.Context, conn net.Conn, h hello) error {
	deadline := time.Now().Add(helloTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := conn.Write(h.encode()); err != nil {
		return err
	}
	reason, err := readShort(conn)
	if err != nil {
		return fmt.Errorf("no answer to the hello: %w", err)
	}
	if reason != "" {
		return fmt.Errorf("refused: %s", reason)
	}
	return conn.SetDeadline(time.Time{})
}

// followAuthority closes every connection when there is another authority than the given one, until the network closes:
// whom the new one has not signed must not stay, and the others come back at once. A handshake takes the certificates
// when its connection is already tracked, so none goes by the old authority unseen.
func (n *network) followAuthority(authority *x509.CertPool) {
	for {
		select {
		case <-n.certs.changed:
		case <-n.closing:
			return
		}
		now := n.certs.get().roots
		if now.Equal(authority) {
			continue
		}
		authority = now
		n.log.Info("closing all connections to other nodes: there is another authority")
		n.mu.Lock()
		conns := slices.Collect(maps.Keys(n.conns))
		n.mu.Unlock()
		for _, conn := range conns {
			_ = conn.Close()
		}
	}
}

// tracked is a connection that network closes when it closes.
type tracked struct {
	net.Conn
	n      *network
	target string // the server, or node, that this one has called; "" for a connection that it has accepted
}

// Read hides the error of a connection that network has closed: its end was wanted.
func (t *tracked) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if errors.Is(err, net.ErrClosed) {
		err = io.EOF
	}
	return n, err
}

func (t *tracked) Close() error {
	t.n.mu.Lock()
	delete(t.n.conns, t)
	t.n.mu.Unlock()
	return t.Conn.Close()
}

// goUnlessClosed runs f in a goroutine that Close waits for, unless network is closing.
func (n *network) goUnlessClosed(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	select {
	case <-n.closing:
	default:
		n.wg.Go(f)
	}
}

// track takes conn over, and closes it if network is closing.
func (n *network) track(conn net.Conn, target string) (net.Conn, error) {
	t := &tracked{Conn: conn, n: n, target: target}
	n.mu.Lock()
	defer n.mu.Unlock()
	select {
	case <-n.closing:
		_ = conn.Close()
		return nil, net.ErrClosed
	default:
	}
	n.conns[t] = struct{}{}
	return t, nil
}

// closeOthers closes the connections that this node has made to servers that are neither among the members nor the leader:
// Raft's transport would keep those to a server that is gone.
func (n *network) closeOthers(members []member, leader string) {
	n.mu.Lock()
	var others []*tracked
	for conn := range n.conns {
		isServer := nodeOf(conn.target) != conn.target
		if isServer && conn.target != leader && !slices.ContainsFunc(members, func(m member) bool { return m.Server == conn.target }) {
			others = append(others, conn)
		}
	}
	n.mu.Unlock()
	for _, conn := range others {
		_ = conn.Close()
	}
}

// Close stops listening, closes every connection and waits for what served them.
func (n *network) Close() error {
	err := n.sever()
	n.wg.Wait()
	return err
}

// sever is Close without the wait.
func (n *network) sever() error {
	n.mu.Lock()
	select {
	case <-n.closing:
		n.mu.Unlock()
		return nil
	default:
	}
	close(n.closing)
	conns := n.conns
	n.conns = make(map[*tracked]struct{}) // so that closing them changes another map
	n.mu.Unlock()
	err := n.listener.Close()
	for conn := range conns {
		_ = conn.Close()
	}
	return err
}

// Accept, Addr and Dial make network a raft.StreamLayer.

// Accept returns the next connection that carries Raft's messages.
func (n *network) Accept() (net.Conn, error) {
	select {
	case conn := <-n.raftConns:
		return conn.Conn, nil
	case <-n.closing:
		return nil, net.ErrClosed
	}
}

// Addr returns this server's name.
func (n *network) Addr() net.Addr {
	server, _ := n.directory.self()
	return nodeAddr(server)
}

// Dial connects to the server whose name is given.
func (n *network) Dial(id raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return n.dial(ctx, string(id), kindRaft)
}

// nodeAddr is a node's id or a server's name where net and raft want an address.
type nodeAddr string

func (nodeAddr) Network() string  { return "node" }
func (a nodeAddr) String() string { return string(a) }
