package main

import (
	"context"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/compare/servers"
)

// verifyLoads checks that each put was applied once, and that what the gets read is there through every node.
func (t *trial) verifyLoads(ctx context.Context, puts int) error {
	versions, err := t.versions(ctx, putPrefix)
	if err != nil {
		return err
	}
	if versions != puts {
		return fmt.Errorf("%w: %d puts were acknowledged, %d are there", errWrong, puts, versions)
	}
	conns, err := dialAll(t.cluster.Endpoints())
	if err != nil {
		return err
	}
	defer closeAll(conns)
	for i, conn := range conns {
		for _, serializable := range []bool{false, true} {
			response, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{
				Key: []byte(readPrefix), RangeEnd: prefixEnd(readPrefix), Serializable: serializable,
			})
			if err != nil {
				return err
			}
			if len(response.Kvs) != t.readKeys {
				return fmt.Errorf("%w: node %d has %d keys to read, not %d (serializable: %v)", errWrong, i+1, len(response.Kvs), t.readKeys, serializable)
			}
			for _, kv := range response.Kvs {
				if len(kv.Key) != keyBytes || len(kv.Value) != valueBytes {
					return fmt.Errorf("%w: node %d: key %q has %d bytes, not %d", errWrong, i+1, kv.Key, len(kv.Value), valueBytes)
				}
			}
		}
	}
	return nil
}

// versions returns how often all keys with a prefix together have been put.
func (t *trial) versions(ctx context.Context, prefix string) (int, error) {
	conn, err := servers.Dial(t.cluster.Endpoints()[0])
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	response, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(prefix), RangeEnd: prefixEnd(prefix), KeysOnly: true})
	if err != nil {
		return 0, err
	}
	sum := 0
	for _, kv := range response.Kvs {
		sum += int(kv.Version)
	}
	return sum, nil
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
