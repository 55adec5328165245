package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
)

// watchStream is one client's. One goroutine receives what it asks for; another one, the sender, tells it everything, one
// thing at a time: what is handed over waits until the sender takes it, so nothing piles up here.
type watchStream struct {
	service *watch
	stream  pb.Watch_WatchServer
	feed    watchFeed
	work    chan func() error // for the sender
	ended   chan error        // why the stream has to end
	stall   *time.Timer       // runs while the client is to take something

	// Of the goroutine that receives.
	byID   map[int64]*watched // by the client's number
	nextID int64
	known  int64 // newest revision that was seen

	// Of the sender.
	open   map[int64]*watched // by the follower's number: those that the client knows, and that have not ended
	header *pb.ResponseHeader // the last one
	said   int64              // the newest revision that the client has been told

	mu       sync.Mutex
	byNumber map[int64]*watched
	numbers  int64 // the last one given
	added    int64 // the last one that the follower has
	asked    bool  // the client wants to know how far all watches are
	due      bool  // it is to be told how far each watch is that wants this
	telling  bool
	closed   bool
	cost     int64 // of all watches
	helpers  sync.WaitGroup
}

// watched is one watch. The follower's number is never used again, the client's may be.
type watched struct {
	id, number    int64
	from          int64 // the revision that the client has asked for
	fragment      bool
	notify        bool
	noPut, noDel  bool
	cost          int64
	announced     chan struct{} // closed when the client has been told that it exists
	told          int64         // of the sender: the client knows everything up to here
	toldOfChanges bool          // of the sender: since it was last due to be told how far the watch is
	toldOfCancel  bool          // of the sender
}

const (
	progressTries   = 5
	progressTimeout = 10 * time.Second
	emptyWatchRange = "mvcc: watcher range is empty" // etcd's
	duplicateWatch  = "mvcc: duplicate watch ID provided on the WatchStream"
)

func newWatchStream(s *watch, stream pb.Watch_WatchServer) *watchStream {
	w := &watchStream{
		service: s, stream: stream, work: make(chan func() error), ended: make(chan error, 1),
		byID: make(map[int64]*watched), open: make(map[int64]*watched), byNumber: make(map[int64]*watched),
	}
	w.stall = time.AfterFunc(time.Hour, func() {
		s.router.metrics.watchesStalled.Inc()
		w.end(errStalled)
	})
	w.stall.Stop()
	return w
}

// end has the stream end, unless it does already.
func (w *watchStream) end(err error) {
	select {
	case w.ended <- err:
	default:
	}
}

// spawn runs f on a goroutine that ends soon after the call has: gRPC sees to that.
func (w *watchStream) spawn(f func() error) bool {
	return w.service.router.spawn(func() {
		defer func() {
			if p := recover(); p != nil {
				w.end(w.service.recovered(pb.Watch_Watch_FullMethodName, p))
			}
		}()
		if err := f(); err != nil {
			w.end(err)
		}
	})
}

// close ends what belongs to the stream, whose context has ended.
func (w *watchStream) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.feed.close()
	w.helpers.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.service.give(int64(len(w.byNumber)), w.cost)
	w.byNumber, w.cost = nil, 0
}

// receive takes requests. When there will be no more, the client may still listen.
func (w *watchStream) receive(ctx context.Context) error {
	for {
		request, err := w.stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		switch r := request.GetRequestUnion().(type) {
		case *pb.WatchRequest_CreateRequest:
			if r.CreateRequest != nil {
				err = w.create(ctx, r.CreateRequest)
			}
		case *pb.WatchRequest_CancelRequest:
			if r.CancelRequest != nil {
				err = w.cancel(ctx, r.CancelRequest.WatchId)
			}
		case *pb.WatchRequest_ProgressRequest:
			if r.ProgressRequest != nil && len(w.byID) > 0 { // else it is not answered, as in etcd
				w.tell(ctx, true)
			}
		} // others are ignored, as in etcd
		if err != nil {
			return err
		}
	}
}

// hand has the sender run f, after everything that was handed over before; it has begun when hand returns.
func (w *watchStream) hand(ctx context.Context, f func() error) error {
	select {
	case w.work <- f:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// create begins a watch. Whatever comes of it, the client is first told that the watch was created: then, perhaps in the
// same message, that it has ended.
func (w *watchStream) create(ctx context.Context, r *pb.WatchCreateRequest) error {
	one, why := w.admit(r)
	if why != "" {
		return w.refuse(ctx, why)
	}
	revision, err := w.feed.add(one.number, watchSpec{key: r.Key, end: r.RangeEnd, from: r.StartRevision, prevKV: r.PrevKv})
	var compacted *fsm.CompactedError
	if isCompacted := errors.As(err, &compacted); err != nil && !isCompacted {
		w.forget(one)
		close(one.announced) // for what may have been delivered
		if mayFareBetter(err) {
			return err
		}
		return w.refuse(ctx, rpctypes.ErrorDesc(refusal(err)))
	}
	w.mu.Lock()
	w.added = one.number
	w.mu.Unlock()
	w.byID[one.id] = one
	if compacted != nil {
		revision = w.service.newest(ctx, w.known)
	}
	w.known = max(w.known, revision)
	if err := w.hand(ctx, func() error { return w.created(one, revision) }); err != nil {
		return err
	}
	close(one.announced)
	if compacted == nil {
		return nil
	}
	return w.hand(ctx, func() error { return w.compacted(one, compacted.Revision) })
}

// mayFareBetter reports whether the client should try again, on another stream and perhaps with another node. Everything
// else is told to it as the end of the one watch.
func mayFareBetter(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return true
	}
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// admit checks a request, puts the key in order and makes the watch that is asked for, or says why not, in etcd's order.
func (w *watchStream) admit(r *pb.WatchCreateRequest) (_ *watched, why string) {
	if len(r.Key) == 0 {
		r.Key = []byte{0}
	}
	if r.StartRevision < 0 {
		return nil, rpctypes.ErrCompacted.Error()
	}
	endless := len(r.RangeEnd) == 1 && r.RangeEnd[0] == 0
	if len(r.RangeEnd) > 0 && !endless && bytes.Compare(r.Key, r.RangeEnd) >= 0 {
		return nil, emptyWatchRange
	}
	if w.byID[r.WatchId] != nil && r.WatchId != clientv3.AutoWatchID {
		return nil, duplicateWatch
	}
	if most := w.service.router.cfg.MaxStreamWatches; len(w.byID) >= most {
		return nil, fmt.Sprintf("kvd: the stream has as many watches as it may: %d", most)
	}
	one := &watched{
		id: r.WatchId, from: r.StartRevision, fragment: r.Fragment, notify: r.ProgressNotify,
		cost: int64(len(r.Key) + len(r.RangeEnd)), announced: make(chan struct{}),
	}
	for _, f := range r.Filters {
		one.noPut = one.noPut || f == pb.WatchCreateRequest_NOPUT
		one.noDel = one.noDel || f == pb.WatchCreateRequest_NODELETE
	}
	if err := w.remember(one); err != nil {
		return nil, err.Error()
	}
	if one.id == clientv3.AutoWatchID {
		for w.byID[w.nextID] != nil {
			w.nextID++
		}
		one.id = w.nextID
		w.nextID++
	}
	return one, ""
}

// remember counts a watch and gives it a number.
func (w *watchStream) remember(one *watched) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return context.Canceled
	}
	if err := w.service.take(one.cost); err != nil {
		return err
	}
	w.numbers++
	one.number = w.numbers
	w.byNumber[one.number] = one
	w.cost += one.cost
	return nil
}

func (w *watchStream) forget(one *watched) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.byNumber[one.number] != nil {
		delete(w.byNumber, one.number)
		w.cost -= one.cost
		w.service.give(1, one.cost)
	}
}

// refuse tells that a watch was created and has ended, in one message and without its number.
func (w *watchStream) refuse(ctx context.Context, why string) error {
	revision := w.service.newest(ctx, w.known)
	return w.hand(ctx, func() error {
		return w.say(&pb.WatchResponse{
			Header: w.headerAt(max(revision, w.said)), WatchId: clientv3.InvalidWatchID, Created: true, Canceled: true, CancelReason: why,
		}, 0)
	})
}

// cancel ends a watch. One that has ended by itself keeps its number until then, as in etcd. If there is none the client
// is not told anything.
func (w *watchStream) cancel(ctx context.Context, id int64) error {
	one := w.byID[id]
	if one == nil {
		return nil
	}
	w.feed.cancel(one.number)
	delete(w.byID, id)
	w.forget(one)
	revision := w.service.newest(ctx, w.known)
	return w.hand(ctx, func() error { return w.canceled(one, max(revision, w.said)) })
}

// deliver is the follower's. A watch's events wait until the client knows it.
func (w *watchStream) deliver(ctx context.Context, d watchDelivery) error {
	w.mu.Lock()
	one := w.byNumber[d.id]
	w.mu.Unlock()
	if one == nil { // cancelled
		return nil
	}
	select {
	case <-one.announced:
	case <-ctx.Done():
		return ctx.Err()
	}
	if d.aside != nil {
		return w.deliverAside(ctx, one, d.aside)
	}
	return w.hand(ctx, func() error { return w.changed(ctx, d) })
}

// tell has the client told how far its watches are: all of them together, because it has asked, or each one that is to
// be told from time to time.
func (w *watchStream) tell(ctx context.Context, asked bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked, w.due = w.asked || asked, w.due || !asked
	if !w.telling && !w.closed {
		w.telling = true
		w.helpers.Go(func() { w.tellAll(ctx) })
	}
}

// tellAll answers what was asked for before it began with one answer; what is asked for meanwhile, afterwards.
func (w *watchStream) tellAll(ctx context.Context) {
	for {
		w.mu.Lock()
		asked, due := w.asked, w.due
		w.asked, w.due = false, false
		w.telling = (asked || due) && ctx.Err() == nil
		goOn := w.telling
		w.mu.Unlock()
		if !goOn {
			return
		}
		if asked {
			w.tellTogether(ctx)
		}
		if due {
			w.tellEach(ctx)
		}
	}
}

// tellTogether finds a revision up to which the client has everything of all its watches. Events and watches that come
// while it looks may be beyond it: then it looks again. etcd does not answer while a watch lags behind; this waits.
func (w *watchStream) tellTogether(ctx context.Context) {
	for try := range progressTries {
		revision, added, err := w.progress(ctx)
		if err != nil {
			return
		}
		told := make(chan bool, 1)
		err = w.hand(ctx, func() error {
			done, err := w.allAt(revision, added, try == progressTries-1)
			told <- done
			return err
		})
		if err != nil {
			return
		}
		select {
		case done := <-told:
			if done {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// progress asks the follower. added is the number of the last watch that the answer covers.
func (w *watchStream) progress(ctx context.Context) (revision, added int64, err error) {
	w.mu.Lock()
	added = w.added
	w.mu.Unlock()
	if w.service.router.cfg.faults.ProgressAhead {
		return w.service.newest(ctx, 0), added, nil
	}
	ctx, cancel := context.WithTimeout(ctx, progressTimeout)
	defer cancel()
	revision, err = w.feed.progress(ctx)
	return revision, added, err
}

// tellEach tells the watches that want it how far they are. If that is not the same for all it is what is known.
func (w *watchStream) tellEach(ctx context.Context) {
	revision, added, err := w.progress(ctx)
	_ = w.hand(ctx, func() error {
		for _, one := range w.open {
			at, ok := revision, err == nil && one.number <= added
			if !ok {
				at, ok = w.feed.progressOf(one.number)
			}
			isDue := one.notify && !one.toldOfChanges
			one.toldOfChanges = false
			if !ok || !isDue || one.from > at {
				continue
			}
			if err := w.at(one, at); err != nil {
				return err
			}
		}
		return nil
	}) // fails when the stream ends
}
