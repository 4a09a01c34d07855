package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"raftstarter/test/authority"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// testSystem is a machine with a name and an address, neither of them from the one the test runs on.
func testSystem() system {
	return system{
		hostname: "node1", hostIPv4: func() string { return "10.1.1.1" },
		addrs: []netip.Addr{netip.MustParseAddr("10.1.1.7"), netip.MustParseAddr("fd00::9")},
	}
}

type testEnv map[string]string

func (e testEnv) get(name string) string { return e[name] }

// with returns a copy with the given names and values put in.
func (e testEnv) with(pairs ...string) testEnv {
	out := testEnv{}
	for k, v := range e {
		out[k] = v
	}
	for i := 0; i < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}

func mustLoadConfig(t *testing.T, e testEnv) *Config {
	t.Helper()
	cfg, err := loadConfig(e.get, testSystem())
	if err != nil {
		t.Fatalf("loadConfig(%v): %v", e, err)
	}
	return cfg
}

// configProblems returns the lines of loadConfig's error, and fails when there is none.
func configProblems(t *testing.T, e testEnv, sys system) []string {
	t.Helper()
	cfg, err := loadConfig(e.get, sys)
	if err == nil {
		t.Fatalf("loadConfig(%v): got no error; want one", e)
	}
	if cfg != nil {
		t.Errorf("loadConfig(%v): got a config beside the error %v; want nil", e, err)
	}
	return strings.Split(err.Error(), "\n")
}

// defaultConfig is what no environment at all amounts to.
func defaultConfig() *Config {
	return &Config{
		NodeID: "node1", StateDir: "/tmp/node1", KVStore: "boltdb",
		HTTPAddr: "0.0.0.0:11000", RaftAddr: "0.0.0.0:12000", RaftAdvertise: "10.1.1.1:12000",
		Peers: []Peer{{ID: "node1", Addr: "10.1.1.1:12000"}}, ReadConsistency: Linearizable,
		LogLevel: "info", LogFormat: "text", MaxBodyBytes: 524288,
		SnapshotThreshold: 8192, SnapshotInterval: 30 * time.Second, TrailingLogs: 4096, ShutdownTimeout: 8 * time.Second,
	}
}

func TestLoadConfig(t *testing.T) {
	tests := []struct {
		name string
		env  testEnv
		want func(*Config)
	}{
		{"no environment", testEnv{}, func(*Config) {}},
		{"empty means unset", testEnv{"NODE_ID": "", "HTTP_PORT": "", "PEERS": "", "SHUTDOWN_TIMEOUT": ""}, func(*Config) {}},
		{"node id", testEnv{"NODE_ID": "a.B_c-9"}, func(c *Config) {
			c.NodeID, c.StateDir, c.Peers[0].ID = "a.B_c-9", "/tmp/a.B_c-9", "a.B_c-9"
		}},
		{"longest node id", testEnv{"NODE_ID": strings.Repeat("n", 64), "STATE_DIR": "s"}, func(c *Config) {
			c.NodeID, c.StateDir, c.Peers[0].ID = strings.Repeat("n", 64), "s", strings.Repeat("n", 64)
		}},
		{"memory", testEnv{"KV_STORE": "memory"}, func(c *Config) { c.KVStore = storeMemory }},
		{"stale", testEnv{"READ_CONSISTENCY": "stale"}, func(c *Config) { c.ReadConsistency = Stale }},
		{"words in any case", testEnv{"KV_STORE": "Memory", "READ_CONSISTENCY": "STALE"}, func(c *Config) {
			c.KVStore, c.ReadConsistency = storeMemory, Stale
		}},
		{"state dir", testEnv{"STATE_DIR": "./a b~/ü"}, func(c *Config) { c.StateDir = "./a b~/ü" }},
		{"log in any case", testEnv{"LOG_LEVEL": "WARN", "LOG_FORMAT": "Json"}, func(c *Config) { c.LogLevel, c.LogFormat = "warn", "json" }},
		{"log off", testEnv{"LOG_LEVEL": "off"}, func(c *Config) { c.LogLevel = "off" }},
		{"smallest body", testEnv{"MAX_BODY_BYTES": "1"}, func(c *Config) { c.MaxBodyBytes = 1 }},
		{"largest body", testEnv{"MAX_BODY_BYTES": "2097152"}, func(c *Config) { c.MaxBodyBytes = 2 << 20 }},
		{"smallest snapshot settings", testEnv{"SNAPSHOT_THRESHOLD": "1", "SNAPSHOT_INTERVAL": "5ms", "TRAILING_LOGS": "0"}, func(c *Config) {
			c.SnapshotThreshold, c.SnapshotInterval, c.TrailingLogs = 1, 5*time.Millisecond, 0
		}},
		{"shutdown timeout", testEnv{"SHUTDOWN_TIMEOUT": "1m30s"}, func(c *Config) { c.ShutdownTimeout = 90 * time.Second }},
		{"ports", testEnv{"HTTP_PORT": "1", "RAFT_PORT": "065535"}, func(c *Config) {
			c.HTTPAddr, c.RaftAddr, c.RaftAdvertise, c.Peers[0].Addr = "0.0.0.0:1", "0.0.0.0:65535", "10.1.1.1:65535", "10.1.1.1:65535"
		}},
		{"ipv6 without brackets", testEnv{"HTTP_ADDR": "::", "RAFT_ADDR": "fd00::1", "RAFT_ADVERTISE_ADDR": "fd00::1"}, func(c *Config) {
			c.HTTPAddr, c.RaftAddr, c.RaftAdvertise, c.Peers[0].Addr = "[::]:11000", "[fd00::1]:12000", "[fd00::1]:12000", "[fd00::1]:12000"
		}},
		{"ipv6 in brackets", testEnv{"HTTP_ADDR": "[::]", "RAFT_ADDR": "[FD00:0::1]", "RAFT_ADVERTISE_ADDR": "[fd00::1]"}, func(c *Config) {
			c.HTTPAddr, c.RaftAddr, c.RaftAdvertise, c.Peers[0].Addr = "[::]:11000", "[fd00::1]:12000", "[fd00::1]:12000", "[fd00::1]:12000"
		}},
		{"listen on a name and a zone", testEnv{"HTTP_ADDR": "localhost", "RAFT_ADDR": "fe80::1%eth0"}, func(c *Config) {
			c.HTTPAddr, c.RaftAddr = "localhost:11000", "[fe80::1%eth0]:12000"
		}},
		{"advertise a name", testEnv{"RAFT_ADVERTISE_ADDR": "Node1.example.", "RAFT_ADVERTISE_PORT": "9"}, func(c *Config) {
			c.RaftAdvertise, c.Peers[0].Addr = "Node1.example.:9", "Node1.example.:9"
		}},
		{"one port on two addresses", testEnv{"HTTP_ADDR": "127.0.0.1", "RAFT_ADDR": "127.0.0.2", "RAFT_PORT": "11000"}, func(c *Config) {
			c.HTTPAddr, c.RaftAddr, c.RaftAdvertise, c.Peers[0].Addr = "127.0.0.1:11000", "127.0.0.2:11000", "10.1.1.1:11000", "10.1.1.1:11000"
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := defaultConfig()
			tt.want(want)
			if diff := cmp.Diff(want, mustLoadConfig(t, tt.env), cmp.AllowUnexported(Config{})); diff != "" {
				t.Errorf("config differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadConfigPeers(t *testing.T) {
	long := strings.Repeat(strings.Repeat("l", 63)+".", 3) + strings.Repeat("l", 61) // 253 bytes
	tests := []struct {
		name      string
		env       testEnv
		advertise string
		peers     []Peer
	}{
		{"sorted by id", testEnv{"PEERS": "node2@b:2,node1@a:1,node10@c:3"}, "a:1", []Peer{{"node1", "a:1"}, {"node10", "c:3"}, {"node2", "b:2"}}},
		{"white space around entries", testEnv{"PEERS": " node1@a:1 ,\n\tnode2@b:2\n"}, "a:1", []Peer{{"node1", "a:1"}, {"node2", "b:2"}}},
		{"alone", testEnv{"PEERS": "node1@a:1"}, "a:1", []Peer{{"node1", "a:1"}}},
		{"ipv6", testEnv{"PEERS": "node1@[fd00::1]:1,node2@[FD00::2]:2"}, "[fd00::1]:1", []Peer{{"node1", "[fd00::1]:1"}, {"node2", "[fd00::2]:2"}}},
		{"ipv4 written as ipv6", testEnv{"PEERS": "node1@[::ffff:10.1.1.1]:1"}, "10.1.1.1:1", []Peer{{"node1", "10.1.1.1:1"}}},
		{"names stay as they are", testEnv{"PEERS": "node1@raft_1.Ns-1.svc.:1,node2@10.example:2"}, "raft_1.Ns-1.svc.:1", []Peer{{"node1", "raft_1.Ns-1.svc.:1"}, {"node2", "10.example:2"}}},
		{"longest name", testEnv{"PEERS": "node1@" + long + ":1"}, long + ":1", []Peer{{"node1", long + ":1"}}},
		{"one host with two ports", testEnv{"PEERS": "node1@a:1,node2@a:2"}, "a:1", []Peer{{"node1", "a:1"}, {"node2", "a:2"}}},
		{"ids differ in case", testEnv{"PEERS": "node1@a:1,NODE1@b:2"}, "a:1", []Peer{{"NODE1", "b:2"}, {"node1", "a:1"}}},
		{"node id is given", testEnv{"NODE_ID": "b", "PEERS": "a@a:1,b@b:2"}, "b:2", []Peer{{"a", "a:1"}, {"b", "b:2"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := mustLoadConfig(t, tt.env)
			if cfg.RaftAdvertise != tt.advertise {
				t.Errorf("advertised: got %v; want %v", cfg.RaftAdvertise, tt.advertise)
			}
			if diff := cmp.Diff(tt.peers, cfg.Peers); diff != "" {
				t.Errorf("peers differ (-want +got):\n%s", diff)
			}
			if len(cfg.Warnings) != 0 {
				t.Errorf("warnings: got %q; want none", cfg.Warnings)
			}
		})
	}
}

// Every problem is one line that holds the variable, the value and the cure, and comes with no other.
func TestLoadConfigProblem(t *testing.T) {
	const all = "set all three, or none of them"
	file := func(content string, mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	some, none, folder, open, pipe := file("some", 0o600), file("", 0o600), t.TempDir(), file("token", 0o600), filepath.Join(t.TempDir(), "pipe")
	if err := errors.Join(os.Chmod(open, 0o666), syscall.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	ca, other := authority.New(t), authority.New(t)
	good := ca.Node("node1")
	own := func(of map[string]string, pairs ...string) testEnv { return testEnv(of).with(pairs...) }
	two := "node1@a:1,node2@b:1"
	label64 := strings.Repeat("l", 64)
	tooLong := strings.Repeat("l.", 127) + "com" // 257 bytes
	tests := []struct {
		name string
		env  testEnv
		want []string
	}{
		{"node id with a space", testEnv{"NODE_ID": "no de"}, []string{`NODE_ID="no de"`, "set NODE_ID to ASCII letters"}},
		{"node id with a newline", testEnv{"NODE_ID": "a\nb"}, []string{`NODE_ID="a\nb"`, "set NODE_ID to"}},
		{"node id with a leading dot", testEnv{"NODE_ID": ".a"}, []string{`NODE_ID=".a"`, "no leading . or -"}},
		{"node id with a leading dash", testEnv{"NODE_ID": "-a"}, []string{`NODE_ID="-a"`, "no leading . or -"}},
		{"node id with an umlaut", testEnv{"NODE_ID": "kön"}, []string{`NODE_ID="kön"`, "ASCII"}},
		{"node id of 65 bytes", testEnv{"NODE_ID": strings.Repeat("n", 65)}, []string{"NODE_ID=", "nnn", "at most 64"}},
		{"bad node id and peers", testEnv{"NODE_ID": "a b", "PEERS": "n1@a:1", "RAFT_ADVERTISE_ADDR": "c"}, []string{`NODE_ID="a b"`}},
		{"state dir in a home that no shell knows", testEnv{"STATE_DIR": "~/state"}, []string{`STATE_DIR="~/state"`, "set STATE_DIR to"}},
		{"state dir with a variable", testEnv{"STATE_DIR": "/data/${NODE_ID}"}, []string{`STATE_DIR="/data/${NODE_ID}"`, "expanded"}},
		{"state dir in quotes", testEnv{"STATE_DIR": `"/data"`}, []string{`STATE_DIR="\"/data\""`, "quotes"}},
		{"state dir with a newline", testEnv{"STATE_DIR": "/data\n"}, []string{`STATE_DIR="/data\n"`, "control characters"}},
		{"kv store", testEnv{"KV_STORE": "Redis"}, []string{`KV_STORE="Redis"`, "set KV_STORE to one of boltdb, memory"}},
		{"read consistency", testEnv{"READ_CONSISTENCY": "stale "}, []string{`READ_CONSISTENCY="stale "`, "linearizable, stale"}},
		{"log level", testEnv{"LOG_LEVEL": "Loud"}, []string{`LOG_LEVEL="Loud"`, "one of trace, debug, info, warn, error, off"}},
		{"log format", testEnv{"LOG_FORMAT": "xml"}, []string{`LOG_FORMAT="xml"`, "set LOG_FORMAT to one of text, json"}},
		{"http port as a service link", testEnv{"HTTP_PORT": "tcp://10.0.0.1:11000"}, []string{
			`HTTP_PORT="tcp://10.0.0.1:11000" is a Kubernetes service link, not a port: set enableServiceLinks: false in the pod, or HTTP_PORT to a number from 1 to 65535`,
		}},
		{"raft port as a service link", testEnv{"RAFT_PORT": "tcp://[fd00::1]:1"}, []string{`RAFT_PORT="tcp://[fd00::1]:1"`, "enableServiceLinks: false"}},
		{"advertised port as a service link", testEnv{"RAFT_ADVERTISE_PORT": "tcp://a:1"}, []string{`RAFT_ADVERTISE_PORT="tcp://a:1"`, "enableServiceLinks: false"}},
		{"port 0", testEnv{"HTTP_PORT": "0"}, []string{`HTTP_PORT="0"`, "set HTTP_PORT to a number from 1 to 65535"}},
		{"port 65536", testEnv{"RAFT_PORT": "65536"}, []string{`RAFT_PORT="65536"`, "1 to 65535"}},
		{"port with a sign", testEnv{"RAFT_ADVERTISE_PORT": "+1"}, []string{`RAFT_ADVERTISE_PORT="+1"`, "1 to 65535"}},
		{"port with a space", testEnv{"HTTP_PORT": "80 "}, []string{`HTTP_PORT="80 "`, "1 to 65535"}},
		{"port in hex", testEnv{"HTTP_PORT": "0x50"}, []string{`HTTP_PORT="0x50"`, "1 to 65535"}},
		{"http address with a port", testEnv{"HTTP_ADDR": "localhost:80"}, []string{`HTTP_ADDR="localhost:80"`, "without a port"}},
		{"http address as a url", testEnv{"HTTP_ADDR": "http://a"}, []string{`HTTP_ADDR="http://a"`, "set HTTP_ADDR to an IPv4"}},
		{"http address that is a bad ipv4", testEnv{"HTTP_ADDR": "10.0.0.256"}, []string{`HTTP_ADDR="10.0.0.256"`, "set HTTP_ADDR to an IPv4"}},
		{"raft address that is a bad ipv6", testEnv{"RAFT_ADDR": "fd00::1::2"}, []string{`RAFT_ADDR="fd00::1::2"`, "set RAFT_ADDR to an IPv4"}},
		{"ipv4 in brackets", testEnv{"RAFT_ADDR": "[10.0.0.1]"}, []string{`RAFT_ADDR="[10.0.0.1]"`, "set RAFT_ADDR to an IPv4"}},
		{"half a bracket", testEnv{"RAFT_ADDR": "[::1"}, []string{`RAFT_ADDR="[::1"`, "set RAFT_ADDR to an IPv4"}},
		{"advertised address unspecified", testEnv{"RAFT_ADVERTISE_ADDR": "0.0.0.0"}, []string{`RAFT_ADVERTISE_ADDR="0.0.0.0"`, "unspecified", "set RAFT_ADVERTISE_ADDR to an IPv4"}},
		{"advertised ipv6 unspecified", testEnv{"RAFT_ADVERTISE_ADDR": "[0::0]"}, []string{`RAFT_ADVERTISE_ADDR="[0::0]"`, "unspecified"}},
		{"advertised ipv4 in ipv6 unspecified", testEnv{"RAFT_ADVERTISE_ADDR": "::ffff:0.0.0.0"}, []string{`RAFT_ADVERTISE_ADDR="::ffff:0.0.0.0"`, "unspecified"}},
		{"advertised address with a zone", testEnv{"RAFT_ADVERTISE_ADDR": "fe80::1%eth0"}, []string{`RAFT_ADVERTISE_ADDR="fe80::1%eth0"`, "zone"}},
		{"advertised address with a slash", testEnv{"RAFT_ADVERTISE_ADDR": "a/b"}, []string{`RAFT_ADVERTISE_ADDR="a/b"`, "set RAFT_ADVERTISE_ADDR to"}},
		{"one port for both", testEnv{"HTTP_PORT": "12000"}, []string{`HTTP_PORT="12000" and RAFT_PORT="12000"`, "HTTP_ADDR", "RAFT_ADDR", "to another number"}},
		{"one port on one address", testEnv{"HTTP_PORT": "1", "RAFT_PORT": "01", "HTTP_ADDR": "::1", "RAFT_ADDR": "[::1]"}, []string{`HTTP_PORT="1" and RAFT_PORT="1"`}},
		{"one port on one name", testEnv{"HTTP_PORT": "1", "RAFT_PORT": "1", "HTTP_ADDR": "localhost", "RAFT_ADDR": "LocalHost"}, []string{"HTTP_PORT", "RAFT_PORT"}},
		{"one port, http everywhere", testEnv{"HTTP_PORT": "1", "RAFT_PORT": "1", "HTTP_ADDR": "::", "RAFT_ADDR": "10.0.0.1"}, []string{"HTTP_PORT", "RAFT_PORT"}},
		{"one port, raft everywhere", testEnv{"HTTP_PORT": "1", "RAFT_PORT": "1", "HTTP_ADDR": "10.0.0.1"}, []string{"HTTP_PORT", "RAFT_PORT"}},
		{"no body", testEnv{"MAX_BODY_BYTES": "0"}, []string{`MAX_BODY_BYTES="0"`, "a whole number from 1 to 2097152"}},
		{"body too large", testEnv{"MAX_BODY_BYTES": "2097153"}, []string{`MAX_BODY_BYTES="2097153"`, "from 1 to 2097152"}},
		{"body with a unit", testEnv{"MAX_BODY_BYTES": "1MiB"}, []string{`MAX_BODY_BYTES="1MiB"`, "a whole number"}},
		{"snapshot threshold", testEnv{"SNAPSHOT_THRESHOLD": "0"}, []string{`SNAPSHOT_THRESHOLD="0"`, "a whole number from 1"}},
		{"trailing logs", testEnv{"TRAILING_LOGS": "-1"}, []string{`TRAILING_LOGS="-1"`, "a whole number from 0"}},
		{"snapshot interval", testEnv{"SNAPSHOT_INTERVAL": "4ms"}, []string{`SNAPSHOT_INTERVAL="4ms"`, "from 5ms to"}},
		{"an endless snapshot interval", testEnv{"SNAPSHOT_INTERVAL": "2562047h"}, []string{`SNAPSHOT_INTERVAL="2562047h"`, "to 8760h"}},
		{"duration without a unit", testEnv{"SHUTDOWN_TIMEOUT": "8"}, []string{`SHUTDOWN_TIMEOUT="8"`, "such as 8s"}},
		{"no time at all", testEnv{"SHUTDOWN_TIMEOUT": "0s"}, []string{`SHUTDOWN_TIMEOUT="0s"`, "set SHUTDOWN_TIMEOUT to a duration from"}},
		{"negative duration", testEnv{"SHUTDOWN_TIMEOUT": "-8s"}, []string{`SHUTDOWN_TIMEOUT="-8s"`, "set SHUTDOWN_TIMEOUT to a duration from"}},
		{"tokens that are not there", testEnv{"HTTP_TOKEN_FILE": "/no/such/file"}, []string{`HTTP_TOKEN_FILE="/no/such/file" will not do`, "no such file", "set HTTP_TOKEN_FILE to a file that"}},
		{"no tokens", testEnv{"HTTP_TOKEN_FILE": none}, []string{"HTTP_TOKEN_FILE=", "is empty", "set HTTP_TOKEN_FILE to"}},
		{"tokens in a directory", testEnv{"HTTP_TOKEN_FILE": folder}, []string{"HTTP_TOKEN_FILE=", "is a directory"}},
		{"tokens in a pipe", testEnv{"HTTP_TOKEN_FILE": pipe}, []string{"HTTP_TOKEN_FILE=", "no regular file", "set HTTP_TOKEN_FILE to"}},
		{"tokens in a device", testEnv{"HTTP_TOKEN_FILE": "/dev/zero"}, []string{"HTTP_TOKEN_FILE=", "no regular file"}},
		{"tokens that everybody can add to", testEnv{"HTTP_TOKEN_FILE": open}, []string{"HTTP_TOKEN_FILE=", "everybody can write", "0666", "chmod o-w"}},
		{"tls key that everybody can write", own(good, "TLS_KEY_FILE", open), []string{"TLS_KEY_FILE=", "everybody can write"}},
		{"tls authority that everybody can write", own(good, "TLS_CA_FILE", open), []string{"TLS_CA_FILE=", "everybody can write"}},
		{"tls key in a pipe", own(good, "TLS_KEY_FILE", pipe), []string{"TLS_KEY_FILE=", "no regular file"}},
		{"blank lines for tokens", testEnv{"HTTP_TOKEN_FILE": file("\n \n", 0o600)}, []string{"HTTP_TOKEN_FILE: ", "holds no token", "write at least one"}},
		{"tokens of other letters", testEnv{"HTTP_TOKEN_FILE": file("good\n\nnot good\n", 0o600)}, []string{"HTTP_TOKEN_FILE: line 3 of ", "is not a token: use letters"}},
		{"tls certificate alone", testEnv{"TLS_CERT_FILE": some}, []string{"TLS_CERT_FILE=", `TLS_KEY_FILE=""`, all}},
		{"tls key alone", testEnv{"TLS_KEY_FILE": some}, []string{`TLS_CERT_FILE=""`, all}},
		{"tls authority alone", testEnv{"TLS_CA_FILE": some}, []string{`TLS_CERT_FILE=""`, all}},
		{"tls without an authority", testEnv{"TLS_CERT_FILE": some, "TLS_KEY_FILE": some}, []string{`TLS_CA_FILE=""`, all}},
		{"tls key that is not there", own(good, "TLS_KEY_FILE", "/no/such/key"), []string{`TLS_KEY_FILE="/no/such/key" will not do`, "no such file"}},
		{"tls authority that is empty", own(good, "TLS_CA_FILE", none), []string{"TLS_CA_FILE=", "is empty"}},
		{"tls certificate that is none", own(good, "TLS_CERT_FILE", some), []string{"TLS_CERT_FILE", "PEM"}},
		{"tls key of another certificate", own(good, "TLS_KEY_FILE", ca.Node("node2")["TLS_KEY_FILE"]), []string{"TLS_KEY_FILE", "match"}},
		{"tls authority that is none", own(good, "TLS_CA_FILE", some), []string{"TLS_CA_FILE holds no certificate in PEM"}},
		{"tls authority of others", own(good, "TLS_CA_FILE", other.Node("node1")["TLS_CA_FILE"]), []string{"TLS_CERT_FILE is no server's certificate under TLS_CA_FILE", "unknown authority"}},
		{"tls certificate that has expired", own(ca.Issue(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }, "node1")), []string{"TLS_CERT_FILE", "expired"}},
		{"tls certificate of another node", own(ca.Node("node2"), "PEERS", two), []string{"TLS_CERT_FILE", `"node2"`, `not of node "node1"`}},
		{"tls certificate for servers only", own(ca.Issue(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, "node1"), "PEERS", two), []string{"TLS_CERT_FILE is no client's certificate", "incompatible key usage"}},
		{"tls certificate for servers only, of a node that is to have peers", own(ca.Issue(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, "node1"), "PEERS_FILE", file("node1@a:1\n", 0o600)), []string{"TLS_CERT_FILE is no client's certificate"}},
		{"stray comma at the end", testEnv{"PEERS": "node1@a:1,"}, []string{`PEERS="node1@a:1,"`, "entry 2", "remove the stray comma"}},
		{"stray comma in between", testEnv{"PEERS": "node1@a:1, ,b@b:1"}, []string{`PEERS="node1@a:1, ,b@b:1"`, "entry 2", "remove the stray comma"}},
		{"peers of white space", testEnv{"PEERS": " "}, []string{`PEERS=" "`, "unset PEERS"}},
		{"peer without an id", testEnv{"PEERS": "node1@a:1,b:1"}, []string{`PEERS entry "b:1" has no id`, "id@host:port"}},
		{"peer with a bad id", testEnv{"PEERS": "node1@a:1,b c@b:1"}, []string{`PEERS entry "b c@b:1"`, `id "b c"`, "ASCII letters"}},
		{"peer with an empty id", testEnv{"PEERS": "node1@a:1,@b:1"}, []string{`PEERS entry "@b:1"`, `id ""`, "ASCII letters"}},
		{"peers with blanks between", testEnv{"PEERS": "node1@a:1 node2@b:1"}, []string{`PEERS entry "node1@a:1 node2@b:1"`, "separate entries with commas"}},
		{"peers with semicolons between", testEnv{"PEERS": "node1@a:1;node2@b:1"}, []string{`PEERS entry "node1@a:1;node2@b:1"`, "separate entries with commas"}},
		{"peers on lines", testEnv{"PEERS": "node1@a:1\nnode2@b:1\n"}, []string{`PEERS entry "node1@a:1\nnode2@b:1"`, "separate entries with commas"}},
		{"ipv6 peer without brackets", testEnv{"PEERS": "node1@::1:12000"}, []string{`PEERS entry "node1@::1:12000"`, "in two ways", "id@[host]:port"}},
		{"long ipv6 peer without brackets", testEnv{"PEERS": "node1@1:2:3:4:5:6:7:8:9"}, []string{"in two ways", "id@[host]:port"}},
		{"ipv6 peer without brackets or port", testEnv{"PEERS": "node1@fd00::1"}, []string{"in two ways", "id@[host]:port"}},
		{"peer without a port", testEnv{"PEERS": "node1@a"}, []string{`PEERS entry "node1@a" has no port`, "id@host:port"}},
		{"ipv6 peer without a port", testEnv{"PEERS": "node1@[fd00::1]"}, []string{`PEERS entry "node1@[fd00::1]" has no port`, "id@host:port"}},
		{"peer with an empty port", testEnv{"PEERS": "node1@a:"}, []string{`PEERS entry "node1@a:"`, `port ""`, "a number from 1 to 65535"}},
		{"peer with port 0", testEnv{"PEERS": "node1@a:0"}, []string{`PEERS entry "node1@a:0"`, `port "0"`, "1 to 65535"}},
		{"peer with a named port", testEnv{"PEERS": "node1@a:http"}, []string{`PEERS entry "node1@a:http"`, `port "http"`, "1 to 65535"}},
		{"peer with an empty host", testEnv{"PEERS": "node1@:1"}, []string{`PEERS entry "node1@:1"`, `host ""`, "id@host:port"}},
		{"peer with two ids", testEnv{"PEERS": "node1@b@c:1"}, []string{`PEERS entry "node1@b@c:1"`, `host "b@c"`, "id@host:port"}},
		{"peer with a bad ipv4", testEnv{"PEERS": "node1@10.1.1:1"}, []string{`host "10.1.1"`, "the host being an IPv4"}},
		{"peer with a bad ipv6", testEnv{"PEERS": "node1@[fd00::x]:1"}, []string{`host "[fd00::x]"`, "the host being an IPv4"}},
		{"peer with a url", testEnv{"PEERS": "node1@tcp://a:1"}, []string{`host "tcp://a"`, "the host being an IPv4"}},
		{"peer with an umlaut", testEnv{"PEERS": "node1@kön:1"}, []string{`host "kön"`, "DNS name"}},
		{"peer with two dots", testEnv{"PEERS": "node1@a..b:1"}, []string{`host "a..b"`, "DNS name"}},
		{"peer with a long label", testEnv{"PEERS": "node1@" + label64 + ":1"}, []string{label64, "DNS name"}},
		{"peer with a long name", testEnv{"PEERS": "node1@" + tooLong + ":1"}, []string{tooLong, "DNS name"}},
		{"peer unspecified", testEnv{"PEERS": "node1@0.0.0.0:1"}, []string{`PEERS entry "node1@0.0.0.0:1"`, "unspecified", "that peers reach it by"}},
		{"ipv6 peer unspecified", testEnv{"PEERS": "node1@[::]:1"}, []string{`PEERS entry "node1@[::]:1"`, "unspecified", "the host being"}},
		{"peer with a zone", testEnv{"PEERS": "node1@[fe80::1%eth0]:1"}, []string{`PEERS entry "node1@[fe80::1%eth0]:1"`, "zone"}},
		{"two peers with one id", testEnv{"PEERS": "node1@a:1,node1@b:1"}, []string{`PEERS entry "node1@b:1"`, "same id", "its own"}},
		{"two peers with one name", testEnv{"PEERS": "node1@a:1,b@A:01"}, []string{`PEERS entry "b@A:01"`, "same address", "its own"}},
		{"two peers with one ipv6", testEnv{"PEERS": "node1@[fd00::1]:1,b@[FD00:0:0::1]:1"}, []string{`PEERS entry "b@[FD00:0:0::1]:1"`, "same address", "its own"}},
		{"two peers with one ipv4", testEnv{"PEERS": "node1@10.1.1.1:1,b@[::ffff:10.1.1.1]:1"}, []string{`PEERS entry "b@[::ffff:10.1.1.1]:1"`, "same address", "its own"}},
		{"node id not in peers", testEnv{"NODE_ID": "x", "PEERS": "b@b:1,a@a:1"}, []string{`NODE_ID="x"`, "PEERS", `"a" "b"`, "set NODE_ID to one of these, or add this node to PEERS"}},
		{"hostname not in peers", testEnv{"PEERS": "a@a:1"}, []string{"NODE_ID", `hostname "node1"`, "PEERS", `"a"`, "set NODE_ID to"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := configProblems(t, tt.env, testSystem())
			if len(got) != 1 {
				t.Fatalf("got %d problems; want 1:\n%s", len(got), strings.Join(got, "\n"))
			}
			for _, want := range tt.want {
				if !strings.Contains(got[0], want) {
					t.Errorf("got %s; want it to contain %s", got[0], want)
				}
			}
		})
	}
	for name, env := range map[string]testEnv{ // two each
		"key and authority": own(good, "TLS_KEY_FILE", some, "TLS_CA_FILE", some),
		"key and peers":     own(good, "TLS_KEY_FILE", some, "PEERS", "node1@a"),
		"tokens":            {"HTTP_TOKEN_FILE": file("a b\nc d\n", 0o600)},
	} {
		got := strings.Join(configProblems(t, env, testSystem()), "\n")
		if n := strings.Count(got, "_FILE holds no") + strings.Count(got, "_KEY_FILE: ") + strings.Count(got, "PEERS entry") +
			strings.Count(got, "HTTP_TOKEN_FILE: line"); n != 2 {
			t.Errorf("%s: got %s; want two problems", name, got)
		}
	}
}

func TestLoadConfigHostname(t *testing.T) {
	for _, hostname := range []string{"", "my host", "-a", strings.Repeat("h", 65)} {
		t.Run(fmt.Sprintf("%.10q", hostname), func(t *testing.T) {
			sys := testSystem()
			sys.hostname = hostname
			got := configProblems(t, testEnv{"PEERS": "a@a:1"}, sys)
			if len(got) != 1 || !strings.Contains(got[0], "set NODE_ID") || !strings.Contains(got[0], fmt.Sprintf("%q", hostname)) {
				t.Errorf("got %q; want one problem that names the hostname and says to set NODE_ID", got)
			}
			cfg, err := loadConfig(testEnv{"NODE_ID": "a"}.get, sys)
			if err != nil || cfg.NodeID != "a" {
				t.Errorf("with NODE_ID: got %v, %v; want node a", cfg, err)
			}
		})
	}
}

// An address that is given must not cost the look-up of one that is not needed.
func TestLoadConfigLooksNothingUpInVain(t *testing.T) {
	sys := system{hostname: "node1", hostIPv4: func() string {
		t.Error("got a look-up; want none")
		return ""
	}}
	for _, e := range []testEnv{{"PEERS": "node1@a:1"}, {"RAFT_ADVERTISE_ADDR": "a"}} {
		if _, err := loadConfig(e.get, sys); err != nil {
			t.Errorf("loadConfig(%v): got %v; want no error", e, err)
		}
	}
}

func TestLoadConfigAllProblemsAtOnce(t *testing.T) {
	e := testEnv{
		"KV_STORE": "redis", "HTTP_ADDR": "a b", "HTTP_PORT": "tcp://a:1", "RAFT_ADDR": "*", "RAFT_PORT": "x",
		"RAFT_ADVERTISE_ADDR": "::", "RAFT_ADVERTISE_PORT": "0", "READ_CONSISTENCY": "maybe", "LOG_LEVEL": "l", "LOG_FORMAT": "f",
		"MAX_BODY_BYTES": "b", "SNAPSHOT_THRESHOLD": "t", "SNAPSHOT_INTERVAL": "i", "TRAILING_LOGS": "l", "SHUTDOWN_TIMEOUT": "s",
		"HTTP_TOKEN_FILE": "/no/t", "TLS_CERT_FILE": "/no/c", "TLS_KEY_FILE": "/no/k", "TLS_CA_FILE": "/no/a",
	}
	with := e.with("NODE_ID", "x y", "PEERS", "a@0.0.0.0:0,b, ,a@c:1,d@C:1,e f@g:1")
	got := configProblems(t, with, testSystem())
	for name := range e {
		if n := countPrefix(got, name+"="); n != 1 {
			t.Errorf("problems of %s: got %d; want 1", name, n)
		}
	}
	// Host and port of the first, no id, stray comma, an id twice, an address twice, a bad id.
	if n := countPrefix(got, "PEERS"); n != 7 {
		t.Errorf("problems of PEERS: got %d; want 7", n)
	}
	if want := len(e) + 7 + 1; len(got) != want {
		t.Errorf("got %d problems; want %d:\n%s", len(got), want, strings.Join(got, "\n"))
	}
	for _, line := range got {
		if strings.Contains(line, "set all three") {
			t.Errorf("got %s; want no word of a part, all three are set", line)
		}
	}
}

// A file of secrets that everybody can read works, but the operator hears of it.
func TestLoadConfigReadableSecrets(t *testing.T) {
	env := testEnv(authority.New(t).Node("node1"))
	env["HTTP_TOKEN_FILE"] = filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(env["HTTP_TOKEN_FILE"], []byte("token"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := mustLoadConfig(t, env).Warnings; len(got) > 0 {
		t.Errorf("got %q for files of this user alone; want none", got)
	}
	for _, name := range []string{"HTTP_TOKEN_FILE", "TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CA_FILE"} {
		if err := os.Chmod(env[name], 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := mustLoadConfig(t, env).Warnings
	if len(got) != 2 || !strings.HasPrefix(got[0], "HTTP_TOKEN_FILE=") || !strings.HasPrefix(got[1], "TLS_KEY_FILE=") || !strings.Contains(got[1], "chmod o-r it") {
		t.Errorf("got %q; want a warning of the tokens and one of the key, with the cure", got)
	}
}

func countPrefix(lines []string, prefix string) (n int) {
	for _, line := range lines {
		if strings.HasPrefix(line, prefix) {
			n++
		}
	}
	return n
}

func TestLoadConfigWarnings(t *testing.T) {
	base := testEnv{"PEERS": "node1@[fd00::1]:1,node2@Host2:2"}
	tests := []struct {
		name string
		env  testEnv
		want []string // what the warnings begin with
	}{
		{"nothing given", base, nil},
		{"the same", base.with("RAFT_ADVERTISE_ADDR", "FD00::1", "RAFT_ADVERTISE_PORT", "01"), nil},
		{"the same name in another case", base.with("NODE_ID", "node2", "RAFT_ADVERTISE_ADDR", "hOST2"), nil},
		{"another address", base.with("RAFT_ADVERTISE_ADDR", "10.1.1.1"), []string{`RAFT_ADVERTISE_ADDR="10.1.1.1"`}},
		{"another port", base.with("RAFT_ADVERTISE_PORT", "9"), []string{`RAFT_ADVERTISE_PORT="9"`}},
		{"both", base.with("RAFT_ADVERTISE_ADDR", "a", "RAFT_ADVERTISE_PORT", "9"), []string{`RAFT_ADVERTISE_ADDR="a"`, `RAFT_ADVERTISE_PORT="9"`}},
		{"another port to listen on, behind another address", base.with("RAFT_PORT", "9"), nil},
		{"another port to listen on, here", testEnv{"PEERS": "node1@10.1.1.7:1,node2@b:2", "RAFT_PORT": "9"}, []string{`RAFT_PORT="9"`}},
		{"another port to listen on, on localhost", testEnv{"PEERS": "node1@localhost:1,node2@b:2", "RAFT_PORT": "9"}, []string{`RAFT_PORT="9"`}},
		{"another port to listen on, by this host's name", testEnv{"PEERS": "node1@Node1:1,node2@b:2"}, []string{`RAFT_PORT="12000"`}},
		{"the port to listen on", testEnv{"PEERS": "node1@10.1.1.7:9,node2@b:2", "RAFT_PORT": "9"}, nil},
		{"listening for this machine alone", base.with("RAFT_ADDR", "127.0.0.1"), []string{`RAFT_ADDR="127.0.0.1"`}},
		{"a cluster on this machine alone", testEnv{"PEERS": "node1@127.0.0.1:1,node2@[::1]:2", "RAFT_ADDR": "127.0.0.1", "RAFT_PORT": "1"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := mustLoadConfig(t, tt.env)
			if len(cfg.Warnings) != len(tt.want) {
				t.Fatalf("got %q; want %q", cfg.Warnings, tt.want)
			}
			for i, w := range cfg.Warnings {
				if !strings.HasPrefix(w, tt.want[i]) || !strings.Contains(w, "PEERS") || !regexp.MustCompile(`: (unset|set) RAFT_`).MatchString(w) {
					t.Errorf("got %s; want %s, PEERS and what to set or unset", w, tt.want[i])
				}
			}
			if want := cfg.Peers[slices.IndexFunc(cfg.Peers, func(p Peer) bool { return p.ID == cfg.NodeID })].Addr; cfg.RaftAdvertise != want {
				t.Errorf("advertised: got %v; want the entry in PEERS, %s", cfg.RaftAdvertise, want)
			}
		})
	}
}

func TestTwoNodesInMemoryAreWarnedOf(t *testing.T) {
	for peers, want := range map[string]int{"node1@a:1": 0, "node1@a:1,node2@b:2": 1, "node1@a:1,node2@b:2,node3@c:3": 0} {
		if got := mustLoadConfig(t, testEnv{"KV_STORE": storeMemory, "PEERS": peers}).Warnings; len(got) != want {
			t.Errorf("PEERS=%s: got %q; want %d warnings", peers, got, want)
		}
	}
}

func TestParseConsistency(t *testing.T) {
	for _, want := range []Consistency{Linearizable, Stale} {
		if got, err := parseConsistency(string(want)); err != nil || got != want {
			t.Errorf("parseConsistency(%q): got %v, %v; want %v", want, got, err, want)
		}
	}
	for _, s := range []string{"", "STALE", "stale ", "strong"} {
		if got, err := parseConsistency(s); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", s)) || got != "" {
			t.Errorf("parseConsistency(%q): got %q, %v; want an error that quotes it", s, got, err)
		}
	}
}

func TestLogPairs(t *testing.T) {
	cfg := mustLoadConfig(t, testEnv{"PEERS": "node1@a:1,node2@b:2"})
	pairs := cfg.logPairs()
	got := map[string]any{}
	for i := 0; i < len(pairs); i += 2 {
		got[pairs[i].(string)] = pairs[i+1]
	}
	for key, want := range map[string]any{
		"node_id": "node1", "http_addr": "0.0.0.0:11000", "raft_advertise": "a:1", "peers": "node1@a:1,node2@b:2",
		"read_consistency": "linearizable", "shutdown_timeout": "8s", "max_body_bytes": int64(524288),
	} {
		if got[key] != want {
			t.Errorf("%s: got %v; want %v", key, got[key], want)
		}
	}
	if len(got) != 20 {
		t.Errorf("got %d keys; want 20: every field but the warnings", len(got))
	}
}

// variableNames returns the variables that --help lists.
func variableNames() (names []string) {
	for _, row := range regexp.MustCompile(`(?m)^  ([A-Z_]+) `).FindAllStringSubmatch(helpText, -1) {
		names = append(names, row[1])
	}
	return names
}

// docs/configuration.md, --help and the code know the same variables, with the same defaults and meanings.
func TestVariables(t *testing.T) {
	asked := map[string]bool{}
	plain, err := loadConfig(func(name string) string { asked[name] = true; return "" }, testSystem())
	if err != nil {
		t.Fatal(err)
	}
	if names := variableNames(); !slices.Equal(slices.Sorted(slices.Values(names)), slices.Sorted(maps.Keys(asked))) {
		t.Errorf("--help lists %q; the code asks for %q", names, slices.Sorted(maps.Keys(asked)))
	}
	doc, err := os.ReadFile("docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| (.+?) \\| (.+) \\|$").FindAllStringSubmatch(string(doc), -1)
	var table strings.Builder
	for _, row := range rows {
		name, def, meaning := row[1], row[2], row[3]
		fmt.Fprintf(&table, "%s %s default: %s ", name, meaning, def)
		if value := strings.Trim(def, "`"); def == "`"+value+"`" && !strings.ContainsAny(value, "`<") {
			if diff := cmp.Diff(plain, mustLoadConfig(t, testEnv{name: value}), cmp.AllowUnexported(Config{})); diff != "" {
				t.Errorf("%s=%s is not the default (-unset +set):\n%s", name, value, diff)
			}
		}
	}
	_, help, _ := strings.Cut(helpText, "counts as unset):")
	if diff := cmp.Diff(strings.Fields(strings.ReplaceAll(table.String(), "`", "")), strings.Fields(help)); diff != "" || len(rows) == 0 {
		t.Errorf("docs/configuration.md and --help differ (-table +help):\n%s", diff)
	}
	for line := range strings.Lines(helpText) {
		if len(line) > 101 || strings.HasSuffix(line, " \n") {
			t.Errorf("--help: got %q; want at most 100 bytes and no space at the end", line)
		}
	}
}

// The machine's own defaults must do wherever the tests run.
func TestThisSystem(t *testing.T) {
	sys := thisSystem()
	if ip, why := parsePeerHost(sys.hostIPv4()); why != "" || strings.Contains(ip, ":") {
		t.Errorf("hostIPv4: got %v; want an IPv4 that can be advertised", ip)
	}
}
