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
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	helloTimeout   = 3 * time.Second // for TLS and the hello of a connection, until the answer is there
	dialTimeout    = 2 * time.Second
	redialInterval = 100 * time.Millisecond

	// Between two warnings about refused connections of the same node. The time grows from the one to the other.
	warnInterval, maxWarnInterval = 10 * time.Second, time.Hour
)

// port is where this node listens for its peers, and how it connects to them. The simulation has one in memory.
type port interface {
	net.Listener
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
}

type tcpPort struct {
	net.Listener
	dialer net.Dialer
}

// listenForPeers opens the Raft port; addr is host:port.
func listenForPeers(addr string) (port, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for peers on RAFT_ADDR:RAFT_PORT %s: %w", addr, err)
	}
	return &tcpPort{Listener: l}, nil
}

// DialContext dials all addresses of a name at once and returns the first connection. net.Dialer dials one after the
// other: an address that does not answer would use up the time of those after it.
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
	var wg sync.WaitGroup
	first, errs := make(chan net.Conn, 1), make([]error, len(ips))
	for i, ip := range ips {
		wg.Go(func() {
			conn, err := p.dialer.DialContext(ctx, network, net.JoinHostPort(ip.Unmap().String(), port))
			if err != nil {
				errs[i] = err
				return
			}
			select {
			case first <- conn:
				cancel() // ends the other attempts at once
			default:
				_ = conn.Close()
			}
		})
	}
	wg.Wait()
	select {
	case conn := <-first:
		return conn, nil
	default:
		return nil, errors.Join(errs...)
	}
}

// errNoRaft refuses Raft's messages and calls while this node runs no Raft. Its text travels to the other node.
var errNoRaft = errors.New("this node runs no Raft now; try again")

// directory is what network must know of this node and the others. The Store is one. Many goroutines call its methods.
type directory interface {
	// self returns this node's server and its cluster, "" for none.
	self() (server, cluster string)
	// address returns where a node listens, as host:port, and whether that is known.
	address(node string) (addr string, known bool)
	// authorize checks last whether a connection with a hello from a known peer is accepted; an error refuses it.
	authorize(h hello) error
}

// network owns the Raft port and every connection between this node and its peers. It accepts a connection once its
// hello has been checked, and passes it on to Raft's transport or to peers.
type network struct {
	node       string
	port       port
	listener   *connLimiter             // the port's; it waits for a connection until its hello has come
	certs      *reloaded[*certificates] // nil for no TLS
	directory  directory
	refusals   prometheus.Counter // of connections
	log        hclog.Logger
	refusalLog *repeatLogger
	stranger   atomic.Pointer[stranger]

	raftConns chan *peerConn  // accepted, for Raft's transport
	callConns chan *peerConn  // accepted, for peers
	ctx       context.Context // ended by Close
	cancel    context.CancelFunc
	wg        sync.WaitGroup // of what serves connections

	mu    sync.Mutex // guards conns; ctx ends while it is held
	conns map[*peerConn]struct{}
}

// stranger is a node that this one does not know, and that has asked who it is.
type stranger struct {
	node string
	at   time.Time
}

// newNetwork accepts connections at p, which it owns from then on, until Close. certs secure every connection; nil
// means no TLS. refusals counts the connections that are refused.
func newNetwork(node string, p port, certs *reloaded[*certificates], d directory, refusals prometheus.Counter,
	log hclog.Logger,
) *network {
	n := &network{
		node: node, port: p, certs: certs, directory: d, refusals: refusals, log: log,
		listener:   newConnLimiter(p, min(maxRaftConns, maxFiles()/8), 0, refusals),
		refusalLog: newRepeatLogger(log, warnInterval, maxWarnInterval),
		raftConns:  make(chan *peerConn),
		callConns:  make(chan *peerConn),
		conns:      make(map[*peerConn]struct{}),
	}
	n.stranger.Store(new(stranger))
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if certs != nil {
		roots := certs.get().roots // read here: later it may have changed already
		n.wg.Go(func() { n.closeOnNewAuthority(roots) })
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
		case err != nil: // no file descriptor is free, for example: that passes, or the operator sees it
			n.log.Error("accept on the Raft port", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		n.wg.Go(func() { n.receive(conn) })
	}
}

// receive checks the hello of a connection that another node has made, and passes the connection on.
func (n *network) receive(raw net.Conn) {
	conn, err := n.track(raw, "")
	if err != nil {
		return
	}
	if err := n.receiveHello(conn); err != nil {
		n.logRefusal(conn.RemoteAddr().String(), conn.hello.sender, err)
		_ = conn.Close()
		return
	}
	raw.(*limitedConn).endWait()
	conns := n.callConns
	if conn.hello.kind == kindRaft {
		conns = n.raftConns
	}
	select {
	case conns <- conn:
	case <-n.ctx.Done():
		_ = conn.Close()
	}
}

// receiveHello secures an accepted connection, reads its hello and answers it. An error refuses the connection.
func (n *network) receiveHello(conn *peerConn) error {
	if err := conn.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	var cert *x509.Certificate // the other node's
	if n.certs != nil {
		secured := tls.Server(conn.raw, n.certs.get().serverConfig())
		if err := secured.HandshakeContext(n.ctx); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
		cert = secured.ConnectionState().PeerCertificates[0]
		conn.Conn = secured
	}
	var err error
	if conn.hello, err = readHello(conn); err != nil {
		return err
	}
	refused, reason := n.checkHello(conn.hello, cert), ""
	if refused != nil {
		reason = refused.Error()
		reason = reason[:min(len(reason), 255)]
	}
	if _, err := conn.Write(append([]byte{byte(len(reason))}, reason...)); err != nil {
		return errors.Join(refused, err)
	}
	return errors.Join(refused, conn.SetDeadline(time.Time{}))
}

// checkHello returns why a hello is refused, nil if it is not. Raft's messages name neither their target nor their
// cluster, so what is meant for somebody else must be kept out here. Three examples: node2 lost its state and is
// another server now, and node1 still sends to the one before; node2's address was given to node4; a node of another
// cluster has an old PEERS. Under TLS the certificate must be that of the sender's node. Others that the same
// authority signed are no peers.
func (n *network) checkHello(h hello, cert *x509.Certificate) error {
	server, cluster := n.directory.self()
	switch {
	case h.kind != kindRaft && h.kind != kindCall && h.kind != kindAsk:
		return fmt.Errorf("connection kind %q is not known", h.kind)
	case nodeOf(h.target) != n.node:
		return fmt.Errorf("this is node %q, not %q: does an address in PEERS belong to another node?",
			n.node, nodeOf(h.target))
	case h.kind != kindAsk && h.target != server:
		return fmt.Errorf("node %q is server %q now, not %q", n.node, server, h.target)
	}
	sender := nodeOf(h.sender)
	addr, known := n.directory.address(sender)
	if !known || sender == n.node {
		if !known && h.kind == kindAsk {
			n.stranger.Store(&stranger{sender, time.Now()})
		}
		return fmt.Errorf("node %q is neither in the PEERS of node %q nor in its stored membership", sender, n.node)
	}
	if cert != nil {
		if err := checkNode(cert, sender, addr, n.isNode); err != nil {
			return err
		}
	}
	if h.kind != kindAsk && (cluster == "" || h.cluster != cluster) {
		return fmt.Errorf("server %q is of cluster %q, server %q of cluster %q", h.sender, h.cluster, server, cluster)
	}
	return n.directory.authorize(h)
}

// isNode says whether there is a node with this id.
func (n *network) isNode(id string) bool {
	_, known := n.directory.address(id)
	return known
}

// logRefusal counts and logs a refused connection. Whoever can reach the port must not be able to fill the log, so
// there are a handful of warnings of each node that this one knows, and of all others together, and then one each
// maxWarnInterval. Two cases are logged for debugging only: the other end said nothing or
// went away, which is not counted as a refusal; and this node does not run Raft yet.
func (n *network) logRefusal(remote, sender string, err error) {
	gone := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, new(syscall.Errno))
	if !gone {
		n.refusals.Inc()
	}
	level := hclog.Warn
	if gone || errors.Is(err, errNoRaft) {
		level = hclog.Debug
	}
	node := nodeOf(sender)
	if !n.isNode(node) {
		node = ""
	}
	n.refusalLog.logAbout(node, level, "refused a connection to the Raft port",
		"remote", remote, "node", sender, "reason", err)
}

// dialError is the error of dial: nothing has reached the peer's Raft, nor those who serve its calls.
type dialError struct {
	id  string
	err error
}

func (e *dialError) Error() string { return fmt.Sprintf("connect to node %q: %v", e.id, e.err) }
func (e *dialError) Unwrap() error { return e.err }

// dial connects to a server by its name, or for kindAsk to a node by its id. It looks the node's address up each
// time, so a node may move. Its errors are *dialError.
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

// connect makes a connection to h.target's node and sends h.
func (n *network) connect(ctx context.Context, h hello) (*peerConn, error) {
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
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // which ends what the next lines wait for
	if n.certs != nil {
		secured := tls.Client(raw, n.certs.get().clientConfig(nodeOf(h.target), addr, n.isNode))
		if err = secured.HandshakeContext(ctx); err != nil {
			err = fmt.Errorf("TLS: %w", err)
		}
		conn.Conn = secured
	}
	if err == nil {
		err = sendHello(conn, h)
	}
	if !stop() { // ctx has ended
		err = fmt.Errorf("no answer to the hello: %w", ctx.Err())
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// peerConn is a connection between this node and another one.
type peerConn struct {
	net.Conn // to read and write: raw, or TLS over it
	raw      net.Conn
	network  *network
	hello    hello  // that the other node has sent
	target   string // the server or node to which this node has made the connection; "" for an accepted one
}

// Read makes a plain end of two errors: this node has closed the connection, or the other node has closed it without
// TLS's closing alert. What travels here says itself where it ends.
func (c *peerConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}

// Close leaves TLS's closing alert out: sending it could wait for a peer that does not read.
func (c *peerConn) Close() error {
	c.network.mu.Lock()
	delete(c.network.conns, c)
	c.network.mu.Unlock()
	return c.raw.Close()
}

// track makes a peerConn of a connection, which closeConns and Close close then. If the network is closed already, it
// closes the connection and returns net.ErrClosed.
func (n *network) track(raw net.Conn, target string) (*peerConn, error) {
	c := &peerConn{Conn: raw, raw: raw, network: n, target: target}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ctx.Err() != nil {
		_ = raw.Close()
		return nil, net.ErrClosed
	}
	n.conns[c] = struct{}{}
	return c, nil
}

// closeConns closes the connections with a matching target: the server or node to which this node has made the
// connection, "" for one that another node has made.
func (n *network) closeConns(match func(target string) bool) {
	n.mu.Lock()
	conns := slices.Collect(maps.Keys(n.conns))
	n.mu.Unlock()
	for _, c := range conns {
		if match(c.target) {
			_ = c.Close()
		}
	}
}

// closeOthers closes the connections that this node has made to servers that are neither members nor the leader. Raft's
// transport would keep them open for ever.
func (n *network) closeOthers(members []member, leader string) {
	n.closeConns(func(target string) bool {
		isServer := nodeOf(target) != target
		isMember := slices.ContainsFunc(members, func(m member) bool { return m.Server == target })
		return isServer && !isMember && target != leader
	})
}

// closeOnNewAuthority closes every connection when TLS_CA_FILE has changed, until the network closes. Peers that the
// new authority has signed connect again at once; the others must not stay. A handshake reads the certificates after
// its connection is tracked, so a connection made under the old authority is always among those that are closed.
func (n *network) closeOnNewAuthority(roots *x509.CertPool) {
	for {
		select {
		case <-n.certs.changed:
		case <-n.ctx.Done():
			return
		}
		if now := n.certs.get().roots; !now.Equal(roots) {
			roots = now
			n.log.Info("closing all connections to other nodes: TLS_CA_FILE has changed")
			n.closeConns(func(string) bool { return true })
		}
	}
}

// Close stops listening, closes every connection and waits for the goroutines that served them.
func (n *network) Close() error {
	err := n.closeNow()
	n.wg.Wait()
	return err
}

// closeNow is Close without the wait.
func (n *network) closeNow() error {
	n.mu.Lock()
	closed := n.ctx.Err() != nil
	n.cancel()
	n.mu.Unlock()
	if closed {
		return nil
	}
	err := n.listener.Close()
	n.closeConns(func(string) bool { return true })
	return err
}
