package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestMetrics(t *testing.T) {
	node := newTestNode(t, storeBolt)
	node.put(t, "secretkey", `"secretvalue"`)
	node.get(t, "secretkey")
	request(t, "SECRETMETHOD", node.url+"/value/secretkey", "")
	request(t, http.MethodGet, node.url+"/secretpath", "")
	a := request(t, http.MethodGet, node.url+"/metrics", "")
	if a.status != http.StatusOK || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") {
		t.Fatalf("got %d, %s; want 200, text/plain", a.status, a.header.Get("Content-Type"))
	}
	for _, want := range []string{
		`raftstarter_http_requests_total{method="PUT",route="/value/",status="200"} 1`,
		`raftstarter_http_requests_total{method="other",route="/value/",status="405"} 1`,
		`raftstarter_http_requests_total{method="GET",route="none",status="404"} 1`,
		`raftstarter_http_request_duration_seconds_count{method="PUT",route="/value/"} 1`,
		`raftstarter_leader_changes_total 1`,
		`raftstarter_commit_duration_seconds_count 1`,
		`raftstarter_apply_duration_seconds_count 2`, // the first is the leader's own, without a command
		`raftstarter_entry_commands_sum 1`,
		`raftstarter_read_round_reads_count [2-9]`,
		`raftstarter_forwarded_commands_total 0`,
		`raftstarter_peers_drift 0`,
		`raftstarter_keys 1`,
		`go_goroutines [1-9]`,
	} {
		if !regexp.MustCompile(`(?m)^` + strings.NewReplacer(`{`, `\{`, `}`, `\}`).Replace(want)).MatchString(a.body) {
			t.Errorf("/metrics has no line %s", want)
		}
	}
	if strings.Contains(strings.ToLower(a.body), "secret") {
		t.Error("/metrics holds something that a client made up")
	}
	var own []string
	for _, line := range strings.Split(a.body, "\n") {
		if f := strings.Fields(line); len(f) > 2 && f[1] == "TYPE" && strings.HasPrefix(f[2], "raftstarter_") {
			own = append(own, f[2])
		}
	}
	problems, err := testutil.GatherAndLint(node.metrics.registry, own...)
	if err != nil || len(problems) > 0 || len(own) < 20 {
		t.Errorf("promlint: got %v, %v for %d metrics; want no complaint for 20 or more", problems, err, len(own))
	}
	checkWatched(t, own)
}

// checkWatched compares what docs/metrics.md, the alert rules and the dashboard speak of with what there is.
func checkWatched(t *testing.T, own []string) {
	t.Helper()
	doc, err1 := os.ReadFile("docs/metrics.md")
	rules, err2 := os.ReadFile("k8s/variants/monitoring/prometheusrule.yaml")
	board, err3 := os.ReadFile("k8s/variants/monitoring/dashboard.yaml")
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	_, dashboard, found := strings.Cut(string(board), "raftstarter.json: |\n")
	if !found || !json.Valid([]byte(dashboard)) {
		t.Error("the dashboard is not JSON")
	}
	_, table, _ := strings.Cut(string(doc), "# Metrics\n")
	table, _, _ = strings.Cut(table, "\n\nThose that begin")
	for _, cell := range regexp.MustCompile("(?m)^\\| (`.*?) \\|").FindAllStringSubmatch(table, -1) {
		table += "\nraftstarter_" + strings.NewReplacer("`", "", ", ", " raftstarter_").Replace(cell[1])
	}
	for from, text := range map[string]string{"docs/metrics.md": table, "the rules": string(rules), "the dashboard": dashboard} {
		names := regexp.MustCompile(`raftstarter_[a-z_]+`).FindAllString(text, -1)
		if len(names) < 10 {
			t.Errorf("%s: got %d metrics; want 10 or more", from, len(names))
		}
		for _, name := range names {
			name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
			if name != "raftstarter_" && name != "raftstarter_tls_certificate_expiry_seconds" && !slices.Contains(own, name) {
				t.Errorf("%s: %s is no metric", from, name)
			}
		}
	}
}

// metric returns the value that /metrics has for a series of this service.
func (n *testNode) metric(t *testing.T, series string) float64 {
	t.Helper()
	for _, line := range strings.Split(request(t, http.MethodGet, n.url+"/metrics", "").body, "\n") {
		if text, found := strings.CutPrefix(line, "raftstarter_"+series+" "); found {
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Fatalf("%s: %v", series, err)
			}
			return value
		}
	}
	t.Fatalf("/metrics has no %s", series)
	return 0
}

func (n *testNode) wantMetrics(t *testing.T, want map[string]float64) {
	t.Helper()
	for series, value := range want {
		if got := n.metric(t, series); got != value {
			t.Errorf("%s: got %s %v; want %v", n.cfg.NodeID, series, got, value)
		}
	}
}

func TestMetricsOfTheStorage(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{storeBolt, storeMemory} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			c := newTestCluster(t, 1, kind)
			node := c.nodes[0]
			node.wantMetrics(t, map[string]float64{"snapshot_timestamp_seconds": 0, "snapshot_size_bytes": 0})
			stored := node.metric(t, "log_store_duration_seconds_count")
			for range 3 {
				node.put(t, "k", `"`+strings.Repeat("v", 20_000)+`"`)
			}
			if got := node.metric(t, "log_store_duration_seconds_count"); (got >= stored+3) != (kind == storeBolt) {
				t.Errorf("got %v stores of log entries, and %v after three writes", stored, got)
			}
			before := time.Now().Add(-time.Second)
			if err := node.raft.Load().Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
			at := node.metric(t, "snapshot_timestamp_seconds")
			if when := time.UnixMilli(int64(at * 1000)); when.Before(before) || when.After(time.Now()) {
				t.Errorf("got a snapshot of %v; want one of now, %v", when, time.Now())
			}
			if kind == storeMemory {
				node.wantMetrics(t, map[string]float64{"snapshot_size_bytes": 0}) // it shares what it has with the state
				list, err := node.storage.snapshots.List()
				if err != nil {
					t.Fatal(err)
				}
				if _, state, err := node.storage.snapshots.Open(list[0].ID); err != nil || state.Close() != nil {
					t.Errorf("got error %v; want the snapshot", err)
				}
				if size := node.metric(t, "snapshot_size_bytes"); size < 20_000 || size > 21_000 {
					t.Errorf("got a snapshot of %v bytes when it is sent; want little more than the value's 20000", size)
				}
				return
			}
			states, err := filepath.Glob(filepath.Join(node.cfg.StateDir, snapshotsDir, "*", stateName))
			if err != nil || len(states) != 1 {
				t.Fatalf("got snapshots %v, error %v; want one", states, err)
			}
			want := map[string]float64{"snapshot_timestamp_seconds": at, "snapshot_size_bytes": fileSize(t, states[0])}
			node.wantMetrics(t, want)
			c.stop(0)
			c.start(0)
			node.wantMetrics(t, want)
			db := fileSize(t, filepath.Join(node.cfg.StateDir, dbName))
			node.wantMetrics(t, map[string]float64{"db_size_bytes": db})
			if free := node.metric(t, "db_free_bytes"); free <= 0 || free >= db {
				t.Errorf("got %v free bytes of %v; want some, but not all", free, db)
			}
		})
	}
}

func fileSize(t *testing.T, path string) float64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return float64(info.Size())
}

func TestMetricsOfTheCluster(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.leader()
	follower := c.nodes[c.followers(leader)[0]]
	follower.put(t, "k", "1")
	follower.get(t, "k")
	status := follower.Status()
	for _, node := range c.nodes {
		leads := 0.0
		if node == c.nodes[leader] {
			leads = 1
		}
		node.wantMetrics(t, map[string]float64{
			"is_leader": leads, "has_leader": 1, "ready": 1, "voters": 3, "peers_drift": 0,
			"term": float64(status.Term), `build_info{version="` + version + `"}`: 1,
		})
	}
	follower.wantMetrics(t, map[string]float64{
		"commit_index": float64(status.CommitIndex), "applied_index": float64(status.AppliedIndex),
	})

	for i, node := range c.nodes {
		if node != follower {
			c.stop(i)
		}
	}
	waitFor(t, "the leader to be missed", func() bool { return follower.Leader() == "" })
	follower.wantMetrics(t, map[string]float64{"is_leader": 0, "has_leader": 0, "ready": 0, "voters": 3})
}

func TestMetricsOfWritesThatWait(t *testing.T) {
	t.Parallel()
	node := newTestNode(t, storeMemory)
	node.wantMetrics(t, map[string]float64{"waiting_write_bytes": 0})
	node.writes.committing <- struct{}{}
	done := make(chan error, 1)
	go func() {
		_, err := node.client.set(t.Context(), "k", strings.Repeat("v", 100))
		done <- err
	}()
	waitFor(t, "a write of 100 bytes to wait", func() bool {
		waiting := node.metric(t, "waiting_write_bytes")
		return waiting > 100 && waiting < 200
	})
	<-node.writes.committing
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	node.wantMetrics(t, map[string]float64{"waiting_write_bytes": 0})
}
