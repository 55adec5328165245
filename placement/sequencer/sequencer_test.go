package sequencer

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

func reserve(t *testing.T, n *node, count int) int64 {
	t.Helper()
	ctx, cancel := within(30 * time.Second)
	defer cancel()
	first, err := n.client.Reserve(ctx, func() int { return count })
	if err != nil {
		t.Fatalf("reserve %d on %s: %v", count, n.name, err)
	}
	return first
}

func latest(t *testing.T, n *node) int64 {
	t.Helper()
	ctx, cancel := within(30 * time.Second)
	defer cancel()
	last, err := n.client.Latest(ctx)
	if err != nil {
		t.Fatalf("latest on %s: %v", n.name, err)
	}
	return last
}

func TestRevisionsBeginAfterAnEmptyStore(t *testing.T) {
	bubble(t, &cluster{}, func(c *cluster) {
		nodes := c.up()
		if got := latest(t, nodes[0]); got != 1 {
			t.Errorf("the latest revision of an empty cluster is %d", got)
		}
		next := int64(2)
		for i, n := range []*node{nodes[0], nodes[1], nodes[2], nodes[0]} {
			if got := reserve(t, n, 10+i); got != next {
				t.Errorf("%s got %d, not %d", n.name, got, next)
			}
			next += int64(10 + i)
			if got := latest(t, nodes[i%2]); got != next-1 {
				t.Errorf("the latest is %d, not %d", got, next-1)
			}
		}
	})
}

// No two get the same, whatever they ask for at the same time, and each gets
// more than what was handed out before it asked.
func TestEveryRevisionIsHandedOutOnce(t *testing.T) {
	bubble(t, &cluster{window: 100}, func(c *cluster) { // many windows
		type span struct{ first, last int64 }
		var mu sync.Mutex
		var spans []span
		var all sync.WaitGroup
		for i := range 30 {
			n := c.up()[i%3]
			all.Go(func() {
				var before int64
				for j := range 20 {
					count := 1 + (i*7+j*13)%150 // more than a window too
					first := reserve(t, n, count)
					if first <= before {
						t.Errorf("got %d after %d", first, before)
					}
					before = first + int64(count) - 1
					mu.Lock()
					spans = append(spans, span{first, before})
					mu.Unlock()
					if last := latest(t, n); last < before {
						t.Errorf("the latest is %d after %d", last, before)
					}
				}
			})
		}
		all.Wait()
		seen := make(map[int64]bool)
		for _, s := range spans {
			for r := s.first; r <= s.last; r++ {
				if seen[r] || r < 2 {
					t.Fatalf("%d was handed out twice, or is too small", r)
				}
				seen[r] = true
			}
		}
	})
}

// A window that is soon used up is extended before that.
func TestWindowsAreMadeReadyAhead(t *testing.T) {
	bubble(t, &cluster{window: 1000}, func(c *cluster) {
		leader, replica := c.leader(0)
		reserve(t, leader, 1)
		time.Sleep(time.Second)
		for range 20 {
			before := replica.Status().LastLogIndex
			c.log(leader.name, 0).Stall(time.Second)
			start := time.Now()
			reserve(t, leader, 200)
			if took := time.Since(start); took > 100*time.Millisecond {
				t.Errorf("waited %v for a window", took)
			}
			time.Sleep(2 * time.Second)
			if after := replica.Status().LastLogIndex; after > before+1 {
				t.Errorf("%d entries for one window", after-before)
			}
		}
	})
}

func TestANewLeaderGoesOnAbove(t *testing.T) {
	bubble(t, &cluster{window: 1000}, func(c *cluster) {
		var before int64
		for i := range 12 {
			n := c.up()[i%3]
			first := reserve(t, n, 10)
			if last := latest(t, c.up()[(i+1)%3]); first <= before || last < first+9 {
				t.Errorf("got %d after %d, and the latest is %d", first, before, last)
			}
			before = first + 9
			leader, replica := c.leader(0)
			switch i % 3 {
			case 0: // and back again: it must not go on where it was
				ctx, cancel := within(10 * time.Second)
				_ = replica.TransferLeadership(ctx, "")
				cancel()
			case 1:
				c.stop(leader.name)
				c.leader(0)
				c.start(leader.name)
			case 2:
				c.network.Isolate(leader.name)
				c.leader(0, leader.name)
				c.network.Rejoin(leader.name)
			}
			time.Sleep(3 * time.Second)
		}
		if before > 20_000 {
			t.Errorf("120 revisions in 12 terms ended at %d", before)
		}
	})
}

// A leader that comes back in a later term has what it had made ready before.
// It must not use it: another has handed out more meanwhile.
func TestALeaderDoesNotUseAnEarlierTermsWindow(t *testing.T) {
	bubble(t, &cluster{window: 1000}, func(c *cluster) {
		c.lead(0, "n1")
		reserve(t, c.nodes["n1"], 1)
		c.lead(0, "n2")
		above := reserve(t, c.nodes["n2"], 1)
		c.lead(0, "n1")
		if last := latest(t, c.nodes["n1"]); last < above {
			t.Errorf("the latest is %d after %d", last, above)
		}
		if first := reserve(t, c.nodes["n1"], 1); first <= above {
			t.Errorf("got %d after %d", first, above)
		}
	})
}

// zombie makes n1 a leader of group 0 that does not know that it is none any
// more: its log does not take a write, so raft's main loop stands still, and
// its silence makes the others elect another one. It can talk to everybody.
func zombie(c *cluster) (leader *node) {
	c.t.Helper()
	old := c.lead(0, "n1")
	reserve(c.t.(*testing.T), c.nodes["n1"], 1)
	time.Sleep(time.Second)
	c.log("n1", 0).Stall(25 * time.Second)
	go func() { // gets it stuck
		ctx, cancel := within(20 * time.Second)
		defer cancel()
		_, _ = old.Propose(ctx, fsm.Request{Space: fsm.System})
	}()
	leader, _ = c.leader(0, "n1")
	return leader
}

// The fault of a floor that is not taken under confirmed leadership: a write
// that begins after another one was acknowledged has a lower revision.
func TestFloorsAreTakenUnderConfirmedLeadership(t *testing.T) {
	for _, fault := range []bool{false, true} {
		c := &cluster{groups: 2, faults: Faults{WithoutConfirmation: fault}}
		bubble(t, c, func(c *cluster) {
			c.lead(1, "n1")
			c.lead(2, "n2")
			zombie(c)
			ctx, cancel := within(10 * time.Second)
			defer cancel()
			first, err := put(ctx, c.nodes["n2"].replicas[2], "k2", "v")
			if err != nil {
				t.Fatal(err)
			}
			second, err := put(ctx, c.nodes["n1"].replicas[1], "k1", "v")
			if fault != (err == nil && second < first) {
				t.Errorf("fault planted: %v; the first write is at %d, the second at %d: %v", fault, first, second, err)
			}
			time.Sleep(30 * time.Second)
		})
	}
}

func TestTheLatestIsTakenUnderConfirmedLeadership(t *testing.T) {
	for _, fault := range []bool{false, true} {
		bubble(t, &cluster{faults: Faults{WithoutConfirmation: fault}}, func(c *cluster) {
			next := zombie(c)
			first := reserve(t, next, 1)
			ctx, cancel := within(5 * time.Second)
			defer cancel()
			last, err := c.nodes["n1"].client.Latest(ctx)
			if fault != (err == nil && last < first) {
				t.Errorf("fault planted: %v; the latest is %d after %d: %v", fault, last, first, err)
			}
			time.Sleep(30 * time.Second)
		})
	}
}

func TestNobodyLeads(t *testing.T) {
	bubble(t, &cluster{}, func(c *cluster) {
		leader, _ := c.leader(0)
		reserve(t, leader, 1)
		for _, n := range c.up() {
			c.network.Isolate(n.name)
		}
		time.Sleep(5 * time.Second)
		asked := 0
		ctx, cancel := within(3 * time.Second)
		_, err := leader.client.Reserve(ctx, func() int { asked++; return 1 })
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || asked > 0 {
			t.Errorf("without a leader: %v, asked %d times", err, asked)
		}
		var all sync.WaitGroup
		for _, n := range c.up() {
			all.Go(func() { reserve(t, n, 5) }) // goes through when there is one again
			all.Go(func() { latest(t, n) })
		}
		time.Sleep(5 * time.Second)
		c.network.HealAll()
		all.Wait()
	})
}

// A leader may leave a question unanswered, and its connection open. The client
// turns to the next one as soon as it hears of it.
func TestAnUnansweredQuestionIsForgottenWithItsLeader(t *testing.T) {
	bubble(t, &cluster{}, func(c *cluster) {
		c.lead(0, "n1")
		n := c.nodes["n2"]
		client := NewClient(ClientConfig{
			Node: n.name, Group0: n.replicas[0], Server: n.server, CallTimeout: time.Hour,
			Peers: silent{n.transport, "n1"},
		})
		defer client.Close()
		var all sync.WaitGroup
		all.Go(func() {
			ctx, cancel := within(time.Minute)
			defer cancel()
			if _, err := client.Latest(ctx); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(time.Second)
		c.lead(0, "n3")
		all.Wait()
	})
}

// silent is a network on which one node never answers.
type silent struct {
	Peers
	node string
}

func (s silent) Call(ctx context.Context, node, method string, payload []byte) ([]byte, error) {
	if node == s.node {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.Peers.Call(ctx, node, method, payload)
}

// What is wanted while a request is under way shares the next one.
func TestOneRequestIsUnderWay(t *testing.T) {
	bubble(t, &cluster{}, func(c *cluster) {
		leader, _ := c.leader(0)
		reserve(t, leader, 1)
		var n *node
		for _, other := range c.up() {
			if other != leader {
				n = other
			}
		}
		peers := &counting{Peers: n.transport}
		client := NewClient(ClientConfig{Node: n.name, Group0: n.replicas[0], Server: n.server, Peers: peers})
		defer client.Close()
		for _, name := range names {
			for _, other := range names {
				c.network.Delay(name, other, 10*time.Millisecond)
			}
		}
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if _, err := client.Reserve(ctx, func() int { return 3 }); err != nil {
					t.Error(err)
				}
			})
			all.Go(func() {
				if _, err := client.Latest(ctx); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(time.Millisecond)
		}
		all.Wait()
		if peers.most > 1 || peers.calls > 5 {
			t.Errorf("%d calls, %d at a time", peers.calls, peers.most)
		}
	})
}

type counting struct {
	Peers
	mu               sync.Mutex
	now, most, calls int
}

func (p *counting) Call(ctx context.Context, node, method string, payload []byte) ([]byte, error) {
	p.mu.Lock()
	p.now++
	p.calls++
	p.most = max(p.most, p.now)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.now--
	}()
	return p.Peers.Call(ctx, node, method, payload)
}

// count is not called when the call has returned, however it ended.
func TestCountIsNotCalledAfterwards(t *testing.T) {
	bubble(t, &cluster{}, func(c *cluster) {
		leader, _ := c.leader(0)
		reserve(t, leader, 1)
		for i := range 50 {
			var mu sync.Mutex
			returned := false
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*time.Millisecond)
			if i%10 == 5 {
				c.network.Isolate(leader.name)
			}
			_, _ = leader.client.Reserve(ctx, func() int {
				mu.Lock()
				defer mu.Unlock()
				if returned {
					t.Error("called after the call has returned")
				}
				return 1
			})
			mu.Lock()
			returned = true
			mu.Unlock()
			cancel()
			c.network.HealAll()
		}
	})
}

func TestCloseEndsWhoWaits(t *testing.T) {
	bubble(t, &cluster{}, func(c *cluster) {
		leader, _ := c.leader(0)
		for _, n := range c.up() {
			c.network.Isolate(n.name)
		}
		client := NewClient(ClientConfig{Node: leader.name, Group0: leader.replicas[0], Server: leader.server, Peers: leader.transport})
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				if _, err := client.Latest(context.Background()); !errors.Is(err, ErrClosed) {
					t.Errorf("waiting at Close: %v", err)
				}
			})
		}
		time.Sleep(time.Second)
		client.Close()
		client.Close()
		all.Wait()
		if _, err := client.Latest(context.Background()); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		leader.server.Close()
		c.network.HealAll()
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		for ctx.Err() == nil {
			_, err := leader.server.Take(ctx, 1)
			if errors.Is(err, ErrClosed) {
				return
			}
		}
		t.Error("a closed server does not say so")
	})
}

// A cluster that was founded with keys goes on above them, and a record that is
// not understood stops all writes rather than let revisions be used again.
func TestTheBoundIsKept(t *testing.T) {
	bubble(t, &cluster{window: 1000}, func(c *cluster) {
		_, replica := c.leader(0)
		set := func(value []byte) {
			data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(Key), Value: value}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := within(time.Second)
			defer cancel()
			if result, err := replica.Propose(ctx, fsm.Request{Space: fsm.System, Data: data}); err != nil || result.Err != nil {
				t.Fatal(err, result.Err)
			}
		}
		for value, want := range map[int64]int64{1: 2, 5000: 5001} {
			set(Encode(value))
			c.restartServers()
			if first := reserve(t, c.up()[1], 1); first != want {
				t.Errorf("above %d comes %d", value, first)
			}
		}
		for _, value := range [][]byte{[]byte("x"), nil, Encode(0), Encode(-5), Encode(math.MaxInt64)} {
			set(value)
			c.restartServers()
			ctx, cancel := within(3 * time.Second)
			if first, err := c.up()[0].client.Reserve(ctx, func() int { return 1 }); err == nil {
				t.Errorf("above %q comes %d", value, first)
			}
			cancel()
		}
	})
}

// restartServers makes the servers forget what they have made ready.
func (c *cluster) restartServers() {
	for _, n := range c.up() {
		n.server.mu.Lock()
		n.server.term = 0
		n.server.mu.Unlock()
	}
}

func TestMessages(t *testing.T) {
	for _, n := range []int64{0, 1, 1024, maxReserve} {
		if got, err := parseRequest(appendRequest(n)); err != nil || got != n {
			t.Errorf("request of %d: %d, %v", n, got, err)
		}
	}
	for _, bad := range [][]byte{nil, {wireVersion}, {9, 0, 0, 0, 0, 0, 0, 0, 1}, append(appendRequest(1), 0), appendRequest(-1), appendRequest(maxReserve + 1)} {
		if n, err := parseRequest(bad); err == nil {
			t.Errorf("request %x: %d", bad, n)
		}
	}
	if got, err := parseResponse(appendResponse(42, nil)); err != nil || got != 42 {
		t.Errorf("response: %d, %v", got, err)
	}
	if _, err := parseResponse(appendResponse(0, shard.ErrClosed)); err == nil {
		t.Error("a failure is taken for an answer")
	}
	if _, err := parseResponse(appendResponse(0, ErrNotLeader)); !errors.Is(err, ErrNotLeader) {
		t.Errorf("not leader: %v", err)
	}
	for _, bad := range [][]byte{nil, {wireVersion, 0}, appendResponse(1, nil), appendResponse(-3, nil), append(appendResponse(42, nil), 0)} {
		if n, err := parseResponse(bad); err == nil {
			t.Errorf("response %x: %d", bad, n)
		}
	}
}
