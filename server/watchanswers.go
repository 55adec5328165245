package server

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What follows is the sender's.

const (
	watchAnswerBytes  = 1 << 20 // of one answer, unless one revision has more
	watchAnswerHeader = 96      // more than an answer has besides its events
	stallBytesPerS    = 64 << 10
)

// send runs what is handed over.
func (w *watchStream) send(ctx context.Context) error {
	for {
		select {
		case f := <-w.work:
			if err := f(); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// headerAt is a complete header.
func (w *watchStream) headerAt(revision int64) *pb.ResponseHeader {
	w.header, w.said = &pb.ResponseHeader{Revision: revision}, max(w.said, revision)
	w.service.router.fill(w.header)
	return w.header
}

// headerOf is a header for events: those of one revision are often for many watches.
func (w *watchStream) headerOf(revision int64) *pb.ResponseHeader {
	if w.header != nil && w.header.Revision == revision {
		return w.header
	}
	return w.headerAt(revision)
}

// say sends an answer with so many bytes. A client that takes it more slowly than stallBytesPerS does not keep it here
// for longer than WatchTimeout and the time that it needs at that speed.
func (w *watchStream) say(answer *pb.WatchResponse, sizeBytes int) error {
	patience := w.service.router.cfg.WatchTimeout
	w.stall.Reset(patience + time.Duration(sizeBytes/stallBytesPerS)*time.Second)
	defer w.stall.Stop()
	return w.stream.Send(answer)
}

// created announces a watch.
func (w *watchStream) created(one *watched, revision int64) error {
	w.open[one.number] = one
	if one.told = one.from - 1; one.from == 0 {
		one.told = revision
	}
	return w.say(&pb.WatchResponse{Header: w.headerAt(revision), WatchId: one.id, Created: true}, 0)
}

// compacted ends a watch that needs what is gone. As in etcd, the header has no revision.
func (w *watchStream) compacted(one *watched, revision int64) error {
	delete(w.open, one.number)
	return w.say(&pb.WatchResponse{Header: w.headerAt(0), WatchId: one.id, Canceled: true, CompactRevision: revision}, 0)
}

// canceled ends a watch because the client wants it, unless it has been told that already.
func (w *watchStream) canceled(one *watched, revision int64) error {
	if one.toldOfCancel {
		return nil
	}
	one.toldOfCancel = true
	delete(w.open, one.number)
	return w.say(&pb.WatchResponse{Header: w.headerAt(revision), WatchId: one.id, Canceled: true}, 0)
}

// changed passes on what has been delivered.
func (w *watchStream) changed(ctx context.Context, d watchDelivery) error {
	one := w.open[d.id]
	if one == nil {
		return nil
	}
	if err := w.events(ctx, one, d.events); err != nil {
		return err
	}
	switch {
	case d.compacted > 0:
		return w.compacted(one, d.compacted)
	case d.err != nil: // to end the watch alone would look as if the client had ended it
		return streamEnd(d.err)
	}
	return nil
}

// streamEnd is a follower's error as the client is told it: if nothing else is known, it should try again.
func streamEnd(err error) error {
	if _, ok := status.FromError(err); ok || errors.Is(err, context.Canceled) {
		return err
	}
	return kvdError(codes.Unavailable, ReasonInternal, err.Error())
}

// events sends those that the client wants to see.
func (w *watchStream) events(ctx context.Context, one *watched, events []*mvccpb.Event) error {
	events = one.wanted(events)
	for len(events) > 0 {
		part, size := cutRevisions(events, watchAnswerBytes)
		events = events[len(part):]
		at := part[len(part)-1].Kv.ModRevision
		if err := w.room(ctx, size); err != nil {
			return err
		}
		if err := w.part(one, part, size, at); err != nil {
			return err
		}
		w.service.router.metrics.watchEvents.Add(float64(len(part)))
		one.told, one.toldOfChanges = max(one.told, at), true
	}
	return nil
}

// wanted leaves out what the watch filters. The events are others' too.
func (one *watched) wanted(events []*mvccpb.Event) []*mvccpb.Event {
	if !one.noPut && !one.noDel {
		return events
	}
	var wanted []*mvccpb.Event
	for _, e := range events {
		if isDelete := e.Type == mvccpb.Event_DELETE; isDelete && !one.noDel || !isDelete && !one.noPut {
			wanted = append(wanted, e)
		}
	}
	return wanted
}

// part sends events in one answer, or in fragments if it is large and the client has asked for that.
func (w *watchStream) part(one *watched, events []*mvccpb.Event, size int, at int64) error {
	header := w.headerOf(at)
	most := w.service.router.cfg.MaxRequestBytes + overheadBytes // as in etcd
	if !one.fragment || size < most {
		return w.say(&pb.WatchResponse{Header: header, WatchId: one.id, Events: events}, size)
	}
	for len(events) > 0 {
		some, size := cutBytes(events, most)
		events = events[len(some):]
		if err := w.say(&pb.WatchResponse{Header: header, WatchId: one.id, Events: some, Fragment: len(events) > 0}, size); err != nil {
			return err
		}
	}
	return nil
}

// room waits while other answers take all the memory that they may.
func (w *watchStream) room(ctx context.Context, size int) error {
	r := w.service.router
	if size <= freeAnswerBytes {
		return nil
	}
	for since := time.Now(); r.answers.bytes.Load() >= r.cfg.MaxAnswerBytes; {
		if time.Since(since) > r.cfg.WatchTimeout {
			return errNoRoom
		}
		timer := time.NewTimer(minBackoff)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
	return nil
}

// cutRevisions returns the first events: whole revisions that fit into an answer, at least one.
func cutRevisions(events []*mvccpb.Event, mostBytes int) (part []*mvccpb.Event, size int) {
	size = watchAnswerHeader
	n, whole := 0, 0 // whole: bytes of the revisions before n
	for i, e := range events {
		if i > 0 && e.Kv.ModRevision != events[i-1].Kv.ModRevision {
			n, whole = i, size
		}
		if size += sizeEvent(e); size > mostBytes && n > 0 {
			return events[:n], whole
		}
	}
	return events, size
}

// cutBytes returns the first events that fit into an answer, at least one.
func cutBytes(events []*mvccpb.Event, mostBytes int) (part []*mvccpb.Event, size int) {
	size = watchAnswerHeader
	for i, e := range events {
		more := sizeEvent(e)
		if i > 0 && size+more >= mostBytes {
			return events[:i], size
		}
		size += more
	}
	return events, size
}

// sizeEvent is the most that an event takes in an answer.
func sizeEvent(e *mvccpb.Event) int {
	const lengths = 2 + 3*(1+5) // of the type, and of the event and its two keys with their values
	size := lengths + sizeKeyValue(e.Kv)
	if e.PrevKv != nil {
		size += sizeKeyValue(e.PrevKv)
	}
	return size
}

// allAt tells the client that it has everything of all its watches up to a revision, if that is so: done is false if it
// is not, and should be tried again. added is the last watch that the revision is about. In the end each watch is told
// alone, as far as it is.
func (w *watchStream) allAt(revision, added int64, isLast bool) (done bool, err error) {
	same := true
	for _, one := range w.open {
		if one.from > revision { // as in etcd: the client would go on before the first revision that it wants
			return true, nil
		}
		same = same && one.number <= added && one.told <= revision
	}
	switch {
	case len(w.open) == 0: // as in etcd
		return true, nil
	case same:
		for _, one := range w.open {
			one.told = revision
		}
		return true, w.say(&pb.WatchResponse{Header: w.headerAt(revision), WatchId: clientv3.InvalidWatchID}, 0)
	case !isLast:
		return false, nil
	}
	for _, one := range w.open {
		if one.number <= added {
			if err := w.at(one, revision); err != nil {
				return true, err
			}
		}
	}
	return true, nil
}

// at tells the client that it has everything of a watch up to a revision, or up to a later one that it knows of already:
// it must never be told less than before, because it would go on from there.
func (w *watchStream) at(one *watched, revision int64) error {
	one.told = max(one.told, revision)
	return w.say(&pb.WatchResponse{Header: w.headerAt(one.told), WatchId: one.id}, 0)
}
