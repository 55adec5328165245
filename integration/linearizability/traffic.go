package linearizability

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// ErrNotSent is what a Service wraps when a request certainly changes nothing, now or later.
var ErrNotSent = errors.New("linearizability: the request was not carried out")

// Service is a key-value service as one client sees it. It must send a request at most once. Any error that
// does not wrap ErrNotSent leaves the outcome open.
type Service interface {
	Range(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error)
	Put(context.Context, *pb.PutRequest) (*pb.PutResponse, error)
	DeleteRange(context.Context, *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error)
	Txn(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error)
}

// Traffic is a load of concurrent clients over few keys.
type Traffic struct {
	Services []Service     // one client each
	Keys     []string      // few, so that clients meet; at least two
	Seed     uint64        // of the clients' choices
	Timeout  time.Duration // of one request; 0 = 5 s
	Think    time.Duration // a client's mean pause between requests; 0 = 5 ms
	Prefix   string        // of values: makes them unique where several loads share a store
	// Sharded says that the store has shards, and Keys are {tag}rest with several tags and at least two keys for each:
	// transactions stay within a tag, and all keys are read by a range, which must hold no other keys.
	Sharded bool
}

// Run records into h until ctx is done and the requests in flight have been answered or have timed out.
func (t Traffic) Run(ctx context.Context, h *History) {
	if t.Timeout == 0 {
		t.Timeout = 5 * time.Second
	}
	if t.Think == 0 {
		t.Think = 5 * time.Millisecond
	}
	var group sync.WaitGroup
	var newest atomic.Int64
	for i, service := range t.Services {
		c := &client{
			Traffic: t, service: service, history: h, id: h.newClient(), known: make(map[string]string), newest: &newest,
			random: rand.New(rand.NewPCG(t.Seed, uint64(i))),
		}
		group.Go(func() { c.run(ctx) })
	}
	group.Wait()
}

// client does one thing after the other.
type client struct {
	Traffic
	service Service
	history *History
	id      int
	random  *rand.Rand
	known   map[string]string // the values it saw last, which its swaps expect
	newest  *atomic.Int64     // the highest revision that any of the clients was told
}

func (c *client) run(ctx context.Context) {
	for {
		pause := time.Duration(c.random.ExpFloat64() * float64(c.Think))
		select {
		case <-ctx.Done():
			return
		case <-time.After(min(pause, 10*c.Think)):
		}
		// A request in flight is not abandoned with ctx: every outcome left open makes the check weaker.
		request, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.Timeout)
		c.one(request)
		cancel()
	}
}

// one sends a random request.
func (c *client) one(ctx context.Context) {
	key := c.Keys[c.random.IntN(len(c.Keys))]
	prev := c.random.IntN(2) == 0
	switch n := c.random.IntN(100); {
	case n < 25:
		c.get(ctx, key, c.random.IntN(5) == 0)
	case n < 35 && c.Sharded:
		c.getRange(ctx)
	case n < 35:
		c.getAll(ctx)
	case n < 60:
		c.put(ctx, key, prev)
	case n < 70:
		c.delete(ctx, key, prev)
	case n < 92:
		c.swap(ctx, key)
	default:
		c.putTwo(ctx)
	}
}

// record does a request and adds its operations. The answer fills in the outputs, in the order of the inputs.
func (c *client) record(inputs []Input, do func(outputs []Output) error) {
	outputs := make([]Output, len(inputs))
	txn, call := c.history.newTxn(), c.history.Now()
	err := do(outputs)
	returned := c.history.Now()
	if errors.Is(err, ErrNotSent) {
		return
	}
	ops := make([]Op, len(inputs))
	for i := range inputs {
		if err != nil {
			outputs[i], returned = Output{Unknown: true}, Open
		}
		ops[i] = Op{Client: c.id, Txn: txn, Call: call, Return: returned, Input: inputs[i], Output: outputs[i]}
	}
	c.history.Add(ops...)
	if err != nil {
		c.id = c.history.newClient() // the old one still has an operation open
	} else if told := ops[0].Output.Revision; told > c.newest.Load() {
		c.newest.Store(told) // a lower one of another client's may come after it: no harm
	}
}

func (c *client) newValue() string {
	return fmt.Sprintf("%s%d-%d", c.Prefix, c.id, c.history.newTxn())
}

func (c *client) get(ctx context.Context, key string, stale bool) {
	kind := Get
	if stale {
		kind = Stale
	}
	c.record([]Input{{Kind: kind, Key: key}}, func(out []Output) error {
		resp, err := c.service.Range(ctx, &pb.RangeRequest{Key: []byte(key), Serializable: stale})
		if err != nil {
			return err
		}
		out[0] = Output{Revision: resp.Header.Revision, Seen: first(resp.Kvs)}
		c.known[key] = out[0].Seen.Value
		return nil
	})
}

// getAll reads all keys in one transaction: a snapshot.
func (c *client) getAll(ctx context.Context) {
	inputs := make([]Input, len(c.Keys))
	request := &pb.TxnRequest{}
	for i, key := range c.Keys {
		inputs[i] = Input{Kind: Get, Key: key}
		request.Success = append(request.Success, &pb.RequestOp{
			Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}},
		})
	}
	c.record(inputs, func(out []Output) error {
		resp, err := c.service.Txn(ctx, request)
		if err != nil {
			return err
		}
		for i := range inputs {
			out[i] = Output{Revision: resp.Header.Revision, Seen: first(resp.Responses[i].GetResponseRange().Kvs)}
		}
		return nil
	})
}

// getRange reads all keys by a range, which goes over all shards and is a snapshot all the same: at one go, in pages, or
// at a revision of the past.
func (c *client) getRange(ctx context.Context) {
	request := &pb.RangeRequest{Key: []byte(slices.Min(c.Keys)), RangeEnd: []byte(slices.Max(c.Keys) + "\x00")}
	in := Input{Kind: Get, Snapshot: true}
	switch c.random.IntN(3) {
	case 0:
		request.Limit = 1 + c.random.Int64N(int64(len(c.Keys)))
	case 1:
		if newest := c.newest.Load(); newest > 1 {
			in, request.Revision = Input{Kind: Stale, Past: true}, newest-c.random.Int64N(min(newest, 3))
		}
	}
	inputs := make([]Input, len(c.Keys))
	for i, key := range c.Keys {
		inputs[i] = in
		inputs[i].Key = key
	}
	c.record(inputs, func(out []Output) error {
		found := make(map[string]KV)
		for {
			resp, err := c.service.Range(ctx, request)
			if err != nil {
				return err
			}
			if request.Revision == 0 {
				request.Revision = resp.Header.Revision // of all further pages
			}
			for _, kv := range resp.Kvs {
				found[string(kv.Key)] = seen(kv)
			}
			if !resp.More || len(resp.Kvs) == 0 {
				break
			}
			request.Key = append(resp.Kvs[len(resp.Kvs)-1].Key, 0)
		}
		for i, key := range c.Keys {
			out[i] = Output{Revision: request.Revision, Seen: found[key]}
		}
		return nil
	})
}

func (c *client) put(ctx context.Context, key string, prev bool) {
	value := c.newValue()
	c.record([]Input{{Kind: Put, Key: key, Value: value, Prev: prev}}, func(out []Output) error {
		resp, err := c.service.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value), PrevKv: prev})
		if err != nil {
			return err
		}
		out[0] = Output{Revision: resp.Header.Revision, Seen: seen(resp.PrevKv)}
		c.known[key] = value
		return nil
	})
}

// two are different keys, of one tag where that matters.
func (c *client) two() []string {
	keys := slices.Clone(c.Keys)
	c.random.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	if c.Sharded {
		tag, _, _ := strings.Cut(keys[0], "}")
		keys = slices.DeleteFunc(keys, func(key string) bool { return !strings.HasPrefix(key, tag+"}") })
	}
	return keys[:2]
}

// putTwo writes two keys in one transaction.
func (c *client) putTwo(ctx context.Context) {
	value, request := c.newValue(), &pb.TxnRequest{}
	var inputs []Input
	for _, key := range c.two() {
		inputs = append(inputs, Input{Kind: Put, Key: key, Value: value})
		request.Success = append(request.Success, putOp(key, value))
	}
	c.record(inputs, func(out []Output) error {
		resp, err := c.service.Txn(ctx, request)
		if err != nil {
			return err
		}
		for i := range out {
			out[i] = Output{Revision: resp.Header.Revision}
		}
		return nil
	})
}

func (c *client) delete(ctx context.Context, key string, prev bool) {
	c.record([]Input{{Kind: Delete, Key: key, Prev: prev}}, func(out []Output) error {
		resp, err := c.service.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(key), PrevKv: prev})
		if err != nil {
			return err
		}
		out[0] = Output{Revision: resp.Header.Revision, Deleted: resp.Deleted > 0, Seen: first(resp.PrevKvs)}
		delete(c.known, key)
		return nil
	})
}

// swap expects what it saw last: often right, often overtaken.
func (c *client) swap(ctx context.Context, key string) {
	value, expect := c.newValue(), c.known[key]
	compare := &pb.Compare{Key: []byte(key), Target: pb.Compare_VALUE, Result: pb.Compare_EQUAL,
		TargetUnion: &pb.Compare_Value{Value: []byte(expect)}}
	if expect == "" {
		compare.Target, compare.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{}
	}
	read := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
	request := &pb.TxnRequest{Compare: []*pb.Compare{compare}, Success: []*pb.RequestOp{putOp(key, value)}, Failure: []*pb.RequestOp{read}}
	c.record([]Input{{Kind: Swap, Key: key, Value: value, Expect: expect}}, func(out []Output) error {
		resp, err := c.service.Txn(ctx, request)
		if err != nil {
			return err
		}
		out[0] = Output{Revision: resp.Header.Revision, Succeeded: resp.Succeeded}
		if c.known[key] = value; !resp.Succeeded {
			out[0].Seen = first(resp.Responses[0].GetResponseRange().Kvs)
			c.known[key] = out[0].Seen.Value
		}
		return nil
	})
}

func putOp(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func first(kvs []*mvccpb.KeyValue) KV {
	if len(kvs) == 0 {
		return KV{}
	}
	return seen(kvs[0])
}

func seen(kv *mvccpb.KeyValue) KV {
	if kv == nil {
		return KV{}
	}
	return KV{Found: true, Value: string(kv.Value), Create: kv.CreateRevision, Mod: kv.ModRevision, Version: kv.Version}
}
