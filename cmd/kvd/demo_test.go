package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kvd/bench/local"
)

// demoOf is a demo of one node that is somebody else's.
func demoOf(address string) *demo {
	return &demo{Cluster: &local.Cluster{Nodes: []*local.Node{local.Given("n1", address)}}, out: io.Discard, start: time.Now()}
}

// A demo whose cluster forgets an acknowledged write says so, and its exit code, too.
func TestDemoSeesLoss(t *testing.T) {
	for _, forget := range []string{"", "demo/000017"} {
		f := startFake(t)
		f.forget = forget
		d := demoOf(f.addr)
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
	d := demoOf(f.addr)
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
	d := demoOf(f.addr)
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
		d := newShardedDemo(demoOf(f.addr))
		if err := d.write(t.Context(), 50); err != nil {
			t.Fatal(err)
		}
		if err := d.readAcross(t.Context()); errors.Is(err, errDataLost) != (forget != "") || err != nil && forget == "" {
			t.Errorf("with %q forgotten: %v", forget, err)
		}
	}
}

func TestDemoCountsShards(t *testing.T) {
	if got := shardsPerNode(testView()); got != "n1 has 2, n2 has 1" {
		t.Errorf("shards per node: %s", got)
	}
}
