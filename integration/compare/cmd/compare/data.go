package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/integration/compare/servers"
)

const (
	minKeys      = 2000
	dataPrefix   = "data/"
	keysPerTag   = 100
	fillPerTxn   = 50
	fillAlone    = 20_000 // keys, at the end, that are put one by one: both servers keep the last entries of their logs in memory
	fillClients  = 128
	memorySettle = 10 * time.Second
	lostFor      = 3 * time.Second
	dataTimeout  = 5 * time.Minute // of each step
)

// probed counts the puts of all probes.
type probed struct{ sent, failed int }

// data fills the store and measures what it takes up, how long it takes to start, and what larger things do to others.
func (t *trial) data(ctx context.Context) error {
	if err := t.fill(ctx, 1); err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	steps := []struct {
		part string
		run  func(ctx context.Context) error
	}{
		{"memory", t.memory},
		{"restart", t.restart},
		{"backup", t.backup},
		{"compaction", t.compaction},
		{"install", t.install},
	}
	for _, step := range steps {
		if !t.chosen[step.part] {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, dataTimeout)
		err := step.run(ctx)
		cancel()
		t.tell()
		if err != nil {
			return fmt.Errorf("%s: %w", step.part, err)
		}
	}
	return t.verifyProbes(ctx)
}

// dataKey is a key of keyBytes. What one transaction writes has one {tag}, and so is in one shard.
func dataKey(i int) []byte {
	return fmt.Appendf(nil, "%s{%05d}/%03d", dataPrefix, i/keysPerTag, i%keysPerTag)
}

// valueOf a key, in one of its versions, does not compress.
func valueOf(key, version int) []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(key))
	binary.LittleEndian.PutUint64(seed[8:], uint64(version))
	value := make([]byte, valueBytes)
	rand.NewChaCha8(seed).Read(value)
	return value
}

// fill puts every key once, most of them many in a transaction, and checks that they are there.
func (t *trial) fill(ctx context.Context, version int) error {
	conns, err := dialAll(t.cluster.Endpoints())
	if err != nil {
		return err
	}
	defer closeAll(conns)
	start := time.Now()
	together := (t.o.keys - min(fillAlone, t.o.keys/2)) / fillPerTxn * fillPerTxn
	if err := t.fillPart(ctx, conns, version, 0, together, fillPerTxn); err != nil {
		return err
	}
	if err := t.fillPart(ctx, conns, version, together, t.o.keys, 1); err != nil {
		return err
	}
	t.logf("%d keys written in %.1f s", t.o.keys, time.Since(start).Seconds())
	for i, conn := range conns {
		if err := t.checkCount(ctx, conn); err != nil {
			return fmt.Errorf("node %d: %w", i+1, err)
		}
	}
	return nil
}

// fillPart puts the keys from first to before end, perTxn in a transaction.
func (t *trial) fillPart(ctx context.Context, conns []*grpc.ClientConn, version, first, end, perTxn int) error {
	var next atomic.Int64
	next.Store(int64(first))
	return parallel(fillClients, func(client int) error {
		for {
			from := int(next.Add(int64(perTxn))) - perTxn
			if from >= end {
				return nil
			}
			txn := &pb.TxnRequest{}
			for i := from; i < min(from+perTxn, end); i++ {
				txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
					RequestPut: &pb.PutRequest{Key: dataKey(i), Value: valueOf(i, version)},
				}})
			}
			if _, err := pb.NewKVClient(conns[client%len(conns)]).Txn(ctx, txn); err != nil {
				return err
			}
		}
	})
}

func (t *trial) checkCount(ctx context.Context, conn *grpc.ClientConn) error {
	has, err := countData(ctx, conn, false)
	if err == nil && has.Count != int64(t.o.keys) {
		err = fmt.Errorf("%w: %d keys of %d are there", errWrong, has.Count, t.o.keys)
	}
	return err
}

func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// memory measures what all nodes take for the keys, a while after the last of them was written.
func (t *trial) memory(ctx context.Context) error {
	if err := t.rest(ctx, memorySettle); err != nil {
		return err
	}
	memory, err := t.cluster.Memory()
	if err != nil {
		return err
	}
	disk, err := t.cluster.Disk()
	if err != nil {
		return err
	}
	mib := func(bytes int64) float64 { return float64(bytes) / (1 << 20) }
	t.note("memory/resident", mib(memory.Resident))
	t.note("memory/anonymous", mib(memory.Anonymous))
	t.note("memory/peak", mib(memory.Peak))
	t.note("disk", mib(disk))
	return nil
}

// restart ends all nodes in order, one after the other, and measures the time from starting them, all at once, until each has answered
// linearizable reads.
func (t *trial) restart(ctx context.Context) error {
	for node := range nodes {
		if err := t.cluster.Terminate(ctx, node); err != nil {
			return err
		}
	}
	conns, err := dialAll(t.cluster.Endpoints())
	if err != nil {
		return err
	}
	defer closeAll(conns)
	start := time.Now()
	if err := t.cluster.Start(0, 1, 2); err != nil {
		return err
	}
	if err := parallel(nodes, func(i int) error { return t.readSome(ctx, conns[i]) }); err != nil {
		return err
	}
	t.note("restart", time.Since(start).Seconds())
	if err := t.cluster.WaitReady(ctx); err != nil {
		return err
	}
	return t.settle(ctx)
}

// readSome returns when a node has answered linearizable reads of keys all over the store, rightly.
func (t *trial) readSome(ctx context.Context, conn *grpc.ClientConn) error {
	const reads = 100
	for i := range reads {
		key := i * (t.o.keys / reads)
		for {
			attempt, cancel := context.WithTimeout(ctx, time.Second)
			response, err := pb.NewKVClient(conn).Range(attempt, &pb.RangeRequest{Key: dataKey(key)})
			cancel()
			if err == nil {
				if len(response.Kvs) != 1 || !bytes.Equal(response.Kvs[0].Value, valueOf(key, 1)) {
					return fmt.Errorf("%w: key %d is not what was put: %v", errWrong, key, response)
				}
				break
			}
			if sleep(ctx, 2*time.Millisecond) != nil {
				return fmt.Errorf("read key %d: %w", key, err)
			}
		}
	}
	return nil
}

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

// verifyProbes checks that the puts of all probes are in the store.
func (t *trial) verifyProbes(ctx context.Context) error {
	versions, err := t.versions(ctx, probePrefix)
	if err != nil {
		return err
	}
	if least, most := t.probed.sent-t.probed.failed, t.probed.sent; versions < least || versions > most {
		return fmt.Errorf("%w: %d puts of the probes were acknowledged of %d sent, %d are there", errWrong, least, most, versions)
	}
	t.note("probe/failed", float64(t.probed.failed))
	return nil
}
