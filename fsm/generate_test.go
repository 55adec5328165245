package fsm

import (
	"fmt"
	"math/rand/v2"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// generator makes random requests over few keys, so that they meet. It keeps to what servers let through, except
// that it also makes transactions that change a key twice.
type generator struct {
	*rand.Rand
	revision  int64 // the newest, to aim at
	compacted int64
	leases    []int64
}

func newGenerator(seed uint64) *generator {
	return &generator{Rand: rand.New(rand.NewPCG(seed, 1)), revision: 1, compacted: -1, leases: []int64{0}}
}

func (g *generator) oneIn(n int) bool { return g.IntN(n) == 0 }

func (g *generator) key() []byte {
	return []byte([...]string{"a", "a/1", "a/2", "b", "b/1", "b/1/x", "c", "d", "\x00", "\xff", "\xff\xff", "e"}[g.IntN(12)])
}

func (g *generator) rangeEnd() []byte {
	switch g.IntN(6) {
	case 0, 1, 2:
		return nil
	case 3:
		return []byte{0}
	default:
		return g.key()
	}
}

func (g *generator) value() []byte {
	if g.oneIn(8) {
		return nil
	}
	return fmt.Append(nil, "v", g.IntN(5))
}

// atRevision is mostly the newest, sometimes an old one, rarely one that is out of bounds.
func (g *generator) atRevision() int64 {
	switch g.IntN(10) {
	case 0, 1, 2:
		return max(0, g.compacted) + g.Int64N(g.revision-max(0, g.compacted)+1)
	case 3:
		return g.Int64N(g.revision+4) - 2
	}
	return 0
}

func (g *generator) bound() int64 {
	if g.oneIn(4) {
		return g.Int64N(g.revision + 2)
	}
	return 0
}

func (g *generator) rangeRequest() *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key(), RangeEnd: g.rangeEnd(), Revision: g.atRevision()}
	if g.oneIn(3) {
		r.Limit = g.Int64N(6) - 1
	}
	if g.oneIn(3) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.IntN(5))
	}
	if g.oneIn(5) {
		r.MinModRevision, r.MaxModRevision = g.bound(), g.bound()
		r.MinCreateRevision, r.MaxCreateRevision = g.bound(), g.bound()
	}
	r.KeysOnly = g.oneIn(6)
	r.CountOnly = g.oneIn(8)
	return r
}

func (g *generator) putRequest() *pb.PutRequest {
	p := &pb.PutRequest{Key: g.key(), Value: g.value(), PrevKv: g.oneIn(4), Lease: g.leases[g.IntN(len(g.leases))]}
	if g.oneIn(10) {
		p.IgnoreValue, p.Value = true, nil
	}
	if g.oneIn(10) {
		p.IgnoreLease, p.Lease = true, 0
	}
	if g.oneIn(40) {
		p.Lease = 404
	}
	return p
}

func (g *generator) deleteRequest() *pb.DeleteRangeRequest {
	d := &pb.DeleteRangeRequest{Key: g.key(), PrevKv: g.oneIn(3)}
	if g.oneIn(3) {
		d.RangeEnd = g.rangeEnd()
	}
	return d
}

func (g *generator) compaction() *pb.CompactionRequest {
	low := max(0, g.compacted)
	return &pb.CompactionRequest{Revision: low + g.Int64N(g.revision-low+3) - 1}
}

func (g *generator) compare() *pb.Compare {
	c := &pb.Compare{
		Key:    g.key(),
		Result: pb.Compare_CompareResult(g.IntN(4)),
		Target: pb.Compare_CompareTarget(g.IntN(5)),
	}
	if g.oneIn(3) {
		c.RangeEnd = g.rangeEnd()
	}
	switch c.Target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: g.bound()}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: g.bound()}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: g.value()}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: g.leases[g.IntN(len(g.leases))]}
	}
	if g.oneIn(20) {
		c.TargetUnion = nil
	}
	return c
}

func (g *generator) ops(depth int, write bool) []*pb.RequestOp {
	var ops []*pb.RequestOp
	for range g.IntN(4) {
		op := &pb.RequestOp{}
		switch n := g.IntN(10); {
		case !write || n < 3:
			op.Request = &pb.RequestOp_RequestRange{RequestRange: g.rangeRequest()}
		case n < 6:
			op.Request = &pb.RequestOp_RequestPut{RequestPut: g.putRequest()}
		case n < 8:
			op.Request = &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: g.deleteRequest()}
		case depth > 0:
			op.Request = &pb.RequestOp_RequestTxn{RequestTxn: g.txn(depth-1, write)}
		default:
			continue
		}
		ops = append(ops, op)
	}
	return ops
}

func (g *generator) txn(depth int, write bool) *pb.TxnRequest {
	r := &pb.TxnRequest{Success: g.ops(depth, write), Failure: g.ops(depth, write)}
	for range g.IntN(3) {
		r.Compare = append(r.Compare, g.compare())
	}
	return r
}

// command is a request that goes through the log.
func (g *generator) command() proto.Message {
	switch n := g.IntN(40); {
	case n < 20:
		return g.putRequest()
	case n < 26:
		return g.deleteRequest()
	case n < 38:
		return g.txn(2, true)
	case n < 39:
		return g.compaction()
	default:
		return nil
	}
}
