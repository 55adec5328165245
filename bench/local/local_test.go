package local

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"kvd/server/kvdpb"
)

func TestNew(t *testing.T) {
	c, err := New(3, "/tmp/x")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var addresses []string
	for _, n := range c.Nodes {
		addresses = append(addresses, n.Client, n.Peer, n.HTTP)
		if n.Running() || n.Pid() != 0 {
			t.Errorf("%s runs before it was started", n.Name)
		}
		n.Kill() // of what does not run is nothing
		n.Terminate()
		n.Await(time.Nanosecond)
	}
	slices.Sort(addresses)
	if len(slices.Compact(addresses)) != 9 {
		t.Errorf("addresses are used twice: %v", addresses)
	}
	if got, want := c.Peers(), "n1="+c.Nodes[0].Peer+",n2="+c.Nodes[1].Peer+",n3="+c.Nodes[2].Peer; got != want {
		t.Errorf("peers %q, want %q", got, want)
	}
}

// Two clusters never have a port in common, though no node listens yet, until one of them is closed.
func TestPortsAreHeld(t *testing.T) {
	const nodes = 100 // by chance, some ports would be the same
	taken := make(map[string]bool)
	var clusters []*Cluster
	for range 2 {
		c, err := New(nodes, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clusters = append(clusters, c)
		for _, n := range c.Nodes {
			for _, address := range []string{n.Client, n.Peer, n.HTTP} {
				if taken[address] {
					t.Errorf("%s is in both", address)
				}
				taken[address] = true
			}
		}
	}
	address := clusters[0].Nodes[0].Peer
	if hold, err := holdPort(address); err == nil {
		t.Errorf("%s is not held", address)
		hold.Close()
	}
	clusters[0].Close()
	hold, err := holdPort(address)
	if err != nil {
		t.Fatalf("%s is not given up: %v", address, err)
	}
	hold.Close()
}

func TestChildrenAreNotConfiguredByAccident(t *testing.T) {
	got := withoutSettings([]string{"PATH=/bin", "KVD_NAME=other", "KVDX=1", "KVD_CONFIG=x"})
	if strings.Join(got, " ") != "PATH=/bin KVDX=1" {
		t.Errorf("children get %v", got)
	}
}

func TestRunningNodes(t *testing.T) {
	c := &Cluster{Nodes: []*Node{Given("n1", "a:1"), {Name: "n2", Client: "a:2"}, Given("n3", "a:3")}}
	if got := strings.Join(c.Endpoints(), " "); got != "a:1 a:3" {
		t.Errorf("endpoints are %s", got)
	}
	if got := c.Running(c.Nodes[0]); len(got) != 1 || got[0] != c.Nodes[2] {
		t.Errorf("without n1 run %v", got)
	}
	c.Close()
	if !c.Nodes[0].Running() {
		t.Error("a node of somebody else's was ended")
	}
}

// A process that ends is noticed, and its last line is the reason.
func TestNodeThatEnds(t *testing.T) {
	c, err := New(1, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c.Program = "/bin/echo"
	n := c.Nodes[0]
	if err := c.Start(n); err != nil {
		t.Fatal(err)
	}
	err = Until(t.Context(), time.Minute, "wait for it", c.Nodes, func(ctx context.Context) error {
		<-ctx.Done() // which the end of the node ends
		return errors.New("not yet")
	})
	if err == nil || !strings.HasPrefix(err.Error(), "n1 ended: start --name n1") {
		t.Errorf("it waited until %v", err)
	}
	n.Kill()
	c.Program = "/nowhere/kvd"
	if err := c.Start(n); err == nil {
		t.Error("a program that does not exist was started")
	}
}

func TestUntil(t *testing.T) {
	tries := 0
	if err := Until(t.Context(), time.Minute, "it", nil, func(context.Context) error {
		if tries++; tries < 3 {
			return errors.New("not yet")
		}
		return nil
	}); err != nil || tries != 3 {
		t.Errorf("%d tries, %v", tries, err)
	}
	errWhy := errors.New("why")
	err := Until(t.Context(), time.Millisecond, "it", nil, func(context.Context) error { return errWhy })
	if !errors.Is(err, errWhy) {
		t.Errorf("out of time: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = Until(ctx, time.Minute, "it", nil, func(context.Context) error { cancel(); return errWhy })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func replica(node, role, state string, alive bool) *kvdpb.Replica {
	return &kvdpb.Replica{Node: node, Role: role, State: state, Alive: alive}
}

func TestWhereShardsAre(t *testing.T) {
	view := &kvdpb.ShardsResponse{Shards: []*kvdpb.Shard{
		{Number: 0, State: "ok", Replicas: []*kvdpb.Replica{replica("n2", "data", "voter", true), replica("n1", "data", "voter", true), replica("n4", "witness", "voter", true)}},
		{Number: 1, State: "moving", Replicas: []*kvdpb.Replica{replica("n1", "data", "voter", true), replica("n3", "data", "voter", false), replica("n2", "data", "learner", true)}},
		{Number: 2, State: "no quorum"},
	}}
	if got := strings.Join(DataNodes(view.Shards[0]), " "); got != "n1 n2" {
		t.Errorf("live copies are on %q", got)
	}
	if got := strings.Join(DataNodes(view.Shards[1]), " "); got != "n1" { // one is down, one has no vote yet
		t.Errorf("live copies are on %q", got)
	}
	if got := Away(view, map[int32][]string{0: {"n1", "n2"}, 1: {"n1"}, 2: {"n1"}, 3: {"n1"}}); got != 2 {
		t.Errorf("%d shards are not home", got)
	}
	if got := Away(view, Homes(view)); got != 0 {
		t.Errorf("%d shards are not where they are", got)
	}
	if err := AllOK(view); err == nil {
		t.Error("a shard that moves is at rest")
	}
	view.Shards = view.Shards[:1]
	if err := AllOK(view); err != nil {
		t.Error(err)
	}
	view.Shards = nil
	if err := AllOK(view); err == nil {
		t.Error("no shards at all are at rest")
	}
}
