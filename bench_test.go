package main

import (
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

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
					client, key, began := c.nodes[through.node].client, new(atomic.Int64), time.Now()
					write := func() {
						if _, err := client.set(b.Context(), fmt.Sprint(key.Add(1)%10_000), value); err != nil {
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
