package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/bench"
)

func TestBench(t *testing.T) {
	f := startFake(t)
	for line, want := range map[string]string{
		"put --total 20":                                                          "put           20",
		"put --total 20 --rate 10000":                                             "10,000 requests/s due (open loop)",
		"put --total 20 --val-size 0":                                             "values of 0 bytes",
		"get --total 20 --keys 5":                                                 "5 keys were written beforehand",
		"get --total 20 --keys 5 --order zipfian":                                 "5 keys of 16 bytes, zipfian",
		"range --total 20 --keys 5 --limit 3":                                     "range         20",
		"txn --total 20 --keys 5":                                                 "txn           20",
		"mixed --total 20 --keys 5 --shape f":                                     "mixed F (50% read, 50% read-modify-write), linearizable",
		"get --total 20 --keys 5 --format csv":                                    "get,,get,closed,0,100,2,5,16,256,",
		"put --total 20 --clients 3 --conns 2 --key-size 20 --prefix x/ --seed 9": "10,000 keys of 20 bytes, random; values of 256 bytes; seed 9",
	} {
		code, out, errOut := kvd(t, "", append([]string{"bench", "--endpoints", f.addr}, strings.Fields(line)...)...)
		if code != exitOK || errOut != "" || !strings.Contains(out, want) {
			t.Errorf("%s: exit code %d: %s%s", line, code, out, errOut)
		}
	}
}

func TestBenchConsistency(t *testing.T) {
	f := startFake(t)
	for flag, serializable := range map[string]bool{"l": false, "s": true} {
		if code, _, errOut := kvd(t, "", "bench", "get", "--endpoints", f.addr, "--total", "1", "--clients", "1", "--keys", "1", "--consistency", flag); code != exitOK {
			t.Fatal(errOut)
		}
		if r, ok := f.last().(*pb.RangeRequest); !ok || r.GetSerializable() != serializable {
			t.Errorf("--consistency %s asks for %v", flag, f.last())
		}
	}
}

func TestBenchJSON(t *testing.T) {
	f := startFake(t)
	for _, flags := range []string{"--format json", "-w json"} {
		args := append([]string{"bench", "put", "--endpoints", "http://" + f.addr, "--total", "20", "--warmup", "10ms"}, strings.Fields(flags)...)
		code, out, errOut := kvd(t, "", args...)
		var report bench.Report
		if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitOK {
			t.Fatalf("%v, exit code %d: %s%s", err, code, out, errOut)
		}
		if report.Workload != "put" || report.Operations[0].Count != 20 || report.Clients != 100 || report.Endpoints[0] != f.addr || report.WarmupSecond != 0.01 {
			t.Errorf("%+v", report)
		}
	}
}

func TestBenchTimeline(t *testing.T) {
	f := startFake(t)
	file := filepath.Join(t.TempDir(), "timeline.csv")
	if code, _, errOut := kvd(t, "", "bench", "put", "--endpoints", f.addr, "--total", "20", "--timeline", file, "--interval", "1ms"); code != exitOK {
		t.Fatal(errOut)
	}
	data, err := os.ReadFile(file)
	if err != nil || !strings.HasPrefix(string(data), "at_seconds,count,failed,p50_us,p99_us,max_us\n0,") {
		t.Errorf("%v: %s", err, data)
	}
}

func TestBenchFails(t *testing.T) {
	healthy, failing, dead := startFake(t), startFake(t), deadAddress(t)
	failing.fail = rpctypes.ErrGRPCCompacted
	for _, c := range []struct {
		line string
		code int
		says string
	}{
		{"put --total 5 --endpoints " + failing.addr, exitFailed, "no request succeeded: etcdserver: mvcc: required revision has been compacted (OutOfRange)"},
		{"get --total 5 --keys 5 --endpoints " + failing.addr, exitFailed, "load keys: 5 of 5 keys: etcdserver: mvcc: required revision has been compacted"},
		{"watch --total 5 --endpoints " + healthy.addr, exitFailed, "this server offers no watches"},
		{"put --total 5 --endpoints " + healthy.addr + "," + dead, exitUnavailable, dead + " connection refused"},
		{"put --total 5 --timeline /nonexistent/file --endpoints " + healthy.addr, exitFailed, "no such file"},
		{"put --clients 0", exitUsage, "--clients must be at least 1"},
		{"put --clients 1000000", exitUsage, "clients must be from 1 to 100000, not 1000000"},
		{"put --clients x", exitUsage, "--clients"},
		{"put --keys -4", exitUsage, "--keys must be at least 1"},
		{"put --rate -1", exitUsage, "the rate must be above 0"},
		{"put --duration 0s", exitUsage, "must be above 0"},
		{"put --total 0", exitUsage, "must be above 0"},
		{"put --val-size -1", exitUsage, "--val-size must not be below 0"},
		{"put --val-size 9999999", exitUsage, "the value size must be from 0 to 1048576"},
		{"put --key-size 5", exitUsage, "the key size must be from 10 to 4096, not 5"},
		{"put --prefix=", exitUsage, "--prefix must not be empty"},
		{"put --interval 0s", exitUsage, "--interval must be above 0"},
		{"put --format xml", exitUsage, `--format: "xml" is not a format: use table, json or csv`},
		{"put --order up", exitUsage, `"up" is no order of keys`},
		{"put surplus", exitUsage, "wants no arguments"},
		{"get --consistency x", exitUsage, "neither l nor s"},
		{"range --limit 0", exitUsage, "--limit must be at least 1"},
		{"mixed --shape Q", exitUsage, `"Q" is no shape`},
		{"watch --watchers 0", exitUsage, "--watchers must be at least 1"},
		{"watch --val-size 4", exitUsage, "at least 16 bytes"},
		{"swim", exitUsage, "unknown command"},
	} {
		code, out, errOut := kvd(t, "", append([]string{"bench"}, strings.Fields(c.line)...)...)
		if code != c.code || !strings.Contains(errOut, c.says) || strings.Count(errOut, "\n") != 1 || code == exitUsage && out != "" {
			t.Errorf("bench %s: exit code %d, want %d: %s%s", c.line, code, c.code, out, errOut)
		}
	}
}

// Ctrl-C ends the load, not the report of it.
func TestBenchInterrupted(t *testing.T) {
	f := startFake(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-f.asked
		cancel()
	}()
	code, out, errOut := kvdUntil(ctx, "", "bench", "put", "--duration", "1h", "--endpoints", f.addr)
	if code != exitInterrupted || !strings.Contains(out, "OPERATION") || !strings.Contains(errOut, "interrupted: the figures are of what was measured until then") {
		t.Errorf("exit code %d: %s%s", code, out, errOut)
	}
}

func TestBenchProgressLine(t *testing.T) {
	for want, p := range map[string]bench.Progress{
		"measure    [###############...............]  50%  5s  1234 ops/s":         {Phase: "run", Elapsed: 5 * time.Second, Duration: 10 * time.Second, PerSecond: 1234},
		"write keys [######........................]  20%  1s  0 ops/s  10 failed": {Phase: "load", Done: 190, Errors: 10, Total: 1000, Elapsed: time.Second},
		"warm up    [##############################] 100%  11s  0 ops/s":           {Phase: "warmup", Elapsed: 11 * time.Second, Duration: 10 * time.Second},
		"measure    [###########################...]  90%  1s  0 ops/s":            {Phase: "run", Done: 9, Total: 10, Elapsed: time.Second, Duration: time.Minute},
	} {
		if got := benchLine(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestBenchTLS(t *testing.T) {
	for endpoint, want := range map[string]bool{"n1:2379": false, "http://n1:2379": false, "https://n1:2379": true} {
		o := clientOptions{endpoints: []string{endpoint}, dialTimeout: time.Second, commandTimeout: time.Second}
		o.secure.InsecureTransport = true
		cfg, err := o.tls()
		if err != nil || (cfg != nil) != want {
			t.Errorf("%s: %v, %v", endpoint, cfg, err)
		}
	}
	o := clientOptions{endpoints: []string{"n1:2379"}}
	o.secure.Cacert = "/nonexistent/file"
	if _, err := o.tls(); err == nil {
		t.Error("a missing file of --cacert is not seen")
	}
}
