package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// What the kernel says of each mounted file system is what inMemory says of it, and what the log says of a directory there.
func TestStateDirInMemory(t *testing.T) {
	t.Parallel()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	kinds := make(map[string]string) // by place: what is mounted over another hides it
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && !strings.Contains(f[1], `\`) {
			kinds[f[1]] = f[2]
		}
	}
	seen, dirs := make(map[bool]int), []string{t.TempDir()}
	for place, kind := range kinds {
		if _, err := os.Stat(place); err != nil {
			continue
		}
		got := inMemory(place)
		if want := kind == "tmpfs" || kind == "devtmpfs" || kind == "ramfs"; got != want {
			t.Errorf("got %v for %s, which is a %s", got, place, kind)
		}
		seen[got]++
		if kind != "tmpfs" || len(dirs) > 1 {
			continue
		}
		dir := filepath.Join(place, fmt.Sprintf("raftstarter-test-%d", os.Getpid()))
		if os.Mkdir(dir, 0o700) == nil { // else nobody can write there
			defer func() { _ = os.RemoveAll(dir) }()
			dirs = append(dirs, dir)
		}
	}
	if seen[true] == 0 || seen[false] == 0 || len(dirs) < 2 {
		t.Errorf("saw %d file systems in memory and %d others, made %q; want some of both, and a directory in memory", seen[true], seen[false], dirs)
	}
	for _, dir := range dirs {
		var log bytes.Buffer
		if err := openStateDir(dir, "node1", os.Geteuid(), hclog.New(&hclog.LoggerOptions{Output: &log})); err != nil {
			t.Error(err)
		}
		if warned := strings.Contains(log.String(), "[WARN]  STATE_DIR is in memory"); warned != inMemory(dir) {
			t.Errorf("got log %q for %s", log.String(), dir)
		}
	}
}
