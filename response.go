package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// This file answers requests: bodies, and errors as application/problem+json.

const (
	jsonType   = "application/json"
	textType   = "text/plain; charset=utf-8"
	largeWrite = 4 << 10         // bytes; a longer write may have to wait for the client to read
	pieceBytes = 16 << 10        // of a large answer, which the client has to read
	pieceWait  = 2 * time.Second // within this time
)

// response is the http.ResponseWriter that handlers get. It remembers the status.
type response struct {
	http.ResponseWriter
	server *server
	client *client
	status int // 0 until the answer begins
}

// Unwrap is for http.ResponseController.
func (a *response) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// begin is called before the header is written. It adds what must be as new as the answer.
func (a *response) begin(status int) {
	if a.status != 0 || status < http.StatusOK {
		return
	}
	a.status = status
	h := a.Header()
	if leader := a.server.store.Leader(); leader != "" {
		h["Raft-Leader"] = []string{leader}
	}
	if a.server.stopping.Err() != nil || a.server.store.Leaving() {
		h["Connection"] = []string{"close"}
	}
}

// WriteHeader is that of http.ResponseWriter.
func (a *response) WriteHeader(status int) {
	a.begin(status)
	a.ResponseWriter.WriteHeader(status)
}

// Write is that of http.ResponseWriter. It may wait for the client to read.
func (a *response) Write(p []byte) (int, error) {
	a.begin(http.StatusOK)
	if len(p) > largeWrite {
		a.client.beginWait(time.Now())
		defer a.client.endWait()
	}
	return a.ResponseWriter.Write(p)
}

// Flush makes a response an http.Flusher.
func (a *response) Flush() { _ = a.FlushError() }

// FlushError is what http.ResponseController calls.
func (a *response) FlushError() error {
	a.begin(http.StatusOK)
	return http.NewResponseController(a.ResponseWriter).Flush()
}

// delayClose is called before an answer to a client that may still be sending. If net/http closed the connection at
// once, the client's system would discard the answer. After a MaxBytesReader has met its limit it waits half a second,
// so here is one that meets it.
func (a *response) delayClose() {
	_, _ = http.MaxBytesReader(a.ResponseWriter, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1))
}

// writeBody answers 200 with a body.
func writeBody(w http.ResponseWriter, contentType string, body []byte) error {
	setContent(w, contentType, len(body))
	_, err := w.Write(body)
	return err
}

// writeJSON answers 200 with v as JSON.
func writeJSON(w http.ResponseWriter, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeBody(w, jsonType, body)
}

// writeLarge answers 200 with a body of size bytes, in pieces. It returns an error, which ends the connection, when the
// client does not read a piece within pieceWait.
func writeLarge(w http.ResponseWriter, contentType string, size int, body io.Reader) error {
	setContent(w, contentType, size)
	control := http.NewResponseController(w)
	piece := make([]byte, pieceBytes)
	for size > 0 {
		n, err := body.Read(piece)
		if err != nil {
			return err
		}
		size -= n
		_ = control.SetWriteDeadline(time.Now().Add(pieceWait)) // fails only in tests, which have no connection
		if _, err := w.Write(piece[:n]); err != nil {
			return err
		}
	}
	return nil
}

// setContent sets headers by their canonical names, which saves http.Header's look at each name.
func setContent(w http.ResponseWriter, contentType string, size int) {
	h := w.Header()
	h["Content-Type"] = []string{contentType}
	h["Content-Length"] = []string{strconv.Itoa(size)}
}

// httpError is an error with a status. The rest is for the client.
type httpError struct {
	status  int
	detail  string
	failed  []string // see problem
	refused bool     // the state machine has executed the command and changed nothing
}

func (e *httpError) Error() string { return e.detail }

// statusError returns an error that a handler returns to be answered with that status and detail.
func statusError(status int, format string, args ...any) error {
	return &httpError{status: status, detail: fmt.Sprintf(format, args...)}
}

// refused is statusError for a command that the state machine has refused, as its result says: nothing was changed.
func refused(status int, format string, args ...any) error {
	return &httpError{status: status, detail: fmt.Sprintf(format, args...), refused: true}
}

func badRequest(format string, args ...any) error {
	return statusError(http.StatusBadRequest, format, args...)
}

// errNotFound is also for handlers: a route whose path ends in a slash gets all longer paths.
var errNotFound = statusError(http.StatusNotFound, "there is no such path")

// errPanicked wraps what a handler panicked with.
var errPanicked = errors.New("the handler panicked")

// statusOf says how the errors of a Store are answered. Any other error that is no *httpError is an internal error.
var statusOf = []struct {
	err    error
	status int
}{
	{ErrUnknownOutcome, http.StatusGatewayTimeout},
	{ErrNoLeader, http.StatusServiceUnavailable},
	{ErrNotLeader, http.StatusServiceUnavailable},
	{ErrOverloaded, http.StatusServiceUnavailable},
	{ErrNotInTime, http.StatusServiceUnavailable},
	{ErrNotConfirmed, http.StatusServiceUnavailable},
	{ErrStarting, http.StatusServiceUnavailable},
	{ErrLeft, http.StatusServiceUnavailable},
}

// problem is an error's body: application/problem+json (RFC 9457).
type problem struct {
	Type    string `json:"type"`
	Title   string `json:"title"`
	Status  int    `json:"status"`
	Detail  string `json:"detail"`
	Outcome string `json:"outcome,omitempty"` // of a write: not-applied or unknown

	Failed []string `json:"failed,omitempty"` // keys for which the condition of a transaction does not hold
}

// problemOf returns how err is answered. executed is how many commands of the request have been, or may have been.
func problemOf(err error, method string, executed int) problem {
	p := problem{Type: "about:blank", Status: http.StatusInternalServerError, Detail: "internal error"}
	known := new(httpError)
	if errors.As(err, &known) {
		p.Status, p.Detail, p.Failed = known.status, known.detail, known.failed
		if known.refused {
			executed--
		}
	}
	for _, row := range statusOf {
		if errors.Is(err, row.err) {
			p.Status, p.Detail = row.status, row.err.Error()
		}
	}
	if errors.Is(err, ErrNotUpgraded) { // it names a node
		p.Status, p.Detail = http.StatusServiceUnavailable, err.Error()
	}
	p.Title = http.StatusText(p.Status)
	if method == http.MethodGet || method == http.MethodHead {
		return p
	}
	p.Outcome = "not-applied"
	if executed > 0 || p.Status == http.StatusGatewayTimeout || p.Status == http.StatusInternalServerError {
		p.Outcome = "unknown"
	}
	return p
}

// writeError is the one place where an error becomes an answer. If an answer has begun, it ends the connection, so that
// the client sees that the answer is not whole.
func (s *server) writeError(w *response, r *http.Request, err error) {
	if w.status != 0 {
		if errors.Is(err, errPanicked) {
			s.log.Error("a request failed", "method", r.Method, "error", err)
			w.status = http.StatusInternalServerError // for the metrics
		} else {
			s.log.Debug("an answer was cut short", "method", r.Method, "error", err)
		}
		panic(http.ErrAbortHandler)
	}
	p := problemOf(err, r.Method, int(w.client.executed.Load()))
	if p.Status == http.StatusInternalServerError {
		s.log.Error("a request failed", "method", r.Method, "error", err)
	}
	h := w.Header()
	if p.Status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	for _, name := range []string{"Etag", "Link", "Raft-Index", "Raft-Stale"} { // they were for another answer
		h.Del(name)
	}
	line, _ := json.Marshal(p)            // it holds only strings and a number
	_ = (*jsontext.Value)(&line).Format() // which does not escape < and >
	setContent(w, "application/problem+json", len(line))
	w.WriteHeader(p.Status)
	_, _ = w.Write(line)
}
