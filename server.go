package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
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
	maxHeader     = 12 << 10         // net/http reads 4 KiB more; a key of 1024 bytes is 3 KiB in a path
	answerTimeout = 14 * time.Second // for the answer to a request with a body, from the end of its header on
	largeWrite    = 4 << 10          // of an answer may wait for the other end to read
	jsonType      = "application/json"
	textType      = "text/plain; charset=utf-8"
)

// handlerFunc answers a request, or returns the error with which server answers it. When it has begun to answer and then returns
// an error, the connection is closed, so that the client sees that the answer is not whole.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

// route is what can be done at a path, or, if it ends in a slash, at all longer ones. HEAD is GET without the body.
type route struct {
	path                   string
	get, post, put, delete handlerFunc // nil for not allowed
	open                   bool        // to those without a token, too
	slack                  int64       // bytes by which a body may exceed MAX_BODY_BYTES; the handler says of what kind

	// Made by register:
	methods map[string]endpoint
	allow   string // the names of methods; "" for no such path
}

// endpoint is a method of a route.
type endpoint struct {
	handle handlerFunc // nil for not allowed
	series *series
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
	servedBy []string
	stopping atomic.Bool // the node is about to stop, and says so to load balancers

	running context.Context // ends then, too
	stop    context.CancelFunc
}

func newServer(cfg *Config, store *Store, m *metrics, log hclog.Logger, routes []route) *server {
	s := &server{cfg: cfg, store: store, metrics: m, log: log, origins: http.NewCrossOriginProtection(), servedBy: []string{cfg.NodeID}}
	s.routes = append(slices.Clone(routes),
		route{path: "/livez", get: s.livez, open: true},
		route{path: "/readyz", get: s.readyz, open: true},
		route{path: "/status", get: s.status},
		route{path: "/metrics", get: s.scrape, open: true})
	for i := range s.routes {
		s.routes[i].register(m)
	}
	s.running, s.stop = context.WithCancel(context.Background())
	return s
}

func (rt *route) register(m *metrics) {
	rt.methods = make(map[string]endpoint)
	names := []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete}
	for i, handle := range []handlerFunc{rt.get, rt.get, rt.post, rt.put, rt.delete} {
		if handle != nil {
			rt.methods[names[i]] = endpoint{handle, m.series(rt.path, names[i])}
		}
	}
	rt.allow = strings.Join(slices.DeleteFunc(names, func(name string) bool { return rt.methods[name].handle == nil }), ", ")
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
			if l, ok := conn.(*limited); ok {
				ctx = withClient(ctx, &client{limited: l, running: s.running})
			}
			return ctx
		},
	}
}

// door returns a listener over l with the limits on connections, under TLS if there are certificates.
func (s *server) door(l net.Listener, certs *reloaded[*certificates]) net.Listener {
	l = newLimiter(sparing{l}, min(maxWebConns, maxFiles()/2), requestBytes, s.metrics.crowded)
	if certs != nil {
		l = tls.NewListener(l, webConfig(certs))
	}
	return l
}

// client is a connection to the HTTP port, in the context of its requests, which come one after the other.
type client struct {
	*limited
	applied atomic.Bool     // a command of the request under way may have been executed
	running context.Context // ends when the node is about to stop
}

// stopping returns a context that ends when the node is about to stop: an answer without an end of its own then comes to one.
func stopping(r *http.Request) context.Context {
	if c, ok := r.Context().Value(clientKey{}).(*client); ok {
		return c.running
	}
	return context.Background()
}

type clientKey struct{} // of a *client in a context

func withClient(ctx context.Context, c *client) context.Context {
	return withApplied(context.WithValue(ctx, clientKey{}, c), &c.applied)
}

// ServeHTTP answers a request and takes note of it.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	c, ok := r.Context().Value(clientKey{}).(*client)
	if !ok { // it came by another listener
		c = &client{limited: &limited{limiter: new(limiter)}, running: s.running}
		r = r.WithContext(withClient(r.Context(), c))
	}
	c.applied.Store(false)
	a := &answer{ResponseWriter: w, server: s, client: c}
	rt := s.find(rawPath(r))
	e, ok := rt.methods[r.Method]
	if !ok {
		e.series = s.metrics.series(rt.path, methodLabel(r.Method))
	}
	defer func() {
		failure := recover()
		if failure != nil && failure != http.ErrAbortHandler { //nolint:errorlint // net/http compares it so, too
			err := fmt.Errorf("the handler panicked: %v\n%s", failure, debug.Stack())
			if a.status == 0 {
				s.writeError(a, r, err)
				failure = nil
			} else {
				s.log.Error("a request failed", "method", r.Method, "error", err)
				a.status, failure = http.StatusInternalServerError, http.ErrAbortHandler
			}
		}
		took := time.Since(began)
		c.give()
		c.waits(began.Add(took), headerWeight)
		e.series.answered(cmp.Or(a.status, http.StatusInternalServerError), took)
		if failure != nil {
			panic(failure)
		}
	}()
	if err := s.serve(a, r, rt, e.handle); err != nil {
		s.writeError(a, r, err)
	}
	a.begin(http.StatusOK)
}

// answer is the answer to a request. It remembers the status.
type answer struct {
	http.ResponseWriter
	server *server
	client *client
	status int // 0 until it begins
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// begin is called before the header is written. What it says of the leader is as known now.
func (a *answer) begin(status int) {
	if a.status != 0 || status < http.StatusOK {
		return
	}
	a.status = status
	h := a.Header()
	if leader := a.server.store.Leader(); leader != "" {
		h["Raft-Leader"] = []string{leader}
	}
	if a.server.stopping.Load() {
		h["Connection"] = []string{"close"}
	}
}

// WriteHeader is that of http.ResponseWriter.
func (a *answer) WriteHeader(status int) {
	a.begin(status)
	a.ResponseWriter.WriteHeader(status)
}

// Write is that of http.ResponseWriter. It may wait for the other end to read.
func (a *answer) Write(p []byte) (int, error) {
	a.begin(http.StatusOK)
	if len(p) > largeWrite {
		a.client.since.Store(time.Now().UnixNano())
		defer a.client.served()
	}
	return a.ResponseWriter.Write(p)
}

// Flush makes an answer an http.Flusher.
func (a *answer) Flush() { _ = a.FlushError() }

// FlushError is what http.ResponseController calls.
func (a *answer) FlushError() error {
	a.begin(http.StatusOK)
	return http.NewResponseController(a.ResponseWriter).Flush()
}

// linger is for an answer to a client that may still be sending: were its connection closed at once, the answer would be lost.
// net/http waits half a second when a MaxBytesReader has met its limit, so it gets one to do so.
func (a *answer) linger() {
	_, _ = http.MaxBytesReader(a.ResponseWriter, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1))
}

// body is that of a request, which keeps us waiting until all of it has come. Its errors are *httpError.
type body struct {
	io.ReadCloser
	answer *answer
}

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	tooLarge := new(http.MaxBytesError)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		b.answer.client.served()
	case errors.As(err, &tooLarge):
		err = errTooLarge(b.answer.server.cfg.MaxBodyBytes)
	case errors.Is(err, errCrowded):
		b.answer.linger()
		err = &httpError{http.StatusServiceUnavailable, errCrowded.Error()}
	default:
		err = badRequest("the body did not arrive: %v", err)
	}
	return n, err
}

func errTooLarge(limit int64) error {
	return &httpError{
		status: http.StatusRequestEntityTooLarge,
		detail: fmt.Sprintf("the body has more than %d bytes, the limit set by MAX_BODY_BYTES", limit),
	}
}

// find goes by the path as it was sent: net/http's mux would clean and redirect paths that are keys.
func (s *server) find(path string) *route {
	for i := range s.routes {
		rt := &s.routes[i]
		if path == rt.path || strings.HasSuffix(rt.path, "/") && strings.HasPrefix(path, rt.path) {
			return rt
		}
	}
	return &route{path: "none"}
}

// serve has handle answer a request if whoever it comes from may ask so. It is nil where the method is not allowed.
func (s *server) serve(a *answer, r *http.Request, rt *route, handle handlerFunc) error {
	h := a.Header()
	h["X-Content-Type-Options"] = noSniff
	h["Cache-Control"] = noCache
	h["Raft-Served-By"] = s.servedBy
	if err := s.admit(h, r, rt); err != nil {
		return err
	}
	switch {
	case rt.allow == "":
		return &httpError{http.StatusNotFound, "there is no such path"}
	case handle == nil:
		h.Set("Allow", rt.allow)
		return &httpError{http.StatusMethodNotAllowed, r.Method + " is not allowed here; allowed are " + rt.allow}
	case r.ContentLength > s.cfg.MaxBodyBytes+rt.slack:
		a.linger() // without a look at the body, so that it is not asked for
		return errTooLarge(s.cfg.MaxBodyBytes)
	case r.ContentLength == 0:
		a.client.served()
		return handle(a, r)
	}
	a.client.waits(time.Now(), 1)
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout) // a body may take its time, of which the Store knows nothing
	defer cancel()
	r = r.WithContext(ctx)
	r.Body = body{http.MaxBytesReader(a.ResponseWriter, r.Body, s.cfg.MaxBodyBytes+rt.slack), a}
	return handle(a, r)
}

// What every answer says, unless its handler says otherwise.
var (
	noSniff = []string{"nosniff"}  // it is of the type that it says
	noCache = []string{"no-cache"} // a cache asks again before it uses it: else it would make a linearizable read stale
)

// admit says why a request is not served for whoever it comes from, if it is not.
func (s *server) admit(answer http.Header, r *http.Request, rt *route) error {
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

// readBody returns the body. Memory is taken as it arrives, and not as it is announced.
func readBody(r *http.Request) ([]byte, error) {
	var body bytes.Buffer
	body.Grow(int(min(max(r.ContentLength, 0), bytes.MinRead)) + bytes.MinRead)
	_, err := body.ReadFrom(r.Body)
	return body.Bytes(), err
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

// writeBody writes an answer, whose parts are not copied together.
func writeBody(w http.ResponseWriter, contentType string, parts ...[]byte) error {
	size := 0
	for _, part := range parts {
		size += len(part)
	}
	h := w.Header()
	h["Content-Type"] = []string{contentType}
	h["Content-Length"] = []string{strconv.Itoa(size)}
	for _, part := range parts {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
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

	Failed []string `json:"failed,omitempty"` // keys of which a transaction expected something else
}

// writeError is the one place where an error becomes an answer. Where one has begun it is cut short.
func (s *server) writeError(w *answer, r *http.Request, err error) {
	if w.status != 0 {
		s.log.Debug("an answer was cut short", "method", r.Method, "error", err)
		panic(http.ErrAbortHandler)
	}
	p := problem{Type: "about:blank", Status: http.StatusInternalServerError, Detail: "internal error"}
	known := new(httpError)
	if errors.As(err, &known) {
		p.Status, p.Detail = known.status, known.detail
	}
	var unmet interface{ failedKeys() []string }
	if errors.As(err, &unmet) {
		p.Failed = unmet.failedKeys()
	}
	for _, row := range statusOf {
		if errors.Is(err, row.err) {
			p.Status, p.Detail = row.status, row.err.Error()
		}
	}
	p.Title = http.StatusText(p.Status)
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		p.Outcome = "not-applied"
		applied := w.client.applied.Load() && p.Status != http.StatusPreconditionFailed // which says that nothing was done
		if applied || p.Status == http.StatusGatewayTimeout || p.Status == http.StatusInternalServerError {
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
