package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/compare/servers"
)

// Names of what is compared.
const (
	etcd          = "etcd"
	full          = "kvd full"
	consistent    = "kvd consistent"
	consistent256 = "kvd consistent, 256 shards"
	floor         = "floor"
)

// contestant is a kind of server.
type contestant struct {
	name   string
	shards int // 0: it has none
	// installMetric counts the snapshots that a node was sent.
	installMetric string
	start         func(ctx context.Context, c *comparison, dir string) (*servers.Cluster, error)
}

const installMetricKVD = "kvd_shard_snapshot_installs_total"

var contestants = map[string]*contestant{
	etcd: {name: etcd, installMetric: "etcd_network_snapshot_receive_success", start: func(ctx context.Context, c *comparison, dir string) (*servers.Cluster, error) {
		return servers.StartEtcd(ctx, c.binaries[servers.Etcd], dir, nodes)
	}},
	full: {name: full, installMetric: installMetricKVD, start: func(ctx context.Context, c *comparison, dir string) (*servers.Cluster, error) {
		return servers.StartKVD(ctx, c.binaries[servers.KVD], dir, nodes)
	}},
	consistent:    sharded(consistent, shards),
	consistent256: sharded(consistent256, 256),
	floor: {name: floor, start: func(ctx context.Context, c *comparison, dir string) (*servers.Cluster, error) {
		return servers.StartCommand(ctx, c.binaries[servers.Floor], dir, nodes, "-val-size", strconv.Itoa(valueBytes))
	}},
}

func sharded(name string, shards int) *contestant {
	return &contestant{name: name, shards: shards, installMetric: installMetricKVD, start: func(ctx context.Context, c *comparison, dir string) (*servers.Cluster, error) {
		return servers.StartKVD(ctx, c.binaries[servers.KVD], dir, nodes, "--strategy", "consistent",
			"--shards", strconv.Itoa(shards), "--replication-factor", strconv.Itoa(replicationFactor))
	}}
}

// leader returns the node that leads what a key is in.
func (t *trial) leader(ctx context.Context, key string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		find := t.leaderByStatus
		if t.shards > 0 {
			find = func(ctx context.Context) (int, error) { return t.leaderByLocate(ctx, key) }
		}
		node, err := find(ctx)
		if err == nil {
			return node, nil
		}
		if sleep(ctx, 50*time.Millisecond) != nil {
			return 0, fmt.Errorf("no leader is found: %w", err)
		}
	}
}

func (t *trial) leaderByStatus(ctx context.Context) (int, error) {
	var last error
	for i, endpoint := range t.cluster.Endpoints() {
		conn, err := servers.Dial(endpoint)
		if err != nil {
			return 0, err
		}
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		status, err := pb.NewMaintenanceClient(conn).Status(attempt, &pb.StatusRequest{})
		cancel()
		conn.Close()
		if err == nil && status.Leader == status.Header.MemberId {
			return i, nil
		}
		last = errors.Join(last, err)
	}
	return 0, errors.Join(errors.New("no node says that it leads"), last)
}

func (t *trial) leaderByLocate(ctx context.Context, key string) (int, error) {
	out, err := t.kvd(ctx, "locate", key)
	if err != nil {
		return 0, err
	}
	var at struct{ Place struct{ Leader string } }
	if err := json.Unmarshal(out, &at); err != nil {
		return 0, err
	}
	if node := t.cluster.Node(at.Place.Leader); node >= 0 {
		return node, nil
	}
	return 0, fmt.Errorf("the shard of %q has no leader", key)
}

// kvd runs a client command that prints JSON.
func (t *trial) kvd(ctx context.Context, args ...string) ([]byte, error) {
	args = append(args, "--endpoints", strings.Join(t.cluster.Endpoints(), ","), "-w", "json")
	out, err := exec.CommandContext(ctx, t.binaries[servers.KVD], args...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("kvd %s: %w\n%s", args[0], err, exit.Stderr)
	}
	return out, err
}
