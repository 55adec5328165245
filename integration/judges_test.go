package integration

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/cluster"
	"kvd/integration/leases"
	"kvd/integration/linearizability"
	"kvd/integration/nemesis"
	"kvd/integration/watches"
)

func (s service) Watch(ctx context.Context) (watches.Stream, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	return pb.NewWatchClient(s.conn).Watch(ctx)
}

func (s service) Compact(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	return s.kv.Compact(ctx, r)
}

func (s service) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := pb.NewLeaseClient(s.conn).LeaseGrant(ctx, r)
	return resp, outcome(err)
}

func (s service) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := pb.NewLeaseClient(s.conn).LeaseRevoke(ctx, r)
	return resp, outcome(err)
}

func (s service) LeaseTimeToLive(ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	resp, err := pb.NewLeaseClient(s.conn).LeaseTimeToLive(ctx, r)
	return resp, outcome(err)
}

func (s service) KeepAlive(ctx context.Context, id int64) (*pb.LeaseKeepAliveResponse, error) {
	if err := s.connected(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewLeaseClient(s.conn).LeaseKeepAlive(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
		return nil, err
	}
	return stream.Recv()
}

// judges watch everything and hold leases while others write.
type judges struct {
	c        *cluster.Cluster
	history  *linearizability.History
	services []linearizability.Service
	watches  *watches.Traffic
	watchLog watches.Log
	reader   *watches.Reader
	leases   leases.Traffic
	leaseLog *leases.Log

	stopLeases, stopWatches context.CancelFunc
	working                 sync.WaitGroup // leases and compactions
}

// leaseBound is how long a lease may live on while nothing is broken: the machine may be busy with other tests.
const leaseBound = 15 * time.Second

// summon starts clients with watches, and clients with leases, on every node. Others write keys.
func summon(t *testing.T, c *cluster.Cluster, seed uint64, history *linearizability.History, keys []string) *judges {
	t.Helper()
	j := &judges{c: c, history: history, leaseLog: leases.NewLog()}
	j.watches = &watches.Traffic{Keys: append(slices.Clone(keys), leases.Prefix), Seed: seed, History: history, Log: &j.watchLog,
		Newest: history.Newest, Rest: time.Second}
	j.leases = leases.Traffic{Clients: 4, Seed: seed, Tags: tagsOf(keys), TTL: 2, Log: j.leaseLog}
	for _, name := range c.Names() {
		s := newService(t, c, name)
		j.services = append(j.services, s)
		j.watches.Services = append(j.watches.Services, s, s)
		j.leases.Services = append(j.leases.Services, s)
	}
	var watching, holding context.Context
	watching, j.stopWatches = context.WithCancel(t.Context())
	holding, j.stopLeases = context.WithCancel(t.Context())
	t.Cleanup(j.stop)
	j.watches.Start(watching)
	j.reader = watches.NewReader(j.services, watches.Bounds{})
	j.working.Go(func() { j.leases.Run(holding) })
	j.working.Go(func() { j.watches.Compact(holding, j.reader, j.known) })
	return j
}

// tagsOf are the {tags} of keys; nil if they have none.
func tagsOf(keys []string) (tags []string) {
	for _, key := range keys {
		if from, to := strings.IndexByte(key, '{'), strings.IndexByte(key, '}'); from >= 0 && to > from {
			tags = append(tags, key[from:to+1])
		}
	}
	return slices.Compact(tags)
}

func (j *judges) stop() {
	j.stopLeases()
	j.working.Wait()
	j.stopWatches()
	j.watches.Wait()
}

// known are the revisions at which clients were told that something happened.
func (j *judges) known() []int64 {
	return append(watches.Known(j.history.Ops(), nil), j.leaseLog.Known()...)
}

// judge ends the clients, when nothing is broken any more and nobody writes, and judges what they were told. ops are
// what writers were told, shards 0 for one key space.
func (j *judges) judge(t *testing.T, ops []linearizability.Op, shards int) {
	t.Helper()
	// On a busy machine some things may not have come about so far.
	eventually(t, "compactions have ended watches, and holders have done everything", func(context.Context) (bool, error) {
		held := leases.Summarize(j.leaseLog.Ops())
		return watches.Summarize(j.watchLog.Watches()).Compacted > 0 && held.Kept > 0 && held.Revoked > 0, nil
	})
	j.stopLeases()
	j.working.Wait()
	wait, end := context.WithTimeout(t.Context(), cluster.Liveness)
	defer end()
	if err := j.leases.Finish(wait); err != nil {
		t.Error(err)
	}
	newest, err := j.services[0].Range(wait, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
	must(t, err)
	if err := j.watches.Finish(wait, newest.Header.Revision); err != nil {
		t.Error(err)
	}
	j.stop()
	seen := j.watchLog.Watches()
	known := append(watches.Known(ops, seen), j.leaseLog.Known()...)
	must(t, j.reader.To(wait, newest.Header.Revision, known))
	ledger := j.reader.Ledger()
	j.leaseLog.Tell(j.watchLog.Deletions())
	watched, held := watches.Summarize(seen), leases.Summarize(j.leaseLog.Ops())
	t.Logf("%d changes, %d compactions, watches %+v, leases %+v", len(ledger.Changes), len(j.watchLog.Compactions()), watched, held)
	if err := errors.Join(watched.Vacuous(), held.Vacuous(), watches.Check(seen, ledger, ops, j.watchLog.Compactions())); err != nil {
		t.Error(err)
	}
	err = leases.Check(j.leaseLog.Ops(), leases.Config{Bound: leaseBound, Broken: j.leaseLog.Broken(), Shards: shards})
	if err != nil {
		t.Error(err)
	}
}

// Leases that live for less than the faults last: the leader is stopped, cut off or killed for longer than they live.
// Those that are renewed through the other nodes stay, and the others end.
func TestLeasesUnderFaults(t *testing.T) {
	testLeasesUnderFaults(t, cluster.Config{Nodes: 3, Args: quick}, 0)
}
func TestShardedLeasesUnderFaults(t *testing.T) {
	const shards = 8
	testLeasesUnderFaults(t, sharded(3, shards, 2, quick...), shards)
}

func testLeasesUnderFaults(t *testing.T, cfg cluster.Config, shards int) {
	t.Parallel()
	seed := seed(t)
	cfg.Links = true
	c := cluster.Run(t, cfg)
	var history linearizability.History
	keys := []string{"lin/{1}a", "lin/{2}b", "lin/{3}c"}
	traffic := linearizability.Traffic{Keys: keys, Seed: seed, Think: 100 * time.Millisecond, Timeout: 3 * time.Second, Sharded: shards > 0}
	if traffic.Sharded {
		traffic.Keys = taggedKeys(shards, 3)
	}
	for _, name := range c.Names() {
		traffic.Services = append(traffic.Services, newService(t, c, name))
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); traffic.Run(ctx, &history) }()
	j := summon(t, c, seed, &history, traffic.Keys)
	deadly := slices.DeleteFunc(nemesis.Faults(), func(f nemesis.Fault) bool {
		return !slices.Contains([]string{"pause leader", "freeze leader out", "kill leader", "pause majority"}, f.Name)
	})
	var settled nemesis.Cluster = patient{c}
	if traffic.Sharded {
		settled = shardedPatient{patient{c}}
	}
	until, end := context.WithTimeout(t.Context(), *campaignFlag)
	defer end()
	_, err := nemesis.Run(until, settled, nemesis.Config{
		Faults: deadly, Seed: seed, Hold: 5 * time.Second, Rest: 2 * time.Second, Timeout: cluster.Liveness,
		Now: history.Now, Progress: func(since int64) bool { return history.ChangesSince(since) > 5 }, Broke: j.leaseLog.Broke, Logf: t.Logf,
	})
	if err != nil {
		t.Error(err)
	}
	cancel()
	<-done
	j.judge(t, history.Ops(), shards)
}
