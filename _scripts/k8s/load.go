// Load writes to a cluster and reads back, as a polite client does: the checking load of ../k8s-test.sh.
//
//	load URL
//
// Each client writes keys of its own through the service at URL and reads each back at once, until a line comes on standard
// input. The next line holds the URLs of all pods, and every key that was acknowledged is looked for through every one. A
// request is tried again only when the answer is 503 with Retry-After, or when no connection came about, so that nothing was
// sent. Whatever else goes wrong has failed. Load exits 1 if anything failed or is lost.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	clients  = 16
	patience = 10 * time.Second // for one request, with all its repetitions
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: load URL")
		os.Exit(2)
	}
	if !run(os.Args[1], os.Stdin) {
		os.Exit(1)
	}
}

// tally is what all clients have seen.
type tally struct {
	mu          sync.Mutex // guards what follows
	acked       map[string]bool
	unavailable int // answers 503 with Retry-After
	unconnected int
	failed      []string
	slowest     time.Duration // of a write, with its repetitions
}

func run(service string, in io.Reader) (ok bool) {
	t := &tally{acked: make(map[string]bool)}
	var stop atomic.Bool
	prefix := fmt.Sprintf("load/%d/", time.Now().UnixNano())
	var wg sync.WaitGroup
	for i := range clients {
		// Half of the clients keep their connection, which stays with one pod until it ends it, and nearly always have a
		// request on it. The others connect anew for each request.
		client, pause := &http.Client{Transport: &http.Transport{}}, time.Duration(0)
		if i%2 == 1 {
			client, pause = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, 20*time.Millisecond
		}
		wg.Go(func() {
			for n := 0; !stop.Load(); n++ {
				t.writeAndRead(client, service, fmt.Sprintf("%s%d/%d", prefix, i, n))
				time.Sleep(pause)
			}
		})
	}
	lines := bufio.NewScanner(in)
	lines.Scan()
	stop.Store(true)
	wg.Wait()
	fmt.Printf("%d writes acknowledged and read back; tried again: %d after 503 with Retry-After, %d without a connection; failed: %d; slowest write: %.2f s\n",
		len(t.acked), t.unavailable, t.unconnected, len(t.failed), t.slowest.Seconds())
	for _, failure := range t.failed[:min(len(t.failed), 10)] {
		fmt.Println("FAILED:", failure)
	}
	lines.Scan()
	pods := strings.Fields(lines.Text())
	ok = len(pods) > 0 && len(t.failed) == 0 && len(t.acked) > 0
	for _, pod := range pods {
		found, err := t.find(pod, prefix)
		if err != nil || found < len(t.acked) {
			fmt.Printf("LOST: %s has %d of %d acknowledged writes; error: %v\n", pod, found, len(t.acked), err)
			ok = false
		}
	}
	return ok
}

// writeAndRead writes key and reads it back.
func (t *tally) writeAndRead(client *http.Client, service, key string) {
	began := time.Now()
	if _, err := t.do(client, http.MethodPut, service+"/key/"+key, `"`+key+`"`); err != nil {
		t.fail(err)
		return
	}
	t.mu.Lock()
	t.acked[key] = true
	t.slowest = max(t.slowest, time.Since(began))
	t.mu.Unlock()
	body, err := t.do(client, http.MethodGet, service+"/key/"+key, "")
	if want := fmt.Sprintf(`{"%s":"%s"}`, key, key); err == nil && body != want {
		err = fmt.Errorf("GET %s after it was written: %s", key, body)
	}
	if err != nil {
		t.fail(err)
	}
}

func (t *tally) fail(err error) {
	t.mu.Lock()
	t.failed = append(t.failed, time.Now().Format("15:04:05.000 ")+err.Error())
	t.mu.Unlock()
}

// do makes a request, and makes it again where that is safe.
func (t *tally) do(client *http.Client, method, url, body string) (answer string, err error) {
	for deadline := time.Now().Add(patience); ; {
		answer, wait, err := once(client, method, url, body)
		if wait == 0 || time.Now().After(deadline) {
			return answer, err
		}
		t.mu.Lock()
		if errors.Is(err, errUnconnected) {
			t.unconnected++
		} else {
			t.unavailable++
		}
		t.mu.Unlock()
		time.Sleep(wait)
	}
}

var errUnconnected = errors.New("no connection")

// unsent is how the API server, as a proxy, says that it has no pod to connect to or could not.
var unsent = regexp.MustCompile(`"kind":"Status".*(no endpoints available|error trying to reach service: dial )`)

// once makes a request. If wait is not 0, it may be made again after that time.
func once(client *http.Client, method, url, body string) (answer string, wait time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return "", 0, err
	}
	response, err := client.Do(request)
	if op := new(net.OpError); errors.As(err, &op) && op.Op == "dial" {
		return "", 200 * time.Millisecond, fmt.Errorf("%w: %w", errUnconnected, err)
	} else if err != nil {
		return "", 0, err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	answer = string(b)
	if err != nil || response.StatusCode == http.StatusOK {
		return answer, 0, err
	}
	err = fmt.Errorf("%s %s: %s %s", method, url, response.Status, answer)
	if unsent.MatchString(answer) {
		return "", 200 * time.Millisecond, fmt.Errorf("%w: %w", errUnconnected, err)
	}
	seconds, _ := strconv.Atoi(response.Header.Get("Retry-After"))
	if response.StatusCode != http.StatusServiceUnavailable {
		seconds = 0
	}
	return "", time.Duration(seconds) * time.Second, err
}

// find counts the acknowledged keys that a listing through pod has.
func (t *tally) find(pod, prefix string) (found int, err error) {
	for after := ""; ; {
		query := url.Values{"prefix": {prefix}, "after": {after}, "limit": {"10000"}}
		answer, err := t.do(http.DefaultClient, http.MethodGet, pod+"/key?"+query.Encode(), "")
		if err != nil {
			return found, err
		}
		var page map[string]string
		if err := json.Unmarshal([]byte(answer), &page); err != nil || len(page) == 0 {
			return found, err
		}
		for key, value := range page {
			if t.acked[key] && value == key {
				found++
			}
			after = max(after, key)
		}
	}
}
