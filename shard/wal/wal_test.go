package wal

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"kvd/shard/raftlog/raftlogtest"
)

const testSegmentBytes = 64 << 10

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func open(tb testing.TB, o Options) *Log {
	tb.Helper()
	l, err := Open(o)
	must(tb, err)
	return l
}

func openReplica(tb testing.TB, l *Log, id ID, o ReplicaOptions) *Store {
	tb.Helper()
	if err := l.Create(id); err != nil && !errors.Is(err, ErrExists) {
		tb.Fatal(err)
	}
	s, err := l.Replica(id, o)
	must(tb, err)
	return s
}

// both is a Store whose Log closes with it.
type both struct {
	*Store
	tb  testing.TB
	log *Log
}

func (b both) Close() error {
	err := errors.Join(b.Store.Close(), b.log.Close())
	checkFiles(b.tb, b.log.options)
	return err
}

// checkFiles reads what is on the disk once more.
func checkFiles(tb testing.TB, o Options) {
	tb.Helper()
	o.Registerer = nil
	l, err := Open(o)
	if errors.Is(err, ErrLocked) {
		return
	}
	must(tb, err)
	must(tb, l.Close())
}

func TestConformance(t *testing.T) {
	for name, cacheBytes := range map[string]int{"cached": 0, "small cache": 2000, "uncached": -1} {
		t.Run(name, func(t *testing.T) {
			raftlogtest.Run(t, func(tb testing.TB, dir string, guard func() uint64) raftlogtest.Store {
				l := open(tb, Options{Dir: filepath.Join(dir, "log"), SegmentBytes: testSegmentBytes, NoSync: true})
				return both{openReplica(tb, l, ID{1, 1}, ReplicaOptions{Guard: guard, CacheBytes: cacheBytes}), tb, l}
			}, raftlogtest.Errors{Gap: ErrGap, Guarded: ErrGuarded})
		})
	}
}

func value(tb testing.TB, c prometheus.Metric) float64 {
	tb.Helper()
	var m dto.Metric
	must(tb, c.Write(&m))
	return m.GetCounter().GetValue()
}
