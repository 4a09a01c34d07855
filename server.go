package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
)

// This file is what any state machine's HTTP API needs: limits, probes, status, metrics, reading a request, and errors.
// The routes of this service are in http.go.

const (
	maxHeader     = 32 << 10
	answerTimeout = 14 * time.Second // for the answer to a request with a body, from the end of its header on
	smallBytes    = 16 << 10         // of a body: so much of each is not counted
	largeBytes    = 64 << 20         // what bodies may have of memory beyond that, or more where MAX_BODY_BYTES is large
	sendBuffer    = 32 << 10         // of a connection, in the kernel, which makes it twice that
	jsonType      = "application/json"
	textType      = "text/plain; charset=utf-8"
)

// handlerFunc answers a request, or returns the error with which server answers it.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

// route is what can be done at a path, or, if it ends in a slash, at all longer ones. HEAD is GET without the body.
type route struct {
	path                   string
	get, post, put, delete handlerFunc // nil for not allowed
	open                   bool        // to those without a token, too
}

// server answers HTTP requests: those of its routes, and the probes' and operators'. It is an http.Handler.
type server struct {
	cfg      *Config
	store    *Store
	metrics  *metrics
	log      hclog.Logger
	routes   []route
	tokens   *reloaded[tokens] // nil for none; set before the first request
	origins  *http.CrossOriginProtection
	room     room
	servedBy []string
	stopping atomic.Bool // the node is about to stop, and says so to load balancers
}

func newServer(cfg *Config, store *Store, m *metrics, log hclog.Logger, routes []route) *server {
	s := &server{cfg: cfg, store: store, metrics: m, log: log, origins: http.NewCrossOriginProtection(), servedBy: []string{cfg.NodeID}}
	s.room.most = max(largeBytes, 8*cfg.MaxBodyBytes)
	s.routes = append(slices.Clone(routes),
		route{path: "/livez", get: s.livez, open: true},
		route{path: "/readyz", get: s.readyz, open: true},
		route{path: "/status", get: s.status},
		route{path: "/metrics", get: s.scrape, open: true})
	return s
}

// listener returns an http.Server for s, with all of its limits on requests.
func (s *server) listener() *http.Server {
	return &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       12 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          s.log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if t, ok := conn.(*tls.Conn); ok {
				conn = t.NetConn()
			}
			if g, ok := conn.(*guest); ok {
				ctx = context.WithValue(ctx, guestKey{}, g)
			}
			return ctx
		},
	}
}

type guestKey struct{} // of a connection in the context of its requests

// door returns a listener over l with the limits on connections, under TLS if there are certificates.
func (s *server) door(l net.Listener, certs *reloaded[*certificates]) net.Listener {
	most := min(maxWebConns, maxFiles()/2)
	l = newDoorman(sparing{l}, most, most*3/4, s.metrics.crowded.Inc)
	if certs != nil {
		l = tls.NewListener(l, webConfig(certs))
	}
	return l
}

// sparing is a listener whose connections have the kernel keep little of what their clients do not read. It would else keep a
// megabyte for each of however many, and hide from us that they do not read.
type sparing struct{ net.Listener }

func (l sparing) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(sendBuffer)
	}
	return conn, err
}

// ServeHTTP answers a request and takes note of it.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	x := &metered{ResponseWriter: w, status: http.StatusOK, room: &s.room}
	x.guest, _ = r.Context().Value(guestKey{}).(*guest)
	rt := s.find(rawPath(r))
	defer func() { // also when a handler panics
		took := time.Since(began)
		s.room.give(x.taken)
		x.guest.waits(began.Add(took))
		s.metrics.answered(rt.path, r.Method, x.status, took)
	}()
	if err := s.serve(x, r, rt); err != nil {
		s.writeError(x, r, err)
	}
}

// room is memory for large bodies, which many clients at once could else use up.
type room struct {
	most int64
	used atomic.Int64
}

func (r *room) take(n int64) bool {
	if r.used.Add(n) > r.most {
		r.used.Add(-n)
		return false
	}
	return true
}

func (r *room) give(n int64) { r.used.Add(-n) }

var errCrowded = &httpError{http.StatusServiceUnavailable, "too many large requests are under way"}

// metered is the answer to a request, of which it remembers the status, and the body of a request that has one, which
// takes room as far as it is large.
type metered struct {
	http.ResponseWriter
	status int
	room   *room
	taken  int64 // of room
	guest  *guest

	body io.ReadCloser
	read int64 // of body
}

func (x *metered) WriteHeader(status int) {
	x.status = status
	x.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (x *metered) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// take makes sure that there is room for n bytes, but for the first smallBytes of them.
func (x *metered) take(n int64) error {
	more := n - smallBytes - x.taken
	if more > 0 && !x.room.take(more) {
		return errCrowded
	}
	x.taken += max(more, 0)
	return nil
}

func (x *metered) Read(p []byte) (int, error) {
	n, err := x.body.Read(p)
	x.read += int64(n)
	if crowded := x.take(x.read); crowded != nil {
		return n, crowded
	}
	if errors.Is(err, io.EOF) {
		x.guest.served()
	}
	return n, err
}

func (x *metered) Close() error { return x.body.Close() }

// find goes by the path as it was sent: net/http's mux would clean and redirect paths that are keys.
func (s *server) find(path string) route {
	for _, rt := range s.routes {
		if path == rt.path || strings.HasSuffix(rt.path, "/") && strings.HasPrefix(path, rt.path) {
			return rt
		}
	}
	return route{path: "none"}
}

func (s *server) serve(w *metered, r *http.Request, rt route) error {
	h := w.Header()
	h["X-Content-Type-Options"] = noSniff
	h["Raft-Served-By"] = s.servedBy
	if s.stopping.Load() {
		h["Connection"] = []string{"close"}
	}
	if leader := s.store.Leader(); leader != "" {
		h["Raft-Leader"] = []string{leader}
	}
	handle := rt.get
	switch r.Method {
	case http.MethodGet, http.MethodHead:
	case http.MethodPost:
		handle = rt.post
	case http.MethodPut:
		handle = rt.put
	case http.MethodDelete:
		handle = rt.delete
	default:
		handle = nil
	}
	if err := s.admit(h, r, rt); err != nil {
		return err
	}
	if r.ContentLength == 0 {
		w.guest.served()
	} else if handle != nil { // a body may take its time, of which the Store knows nothing
		ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
		defer cancel()
		r = r.WithContext(ctx)
		w.body, r.Body = http.MaxBytesReader(w.ResponseWriter, r.Body, s.cfg.MaxBodyBytes), w
	}
	if handle != nil {
		return handle(w, r)
	}
	allow := rt.allow()
	if allow == "" {
		return &httpError{http.StatusNotFound, "there is no such path"}
	}
	h.Set("Allow", allow)
	return &httpError{http.StatusMethodNotAllowed, r.Method + " is not allowed here; allowed are " + allow}
}

var noSniff = []string{"nosniff"} // the answer is of the type that it says

// admit says why a request is not served for whoever it comes from, if it is not.
func (s *server) admit(answer http.Header, r *http.Request, rt route) error {
	if s.tokens != nil && !rt.open {
		if err := s.tokens.get().admit(r); err != nil {
			answer.Set("WWW-Authenticate", `Bearer realm="raftstarter"`)
			return &httpError{http.StatusUnauthorized, err.Error()}
		}
	}
	if s.origins.Check(r) != nil {
		return &httpError{http.StatusForbidden, "a web page of another origin may not change anything here"}
	}
	return nil
}

// allow lists the methods of a route, "" if it has none.
func (rt route) allow() string {
	var methods []string
	if rt.get != nil {
		methods = append(methods, http.MethodGet, http.MethodHead)
	}
	if rt.post != nil {
		methods = append(methods, http.MethodPost)
	}
	if rt.put != nil {
		methods = append(methods, http.MethodPut)
	}
	if rt.delete != nil {
		methods = append(methods, http.MethodDelete)
	}
	return strings.Join(methods, ", ")
}

func (s *server) livez(w http.ResponseWriter, _ *http.Request) error {
	return writeBody(w, textType, []byte("ok\n"))
}

func (s *server) readyz(w http.ResponseWriter, _ *http.Request) error {
	err := s.store.Ready()
	if s.stopping.Load() {
		err = errors.New("this node is shutting down")
	}
	if err != nil {
		return &httpError{status: http.StatusServiceUnavailable, detail: "not ready: " + err.Error()}
	}
	return writeBody(w, textType, []byte("ok\n"))
}

func (s *server) status(w http.ResponseWriter, _ *http.Request) error {
	body, err := json.Marshal(s.store.Status())
	if err != nil {
		return err
	}
	return writeBody(w, jsonType, body)
}

func (s *server) scrape(w http.ResponseWriter, r *http.Request) error {
	s.metrics.handler().ServeHTTP(w, r)
	return nil
}

// rawPath returns the path as it was sent. URL.EscapedPath would make it up from the decoded path where it holds bytes
// that should have been escaped, and %2F would be lost.
func rawPath(r *http.Request) string {
	if r.URL.RawPath != "" {
		return r.URL.RawPath
	}
	return r.URL.EscapedPath()
}

// pathRest returns what follows prefix in the path, percent-decoded once.
func pathRest(r *http.Request, prefix string) (string, error) {
	rest, err := url.PathUnescape(strings.TrimPrefix(rawPath(r), prefix))
	switch {
	case err != nil:
		return "", badRequest("the path is not percent-encoded as it should be: %v", err)
	case !utf8.ValidString(rest):
		return "", badRequest("the path must be valid UTF-8")
	}
	return rest, nil
}

// readBody returns the body.
func readBody(r *http.Request) ([]byte, error) {
	var body bytes.Buffer
	body.Grow(int(min(max(r.ContentLength, 0), 64<<10)) + bytes.MinRead)
	if _, err := body.ReadFrom(r.Body); err != nil {
		if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
			return nil, &httpError{
				status: http.StatusRequestEntityTooLarge,
				detail: fmt.Sprintf("the body has more than %d bytes, the limit set by MAX_BODY_BYTES", tooLarge.Limit),
			}
		}
		if errors.Is(err, errCrowded) {
			return nil, err
		}
		return nil, badRequest("the body did not arrive: %v", err)
	}
	return body.Bytes(), nil
}

// consistency returns what a read asks for, or what is configured where it does not say.
func consistency(cfg *Config, query url.Values) (Consistency, error) {
	if !query.Has("consistency") {
		return cfg.ReadConsistency, nil
	}
	asked, err := parseConsistency(query.Get("consistency"))
	if err != nil {
		return "", badRequest("consistency: %v", err)
	}
	return asked, nil
}

// markStale says of the answer to a read that it may be from an old snapshot, if it may. It is called before the read.
func markStale(w http.ResponseWriter, store *Store, read Consistency) {
	if read == Stale && !store.CaughtUp() {
		w.Header().Set("Raft-Stale", "since-start")
	}
}

// writeBody writes an answer.
func writeBody(w http.ResponseWriter, contentType string, body []byte) error {
	h := w.Header()
	h["Content-Type"] = []string{contentType}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	_, _ = w.Write(body) // an error means that nobody listens any more
	return nil
}

// httpError is an error that knows its status. Its detail is for the client.
type httpError struct {
	status int
	detail string
}

func (e *httpError) Error() string { return e.detail }

func badRequest(format string, args ...any) error {
	return &httpError{status: http.StatusBadRequest, detail: fmt.Sprintf(format, args...)}
}

// statusOf says how the errors of a Store are answered. What is not here is an internal error.
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
}

// problem is an error's body: application/problem+json (RFC 9457).
type problem struct {
	Type    string `json:"type"`
	Title   string `json:"title"`
	Status  int    `json:"status"`
	Detail  string `json:"detail"`
	Outcome string `json:"outcome,omitempty"` // of a write
}

// writeError is the one place where an error becomes an answer.
func (s *server) writeError(w http.ResponseWriter, r *http.Request, err error) {
	p := problem{Type: "about:blank", Status: http.StatusInternalServerError, Detail: "internal error"}
	known := new(httpError)
	if errors.As(err, &known) {
		p.Status, p.Detail = known.status, known.detail
	}
	for _, row := range statusOf {
		if errors.Is(err, row.err) {
			p.Status, p.Detail = row.status, row.err.Error()
		}
	}
	p.Title = http.StatusText(p.Status)
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		p.Outcome = "not-applied"
		if p.Status == http.StatusGatewayTimeout || p.Status == http.StatusInternalServerError {
			p.Outcome = "unknown"
		}
	}
	if p.Status == http.StatusInternalServerError {
		s.log.Error("a request failed", "method", r.Method, "error", err)
	}
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(p)                                             // it holds only strings and a number
	for _, name := range []string{"Etag", "Link", "Raft-Stale"} { // of an answer that is not given now
		w.Header().Del(name)
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Content-Length", strconv.Itoa(body.Len()-1))
	w.WriteHeader(p.Status)
	_, _ = w.Write(bytes.TrimSuffix(body.Bytes(), []byte("\n")))
}
