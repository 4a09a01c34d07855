package main

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// This file is what http.go is made with: routes, and the two ways of a handler to the state machine.

// handlerFunc answers a request, or returns an error and has the server answer it (see statusError). If it returns an
// error after it has begun to answer, the connection is closed, so that the client sees that the answer is not whole.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

// route says what can be done at a path, or, if it ends in a slash, at every longer path. HEAD is GET without the body.
type route struct {
	path                   string
	get, post, put, delete handlerFunc // nil for a method that is not allowed
	noToken                bool        // HTTP_TOKEN_FILE does not apply
	slack                  int64       // bytes by which a body may exceed MAX_BODY_BYTES, if the handler agrees
}

// methods are those that a route can have, in the order in which the header Allow names them.
var methods = []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete}

// handler returns nil for a method that is not allowed.
func (rt *route) handler(method string) handlerFunc {
	switch method {
	case http.MethodGet, http.MethodHead:
		return rt.get
	case http.MethodPost:
		return rt.post
	case http.MethodPut:
		return rt.put
	case http.MethodDelete:
		return rt.delete
	}
	return nil
}

// allow returns the methods that are allowed, for the header of that name; "" where there is no such path.
func (rt *route) allow() string {
	refuses := func(method string) bool { return rt.handler(method) == nil }
	return strings.Join(slices.DeleteFunc(slices.Clone(methods), refuses), ", ")
}

// applyCommand has the state machine execute command and returns its result. The answer gets the header Raft-Index.
func applyCommand(w http.ResponseWriter, r *http.Request, store *Store, command []byte) ([]byte, error) {
	result, err := store.Apply(r.Context(), command)
	if err != nil {
		return nil, err
	}
	w.Header()["Raft-Index"] = []string{strconv.FormatUint(result.Index, 10)}
	return result.Data, nil
}

// readConsistency returns what a request asks for with ?consistency=, or else what READ_CONSISTENCY says.
func readConsistency(store *Store, query url.Values) (Consistency, error) {
	if !query.Has("consistency") {
		return store.cfg.ReadConsistency, nil
	}
	consistency, err := parseConsistency(query.Get("consistency"))
	if err != nil {
		return "", badRequest("consistency: %v", err)
	}
	return consistency, nil
}

// captureState calls capture, which makes a copy of the state machine; readState comes before it. With stale
// consistency that copy is what people save when the other nodes are lost, so it then calls execute: see
// Store.CaptureAll.
func captureState(
	r *http.Request, store *Store, query url.Values, capture func(), execute func(command []byte, at time.Time) error,
) error {
	consistency, err := readConsistency(store, query)
	if err != nil {
		return err
	}
	if consistency == Stale {
		return store.CaptureAll(r.Context(), capture, execute)
	}
	store.Capture(capture)
	return nil
}

// readState calls read, which may look at the state machine until it returns and must keep none of its maps and slices.
// Before that it waits for what the request's consistency asks for. query is what readQuery has returned.
func readState(w http.ResponseWriter, r *http.Request, store *Store, query url.Values, read func()) error {
	consistency, err := readConsistency(store, query)
	if err != nil {
		return err
	}
	if consistency == Stale && !store.CaughtUp() { // asked before the read: it may catch up meanwhile
		w.Header().Set("Raft-Stale", "since-start")
	}
	return store.Read(r.Context(), consistency, read)
}
