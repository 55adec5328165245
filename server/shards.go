package server

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"

	"kvd/ring"
)

// groupOf is the group that has a key.
func (r *router) groupOf(key []byte) (uint64, error) {
	if !r.sharded {
		return userGroup, nil
	}
	if len(r.cfg.Groups.All()) == 0 {
		return 0, notJoined()
	}
	return r.cfg.Groups.Group(key), nil
}

// groupOfRange is the group that has all keys of a range; one is false if
// there may be several.
func (r *router) groupOfRange(key, end []byte) (group uint64, one bool, err error) {
	if group, err = r.groupOf(key); err != nil || !r.sharded {
		return group, true, err
	}
	return group, len(r.cfg.Groups.All()) == 1 || oneGroup(key, end), nil
}

// oneGroup reports whether all keys of a range are in the group of the first
// one: because there is no other, or because they all have its tag.
func oneGroup(key, end []byte) bool {
	switch {
	case len(end) == 0:
		return true
	case len(end) == 1 && end[0] == 0: // without an end
		return false
	case bytes.Compare(end, key) <= 0, bytes.Equal(end, after(key)):
		return true
	}
	tag := ring.Tag(key)
	if len(tag) == len(key) {
		return false
	}
	prefix := key[:bytes.IndexByte(key, '{')+len(tag)+2]
	last := len(prefix) - 1 // the closing brace
	next := append(bytes.Clone(prefix[:last]), prefix[last]+1)
	return bytes.Compare(end, next) <= 0
}

// after is the key that comes next.
func after(key []byte) []byte { return append(bytes.Clone(key), 0) }

// shardNumber is what people call a group.
func shardNumber(group uint64) uint64 { return group - 1 }

// groupOfTxn is the group of all keys of a transaction; none is true if it is
// sharded and the transaction has no keys at all.
func (r *router) groupOfTxn(t *pb.TxnRequest) (group uint64, none bool, err error) {
	if !r.sharded {
		return userGroup, false, nil
	}
	if len(r.cfg.Groups.All()) == 0 {
		return 0, false, notJoined()
	}
	k := txnKeys{router: r}
	k.txn(t)
	switch {
	case len(k.groups) > 1 || k.spanning != "":
		return 0, false, k.refusal()
	case len(k.groups) == 0:
		return 0, true, nil
	}
	return k.groups[0], false, nil
}

// txnOfNothing answers a transaction without keys. It says no more than what
// the newest revision is, which no shard knows.
func (s *kv) txnOfNothing(ctx context.Context, t *pb.TxnRequest) (*pb.TxnResponse, error) {
	newest, err := s.router.latest(ctx)
	if err != nil {
		return nil, err
	}
	resp := succeeded(t)
	resp.Header.Revision = newest
	return resp, nil
}

// succeeded is the answer to a transaction of nothing but nested ones.
func succeeded(t *pb.TxnRequest) *pb.TxnResponse {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: true}
	for _, op := range t.Success {
		resp.Responses = append(resp.Responses, &pb.ResponseOp{
			Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: succeeded(op.GetRequestTxn())},
		})
	}
	return resp
}

// txnKeys collects the groups of a transaction, and a key of each, as far as a
// refusal names them.
type txnKeys struct {
	router   *router
	groups   []uint64
	keys     []string
	spanning string // a range over several shards
}

// namedShards is how many shards a refusal names.
const namedShards = 4

func (k *txnKeys) txn(t *pb.TxnRequest) {
	for _, c := range t.GetCompare() {
		k.add(c.GetKey(), c.GetRangeEnd())
	}
	for _, branch := range [][]*pb.RequestOp{t.GetSuccess(), t.GetFailure()} {
		for _, op := range branch {
			k.op(op)
		}
	}
}

func (k *txnKeys) op(op *pb.RequestOp) {
	switch op := op.GetRequest().(type) {
	case *pb.RequestOp_RequestRange:
		k.add(op.RequestRange.GetKey(), op.RequestRange.GetRangeEnd())
	case *pb.RequestOp_RequestPut:
		k.add(op.RequestPut.GetKey(), nil)
	case *pb.RequestOp_RequestDeleteRange:
		k.add(op.RequestDeleteRange.GetKey(), op.RequestDeleteRange.GetRangeEnd())
	case *pb.RequestOp_RequestTxn:
		k.txn(op.RequestTxn)
	}
}

func (k *txnKeys) add(key, end []byte) {
	group, one, err := k.router.groupOfRange(key, end)
	switch {
	case err != nil: // the map is known, and does not get lost
	case !one && k.spanning == "":
		k.spanning = fmt.Sprintf("the range from %s to %s has keys in all shards", quoted(key), quoted(end))
	case one && len(k.groups) < namedShards:
		for _, known := range k.groups {
			if known == group {
				return
			}
		}
		k.groups = append(k.groups, group)
		k.keys = append(k.keys, quoted(key))
	}
}

// quoted keeps a message short, whatever the key.
func quoted(key []byte) string {
	const most = 64
	if len(key) > most {
		return fmt.Sprintf("%q...", key[:most])
	}
	return fmt.Sprintf("%q", key)
}

func (k *txnKeys) refusal() error {
	why := k.spanning
	if why == "" {
		var named []string
		for i, group := range k.groups {
			named = append(named, fmt.Sprintf("key %s is in shard %d", k.keys[i], shardNumber(group)))
		}
		why = strings.Join(named, ", ")
	}
	return kvdError(codes.InvalidArgument, ReasonCrossShard,
		"a transaction that writes must compare and write within one shard, and read elsewhere after its writes, but "+why+": keys with the same {tag} in their names, such as {user42}/cart and {user42}/name, share a shard")
}
