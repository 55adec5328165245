package shard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"kvd/fsm"
)

// leaderOf makes one of the data replicas the leader, and returns it and the other.
func (c *cluster) leaderOf(name string) (leader, other *Replica) {
	c.t.Helper()
	now, r := c.leader()
	if now != name {
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := r.TransferLeadership(ctx, name); err != nil {
			c.t.Fatal(err)
		}
		c.leader(now)
	}
	_, other = c.follower(name)
	return c.replicas[name], other
}

// until waits for something to happen.
func (c *cluster) until(happens func() bool) {
	c.t.Helper()
	for range 60_000 {
		if happens() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	c.t.Fatal("it has not happened within a minute")
}

// leads is whether raft calls the replica the leader, which with a witness is not to serve.
func leads(r *Replica) bool { return r.life.Load().raft.State() == raft.Leader }

// The reason why a witness is a voter with a log, and may lead: what was
// committed with it can live on it and on a dead node alone.
func TestACommittedEntryOnADeadNodeAndAWitnessSurvives(t *testing.T) {
	bubbleWith(t, 3, "n3", nil, func(c *cluster) {
		leader, _ := c.leaderOf("n1")
		c.mustPut(leader, "k", "old")
		time.Sleep(time.Second)
		c.network.Isolate("n2")
		for i := range 100 {
			c.mustPut(leader, fmt.Sprint("k", i), "acknowledged")
		}
		c.stop("n1")
		c.network.Rejoin("n2")
		name, leader := c.leader()
		if name != "n2" {
			t.Fatalf("%s leads", name)
		}
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		index, err := leader.ReadIndex(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			if got := c.get(leader, fmt.Sprint("k", i), index); got != "acknowledged" {
				t.Fatalf("k%d = %q", i, got)
			}
		}
		c.mustPut(leader, "k", "new")
	})
}

// Where a data replica can win, it does: a witness votes, and stands later.
func TestAWitnessLetsDataReplicasStandFirst(t *testing.T) {
	elections := func(tune func(*Config)) (ofWitness int) {
		bubbleWith(t, 3, "n3", tune, func(c *cluster) {
			const rounds = 20
			for i := range rounds {
				name, leader := c.leader()
				c.mustPut(leader, "k", fmt.Sprint(i))
				time.Sleep(time.Second) // the others have it
				c.network.Isolate(name)
				next, _ := c.leader(name)
				if next == "n3" {
					t.Error("a witness serves")
				}
				c.network.Rejoin(name)
				time.Sleep(10 * time.Second)
			}
			ofWitness = int(counterValue(t, c.replicas["n3"].metrics.witnessLeads))
		})
		return ofWitness
	}
	if n := elections(nil); n != 0 {
		t.Errorf("the witness was elected %d times", n)
	}
	if n := elections(func(c *Config) { c.Faults.witnessStands = true }); n == 0 {
		t.Error("a witness that stands like the others was never elected: this test proves nothing")
	}
}

func counterValue(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil || len(families) != 1 {
		t.Fatal(families, err)
	}
	return families[0].GetMetric()[0].GetCounter().GetValue()
}

// An elected witness hands over at once, and not before the other has the log.
func TestAWitnessHandsOverAtOnce(t *testing.T) {
	bubbleWith(t, 3, "n3", nil, func(c *cluster) {
		for i := range 10 {
			name, leader := c.leader()
			c.mustPut(leader, "k", fmt.Sprint(i))
			l := leader.life.Load()
			if err := l.raft.LeadershipTransferToServer("n3/1w", "n3/1w").Error(); err != nil {
				t.Fatal(err)
			}
			c.until(func() bool { return !leader.Serving() }) // the old leader has heard of it
			start := time.Now()
			next, leader := c.leader()
			if took := time.Since(start); took > 500*time.Millisecond {
				t.Errorf("nobody has served for %v", took)
			}
			if got := c.get(leader, "k", leader.Status().CommitIndex); got != fmt.Sprint(i) {
				t.Errorf("%s, after %s, has %q of %d", next, name, got, i)
			}
		}
		if n := counterValue(t, c.replicas["n3"].metrics.witnessLeads); n != 10 {
			t.Errorf("the witness was elected %v times", n)
		}
	})
}

// stuck makes a witness lead that cannot hand over: the only other voter lacks
// entries that the witness, against its rules, has removed.
func stuck(c *cluster) (witness *Replica) {
	c.t.Helper()
	leader, _ := c.leaderOf("n1")
	c.mustPut(leader, "k", "old")
	time.Sleep(time.Second)
	c.network.Isolate("n2")
	witness = c.replicas["n3"]
	witness.SetTruncationFloor(1 << 40)
	for i := range 200 {
		c.mustPut(leader, "k", fmt.Sprint(i))
	}
	time.Sleep(time.Second)
	if first := witness.Status().FirstLogIndex; first < 100 {
		c.t.Fatalf("the witness's log begins at %d", first)
	}
	c.network.Isolate("n1")
	c.network.Rejoin("n2")
	c.until(func() bool { return leads(witness) })
	return witness
}

func truncating(c *Config) { c.SnapshotEntries, c.TrailingEntries = 20, 5 }

func TestAWitnessServesNothing(t *testing.T) {
	bubbleWith(t, 3, "n3", truncating, func(c *cluster) {
		witness := stuck(c)
		for range 100 {
			time.Sleep(50 * time.Millisecond)
			if !leads(witness) {
				t.Fatal("the witness does not lead any more: this test proves nothing")
			}
			ctx, cancel := within(time.Second)
			if err := put(witness, "k", "v"); !errors.Is(err, ErrNotLeader) {
				t.Errorf("put: %v", err)
			}
			if _, err := witness.ReadIndex(ctx); !errors.Is(err, ErrNotLeader) {
				t.Errorf("read index: %v", err)
			}
			if _, err := witness.ReadIndexAt(ctx, 1); !errors.Is(err, ErrNotLeader) {
				t.Errorf("read index at a revision: %v", err)
			}
			if _, _, err := witness.AcquireState(ctx, 0); !errors.Is(err, ErrNoState) {
				t.Errorf("state: %v", err)
			}
			if _, err := witness.AddLearner(ctx, "n9/1", witness.Status().ConfigurationIndex); !errors.Is(err, ErrNotLeader) {
				t.Errorf("change of members: %v", err)
			}
			cancel()
			if witness.Serving() || witness.Leader().Self || witness.Followers() != nil || !witness.Witness() {
				t.Errorf("leader %+v, followers %v", witness.Leader(), witness.Followers())
			}
			if l := c.replicas["n2"].Leader(); l.ID != "" || l.Node != "" {
				t.Errorf("the other one names it as the leader: %+v", l)
			}
		}
	})
}

// A witness has nothing to send; one that cannot feed a data replica leaves it
// as it is, and the group goes on when somebody with the data is back.
func TestAWitnessIsNeverTheSourceOfASnapshot(t *testing.T) {
	bubbleWith(t, 3, "n3", truncating, func(c *cluster) {
		witness := stuck(c)
		if _, _, err := witness.life.Load().snapshots.Open(""); !errors.Is(err, fsm.ErrWitness) {
			t.Errorf("opened a snapshot: %v", err)
		}
		behind := c.replicas["n2"].Status()
		time.Sleep(20 * time.Second)
		if s := c.replicas["n2"].Status(); s.AppliedIndex != behind.AppliedIndex || s.FirstLogIndex != 1 {
			t.Errorf("%+v has become %+v", behind, s)
		}
		c.network.Rejoin("n1")
		_, leader := c.leader()
		index := leader.Status().CommitIndex
		if got := c.get(c.replicas["n2"], "k", index); got != "199" {
			t.Errorf("k = %q", got)
		}
	})
}

func TestAWitnessRemovesNothingThatADataReplicaLacks(t *testing.T) {
	bubbleWith(t, 3, "n3", truncating, func(c *cluster) {
		leader, behind := c.leaderOf("n1")
		witness := c.replicas["n3"]
		c.mustPut(leader, "k", "old")
		time.Sleep(time.Second)
		c.network.Isolate("n2")
		write := func() {
			for i := range 200 {
				c.mustPut(leader, fmt.Sprint("k", i), "v")
			}
			time.Sleep(time.Second)
		}
		write()
		if first := witness.Status().FirstLogIndex; first != 1 {
			t.Errorf("untold, it has removed what is below %d", first)
		}
		if first := leader.Status().FirstLogIndex; first < 100 {
			t.Fatalf("the leader's log begins at %d: this test proves nothing", first)
		}
		lacks := behind.Status().LastLogIndex + 1
		witness.SetTruncationFloor(behind.Status().DurableIndex)
		write()
		if first := witness.Status().FirstLogIndex; first > lacks {
			t.Errorf("its log begins at %d, and another lacks %d", first, lacks)
		}
		c.stop("n1")
		c.network.Rejoin("n2")
		if name, _ := c.leader(); name != "n2" {
			t.Errorf("%s leads", name)
		}
		for i := range 200 {
			if got := c.get(behind, fmt.Sprint("k", i), 0); got != "v" {
				t.Fatalf("k%d = %q", i, got)
			}
		}
		if n := counterValue(t, behind.metrics.installs); n != 0 {
			t.Errorf("%v snapshots were installed", n)
		}
		// When nobody lacks them, they go.
		leader = behind
		witness.SetTruncationFloor(leader.Status().DurableIndex)
		write()
		witness.SetTruncationFloor(leader.Status().DurableIndex)
		time.Sleep(time.Second)
		if first := witness.Status().FirstLogIndex; first < 300 {
			t.Errorf("its log still begins at %d", first)
		}
	})
}

// installs records how large the snapshots are that a replica is sent.
type installs struct {
	mu    sync.Mutex
	sizes []int64
}

func (s *installs) tune(c *Config) {
	connect := c.NewTransport
	c.NewTransport = func(install InstallFunc) (Transport, error) {
		return connect(func(ctx context.Context, req *raft.InstallSnapshotRequest, body io.Reader) (*raft.InstallSnapshotResponse, error) {
			n, err := io.Copy(io.Discard, body)
			if err != nil || n != req.Size {
				return nil, errors.Join(err, fmt.Errorf("%d bytes instead of %d", n, req.Size))
			}
			s.mu.Lock()
			s.sizes = append(s.sizes, n)
			s.mu.Unlock()
			return install(ctx, req, nil)
		})
	}
}

// A witness for which the leader's log begins too late is told where it begins,
// and no more.
func TestAWitnessIsSentNoData(t *testing.T) {
	var sent installs
	tune := func(c *Config) {
		truncating(c)
		if IsWitness(c.Replica) {
			sent.tune(c)
		}
	}
	bubbleWith(t, 3, "n3", tune, func(c *cluster) {
		leader, _ := c.leaderOf("n1")
		witness := c.replicas["n3"]
		c.network.Isolate("n3")
		for i := range 200 {
			c.mustPut(leader, fmt.Sprint("k", i), "v")
		}
		c.network.Rejoin("n3")
		time.Sleep(20 * time.Second)
		last := witness.Status().LastLogIndex
		if first := witness.Status().FirstLogIndex; first != 1 || last > 100 {
			t.Errorf("it does not know what the others have, and its log is from %d to %d", first, last)
		}
		witness.SetTruncationFloor(last)
		sent.sizes = nil
		c.until(func() bool { return leader.Followers()["n3/1w"].Match >= leader.Status().CommitIndex })
		if len(sent.sizes) == 0 || sent.sizes[0] != 0 {
			t.Errorf("sizes of what was sent: %v", sent.sizes)
		}
		if s := witness.Status(); s.FirstLogIndex <= last+1 || s.AppliedIndex != leader.Status().CommitIndex || len(s.Members) != 3 {
			t.Errorf("%+v", s)
		}
		// It is as good as another, and remembers.
		c.stop("n2")
		c.mustPut(leader, "k", "two of three")
		c.stop("n3")
		witness = c.start("n3", 1, nil)
		c.mustPut(leader, "k", "again")
		if s := witness.Status(); s.FirstLogIndex <= last+1 {
			t.Errorf("%+v", s)
		}
	})
}

// What an install does to a witness is a matter of what its log holds, as with
// others, and of what data replicas may lack.
func TestInstallOnAWitness(t *testing.T) {
	const at, term = 10, 3
	for _, tc := range []struct {
		name        string
		first, last uint64
		logTerm     uint64
		floor       uint64
		log         [2]uint64 // afterwards
		err         error
	}{
		{name: "empty log"},
		{name: "log ends before, and all have it", first: 1, last: 5, logTerm: term, floor: 5},
		{name: "log ends before, and one may lack its end", first: 1, last: 5, logTerm: term, floor: 4, log: [2]uint64{1, 5}, err: ErrNeeded},
		{name: "log ends before, and nothing is known", first: 1, last: 5, logTerm: term, log: [2]uint64{1, 5}, err: ErrNeeded},
		{name: "log ends there", first: 1, last: 10, logTerm: term, log: [2]uint64{1, 10}},
		{name: "log goes on", first: 1, last: 20, logTerm: term, log: [2]uint64{1, 20}},
		{name: "divergent log goes on", first: 1, last: 20, logTerm: 2, floor: 9},
		{name: "divergent log goes on, and one may lack its beginning", first: 1, last: 20, logTerm: 2, floor: 8, log: [2]uint64{1, 20}, err: ErrNeeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			request, _ := makeStream(t, 3, 7, at, term)
			request.Size = 0
			request.Configuration, request.ConfigurationIndex = raft.EncodeConfiguration(threeVoters()), 1
			bubble(t, 0, nil, func(c *cluster) {
				c.witness = "n1"
				r := c.lone(tc.first, tc.last, tc.logTerm)
				r.SetTruncationFloor(tc.floor)
				answer, err := r.install(context.Background(), request, failingReader{})
				if !errors.Is(err, tc.err) || err == nil && !answer.Success {
					t.Fatalf("answer %+v, %v", answer, err)
				}
				for range 2 {
					if got := bounds(t, r); got != tc.log {
						t.Errorf("log %v, want %v", got, tc.log)
					}
					if s := r.Status(); tc.log == [2]uint64{} && (s.AppliedIndex != at || s.DurableIndex != at || s.FirstLogIndex != at+1 || len(s.Members) != 3 || s.ConfigurationIndex != 1) {
						t.Errorf("status %+v", s)
					}
					keepsVotes(t, r)
					r = c.reopened()
				}
				request.Term--
				if answer, err := r.install(context.Background(), request, failingReader{}); err != nil || answer.Success {
					t.Errorf("to a deposed leader: %+v, %v", answer, err)
				}
			})
		})
	}
}

func TestLeadershipIsNotTransferredToAWitness(t *testing.T) {
	bubbleWith(t, 3, "n3", nil, func(c *cluster) {
		leader, _ := c.leaderOf("n1")
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := leader.TransferLeadership(ctx, "n3"); !errors.Is(err, ErrNoTarget) {
			t.Errorf("to the witness: %v", err)
		}
		c.stop("n2")
		if err := leader.TransferLeadership(ctx, ""); err == nil {
			t.Error("to anybody, with nobody but a witness there")
		}
	})
}

// At the bound of its log a witness takes no more writes, rather than to remove
// what another lacks; and it goes on when that one has it.
func TestTheLogOfAWitnessIsBounded(t *testing.T) {
	const limit = 64 << 10
	tune := func(c *Config) {
		truncating(c)
		c.WitnessLogBytes = limit
	}
	bubbleWith(t, 3, "n3", tune, func(c *cluster) {
		leader, _ := c.leaderOf("n1")
		witness := c.replicas["n3"]
		c.stop("n2")
		written := 0
		for put(leader, fmt.Sprint("k", written), string(make([]byte, 1000))) == nil {
			if written++; written > 1000 {
				t.Fatal("the log has no bound")
			}
			if held := witness.held.sizeBytes(); held > limit/2+2000 && !witness.held.warned {
				t.Fatalf("no warning at %d bytes", held)
			}
		}
		if written < limit/1200 {
			t.Errorf("refused after %d writes", written)
		}
		if held := witness.held.sizeBytes(); held > limit+10_000 {
			t.Errorf("the log has %d bytes", held)
		}
		if first := witness.Status().FirstLogIndex; first != 1 {
			t.Errorf("it has removed what is below %d", first)
		}
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if _, err := leader.ReadIndex(ctx); err != nil {
			t.Errorf("reads need no log: %v", err)
		}
		// Even so it leads if it must, and feeds the one that was away.
		c.stop("n1")
		behind := c.start("n2", 1, nil)
		if name, _ := c.leader(); name != "n2" {
			t.Errorf("%s leads", name)
		}
		if got := c.get(behind, fmt.Sprint("k", written-1), behind.Status().CommitIndex); len(got) != 1000 {
			t.Errorf("k%d = %q", written-1, got)
		}
		c.start("n1", 1, nil)
		time.Sleep(10 * time.Second)
		witness.SetTruncationFloor(behind.Status().DurableIndex)
		time.Sleep(10 * time.Second)
		c.stop("n1")
		_, leader = c.leader()
		c.mustPut(leader, "k", "the witness takes part again")
		c.stop("n3")
		witness = c.start("n3", 1, nil) // what it holds is measured anew
		if held := witness.held.sizeBytes(); held == 0 || held > limit/2 {
			t.Errorf("%d bytes after a restart", held)
		}
	})
}

func TestHeldIsWhatIsLeft(t *testing.T) {
	h := &held{log: slog.New(slog.DiscardHandler), limitBytes: 1 << 40}
	log := raft.NewInmemStore()
	entry := func(i uint64, size int) *raft.Log { return &raft.Log{Index: i, Data: make([]byte, size-entryOverhead)} }
	for i := uint64(1); i <= 3000; i++ {
		if err := log.StoreLog(entry(i, 200)); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.measure(log); err != nil || h.bytes != 3000*200 {
		t.Errorf("%d bytes, %v", h.bytes, err)
	}
	for i := uint64(3001); i <= 6000; i++ {
		h.add([]*raft.Log{entry(i, 100)})
	}
	for _, step := range []struct {
		first, last uint64
		want        int64
	}{
		{1, 6000, 900_000},
		{1001, 6000, 700_000},
		{1001, 5000, 600_000},
		{4501, 5000, 50_000},
		{0, 0, 0},
	} {
		if h.keep(step.first, step.last); h.bytes != step.want {
			t.Errorf("%d to %d: %d bytes, want %d", step.first, step.last, h.bytes, step.want)
		}
	}
}

// With the planted fault a witness serves like the others, though it has no
// data: an acknowledged write is gone for its readers.
func TestAWitnessThatAnswersReadsIsSeen(t *testing.T) {
	tune := func(c *Config) { c.Faults.WitnessServes = true }
	bubbleWith(t, 3, "n3", tune, func(c *cluster) {
		name, leader := c.leader()
		for name == "n3" {
			ctx, cancel := within(10 * time.Second)
			if err := leader.TransferLeadership(ctx, "n1"); err != nil {
				t.Fatal(err)
			}
			cancel()
			name, leader = c.leader()
		}
		c.mustPut(leader, "k", "acknowledged")
		l := leader.life.Load()
		if err := l.raft.LeadershipTransferToServer("n3/1w", "n3/1w").Error(); err != nil {
			t.Fatal(err)
		}
		_, witness := c.leader("n1", "n2")
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		index, err := witness.ReadIndex(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.get(witness, "k", index); got != "" {
			t.Errorf("the planted fault did not show: %q", got)
		}
	})
}
