package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file serves HTTP for any state machine: limits, tokens, web origins, panics, metrics, probes and status. The
// routes of this service are in http.go.

const (
	maxHeader     = 12 << 10         // bytes; net/http reads 4 KiB more; a key of 1024 bytes is 3 KiB in a path
	answerTimeout = 14 * time.Second // for the answer to a request with a body, from the end of its header on
)

// What every answer says, unless its handler says otherwise.
var (
	noSniff = []string{"nosniff"}  // browsers must not guess another content type
	noCache = []string{"no-cache"} // a cache must ask again before each use, or it would make linearizable reads stale
)

// server answers HTTP requests: those to its routes, and those of probes and operators. It is an http.Handler.
type server struct {
	cfg      *Config
	store    *Store
	tokens   *reloaded[tokens] // nil for none
	metrics  *metrics
	log      hclog.Logger
	routes   []route
	page     *route
	origins  *http.CrossOriginProtection
	servedBy []string        // of every answer
	stopping context.Context // done when the node begins to shut down: load balancers are told, and streams end
	stop     context.CancelFunc
}

func newServer(
	cfg *Config, store *Store, tokens *reloaded[tokens], m *metrics, log hclog.Logger, routes []route,
) *server {
	s := &server{
		cfg: cfg, store: store, tokens: tokens, metrics: m, log: log, page: newPage(),
		origins: http.NewCrossOriginProtection(), servedBy: []string{cfg.NodeID},
	}
	s.routes = append(slices.Clone(routes),
		route{path: "/livez", get: s.livez, noToken: true},
		route{path: "/readyz", get: s.readyz, noToken: true},
		route{path: "/status", get: s.status},
		route{path: "/metrics", get: s.scrape, noToken: true})
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s
}

// httpServer returns an http.Server for s, with all limits on requests.
func (s *server) httpServer() *http.Server {
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
			return s.withClient(ctx, conn.(*limitedConn))
		},
	}
}

// limitListener returns a listener over l with the limits on connections, and with TLS if there are certificates.
func (s *server) limitListener(l net.Listener, certs *reloaded[*certificates]) net.Listener {
	limiter := newConnLimiter(l, min(maxWebConns, maxFiles()/2), requestBytes, s.metrics.overLimit)
	limiter.pause = churnPause
	l = limiter
	if certs != nil {
		l = tls.NewListener(l, webConfig(certs))
	}
	return l
}

// client is a connection to the HTTP port. It is in the context of its requests, which come one after the other.
type client struct {
	*limitedConn
	executed atomic.Int32    // how many commands of the request under way have been, or may have been: see withCount
	stopping context.Context // of the server
}

// setSendBuffer sets how much of answers the kernel holds for the client, in bytes. It doubles that.
func (c *client) setSendBuffer(bytes int) {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(bytes)
	}
}

// stopping returns a context that is done when the node begins to shut down. An answer without an end ends then.
func stopping(r *http.Request) context.Context {
	return clientOf(r).stopping
}

func clientOf(r *http.Request) *client { return r.Context().Value(clientKey{}).(*client) }

type clientKey struct{} // of a *client in a context

// withClient returns the context of a connection that limitListener has accepted.
func (s *server) withClient(ctx context.Context, conn *limitedConn) context.Context {
	c := &client{limitedConn: conn, stopping: s.stopping}
	c.setSendBuffer(sendBuffer)
	return withCount(context.WithValue(ctx, clientKey{}, c), &c.executed)
}

// ServeHTTP answers a request and counts it.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	c := clientOf(r)
	c.executed.Store(0)
	a := &response{ResponseWriter: w, server: s, client: c}
	rt := s.find(r)
	defer func() {
		took := time.Since(began)
		c.releaseMemory()
		c.expect(began.Add(took), headerWeight)
		c.answered.Store(true)
		s.metrics.answered(rt.path, r.Method, cmp.Or(a.status, http.StatusInternalServerError), took)
	}()
	if err := s.handle(a, r, rt); err != nil {
		s.writeError(a, r, err)
	}
	a.begin(http.StatusOK)
}

// find goes by the path as it was sent: http.ServeMux would clean and redirect paths that are keys, such as /key/a//b.
func (s *server) find(r *http.Request) *route {
	path := rawPath(r)
	for i := range s.routes {
		rt := &s.routes[i]
		if path == rt.path || strings.HasSuffix(rt.path, "/") && strings.HasPrefix(path, rt.path) {
			return rt
		}
	}
	if asksForPage(r) {
		return s.page
	}
	return &route{path: "none"}
}

// handle checks whether the client may send such a request, and calls the handler. A panic of the handler is returned
// as an error.
func (s *server) handle(a *response, r *http.Request, rt *route) (err error) {
	h := a.Header()
	h["X-Content-Type-Options"] = noSniff
	h["Cache-Control"] = noCache
	h["Raft-Served-By"] = s.servedBy
	if r.URL.Path == "/" {
		h["Vary"] = []string{"Accept"} // which decides between the page and 404
	}
	if err := s.authorize(h, r, rt); err != nil {
		return err
	}
	handler, limit := rt.handler(r.Method), s.cfg.MaxBodyBytes+rt.slack
	switch {
	case handler == nil && rt.allow() == "":
		return errNotFound
	case handler == nil:
		h.Set("Allow", rt.allow())
		return statusError(http.StatusMethodNotAllowed, "%s is not allowed here; allowed are %s", r.Method, rt.allow())
	case r.ContentLength > limit:
		a.delayClose() // the body is not read, so that a client that asks first (Expect: 100-continue) does not send it
		return errTooLarge(s.cfg.MaxBodyBytes)
	}
	defer func() {
		cause := recover()
		if cause == http.ErrAbortHandler { //nolint:errorlint // net/http compares it so, too
			panic(cause)
		}
		if cause != nil {
			err = fmt.Errorf("%w: %v\n%s", errPanicked, cause, debug.Stack())
		}
	}()
	if r.ContentLength == 0 {
		a.client.endWait()
		return handler(a, r)
	}
	a.client.expect(time.Now(), 1)
	if r.Method != http.MethodGet && r.Method != http.MethodHead { // which may be streams
		// The Store's own time limit begins only when the body has arrived.
		ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
		defer cancel()
		r = r.WithContext(ctx)
	}
	r.Body = requestBody{http.MaxBytesReader(a.ResponseWriter, r.Body, limit), a}
	return handler(a, r)
}

// authorize checks the token, and that no web page of another origin changes anything.
func (s *server) authorize(answer http.Header, r *http.Request, rt *route) error {
	if s.tokens != nil && !rt.noToken {
		if err := s.tokens.get().check(r); err != nil {
			answer.Set("WWW-Authenticate", `Bearer realm="raftstarter"`)
			return statusError(http.StatusUnauthorized, "%v", err)
		}
	}
	if s.origins.Check(r) != nil {
		return statusError(http.StatusForbidden, "a web page of another origin may not change anything here")
	}
	return nil
}

func (s *server) livez(w http.ResponseWriter, _ *http.Request) error {
	return writeBody(w, textType, []byte("ok\n"))
}

func (s *server) readyz(w http.ResponseWriter, _ *http.Request) error {
	err := s.store.Ready()
	if s.stopping.Err() != nil {
		err = errors.New("this node is shutting down")
	}
	if err != nil {
		return statusError(http.StatusServiceUnavailable, "not ready: %v", err)
	}
	return writeBody(w, textType, []byte("ok\n"))
}

func (s *server) status(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, s.store.Status())
}

func (s *server) scrape(w http.ResponseWriter, r *http.Request) error {
	s.metrics.handler().ServeHTTP(w, r)
	return nil
}
