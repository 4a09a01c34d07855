// Package page tries the page in a real browser; see _scripts/page-test.sh.
package page

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// node is a process of the built binary.
type node struct {
	id, url string
	env     []string
	binary  string
	cmd     *exec.Cmd // nil while it is down
}

// newNodes builds the binary and starts n nodes of a cluster on free loopback ports. The test's end kills them.
func newNodes(t *testing.T, n int, env ...string) (nodes []*node) {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "raftstarter")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-X main.version=v1.0.0", "-o", binary, "../..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var peers []string
	for i := range n {
		id, web, raft := fmt.Sprintf("node%d", i+1), freePort(t), freePort(t)
		peers = append(peers, fmt.Sprintf("%s@127.0.0.1:%s", id, raft))
		nodes = append(nodes, &node{id: id, url: "http://127.0.0.1:" + web, binary: binary, env: append([]string{
			"NODE_ID=" + id, "STATE_DIR=" + filepath.Join(dir, id), "HTTP_ADDR=127.0.0.1", "HTTP_PORT=" + web,
			"RAFT_ADDR=127.0.0.1", "RAFT_PORT=" + raft, "LOG_LEVEL=error",
		}, env...)})
	}
	for _, nd := range nodes {
		nd.env = append(nd.env, "PEERS="+strings.Join(peers, ","))
		nd.start(t)
		t.Cleanup(nd.kill)
	}
	return nodes
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (n *node) start(t *testing.T) {
	t.Helper()
	n.cmd = exec.CommandContext(t.Context(), n.binary)
	n.cmd.Env, n.cmd.Stderr = n.env, os.Stderr
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (n *node) kill() {
	if n.cmd != nil {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
		n.cmd = nil
	}
}

// status is of /status what the tests need.
type status struct {
	ID     string
	Leader string
	Term   int
}

// led waits until the node is ready, and returns its status.
func (n *node) led(t *testing.T) (s status) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if code, _ := n.ask(t, http.MethodGet, "/readyz", ""); code == http.StatusOK {
			if _, body := n.ask(t, http.MethodGet, "/status", ""); json.Unmarshal(body, &s) == nil && s.Leader != "" {
				return s
			}
		}
	}
	t.Fatalf("%s was not ready within 20 s", n.id)
	return s
}

// ask makes a request and returns what came, 0 for nothing.
func (n *node) ask(t *testing.T, method, path, body string) (int, []byte) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, n.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, nil
	}
	defer response.Body.Close()
	answer, _ := io.ReadAll(response.Body)
	return response.StatusCode, answer
}

// card is the expression for the text of the card of a node.
func card(id string) string {
	return "[...document.querySelectorAll('#nodes li')].find(c => " +
		"c.querySelector('h3').textContent === " + quote(id) + ").innerText"
}

// current is the expression for whether the card of a node shows that it has executed all that is committed.
func current(id string) string {
	return card(id) + ".includes('Applied index\\n' + document.getElementById('commit').innerText + '\\n')"
}

const (
	headline = "document.getElementById('headline').innerText + ' / ' + document.getElementById('detail').innerText"
	events   = "document.getElementById('events').innerText"
)

func TestPageOfThreeNodes(t *testing.T) {
	nodes := newNodes(t, 3)
	byID := make(map[string]*node)
	for _, n := range nodes {
		byID[n.id] = n
	}
	first := nodes[0].led(t)
	viewer := nodes[0] // a follower, so that it outlives the leader
	if first.Leader == viewer.id {
		viewer = nodes[1]
	}
	viewer.led(t)
	keys := make(map[string]int)
	for i := range 1280 {
		keys[fmt.Sprintf("k%d", i)] = i
	}
	body, _ := json.Marshal(keys) // which always can be
	for range 30 {
		if code, _ := viewer.ask(t, http.MethodPost, "/key", string(body)); code != http.StatusOK {
			t.Fatalf("post: got %d; want 200", code)
		}
	}
	b := newBrowser(t)
	b.open(viewer.url + "/?a=query")

	b.until(headline, first.Leader+" leads, all 3 nodes answer / Reads and writes go on when 1 of them fails.")
	b.until(texts("header"), "as "+viewer.id+" sees it", "Updated ")
	b.until(texts(".facts"), fmt.Sprintf("Term\n%d\n", first.Term), "Voters that answer\n3 of 3",
		"Keys\n1,280", "Store\nboltdb", "Version\nv1.0.0")
	b.until(texts(".below .good"), "Ready |", "PEERS names the nodes that the cluster has")
	b.until(texts(".below"), "State\nfollower", "None so far.")
	for _, n := range nodes {
		b.until(current(n.id), "true")
		b.until(card(n.id), "Answers", "Behind\nnothing", "Address\n127.0.0.1:")
		if leads := strings.Contains(b.eval(card(n.id)), "leader"); leads != (n.id == first.Leader) {
			t.Errorf("card of %s: got %q, where %s leads", n.id, b.eval(card(n.id)), first.Leader)
		}
	}
	for _, scheme := range []string{"light", "dark"} {
		b.picture("all-"+scheme, 1200, scheme)
		b.picture("all-phone-"+scheme, 375, scheme)
	}

	byID[first.Leader].kill()
	b.until(events, first.Leader+" no longer answers", " leads now (term ")
	second := viewer.led(t)
	b.until(events, fmt.Sprintf("%s leads now (term %d)", second.Leader, second.Term))
	b.until(headline, second.Leader+" leads, 2 of 3 nodes answer / Reads and writes go on, and stop when one more fails.")
	for range 12 {
		viewer.ask(t, http.MethodPut, "/key/more", "1")
	}
	b.until(current(viewer.id), "true")
	b.until(card(viewer.id), "this node")
	b.until(card(first.Leader), "Does not answer", " when last seen", "at most ", " entries")
	b.until(card(second.Leader), "leader", "Answers", "nothing")
	b.picture("killed-light", 1200, "light")
	b.picture("killed-phone-dark", 375, "dark")

	for _, n := range nodes {
		if n != viewer {
			n.kill()
		}
	}
	b.until(headline, "There is no leader / 1 of 3 nodes answers, 2 are needed: no write")
	b.until(texts("#ready"), "Not ready: ")
	b.until(events, "There is no leader", viewer.id+" is not ready")
	b.picture("no-leader-light", 1200, "light")

	viewer.kill()
	b.until(headline, viewer.id+" does not answer / The page tries again every second. Below is what it said last.")
	b.picture("gone-light", 1200, "light")
	b.picture("gone-dark", 1200, "dark")
	for _, n := range nodes {
		n.start(t)
	}
	b.until(headline, "leads, all 3 nodes answer")
	b.until(events, viewer.id+" answers this page again", first.Leader+" answers again", viewer.id+" is ready")
	b.picture("again-light", 1200, "light")
	b.quiet()
}

func TestPageAsksForToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(file, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := newNodes(t, 1, "HTTP_TOKEN_FILE="+file)[0]
	for code := 0; code != http.StatusOK; code, _ = n.ask(t, http.MethodGet, "/readyz", "") {
		time.Sleep(50 * time.Millisecond)
	}
	b := newBrowser(t)
	b.open(n.url)
	b.until(headline, "This node asks for a token")
	b.until("document.activeElement.id", "token")
	b.until(texts("#cluster, #login"), "Token")
	if got := b.eval(texts("#refusal")); got != "" {
		t.Errorf("got %q before a token was given", got)
	}
	b.picture("token-light", 1200, "light")
	b.picture("token-phone-dark", 375, "dark")
	b.typeIn("#token", "wörd")
	b.click("#login button")
	b.until(texts("#refusal"), "A token has letters")
	b.eval("document.getElementById('token').value = ''")
	b.typeIn("#token", "wrong")
	b.click("#login button")
	b.until(texts("#refusal"), "That token is not good here.")
	b.typeIn("#token", "s3cret")
	b.click("#login button")
	b.until(headline, "node1 leads, alone")
	b.open(n.url)
	b.until(headline, "node1 leads, alone") // the tab has kept it
	b.until("sessionStorage.length + ' ' + localStorage.length + ' [' + document.cookie + ']'", "1 0 []")
	b.quiet()
}

// The page shows whatever a node says, as text.
func TestPageShowsText(t *testing.T) {
	n := newNodes(t, 1)[0]
	n.led(t)
	target, err := url.Parse(n.url)
	if err != nil {
		t.Fatal(err)
	}
	node := httputil.NewSingleHostReverseProxy(target)
	markup, long, longer := `<img src=x onerror=alert(1)>`, strings.Repeat("n", 64), strings.Repeat("a", 250)
	status := map[string]any{
		"id": markup, "state": markup, "leader": markup, "term": 7, "commit_index": 1234567, "last_contact_ms": 12,
		"kv_store": markup, "keys": 1, "version": markup, "cluster_id": markup, "peers_drift": true, "peers": []any{
			map[string]any{"id": markup, "address": markup, "voter": true, "reachable": true, "applied_index": 1234567},
			map[string]any{"id": long, "address": longer, "reachable": true, "applied_index": 1234566, "voter": false},
			map[string]any{"id": "away", "address": "away:1", "voter": true, "reachable": false, "applied_index": 0},
		},
	}
	web := httptest.NewServer(http.StripPrefix("/prefix", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/status":
			_ = json.NewEncoder(w).Encode(status)
		case "/readyz":
			w.WriteHeader(http.StatusServiceUnavailable)
			_ = json.NewEncoder(w).Encode(map[string]any{"detail": "not ready: " + markup})
		default:
			node.ServeHTTP(w, r)
		}
	})))
	t.Cleanup(web.Close)
	b := newBrowser(t)
	b.open(web.URL + "/prefix/")
	b.until(headline, markup+" leads, 2 of 3 nodes answer / No vote yet: nnn")
	b.until(texts("#ready"), "Not ready: "+markup)
	b.until(texts("#drift"), "PEERS of this node names other nodes")
	b.until(card(long), "no vote", "Behind\n1 entry")
	b.until(card("away"), "Does not answer", "Applied index\nunknown", "Behind\nunknown")
	if got := b.eval("document.querySelectorAll('img').length"); got != "0" {
		t.Errorf("got %s images; want none", got)
	}
	b.picture("text-light", 1200, "light")
	b.picture("text-phone-light", 375, "light")
	b.quiet()
}
