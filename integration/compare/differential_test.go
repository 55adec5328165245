package compare

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// pair is two servers that must answer alike.
type pair struct {
	reference, subject *client
	nodes              int        // of the subject
	revisions          *revisions // if the subject's are not the reference's
}

// ask asks both and returns what the reference answered and how the subject's answer differs, "" if it does not.
func (p pair) ask(ctx context.Context, c call) (want answer, diff string) {
	want = p.reference.ask(ctx, c)
	if p.revisions == nil {
		return want, difference(want, p.subject.ask(ctx, c))
	}
	for range maxStale {
		diff = p.askWithOwnRevisions(ctx, c, want)
		if stale := p.nodes > 1 && mayBeStale(c.request); diff == "" || !stale && !p.revisions.outdated(ctx) {
			break
		}
		time.Sleep(staleBackoff)
	}
	return want, diff
}

// A read that may be answered from an old state is made again if it differs: the state may be on a node that is passed
// by, for a while, by what would bring it up to date.
const (
	maxStale     = 20
	staleBackoff = 100 * time.Millisecond
)

func mayBeStale(request proto.Message) bool {
	_, hash := request.(*pb.HashKVRequest) // of all shards at one revision
	return readsLocally(request) && !hash
}

func (p pair) askWithOwnRevisions(ctx context.Context, c call, want answer) (diff string) {
	asked, err := p.revisions.request(ctx, c)
	if err != nil {
		return err.Error()
	}
	got := p.revisions.answer(c, want, p.subject.ask(ctx, asked))
	if hash, ok := got.response.(*pb.HashKVResponse); ok && want.response != nil {
		hash.Hash = want.response.(*pb.HashKVResponse).Hash // of other revisions
	}
	if diff := difference(want, got); diff != "" {
		return fmt.Sprintf("asked as %v\n%s", asked, diff)
	}
	if want.response != nil {
		p.revisions.learn(c, asked)
	}
	return ""
}

// play sends n made-up calls to both, then reads the whole history that is left. It stops at the first difference,
// which is about the last call made.
func (p pair) play(ctx context.Context, seed uint64, n int, seen coverage) (made []call, diff string) {
	g := newGenerator(seed, p.subject.tag)
	differs := func(c call) bool {
		made = append(made, c)
		var want answer
		want, diff = p.ask(ctx, c)
		g.learn(c, want)
		seen.note(c, want)
		return diff != ""
	}
	for range n {
		if differs(g.next(p.nodes)) {
			return made, diff
		}
	}
	for _, c := range g.history(p.nodes) {
		if differs(c) {
			return made, diff
		}
	}
	return made, ""
}

// replay sends the calls to both, up to the first difference.
func (p pair) replay(ctx context.Context, calls []call) (diff string) {
	for _, c := range calls {
		if _, diff := p.ask(ctx, c); diff != "" {
			return fmt.Sprintf("%v\n%s", c, diff)
		}
	}
	return ""
}

// shrink looks for fewer calls after which there still is a difference, each attempt on a fresh pair.
func shrink(t *testing.T, start func(*testing.T) pair, calls []call) (fewer []call, diff string) {
	const patience = 2 * time.Minute
	began := time.Now()
	differs := func(candidate []call) (found bool) {
		t.Run("shrink", func(t *testing.T) {
			if d := start(t).replay(t.Context(), candidate); d != "" {
				found, diff = true, d
			}
		})
		return found
	}
	last := len(calls) - 1
	writes := slices.DeleteFunc(slices.Clone(calls[:last]), func(c call) bool { return !mutates(c) })
	if candidate := append(writes, calls[last]); differs(candidate) {
		calls = candidate
	}
	for size := len(calls) / 2; size > 0; size /= 2 {
		for from := 0; from+size < len(calls) && time.Since(began) < patience; {
			if candidate := slices.Delete(slices.Clone(calls), from, from+size); differs(candidate) {
				calls = candidate
			} else {
				from += size
			}
		}
	}
	return calls, diff
}

// mustBeEqual plays sequences of calls on fresh pairs, more of them as long as too little is covered. It fails at a
// difference, or if too little stays covered.
func mustBeEqual(t *testing.T, start func(*testing.T) pair) {
	t.Parallel()
	first := *seedFlag
	if first == 0 {
		first = rand.Uint64()
	}
	total := coverage{}
	for i := 0; i < *sequencesFlag || i < 3**sequencesFlag && len(total.missing()) > 0 && !t.Failed(); i++ {
		seed := first + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			made, diff := start(t).play(t.Context(), seed, *callsFlag, total)
			if diff == "" {
				return
			}
			t.Errorf("call %d differs:\n%v\n%s", len(made), made[len(made)-1], diff)
			fewer, diff := shrink(t, start, made)
			t.Errorf("shrunk to %d calls:\n%s\n%s\n-seed=%d replays the whole", len(fewer), list(fewer), diff, seed)
		})
	}
	if t.Failed() {
		return
	}
	if missing := total.missing(); len(missing) > 0 {
		t.Errorf("equal, but seeds %d.. never met: %s", first, strings.Join(missing, "; "))
	}
	t.Logf("seeds %d.., rarest of what was met:\n%s", first, total.rarest(12))
}

// list shows the last of the calls, one a line.
func list(calls []call) string {
	const most = 25
	var lines strings.Builder
	if skipped := len(calls) - most; skipped > 0 {
		fmt.Fprintf(&lines, "(%d earlier)\n", skipped)
		calls = calls[skipped:]
	}
	for _, c := range calls {
		fmt.Fprintln(&lines, c)
	}
	return lines.String()
}

func mustDial(t testing.TB, endpoints []string, options ...grpc.DialOption) *client {
	t.Helper()
	c, err := dial(endpoints, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

func etcdAndKVD(nodes int) func(*testing.T) pair {
	return func(t *testing.T) pair {
		return pair{reference: mustDial(t, []string{startEtcd(t)}), subject: mustDial(t, startKVD(t, nodes)), nodes: nodes}
	}
}

// etcdAndShards has keys of one shard only: those of others would have the revisions of their own.
func etcdAndShards(t *testing.T) pair {
	subject := mustDial(t, startKVD(t, 3, consistent...))
	subject.tag = "{t}"
	return pair{
		reference: mustDial(t, []string{startEtcd(t)}), subject: subject, nodes: 3,
		revisions: newRevisions(subject.latest),
	}
}

func TestOneNodeAnswersAsEtcd(t *testing.T)   { mustBeEqual(t, etcdAndKVD(1)) }
func TestThreeNodesAnswerAsEtcd(t *testing.T) { mustBeEqual(t, etcdAndKVD(3)) }
func TestOneShardAnswersAsEtcd(t *testing.T)  { mustBeEqual(t, etcdAndShards) }

// TestEtcdAnswersAsEtcd proves that the comparison itself makes no differences.
func TestEtcdAnswersAsEtcd(t *testing.T) {
	mustBeEqual(t, func(t *testing.T) pair {
		return pair{reference: mustDial(t, []string{startEtcd(t)}), subject: mustDial(t, []string{startEtcd(t)}), nodes: 1}
	})
}

// TestPlantedDifferenceIsCaught bends single answers of a real etcd and expects each to be noticed.
func TestPlantedDifferenceIsCaught(t *testing.T) {
	t.Parallel()
	reference, subject := startEtcd(t), startEtcd(t)
	for name, bend := range planted {
		t.Run(name, func(t *testing.T) {
			mustNotice(t, pair{reference: mustDial(t, []string{reference}), subject: mustDialBent(t, subject, bend), nodes: 1})
		})
	}
}

// TestPlantedDifferenceIsCaughtWithOtherRevisions is the same where revisions need not be equal.
func TestPlantedDifferenceIsCaughtWithOtherRevisions(t *testing.T) {
	t.Parallel()
	for name, bend := range planted {
		if name == "hash" {
			continue // it has the revisions in it
		}
		t.Run(name, func(t *testing.T) {
			bent := mustDialBent(t, startEtcd(t), bend)
			mustNotice(t, pair{
				reference: mustDial(t, []string{startEtcd(t)}), subject: bent, nodes: 1,
				revisions: newRevisions(bent.latest),
			})
		})
	}
}

func mustNotice(t *testing.T, p pair) {
	t.Helper()
	seed := rand.Uint64()
	made, diff := p.play(t.Context(), seed, 5000, coverage{})
	if diff == "" {
		t.Fatalf("seed %d: not noticed in %d calls", seed, len(made))
	}
	t.Logf("seed %d: noticed at call %d", seed, len(made))
}

// mustDialBent connects to a server all of whose answers to plain calls are bent.
func mustDialBent(t *testing.T, endpoint string, bend bend) *client {
	return mustDial(t, []string{endpoint}, grpc.WithUnaryInterceptor(
		func(ctx context.Context, method string, request, response any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
			err := invoke(ctx, method, request, response, conn, options...)
			return bend(response.(proto.Message), err)
		}))
}

var planted = map[string]bend{
	"revision of a put": onResponse(func(r *pb.PutResponse) { r.Header.Revision++ }),
	"older revision":    onResponse(func(r *pb.RangeResponse) { r.Header.Revision-- }),
	"missing prev_kv":   onResponse(func(r *pb.PutResponse) { r.PrevKv = nil }),
	"missing header":    onResponse(func(r *pb.RangeResponse) { r.Header = nil }),
	"no cluster id":     onResponse(func(r *pb.RangeResponse) { r.Header.ClusterId = 0 }),
	"count":             onResponse(func(r *pb.RangeResponse) { r.Count = int64(len(r.Kvs)) }),
	"more":              onResponse(func(r *pb.RangeResponse) { r.More = false }),
	"order":             onResponse(func(r *pb.RangeResponse) { slices.Reverse(r.Kvs) }),
	"version":           onKeyValue(func(kv *mvccpb.KeyValue) { kv.Version = 1 }),
	"create revision":   onKeyValue(func(kv *mvccpb.KeyValue) { kv.CreateRevision = kv.ModRevision }),
	"mod revision":      onKeyValue(func(kv *mvccpb.KeyValue) { kv.ModRevision = kv.CreateRevision }),
	"value":             onKeyValue(func(kv *mvccpb.KeyValue) { kv.Value = append(kv.Value, 0) }),
	"deleted":           onResponse(func(r *pb.DeleteRangeResponse) { r.Deleted = min(r.Deleted, 1) }),
	"branch":            onResponse(func(r *pb.TxnResponse) { r.Succeeded = true }),
	"operation's header": onResponse(func(r *pb.TxnResponse) {
		for _, op := range r.Responses {
			if put := op.GetResponsePut(); put != nil {
				put.Header = nil
			}
		}
	}),
	"compaction's revision":  onResponse(func(r *pb.CompactionResponse) { r.Header.Revision = 0 }),
	"hash":                   onResponse(func(r *pb.HashKVResponse) { r.Hash++ }),
	"hashed revision":        onResponse(func(r *pb.HashKVResponse) { r.HashRevision++ }),
	"code":                   onError(func(s *status.Status) error { return status.Error(codes.Unknown, s.Message()) }),
	"message":                onError(func(s *status.Status) error { return status.Error(s.Code(), s.Message()+".") }),
	"accepted what is wrong": onError(func(*status.Status) error { return nil }),
}

// bend alters what a client receives; it returns the error that the client is to see.
type bend func(response proto.Message, err error) error

func onResponse[R proto.Message](alter func(R)) bend {
	return func(response proto.Message, err error) error {
		if r, ok := response.(R); ok && err == nil {
			alter(r)
		}
		return err
	}
}

func onKeyValue(alter func(*mvccpb.KeyValue)) bend {
	return onResponse(func(r *pb.RangeResponse) {
		for _, kv := range r.Kvs {
			alter(kv)
		}
	})
}

func onError(alter func(*status.Status) error) bend {
	return func(_ proto.Message, err error) error {
		if err != nil {
			return alter(status.Convert(err))
		}
		return nil
	}
}
