package report

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/bench/local"
)

// Options of Run. The zero value of each has the default it names.
type Options struct {
	Strategies []string // default: both
	Pairs      int      // default 1000
	ValueBytes int      // default 256
	Clients    int      // that write or read at the same time; default 32
	Rate       float64  // of writes per second, and a little less of reads, while nodes die and return; default 100
	Quick      bool     // fewer pairs and shorter spells, to see that it works
	Dir        string   // an existing directory for the nodes' data; default: the system's for temporary files
	Kvd        string   // the kvd program; default: this program
	Program    Program  // Go and Revision are found out
	Progress   func(Step)
}

// Step is a part of the work. Progress gets it when it begins, without Result and Err, and when it ends.
type Step struct {
	Number, Total int
	Where, What   string
	Result        string // in a few words
	Err           error
}

const (
	shards    = 16
	keyPrefix = "report/"
	downAfter = 3 * time.Second

	// readsPerWrite is not 1: reads and writes that are due in step would always meet, or never.
	readsPerWrite = 0.97

	stepLimit = 30 * time.Second // for anything that a healthy cluster does at once
	moveLimit = 60 * time.Second // for copies to be made elsewhere, or to come home
)

func (o Options) withDefaults() Options {
	if len(o.Strategies) == 0 {
		o.Strategies = []string{Full, Consistent}
	}
	if o.Quick {
		o.Pairs = cmp.Or(o.Pairs, 100)
	}
	o.Pairs = cmp.Or(o.Pairs, 1000)
	o.ValueBytes = cmp.Or(o.ValueBytes, 256)
	o.Clients = cmp.Or(o.Clients, 32)
	o.Rate = cmp.Or(o.Rate, 100)
	if o.Progress == nil {
		o.Progress = func(Step) {}
	}
	return o
}

// Bounds of Options.
const (
	maxPairs      = 1_000_000
	maxValueBytes = 1 << 20
	maxClients    = 10_000
	maxRate       = 10_000
)

// ErrOptions: an option is out of bounds.
var ErrOptions = errors.New("invalid options")

// Validate returns an ErrOptions that says what is wrong.
func (o Options) Validate() error {
	for _, b := range []struct {
		what        string
		value, most float64
	}{
		{"pairs", float64(o.Pairs), maxPairs}, {"bytes of a value", float64(o.ValueBytes), maxValueBytes},
		{"clients", float64(o.Clients), maxClients}, {"requests per second", o.Rate, maxRate},
	} {
		if !(b.value >= 0 && b.value <= b.most) { // also what is no number
			return fmt.Errorf("%w: %g %s: at most %g, or 0 for the default", ErrOptions, b.value, b.what, b.most)
		}
	}
	return nil
}

// layouts are the clusters whose speed and recovery are measured.
func layouts(strategy string) []Layout {
	if strategy == Full {
		return []Layout{{Strategy: Full, Nodes: 3, Copies: 3}}
	}
	return []Layout{
		{Strategy: Consistent, Nodes: 3, Shards: shards, Copies: 2},
		{Strategy: Consistent, Nodes: 5, Shards: shards, Copies: 3},
	}
}

// runner does the steps one after the other and keeps count.
type runner struct {
	o     Options
	dir   string
	calm  time.Duration // before and after something happens
	step  Step
	total int
}

// Run measures. Steps that fail are in the report; an error says that there is none, as when ctx has ended. All
// processes have ended and all of their files are removed when it returns.
func Run(ctx context.Context, o Options) (r *Report, err error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	m := &runner{o: o, calm: 3 * time.Second}
	sustained := 3 * time.Second
	if o.Quick {
		m.calm, sustained = 500*time.Millisecond, 300*time.Millisecond
	}
	if m.dir, err = os.MkdirTemp(o.Dir, "kvd-report-"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(m.dir)) }()
	r = &Report{
		Format: Format, Started: time.Now(), Quick: o.Quick, Program: o.Program.complete(),
		Load: Load{
			Pairs: o.Pairs, ValueBytes: o.ValueBytes, Clients: o.Clients, Sustained: sustained, WriteRate: o.Rate, ReadRate: readsPerWrite * o.Rate, DownAfter: downAfter,
		},
	}
	if r.Machine, err = thisMachine(m.dir); err != nil {
		return nil, err
	}
	for _, strategy := range o.Strategies {
		m.total += len(layouts(strategy))*stepsPerCluster + len(tests(strategy))
	}
	for _, strategy := range o.Strategies {
		for _, layout := range layouts(strategy) {
			r.Clusters = append(r.Clusters, m.measure(ctx, layout, r.Load))
		}
	}
	for _, strategy := range o.Strategies {
		for _, test := range tests(strategy) {
			m.test(ctx, test)
			r.Tests = append(r.Tests, test)
		}
	}
	r.Took = time.Since(r.Started)
	return r, ctx.Err()
}

// begin and end tell of a step.
func (m *runner) begin(layout Layout, what string) {
	m.step = Step{Number: m.step.Number + 1, Total: m.total, Where: layout.Name(), What: what}
	m.o.Progress(m.step)
}

func (m *runner) end(err error, format string, args ...any) {
	m.step.Err = err
	m.step.Result = fmt.Sprintf(format, args...)
	if err != nil {
		m.step.Result = reason(err)
	}
	m.o.Progress(m.step)
}

// reason is an error for the report; empty if there is none.
func reason(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// cluster is a cluster that is measured.
type cluster struct {
	*local.Cluster
	layout Layout
	probes []string           // a key of each shard; one in full
	homes  map[int32][]string // nodes with the data of each shard, at rest
}

// form starts a cluster of its own directory and waits until all nodes serve and all shards are where they belong. The
// caller closes it, also after an error.
func (m *runner) form(ctx context.Context, l Layout, flags ...string) (*cluster, error) {
	dir, err := os.MkdirTemp(m.dir, "cluster-")
	if err != nil {
		return nil, err
	}
	nodes, err := local.New(l.Nodes, dir)
	if err != nil {
		return nil, err
	}
	nodes.Program, nodes.Flags = m.o.Kvd, append(l.flags(), flags...)
	c := &cluster{Cluster: nodes, layout: l, probes: []string{keyPrefix + "probe"}}
	if err := c.Start(c.Nodes...); err != nil {
		return c, err
	}
	if err := c.AwaitServing(ctx, stepLimit, keyPrefix, c.Nodes...); err != nil || l.Strategy == Full {
		return c, err
	}
	if err := c.awaitRest(ctx); err != nil {
		return c, err
	}
	c.probes, err = c.Probes(ctx, keyPrefix+"probe/", l.Shards)
	return c, err
}

// flags of kvd start.
func (l Layout) flags() []string {
	if l.Strategy == Full {
		return []string{"--strategy", Full}
	}
	return []string{
		"--strategy", Consistent, "--shards", fmt.Sprint(l.Shards), "--replication-factor", fmt.Sprint(l.Copies),
		"--down-after", downAfter.String(),
	}
}

// close ends the nodes and removes their files.
func (c *cluster) close() {
	if c == nil {
		return
	}
	c.Close()
	_ = os.RemoveAll(filepath.Dir(c.Nodes[0].Dir)) // what stays goes with all the rest
}

// awaitRest waits until every shard is where it is wanted, and notes where that is.
func (c *cluster) awaitRest(ctx context.Context) error {
	if c.layout.Strategy == Full {
		return nil
	}
	return local.Until(ctx, moveLimit, "wait for all shards to be in place", c.Nodes, func(ctx context.Context) error {
		view, err := c.Shards(ctx)
		if err != nil {
			return err
		}
		if err := local.AllOK(view); err != nil {
			return pause(ctx, err)
		}
		c.homes = local.Homes(view)
		for number, nodes := range c.homes {
			if len(nodes) != c.layout.Copies {
				return pause(ctx, fmt.Errorf("shard %d has %d copies of %d", number, len(nodes), c.layout.Copies))
			}
		}
		return nil
	})
}

// pause is err, a moment later: shards need not be looked at all the time.
func pause(ctx context.Context, err error) error {
	_ = sleep(ctx, 100*time.Millisecond)
	return err
}

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// findLeader waits for a node that leads; with shards, group 0.
func (c *cluster) findLeader(ctx context.Context) (leader *local.Node, applied uint64, err error) {
	err = local.Until(ctx, stepLimit, "look for the leader", nil, func(ctx context.Context) error {
		node, status, err := c.Leader(ctx)
		leader, applied = node, status.GetRaftAppliedIndex()
		return err
	})
	return leader, applied, err
}

// ledger is what has been acknowledged.
type ledger map[string]string

// write puts n new pairs, each until it is acknowledged.
func (l ledger) write(ctx context.Context, c *cluster, prefix string, n int, endpoints ...string) error {
	return c.With(func(client *clientv3.Client) error {
		for i := range n {
			key := fmt.Sprintf("%s%s%04d", keyPrefix, prefix, i)
			if err := l.put(ctx, client, key); err != nil {
				return err
			}
		}
		return nil
	}, endpoints...)
}

// put writes one key, until that is acknowledged, and notes it.
func (l ledger) put(ctx context.Context, client *clientv3.Client, key string) error {
	value := "value of " + key
	err := local.Until(ctx, stepLimit, "write "+key, nil, func(ctx context.Context) error {
		_, err := client.Put(ctx, key, value)
		return err
	})
	if err == nil {
		l[key] = value
	}
	return err
}

// read gets all pairs, and says which are as they were written.
func (l ledger) read(ctx context.Context, c *cluster, endpoint string, how ...clientv3.OpOption) (good map[string]bool, err error) {
	good = make(map[string]bool)
	err = c.With(func(client *clientv3.Client) error {
		for key, value := range l {
			var got *clientv3.GetResponse
			err := local.Until(ctx, stepLimit, "read "+key, nil, func(ctx context.Context) (err error) {
				got, err = client.Get(ctx, key, how...)
				return err
			})
			if err != nil {
				return err
			}
			if len(got.Kvs) == 1 && string(got.Kvs[0].Value) == value {
				good[key] = true
			}
		}
		return nil
	}, endpoint)
	return good, err
}

// readAll reads everything through each of the nodes, and counts what was right through all of them.
func (l ledger) readAll(ctx context.Context, c *cluster, nodes []*local.Node, how ...clientv3.OpOption) (good int, err error) {
	seen := make(map[string]int)
	for _, n := range nodes {
		right, err := l.read(ctx, c, n.Client, how...)
		if err != nil {
			return 0, fmt.Errorf("through %s: %w", n.Name, err)
		}
		for key := range right {
			seen[key]++
		}
	}
	for _, times := range seen {
		if times == len(nodes) {
			good++
		}
	}
	return good, nil
}
