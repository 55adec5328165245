package compare

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
)

// coverage counts what a comparison has really put to the test, judged by the reference's answers. Without it, two
// servers that refuse everything would be equal.
type coverage map[string]int

// required lists what every comparison must have met at least once.
func required() []string {
	all := []string{
		"put", "put with prev_kv", "put with ignore_value", "put with ignore_lease",
		"delete", "delete nothing", "delete several", "delete with prev_kvs",
		"compact", "compact physically", "hash",
		"range", "range of several", "range at an old revision", "range serializable", "range more", "range all under a limit",
		"range from key", "range keys only", "range count only", "range count beyond limit", "range bounded by revisions",
		"range negative limit",
		"stream", "stream more", "stream of many", "stream at an old revision", "stream count only",
		"txn read only", "txn writes", "txn reads own put", "txn reads own delete", "txn nested", "txn twice nested", "txn wide",
		"compare range", "compare unknown result", "compare unknown target", "compare without operand",
		"oversize taken",
	}
	for _, order := range pb.RangeRequest_SortOrder_name {
		for _, target := range pb.RangeRequest_SortTarget_name {
			all = append(all, fmt.Sprintf("sort %s %s", order, target))
		}
	}
	for _, target := range pb.Compare_CompareTarget_name {
		for _, result := range pb.Compare_CompareResult_name {
			all = append(all, fmt.Sprintf("compare %s %s true", target, result), fmt.Sprintf("compare %s %s false", target, result))
		}
	}
	for request, errs := range map[string][]error{
		"RangeRequest": {
			rpctypes.ErrGRPCEmptyKey, rpctypes.ErrGRPCInvalidSortOption, rpctypes.ErrGRPCCompacted, rpctypes.ErrGRPCFutureRev,
		},
		"PutRequest": {
			rpctypes.ErrGRPCEmptyKey, rpctypes.ErrGRPCValueProvided, rpctypes.ErrGRPCLeaseProvided, rpctypes.ErrGRPCKeyNotFound,
			rpctypes.ErrGRPCLeaseNotFound, rpctypes.ErrGRPCRequestTooLarge,
		},
		"DeleteRangeRequest": {rpctypes.ErrGRPCEmptyKey},
		"TxnRequest": {
			rpctypes.ErrGRPCEmptyKey, rpctypes.ErrGRPCTooManyOps, rpctypes.ErrGRPCDuplicateKey, rpctypes.ErrGRPCInvalidSortOption,
			rpctypes.ErrGRPCCompacted, rpctypes.ErrGRPCFutureRev, rpctypes.ErrGRPCKeyNotFound, rpctypes.ErrGRPCValueProvided,
			rpctypes.ErrGRPCLeaseNotFound, rpctypes.ErrGRPCRequestTooLarge,
		},
		"CompactionRequest": {rpctypes.ErrGRPCCompacted, rpctypes.ErrGRPCFutureRev},
		"HashKVRequest":     {rpctypes.ErrGRPCCompacted, rpctypes.ErrGRPCFutureRev},
	} {
		for _, err := range errs {
			a := refusal(err)
			all = append(all, refused(request, a))
		}
	}
	return append(all, "PutRequest refused: message too large", "RangeRequest refused: "+codes.Unimplemented.String())
}

func refused(request string, a answer) string {
	return fmt.Sprintf("%s refused: %v %s", request, a.code, a.message)
}

// missing returns what is required and was not met.
func (c coverage) missing() []string {
	var missing []string
	for _, label := range required() {
		if c[label] == 0 {
			missing = append(missing, label)
		}
	}
	slices.Sort(missing)
	return missing
}

// rarest returns the n labels met least often, of those required.
func (c coverage) rarest(n int) string {
	labels := required()
	slices.SortFunc(labels, func(a, b string) int { return cmp.Compare(c[a], c[b]) })
	var out bytes.Buffer
	for _, label := range labels[:n] {
		fmt.Fprintf(&out, "%6d %s\n", c[label], label)
	}
	return out.String()
}

// when counts the label if the condition holds.
func (c coverage) when(condition bool, label string) {
	if condition {
		c[label]++
	}
}

// note counts what one call and the reference's answer have covered.
func (c coverage) note(what call, a answer) {
	if a.response == nil {
		c.noteRefusal(what, a)
		return
	}
	switch r := what.request.(type) {
	case *pb.RangeRequest:
		c.noteRange(r, a.response.(*pb.RangeResponse), what.stream)
	case *pb.PutRequest:
		response := a.response.(*pb.PutResponse)
		c["put"]++
		c.when(len(r.Value) > maxRequestBytes/2, "oversize taken")
		c.when(response.PrevKv != nil, "put with prev_kv")
		c.when(r.IgnoreValue, "put with ignore_value")
		c.when(r.IgnoreLease, "put with ignore_lease")
	case *pb.DeleteRangeRequest:
		response := a.response.(*pb.DeleteRangeResponse)
		c.when(response.Deleted > 0, "delete")
		c.when(response.Deleted > 1, "delete several")
		c.when(response.Deleted == 0, "delete nothing")
		c.when(len(response.PrevKvs) > 0, "delete with prev_kvs")
	case *pb.TxnRequest:
		c.noteTxn(what, r, a.response.(*pb.TxnResponse), 0)
	case *pb.CompactionRequest:
		c["compact"]++
		c.when(r.Physical, "compact physically")
	case *pb.HashKVRequest:
		c["hash"]++
	}
}

func (c coverage) noteRefusal(what call, a answer) {
	request := string(what.request.ProtoReflect().Descriptor().Name())
	c[refused(request, a)]++
	c.when(a.code == codes.Unimplemented, request+" refused: "+codes.Unimplemented.String())
	c.when(a.code == codes.ResourceExhausted, request+" refused: message too large")
}

func (c coverage) noteRange(r *pb.RangeRequest, response *pb.RangeResponse, stream bool) {
	n, old := len(response.Kvs), r.Revision > 0 && r.Revision < response.Header.Revision
	if stream {
		c["stream"]++
		c.when(response.More, "stream more")
		c.when(n > 10, "stream of many")
		c.when(old && n > 0, "stream at an old revision")
		c.when(r.CountOnly && response.Count > 0, "stream count only")
		return
	}
	c["range"]++
	c.when(n > 1, "range of several")
	c.when(old && n > 0, "range at an old revision")
	c.when(r.Serializable, "range serializable")
	c.when(response.More, "range more")
	c.when(r.Limit > 0 && n > 1 && !response.More, "range all under a limit")
	c.when(r.Limit < 0 && n > 1, "range negative limit")
	c.when(bytes.Equal(r.RangeEnd, []byte{0}) && n > 1, "range from key")
	c.when(r.KeysOnly && n > 0, "range keys only")
	c.when(r.CountOnly && response.Count > 0, "range count only")
	c.when(r.Limit > 0 && response.Count > r.Limit, "range count beyond limit")
	bounds := []int64{r.MinModRevision, r.MaxModRevision, r.MinCreateRevision, r.MaxCreateRevision}
	c.when(n > 0 && slices.Max(bounds) > 0 && response.Count > int64(n), "range bounded by revisions")
	c.when(n > 2, fmt.Sprintf("sort %s %s", r.SortOrder, r.SortTarget))
}

func (c coverage) noteTxn(what call, r *pb.TxnRequest, response *pb.TxnResponse, depth int) {
	branch := r.Success
	if !response.Succeeded {
		branch = r.Failure
	}
	if depth == 0 {
		c.when(!mutates(what), "txn read only")
	}
	c.when(len(branch) >= maxTxnOps-1, "txn wide")
	c.when(depth == 1, "txn nested")
	c.when(depth == 2, "txn twice nested")
	if len(r.Compare) == 1 {
		c.noteCompare(r.Compare[0], response.Succeeded)
	}
	written := map[string]string{}
	for i, op := range branch {
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			c["txn writes"]++
			written[string(o.RequestPut.Key)] = "txn reads own put"
			c.when(len(o.RequestPut.Value) > maxRequestBytes/2, "oversize taken")
		case *pb.RequestOp_RequestDeleteRange:
			if response.Responses[i].GetResponseDeleteRange().Deleted > 0 {
				written[string(o.RequestDeleteRange.Key)] = "txn reads own delete"
			}
		case *pb.RequestOp_RequestRange:
			if label := written[string(o.RequestRange.Key)]; label != "" {
				c[label]++
			}
		case *pb.RequestOp_RequestTxn:
			c.noteTxn(what, o.RequestTxn, response.Responses[i].GetResponseTxn(), depth+1)
		}
	}
}

// noteCompare counts a compare that alone decided which branch was taken.
func (c coverage) noteCompare(compare *pb.Compare, held bool) {
	c.when(len(compare.RangeEnd) > 0, "compare range")
	c.when(compare.Result > pb.Compare_NOT_EQUAL, "compare unknown result")
	c.when(compare.Target > pb.Compare_LEASE, "compare unknown target")
	c.when(compare.TargetUnion == nil, "compare without operand")
	c[fmt.Sprintf("compare %s %s %v", compare.Target, compare.Result, held)]++
}
