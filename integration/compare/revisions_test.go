package compare

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sort"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// revisions relates the revisions of a reference, which has no gaps, to those of a subject, which may have: each state
// of the reference is a span of the subject's revisions. It translates requests to the subject and answers from it.
//
// Answers are equal after the translation only if the subject keeps the order: a write is above all that was seen
// before it, what is read later is at or above it, and keys carry the very revisions that their writes were answered
// with.
type revisions struct {
	rng    *rand.Rand
	latest func(context.Context) (int64, error) // the subject's newest revision of all
	exact  bool                                 // compactions are at the revision of the write, from which a watch may begin then
	spans  []span                               // by revision of the reference; the first one is not used

	compacted struct{ reference, subject int64 }
	judged    int64 // what was the subject's newest, if the last request named a revision just ahead of it
}

// span is the subject's revisions that have the state of one revision of the reference. It begins at low; first and
// last, and what is between, were seen to have it. first is the write itself, but for a deletion that took place shard
// by shard: that is somewhere from low to first.
type span struct{ low, first, last int64 }

// farRevision is how far ahead of the newest revision a request may be for it to be taken as an offset to it; what is
// beyond is a limit of the type, and stays.
const farRevision = 1 << 20

// unreachable is more revisions than any test uses up.
const unreachable = 1 << 40

// newRevisions is for fresh servers.
func newRevisions(latest func(context.Context) (int64, error)) *revisions {
	return &revisions{
		rng:    rand.New(rand.NewPCG(0, 0)),
		latest: latest,
		spans:  []span{{}, {1, 1, 1}}, // an empty store is at 1
	}
}

// newest is the newest revision of the reference.
func (r *revisions) newest() int64 { return int64(len(r.spans) - 1) }

// request is a call with the subject's revisions in place of the reference's.
func (r *revisions) request(ctx context.Context, c call) (call, error) {
	var failed error
	r.judged = 0
	changes := mutates(c)
	c.request = proto.Clone(c.request)
	if compaction, ok := c.request.(*pb.CompactionRequest); ok && r.exact && compaction.Revision > 0 && compaction.Revision <= r.newest() {
		compaction.Revision = r.spans[compaction.Revision].first
		return c, nil
	}
	rewriteRevisions(c.request.ProtoReflect(), func(field string, revision int64) int64 {
		if revision > 0 && revision <= r.newest() && (field == "revision" || strings.HasPrefix(field, "max_")) {
			return r.within(revision)
		}
		translated, err := r.first(ctx, revision)
		if err != nil {
			failed = err
		}
		if ahead := revision - r.newest(); revision > 0 && ahead > 0 && ahead <= farRevision && !changes {
			translated -= unreachable
			r.judged = translated - ahead
		}
		return translated
	})
	return c, failed
}

// outdated tells whether the last request may have been refused, or not, because the newest revision had moved on
// without a write: leaders that begin use some up. Only reads are so near to it.
func (r *revisions) outdated(ctx context.Context) bool {
	if r.judged == 0 {
		return false
	}
	latest, err := r.latest(ctx)
	return err == nil && latest != r.judged
}

// first is the subject's revision of a write; of one that is yet to come, as far ahead of what the subject won't reach
// as it is ahead of the newest.
func (r *revisions) first(ctx context.Context, revision int64) (int64, error) {
	ahead := revision - r.newest()
	switch {
	case revision <= 0 || ahead > farRevision:
		return revision, nil
	case ahead <= 0:
		return r.spans[revision].first, nil
	}
	latest, err := r.latest(ctx)
	r.extend(r.newest(), latest, false)
	return unreachable + latest + ahead, err
}

// within is one of the subject's revisions with the state of the reference's. Where both were compacted, it is the one
// at which the subject was: what is below is gone, and to compact what is above is nothing to refuse.
func (r *revisions) within(revision int64) int64 {
	switch s := r.spans[revision]; {
	case revision == r.compacted.reference:
		return r.compacted.subject
	case r.rng.IntN(2) == 0:
		return s.first
	default:
		return s.last
	}
}

// answer is what the subject answered, with the reference's revisions in place of its own. Revisions of keys become
// negative if no write had them. It learns from the two answers.
func (r *revisions) answer(asked call, want, got answer) answer {
	if want.response == nil || got.response == nil {
		return got
	}
	r.extend(headerOf(want.response).GetRevision(), headerOf(got.response).GetRevision(), inSteps(asked))
	rewriteRevisions(got.response.ProtoReflect(), r.translate)
	return got
}

// learn notes that a call was answered by both.
func (r *revisions) learn(reference, subject call) {
	if compaction, ok := reference.request.(*pb.CompactionRequest); ok {
		r.compacted.reference = compaction.Revision
		r.compacted.subject = subject.request.(*pb.CompactionRequest).Revision
	}
}

// extend learns that the subject is at a revision while the reference is at one, its newest or the next.
func (r *revisions) extend(reference, subject int64, inSteps bool) {
	last := &r.spans[r.newest()]
	switch {
	case subject <= last.last: // older, or nothing new, or a write that is not above all others
	case reference == r.newest():
		last.last = subject
	case reference == r.newest()+1 && inSteps:
		r.spans = append(r.spans, span{last.last + 1, subject, subject})
	case reference == r.newest()+1:
		r.spans = append(r.spans, span{subject, subject, subject})
	}
}

// inSteps tells a deletion that takes place shard by shard: its answer has the last one's revision.
func inSteps(c call) bool {
	if _, ok := c.request.(*pb.LeaseRevokeRequest); ok {
		return true
	}
	r, ok := c.request.(*pb.DeleteRangeRequest)
	return ok && bytes.Equal(r.RangeEnd, []byte{0})
}

// translate returns the reference's revision for one of the subject's.
func (r *revisions) translate(field string, revision int64) int64 {
	if revision <= 0 {
		return revision
	}
	if field == "compact_revision" {
		if revision == r.compacted.subject {
			return r.compacted.reference
		}
		return -revision
	}
	above := sort.Search(len(r.spans), func(i int) bool { return r.spans[i].low > revision })
	reference := int64(above - 1)
	if written := field == "mod_revision" || field == "create_revision"; written && revision != r.spans[reference].first {
		return -revision
	}
	return reference
}

// rewriteRevisions replaces every revision in a message.
func rewriteRevisions(m protoreflect.Message, replace func(field string, revision int64) int64) {
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		name := string(field.Name())
		switch {
		case field.Kind() == protoreflect.MessageKind && field.IsList():
			for i := range value.List().Len() {
				rewriteRevisions(value.List().Get(i).Message(), replace)
			}
		case field.Kind() == protoreflect.MessageKind:
			rewriteRevisions(value.Message(), replace)
		case field.Kind() == protoreflect.Int64Kind && strings.HasSuffix(name, "revision"):
			m.Set(field, protoreflect.ValueOfInt64(replace(name, value.Int())))
		}
		return true
	})
}
