package test

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// An hour of it, as for the figures in PERFORMANCE.md:
// go test -v -run TestMixedSizes/boltdb -mixed.for=1h -timeout=2h ./test
var mixedTime = flag.Duration("mixed.for", 8*time.Second, "how long TestMixedSizes writes to each of its clusters")

const (
	mixedMost  = 50 << 20  // bytes of the largest state that the test wants
	mixedSlack = 100 << 20 // bytes of disk and of memory that a node may use beyond twice its state
)

// Writes of all sizes, over a state that grows and shrinks, while nodes restart: memory and disk stay within twice the
// largest state that there was, and 100 MiB. (The database does not shrink, and memory is given back late.)
func TestMixedSizes(t *testing.T) {
	t.Parallel()
	for _, store := range []string{storeBolt, storeMemory} {
		t.Run(store, func(t *testing.T) { writeMixedSizes(t, store) })
	}
}

// mixed is a cluster under such a load, and what has been seen of its nodes.
type mixed struct {
	nodes  []*proc
	web    *http.Client
	began  time.Time
	length time.Duration

	state   atomic.Int64 // bytes of all keys and values that are there
	sent    atomic.Int64 // bytes that have been written, and
	writes  atomic.Int64 // in how many writes
	largest int          // state so far
	base    []int        // by node: bytes that were resident at its first start
	maxima  map[string]mixedMax
}

// mixedMax is the most that some size has been, and the size of the state then, where and when.
type mixedMax struct {
	bytes, state int
	node         string
	after        time.Duration
}

// The sizes that are bounded.
const (
	diskBeyond   = "disk beyond twice the largest state so far"
	memoryBeyond = "resident beyond the start's and twice the largest state so far"
)

func writeMixedSizes(t *testing.T, store string) { //nolint:thelper // it is the test
	m := &mixed{
		nodes: startAll(newProcs(t, map[string]string{"KV_STORE": store})...),
		web:   &http.Client{Timeout: 15*time.Second + slack, Transport: &http.Transport{MaxIdleConnsPerHost: 10}},
		began: time.Now(), length: *mixedTime, maxima: make(map[string]mixedMax),
	}
	for _, p := range m.nodes {
		m.base = append(m.base, p.memory("VmRSS"))
	}
	ctx, cancel := context.WithTimeout(t.Context(), m.length)
	defer cancel()
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			c := &mixedClient{mixed: m, id: i, sizes: make(map[string]int), random: rand.New(rand.NewPCG(1, uint64(i)))}
			for ctx.Err() == nil {
				c.write(ctx)
			}
		})
	}
	second := time.NewTicker(min(time.Second, m.length/20))
	defer second.Stop()
	restarts := 0
	for next := m.pause(); ctx.Err() == nil; <-second.C {
		m.sample()
		if time.Since(m.began) < next {
			continue
		}
		for _, p := range m.nodes { // the one that was restarted before, too
			p.await(http.StatusOK, http.MethodGet, "/readyz", "")
		}
		p := m.nodes[restarts%len(m.nodes)]
		if restarts%2 == 0 {
			p.end(syscall.SIGKILL, -1)
		} else {
			p.end(syscall.SIGTERM, exitOK)
		}
		p.start() // what it takes to be ready is sampled, too
		restarts++
		next = time.Since(m.began) + m.pause()
	}
	clients.Wait()
	t.Logf("%s, %v: %d writes of %d MiB in all, %d restarts; largest state %d MiB",
		store, m.length, m.writes.Load(), m.sent.Load()>>20, restarts, m.largest>>20)
	for _, what := range slices.Sorted(maps.Keys(m.maxima)) {
		most := m.maxima[what]
		t.Logf("%s: at most %d MiB, on %s after %v, when the state was %d MiB",
			what, most.bytes>>20, most.node, most.after.Round(time.Second), most.state>>20)
	}
	for _, what := range []string{diskBeyond, memoryBeyond} {
		if most := m.maxima[what]; most.bytes > mixedSlack {
			t.Errorf("got %d MiB of %s; want %d MiB at most", most.bytes>>20, what, mixedSlack>>20)
		}
	}
	if m.writes.Load() < 10 || restarts == 0 {
		t.Errorf("got %d writes and %d restarts; want some", m.writes.Load(), restarts)
	}
}

// pause is how long all nodes run between two restarts.
func (m *mixed) pause() time.Duration { return min(m.length/3, 3*time.Minute) }

// sample looks at all nodes once.
func (m *mixed) sample() {
	state := int(m.state.Load())
	m.largest = max(m.largest, state)
	for i, p := range m.nodes {
		note := func(what string, bytes int) {
			if most, ok := m.maxima[what]; !ok || bytes > most.bytes {
				m.maxima[what] = mixedMax{bytes, state, p.name, time.Since(m.began)}
			}
		}
		disk, resident := p.diskUsed(), p.memory("VmRSS")
		note("disk", disk)
		note("disk beyond twice the state of that moment", disk-2*state)
		note(diskBeyond, disk-2*m.largest)
		note("resident", resident)
		note("resident without mapped files", p.memory("RssAnon"))
		note("resident beyond the start's and twice the state of that moment", resident-m.base[i]-2*state)
		note(memoryBeyond, resident-m.base[i]-2*m.largest)
		if db, err := os.Stat(filepath.Join(p.env["STATE_DIR"], dbName)); err == nil {
			note(dbName, int(db.Size()))
		}
	}
}

// wanted is how large the state is to be now: between a tenth of mixedMost and all of it, in at least six waves.
func (m *mixed) wanted() int64 {
	wave := min(m.length/6, 10*time.Minute).Seconds()
	return int64(mixedMost * (0.55 - 0.45*math.Cos(2*math.Pi*time.Since(m.began).Seconds()/wave)))
}

// rest waits until the load may go on: a third of the time it is 8 MB/s, and else 0.5 MB/s.
func (m *mixed) rest(ctx context.Context) {
	const cycle = 30.0
	for ctx.Err() == nil {
		seconds := time.Since(m.began).Seconds() + 1
		full, part := math.Floor(seconds/cycle), math.Mod(seconds, cycle)
		burst := full*cycle/3 + min(part, cycle/3)
		if float64(m.sent.Load()) < 8e6*burst+5e5*(seconds-burst) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// mixedClient writes keys that nobody else writes.
type mixedClient struct {
	*mixed
	id     int
	sizes  map[string]int // of its keys that are there: bytes of key and value
	random *rand.Rand
}

// key returns one of n names.
func (c *mixedClient) key(kind string, n int) string {
	return fmt.Sprintf("%s-%d-%d", kind, c.id, c.random.IntN(n))
}

// value returns a JSON string that is as long as a value drawn from least to most, small ones as often as large ones on a
// scale of logarithms.
func (c *mixedClient) value(least, most float64) string {
	n := int(least * math.Pow(most/least, c.random.Float64()))
	return `"` + strings.Repeat(string(rune('a'+c.random.IntN(26))), n-2) + `"`
}

// write makes one write: it puts or deletes a key, or posts many. When the state is larger than it is to be it deletes.
func (c *mixedClient) write(ctx context.Context) {
	c.rest(ctx)
	kind := c.random.IntN(100)
	if c.state.Load() > c.wanted() {
		for key, size := range c.sizes { // a large one if one of the first is: maps are in no order
			if size > 1000 || c.random.IntN(100) == 0 {
				c.set(ctx, http.MethodDelete, "/key/"+key, "", map[string]int{key: 0})
				return
			}
		}
		kind = c.random.IntN(50) // only small ones
	}
	switch {
	case kind < 40:
		c.put(ctx, c.key("small", 3000), c.value(10, 500))
	case kind < 50:
		key := c.key("small", 3000)
		c.set(ctx, http.MethodDelete, "/key/"+key, "", map[string]int{key: 0})
	case kind < 60:
		members, sizes := []string{}, make(map[string]int)
		for range 10 + c.random.IntN(500) {
			key, value := c.key("small", 3000), c.value(10, 500)
			if _, twice := sizes[key]; !twice {
				members, sizes[key] = append(members, fmt.Sprintf("%q:%s", key, value)), len(key)+len(value)
			}
		}
		c.set(ctx, http.MethodPost, "/key", "{"+strings.Join(members, ",")+"}", sizes)
	case kind < 85:
		c.put(ctx, c.key("medium", 300), c.value(500, 20_000))
	default:
		c.put(ctx, c.key("large", 60), c.value(20_000, 500_000))
	}
}

func (c *mixedClient) put(ctx context.Context, key, value string) {
	c.set(ctx, http.MethodPut, "/key/"+key, value, map[string]int{key: len(key) + len(value)})
}

// set makes a write until it is acknowledged, and counts what it does to the state: the sizes that its keys then have.
func (c *mixedClient) set(ctx context.Context, method, path, body string, sizes map[string]int) {
	for node := c.random.IntN(len(c.nodes)); ctx.Err() == nil; node++ {
		req, err := http.NewRequestWithContext(ctx, method, c.nodes[node%len(c.nodes)].url()+path, strings.NewReader(body))
		if err != nil {
			panic(err)
		}
		if a, err := roundTrip(c.web, req); err == nil && a.status == http.StatusOK {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	for key, size := range sizes {
		c.state.Add(int64(size - c.sizes[key]))
		if c.sizes[key] = size; size == 0 {
			delete(c.sizes, key)
		}
	}
	c.sent.Add(int64(len(path) + len(body)))
	c.writes.Add(1)
}
