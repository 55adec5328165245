package bench

import (
	"sync"
	"sync/atomic"
)

func newWorkload(r *run) workload {
	b := basic{r, new(atomic.Int64)}
	switch w := r.o.Workload; w.Kind {
	case Put:
		return puts{b}
	case Get:
		return gets{b}
	case Range:
		return ranges{b}
	case Txn:
		return &txns{basic: b, revisions: make([]atomic.Int64, r.o.Keys)}
	}
	return newMix(r, r.o.Workload.Shape)
}

// basic workloads have one operation, and keys in an order.
type basic struct {
	*run
	last *atomic.Int64
}

func (b basic) chooser(seed uint64) chooser { return b.choose(int64(b.o.Keys)) }

func (b basic) choose(n int64) chooser {
	switch b.o.Workload.Order {
	case Sequential:
		return sequence{n, b.last}
	case Zipfian:
		return newScrambled(n)
	}
	return uniform{n}
}

type puts struct{ basic }

func (puts) operations() []string { return []string{"put"} }

func (puts) do(c *client) (int, outcome) { return 0, c.put(c.keys.next(c.rng)) }

type gets struct{ basic }

func (gets) operations() []string { return []string{"get"} }

func (gets) do(c *client) (int, outcome) { return 0, c.get(c.keys.next(c.rng)) }

type ranges struct{ basic }

func (ranges) operations() []string { return []string{"range"} }

// chooser picks first keys that have enough others behind them.
func (r ranges) chooser(uint64) chooser {
	return r.choose(int64(r.o.Keys - r.o.Workload.RangeKeys + 1))
}

func (r ranges) do(c *client) (int, outcome) {
	first := c.keys.next(c.rng)
	c.end = c.run.keys.append(c.end[:0], first+int64(r.o.Workload.RangeKeys))
	return 0, c.scan(first, c.end, 0)
}

// txns put keys that are still as this process knew them last.
type txns struct {
	basic
	revisions []atomic.Int64 // of each key, as far as it is known
}

func (*txns) operations() []string { return []string{"txn"} }

func (t *txns) do(c *client) (int, outcome) {
	n := c.keys.next(c.rng)
	o := c.compareAndPut(n, t.revisions[n].Load())
	if o.err == nil && c.call.modRevision > 0 {
		t.revisions[n].Store(c.call.modRevision)
	}
	return 0, o
}

// put writes key number n.
func (c *client) put(n int64) outcome {
	c.key = c.run.keys.append(c.key[:0], n)
	c.call.request = appendPut(c.call.request[:0], c.key, c.run.values.pick(c.rng))
	return outcome{err: c.invoke(methodPut, readPut), keys: 1}
}

// get reads key number n, which must be there.
func (c *client) get(n int64) outcome {
	c.key = c.run.keys.append(c.key[:0], n)
	c.call.request = appendRange(c.call.request[:0], c.key, nil, 0, c.run.o.Workload.Serializable)
	return c.reading(c.invoke(methodRange, readRange))
}

// scan reads the keys from number n to end, at most limit if that is not 0.
func (c *client) scan(n int64, end []byte, limit int) outcome {
	c.key = c.run.keys.append(c.key[:0], n)
	c.call.request = appendRange(c.call.request[:0], c.key, end, limit, c.run.o.Workload.Serializable)
	return c.reading(c.invoke(methodRange, readRange))
}

func (c *client) reading(err error) outcome {
	if err == nil && c.call.keys == 0 {
		err = errMissing
	}
	return outcome{err: err, keys: c.call.keys}
}

func (c *client) compareAndPut(n, revision int64) outcome {
	c.key = c.run.keys.append(c.key[:0], n)
	c.call.request = appendCompareAndPut(c.call.request[:0], c.key, c.run.values.pick(c.rng), revision)
	err := c.invoke(methodTxn, readTxn)
	return outcome{err: err, keys: 1, conflict: err == nil && !c.call.succeeded}
}

// share of an operation in a mix.
type share struct {
	name    string
	percent int
	do      func(m *mix, c *client) outcome
}

// mixes are YCSB's core workloads (its files workloads/workloada to workloadf), by shape.
var mixes = map[string][]share{
	"A": {{"read", 50, (*mix).read}, {"update", 50, (*mix).update}},
	"B": {{"read", 95, (*mix).read}, {"update", 5, (*mix).update}},
	"C": {{"read", 100, (*mix).read}},
	"D": {{"read", 95, (*mix).readLatest}, {"insert", 5, (*mix).insert}},
	"E": {{"scan", 95, (*mix).scan}, {"insert", 5, (*mix).insert}},
	"F": {{"read", 50, (*mix).read}, {"read-modify-write", 50, (*mix).readModifyWrite}},
}

// mix is a mixed workload. Unlike YCSB's, its keys are not hashed: inserts go to the end of the key space.
type mix struct {
	*run
	shares []share
	newest *newest
	age    zipfian // of what readLatest reads, within as many keys as there were at first
	end    []byte  // of all keys
}

func newMix(r *run, shape string) *mix {
	m := &mix{run: r, shares: mixes[shape], newest: newNewest(int64(r.o.Keys)), end: r.keys.after(nil)}
	if shape == "D" {
		m.age = newZipfian(int64(r.o.Keys))
	}
	return m
}

func (m *mix) operations() (names []string) {
	for _, s := range m.shares {
		names = append(names, s.name)
	}
	return names
}

func (m *mix) chooser(uint64) chooser { return newScrambled(int64(m.o.Keys)) }

func (m *mix) do(c *client) (int, outcome) {
	n := c.rng.IntN(100)
	for i, s := range m.shares {
		if n -= s.percent; n < 0 {
			return i, s.do(m, c)
		}
	}
	panic("bench: the shares of a mix are less than all")
}

func (m *mix) read(c *client) outcome   { return c.get(c.keys.next(c.rng)) }
func (m *mix) update(c *client) outcome { return c.put(c.keys.next(c.rng)) }

func (m *mix) readLatest(c *client) outcome { return c.get(m.newest.load() - m.age.next(c.rng)) }

func (m *mix) scan(c *client) outcome {
	return c.scan(c.keys.next(c.rng), m.end, 1+c.rng.IntN(maxScanKeys))
}

func (m *mix) readModifyWrite(c *client) outcome {
	n := c.keys.next(c.rng)
	if o := c.get(n); o.err != nil {
		return o
	}
	return c.compareAndPut(n, c.call.modRevision)
}

// insert writes a new key.
func (m *mix) insert(c *client) outcome {
	n := m.newest.reserve()
	o := c.put(n)
	m.newest.settle(n, o.err == nil)
	return o
}

// newest tracks up to which number all keys are there.
type newest struct {
	there atomic.Int64 // number of the newest key before which none is missing
	mu    sync.Mutex
	given int64
	again []int64        // whose inserts failed: they are the next, so that none stays out
	ahead map[int64]bool // there, but a key before is not yet
}

func newNewest(keys int64) *newest {
	n := &newest{given: keys - 1, ahead: map[int64]bool{}}
	n.there.Store(keys - 1)
	return n
}

func (n *newest) load() int64 { return n.there.Load() }

// reserve returns the number of the next key to insert. The caller calls settle for it.
func (n *newest) reserve() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if last := len(n.again) - 1; last >= 0 {
		key := n.again[last]
		n.again = n.again[:last]
		return key
	}
	n.given++
	return n.given
}

// settle notes whether the key is there.
func (n *newest) settle(key int64, inserted bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !inserted {
		n.again = append(n.again, key)
		return
	}
	n.ahead[key] = true
	there := n.there.Load()
	for n.ahead[there+1] {
		there++
		delete(n.ahead, there)
	}
	n.there.Store(there)
}
