package compare

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// leasePlay asks two servers for the same leases at random. Ids that servers choose are translated.
type leasePlay struct {
	pair
	rng   *rand.Rand
	ids   []int64         // the reference's
	own   map[int64]int64 // the subject's id for one of the reference's, where they differ
	keys  []string
	made  []string
	seen  map[string]int
	timed int64 // TTLs from here on are compared; shorter ones have a minimum that depends on the servers' settings
}

// anyLease is an id: of a lease that is there, or was, or never was.
func (p *leasePlay) anyLease() int64 {
	if len(p.ids) == 0 || p.rng.IntN(12) == 0 {
		return []int64{0, -5, 999, 1 << 62}[p.rng.IntN(4)]
	}
	return p.ids[p.rng.IntN(len(p.ids))]
}

func (p *leasePlay) next() proto.Message {
	key := []byte(p.subject.tag + p.keys[p.rng.IntN(len(p.keys))])
	switch n := p.rng.IntN(100); {
	case n < 15:
		return p.grant()
	case n < 22:
		return &pb.LeaseRevokeRequest{ID: p.anyLease()}
	case n < 36:
		return &pb.LeaseTimeToLiveRequest{ID: p.anyLease(), Keys: p.rng.IntN(3) > 0}
	case n < 40:
		return &pb.LeaseLeasesRequest{}
	case n < 48:
		return &pb.LeaseKeepAliveRequest{ID: p.anyLease()}
	case n < 70:
		return &pb.PutRequest{Key: key, Value: fmt.Appendf(nil, "v%d", len(p.made)), Lease: p.anyLease(), PrevKv: p.rng.IntN(3) == 0}
	case n < 75:
		return &pb.PutRequest{Key: key, Value: []byte("kept"), IgnoreLease: true}
	case n < 79:
		return &pb.DeleteRangeRequest{Key: key, PrevKv: true}
	case n < 88:
		return p.txn(key)
	default:
		from := []byte(p.subject.tag)
		if p.subject.tag == "" {
			from = []byte("a")
		}
		return &pb.RangeRequest{Key: from, RangeEnd: prefixEnd(key)}
	}
}

func (p *leasePlay) grant() proto.Message {
	r := &pb.LeaseGrantRequest{TTL: p.timed + p.rng.Int64N(1000)}
	switch p.rng.IntN(8) {
	case 0, 1, 2:
		r.ID = 1 + p.rng.Int64N(60) // sometimes there already
	case 3:
		r.ID = -1 - p.rng.Int64N(5)
	case 4:
		r.TTL = 9_000_000_000 + p.rng.Int64N(2)
	}
	return r
}

// txn puts with leases, in one of two branches.
func (p *leasePlay) txn(key []byte) proto.Message {
	put := func(suffix string) *pb.RequestOp {
		return putOp(&pb.PutRequest{Key: append(slices.Clone(key), suffix...), Value: []byte("t"), Lease: p.anyLease(), PrevKv: true})
	}
	compare := &pb.Compare{Key: key, Target: pb.Compare_LEASE, Result: []pb.Compare_CompareResult{pb.Compare_EQUAL, pb.Compare_NOT_EQUAL}[p.rng.IntN(2)], TargetUnion: &pb.Compare_Lease{Lease: p.anyLease()}}
	return &pb.TxnRequest{Compare: []*pb.Compare{compare}, Success: []*pb.RequestOp{put(""), put("+")}, Failure: []*pb.RequestOp{put("-")}}
}

// leaseField tells the fields that hold the id of a lease.
func leaseField(m protoreflect.Message, field protoreflect.FieldDescriptor) bool {
	name := field.Name()
	return field.Kind() == protoreflect.Int64Kind && (name == "lease" || name == "ID" && strings.HasPrefix(string(m.Descriptor().Name()), "Lease"))
}

// rewriteLeases replaces every id of a lease in a message.
func rewriteLeases(m protoreflect.Message, replace func(int64) int64) {
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.Kind() == protoreflect.MessageKind && field.IsList():
			for i := range value.List().Len() {
				rewriteLeases(value.List().Get(i).Message(), replace)
			}
		case field.Kind() == protoreflect.MessageKind:
			rewriteLeases(value.Message(), replace)
		case leaseField(m, field):
			m.Set(field, protoreflect.ValueOfInt64(replace(value.Int())))
		}
		return true
	})
}

// askLeases asks both servers. Sets are put in order; a lease's remaining time only has to be one that is possible.
func (p *leasePlay) askLeases(ctx context.Context, c call) (want answer, diff string) {
	reference := p.reference.ask(ctx, c)
	asked := c
	asked.request = proto.Clone(c.request)
	rewriteLeases(asked.request.ProtoReflect(), func(id int64) int64 {
		if own, ok := p.own[id]; ok {
			return own
		}
		return id
	})
	if p.revisions != nil {
		var err error
		if asked, err = p.revisions.request(ctx, asked); err != nil {
			return reference, err.Error()
		}
	}
	got := p.subject.ask(ctx, asked)
	p.learnID(c, reference, got)
	if got.response != nil {
		rewriteLeases(got.response.ProtoReflect(), p.theirs)
	}
	if p.revisions != nil {
		if err := p.withHeader(ctx, c, reference, got); err != nil {
			return reference, err.Error()
		}
		got = p.revisions.answer(c, reference, got)
	}
	return reference, difference(inOrder(reference), inOrder(got))
}

// withHeader puts a revision into the header of an answer about a lease: there is that of the shard which is the lease's
// home, whatever shards its keys are in.
func (p *leasePlay) withHeader(ctx context.Context, c call, want, got answer) (err error) {
	if !strings.HasPrefix(string(c.request.ProtoReflect().Descriptor().Name()), "Lease") || want.response == nil || got.response == nil {
		return nil
	}
	headerOf(got.response).Revision, err = p.revisions.latest(ctx)
	return err
}

// theirs is the reference's id for one of the subject's.
func (p *leasePlay) theirs(id int64) int64 {
	for reference, own := range p.own {
		if own == id {
			return reference
		}
	}
	return id
}

// learnID notes the ids of a lease that the servers have chosen.
func (p *leasePlay) learnID(c call, want, got answer) {
	w, ok := want.response.(*pb.LeaseGrantResponse)
	if !ok {
		return
	}
	p.ids = append(p.ids, w.ID)
	if g, ok := got.response.(*pb.LeaseGrantResponse); ok && c.request.(*pb.LeaseGrantRequest).ID == 0 {
		p.own[w.ID] = g.ID
	}
}

// inOrder sorts what has no order, and takes out what depends on the time.
func inOrder(a answer) answer {
	if a.response == nil {
		return a
	}
	a.response = proto.Clone(a.response)
	switch r := a.response.(type) {
	case *pb.LeaseLeasesResponse:
		slices.SortFunc(r.Leases, func(a, b *pb.LeaseStatus) int { return int(min(max(a.ID-b.ID, -1), 1)) })
	case *pb.LeaseTimeToLiveResponse:
		slices.SortFunc(r.Keys, func(a, b []byte) int { return strings.Compare(string(a), string(b)) })
		if r.TTL <= r.GrantedTTL && r.TTL > r.GrantedTTL-60 {
			r.TTL = r.GrantedTTL
		}
	}
	return a
}

// leasesMustBeEqual plays random calls on a fresh pair.
func leasesMustBeEqual(t *testing.T, start func(*testing.T) pair) {
	t.Parallel()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	p := &leasePlay{pair: start(t), rng: rand.New(rand.NewPCG(seed, 8)), own: map[int64]int64{}, seen: map[string]int{}, timed: 600,
		keys: []string{"a", "b", "c", "d", "e", "f", "g"}}
	for i := 0; i < *callsFlag || i < longer**callsFlag && len(unmet(p.seen, leaseKinds)) > 0; i++ {
		c := call{request: p.next(), node: p.rng.IntN(p.nodes)}
		p.made = append(p.made, c.String())
		want, diff := p.askLeases(t.Context(), c)
		if diff != "" {
			t.Fatalf("seed %d: after\n%s\n%s", seed, strings.Join(p.made[max(0, len(p.made)-40):], "\n"), diff)
		}
		what := string(c.request.ProtoReflect().Descriptor().Name())
		if want.response == nil {
			what += ": " + want.message
		}
		p.seen[what]++
	}
	t.Logf("seed %d: %v", seed, p.seen)
	if missing := unmet(p.seen, leaseKinds); len(missing) > 0 {
		t.Errorf("equal, but never met: %q", missing)
	}
}

var leaseKinds = []string{
	"LeaseGrantRequest", "LeaseGrantRequest: etcdserver: lease already exists", "LeaseGrantRequest: etcdserver: too large lease TTL",
	"LeaseRevokeRequest", "LeaseRevokeRequest: etcdserver: requested lease not found", "LeaseTimeToLiveRequest", "LeaseLeasesRequest",
	"LeaseKeepAliveRequest", "PutRequest", "PutRequest: etcdserver: requested lease not found", "TxnRequest: etcdserver: requested lease not found",
}

func TestEtcdLeasesAsEtcd(t *testing.T) {
	leasesMustBeEqual(t, func(t *testing.T) pair {
		return pair{reference: mustDial(t, []string{startEtcd(t)}), subject: mustDial(t, []string{startEtcd(t)}), nodes: 1}
	})
}
func TestOneNodeLeasesAsEtcd(t *testing.T)   { leasesMustBeEqual(t, etcdAndKVD(1)) }
func TestThreeNodesLeaseAsEtcd(t *testing.T) { leasesMustBeEqual(t, etcdAndKVD(3)) }
func TestOneShardLeasesAsEtcd(t *testing.T)  { leasesMustBeEqual(t, etcdAndShards) }
