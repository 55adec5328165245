package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestComparesRealServers(t *testing.T) {
	o := options{
		rounds: 1, nodes: 3, total: 300, clients: 10, conns: 10, keySize: 16, keySpace: 100, valueSize: 256,
		shards: 4, replicationFactor: 3, dir: t.TempDir(),
	}
	var out bytes.Buffer
	if err := compare(t.Context(), &out, o); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"round 1  etcd", "round 1  kvd full", "round 1  kvd consistent", "kvd consistent / kvd full"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

const sampleReport = `
Summary:
  Total:	8.1 secs.
  Requests/sec:	6172.8395

Latency distribution:
  10% in 0.0077 secs.
  50% in 0.0134 secs.
  95% in 0.0265 secs.
  99% in 0.0329 secs.
  99.9% in 0.0512 secs.
`

func TestParse(t *testing.T) {
	r, err := parse([]byte(sampleReport))
	if want := (result{perSecond: 6172.8395, p50: 13400 * time.Microsecond, p99: 32900 * time.Microsecond}); err != nil || r != want {
		t.Errorf("%+v, %v", r, err)
	}
	for name, out := range map[string]string{
		"nothing":     "",
		"no latency":  "Requests/sec:\t100.0",
		"failed puts": sampleReport + "\nError distribution:\n  [3]\tetcdserver: request timed out\n",
	} {
		if r, err := parse([]byte(out)); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestReportJudgesRounds(t *testing.T) {
	results := func(rates ...float64) (all []result) {
		for _, rate := range rates {
			all = append(all, result{perSecond: rate, cpu: time.Millisecond})
		}
		return all
	}
	contestants := []*contestant{
		{name: "etcd", puts: results(100, 10), gets: results(1, 1)},
		{name: "full", puts: results(150, 13), gets: results(2, 2)},
		{name: "consistent", puts: results(300, 39), gets: results(3, 3)},
	}
	var out bytes.Buffer
	if err := report(&out, contestants, 1.39); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"full / etcd       1.30    1.40  1.50", "consistent / full       2.00    2.50  3.00", "consistent / full       1.50    1.50  1.50"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if report(&out, contestants, 1.41) == nil {
		t.Error("1.40 passes for 1.41")
	}
}

func TestAtHome(t *testing.T) {
	shard := func(state, leader string) string {
		return `{"shards": [{"state": "ok", "leader": "n1", "target": [{"node": "n1"}, {"node": "n2"}]},
			{"state": "` + state + `", "leader": "` + leader + `", "target": [{"node": "n2"}, {"node": "n1"}]}]}`
	}
	for out, want := range map[string]bool{
		shard("ok", "n2"): true, shard("ok", "n1"): false, shard("moving", "n2"): false, shard("ok", ""): false, `{"shards": []}`: false,
	} {
		if got, err := atHome([]byte(out)); got != want || err != nil {
			t.Errorf("%s: %v, %v", out, got, err)
		}
	}
	if _, err := atHome([]byte("Error")); err == nil {
		t.Error("no error")
	}
}
