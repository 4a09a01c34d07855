package main

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"mime"
	"net/http"
	"strconv"
	"strings"
)

// pageHTML shows the cluster to people, from /status and /readyz of the node that served it. Its style and its script
// are in it, so it needs nothing else. It changes nothing.
//
//go:embed page.html
var pageHTML []byte

// newPage returns the page's route. It is none of server.routes: / is no path but for those who ask for the page.
func newPage() *route {
	policy := pagePolicy(string(pageHTML))
	return &route{path: "/", noToken: true, get: func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Security-Policy", policy)
		return writeBody(w, "text/html; charset=utf-8", pageHTML)
	}}
}

// asksForPage says whether a request is one of a browser for the page. curl, which accepts */*, does not ask for it.
func asksForPage(r *http.Request) bool {
	if r.URL.Path != "/" || r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	for accepted := range strings.SplitSeq(strings.Join(r.Header["Accept"], ","), ",") {
		name, parameters, err := mime.ParseMediaType(accepted)
		if err != nil || name != "text/html" {
			continue
		}
		weight, err := strconv.ParseFloat(parameters["q"], 64)
		return err != nil || weight > 0 // q=0 is what the client does not want
	}
	return false
}

// pagePolicy returns the Content-Security-Policy of the page: a browser takes the style and the script that are in it,
// known by their digests, and lets it ask its own origin. Nothing else is loaded, run, framed or sent anywhere.
func pagePolicy(page string) string {
	return "default-src 'none'; script-src " + digestOf(page, "script") + "; style-src " + digestOf(page, "style") +
		"; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

// digestOf returns the digest of what is in the only element with this name, as a policy has it.
func digestOf(page, element string) string {
	_, rest, _ := strings.Cut(page, "<"+element+">")
	content, _, _ := strings.Cut(rest, "</"+element+">")
	digest := sha256.Sum256([]byte(content))
	return "'sha256-" + base64.StdEncoding.EncodeToString(digest[:]) + "'"
}
