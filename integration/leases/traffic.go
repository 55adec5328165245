package leases

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/integration/linearizability"
	"kvd/integration/watches"
)

// Prefix begins all keys that are attached to leases.
const Prefix = "lease/"

// Traffic is a load of clients that each hold one lease after the other.
type Traffic struct {
	Services []Service // all that there are; a client goes to any of them
	Clients  int
	Seed     uint64
	Tags     []string // what follows the prefix in keys: {tags} of several shards; nil = nothing
	TTL      int64    // seconds, at least; it is up to twice that
	Timeout  time.Duration
	Log      *Log
}

// Run goes on until ctx is done and the requests under way have been answered or have timed out.
func (t Traffic) Run(ctx context.Context) {
	if t.Timeout == 0 {
		t.Timeout = 3 * time.Second
	}
	if t.Tags == nil {
		t.Tags = []string{""}
	}
	var group sync.WaitGroup
	for i := range t.Clients {
		h := &holder{Traffic: t, name: i, random: rand.New(rand.NewPCG(t.Seed, uint64(i)+2000))}
		group.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				h.hold(ctx, n)
			}
		})
	}
	group.Wait()
}

// Finish waits until no key has a lease any more, and then looks for every key once more. It fails when ctx is done.
func (t Traffic) Finish(ctx context.Context) error {
	t.Timeout = 5 * time.Second
	h := &holder{Traffic: t, random: rand.New(rand.NewPCG(t.Seed, 1999))}
	var there []*mvccpb.KeyValue
	for {
		sent := t.Log.Now()
		answer, err := h.all(ctx)
		if err == nil {
			there = answer.Kvs
		}
		answered := t.Log.Now()
		if err == nil && !slices.ContainsFunc(answer.Kvs, func(kv *mvccpb.KeyValue) bool { return kv.Lease != 0 }) {
			t.Log.Add(looks(t.Log.Ops(), answer, sent, answered)...)
			return nil
		}
		if !pause(ctx, 200*time.Millisecond) {
			return fmt.Errorf("leases: keys that still have one, of these: %v, %w", there, errors.Join(err, ctx.Err()))
		}
	}
}

// looks are what an answer with all keys says of each.
func looks(ops []Op, answer *pb.RangeResponse, sent, answered time.Duration) (found []Op) {
	there := make(map[string]bool)
	for _, kv := range answer.Kvs {
		there[string(kv.Key)] = true
	}
	seen := make(map[string]bool)
	for _, op := range ops {
		if op.Key == "" || seen[op.Key] {
			continue
		}
		seen[op.Key] = true
		look := Op{Kind: Look, Lease: op.Lease, Key: op.Key, Sent: sent, Answered: answered, Outcome: Missing}
		if there[op.Key] {
			look.Outcome, look.Bare = Done, true
		}
		found = append(found, look)
	}
	return found
}

// Tell adds what watches told of the deletion of keys.
func (l *Log) Tell(deletions []watches.Deletion) {
	of := make(map[string]int64)
	for _, op := range l.Ops() {
		if op.Key != "" {
			of[op.Key] = op.Lease
		}
	}
	for _, d := range deletions {
		if id, ok := of[d.Key]; ok {
			l.Add(Op{Kind: Gone, Lease: id, Key: d.Key, Sent: l.Since(d.Time), Answered: l.Since(d.Time), Revision: d.Revision})
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// holder is one client.
type holder struct {
	Traffic
	name   int
	random *rand.Rand
}

// request calls one of the services and records what came of it. do fills in what the answer says.
func (h *holder) request(ctx context.Context, op Op, do func(ctx context.Context, s Service, op *Op) error) Op {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.Timeout)
	defer cancel()
	service := h.Services[h.random.IntN(len(h.Services))]
	op.Sent = h.Log.Now()
	err := do(ctx, service, &op)
	op.Answered = h.Log.Now()
	switch {
	case errors.Is(err, linearizability.ErrNotSent):
		op.Outcome = Unknown
		return op
	case notFound(err):
		op.Outcome = Missing
	case err != nil:
		op.Outcome = Unknown
	}
	if op.Lease != 0 {
		h.Log.Add(op)
	}
	return op
}

// notFound reports whether an error says that there is no such lease.
func notFound(err error) bool { return status.Code(err) == codes.NotFound }

// hold grants a lease, attaches keys to it, renews it for a while, and lets go of it in one of several ways.
func (h *holder) hold(ctx context.Context, n int) {
	granted := h.request(ctx, Op{Kind: Grant}, func(ctx context.Context, s Service, op *Op) error {
		answer, err := s.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: h.TTL + h.random.Int64N(h.TTL+1)})
		op.Lease, op.TTL = answer.GetID(), time.Duration(answer.GetTTL())*time.Second
		return err
	})
	if granted.Outcome != Done {
		pause(ctx, 100*time.Millisecond)
		return
	}
	var keys []string
	for i := range 1 + h.random.IntN(4) {
		key := fmt.Sprintf("%s%s%d-%d-%d", Prefix, h.Tags[h.random.IntN(len(h.Tags))], h.name, n, i)
		keys = append(keys, key)
		h.attach(ctx, granted.Lease, key)
	}
	alive := h.renew(ctx, granted, keys)
	turn := h.name + n // so that few leases are enough to see everything
	if alive && turn%2 == 0 {
		h.detach(ctx, granted.Lease, keys[0])
	}
	if alive && turn/2%2 == 0 {
		keys = append(keys, h.revoke(ctx, granted.Lease, keys[0]))
	}
	h.lookOn(ctx, granted, keys)
}

func (h *holder) attach(ctx context.Context, id int64, key string) Outcome {
	return h.request(ctx, Op{Kind: Attach, Lease: id, Key: key}, func(ctx context.Context, s Service, op *Op) error {
		answer, err := s.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte("held"), Lease: id})
		op.Revision = answer.GetHeader().GetRevision()
		return err
	}).Outcome
}

func (h *holder) detach(ctx context.Context, id int64, key string) {
	h.request(ctx, Op{Kind: Detach, Lease: id, Key: key}, func(ctx context.Context, s Service, _ *Op) error {
		_, err := s.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte("kept")})
		return err
	})
}

func (h *holder) look(ctx context.Context, id int64, key string) Op {
	return h.request(ctx, Op{Kind: Look, Lease: id, Key: key}, func(ctx context.Context, s Service, op *Op) error {
		answer, err := s.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
		if err == nil && len(answer.Kvs) == 0 {
			op.Outcome = Missing
		}
		op.Bare = err == nil && len(answer.Kvs) > 0 && answer.Kvs[0].Lease == 0
		return err
	})
}

func (h *holder) all(ctx context.Context) (*pb.RangeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	return h.Services[h.random.IntN(len(h.Services))].Range(ctx, &pb.RangeRequest{Key: []byte(Prefix), RangeEnd: []byte("lease0")})
}

// renew keeps the lease alive for a while. It reports whether the lease may still be there.
func (h *holder) renew(ctx context.Context, granted Op, keys []string) bool {
	for range h.random.IntN(6) {
		if !pause(ctx, time.Duration(h.random.Int64N(int64(granted.TTL)/2))) {
			return false
		}
		outcome := Unknown
		for i := 0; i < 4 && outcome == Unknown; i++ { // other nodes may know better
			outcome = h.renewOnce(ctx, granted.Lease)
		}
		if outcome == Missing {
			return false
		}
		h.look(ctx, granted.Lease, keys[h.random.IntN(len(keys))])
		if h.random.IntN(3) == 0 {
			h.left(ctx, granted.Lease)
		}
	}
	return true
}

func (h *holder) renewOnce(ctx context.Context, id int64) Outcome {
	return h.request(ctx, Op{Kind: Renew, Lease: id}, func(ctx context.Context, s Service, op *Op) error {
		answer, err := s.KeepAlive(ctx, id)
		if op.TTL = time.Duration(answer.GetTTL()) * time.Second; err == nil && op.TTL <= 0 {
			op.Outcome = Missing
		}
		return err
	}).Outcome
}

func (h *holder) left(ctx context.Context, id int64) {
	h.request(ctx, Op{Kind: Left, Lease: id}, func(ctx context.Context, s Service, op *Op) error {
		answer, err := s.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: id, Keys: true})
		if op.TTL = time.Duration(answer.GetTTL()) * time.Second; err == nil && answer.TTL < 0 {
			op.Outcome = Missing
		}
		return err
	})
}

// revoke revokes a lease while a key is put with it.
func (h *holder) revoke(ctx context.Context, id int64, like string) (racing string) {
	racing = like + "-late"
	beside := &holder{Traffic: h.Traffic, name: h.name, random: rand.New(rand.NewPCG(h.random.Uint64(), 0))}
	wait := time.Duration(h.random.IntN(20)) * time.Millisecond
	var group sync.WaitGroup
	group.Go(func() {
		pause(ctx, wait)
		beside.attach(ctx, id, racing)
	})
	pause(ctx, time.Duration(h.random.IntN(20))*time.Millisecond)
	h.request(ctx, Op{Kind: Revoke, Lease: id}, func(ctx context.Context, s Service, _ *Op) error {
		_, err := s.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id})
		return err
	})
	group.Wait()
	return racing
}

// lookOn looks for the keys until they are gone, or for as long as the lease may live twice over.
func (h *holder) lookOn(ctx context.Context, granted Op, keys []string) {
	for until := h.Log.Now() + 2*granted.TTL; h.Log.Now() < until; {
		key := keys[h.random.IntN(len(keys))]
		if op := h.look(ctx, granted.Lease, key); op.Outcome == Missing && h.random.IntN(3) == 0 {
			// Both may be too late.
			h.renewOnce(ctx, granted.Lease)
			h.attach(ctx, granted.Lease, key)
			return
		}
		if !pause(ctx, time.Duration(100+h.random.IntN(200))*time.Millisecond) {
			return
		}
	}
}
