package server

import (
	"context"
	"errors"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// watches follows keys for one client's stream, wherever their groups are. All
// methods are safe for concurrent use.
type watches struct {
	router  *router
	deliver func(watchDelivery) error
}

// watchSpec is what one watch asks for.
type watchSpec struct {
	key, end []byte // as in a range
	from     int64  // the first revision that is wanted; 0 = from now on
	prevKV   bool   // events come with the key as it was before
}

// watchDelivery is a part of what one watch is to see, in order.
type watchDelivery struct {
	id        int64
	events    []*mvccpb.Event // whole revisions, ascending; shared, read-only; PrevKv set if asked for
	compacted int64           // > 0: the watch has ended, because what it needed was compacted up to here
	err       error           // the watch has ended
}

// newWatches follows until ctx ends or close. deliver is called by one goroutine
// at a time and may block: then nothing more is taken from the groups. An error
// of it ends everything.
func (r *router) newWatches(ctx context.Context, deliver func(watchDelivery) error) *watches {
	return &watches{router: r, deliver: deliver}
}

var errNotFollowed = errors.New("server: nothing is followed")

// add begins a watch. revision is for the answer's header: a watch from now on
// gets the events after it. Errors: *fsm.CompactedError, or gRPC statuses.
func (w *watches) add(id int64, s watchSpec) (revision int64, err error) { return 0, errNotFollowed }

// cancel ends a watch: when it returns, nothing of it is delivered any more. It
// must not be called by deliver.
func (w *watches) cancel(id int64) {}

// progress returns a revision up to which everything of ALL watches has been
// delivered: deliver has returned before this does.
func (w *watches) progress(ctx context.Context) (revision int64, err error) {
	return 0, errNotFollowed
}

// progressOf is the same for one watch, as far as it is known without asking.
func (w *watches) progressOf(id int64) (revision int64, ok bool) { return 0, false }

// close ends all watches, and waits for deliver to return.
func (w *watches) close() {}
