// Package authority makes certificates for tests, of the nodes in one process and of those that are processes.
package authority

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA is an authority that signs certificates for tests.
type CA struct {
	t    testing.TB
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// New makes an authority, which fails t when it cannot do something.
func New(t testing.TB) *CA {
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
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &CA{t, cert, key}
}

// WritePEM writes a file with one block.
func WritePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Node makes a certificate with these names and returns the environment of a node with it.
func (ca *CA) Node(names ...string) map[string]string {
	return ca.Issue(func(*x509.Certificate) {}, names...)
}

// Issue is Node for a certificate that is changed before it is signed.
func (ca *CA) Issue(change func(*x509.Certificate), names ...string) map[string]string {
	ca.t.Helper()
	dir := ca.t.TempDir()
	env := map[string]string{
		"TLS_CERT_FILE": filepath.Join(dir, "cert.pem"), "TLS_KEY_FILE": filepath.Join(dir, "key.pem"), "TLS_CA_FILE": filepath.Join(dir, "ca.pem"),
	}
	ca.Renew(env, change, names...)
	return env
}

// Renew puts another certificate into the files of a node.
func (ca *CA) Renew(env map[string]string, change func(*x509.Certificate), names ...string) {
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
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Cert, key.Public(), ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.t.Fatal(err)
	}
	WritePEM(ca.t, env["TLS_KEY_FILE"], "PRIVATE KEY", keyDER)
	WritePEM(ca.t, env["TLS_CERT_FILE"], "CERTIFICATE", der)
	WritePEM(ca.t, env["TLS_CA_FILE"], "CERTIFICATE", ca.Cert.Raw)
}

// Client returns what a client needs that trusts the authority, and shows the certificate of env if that is not nil.
func (ca *CA) Client(env map[string]string) *tls.Config {
	ca.t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	c.RootCAs.AddCert(ca.Cert)
	if env != nil {
		pair, err := tls.LoadX509KeyPair(env["TLS_CERT_FILE"], env["TLS_KEY_FILE"])
		if err != nil {
			ca.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}
