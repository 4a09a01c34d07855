package test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"raftstarter/test/authority"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// secureProcs returns three nodes under TLS, with one token.
func secureProcs(t *testing.T) (ca *authority.CA, tokenFile string, nodes []*proc) {
	t.Helper()
	ca, nodes = authority.New(t), newProcs(t, nil)
	tokenFile = filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(tokenFile, []byte("the-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range nodes {
		for name, value := range ca.Node(p.name, p.env["HTTP_ADDR"]) {
			p.env[name] = value
		}
		p.env["HTTP_TOKEN_FILE"] = tokenFile
		p.tls, p.token = ca.Client(nil), "the-token"
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
		"another authority": authority.New(t).Client(nil),
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
	ca.Renew(p.env, func(c *x509.Certificate) { c.NotAfter = time.Unix(2000000000, 0) }, p.name, p.env["HTTP_ADDR"])
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
