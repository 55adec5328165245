package bootstrap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A cluster of real Formations on real directories, in virtual time, over a network that loses and delays messages.
type cluster struct {
	t    *testing.T
	root string

	mu    sync.Mutex // guards all below
	rng   *rand.Rand
	loss  float64
	delay time.Duration // at most, each way
	hosts map[string]*host
	wiped int
}

// host is one process at an address; two hosts may claim one name.
type host struct {
	c    *cluster
	addr string
	path string

	set       Settings
	dir       *Dir
	formation *Formation // nil: down
	stop      func()     // cancel and join
	outcome   *Outcome
	err       error
	log       *bytes.Buffer
}

func newCluster(t *testing.T, seed uint64) *cluster {
	return &cluster{t: t, root: t.TempDir(), rng: rand.New(rand.NewPCG(seed, 9)), hosts: map[string]*host{}}
}

func (c *cluster) add(addr string, set Settings) *host {
	h := &host{c: c, addr: addr, path: filepath.Join(c.root, addr), set: set}
	c.hosts[addr] = h
	return h
}

func (c *cluster) sorted() (hosts []*host) {
	for _, addr := range slices.Sorted(maps.Keys(c.hosts)) {
		hosts = append(hosts, c.hosts[addr])
	}
	return hosts
}

func (c *cluster) roll(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rng.IntN(n)
}

// travel is one way of a message.
func (c *cluster) travel(ctx context.Context) error {
	c.mu.Lock()
	lost := c.rng.Float64() < c.loss
	delay := time.Duration(c.rng.Int64N(int64(c.delay) + int64(time.Millisecond)))
	c.mu.Unlock()
	if lost {
		<-ctx.Done()
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(delay):
		return nil
	}
}

// Ask implements Asker. What a host has answered arrives even if the host is gone by then.
func (c *cluster) Ask(ctx context.Context, addr, method string, payload []byte) ([]byte, error) {
	if method != MethodStatus {
		c.t.Errorf("asked %q", method)
	}
	if err := c.travel(ctx); err != nil {
		return nil, err
	}
	c.mu.Lock()
	var f *Formation
	if h := c.hosts[addr]; h != nil {
		f = h.formation
	}
	c.mu.Unlock()
	if f == nil {
		return nil, errors.New("connection refused")
	}
	reply, err := f.HandleAsk(ctx, payload)
	if err != nil {
		return nil, err
	}
	return reply, c.travel(ctx)
}

// start runs the host until stop or until a file step fails, which kills the process.
func (h *host) start(fault func(op, name string) error) {
	dir, err := open(h.path, h.set, files{noSync: true, fault: fault})
	if err != nil {
		h.err = err
		return
	}
	h.log = &bytes.Buffer{}
	f, err := New(Config{Dir: dir, Asker: h.c, Logger: slog.New(slog.NewTextHandler(h.log, nil)), AskTimeout: 3 * time.Second})
	if err != nil {
		h.c.t.Error(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	h.c.mu.Lock()
	h.dir, h.formation, h.outcome, h.err = dir, f, nil, nil
	h.c.mu.Unlock()
	h.stop = func() {
		cancel()
		<-done
		h.c.mu.Lock()
		h.formation = nil
		h.c.mu.Unlock()
		dir.Close()
	}
	go func() {
		defer close(done)
		h.run(ctx, f)
	}()
}

func (h *host) run(ctx context.Context, f *Formation) {
	for {
		out, err := f.Run(ctx)
		if err == nil && out.Rejoin != nil {
			if out, err = h.rejoin(f, out); out.ClusterID == 0 && err == nil {
				select {
				case <-ctx.Done():
					return
				case <-time.After(200 * time.Millisecond):
				}
				continue
			}
		}
		h.c.mu.Lock()
		defer h.c.mu.Unlock()
		h.err = err
		if err == nil {
			h.outcome = &out
		}
		if err != nil { // the process has ended
			h.formation = nil
		}
		return
	}
}

// rejoin asks the cluster's leader, which exists if a majority of its members are up, as raft would have it.
func (h *host) rejoin(f *Formation, out Outcome) (Outcome, error) {
	h.c.mu.Lock()
	up, record := 0, (*Record)(nil)
	reporting := map[uint64]bool{}
	for _, other := range h.c.hosts {
		if other.outcome != nil && other.formation != nil && other.outcome.ClusterID == out.ClusterID {
			up, record = up+1, other.outcome.Record
			reporting[other.outcome.Incarnation] = true
		}
	}
	h.c.mu.Unlock()
	if record == nil || up <= len(record.Members)/2 {
		return Outcome{}, nil
	}
	judge := Cluster{record.ClusterID, record.Common, record.Members, func(m Member) bool { return reporting[m.Incarnation] }}
	payload, err := NewRejoinRequest(f.cfg.Dir, *out.Rejoin).Encode()
	if err != nil {
		return Outcome{}, err
	}
	req, err := DecodeRejoinRequest(payload)
	if err != nil {
		return Outcome{}, err
	}
	resp := RejoinResponse{ClusterID: record.ClusterID, Replica: ReplicaID(h.set.Name, 2), Record: record}
	if _, _, refusal := judge.Judge(req); refusal != nil {
		if refusal.Retryable() {
			return Outcome{}, nil
		}
		resp = Refuse(refusal)
	}
	return f.CompleteRejoin(resp)
}

func (h *host) crash() {
	if h.stop != nil {
		h.stop()
		h.stop = nil
	}
}

func (h *host) wipe() {
	h.crash()
	h.c.wiped++
	if err := os.RemoveAll(h.path); err != nil {
		h.c.t.Fatal(err)
	}
}

// dieAt makes the process die at its n-th file step from now.
func dieAt(n int) func(op, name string) error {
	return func(op, name string) error {
		if n--; n < 0 {
			return errCrash
		}
		return nil
	}
}

// chaos crashes and wipes hosts at random.
func (c *cluster) chaos(hosts []*host, rounds, wipes int) {
	for range rounds {
		time.Sleep(time.Duration(c.roll(400)) * time.Millisecond)
		h := hosts[c.roll(len(hosts))]
		switch c.roll(4) {
		case 0:
			h.crash()
			h.start(nil)
		case 1:
			h.crash()
			h.start(dieAt(c.roll(12)))
		case 2:
			if wipes > 0 {
				wipes--
				h.wipe()
				h.start(nil)
			}
		}
		c.agree()
	}
}

// agree wants everyone who is bound to be bound to one record, at this moment and since anyone was.
func (c *cluster) agree() {
	c.mu.Lock()
	defer c.mu.Unlock()
	var first *Outcome
	for _, h := range c.sorted() {
		if h.outcome == nil {
			continue
		}
		if first == nil {
			first = h.outcome
		}
		if h.outcome.ClusterID != first.ClusterID || !h.outcome.Record.equal(first.Record) {
			c.t.Fatalf("two records: %+v and %+v", first.Record, h.outcome.Record)
		}
	}
}

// heal ends all faults and waits for everybody to become a member.
func (c *cluster) heal(hosts []*host) {
	c.mu.Lock()
	c.loss, c.delay = 0, 5*time.Millisecond
	c.mu.Unlock()
	for _, h := range hosts {
		h.crash()
		h.start(nil)
	}
	time.Sleep(30 * time.Second)
	synctest.Wait()
	c.agree()
}

func (c *cluster) stopAll() {
	for _, h := range c.sorted() {
		h.crash()
	}
}

func peersOf(n int) map[string]string {
	peers := map[string]string{}
	for i := range n {
		peers[fmt.Sprintf("n%d", i+1)] = fmt.Sprintf("host%d:1", i+1)
	}
	return peers
}

func (c *cluster) addAll(n int) (hosts []*host) {
	for i := range n {
		set := Settings{Name: fmt.Sprintf("n%d", i+1), Common: Common{Token: "t", Strategy: "full"}, Peers: peersOf(n)}
		hosts = append(hosts, c.add(set.Peers[set.Name], set))
	}
	return hosts
}

func TestFormationRandom(t *testing.T) {
	first := rand.Uint64()
	t.Logf("seeds %d..+60", first)
	rejoined := 0
	for seed := first; seed != first+60; seed++ {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, seed)
			defer c.stopAll()
			n := 1 + c.roll(5)
			hosts := c.addAll(n)
			if c.loss, c.delay = 0, 5*time.Millisecond; seed%2 == 0 { // else formed soon, and faults come after
				c.loss, c.delay = float64(c.roll(5))/20, time.Duration(c.roll(1000))*time.Millisecond
			}
			for _, h := range hosts {
				h.start(nil)
			}
			c.chaos(hosts, 5+c.roll(20), c.roll(4))
			c.heal(hosts)
			members := 0
			for _, h := range hosts {
				if h.err != nil {
					t.Errorf("seed %d: %s: %v", seed, h.set.Name, h.err)
				}
				if h.outcome == nil {
					continue
				}
				members++
				if !h.outcome.Founder {
					rejoined++
				}
				if h.outcome.Founder != (h.outcome.Replica == ReplicaID(h.set.Name, 1)) {
					t.Errorf("seed %d: %s: %+v", seed, h.set.Name, h.outcome)
				}
			}
			if members < n && c.wiped <= (n-1)/2 {
				t.Errorf("seed %d: %d of %d nodes are members after %d lost disks", seed, members, n, c.wiped)
			}
		})
	}
	t.Logf("%d nodes rejoined", rejoined)
	if rejoined == 0 {
		t.Error("no run had a node that rejoined")
	}
}

// Operators' mistakes: nobody forms a second cluster; the mistaken are told which flag; corrected, they form one.
func TestFormationMistakes(t *testing.T) {
	swapped := peersOf(3)
	swapped["n1"], swapped["n3"] = swapped["n3"], swapped["n1"]
	more := peersOf(4)
	fewer := map[string]string{"n1": "n3", "n2": "n1", "n3": "n2"}
	for name, c := range map[string]struct {
		mistake func(*Settings)
		flag    string
	}{
		"other token":       {func(s *Settings) { s.Token = "u" }, "--cluster-token"},
		"other strategy":    {func(s *Settings) { s.Strategy = "consistent" }, "--strategy"},
		"other shards":      {func(s *Settings) { s.Shards = 64 }, "--shards"},
		"other replication": {func(s *Settings) { s.ReplicationFactor = 2 }, "--replication-factor"},
		"other witnesses":   {func(s *Settings) { s.Witnesses = "0" }, "--witnesses"},
		"one peer more":     {func(s *Settings) { s.Peers = more }, "--peers"},
		"one peer fewer":    {func(s *Settings) { s.Peers = maps.Clone(s.Peers); delete(s.Peers, fewer[s.Name]) }, "--peers"},
		"swapped addresses": {func(s *Settings) { s.Peers = swapped }, "--peers"},
	} {
		for mistaken := range 3 {
			t.Run(fmt.Sprintf("%s on n%d", name, mistaken+1), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					net := newCluster(t, rand.Uint64())
					defer net.stopAll()
					hosts := net.addAll(3)
					c.mistake(&hosts[mistaken].set)
					for _, h := range hosts {
						h.start(nil)
					}
					time.Sleep(10 * time.Second)
					synctest.Wait()
					refused := 0
					for _, h := range hosts {
						var mismatch *MismatchError
						if errors.As(h.err, &mismatch) && mismatch.Flag == c.flag && !strings.Contains(h.err.Error(), "\n") {
							refused++
						}
						if h.outcome != nil {
							t.Errorf("%s is a member of %+v", h.set.Name, h.outcome)
						}
					}
					if refused == 0 {
						t.Errorf("nobody names %s", c.flag)
					}
					for i, h := range hosts {
						h.set = Settings{Name: fmt.Sprintf("n%d", i+1), Common: Common{Token: "t", Strategy: "full"}, Peers: peersOf(3)}
					}
					net.heal(hosts)
					for _, h := range hosts {
						if h.outcome == nil || !h.outcome.Founder {
							t.Errorf("corrected, %s is %+v, %v", h.set.Name, h.outcome, h.err)
						}
					}
				})
			})
		}
	}
}

// Two nodes claim one name, and the others disagree about which of them is meant; with crashes.
func TestFormationDuplicateNames(t *testing.T) {
	first, runs := rand.Uint64(), uint64(40)
	if testing.Short() {
		runs = 10
	}
	t.Logf("seeds %d..+%d", first, runs)
	formed := 0
	for seed := first; seed != first+runs; seed++ {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, seed)
			defer c.stopAll()
			n := 2 + c.roll(4)
			hosts := c.addAll(n)
			twin := c.roll(n)
			hosts = append(hosts, c.add("twin:1", hosts[twin].set))
			atTwin := 0
			for i, h := range hosts[:n] {
				if i != twin && c.roll(2) == 0 {
					atTwin++
					h.set.Peers = maps.Clone(h.set.Peers)
					h.set.Peers[hosts[twin].set.Name] = "twin:1"
				}
			}
			c.loss, c.delay = 0.1, 300*time.Millisecond
			for _, h := range hosts {
				h.start(nil)
			}
			c.chaos(hosts, 10, 0)
			c.heal(hosts)
			// The other twin may rejoin while the first is down, but it never is a founder too.
			a, b := hosts[twin].outcome, hosts[n].outcome
			both := a != nil && b != nil && a.Founder == b.Founder
			if both || (atTwin != 0 && atTwin != n-1) && slices.ContainsFunc(hosts, func(h *host) bool { return h.outcome != nil }) {
				t.Errorf("seed %d: %d of %d nodes mean the twin, yet there is a cluster", seed, atTwin, n-1)
			}
			if atTwin == 0 || atTwin == n-1 {
				formed++
			} else if !slices.ContainsFunc(hosts, func(h *host) bool { return strings.Contains(h.log.String(), "is the name used twice?") }) {
				t.Errorf("seed %d: nobody says that a name is used twice", seed)
			}
		})
	}
	if formed == 0 && !testing.Short() {
		t.Error("no run had a clear majority for one of the twins")
	}
}

func TestFormationAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		defer c.stopAll()
		h := c.add("host1:1", Settings{Name: "n1", Common: Common{Strategy: "full"}})
		begin := time.Now()
		h.start(nil)
		synctest.Wait()
		if h.outcome == nil || !h.outcome.Founder || h.outcome.Replica != "n1/1" || len(h.outcome.Record.Members) != 1 || time.Since(begin) != 0 {
			t.Fatalf("%+v %v after %v", h.outcome, h.err, time.Since(begin))
		}
		formed := *h.outcome
		h.crash()
		h.start(nil)
		synctest.Wait()
		if h.outcome == nil || h.outcome.ClusterID != formed.ClusterID || !h.outcome.Record.equal(formed.Record) {
			t.Fatalf("after a restart: %+v %v", h.outcome, h.err)
		}
	})
}

// An unknown name, a wrong token and a wiped member come to a cluster that exists.
func TestFormationMeetsACluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		defer c.stopAll()
		hosts := c.addAll(3)
		for _, h := range hosts {
			h.start(nil)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		cluster := hosts[0].outcome.ClusterID
		stranger := c.add("host4:1", Settings{Name: "n4", Common: Common{Token: "t", Strategy: "full"}, Peers: peersOf(4)})
		stranger.start(nil)
		badToken := c.add("host5:1", Settings{Name: "n5", Common: Common{Token: "other", Strategy: "full"}, Peers: peersOf(5)})
		badToken.start(nil)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if !errors.Is(stranger.err, ErrUnknownMember) || !strings.Contains(stranger.err.Error(), "join") {
			t.Errorf("the stranger: %v", stranger.err)
		}
		if !errors.Is(badToken.err, ErrMismatch) || !strings.Contains(badToken.err.Error(), "--cluster-token") {
			t.Errorf("the other token: %v", badToken.err)
		}
		alone := hosts[0]
		alone.wipe()
		alone.set.Peers = map[string]string{"n3": "host3:1"} // enough to find the cluster
		alone.start(nil)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if o := alone.outcome; o == nil || o.ClusterID != cluster || o.Founder || o.Replica != "n1/2" || o.Record == nil {
			t.Errorf("the wiped node: %+v, %v", alone.outcome, alone.err)
		}
		elsewhere := c.add("host6:1", Settings{Name: "n6", Common: Common{Token: "t", Strategy: "full"}})
		elsewhere.start(nil)
		lost := c.add("host7:1", Settings{Name: "n3", Common: Common{Token: "t", Strategy: "full"}, Peers: map[string]string{"n2": "host2:1", "n6": "host6:1"}})
		time.Sleep(time.Second)
		lost.start(nil)
		time.Sleep(time.Second)
		synctest.Wait()
		if !errors.Is(lost.err, ErrTwoClusters) {
			t.Errorf("between two clusters: %v", lost.err)
		}
	})
}

// A member whose peers are all of another cluster has been started in the wrong place, and says so. One such peer
// does not stop it.
func TestFormationRefusesADirectoryOfAnotherCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		defer c.stopAll()
		for _, h := range c.addAll(3) {
			h.start(nil)
		}
		alone := c.add("host4:1", Settings{Name: "n1", Common: Common{Token: "t", Strategy: "full"}})
		alone.start(nil)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		alone.crash()
		alone.set.Peers = map[string]string{"n1": "host4:1", "n2": "host2:1", "n3": "host3:1"}
		alone.start(nil)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if err := alone.err; !errors.Is(err, ErrOtherCluster) || !strings.Contains(err.Error(), alone.path) {
			t.Errorf("all peers are of another cluster: %v", err)
		}
		alone.crash()
		c.hosts["host3:1"].crash()
		alone.start(nil)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if alone.outcome == nil || alone.err != nil {
			t.Errorf("one peer is of another cluster, and one is down: %+v, %v", alone.outcome, alone.err)
		}
	})
}

// A node that waits says for whom, but not all the time.
func TestFormationSaysForWhomItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		defer c.stopAll()
		hosts := c.addAll(3)
		hosts[0].start(nil)
		hosts[1].start(nil)
		time.Sleep(60 * time.Second)
		synctest.Wait()
		log := hosts[0].log.String()
		if lines := strings.Count(log, "waiting to form"); lines < 3 || lines > 10 || !strings.Contains(log, "n3 (host3:1): connection refused") {
			t.Fatalf("%d lines:\n%s", lines, log)
		}
	})
}

type askerFunc func(ctx context.Context) ([]byte, error)

func (f askerFunc) Ask(ctx context.Context, _, _ string, _ []byte) ([]byte, error) { return f(ctx) }

var unreachable askerFunc = func(context.Context) ([]byte, error) { return nil, errors.New("connection refused") }

// Each question has a deadline, and only so many are out at a time.
func TestFormationBoundsItsQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := mustOpen(t, t.TempDir(), Settings{Name: "n1", Common: Common{Strategy: "full"}, Peers: peersOf(20)})
		defer d.Close()
		var mu sync.Mutex
		out, most := 0, 0
		f, err := New(Config{Dir: d, MaxConcurrentAsks: 3, Asker: askerFunc(func(ctx context.Context) ([]byte, error) {
			mu.Lock()
			out++
			most = max(most, out)
			mu.Unlock()
			<-ctx.Done()
			mu.Lock()
			out--
			mu.Unlock()
			return nil, ctx.Err()
		})})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		f.round(context.Background(), f.machine.peers())
		if most != 3 || time.Since(begin) != 7*time.Second {
			t.Fatalf("%d questions at once, a round of %v", most, time.Since(begin))
		}
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		if _, err := f.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	})
}
