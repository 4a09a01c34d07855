// Raftstarter is a highly available key-value service in one binary: JSON values over HTTP, replicated with Raft.
//
// Run with no environment it is a cluster of one node that stores durably and answers on port 11000:
//
//	curl -X POST -d '{"greeting":"hello"}' localhost:11000/key
//	curl localhost:11000/key/greeting
//	curl -X DELETE localhost:11000/key/greeting
//
// PEERS names all nodes of a larger cluster in advance, the same on each of them. Any node answers any request; a
// follower forwards writes to the leader. raftstarter --help lists every variable.
//
// docs/fork.md shows how to make it a service of your own. DESIGN.md says what each file does, and why the service can
// promise what it promises.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The exit codes of the process.
const (
	exitOK     = 0
	exitFailed = 1 // at run time; the log says why
	exitUsage  = 2 // bad arguments or configuration; nothing was done
)

// lastRequests is for how long a node that stops still answers requests on connections that are kept alive.
const lastRequests = 500 * time.Millisecond

// The garbage collector runs when garbagePercent of what is in use has piled up as garbage. That bounds memory by the
// state; Go's own 100 would have a node with much data hold as much garbage again. Whoever sets GOGC has it.
//
// ballastBytes are allocated and never touched, so they take no memory. The collector counts them as in use: with a
// small state under load it would else run dozens of times a second. It counts them towards GOMEMLIMIT, too, which is
// therefore raised by as much.
const (
	garbagePercent = 25
	ballastBytes   = 100 << 20
)

// Go keeps memory that it had in use, for it may need it again. A node that has become quiet gives it back: one that
// has allocated much, and then less than quietBytes within quietInterval.
const (
	quietInterval = 5 * time.Second
	quietBytes    = 4 << 20
	muchBytes     = 32 << 20 // less is not worth a collection
)

func main() {
	ballast := make([]byte, ballastBytes)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		debug.SetMemoryLimit(limit + ballastBytes)
	}
	go freeWhenQuiet()
	code := run(os.Args[1:], os.Getenv, notifySignals(), os.Stdout, os.Stderr)
	runtime.KeepAlive(ballast)
	os.Exit(code)
}

// freeWhenQuiet gives memory back to the system whenever the node has become quiet, until the process ends.
func freeWhenQuiet() {
	var stats runtime.MemStats
	var last, freed uint64 // of all that has been allocated: 5 s ago, and when memory was given back
	for range time.Tick(quietInterval) {
		runtime.ReadMemStats(&stats)
		if stats.TotalAlloc-last < quietBytes && stats.TotalAlloc-freed > muchBytes {
			debug.FreeOSMemory()
			freed = stats.TotalAlloc
		}
		last = stats.TotalAlloc
	}
}

// run does what the arguments ask for and returns the exit code.
func run(args []string, getenv func(string) string, sig signals, stdout, stderr io.Writer) int {
	if len(args) == 1 {
		switch args[0] {
		case "-h", "-help", "--help":
			_, _ = io.WriteString(stdout, helpText) // if standard output is closed there is nobody to tell
			return exitOK
		case "--version":
			fmt.Fprintln(stdout, version)
			return exitOK
		case "--healthcheck":
			if err := checkHealth(getenv); err != nil {
				say(stderr, "raftstarter:", err)
				return exitFailed
			}
			return exitOK
		}
	}
	if len(args) > 0 {
		say(stderr, fmt.Sprintf("raftstarter: unexpected arguments %q; configuration comes from the environment, "+
			"see --help", args))
		return exitUsage
	}
	var cfg *Config
	stopped, err := untilSignal(sig, func() (err error) {
		cfg, err = loadConfig(getenv, thisSystem())
		return err
	})
	if stopped {
		return exitOK
	}
	if err != nil {
		say(stderr, err)
		return exitUsage
	}
	m := newMetrics()
	log, flush := openLog(cfg, stderr, m.dropped)
	defer flush()
	if err := serve(cfg, sig, m, log); err != nil {
		log.SetLevel(min(log.GetLevel(), hclog.Error)) // so that LOG_LEVEL=off does not hide the reason
		log.Error(err.Error())
		return exitFailed
	}
	return exitOK
}

// say writes a line to stderr before there is a log. Nobody may be reading it: then the process ends all the same.
func say(stderr io.Writer, words ...any) {
	done := make(chan struct{})
	go func() {
		fmt.Fprintln(stderr, words...)
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(flushTimeout):
	}
}

// untilSignal calls f and returns its error, or stopped if a signal asks to stop before f returns. f may hang, because
// it reads files, which may be on a network file system, or asks a name server.
func untilSignal(sig signals, f func() error) (stopped bool, err error) {
	done := make(chan error, 1)
	go func() { done <- f() }() // if it hangs, until the process ends
	select {
	case err := <-done:
		return false, err
	case <-sig.stop:
		return true, nil
	}
}

// serve opens and connects all parts of the node, and runs it until a signal or an error ends it.
func serve(cfg *Config, sig signals, m *metrics, log hclog.Logger) error {
	log.Info("configuration", cfg.logPairs()...)
	for _, warning := range cfg.Warnings {
		log.Warn(warning)
	}
	var certs *reloaded[*certificates]
	var tokens *reloaded[tokens]
	var listener net.Listener
	stopped, err := untilSignal(sig, func() (err error) {
		if certs, err = openCertificates(cfg, m, log); err != nil {
			return err
		}
		if tokens, err = openTokens(cfg, log); err != nil {
			return err
		}
		if listener, err = new(net.ListenConfig).Listen(context.Background(), "tcp", cfg.HTTPAddr); err != nil {
			return fmt.Errorf("listen on HTTP_ADDR:HTTP_PORT %s: %w", cfg.HTTPAddr, err)
		}
		return nil
	})
	if stopped {
		log.Info("stopped while certificates and tokens were being read")
	}
	if stopped || err != nil {
		return err
	}
	warnOfOpenPorts(cfg, log)
	go reloadForever(certs, tokens, sig.reload, log)

	machine := newMachine()
	store := NewStore(cfg, machine, m, log)
	store.OnChange(func(s RaftState) { // a place for code that runs only on the leader
		log.Info("new raft state", "state", s.State, "leader", s.Leader, "term", s.Term)
	})
	handler := newServer(cfg, store, tokens, m, log.Named("http"), routes(store, machine))
	web := handler.httpServer()
	defer web.Close()
	n := &node{cfg, certs, sig, log, store, handler, web}
	return n.run(handler.limitListener(listener, certs))
}

// node is what run and shutdown need.
type node struct {
	cfg     *Config
	certs   *reloaded[*certificates] // nil for no TLS
	sig     signals
	log     hclog.Logger
	store   *Store
	handler *server
	web     *http.Server
}

// run serves HTTP, opens the store, and returns when a signal or an error has ended the node.
func (n *node) run(listener net.Listener) error {
	httpFailed, opened := make(chan error, 1), make(chan error, 1)
	go func() { httpFailed <- n.web.Serve(listener) }() // until it is closed
	go func() { opened <- n.store.Open(n.certs) }()     // it may wait for a large or locked database
	open, ready := false, n.store.WasReady()
	for {
		select {
		case err := <-opened:
			if err != nil {
				return err
			}
			open = true
			n.log.Info("listening", "http", n.cfg.HTTPAddr, "raft", n.cfg.RaftAddr)
		case <-ready:
			ready = nil // once
			n.log.Info("ready: " + localURL(n.cfg, "localhost"))
		case s := <-n.sig.stop:
			if !open { // nothing has been done that could be left half done
				n.handler.stop()
				n.store.Cancel()
				n.answerLast(context.Background())
				n.log.Info("stopped while the storage was being opened", "signal", s.String())
				return nil
			}
			n.log.Info("stopping; a second signal ends the process at once", "signal", s.String())
			return n.shutdown()
		case err := <-n.store.Failed():
			if open {
				n.store.Abandon() // the process may be unable to exit until its disk answers
			}
			return err
		case err := <-httpFailed:
			return fmt.Errorf("serve HTTP: %w", err)
		}
	}
}

// shutdown lets requests under way finish, hands leadership over and stops Raft, all within SHUTDOWN_TIMEOUT. If that
// is not enough the node ends all the same, without an error: nothing that was acknowledged can be lost.
func (n *node) shutdown() error {
	timeout := n.cfg.ShutdownTimeout
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	n.handler.stop()
	done := make(chan error, 1)
	go func() {
		// Answers close their connections from now on. An idle connection stays open for a moment, because a request
		// may be on its way on it.
		time.Sleep(min(lastRequests, timeout/8))
		// Requests hang where there is no majority. They must leave time for the steps after this.
		drain, cancel := context.WithTimeout(ctx, timeout*2/3)
		defer cancel()
		err := n.web.Shutdown(drain)
		err = errors.Join(err, n.store.Shutdown(ctx))
		n.answerLast(ctx)
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			n.log.Warn("not everything stopped in time", "error", err)
		}
		n.log.Info("stopped")
	case <-ctx.Done():
		n.log.Warn("not everything stopped within SHUTDOWN_TIMEOUT", "timeout", timeout)
	case s := <-n.sig.stop:
		return fmt.Errorf("ended by a second signal (%v)", s)
	case err := <-n.store.Failed():
		return err
	}
	return nil
}

// answerLast lets requests end that waited for a leader, and have an error now.
func (n *node) answerLast(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, min(lastRequests, n.cfg.ShutdownTimeout))
	defer cancel()
	_ = n.web.Shutdown(ctx) // what is left is closed
}

// reloadForever reads the files of certificates and tokens again every few seconds, and at once on SIGHUP, for as long
// as the process runs. It has a goroutine of its own because reading them may hang.
func reloadForever(certs *reloaded[*certificates], tokens *reloaded[tokens], asked <-chan os.Signal, log hclog.Logger) {
	for tick := time.Tick(reloadInterval); ; {
		select {
		case <-tick:
			certs.reload(false)
			tokens.reload(false)
		case <-asked:
			log.Info("SIGHUP: reading certificates and tokens again; PEERS_FILE is read every second",
				"certificates", certs != nil, "tokens", tokens != nil)
			certs.reload(true)
			tokens.reload(true)
		}
	}
}

// warnOfOpenPorts logs what other machines can do without a token or a certificate.
func warnOfOpenPorts(cfg *Config, log hclog.Logger) {
	var open []string
	if host, _, _ := net.SplitHostPort(cfg.HTTPAddr); !isLoopback(host) {
		switch {
		case cfg.HTTPTokenFile == "":
			open = append(open, "whoever reaches the HTTP port can read and write: set HTTP_TOKEN_FILE")
		case cfg.TLSCertFile == "":
			open = append(open, "tokens cross the network in the clear: set the TLS files")
		}
	}
	if host, _, _ := net.SplitHostPort(cfg.RaftAddr); cfg.TLSCertFile == "" && !isLoopback(host) {
		open = append(open, "whoever reaches the Raft port can take the cluster over: set the TLS files, or let only "+
			"the peers reach it")
	}
	if len(open) > 0 {
		log.Warn("open ports: " + strings.Join(open, "; "))
	}
}

// localURL returns the URL at which this machine reaches the HTTP port. self is this machine, where HTTP_ADDR names no
// address.
func localURL(cfg *Config, self string) string {
	host, port, _ := net.SplitHostPort(cfg.HTTPAddr) // loadConfig has checked it
	if isUnspecified(host) {
		host = self
	}
	scheme := "http"
	if cfg.TLSCertFile != "" {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(strings.ReplaceAll(host, "%", "%25"), port) // % begins a zone
}

// checkHealth asks the node that runs with the same environment whether it is alive. It accepts any certificate,
// because that of a live node may have expired, and sends no secret.
func checkHealth(getenv func(string) string) error {
	cfg, err := loadHealthcheck(getenv)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{ // without a proxy
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}, //nolint:gosec // as said
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, localURL(cfg, "127.0.0.1")+"/livez", http.NoBody)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("/livez answers %s", response.Status)
	}
	return nil
}
