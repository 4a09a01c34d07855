package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
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
const maxBodyBytes = 16 << 20

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
	Peers             []Peer // in the order of their ids, this node included
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
}

// variable is one environment variable. Parsing, --help and the README's table all come from these.
type variable struct {
	name  string
	def   string // parsed when the variable is unset; "" leaves it to identify
	unset string // the default in words, when def is ""
	help  string // Markdown with no other mark-up than backticks, which --help drops
	set   func(l *loader, v setting)
}

func preset(name, def, help string, set func(*loader, setting)) variable {
	return variable{name: name, def: def, help: help, set: set}
}

func derived(name, unset, help string, set func(*loader, setting)) variable {
	return variable{name: name, unset: unset, help: help, set: set}
}

var variables = []variable{
	derived("NODE_ID", "system hostname", "this node's name in `PEERS`: "+idRule,
		func(l *loader, v setting) { l.cfg.NodeID = v.text }),
	derived("STATE_DIR", "`/tmp/<NODE_ID>`", "where the Raft log, votes and snapshots live; not used with `KV_STORE=memory`",
		func(l *loader, v setting) { l.cfg.StateDir = v.text }),
	preset("KV_STORE", storeBolt, "`boltdb` (durable) or `memory` (faster, nothing of the data on disk)",
		func(l *loader, v setting) { l.cfg.KVStore = l.oneOf(v, storeBolt, storeMemory) }),
	preset("HTTP_ADDR", "0.0.0.0", "the address the HTTP API listens on: IPv4, IPv6 or a name",
		func(l *loader, v setting) { l.httpHost = l.host(v, parseHost) }),
	preset("HTTP_PORT", "11000", "the port the HTTP API listens on",
		func(l *loader, v setting) { l.httpPort = l.port(v) }),
	preset("RAFT_ADDR", "0.0.0.0", "the address peers connect to: IPv4, IPv6 or a name",
		func(l *loader, v setting) { l.raftHost = l.host(v, parseHost) }),
	preset("RAFT_PORT", "12000", "the port peers connect to",
		func(l *loader, v setting) { l.raftPort = l.port(v) }),
	derived("RAFT_ADVERTISE_ADDR",
		"this node's host in `PEERS`; without `PEERS`, the IPv4 of the system hostname, else of the first usable interface, else `127.0.0.1`",
		"the address peers are told; a DNS name stays a name; `PEERS` wins over it",
		func(l *loader, v setting) { l.advertiseHost = l.host(v, parsePeerHost) }),
	derived("RAFT_ADVERTISE_PORT", "this node's port in `PEERS`; without `PEERS`, `RAFT_PORT`", "the port peers are told; `PEERS` wins over it",
		func(l *loader, v setting) { l.advertisePort = l.port(v) }),
	derived("PEERS", "`<NODE_ID>@<RAFT_ADVERTISE_ADDR>:<RAFT_ADVERTISE_PORT>`",
		"the whole cluster, this node included, the same on every node: `node1@10.1.1.1:12000,node2@host2:12000,...`; "+
			"hosts are IPv4, `[IPv6]` or DNS names, looked up at every dial",
		(*loader).peers),
	preset("READ_CONSISTENCY", string(Linearizable), "what a GET without `?consistency=` gets: `linearizable` or `stale`",
		func(l *loader, v setting) {
			l.cfg.ReadConsistency = Consistency(l.oneOf(v, string(Linearizable), string(Stale)))
		}),
	preset("LOG_LEVEL", "info", "`trace`, `debug`, `info`, `warn`, `error` or `off`",
		func(l *loader, v setting) {
			l.cfg.LogLevel = l.anyCase(v, "trace", "debug", "info", "warn", "error", "off")
		}),
	preset("LOG_FORMAT", "text", "`text` or `json`",
		func(l *loader, v setting) { l.cfg.LogFormat = l.anyCase(v, "text", "json") }),
	preset("MAX_BODY_BYTES", "524288", "the largest request body, `1` to `16777216` (16 MiB)",
		func(l *loader, v setting) { l.cfg.MaxBodyBytes = int64(l.number(v, 1, maxBodyBytes)) }),
	preset("SNAPSHOT_THRESHOLD", "8192", "how many new Raft log entries make a snapshot due, at least `1`",
		func(l *loader, v setting) { l.cfg.SnapshotThreshold = l.number(v, 1, math.MaxInt64) }),
	preset("SNAPSHOT_INTERVAL", "30s", "the time between two looks at whether a snapshot is due (up to twice that), at least `5ms`",
		func(l *loader, v setting) { l.cfg.SnapshotInterval = l.duration(v, 5*time.Millisecond) }),
	preset("TRAILING_LOGS", "4096", "how many Raft log entries stay after a snapshot, for peers that are a little behind; `0` or more",
		func(l *loader, v setting) { l.cfg.TrailingLogs = l.number(v, 0, math.MaxInt64) }),
	preset("SHUTDOWN_TIMEOUT", "8s", "bound on a graceful stop",
		func(l *loader, v setting) { l.cfg.ShutdownTimeout = l.duration(v, 1) }),
	derived("HTTP_TOKEN_FILE", "none", "a file with bearer tokens, one a line; set: every request but `/livez`, `/readyz` and `/metrics` needs one",
		func(l *loader, v setting) { l.cfg.HTTPTokenFile = v.text }),
	derived("TLS_CERT_FILE", "none", "this node's certificate, in PEM: the HTTP port speaks TLS with it, and peers mutual TLS; "+
		"its id or its host in `PEERS` is a subject alternative name",
		func(l *loader, v setting) { l.cfg.TLSCertFile = v.text }),
	derived("TLS_KEY_FILE", "none", "the key of `TLS_CERT_FILE`, in PEM",
		func(l *loader, v setting) { l.cfg.TLSKeyFile = v.text }),
	derived("TLS_CA_FILE", "none", "the authority that signed the certificates of all nodes, in PEM; set with the two above or not at all",
		func(l *loader, v setting) { l.cfg.TLSCAFile = v.text }),
}

// The cures that more than one message ends in.
const (
	idRule   = "ASCII letters, digits, `.`, `_` and `-`, at most 64, no leading `.` or `-`"
	hostRule = "an IPv4 address, an IPv6 address or a DNS name"
	portRule = "a number from 1 to 65535"
)

// system is what the defaults need to know of the machine. main fills it, tests make one up.
type system struct {
	hostname string        // "" when it could not be told
	hostIPv4 func() string // asked only when needed: it may look a name up
	readFile func(path string) (content []byte, mode os.FileMode, err error)
}

// thisSystem is the real one, and all in this file that is not pure.
func thisSystem() system {
	hostname, _ := os.Hostname() // loadConfig tells the operator what to do without one
	return system{hostname: hostname, readFile: readSecret, hostIPv4: func() string {
		// A name server that does not answer must not hold up the start for long.
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		ips, _ := net.DefaultResolver.LookupNetIP(ctx, "ip4", hostname)
		for _, ip := range ips {
			if ip = ip.Unmap(); ip.Is4() && !ip.IsUnspecified() {
				return ip.String()
			}
		}
		addrs, _ := net.InterfaceAddrs()
		for _, addr := range addrs {
			prefix, err := netip.ParsePrefix(addr.String())
			if err == nil && prefix.Addr().Is4() && prefix.Addr().IsGlobalUnicast() {
				return prefix.Addr().String()
			}
		}
		return "127.0.0.1"
	}}
}

// setting is a variable as it was found, so that every complaint can name it.
type setting struct{ name, text string }

// loader carries a Config on its way, the parts it is put together from, and what was wrong. A host or port that could
// not be parsed stays "", which keeps later checks from complaining of it a second time.
type loader struct {
	cfg                          Config
	httpHost, httpPort           string
	raftHost, raftPort           string
	advertiseHost, advertisePort string
	problems                     []error
}

// loadConfig makes the Config that getenv and sys amount to. Its error joins all that is wrong, one problem a line.
func loadConfig(getenv func(string) string, sys system) (*Config, error) {
	l := &loader{}
	for _, vr := range variables {
		if text := cmp.Or(getenv(vr.name), vr.def); text != "" {
			vr.set(l, setting{vr.name, text})
		}
	}
	l.checkListeners()
	l.identify(sys)
	l.checkFiles(sys)
	if len(l.problems) > 0 {
		return nil, errors.Join(l.problems...)
	}
	l.cfg.HTTPAddr = net.JoinHostPort(l.httpHost, l.httpPort)
	l.cfg.RaftAddr = net.JoinHostPort(l.raftHost, l.raftPort)
	return &l.cfg, nil
}

func (l *loader) fail(format string, args ...any) {
	l.problems = append(l.problems, fmt.Errorf(format, args...))
}

// refuse says why v will not do and what would.
func (l *loader) refuse(v setting, why, cure string) {
	l.fail("%s=%q %s: set %s to %s", v.name, v.text, why, v.name, cure)
}

func (l *loader) oneOf(v setting, choices ...string) string {
	if !slices.Contains(choices, v.text) {
		l.refuse(v, "is not known", "one of "+strings.Join(choices, ", "))
	}
	return v.text
}

func (l *loader) anyCase(v setting, choices ...string) string {
	if lower := strings.ToLower(v.text); slices.Contains(choices, lower) {
		return lower
	}
	return l.oneOf(v, choices...)
}

func (l *loader) number(v setting, least, most uint64) uint64 {
	n, err := strconv.ParseUint(v.text, 10, 64)
	if err != nil || n < least || n > most {
		l.refuse(v, "will not do", fmt.Sprintf("a whole number from %d to %d", least, most))
	}
	return n
}

func (l *loader) duration(v setting, least time.Duration) time.Duration {
	d, err := time.ParseDuration(v.text)
	if err != nil {
		l.refuse(v, "is not a duration", "one such as 8s or 1m30s")
	} else if d < least {
		l.refuse(v, "is too short", "at least "+least.String())
	}
	return d
}

func (l *loader) port(v setting) string {
	port, ok := parsePort(v.text)
	if strings.HasPrefix(v.text, "tcp://") {
		l.fail("%s=%q is a Kubernetes service link, not a port: set enableServiceLinks: false in the pod, or %s to %s", v.name, v.text, v.name, portRule)
	} else if !ok {
		l.refuse(v, "is not a port", portRule)
	}
	return port
}

// host takes parseHost for an address to listen on, parsePeerHost for one to be dialled.
func (l *loader) host(v setting, parse func(string) (host, why string)) string {
	host, why := parse(v.text)
	if why != "" {
		l.refuse(v, why, hostRule+", without a port")
	}
	return host
}

func (l *loader) peers(v setting) {
	for i, entry := range strings.Split(v.text, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			l.fail("PEERS=%q is empty at entry %d: remove the stray comma, or unset PEERS", v.text, i+1)
		} else {
			l.peer(entry)
		}
	}
	slices.SortFunc(l.cfg.Peers, func(a, b Peer) int { return strings.Compare(a.ID, b.ID) })
}

// peer adds one entry of PEERS, or says all that is wrong with it. One with a bad address is added without: its id is
// there all the same, and a Config with a problem never gets out.
func (l *loader) peer(entry string) {
	id, addr, found := strings.Cut(entry, "@")
	if !found {
		l.fail("PEERS entry %q has no id: write it as id@host:port", entry)
		return
	}
	if !validID(id) {
		l.fail("PEERS entry %q has a bad id %q: use %s", entry, id, plainText(idRule))
	}
	peer := Peer{ID: id}
	if colon := strings.LastIndexByte(addr, ':'); colon < 0 || strings.HasSuffix(addr, "]") {
		l.fail("PEERS entry %q has no port: write it as id@host:port", entry)
	} else {
		host, why := parsePeerHost(addr[:colon])
		if why != "" {
			l.fail("PEERS entry %q: host %q %s: write it as id@host:port, the host being %s that peers reach it by", entry, addr[:colon], why, hostRule)
		}
		port, ok := parsePort(addr[colon+1:])
		if !ok {
			l.fail("PEERS entry %q has a bad port %q: use %s", entry, addr[colon+1:], portRule)
		}
		if why == "" && ok {
			peer.Addr = net.JoinHostPort(host, port)
		}
	}
	if slices.ContainsFunc(l.cfg.Peers, func(p Peer) bool { return p.ID == id }) {
		l.fail("PEERS entry %q has the same id as one before it: give every node its own", entry)
	}
	if peer.Addr != "" && slices.ContainsFunc(l.cfg.Peers, func(p Peer) bool { return strings.EqualFold(p.Addr, peer.Addr) }) {
		l.fail("PEERS entry %q has the same address as one before it: give every node its own", entry)
	}
	l.cfg.Peers = append(l.cfg.Peers, peer)
}

func (l *loader) checkListeners() {
	if l.httpPort == "" || l.httpPort != l.raftPort || l.httpHost == "" || l.raftHost == "" {
		return
	}
	if strings.EqualFold(l.httpHost, l.raftHost) || unspecified(l.httpHost) || unspecified(l.raftHost) {
		l.fail("HTTP_PORT=%q and RAFT_PORT=%q are one port, and HTTP_ADDR=%q and RAFT_ADDR=%q overlap: set HTTP_PORT or RAFT_PORT to another number",
			l.httpPort, l.raftPort, l.httpHost, l.raftHost)
	}
}

// checkFiles reads the files of tokens, certificates and keys, to say now what is wrong with them.
func (l *loader) checkFiles(sys system) {
	c, before := &l.cfg, len(l.problems)
	read := func(name, path string, secret bool) (content []byte) {
		if path == "" {
			return nil
		}
		content, mode, err := sys.readFile(path)
		if err != nil {
			l.fail("%s=%q will not do: %w: set %s to a file that this user can read and that is not empty", name, path, err, name)
		} else if secret && mode&0o007 != 0 {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%q can be read by every user of this machine (its mode is %#o): chmod o-rwx it", name, path, mode.Perm()))
		}
		return content
	}
	if content := read("HTTP_TOKEN_FILE", c.HTTPTokenFile, true); content != nil {
		if _, err := parseTokens(c.HTTPTokenFile, content); err != nil {
			l.fail("HTTP_TOKEN_FILE: %w", err)
		}
	}
	read("TLS_CERT_FILE", c.TLSCertFile, false)
	read("TLS_KEY_FILE", c.TLSKeyFile, true)
	read("TLS_CA_FILE", c.TLSCAFile, false)
	switch some := c.TLSCertFile + c.TLSKeyFile + c.TLSCAFile; {
	case some != "" && (c.TLSCertFile == "" || c.TLSKeyFile == "" || c.TLSCAFile == ""):
		l.fail("TLS_CERT_FILE=%q, TLS_KEY_FILE=%q, TLS_CA_FILE=%q: set all three, or none of them", c.TLSCertFile, c.TLSKeyFile, c.TLSCAFile)
	case some != "" && len(l.problems) == before && c.RaftAdvertise != "": // else it would be said twice, or nobody knows of whom
		if _, err := readCertificates(c, sys.readFile); err != nil {
			l.fail("%w", err)
		}
	}
}

// identify settles who this node is, and with that its directory, its place in PEERS and its advertised address.
func (l *loader) identify(sys system) {
	c, named := &l.cfg, fmt.Sprintf("NODE_ID=%q", l.cfg.NodeID)
	if c.NodeID == "" {
		c.NodeID, named = sys.hostname, fmt.Sprintf("NODE_ID is unset and the system hostname %q", sys.hostname)
	}
	if !validID(c.NodeID) {
		l.fail("%s is not a node id: set NODE_ID to %s", named, plainText(idRule))
		return // whatever the rest could say would come of this alone
	}
	c.StateDir = cmp.Or(c.StateDir, "/tmp/"+c.NodeID)
	if len(c.Peers) == 0 {
		if l.advertiseHost == "" {
			l.advertiseHost = sys.hostIPv4()
		}
		c.RaftAdvertise = net.JoinHostPort(l.advertiseHost, cmp.Or(l.advertisePort, l.raftPort))
		c.Peers = []Peer{{ID: c.NodeID, Addr: c.RaftAdvertise}}
		return
	}
	var ids []string
	for _, p := range c.Peers {
		if ids = append(ids, p.ID); p.ID == c.NodeID {
			c.RaftAdvertise = p.Addr
		}
	}
	if !slices.Contains(ids, c.NodeID) {
		l.fail("%s is not in PEERS, which has %q: set NODE_ID to one of these, or add this node to PEERS on every node", named, ids)
		return
	}
	if c.KVStore == storeMemory && len(c.Peers) == 2 {
		c.Warnings = append(c.Warnings, `KV_STORE="memory" and PEERS has two nodes: neither can outlive the other's restart, since one `+
			"of two is no majority: name three nodes in PEERS on every node, or set KV_STORE to boltdb")
	}
	host, port, _ := net.SplitHostPort(c.RaftAdvertise) // of no account when that entry is bad: then nobody sees the warnings
	for _, v := range []struct{ name, text, wins string }{
		{"RAFT_ADVERTISE_ADDR", l.advertiseHost, host}, {"RAFT_ADVERTISE_PORT", l.advertisePort, port},
	} {
		if v.text != "" && !strings.EqualFold(v.text, v.wins) {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%q differs from %q, this node's entry in PEERS, which wins: unset %s, or correct PEERS on every node",
				v.name, v.text, c.RaftAdvertise, v.name))
		}
	}
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
	if unspecified(host) {
		return "", "is unspecified, which no peer can dial"
	}
	if strings.Contains(host, "%") {
		return "", "has a zone, which means nothing on another machine"
	}
	return host, why
}

func unspecified(host string) bool { return host == "0.0.0.0" || host == "::" }

// logPairs returns the effective configuration as the keys and values of one log line. It holds no secret: only paths to them.
func (c *Config) logPairs() []any {
	peers := make([]string, len(c.Peers))
	for i, p := range c.Peers {
		peers[i] = p.ID + "@" + p.Addr
	}
	return []any{
		"node_id", c.NodeID, "state_dir", c.StateDir, "kv_store", c.KVStore,
		"http_addr", c.HTTPAddr, "raft_addr", c.RaftAddr, "raft_advertise", c.RaftAdvertise, "peers", strings.Join(peers, ","),
		"read_consistency", string(c.ReadConsistency), "log_level", c.LogLevel, "log_format", c.LogFormat, "max_body_bytes", c.MaxBodyBytes,
		"snapshot_threshold", c.SnapshotThreshold, "snapshot_interval", c.SnapshotInterval.String(), "trailing_logs", c.TrailingLogs,
		"shutdown_timeout", c.ShutdownTimeout.String(), "http_token_file", c.HTTPTokenFile,
		"tls_cert_file", c.TLSCertFile, "tls_key_file", c.TLSKeyFile, "tls_ca_file", c.TLSCAFile,
	}
}

const helpHead = `usage: raftstarter [--help | --version | --healthcheck]

flags:
  -h, --help           print this and exit
  --version            print the version and exit
  --healthcheck        ask the node that runs here whether it is well, and exit 0 if so

environment (an empty variable counts as unset):
`

// writeHelp prints what --help shows; an error of w, which is standard output, leaves nobody to tell.
func writeHelp(w io.Writer) {
	var b strings.Builder
	b.WriteString(helpHead)
	for _, vr := range variables {
		lines := append(wrapText(plainText(vr.help), 76), wrapText("default: "+plainText(cmp.Or(vr.def, vr.unset)), 76)...)
		fmt.Fprintf(&b, "  %-19s  %s\n", vr.name, strings.Join(lines, "\n"+strings.Repeat(" ", 23)))
	}
	_, _ = io.WriteString(w, b.String())
}

// configTable returns the same as the Markdown table of the README; a test keeps the two equal.
func configTable() string {
	var b strings.Builder
	b.WriteString("| variable | default | meaning |\n|---|---|---|\n")
	for _, vr := range variables {
		def := vr.unset
		if vr.def != "" {
			def = "`" + vr.def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", vr.name, def, vr.help)
	}
	return b.String()
}

func plainText(markdown string) string { return strings.ReplaceAll(markdown, "`", "") }

// wrapText breaks text at spaces into lines of at most width bytes, but for words that are longer.
func wrapText(text string, width int) []string {
	var lines []string
	for _, word := range strings.Fields(text) {
		if last := len(lines) - 1; last >= 0 && len(lines[last])+1+len(word) <= width {
			lines[last] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return lines
}
