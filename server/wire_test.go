package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Whatever a node sends, the answer is one, and nothing is read that it did not
// ask for properly.
func TestMalformedCallsOfShardedReads(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	w.put("n1", w.keyIn(1, "k"), "v")
	handlers := w.servers["n1"].Handlers()
	valid := func(p *pageRequest) []byte {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		payload, err := p.encode(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return payload
	}
	key := &pb.RangeRequest{Key: []byte("k")}
	page := valid(&pageRequest{group: 1, lead: true, r: key})
	gateOf := func(at int64, groups ...uint64) []byte {
		b := append([]byte{protocolVersion}, make([]byte, 12)...)
		binary.BigEndian.PutUint64(b[1:], uint64(at))
		binary.BigEndian.PutUint32(b[9:], 1000)
		for _, g := range groups {
			b = binary.BigEndian.AppendUint64(b, g)
		}
		return b
	}
	many := make([]uint64, maxGateGroups+1)
	for i := range many {
		many[i] = uint64(i)
	}
	txn := append([]byte{protocolVersion, 0}, make([]byte, 20)...)
	txn[9], txn[11] = 1, 1
	write, err := proto.Marshal(&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: putData(t, "k", "v")}}}})
	if err != nil {
		t.Fatal(err)
	}
	fixed := func(n int, group byte) []byte { // with a timeout
		b := make([]byte, n)
		b[0], b[8], b[10] = protocolVersion, group, 1
		return b
	}
	for name, test := range map[string]struct {
		method  string
		payload []byte
		want    code
	}{
		"page":                      {methodPage, page, codeOK},
		"empty page":                {methodPage, nil, codeMalformed},
		"cut off page":              {methodPage, page[:len(page)-1], codeMalformed},
		"page of another version":   {methodPage, append([]byte{9}, page[1:]...), codeMalformed},
		"page without key":          {methodPage, valid(&pageRequest{group: 1, r: &pb.RangeRequest{}}), codeMalformed},
		"page sorted by what":       {methodPage, valid(&pageRequest{group: 1, whole: true, r: &pb.RangeRequest{Key: []byte("k"), SortTarget: 99}}), codeMalformed},
		"page at a negative newest": {methodPage, valid(&pageRequest{group: 1, current: -1, r: key}), codeMalformed},
		"page of another's group":   {methodPage, valid(&pageRequest{group: 2, r: key}), codeNotLeader},
		"page of the map":           {methodPage, valid(&pageRequest{group: 0, lead: true, r: key}), codeNotLeader},
		"page of no group":          {methodPage, valid(&pageRequest{group: 99, r: key}), codeNotLeader},
		"page in the future":        {methodPage, valid(&pageRequest{group: 1, r: &pb.RangeRequest{Key: []byte("k"), Revision: 99}}), codeRefused},
		"page of an unknown index":  {methodPage, valid(&pageRequest{group: 1, index: 99, r: key}), codeNotLeader},
		"gates":                     {methodGate, gateOf(1, 1, 2, 99), codeOK},
		"no gates":                  {methodGate, gateOf(1), codeMalformed},
		"empty gates":               {methodGate, nil, codeMalformed},
		"gates at nothing":          {methodGate, gateOf(0, 1), codeMalformed},
		"gates at less":             {methodGate, gateOf(-5, 1), codeMalformed},
		"the same gate twice":       {methodGate, gateOf(1, 2, 2), codeMalformed},
		"cut off gates":             {methodGate, gateOf(1, 1, 2)[:gateHeader+9], codeMalformed},
		"too many gates":            {methodGate, gateOf(1, many...), codeMalformed},
		"transaction":               {methodReadTxn, txn, codeOK},
		"empty transaction":         {methodReadTxn, nil, codeMalformed},
		"transaction that writes":   {methodReadTxn, append(bytes.Clone(txn), write...), codeMalformed},
		"garbage of a transaction":  {methodReadTxn, append(bytes.Clone(txn), "garbage"...), codeMalformed},
		"empty rows":                {methodRows, nil, codeMalformed},
		"rows":                      {methodRows, fixed(rowsHeader, 1), codeOK},
		"rows of another's group":   {methodRows, fixed(rowsHeader, 2), codeNotLeader},
		"empty leases":              {methodLeases, nil, codeMalformed},
		"long leases":               {methodLeases, fixed(leasesHeader+1, 1), codeMalformed},
		"leases":                    {methodLeases, fixed(leasesHeader, 1), codeOK},
		"leases of another's group": {methodLeases, fixed(leasesHeader, 2), codeNotLeader},
		"empty hash":                {methodHash, nil, codeMalformed},
		"long hash":                 {methodHash, fixed(hashHeader+1, 1), codeMalformed},
		"hash":                      {methodHash, fixed(hashHeader, 1), codeOK},
		"hash of another's group":   {methodHash, fixed(hashHeader, 2), codeNotLeader},
	} {
		t.Run(name, func(t *testing.T) {
			reply, err := handlers[test.method](t.Context(), "n2", test.payload)
			if err != nil || len(reply) < answerHeader || code(reply[1]) != test.want {
				t.Fatalf("reply %v, %v; want code %d", reply, err, test.want)
			}
		})
	}
	g := seeded(t)
	for range 20_000 {
		for method, h := range handlers {
			payload := make([]byte, g.IntN(60))
			for i := range payload {
				payload[i] = byte(g.IntN(3))
			}
			if len(payload) > 0 {
				payload[0] = protocolVersion
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // what is understood by chance must not be waited for
			if _, err := h(ctx, "n2", payload); err != nil {
				t.Fatalf("%s %v: %v", method, payload, err)
			}
		}
	}
}

// Answers that contradict the request are not believed: the merge relies on
// their order, and on coming to an end.
func TestBadPages(t *testing.T) {
	kvs := func(keys ...string) (list []*mvccpb.KeyValue) {
		for _, k := range keys {
			list = append(list, &mvccpb.KeyValue{Key: []byte(k)})
		}
		return list
	}
	p := &pageRequest{r: &pb.RangeRequest{Key: []byte("b"), RangeEnd: []byte("x")}}
	for name, test := range map[string]struct {
		page page
		good bool
	}{
		"empty":            {page{}, true},
		"in order":         {page{kvs: kvs("b", "c"), next: []byte("d")}, true},
		"all filtered":     {page{next: []byte("d")}, true},
		"out of order":     {page{kvs: kvs("c", "b")}, false},
		"twice":            {page{kvs: kvs("c", "c")}, false},
		"before the range": {page{kvs: kvs("a")}, false},
		"beyond the next":  {page{kvs: kvs("c"), next: []byte("c")}, false},
		"no progress":      {page{next: []byte("b")}, false},
		"backwards":        {page{next: []byte("a")}, false},
	} {
		reply, err := test.page.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.decode(reply[answerHeader:]); (err == nil) != test.good || err != nil && !errors.Is(err, errBadAnswer) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good, err := (&page{kvs: kvs("b", "c"), next: []byte("d"), count: 3, revision: 4, index: 5}).encode()
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(good) - answerHeader {
		_, _ = p.decode(good[answerHeader:][:n]) // must not panic
	}
	g := seeded(t)
	for range 100_000 {
		b := bytes.Clone(good[answerHeader:])
		for range 1 + g.IntN(3) {
			b[g.IntN(len(b))] = byte(g.Uint32())
		}
		_, _ = p.decode(b)
	}
}

func TestBadGates(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	r := w.servers["n1"].router
	ok := func(index uint64) []byte { return binary.BigEndian.AppendUint64([]byte{byte(codeOK)}, index) }
	for name, test := range map[string]struct {
		body   []byte
		passed int
		bad    bool
	}{
		"both":             {append(ok(1), ok(2)...), 2, false},
		"one, with a hint": {append(ok(1), byte(codeNotLeader), 2, 'n', '3'), 1, false},
		"nothing":          {nil, 0, true},
		"only one":         {ok(1), 0, true},
		"too many":         {append(append(ok(1), ok(2)...), ok(3)...), 0, true},
		"cut off index":    {append(ok(1), ok(2)[:8]...), 0, true},
		"cut off hint":     {append(ok(1), byte(codeNotLeader), 200, 'n'), 0, true},
	} {
		passed, err := r.readGates("n2", []uint64{1, 2}, test.body)
		if len(passed) != test.passed || errors.Is(err, errBadAnswer) != test.bad || test.passed < 2 && err == nil {
			t.Errorf("%s: %v, %v", name, passed, err)
		}
	}
}

// A copy for another group must not lose what a later API adds.
func TestSameKeysCopiesEverything(t *testing.T) {
	full := &pb.RangeRequest{}
	fields := full.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		value := protoreflect.ValueOfInt64(int64(i) + 1)
		switch f.Kind() {
		case protoreflect.BytesKind:
			value = protoreflect.ValueOfBytes([]byte{byte(i + 1)})
		case protoreflect.BoolKind:
			value = protoreflect.ValueOfBool(true)
		case protoreflect.EnumKind:
			value = protoreflect.ValueOfEnum(1)
		}
		full.ProtoReflect().Set(f, value)
	}
	if got := sameKeys(full); !proto.Equal(got, full) {
		t.Fatalf("%v is copied as %v", full, got)
	}
}

// Large answers are put together in bounded memory, and shed beyond that.
func TestAnswersOverShardsAreBounded(t *testing.T) {
	const valueBytes = 100 << 10
	w := newWorld(t, 3, 4, 1, func(c *Config) { c.MaxAnswerBytes = 24 * valueBytes })
	for i := range 40 {
		w.put("n1", fmt.Sprintf("k%02d", i), strings.Repeat("v", valueBytes))
	}
	kv := w.kv("n1")
	for name, r := range map[string]*pb.RangeRequest{
		"all":    wholeRange,
		"sorted": {Key: []byte{0}, RangeEnd: []byte{0}, SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_DESCEND},
		"top":    {Key: []byte{0}, RangeEnd: []byte{0}, SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_DESCEND, Limit: 30},
	} {
		if _, err := kv.Range(t.Context(), r); status.Code(err) != codes.ResourceExhausted || reasonOf(err) != ReasonBusy {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range map[string]*pb.RangeRequest{
		"limited":   {Key: []byte{0}, RangeEnd: []byte{0}, Limit: 2},
		"keys only": {Key: []byte{0}, RangeEnd: []byte{0}, KeysOnly: true},
		"counted":   {Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true},
		"the last":  {Key: []byte{0}, RangeEnd: []byte{0}, SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_DESCEND, KeysOnly: true, Limit: 1},
	} {
		resp, err := kv.Range(t.Context(), r)
		if err != nil || resp.Count != 40 {
			t.Errorf("%s: %v, %v", name, resp.GetCount(), err)
		}
	}
	// A stream gives back what it has sent.
	for _, s := range w.servers {
		s.router.sizes = pageSizes{firstKeys: 1, pageBytes: valueBytes, wholeBytes: valueBytes, mergeBytes: 4 * valueBytes}
	}
	c := &chunks{ctx: t.Context()}
	if err := w.servers["n1"].kv.RangeStream(wholeRange, c); err != nil {
		t.Fatal(err)
	}
	keys := 0
	for _, chunk := range c.all {
		keys += len(chunk.Kvs)
	}
	if keys != 40 {
		t.Fatalf("streamed %d keys", keys)
	}
}

// A transaction that reads more than a message may have is refused, wherever it
// is asked.
func TestLargeReadTransactionElsewhere(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	for _, s := range w.servers {
		s.router.sizes.wholeBytes = 1000
	}
	for i := range 10 {
		w.put("n1", fmt.Sprint("{t}", i), strings.Repeat("v", 200))
	}
	txn := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("{t}"), RangeEnd: []byte("{t~")}}}}}
	refused := 0
	for _, node := range w.nodes {
		_, err := w.kv(node).Txn(t.Context(), txn)
		if err != nil && reasonOf(err) != ReasonTooMuchRead {
			t.Error(err)
		}
		if err != nil {
			refused++
		}
		if resp, err := w.kv(node).Range(t.Context(), txn.Success[0].GetRequestRange()); err != nil || len(resp.Kvs) != 10 {
			t.Errorf("%v, %v", resp, err)
		}
	}
	if refused != 2 {
		t.Errorf("refused by %d nodes", refused)
	}
}

// Other nodes cannot make this one wait for any number of gates.
func TestGatesAreBounded(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	r := w.servers["n1"].router
	r.gating.Store(maxGating)
	_, err := r.askGates(t.Context(), "n2", 1, []uint64{2})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.servers["n2"].router.askGates(t.Context(), "n1", 1, []uint64{1})
	if err == nil {
		t.Fatal("one more gate")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := w.kv("n2").Range(t.Context(), wholeRange); err != nil {
			t.Error(err)
		}
	}()
	for w.callsOf(methodGate) < 4 { // told to come back
		time.Sleep(time.Millisecond)
	}
	r.gating.Store(0)
	<-done
	if n := r.gating.Load(); n != 0 {
		t.Fatalf("%d gates are left", n)
	}
}

// Many reads of all shards at once share cuts.
func TestReadsShareCuts(t *testing.T) {
	w := newWorld(t, 3, 6, 2, nil)
	var latest sync.Mutex
	cuts := 0
	w.onLatest = func() {
		latest.Lock()
		defer latest.Unlock()
		cuts++
	}
	var reading sync.WaitGroup
	for range 500 {
		reading.Go(func() {
			if _, err := w.kv("n1").Range(t.Context(), wholeRange); err != nil {
				t.Error(err)
			}
		})
	}
	reading.Wait()
	if cuts >= 250 {
		t.Errorf("500 reads at once made %d cuts", cuts)
	}
}
