package main

import (
	"go/format"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

const walkLimit = 100 // lines of the walk's two files together

// TestWalk follows "Make it your own" in README.md: the fsm.go and http.go given there must make another service of this
// one with no other file touched, and that service must do what the README shows.
func TestWalk(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, walk, _ := strings.Cut(string(readme), "\n## Make it your own\n")
	walk, _, _ = strings.Cut(walk, "\n## ")
	binary := buildWalk(t, walk)
	nodes := newProcs(t, map[string]string{"SNAPSHOT_THRESHOLD": "1", "SNAPSHOT_INTERVAL": "5ms", "TRAILING_LOGS": "0"})
	for _, p := range nodes {
		p.binary = binary
	}
	startAll(nodes...)
	curlWalk(t, walk, nodes)

	const path = "/counter/visits"
	have := func(want string, nodes ...*proc) {
		t.Helper()
		for _, p := range nodes {
			p.await(http.StatusOK, http.MethodGet, path, "")
			if got := p.expect(http.StatusOK, http.MethodGet, path, "").body; got != want {
				t.Errorf("got %s through %s; want %s", got, p.name, want)
			}
		}
	}
	add := func(p *proc, number, want string) {
		t.Helper()
		if got := p.expect(http.StatusOK, http.MethodPost, path, number).body; got != want {
			t.Errorf("got %s after adding %s through %s; want %s", got, number, p.name, want)
		}
	}
	have("42", nodes...)
	for _, body := range []string{"", "1.5", `"1"`, "null", "1 2"} {
		nodes[0].expect(http.StatusBadRequest, http.MethodPost, path, body)
	}
	nodes[1].expect(http.StatusConflict, http.MethodPost, path, "-43")
	nodes[0].expect(http.StatusMethodNotAllowed, http.MethodDelete, path, "")
	nodes[0].expect(http.StatusNotFound, http.MethodGet, "/key/visits", "")

	killed, others := pick(nodes, true)
	waitFor(t, "a snapshot with the counter", func() bool { // the killed node will begin with it
		files, _ := filepath.Glob(filepath.Join(killed.env["STATE_DIR"], "snapshots", "*[0-9]", "state.bin"))
		for _, file := range files {
			state, _ := os.ReadFile(file) // snapshots come and go
			if strings.Contains(string(state), `"visits":42`) {
				return true
			}
		}
		return false
	})
	killed.end(syscall.SIGKILL, -1)
	have("42", others...)
	add(others[0], "-40", "2")
	have("2", others...)
	startAll(killed)
	have("2", nodes...)
	add(killed, "5", "7")
	have("7", nodes...)

	for _, p := range nodes {
		p.expect(http.StatusOK, http.MethodGet, "/livez", "")
		p.expect(http.StatusOK, http.MethodGet, "/readyz", "")
		if leader := p.status().Leader; leader == "" {
			t.Errorf("/status of %s names no leader", p.name)
		}
		if a := p.expect(http.StatusOK, http.MethodGet, "/metrics", ""); !strings.Contains(a.body, `route="/counter/"`) {
			t.Errorf("/metrics of %s does not tell of /counter/", p.name)
		}
	}
	for _, p := range nodes {
		p.end(syscall.SIGTERM, exitOK)
	}
}

// buildWalk checks and builds the service that the walk makes of this one, and returns the path of its binary.
func buildWalk(t *testing.T, walk string) string {
	t.Helper()
	dir, lines := t.TempDir(), 0
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"fsm.go", "http.go"} {
		_, code, found := strings.Cut(walk, "\n`"+name+"`:\n\n```go\n")
		code, _, ended := strings.Cut(code, "```\n")
		if !found || !ended {
			t.Fatalf("README.md: got no block of code below a line that names %s; want one", name)
		}
		formatted, err := format.Source([]byte(code))
		if err != nil {
			t.Fatalf("README.md: %s: %v", name, err)
		}
		if string(formatted) != code {
			t.Errorf("README.md: %s is not as gofmt would have it", name)
		}
		lines += strings.Count(code, "\n")
		write(name, []byte(code))
	}
	if lines > walkLimit {
		t.Errorf("README.md: got %d lines of fsm.go and http.go; want at most %d", lines, walkLimit)
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(files, "go.mod", "go.sum", "help.txt") {
		if strings.HasSuffix(name, "_test.go") || name == "fsm.go" || name == "http.go" || name == "txn.go" {
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(name, content)
	}
	for _, args := range [][]string{{"build", "-o", "walk", "."}, {"vet", "."}} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", args[0], err, out)
		}
	}
	return filepath.Join(dir, "walk")
}

// curlWalk does what the walk's curl commands do, and checks that they print what stands below them.
func curlWalk(t *testing.T, walk string, nodes []*proc) {
	t.Helper()
	shown := regexp.MustCompile("(?s)\n```sh\n(curl [^`]*)\n```\n\n```\n([^`]*)```\n").FindStringSubmatch(walk)
	if shown == nil {
		t.Fatal("README.md: got no block of curl commands with one of what they print; want both")
	}
	curl := regexp.MustCompile(`^curl (?:-d (\S+) )?localhost:1100([123])(\S+); echo$`)
	var printed strings.Builder
	for line := range strings.Lines(shown[1]) {
		parts := curl.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if parts == nil {
			t.Fatalf("README.md: got %q; want only curl commands that this test understands", line)
		}
		method := http.MethodPost
		if parts[1] == "" {
			method = http.MethodGet
		}
		a, err := nodes[parts[2][0]-'1'].ask(method, parts[3], parts[1])
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		printed.WriteString(a.body + "\n")
	}
	if got, want := printed.String(), shown[2]; got != want {
		t.Errorf("the commands in README.md print\n%s\nwant, as it says there,\n%s", got, want)
	}
}
