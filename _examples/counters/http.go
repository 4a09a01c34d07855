package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"time"
)

// This file is the HTTP API of the counters:
//
//	POST /counter/<name>  adds the number in the body and answers the new value; 409 if the counter would be negative
//	GET /counter/<name>   answers the value
//	GET /counters         answers all of them
//	GET /backup           likewise, with all that this node has; to restore, add each to a counter of a new cluster
type api struct {
	store    *Store
	counters *counters
}

// routes returns what this service answers. The server adds the paths for probes and operators.
func routes(store *Store, machine *counters) []route {
	a := &api{store, machine}
	return []route{
		{path: "/counter/", get: a.get, post: a.add},
		{path: "/counters", get: a.list},
		{path: "/backup", get: a.backup},
	}
}

func (a *api) add(w http.ResponseWriter, r *http.Request) error {
	name, err := counterName(r)
	if err != nil {
		return err
	}
	if _, err := readQuery(r); err != nil { // it knows no parameters
		return err
	}
	body, err := readBody(r)
	if err != nil {
		return err
	}
	c := command{Op: opAdd, Name: name}
	if err := json.Unmarshal(body, &c.N); err != nil {
		return badRequest("the body must be a whole number: %v", err)
	}
	encoded, err := json.Marshal(c)
	if err != nil {
		return err
	}
	data, err := applyCommand(w, r, a.store, encoded)
	if err != nil {
		return err
	}
	var result result
	if err := json.Unmarshal(data, &result); err != nil {
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	if result.Refused {
		return refused(http.StatusConflict, "the counter is %d, so %d cannot be added", result.Value, c.N)
	}
	return writeJSON(w, result.Value)
}

func (a *api) get(w http.ResponseWriter, r *http.Request) error {
	name, err := counterName(r)
	if err != nil {
		return err
	}
	query, err := readQuery(r, "consistency")
	if err != nil {
		return err
	}
	var value int64
	var found bool
	err = readState(w, r, a.store, query, func() { value, found = a.counters.values[name] })
	switch {
	case err != nil:
		return err
	case !found:
		return statusError(http.StatusNotFound, "there is no counter %q", name)
	}
	return writeJSON(w, value)
}

func (a *api) list(w http.ResponseWriter, r *http.Request) error {
	query, err := readQuery(r, "consistency")
	if err != nil {
		return err
	}
	var values map[string]int64
	err = readState(w, r, a.store, query, func() { values = maps.Clone(a.counters.values) })
	if err != nil {
		return err
	}
	return writeJSON(w, values)
}

// backup answers all counters. With ?consistency=stale it is what people save when a majority of the nodes is lost: the
// state, and what this node has only in its log.
func (a *api) backup(w http.ResponseWriter, r *http.Request) error {
	query, err := readQuery(r, "consistency")
	if err != nil {
		return err
	}
	if err := readState(w, r, a.store, query, func() {}); err != nil {
		return err
	}
	state := newMachine()
	capture := func() { state.values = maps.Clone(a.counters.values) }
	err = captureState(r, a.store, query, capture, func(command []byte, at time.Time) error {
		_, err := state.Apply(command, at)
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, state.values)
}

// counterName returns the name in the path: one part, so it holds a slash only as %2F.
func counterName(r *http.Request) (string, error) {
	parts, err := pathParts(r, "/counter/")
	switch {
	case err != nil:
		return "", err
	case len(parts) != 1 || parts[0] == "":
		return "", errNotFound
	}
	return parts[0], nil
}
