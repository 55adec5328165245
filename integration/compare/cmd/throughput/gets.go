package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func dial(endpoint string) (*grpc.ClientConn, error) {
	return grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)))
}

// gets reads random keys, one at a time and linearizably, by many clients that share connections to all nodes in turn.
type gets struct {
	conns []*grpc.ClientConn
	keys  [][]byte
	o     options
}

// newGets connects to the nodes, once it is sure that every connection works.
func newGets(ctx context.Context, endpoints []string, keys [][]byte, o options) (*gets, error) {
	g := &gets{keys: keys, o: o}
	for i := range o.conns {
		conn, err := dial(endpoints[i%len(endpoints)])
		if err == nil {
			g.conns = append(g.conns, conn)
			err = g.get(ctx, conn, keys[0])
		}
		if err != nil {
			g.close()
			return nil, err
		}
	}
	return g, nil
}

func (g *gets) close() {
	for _, conn := range g.conns {
		conn.Close()
	}
}

func (g *gets) run(ctx context.Context) (result, error) {
	var (
		clients   sync.WaitGroup
		begun     atomic.Int64
		latencies = make([]time.Duration, g.o.total)
		errs      = make([]error, g.o.clients)
		start     = time.Now()
	)
	for client := range g.o.clients {
		clients.Go(func() {
			for errs[client] == nil {
				i := begun.Add(1) - 1
				if i >= int64(g.o.total) {
					return
				}
				asked := time.Now()
				errs[client] = g.get(ctx, g.conns[client%len(g.conns)], g.keys[rand.IntN(len(g.keys))])
				latencies[i] = time.Since(asked)
			}
		})
	}
	clients.Wait()
	took := time.Since(start)
	slices.Sort(latencies)
	return result{
		perSecond: float64(g.o.total) / took.Seconds(),
		p50:       latencies[g.o.total/2], p99: latencies[g.o.total*99/100],
	}, errors.Join(errs...)
}

func (g *gets) get(ctx context.Context, conn *grpc.ClientConn, key []byte) error {
	response, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: key})
	if err == nil && (len(response.Kvs) != 1 || len(response.Kvs[0].Value) != g.o.valueSize) {
		err = fmt.Errorf("get %q: not the value that was put: %v", key, response)
	}
	return err
}
