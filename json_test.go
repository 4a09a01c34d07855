package main

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// BenchmarkBodies measures what a body costs until it can be a command: the value of a PUT, the object of a POST.
func BenchmarkBodies(b *testing.B) {
	record := `{"name":"somebody","visits":12345,"tags":["a","b"],"address":{"street":"Somewhere 12","zip":"12345"},"score":1.25}`
	for _, bm := range []struct{ name, value string }{
		{"string of 256 B", `"` + strings.Repeat("x", 254) + `"`},
		{"string of 64 KiB", `"` + strings.Repeat("x", 64<<10) + `"`},
		{"objects of 256 B", "[" + record + "," + record + "]"},
		{"objects of 64 KiB", "[" + strings.Repeat(record+", ", 560) + "1]"},
	} {
		request := func(body string) *http.Request {
			return &http.Request{ContentLength: int64(len(body)), Body: io.NopCloser(strings.NewReader(body))}
		}
		b.Run("put/"+bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				value, err := readJSON(request(bm.value))
				if err != nil || string(value) == "" {
					b.Fatal(err)
				}
			}
		})
		b.Run("post/"+bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if pairs, _, err := readObject(request(`{"key":`+bm.value+`}`), maxDepth); err != nil || len(pairs) != 1 {
					b.Fatal(err)
				}
			}
		})
	}
}
