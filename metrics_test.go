package main

import (
	"net/http"
	"regexp"
	"strings"
	"testing"

	raftmetrics "github.com/armon/go-metrics"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestMetrics(t *testing.T) {
	node := newTestNode(t, storeBolt)
	t.Cleanup(func() { // other tests have other clocks, to which the sink's series would have to turn
		_, _ = raftmetrics.NewGlobal(raftmetrics.DefaultConfig(""), &raftmetrics.BlackholeSink{})
	})
	if err := node.metrics.collectRaft(); err != nil {
		t.Fatal(err)
	}
	node.put(t, "secretkey", `"secretvalue"`)
	node.get(t, "secretkey")
	request(t, "SECRETMETHOD", node.url+"/key/secretkey", "")
	request(t, http.MethodGet, node.url+"/secretpath", "")
	a := request(t, http.MethodGet, node.url+"/metrics", "")
	if a.status != http.StatusOK || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") {
		t.Fatalf("got %d, %s; want 200, text/plain", a.status, a.header.Get("Content-Type"))
	}
	for _, want := range []string{
		`raftstarter_http_requests_total{method="PUT",route="/key/",status="200"} 1`,
		`raftstarter_http_requests_total{method="other",route="/key/",status="405"} 1`,
		`raftstarter_http_requests_total{method="GET",route="none",status="404"} 1`,
		`raftstarter_http_request_duration_seconds_count{method="PUT",route="/key/"} 1`,
		`raftstarter_leader_changes_total 1`,
		`raftstarter_commit_duration_seconds_count 1`,
		`raftstarter_apply_duration_seconds_count 1`,
		`raftstarter_entry_commands_sum 1`,
		`raftstarter_read_round_reads_count [2-9]`,
		`raftstarter_forwarded_commands_total 0`,
		`raftstarter_peers_drift 0`,
		`raftstarter_keys 1`,
		`raft_apply [1-9]`, // of the raft package
		`raft_boltdb_storeLogs_count [1-9]`,
		`go_goroutines [1-9]`,
	} {
		if !regexp.MustCompile(`(?m)^` + strings.NewReplacer(`{`, `\{`, `}`, `\}`).Replace(want)).MatchString(a.body) {
			t.Errorf("/metrics has no line %s", want)
		}
	}
	if strings.Contains(strings.ToLower(a.body), "secret") {
		t.Error("/metrics holds something that a client made up")
	}
	problems, err := testutil.GatherAndLint(node.metrics.registry, "raftstarter_http_requests_total",
		"raftstarter_http_request_duration_seconds", "raftstarter_leader_changes_total", "raftstarter_commit_duration_seconds",
		"raftstarter_apply_duration_seconds", "raftstarter_entry_commands", "raftstarter_read_round_reads",
		"raftstarter_forwarded_commands_total", "raftstarter_peers_drift", "raftstarter_keys")
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: got %v, %v; want no complaint", problems, err)
	}
}
