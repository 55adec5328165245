package server

import (
	"github.com/tidwall/btree"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// The checks of this file give etcd's answers, in etcd's order, before a
// request is routed anywhere.

func checkRange(r *pb.RangeRequest) error {
	if len(r.GetKey()) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	_, order := pb.RangeRequest_SortOrder_name[int32(r.SortOrder)]
	_, target := pb.RangeRequest_SortTarget_name[int32(r.SortTarget)]
	if !order || !target {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

func checkPut(r *pb.PutRequest) error {
	switch {
	case len(r.GetKey()) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

// checkForwardedRequest holds what another node proposes against the same rules as
// this one.
func checkForwardedRequest(request fsm.Request) error {
	switch request.Space {
	case fsm.User:
		return checkForwarded(request.Data)
	case fsm.LeaseCommands:
		if _, err := fsm.ParseLeaseCommand(request.Data); err == nil {
			return nil
		}
	}
	return errMalformed
}

// checkForwarded holds a write from another node against the same rules as a
// client's: the state machine halts at a command that it does not understand,
// on every replica and again after each restart. Operations are not counted,
// the nodes may disagree on limits.
func checkForwarded(data []byte) error {
	if put, n := protowire.ConsumeBytes(data[min(1, len(data)):]); len(data) > 0 && data[0] == putTag && n == len(data)-1 {
		var r pb.PutRequest
		if decodePut(put, &r) {
			if checkPut(&r) != nil {
				return errMalformed
			}
			return nil
		}
	}
	var r pb.InternalRaftRequest
	if err := proto.Unmarshal(data, &r); err != nil {
		return errMalformed
	}
	commands, err := 0, error(nil)
	if r.Put != nil {
		commands, err = commands+1, checkPut(r.Put)
	}
	if r.DeleteRange != nil {
		commands, err = commands+1, checkDelete(r.DeleteRange)
	}
	if r.Txn != nil {
		commands, err = commands+1, checkTxn(r.Txn, MaxMaxTxnOps)
	}
	if r.Compaction != nil {
		commands++
	}
	if r.LeaseGrant != nil {
		commands, err = commands+1, checkGrant(r.LeaseGrant)
	}
	if r.LeaseRevoke != nil {
		commands++
	}
	if err != nil || commands != 1 {
		return errMalformed
	}
	return nil
}

func checkGrant(r *pb.LeaseGrantRequest) error {
	if r.ID == 0 || r.TTL <= 0 || r.TTL > maxLeaseTTL {
		return errMalformed
	}
	return nil
}

func checkDelete(r *pb.DeleteRangeRequest) error {
	if len(r.GetKey()) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	return nil
}

// checkTxn bounds and checks a transaction, then looks for keys that it would
// write twice. The bound comes first: what it lets through is cheap to search.
func checkTxn(r *pb.TxnRequest, maxOps int) error {
	c := txnCheck{ops: max(maxAllOps, 3*maxOps), depth: maxTxnDepth}
	if err := c.txn(r, maxOps); err != nil {
		return err
	}
	for _, branch := range [][]*pb.RequestOp{r.GetSuccess(), r.GetFailure()} {
		if _, err := collectWrites(branch); err != nil {
			return err
		}
	}
	return nil
}

// What a transaction may have whose nested ones do not count: compares and
// operations in all, and levels. With DefaultMaxTxnOps that is as deep as it
// can be, and as much as a request can have that is not made to take time.
const (
	maxAllOps   = DefaultMaxTxnOps * DefaultMaxTxnOps
	maxTxnDepth = DefaultMaxTxnOps + 1
)

// txnCheck is what a transaction has left. Without it, nesting fits so many
// operations into one request that looking through them takes seconds.
type txnCheck struct{ ops, depth int }

// txn checks every operation. A nested transaction may have only as many
// operations as its parent has left, as in etcd.
func (c *txnCheck) txn(r *pb.TxnRequest, maxOps int) error {
	ops := max(len(r.GetCompare()), len(r.GetSuccess()), len(r.GetFailure()))
	c.ops -= len(r.GetCompare()) + len(r.GetSuccess()) + len(r.GetFailure())
	if ops > maxOps || c.ops < 0 || c.depth == 0 {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.GetCompare() {
		if len(c.GetKey()) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	c.depth--
	defer func() { c.depth++ }()
	for _, branch := range [][]*pb.RequestOp{r.GetSuccess(), r.GetFailure()} {
		for _, op := range branch {
			if err := c.op(op, maxOps-ops); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *txnCheck) op(op *pb.RequestOp, maxOps int) error {
	switch op := op.GetRequest().(type) {
	case *pb.RequestOp_RequestRange:
		return checkRange(op.RequestRange)
	case *pb.RequestOp_RequestPut:
		return checkPut(op.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		return checkDelete(op.RequestDeleteRange)
	case *pb.RequestOp_RequestTxn:
		return c.txn(op.RequestTxn, maxOps)
	default:
		return rpctypes.ErrGRPCKeyNotFound // etcd's answer for an empty operation
	}
}

// writes are the keys that a list of operations puts and deletes.
type writes struct {
	puts map[string]struct{}
	dels keyRanges
}

// collectWrites fails if the operations put a key twice, or put and delete it.
// The branches of one nested transaction exclude each other. As in etcd, a
// nested put is held against the deletes around and before it, not against
// those of later nested transactions.
func collectWrites(ops []*pb.RequestOp) (*writes, error) {
	w := &writes{puts: make(map[string]struct{})}
	for _, op := range ops {
		if del := op.GetRequestDeleteRange(); del != nil {
			w.dels.add(string(del.Key), string(del.RangeEnd))
		}
	}
	for _, op := range ops {
		if nested := op.GetRequestTxn(); nested != nil {
			if err := w.addNested(nested); err != nil {
				return nil, err
			}
		}
	}
	for _, op := range ops {
		if put := op.GetRequestPut(); put != nil {
			if err := w.addPut(string(put.Key), nil); err != nil {
				return nil, err
			}
		}
	}
	return w, nil
}

func (w *writes) addNested(r *pb.TxnRequest) error {
	success, err := collectWrites(r.Success)
	if err != nil {
		return err
	}
	failure, err := collectWrites(r.Failure)
	if err != nil {
		return err
	}
	for key := range success.puts {
		if err := w.addPut(key, nil); err != nil {
			return err
		}
	}
	for key := range failure.puts {
		if err := w.addPut(key, success.puts); err != nil {
			return err
		}
	}
	w.dels.union(&success.dels)
	w.dels.union(&failure.dels)
	return nil
}

// addPut records a put of a key, which may also be among the exclusive ones.
func (w *writes) addPut(key string, exclusive map[string]struct{}) error {
	_, twice := w.puts[key]
	_, allowed := exclusive[key]
	if twice && !allowed || w.dels.contains(key) {
		return rpctypes.ErrGRPCDuplicateKey
	}
	w.puts[key] = struct{}{}
	return nil
}

// keyRanges is a set of keys, kept as disjoint ranges [begin, end) and perhaps
// one without an end. The zero value is empty.
type keyRanges struct {
	ends btree.Map[string, string] // by begin
	open bool                      // all keys from tail on
	tail string
}

// add takes a request's key and range end. etcd's check overlooks the ranges
// without an end ("\x00"), and a key that such a transaction deletes and puts
// is then lost by a compaction at its revision; kvd refuses it like any other.
func (s *keyRanges) add(begin, end string) {
	switch end {
	case "":
		s.insert(begin, begin+"\x00")
	case "\x00":
		s.insertTail(begin)
	default:
		s.insert(begin, end)
	}
}

func (s *keyRanges) insertTail(begin string) {
	if !s.open || begin < s.tail {
		s.open, s.tail = true, begin
	}
}

func (s *keyRanges) insert(begin, end string) {
	if begin >= end {
		return
	}
	if b, e, ok := s.before(begin); ok && e >= begin {
		begin, end = b, max(e, end)
	}
	var merged []string
	s.ends.Ascend(begin, func(b, e string) bool {
		if b > end {
			return false
		}
		merged = append(merged, b)
		end = max(end, e)
		return true
	})
	for _, b := range merged {
		s.ends.Delete(b)
	}
	s.ends.Set(begin, end)
}

// before returns the last range that begins at or before key.
func (s *keyRanges) before(key string) (begin, end string, ok bool) {
	s.ends.Descend(key, func(b, e string) bool {
		begin, end, ok = b, e, true
		return false
	})
	return begin, end, ok
}

func (s *keyRanges) contains(key string) bool {
	_, end, ok := s.before(key)
	return ok && key < end || s.open && key >= s.tail
}

func (s *keyRanges) union(other *keyRanges) {
	other.ends.Scan(func(begin, end string) bool {
		s.insert(begin, end)
		return true
	})
	if other.open {
		s.insertTail(other.tail)
	}
}

// isReadOnly reports whether a transaction consists of ranges only.
func isReadOnly(r *pb.TxnRequest) bool {
	return everyOp(r, func(op *pb.RequestOp) bool { return op.GetRequestRange() != nil })
}

// isSerializable reports whether a read-only transaction asks for nothing but
// serializable ranges. Compares alone are linearizable: they have no flag to
// say otherwise.
func isSerializable(r *pb.TxnRequest) bool {
	return len(r.Success)+len(r.Failure) > 0 &&
		everyOp(r, func(op *pb.RequestOp) bool { return op.GetRequestRange().GetSerializable() })
}

// grows reports whether a transaction may put anything.
func grows(r *pb.TxnRequest) bool {
	return !everyOp(r, func(op *pb.RequestOp) bool {
		nested := op.GetRequestTxn()
		return op.GetRequestPut() == nil && (nested == nil || !grows(nested))
	})
}

func everyOp(r *pb.TxnRequest, holds func(*pb.RequestOp) bool) bool {
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range branch {
			if !holds(op) {
				return false
			}
		}
	}
	return true
}
