package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// pageRequest asks for a part of a range in one group.
type pageRequest struct {
	group uint64
	// lead: the state must be linearizable, or, at a revision, have all of it
	// for ever; only the leader knows. Else the state must have applied index.
	lead  bool
	index uint64
	// current is the newest revision that has been handed out; 0 = what the
	// group has used.
	current int64
	whole   bool // answer the request as it is, however it is sorted, or not at all
	count   bool // say how many keys the range has
	r       *pb.RangeRequest
}

// page is a part of a range: the first keys in their order, unless it is the
// whole. Keys that the filters keep out are missing.
type page struct {
	kvs      []*mvccpb.KeyValue
	revision int64  // of the header
	index    uint64 // that the state had to have applied
	count    int64  // of keys in the range, if asked for
	next     []byte // where the next page begins; nil = there is none, or it is the whole
	node     string // that it came from; "" = this one
}

const maxPageKeys = 1 << 14

// pageSizes bound what travels in one message.
type pageSizes struct {
	firstKeys  int64 // of a page, as long as the size of the values is not known
	pageBytes  int   // a page has less, unless it has one key
	wholeBytes int   // and so has what cannot be cut into pages
	mergeBytes int   // what the pages of one request take in sum, about
}

var defaultPageSizes = pageSizes{firstKeys: 256, pageBytes: 4 << 20, wholeBytes: 32 << 20, mergeBytes: 32 << 20}

// errPageFull: the answer does not fit into what one message may have.
var errPageFull = errors.New("server: the answer is too large for one message")

// pageMeter ends reads that make a page too large.
type pageMeter struct {
	answers fsm.Meter
	left    int
}

func (m *pageMeter) Take(n int) error {
	if m.left -= n; m.left < 0 {
		return errPageFull
	}
	return m.answers.Take(n)
}

// page reads a part of a range from a state. What it takes counts until
// release.
func (r *router) page(ctx context.Context, state *fsm.Store, p *pageRequest) (_ *page, release func(), _ error) {
	meter := r.answers.meter()
	read := r.readPage
	if p.whole {
		read = r.readWhole
	}
	out, err := read(fsm.WithMeter(ctx, meter), meter, state, p)
	if err != nil {
		meter.release()
		return nil, nil, err
	}
	return out, meter.release, nil
}

func (r *router) readWhole(ctx context.Context, meter fsm.Meter, state *fsm.Store, p *pageRequest) (*page, error) {
	if !p.r.CountOnly { // counting keeps nothing
		ctx = fsm.WithMeter(ctx, &pageMeter{meter, r.sizes.wholeBytes})
	}
	resp, err := state.RangeAt(ctx, fsm.User, p.r, p.current)
	if err != nil {
		return nil, err
	}
	return &page{kvs: resp.Kvs, revision: resp.Header.Revision, count: resp.Count}, nil
}

// readPage takes fewer keys until they fit.
func (r *router) readPage(ctx context.Context, meter fsm.Meter, state *fsm.Store, p *pageRequest) (*page, error) {
	keys := min(max(p.r.Limit, 1), maxPageKeys)
	for ; ; keys = max(keys/4, 1) {
		limit := r.sizes.pageBytes
		if keys == 1 {
			limit = math.MaxInt
		}
		resp, err := state.RangePageAt(fsm.WithMeter(ctx, &pageMeter{meter, limit}), fsm.User, plain(p.r, keys), p.current)
		switch {
		case errors.Is(err, errPageFull):
			continue
		case err != nil:
			return nil, err
		}
		out := &page{revision: resp.Header.Revision, count: int64(len(resp.Kvs))}
		if resp.More {
			out.next = after(resp.Kvs[len(resp.Kvs)-1].Key)
		}
		if out.next != nil && p.count {
			counted, err := state.RangeAt(ctx, fsm.User, counting(p.r, out.revision), p.current)
			if err != nil {
				return nil, err
			}
			out.count = counted.Count
		}
		out.kvs = fsm.Filter(resp.Kvs, p.r)
		return out, nil
	}
}

// plain is a request for the first keys of a range, unfiltered. Values that
// the request sorts by are read.
func plain(r *pb.RangeRequest, keys int64) *pb.RangeRequest {
	return &pb.RangeRequest{
		Key: r.Key, RangeEnd: r.RangeEnd, Revision: r.Revision, Limit: keys,
		KeysOnly: r.KeysOnly && r.SortTarget != pb.RangeRequest_VALUE,
	}
}

// counting counts the keys of a range at the request's revision, or at newest.
func counting(r *pb.RangeRequest, newest int64) *pb.RangeRequest {
	if r.Revision > 0 {
		newest = r.Revision
	}
	return &pb.RangeRequest{Key: r.Key, RangeEnd: r.RangeEnd, Revision: newest, CountOnly: true}
}

// pageHere answers from this node's replica.
func (r *router) pageHere(ctx context.Context, replica Replica, p *pageRequest) (*page, func(), error) {
	index := p.index
	if p.lead {
		var err error
		if index, err = leaderIndex(ctx, replica, p.r.Revision); err != nil {
			return nil, nil, err
		}
	}
	state, unpin, err := pinFor(ctx, replica, index)
	if err != nil {
		return nil, nil, err
	}
	defer unpin()
	out, release, err := r.page(ctx, state, p)
	if err != nil {
		return nil, nil, err
	}
	out.index = index
	return out, release, nil
}

// leaderIndex is an index that makes states linearizable or, at a revision,
// complete for ever. replica must lead.
func leaderIndex(ctx context.Context, replica Replica, revision int64) (uint64, error) {
	if revision <= 0 {
		return replica.ReadIndex(ctx)
	}
	return replica.ReadIndexAt(ctx, revision)
}

// elsewhereError: this node's replica cannot answer now, another one may.
type elsewhereError struct{ err error }

func elsewhere(err error) error { return &elsewhereError{err} }

func (e *elsewhereError) Error() string {
	return "server: this node's replica cannot answer: " + e.err.Error()
}

func (e *elsewhereError) Unwrap() []error { return []error{shard.ErrNotLeader, e.err} }

// The request for a page and its answer, beside what forward.go says:
//
//	page:   version 1, flags 1, group 8, timeout 4 (ms), index 8, current 8 | RangeRequest
//	answer: version 1, code 1 | index 8, size of next (uvarint), next | RangeResponse
const (
	pageHeader = 30

	flagLead  = 1 << 0
	flagWhole = 1 << 1
	flagCount = 1 << 2
)

func (p *pageRequest) encode(ctx context.Context) ([]byte, error) {
	payload := make([]byte, pageHeader, pageHeader+proto.Size(p.r))
	payload[0] = protocolVersion
	for flag, set := range map[byte]bool{flagLead: p.lead, flagWhole: p.whole, flagCount: p.count} {
		if set {
			payload[1] |= flag
		}
	}
	binary.BigEndian.PutUint64(payload[2:], p.group)
	binary.BigEndian.PutUint32(payload[10:], timeoutMillis(ctx))
	binary.BigEndian.PutUint64(payload[14:], p.index)
	binary.BigEndian.PutUint64(payload[22:], uint64(p.current))
	return proto.MarshalOptions{}.MarshalAppend(payload, p.r)
}

// decodePage also returns the milliseconds that the caller waits.
func decodePage(payload []byte) (*pageRequest, uint32, error) {
	if len(payload) < pageHeader || payload[0] != protocolVersion {
		return nil, 0, errMalformed
	}
	p := &pageRequest{
		lead: payload[1]&flagLead != 0, whole: payload[1]&flagWhole != 0, count: payload[1]&flagCount != 0,
		group:   binary.BigEndian.Uint64(payload[2:]),
		index:   binary.BigEndian.Uint64(payload[14:]),
		current: int64(binary.BigEndian.Uint64(payload[22:])),
		r:       &pb.RangeRequest{},
	}
	if proto.Unmarshal(payload[pageHeader:], p.r) != nil || checkRange(p.r) != nil || p.current < 0 {
		return nil, 0, errMalformed
	}
	return p, binary.BigEndian.Uint32(payload[10:]), nil
}

func (p *page) encode() ([]byte, error) {
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: p.revision}, Kvs: p.kvs, Count: p.count}
	reply := make([]byte, answerHeader, answerHeader+8+binary.MaxVarintLen64+len(p.next)+proto.Size(resp))
	reply[0], reply[1] = protocolVersion, byte(codeOK)
	reply = binary.BigEndian.AppendUint64(reply, p.index)
	reply = binary.AppendUvarint(reply, uint64(len(p.next)))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(append(reply, p.next...), resp)
}

// decode holds the answer against the request: keys that are not asked for or
// out of order, or a next page that does not come after this one, would
// confuse the merge, or go on for ever.
func (p *pageRequest) decode(body []byte) (*page, error) {
	if len(body) < 8 {
		return nil, errBadAnswer
	}
	out := &page{index: binary.BigEndian.Uint64(body)}
	size, n := binary.Uvarint(body[8:])
	if n <= 0 || size > uint64(len(body)-8-n) {
		return nil, errBadAnswer
	}
	if size > 0 {
		out.next = bytes.Clone(body[8+n:][:size])
	}
	var resp pb.RangeResponse
	if err := proto.Unmarshal(body[8+n+int(size):], &resp); err != nil || resp.Header == nil {
		return nil, errBadAnswer
	}
	out.kvs, out.revision, out.count = resp.Kvs, resp.Header.Revision, resp.Count
	if out.next != nil && (p.whole || bytes.Compare(out.next, p.r.Key) <= 0) {
		return nil, errBadAnswer
	}
	if p.whole {
		return out, nil
	}
	for i, kv := range out.kvs {
		inOrder := bytes.Compare(kv.GetKey(), p.r.Key) >= 0
		if i > 0 {
			inOrder = bytes.Compare(kv.GetKey(), out.kvs[i-1].Key) > 0
		}
		if !inOrder || out.next != nil && bytes.Compare(kv.Key, out.next) >= 0 {
			return nil, errBadAnswer
		}
	}
	return out, nil
}

// pageThere asks another node.
func (r *router) pageThere(ctx context.Context, node string, p *pageRequest) (*page, error) {
	payload, err := p.encode(ctx)
	if err != nil {
		return nil, err
	}
	call := r.askAnyone
	if p.lead {
		call = r.ask
	}
	r.metrics.forwardedReads.Inc()
	c, body, err := call(ctx, p.group, node, methodPage, payload)
	switch {
	case err != nil:
		return nil, err
	case c == codeRefused:
		return nil, decodeRefusal(body)
	case c == codeTooLarge:
		return nil, errPageFull
	case c != codeOK:
		return nil, c.err()
	}
	return p.decode(body)
}

func (r *router) handlePage(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	p, ms, err := decodePage(payload)
	if err != nil {
		return answer(codeMalformed), nil
	}
	replica := r.ofKeys(p.group)
	if replica == nil {
		return r.decline(p.group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMost(ctx, ms)
	defer cancel()
	out, release, err := r.pageHere(ctx, replica, p)
	if err != nil {
		return r.declineRead(p.group, replica, err), nil
	}
	defer release()
	reply, err := out.encode()
	if err != nil {
		return answer(codeUnknown), nil
	}
	return reply, nil
}

// declineRead tells a refusal of the state machine or a meter from what another
// node, or another attempt, may do better.
func (r *router) declineRead(group uint64, replica Replica, err error) []byte {
	switch {
	case isRefusal(err):
		return answer(codeRefused, encodeRefusal(err)...)
	case errors.Is(err, errPageFull):
		return answer(codeTooLarge)
	}
	return r.decline(group, replica, err)
}
