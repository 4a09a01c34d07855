package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// testCA is an authority that signs certificates for tests.
type testCA struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newTestCA(t *testing.T) *testCA {
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

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// node makes a certificate with these names and returns the environment of a node with it.
func (ca *testCA) node(names ...string) map[string]string {
	ca.t.Helper()
	dir := ca.t.TempDir()
	env := map[string]string{
		"TLS_CERT_FILE": filepath.Join(dir, "cert.pem"), "TLS_KEY_FILE": filepath.Join(dir, "key.pem"), "TLS_CA_FILE": filepath.Join(dir, "ca.pem"),
	}
	ca.renew(env, func(*x509.Certificate) {}, names...)
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

// client returns what a client needs that trusts the authority.
func (ca *testCA) client() *tls.Config {
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	c.RootCAs.AddCert(ca.cert)
	return c
}

// secureProcs returns three nodes under TLS, with one token.
func secureProcs(t *testing.T) (ca *testCA, tokenFile string, nodes []*proc) {
	t.Helper()
	ca, nodes = newTestCA(t), newProcs(t, nil)
	tokenFile = filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(tokenFile, []byte("the-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range nodes {
		for name, value := range ca.node(p.name, p.env["HTTP_ADDR"]) {
			p.env[name] = value
		}
		p.env["HTTP_TOKEN_FILE"] = tokenFile
		p.tls, p.token = ca.client(), "the-token"
	}
	return ca, tokenFile, nodes
}

func TestProcessTLSAndTokens(t *testing.T) {
	t.Parallel()
	ca, tokenFile, nodes := secureProcs(t)
	startAll(nodes...)
	for i, p := range nodes {
		p.put(fmt.Sprint("k", i), "1")
	}
	for _, p := range nodes {
		for i := range nodes {
			p.has(fmt.Sprint("k", i), "1", "")
		}
		check := *p
		check.start("--healthcheck")
		check.exits(0, 5*time.Second)
	}
	leader, others := pick(nodes, true)
	leader.end(syscall.SIGKILL, -1)
	others[0].await(http.StatusOK, http.MethodPut, "/key/k0", "2") // one that was just being passed on may be 504
	others[1].has("k0", "2", "")

	p := others[0]
	p.logs(`certificates read.*good until`)
	if strings.Contains(p.read(p.stderr), "the-token") {
		t.Error("the log holds the token")
	}
	if strings.Contains(p.read(p.stderr), "open ports") {
		t.Error("the log warns of open ports; want no such thing under TLS with tokens")
	}
	for name, config := range map[string]*tls.Config{
		"TLS 1.2":           {MaxVersion: tls.VersionTLS12, RootCAs: p.tls.RootCAs},
		"another authority": newTestCA(t).client(),
	} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
		if response, err := client.Get(p.url() + "/livez"); err == nil { //nolint:noctx // it does not get far
			_ = response.Body.Close()
			t.Errorf("%s: got an answer; want none", name)
		}
	}
	plain := &http.Client{}
	if response, err := plain.Get(strings.Replace(p.url(), "https", "http", 1) + "/livez"); err == nil { //nolint:noctx // as above
		_ = response.Body.Close()
		if response.StatusCode != http.StatusBadRequest {
			t.Errorf("without TLS: got %d; want 400", response.StatusCode)
		}
	}

	// SIGHUP has the files read again, and says so.
	if err := os.WriteFile(tokenFile, []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ca.renew(p.env, func(c *x509.Certificate) { c.NotAfter = time.Unix(2000000000, 0) }, p.name, p.env["HTTP_ADDR"])
	p.signal(syscall.SIGHUP)
	waitFor(t, "the log to tell of it", func() bool {
		return regexp.MustCompile(`(?s)certificates read again.*2033.*tokens read again: what="1 tokens"`).MatchString(p.read(p.stderr))
	})
	p.expect(http.StatusUnauthorized, http.MethodGet, "/key/k0", "")
	p.token = "another"
	p.has("k0", "2", "")
	p.client.CloseIdleConnections()
	if a := p.expect(http.StatusOK, http.MethodGet, "/metrics", ""); !strings.Contains(a.body, "\nraftstarter_tls_certificate_expiry_seconds 2e+09\n") {
		t.Error("/metrics does not have the new certificate's expiry")
	}
}
