package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
)

// certificates are this node's certificate and the authority that its peers' must be signed by.
type certificates struct {
	own   tls.Certificate
	roots *x509.CertPool
	// web is for the HTTP port: the client sees who we are. HTTP/2, of which nothing here has need, is not spoken.
	web *tls.Config
	// toUs is for the Raft port: both see who the other is.
	toUs *tls.Config
}

// parseCertificates makes certificates of what their three files hold, in PEM, and checks that this node's peers will
// take them for its own.
func parseCertificates(cfg *Config, cert, key, authority []byte) (*certificates, error) {
	own, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE and TLS_KEY_FILE: %w", err)
	}
	c := &certificates{own: own, roots: x509.NewCertPool()}
	if !c.roots.AppendCertsFromPEM(authority) {
		return nil, errors.New("TLS_CA_FILE holds no certificate in PEM")
	}
	c.web = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own}, NextProtos: []string{"http/1.1"},
	}
	c.toUs = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: c.roots,
		SessionTicketsDisabled: true, // a ticket would outlive a change of the authority
	}
	var chain []*x509.Certificate
	for _, der := range c.own.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("TLS_CERT_FILE: %w", err)
		}
		chain = append(chain, cert)
	}
	if err := c.verify(chain, x509.ExtKeyUsageServerAuth); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE is no server's certificate under TLS_CA_FILE: %w", err)
	}
	if len(cfg.Peers) == 1 {
		return c, nil
	}
	if err := c.verify(chain, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE is no client's certificate under TLS_CA_FILE, as which this node shows it to its peers: %w", err)
	}
	host, _, _ := net.SplitHostPort(cfg.RaftAdvertise)
	isNode := func(id string) bool { return slices.ContainsFunc(cfg.Peers, func(p Peer) bool { return p.ID == id }) }
	if err := names(chain[0], cfg.NodeID, host, isNode); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE: %w", err)
	}
	return c, nil
}

// verify says whether a chain, the leaf first, leads to the authority.
func (c *certificates) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) error {
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: c.roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}})
	return err
}

// names says whether a certificate is that of the node with this id and host: one of them must be a subject alternative
// name of it, as it is. A wildcard is nobody's own, and the authority may have signed it for others. Nor is a host that
// several nodes share: a certificate with ids of nodes among its names is that of those nodes only.
func names(cert *x509.Certificate, id, host string, isNode func(id string) bool) error {
	host = strings.TrimSuffix(host, ".")
	ip := net.ParseIP(host)
	switch {
	case slices.Contains(cert.DNSNames, id):
		return nil
	case slices.ContainsFunc(cert.DNSNames, isNode): // and not this one
	case ip != nil && slices.ContainsFunc(cert.IPAddresses, ip.Equal):
		return nil
	case ip == nil && slices.ContainsFunc(cert.DNSNames, func(name string) bool { return strings.EqualFold(name, host) }):
		return nil
	}
	return fmt.Errorf("the certificate is that of %q %v, and not of node %q: its id, or in a certificate without ids its host %q, must be a "+
		"subject alternative name", cert.DNSNames, cert.IPAddresses, id, host)
}

// toPeer is for a connection to the node with this id, at this host.
func (c *certificates) toPeer(id, host string, isNode func(id string) bool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.own}, ServerName: host,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection checks all that this would, but the id or the host will do
		VerifyConnection: func(state tls.ConnectionState) error {
			if err := c.verify(state.PeerCertificates, x509.ExtKeyUsageServerAuth); err != nil {
				return err
			}
			return names(state.PeerCertificates[0], id, host, isNode)
		},
	}
}

// String says whose the certificate is.
func (c *certificates) String() string {
	leaf := c.own.Leaf
	return fmt.Sprintf("certificate of %q %v, good until %s", leaf.DNSNames, leaf.IPAddresses, leaf.NotAfter.UTC().Format(time.RFC3339))
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

// webConfig returns the configuration for the HTTP port, which has newer connections use newer certificates.
func webConfig(certs *reloaded[*certificates]) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return certs.get().web, nil },
	}
}

// secured is a connection between nodes under TLS.
type secured struct {
	*tls.Conn
	raw net.Conn
}

// Close leaves out TLS's farewell, which could wait for a peer that does not read. What travels here says itself where it
// ends.
func (s *secured) Close() error { return s.raw.Close() }

// Read takes the end of the connection for what it is, farewell or not.
func (s *secured) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}
