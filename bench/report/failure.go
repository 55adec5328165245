package report

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/status"

	"kvd/bench"
	"kvd/bench/local"
	"kvd/server/kvdpb"
)

// ledgerPairs are written before a node is killed.
const ledgerPairs = 100

// fail kills a node of the role that f names, starts it again, and notes what that does.
func (m *runner) fail(ctx context.Context, c *cluster, f *Failure) error {
	if err := c.revive(ctx); err != nil {
		return err
	}
	if err := c.awaitRest(ctx); err != nil {
		return err
	}
	victim, err := c.choose(ctx, f)
	if err != nil {
		return err
	}
	pairs := make(ledger)
	if err := pairs.write(ctx, c, f.Role+"/", ledgerPairs); err != nil {
		return err
	}
	if f.Keys, err = c.count(ctx, keyPrefix); err != nil {
		return err
	}
	load := startLoad(ctx, c, m.o)
	err = m.calmly(ctx, func() error { return m.killAndRecover(ctx, c, f, victim, pairs, load) })
	return errors.Join(err, load.stop(f))
}

// revive starts the nodes that a step which failed has left dead.
func (c *cluster) revive(ctx context.Context) error {
	for _, n := range c.Nodes {
		if n.Running() {
			continue
		}
		if err := c.Start(n); err != nil {
			return err
		}
		if err := c.AwaitServing(ctx, stepLimit, keyPrefix, n); err != nil {
			return err
		}
	}
	return nil
}

// calmly leaves the load alone for a moment before and after something happens.
func (m *runner) calmly(ctx context.Context, happen func() error) error {
	if err := sleep(ctx, m.calm); err != nil {
		return err
	}
	if err := happen(); err != nil {
		return err
	}
	return sleep(ctx, m.calm)
}

// choose picks the node to be killed: the leader, or of the others the one that leads the fewest shards.
func (c *cluster) choose(ctx context.Context, f *Failure) (*local.Node, error) {
	leader, _, err := c.findLeader(ctx)
	if err != nil {
		return nil, err
	}
	led := make(map[string]int)
	if c.layout.Strategy != Full {
		view, err := c.Shards(ctx)
		if err != nil {
			return nil, err
		}
		for _, s := range view.GetShards() {
			led[s.GetLeader()]++
		}
	}
	victim := leader
	if f.Role == Follower {
		victim = slices.MinFunc(c.Running(leader), func(a, b *local.Node) int { return led[a.Name] - led[b.Name] })
	}
	f.Node, f.Led = victim.Name, led[victim.Name]
	return victim, nil
}

// killAndRecover does what it says. Every acknowledged pair is read back from the others, and from the node in the end.
func (m *runner) killAndRecover(ctx context.Context, c *cluster, f *Failure, victim *local.Node, pairs ledger, load *load) error {
	others := c.Running(victim)
	client, err := c.warm(ctx, others)
	if err != nil {
		return err
	}
	defer client.Close()
	killed := time.Now()
	load.killed(killed)
	victim.Kill()
	if err := c.firstWrites(ctx, f, client, pairs, killed); err != nil {
		return err
	}
	if err := f.readBack(ctx, c, pairs, others[0]); err != nil {
		return err
	}
	if c.layout.Strategy != Full {
		if err := c.awaitCopies(ctx, victim); err != nil {
			return err
		}
		f.Restored = time.Since(killed)
	}
	if err := sleep(ctx, m.calm); err != nil {
		return err
	}
	if err := c.recover(ctx, f, victim, killed); err != nil {
		return err
	}
	return f.readBack(ctx, c, pairs, victim)
}

// warm returns a client that has connections to all of these nodes.
func (c *cluster) warm(ctx context.Context, nodes []*local.Node) (*clientv3.Client, error) {
	var endpoints []string
	for _, n := range nodes {
		endpoints = append(endpoints, n.Client)
	}
	client, err := c.Connect(endpoints...)
	if err != nil {
		return nil, err
	}
	for range 2 * len(nodes) { // in turns
		if _, err := client.Get(ctx, keyPrefix); err != nil {
			client.Close()
			return nil, err
		}
	}
	return client, nil
}

// firstWrites writes a key of each shard, all at once, each until it is acknowledged.
func (c *cluster) firstWrites(ctx context.Context, f *Failure, client *clientv3.Client, pairs ledger, killed time.Time) error {
	f.Writes = make([]time.Duration, len(c.probes))
	errs := make([]error, len(c.probes))
	acknowledged := make([]ledger, len(c.probes))
	var all sync.WaitGroup
	for i, key := range c.probes {
		all.Go(func() {
			acknowledged[i] = make(ledger)
			errs[i] = acknowledged[i].put(ctx, client, key)
			f.Writes[i] = time.Since(killed)
		})
	}
	all.Wait()
	for _, l := range acknowledged {
		maps.Copy(pairs, l)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	f.FirstWrite, f.AllWrites = slices.Min(f.Writes), slices.Max(f.Writes)
	return nil
}

// readBack reads all pairs through a node and notes what is lost.
func (f *Failure) readBack(ctx context.Context, c *cluster, pairs ledger, through *local.Node) error {
	good, err := pairs.readAll(ctx, c, []*local.Node{through})
	if err != nil {
		return fmt.Errorf("through %s: %w", through.Name, err)
	}
	f.Acknowledged = len(pairs)
	f.Lost = max(f.Lost, len(pairs)-good)
	return nil
}

// awaitCopies waits until every shard has all its copies on nodes that live.
func (c *cluster) awaitCopies(ctx context.Context, lost *local.Node) error {
	return local.Until(ctx, moveLimit, "make copies elsewhere", c.Running(), func(ctx context.Context) error {
		view, err := c.Shards(ctx)
		if err != nil {
			return err
		}
		short := c.layout.Shards
		for _, nodes := range local.Homes(view) {
			if len(nodes) >= c.layout.Copies && !slices.Contains(nodes, lost.Name) {
				short--
			}
		}
		if short > 0 {
			return pause(ctx, fmt.Errorf("%d of %d shards lack a copy", short, c.layout.Shards))
		}
		return nil
	})
}

// recover starts a killed node and waits until it has all data that there was when it started and, with shards, until
// each of these is where it had been.
func (c *cluster) recover(ctx context.Context, f *Failure, victim *local.Node, killed time.Time) error {
	_, applied, err := c.findLeader(ctx)
	if err != nil {
		return err
	}
	started := time.Now()
	f.Restarted = started.Sub(killed)
	if err := c.Start(victim); err != nil {
		return err
	}
	if c.layout.Strategy == Full {
		err := c.awaitApplied(ctx, victim, applied)
		f.CaughtUp = time.Since(started)
		return err
	}
	return local.Until(ctx, moveLimit, "bring the shards home", c.Nodes, func(ctx context.Context) error {
		view, err := c.Shards(ctx)
		if err != nil {
			return err
		}
		if behind := c.behind(view, victim); behind > 0 {
			return pause(ctx, fmt.Errorf("%s lacks %d shards", victim.Name, behind))
		} else if f.CaughtUp == 0 {
			f.CaughtUp = time.Since(started)
		}
		if away := local.Away(view, c.homes); away > 0 {
			return pause(ctx, fmt.Errorf("%d of %d shards are not where they were", away, c.layout.Shards))
		}
		if err := local.AllOK(view); err != nil {
			return pause(ctx, err)
		}
		f.Home = time.Since(started)
		return nil
	})
}

// behind counts the shards of which a node had the data at first and has not all of it now.
func (c *cluster) behind(view *kvdpb.ShardsResponse, n *local.Node) (shards int) {
	for _, s := range view.GetShards() {
		if !slices.Contains(c.homes[s.GetNumber()], n.Name) {
			continue
		}
		has := slices.ContainsFunc(s.GetReplicas(), func(r *kvdpb.Replica) bool {
			return r.GetNode() == n.Name && r.GetRole() == "data" && r.GetState() == "voter" && r.GetAlive() &&
				r.GetCommit() > 0 && r.GetMatch()+underWay >= r.GetCommit()
		})
		if !has {
			shards++
		}
	}
	return shards
}

// underWay are log entries that a replica may lack without being behind: what a busy shard is just sending.
const underWay = 64

// awaitApplied waits until a node serves and its own state has everything up to an entry of the log.
func (c *cluster) awaitApplied(ctx context.Context, n *local.Node, applied uint64) error {
	return local.Until(ctx, stepLimit, "wait for "+n.Name, []*local.Node{n}, func(ctx context.Context) error {
		return c.With(func(client *clientv3.Client) error {
			status, err := client.Status(ctx, n.Client)
			if err == nil && status.RaftAppliedIndex < applied {
				err = fmt.Errorf("it has applied %d of %d log entries", status.RaftAppliedIndex, applied)
			}
			if err != nil {
				return err
			}
			_, err = client.Get(ctx, keyPrefix)
			return err
		}, n.Client)
	})
}

// load is a steady stream of writes and reads: an open loop, whatever the cluster does.
type load struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	begin   time.Time
	zero    time.Time // of the kill
	samples []bench.Sample
	unsent  int64
	lag     time.Duration
	errs    []error
}

// loadLimit is longer than anything that happens under load.
const loadLimit = 4 * moveLimit

// startLoad starts it. Its keys are its own.
func startLoad(ctx context.Context, c *cluster, o Options) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, begin: time.Now()}
	for kind, rate := range map[bench.Kind]float64{bench.Put: o.Rate, bench.Get: readsPerWrite * o.Rate} {
		options := bench.Options{
			Endpoints: c.Endpoints(), Workload: bench.Workload{Kind: kind}, Clients: int(o.Rate*bench.DefaultTimeout.Seconds()) + len(c.Nodes),
			Conns: len(c.Nodes), Rate: rate, Duration: loadLimit, Keys: o.Pairs, ValueBytes: o.ValueBytes, SkipLoad: true,
			Prefix: keyPrefix + "many/", Dial: l.dial(c), Observe: l.observe,
		}
		l.done.Go(func() {
			result, err := bench.Run(ctx, options)
			l.mu.Lock()
			defer l.mu.Unlock()
			if err != nil && ctx.Err() == nil {
				l.errs = append(l.errs, fmt.Errorf("load: %w", err))
			}
			if result != nil {
				l.unsent, l.lag = l.unsent+result.Unsent, max(l.lag, result.MaxLag)
			}
		})
	}
	return l
}

// dial connects as a client does that knows all nodes: to another one, if the one that it wants does not answer.
func (l *load) dial(c *cluster) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "tcp", address)
		for _, n := range c.Nodes {
			if err == nil || ctx.Err() != nil {
				break
			}
			if n.Client != address {
				conn, err = dialer.DialContext(ctx, "tcp", n.Client)
			}
		}
		return conn, err
	}
}

func (l *load) observe(s bench.Sample) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.samples = append(l.samples, s)
}

func (l *load) killed(at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.zero = at
}

// stop ends the load and notes in f what became of its requests.
func (l *load) stop(f *Failure) error {
	ended := time.Now()
	l.cancel()
	l.done.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.zero.IsZero() {
		l.zero = ended
	}
	f.Load.From, f.Load.To = l.begin.Sub(l.zero), ended.Sub(l.zero)
	f.Load.Unsent, f.Load.MaxLag = l.unsent, l.lag
	f.Load.List = samplesBefore(l.samples, l.zero, ended)
	if len(l.errs) == 0 && len(f.Load.List) == 0 {
		l.errs = append(l.errs, errors.New("load: no request was answered"))
	}
	return errors.Join(l.errs...)
}

// samplesBefore are the requests that were answered before the end: what was under way then has not failed.
func samplesBefore(samples []bench.Sample, zero, ended time.Time) (list []Sample) {
	for _, s := range samples {
		if s.End.After(ended) {
			continue
		}
		r := Sample{Due: s.Begin.Sub(zero), Took: s.End.Sub(s.Begin), Read: s.Operation == string(bench.Get)}
		if s.Err != nil {
			r.Code = status.Code(s.Err).String()
		}
		list = append(list, r)
	}
	sortSamples(list)
	return list
}

func (m *runner) endFailure(f *Failure) {
	var err error
	switch {
	case f.Error != "":
		err = errors.New(f.Error)
	case f.Lost > 0:
		err = fmt.Errorf("%d of %d acknowledged pairs are lost", f.Lost, f.Acknowledged)
	}
	text := fmt.Sprintf("next write after %s", Short(f.FirstWrite))
	if len(f.Writes) > 1 {
		text += fmt.Sprintf(", in all shards after %s; copies restored after %s", Short(f.AllWrites), Short(f.Restored))
	}
	text += fmt.Sprintf("; caught up %s after its start", Short(f.CaughtUp))
	if f.Home > 0 {
		text += ", home after " + Short(f.Home)
	}
	failed := 0
	for _, n := range f.Load.Failed() {
		failed += n
	}
	m.end(err, "%s; %d of %d requests failed", text, failed, len(f.Load.List))
}
