package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// methodWatchPoll asks a node for what its state of a group has for watches. The
// node remembers nothing: each question says from where on, so that any node can
// be asked next.
const methodWatchPoll = "watch.poll"

const (
	pollWait    = 2 * time.Second       // that a question waits for something to happen
	pollGather  = 20 * time.Millisecond // that one which waits is left alone when there are more watches
	pollPause   = maxBackoff            // between questions that may not wait
	pollBytes   = 1 << 20               // of events in an answer, at most about
	maxPolls    = 1 << 10               // questions that wait on a node at a time
	pollRest    = 10 * time.Microsecond // for each watch of a question, before the next one: it begins them all anew
	leastRest   = 2 * time.Millisecond  // less is not worth it
	shortPolls  = 40                    // questions that do not wait, after one was told not to
	maxPollKeys = 1 << 20               // watches in a question
)

// relay follows a group by polling nodes that have its state.
type relay struct {
	*groupFollower
	node  string // that has answered last; "" = ask another one
	turn  int    // counts the nodes asked
	short int    // questions that must not wait
	asked int    // watches in the last question
}

// question is what is asked of a node, beside what forward.go says:
//
//	question: version 1, group 8, timeout 4 (ms), wait 4 (ms), index 8, most 4 |
//	          for each watch: flags 1, from 8, sizes of key and end (uvarint), key, end
//	answer:   version 1, code 1 | flags 1, applied 8, revision 8 |
//	          for each delivery: size (uvarint), WatchResponse: the watch by its
//	          number in the question, events, compact_revision, and in the header
//	          the revision that the watch goes on from; fragment: what is there is too large
type question struct {
	group   uint64
	wait    time.Duration
	index   uint64 // answer as soon as the state has applied it; 0 = when something has happened
	most    int    // bytes of events of one transaction, and in the answer, about
	watches []asked
}

type asked struct {
	number   int64 // the asking stream's
	key, end []byte
	from     int64
	prevKV   bool
}

const (
	questionHeader = 29
	replyHeader    = 17

	flagPrevKV = 1 << 0
	flagLive   = 1 << 0
	flagLeads  = 1 << 1
	flagOrphan = 1 << 2 // no leader is known
)

// poll asks a node once, and delivers what it answers.
func (y *relay) poll(a *attempts) error {
	r := y.w.router
	if err := y.rest(); err != nil {
		return err
	}
	q, hurried := y.question()
	if y.asked = len(q.watches); y.asked == 0 {
		return y.idle(pollWait)
	}
	node := y.choose(a)
	if node == "" {
		return errNoReplica
	}
	ctx, cancel := context.WithTimeout(y.w.ctx, q.wait+min(a.timeout(minAttempt), cutTimeout))
	defer cancel()
	var watching sync.WaitGroup
	interrupted := false
	if !hurried {
		watching.Go(func() { interrupted = y.interrupt(ctx, cancel) })
	}
	b, err := r.pollThere(ctx, node, q)
	cancel()
	watching.Wait()
	switch {
	case interrupted && err != nil:
		return nil // it is asked again at once
	case errors.Is(err, shard.ErrOverloaded):
		y.short = shortPolls
		return err
	case err != nil:
		y.node = ""
		y.heard(false)
		return err
	}
	a.limit = 0
	y.node = node
	y.heard(!b.orphan)
	if err := y.accept(b); err != nil {
		return err
	}
	if hurried && b.applied < q.index && len(b.deliveries) == 0 {
		y.node = ""
		return errBehind
	}
	if len(b.deliveries) == 0 && q.wait > 0 && !interrupted && !hurried && !b.leads {
		y.node = "" // nothing has happened there for long: maybe it does not hear of it, or late
	}
	if y.short > 0 && len(b.deliveries) == 0 {
		y.short--
		return y.idle(pollPause)
	}
	return nil
}

// heard notes whether there is a leader.
func (y *relay) heard(leader bool) {
	y.w.mu.Lock()
	defer y.w.mu.Unlock()
	y.leaderless = !leader
}

// choose names the node to ask: the one that led when the group became complete,
// the one that has answered last, or another one.
func (y *relay) choose(a *attempts) string {
	y.w.mu.Lock()
	t, ok := y.pending()
	y.w.mu.Unlock()
	r := y.w.router
	switch {
	case ok && a.n == 0 && t.node != "" && !r.quiet.isSilent(t.node):
		return t.node
	case y.node != "" && a.n == 0 && !r.quiet.isSilent(y.node):
		return y.node
	}
	y.turn++
	if a.n == 0 && y.turn%2 == 1 {
		return r.guess(y.group, y.turn) // who leads knows first
	}
	return r.dataNode(y.group, y.turn)
}

// question asks for all watches. hurried is true if there is a target.
func (y *relay) question() (q *question, hurried bool) {
	y.w.mu.Lock()
	defer y.w.mu.Unlock()
	y.reset()
	q = &question{group: y.group, wait: pollWait, most: y.w.shareOf(wholeBytes)}
	for _, p := range y.fresh {
		if p.of.ended || p.given {
			continue
		}
		spec := &p.of.spec
		q.watches = append(q.watches, asked{p.of.number, spec.key, spec.end, y.give(p), spec.prevKV})
	}
	y.fresh = nil
	if t, ok := y.pending(); ok {
		q.index, q.wait, hurried = t.index, minAttempt, true
	}
	if y.short > 0 || hurried && q.index == 0 {
		q.wait = 0
	}
	return q, hurried
}

// rest keeps a stream with very many watches from having another node begin them anew all the time.
func (y *relay) rest() error {
	rest := time.Duration(y.asked) * pollRest
	if rest < leastRest {
		return nil
	}
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-y.w.ctx.Done():
		return y.w.ctx.Err()
	}
}

// idle waits until there is something else to follow, or for a while.
func (y *relay) idle(most time.Duration) error {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-y.wake:
	case <-timer.C:
	case <-y.w.ctx.Done():
		return y.w.ctx.Err()
	}
	return nil
}

// interrupt ends a question that waits when there is another one to ask: at once
// if there is a target, else soon.
func (y *relay) interrupt(ctx context.Context, cancel context.CancelFunc) bool {
	select {
	case <-y.wake:
	case <-ctx.Done():
		return false
	}
	timer := time.NewTimer(pollGather)
	defer timer.Stop()
	for {
		y.w.mu.Lock()
		_, target := y.pending()
		y.w.mu.Unlock()
		if target {
			cancel()
			return true
		}
		select {
		case <-y.wake:
		case <-timer.C:
			cancel()
			return true
		case <-ctx.Done():
			signalOnce(y.wake) // it has been heard, and nothing done
			return false
		}
	}
}

// pollThere asks another node.
func (r *router) pollThere(ctx context.Context, node string, q *question) (*batch, error) {
	r.metrics.polls.Inc()
	c, body, err := r.call(ctx, node, methodWatchPoll, q.encode(ctx))
	switch {
	case err != nil:
		return nil, err
	case c != codeOK:
		return nil, c.err()
	}
	b, err := q.decode(body)
	if err == nil && r.cfg.faults.relaySkips {
		b.skip()
	}
	return b, err
}

// skip plants a gap: what has not been answered is taken for nothing.
func (b *batch) skip() {
	for i := range b.deliveries {
		d := &b.deliveries[i]
		if n := len(d.Events); n > 1 {
			d.Events = d.Events[:n-1]
		}
	}
}

func (q *question) encode(ctx context.Context) []byte {
	payload := []byte{protocolVersion}
	payload = binary.BigEndian.AppendUint64(payload, q.group)
	payload = binary.BigEndian.AppendUint32(payload, timeoutMillis(ctx))
	payload = binary.BigEndian.AppendUint32(payload, uint32(q.wait.Milliseconds()))
	payload = binary.BigEndian.AppendUint64(payload, q.index)
	payload = binary.BigEndian.AppendUint32(payload, uint32(q.most))
	for i := range q.watches {
		payload = q.watches[i].encode(payload)
	}
	return payload
}

func (w *asked) encode(payload []byte) []byte {
	flags := byte(0)
	if w.prevKV {
		flags |= flagPrevKV
	}
	payload = binary.BigEndian.AppendUint64(append(payload, flags), uint64(w.from))
	payload = binary.AppendUvarint(payload, uint64(len(w.key)))
	payload = binary.AppendUvarint(payload, uint64(len(w.end)))
	return append(append(payload, w.key...), w.end...)
}

// decodeQuestion also returns the milliseconds that the caller waits.
func decodeQuestion(payload []byte) (*question, uint32, error) {
	if len(payload) < questionHeader || payload[0] != protocolVersion {
		return nil, 0, errMalformed
	}
	q := &question{
		group: binary.BigEndian.Uint64(payload[1:]),
		wait:  time.Duration(binary.BigEndian.Uint32(payload[13:])) * time.Millisecond,
		index: binary.BigEndian.Uint64(payload[17:]),
		most:  int(min(binary.BigEndian.Uint32(payload[25:]), wholeBytes)),
	}
	for rest := payload[questionHeader:]; len(rest) > 0; {
		var w asked
		var ok bool
		if w, rest, ok = decodeAsked(rest); !ok || len(q.watches) == maxPollKeys {
			return nil, 0, errMalformed
		}
		w.number = int64(len(q.watches))
		q.watches = append(q.watches, w)
	}
	return q, binary.BigEndian.Uint32(payload[9:]), nil
}

func decodeAsked(b []byte) (w asked, rest []byte, ok bool) {
	if len(b) < 9 {
		return w, nil, false
	}
	w.prevKV, w.from = b[0]&flagPrevKV != 0, int64(binary.BigEndian.Uint64(b[1:]))
	b = b[9:]
	key, n := binary.Uvarint(b)
	if n <= 0 {
		return w, nil, false
	}
	b = b[n:]
	end, n := binary.Uvarint(b)
	if n <= 0 {
		return w, nil, false
	}
	b = b[n:]
	if key > uint64(len(b)) || end > uint64(len(b))-key || w.from <= 0 {
		return w, nil, false
	}
	w.key, w.end = b[:key:key], b[key:][:end:end]
	return w, b[key+end:], true
}

// handleWatchPoll answers from this node's replica.
func (r *router) handleWatchPoll(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	q, ms, err := decodeQuestion(payload)
	if err != nil {
		return answer(codeMalformed), nil
	}
	replica := r.ofKeys(q.group)
	if replica == nil {
		return r.decline(q.group, nil, shard.ErrNotLeader), nil
	}
	if q.wait > 0 {
		defer r.polls.Add(-1)
		if r.polls.Add(1) > maxPolls {
			return answer(codeOverloaded), nil
		}
	}
	ctx, cancel := withMost(ctx, ms)
	defer cancel()
	meter := r.answers.meter()
	defer meter.release()
	b, err := r.pollHere(ctx, replica, q, meter)
	if err != nil {
		return r.declineRead(q.group, replica, err), nil
	}
	leader := replica.Leader()
	b.leads, b.orphan = leader.Self, leader.Node == ""
	return b.encode()
}

// pollHere waits until there is something for the watches, or the state has
// applied the index, or it is time to answer.
func (r *router) pollHere(ctx context.Context, replica Replica, q *question, meter *answerMeter) (*batch, error) {
	s := &pollSource{question: q, replica: replica, meter: meter}
	defer s.close()
	timer := time.NewTimer(q.wait)
	defer timer.Stop()
	waiting, cancel := context.WithCancel(ctx)
	var applying sync.WaitGroup
	defer applying.Wait()
	defer cancel()
	applied := make(chan struct{})
	if q.index > 0 {
		applying.Go(func() {
			if _, release, err := replica.AcquireState(waiting, q.index); err == nil {
				release()
				close(applied)
			}
		})
	}
	for late := q.wait == 0; ; {
		b, err := s.take(ctx)
		switch {
		case err != nil:
			return nil, err
		case len(b.deliveries) > 0 || late || b.live && q.index > 0 && b.applied >= q.index:
			return b, nil
		}
		reached := applied
		if b.applied >= q.index {
			reached = nil
		}
		select {
		case <-s.feed.Ready():
		case <-s.feed.Done():
			return nil, elsewhere(errNoSource)
		case <-reached:
		case <-timer.C:
			late = true
		case <-ctx.Done():
			return nil, elsewhere(ctx.Err())
		}
	}
}

// pollSource takes what there is for a question.
type pollSource struct {
	*question
	replica Replica
	meter   *answerMeter
	state   *fsm.Store
	feed    *fsm.Feed
}

func (s *pollSource) close() {
	if s.feed != nil {
		s.feed.Close()
	}
}

func (s *pollSource) take(ctx context.Context) (*batch, error) {
	state, release, err := s.replica.AcquireState(ctx, 0)
	if err != nil {
		return nil, elsewhere(err)
	}
	defer release()
	b := &batch{}
	switch {
	case s.feed == nil:
		s.state, s.feed = state, state.NewFeed(int64(min(s.most, feedBytes)))
		if b.deliveries, err = s.register(); err != nil {
			return nil, elsewhere(err)
		}
	case s.state != state:
		return nil, elsewhere(errNoSource)
	}
	b.applied = state.AppliedIndex() // before what is taken
	taken, err := s.takeFew(ctx)
	if err != nil {
		return nil, err
	}
	b.deliveries = append(b.deliveries, taken...)
	b.revision, b.live = s.feed.Progress()
	return b, nil
}

func (s *pollSource) register() (refused []fsm.Delivery, _ error) {
	for _, w := range s.watches {
		err := s.feed.Watch(w.number, w.key, w.end, w.from)
		var compacted *fsm.CompactedError
		switch {
		case errors.As(err, &compacted):
			refused = append(refused, fsm.Delivery{ID: w.number, Compacted: compacted.Revision})
		case err != nil:
			return nil, err
		}
	}
	return refused, nil
}

// takeFew takes about as much as an answer may have.
func (s *pollSource) takeFew(ctx context.Context) ([]fsm.Delivery, error) {
	most := max(1, s.most)
	taken, err := s.feed.Take(ctx, min(most, pollBytes), most)
	if err != nil {
		return nil, elsewhere(err)
	}
	ended := make(map[int64]bool) // before what is set aside
	out := taken[:0]
	for _, d := range taken {
		if ended[d.ID] {
			continue
		}
		if s.watches[d.ID].prevKV {
			if err := addPrevious(ctx, s.state, &d, most); err != nil {
				return nil, elsewhere(err)
			}
		}
		if err := s.meter.Take(sizeOfEvents(d.Events)); err != nil {
			return nil, err
		}
		ended[d.ID] = d.Huge
		out = append(out, d)
	}
	return out, nil
}

func (b *batch) encode() ([]byte, error) {
	reply := answer(codeOK, 0)
	if b.live {
		reply[answerHeader] |= flagLive
	}
	if b.leads {
		reply[answerHeader] |= flagLeads
	}
	if b.orphan {
		reply[answerHeader] |= flagOrphan
	}
	reply = binary.BigEndian.AppendUint64(reply, b.applied)
	reply = binary.BigEndian.AppendUint64(reply, uint64(b.revision))
	for i := range b.deliveries {
		d := &b.deliveries[i]
		message := &pb.WatchResponse{
			WatchId: d.ID, Header: &pb.ResponseHeader{Revision: d.Next}, Events: d.Events, CompactRevision: d.Compacted, Fragment: d.Huge,
		}
		reply = binary.AppendUvarint(reply, uint64(proto.Size(message)))
		var err error
		if reply, err = (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend(reply, message); err != nil {
			return answer(codeUnknown), nil
		}
	}
	return reply, nil
}

// decode holds the answer against the question: events that were not asked for,
// or out of order, would reach the client.
func (q *question) decode(body []byte) (*batch, error) {
	if len(body) < replyHeader {
		return nil, errBadAnswer
	}
	b := &batch{
		live: body[0]&flagLive != 0, leads: body[0]&flagLeads != 0, orphan: body[0]&flagOrphan != 0,
		applied: binary.BigEndian.Uint64(body[1:]), revision: int64(binary.BigEndian.Uint64(body[9:])),
	}
	next := make(map[int64]int64)
	for rest := body[replyHeader:]; len(rest) > 0; {
		size, n := binary.Uvarint(rest)
		if n <= 0 || size > uint64(len(rest)-n) {
			return nil, errBadAnswer
		}
		d, err := q.decodeDelivery(rest[n:][:size], next)
		if err != nil {
			return nil, err
		}
		b.deliveries = append(b.deliveries, *d)
		rest = rest[n+int(size):]
	}
	return b, nil
}

func (q *question) decodeDelivery(data []byte, next map[int64]int64) (*fsm.Delivery, error) {
	var m pb.WatchResponse
	if err := proto.Unmarshal(data, &m); err != nil || m.WatchId < 0 || m.WatchId >= int64(len(q.watches)) || m.Header == nil {
		return nil, errBadAnswer
	}
	w := &q.watches[m.WatchId]
	d := &fsm.Delivery{ID: w.number, Events: m.Events, Next: m.Header.Revision, Compacted: m.CompactRevision, Huge: m.Fragment}
	if d.Compacted > 0 {
		return d, nil
	}
	from := max(w.from, next[m.WatchId])
	for _, e := range m.Events {
		switch {
		case e.GetKv() == nil, e.Kv.ModRevision < from, e.Kv.ModRevision >= d.Next, !w.has(e.Kv.Key):
			return nil, fmt.Errorf("%w: an event that was not asked for", errBadAnswer)
		}
		from = e.Kv.ModRevision
	}
	if d.Next < from {
		return nil, errBadAnswer
	}
	next[m.WatchId] = d.Next
	return d, nil
}

// has reports whether a key is in the range that is watched.
func (w *asked) has(key []byte) bool {
	switch {
	case len(w.end) == 0:
		return bytes.Equal(key, w.key)
	case len(w.end) == 1 && w.end[0] == 0:
		return bytes.Compare(key, w.key) >= 0
	}
	return bytes.Compare(key, w.key) >= 0 && bytes.Compare(key, w.end) < 0
}
