package main

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	raftmetrics "github.com/armon/go-metrics"
	raftsink "github.com/armon/go-metrics/prometheus"
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

// series has the metrics of one method of one route.
type series struct {
	requests *prometheus.CounterVec // by status
	ok       prometheus.Counter     // that of requests for status 200, which most need, without a look-up
	latency  prometheus.Observer
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
func (m *metrics) flag(name, help string, is func() bool) { m.gauge(name, help, zeroOrOne(is)) }

func (m *metrics) labelled(name, help string, labels map[string]string, value func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: metricsPrefix + name, Help: help, ConstLabels: labels,
	}, value))
}

func zeroOrOne(is func() bool) func() float64 {
	return func() float64 {
		if is() {
			return 1
		}
		return 0
	}
}

// collectRaft adds the metrics of the raft and raft-boltdb packages. They know only one sink for the whole process:
// that of armon/go-metrics, unless they are built with the tag hashicorpmetrics.
func (m *metrics) collectRaft() error {
	sink, err := raftsink.NewPrometheusSinkFrom(raftsink.PrometheusOpts{Registerer: m.registry})
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	conf := raftmetrics.DefaultConfig("")
	conf.EnableHostname, conf.EnableRuntimeMetrics = false, false
	_, err = raftmetrics.NewGlobal(conf, sink)
	return err
}

// series makes the counters of one method of a route.
func (m *metrics) series(route, method string) *series {
	requests := m.requests.MustCurryWith(prometheus.Labels{"route": route, "method": method})
	return &series{requests, requests.WithLabelValues("200"), m.latency.WithLabelValues(route, method)}
}

// answered counts a request.
func (s *series) answered(status int, took time.Duration) {
	if status == http.StatusOK {
		s.ok.Inc()
	} else {
		s.requests.WithLabelValues(strconv.Itoa(status)).Inc()
	}
	s.latency.Observe(took.Seconds())
}

// methodLabel returns method if it is a known one, else "other": a client may send any word as a method.
func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete:
		return method
	}
	return "other"
}

// handler serves the metrics in Prometheus' text format.
func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}
