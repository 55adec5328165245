package fsm

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// model is a key space as one would explain it: for each revision, a whole map of what exists then.
type model struct {
	states    []map[string]*mvccpb.KeyValue // by revision; 0 and 1 are empty
	compacted int64
	used      int64                // newest revision of a change
	reserved  bool                 // revisions are reserved outside, and have gaps
	leases    map[int64]*LeaseInfo // without Keys: those follow from the newest state
	drops     []drop               // all there ever were
	maxDrops  int
	index     uint64 // of the entry
	place     int    // in it
}

func newModel() *model {
	return &model{states: make([]map[string]*mvccpb.KeyValue, 2), compacted: -1, used: 1, leases: map[int64]*LeaseInfo{}, maxDrops: rememberedDrops}
}

func (m *model) revision() int64 { return int64(len(m.states) - 1) }

// reserve makes rev the revision of the next change.
func (m *model) reserve(rev int64) {
	for m.reserved = true; m.revision() < rev-1; {
		m.states = append(m.states, m.states[m.revision()])
	}
}

// attempt is a transaction under way: the state it has made, and how many changes.
type attempt struct {
	*model
	state   map[string]*mvccpb.KeyValue
	changes int
}

func (m *model) begin() *attempt {
	return &attempt{model: m, state: maps.Clone(m.states[m.revision()])}
}

// now is the revision that the transaction's own reads see.
func (a *attempt) now() int64 {
	if a.changes > 0 {
		return a.revision() + 1
	}
	return a.revision()
}

func (a *attempt) commit() {
	if a.changes > 0 {
		a.states = append(a.states, a.state)
		a.used = a.revision()
	}
}

func inRange(key string, start, end []byte) bool {
	switch {
	case len(end) == 0:
		return key == string(start)
	case bytes.Equal(end, []byte{0}):
		return key >= string(start)
	}
	return key >= string(start) && key < string(end)
}

// find returns copies of what exists in a range, by key.
func find(state map[string]*mvccpb.KeyValue, start, end []byte) []*mvccpb.KeyValue {
	kvs := []*mvccpb.KeyValue{}
	for _, key := range slices.Sorted(maps.Keys(state)) {
		if inRange(key, start, end) {
			kvs = append(kvs, proto.Clone(state[key]).(*mvccpb.KeyValue))
		}
	}
	return kvs
}

func (a *attempt) rangeKeys(r *pb.RangeRequest) (*pb.RangeResponse, error) {
	state := a.state
	switch {
	case r.Revision > a.now():
		return nil, ErrFutureRevision
	case r.Revision > 0 && r.Revision < a.compacted:
		return nil, ErrCompacted
	case r.Revision > 0 && r.Revision <= a.revision():
		state = a.states[r.Revision]
	}
	kvs := find(state, r.Key, r.RangeEnd)
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: a.now()}, Count: int64(len(kvs))}
	if r.CountOnly {
		return resp, nil
	}
	ordered := r.SortOrder != pb.RangeRequest_NONE && (r.SortTarget != pb.RangeRequest_KEY || r.SortOrder != pb.RangeRequest_ASCEND)
	filtered := r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
	if !ordered && !filtered && r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs = kvs[:r.Limit+1]
	}
	kvs = slices.DeleteFunc(kvs, func(kv *mvccpb.KeyValue) bool {
		return kv.ModRevision < r.MinModRevision || kv.CreateRevision < r.MinCreateRevision ||
			r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
			r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision
	})
	sort.Sort(byTarget{kvs, r.SortTarget, r.SortOrder == pb.RangeRequest_DESCEND})
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, resp.More = kvs[:r.Limit], true
	}
	for _, kv := range kvs {
		if r.KeysOnly {
			kv.Value = nil
			if r.SortTarget != pb.RangeRequest_VALUE {
				kv.Lease = 0
			}
		}
	}
	resp.Kvs = kvs
	return resp, nil
}

type byTarget struct {
	kvs     []*mvccpb.KeyValue
	target  pb.RangeRequest_SortTarget
	descend bool
}

func (s byTarget) Len() int      { return len(s.kvs) }
func (s byTarget) Swap(i, j int) { s.kvs[i], s.kvs[j] = s.kvs[j], s.kvs[i] }
func (s byTarget) Less(i, j int) bool {
	if s.descend {
		i, j = j, i
	}
	a, b := s.kvs[i], s.kvs[j]
	switch s.target {
	case pb.RangeRequest_VERSION:
		return a.Version < b.Version
	case pb.RangeRequest_CREATE:
		return a.CreateRevision < b.CreateRevision
	case pb.RangeRequest_MOD:
		return a.ModRevision < b.ModRevision
	case pb.RangeRequest_VALUE:
		return bytes.Compare(a.Value, b.Value) < 0
	}
	return bytes.Compare(a.Key, b.Key) < 0
}

func (a *attempt) checkPut(p *pb.PutRequest) error {
	if l := a.leases[p.Lease]; p.Lease != 0 && (l == nil || l.Ending) {
		return ErrLeaseNotFound
	}
	if _, exists := a.states[a.revision()][string(p.Key)]; !exists && (p.IgnoreValue || p.IgnoreLease) {
		return ErrKeyNotFound
	}
	return nil
}

func (a *attempt) put(p *pb.PutRequest) *pb.PutResponse {
	kv := &mvccpb.KeyValue{Key: p.Key, Value: p.Value, Lease: p.Lease, CreateRevision: a.revision() + 1, ModRevision: a.revision() + 1, Version: 1}
	resp := &pb.PutResponse{}
	if prev, ok := a.state[string(p.Key)]; ok {
		kv.CreateRevision, kv.Version = prev.CreateRevision, prev.Version+1
		if p.IgnoreValue {
			kv.Value = prev.Value
		}
		if p.IgnoreLease {
			kv.Lease = prev.Lease
		}
		if p.PrevKv {
			resp.PrevKv = prev
		}
	}
	a.changes++
	if a.state == nil {
		a.state = map[string]*mvccpb.KeyValue{}
	}
	a.state[string(p.Key)] = kv
	resp.Header = &pb.ResponseHeader{Revision: a.now()}
	return resp
}

func (a *attempt) deleteRange(d *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	kvs := find(a.state, d.Key, d.RangeEnd)
	for _, kv := range kvs {
		delete(a.state, string(kv.Key))
		a.changes++
	}
	resp := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{Revision: a.now()}, Deleted: int64(len(kvs))}
	if d.PrevKv {
		resp.PrevKvs = kvs
	}
	return resp
}

// decided maps each transaction of a tree to the outcome of its compares before any change.
type decided map[*pb.TxnRequest]bool

func (a *attempt) decide(r *pb.TxnRequest, all decided) {
	all[r] = true
	for _, c := range r.Compare {
		all[r] = all[r] && a.compare(c)
	}
	for _, op := range all.ops(r) {
		if t := op.GetRequestTxn(); t != nil {
			a.decide(t, all)
		}
	}
}

func (d decided) ops(r *pb.TxnRequest) []*pb.RequestOp {
	if d[r] {
		return r.Success
	}
	return r.Failure
}

func (a *attempt) compare(c *pb.Compare) bool {
	kvs := find(a.state, c.Key, c.RangeEnd)
	if len(kvs) == 0 {
		if c.Target == pb.Compare_VALUE {
			return false
		}
		kvs = append(kvs, &mvccpb.KeyValue{})
	}
	for _, kv := range kvs {
		order := map[pb.Compare_CompareTarget]int{
			pb.Compare_VERSION: cmp.Compare(kv.Version, c.GetVersion()),
			pb.Compare_CREATE:  cmp.Compare(kv.CreateRevision, c.GetCreateRevision()),
			pb.Compare_MOD:     cmp.Compare(kv.ModRevision, c.GetModRevision()),
			pb.Compare_VALUE:   bytes.Compare(kv.Value, c.GetValue()),
			pb.Compare_LEASE:   cmp.Compare(kv.Lease, c.GetLease()),
		}[c.Target]
		if !map[pb.Compare_CompareResult]bool{
			pb.Compare_EQUAL: order == 0, pb.Compare_NOT_EQUAL: order != 0, pb.Compare_LESS: order < 0, pb.Compare_GREATER: order > 0,
		}[c.Result] {
			return false
		}
	}
	return true
}

func (a *attempt) checkTxn(r *pb.TxnRequest, all decided) error {
	for _, op := range all.ops(r) {
		var err error
		if p := op.GetRequestPut(); p != nil {
			err = a.checkPut(p)
		} else if t := op.GetRequestTxn(); t != nil {
			err = a.checkTxn(t, all)
		} else if q := op.GetRequestRange(); q != nil {
			switch {
			case q.Revision > a.revision():
				err = ErrFutureRevision
			case q.Revision != 0 && q.Revision < a.compacted:
				err = ErrCompacted
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *attempt) execute(r *pb.TxnRequest, all decided) *pb.TxnResponse {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: all[r]}
	for _, op := range all.ops(r) {
		answer := &pb.ResponseOp{}
		if p := op.GetRequestPut(); p != nil {
			answer.Response = &pb.ResponseOp_ResponsePut{ResponsePut: a.put(p)}
		} else if d := op.GetRequestDeleteRange(); d != nil {
			answer.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: a.deleteRange(d)}
		} else if t := op.GetRequestTxn(); t != nil {
			answer.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: a.execute(t, all)}
		} else if q := op.GetRequestRange(); q != nil {
			r, err := a.rangeKeys(q)
			if err != nil {
				panic(err) // it was checked
			}
			answer.Response = &pb.ResponseOp_ResponseRange{ResponseRange: r}
		}
		resp.Responses = append(resp.Responses, answer)
	}
	return resp
}

func (a *attempt) txn(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	all := decided{}
	a.decide(r, all)
	if err := a.checkTxn(r, all); err != nil {
		return nil, err
	}
	resp := a.execute(r, all)
	resp.Header.Revision = a.now()
	return resp, nil
}

// apply is what the store should answer to a command.
func (m *model) apply(command proto.Message) Result {
	a := m.begin()
	var result Result
	switch c := command.(type) {
	case nil:
	case *pb.PutRequest:
		if result.Err = a.checkPut(c); result.Err == nil {
			result.Response = a.put(c)
		}
	case *pb.DeleteRangeRequest:
		result.Response = a.deleteRange(c)
	case *pb.TxnRequest:
		if resp, err := a.txn(c); err != nil {
			result.Err = err
		} else {
			result.Response = resp
		}
	case *pb.CompactionRequest:
		switch {
		case c.Revision <= m.compacted:
			result.Err = ErrCompacted
		case c.Revision > m.revision():
			result.Err = ErrFutureRevision
		default:
			m.compacted = c.Revision
			if m.reserved {
				m.states = append(m.states, m.states[m.revision()])
				m.used = m.revision()
			}
			result.Response = &pb.CompactionResponse{Header: &pb.ResponseHeader{Revision: m.revision()}}
		}
	default:
		result = a.lease(command)
	}
	a.commit()
	return result
}
