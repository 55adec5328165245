package integration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"kvd/integration/cluster"
	"kvd/integration/linearizability"
	"kvd/integration/nemesis"
)

// service is a node as a linearizability.Service: every request is sent at most once.
type service struct {
	conn *grpc.ClientConn
	kv   pb.KVClient
}

func newService(t *testing.T, c *cluster.Cluster, name string) service {
	t.Helper()
	conn, err := c.Dial(name)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return service{conn, pb.NewKVClient(conn)}
}

// connected waits for a connection, so that an attempt to reach a dead node is no open outcome.
func (s service) connected(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for {
		s.conn.Connect()
		state := s.conn.GetState()
		if state == connectivity.Ready {
			return nil
		}
		if !s.conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("not connected: %w", linearizability.ErrNotSent)
		}
	}
}

// outcome says of an error whether the request was certainly refused.
func outcome(err error) error {
	if status.Code(err) == codes.ResourceExhausted {
		return errors.Join(linearizability.ErrNotSent, err)
	}
	return err
}

func (s service) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := s.kv.Range(ctx, r)
	return resp, outcome(err)
}

func (s service) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := s.kv.Put(ctx, r)
	return resp, outcome(err)
}

func (s service) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := s.kv.DeleteRange(ctx, r)
	return resp, outcome(err)
}

func (s service) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := s.kv.Txn(ctx, r)
	return resp, outcome(err)
}

// patient is a cluster as the nemesis sees it.
type patient struct{ *cluster.Cluster }

func (p patient) Kill(name string) error   { return p.Node(name).Kill() }
func (p patient) Pause(name string) error  { return p.Node(name).Pause() }
func (p patient) Resume(name string) error { return p.Node(name).Resume() }
func (p patient) Cut(from, to string)      { p.Link(from, to).Cut() }
func (p patient) Freeze(from, to string)   { p.Link(from, to).Freeze() }
func (p patient) Start(name string) error {
	if p.Node(name).Running() {
		return nil
	}
	return p.Node(name).Start()
}
func (p patient) Settle(ctx context.Context) error { return p.WaitReady(ctx, p.Names()...) }

// Concurrent clients on few keys, while nodes are killed, stopped and cut off: the answers are those of one
// store that does one thing at a time.
func TestLinearizableUnderFaults(t *testing.T) {
	t.Parallel()
	seed := seed(t)
	c := cluster.Run(t, cluster.Config{Nodes: *nodesFlag, Links: true, Args: with("--snapshot-entries=300", "--trailing-entries=50")})
	var history linearizability.History
	traffic := linearizability.Traffic{Keys: []string{"k0", "k1", "k2", "k3"}, Seed: seed, Think: 15 * time.Millisecond, Timeout: 3 * time.Second}
	for _, name := range slices.Repeat(c.Names(), 3) {
		traffic.Services = append(traffic.Services, newService(t, c, name))
	}
	stop, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); traffic.Run(stop, &history) }()
	j := summon(t, c, seed, &history, traffic.Keys)

	campaign, end := context.WithTimeout(t.Context(), *campaignFlag)
	defer end()
	windows, err := nemesis.Run(campaign, patient{c}, nemesis.Config{
		Seed: seed, Hold: time.Second, Rest: 300 * time.Millisecond, Timeout: cluster.Liveness,
		Now: history.Now, Progress: func(since int64) bool { return history.ChangesSince(since) > 20 }, Broke: j.leaseLog.Broke, Logf: t.Logf,
	})
	cancel()
	<-done
	ops := history.Ops()
	summary := linearizability.Summarize(ops, windows)
	t.Logf("%+v", summary)
	if err := errors.Join(err, summary.Vacuous()); err != nil {
		t.Error(err)
	}
	if err := linearizability.Check(ops, linearizability.Config{OneOrder: true, Timeout: 2 * time.Minute}); err != nil {
		t.Error(err)
	}
	j.judge(t, ops, 0)
	sameEverywhere(t, c)
}

// sameEverywhere checks that all nodes hold the same (invariant I4).
func sameEverywhere(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	name := leader(t, c)
	resp, err := client(t, c, name).Get(liveness(t), "any")
	must(t, err)
	var want uint32
	for i, name := range c.Names() {
		caughtUp(t, c, name, leader(t, c))
		cl := client(t, c, name)
		hash, err := cl.HashKV(liveness(t), cl.Endpoints()[0], resp.Header.Revision)
		must(t, err)
		if i == 0 {
			want = hash.Hash
		}
		if hash.Hash != want {
			t.Errorf("at revision %d %s holds something else than %s", resp.Header.Revision, name, c.Names()[0])
		}
	}
}
