package transport

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// fill sets every field of a message to a random value other than zero, or to an extreme one.
func fill(r *rand.Rand, v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(r.Int64N(1<<34)-1<<33, r.Int64N(1e9)).UTC()))
			return
		}
		for i := range v.NumField() {
			fill(r, v.Field(i))
		}
		switch m := v.Addr().Interface().(type) { // random bytes are no configuration
		case *raft.Log:
			if m.Type = raft.LogType(r.IntN(int(raft.LogConfiguration) + 1)); m.Type == raft.LogConfiguration {
				m.Data = testConfiguration
			} else if m.Type != raft.LogCommand && m.Type != raft.LogNoop {
				m.Type = raft.LogBarrier
			}
		case *raft.InstallSnapshotRequest:
			m.Configuration = testConfiguration
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(r, v.Elem())
	case reflect.Slice:
		n := 1 + r.IntN(5)
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		for i := range n {
			fill(r, v.Index(i))
		}
	case reflect.Uint64:
		v.SetUint([]uint64{1, math.MaxUint64, 1 + r.Uint64N(1<<20)}[r.IntN(3)])
	case reflect.Uint8:
		v.SetUint(1 + r.Uint64N(255))
	case reflect.Int, reflect.Int64:
		v.SetInt(1 + r.Int64N(math.MaxInt64))
	case reflect.Bool:
		v.SetBool(true)
	default:
		panic("no value for " + v.Type().String())
	}
}

var testConfiguration = raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{
	{ID: "a/1", Address: "a/1"}, {ID: "b/1", Address: "b/1", Suffrage: raft.Nonvoter}}})

var requests = []any{&raft.AppendEntriesRequest{}, &raft.RequestVoteRequest{}, &raft.RequestPreVoteRequest{},
	&raft.TimeoutNowRequest{}, &raft.InstallSnapshotRequest{}}

var responses = []any{&raft.AppendEntriesResponse{}, &raft.RequestVoteResponse{}, &raft.RequestPreVoteResponse{},
	&raft.TimeoutNowResponse{}, &raft.InstallSnapshotResponse{}}

// newLike returns a pointer to a new value of the type that like points to, filled or zero.
func newLike(r *rand.Rand, like any, filled bool) any {
	v := reflect.New(reflect.TypeOf(like).Elem())
	if filled {
		fill(r, v.Elem())
	}
	return v.Interface()
}

// TestMessagesRoundTrip fills every field there is, so a field that raft adds fails it.
func TestMessagesRoundTrip(t *testing.T) {
	r := seeded(t)
	for range 50 {
		for _, like := range requests {
			for _, filled := range []bool{false, true} {
				in := newLike(r, like, filled)
				if install, ok := in.(*raft.InstallSnapshotRequest); ok {
					install.Configuration = testConfiguration
				}
				out, err := decodeRequest(typeOf(in), appendRequest(nil, in))
				if err != nil || !reflect.DeepEqual(in, out) {
					t.Fatalf("%T: %v\n%+v became\n%+v", in, err, in, out)
				}
			}
		}
		for _, like := range responses {
			for _, filled := range []bool{false, true} {
				in, out := newLike(r, like, filled), newLike(r, like, true)
				if err := decodeResponse(appendResponse(nil, in), out); err != nil || !reflect.DeepEqual(in, out) {
					t.Fatalf("%T, decoded into a used one: %v\n%+v became\n%+v", in, err, in, out)
				}
			}
		}
	}
}

func TestEntriesKeepNilAndEmptyApart(t *testing.T) {
	in := &raft.AppendEntriesRequest{Entries: []*raft.Log{{Data: nil, Extensions: []byte{}}, {Data: []byte{}}}}
	out, err := decodeRequest(typeAppendEntries, appendRequest(nil, in))
	if err != nil || !reflect.DeepEqual(in, out) {
		t.Fatalf("%v: %+v", err, out)
	}
}

// TestFailedDecodeLeavesNothing: what is left of an earlier answer must not pass for this one's.
func TestFailedDecodeLeavesNothing(t *testing.T) {
	r := seeded(t)
	for _, like := range responses {
		b := appendResponse(nil, newLike(r, like, true))
		for cut := range len(b) {
			out := newLike(r, like, true)
			err := decodeResponse(b[:cut], out)
			if !errors.Is(err, errMalformed) || !reflect.DeepEqual(out, newLike(r, like, false)) {
				t.Fatalf("%T cut to %d of %d bytes: %v, %+v", like, cut, len(b), err, out)
			}
		}
	}
}

func TestCutRequestsAreRefused(t *testing.T) {
	r := seeded(t)
	for _, like := range requests {
		b := appendRequest(nil, newLike(r, like, true))
		for cut := range len(b) {
			if _, err := decodeRequest(typeOf(like), b[:cut]); !errors.Is(err, errMalformed) {
				t.Fatalf("%T cut to %d of %d bytes: %v", like, cut, len(b), err)
			}
		}
		if _, err := decodeRequest(typeOf(like), append(b, 0)); !errors.Is(err, errMalformed) {
			t.Fatalf("%T with a byte too many: %v", like, err)
		}
	}
}

// TestUnsoundEntriesAreRefused: raft would panic at some of these, now and at each start.
func TestUnsoundEntriesAreRefused(t *testing.T) {
	encode := func(servers ...raft.Server) []byte {
		return raft.EncodeConfiguration(raft.Configuration{Servers: servers})
	}
	a, b := raft.Server{ID: "a/1", Address: "a/1"}, raft.Server{ID: "b/1", Address: "b/1"}
	deep := append([]byte("\x81\xa1x"), bytes.Repeat([]byte{0x91}, 1<<20)...)
	configurations := map[string][]byte{
		"nothing": nil, "garbage": []byte("garbage"), "cut": testConfiguration[:len(testConfiguration)-1], "deep": deep,
		"no servers":        encode(),
		"no voter":          encode(raft.Server{ID: "a/1", Address: "a/1", Suffrage: raft.Nonvoter}),
		"no id":             encode(a, raft.Server{Address: "b/1"}),
		"no address":        encode(a, raft.Server{ID: "b/1"}),
		"one id twice":      encode(a, raft.Server{ID: "a/1", Address: "b/1"}),
		"one address twice": encode(a, raft.Server{ID: "b/1", Address: "a/1"}),
		"suffrage":          encode(a, raft.Server{ID: "b/1", Address: "b/1", Suffrage: 3}),
		"negative suffrage": encode(a, raft.Server{ID: "b/1", Address: "b/1", Suffrage: -1}),
	}
	refused := func(name string, request any) {
		if _, err := decodeRequest(typeOf(request), appendRequest(nil, request)); !errors.Is(err, errMalformed) {
			t.Errorf("%s in %T: %v", name, request, err)
		}
	}
	entry := func(of raft.LogType, data []byte) *raft.AppendEntriesRequest {
		return &raft.AppendEntriesRequest{Entries: []*raft.Log{{Index: 1}, {Index: 2, Type: of, Data: data}}}
	}
	for name, data := range configurations {
		refused(name, entry(raft.LogConfiguration, data))
		refused(name, &raft.InstallSnapshotRequest{SnapshotVersion: 1, Configuration: data})
	}
	for of := range 256 {
		request := entry(raft.LogType(of), encode(a, b))
		switch raft.LogType(of) {
		case raft.LogCommand, raft.LogNoop, raft.LogBarrier, raft.LogConfiguration:
			if _, err := decodeRequest(typeAppendEntries, appendRequest(nil, request)); err != nil {
				t.Errorf("type %d: %v", of, err)
			}
		default:
			refused("type", request)
		}
	}
}

func TestHandshakesRoundTrip(t *testing.T) {
	p := Peer{math.MaxUint64, "node-1", 7, "a:1", "b:2", ""}
	h := hello{1, 2, purposeAsk, "other", p}
	if got, err := parseHello(appendHello(nil, &h)); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	reply := helloReply{1, verdictCluster, p, "because"}
	if got, err := parseHelloReply(appendHelloReply(nil, &reply)); err != nil || got != reply {
		t.Errorf("%+v, %v", got, err)
	}
	for _, node := range []string{"", "a/b", "a b", string(bytes.Repeat([]byte("x"), 64))} {
		h.from.Node = node
		if _, err := parseHello(appendHello(nil, &h)); !errors.Is(err, errMalformed) {
			t.Errorf("node name %q: %v", node, err)
		}
	}
}

// FuzzMessages: whatever arrives is refused or decodes to something that encodes back.
func FuzzMessages(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for i, like := range requests {
		f.Add(uint8(i), appendRequest(nil, newLike(r, like, true)))
		f.Add(uint8(i+len(requests)), appendResponse(nil, newLike(r, responses[i], true)))
	}
	f.Add(uint8(0), []byte{0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		i := int(which) % (2 * len(requests))
		if i < len(requests) {
			req, err := decodeRequest(typeOf(requests[i]), b)
			if err != nil {
				return
			}
			again, err := decodeRequest(typeOf(requests[i]), appendRequest(nil, req))
			if err != nil || !reflect.DeepEqual(req, again) {
				t.Fatalf("%+v became %+v, %v", req, again, err)
			}
			return
		}
		like := responses[i-len(requests)]
		resp, again := newLike(r, like, false), newLike(r, like, false)
		if decodeResponse(b, resp) != nil {
			return
		}
		if err := decodeResponse(appendResponse(nil, resp), again); err != nil || !reflect.DeepEqual(resp, again) {
			t.Fatalf("%+v became %+v, %v", resp, again, err)
		}
	})
}

func FuzzHandshakes(f *testing.F) {
	p := Peer{1, "n1", 2, "a", "b", "c"}
	f.Add(appendHello(nil, &hello{1, 1, purposePeer, "n2", p}))
	f.Add(appendHelloReply(nil, &helloReply{1, 0, p, "reason"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := parseHello(b); err == nil {
			if again, err := parseHello(appendHello(nil, &h)); err != nil || again != h {
				t.Fatalf("%+v became %+v, %v", h, again, err)
			}
		}
		if r, err := parseHelloReply(b); err == nil {
			if again, err := parseHelloReply(appendHelloReply(nil, &r)); err != nil || again != r {
				t.Fatalf("%+v became %+v, %v", r, again, err)
			}
		}
		if _, err := parseOutcome(b); err != nil && len(err.Error()) == 0 {
			t.Fatal("an error without text")
		}
	})
}
