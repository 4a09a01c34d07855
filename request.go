package main

import (
	"cmp"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

// This file reads requests: path, query and body. What it returns as errors are *httpError, with a status for the
// client.

// rawPath returns the path as it was sent. URL.Path is decoded, which loses the difference between / and %2F, and
// URL.EscapedPath encodes again what the client should have encoded.
func rawPath(r *http.Request) string {
	if r.URL.RawPath != "" {
		return r.URL.RawPath
	}
	return r.URL.EscapedPath()
}

// pathRest returns what follows prefix in the path, percent-decoded once. It may hold slashes.
func pathRest(r *http.Request, prefix string) (string, error) {
	return unescapePath(strings.TrimPrefix(rawPath(r), prefix))
}

// pathParts returns what follows prefix in the path, cut at slashes, each part percent-decoded once. With the prefix
// /queue/ the path /queue/a%2Fb/7/take has the parts "a/b", "7" and "take".
func pathParts(r *http.Request, prefix string) (parts []string, err error) {
	parts = strings.Split(strings.TrimPrefix(rawPath(r), prefix), "/")
	for i := range parts {
		if parts[i], err = unescapePath(parts[i]); err != nil {
			return nil, err
		}
	}
	return parts, nil
}

func unescapePath(s string) (string, error) {
	decoded, err := url.PathUnescape(s)
	switch {
	case err != nil:
		return "", badRequest("the path is not percent-encoded as it should be: %v", err)
	case !utf8.ValidString(decoded):
		return "", badRequest("the path must be valid UTF-8")
	}
	return decoded, nil
}

// readQuery returns the query. A parameter that is not among names, or is given twice, is an error: a request that
// misspells what it asks for must not get something else.
func readQuery(r *http.Request, names ...string) (url.Values, error) {
	if r.URL.RawQuery == "" {
		return nil, nil
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("the query cannot be read: %v", err)
	}
	for name, values := range query {
		switch {
		case !slices.Contains(names, name):
			known := cmp.Or(strings.Join(names, ", "), "none")
			return nil, badRequest("the query parameter %.40q is not known; this request knows %s", name, known)
		case len(values) > 1:
			return nil, badRequest("%s is given %d times; give it once", name, len(values))
		case !utf8.ValidString(values[0]):
			return nil, badRequest("%s must be valid UTF-8", name)
		}
	}
	return query, nil
}

// rejectHeaders returns an error that says why if the request has one of the headers.
func rejectHeaders(r *http.Request, why string, headers ...string) error {
	for _, header := range headers {
		if _, present := r.Header[header]; present {
			return badRequest("%s cannot be used here: %s", header, why)
		}
	}
	return nil
}

// readBody returns the body. Its memory grows as bytes arrive: what Content-Length announces may never come.
func readBody(r *http.Request) ([]byte, error) { return io.ReadAll(r.Body) }

// requestBody is the body of a request. It tells the connection limit when all of it has arrived.
type requestBody struct {
	io.ReadCloser
	response *response
}

func (b requestBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	tooLarge := new(http.MaxBytesError)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		b.response.client.endWait()
	case errors.As(err, &tooLarge):
		err = errTooLarge(b.response.server.cfg.MaxBodyBytes)
	case errors.Is(err, errMemoryLimit):
		b.response.delayClose()
		err = statusError(http.StatusServiceUnavailable, "%v", errMemoryLimit)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = badRequest("the body did not arrive in time")
	default:
		err = badRequest("the body did not arrive: %v", err)
	}
	return n, err
}

func errTooLarge(limit int64) error {
	return statusError(http.StatusRequestEntityTooLarge,
		"the body has more than %d bytes, the limit set by MAX_BODY_BYTES", limit)
}
