package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"runtime"

	"github.com/livekit/protocol/utils/hwstats"
	"github.com/prometheus/client_golang/prometheus"
)

const pulseClientsOfChrome = 4

// Metrics under upstream's names ("pipline" is its spelling).
type metrics struct {
	requests *prometheus.GaugeVec
	results  *prometheus.CounterVec
	uploads  *prometheus.CounterVec
	times    *prometheus.HistogramVec
	backups  *prometheus.CounterVec
	load     prometheus.Gauge
	ratio    *prometheus.GaugeVec
	memory   prometheus.Gauge
}

func newMetrics(s *service) *metrics {
	labels := prometheus.Labels{"node_id": s.node, "cluster_id": s.conf.ClusterID}
	options := func(subsystem, name, help string) prometheus.Opts {
		return prometheus.Opts{
			Namespace: "livekit", Subsystem: subsystem, Name: name, Help: help, ConstLabels: labels,
		}
	}
	gauge := func(name string, value func() bool) {
		prometheus.MustRegister(prometheus.NewGaugeFunc(
			prometheus.GaugeOpts(options("egress", name, "")), func() float64 {
				if value() {
					return 1
				}
				return 0
			}))
	}
	gauge("available", func() bool { return s.available() == s.cpus })
	gauge("is_disabled", s.disabled)
	gauge("is_terminating", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.terminating })
	gauge("can_accept_request", func() bool {
		clients, err := pulseClients()
		return err == nil && clients+pulseClientsOfChrome <= s.conf.CPUCost.MaxPulseClients &&
			!s.disabled() && s.available() >= s.conf.CPUCost.Web
	})
	gauge("pulse_sinks", func() bool { return false }) // Chrome's; there is none
	gauge("cgroup_read_success", func() bool { return false })
	gauge("cgroup_memory_bytes", func() bool { return false })
	gauge("would_reject_cgroup", func() bool { return false })
	node := options("node", "cpu_load", "")
	node.ConstLabels = prometheus.Labels{
		"node_id": s.node, "cluster_id": s.conf.ClusterID, "node_type": "EGRESS",
	}
	kinds := []string{"type", "status", "custom_endpoint"}
	m := &metrics{
		load: prometheus.NewGauge(prometheus.GaugeOpts(node)),
		requests: prometheus.NewGaugeVec(
			prometheus.GaugeOpts(options("egress", "requests", "")), []string{"type"}),
		memory: prometheus.NewGauge(prometheus.GaugeOpts(
			options("egress", "proc_rss_bytes", "Per-process RSS sum in bytes"))),
		ratio: prometheus.NewGaugeVec(prometheus.GaugeOpts(
			options("", "load_ratio", "Per-resource utilization ratio")), []string{"type"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts(options("egress",
			"handler_results_total", "Handler outcomes, by result")), []string{"type", "result"}),
		uploads: prometheus.NewCounterVec(prometheus.CounterOpts(
			options("egress", "pipeline_uploads", "Uploads, by type and status")), kinds),
		times: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "livekit", Subsystem: "egress", Name: "pipline_upload_response_time_ms",
			Help: "Latencies of uploads in milliseconds", ConstLabels: labels,
			Buckets: []float64{10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 15000, 20000, 30000},
		}, kinds),
		backups: prometheus.NewCounterVec(prometheus.CounterOpts(options("egress",
			"backup_storage_writes", "Writes to the backup storage")), []string{"output_type"}),
	}
	prometheus.MustRegister(
		m.load, m.requests, m.memory, m.ratio, m.results, m.uploads, m.times, m.backups)
	return m
}

func (m *metrics) measured(stats *hwstats.ProcStats) {
	total := 0
	for _, each := range stats.Memory {
		total += each.Total
	}
	m.memory.Set(float64(total))
	load := 1 - stats.CpuIdle/float64(runtime.NumCPU())
	m.load.Set(load)
	m.ratio.WithLabelValues("cpu").Set(load)
}

func (m *metrics) uploaded(u *upload) {
	labels := prometheus.Labels{"type": u.Type, "status": u.Status, "custom_endpoint": "false"}
	if u.Endpoint {
		labels["custom_endpoint"] = "true"
	}
	if u.Backup {
		if u.Status == "success" {
			m.backups.WithLabelValues(u.Type).Inc()
		}
		return
	}
	m.uploads.With(labels).Inc()
	m.times.With(labels).Observe(u.Milliseconds)
}

// The number of pulseaudio's clients; an error where it is dead.
func pulseClients() (int, error) {
	var out, words bytes.Buffer
	command := exec.Command("pactl", "--format", "json", "list")
	command.Stdout, command.Stderr = &out, &words
	if err := command.Run(); err != nil {
		return 0, errors.Join(err, errors.New(words.String()))
	}
	var found struct{ Clients []any }
	if err := json.Unmarshal(out.Bytes(), &found); err != nil {
		return 0, err
	}
	return len(found.Clients), nil
}
