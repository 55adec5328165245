package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
)

// Run runs a client command of kvd against one node and returns what it prints. An error has what it said on stderr.
func (c *Cluster) Run(ctx context.Context, node string, args ...string) (string, error) {
	args = append([]string{"--endpoints", c.Node(node).ClientAddr()}, args...)
	cmd := exec.CommandContext(ctx, c.binary, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kvd %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// RunJSON runs a client command that prints JSON, into the value that result points to.
func (c *Cluster) RunJSON(ctx context.Context, result any, node string, args ...string) error {
	out, err := c.Run(ctx, node, append(args, "--write-out", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), result); err != nil {
		return fmt.Errorf("kvd %s printed no JSON: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
