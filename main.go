// Raftstarter is a highly available key-value service in one binary: JSON values over HTTP, replicated with Raft.
//
// Run with no environment it is a cluster of one node that stores durably and answers on port 11000:
//
//	curl -X POST -d '{"greeting":"hello"}' localhost:11000/key
//	curl localhost:11000/key/greeting
//	curl -X DELETE localhost:11000/key/greeting
//
// A cluster of more nodes is defined in advance: PEERS names all of them, the same on each. Any node answers any
// request; writes are passed on to the leader. raftstarter --help lists what else the environment can say.
//
// DESIGN.md says which file owns what, and why the service may promise what it promises.
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

// How the process ends.
const (
	exitOK     = 0
	exitFailed = 1 // something at run time, which the log names
	exitUsage  = 2 // bad arguments or configuration; nothing was done
)

// ballastBytes are never touched, so they take no memory. The garbage collector counts them: it lets as much more of
// garbage pile up before it runs, where a small state under load would have it run dozens of times a second. It counts them
// towards GOMEMLIMIT, too, which is meant for memory that is there, so that is raised by them.
const ballastBytes = 24 << 20

func main() {
	ballast := make([]byte, ballastBytes)
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		debug.SetMemoryLimit(limit + ballastBytes)
	}
	code := run(os.Args[1:], os.Getenv, notifySignals(), os.Stdout, os.Stderr)
	runtime.KeepAlive(ballast)
	os.Exit(code)
}

// run is the process: it returns its exit code.
func run(args []string, getenv func(string) string, sig signals, stdout, stderr io.Writer) int {
	action, err := parseArgs(args)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return exitUsage
	}
	switch action {
	case "help":
		_, _ = io.WriteString(stdout, helpText) // if standard output is gone, nobody is left to tell
		return exitOK
	case "version":
		fmt.Fprintln(stdout, version)
		return exitOK
	case "healthcheck":
		if err := checkHealth(getenv); err != nil {
			fmt.Fprintln(stderr, "raftstarter:", err)
			return exitFailed
		}
		return exitOK
	}
	var cfg *Config
	loaded := make(chan error, 1)
	go func() { // it may wait for files on a mount that is dead, or for a name server
		var err error
		cfg, err = loadConfig(getenv, thisSystem())
		loaded <- err
	}()
	select {
	case err := <-loaded:
		if err != nil {
			fmt.Fprintln(stderr, err)
			return exitUsage
		}
	case <-sig.stop:
		return exitOK
	}
	m := newMetrics()
	log, flush := openLog(cfg, stderr, m.dropped)
	defer flush()
	if err := serve(cfg, sig, m, log); err != nil {
		log.SetLevel(min(log.GetLevel(), hclog.Error)) // an end has its reason told even where LOG_LEVEL is off
		log.Error(err.Error())
		return exitFailed
	}
	return exitOK
}

func parseArgs(args []string) (action string, err error) {
	if len(args) == 0 {
		return "serve", nil
	}
	switch args[0] {
	case "-h", "-help", "--help":
		action = "help"
	case "--version":
		action = "version"
	case "--healthcheck":
		action = "healthcheck"
	}
	if action == "" || len(args) > 1 {
		return "", fmt.Errorf("raftstarter: unexpected arguments %q; configuration comes from the environment, see --help", args)
	}
	return action, nil
}

// warnOfOpenPorts says what is open to whom, unless it is open to nobody but this machine.
func warnOfOpenPorts(cfg *Config, log hclog.Logger) {
	var open []string
	host := func(addr string) net.IP {
		host, _, _ := net.SplitHostPort(addr)
		return net.ParseIP(host)
	}
	if !host(cfg.HTTPAddr).IsLoopback() {
		switch {
		case cfg.HTTPTokenFile == "":
			open = append(open, "whoever reaches the HTTP port can read and write: set HTTP_TOKEN_FILE")
		case cfg.TLSCertFile == "":
			open = append(open, "tokens cross the network in the clear: set the TLS files")
		}
	}
	if cfg.TLSCertFile == "" && !host(cfg.RaftAddr).IsLoopback() {
		open = append(open, "whoever reaches the Raft port can take the cluster over: set the TLS files, or let only the peers reach it")
	}
	if len(open) > 0 {
		log.Warn("open ports: " + strings.Join(open, "; "))
	}
}

// serve runs the node until a signal or an error ends it.
func serve(cfg *Config, sig signals, m *metrics, log hclog.Logger) error {
	log.Info("configuration", cfg.logPairs()...)
	for _, warning := range cfg.Warnings {
		log.Warn(warning)
	}
	if err := m.collectRaft(); err != nil {
		return err
	}
	machine := newMachine()
	store := NewStore(cfg, machine, m, log)
	store.OnChange(func(s RaftState) { // here a service of your own can react to being the leader, or no longer
		log.Info("new raft state", "state", s.State, "leader", s.Leader, "term", s.Term)
	})
	handler := newServer(cfg, store, m, log.Named("http"), routes(cfg, store, machine))
	web := handler.listener()
	defer web.Close()

	httpFailed := make(chan error, 1)
	start := func() error { // it may wait for files on a mount that is dead, and for a large or locked database
		certs, err := openCertificates(cfg, m, log)
		if err != nil {
			return err
		}
		tokens, err := openTokens(cfg, log)
		if err != nil {
			return err
		}
		warnOfOpenPorts(cfg, log)
		go reloadForever(certs, tokens, sig.reload, log)
		store.certs, handler.tokens = certs, tokens
		listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", cfg.HTTPAddr)
		if err != nil {
			return fmt.Errorf("listen on HTTP_ADDR:HTTP_PORT %s: %w", cfg.HTTPAddr, err)
		}
		go func() { httpFailed <- web.Serve(handler.door(listener, certs)) }()
		return store.Open()
	}
	opened, open := make(chan error, 1), false
	go func() { opened <- start() }()

	current := store.Current()
	for {
		select {
		case <-current:
			current = nil
			log.Info("ready: " + localURL(cfg))
		case err := <-opened:
			if err != nil {
				return err
			}
			open = true
			log.Info("listening", "http", cfg.HTTPAddr, "raft", cfg.RaftAddr)
		case s := <-sig.stop:
			if !open {
				return nil // nothing has been done that could be left half done
			}
			log.Info("stopping; a second signal ends the process at once", "signal", s.String())
			return shutdown(handler, web, cfg.ShutdownTimeout, sig)
		case err := <-store.Failed():
			if open {
				store.Abandon() // the process itself may hang in the kernel until the disk answers
			}
			return err
		case err := <-httpFailed:
			return fmt.Errorf("serve HTTP: %w", err)
		}
	}
}

// reloadForever reads the files that may be renewed again and again, for as long as the process runs: they may be on a
// mount that is dead.
func reloadForever(certs *reloaded[*certificates], tokens *reloaded[tokens], asked <-chan os.Signal, log hclog.Logger) {
	for tick := time.Tick(reloadInterval); ; {
		select {
		case <-tick:
			certs.reload(false)
			tokens.reload(false)
		case <-asked:
			log.Info("SIGHUP: reading certificates and tokens again; nothing else can change without a restart",
				"certificates", certs != nil, "tokens", tokens != nil)
			certs.reload(true)
			tokens.reload(true)
		}
	}
}

// lastRequests is for how long a node that stops takes more requests on connections that are kept alive.
const lastRequests = 500 * time.Millisecond

// shutdown lets requests under way finish, hands leadership over, and stops Raft. It has timeout for all of it, and
// still exits cleanly when that is over: what was acknowledged is safe at any moment.
func shutdown(s *server, web *http.Server, timeout time.Duration, sig signals) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s.stopping.Store(true)
	s.stop()
	done := make(chan error, 1)
	go func() {
		// Answers close their connections from now on. A connection that is kept alive is given the time for one more: if it
		// were closed at once, a request that is on its way on it would be lost.
		time.Sleep(min(lastRequests, timeout/8))
		// Requests may hang where there is no quorum; they must not use up the time of those that come after.
		drain, cancel := context.WithTimeout(ctx, timeout*2/3)
		defer cancel()
		err := web.Shutdown(drain)
		done <- errors.Join(err, s.store.Shutdown(ctx))
	}()
	select {
	case err := <-done:
		if err != nil {
			s.log.Warn("not everything stopped in time", "error", err)
		}
		s.log.Info("stopped")
	case <-ctx.Done():
		s.log.Warn("not everything stopped within SHUTDOWN_TIMEOUT", "timeout", timeout)
	case s := <-sig.stop:
		return fmt.Errorf("ended by a second signal (%v)", s)
	case err := <-s.store.Failed():
		return err
	}
	return nil
}

// localURL returns the URL at which this machine reaches the HTTP port.
func localURL(cfg *Config) string {
	host, port, _ := net.SplitHostPort(cfg.HTTPAddr) // which loadConfig has made
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	scheme := "http"
	if cfg.TLSCertFile != "" {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

// checkHealth asks the node that runs with the same environment whether it is alive. It tells it no secret, and believes
// whatever certificate it shows: that of a live node may have expired, and its files may be in the middle of a change.
func checkHealth(getenv func(string) string) error {
	cfg, err := loadHealthcheck(getenv)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{ // through no proxy
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}, //nolint:gosec // see above
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, localURL(cfg)+"/livez", http.NoBody)
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
