package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"kvd/integration/compare/servers"
)

const toolClients = 100

// tool has etcd's own benchmark measure puts, and reads of one key, as a second opinion. It takes about as long for them
// as kvd bench did.
func (t *trial) tool(ctx context.Context) error {
	readKey := fmt.Sprintf("%s%0*d", readPrefix, keyBytes-len(readPrefix), 0) // as kvd bench names its first
	for _, part := range []struct {
		row, like string
		args      []string
	}{
		{"tool-put/rate", "put-100/rate", []string{
			"put", "--key-size", strconv.Itoa(keyBytes), "--val-size", strconv.Itoa(valueBytes),
			"--key-space-size", strconv.Itoa(putKeys),
		}},
		{"tool-range/rate", "get-100/rate", []string{"range", readKey, "--consistency", "l"}},
	} {
		total := 1000
		if like, ok := t.figures[part.like][t.name][t.round]; ok {
			total = max(total, int(like*t.o.duration.Seconds()))
		}
		rate, err := t.benchmark(ctx, append(part.args, "--total", strconv.Itoa(total))...)
		if err != nil {
			return err
		}
		t.note(part.row, rate)
	}
	return nil
}

func (t *trial) benchmark(ctx context.Context, args ...string) (float64, error) {
	args = append(args, "--endpoints", strings.Join(t.cluster.Endpoints(), ","),
		"--clients", strconv.Itoa(toolClients), "--conns", strconv.Itoa(min(toolClients, maxConns)))
	cmd := exec.CommandContext(ctx, t.binaries[servers.Benchmark], args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("benchmark %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return parseBenchmark(stdout.Bytes())
}

var rateLine = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)

// parseBenchmark reads the benchmark tool's report.
func parseBenchmark(out []byte) (perSecond float64, err error) {
	if bytes.Contains(out, []byte("Error distribution:")) {
		return 0, fmt.Errorf("some requests failed:\n%s", out)
	}
	rate := rateLine.FindSubmatch(out)
	if rate == nil {
		return 0, fmt.Errorf("not a report of the benchmark tool:\n%s", out)
	}
	return strconv.ParseFloat(string(rate[1]), 64)
}
