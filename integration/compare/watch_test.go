package compare

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// How a server cuts events into answers, and when it sends them, is its own affair. So what is compared is, for every
// stream, the answers without events in their order, and for every watch its events in theirs, as soon as both servers
// have come to rest.

// watchStream is one stream of one server.
type watchStream struct {
	stream  pb.Watch_WatchClient
	cancel  context.CancelFunc
	flaws   []string
	control []*pb.WatchResponse
	events  map[int64][]*mvccpb.Event // by watch
	newest  int64                     // the highest revision of a header
	pieces  int                       // answers that were cut

	mu sync.Mutex
}

func openWatch(ctx context.Context, conn *grpc.ClientConn) (*watchStream, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := pb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	s := &watchStream{stream: stream, cancel: cancel, events: map[int64][]*mvccpb.Event{}}
	go func() {
		for {
			answer, err := stream.Recv()
			if err != nil {
				s.end(ctx, err)
				return
			}
			s.take(answer)
		}
	}()
	return s, nil
}

func (s *watchStream) end(ctx context.Context, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() == nil {
		s.flaws = append(s.flaws, "the stream ended: "+err.Error())
	}
}

func (s *watchStream) take(answer *pb.WatchResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newest = max(s.newest, answer.GetHeader().GetRevision())
	if flaw := setAside(answer); flaw != "" {
		s.flaws = append(s.flaws, flaw)
		return
	}
	if answer.Fragment {
		s.pieces++
	}
	if len(answer.Events) == 0 {
		s.control = append(s.control, answer)
		return
	}
	if last := answer.Events[len(answer.Events)-1].Kv.ModRevision; answer.Header.Revision < last || answer.Created || answer.Canceled {
		s.flaws = append(s.flaws, fmt.Sprintf("an answer of revision %d, created %t, canceled %t, with an event of %d", answer.Header.Revision, answer.Created, answer.Canceled, last))
	}
	s.events[answer.WatchId] = append(s.events[answer.WatchId], answer.Events...)
}

// record is all that a stream has told.
type record struct {
	flaws   []string
	control []*pb.WatchResponse
	events  []*pb.WatchResponse // one for each watch
}

func (s *watchStream) record() (r record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.flaws = slices.Clone(s.flaws)
	for _, c := range s.control {
		r.control = append(r.control, proto.Clone(c).(*pb.WatchResponse))
	}
	for id, events := range s.events {
		r.events = append(r.events, proto.Clone(&pb.WatchResponse{WatchId: id, Events: events}).(*pb.WatchResponse))
	}
	slices.SortFunc(r.events, func(a, b *pb.WatchResponse) int { return int(a.WatchId - b.WatchId) })
	return r
}

// difference tells how another record differs, "" if it does not.
func (r record) difference(o record) string {
	if d := cmp.Diff(r.flaws, o.flaws); d != "" {
		return d
	}
	for _, both := range [][2][]*pb.WatchResponse{{r.control, o.control}, {r.events, o.events}} {
		if !slices.EqualFunc(both[0], both[1], func(a, b *pb.WatchResponse) bool { return proto.Equal(a, b) }) {
			return "want " + brief(both[0]) + "\ngot  " + brief(both[1])
		}
	}
	return ""
}

// brief shows answers without the whole of large values.
func brief(answers []*pb.WatchResponse) string {
	const most = 6000
	text := fmt.Sprint(answers)
	return text[:min(len(text), most)]
}

// forget drops what has been compared, and keeps what came after it.
func (s *watchStream) forget(compared record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.control, s.pieces = s.control[len(compared.control):], 0
	for _, r := range compared.events {
		if s.events[r.WatchId] = s.events[r.WatchId][len(r.Events):]; len(s.events[r.WatchId]) == 0 {
			delete(s.events, r.WatchId)
		}
	}
}

// watchPair is a stream of each server, which are asked the same.
type watchPair struct {
	reference, subject *watchStream
	want, got          record // what was compared last
	future, silent     bool   // it has a watch of the future, or none: etcd tells of no progress then
}

// watchPlay asks two servers the same at random.
type watchPlay struct {
	pair
	rng     *rand.Rand
	newest  int64 // the reference's
	compact int64
	keys    []string
	streams []*watchPair
	made    []string
	seen    map[string]int

	patience time.Duration // how long servers may differ; a minute is longer than a busy machine keeps them from telling
}

func (p *watchPlay) note(what string, args ...any) {
	p.made = append(p.made, fmt.Sprintf(what, args...))
}

// write changes keys on both servers.
func (p *watchPlay) write(ctx context.Context) (diff string) {
	key := func() []byte { return []byte(p.subject.tag + p.keys[p.rng.IntN(len(p.keys))]) }
	value := func() []byte {
		if p.rng.IntN(25) == 0 {
			return make([]byte, 600<<10)
		}
		return fmt.Appendf(nil, "v%d", len(p.made))
	}
	var request proto.Message = &pb.PutRequest{Key: key(), Value: value()}
	switch p.rng.IntN(6) {
	case 0:
		request = &pb.DeleteRangeRequest{Key: key()}
	case 1:
		from := key()
		request = &pb.DeleteRangeRequest{Key: from, RangeEnd: prefixEnd(from)}
	case 2:
		txn, used := &pb.TxnRequest{}, map[string]bool{}
		for range 2 + p.rng.IntN(4) {
			k := key()
			switch {
			case used[string(k)]:
			case p.rng.IntN(3) == 0:
				txn.Success = append(txn.Success, deleteOp(&pb.DeleteRangeRequest{Key: k}))
			default:
				txn.Success = append(txn.Success, putOp(&pb.PutRequest{Key: k, Value: fmt.Appendf(nil, "t%d", len(p.made))}))
			}
			used[string(k)] = true
		}
		request = txn
	}
	return p.call(ctx, request)
}

func (p *watchPlay) call(ctx context.Context, request proto.Message) (diff string) {
	c := call{request: request, node: p.rng.IntN(p.nodes)}
	p.note("%v", c)
	want, diff := p.ask(ctx, c)
	if want.response != nil {
		p.newest = max(p.newest, headerOf(want.response).Revision)
	}
	return diff
}

// step does one thing and waits until both servers have told the same of it.
func (p *watchPlay) step(ctx context.Context) (diff string) {
	switch n := p.rng.IntN(100); {
	case n < 50:
		for range 1 + p.rng.IntN(4) {
			if diff := p.write(ctx); diff != "" {
				return diff
			}
		}
	case n < 60 || len(p.streams) == 0:
		diff = p.open(ctx)
	case n < 78:
		diff = p.create(ctx, p.streams[p.rng.IntN(len(p.streams))])
	case n < 84:
		diff = p.cancel(p.streams[p.rng.IntN(len(p.streams))])
	case n < 97:
		diff = p.progress(p.streams[p.rng.IntN(len(p.streams))])
	default:
		diff = p.compaction(ctx)
	}
	if diff != "" {
		return diff
	}
	return p.settle(ctx)
}

// open opens a stream, of at most a few.
func (p *watchPlay) open(ctx context.Context) string {
	if len(p.streams) > 3 {
		p.close(0)
	}
	node := p.rng.IntN(p.nodes)
	p.note("stream on node %d", node)
	reference, err := openWatch(ctx, p.reference.conns[0])
	if err != nil {
		return err.Error()
	}
	subject, err := openWatch(ctx, p.subject.conns[node%len(p.subject.conns)])
	if err != nil {
		return err.Error()
	}
	p.streams = append(p.streams, &watchPair{reference: reference, subject: subject, silent: true})
	return ""
}

func (p *watchPlay) close(i int) {
	p.note("close stream %d", i)
	p.streams[i].reference.cancel()
	p.streams[i].subject.cancel()
	p.streams = slices.Delete(p.streams, i, i+1)
}

// send sends a request on both streams; the subject's has revisions of its own.
func (p *watchPlay) send(w *watchPair, request *pb.WatchRequest) string {
	p.note("stream %d: %v", slices.Index(p.streams, w), request)
	if err := w.reference.stream.Send(request); err != nil {
		return err.Error()
	}
	own := proto.Clone(request).(*pb.WatchRequest)
	if create := own.GetCreateRequest(); create != nil && p.revisions != nil {
		create.StartRevision = p.revisions.start(create.StartRevision)
	}
	if err := w.subject.stream.Send(own); err != nil {
		return err.Error()
	}
	return ""
}

// start is where a watch of the subject begins if the reference's begins at a revision.
func (r *revisions) start(revision int64) int64 {
	if revision <= 0 || revision > r.newest() {
		return revision
	}
	return r.spans[revision].low
}

// create asks for a watch of any kind.
func (p *watchPlay) create(ctx context.Context, w *watchPair) string {
	for _, conn := range p.subject.conns { // watches from now on begin at the node's own revision
		if err := p.subject.catchUp(ctx, conn); err != nil {
			return err.Error()
		}
	}
	key := p.subject.tag + p.keys[p.rng.IntN(len(p.keys))]
	r := &pb.WatchCreateRequest{Key: []byte(key), PrevKv: p.rng.IntN(2) == 0, Fragment: p.rng.IntN(3) == 0, ProgressNotify: p.rng.IntN(4) == 0}
	switch p.rng.IntN(7) {
	case 0:
		r.RangeEnd = []byte{0}
	case 1:
		r.RangeEnd = prefixEnd(r.Key)
	case 2:
		r.RangeEnd = []byte(p.subject.tag + p.keys[p.rng.IntN(len(p.keys))]) // may be empty, or the wrong way round
	case 3:
		r.Key, r.RangeEnd = []byte{0}, []byte{0}
	case 4:
		r.Key, r.RangeEnd = nil, []byte{0}
	}
	switch p.rng.IntN(12) {
	case 0:
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}
	case 1:
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}
	case 2:
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE, pb.WatchCreateRequest_NOPUT}
	}
	switch p.rng.IntN(10) {
	case 0, 1, 2, 3:
		r.StartRevision = 1 + p.rng.Int64N(p.newest)
	case 4:
		r.StartRevision = max(p.compact, 1)
	case 5:
		if p.revisions == nil && p.rng.IntN(2) == 0 {
			r.StartRevision = p.newest + 1 + p.rng.Int64N(5)
		}
	case 6:
		r.StartRevision = -1 - p.rng.Int64N(3)
	}
	if p.rng.IntN(3) == 0 {
		r.WatchId = p.rng.Int64N(8) - 1
	}
	if r.WatchId == -1 && p.rng.IntN(4) > 0 {
		r.WatchId = 0
	}
	w.silent = false
	w.future = w.future || r.StartRevision > p.newest
	return p.send(w, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r}})
}

func (p *watchPlay) cancel(w *watchPair) string {
	id := p.rng.Int64N(3) // which may not be there
	w.silent = true       // may be
	return p.send(w, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

// progress asks for progress where etcd would answer.
func (p *watchPlay) progress(w *watchPair) string {
	if w.silent || w.future {
		return ""
	}
	return p.send(w, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

func (p *watchPlay) compaction(ctx context.Context) string {
	revision := 1 + p.rng.Int64N(p.newest)
	if revision <= p.compact {
		return ""
	}
	diff := p.call(ctx, &pb.CompactionRequest{Revision: revision, Physical: p.rng.IntN(2) == 0})
	p.compact = revision
	return diff
}

// rest is longer than a server lets a watch wait that has to catch up.
const rest = 150 * time.Millisecond

// settle waits until both servers have told all they had to tell, and compares it. Streams with a watch that was ended
// for a compaction are closed: etcd tells of no progress on them any more, and does not give the watch's id to others.
func (p *watchPlay) settle(ctx context.Context) (diff string) {
	deadline := time.Now().Add(p.patience)
	time.Sleep(rest / 5)
	var equalSince time.Time
	for ; ; time.Sleep(10 * time.Millisecond) {
		if diff = p.compare(); diff != "" {
			equalSince = time.Time{}
			if time.Now().After(deadline) || ctx.Err() != nil {
				return diff
			}
		} else if equalSince.IsZero() {
			equalSince = time.Now()
		}
		if !equalSince.IsZero() && time.Since(equalSince) > rest {
			break
		}
	}
	for i := len(p.streams) - 1; i >= 0; i-- {
		w := p.streams[i]
		ended := func(r *pb.WatchResponse) bool { return r.Canceled && r.CompactRevision > 0 }
		over := slices.ContainsFunc(w.want.control, ended)
		p.cover(w)
		w.reference.forget(w.want)
		w.subject.forget(w.got)
		if over {
			p.close(i)
		}
	}
	return ""
}

// compare compares what all streams have told so far.
func (p *watchPlay) compare() (diff string) {
	for i, w := range p.streams {
		want, got := w.reference.record(), w.subject.record()
		if p.revisions != nil {
			w.subject.mu.Lock()
			p.revisions.extend(p.revisions.newest(), w.subject.newest, false)
			w.subject.mu.Unlock()
			for _, r := range slices.Concat(got.control, got.events) {
				if r.Created || r.Canceled && r.CompactRevision == 0 { // at whatever revision the node has heard of
					r.Header.Revision = p.revisions.spans[p.revisions.newest()].last
				}
				rewriteRevisions(r.ProtoReflect(), p.revisions.translate)
			}
		}
		w.want, w.got = want, got
		if d := want.difference(got); d != "" {
			diff += fmt.Sprintf("stream %d:\n%s\n", i, d)
		}
	}
	return diff
}

// cover counts what a stream has put to the test.
func (p *watchPlay) cover(w *watchPair) {
	r := w.want
	for _, c := range r.control {
		switch {
		case c.Created && c.Canceled:
			p.seen["refused: "+c.CancelReason]++
		case c.Created:
			p.seen["created"]++
		case c.CompactRevision > 0:
			p.seen["compacted"]++
		case c.Canceled:
			p.seen["cancelled"]++
		default:
			p.seen["progress"]++
		}
	}
	for _, e := range r.events {
		for i, e := range e.Events {
			p.seen[e.Type.String()]++
			if e.PrevKv != nil {
				p.seen["prev_kv with "+e.Type.String()]++
			}
			if i > 0 && e.Kv.ModRevision == r.events[0].Events[0].Kv.ModRevision {
				p.seen["transaction"]++
			}
		}
	}
	if w.reference.pieces > 0 {
		p.seen["fragments"]++
	}
}

func newWatchPlay(servers pair, seed uint64) *watchPlay {
	return &watchPlay{pair: servers, rng: rand.New(rand.NewPCG(seed, 7)), newest: 1, seen: map[string]int{}, patience: time.Minute,
		keys: []string{"a", "aa", "ab", "b", "ba", "c", "k/1", "k/2", "k/3", "z"}}
}

// watchesMustBeEqual plays random steps on a fresh pair.
func watchesMustBeEqual(t *testing.T, start func(*testing.T) pair, steps int) {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	p := newWatchPlay(start(t), seed)
	if p.revisions != nil {
		p.revisions.exact = true
	}
	for i := 0; i < steps || i < longer*steps && len(unmet(p.seen, watchKinds)) > 0; i++ {
		if diff := p.step(t.Context()); diff != "" {
			t.Fatalf("seed %d: after\n%s\n%s", seed, strings.Join(p.made[max(0, len(p.made)-40):], "\n"), diff)
		}
	}
	t.Logf("seed %d: %v", seed, p.seen)
	if missing := unmet(p.seen, watchKinds); len(missing) > 0 {
		t.Errorf("equal, but never met: %v", missing)
	}
}

// watchSteps is mostly enough to meet everything that is listed in watchKinds.
// Where it is not, up to longer times as many steps are made.
const (
	watchSteps = 200
	longer     = 10
)

var watchKinds = []string{"created", "compacted", "cancelled", "progress", "PUT", "DELETE", "prev_kv with PUT", "prev_kv with DELETE"}

// unmet are the kinds of which nothing has been seen.
func unmet(seen map[string]int, kinds []string) (missing []string) {
	for _, kind := range kinds {
		if seen[kind] == 0 {
			missing = append(missing, kind)
		}
	}
	return missing
}

func testWatches(t *testing.T, start func(*testing.T) pair) {
	t.Parallel()
	watchesMustBeEqual(t, start, watchSteps)
}

func TestEtcdWatchesAsEtcd(t *testing.T) {
	testWatches(t, func(t *testing.T) pair {
		return pair{reference: mustDial(t, []string{startEtcd(t)}), subject: mustDial(t, []string{startEtcd(t)}), nodes: 1}
	})
}
func TestOneNodeWatchesAsEtcd(t *testing.T)  { testWatches(t, etcdAndKVD(1)) }
func TestThreeNodesWatchAsEtcd(t *testing.T) { testWatches(t, etcdAndKVD(3)) }
func TestOneShardWatchesAsEtcd(t *testing.T) { testWatches(t, etcdAndShards) }

// bentStream alters what a client receives.
type bentStream struct {
	grpc.ClientStream
	bend func(*pb.WatchResponse)
}

func (s bentStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if answer, ok := m.(*pb.WatchResponse); ok && err == nil {
		s.bend(answer)
	}
	return err
}

// TestPlantedWatchDifferenceIsCaught bends what a real etcd tells and expects it to be noticed.
func TestPlantedWatchDifferenceIsCaught(t *testing.T) {
	t.Parallel()
	events := func(alter func(*pb.WatchResponse)) func(*pb.WatchResponse) {
		return func(r *pb.WatchResponse) {
			if len(r.Events) > 0 {
				alter(r)
			}
		}
	}
	for name, bend := range map[string]func(*pb.WatchResponse){
		"gap":              events(func(r *pb.WatchResponse) { r.Events = r.Events[1:] }),
		"event twice":      events(func(r *pb.WatchResponse) { r.Events = append(r.Events, r.Events[len(r.Events)-1]) }),
		"order":            events(func(r *pb.WatchResponse) { slices.Reverse(r.Events) }),
		"no prev_kv":       events(func(r *pb.WatchResponse) { r.Events[0].PrevKv = nil }),
		"another watch":    events(func(r *pb.WatchResponse) { r.WatchId++ }),
		"compact_revision": func(r *pb.WatchResponse) { r.CompactRevision = 0 },
		"reason":           func(r *pb.WatchResponse) { r.CancelReason = "" },
		"revision":         func(r *pb.WatchResponse) { r.Header.Revision = min(r.Header.Revision, 2) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bent := mustDial(t, []string{startEtcd(t)}, grpc.WithStreamInterceptor(
				func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
					stream, err := streamer(ctx, desc, conn, method, options...)
					return bentStream{stream, bend}, err
				}))
			p := newWatchPlay(pair{reference: mustDial(t, []string{startEtcd(t)}), subject: bent, nodes: 1}, rand.Uint64())
			p.patience = time.Second
			for range 20 * watchSteps { // watches that a compaction ends are rare
				if diff := p.step(t.Context()); diff != "" {
					return
				}
			}
			t.Error("not noticed")
		})
	}
}
