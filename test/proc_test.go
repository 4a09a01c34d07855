package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"maps"
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
	"testing"
	"time"
)

var (
	ownedPorts sync.Map // given to a process: no other gets them while it is down
	procsMade  atomic.Uint32
)

// lastPort is the port that freeAddr has given out last. It begins anywhere, for the sake of other runs on this machine.
var lastPort atomic.Uint32

func init() { lastPort.Store(uint32(os.Getpid())) }

// freeAddr returns a loopback address that nobody uses and that nobody gets by chance: the ports that the kernel gives to
// outgoing connections are higher.
func freeAddr(t testing.TB) string {
	t.Helper()
	const first, ports = 20000, 12000
	for range ports {
		addr := fmt.Sprintf("127.0.0.1:%d", first+lastPort.Add(1)%ports)
		if l, err := net.Listen("tcp", addr); err == nil {
			_ = l.Close()
			return addr
		}
	}
	t.Fatal("no port is free")
	return ""
}

// answerTo is what an HTTP request came to.
type answerTo struct {
	status int
	header http.Header
	body   string
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

// peakMemory returns the most that the process ever had in memory, in bytes. Only Linux tells it.
func (p *proc) peakMemory() int {
	p.t.Helper()
	return p.memory("VmHWM")
}

// memory returns a field of what Linux says of the process's memory, in bytes.
func (p *proc) memory(field string) int {
	p.t.Helper()
	found := regexp.MustCompile(field + `:\s+(\d+) kB`).FindStringSubmatch(p.read(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)))
	if found == nil {
		p.t.Fatalf("its %s is not known", field)
	}
	kib, _ := strconv.Atoi(found[1])
	return kib << 10
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
