package compare

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Limits of a default etcd: what a request may weigh, what a message may weigh, operations in a transaction.
const (
	maxRequestBytes = 1536 << 10
	maxMessageBytes = maxRequestBytes + 512<<10
	maxTxnOps       = 128
)

// generator makes up calls. It follows the answers of the reference, so that revisions, versions and values in its
// calls are near to the real ones. The same seed and the same answers give the same calls.
type generator struct {
	rng       *rand.Rand
	tag       string // begins every key; "" = none
	keys      [][]byte
	revision  int64 // the newest seen
	compacted int64

	compactions map[int64]bool
	modified    map[string]int64  // key to the revision of the last put
	values      map[string][]byte // key to the value of the last put
	queue       []call            // what must come next
}

func newGenerator(seed uint64, tag string) *generator {
	g := &generator{
		rng:      rand.New(rand.NewPCG(seed, 0)),
		tag:      tag,
		revision: 1, compacted: -1,
		compactions: map[int64]bool{}, modified: map[string]int64{}, values: map[string][]byte{},
	}
	for _, key := range []string{
		"\x00", "\x00\x00", "a", "a\x00", "aa", "ab", "abc", "b", "b\xff", "c", "k/1", "k/10", "k/2", "\xff", "\xff\xff",
		"long" + string(bytes.Repeat([]byte("g"), 300)),
	} {
		g.keys = append(g.keys, []byte(tag+key))
	}
	for i := range 24 { // enough to sort more keys than an insertion sort would
		g.keys = append(g.keys, fmt.Appendf(nil, "%sn%02d", tag, i))
	}
	return g
}

// next makes up a call to one of nodes nodes.
func (g *generator) next(nodes int) call {
	var c call
	if len(g.queue) > 0 {
		c, g.queue = g.queue[0], g.queue[1:]
	} else {
		c = g.call()
	}
	if t, ok := c.request.(*pb.TxnRequest); ok && g.tag != "" {
		g.confine(t)
	}
	c.node = g.rng.IntN(nodes)
	return c
}

// confine keeps a transaction within the keys with the tag: in its ranges are no others. Those that may read other shards
// stay as they are: of a transaction that only reads, and after all that one compares and writes.
func (g *generator) confine(t *pb.TxnRequest) {
	if readsOnly(t) {
		for _, op := range slices.Concat(t.Success, t.Failure) {
			if r := op.GetRequestRange(); r.Revision == -1 && g.compacted < 0 {
				r.Revision = 0 // README.md
			}
		}
		return
	}
	for _, branch := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for i, op := range branch {
			r := op.GetRequestRange()
			if r == nil || r.Revision != 0 || len(t.Compare) == 0 || !allReads(branch[i:]) {
				g.confineOp(op)
			}
		}
	}
	g.confineCompares(t)
}

func readsOnly(t *pb.TxnRequest) bool { return allReads(t.Success) && allReads(t.Failure) }

func allReads(ops []*pb.RequestOp) bool {
	return !slices.ContainsFunc(ops, func(op *pb.RequestOp) bool { return op.GetRequestRange() == nil })
}

func (g *generator) confineCompares(t *pb.TxnRequest) {
	for _, c := range t.Compare {
		c.Key, c.RangeEnd = g.tagged(c.Key, c.RangeEnd)
	}
}

func (g *generator) confineOp(op *pb.RequestOp) {
	switch o := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		o.RequestRange.Key, o.RequestRange.RangeEnd = g.tagged(o.RequestRange.Key, o.RequestRange.RangeEnd)
	case *pb.RequestOp_RequestDeleteRange:
		o.RequestDeleteRange.Key, o.RequestDeleteRange.RangeEnd = g.tagged(o.RequestDeleteRange.Key, o.RequestDeleteRange.RangeEnd)
	case *pb.RequestOp_RequestTxn:
		g.confineCompares(o.RequestTxn)
		for _, op := range slices.Concat(o.RequestTxn.Success, o.RequestTxn.Failure) {
			g.confineOp(op)
		}
	}
}

// tagged returns the keys with the tag in an interval.
func (g *generator) tagged(key, end []byte) (taggedKey, taggedEnd []byte) {
	if g.tag == "" {
		return key, end
	}
	if bytes.Equal(key, []byte{0}) {
		key = []byte(g.tag)
	}
	if bytes.Equal(end, []byte{0}) {
		end = prefixEnd([]byte(g.tag))
	}
	return key, end
}

func (g *generator) call() call {
	switch n := g.rng.IntN(1000); {
	case n < 250:
		return call{request: g.rangeRequest()}
	case n < 300:
		return call{request: g.streamRequest(), stream: true}
	case n < 510:
		return call{request: g.put()}
	case n < 560:
		return call{request: g.deleteRange()}
	case n < 680:
		return call{request: g.txn(0, false)}
	case n < 710:
		return call{request: g.oldReadTxn()}
	case n < 735:
		return call{request: g.ownWriteTxn()}
	case n < 925:
		return call{request: g.comparison()}
	case n < 950:
		return call{request: g.compaction()}
	case n < 970:
		return call{request: g.hash()}
	case n < 985:
		return call{request: g.wideTxn()}
	default:
		return g.oversize()
	}
}

// learn takes in what the reference answered.
func (g *generator) learn(c call, a answer) {
	if a.response == nil {
		return
	}
	header := headerOf(a.response)
	g.revision = max(g.revision, header.GetRevision())
	switch r := c.request.(type) {
	case *pb.PutRequest:
		g.modified[string(r.Key)], g.values[string(r.Key)] = header.GetRevision(), r.Value
	case *pb.CompactionRequest:
		g.compacted = r.Revision
		g.compactions[r.Revision] = true
	}
}

// history returns calls that read everything at many revisions, from the last compaction to the newest.
func (g *generator) history(nodes int) []call {
	const most = 200
	low := max(g.compacted, 1)
	var calls []call
	for revision := low; revision <= g.revision; revision += (g.revision-low)/most + 1 {
		everything := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revision}
		calls = append(calls, call{request: everything, node: len(calls) % nodes})
	}
	return calls
}

func (g *generator) chance(percent int) bool { return g.rng.IntN(100) < percent }

func pick[T any](g *generator, from ...T) T { return from[g.rng.IntN(len(from))] }

func (g *generator) key() []byte {
	if g.chance(3) {
		return nil
	}
	return pick(g, g.keys...)
}

// interval returns a key and the range_end that goes with it.
func (g *generator) interval() (key, end []byte) {
	key = g.key()
	switch g.rng.IntN(10) {
	case 0, 1, 2, 3: // a single key
	case 4:
		end = []byte{0} // all keys from key on
	case 5:
		key, end = []byte{0}, []byte{0} // all keys
	case 6:
		key, end = []byte(g.tag+"n"), []byte(g.tag+"o")
	case 7:
		end = prefixEnd(key)
	default:
		end = g.key() // also at or before key: an empty interval
	}
	if g.chance(50) {
		return g.tagged(key, end)
	}
	return key, end
}

// prefixEnd returns the range_end that makes key a prefix.
func prefixEnd(key []byte) []byte {
	for i := len(key) - 1; i >= 0; i-- {
		if key[i] < 0xff {
			end := slices.Clone(key[:i+1])
			end[i]++
			return end
		}
	}
	return []byte{0}
}

func (g *generator) value() []byte {
	switch n := g.rng.IntN(100); {
	case n < 15:
		return nil
	case n < 80:
		return []byte(pick(g, "x", "y", "z", "zz"))
	case n < 99:
		return g.bytes(1 + g.rng.IntN(40))
	default:
		return g.bytes(20 << 10)
	}
}

func (g *generator) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.rng.Uint32())
	}
	return b
}

// pastRevision returns a revision between the compacted and the newest one.
func (g *generator) pastRevision() int64 {
	low := max(g.compacted, 1)
	return low + g.rng.Int64N(g.revision-low+1)
}

// readRevision returns a revision to read at; most are 0, the newest.
func (g *generator) readRevision() int64 {
	switch n := g.rng.IntN(100); {
	case n < 60:
		return 0
	case n < 86:
		return g.pastRevision()
	case n < 88:
		return g.revision
	case n < 90:
		return g.compacted
	case n < 93:
		return g.compacted - 1
	case n < 96:
		return g.revision + 1
	default:
		return pick[int64](g, 1, -1, -2, math.MinInt64, math.MaxInt64, g.revision+1000)
	}
}

// filterRevision returns a bound for the min and max revision options; most are 0, none.
func (g *generator) filterRevision() int64 {
	switch n := g.rng.IntN(100); {
	case n < 85:
		return 0
	case n < 98:
		return g.pastRevision()
	default:
		return pick[int64](g, -1, math.MaxInt64, math.MinInt64)
	}
}

func (g *generator) limit() int64 {
	switch n := g.rng.IntN(100); {
	case n < 50:
		return 0
	case n < 92:
		return 1 + g.rng.Int64N(30)
	default:
		return pick[int64](g, -1, math.MinInt64, math.MaxInt64, math.MaxInt64-1, math.MaxInt32)
	}
}

func (g *generator) rangeRequest() *pb.RangeRequest {
	key, end := g.interval()
	r := &pb.RangeRequest{
		Key: key, RangeEnd: end, Revision: g.readRevision(), Limit: g.limit(),
		KeysOnly: g.chance(15), CountOnly: g.chance(10), Serializable: g.chance(20),
	}
	if g.chance(50) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.rng.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.rng.IntN(5))
	}
	if g.chance(25) {
		r.MinModRevision, r.MaxModRevision = g.filterRevision(), g.filterRevision()
		r.MinCreateRevision, r.MaxCreateRevision = g.filterRevision(), g.filterRevision()
	}
	if g.chance(1) {
		r.SortOrder = pb.RangeRequest_SortOrder(pick(g, 3, 99, -1))
	}
	if g.chance(1) {
		r.SortTarget = pb.RangeRequest_SortTarget(pick(g, 5, 99, -1))
	}
	return r
}

// streamRequest is a rangeRequest without a combination with which etcd's stream loses keys: it sorts each piece by the
// target, though no order is asked for, and goes on after the last key of the sorted piece.
func (g *generator) streamRequest() *pb.RangeRequest {
	r := g.rangeRequest()
	if r.SortOrder == pb.RangeRequest_NONE && r.SortTarget >= 0 && r.SortTarget <= pb.RangeRequest_VALUE {
		r.SortTarget = pb.RangeRequest_KEY
	}
	return r
}

func (g *generator) put() *pb.PutRequest {
	p := &pb.PutRequest{Key: g.key(), Value: g.value(), PrevKv: g.chance(30)}
	switch n := g.rng.IntN(100); {
	case n < 6:
		p.IgnoreValue, p.Value = true, nil
	case n < 8:
		p.IgnoreValue = true // together with most values: refused
	case n < 14:
		p.IgnoreLease = true
	case n < 16:
		p.IgnoreLease, p.Lease = true, 7 // refused
	case n < 18:
		p.IgnoreLease, p.IgnoreValue, p.Value = true, true, nil
	case n < 21:
		p.Lease = pick[int64](g, 1, -1, math.MaxInt64) // no such lease
	case n < 22:
		p.Lease, p.IgnoreValue, p.Value = 1, true, nil
	}
	return p
}

func (g *generator) deleteRange() *pb.DeleteRangeRequest {
	key, end := g.interval()
	if g.chance(85) {
		key, end = g.key(), nil // or hardly anything would live
	}
	if g.chance(3) {
		key = nil
	}
	return &pb.DeleteRangeRequest{Key: key, RangeEnd: end, PrevKv: g.chance(40)}
}

func (g *generator) compaction() *pb.CompactionRequest {
	r := &pb.CompactionRequest{Physical: g.chance(30)}
	switch n := g.rng.IntN(100); {
	case n < 50: // not far, so that old revisions stay to be read
		r.Revision = max(g.compacted, 0) + g.rng.Int64N((g.revision-max(g.compacted, 0))/4+1)
	case n < 55:
		r.Revision = g.revision
	case n < 70:
		r.Revision = g.revision + 1
	case n < 80:
		r.Revision = g.compacted
	case n < 90:
		r.Revision = pick(g, 0, -1, g.compacted-1)
	default:
		r.Revision = pick(g, math.MaxInt64, math.MinInt64, g.revision+1000)
	}
	return r
}

// hash asks for no revision at which there was a compaction: for some of those etcd has a hash in store, for some it
// hasn't, as the compaction in the background had it.
func (g *generator) hash() *pb.HashKVRequest {
	revision := pick(g, 0, g.pastRevision(), g.pastRevision(), max(g.compacted-1, 0), g.revision+1)
	for g.compactions[revision] {
		revision++
	}
	return &pb.HashKVRequest{Revision: revision}
}

func (g *generator) compare() *pb.Compare {
	c := &pb.Compare{
		Key:    g.key(),
		Result: pb.Compare_CompareResult(g.rng.IntN(4)),
		Target: pick(g, pb.Compare_VERSION, pb.Compare_CREATE, pb.Compare_MOD, pb.Compare_VALUE, pb.Compare_VALUE, pb.Compare_LEASE),
	}
	if g.chance(20) {
		c.Key, c.RangeEnd = g.interval()
	}
	union := c.Target
	if g.chance(3) {
		union = pb.Compare_CompareTarget(g.rng.IntN(5)) // another than the target's own
	}
	switch union {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.rng.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: g.compareRevision(c.Key)}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: g.compareRevision(c.Key)}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: pick(g, g.values[string(c.Key)], []byte("x"), []byte("y"), g.value())}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: g.rng.Int64N(3) - 1}
	}
	switch g.rng.IntN(60) {
	case 0:
		c.Result = 77
	case 1:
		c.Target = 77
	case 2:
		c.TargetUnion = nil
	}
	return c
}

func (g *generator) compareRevision(key []byte) int64 {
	switch g.rng.IntN(4) {
	case 0:
		return 0
	case 1:
		return g.pastRevision()
	default:
		return g.modified[string(key)] // right, if nothing but puts has touched it
	}
}

// comparison is a transaction with a single compare, whose result is the branch taken.
func (g *generator) comparison() *pb.TxnRequest {
	return g.withoutCrash(&pb.TxnRequest{
		Compare: []*pb.Compare{g.compare()},
		Success: g.ops(g.rng.IntN(2), 0, false),
		Failure: g.ops(g.rng.IntN(2), 0, false),
	})
}

const maxDepth = 3

// txn makes up a transaction, nested up to maxDepth.
func (g *generator) txn(depth int, readOnly bool) *pb.TxnRequest {
	readOnly = readOnly || g.chance(15)
	t := &pb.TxnRequest{}
	for range g.rng.IntN(4 - depth) {
		t.Compare = append(t.Compare, g.compare())
	}
	t.Success = g.ops(g.rng.IntN(5), depth, readOnly)
	t.Failure = g.ops(g.rng.IntN(5), depth, readOnly)
	if depth == 0 {
		return g.withoutCrash(t)
	}
	return t
}

func (g *generator) ops(n, depth int, readOnly bool) []*pb.RequestOp {
	var ops []*pb.RequestOp
	for range n {
		switch k := g.rng.IntN(200); {
		case k == 0:
			ops = append(ops, &pb.RequestOp{}) // refused
		case k < 70 || readOnly:
			r := g.rangeRequest()
			if g.chance(80) {
				r.Revision = 0 // or few transactions would get past their reads
			}
			if len(ops) > 0 && g.chance(50) {
				r.Key, r.RangeEnd = written(ops[len(ops)-1]), nil
			}
			ops = append(ops, rangeOp(r))
		case k < 140:
			ops = append(ops, putOp(g.put()))
		case k < 158 || depth == maxDepth:
			ops = append(ops, deleteOp(g.deleteRange()))
		default:
			ops = append(ops, txnOp(g.txn(depth+1, false)))
		}
	}
	return ops
}

// oldReadTxn is a read-only transaction with a read that is most likely not at the newest revision.
func (g *generator) oldReadTxn() *pb.TxnRequest {
	read := g.rangeRequest()
	for range 3 {
		if read.Revision == 0 {
			read.Revision = g.readRevision()
		}
	}
	return &pb.TxnRequest{Success: []*pb.RequestOp{rangeOp(read)}, Failure: g.ops(1, maxDepth, true)}
}

// ownWriteTxn is a transaction that reads what it has written.
func (g *generator) ownWriteTxn() *pb.TxnRequest {
	key := pick(g, g.keys...)
	write := putOp(&pb.PutRequest{Key: key, Value: g.value()})
	if g.chance(50) {
		write = deleteOp(&pb.DeleteRangeRequest{Key: key})
	}
	return &pb.TxnRequest{Success: []*pb.RequestOp{
		write,
		rangeOp(&pb.RangeRequest{Key: key}),
		rangeOp(g.rangeRequest()),
	}}
}

func rangeOp(r *pb.RangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
}

func putOp(r *pb.PutRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}}
}

func deleteOp(r *pb.DeleteRangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
}

func txnOp(r *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}}
}

// written returns the key that the operation writes, nil if it writes none.
func written(op *pb.RequestOp) []byte {
	if p := op.GetRequestPut(); p != nil {
		return p.Key
	}
	return op.GetRequestDeleteRange().GetKey()
}

// wideTxn is a transaction with about as many operations as are allowed, all in one level or in two.
func (g *generator) wideTxn() *pb.TxnRequest {
	reads := func(n int) []*pb.RequestOp {
		var ops []*pb.RequestOp
		for range n {
			ops = append(ops, rangeOp(&pb.RangeRequest{Key: pick(g, g.keys...), CountOnly: true}))
		}
		return ops
	}
	n := maxTxnOps - 1 + g.rng.IntN(3)
	t := &pb.TxnRequest{}
	switch g.rng.IntN(4) {
	case 0:
		t.Success = reads(n)
	case 1:
		t.Failure = reads(n)
	case 2:
		for range n {
			t.Compare = append(t.Compare, &pb.Compare{Key: pick(g, g.keys...)})
		}
	default: // the levels count together
		inner := 20 + g.rng.IntN(20)
		t.Success = reads(n - inner - 1)
		t.Success = append(t.Success, txnOp(&pb.TxnRequest{Success: reads(inner)}))
	}
	return t
}

// oversize is a request around one of the two limits of size, but not so near that the encoding would matter.
func (g *generator) oversize() call {
	key := []byte(g.tag + "big")
	size := pick(g, maxRequestBytes-200, maxRequestBytes+1, maxMessageBytes-200, maxMessageBytes+1)
	value := bytes.Repeat([]byte("v"), size)
	g.queue = append(g.queue, call{request: &pb.DeleteRangeRequest{Key: key}}) // don't carry it along
	if g.chance(50) {
		return call{request: &pb.PutRequest{Key: key, Value: value}}
	}
	return call{request: &pb.TxnRequest{Success: []*pb.RequestOp{putOp(&pb.PutRequest{Key: key, Value: value})}}}
}

// withoutCrash takes out what brings a real etcd down sooner or later: a transaction that deletes a key and then puts
// it again. Asked to keep the value it has just deleted, etcd panics at once; otherwise a compaction at that very
// revision takes the new value away and the next read of it is fatal. etcd refuses such transactions, but overlooks
// the keys in a range without an end.
func (g *generator) withoutCrash(t *pb.TxnRequest) *pb.TxnRequest {
	var last []byte // of the keys that are put
	eachOp(t, func(op *pb.RequestOp) {
		if p := op.GetRequestPut(); p != nil && bytes.Compare(p.Key, last) > 0 {
			last = p.Key
		}
	})
	eachOp(t, func(op *pb.RequestOp) {
		if d := op.GetRequestDeleteRange(); d != nil && bytes.Equal(d.RangeEnd, []byte{0}) && bytes.Compare(d.Key, last) <= 0 {
			d.RangeEnd = nil
		}
	})
	return t
}

// eachOp calls f for every operation of a transaction, nested ones too.
func eachOp(t *pb.TxnRequest, f func(*pb.RequestOp)) {
	for _, op := range slices.Concat(t.Success, t.Failure) {
		f(op)
		if inner := op.GetRequestTxn(); inner != nil {
			eachOp(inner, f)
		}
	}
}

// mutates tells whether the call may change the store.
func mutates(c call) bool {
	switch r := c.request.(type) {
	case *pb.PutRequest, *pb.DeleteRangeRequest, *pb.CompactionRequest:
		return true
	case *pb.TxnRequest:
		found := false
		eachOp(r, func(op *pb.RequestOp) { found = found || op.GetRequestRange() == nil })
		return found
	}
	return false
}
