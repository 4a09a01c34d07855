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
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics counts and times what a node does. No label ever holds a key, a value, or anything else that a client made up.
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

// series count the requests of one method to one route.
type series struct {
	requests *prometheus.CounterVec // by status
	ok       prometheus.Counter     // of requests, that for 200: most need no look-up
	latency  prometheus.Observer
}

func newMetrics() *metrics {
	sizes := prometheus.ExponentialBuckets(1, 2, 12)
	times := prometheus.ExponentialBuckets(0.0001, 2, 18) // 0.1 ms to 13 s
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "raftstarter_" + name, Help: help, Buckets: buckets})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "raftstarter_" + name, Help: help})
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "raftstarter_http_requests_total", Help: "HTTP requests answered.",
		}, []string{"route", "method", "status"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "raftstarter_http_request_duration_seconds", Help: "From a request's header to its answer.", Buckets: times,
		}, []string{"route", "method"}),
		leaderChanges: counter("leader_changes_total", "How often this node heard of another leader than before."),
		commit:        histogram("commit_duration_seconds", "On the leader, from appending a log entry until it is executed.", times),
		apply:         histogram("apply_duration_seconds", "Executing the commands of one log entry.", times),
		stored:        histogram("log_store_duration_seconds", "With boltdb, storing log entries until they are on the disk (fsync).", times),
		batch:         histogram("entry_commands", "Commands in one log entry, as it is executed.", sizes),
		round:         histogram("read_round_reads", "Linearizable reads that shared one confirmation round.", sizes),
		forwarded:     counter("forwarded_commands_total", "Commands passed on to the leader."),
		refusals:      counter("peer_refusals_total", "Connections to the Raft port that were refused, or too many."),
		overLimit:     counter("http_connections_over_limit_total", "Connections to the HTTP port closed because there were too many."),
		dropped:       counter("log_lines_dropped_total", "Lines of the log that stderr did not take in time, or at all."),
	}
	m.registry.MustRegister(m.requests, m.latency, m.leaderChanges, m.commit, m.apply, m.stored, m.batch, m.round, m.forwarded, m.refusals, m.overLimit, m.dropped,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// gauge registers a value that is asked for whenever the metrics are.
func (m *metrics) gauge(name, help string, value func() float64) {
	m.labelled(name, help, nil, value)
}

// flag registers a value that is 1 while it is true, else 0.
func (m *metrics) flag(name, help string, is func() bool) { m.gauge(name, help, zeroOrOne(is)) }

func (m *metrics) labelled(name, help string, labels map[string]string, value func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "raftstarter_" + name, Help: help, ConstLabels: labels,
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

// collectRaft makes the metrics of the raft and raft-boltdb packages part of these. The packages know only one sink for
// the whole process: that of armon/go-metrics, unless they are built with the tag hashicorpmetrics.
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

// answered takes note of a request.
func (s *series) answered(status int, took time.Duration) {
	if status == http.StatusOK {
		s.ok.Inc()
	} else {
		s.requests.WithLabelValues(strconv.Itoa(status)).Inc()
	}
	s.latency.Observe(took.Seconds())
}

// methodLabel returns a method, if it is known: only then it may become a label.
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
