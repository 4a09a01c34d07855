package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Consistency says how fresh a read must be.
type Consistency string

const (
	// Linearizable reads see every write acknowledged before they began.
	Linearizable Consistency = "linearizable"
	// Stale reads see what this node has, whether or not there is a leader.
	Stale Consistency = "stale"
)

func parseConsistency(s string) (Consistency, error) {
	if c := Consistency(s); c == Linearizable || c == Stale {
		return c, nil
	}
	return "", fmt.Errorf("%q is not a consistency: use %s or %s", s, Linearizable, Stale)
}

// The values of KV_STORE.
const (
	storeBolt   = "boltdb"
	storeMemory = "memory"
)

// version is set when a release is built: -ldflags "-X main.version=v1.2.3".
var version = "dev"

const (
	maxBodyBytes = 2 << 20              // the largest MAX_BODY_BYTES
	maxDuration  = 365 * 24 * time.Hour // of a variable: sums and multiples of it must not overflow
)

// Config is the effective configuration: valid, complete, and not changed once loaded.
type Config struct {
	NodeID            string
	StateDir          string // not used when KVStore is storeMemory
	KVStore           string // storeBolt or storeMemory
	HTTPAddr          string // host:port to listen on
	RaftAddr          string // host:port to listen on
	RaftAdvertise     string // host:port peers are told; this node's entry in PEERS; "" if it is not known
	Peers             []Peer // in the order of their ids, this node included unless PeersFile leaves it out
	PeersFile         string // "" for PEERS
	ReadConsistency   Consistency
	LogLevel          string // as hclog names it, lower-case
	LogFormat         string // text or json
	MaxBodyBytes      int64
	SnapshotThreshold uint64 // log entries
	SnapshotInterval  time.Duration
	TrailingLogs      uint64 // log entries
	ShutdownTimeout   time.Duration
	HTTPTokenFile     string // "" for no tokens
	TLSCertFile       string // "" for no TLS, as the next two
	TLSKeyFile        string
	TLSCAFile         string
	Warnings          []string // what the operator should know, though the node can run; the caller logs them
}

// helpText is what --help prints. README.md has the same as a table; a test holds both and loadConfig together.
//
//go:embed help.txt
var helpText string

// system is what loadConfig needs to know of the machine. Tests make one up.
type system struct {
	hostname string        // "" if unknown
	addrs    []netip.Addr  // of its interfaces
	hostIPv4 func() string // called only if needed, because it may ask a name server
}

func thisSystem() system {
	hostname, _ := os.Hostname() // loadConfig says what to do without one
	sys := system{hostname: hostname}
	addrs, _ := net.InterfaceAddrs() // without them some defaults and warnings are missing
	for _, addr := range addrs {
		if prefix, err := netip.ParsePrefix(addr.String()); err == nil {
			sys.addrs = append(sys.addrs, prefix.Addr())
		}
	}
	sys.hostIPv4 = func() string {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second) // the name server may be down
		defer cancel()
		ips, _ := net.DefaultResolver.LookupNetIP(ctx, "ip4", hostname)
		for _, ip := range ips {
			if ip = ip.Unmap(); ip.Is4() && !ip.IsUnspecified() {
				return ip.String()
			}
		}
		for _, ip := range sys.addrs {
			if ip.Is4() && ip.IsGlobalUnicast() {
				return ip.String()
			}
		}
		return "127.0.0.1"
	}
	return sys
}

// owns reports whether host is this machine, as far as it knows without asking a name server.
func (sys system) owns(host string) bool {
	ip, err := netip.ParseAddr(host)
	return isLoopback(host) || strings.EqualFold(host, sys.hostname) || err == nil && slices.Contains(sys.addrs, ip)
}

// env reads variables and collects what is wrong with them. A host or port that cannot be parsed becomes "", so that
// later checks do not report it a second time.
type env struct {
	get      func(name string) string
	problems []error
}

func (e *env) problem(format string, args ...any) {
	e.problems = append(e.problems, fmt.Errorf(format, args...))
}

// invalid reports what is wrong with the value of a variable, and the cure.
func (e *env) invalid(name, why, cure string) {
	e.problem("%s=%q %s: set %s to %s", name, e.get(name), why, name, cure)
}

func (e *env) text(name, def string) string { return cmp.Or(e.get(name), def) }

func (e *env) word(name, def string, choices ...string) string {
	word := strings.ToLower(e.text(name, def))
	if !slices.Contains(choices, word) {
		e.invalid(name, "is not known", "one of "+strings.Join(choices, ", "))
	}
	return word
}

func (e *env) number(name string, def, least, most uint64) uint64 {
	n, err := strconv.ParseUint(e.text(name, strconv.FormatUint(def, 10)), 10, 64)
	if err != nil || n < least || n > most {
		e.invalid(name, "will not do", fmt.Sprintf("a whole number from %d to %d", least, most))
	}
	return n
}

func (e *env) duration(name string, def, least time.Duration) time.Duration {
	d, err := time.ParseDuration(e.text(name, def.String()))
	if err != nil {
		e.invalid(name, "is not a duration", "one such as 8s or 1m30s")
	} else if d < least || d > maxDuration {
		e.invalid(name, "will not do", fmt.Sprintf("a duration from %v to %v", least, maxDuration))
	}
	return d
}

func (e *env) port(name, def string) string {
	text := e.text(name, def)
	port, ok := parsePort(text)
	if strings.HasPrefix(text, "tcp://") {
		e.problem("%s=%q is a Kubernetes service link, not a port: set enableServiceLinks: false in the pod, "+
			"or %s to %s", name, text, name, portRule)
	} else if !ok && text != "" {
		e.invalid(name, "is not a port", portRule)
	}
	return port
}

// host reads a host. parse is parseHost for an address to listen on, parsePeerHost for one that others dial.
func (e *env) host(name, def string, parse func(string) (host, why string)) string {
	text := e.text(name, def)
	if text == "" {
		return ""
	}
	host, why := parse(text)
	if why != "" {
		e.invalid(name, why, hostRule+", without a port")
	}
	return host
}

// directory reads a path. What a shell would have expanded, such as ~ or $HOME, is not expanded here.
func (e *env) directory(name, def string) string {
	dir := e.get(name)
	control := strings.ContainsFunc(dir, unicode.IsControl)
	if control || strings.HasPrefix(dir, "~") || strings.ContainsAny(dir, "\"'`$") {
		e.invalid(name, "has quotes, control characters, a leading ~ or a $, which nobody has expanded",
			"the path itself, such as /var/lib/raftstarter")
	}
	return cmp.Or(dir, def)
}

func (e *env) httpAddr() (host, port string) {
	return e.host("HTTP_ADDR", "0.0.0.0", parseHost), e.port("HTTP_PORT", "11000")
}

// loadConfig reads the environment. Its error joins all problems, one a line.
func loadConfig(getenv func(string) string, sys system) (*Config, error) {
	e := &env{get: getenv}
	c := &Config{NodeID: e.text("NODE_ID", sys.hostname)}
	c.StateDir = e.directory("STATE_DIR", "/tmp/"+c.NodeID)
	c.KVStore = e.word("KV_STORE", storeBolt, storeBolt, storeMemory)
	httpHost, httpPort := e.httpAddr()
	raftHost, raftPort := e.host("RAFT_ADDR", "0.0.0.0", parseHost), e.port("RAFT_PORT", "12000")
	overlap := strings.EqualFold(httpHost, raftHost) || isUnspecified(httpHost) || isUnspecified(raftHost)
	if overlap && httpPort == raftPort && httpPort != "" && httpHost != "" && raftHost != "" {
		e.problem("HTTP_PORT=%q and RAFT_PORT=%q are one port, and HTTP_ADDR=%q and RAFT_ADDR=%q overlap: "+
			"set HTTP_PORT or RAFT_PORT to another number", httpPort, raftPort, httpHost, raftHost)
	}
	c.HTTPAddr, c.RaftAddr = net.JoinHostPort(httpHost, httpPort), net.JoinHostPort(raftHost, raftPort)
	e.identify(c, sys)
	const linearizable, stale = string(Linearizable), string(Stale)
	c.ReadConsistency = Consistency(e.word("READ_CONSISTENCY", linearizable, linearizable, stale))
	c.LogLevel = e.word("LOG_LEVEL", "info", "trace", "debug", "info", "warn", "error", "off")
	c.LogFormat = e.word("LOG_FORMAT", "text", "text", "json")
	c.MaxBodyBytes = int64(e.number("MAX_BODY_BYTES", 512<<10, 1, maxBodyBytes))
	c.SnapshotThreshold = e.number("SNAPSHOT_THRESHOLD", 8192, 1, math.MaxInt64)
	c.SnapshotInterval = e.duration("SNAPSHOT_INTERVAL", 30*time.Second, 5*time.Millisecond)
	c.TrailingLogs = e.number("TRAILING_LOGS", 4096, 0, math.MaxInt64)
	c.ShutdownTimeout = e.duration("SHUTDOWN_TIMEOUT", 8*time.Second, 1)
	c.HTTPTokenFile = e.text("HTTP_TOKEN_FILE", "")
	c.TLSCertFile = e.text("TLS_CERT_FILE", "")
	c.TLSKeyFile = e.text("TLS_KEY_FILE", "")
	c.TLSCAFile = e.text("TLS_CA_FILE", "")
	e.checkFiles(c)
	if len(e.problems) > 0 {
		return nil, errors.Join(e.problems...)
	}
	return c, nil
}

// loadHealthcheck reads as much as it takes to ask the node that runs with the same environment whether it is alive.
// What is wrong with other variables, or with files by now, does that node no harm.
func loadHealthcheck(getenv func(string) string) (*Config, error) {
	e := &env{get: getenv}
	host, port := e.httpAddr()
	c := &Config{HTTPAddr: net.JoinHostPort(host, port), TLSCertFile: e.text("TLS_CERT_FILE", "")}
	return c, errors.Join(e.problems...)
}

// identify sets the node's id, its peers and its advertised address.
func (e *env) identify(c *Config, sys system) {
	host, port := e.host("RAFT_ADVERTISE_ADDR", "", parsePeerHost), e.port("RAFT_ADVERTISE_PORT", "")
	from := e.readPeers(c)
	named := fmt.Sprintf("NODE_ID=%q", c.NodeID)
	if e.get("NODE_ID") == "" {
		named = fmt.Sprintf("NODE_ID is unset and the system hostname %q", sys.hostname)
	}
	if !validID(c.NodeID) {
		e.problem("%s is not a node id: set NODE_ID to %s", named, idRule)
		return // the checks below would only report the same
	}
	_, raftPort, _ := net.SplitHostPort(c.RaftAddr)
	i := slices.IndexFunc(c.Peers, func(p Peer) bool { return p.ID == c.NodeID })
	switch {
	case i >= 0:
		c.RaftAdvertise = c.Peers[i].Addr
		c.warnOfPeers(host, port, sys)
		return
	case len(c.Peers) > 0 && (c.PeersFile == "" || !c.hasState()):
		e.problem("%s is not in %s, which has %q: set NODE_ID to one of these, or add this node to %[2]s on every node",
			named, from, peerIDs(c.Peers))
		return
	}
	if len(c.Peers) > 0 {
		c.Warnings = append(c.Warnings,
			named+" is not in PEERS_FILE: this node is to leave the cluster")
	} else if host == "" {
		host = sys.hostIPv4()
	}
	if host != "" { // else it is where the cluster's configuration says
		c.RaftAdvertise = net.JoinHostPort(host, cmp.Or(port, raftPort))
	}
	if len(c.Peers) == 0 {
		c.Peers = []Peer{{ID: c.NodeID, Addr: c.RaftAdvertise}}
	}
}

// readPeers reads PEERS or PEERS_FILE, and returns which of them it was.
func (e *env) readPeers(c *Config) (name string) {
	var problems []error
	name, text := "PEERS", e.get("PEERS")
	if c.PeersFile = e.text("PEERS_FILE", ""); c.PeersFile != "" {
		name = "PEERS_FILE"
		if text != "" {
			e.problem("PEERS=%q and PEERS_FILE=%q: set one of them and unset the other", text, c.PeersFile)
		}
		content, _, err := readFile(c.PeersFile)
		if err != nil {
			e.invalid(name, "will not do: "+err.Error(), "a file that names the nodes, one a line, as id@host:port")
		} else {
			c.Peers, problems = parsePeersFile(string(content))
		}
	} else if text != "" {
		c.Peers, problems = parsePeers(name, text)
	}
	e.problems = append(e.problems, problems...)
	return name
}

// hasState says whether this node has been of a cluster before.
func (c *Config) hasState() bool {
	_, err := os.Stat(filepath.Join(c.StateDir, dbName))
	return c.KVStore != storeMemory && err == nil
}

// warnOfPeers warns of variables that contradict this node's entry in PEERS. The entry is what is advertised to peers,
// whatever RAFT_ADVERTISE_ADDR and RAFT_ADVERTISE_PORT (host and port) say.
func (c *Config) warnOfPeers(host, port string, sys system) {
	warn := func(format string, args ...any) { c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...)) }
	if c.KVStore == storeMemory && len(c.Peers) == 2 {
		warn(`KV_STORE="memory" and PEERS has two nodes: neither can outlive the other's restart, since one of two ` +
			"is no majority: name three nodes in PEERS on every node, or set KV_STORE to boltdb")
	}
	entryHost, entryPort, _ := net.SplitHostPort(c.RaftAdvertise)
	listenHost, listenPort, _ := net.SplitHostPort(c.RaftAddr)
	const wins = "%s=%q differs from %q, this node's entry in PEERS, which wins: unset %[1]s, or correct PEERS on " +
		"every node"
	if host != "" && !strings.EqualFold(host, entryHost) {
		warn(wins, "RAFT_ADVERTISE_ADDR", host, c.RaftAdvertise)
	}
	if port != "" && port != entryPort {
		warn(wins, "RAFT_ADVERTISE_PORT", port, c.RaftAdvertise)
	}
	if listenPort != entryPort && sys.owns(entryHost) {
		warn("RAFT_PORT=%q is where this node listens, and %q, its entry in PEERS, is where the others look for it on "+
			"this machine: set RAFT_PORT to %s, or correct PEERS on every node", listenPort, c.RaftAdvertise, entryPort)
	}
	if isLoopback(listenHost) && !isLoopback(entryHost) {
		warn("RAFT_ADDR=%q can be reached from this machine alone, and %q, this node's entry in PEERS, is no such "+
			"address: set RAFT_ADDR to 0.0.0.0 or to an address that the others reach", listenHost, c.RaftAdvertise)
	}
}

// readFile returns the content of the file that the variable name is set to, nil if path is "". A secret should be
// readable by this user only.
func (e *env) readFile(c *Config, name, path string, secret bool) []byte {
	if path == "" {
		return nil
	}
	content, mode, err := readSecret(path)
	if err != nil {
		e.invalid(name, "will not do: "+err.Error(),
			"a file that holds something, that this user can read and that not everybody can write")
	} else if secret && mode&0o004 != 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%q can be read by every user of this machine (its mode is "+
			"%#o): chmod o-r it", name, path, mode.Perm()))
	}
	return content
}

// checkFiles reports what is wrong with the files of tokens, certificates and keys. main reads them again to use them.
func (e *env) checkFiles(c *Config) {
	if content := e.readFile(c, "HTTP_TOKEN_FILE", c.HTTPTokenFile, true); content != nil {
		if _, err := parseTokens(c.HTTPTokenFile, content); err != nil {
			e.problem("%w", err)
		}
	}
	before := len(e.problems)
	cert := e.readFile(c, "TLS_CERT_FILE", c.TLSCertFile, false)
	key := e.readFile(c, "TLS_KEY_FILE", c.TLSKeyFile, true)
	authority := e.readFile(c, "TLS_CA_FILE", c.TLSCAFile, false)
	readable := len(e.problems) == before
	set := c.TLSCertFile != "" && c.TLSKeyFile != "" && c.TLSCAFile != ""
	switch {
	case !set && c.TLSCertFile+c.TLSKeyFile+c.TLSCAFile != "":
		e.problem("TLS_CERT_FILE=%q, TLS_KEY_FILE=%q, TLS_CA_FILE=%q: set all three, or none of them",
			c.TLSCertFile, c.TLSKeyFile, c.TLSCAFile)
	case set && readable:
		if _, err := parseCertificates(c, cert, key, authority); err != nil {
			e.problem("%w", err)
		}
	}
}

// logPairs returns the configuration as keys and values of a log line. There are no secrets in it, only paths to them.
func (c *Config) logPairs() []any {
	peers := make([]string, len(c.Peers))
	for i, p := range c.Peers {
		peers[i] = p.ID + "@" + p.Addr
	}
	return []any{
		"node_id", c.NodeID, "state_dir", c.StateDir, "kv_store", c.KVStore,
		"http_addr", c.HTTPAddr, "raft_addr", c.RaftAddr, "raft_advertise", c.RaftAdvertise,
		"peers", strings.Join(peers, ","), "peers_file", c.PeersFile, "read_consistency", string(c.ReadConsistency),
		"log_level", c.LogLevel, "log_format", c.LogFormat, "max_body_bytes", c.MaxBodyBytes,
		"snapshot_threshold", c.SnapshotThreshold, "snapshot_interval", c.SnapshotInterval.String(),
		"trailing_logs", c.TrailingLogs, "shutdown_timeout", c.ShutdownTimeout.String(),
		"http_token_file", c.HTTPTokenFile, "tls_cert_file", c.TLSCertFile,
		"tls_key_file", c.TLSKeyFile, "tls_ca_file", c.TLSCAFile,
	}
}
