package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// discard is an http.ResponseWriter that keeps nothing.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(int)             {}

// BenchmarkHandlers measures what this service adds to net/http for a request: routing, the state machine, the answer.
func BenchmarkHandlers(b *testing.B) {
	c := unstartedCluster(b, 1, storeMemory)
	c.start(0)
	c.leader()
	handler := c.nodes[0].server
	value := `"` + strings.Repeat("x", 256) + `"`
	for _, bm := range []struct{ name, method, target, body string }{
		{"put", http.MethodPut, "/key/k", value},
		{"post", http.MethodPost, "/key", `{"k":` + value + `}`},
		{"get linearizable", http.MethodGet, "/key/k", ""},
		{"get stale", http.MethodGet, "/key/k?consistency=stale", ""},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r := httptest.NewRequestWithContext(b.Context(), bm.method, bm.target, strings.NewReader(bm.body))
					handler.ServeHTTP(&discard{make(http.Header)}, r)
				}
			})
		})
	}
}

// BenchmarkStaleReadOverHTTP compares a stale read with what net/http alone needs for an answer of the same size.
func BenchmarkStaleReadOverHTTP(b *testing.B) {
	c := unstartedCluster(b, 1, storeMemory)
	c.start(0)
	c.leader()
	value := `"` + strings.Repeat("x", 256) + `"`
	if _, err := c.nodes[0].kv.Set(b.Context(), []Pair{{"k", value}}, Condition{}); err != nil {
		b.Fatal(err)
	}
	answer := []byte(`{"k":` + value + `}`)
	for _, bm := range []struct {
		name    string
		handler http.Handler
	}{
		{"service", c.nodes[0].server},
		{"bare", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _ = writeBody(w, jsonType, answer) })},
	} {
		b.Run(bm.name, func(b *testing.B) {
			web := httptest.NewServer(bm.handler)
			defer web.Close()
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
			defer client.CloseIdleConnections()
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r, err := http.NewRequestWithContext(b.Context(), http.MethodGet, web.URL+"/key/k?consistency=stale", http.NoBody)
					if err != nil {
						b.Error(err)
						return
					}
					response, err := client.Do(r)
					if err != nil {
						b.Error(err)
						return
					}
					if body, err := io.ReadAll(response.Body); err != nil || !bytes.Equal(body, answer) {
						b.Errorf("got %q, error %v; want %q", body, err, answer)
					}
					_ = response.Body.Close()
				}
			})
		})
	}
}

// BenchmarkCodec measures a command's way into a log entry and back.
func BenchmarkCodec(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprintf("%d commands", n), func(b *testing.B) {
			b.ReportAllocs()
			commands := make([][]byte, n)
			for b.Loop() {
				for i := range commands {
					commands[i] = command{op: opSet, pairs: []Pair{{"some-key", strings.Repeat("x", 256)}}}.encode()
				}
				_, decoded, err := decodeEntry(encodeEntry(testTime, commands))
				if err != nil {
					b.Fatal(err)
				}
				for _, encoded := range decoded {
					if _, err := decodeCommand(encoded); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkThreeNodeWrite measures durable and memory writes through a cluster in this process, at the leader and through
// a follower, one client and many.
func BenchmarkThreeNodeWrite(b *testing.B) {
	value := `"` + strings.Repeat("x", 256) + `"`
	for _, store := range []string{storeBolt, storeMemory} {
		c := newTestCluster(b, 3, store)
		leader := c.leader()
		for _, through := range []struct {
			name string
			node int
		}{{"leader", leader}, {"follower", c.followers(leader)[0]}} {
			for _, clients := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/%s/%d", store, through.name, clients), func(b *testing.B) {
					kv, key, began := c.nodes[through.node].kv, new(atomic.Int64), time.Now()
					write := func() {
						if _, err := kv.Set(b.Context(), []Pair{{fmt.Sprint(key.Add(1) % 10_000), value}}, Condition{}); err != nil {
							b.Error(err)
						}
					}
					if clients == 1 {
						for b.Loop() {
							write()
						}
					} else {
						b.SetParallelism(clients / runtime.GOMAXPROCS(0))
						b.RunParallel(func(pb *testing.PB) {
							for pb.Next() {
								write()
							}
						})
					}
					b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "writes/s")
				})
			}
		}
	}
}
