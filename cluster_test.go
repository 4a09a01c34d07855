package main

import (
	"fmt"
	"net/http"
	"testing"
)

func TestAnyNodeTakesAnyRequest(t *testing.T) {
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) {
			c := newTestCluster(t, 3, store)
			for i, writer := range c.nodes {
				value := fmt.Sprint(i)
				if a := request(t, http.MethodPut, writer.url+"/key/k", value); a.status != 200 {
					t.Fatalf("put through node %d: got %v; want 200", i, a)
				}
				for j, reader := range c.nodes {
					if a := request(t, http.MethodGet, reader.url+"/key/k", ""); a.body != `{"k":`+value+`}` {
						t.Errorf("got %v through node %d; want what was put through node %d", a, j, i)
					}
				}
			}
		})
	}
}
