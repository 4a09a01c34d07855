package main

import (
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsPrefix is what the names of our own metrics begin with.
const metricsPrefix = "raftstarter_"

// metrics counts and times what a node does. Labels never hold keys, values, or anything else that a client sends: each
// value of a label costs memory for ever.
type metrics struct {
	registry      *prometheus.Registry
	requests      *prometheus.CounterVec   // by route, method and status
	latency       *prometheus.HistogramVec // seconds, by route and method
	leaderChanges prometheus.Counter
	commit        prometheus.Histogram // seconds
	apply         prometheus.Histogram // seconds
	stored        prometheus.Histogram // seconds
	batch         prometheus.Histogram // commands
	round         prometheus.Histogram // reads
	forwarded     prometheus.Counter   // commands
	refusals      prometheus.Counter   // connections to the Raft port
	overLimit     prometheus.Counter
	dropped       prometheus.Counter // lines of the log
}

func newMetrics() *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	register := promauto.With(registry)
	counter := func(name, help string) prometheus.Counter {
		return register.NewCounter(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help})
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return register.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + name, Help: help, Buckets: buckets})
	}
	times := prometheus.ExponentialBuckets(0.0001, 2, 18) // 0.1 ms to 13 s
	sizes := prometheus.ExponentialBuckets(1, 2, 12)
	return &metrics{
		registry: registry,
		requests: register.NewCounterVec(prometheus.CounterOpts{
			Name: metricsPrefix + "http_requests_total", Help: "HTTP requests answered.",
		}, []string{"route", "method", "status"}),
		latency: register.NewHistogramVec(prometheus.HistogramOpts{
			Name: metricsPrefix + "http_request_duration_seconds", Help: "From a request's header to its answer.",
			Buckets: times,
		}, []string{"route", "method"}),
		leaderChanges: counter("leader_changes_total", "How often this node heard of another leader than before."),
		commit: histogram("commit_duration_seconds",
			"On the leader, from appending a log entry to its execution.", times),
		apply:     histogram("apply_duration_seconds", "Executing the commands of one log entry.", times),
		stored:    histogram("log_store_duration_seconds", "With boltdb, storing entries on disk (fsync).", times),
		batch:     histogram("entry_commands", "Commands in one log entry, as it is executed.", sizes),
		round:     histogram("read_round_reads", "Linearizable reads that shared one confirmation round.", sizes),
		forwarded: counter("forwarded_commands_total", "Commands forwarded to the leader."),
		refusals:  counter("peer_refusals_total", "Connections to the Raft port that were refused, or too many."),
		overLimit: counter("http_connections_over_limit_total", "HTTP connections closed because of too many."),
		dropped:   counter("log_lines_dropped_total", "Lines of the log that could not be written to stderr."),
	}
}

// gauge registers a value that is read at every scrape.
func (m *metrics) gauge(name, help string, value func() float64) {
	m.labelled(name, help, nil, value)
}

// flag registers a value that is 1 while it is true, else 0.
func (m *metrics) flag(name, help string, is func() bool) {
	m.gauge(name, help, func() float64 {
		if is() {
			return 1
		}
		return 0
	})
}

func (m *metrics) labelled(name, help string, labels map[string]string, value func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: metricsPrefix + name, Help: help, ConstLabels: labels,
	}, value))
}

// answered counts a request. A client may send any word as a method: those that no route can have are "other".
func (m *metrics) answered(route, method string, status int, took time.Duration) {
	if !slices.Contains(methods, method) {
		method = "other"
	}
	m.requests.WithLabelValues(route, method, strconv.Itoa(status)).Inc()
	m.latency.WithLabelValues(route, method).Observe(took.Seconds())
}

// handler serves the metrics in Prometheus' text format.
func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}
