package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/leases"
	"kvd/integration/linearizability"
	"kvd/integration/watches"
)

// judges watch everything and hold leases while others write.
type judges struct {
	services    []linearizability.Service
	watches     *watches.Traffic
	watchLog    watches.Log
	reader      *watches.Reader
	history     *linearizability.History
	leases      leases.Traffic
	leaseLog    *leases.Log
	stopWatches context.CancelFunc
	shards      int
}

// patience is how long whole nodes may take, in virtual time, to end leases and to tell watches of everything.
const patience = 2 * time.Minute

// summon starts clients with watches. Those with leases are started by the caller, who starts writers of keys, too.
func (w *world) summon(seed uint64, keys []string, history *linearizability.History) *judges {
	j := &judges{leaseLog: leases.NewLog(), history: history, shards: w.shards}
	j.watches = &watches.Traffic{Keys: append(slices.Clone(keys), leases.Prefix), Seed: seed, Life: 15 * time.Second, History: history,
		Log: &j.watchLog, Newest: history.Newest}
	j.leases = leases.Traffic{Clients: 5, Seed: seed, TTL: 2, Timeout: 5 * time.Second, Log: j.leaseLog}
	if w.shards > 0 { // and not what the chain has, which is too much to read at every revision
		j.watches.Bounds = watches.Bounds{Key: []byte(leases.Prefix), End: []byte{0}}
	}
	for i := range w.shards {
		j.leases.Tags = append(j.leases.Tags, fmt.Sprintf("{l%d}", i))
	}
	for _, name := range w.names {
		s := service{w.hosts[name]}
		j.services = append(j.services, s)
		j.watches.Services = append(j.watches.Services, s)
		j.leases.Services = append(j.leases.Services, s)
	}
	j.reader = watches.NewReader(j.services, j.watches.Bounds)
	var ctx context.Context
	ctx, j.stopWatches = context.WithCancel(context.Background())
	j.watches.Start(ctx)
	return j
}

// known are the revisions at which clients were told that something happened.
func (j *judges) known() []int64 {
	return append(watches.Known(j.history.Ops(), nil), j.leaseLog.Known()...)
}

// judge ends the clients with watches, when nothing is broken any more and nobody writes, and judges what all were
// told. ops are what writers were told.
func (j *judges) judge(r *report, ops []linearizability.Op) error {
	defer j.watches.Wait()
	defer j.stopWatches()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := j.leases.Finish(ctx); err != nil {
		return err
	}
	newest, err := j.services[0].Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
	if err != nil {
		return fmt.Errorf("sim: the newest revision: %w", err)
	}
	if err := j.watches.Finish(ctx, newest.Header.Revision); err != nil {
		return err
	}
	seen := j.watchLog.Watches()
	known := append(watches.Known(ops, seen), j.leaseLog.Known()...)
	if err := j.reader.To(ctx, newest.Header.Revision, known); err != nil {
		return err
	}
	j.leaseLog.Tell(j.watchLog.Deletions())
	r.watched, r.held = watches.Summarize(seen), leases.Summarize(j.leaseLog.Ops())
	return errors.Join(watches.Check(seen, j.reader.Ledger(), ops, j.watchLog.Compactions()),
		leases.Check(j.leaseLog.Ops(), leases.Config{Broken: j.leaseLog.Broken(), Shards: j.shards}))
}
