package server

import (
	"errors"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func opRange(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
}

func opPut(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}}
}

func opDelete(key, end string) *pb.RequestOp {
	r := &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
}

func opTxn(success, failure []*pb.RequestOp) *pb.RequestOp {
	r := &pb.TxnRequest{Success: success, Failure: failure}
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}}
}

func list(ops ...*pb.RequestOp) []*pb.RequestOp { return ops }

func repeated(n int, op *pb.RequestOp) []*pb.RequestOp {
	ops := make([]*pb.RequestOp, n)
	for i := range ops {
		ops[i] = op
	}
	return ops
}

func TestCheckTxn(t *testing.T) {
	deep := opRange("a")
	for range 127 {
		deep = opTxn(list(deep), nil)
	}
	for name, test := range map[string]struct {
		request *pb.TxnRequest
		want    error
	}{
		"empty":              {&pb.TxnRequest{}, nil},
		"most operations":    {&pb.TxnRequest{Success: repeated(128, opRange("a")), Failure: repeated(128, opRange("a"))}, nil},
		"too many success":   {&pb.TxnRequest{Success: repeated(129, opRange("a"))}, rpctypes.ErrGRPCTooManyOps},
		"too many failure":   {&pb.TxnRequest{Failure: repeated(129, opRange("a"))}, rpctypes.ErrGRPCTooManyOps},
		"too many compares":  {&pb.TxnRequest{Compare: make([]*pb.Compare, 129)}, rpctypes.ErrGRPCTooManyOps},
		"deepest":            {&pb.TxnRequest{Success: list(deep)}, nil},
		"too deep":           {&pb.TxnRequest{Success: list(opTxn(list(deep), nil))}, rpctypes.ErrGRPCTooManyOps},
		"most in all":        {&pb.TxnRequest{Success: repeated(62, opTxn(repeated(64, opTxn(repeated(2, opRange("a")), nil)), nil))}, nil},
		"too many in all":    {&pb.TxnRequest{Success: repeated(62, opTxn(repeated(63, opTxn(repeated(3, opRange("a")), repeated(3, opRange("a")))), nil))}, rpctypes.ErrGRPCTooManyOps},
		"nested above rest":  {&pb.TxnRequest{Success: list(opTxn(repeated(128, opRange("a")), nil))}, rpctypes.ErrGRPCTooManyOps},
		"nested in rest":     {&pb.TxnRequest{Success: list(opTxn(repeated(127, opRange("a")), nil))}, nil},
		"compare no key":     {&pb.TxnRequest{Compare: []*pb.Compare{{}}}, rpctypes.ErrGRPCEmptyKey},
		"put no key":         {&pb.TxnRequest{Success: list(opPut(""))}, rpctypes.ErrGRPCEmptyKey},
		"range no key":       {&pb.TxnRequest{Failure: list(opRange(""))}, rpctypes.ErrGRPCEmptyKey},
		"delete no key":      {&pb.TxnRequest{Success: list(opDelete("", "b"))}, rpctypes.ErrGRPCEmptyKey},
		"empty operation":    {&pb.TxnRequest{Success: list(&pb.RequestOp{})}, rpctypes.ErrGRPCKeyNotFound},
		"put twice":          {&pb.TxnRequest{Success: list(opPut("a"), opPut("a"))}, rpctypes.ErrGRPCDuplicateKey},
		"put in branches":    {&pb.TxnRequest{Success: list(opPut("a")), Failure: list(opPut("a"))}, nil},
		"put and delete":     {&pb.TxnRequest{Failure: list(opPut("b"), opDelete("a", "c"))}, rpctypes.ErrGRPCDuplicateKey},
		"put beside delete":  {&pb.TxnRequest{Success: list(opPut("c"), opDelete("a", "c"))}, nil},
		"delete twice":       {&pb.TxnRequest{Success: list(opDelete("a", "c"), opDelete("b", "d"))}, nil},
		"delete from key on": {&pb.TxnRequest{Success: list(opPut("b"), opDelete("a", "\x00"))}, rpctypes.ErrGRPCDuplicateKey},
		"put before it":      {&pb.TxnRequest{Success: list(opPut("a"), opDelete("b", "\x00"))}, nil},
		"nested from key on": {&pb.TxnRequest{Success: list(opPut("b"), opTxn(nil, list(opDelete("a", "\x00"))))}, rpctypes.ErrGRPCDuplicateKey},
		"delete nothing":     {&pb.TxnRequest{Success: list(opPut("b"), opDelete("c", "a"))}, nil},
		"nested put again":   {&pb.TxnRequest{Success: list(opPut("a"), opTxn(list(opPut("a")), nil))}, rpctypes.ErrGRPCDuplicateKey},
		"nested else again":  {&pb.TxnRequest{Success: list(opPut("a"), opTxn(nil, list(opPut("a"))))}, rpctypes.ErrGRPCDuplicateKey},
		"nested either":      {&pb.TxnRequest{Success: list(opTxn(list(opPut("a")), list(opPut("a"))))}, nil},
		"nested twice":       {&pb.TxnRequest{Success: list(opTxn(list(opPut("a")), nil), opTxn(nil, list(opPut("a"))))}, rpctypes.ErrGRPCDuplicateKey},
		"delete then put":    {&pb.TxnRequest{Success: list(opTxn(list(opDelete("a", "")), nil), opTxn(list(opPut("a")), nil))}, rpctypes.ErrGRPCDuplicateKey},
		"put then delete":    {&pb.TxnRequest{Success: list(opTxn(list(opPut("a")), nil), opTxn(list(opDelete("a", "")), nil))}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if err := checkTxn(test.request, 128); !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
		})
	}
}

// TestCheckTxnWithOtherLimits: few operations may all be used, and many do not multiply.
func TestCheckTxnWithOtherLimits(t *testing.T) {
	get := opRange("a")
	wide := func(n int) *pb.TxnRequest {
		r := &pb.TxnRequest{Success: repeated(n, get), Failure: repeated(n, get)}
		for range n {
			r.Compare = append(r.Compare, &pb.Compare{Key: []byte("a")})
		}
		return r
	}
	deep := func(n int) *pb.TxnRequest {
		r := &pb.TxnRequest{Success: list(get)}
		for range n {
			r = &pb.TxnRequest{Success: list(&pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}})}
		}
		return r
	}
	squared := &pb.TxnRequest{Success: repeated(300, opTxn(repeated(300, get), nil))}
	for name, test := range map[string]struct {
		request *pb.TxnRequest
		limit   int
		fits    bool
	}{
		"one":                 {wide(1), 1, true},
		"two with a limit of": {wide(2), 1, false},
		"most":                {wide(MaxMaxTxnOps), MaxMaxTxnOps, true},
		"more":                {wide(MaxMaxTxnOps + 1), MaxMaxTxnOps, false},
		"squared":             {squared, 1000, false},
		"deepest":             {deep(maxTxnDepth - 1), 1000, true},
		"too deep":            {deep(maxTxnDepth), 1000, false},
	} {
		if err := checkTxn(test.request, test.limit); err != nil && test.fits || err == nil && !test.fits {
			t.Errorf("%s, with a limit of %d: %v", name, test.limit, err)
		}
	}
}

// plainRanges is keyRanges without being clever.
type plainRanges [][2]string

func (p *plainRanges) add(begin, end string) {
	if end == "" {
		end = begin + "\x00"
	}
	*p = append(*p, [2]string{begin, end})
}

func (p plainRanges) contains(key string) bool {
	for _, r := range p {
		if r[0] <= key && (key < r[1] || r[1] == "\x00") {
			return true
		}
	}
	return false
}

func TestKeyRangesAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	key := func() string {
		b := make([]byte, 1+random.IntN(2))
		for i := range b {
			b[i] = byte('a' + random.IntN(6))
		}
		return string(b)
	}
	for range 300 {
		var got keyRanges
		var want plainRanges
		for range random.IntN(12) {
			begin, end := key(), ""
			switch random.IntN(8) {
			case 0:
				end = "\x00"
			case 1, 2, 3, 4:
				end = key()
			}
			want.add(begin, end)
			if random.IntN(2) == 0 {
				var other keyRanges
				other.add(begin, end)
				got.union(&other)
			} else {
				got.add(begin, end)
			}
		}
		for range 50 {
			if k := key(); got.contains(k) != want.contains(k) {
				t.Fatalf("contains(%q) = %v, ranges %q", k, got.contains(k), want)
			}
		}
		last := ""
		got.ends.Scan(func(begin, end string) bool {
			if begin <= last && last != "" || end <= begin {
				t.Fatalf("ranges are not disjoint: [%q, %q) after %q", begin, end, last)
			}
			last = end
			return true
		})
	}
}

func TestTxnClasses(t *testing.T) {
	stale := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), Serializable: true}}}
	for name, test := range map[string]struct {
		request                       *pb.TxnRequest
		readOnly, serializable, grows bool
	}{
		"compares only":     {&pb.TxnRequest{Compare: []*pb.Compare{{Key: []byte("a")}}}, true, false, false},
		"ranges":            {&pb.TxnRequest{Success: list(opRange("a")), Failure: list(stale)}, true, false, false},
		"serializable":      {&pb.TxnRequest{Success: list(stale), Failure: list(stale)}, true, true, false},
		"put":               {&pb.TxnRequest{Failure: list(opPut("a"))}, false, false, true},
		"delete":            {&pb.TxnRequest{Success: list(opDelete("a", ""), stale)}, false, false, false},
		"nested":            {&pb.TxnRequest{Success: list(opTxn(list(stale), nil))}, false, false, false},
		"nested put":        {&pb.TxnRequest{Success: list(opTxn(nil, list(opPut("a"))))}, false, false, true},
		"delete beside put": {&pb.TxnRequest{Success: list(opDelete("a", "")), Failure: list(opPut("a"))}, false, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := isReadOnly(test.request); got != test.readOnly {
				t.Errorf("isReadOnly = %v", got)
			}
			if got := isReadOnly(test.request) && isSerializable(test.request); got != test.serializable {
				t.Errorf("isSerializable = %v", got)
			}
			if got := grows(test.request); got != test.grows {
				t.Errorf("grows = %v", got)
			}
		})
	}
}
