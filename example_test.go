package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const exampleDir = "_examples/counters"

// kvFiles are about the key-value service, and left out where another service takes its place. _scripts/new.sh has them, too.
var kvFiles = []string{
	"fsm.go", "http.go", "fsm_test.go", "http_test.go", "list_test.go", "json_test.go", "fuzz_http_test.go", "kv_test.go",
	"example_test.go", "txn.go", "txn_test.go", "backup.go", "backup_test.go", "follow_test.go", "lock_test.go",
}

// exampleNode is a process of the example.
type exampleNode struct {
	id, url string
	process *exec.Cmd
}

// The example makes another service with no other file than its fsm.go and http.go touched. Three nodes of it lose no
// increment that they have acknowledged when the leader is killed.
func TestExample(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it builds a binary")
	}
	binary := buildExample(t)
	nodes := startExample(t, binary, 3)
	acknowledged, unknown := 0, 0
	killed := ""
	for deadline := time.Now().Add(20 * time.Second); acknowledged < 300; {
		if time.Now().After(deadline) {
			t.Fatalf("got %d increments acknowledged in 20 s; want 300", acknowledged)
		}
		if acknowledged == 100 && killed == "" {
			killed = killLeader(t, nodes)
		}
		node := nodes[acknowledged%len(nodes)]
		if node.id == killed {
			node = nodes[(acknowledged+1)%len(nodes)]
		}
		status, body := node.ask(t, http.MethodPost, "/counter/visits", "1")
		switch {
		case status == http.StatusOK:
			acknowledged++
		case status == http.StatusServiceUnavailable && strings.Contains(body, `"outcome":"not-applied"`):
			time.Sleep(20 * time.Millisecond)
		case status == http.StatusGatewayTimeout:
			unknown++
		default:
			t.Fatalf("%s: got %d %s; want it counted, or refused, or its outcome unknown", node.id, status, body)
		}
	}
	for _, node := range nodes {
		if node.id == killed {
			continue
		}
		status, body := node.ask(t, http.MethodGet, "/counter/visits", "")
		got, err := strconv.Atoi(body)
		if status != http.StatusOK || err != nil || got < acknowledged || got > acknowledged+unknown {
			t.Errorf("%s: got %d %s; want %d to %d", node.id, status, body, acknowledged, acknowledged+unknown)
		}
	}
	if killed == "" {
		t.Error("no leader was killed")
	}
}

// buildExample puts the example's files in the place of this service's, vets the result with the engine's tests, and
// builds it.
func buildExample(t *testing.T) (binary string) {
	t.Helper()
	dir := t.TempDir()
	engine, err1 := filepath.Glob("*.go")
	shared, err2 := filepath.Glob("test/*/*.go") // which tests of the engine import
	example, err3 := filepath.Glob(exampleDir + "/*.go")
	if err := errors.Join(err1, err2, err3); err != nil || len(example) == 0 {
		t.Fatalf("got %d files of the example, error %v", len(example), err)
	}
	engine = slices.DeleteFunc(engine, func(name string) bool { return slices.Contains(kvFiles, name) })
	for _, path := range slices.Concat(engine, shared, example, []string{"help.txt", "page.html", "go.mod", "go.sum"}) {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		target := filepath.Join(dir, strings.TrimPrefix(path, exampleDir+"/"))
		if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(target, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	binary = filepath.Join(dir, "counters")
	for _, args := range [][]string{{"vet", "./..."}, {"build", "-o", binary, "."}} {
		command := exec.CommandContext(t.Context(), "go", args...)
		command.Dir = dir
		command.Env = append(os.Environ(), "GOWORK=off")
		if output, err := command.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", args[0], err, output)
		}
	}
	return binary
}

// startExample starts nodes of a cluster and waits until they are ready. They are killed when the test ends.
func startExample(t *testing.T, binary string, count int) (nodes []*exampleNode) {
	t.Helper()
	var peers []string
	for i := range count {
		nodes = append(nodes, &exampleNode{id: fmt.Sprintf("node%d", i+1)})
		peers = append(peers, nodes[i].id+"@"+freeAddr(t))
	}
	for i, node := range nodes {
		_, raftPort, _ := net.SplitHostPort(peers[i])
		httpAddr := freeAddr(t)
		_, httpPort, _ := net.SplitHostPort(httpAddr)
		node.url = "http://" + httpAddr
		node.process = exec.CommandContext(context.WithoutCancel(t.Context()), binary)
		node.process.Env = []string{
			"NODE_ID=" + node.id, "KV_STORE=memory", "PEERS=" + strings.Join(peers, ","),
			"HTTP_ADDR=127.0.0.1", "RAFT_ADDR=127.0.0.1", "HTTP_PORT=" + httpPort, "RAFT_PORT=" + raftPort,
		}
		log := new(bytes.Buffer)
		node.process.Stderr = log
		if err := node.process.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = node.process.Process.Kill()
			_ = node.process.Wait()
			if t.Failed() {
				t.Logf("%s:\n%s", node.id, log)
			}
		})
	}
	for _, node := range nodes {
		waitFor(t, node.id+" to be ready", func() bool {
			response, err := http.Get(node.url + "/readyz") //nolint:noctx // waitFor ends it
			if err == nil {
				_ = response.Body.Close()
			}
			return err == nil && response.StatusCode == http.StatusOK
		})
	}
	return nodes
}

// killLeader kills the leader, as kill -9 does, and returns its id.
func killLeader(t *testing.T, nodes []*exampleNode) string {
	t.Helper()
	_, body := nodes[0].ask(t, http.MethodGet, "/status", "")
	var status struct{ Leader string }
	if err := json.Unmarshal([]byte(body), &status); err != nil {
		t.Fatal(err)
	}
	for _, node := range nodes {
		if node.id == status.Leader {
			if err := node.process.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			return node.id
		}
	}
	t.Fatalf("got %s; want a leader", body)
	return ""
}

func (n *exampleNode) ask(t *testing.T, method, path, body string) (status int, answer string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, n.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(data)
}
