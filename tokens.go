package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// tokens are the bearer tokens (RFC 6750) for the HTTP API, as digests: those have one length, and a memory dump does
// not show the tokens.
type tokens [][sha256.Size]byte

// tokenForm is the syntax of a token (RFC 6750, 2.1).
var tokenForm = regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`)

// parseTokens parses a file of tokens, one a line. Its errors name lines, never their content.
func parseTokens(path string, content []byte) (tokens, error) {
	var all tokens
	var problems []error
	n := 0
	for line := range bytes.Lines(content) {
		n++
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if !tokenForm.Match(line) {
			problems = append(problems, fmt.Errorf("HTTP_TOKEN_FILE: line %d of %s is not a token: "+
				"use letters, digits and -._~+/, with nothing else on the line", n, path))
			continue
		}
		all = append(all, sha256.Sum256(line))
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("HTTP_TOKEN_FILE: %s holds no token: write at least one, on a line of its own", path)
	}
	return all, nil
}

// openTokens returns the tokens in HTTP_TOKEN_FILE, nil if there is none.
func openTokens(cfg *Config, log hclog.Logger) (*reloaded[tokens], error) {
	if cfg.HTTPTokenFile == "" {
		return nil, nil // no tokens is not an error
	}
	return newReloaded("tokens", log, func(contents [][]byte) (tokens, error) {
		return parseTokens(cfg.HTTPTokenFile, contents[0])
	}, cfg.HTTPTokenFile)
}

// String returns how many tokens there are, and nothing of their content.
func (t tokens) String() string { return fmt.Sprintf("%d tokens", len(t)) }

// check returns an error unless a request carries one of the tokens. How long that takes says nothing about the tokens.
func (t tokens) check(r *http.Request) error {
	header := r.Header["Authorization"]
	if len(header) == 0 {
		return errors.New("a token is needed here, in a header such as Authorization: Bearer <token>; " +
			"HTTP_TOKEN_FILE holds those that are good")
	}
	scheme, token, _ := strings.Cut(header[0], " ")
	if len(header) > 1 || !strings.EqualFold(scheme, "Bearer") {
		return errors.New("the Authorization header must come once, and be Bearer <token>")
	}
	digest, known := sha256.Sum256([]byte(strings.TrimSpace(token))), 0
	for i := range t {
		known |= subtle.ConstantTimeCompare(digest[:], t[i][:])
	}
	if known != 1 {
		return errors.New("this token is not good: HTTP_TOKEN_FILE of this node does not hold it")
	}
	return nil
}
