package main

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A demo whose cluster forgets an acknowledged write says so, and its exit code, too.
func TestDemoSeesLoss(t *testing.T) {
	for _, forget := range []string{"", "demo/000017"} {
		f := startFake(t)
		f.forget = forget
		d := &demo{out: io.Discard, nodes: []*demoNode{{name: "n1", client: f.addr, exited: make(chan struct{})}}, start: time.Now()}
		if err := d.write(t.Context(), 50); err != nil {
			t.Fatal(err)
		}
		err := d.readBack(t.Context(), "again", f.addr)
		if lost := errors.Is(err, errDataLost); lost != (forget != "") || !lost && err != nil {
			t.Errorf("with %q forgotten: %v", forget, err)
		}
		if forget != "" && exitCode(t.Context(), err) != exitDataLost {
			t.Errorf("the exit code of %v is %d", err, exitCode(t.Context(), err))
		}
	}
}

func TestDemoSeesWrongValues(t *testing.T) {
	f := startFake(t)
	d := &demo{out: io.Discard, nodes: []*demoNode{{name: "n1", client: f.addr, exited: make(chan struct{})}}, start: time.Now()}
	if err := d.write(t.Context(), 5); err != nil {
		t.Fatal(err)
	}
	f.pairs["demo/000003"] = "something else"
	if err := d.readBack(t.Context(), "again", f.addr); !errors.Is(err, errDataLost) {
		t.Error(err)
	}
}

// What was never acknowledged is no loss.
func TestDemoRemembersAcknowledgedWritesOnly(t *testing.T) {
	f := startFake(t)
	f.fail = errTest
	d := &demo{out: io.Discard, nodes: []*demoNode{{name: "n1", client: f.addr, exited: make(chan struct{})}}, start: time.Now()}
	if err := d.write(t.Context(), 5); err == nil {
		t.Error("writes that all failed are a success")
	}
	if len(d.acked) != 0 {
		t.Errorf("it remembers %v", d.acked)
	}
}

func TestEach(t *testing.T) {
	var calls [100]atomic.Int32
	if err := each(t.Context(), len(calls), func(_ context.Context, i int) error { calls[i].Add(1); return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range calls {
		if n := calls[i].Load(); n != 1 {
			t.Errorf("%d was called %d times", i, n)
		}
	}
	var after atomic.Int32
	err := each(t.Context(), 1<<30, func(ctx context.Context, i int) error {
		if i == 3 {
			return errTest
		}
		after.Add(1)
		<-ctx.Done()
		return nil
	})
	if !errors.Is(err, errTest) || after.Load() > 2*demoClients {
		t.Errorf("ended with %v after %d calls", err, after.Load())
	}
}

func TestDemoNodes(t *testing.T) {
	nodes, err := newDemoNodes(3, "/tmp/x")
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, n := range nodes {
		addresses = append(addresses, n.client, n.peer, n.http)
		if n.running() {
			t.Errorf("%s runs before it was started", n.name)
		}
	}
	slices.Sort(addresses)
	if len(slices.Compact(addresses)) != 9 {
		t.Errorf("addresses are used twice: %v", addresses)
	}
	d := &demo{nodes: nodes}
	if got, want := d.peers(), "n1="+nodes[0].peer+",n2="+nodes[1].peer+",n3="+nodes[2].peer; got != want {
		t.Errorf("peers %q, want %q", got, want)
	}
}

func TestChildrenAreNotConfiguredByAccident(t *testing.T) {
	got := withoutSettings([]string{"PATH=/bin", "KVD_NAME=other", "KVDX=1", "KVD_CONFIG=x"})
	if strings.Join(got, " ") != "PATH=/bin KVDX=1" {
		t.Errorf("children get %v", got)
	}
}

func TestDemoStrategies(t *testing.T) {
	for _, c := range []struct {
		o    demoOptions
		want string // "" = refused
	}{
		{demoOptions{strategy: "both"}, "full consistent"},
		{demoOptions{strategy: "full", nodes: 3}, "full"},
		{demoOptions{strategy: "consistent", nodes: 5}, "consistent"},
		{demoOptions{strategy: "both", nodes: 7}, "full consistent"},
		{demoOptions{strategy: "both", nodes: 4}, ""},
		{demoOptions{strategy: "full", nodes: 2}, ""},
		{demoOptions{strategy: "full", nodes: 8}, ""},
		{demoOptions{strategy: "magic"}, ""},
	} {
		got, err := c.o.strategies()
		var usage *usageError
		if strings.Join(got, " ") != c.want || (c.want == "") != errors.As(err, &usage) {
			t.Errorf("%+v shows %v, %v; want %q", c.o, got, err, c.want)
		}
	}
}

// A read across all shards that misses an acknowledged write is a loss.
func TestDemoSeesLossAcrossShards(t *testing.T) {
	for _, forget := range []string{"", "demo/000017"} {
		f := startFake(t)
		f.forget = forget
		d := newShardedDemo(&demo{out: io.Discard, nodes: []*demoNode{{name: "n1", client: f.addr, exited: make(chan struct{})}}, start: time.Now()})
		if err := d.write(t.Context(), 50); err != nil {
			t.Fatal(err)
		}
		if err := d.readAcross(t.Context()); errors.Is(err, errDataLost) != (forget != "") || err != nil && forget == "" {
			t.Errorf("with %q forgotten: %v", forget, err)
		}
	}
}

func TestDemoKnowsWhereShardsAre(t *testing.T) {
	view := overviewOf(testView())
	d := newShardedDemo(&demo{})
	d.home = map[int][]string{0: {"n1", "n2"}, 1: {"n1"}, 2: {"n1"}}
	if got := strings.Join(dataNodes(view.Shards[1]), " "); got != "n1" { // one is down, one has no vote yet
		t.Errorf("live copies are on %q", got)
	}
	if got := shardsPerNode(view); got != "n1 has 2, n2 has 1" {
		t.Errorf("shards per node: %s", got)
	}
	if got := d.away(view); got != demoShards-2 {
		t.Errorf("%d shards are not home", got)
	}
	if err := allOK(view); err == nil {
		t.Error("a shard that moves is at rest")
	}
	view.Shards = view.Shards[:1]
	if err := allOK(view); err != nil {
		t.Error(err)
	}
	view.Shards = nil
	if err := allOK(view); err == nil {
		t.Error("no shards at all are at rest")
	}
}
