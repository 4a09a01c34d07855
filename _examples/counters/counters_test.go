package main

import (
	"bytes"
	"net/http"
	"testing"
	"time"
)

// countersService is the service of this project, as the helpers of the tests run it.
type countersService struct{}

func (countersService) newMachine() StateMachine { return newMachine() }

func (countersService) routes(_ *Config, store *Store, machine StateMachine) []route {
	return routes(store, machine.(*counters))
}

// Three nodes in this process count while the leader stops and another one takes over. c.cut(i, linkCut) would cut node
// i off instead, c.start(i) starts it again.
func TestCountersWhileTheLeaderStops(t *testing.T) {
	c := unstartedCluster(t, 3, storeMemory)
	c.service = countersService{}
	c.startAll()
	leader := c.leader()
	node := c.nodes[c.followers(leader)[0]]
	for i := range 10 {
		if i == 5 {
			c.stop(leader)
		}
		if a := request(t, http.MethodPost, node.url+"/counter/visits", "1"); a.status != http.StatusOK {
			t.Fatalf("increment %d: got %v; want 200", i+1, a)
		}
	}
	if a := request(t, http.MethodGet, node.url+"/counter/visits", ""); a.status != http.StatusOK || a.body != "10" {
		t.Errorf("got %v; want 10", a)
	}
	for target, want := range map[string]int{
		"/counter/none": 404, "/counter/": 404, "/counter/a/b": 404, "/counters?x=1": 400,
	} {
		if a := request(t, http.MethodGet, node.url+target, ""); a.status != want {
			t.Errorf("GET %s: got %v; want %d", target, a, want)
		}
	}
	for _, tt := range []struct {
		body string
		want int
	}{{"-11", 409}, {"9223372036854775807", 409}, {"1.5", 400}, {"", 400}, {"-10", 200}} {
		if a := request(t, http.MethodPost, node.url+"/counter/visits", tt.body); a.status != tt.want {
			t.Errorf("POST %q: got %v; want %d", tt.body, a, tt.want)
		}
	}
	for _, target := range []string{"/counters", "/backup", "/backup?consistency=stale"} {
		if a := request(t, http.MethodGet, node.url+target, ""); a.status != http.StatusOK || a.body != `{"visits":0}` {
			t.Errorf("GET %s: got %v; want the one counter, 0", target, a)
		}
	}
}

func TestCountersSnapshot(t *testing.T) {
	m, restored := newMachine(), newMachine()
	for _, cmd := range []string{`{"op":"add","name":"a","n":2}`, `{"op":"add","name":"b","n":3}`} {
		if _, err := m.Apply([]byte(cmd), time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	var first, second bytes.Buffer
	if err := m.Snapshot()(&first); err != nil {
		t.Fatal(err)
	}
	install, err := restored.Restore(bytes.NewReader(first.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	install()
	err = restored.Snapshot()(&second)
	if err != nil || restored.Len() != 2 || !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Errorf("restored: got %v; want %v", restored.values, m.values)
	}
	for _, bad := range []string{`{"op":"multiply"}`, `{`, ``} {
		if _, err := m.Apply([]byte(bad), time.Time{}); err == nil {
			t.Errorf("command %q: got no error; want one", bad)
		}
	}
}
