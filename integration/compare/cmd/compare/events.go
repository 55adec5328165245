package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/integration/compare/servers"
)

// backup streams backups from the leader, one after the other.
func (t *trial) backup(ctx context.Context) error {
	node, err := t.leader(ctx, string(dataKey(0)))
	if err != nil {
		return err
	}
	conn, err := servers.Dial(t.cluster.Endpoints()[node])
	if err != nil {
		return err
	}
	defer conn.Close()
	atLeast := 4 * time.Second
	if t.o.quick {
		atLeast = 0
	}
	var took spread
	err = t.disrupted(ctx, "backup", t.cluster.Endpoints(), func(ctx context.Context) error {
		for begin := time.Now(); len(took) == 0 || time.Since(begin) < atLeast; {
			start := time.Now()
			size, err := receiveBackup(ctx, conn)
			if err != nil {
				return err
			}
			if least := int64(t.o.keys) * (keyBytes + valueBytes); size < least {
				return fmt.Errorf("%d bytes are no backup of %d", size, least)
			}
			took = append(took, time.Since(start).Seconds())
		}
		return nil
	})
	if err == nil {
		t.note("backup/time", took.median())
	}
	return err
}

func receiveBackup(ctx context.Context, conn *grpc.ClientConn) (size int64, err error) {
	stream, err := pb.NewMaintenanceClient(conn).Snapshot(ctx, &pb.SnapshotRequest{})
	if err != nil {
		return 0, err
	}
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return 0, err
		}
		size += int64(len(part.Blob))
	}
}

// compaction overwrites all keys, and then has their first versions deleted.
func (t *trial) compaction(ctx context.Context) error {
	if err := t.fill(ctx, 2); err != nil {
		return err
	}
	node, err := t.leader(ctx, string(dataKey(0)))
	if err != nil {
		return err
	}
	conn, err := servers.Dial(t.cluster.Endpoints()[node])
	if err != nil {
		return err
	}
	defer conn.Close()
	kv := pb.NewKVClient(conn)
	now, err := countData(ctx, conn, false)
	if err != nil {
		return err
	}
	revision := now.Header.Revision
	var took time.Duration
	err = t.disrupted(ctx, "compaction", t.cluster.Endpoints(), func(ctx context.Context) error {
		start := time.Now()
		_, err := kv.Compact(ctx, &pb.CompactionRequest{Revision: revision, Physical: true})
		took = time.Since(start)
		return err
	})
	if err != nil {
		return err
	}
	_, err = kv.Range(ctx, &pb.RangeRequest{Key: dataKey(0), Revision: revision - 1})
	if status.Code(err) != codes.OutOfRange {
		return fmt.Errorf("a read before the compaction's revision is not refused: %w", err)
	}
	t.note("compaction/time", took.Seconds())
	return nil
}

// install brings a node back that lost its data, and measures until it has all of it again.
func (t *trial) install(ctx context.Context) error {
	leader, err := t.leader(ctx, string(dataKey(0)))
	if err != nil {
		return err
	}
	lost := (leader + 1) % nodes
	t.cluster.Kill(lost)
	var others []string
	for i, endpoint := range t.cluster.Endpoints() {
		if i != lost {
			others = append(others, endpoint)
		}
	}
	// The others lead what the lost node did, and have got used to its absence.
	if err := t.rest(ctx, lostFor); err != nil {
		return err
	}
	conn, err := servers.Dial(t.cluster.Endpoints()[leader])
	if err != nil {
		return err
	}
	defer conn.Close()
	var took time.Duration
	err = t.disrupted(ctx, "install", others, func(ctx context.Context) error {
		start := time.Now()
		now, err := countData(ctx, conn, false)
		if err != nil {
			return err
		}
		if err := t.cluster.Replace(ctx, lost); err != nil {
			return err
		}
		err = t.awaitCopy(ctx, lost, now.Header.Revision)
		took = time.Since(start)
		return err
	})
	if err != nil {
		return err
	}
	t.note("install/time", took.Seconds())
	installs, err := t.cluster.Metric(ctx, lost, t.installMetric)
	if err == nil {
		t.note("install/count", installs)
	}
	return err
}

// awaitCopy returns when a node has all data of a revision itself, is a full member, and shards are at home.
func (t *trial) awaitCopy(ctx context.Context, node int, revision int64) error {
	conn, err := servers.Dial(t.cluster.Endpoints()[node])
	if err != nil {
		return err
	}
	defer conn.Close()
	for {
		err := t.hasCopy(ctx, conn, revision)
		if err == nil {
			break
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return err
		}
	}
	return t.settle(ctx)
}

// hasCopy tells from a node's own view whether it is a full member that has applied everything. With shards, what it
// answers may be another node's view, and only their being at home says so.
func (t *trial) hasCopy(ctx context.Context, conn *grpc.ClientConn, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	state, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return err
	}
	if state.IsLearner || state.Leader == 0 {
		return errors.New("it is not a full member yet")
	}
	has, err := countData(ctx, conn, true)
	if err == nil && (has.Count != int64(t.o.keys) || has.Header.Revision < revision && t.shards == 0) {
		err = fmt.Errorf("it has %d keys of %d, and revision %d of %d", has.Count, t.o.keys, has.Header.Revision, revision)
	}
	return err
}

// countData asks for the number of keys and the revision.
func countData(ctx context.Context, conn *grpc.ClientConn, serializable bool) (*pb.RangeResponse, error) {
	return pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{
		Key: []byte(dataPrefix), RangeEnd: prefixEnd(dataPrefix), CountOnly: true, Serializable: serializable,
	})
}
