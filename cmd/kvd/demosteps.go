package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/bench/local"
)

// Sizes and limits of a demo.
const (
	demoPairs     = 1000
	demoMore      = 200 // written while a node is down
	demoClients   = 32
	demoPrefix    = "demo/"
	demoStepLimit = 30 * time.Second
)

// demo is a cluster of child processes and what has been done to it.
type demo struct {
	*local.Cluster
	out      io.Writer
	start    time.Time
	measured func() [][2]string // for the report: what was measured

	mu    sync.Mutex
	acked map[string]string // every write that a node has acknowledged

	writeMean, readMean time.Duration // of the first thousand
	failover, recovery  time.Duration
}

// steps runs the demo. An errDataLost means what it says; with restore, all nodes run in the end.
func (d *demo) steps(ctx context.Context, restore bool) error {
	fmt.Fprintf(d.out, "kvd demo, strategy full: %d nodes on this machine, each a process of its own with every key\n\n", len(d.Nodes))
	if err := d.form(ctx); err != nil {
		return err
	}
	if err := d.write(ctx, demoPairs); err != nil {
		return err
	}
	if err := d.readBack(ctx, "through all nodes", d.Endpoints()...); err != nil {
		return err
	}
	lost, err := d.loseLeader(ctx)
	if err != nil {
		return err
	}
	if err := d.readBack(ctx, "through the survivors", d.Endpoints()...); err != nil {
		return err
	}
	if err := d.write(ctx, demoMore); err != nil {
		return err
	}
	if err := d.recover(ctx, lost); err != nil {
		return err
	}
	another, err := d.loseAnother(ctx, lost)
	if err != nil {
		return err
	}
	if err := d.readBack(ctx, "through "+lost.Name+" alone", lost.Client); err != nil {
		return err
	}
	if restore {
		return d.recover(ctx, another)
	}
	return nil
}

// say prints a line of the story.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%6.1f s  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

// until repeats try until it succeeds, a step's time is up, or a node that should run has ended.
func (d *demo) until(ctx context.Context, what string, nodes []*local.Node, try func(context.Context) error) error {
	return local.Until(ctx, demoStepLimit, what, nodes, try)
}

// form starts the nodes and waits until each of them answers.
func (d *demo) form(ctx context.Context) error {
	for _, n := range d.Nodes {
		if err := d.Start(n); err != nil {
			return err
		}
		fmt.Fprintf(d.out, "          %s  pid %-7d client %s\n", n.Name, n.Pid(), n.Client)
	}
	if err := d.AwaitServing(ctx, demoStepLimit, demoPrefix, d.Nodes...); err != nil {
		return err
	}
	leader, _, err := d.leader(ctx)
	if err != nil {
		return err
	}
	d.say("all %d serve; %s leads", len(d.Nodes), leader.Name)
	return nil
}

// leader waits for a node that leads, and returns it with what it says about itself.
func (d *demo) leader(ctx context.Context) (leader *local.Node, status *pb.StatusResponse, err error) {
	err = d.until(ctx, "look for the leader", nil, func(ctx context.Context) (err error) {
		leader, status, err = d.Leader(ctx)
		return err
	})
	return leader, status, err
}

// each calls work for every number below n from demoClients goroutines, and returns the first error.
func each(ctx context.Context, n int, work func(context.Context, int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var all sync.WaitGroup
	for range demoClients {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := work(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// write puts n new pairs through all running nodes.
func (d *demo) write(ctx context.Context, n int) error {
	client, err := d.Connect()
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, demoStepLimit)
	defer cancel()
	first, begin := len(d.acked), time.Now()
	var busy atomic.Int64
	err = each(ctx, n, func(ctx context.Context, i int) error {
		start := time.Now()
		defer func() { busy.Add(int64(time.Since(start))) }()
		key := fmt.Sprintf("%s%06d", demoPrefix, first+i)
		var refused error
		err := d.until(ctx, "write "+key, nil, func(ctx context.Context) error {
			err := d.put(ctx, client, key)
			if err == nil || isUnavailable(err) { // to put the same value again is harmless
				return err
			}
			refused = err
			return nil
		})
		return errors.Join(err, refused)
	})
	if err != nil {
		return fmt.Errorf("write %d pairs: %w", n, err)
	}
	took := time.Since(begin)
	if d.writeMean == 0 {
		d.writeMean = time.Duration(busy.Load()) / time.Duration(n)
	}
	d.say("%d pairs written by %d clients in %s: %.0f per second", n, demoClients, short(took), float64(n)/took.Seconds())
	return nil
}

// put writes one key and remembers it once it is acknowledged.
func (d *demo) put(ctx context.Context, client *clientv3.Client, key string) error {
	value := "value of " + key
	if _, err := client.Put(ctx, key, value); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.acked == nil {
		d.acked = make(map[string]string)
	}
	d.acked[key] = value
	return nil
}

// readBack reads every acknowledged pair through endpoints. What is missing or different is an errDataLost.
func (d *demo) readBack(ctx context.Context, through string, endpoints ...string) error {
	client, err := d.Connect(endpoints...)
	if err != nil {
		return err
	}
	defer client.Close()
	keys := make([]string, 0, len(d.acked))
	for key := range d.acked {
		keys = append(keys, key)
	}
	var lost atomic.Int64
	var busy atomic.Int64
	begin := time.Now()
	err = each(ctx, len(keys), func(ctx context.Context, i int) error {
		var got *clientv3.GetResponse
		start := time.Now()
		err := d.until(ctx, "read "+keys[i], nil, func(ctx context.Context) (err error) {
			got, err = client.Get(ctx, keys[i])
			return err
		})
		busy.Add(int64(time.Since(start)))
		if err == nil && (len(got.Kvs) != 1 || string(got.Kvs[0].Value) != d.acked[keys[i]]) {
			lost.Add(1)
		}
		return err
	})
	if err != nil {
		return err
	}
	if n := lost.Load(); n > 0 {
		return fmt.Errorf("%w: %d of %d acknowledged writes are missing or wrong when read %s", errDataLost, n, len(keys), through)
	}
	if d.readMean == 0 {
		d.readMean = time.Duration(busy.Load()) / time.Duration(len(keys))
	}
	d.say("%d pairs read back %s in %s, none lost", len(keys), through, short(time.Since(begin)))
	return nil
}

// loseLeader kills the leader and waits for the first write that succeeds after it.
func (d *demo) loseLeader(ctx context.Context) (*local.Node, error) {
	leader, _, err := d.leader(ctx)
	if err != nil {
		return nil, err
	}
	client, err := d.Connect()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	leader.Kill()
	killed := time.Now()
	d.say("kill -9 %s, the leader", leader.Name)
	if err := d.firstWrite(ctx, client); err != nil {
		return nil, err
	}
	d.failover = time.Since(killed)
	next, _, err := d.leader(ctx)
	if err != nil {
		return nil, err
	}
	d.say("a write succeeds %s after the kill; %s leads", short(d.failover), next.Name)
	return leader, nil
}

// firstWrite tries with several clients at once, each write a new key, until one succeeds.
func (d *demo) firstWrite(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, demoStepLimit)
	defer cancel()
	errSuccess := errors.New("a write succeeded")
	err := each(ctx, 1<<20, func(ctx context.Context, i int) error {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if d.put(attempt, client, fmt.Sprintf("%sfailover/%06d", demoPrefix, i)) == nil {
			return errSuccess
		}
		select { // a refused connection answers at once
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
		return nil
	})
	if !errors.Is(err, errSuccess) {
		return fmt.Errorf("no write succeeded within %v of the kill: %w", demoStepLimit, err)
	}
	return nil
}

// recover starts a killed node again and waits until it has everything that the leader had then.
func (d *demo) recover(ctx context.Context, n *local.Node) error {
	_, target, err := d.leader(ctx)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := d.Start(n); err != nil {
		return err
	}
	d.say("%s starts again (pid %d)", n.Name, n.Pid())
	var has int64
	err = d.until(ctx, "wait for "+n.Name, []*local.Node{n}, func(ctx context.Context) error {
		client, err := d.Connect(n.Client)
		if err != nil {
			return err
		}
		defer client.Close()
		has, err = localPairs(ctx, client, n.Client, target.GetRaftAppliedIndex())
		return err
	})
	if err != nil {
		return err
	}
	if has < int64(len(d.acked)) {
		return fmt.Errorf("%w: %s has %d of %d acknowledged writes after it caught up", errDataLost, n.Name, has, len(d.acked))
	}
	if d.recovery == 0 {
		d.recovery = time.Since(begin)
	}
	d.say("%s has caught up, %s after its start: all %d pairs are in its own state", n.Name, short(time.Since(begin)), len(d.acked))
	return nil
}

// localPairs counts the pairs in a node's own state, once that has applied index.
func localPairs(ctx context.Context, client *clientv3.Client, endpoint string, index uint64) (int64, error) {
	status, err := client.Status(ctx, endpoint)
	if err != nil {
		return 0, err
	}
	if status.RaftAppliedIndex < index {
		return 0, fmt.Errorf("it has applied %d of %d log entries", status.RaftAppliedIndex, index)
	}
	got, err := client.Get(ctx, demoPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithSerializable())
	if err != nil {
		return 0, err
	}
	return got.Count, nil
}

// loseAnother kills a node other than spare: the leader, if that is one.
func (d *demo) loseAnother(ctx context.Context, spare *local.Node) (*local.Node, error) {
	leader, _, err := d.leader(ctx)
	if err != nil {
		return nil, err
	}
	victim := leader
	for _, n := range d.Nodes {
		if victim == spare {
			victim = n
		}
	}
	victim.Kill()
	role := "a follower"
	if victim == leader {
		role = "the leader"
	}
	d.say("kill -9 %s, %s", victim.Name, role)
	return victim, nil
}
