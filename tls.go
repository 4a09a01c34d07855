package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
)

// certificates are this node's certificate, and the authority that must have signed those of its peers.
type certificates struct {
	own   tls.Certificate
	roots *x509.CertPool
}

// openCertificates returns this node's certificates, nil if it has none.
func openCertificates(cfg *Config, m *metrics, log hclog.Logger) (*reloaded[*certificates], error) {
	if cfg.TLSCertFile == "" {
		return nil, nil // no TLS is not an error
	}
	certs, err := newReloaded("certificates", log, func(contents [][]byte) (*certificates, error) {
		return parseCertificates(cfg, contents[0], contents[1], contents[2])
	}, cfg.TLSCertFile, cfg.TLSKeyFile, cfg.TLSCAFile)
	if err == nil {
		m.gauge("tls_certificate_expiry_seconds", "When the certificate in use expires, in Unix time.", func() float64 {
			return float64(certs.get().own.Leaf.NotAfter.Unix())
		})
	}
	return certs, err
}

// parseCertificates reads the contents of the three files, in PEM. It checks that this node's peers will accept what
// they say.
func parseCertificates(cfg *Config, cert, key, authority []byte) (*certificates, error) {
	own, err := tls.X509KeyPair(cert, key)
	if err != nil {
		err = fmt.Errorf("TLS_CERT_FILE and TLS_KEY_FILE: %w", err)
	}
	c := &certificates{own: own, roots: x509.NewCertPool()}
	if !c.roots.AppendCertsFromPEM(authority) {
		err = errors.Join(err, errors.New("TLS_CA_FILE holds no certificate in PEM"))
	}
	if err != nil {
		return nil, err
	}
	chain, err := x509.ParseCertificates(bytes.Join(own.Certificate, nil))
	if err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE: %w", err)
	}
	if err := c.verify(chain, x509.ExtKeyUsageServerAuth); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE is no server's certificate under TLS_CA_FILE: %w", err)
	}
	if len(cfg.Peers) == 1 && cfg.PeersFile == "" { // without peers, now and later
		return c, nil
	}
	if err := c.verify(chain, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE is no client's certificate under TLS_CA_FILE, "+
			"as which this node shows it to its peers: %w", err)
	}
	if cfg.RaftAdvertise == "" { // a node that has left the list: whether the certificate names its host is not known
		return c, nil
	}
	isNode := func(id string) bool { return slices.ContainsFunc(cfg.Peers, func(p Peer) bool { return p.ID == id }) }
	if err := checkNode(chain[0], cfg.NodeID, cfg.RaftAdvertise, isNode); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE: %w", err)
	}
	return c, nil
}

// verify returns an error unless the authority has signed a chain, the leaf first, for this usage.
func (c *certificates) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) error {
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: c.roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	return err
}

// checkNode returns an error unless a certificate is that of the node with this id and address. The id or the host
// must be among its subject alternative names, in full: a wildcard may have been signed for others. The host does not
// count when the certificate has ids of nodes: node1 and node2 may run on one host.
func checkNode(cert *x509.Certificate, id, addr string, isNode func(id string) bool) error {
	host, _, _ := net.SplitHostPort(addr)
	host = strings.TrimSuffix(host, ".")
	ip := net.ParseIP(host)
	isHost := func(name string) bool { return strings.EqualFold(name, host) }
	switch {
	case slices.Contains(cert.DNSNames, id):
		return nil
	case slices.ContainsFunc(cert.DNSNames, isNode): // of other nodes
	case ip != nil && slices.ContainsFunc(cert.IPAddresses, ip.Equal):
		return nil
	case ip == nil && slices.ContainsFunc(cert.DNSNames, isHost):
		return nil
	}
	return fmt.Errorf("the certificate is that of %q %v, and not of node %q: its id, or in a certificate without ids "+
		"its host %q, must be a subject alternative name", cert.DNSNames, cert.IPAddresses, id, host)
}

// serverConfig is for the Raft port. Both ends see each other's certificate; the hello says which node it must belong
// to.
func (c *certificates) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.own},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: c.roots,
		SessionTicketsDisabled: true, // a ticket would stay good after a change of the authority
	}
}

// clientConfig is for a connection to the Raft port of the node with this id, at this address.
func (c *certificates) clientConfig(id, addr string, isNode func(id string) bool) *tls.Config {
	host, _, _ := net.SplitHostPort(addr)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.own}, ServerName: host,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection checks the same, but accepts the id or the host
		VerifyConnection: func(state tls.ConnectionState) error {
			if err := c.verify(state.PeerCertificates, x509.ExtKeyUsageServerAuth); err != nil {
				return err
			}
			return checkNode(state.PeerCertificates[0], id, addr, isNode)
		},
	}
}

// webConfig is for the HTTP port, which asks clients for no certificate. A new connection gets the newest certificate.
// HTTP/2 is not offered: nothing here needs it.
func webConfig(certs *reloaded[*certificates]) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &certs.get().own, nil },
	}
}

// String returns whose the certificate is, and until when it is good.
func (c *certificates) String() string {
	leaf := c.own.Leaf
	until := leaf.NotAfter.UTC().Format(time.RFC3339)
	return fmt.Sprintf("certificate of %q %v, good until %s", leaf.DNSNames, leaf.IPAddresses, until)
}
