package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
	"kvd/placement"
)

// TestWatchOverShardsWhileLeadersDie has clients watch a prefix that is in all shards, each by way of one node, some of
// which have no replica of some shards. Nodes that lead shards are killed meanwhile. Every acknowledged put must be
// seen by every client, once, in the order of revisions.
func TestWatchOverShardsWhileLeadersDie(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(5, 8, 3, quick...))
	awaitHome(t, c, "n1")
	random := rand.New(rand.NewPCG(seed(t), 0))
	const prefix = "watched/"
	ctx, stop := context.WithCancel(liveness(t))
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	onlookers := make(map[string]*onlooker)
	for _, name := range c.Names() {
		o := &onlooker{seen: make(map[string]string)}
		onlookers[name] = o
		cl := client(t, c, name)
		watching.Go(func() { o.look(ctx, cl, prefix) })
	}
	must(t, cluster.Until(ctx, func(context.Context) error { return each(onlookers, (*onlooker).began) }))

	var written ledger
	loading, enough := context.WithCancel(ctx)
	defer enough()
	wait := trickle(loading, t, c, &written, prefix+"k", 10*time.Millisecond)
	for range 3 {
		view := awaitShards(t, c, "n1", eachShard(func(s placement.ShardOverview) error {
			if s.Leader == "" {
				return errors.New("nobody leads it")
			}
			return nil
		}))
		victim := view.Shards[random.IntN(len(view.Shards))].Leader
		before := written.count()
		must(t, c.Node(victim).Kill())
		must(t, cluster.Until(ctx, func(context.Context) error {
			if n := written.count() - before; n < 500 {
				return fmt.Errorf("%d puts since %s was killed", n, victim)
			}
			return nil
		}))
		must(t, c.Restart(ctx, victim))
	}
	enough()
	wait()
	must(t, cluster.Until(ctx, func(context.Context) error {
		return each(onlookers, func(o *onlooker) error { return o.reached(written.revision) })
	}))
	t.Logf("%d puts, the last at revision %d", written.count(), written.revision)
	must(t, each(onlookers, func(o *onlooker) error { return o.check(written.acked) }))
}

func each(onlookers map[string]*onlooker, f func(*onlooker) error) error {
	for name, o := range onlookers {
		if err := f(o); err != nil {
			return fmt.Errorf("the watch by way of %s: %w", name, err)
		}
	}
	return nil
}

// onlooker is a client that watches.
type onlooker struct {
	mu       sync.Mutex
	created  bool
	revision int64             // of the last event
	seen     map[string]string // values, by key
	wrong    error
}

// look watches a prefix until ctx ends.
func (o *onlooker) look(ctx context.Context, cl *clientv3.Client, prefix string) {
	for resp := range cl.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
		o.mu.Lock()
		o.created = o.created || resp.Created
		if err := resp.Err(); err != nil && ctx.Err() == nil && o.wrong == nil {
			o.wrong = fmt.Errorf("it ended after revision %d: %w", o.revision, err)
		}
		for _, e := range resp.Events {
			o.event(e)
		}
		o.mu.Unlock()
	}
}

// event enters one, which must come after all others. Every key is put once.
func (o *onlooker) event(e *clientv3.Event) {
	key := string(e.Kv.Key)
	_, again := o.seen[key]
	switch {
	case o.wrong != nil:
	case e.Kv.ModRevision <= o.revision:
		o.wrong = fmt.Errorf("%s at revision %d came after revision %d", key, e.Kv.ModRevision, o.revision)
	case again || !e.IsCreate():
		o.wrong = fmt.Errorf("%s was put again, at revision %d", key, e.Kv.ModRevision)
	}
	o.seen[key], o.revision = string(e.Kv.Value), max(o.revision, e.Kv.ModRevision)
}

func (o *onlooker) began() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.wrong == nil && !o.created {
		return errors.New("it has not begun")
	}
	return nil
}

func (o *onlooker) reached(revision int64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.wrong == nil && o.revision < revision {
		return fmt.Errorf("it is at revision %d, and not at %d", o.revision, revision)
	}
	return nil
}

func (o *onlooker) check(acked []pair) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range acked {
		if value, ok := o.seen[p.key]; o.wrong == nil && (!ok || value != p.value) {
			o.wrong = fmt.Errorf("%s = %q was not seen", p.key, p.value)
		}
	}
	return o.wrong
}
