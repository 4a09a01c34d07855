package test

import (
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// olderCommit is a commit whose binary must get along with this one: the last before commands had more than one version.
const olderCommit = "e568d839ed87c317a9ee93d949bd6015037b49ce"

// buildOlder builds the binary of olderCommit. It needs the history of the repository, which a clone has.
func buildOlder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf("git -C .. archive %s | tar -x -C %q && cd %[2]q && go build -o raftstarter .", olderCommit, dir)
	out, err := exec.CommandContext(t.Context(), "bash", "-c", "set -o pipefail; "+script).CombinedOutput()
	if err != nil {
		t.Fatalf("build the binary of commit %s: %v: %s", olderCommit, err, out)
	}
	return filepath.Join(dir, "raftstarter")
}

// A rolling upgrade, and back, and again: nodes of both versions are a cluster, and nothing is lost. What only the newer
// version knows waits for the last node. After that, an older binary stops and says why.
func TestProcessUpgrade(t *testing.T) {
	t.Parallel()
	older, newer := buildOlder(t), binary
	nodes := newProcs(t, map[string]string{"SNAPSHOT_THRESHOLD": "20", "SNAPSHOT_INTERVAL": "100ms", "TRAILING_LOGS": "5"})
	for _, p := range nodes {
		p.binary = older
	}
	startAll(nodes...)
	written := 0
	write := func(p *proc) {
		t.Helper()
		for range 10 {
			written++
			p.put(fmt.Sprint("k", written), fmt.Sprint(written))
		}
	}
	move := func(to string) {
		t.Helper()
		for i, p := range nodes {
			write(p)
			p.end(syscall.SIGTERM, exitOK)
			p.binary = to
			p.start()
			p.await(http.StatusOK, http.MethodGet, "/readyz", "")
			if to == newer && i < len(nodes)-1 {
				a := p.expect(http.StatusServiceUnavailable, http.MethodPost, "/txn", `{"set":{"t":1}}`)
				if !strings.Contains(a.body, "not-applied") || !strings.Contains(a.body, "node") {
					t.Errorf("a transaction when %d of 3 are upgraded: got %s; want who is behind", i+1, a.body)
				}
			}
			for _, other := range nodes {
				write(other)
			}
		}
	}
	move(newer)
	move(older)
	move(newer)
	nodes[0].await(http.StatusOK, http.MethodPost, "/txn", `{"set":{"t":1}}`)
	for _, p := range nodes {
		for n := 1; n <= written; n++ {
			p.has(fmt.Sprint("k", n), fmt.Sprint(n), "")
		}
	}
	last := nodes[2]
	last.end(syscall.SIGTERM, exitOK)
	last.binary = older
	last.start()
	last.exits(exitFailed, stopLimit)
	last.logs(`version`)
	last.binary = newer
	last.start()
	last.await(http.StatusOK, http.MethodGet, "/readyz", "")
}
