package test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"raftstarter/test/authority"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestProcessThatDoesNotServe(t *testing.T) {
	t.Parallel()
	type env = map[string]string
	running, nobody, file, link := startAll(newProc(t, nil))[0], newProc(t, nil), filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(t.TempDir(), link)); err != nil {
		t.Fatal(err)
	}
	owner := startAll(newProc(t, env{"NODE_ID": "owner"}))[0]
	owner.end(syscall.SIGTERM, exitOK)
	other := owner.env["STATE_DIR"]
	host, port, raftPort, dir := running.env["HTTP_ADDR"], running.env["HTTP_PORT"], running.env["RAFT_PORT"], running.env["STATE_DIR"]
	help := `(?s)--help.*--version.*--healthcheck.*NODE_ID.*STATE_DIR.*SHUTDOWN_TIMEOUT.*8s.*TLS_CA_FILE`
	for _, tc := range []struct {
		name, args  string
		env         env
		code        int
		stdout, log string // patterns
	}{
		{"help", "--help", nil, 0, help, `^$`},
		{"help in short, with a bad configuration", "-h", env{"HTTP_PORT": "x"}, 0, help, `^$`},
		{"help with one dash", "-help", nil, 0, help, `^$`},
		{"version", "--version", nil, 0, `^v0\.0\.0-test\n$`, `^$`},
		{"an unknown flag", "--port=1", nil, 2, `^$`, `--port=1`},
		{"a word", "serve", nil, 2, `^$`, `serve`},
		{"one argument too many", "--version again", nil, 2, `^$`, `again`},
		{"a bad configuration", "", env{
			"HTTP_PORT": "tcp://10.0.0.1:80", "RAFT_PORT": "70000", "KV_STORE": "redis", "SHUTDOWN_TIMEOUT": "soon", "PEERS": "other@0.0.0.0:1",
		}, 2, `^$`, `(?s)KV_STORE="redis".*HTTP_PORT="tcp://10.0.0.1:80".*enableServiceLinks.*RAFT_PORT="70000".*PEERS.*0\.0\.0\.0.*SHUTDOWN_TIMEOUT="soon"`},
		{"a health check of nobody", "--healthcheck", nobody.env, 1, `^$`, nobody.env["HTTP_PORT"]},
		{"a health check of a live node", "--healthcheck", running.env, 0, ``, `^$`},
		{"the http port is in use", "", env{"HTTP_ADDR": host, "HTTP_PORT": port}, 1, ``, `HTTP_PORT.*` + port},
		{"the raft port is in use", "", env{"RAFT_ADDR": host, "RAFT_PORT": raftPort}, 1, ``, `RAFT_PORT.*` + raftPort},
		{"the directory is a file", "", env{"STATE_DIR": file}, 1, ``, `STATE_DIR.*` + file},
		{"the directory is below a file", "", env{"STATE_DIR": file + "/state"}, 1, ``, `STATE_DIR.*` + file},
		{"the directory is a link", "", env{"STATE_DIR": link}, 1, ``, `STATE_DIR.*` + link + `.*symbolic link`},
		{"the directory is another node's", "", env{"NODE_ID": "stranger", "STATE_DIR": other}, 1, ``, `STATE_DIR.*` + other + `.*"owner".*"stranger"`},
		{"the database is locked", "", env{"STATE_DIR": dir}, 1, ``, dir + `.*(?i:lock).*STATE_DIR`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newProc(t, tc.env)
			p.start(strings.Fields(tc.args)...)
			p.exits(tc.code, 5*time.Second)
			p.logs(tc.log)
			if got := p.stdout.String(); !regexp.MustCompile(tc.stdout).MatchString(got) {
				t.Errorf("got %q on stdout; want %s", got, tc.stdout)
			}
			if _, err := os.Stat(p.env["STATE_DIR"]); tc.code == exitUsage && !os.IsNotExist(err) {
				t.Errorf("got %v for STATE_DIR; want that nothing was created", err)
			}
		})
	}
	running.put("k", "1") // none of this has harmed it
}

// hostIPv4 returns an address of this machine that is not loopback, if it has one.
func hostIPv4() string {
	addrs, _ := net.InterfaceAddrs()
	for _, addr := range addrs {
		if ip, ok := addr.(*net.IPNet); ok && ip.IP.To4() != nil && ip.IP.IsGlobalUnicast() {
			return ip.IP.String()
		}
	}
	return "127.0.0.1"
}

// The health check asks the node, whatever has become of the rest of its environment, and through no proxy.
func TestProcessHealthcheck(t *testing.T) {
	t.Parallel()
	for name, ca := range map[string]*authority.CA{"plain": nil, "tls": authority.New(t)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tokenFile := filepath.Join(dir, "tokens")
			if err := os.WriteFile(tokenFile, []byte("token\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			host := hostIPv4() // loopback would never be asked for through a proxy
			p := newProc(t, map[string]string{"HTTP_ADDR": host, "HTTP_TOKEN_FILE": tokenFile})
			if ca != nil {
				maps.Copy(p.env, ca.Node(host))
				p.tls = ca.Client(nil)
			}
			startAll(p)
			for _, file := range []string{tokenFile, p.env["TLS_CERT_FILE"], p.env["TLS_CA_FILE"]} {
				if file != "" {
					if err := os.WriteFile(file, nil, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			_ = os.Remove(p.env["TLS_KEY_FILE"])
			check := *p
			check.env = maps.Clone(p.env)
			maps.Copy(check.env, map[string]string{
				"PEERS": ";", "NODE_ID": "?", "RAFT_PORT": "x", "STATE_DIR": "~", "HTTP_PROXY": "http://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1",
			})
			check.start("--healthcheck")
			check.exits(exitOK, 5*time.Second)
			p.end(syscall.SIGTERM, exitOK)
			check.start("--healthcheck")
			check.exits(exitFailed, 5*time.Second)
		})
	}
}

func TestProcessAnswersWhileItOpens(t *testing.T) {
	t.Parallel()
	running := startAll(newProc(t, nil))[0]
	for _, tc := range []struct {
		path   string
		status int
	}{{"/readyz", http.StatusServiceUnavailable}, {"/status", http.StatusOK}, {"/key/k?consistency=stale", http.StatusServiceUnavailable}} {
		t.Run(tc.path, func(t *testing.T) {
			p := newProc(t, map[string]string{"STATE_DIR": running.env["STATE_DIR"]}) // locked for as long as it waits
			p.start()
			p.await(http.StatusOK, http.MethodGet, "/livez", "")
			p.expect(tc.status, http.MethodGet, tc.path, "")
		})
	}
}

func TestProcessDamagedDatabase(t *testing.T) {
	t.Parallel()
	garbage := func(b []byte) []byte {
		random := rand.New(rand.NewPCG(1, 2)) // the same garbage each time
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	original := startAll(newProc(t, nil))[0]
	for i := range 20 {
		original.put(fmt.Sprintf("k%d", i), strconv.Quote(strings.Repeat("x", 10_000)))
	}
	original.end(syscall.SIGTERM, exitOK)
	content, page := []byte(original.read(filepath.Join(original.env["STATE_DIR"], "raft.db"))), os.Getpagesize()
	for _, tc := range []struct {
		name   string
		damage func(b []byte) []byte
	}{
		{"all of it is garbage", garbage},
		{"all but the meta pages is garbage", func(b []byte) []byte { garbage(b[2*page:]); return b }},
		{"all but the meta pages is zero", func(b []byte) []byte { clear(b[2*page:]); return b }},
		{"it is cut in half", func(b []byte) []byte { return b[:len(b)/2/page*page] }},
		{"only the meta pages are left", func(b []byte) []byte { return b[:2*page] }},
		{"only a few bytes are left", func(b []byte) []byte { return b[:100] }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newProc(t, nil)
			path, damaged := filepath.Join(p.env["STATE_DIR"], "raft.db"), tc.damage(bytes.Clone(content))
			if err := errors.Join(os.Mkdir(p.env["STATE_DIR"], 0o700), os.WriteFile(path, damaged, 0o600)); err != nil {
				t.Fatal(err)
			}
			p.start()
			p.exits(exitFailed, 5*time.Second)
			p.logs(regexp.QuoteMeta(path))
			if strings.Contains(p.read(p.stderr), "goroutine ") {
				t.Error("it crashed; want an error in words")
			}
			if after := p.read(path); after != string(damaged) {
				t.Errorf("the file has changed, from %d to %d bytes; want it untouched", len(damaged), len(after))
			}
		})
	}
}

// GOMEMLIMIT is for memory that is there: what is only held against garbage collection is not part of it.
func TestProcessMemoryLimit(t *testing.T) {
	t.Parallel()
	const ballast = 100 << 20
	for limit, want := range map[string]float64{"384MiB": 384<<20 + ballast, "": math.MaxInt64} {
		p := newProc(t, map[string]string{"KV_STORE": storeMemory, "GOMEMLIMIT": limit})
		startAll(p)
		text := p.expect(http.StatusOK, http.MethodGet, "/metrics", "").body
		found := regexp.MustCompile(`(?m)^go_gc_gomemlimit_bytes (.*)$`).FindStringSubmatch(text)
		if got, err := strconv.ParseFloat(found[1], 64); err != nil || got != want {
			t.Errorf("GOMEMLIMIT=%s: got %v; want %v", limit, got, want)
		}
	}
}

// Without TLS and tokens a node that others can reach says once what is open.
func TestProcessSaysWhatIsOpen(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]int{ownHost(): 0, "0.0.0.0": 1} {
		p := newProc(t, map[string]string{"HTTP_ADDR": host, "RAFT_ADDR": host, "RAFT_ADVERTISE_ADDR": "127.0.0.1"})
		p.env["KV_STORE"] = storeMemory
		p.start()
		p.await(http.StatusOK, http.MethodGet, "/readyz", "")
		if got := strings.Count(p.read(p.stderr), "open ports: "); got != want {
			t.Errorf("listening on %s: got %d lines about open ports; want %d", host, got, want)
		}
	}
}

func TestProcessKeepsFilesPrivate(t *testing.T) {
	t.Parallel()
	p := newProc(t, map[string]string{"SNAPSHOT_THRESHOLD": "1", "SNAPSHOT_INTERVAL": "20ms"})
	p.within = []string{"sh", "-c", `umask 0; exec "$@"`, "sh"}
	startAll(p)
	p.put("k", "1")
	dir := p.env["STATE_DIR"]
	waitFor(t, "a snapshot", func() bool {
		found, err := filepath.Glob(filepath.Join(dir, snapshotsDir, "*[0-9]", stateName))
		return err == nil && len(found) > 0
	})
	p.end(syscall.SIGTERM, exitOK)
	made := make(map[string]bool)
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		want := fs.FileMode(0o600)
		if entry.IsDir() {
			want = 0o700 | fs.ModeDir
		}
		if err == nil && info.Mode() != want {
			t.Errorf("got mode %v for %s; want %v", info.Mode(), path, want)
		}
		made[entry.Name()] = true
		return err
	})
	for _, name := range []string{dbName, metaName, stateName} {
		if err != nil || !made[name] {
			t.Errorf("found %v, error %v; want %s among it", made, err, name)
		}
	}
}
