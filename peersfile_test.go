package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

func TestParsePeersFile(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		ids        string
		problem    string
	}{
		{"one a line", "a@h1:1\nb@h2:1\n", "a,b", ""},
		{"commas", "a@h1:1, b@h2:1,c@h3:1", "a,b,c", ""},
		{"both, with what is skipped", "# the cluster\r\n\r\na@h1:1,\r\n  b@h2:1 , c@h3:1 # in the cellar\r\n\t\n", "a,b,c", ""},
		{"no newline at the end", "b@h2:1\na@h1:1", "a,b", ""},
		{"empty", "", "", "names no node"},
		{"comments alone", "# a@h1:1\n\n", "", "names no node"},
		{"two on a line", "a@h1:1 b@h2:1\n", "", "separate entries with commas"},
		{"half an entry", "a@h1:1\nb@h2", "", "has no port"},
		{"the same node twice", "a@h1:1\na@h2:1", "", "same id"},
		{"two commas", "a@h1:1,,b@h2:1", "", "PEERS_FILE"},
	} {
		peers, problems := parsePeersFile(tt.text)
		switch {
		case tt.problem == "" && (len(problems) > 0 || strings.Join(peerIDs(peers), ",") != tt.ids):
			t.Errorf("%s: got %v, %v; want %s", tt.name, peers, problems, tt.ids)
		case tt.problem != "" && !slices.ContainsFunc(problems, func(err error) bool { return strings.Contains(err.Error(), tt.problem) }):
			t.Errorf("%s: got %v, %v; want %q", tt.name, peers, problems, tt.problem)
		}
	}
}

// A list counts when it has not changed for a while, and what cannot be used changes nothing but the warning.
func TestPeersFileIsReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "peers")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a@h1:1\n")
	first, _ := parsePeersFile("a@h1:1")
	l := newPeerList(&Config{PeersFile: path, Peers: first}, testLogger(t, "list"))
	now := time.Unix(1000, 0)
	check := func(after time.Duration, want string, bad bool) {
		t.Helper()
		now = now.Add(after)
		l.look(now)
		if got := strings.Join(peerIDs(l.get()), ","); got != want || l.bad.Load() != bad {
			t.Errorf("got %s, bad %v; want %s, %v", got, l.bad.Load(), want, bad)
		}
	}
	check(time.Hour, "a", false)
	write("a@h1:1\nb@h2:1\n") // torn: a third line is to come
	check(time.Second, "a", false)
	write("a@h1:1\nb@h2:1\nc@h3:1\n")
	check(time.Second, "a", false)
	check(time.Second, "a", false)
	check(time.Second, "a,b,c", false)
	check(time.Hour, "a,b,c", false)

	write("")
	check(time.Second, "a,b,c", false)
	check(2*time.Second, "a,b,c", true)
	write("nonsense")
	check(time.Second, "a,b,c", true)
	check(2*time.Second, "a,b,c", true)
	write("a@h1:1\nb@h2:1\nc@h3:1\n") // as before
	check(time.Second, "a,b,c", true)
	check(2*time.Second, "a,b,c", false)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	check(time.Second, "a,b,c", false)
	check(2*time.Second, "a,b,c", true)
	write("a@elsewhere:1\n")
	check(time.Second, "a,b,c", true)
	check(2*time.Second, "a", false)
	if got := l.get()[0].Addr; got != "elsewhere:1" {
		t.Errorf("got address %s; want the new one", got)
	}
}

// Who can write the list can remove nodes. It is a warning and no error: where files come from a mount, its modes are not for
// the operator to choose.
func TestPeersFileThatEverybodyCanWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "peers")
	for _, tt := range []struct {
		text string
		mode os.FileMode
		want int // warnings
	}{{"a@h1:1\n", 0o666, 1}, {"a@h1:1\n", 0o644, 0}, {"a@h1:1\nb@h2:1\n", 0o602, 1}} {
		if err := errors.Join(os.WriteFile(path, []byte(tt.text), 0o600), os.Chmod(path, tt.mode)); err != nil {
			t.Fatal(err)
		}
		lines := new(logLines)
		first, _ := parsePeersFile("a@h1:1")
		l := newPeerList(&Config{PeersFile: path, Peers: first}, hclog.New(&hclog.LoggerOptions{Output: lines}))
		for second := range 10 {
			l.look(time.Unix(int64(second), 0))
		}
		if got := lines.count("[WARN]", "everybody can write PEERS_FILE", path); got != tt.want || l.bad.Load() {
			t.Errorf("mode %#o: got %d warnings, bad %v; want %d, and that the list counts", tt.mode, got, l.bad.Load(), tt.want)
		}
	}
}

func TestConfigFromAPeersFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "peers")
	if err := os.WriteFile(path, []byte("node1@h1:1 # first\nnode2@h2:2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	withState := filepath.Join(dir, "state")
	if err := os.Mkdir(withState, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(withState, dbName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		env   map[string]string
		error string // "" for none
		warns string
	}{
		{"in it", map[string]string{"NODE_ID": "node2", "PEERS_FILE": path}, "", ""},
		{"both", map[string]string{"NODE_ID": "node2", "PEERS_FILE": path, "PEERS": "node2@h2:2"}, "set one of them", ""},
		{"no such file", map[string]string{"NODE_ID": "node2", "PEERS_FILE": path + "x"}, "no such file", ""},
		{"a directory", map[string]string{"NODE_ID": "node2", "PEERS_FILE": dir}, "no regular file", ""},
		{"not in it, no state", map[string]string{"NODE_ID": "node3", "PEERS_FILE": path, "STATE_DIR": dir}, "is not in PEERS_FILE", ""},
		{"not in it, in memory", map[string]string{"NODE_ID": "node3", "PEERS_FILE": path, "STATE_DIR": withState, "KV_STORE": "memory"}, "is not in PEERS_FILE", ""},
		{"not in it, with state", map[string]string{"NODE_ID": "node3", "PEERS_FILE": path, "STATE_DIR": withState}, "", "to leave the cluster"},
		{"not in PEERS, with state", map[string]string{"NODE_ID": "node3", "PEERS": "node1@h1:1", "STATE_DIR": withState}, "is not in PEERS", ""},
	} {
		cfg, err := loadConfig(func(name string) string { return tt.env[name] }, system{hostIPv4: func() string { return "127.0.0.1" }})
		switch {
		case tt.error == "" && err != nil, tt.error != "" && (err == nil || !strings.Contains(err.Error(), tt.error)):
			t.Errorf("%s: got error %v; want %q", tt.name, err, tt.error)
		case err == nil && !strings.Contains(strings.Join(cfg.Warnings, ";"), tt.warns):
			t.Errorf("%s: got warnings %q; want %q", tt.name, cfg.Warnings, tt.warns)
		case err == nil && strings.Join(peerIDs(cfg.Peers), ",") != "node1,node2":
			t.Errorf("%s: got %v", tt.name, cfg.Peers)
		}
	}
}
