package main

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
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

	// Set by newServer:
	methods map[string]endpoint
	allow   string // the names of methods, for the header Allow; "" where there is no such path
}

// endpoint is a method of a route.
type endpoint struct {
	handle handlerFunc // nil for not allowed
	series *series
}

func (rt *route) register(m *metrics) {
	rt.methods = make(map[string]endpoint)
	var allow []string
	add := func(method string, handle handlerFunc) {
		if handle != nil {
			rt.methods[method] = endpoint{handle, m.series(rt.path, method)}
			allow = append(allow, method)
		}
	}
	add(http.MethodGet, rt.get)
	add(http.MethodHead, rt.get)
	add(http.MethodPost, rt.post)
	add(http.MethodPut, rt.put)
	add(http.MethodDelete, rt.delete)
	rt.allow = strings.Join(allow, ", ")
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

// readState calls read, which may look at the state machine until it returns and must keep none of its maps and slices.
// Before that it waits for what the request asks for with ?consistency=, or else READ_CONSISTENCY says. query is what
// readQuery has returned.
func readState(w http.ResponseWriter, r *http.Request, store *Store, query url.Values, read func()) error {
	consistency := store.cfg.ReadConsistency
	if query.Has("consistency") {
		var err error
		if consistency, err = parseConsistency(query.Get("consistency")); err != nil {
			return badRequest("consistency: %v", err)
		}
	}
	if consistency == Stale && !store.CaughtUp() { // asked before the read: it may catch up meanwhile
		w.Header().Set("Raft-Stale", "since-start")
	}
	return store.Read(r.Context(), consistency, read)
}
