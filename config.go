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
	// Stale reads see this node's own map as it is, quorum or not.
	Stale Consistency = "stale"
)

func parseConsistency(s string) (Consistency, error) {
	if c := Consistency(s); c == Linearizable || c == Stale {
		return c, nil
	}
	return "", fmt.Errorf("%q is not a consistency: use %s or %s", s, Linearizable, Stale)
}

// What KV_STORE may hold.
const (
	storeBolt   = "boltdb"
	storeMemory = "memory"
)

// version is set when a release is built: -ldflags "-X main.version=v1.2.3".
var version = "dev"

// maxBodyBytes is the most that MAX_BODY_BYTES may say.
const maxBodyBytes = 2 << 20

// Peer is one member of the cluster as PEERS names it.
type Peer struct {
	ID   string
	Addr string // host:port, an IPv6 host in brackets; a DNS name stays a name
}

// Config is the effective configuration: valid, complete, and not changed once loaded.
type Config struct {
	NodeID            string
	StateDir          string // not used when KVStore is storeMemory
	KVStore           string // storeBolt or storeMemory
	HTTPAddr          string // host:port to listen on
	RaftAddr          string // host:port to listen on
	RaftAdvertise     string // host:port peers are told; with PEERS, this node's entry there
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
	Warnings          []string // what the operator should know but need not mend; the caller logs them

	peersText string // what PeersFile held
}

// The cures that more than one message ends in.
const (
	idRule   = "ASCII letters, digits, ., _ and -, at most 64, no leading . or -"
	hostRule = "an IPv4 address, an IPv6 address or a DNS name"
	portRule = "a number from 1 to 65535"
)

// helpText is what --help prints. README.md has the same as a table; a test holds both and loadConfig together.
//
//go:embed help.txt
var helpText string

// system is what the defaults need to know of the machine. main fills it, tests make one up.
type system struct {
	hostname string        // "" when it could not be told
	addrs    []netip.Addr  // of its interfaces
	hostIPv4 func() string // asked only when needed: it may look a name up
}

// thisSystem is the real one.
func thisSystem() system {
	hostname, _ := os.Hostname() // loadConfig tells the operator what to do without one
	sys := system{hostname: hostname}
	addrs, _ := net.InterfaceAddrs() // without them there is no more than fewer defaults and warnings
	for _, addr := range addrs {
		if prefix, err := netip.ParsePrefix(addr.String()); err == nil {
			sys.addrs = append(sys.addrs, prefix.Addr())
		}
	}
	sys.hostIPv4 = func() string {
		// A name server that does not answer must not hold up the start for long.
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
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

// owns says whether a host is this machine, as far as that can be told without asking anybody.
func (sys system) owns(host string) bool {
	ip, err := netip.ParseAddr(host)
	return isLoopback(host) || strings.EqualFold(host, sys.hostname) || err == nil && slices.Contains(sys.addrs, ip)
}

// env reads variables, and collects what is wrong with them. A host or port that could not be parsed is "", which keeps
// later checks from complaining of it a second time.
type env struct {
	get      func(name string) string
	problems []error
}

func (e *env) fail(format string, args ...any) {
	e.problems = append(e.problems, fmt.Errorf(format, args...))
}

// refuse says why what a variable holds will not do and what would.
func (e *env) refuse(name, why, cure string) {
	e.fail("%s=%q %s: set %s to %s", name, e.get(name), why, name, cure)
}

func (e *env) text(name, def string) string { return cmp.Or(e.get(name), def) }

func (e *env) word(name, def string, choices ...string) string {
	word := strings.ToLower(e.text(name, def))
	if !slices.Contains(choices, word) {
		e.refuse(name, "is not known", "one of "+strings.Join(choices, ", "))
	}
	return word
}

func (e *env) number(name string, def, least, most uint64) uint64 {
	n, err := strconv.ParseUint(e.text(name, strconv.FormatUint(def, 10)), 10, 64)
	if err != nil || n < least || n > most {
		e.refuse(name, "will not do", fmt.Sprintf("a whole number from %d to %d", least, most))
	}
	return n
}

func (e *env) duration(name string, def, least time.Duration) time.Duration {
	d, err := time.ParseDuration(e.text(name, def.String()))
	if err != nil {
		e.refuse(name, "is not a duration", "one such as 8s or 1m30s")
	} else if d < least {
		e.refuse(name, "is too short", "at least "+least.String())
	}
	return d
}

func (e *env) port(name, def string) string {
	text := e.text(name, def)
	port, ok := parsePort(text)
	if strings.HasPrefix(text, "tcp://") {
		e.fail("%s=%q is a Kubernetes service link, not a port: set enableServiceLinks: false in the pod, or %s to %s",
			name, text, name, portRule)
	} else if !ok && text != "" {
		e.refuse(name, "is not a port", portRule)
	}
	return port
}

// host takes parseHost for an address to listen on, parsePeerHost for one to be dialed.
func (e *env) host(name, def string, parse func(string) (host, why string)) string {
	text := e.text(name, def)
	if text == "" {
		return ""
	}
	host, why := parse(text)
	if why != "" {
		e.refuse(name, why, hostRule+", without a port")
	}
	return host
}

// directory refuses what only a shell would have made a path of: nothing expands it here.
func (e *env) directory(name, def string) string {
	dir := e.get(name)
	if strings.HasPrefix(dir, "~") || strings.ContainsAny(dir, "\"'`$") || strings.ContainsFunc(dir, unicode.IsControl) {
		e.refuse(name, "has quotes, control characters, a leading ~ or a $, which nobody has expanded",
			"the path itself, such as /var/lib/raftstarter")
	}
	return cmp.Or(dir, def)
}

func (e *env) httpAddr() (host, port string) {
	return e.host("HTTP_ADDR", "0.0.0.0", parseHost), e.port("HTTP_PORT", "11000")
}

// loadConfig makes the Config that getenv and sys amount to. Its error joins all that is wrong, one problem a line.
func loadConfig(getenv func(string) string, sys system) (*Config, error) {
	e := &env{get: getenv}
	c := &Config{NodeID: e.text("NODE_ID", sys.hostname)}
	c.StateDir = e.directory("STATE_DIR", "/tmp/"+c.NodeID)
	c.KVStore = e.word("KV_STORE", storeBolt, storeBolt, storeMemory)
	httpHost, httpPort := e.httpAddr()
	raftHost, raftPort := e.host("RAFT_ADDR", "0.0.0.0", parseHost), e.port("RAFT_PORT", "12000")
	overlap := strings.EqualFold(httpHost, raftHost) || isUnspecified(httpHost) || isUnspecified(raftHost)
	if overlap && httpPort == raftPort && httpPort != "" && httpHost != "" && raftHost != "" {
		e.fail("HTTP_PORT=%q and RAFT_PORT=%q are one port, and HTTP_ADDR=%q and RAFT_ADDR=%q overlap: "+
			"set HTTP_PORT or RAFT_PORT to another number", httpPort, raftPort, httpHost, raftHost)
	}
	c.HTTPAddr, c.RaftAddr = net.JoinHostPort(httpHost, httpPort), net.JoinHostPort(raftHost, raftPort)
	e.identify(c, sys)
	c.ReadConsistency = Consistency(e.word("READ_CONSISTENCY", string(Linearizable), string(Linearizable), string(Stale)))
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

// loadHealthcheck makes as much of a Config as it takes to ask the node that runs with the same environment: whatever
// has become of the rest of it, and of the files that it names, does that node no harm.
func loadHealthcheck(getenv func(string) string) (*Config, error) {
	e := &env{get: getenv}
	host, port := e.httpAddr()
	c := &Config{HTTPAddr: net.JoinHostPort(host, port), TLSCertFile: e.text("TLS_CERT_FILE", "")}
	return c, errors.Join(e.problems...)
}

// identify settles who this node is, its place in PEERS and its advertised address.
func (e *env) identify(c *Config, sys system) {
	host, port := e.host("RAFT_ADVERTISE_ADDR", "", parsePeerHost), e.port("RAFT_ADVERTISE_PORT", "")
	from := e.readPeers(c)
	named := fmt.Sprintf("NODE_ID=%q", c.NodeID)
	if e.get("NODE_ID") == "" {
		named = fmt.Sprintf("NODE_ID is unset and the system hostname %q", sys.hostname)
	}
	if !validID(c.NodeID) {
		e.fail("%s is not a node id: set NODE_ID to %s", named, idRule)
		return // whatever the rest could say would come of this alone
	}
	_, raftPort, _ := net.SplitHostPort(c.RaftAddr)
	i := slices.IndexFunc(c.Peers, func(p Peer) bool { return p.ID == c.NodeID })
	switch {
	case i >= 0:
		c.RaftAdvertise = c.Peers[i].Addr
		c.warnOfPeers(host, port, sys)
		return
	case len(c.Peers) > 0 && (c.PeersFile == "" || !c.hasState()):
		e.fail("%s is not in %s, which has %q: set NODE_ID to one of these, or add this node to %[2]s on every node",
			named, from, peerIDs(c.Peers))
		return
	}
	if host == "" {
		host = sys.hostIPv4()
	}
	c.RaftAdvertise = net.JoinHostPort(host, cmp.Or(port, raftPort))
	if len(c.Peers) == 0 {
		c.Peers = []Peer{{ID: c.NodeID, Addr: c.RaftAdvertise}}
	} else {
		c.Warnings = append(c.Warnings, named+" is not in PEERS_FILE: this node is to leave the cluster, and runs on without a vote")
	}
}

// readPeers reads PEERS or PEERS_FILE, and returns which of them it was.
func (e *env) readPeers(c *Config) (name string) {
	text, problems := e.get("PEERS"), []error(nil)
	switch c.PeersFile = e.text("PEERS_FILE", ""); {
	case c.PeersFile != "" && text != "":
		e.fail("PEERS=%q and PEERS_FILE=%q: set one of them and unset the other", text, c.PeersFile)
	case c.PeersFile != "":
		content, err := readPeersFile(c.PeersFile)
		if err != nil {
			e.refuse("PEERS_FILE", "will not do: "+err.Error(), "a file that names the nodes, one a line, as id@host:port")
			return "PEERS_FILE"
		}
		c.peersText = content
		c.Peers, problems = parsePeersFile(content)
	case text != "":
		c.Peers, problems = parsePeers("PEERS", text)
	}
	e.problems = append(e.problems, problems...)
	if c.PeersFile != "" {
		return "PEERS_FILE"
	}
	return "PEERS"
}

// hasState says whether this node has been of a cluster before.
func (c *Config) hasState() bool {
	_, err := os.Stat(filepath.Join(c.StateDir, dbName))
	return c.KVStore != storeMemory && err == nil
}

// warnOfPeers notes what does not go together with this node's entry in PEERS, which wins over the advertised host and
// port. When that entry is bad it says nonsense, which nobody sees.
func (c *Config) warnOfPeers(host, port string, sys system) {
	warn := func(format string, args ...any) { c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...)) }
	if c.KVStore == storeMemory && len(c.Peers) == 2 {
		warn(`KV_STORE="memory" and PEERS has two nodes: neither can outlive the other's restart, since one of two is no ` +
			"majority: name three nodes in PEERS on every node, or set KV_STORE to boltdb")
	}
	entryHost, entryPort, _ := net.SplitHostPort(c.RaftAdvertise)
	listenHost, listenPort, _ := net.SplitHostPort(c.RaftAddr)
	const wins = "%s=%q differs from %q, this node's entry in PEERS, which wins: unset %[1]s, or correct PEERS on every node"
	if host != "" && !strings.EqualFold(host, entryHost) {
		warn(wins, "RAFT_ADVERTISE_ADDR", host, c.RaftAdvertise)
	}
	if port != "" && port != entryPort {
		warn(wins, "RAFT_ADVERTISE_PORT", port, c.RaftAdvertise)
	}
	if listenPort != entryPort && sys.owns(entryHost) {
		warn("RAFT_PORT=%q is where this node listens, and %q, its entry in PEERS, is where the others look for it on this "+
			"machine: set RAFT_PORT to %s, or correct PEERS on every node", listenPort, c.RaftAdvertise, entryPort)
	}
	if isLoopback(listenHost) && !isLoopback(entryHost) {
		warn("RAFT_ADDR=%q can be reached from this machine alone, and %q, this node's entry in PEERS, is no such address: "+
			"set RAFT_ADDR to 0.0.0.0 or to an address that the others reach", listenHost, c.RaftAdvertise)
	}
}

// checkFiles reads the files of tokens, certificates and keys, to say now what is wrong with them.
func (e *env) checkFiles(c *Config) {
	before := len(e.problems)
	read := func(name, path string, secret bool) []byte {
		if path == "" {
			return nil
		}
		content, mode, err := readSecret(path)
		if err != nil {
			e.refuse(name, "will not do: "+err.Error(),
				"a file that holds something, that this user can read and that not everybody can write")
		} else if secret && mode&0o004 != 0 {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%q can be read by every user of this machine (its mode is %#o): "+
				"chmod o-r it", name, path, mode.Perm()))
		}
		return content
	}
	if content := read("HTTP_TOKEN_FILE", c.HTTPTokenFile, true); content != nil {
		if _, err := parseTokens(c.HTTPTokenFile, content); err != nil {
			e.fail("HTTP_TOKEN_FILE: %w", err)
		}
	}
	cert, key := read("TLS_CERT_FILE", c.TLSCertFile, false), read("TLS_KEY_FILE", c.TLSKeyFile, true)
	authority := read("TLS_CA_FILE", c.TLSCAFile, false)
	set := c.TLSCertFile != "" && c.TLSKeyFile != "" && c.TLSCAFile != ""
	switch {
	case !set && c.TLSCertFile+c.TLSKeyFile+c.TLSCAFile != "":
		e.fail("TLS_CERT_FILE=%q, TLS_KEY_FILE=%q, TLS_CA_FILE=%q: set all three, or none of them",
			c.TLSCertFile, c.TLSKeyFile, c.TLSCAFile)
	case set && len(e.problems) == before && c.RaftAdvertise != "": // else it would be said twice, or nobody knows of whom
		if _, err := parseCertificates(c, cert, key, authority); err != nil {
			e.fail("%w", err)
		}
	}
}

// parsePeers reads what the variable PEERS, or the file in PEERS_FILE, holds, and says all that is wrong with it. The peers come in the order of their ids; one
// with a bad address comes without it.
func parsePeers(name, text string) (peers []Peer, problems []error) {
	for i, entry := range strings.Split(text, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			problems = append(problems,
				fmt.Errorf("%s=%q is empty at entry %d: remove the stray comma, or unset %[1]s", name, text, i+1))
			continue
		}
		peer, whys := parsePeer(entry)
		if slices.ContainsFunc(peers, func(p Peer) bool { return p.ID == peer.ID }) {
			whys = append(whys, "has the same id as one before it: give every node its own")
		}
		if peer.Addr != "" && slices.ContainsFunc(peers, func(p Peer) bool { return strings.EqualFold(p.Addr, peer.Addr) }) {
			whys = append(whys, "has the same address as one before it: give every node its own")
		}
		for _, why := range whys {
			problems = append(problems, fmt.Errorf("%s entry %q %s", name, entry, why))
		}
		if peer.ID != "" {
			peers = append(peers, peer)
		}
	}
	slices.SortFunc(peers, func(a, b Peer) int { return strings.Compare(a.ID, b.ID) })
	return peers, problems
}

// parsePeer reads one entry of PEERS, as far as that goes, and says why it will not do.
func parsePeer(entry string) (peer Peer, whys []string) {
	fail := func(format string, args ...any) { whys = append(whys, fmt.Sprintf(format, args...)) }
	id, addr, found := strings.Cut(entry, "@")
	switch {
	case strings.Contains(addr, "@") && strings.ContainsAny(addr, "; \t\r\n"):
		return Peer{}, []string{"is more than one: separate entries with commas"}
	case !found:
		return Peer{}, []string{"has no id: write it as id@host:port"}
	case !validID(id):
		fail("has a bad id %q: use %s", id, idRule)
	}
	peer.ID = id
	colon := strings.LastIndexByte(addr, ':')
	switch {
	case isIPv6(addr) || colon > 0 && isIPv6(addr[:colon]):
		fail("can be read in two ways: write an IPv6 host in brackets, as in id@[host]:port")
		return peer, whys
	case colon < 0 || strings.HasSuffix(addr, "]"):
		fail("has no port: write it as id@host:port")
		return peer, whys
	}
	host, why := parsePeerHost(addr[:colon])
	if why != "" {
		fail("has a host %q that %s: write it as id@host:port, the host being %s that peers reach it by",
			addr[:colon], why, hostRule)
	}
	port, ok := parsePort(addr[colon+1:])
	if !ok {
		fail("has a bad port %q: use %s", addr[colon+1:], portRule)
	}
	if why == "" && ok {
		peer.Addr = net.JoinHostPort(host, port)
	}
	return peer, whys
}

func validID(s string) bool {
	return s != "" && len(s) <= 64 && s[0] != '.' && s[0] != '-' && !strings.ContainsFunc(s, notNameRune)
}

func notNameRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.'
}

// parsePort returns the port without leading zeros, so that equal ports are equal strings.
func parsePort(s string) (port string, ok bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return "", false
	}
	return strconv.FormatUint(n, 10), true
}

// parseHost returns an IP without brackets and in one spelling, so that equal addresses are equal strings, and a DNS name
// as it is; or else why it will not do.
func parseHost(s string) (host, why string) {
	bare := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		bare = s[1 : len(s)-1]
	}
	if ip, err := netip.ParseAddr(bare); err == nil && (bare == s || ip.Is6()) {
		return ip.Unmap().String(), ""
	}
	name := strings.TrimSuffix(s, ".")
	labels := strings.Split(name, ".")
	badLabel := slices.ContainsFunc(labels, func(label string) bool { return label == "" || len(label) > 63 })
	// No top-level domain is all digits, so a name that ends in such a label is a mistyped IPv4 address.
	mistyped := strings.Trim(labels[len(labels)-1], "0123456789") == ""
	if badLabel || mistyped || len(name) > 253 || strings.ContainsFunc(name, notNameRune) {
		return "", "is not an address"
	}
	return s, ""
}

// parsePeerHost is parseHost for a host that other machines dial.
func parsePeerHost(s string) (host, why string) {
	host, why = parseHost(s)
	if isUnspecified(host) {
		return "", "is unspecified, which no peer can dial"
	}
	if strings.Contains(host, "%") {
		return "", "has a zone, which means nothing on another machine"
	}
	return host, why
}

func isUnspecified(host string) bool { return host == "0.0.0.0" || host == "::" }

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.IsLoopback()
}

func isIPv6(host string) bool {
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Is6()
}

// logPairs returns the effective configuration as the keys and values of one log line. It holds no secret: only paths to them.
func (c *Config) logPairs() []any {
	peers := make([]string, len(c.Peers))
	for i, p := range c.Peers {
		peers[i] = p.ID + "@" + p.Addr
	}
	return []any{
		"node_id", c.NodeID, "state_dir", c.StateDir, "kv_store", c.KVStore,
		"http_addr", c.HTTPAddr, "raft_addr", c.RaftAddr, "raft_advertise", c.RaftAdvertise, "peers", strings.Join(peers, ","), "peers_file", c.PeersFile,
		"read_consistency", string(c.ReadConsistency), "log_level", c.LogLevel, "log_format", c.LogFormat, "max_body_bytes", c.MaxBodyBytes,
		"snapshot_threshold", c.SnapshotThreshold, "snapshot_interval", c.SnapshotInterval.String(), "trailing_logs", c.TrailingLogs,
		"shutdown_timeout", c.ShutdownTimeout.String(), "http_token_file", c.HTTPTokenFile,
		"tls_cert_file", c.TLSCertFile, "tls_key_file", c.TLSKeyFile, "tls_ca_file", c.TLSCAFile,
	}
}
