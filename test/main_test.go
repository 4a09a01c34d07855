// Package test runs the service as its users do: the built binary, real processes, signals, files and networks.
package test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Parts of what the service promises to whoever starts it.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2

	storeBolt   = "boltdb" // of KV_STORE
	storeMemory = "memory"

	dbName       = "raft.db" // in STATE_DIR
	snapshotsDir = "snapshots"
	metaName     = "meta.json" // in the directory of a snapshot
	stateName    = "state.bin"

	maxBodyBytes = 2 << 20          // the most that MAX_BODY_BYTES may say
	sameSignal   = time.Second      // so long after a signal another counts as the same
	diskHangs    = 5 * time.Second  // after which a node whose disk does not answer stops
	staleAfter   = 10 * time.Second // its start, a node without a leader answers stale reads

	slack     = 500 * time.Millisecond // what a busy machine takes to notice that a process has ended
	stopLimit = 8*time.Second + slack  // SHUTDOWN_TIMEOUT unless set
)

// binary is the service, which TestMain builds.
var binary string

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue { // tests mostly wait, for processes and timeouts
		_ = f.Value.Set("4")
	}
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "raftstarter-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary = filepath.Join(dir, "raftstarter")
	build := exec.CommandContext(context.Background(), "go", "build", "-ldflags", "-X main.version=v0.0.0-test", "-o", binary, "..")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v: %s", err, out)
		return 1
	}
	return m.Run()
}

// The go command keeps the result of a test until a file changes that the test has read. It does not know what go build has
// read for these tests, so this one reads that.
func TestSourcesAreRead(t *testing.T) {
	for _, pattern := range []string{"../*.go", "../*.txt", "../*.html", "../go.*", "../Procfile", "../.env"} {
		paths, err := filepath.Glob(pattern)
		if err != nil || len(paths) == 0 {
			t.Errorf("%s: got %v, %v; want files", pattern, paths, err)
		}
		for _, path := range paths {
			if _, err := os.ReadFile(path); err != nil {
				t.Error(err)
			}
		}
	}
}

// waitFor waits until condition holds, and fails the test if it does not within 15 s.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
