package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

const (
	minKeys      = 2000
	dataPrefix   = "data/"
	keysPerTag   = 100
	fillPerTxn   = 50
	fillAlone    = 20_000 // keys, at the end, that are put one by one: both servers keep the last entries of their logs in memory
	fillClients  = 128
	fillTimeout  = 30 * time.Second // of one transaction
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
			if err := txnUntil(ctx, conns[client%len(conns)], txn, time.Now().Add(fillTimeout)); err != nil {
				return err
			}
		}
	})
}

// txnUntil tries again while there is no leader, and where nobody knows what became of it: it says the same each time.
func txnUntil(ctx context.Context, conn *grpc.ClientConn, txn *pb.TxnRequest, end time.Time) error {
	for {
		_, err := pb.NewKVClient(conn).Txn(ctx, txn)
		if err == nil || time.Now().After(end) {
			return err
		}
		if wait := sleep(ctx, 50*time.Millisecond); wait != nil {
			return wait
		}
	}
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
