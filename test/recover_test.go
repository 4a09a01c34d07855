package test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// recipe is docs/operations.md, where node1 and node2 have lost their state and node3 has not.
type recipe struct {
	t     *testing.T
	text  string
	dir   string           // where its commands run
	nodes map[string]*proc // by the port that the recipe gives them
}

func newRecipe(t *testing.T, nodes map[string]*proc) *recipe {
	t.Helper()
	text, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	return &recipe{t, string(text), t.TempDir(), nodes}
}

// run runs the command block that begins so, at the nodes of this test, and returns what it prints.
func (r *recipe) run(begin string) string {
	r.t.Helper()
	block := regexp.MustCompile("(?s)```sh\n *(" + regexp.QuoteMeta(begin) + ".*?)\n *```").FindStringSubmatch(r.text)
	if block == nil {
		r.t.Fatalf("docs/operations.md has no command that begins with %q", begin)
	}
	script := block[1]
	for port, p := range r.nodes {
		script = strings.ReplaceAll(script, "localhost:"+port, strings.TrimPrefix(p.url(), "http://"))
	}
	cmd := exec.CommandContext(r.t.Context(), "bash", "-c", script)
	cmd.Dir = r.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// What people are told to do when a majority has lost its state, with the commands that they are told to use: every
// write that was acknowledged is there again.
func TestProcessRecovery(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatal("the recipe needs curl")
	}
	for _, tt := range []struct {
		name, store string
		file        bool // PEERS_FILE
		gone        bool // the nodes without state start only after the recovery, elsewhere, under other names
		restarted   bool // the node that is left has restarted
	}{
		{"two directories are lost", storeBolt, false, false, true},
		{"two nodes in memory restart", storeMemory, false, false, false},
		{"two machines are gone", storeBolt, false, true, true},
		{"two machines are gone, in memory with a file", storeMemory, true, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nodes := newProcs(t, map[string]string{"KV_STORE": tt.store})
			peers := nodes[0].env["PEERS"]
			tell := func(peers string) {
				for _, p := range nodes {
					p.env["PEERS"] = peers
					if tt.file {
						delete(p.env, "PEERS")
						p.env["PEERS_FILE"] = filepath.Join(filepath.Dir(p.env["STATE_DIR"]), "peers")
						if err := os.WriteFile(p.env["PEERS_FILE"], []byte(peers), 0o600); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			tell(peers)
			startAll(nodes...)
			left, lost := pick(nodes, false)
			for i := range 100 {
				lost[i%2].put(fmt.Sprint("k", i), fmt.Sprint(i))
			}
			waitFor(t, left.name+" to have all of it", func() bool { // two of three are enough for a write
				answer, err := left.ask(http.MethodGet, "/key/k99?consistency=stale", "")
				return err == nil && answer.body == `{"k99":99}`
			})
			for _, p := range lost {
				p.signal(syscall.SIGKILL)
			}
			for _, p := range lost {
				p.exits(-1, stopLimit)
				if err := os.RemoveAll(p.env["STATE_DIR"]); err != nil {
					t.Fatal(err)
				}
			}
			if tt.restarted {
				left.end(syscall.SIGKILL, -1)
				left.start()
				left.await(http.StatusOK, http.MethodGet, "/livez", "")
			}
			ports := map[string]*proc{"11001": left, "11003": left}
			if !tt.gone {
				ports["11001"] = lost[0]
				for _, p := range lost {
					p.start()
					p.await(http.StatusOK, http.MethodGet, "/livez", "")
				}
			}

			r := newRecipe(t, ports)
			waitFor(t, "the advice", func() bool {
				advice := r.run("curl -s localhost:11001/readyz")
				return strings.Contains(advice, "Node "+left.name+" has the most complete log") &&
					strings.Contains(advice, "save its backup") && strings.Contains(advice, "Only if") == tt.gone
			})
			if out := r.run("curl -fsS --retry 15 -o backup 'localhost:11003/backup?consistency=stale'"); !strings.HasSuffix(out, "{}\n") { // after a line for each 503
				t.Fatalf("got %q for the last line of the backup; want {}", out)
			}
			started := nodes
			if tt.gone {
				started = []*proc{left}
				for i, p := range lost {
					name, address := fmt.Sprintf("node%d", 4+i), "@"+p.env["RAFT_ADDR"]+":"
					old := p.name + address + p.env["RAFT_PORT"]
					p.name, p.env["NODE_ID"], p.env["RAFT_PORT"] = name, name, ownPort(t)
					peers = strings.Replace(peers, old, name+address+p.env["RAFT_PORT"], 1)
				}
			}
			for _, p := range started {
				p.end(syscall.SIGTERM, exitOK)
				if tt.store == storeBolt {
					if err := os.Rename(p.env["STATE_DIR"], p.env["STATE_DIR"]+".lost"); err != nil {
						t.Fatal(err)
					}
				}
			}
			tell(peers)
			startAll(nodes...)
			for _, p := range nodes {
				p.has("k1", "null", "")
			}
			r.run("while IFS= read -r line")
			for i := range 100 {
				nodes[i%3].has(fmt.Sprint("k", i), fmt.Sprint(i), "")
			}
		})
	}
}
