package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
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
