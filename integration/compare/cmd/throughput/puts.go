package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// benchmarkPuts has the benchmark tool put random keys.
func benchmarkPuts(ctx context.Context, tool string, endpoints []string, o options) (result, error) {
	cmd := exec.CommandContext(ctx, tool, "put",
		"--endpoints", strings.Join(endpoints, ","),
		"--clients", strconv.Itoa(o.clients), "--conns", strconv.Itoa(o.conns),
		"--total", strconv.Itoa(o.total), "--key-size", strconv.Itoa(o.keySize),
		"--key-space-size", strconv.Itoa(o.keySpace), "--val-size", strconv.Itoa(o.valueSize))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return result{}, fmt.Errorf("benchmark: %w\n%s", err, stderr.Bytes())
	}
	return parse(stdout.Bytes())
}

var (
	rateLine    = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	latencyLine = regexp.MustCompile(`(50|99)% in ([0-9.]+) secs`)
)

// parse reads the benchmark tool's report.
func parse(out []byte) (result, error) {
	if bytes.Contains(out, []byte("Error distribution:")) {
		return result{}, fmt.Errorf("some puts failed:\n%s", out)
	}
	rate, latencies := rateLine.FindSubmatch(out), latencyLine.FindAllSubmatch(out, -1)
	if rate == nil || len(latencies) != 2 {
		return result{}, fmt.Errorf("not a report of the benchmark tool:\n%s", out)
	}
	perSecond, err := strconv.ParseFloat(string(rate[1]), 64)
	p50, err50 := time.ParseDuration(string(latencies[0][2]) + "s")
	p99, err99 := time.ParseDuration(string(latencies[1][2]) + "s")
	return result{perSecond: perSecond, p50: p50, p99: p99}, errors.Join(err, err50, err99)
}

// verify checks that every put has been applied: each makes one revision, and a fresh store is at revision 1. It returns
// all keys.
func verify(ctx context.Context, endpoint string, puts int, gaps bool) ([][]byte, error) {
	conn, err := dial(endpoint)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	response, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, KeysOnly: true})
	if err != nil {
		return nil, err
	}
	if revision, want := response.Header.Revision, int64(puts)+1; revision < want || revision > want && !gaps {
		return nil, fmt.Errorf("revision %d after %d puts", revision, puts)
	}
	var keys [][]byte
	written := int64(0)
	for _, kv := range response.Kvs {
		keys, written = append(keys, kv.Key), written+kv.Version
	}
	if written != int64(puts) {
		return nil, fmt.Errorf("%d puts of %d are there", written, puts)
	}
	return keys, nil
}
