package sequencer

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvd/fsm"
	"kvd/shard"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "the first campaign's seed")
	seedsFlag = flag.Uint64("seeds", 4, "how many campaigns, of a virtual minute each")
)

// operation is one client's call as the client saw it. began and ended are
// moments of one clock that never shows the same time twice.
type operation struct {
	began, ended int64 // ended is math.MaxInt64 for a write of unknown outcome
	kind         string
	key          string         // of a write or a read
	value        string         // of a write; each is written once
	revision     int64          // of a write; of a snapshot; of the row that was read
	rows         map[string]row // of a snapshot
}

const (
	opWrite    = "write"
	opRead     = "read"
	opSnapshot = "snapshot"
)

// history is what all clients did.
type history struct {
	clock atomic.Int64
	mu    sync.Mutex
	ops   []operation
}

func (h *history) add(op operation) {
	if op.ended == 0 {
		op.ended = h.clock.Add(1)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

// check returns why there is no order of all operations, in which writes are by
// revision, that explains what everybody saw and that keeps every operation
// that had ended before another one began before that one: a violation of
// strict serializability (I2, I3). versions are what the shards have in the end,
// for each key by revision.
//
// A write is at its revision, a snapshot just after its own, and a read of one
// key must fit between what it saw and the next version of the key; it is put
// as far to the front as the operations that had ended before it allow.
func (h *history) check(versions map[string][]row) error {
	revisions, err := h.written(versions)
	if err != nil {
		return err
	}
	type event struct {
		at   int64
		op   *operation
		ends bool
	}
	var events []event
	for i := range h.ops {
		op := &h.ops[i]
		if op.kind == opWrite {
			actual, written := revisions[op.key+"="+op.value]
			switch {
			case op.ended < math.MaxInt64 && actual != op.revision:
				return fmt.Errorf("%s=%s was acknowledged at %d and is at %d", op.key, op.value, op.revision, actual)
			case !written:
				continue
			}
			op.revision = actual
		}
		events = append(events, event{op.began, op, false}, event{op.ended, op, true})
	}
	slices.SortFunc(events, func(a, b event) int { return int(a.at - b.at) })
	after := make(map[*operation]int64) // the place of the last one that had ended when it began
	var last int64
	for _, e := range events {
		if !e.ends {
			after[e.op] = last
		}
		if e.ends || e.op.ended == math.MaxInt64 {
			at, err := place(e.op, after[e.op], versions)
			if err != nil {
				return err
			}
			if e.ends && e.at < math.MaxInt64 {
				last = max(last, at)
			}
		}
	}
	return nil
}

// written finds the revision of each write that took effect. None may have done
// so twice, or after it was refused.
func (h *history) written(versions map[string][]row) (map[string]int64, error) {
	tried := make(map[string]bool)
	for _, op := range h.ops {
		if op.kind == opWrite {
			tried[op.key+"="+op.value] = true
		}
	}
	revisions := make(map[string]int64)
	used := make(map[int64]string)
	for key, all := range versions {
		for _, v := range all {
			write := key + "=" + v.value
			switch {
			case used[v.revision] != "":
				return nil, fmt.Errorf("%s and %s are both at revision %d", write, used[v.revision], v.revision)
			case revisions[write] != 0:
				return nil, fmt.Errorf("%s is at %d and at %d", write, revisions[write], v.revision)
			case !tried[write]:
				return nil, fmt.Errorf("%s was refused and is at %d", write, v.revision)
			}
			used[v.revision], revisions[write] = write, v.revision
		}
	}
	return revisions, nil
}

// place is where an operation is in the order of revisions, if that is possible
// after what is at or below revision after.
func place(op *operation, after int64, versions map[string][]row) (int64, error) {
	switch op.kind {
	case opWrite:
		if op.revision <= after {
			return 0, fmt.Errorf("%s=%s is at %d, and began when what is at %d had ended", op.key, op.value, op.revision, after)
		}
		return op.revision, nil
	case opSnapshot:
		if op.revision < after {
			return 0, fmt.Errorf("a snapshot is at %d, and began when what is at %d had ended", op.revision, after)
		}
		for key, all := range versions {
			if want := visible(all, op.revision); op.rows[key] != want {
				return 0, fmt.Errorf("a snapshot at %d has %s = %v, and should have %v", op.revision, key, op.rows[key], want)
			}
		}
		return op.revision, nil
	default:
		at := max(after, op.revision)
		if missed := visible(versions[op.key], at); missed.revision != op.revision {
			return 0, fmt.Errorf("a read saw %s at %d and not at %d, and began when what is at %d had ended", op.key, op.revision, missed.revision, after)
		}
		return at, nil
	}
}

// visible is the newest version at or below a revision.
func visible(all []row, revision int64) (newest row) {
	for _, v := range all {
		if v.revision <= revision {
			newest = v
		}
	}
	return newest
}

// clients work on a cluster and remember what they saw.
type clients struct {
	*cluster
	history
	stop  chan struct{}
	all   sync.WaitGroup
	pairs int
}

// keys of a pair are in two shards.
func (c *clients) keys(pair int) [2]string {
	first := 1 + pair%c.groups
	second := 1 + (pair+1)%c.groups
	return [2]string{fmt.Sprintf("%d/a%d", first, pair), fmt.Sprintf("%d/b%d", second, pair)}
}

func (c *clients) everyKey() (all []string) {
	for pair := range c.pairs {
		k := c.keys(pair)
		all = append(all, k[:]...)
	}
	return all
}

func groupOf(key string) int {
	var group int
	if _, err := fmt.Sscanf(key, "%d/", &group); err != nil {
		panic(err)
	}
	return group
}

func (c *clients) stopped() bool {
	select {
	case <-c.stop:
		return true
	default:
		return false
	}
}

// anyLeader is one of the nodes that believe to lead a group, nil if there is
// none.
func (c *clients) anyLeader(r *rand.Rand, group int) *shard.Replica {
	var all []*shard.Replica
	for _, n := range c.up() {
		if n.replicas[group].Serving() {
			all = append(all, n.replicas[group])
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[r.IntN(len(all))]
}

func (c *clients) any(r *rand.Rand) *node {
	all := c.up()
	return all[r.IntN(len(all))]
}

// write writes the next value of a key and returns whether it is certain that
// it is there.
func (c *clients) write(r *rand.Rand, key, value string) bool {
	leader := c.anyLeader(r, groupOf(key))
	if leader == nil {
		return false
	}
	ctx, cancel := within(2 * time.Second)
	defer cancel()
	op := operation{kind: opWrite, key: key, value: value, began: c.clock.Add(1)}
	var err error
	op.revision, err = put(ctx, leader, key, value)
	switch {
	case err == nil:
		c.add(op)
	case errors.Is(err, shard.ErrUnknownOutcome):
		op.ended = math.MaxInt64
		c.add(op)
	}
	return err == nil
}

func (c *clients) read(r *rand.Rand, key string) {
	ctx, cancel := within(2 * time.Second)
	defer cancel()
	op := operation{kind: opRead, key: key, began: c.clock.Add(1)}
	leader, reader := c.anyLeader(r, groupOf(key)), c.any(r)
	if leader == nil {
		return
	}
	index, err := leader.ReadIndex(ctx)
	if err != nil {
		return
	}
	rows, err := get(ctx, reader.replicas[groupOf(key)], index, 0, key)
	if err != nil {
		return
	}
	op.revision = rows[key].revision
	c.add(op)
}

func (c *clients) snapshot(r *rand.Rand) {
	ctx, cancel := within(2 * time.Second)
	defer cancel()
	op := operation{kind: opSnapshot, rows: make(map[string]row), began: c.clock.Add(1)}
	var err error
	if op.revision, err = c.any(r).client.Latest(ctx); err != nil {
		return
	}
	keys := make(map[int][]string)
	for _, key := range c.everyKey() {
		keys[groupOf(key)] = append(keys[groupOf(key)], key)
	}
	var mu sync.Mutex
	var failed bool
	var all sync.WaitGroup
	for group := range keys {
		leader, reader := c.anyLeader(r, group), c.any(r).replicas[group]
		all.Go(func() {
			var rows map[string]row
			err := errors.New("no leader")
			if leader != nil {
				var index uint64
				if index, err = leader.ReadIndexAt(ctx, op.revision); err == nil {
					rows, err = get(ctx, reader, index, op.revision, keys[group]...)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			failed = failed || err != nil
			maps.Copy(op.rows, rows)
		})
	}
	all.Wait()
	if !failed {
		c.add(op)
	}
}

// work starts the clients: for each pair one that writes to the one key and
// then to the other, and some that read.
func (c *clients) work(seed uint64) {
	for pair := range c.pairs {
		c.all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(pair)))
			for attempt, round := 0, 1; !c.stopped(); round++ {
				for _, key := range c.keys(pair) {
					for done := false; !done && !c.stopped(); attempt++ {
						done = c.write(r, key, fmt.Sprintf("%d.%d", round, attempt))
						time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond)
					}
				}
			}
		})
	}
	for i := range 6 {
		c.all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(1000+i)))
			keys := c.everyKey()
			for !c.stopped() {
				if i%2 == 0 {
					c.snapshot(r)
				} else {
					c.read(r, keys[r.IntN(len(keys))])
				}
				time.Sleep(time.Duration(r.IntN(40)) * time.Millisecond)
			}
		})
	}
}

// disturb makes something go wrong, and right again.
func (c *clients) disturb(r *rand.Rand) {
	n := c.any(r)
	group := r.IntN(c.groups + 1)
	d := time.Duration(200+r.IntN(4000)) * time.Millisecond
	switch r.IntN(11) {
	case 0, 1, 2: // a transfer, often of group 0
		if r.IntN(2) == 0 {
			group = 0
		}
		if leader := c.anyLeader(r, group); leader != nil {
			ctx, cancel := within(time.Second)
			_ = leader.TransferLeadership(ctx, "")
			cancel()
		}
	case 3:
		c.network.Isolate(n.name)
		time.Sleep(d)
		c.network.Rejoin(n.name)
	case 4: // one direction only
		other := c.any(r)
		c.network.Partition(n.name, other.name)
		time.Sleep(d)
		c.network.Heal(n.name, other.name)
	case 5: // a disk that stalls, long enough for others to be elected at times
		c.log(n.name, uint64(group)).Stall(2 * d)
		time.Sleep(d)
	case 6: // a disk that is slow
		c.log(n.name, uint64(group)).Stall(time.Duration(10+r.IntN(200)) * time.Millisecond)
	case 7:
		c.network.DropAll(n.name)
	case 8:
		c.delays(r)
	case 9, 10: // group 0's leader does not notice that another one is elected
		for _, n := range c.up() {
			if n.replicas[0].Serving() {
				c.log(n.name, 0).Stall(14 * time.Second)
				c.all.Go(func() {
					ctx, cancel := within(time.Second)
					defer cancel()
					_, _ = n.replicas[0].Propose(ctx, fsm.Request{Space: fsm.System})
				})
			}
		}
		time.Sleep(10 * time.Second)
	}
}

// delays makes some links slow.
func (c *clients) delays(r *rand.Rand) {
	for _, from := range names {
		for _, to := range names {
			if from != to {
				c.network.Delay(from, to, time.Duration(r.IntN(8000))*time.Microsecond)
			}
		}
	}
}

// versions reads everything that the shards have ever had.
func (c *clients) versions() map[string][]row {
	c.t.Helper()
	all := make(map[string][]row)
	for _, key := range c.everyKey() {
		_, leader := c.cluster.leader(groupOf(key))
		ctx, cancel := within(30 * time.Second)
		index, err := leader.ReadIndex(ctx)
		at := int64(0)
		for err == nil {
			var rows map[string]row
			if rows, err = get(ctx, leader, index, at, key); rows[key].revision == 0 {
				break
			}
			all[key] = append(all[key], rows[key])
			if at = rows[key].revision - 1; at == 0 {
				break
			}
		}
		cancel()
		if err != nil {
			c.t.Fatal(err)
		}
		slices.Reverse(all[key])
	}
	return all
}

// campaign lets clients work on a cluster for a while, while things go wrong, and
// checks what they saw.
func campaign(t *testing.T, seed uint64, duration time.Duration, c *cluster) (err error) {
	t.Logf("seed %d", seed)
	bubble(t, c, func(cluster *cluster) {
		c := &clients{cluster: cluster, stop: make(chan struct{}), pairs: 4}
		r := rand.New(rand.NewPCG(seed, 99))
		c.delays(r)
		c.work(seed)
		for end := time.Now().Add(duration); time.Now().Before(end); {
			time.Sleep(time.Duration(r.IntN(2000)) * time.Millisecond)
			c.disturb(r)
			if r.IntN(12) == 0 {
				n := c.any(r)
				c.cluster.stop(n.name)
				time.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
				c.start(n.name)
			}
		}
		c.network.HealAll()
		close(c.stop)
		c.all.Wait()
		time.Sleep(15 * time.Second)
		versions := c.versions()
		for _, key := range c.everyKey() { // and it goes on
			_, leader := c.cluster.leader(groupOf(key))
			ctx, cancel := within(5 * time.Second)
			if _, err := put(ctx, leader, key, "last"); err != nil {
				t.Errorf("seed %d: after everything was healed: put %s: %v", seed, key, err)
			}
			cancel()
		}
		err = c.check(versions)
		t.Log(c.summary())
	})
	return err
}

func (h *history) summary() string {
	count := make(map[string]int)
	for _, op := range h.ops {
		kind := op.kind
		if op.ended == math.MaxInt64 {
			kind = "unknown " + kind
		}
		count[kind]++
	}
	var all []string
	for _, kind := range slices.Sorted(maps.Keys(count)) {
		all = append(all, fmt.Sprintf("%d %ss", count[kind], kind))
	}
	return strings.Join(all, ", ")
}

// Writes, reads and snapshots over three shards stay strictly serializable, and
// revisions in the order of real time, whoever leads what.
func TestHistoriesAreStrictlySerializable(t *testing.T) {
	duration := time.Minute
	if testing.Short() {
		duration = 5 * time.Second
	}
	for seed := *seedFlag; seed < *seedFlag+*seedsFlag; seed++ {
		if err := campaign(t, seed, duration, &cluster{groups: 3, window: 20_000}); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
}

// The same clients see what each of these faults does.
func TestHistoriesShowPlantedFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute: runs without -short")
	}
	for name, plant := range map[string]func(*cluster){
		"floors without confirmed leadership":     func(c *cluster) { c.faults.WithoutConfirmation = true },
		"reads that do not wait for floors":       func(c *cluster) { c.shard.ReadBeforeReserved = true },
		"snapshots before what is in flight":      func(c *cluster) { c.shard.SnapshotBeforeInFlight = true },
		"snapshots without a gate":                func(c *cluster) { c.shard.SnapshotWithoutGate = true },
		"reads without confirmation":              func(c *cluster) { c.shard.ReadWithoutConfirmation = true },
		"revisions that each shard numbers alone": func(c *cluster) { c.without = true },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(20) {
				c := &cluster{groups: 3, window: 20_000}
				plant(c)
				if err := campaign(t, seed, 30*time.Second, c); err != nil {
					t.Logf("seed %d: %v", seed, err)
					return
				}
			}
			t.Error("nothing was seen")
		})
	}
}
