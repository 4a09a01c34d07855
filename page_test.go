package main

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const browserAccepts = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"

func TestPageIsForBrowsers(t *testing.T) {
	n := newTestNode(t, storeMemory)
	for _, tt := range []struct {
		name, method, target string
		headers              []string
		status               int
	}{
		{"browser", "GET", "/", []string{"Accept", browserAccepts}, 200},
		{"head", "HEAD", "/", []string{"Accept", browserAccepts}, 200},
		{"query", "GET", "/?from=elsewhere", []string{"Accept", browserAccepts}, 200},
		{"upper case", "GET", "/", []string{"Accept", "Text/HTML"}, 200},
		{"not the first", "GET", "/", []string{"Accept", "application/json, text/html;q=0.1"}, 200},
		{"second line", "GET", "/", []string{"Accept", "application/json", "Accept", "text/html"}, 200},
		{"curl", "GET", "/", []string{"Accept", "*/*"}, 404},
		{"head of curl", "HEAD", "/", []string{"Accept", "*/*"}, 404},
		{"client of JSON", "GET", "/", []string{"Accept", "application/json, text/plain, */*"}, 404},
		{"no Accept", "GET", "/", nil, 404},
		{"not wanted", "GET", "/", []string{"Accept", "text/html;q=0, */*"}, 404},
		{"other type of text", "GET", "/", []string{"Accept", "text/htmlx, text/*"}, 404},
		{"malformed", "GET", "/", []string{"Accept", "text/html;;=, ,/"}, 404},
		{"post", "POST", "/", []string{"Accept", browserAccepts}, 404},
		{"delete", "DELETE", "/", []string{"Accept", browserAccepts}, 404},
		{"method of no route", "PATCH", "/", []string{"Accept", browserAccepts}, 404},
		{"other path", "GET", "/index.html", []string{"Accept", browserAccepts}, 404},
		{"two slashes", "GET", "//", []string{"Accept", browserAccepts}, 404},
		{"escaped slash", "GET", "/%2F", []string{"Accept", browserAccepts}, 404},
		{"path that has a route", "GET", "/livez", []string{"Accept", browserAccepts}, 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := want(t, n, tt.status, tt.method, tt.target, "", tt.headers...)
			page := tt.status == 200 && tt.target != "/livez"
			if got := a.header["Content-Security-Policy"] != nil; got != page {
				t.Errorf("got a policy: %v; want %v", got, page)
			}
			if body := string(pageHTML); page && a.body != body && (tt.method != "HEAD" || a.body != "") {
				t.Errorf("got %.100q...; want the page", a.body)
			}
			atRoot := strings.SplitN(tt.target, "?", 2)[0] == "/"
			if got := a.header.Get("Vary"); (got == "Accept") != atRoot {
				t.Errorf("got Vary %q", got)
			}
			if a.header["Allow"] != nil {
				t.Errorf("got Allow %q; want none", a.header["Allow"])
			}
		})
	}
}

// The page needs no token, for it shows nothing by itself. Who asks for / otherwise is treated as at any unknown path.
func TestPageNeedsNoToken(t *testing.T) {
	n := newTestNode(t, storeMemory)
	n.cfg.HTTPTokenFile = filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(n.cfg.HTTPTokenFile, []byte("good\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if n.server.tokens, err = openTokens(n.cfg, testLogger(t, "tokens")); err != nil {
		t.Fatal(err)
	}
	want(t, n, 200, "GET", "/", "", "Accept", browserAccepts)
	want(t, n, 401, "GET", "/", "", "Accept", "*/*")
	want(t, n, 401, "GET", "/nowhere", "", "Accept", browserAccepts)
	want(t, n, 401, "GET", "/status", "", "Accept", browserAccepts)
	want(t, n, 404, "GET", "/", "", "Accept", "*/*", "Authorization", "Bearer good")
}

func TestPagePolicy(t *testing.T) {
	n := newTestNode(t, storeMemory)
	digest := func(element string) string {
		found := regexp.MustCompile(`(?s)<`+element+`[^>]*>(.*?)</`+element+`>`).FindAllSubmatch(pageHTML, -1)
		if len(found) != 1 {
			t.Fatalf("got %d elements %s; want one", len(found), element)
		}
		sum := sha256.Sum256(found[0][1])
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	policy := "default-src 'none'; script-src " + digest("script") + "; style-src " + digest("style") +
		"; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	a := want(t, n, 200, "GET", "/", "", "Accept", browserAccepts)
	for name, want := range map[string]string{
		"Content-Security-Policy": policy, "Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff",
	} {
		if got := a.header.Values(name); len(got) != 1 || got[0] != want {
			t.Errorf("%s: got %q; want %q", name, got, want)
		}
	}
}

// The page loads nothing, leads nowhere, and makes no HTML of what it is told.
func TestPageIsWholeByItself(t *testing.T) {
	for _, forbidden := range []string{
		`(?i)https?:`, `["'(=]//`, `(?i)\b(src|href|action|srcset)\s*=`, `(?i)url\(`, `@import`, `\bimport\b`,
		`(?i)<[^>]*\sstyle=`, `(?i)<[^>]*\son[a-z]+=`,
		`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function`,
		`(?i)method:`, `["']/`, // it asks for what is beside it by GET, also behind a proxy's path prefix
	} {
		if found := regexp.MustCompile(forbidden).Find(pageHTML); found != nil {
			t.Errorf("the page has %q, which %s finds", found, forbidden)
		}
	}
	asked := regexp.MustCompile(`ask\("([^"]*)"`).FindAllSubmatch(pageHTML, -1)
	for _, path := range asked {
		if got := string(path[1]); got != "status" && got != "readyz" {
			t.Errorf("the page asks for %q", got)
		}
	}
	if len(asked) == 0 {
		t.Error("the page asks for nothing")
	}
}

// A service of one's own may have something else at /.
func TestPageLeavesRootToRoutes(t *testing.T) {
	n := newTestNode(t, storeMemory)
	own := func(w http.ResponseWriter, _ *http.Request) error { return writeBody(w, textType, []byte("own")) }
	s := newServer(n.cfg, n.Store, nil, n.metrics, testLogger(t, "own"), []route{{path: "/", get: own}})
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
	r.Header.Set("Accept", browserAccepts)
	w := httptest.NewRecorder()
	s.answer(w, r)
	if w.Body.String() != "own" {
		t.Errorf("got %.100q; want what the route answers", w.Body)
	}
}
