package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestComparesRealServers(t *testing.T) {
	o := options{rounds: 1, nodes: 3, total: 300, clients: 10, conns: 10, keySize: 16, keySpace: 100, valueSize: 256, dir: t.TempDir()}
	var out bytes.Buffer
	if err := compare(t.Context(), &out, o); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"round 1  etcd", "round 1  kvd", "kvd/etcd"} {
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
	if err != nil || r.putsPerSecond != 6172.8395 || r.latencies[0] != "0.0134" || r.latencies[1] != "0.0329" {
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
	etcd := &contestant{name: "etcd", results: []result{{putsPerSecond: 100, cpuPerPut: time.Millisecond}, {putsPerSecond: 10, cpuPerPut: time.Millisecond}}}
	kvd := &contestant{name: "kvd", results: []result{{putsPerSecond: 150, cpuPerPut: time.Millisecond}, {putsPerSecond: 13, cpuPerPut: time.Millisecond}}}
	var out bytes.Buffer
	if err := report(&out, etcd, kvd, 1.39); err != nil || !strings.Contains(out.String(), "1.30    1.40  1.50") {
		t.Errorf("%v\n%s", err, out.String())
	}
	if report(&out, etcd, kvd, 1.41) == nil {
		t.Error("1.40 passes for 1.41")
	}
}
