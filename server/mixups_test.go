package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"kvd/fsm"
	"kvd/shard"
)

// sealed is a value that belongs to one key and one write of it.
func sealed(key string, write uint64) []byte {
	g := rand.New(rand.NewPCG(write, 1))
	b := fmt.Appendf(nil, "%s/%d/", key, write)
	for range g.IntN(1 << (4 + g.IntN(14))) {
		b = append(b, byte(g.Uint32()))
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func isSealed(key string, value []byte) bool {
	n := len(value) - sha256.Size
	if n < 0 || !bytes.HasPrefix(value, []byte(key+"/")) {
		return false
	}
	sum := sha256.Sum256(value[:n])
	return bytes.Equal(sum[:], value[n:])
}

// Values stay whole and with their keys, in the log and in answers, while calls are cancelled, time out and lose their
// connections, and the log applies them long after that.
func TestValuesStayWithTheirKeys(t *testing.T) {
	var applying sync.WaitGroup
	n := startNode(t, nil)
	n.replica.onPropose = func(ctx context.Context, r fsm.Request) (fsm.Result, error) {
		done := make(chan fsm.Result, 1)
		late := time.Duration(len(r.Data)%5) * time.Millisecond
		applying.Go(func() {
			time.Sleep(late)
			result, err := n.replica.apply(r)
			if err != nil {
				t.Error(err)
			}
			done <- result
		})
		select {
		case result := <-done:
			return result, nil
		case <-ctx.Done():
			return fsm.Result{}, shard.ErrUnknownOutcome // the log has it all the same
		}
	}
	g := seeded(t)
	var clients sync.WaitGroup
	for i := range 8 {
		g := rand.New(rand.NewPCG(g.Uint64(), 1))
		clients.Go(func() {
			for life := range 5 {
				conn, err := grpc.NewClient(n.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
				if err != nil {
					t.Error(err)
					return
				}
				var calls sync.WaitGroup
				for j := range 60 {
					key, write := fmt.Sprintf("k%d-%d", i, j%7), g.Uint64()
					calls.Go(func() { sealAndCheck(t, pb.NewKVClient(conn), key, write) })
				}
				if life%2 == 0 {
					time.Sleep(time.Duration(g.IntN(15)) * time.Millisecond)
					_ = conn.Close()
				}
				calls.Wait()
				_ = conn.Close()
			}
		})
	}
	clients.Wait()
	if err := n.Close(); err != nil { // calls that were given up may still run
		t.Error(err)
	}
	applying.Wait()
	all, err := n.replica.store.Range(t.Context(), fsm.User, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil || len(all.Kvs) == 0 {
		t.Fatalf("%d keys, %v", len(all.GetKvs()), err)
	}
	for _, kv := range all.Kvs {
		if !isSealed(string(kv.Key), kv.Value) {
			t.Errorf("the value of %s, %d bytes, is not one that was written", kv.Key, len(kv.Value))
		}
	}
}

// sealAndCheck puts a key and reads it, some of the time without the patience to see the end of that.
func sealAndCheck(t *testing.T, kv pb.KVClient, key string, write uint64) {
	ctx, cancel := context.WithCancel(t.Context())
	switch write % 4 {
	case 0:
		ctx, cancel = context.WithTimeout(t.Context(), time.Duration(write>>8%4000)*time.Microsecond)
	case 1:
		time.AfterFunc(time.Duration(write>>8%4000)*time.Microsecond, cancel)
	}
	defer cancel()
	put, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: sealed(key, write), PrevKv: write&64 != 0})
	if err == nil && put.PrevKv != nil && (string(put.PrevKv.Key) != key || !isSealed(key, put.PrevKv.Value)) {
		t.Errorf("put of %s: the previous value is not its own", key)
	}
	got, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key), Serializable: write&128 != 0})
	if err != nil {
		return
	}
	for _, kv := range got.Kvs {
		if string(kv.Key) != key || !isSealed(key, kv.Value) {
			t.Errorf("get of %s: %s with %d bytes, not its own", key, kv.Key, len(kv.Value))
		}
	}
}
