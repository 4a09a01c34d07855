package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// holder is a run of _scripts/lock.sh.
type holder struct {
	cmd    *exec.Cmd
	output strings.Builder // not to be read before it has ended
	ended  chan struct{}
}

// lock runs a command of the shell under a lock, with a lease of two seconds, until the test ends.
func lock(t *testing.T, n *testNode, command string, env ...string) *holder {
	t.Helper()
	return lockFor(t, n, 2*time.Second, command, env...)
}

// lockFor is lock with another lease.
func lockFor(t *testing.T, n *testNode, lease time.Duration, command string, env ...string) *holder {
	t.Helper()
	h := &holder{ended: make(chan struct{})}
	h.cmd = exec.CommandContext(context.Background(), "_scripts/lock.sh", "job", fmt.Sprint(lease.Seconds()), "sh", "-c", command)
	h.cmd.Env = append(os.Environ(), append(env, "URL="+n.url)...)
	h.cmd.Stdout, h.cmd.Stderr = &h.output, &h.output
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // until the process has ended
		_ = h.cmd.Wait()
		close(h.ended)
	}()
	t.Cleanup(func() {
		_ = h.cmd.Process.Signal(syscall.SIGCONT)
		_ = h.cmd.Process.Signal(syscall.SIGTERM)
		<-h.ended
	})
	return h
}

// exits waits for the end of a run, and checks its code.
func (h *holder) exits(t *testing.T, code int) {
	t.Helper()
	select {
	case <-h.ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the script did not end")
	}
	if got := h.cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("got exit code %d, %s; want %d", got, h.output.String(), code)
	}
}

func needsLockTools(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"bash", "curl", "od"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

// Contenders increment a file, which loses counts unless one at a time does, for longer than a lease altogether.
func TestLockIsHeldByOne(t *testing.T) {
	t.Parallel()
	needsLockTools(t)
	n := newKVNode(t)
	file := filepath.Join(t.TempDir(), "count")
	if err := os.WriteFile(file, []byte("0"), 0o600); err != nil {
		t.Fatal(err)
	}
	var holders []*holder
	for range 4 {
		holders = append(holders, lock(t, n, `n=$(cat "$FILE"); sleep 0.8; echo $((n + 1)) > "$FILE"`, "FILE="+file))
	}
	for _, h := range holders {
		h.exits(t, 0)
	}
	if got, _ := os.ReadFile(file); strings.TrimSpace(string(got)) != "4" {
		t.Errorf("got %s; want 4", got)
	}
	wantValue(t, n, "locks/job", "null")
	lock(t, n, "exit 3").exits(t, 3)
	long := lock(t, n, "sleep 60")
	waitFor(t, "the lock to be taken", func() bool { return len(valuesOf(n)) == 1 })
	time.Sleep(3 * time.Second) // longer than the lease, which is renewed
	other := lock(t, n, "exit 4")
	_ = long.cmd.Process.Signal(syscall.SIGTERM)
	long.exits(t, 143)
	other.exits(t, 4)
}

// A holder that is paused for longer than its lease loses the lock, is ended when it goes on, and what it writes
// until then is refused by its token.
func TestLockOfAPausedHolder(t *testing.T) {
	t.Parallel()
	needsLockTools(t)
	n := newKVNode(t)
	var mu sync.Mutex // guards what follows
	var newest int64
	accepted, refused := make(map[string]int), make(map[string]int)
	mux := http.NewServeMux() // what the commands write to
	mux.HandleFunc("/{who}/{token}", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		var token int64
		who := r.PathValue("who")
		if _, err := fmt.Sscan(r.PathValue("token"), &token); err != nil || token < newest {
			refused[who]++
			w.WriteHeader(http.StatusPreconditionFailed)
			return
		}
		newest = token
		accepted[who]++
	})
	web := httptest.NewServer(mux)
	t.Cleanup(web.Close)
	resource := web.URL
	count := func(of map[string]int, who string) int {
		mu.Lock()
		defer mu.Unlock()
		return of[who]
	}
	work := `while true; do curl -s "$RESOURCE/$WHO/$LOCK_TOKEN"; sleep 0.02; done`
	const lease = 6 * time.Second
	first := lockFor(t, n, lease, work, "WHO=first", "RESOURCE="+resource)
	waitFor(t, "the first to work", func() bool { return count(accepted, "first") > 0 })
	second := lockFor(t, n, lease, work, "WHO=second", "RESOURCE="+resource)
	time.Sleep(lease + time.Second) // the lease is renewed
	if count(accepted, "second") > 0 {
		t.Fatal("the second works beside the first")
	}
	_ = first.cmd.Process.Signal(syscall.SIGSTOP) // its command goes on, as one does that nobody can stop in time
	paused := time.Now()
	waitFor(t, "the second to work", func() bool { return count(accepted, "second") > 0 })
	if took := time.Since(paused); took < lease/2 || took > 2*lease {
		t.Errorf("the lock was taken over after %v; want about a lease of %v", took, lease)
	}
	mu.Lock()
	late := accepted["first"]
	mu.Unlock()
	waitFor(t, "an old token to be refused", func() bool { return count(refused, "first") > 0 })
	_ = first.cmd.Process.Signal(syscall.SIGCONT)
	first.exits(t, 75)
	if got := count(accepted, "first"); got != late || count(refused, "second") > 0 {
		t.Errorf("got %d writes of the paused holder after the takeover, %d of the new one refused; want none", got-late, count(refused, "second"))
	}
	_ = second.cmd.Process.Signal(syscall.SIGTERM)
	second.exits(t, 143)
	wantValue(t, n, "locks/job", "null")
}

// A holder that can reach nobody ends its command before its lease is over. It gives up when two thirds of it are, so the
// lease is long: a third of it is what a machine that is busy may be late by.
func TestLockWithoutAService(t *testing.T) {
	t.Parallel()
	needsLockTools(t)
	n := newKVNode(t)
	const lease = 9 * time.Second
	h := lockFor(t, n, lease, "sleep 60")
	waitFor(t, "the lock to be taken", func() bool { return len(valuesOf(n)) == 1 })
	_ = n.web.Listener.Close()
	gone := time.Now()
	h.exits(t, 75)
	if took := time.Since(gone); took > lease {
		t.Errorf("the command ended after %v; want it before the lease of %v", took, lease)
	}
}
