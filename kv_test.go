package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tidwall/btree"
)

// kvService is the key-value service itself, for the tests of fsm.go and http.go.
type kvService struct{}

func (kvService) newMachine() StateMachine { return newMachine() }

func (kvService) routes(_ *Config, store *Store, machine StateMachine) []route {
	return routes(store, machine.(*kvMachine))
}

// newKVNode is newTestNode with the key-value service, in memory.
func newKVNode(t testing.TB) *testNode {
	t.Helper()
	return newKVCluster(t, 1).nodes[0]
}

// newKVCluster is newTestCluster with the key-value service.
func newKVCluster(t testing.TB, n int) *testCluster {
	t.Helper()
	c := unstartedCluster(t, n, storeMemory)
	c.service = kvService{}
	c.startAll()
	return c
}

// kvClient uses a kvMachine through a Store, without HTTP.
type kvClient struct {
	store   *Store
	machine *kvMachine
}

// kvOf returns a client of a node of such a cluster.
func kvOf(n *testNode) *kvClient { return &kvClient{n.Store, n.machine.(*kvMachine)} }

// set sets pairs, all or none.
func (kv *kvClient) set(ctx context.Context, pairs ...Pair) error {
	_, err := kv.store.Apply(ctx, command{op: opSet, pairs: pairs}.encode())
	return err
}

func (kv *kvClient) get(ctx context.Context, key string) (item Item, err error) {
	err = kv.store.Read(ctx, Linearizable, func() { item, _ = kv.machine.items.Get(key) })
	return item, err
}

// write has a command executed and returns its tag, 0 if its condition was not met.
func (kv *kvClient) write(ctx context.Context, c command) (uint64, error) {
	result, err := kv.store.Apply(ctx, c.encode())
	if err != nil {
		return 0, err
	}
	tag, err := decodeResult(result.Data)
	return uint64(tag), err
}

// txn has a transaction executed and returns its tag, 0 if its comparisons do not hold.
func (kv *kvClient) txn(ctx context.Context, t txn) (uint64, error) {
	result, err := kv.store.Apply(ctx, t.encode())
	if err != nil {
		return 0, err
	}
	tag, _, err := t.decodeResult(result.Data)
	return uint64(tag), err
}

// valuesOf returns the keys and values that a node has.
func valuesOf(n *testNode) map[string]string {
	values := make(map[string]string)
	var items *btree.Map[string, Item]
	n.Capture(func() { items = n.machine.(*kvMachine).items.Copy() })
	items.Scan(func(key string, item Item) bool { values[key] = item.Value; return true })
	return values
}

// kvState is all that a kvMachine holds.
type kvState struct {
	Items   map[string]Item
	LastTag Tag
}

func stateOf(m *kvMachine) kvState { return kvState{itemsOf(m.items), m.lastTag} }

func itemsOf(items *btree.Map[string, Item]) map[string]Item {
	all := make(map[string]Item)
	items.Scan(func(key string, item Item) bool {
		all[key] = item
		return true
	})
	return all
}

// discard is an http.ResponseWriter that keeps nothing.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(int)             {}

// BenchmarkHandlers measures what this service adds to net/http for a request: routing, the state machine, the answer.
func BenchmarkHandlers(b *testing.B) {
	node := newKVNode(b)
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
					node.server.answer(&discard{make(http.Header)}, r)
				}
			})
		})
	}
}

// BenchmarkStaleReadOverHTTP compares a stale read with what net/http alone needs for an answer of the same size.
func BenchmarkStaleReadOverHTTP(b *testing.B) {
	node := newKVNode(b)
	value := `"` + strings.Repeat("x", 256) + `"`
	if err := kvOf(node).set(b.Context(), Pair{"k", value}); err != nil {
		b.Fatal(err)
	}
	answer := []byte(`{"k":` + value + `}`)
	bare := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = writeBody(w, jsonType, answer)
	}))
	defer bare.Close()
	for _, bm := range []struct{ name, url string }{{"service", node.url}, {"bare", bare.URL}} {
		b.Run(bm.name, func(b *testing.B) {
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
			defer client.CloseIdleConnections()
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r, err := http.NewRequestWithContext(b.Context(), http.MethodGet, bm.url+"/key/k?consistency=stale", http.NoBody)
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

func FuzzCommand(f *testing.F) {
	for _, c := range []command{
		{op: opSet, pairs: []Pair{{"k", "1"}, {"", ""}}},
		{op: opDelete, pairs: []Pair{{Key: "k"}}, condition: Condition{Match: &Tags{Any: true}}},
		{op: opSet, pairs: []Pair{{"k", "1"}}, condition: Condition{Match: &Tags{List: []Tag{1, 1 << 60}}, NoneMatch: &Tags{}}},
	} {
		f.Add(c.encode())
	}
	f.Add([]byte{commandVersion, byte(opSet), bitMatch | bitNoneMatch, 1, 1, 1, 2, 1, 1, 'k', 1, '1'})
	f.Add([]byte{commandVersion, byte(opSet), bitMatch, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Add([]byte{commandVersion, byte(opDelete), 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var c command
		var err error
		checkMemory(t, len(b), 1<<20, func() { c, err = decodeCommand(b) })
		if err != nil {
			return
		}
		again, err := decodeCommand(c.encode())
		if diff := cmp.Diff(c, again, cmp.AllowUnexported(command{})); err != nil || diff != "" {
			t.Errorf("decoded, encoded and decoded again: %v (-want +got)\n%s", err, diff)
		}
		if _, err := newMachine().Apply(b, time.UnixMicro(1)); err != nil {
			t.Errorf("a command that can be read cannot be executed: %v", err)
		}
	})
}

// A snapshot's content, behind the checksums that would keep most foreign bytes out. A string of it may announce as
// much as a request may hold, and there are two.
func FuzzSnapshot(f *testing.F) {
	written := func(tb testing.TB, m *kvMachine) []byte {
		tb.Helper()
		var b bytes.Buffer
		if err := m.Snapshot()(&b); err != nil {
			tb.Fatal(err)
		}
		return b.Bytes()
	}
	m := newMachine()
	f.Add(written(f, m))
	m.items.Set("k", Item{Value: "1", Tag: 1})
	m.items.Set("l", Item{Value: "[]", Tag: 1 << 60})
	f.Add(written(f, m))
	f.Add([]byte("12345678\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x07"))
	f.Add([]byte("12345678\xff\xff\xff\xff\xff\xff\xff\xff\x80\x80\x80\x80\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, again := newMachine(), newMachine()
		var install func()
		var err error
		checkMemory(t, len(b), 2*maxBodyBytes+1<<20, func() { install, err = m.Restore(bytes.NewReader(b)) })
		if m.items.Len() != 0 {
			t.Error("the state was touched before all was read")
		}
		if err != nil {
			return
		}
		install()
		first := written(t, m)
		if install, err = again.Restore(bytes.NewReader(first)); err != nil {
			t.Fatal(err)
		}
		install()
		if !bytes.Equal(first, written(t, again)) {
			t.Error("restored and written again it is another snapshot")
		}
	})
}
