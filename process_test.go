package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// These tests run the service as its users do: the built binary, real processes, signals and files.

const (
	slack     = 500 * time.Millisecond // what a busy machine takes to notice that a process has ended
	stopLimit = 8*time.Second + slack  // SHUTDOWN_TIMEOUT unless set
)

var (
	buildDir   string   // TestMain makes and removes it
	ownedPorts sync.Map // given to a process: no other gets them while it is down
	procsMade  atomic.Uint32

	// builtBinary builds the service, once in a run of the tests.
	builtBinary = sync.OnceValues(func() (string, error) {
		path := filepath.Join(buildDir, "raftstarter")
		build := exec.CommandContext(context.Background(), "go", "build", "-ldflags", "-X main.version=v0.0.0-test", "-o", path, ".")
		if out, err := build.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%w: %s", err, out)
		}
		return path, nil
	})
)

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "raftstarter-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue { // tests mostly wait, for processes and timeouts
		_ = f.Value.Set("4")
	}
	code := m.Run()
	_ = os.RemoveAll(buildDir)
	os.Exit(code)
}

// proc is a node that runs as a process of its own, when it runs.
type proc struct {
	t    *testing.T        // the test that made it; the process is gone when that ends
	env  map[string]string // all of its environment
	name string            // for people; NODE_ID if it has one

	binary string
	within []string                                                          // the command that runs the binary, if it is not run directly
	dial   func(ctx context.Context, network, addr string) (net.Conn, error) // how it is reached; nil for as usual
	tls    *tls.Config                                                       // for requests to it; nil for none
	token  string                                                            // in requests to it; "" for none
	pipe   *os.File                                                          // where its log goes; nil for a file

	// Of its newest run:
	cmd    *exec.Cmd
	began  time.Time
	stdout *bytes.Buffer // not to be read before it has ended
	stderr string        // the file where its log goes
	ended  chan struct{}
	client *http.Client
}

// newProc returns a node that is not started, with nothing in its environment but ports, a directory and env.
func newProc(t *testing.T, env map[string]string) *proc {
	t.Helper()
	binary, err := builtBinary() // before it has ports, which another might take in the meantime
	if err != nil {
		t.Fatalf("build: %v", err)
	}
	host := ownHost()
	p := &proc{t: t, binary: binary, name: "the node", env: map[string]string{
		"HTTP_ADDR": host, "HTTP_PORT": ownPort(t), "RAFT_ADDR": host, "RAFT_PORT": ownPort(t), "STATE_DIR": filepath.Join(t.TempDir(), "state"),
	}}
	maps.Copy(p.env, env)
	return p
}

// ownHost returns a loopback address for one process, where Linux has many: no other program uses the ports there while
// it is down.
func ownHost() string {
	if runtime.GOOS != "linux" {
		return "127.0.0.1"
	}
	return fmt.Sprintf("127.%d.%d.%d", 1+os.Getpid()/250%250, os.Getpid()%250, 1+procsMade.Add(1)%250)
}

func ownPort(t *testing.T) string {
	t.Helper()
	for {
		_, port, _ := net.SplitHostPort(freeAddr(t))
		if _, owned := ownedPorts.LoadOrStore(port, true); !owned {
			return port
		}
	}
}

// newProcs returns the three nodes of a cluster, not started.
func newProcs(t *testing.T, env map[string]string) []*proc {
	t.Helper()
	nodes, peers := make([]*proc, 3), make([]string, 3)
	for i := range nodes {
		nodes[i] = newProc(t, env)
		nodes[i].name = fmt.Sprintf("node%d", i+1)
		nodes[i].env["NODE_ID"], peers[i] = nodes[i].name, nodes[i].name+"@"+nodes[i].env["RAFT_ADDR"]+":"+nodes[i].env["RAFT_PORT"]
	}
	for _, p := range nodes {
		p.env["PEERS"] = strings.Join(peers, ",")
	}
	return nodes
}

// startAll starts nodes, waits until they are ready and returns them.
func startAll(nodes ...*proc) []*proc {
	for _, p := range nodes {
		p.start()
	}
	for _, p := range nodes {
		p.await(http.StatusOK, http.MethodGet, "/readyz", "")
	}
	return nodes
}

// start runs the binary. When the test ends it is killed and, if the test failed, its log is shown.
func (p *proc) start(args ...string) {
	p.t.Helper()
	stderr, err := os.Create(filepath.Join(p.t.TempDir(), "stderr"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer stderr.Close()
	argv := slices.Concat(p.within, []string{p.binary}, args)
	cmd, ended := exec.CommandContext(p.t.Context(), argv[0], argv[1:]...), make(chan struct{})
	p.cmd, p.ended, p.stderr, p.stdout, p.began = cmd, ended, stderr.Name(), new(bytes.Buffer), time.Now()
	p.client = &http.Client{Timeout: 15*time.Second + slack, Transport: &http.Transport{MaxIdleConnsPerHost: 8, DialContext: p.dial, TLSClientConfig: p.tls}}
	cmd.Stdout, cmd.Stderr, cmd.Env = p.stdout, stderr, []string{} // nil would be the environment of this process
	for name, value := range p.env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	if p.pipe != nil {
		cmd.Stderr = p.pipe
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	p.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		if <-ended; p.t.Failed() {
			p.t.Logf("%s %q, pid %d, %v:\n%s", p.name, args, cmd.Process.Pid, cmd.ProcessState, p.read(stderr.Name()))
		}
	})
}

func (p *proc) read(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(content)
}

// logs checks what the process has written to stderr so far.
func (p *proc) logs(pattern string) {
	p.t.Helper()
	if !regexp.MustCompile(pattern).MatchString(p.read(p.stderr)) {
		p.t.Errorf("the log of %s does not say %s", p.name, pattern)
	}
}

func (p *proc) signal(sig os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("signal %s: %v", p.name, err)
	}
}

// exits waits until the process has ended, no longer than limit, and checks its exit code.
func (p *proc) exits(code int, limit time.Duration) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(limit):
		p.t.Fatalf("%s has not ended after %v", p.name, limit)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("got exit code %d (%v) of %s; want %d", got, p.cmd.ProcessState, p.name, code)
	}
}

// end sends a signal that ends the process with that exit code.
func (p *proc) end(sig os.Signal, code int) {
	p.t.Helper()
	p.signal(sig)
	p.exits(code, stopLimit)
}

func (p *proc) url() string {
	scheme := "http://"
	if p.tls != nil {
		scheme = "https://"
	}
	return scheme + p.env["HTTP_ADDR"] + ":" + p.env["HTTP_PORT"]
}

// ask makes an HTTP request. It may be called from any goroutine.
func (p *proc) ask(method, path, body string) (answerTo, error) {
	req, err := http.NewRequestWithContext(p.t.Context(), method, p.url()+path, strings.NewReader(body))
	if err != nil {
		return answerTo{}, err
	}
	if p.token != "" {
		req.Header.Set("Authorization", "Bearer "+p.token)
	}
	response, err := p.client.Do(req)
	if err != nil {
		return answerTo{}, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	return answerTo{response.StatusCode, response.Header, string(data)}, err
}

// expect makes a request that must be answered with that status.
func (p *proc) expect(status int, method, path, body string) answerTo {
	p.t.Helper()
	a, err := p.ask(method, path, body)
	if err != nil || a.status != status {
		p.t.Fatalf("%s %s through %s: got %v, %v; want %d", method, path, p.name, a, err, status)
	}
	return a
}

// await waits until a request is answered with that status.
func (p *proc) await(status int, method, path, body string) {
	p.t.Helper()
	waitFor(p.t, fmt.Sprintf("%d for %s %s through %s", status, method, path, p.name), func() bool {
		a, _ := p.ask(method, path, body)
		return a.status == status
	})
}

// awaitStopping waits until the node has begun to stop, or has ended.
func (p *proc) awaitStopping() {
	waitFor(p.t, p.name+" to be stopping", func() bool {
		a, _ := p.ask(http.MethodGet, "/readyz", "")
		return a.status != http.StatusOK
	})
}

func (p *proc) put(key, value string) answerTo {
	p.t.Helper()
	return p.expect(http.StatusOK, http.MethodPut, "/key/"+key, value)
}

// has checks what a read of key gives: a linearizable one, unless query says otherwise.
func (p *proc) has(key, value, query string) answerTo {
	p.t.Helper()
	a, want := p.expect(http.StatusOK, http.MethodGet, "/key/"+key+query, ""), `{"`+key+`":`+value+`}`
	if a.body != want {
		p.t.Errorf("got %s through %s%s; want %s", a.body, p.name, query, want)
	}
	return a
}

// procStatus is what these tests read of /status.
type procStatus struct {
	Leader     string
	ClusterID  string `json:"cluster_id"`
	PeersDrift bool   `json:"peers_drift"`
	Peers      []struct{ ID, Address string }
}

func (p *proc) status() (s procStatus) {
	p.t.Helper()
	a := p.expect(http.StatusOK, http.MethodGet, "/status", "")
	if err := json.Unmarshal([]byte(a.body), &s); err != nil {
		p.t.Fatalf("/status: %v in %s", err, a.body)
	}
	return s
}

// pick waits until the nodes agree on a leader, and returns the leader or else a follower, and the other nodes.
func pick(nodes []*proc, leads bool) (picked *proc, others []*proc) {
	waitFor(nodes[0].t, "all nodes to name one leader", func() bool {
		leader := nodes[0].status().Leader
		i := slices.IndexFunc(nodes, func(p *proc) bool { return (p.name == leader) == leads })
		if i >= 0 {
			picked, others = nodes[i], slices.Delete(slices.Clone(nodes), i, i+1)
		}
		return leader != "" && !slices.ContainsFunc(nodes, func(p *proc) bool { return p.status().Leader != leader })
	})
	return picked, others
}

// outcomeOf checks that a write was refused as the contract has it, and returns its outcome.
func outcomeOf(t *testing.T, a answerTo) string {
	t.Helper()
	var problem struct{ Outcome string }
	err := json.Unmarshal([]byte(a.body), &problem)
	want := map[int]string{http.StatusServiceUnavailable: "not-applied", http.StatusGatewayTimeout: "unknown"}[a.status]
	if err != nil || want == "" || problem.Outcome != want || a.header.Get("Content-Type") != "application/problem+json" ||
		a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == "" {
		t.Errorf("a write was refused with %v; want 503 not-applied with Retry-After, or 504 unknown", a)
	}
	return problem.Outcome
}

// procLoad writes through nodes until end, every value under a key of its own.
type procLoad struct {
	end    func()
	mu     sync.Mutex // guards writes until end
	writes []loadWrite
}

type loadWrite struct {
	through    *proc
	key, value string
	answer     answerTo // none, when the node is dead
	at         time.Time
}

func startLoad(name string, nodes ...*proc) *procLoad {
	l := &procLoad{}
	ctx, cancel := context.WithCancel(nodes[0].t.Context())
	var wg sync.WaitGroup
	for i := range 2 * len(nodes) {
		wg.Go(func() {
			var err error
			for j := 0; ctx.Err() == nil && err == nil; j++ {
				w := loadWrite{through: nodes[i/2], key: fmt.Sprintf("%s-%d-%d", name, i, j), value: strconv.Itoa(j)}
				w.answer, err = w.through.ask(http.MethodPut, "/key/"+w.key, w.value)
				w.at = time.Now()
				l.mu.Lock()
				l.writes = append(l.writes, w)
				l.mu.Unlock()
			}
		})
	}
	l.end = sync.OnceFunc(func() { cancel(); wg.Wait() })
	nodes[0].t.Cleanup(l.end)
	return l
}

// flow waits for some more writes to be answered.
func (l *procLoad) flow(t *testing.T) {
	t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.writes)
	}
	before := count()
	waitFor(t, "writes to go on", func() bool { return count() > before+200 })
}

// check ends the load and checks that what was acknowledged is there, and what was not applied is not. It returns how
// many writes got no answer.
func (l *procLoad) check(t *testing.T, nodes []*proc) int {
	t.Helper()
	l.end()
	outcomes := make(map[string]int)
	for i, w := range l.writes {
		outcome := "no answer"
		if reader := nodes[i%len(nodes)]; w.answer.status == http.StatusOK {
			outcome = "acknowledged"
			reader.has(w.key, w.value, "")
		} else if w.answer.status != 0 {
			if outcome = outcomeOf(t, w.answer); outcome == "not-applied" {
				reader.has(w.key, "null", "")
			}
		}
		outcomes[outcome]++
	}
	t.Logf("writes: %v", outcomes)
	return outcomes["no answer"]
}

// gap ends the load and returns the longest time after since in which no write was acknowledged through p.
func (l *procLoad) gap(p *proc, since time.Time) (longest time.Duration) {
	l.end()
	for _, w := range append(l.writes, loadWrite{through: p, answer: answerTo{status: http.StatusOK}, at: time.Now()}) {
		if w.through == p && w.answer.status == http.StatusOK && w.at.After(since) {
			longest, since = max(longest, w.at.Sub(since)), w.at
		}
	}
	return longest
}

// beginPut sends half the body of a PUT of "ab", once the node asks for it. What it returns sends the rest and returns
// the status of the answer.
func beginPut(p *proc, key string) (finish func() int) {
	body, writer := io.Pipe()
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodPut, p.url()+"/key/"+key, body)
	if err != nil {
		p.t.Fatal(err)
	}
	req.ContentLength = 4
	req.Header.Set("Expect", "100-continue")
	status := make(chan int, 1)
	go func() {
		response, err := (&http.Transport{ExpectContinueTimeout: time.Minute}).RoundTrip(req)
		if err != nil {
			response = &http.Response{Body: http.NoBody}
		}
		_ = response.Body.Close()
		_ = body.Close() // nobody reads it any more
		status <- response.StatusCode
	}()
	if _, err := io.WriteString(writer, `"a`); err != nil {
		p.t.Fatalf("the body of a PUT was not read: %v", err)
	}
	return func() int {
		_, _ = io.WriteString(writer, `b"`) // if it fails there is no answer
		return <-status
	}
}

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

// The health check asks the node, whatever has become of the rest of its environment, and through no proxy.
func TestProcessHealthcheck(t *testing.T) {
	t.Parallel()
	for name, ca := range map[string]*testCA{"plain": nil, "tls": newTestCA(t)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tokenFile := filepath.Join(dir, "tokens")
			if err := os.WriteFile(tokenFile, []byte("token\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			host := thisSystem().hostIPv4() // loopback would never be asked for through a proxy
			p := newProc(t, map[string]string{"HTTP_ADDR": host, "HTTP_TOKEN_FILE": tokenFile})
			if ca != nil {
				maps.Copy(p.env, ca.node(host))
				p.tls = ca.client(nil)
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

// A signal ends the process also while it waits for what may never come: files on a mount that is dead, say.
func TestSignalWhileTheNodeStarts(t *testing.T) {
	sig := signals{stop: make(chan os.Signal, 1), reload: make(chan os.Signal)}
	asked, hang := make(chan struct{}), make(chan struct{})
	defer close(hang)
	code := make(chan int)
	go func() {
		code <- run(nil, func(name string) string {
			if name == "TLS_CA_FILE" {
				close(asked)
				<-hang
			}
			return ""
		}, sig, io.Discard, io.Discard)
	}()
	<-asked
	sig.stop <- syscall.SIGTERM
	select {
	case got := <-code:
		if got != exitOK {
			t.Errorf("got exit code %d; want %d", got, exitOK)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the process goes on")
	}
}

// A node that waits for its database is asked already: by load balancers, if by nobody else.
func TestProcessStopsWhileItOpens(t *testing.T) {
	t.Parallel()
	running := startAll(newProc(t, nil))[0]
	p := newProc(t, map[string]string{"STATE_DIR": running.env["STATE_DIR"]}) // locked for as long as it waits
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/livez", "")
	p.end(syscall.SIGTERM, 0)
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

func TestProcessKilledNodes(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			nodes := startAll(newProcs(t, map[string]string{"KV_STORE": store})...)
			for i, p := range nodes {
				p.put("k", strconv.Itoa(i))
				for _, reader := range nodes {
					reader.has("k", strconv.Itoa(i), "")
				}
			}
			for _, leads := range []bool{true, false} {
				victim, others := pick(nodes, leads)
				victim.end(syscall.SIGKILL, -1)
				began := time.Now()
				for i, p := range others {
					key := fmt.Sprintf("%v%d", leads, i)
					p.await(http.StatusOK, http.MethodPut, "/key/"+key, "1")
					for _, reader := range others {
						reader.has(key, "1", "")
					}
				}
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("the others took %v to go on; want at most 10s", took)
				}
				startAll(victim)
				for i := range others { // it says that it has caught up
					victim.has(fmt.Sprintf("%v%d", leads, i), "1", "?consistency=stale")
				}
				victim.has("k", "2", "")
				victim.put("back", "2")
				others[0].has("back", "2", "")
			}
		})
	}
}

func TestProcessNoQuorum(t *testing.T) {
	t.Parallel()
	for name, led := range map[string]bool{"the last node led": true, "the last node followed": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nodes := startAll(newProcs(t, nil)...)
			last, dead := pick(nodes, led)
			last.put("old", "1")
			last.has("old", "1", "")
			for _, p := range dead {
				p.end(syscall.SIGKILL, -1)
			}
			began := time.Now()
			var wg sync.WaitGroup
			var write, read answerTo
			wg.Go(func() { write, _ = last.ask(http.MethodPut, "/key/new", "2") })
			wg.Go(func() { read, _ = last.ask(http.MethodGet, "/key/old", "") })
			if a := last.has("old", "1", "?consistency=stale"); a.header.Get("Raft-Stale") != "" {
				t.Errorf("got %v; want no Raft-Stale from a node that had a leader", a)
			}
			last.await(http.StatusServiceUnavailable, http.MethodGet, "/readyz", "")
			last.expect(http.StatusOK, http.MethodGet, "/livez", "")
			wg.Wait()
			if took := time.Since(began); took > 15*time.Second {
				t.Errorf("the answers took %v; want at most 15s", took)
			}
			if read.status != http.StatusServiceUnavailable || read.header.Get("Retry-After") == "" {
				t.Errorf("got %v for a linearizable read; want 503 with Retry-After", read)
			}
			outcome := outcomeOf(t, write)
			outcomeOf(t, last.expect(http.StatusServiceUnavailable, http.MethodPut, "/key/later", "3")) // by now it knows of no leader
			last.has("old", "1", "?consistency=stale")
			startAll(dead...)
			last.await(http.StatusOK, http.MethodGet, "/readyz", "")
			last.has("later", "null", "")
			if outcome == "not-applied" {
				last.has("new", "null", "")
			}
		})
	}
}

func TestProcessForming(t *testing.T) {
	t.Parallel()
	nodes := newProcs(t, nil)
	for _, p := range nodes[:2] {
		p.start()
		p.await(http.StatusOK, http.MethodGet, "/livez", "")
	}
	began, reasons := time.Now(), make([]string, 2)
	waitFor(t, "three seconds to pass", func() bool {
		for i, p := range nodes[:2] {
			if s := p.status(); s.ClusterID != "" || s.Leader != "" {
				t.Fatalf("got %+v while one of three is missing; want no cluster", s)
			}
			reasons[i] = p.expect(http.StatusServiceUnavailable, http.MethodGet, "/readyz", "").body
		}
		return time.Since(began) > 3*time.Second
	})
	for i, p := range nodes[:2] {
		missing := "node3 at " + nodes[2].env["RAFT_ADDR"] + ":" + nodes[2].env["RAFT_PORT"] + ": connection refused"
		if !strings.Contains(reasons[i], missing) {
			t.Errorf("got %s from /readyz; want %s", reasons[i], missing)
		}
		p.logs(`\[INFO\].*waiting.*` + regexp.QuoteMeta(missing))
	}
	nodes[0].signal(syscall.SIGTERM)
	nodes[0].exits(exitOK, 2*time.Second)
	nodes[0].start()
	nodes[0].await(http.StatusOK, http.MethodGet, "/livez", "")
	nodes[2].start()
	nodes[2].await(http.StatusOK, http.MethodPut, "/key/k", "1")
	if took := time.Since(nodes[2].began); took > 3*time.Second {
		t.Errorf("forming took %v once all were there; want it at once", took)
	}
	ids := make(map[string]bool)
	for _, p := range nodes {
		p.await(http.StatusOK, http.MethodGet, "/readyz", "")
		p.has("k", "1", "")
		ids[p.status().ClusterID] = true
	}
	if len(ids) != 1 || ids[""] {
		t.Errorf("got cluster ids %v; want one", ids)
	}
}

func TestProcessPeersDrift(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	p, agreed := nodes[2], nodes[2].env["PEERS"]
	for _, drift := range []bool{true, false} {
		p.end(syscall.SIGTERM, exitOK)
		p.env["PEERS"] = agreed
		if drift {
			p.env["PEERS"] += ",node4@127.0.0.1:" + ownPort(t)
		}
		startAll(p)
		p.put("k", "1")
		nodes[0].has("k", "1", "")
		if drift {
			p.logs(`\[WARN\].*PEERS`)
		}
		for _, node := range nodes {
			s := node.status()
			if want := drift && node == p; s.PeersDrift != want {
				t.Errorf("got peers_drift %v on %s; want %v", s.PeersDrift, node.name, want)
			}
			if len(s.Peers) != 3 {
				t.Errorf("got members %v on %s; want what it was", s.Peers, node.name)
			}
		}
	}
}

func TestProcessAddressChange(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	moved := nodes[1]
	moved.end(syscall.SIGTERM, exitOK)
	was, port := moved.env["RAFT_ADDR"]+":"+moved.env["RAFT_PORT"], ownPort(t)
	is := moved.env["RAFT_ADDR"] + ":" + port
	moved.env["RAFT_PORT"], moved.env["PEERS"] = port, strings.Replace(moved.env["PEERS"], was, is, 1)
	for _, p := range []*proc{nodes[0], nodes[2]} {
		p.end(syscall.SIGTERM, exitOK)
		p.env["PEERS"] = moved.env["PEERS"]
		startAll(p)
	}
	nodes[0].put("k", "1")
	startAll(moved)
	for _, p := range nodes {
		p.has("k", "1", "")
		s := p.status()
		if s.PeersDrift || len(s.Peers) != 3 || s.Peers[1].Address != is {
			t.Errorf("got %+v; want no drift, and the new address of node2", s)
		}
	}
}

func TestProcessStopUnderLoad(t *testing.T) {
	t.Parallel()
	signals := []os.Signal{syscall.SIGTERM, syscall.SIGINT}
	for i, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			nodes := startAll(newProcs(t, map[string]string{"KV_STORE": store})...)
			for j, role := range []string{"leader", "follower"} {
				stopped, others := pick(nodes, role == "leader")
				finishPut := beginPut(stopped, role)
				l := startLoad("load-"+role, others...)
				l.flow(t)
				began := time.Now()
				stopped.signal(signals[(i+j)%2])
				stopped.awaitStopping()
				if got := finishPut(); got != http.StatusOK {
					t.Errorf("got %d for a request under way in the %s; want 200", got, role)
				}
				stopped.exits(exitOK, stopLimit-time.Since(began))
				l.flow(t)
				for _, p := range others {
					if gap := l.gap(p, began); gap > 2*time.Second {
						t.Errorf("no write went through %s for %v after the %s was told to stop; want at most 2s", p.name, gap, role)
					}
				}
				startAll(stopped)
				if n := l.check(t, nodes); n > 0 {
					t.Errorf("%d writes got no answer; want one for each", n)
				}
				stopped.has(role, `"ab"`, "")
			}
		})
	}
}

func TestProcessAllEnd(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGINT} {
		l := startLoad(sig.String(), nodes...)
		l.flow(t)
		began := time.Now()
		for _, p := range nodes { // all at the same time
			p.signal(sig)
		}
		for _, p := range nodes {
			p.exits(map[bool]int{true: -1}[sig == syscall.SIGKILL], stopLimit-time.Since(began))
		}
		l.end()
		startAll(nodes...)
		l.check(t, nodes)
	}
	for _, leads := range []bool{true, false} { // one after the other: the last has no quorum
		last, others := pick(nodes, leads)
		last.put("k", "1")
		for _, p := range append(others, last) {
			p.end(syscall.SIGTERM, exitOK)
		}
		startAll(nodes...)[2].has("k", "1", "")
	}
}

func TestProcessSingleNodeEnds(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, timeout string
		signals       []os.Signal
		gap           time.Duration // between them
		slow          string        // what comes of a request under way: "ab" when it is brought to its end
		code          int
		limit         time.Duration
	}{
		{"by sigterm", "8s", []os.Signal{syscall.SIGTERM}, 0, `"ab"`, exitOK, 2 * time.Second},
		{"by sigint", "8s", []os.Signal{syscall.SIGINT}, 0, `"ab"`, exitOK, 2 * time.Second},
		{"by kill -9", "8s", []os.Signal{syscall.SIGKILL}, 0, "null", -1, slack},
		{"in time, while a request hangs", "1s", []os.Signal{syscall.SIGTERM}, 0, "null", exitOK, time.Second + slack},
		{"by a second signal", "1m", []os.Signal{syscall.SIGTERM, syscall.SIGTERM}, 2 * sameSignal, "null", exitFailed, slack},
		{"by a second signal of another kind", "1m", []os.Signal{syscall.SIGINT, syscall.SIGTERM}, 2 * sameSignal, "null", exitFailed, slack},
		{"by one signal that comes twice", "8s", []os.Signal{syscall.SIGINT, syscall.SIGTERM}, 20 * time.Millisecond, `"ab"`, exitOK, 2 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := startAll(newProc(t, map[string]string{"SHUTDOWN_TIMEOUT": tc.timeout}))[0]
			p.signal(syscall.SIGHUP)
			waitFor(t, "the log to tell of SIGHUP", func() bool { return regexp.MustCompile(`(?i)reload|sighup`).MatchString(p.read(p.stderr)) })
			p.put("k", `{"n":1.0}`)
			finishPut := beginPut(p, "slow")
			var began time.Time
			for i, sig := range tc.signals {
				if i > 0 {
					time.Sleep(tc.gap)
				}
				began = time.Now()
				p.signal(sig)
			}
			p.awaitStopping()
			if tc.slow != "null" {
				if got := finishPut(); got != http.StatusOK {
					t.Errorf("got %d for a request under way; want 200", got)
				}
			}
			p.exits(tc.code, tc.limit-time.Since(began))
			startAll(p)
			p.has("k", `{"n":1.0}`, "")
			p.has("slow", tc.slow, "")
		})
	}
}

// GOMEMLIMIT is for memory that is there: what is only held against garbage collection is not part of it.
func TestProcessMemoryLimit(t *testing.T) {
	t.Parallel()
	for limit, want := range map[string]float64{"384MiB": 384<<20 + ballastBytes, "": math.MaxInt64} {
		p := newProc(t, map[string]string{"KV_STORE": storeMemory, "GOMEMLIMIT": limit})
		startAll(p)
		text := p.expect(http.StatusOK, http.MethodGet, "/metrics", "").body
		found := regexp.MustCompile(`(?m)^go_gc_gomemlimit_bytes (.*)$`).FindStringSubmatch(text)
		if got, err := strconv.ParseFloat(found[1], 64); err != nil || got != want {
			t.Errorf("GOMEMLIMIT=%s: got %v; want %v", limit, got, want)
		}
	}
}

func TestProcessPausedFollower(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, nil)...)
	paused, others := pick(nodes, false)
	paused.signal(syscall.SIGSTOP)
	began, n := time.Now(), 0
	waitFor(t, "three seconds of writes", func() bool {
		n++
		others[n%2].put("k", strconv.Itoa(n))
		return time.Since(began) > 3*time.Second
	})
	paused.signal(syscall.SIGCONT)
	paused.await(http.StatusOK, http.MethodGet, "/readyz", "")
	for _, p := range nodes {
		p.has("k", strconv.Itoa(n), "")
	}
	paused.put("k", "0")
	others[0].has("k", "0", "")
}

func TestProcessStaleSinceStart(t *testing.T) {
	t.Parallel()
	nodes := startAll(newProcs(t, map[string]string{"SNAPSHOT_THRESHOLD": "1", "SNAPSHOT_INTERVAL": "50ms"})...)
	p := nodes[0]
	index, err := strconv.Atoi(p.put("old", "1").header.Get("Raft-Index"))
	if err != nil {
		t.Fatalf("Raft-Index: %v", err)
	}
	waitFor(t, "a snapshot with the value", func() bool { // all that a node has before it hears of a leader
		files, _ := filepath.Glob(filepath.Join(p.env["STATE_DIR"], "snapshots", "*[0-9]", "meta.json"))
		return slices.ContainsFunc(files, func(file string) bool {
			var meta struct{ Index int }
			data, _ := os.ReadFile(file) // snapshots come and go
			return json.Unmarshal(data, &meta) == nil && meta.Index >= index
		})
	})
	for _, node := range nodes {
		node.end(syscall.SIGKILL, -1)
	}
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/livez", "")
	waitFor(t, "ten seconds to pass", func() bool {
		p.expect(http.StatusServiceUnavailable, http.MethodGet, "/key/old?consistency=stale", "")
		return time.Since(p.began) > 10*time.Second-slack
	})
	p.await(http.StatusOK, http.MethodGet, "/key/old?consistency=stale", "")
	if took := time.Since(p.began); took > 10*time.Second+slack {
		t.Errorf("got the first stale read %v after the start; want it after 10s", took)
	}
	if a := p.has("old", "1", "?consistency=stale"); a.header.Get("Raft-Stale") != "since-start" {
		t.Errorf("got %v; want Raft-Stale: since-start", a)
	}
	p.expect(http.StatusServiceUnavailable, http.MethodGet, "/readyz", "")
	nodes[1].start()
	p.await(http.StatusOK, http.MethodGet, "/readyz", "")
	if a := p.has("old", "1", "?consistency=stale"); a.header.Get("Raft-Stale") != "" {
		t.Errorf("got %v once there is a leader; want no Raft-Stale", a)
	}
}
