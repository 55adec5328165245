package shard_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"kvd/fsm"
	"kvd/shard"
	"kvd/shard/raftlog"
	"kvd/transport"
)

// BenchmarkIdleGroups measures what groups cost that nobody uses: three nodes
// in this process, over TCP, with their files on disk. The figures are of all
// three nodes together, except goroutines and memory, which are of each.
//
//	go test -run - -bench IdleGroups -benchtime 1x ./shard
func BenchmarkIdleGroups(b *testing.B) {
	for _, groups := range []int{64, 256} {
		b.Run(fmt.Sprint(groups), func(b *testing.B) {
			before := sample(nil)
			h := startHost(b, 3, groups)
			h.awaitLeaders(b)
			const settle, measure = 5 * time.Second, 20 * time.Second
			time.Sleep(settle)
			start := sample(h.registry)
			for b.Loop() {
				time.Sleep(measure)
			}
			end := sample(h.registry)
			seconds := end.at.Sub(start.at).Seconds()
			b.ReportMetric(100*(end.cpu-start.cpu).Seconds()/seconds, "%cpu")
			b.ReportMetric((end.frames-start.frames)/seconds, "messages/s")
			b.ReportMetric((end.switches-start.switches)/seconds, "switches/s")
			b.ReportMetric(float64(end.goroutines-before.goroutines)/3, "goroutines/node")
			b.ReportMetric(float64(end.memory-before.memory)/3/(1<<20), "MiB/node")
		})
	}
}

// host is a few nodes in one process.
type host struct {
	registry *prometheus.Registry // of the transports
	replicas [][]*shard.Replica   // by group
}

func startHost(tb testing.TB, nodes, groups int) *host {
	h := &host{registry: prometheus.NewRegistry(), replicas: make([][]*shard.Replica, groups)}
	listeners := make(map[string]net.Listener)
	for i := range nodes {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		listeners[fmt.Sprint("n", i)] = l
	}
	var founders raft.Configuration
	for name := range listeners {
		id := name + "/1"
		founders.Servers = append(founders.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
	}
	dir := tb.TempDir()
	for name, l := range listeners {
		var dialer net.Dialer
		node, err := transport.New(transport.Config{
			Identity: func() transport.Peer { return transport.Peer{ClusterID: 7, Node: name, Incarnation: 1} },
			Listener: l,
			Dial: func(ctx context.Context, addr string) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", addr)
			},
			Resolve: func(node string) (string, bool) {
				l, ok := listeners[node]
				if !ok {
					return "", false
				}
				return l.Addr().String(), true
			},
			Registerer: prometheus.WrapRegistererWith(prometheus.Labels{"node": name}, h.registry),
		})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = node.Close() })
		metrics := prometheus.NewRegistry()
		for g := range groups {
			h.replicas[g] = append(h.replicas[g], openOn(tb, node, metrics, filepath.Join(dir, name), uint64(g+1), name, founders))
		}
	}
	tb.Cleanup(func() {
		for _, group := range h.replicas {
			for _, r := range group {
				_ = r.Close()
			}
		}
	})
	return h
}

func openOn(tb testing.TB, node *transport.Transport, metrics *prometheus.Registry, dir string, group uint64, name string, founders raft.Configuration) *shard.Replica {
	id := raft.ServerID(name + "/1")
	dir = filepath.Join(dir, fmt.Sprint(group))
	r, err := shard.Open(shard.Config{
		Group: group, ClusterID: 7, Replica: id, Dir: dir, Bootstrap: &founders,
		NewTransport: func(install shard.InstallFunc) (shard.Transport, error) {
			return node.Group(group, raft.ServerAddress(id), transport.InstallFunc(install))
		},
		OpenLog: func(guard func() uint64) (shard.LogStore, error) {
			return raftlog.Open(raftlog.Options{
				Path: filepath.Join(dir, "raft.db"), Guard: guard, CacheBytes: 1 << 20, NoSync: true,
				Registerer: shard.WithGroup(metrics, group, id),
			})
		},
		State:      fsm.Config{NoSync: true},
		Registerer: metrics,
		OnFatal:    func(err error) { tb.Error(err) },
	})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// awaitLeaders waits until every group serves.
func (h *host) awaitLeaders(tb testing.TB) {
	deadline := time.Now().Add(time.Minute)
	for g, group := range h.replicas {
		for {
			serving := false
			for _, r := range group {
				serving = serving || r.Serving()
			}
			if serving {
				break
			}
			if time.Now().After(deadline) {
				tb.Fatalf("group %d has no leader", g+1)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// usage is what the process has used so far, or uses now.
type usage struct {
	at         time.Time
	cpu        time.Duration
	switches   float64 // of the kernel, between threads
	frames     float64 // sent by all nodes
	goroutines int
	memory     uint64 // bytes of heap and stacks
}

func sample(registry *prometheus.Registry) usage {
	runtime.GC()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u := usage{
		at: time.Now(), cpu: time.Duration(r.Utime.Nano() + r.Stime.Nano()), switches: float64(r.Nvcsw + r.Nivcsw),
		goroutines: runtime.NumGoroutine(), memory: m.HeapInuse + m.StackInuse,
	}
	if registry == nil {
		return u
	}
	families, err := registry.Gather()
	if err != nil {
		panic(err)
	}
	for _, f := range families {
		if f.GetName() == "kvd_transport_peer_frames_total" {
			for _, m := range f.GetMetric() {
				if label(m, "direction") == "out" {
					u.frames += m.GetCounter().GetValue()
				}
			}
		}
	}
	return u
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}
