package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"kvd/integration/compare/servers"
)

// load is what kvd bench does to a server.
type load struct {
	part    string // for -only
	kind    string // of kvd bench
	clients int
}

var loads = []load{
	{"put", "put", 1}, {"put", "put", 100}, {"put", "put", 1000},
	{"get", "get", 1}, {"get", "get", 100}, {"get", "get", 1000},
	{"sget", "get", 1}, {"sget", "get", 100}, {"sget", "get", 1000},
	{"range", "range", 100}, {"txn", "txn", 100},
}

const (
	putKeys   = 100_000
	rangeKeys = 100

	putPrefix  = "put/"
	readPrefix = "read/"
	txnPrefix  = "txn/"
)

func (l load) key() string { return fmt.Sprintf("%s-%d", l.part, l.clients) }

func (l load) title() string {
	what := map[string]string{
		"put": "put", "get": "linearizable get", "sget": "serializable get", "range": fmt.Sprintf("linearizable range of %d keys", rangeKeys),
		"txn": "compare-and-put",
	}[l.part]
	if l.clients == 1 {
		return what + ", 1 client"
	}
	return fmt.Sprintf("%s, %d clients", what, l.clients)
}

// args are those of kvd bench.
func (l load) args(readKeys int) []string {
	args := []string{"bench", l.kind, "--key-size", strconv.Itoa(keyBytes), "--val-size", strconv.Itoa(valueBytes)}
	switch l.part {
	case "put":
		return append(args, "--prefix", putPrefix, "--keys", strconv.Itoa(putKeys))
	case "txn":
		return append(args, "--prefix", txnPrefix, "--keys", strconv.Itoa(readKeys))
	case "range":
		args = append(args, "--limit", strconv.Itoa(rangeKeys))
	case "sget":
		args = append(args, "--consistency", "s")
	}
	return append(args, "--prefix", readPrefix, "--keys", strconv.Itoa(readKeys), "--skip-load")
}

// loads puts one load after the other on the servers.
func (t *trial) loads(ctx context.Context) error {
	if err := t.prepareLoads(ctx); err != nil {
		return err
	}
	puts := 0
	for _, l := range loads {
		if !t.chosen[l.part] || t.name == floor && l.kind != "put" && l.kind != "get" {
			continue
		}
		sent, err := t.load(ctx, l)
		if err != nil {
			return fmt.Errorf("%s: %w", l.key(), err)
		}
		if l.part == "put" {
			puts += sent
		}
	}
	if t.name == floor {
		return nil
	}
	if err := t.verifyLoads(ctx, puts); err != nil {
		return err
	}
	if t.chosen["tool"] {
		if err := t.tool(ctx); err != nil {
			return err
		}
	}
	return nil
}

// prepareLoads writes what is to be read, and warms up.
func (t *trial) prepareLoads(ctx context.Context) error {
	if t.name == floor {
		return nil
	}
	_, err := t.bench(ctx, "bench", "get", "--key-size", strconv.Itoa(keyBytes), "--val-size", strconv.Itoa(valueBytes),
		"--prefix", readPrefix, "--keys", strconv.Itoa(t.readKeys), "--clients", "100", "--total", "1000",
		"--endpoints", strings.Join(t.cluster.Endpoints(), ","))
	return err
}

// load measures one load and returns how many requests it made. With one client, whether the node it talks to leads
// decides much: it talks to each node in turn, and what counts is the mean.
func (t *trial) load(ctx context.Context, l load) (int, error) {
	endpoints := [][]string{t.cluster.Endpoints()}
	duration := t.o.duration
	if l.clients == 1 {
		endpoints = slices.Collect(slices.Chunk(t.cluster.Endpoints(), 1))
		duration = max(duration/2, duration/time.Duration(len(endpoints)))
	}
	var requests int
	var elapsed, cpu, client, p50, p99, n float64
	for _, some := range endpoints {
		meter := t.startMeter()
		args := append(l.args(t.readKeys), "--duration", duration.String(), "--clients", strconv.Itoa(l.clients),
			"--conns", strconv.Itoa(min(l.clients, maxConns)), "--endpoints", strings.Join(some, ","))
		r, err := t.bench(ctx, args...)
		used, meterErr := meter.between(r.Start, r.Elapsed)
		if err == nil {
			err = r.check(l)
		}
		if err == nil {
			err = meterErr
		}
		if err != nil {
			return requests, err
		}
		o := r.Total
		requests += int(o.Count)
		elapsed, cpu, client = elapsed+r.Elapsed, cpu+used.servers, client+r.ClientCPU
		p50, p99, n = p50+o.Latency.P50/1000, p99+o.Latency.P99/1000, n+1
		t.others = append(t.others, max(0, used.machine-used.servers-r.ClientCPU)/r.Elapsed)
	}
	each := func(seconds float64) float64 { return seconds * 1e6 / float64(requests) }
	t.note(l.key()+"/rate", float64(requests)/elapsed)
	t.note(l.key()+"/p50", p50/n)
	t.note(l.key()+"/p99", p99/n)
	t.note(l.key()+"/cpu", each(cpu))
	t.note(l.key()+"/client", each(client))
	t.tell()
	return requests, nil
}

// benchResult is what is read of kvd bench's JSON.
type benchResult struct {
	Start      time.Time
	Elapsed    float64 `json:"elapsed_seconds"`
	ClientCPU  float64 `json:"client_cpu_seconds"`
	Operations []benchOperation
	Total      benchOperation
}

type benchOperation struct {
	Operation string
	Count     int64
	PerSecond float64 `json:"per_second"`
	Keys      int64
	Failed    int64
	Errors    json.RawMessage
	Latency   struct{ P50, P99 float64 } `json:"latency_us"`
}

// check refuses a result in which not every request was answered as it is to be. kvd bench itself takes a read that
// finds nothing for failed.
func (r benchResult) check(l load) error {
	o := r.Total
	keys := o.Count
	if l.part == "range" {
		keys *= rangeKeys
	}
	switch {
	case o.Failed > 0:
		return fmt.Errorf("%d of %d requests failed: %s", o.Failed, o.Failed+o.Count, o.Errors)
	case o.Count == 0:
		return fmt.Errorf("no request was answered in %.2f s", r.Elapsed)
	case o.Keys != keys:
		return fmt.Errorf("%d requests read or wrote %d keys instead of %d", o.Count, o.Keys, keys)
	}
	return nil
}

func (t *trial) bench(ctx context.Context, args ...string) (benchResult, error) {
	var r benchResult
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, t.binaries[servers.KVD], append(args, "--format", "json")...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("kvd %s: %w\n%s%s", strings.Join(args, " "), err, stderr.Bytes(), out)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("kvd bench prints %.200q: %w", out, err)
	}
	return r, nil
}
