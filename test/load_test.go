package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"
)

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
	waitFor(t, "writes to go on", func() bool { return count() > before+100 })
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
