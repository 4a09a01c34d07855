package main

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// A client that keeps its connection loses no request when the node stops: an answer says that it is the connection's last.
func TestProcessStopsBetweenRequests(t *testing.T) {
	t.Parallel()
	p := newProc(t, map[string]string{"NODE_ID": "n1", "KV_STORE": storeMemory})
	p.start()
	p.await(http.StatusOK, http.MethodGet, "/readyz", "")

	var wg sync.WaitGroup
	var answers atomic.Int64
	for range 20 {
		transport := &http.Transport{}
		t.Cleanup(transport.CloseIdleConnections)
		wg.Go(func() {
			for last := false; !last; answers.Add(1) {
				// net/http would repeat a GET by itself, but no PUT.
				request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, p.url()+"/key/k", strings.NewReader("1"))
				if err != nil {
					t.Error(err)
					return
				}
				response, err := transport.RoundTrip(request)
				if err != nil {
					t.Errorf("a request was lost: %v", err)
					return
				}
				_ = response.Body.Close()
				last = response.Close
			}
		})
	}
	waitFor(t, "requests on all connections", func() bool { return answers.Load() > 1000 })
	p.end(syscall.SIGTERM, exitOK)
	wg.Wait()
}
