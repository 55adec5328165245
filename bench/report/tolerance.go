package report

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvd/bench/local"
)

// tests are the founding report's three tests of fault tolerance, for a strategy.
func tests(strategy string) []*Test {
	layout := func(nodes, copies int) Layout {
		if strategy == Full {
			return Layout{Strategy: Full, Nodes: nodes, Copies: nodes}
		}
		return Layout{Strategy: strategy, Nodes: nodes, Shards: shards, Copies: copies}
	}
	return []*Test{
		{Number: 1, Layout: layout(3, 2), Title: "Single Node Failure", Operation: "Write 10 key-value pairs, fail 1 node, read all key-value pairs."},
		{Number: 2, Layout: layout(5, 3), Title: "Multiple Node Failures", Operation: "Write 20 key-value pairs, fail 2 nodes, read all key-value pairs."},
		{Number: 3, Layout: layout(3, 2), Title: "Node Recovery", Operation: "Write 10 key-value pairs, fail 1 node, recover the node, read all key-value pairs."},
	}
}

// test does one of them with a cluster of its own.
func (m *runner) test(ctx context.Context, t *Test) {
	m.begin(t.Layout, fmt.Sprintf("test %d: %s", t.Number, t.Title))
	c, err := m.form(ctx, t.Layout)
	defer c.close()
	if err == nil {
		switch t.Number {
		case 1:
			err = t.nodesFail(ctx, c, 10, 1)
		case 2:
			err = t.nodesFail(ctx, c, 20, 2)
		case 3:
			err = t.nodeRecovers(ctx, c, 10)
		}
	}
	t.Error = reason(err)
	if err == nil && !t.Passed() {
		err = fmt.Errorf("%d of %d acknowledged pairs are lost", t.Written-t.Read, t.Written)
	}
	m.end(err, "passed: %d of %d pairs read back", t.Read, t.Written)
}

// nodesFail is tests 1 and 2: the leader fails and, at the same moment, as many others as are to fail with it.
func (t *Test) nodesFail(ctx context.Context, c *cluster, pairs, failures int) error {
	written := make(ledger)
	if err := written.write(ctx, c, "test/", pairs); err != nil {
		return err
	}
	t.Written = len(written)
	leader, _, err := c.findLeader(ctx)
	if err != nil {
		return err
	}
	victims := append([]*local.Node{leader}, c.Running(leader)[:failures-1]...)
	return t.killAndRead(ctx, c, written, victims...)
}

// killAndRead kills nodes at once and reads everything through each of those that live.
func (t *Test) killAndRead(ctx context.Context, c *cluster, written ledger, victims ...*local.Node) error {
	for _, n := range victims { // so that none outlives the other
		if err := n.Pause(); err != nil {
			return err
		}
		t.Killed = append(t.Killed, n.Name)
	}
	killed := time.Now()
	for _, n := range victims {
		n.Kill()
	}
	survivors := c.Running()
	t.Through = nil
	for _, n := range survivors {
		t.Through = append(t.Through, n.Name)
	}
	good, err := written.readAll(ctx, c, survivors)
	t.Read, t.ReadAfter = good, time.Since(killed)
	return err
}

// nodeRecovers is test 3. That the node has synchronized its data shows when another one fails: what is read then is
// what it has. Pairs are also written while it is away.
func (t *Test) nodeRecovers(ctx context.Context, c *cluster, pairs int) error {
	written := make(ledger)
	if err := written.write(ctx, c, "test/", pairs); err != nil {
		return err
	}
	first, _, err := c.findLeader(ctx)
	if err != nil {
		return err
	}
	if err := t.killAndRead(ctx, c, written, first); err != nil {
		return err
	}
	if t.Read != len(written) {
		t.Written = len(written)
		return errors.New("pairs are missing while the node is away")
	}
	if err := written.write(ctx, c, "test/meanwhile/", pairs); err != nil {
		return err
	}
	t.Written = len(written)
	var f Failure
	if err := c.recover(ctx, &f, first, time.Now()); err != nil {
		return err
	}
	t.CaughtUp = f.CaughtUp
	another, _, err := c.findLeader(ctx)
	if err != nil {
		return err
	}
	if another == first {
		another = c.Running(first)[0]
	}
	return t.killAndRead(ctx, c, written, another)
}
