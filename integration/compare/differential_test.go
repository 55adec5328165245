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
	nodes              int // of the subject
}

// play sends n made-up calls to both, then reads the whole history that is left. It stops at the first difference,
// which is about the last call made.
func (p pair) play(ctx context.Context, seed uint64, n int, seen coverage) (made []call, diff string) {
	g := newGenerator(seed)
	differs := func(c call) bool {
		made = append(made, c)
		want, got := p.reference.ask(ctx, c), p.subject.ask(ctx, c)
		g.learn(c, want)
		seen.note(c, want)
		diff = difference(want, got)
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
		if diff := difference(p.reference.ask(ctx, c), p.subject.ask(ctx, c)); diff != "" {
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

// mustBeEqual plays sequences of calls on fresh pairs and fails at a difference, or if too little was covered.
func mustBeEqual(t *testing.T, start func(*testing.T) pair) {
	first := *seedFlag
	if first == 0 {
		first = rand.Uint64()
	}
	total := coverage{}
	for i := range *sequencesFlag {
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
		return pair{mustDial(t, []string{startEtcd(t)}), mustDial(t, startKVD(t, nodes)), nodes}
	}
}

func TestOneNodeAnswersAsEtcd(t *testing.T)   { mustBeEqual(t, etcdAndKVD(1)) }
func TestThreeNodesAnswerAsEtcd(t *testing.T) { mustBeEqual(t, etcdAndKVD(3)) }

// TestEtcdAnswersAsEtcd proves that the comparison itself makes no differences.
func TestEtcdAnswersAsEtcd(t *testing.T) {
	mustBeEqual(t, func(t *testing.T) pair {
		return pair{mustDial(t, []string{startEtcd(t)}), mustDial(t, []string{startEtcd(t)}), 1}
	})
}

// TestPlantedDifferenceIsCaught bends single answers of a real etcd and expects each to be noticed.
func TestPlantedDifferenceIsCaught(t *testing.T) {
	reference, subject := startEtcd(t), startEtcd(t)
	for name, bend := range map[string]bend{
		"revision of a put": onResponse(func(r *pb.PutResponse) { r.Header.Revision++ }),
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
		"hashed revision":        onResponse(func(r *pb.HashKVResponse) { r.HashRevision++ }),
		"code":                   onError(func(s *status.Status) error { return status.Error(codes.Unknown, s.Message()) }),
		"message":                onError(func(s *status.Status) error { return status.Error(s.Code(), s.Message()+".") }),
		"accepted what is wrong": onError(func(*status.Status) error { return nil }),
	} {
		t.Run(name, func(t *testing.T) {
			bent := mustDial(t, []string{subject}, grpc.WithUnaryInterceptor(
				func(ctx context.Context, method string, request, response any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
					err := invoke(ctx, method, request, response, conn, options...)
					return bend(response.(proto.Message), err)
				}))
			p := pair{mustDial(t, []string{reference}), bent, 1}
			made, diff := p.play(t.Context(), rand.Uint64(), 5000, coverage{})
			if diff == "" {
				t.Fatalf("not noticed in %d calls", len(made))
			}
			t.Logf("noticed at call %d", len(made))
		})
	}
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
