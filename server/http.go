package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.etcd.io/etcd/api/v3/version"
)

const (
	httpHeaderTimeout = 10 * time.Second
	httpIdleTimeout   = 2 * time.Minute
	httpHeaderBytes   = 64 << 10
)

func (s *Server) newHTTP() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", s.serveHealth)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) { s.serveChecks(w, r, nil) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { s.serveChecks(w, r, s.readiness()) })
	mux.HandleFunc("GET /version", s.serveVersion)
	mux.Handle("/v3/", s.gateway.handler)
	if s.cfg.Gatherer != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(s.cfg.Gatherer, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	}
	if s.cfg.Pprof {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: httpHeaderTimeout,
		IdleTimeout:       httpIdleTimeout,
		MaxHeaderBytes:    httpHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug),
	}
}

// serveHealth answers in etcd's form. With ?serializable=true it asks for this
// node's health instead of the cluster's.
func (s *Server) serveHealth(w http.ResponseWriter, r *http.Request) {
	answer := struct {
		Health string `json:"health"`
		Reason string `json:"reason"`
	}{Health: "true"}
	status := http.StatusOK
	if reason := s.unhealthy(r.Context(), r.URL.Query().Get("serializable") == "true"); reason != "" {
		answer.Health, answer.Reason = "false", reason
		status = http.StatusServiceUnavailable
		s.metrics.httpFailed.Inc()
	} else {
		s.metrics.httpHealthy.Inc()
	}
	writeJSON(w, status, answer)
}

// unhealthy says why the cluster, or only this node, does not serve; empty if
// it does.
func (s *Server) unhealthy(ctx context.Context, serializable bool) string {
	replica := s.cfg.Replica(userGroup)
	if !serializable && (replica == nil || replica.Leader().Node == "") {
		return "RAFT NO LEADER"
	}
	if err := s.readCheck(ctx, serializable); err != nil {
		return fmt.Sprintf("RANGE ERROR:%s", err)
	}
	return ""
}

func (s *Server) readCheck(ctx context.Context, serializable bool) error {
	_, release, err := s.router.acquire(ctx, userGroup, serializable)
	if err == nil {
		release()
	}
	return err
}

// check is one of the conditions of an endpoint.
type check struct {
	name string
	run  func(context.Context) error
}

func (s *Server) readiness() []check {
	return []check{
		{"serving", func(context.Context) error { return s.servingError() }},
		{"serializable_read", func(ctx context.Context) error { return s.readCheck(ctx, true) }},
		{"linearizable_read", func(ctx context.Context) error { return s.readCheck(ctx, false) }},
	}
}

// serveChecks answers 200 if all checks hold, else 503 with each one's result.
func (s *Server) serveChecks(w http.ResponseWriter, r *http.Request, checks []check) {
	var report strings.Builder
	failed := false
	for _, c := range checks {
		if err := c.run(r.Context()); err != nil {
			failed = true
			fmt.Fprintf(&report, "[-]%s failed: %v\n", c.name, err)
			continue
		}
		fmt.Fprintf(&report, "[+]%s ok\n", c.name)
	}
	if failed {
		http.Error(w, report.String(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.URL.Query().Has("verbose") {
		fmt.Fprint(w, report.String())
	}
	fmt.Fprintln(w, "ok")
}

// serveVersion tells the etcd versions that kvd stands in for, and its own.
func (s *Server) serveVersion(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, struct {
		version.Versions
		KVD string `json:"kvd,omitempty"`
	}{version.Versions{Server: version.Version, Cluster: storageVersion, Storage: storageVersion}, s.cfg.Version})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that has gone is no failure
}
