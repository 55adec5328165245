package transport

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// gathered returns the sum of all series of each metric, by name.
func gathered(t *testing.T, r *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string]float64{}
	for _, f := range families {
		sums[f.GetName()] += 0
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "/" + l.GetValue()
			}
			sums[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sums
}

func TestMetrics(t *testing.T) {
	net := newTestNet(t, true)
	ra, rb := prometheus.NewRegistry(), prometheus.NewRegistry()
	a := net.start("a", func(c *Config) { c.Registerer = ra })
	b := net.start("b", func(c *Config) { c.Registerer = rb })
	b.Handle("echo", echo)
	for range 10 {
		if _, err := a.Call(t.Context(), "b", "echo", make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = a.Call(t.Context(), "c", "echo", nil)
	net.dialAs(t, "stranger", "b", purposePeer) // its address is not known
	eventually(t, "the stranger is counted", func() bool {
		_, ok := gathered(t, rb)["kvd_transport_peer_bytes_total/in/other"]
		return ok
	})
	got := gathered(t, ra)
	for name, want := range map[string]float64{
		"kvd_transport_peer_frames_total/in/b":  10,
		"kvd_transport_peer_frames_total/out/b": 10,
		"kvd_transport_connected_peers":         1,
		"kvd_transport_calls_in_flight":         0,
		"kvd_transport_call_duration_seconds":   11,
		"kvd_transport_queue_bytes/b":           0,
		"kvd_transport_handlers_running":        0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (there: %v), want %v", name, v, ok, want)
		}
	}
	for _, name := range []string{"kvd_transport_peer_bytes_total/in/b", "kvd_transport_peer_bytes_total/out/b"} {
		if got[name] < 10_000 {
			t.Errorf("%s is %v after 10 KB", name, got[name])
		}
	}
	if v := gathered(t, rb)["kvd_transport_peer_frames_total/in/a"]; v != 10 {
		t.Errorf("b counts %v frames from a", v)
	}
	conf := net.config("a2")
	conf.Registerer = ra
	if _, err := New(conf); err == nil {
		t.Error("two transports share a registerer")
	}
	if v := gathered(t, ra)["kvd_transport_connected_peers"]; v != 1 {
		t.Error("the refused transport took the first one's metrics away")
	}
	_ = a.Close()
	if left := gathered(t, ra); len(left) != 0 {
		t.Errorf("after Close: %v", left)
	}
}

func TestConfigIsChecked(t *testing.T) {
	net := newTestNet(t, true)
	for name, tweak := range map[string]func(*Config){
		"no identity":      func(c *Config) { c.Identity = nil },
		"no dial":          func(c *Config) { c.Dial = nil },
		"negative bound":   func(c *Config) { c.QueueBytes = -1 },
		"negative timeout": func(c *Config) { c.RPCTimeout = -1 },
		"retries":          func(c *Config) { c.RetryMin = c.RetryMax + 1<<40 },
		"silence":          func(c *Config) { c.SilenceTimeout = c.PingAfter + 1 },
		"append":           func(c *Config) { c.MaxAppendBytes, c.MaxMessageBytes = 2<<20, 1<<20 },
		"node name":        func(c *Config) { c.Identity = func() Peer { return Peer{Node: "a/b"} } },
	} {
		conf := net.config(name)
		tweak(&conf)
		if _, err := New(conf); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := conf.Listener.Accept(); err == nil {
			t.Errorf("%s: the listener is still open", name)
		}
	}
	conf := net.config("good")
	if err := conf.Validate(); err != nil {
		t.Error(err)
	}
	_ = conf.Listener.Close()
}
