package server

import (
	"context"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// callMetrics count the calls of clients under the names that dashboards for gRPC expect. The counters of each method
// are looked up once, not with every call.
type callMetrics struct {
	started, handled, received, sent *prometheus.CounterVec
	seconds                          *prometheus.HistogramVec
	methods                          map[string]*methodMetrics // by path; complete before anything is served
}

type methodMetrics struct {
	started, received, sent prometheus.Counter
	handled                 [lastCode + 1]prometheus.Counter
	seconds                 prometheus.Observer
}

const lastCode = codes.Unauthenticated

func newCallMetrics() *callMetrics {
	labels := []string{"grpc_type", "grpc_service", "grpc_method"}
	counter := func(name, help string, more ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "grpc_server_" + name, Help: help}, append(labels[:3:3], more...))
	}
	return &callMetrics{
		started:  counter("started_total", "Total number of RPCs started on the server."),
		handled:  counter("handled_total", "Total number of RPCs completed on the server, regardless of success or failure.", "grpc_code"),
		received: counter("msg_received_total", "Total number of RPC stream messages received on the server."),
		sent:     counter("msg_sent_total", "Total number of gRPC stream messages sent by the server."),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "grpc_server_handling_seconds", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15),
			Help: "Histogram of response latency (seconds) of gRPC that had been application-level handled by the server.",
		}, labels),
		methods: make(map[string]*methodMetrics),
	}
}

func (m *callMetrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.started, m.handled, m.received, m.sent, m.seconds}
}

// add makes the counters of a server's methods.
func (m *callMetrics) add(server *grpc.Server) {
	for service, info := range server.GetServiceInfo() {
		for _, method := range info.Methods {
			kind := "unary"
			switch {
			case method.IsClientStream && method.IsServerStream:
				kind = "bidi_stream"
			case method.IsClientStream:
				kind = "client_stream"
			case method.IsServerStream:
				kind = "server_stream"
			}
			labels := []string{kind, service, method.Name}
			of := &methodMetrics{
				started: m.started.WithLabelValues(labels...), received: m.received.WithLabelValues(labels...),
				sent: m.sent.WithLabelValues(labels...), seconds: m.seconds.WithLabelValues(labels...),
			}
			for c := range of.handled {
				of.handled[c] = m.handled.WithLabelValues(append(labels[:3:3], codes.Code(c).String())...)
			}
			m.methods["/"+service+"/"+method.Name] = of
		}
	}
}

// of is nil for methods that no service has.
func (m *callMetrics) of(path string) *methodMetrics {
	if of, ok := m.methods[path]; ok {
		return of
	}
	return m.methods["/"+strings.TrimPrefix(path, "/")]
}

// ended counts a call's end.
func (m *methodMetrics) ended(start time.Time, err error) {
	m.handled[min(codeOfStatus(err), lastCode)].Inc()
	m.seconds.Observe(time.Since(start).Seconds())
}

func codeOfStatus(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	return status.Convert(err).Code()
}

func (m *callMetrics) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	of := m.of(info.FullMethod)
	if of == nil {
		return handle(ctx, request)
	}
	start := time.Now()
	of.started.Inc()
	of.received.Inc()
	response, err := handle(ctx, request)
	if err == nil {
		of.sent.Inc()
	}
	of.ended(start, err)
	return response, err
}

func (m *callMetrics) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	of := m.of(info.FullMethod)
	if of == nil {
		return handle(server, stream)
	}
	start := time.Now()
	of.started.Inc()
	err := handle(server, &countedStream{ServerStream: stream, of: of})
	of.ended(start, err)
	return err
}

// countedStream counts messages.
type countedStream struct {
	grpc.ServerStream
	of *methodMetrics
}

func (s *countedStream) SendMsg(m any) error {
	err := s.ServerStream.SendMsg(m)
	if err == nil {
		s.of.sent.Inc()
	}
	return err
}

func (s *countedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.of.received.Inc()
	}
	return err
}
