package server

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/ring"
)

// readTxn is a transaction that only reads a key.
func readTxn(key string) *pb.TxnRequest {
	return &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}}}
}

// check writes a key by way of a node and reads it in all ways.
func (w *world) check(node, key, value string) {
	w.t.Helper()
	put := w.put(node, key, value)
	kv := w.kv(node)
	for name, r := range map[string]*pb.RangeRequest{
		"newest":       {Key: []byte(key)},
		"at revision":  {Key: []byte(key), Revision: put.Header.Revision},
		"with the tag": {Key: []byte(key), RangeEnd: after([]byte(key))},
	} {
		resp, err := kv.Range(w.t.Context(), r)
		if err != nil || len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != value || resp.Header.Revision < put.Header.Revision {
			w.t.Errorf("%s of %s by way of %s: %v, %v", name, key, node, resp, err)
		}
	}
	txn, err := kv.Txn(w.t.Context(), readTxn(key))
	if err != nil || string(txn.Responses[0].GetResponseRange().Kvs[0].Value) != value {
		w.t.Errorf("transaction on %s by way of %s: %v, %v", key, node, txn, err)
	}
}

func TestEveryNodeServesEveryKey(t *testing.T) {
	w := newWorld(t, 5, 10, 2, nil)
	for _, group := range w.groups {
		key := w.keyIn(group, "k")
		for _, node := range w.nodes {
			w.check(node, key, "by "+node)
		}
		for _, node := range w.nodes { // every way is known now
			before := w.callsOf(methodPropose)
			w.put(node, key, "again")
			if n := w.callsOf(methodPropose) - before; n > 1 {
				t.Errorf("a write to group %d by way of %s takes %d calls", group, node, n)
			}
		}
		w.shards[group].elect(w.shards[group].order[1])
		for _, node := range w.nodes { // whoever led says who does
			before := w.callsOf(methodPropose)
			w.put(node, key, "moved")
			if n := w.callsOf(methodPropose) - before; n > 2 {
				t.Errorf("after an election a write to group %d by way of %s takes %d calls", group, node, n)
			}
			w.check(node, key, "after the election by "+node)
		}
	}
}

// What this node knows may be wrong in any way: requests still arrive.
func TestRequestsSurviveWrongKnowledge(t *testing.T) {
	for name, spoil := range map[string]func(w *world, s *fakeShard, node string){
		"the leader's node is down": func(w *world, s *fakeShard, _ string) {
			old := s.leader
			s.elect(s.order[1])
			w.onCall = func(_, to, _ string) (error, error) {
				if to == old {
					return errNeverSent, nil
				}
				return nil, nil
			}
		},
		"the leader's node hangs": func(w *world, s *fakeShard, _ string) {
			w.hung = map[string]bool{s.leader: true}
			s.elect(s.order[1])
		},
		"a wrong leader is remembered": func(w *world, s *fakeShard, node string) {
			w.servers[node].router.leaders.learn(s.group, s.order[1])
		},
		"a node without the group is remembered": func(w *world, s *fakeShard, node string) {
			w.servers[node].router.leaders.learn(s.group, w.nodes[4])
		},
		"an unheard-of node is remembered": func(w *world, s *fakeShard, node string) {
			w.servers[node].router.leaders.learn(s.group, "nobody")
		},
		"the leader's node has lost its replica": func(_ *world, s *fakeShard, _ string) {
			s.replicas[s.leader].change(func(r *shardReplica) { r.hidden = true })
			s.elect(s.order[1])
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 5, 5, 2, nil)
				for _, node := range []string{"n3", "n4"} { // without group 1
					w.check(node, w.keyIn(1, "k"), "before")
				}
				spoil(w, w.shards[1], "n3")
				start := time.Now()
				for _, node := range []string{"n3", "n4"} {
					if strings.Contains(name, "hangs") { // a write that has been sent is of unknown outcome
						if _, err := w.kv(node).Range(t.Context(), &pb.RangeRequest{Key: []byte(w.keyIn(1, "k"))}); err != nil {
							t.Error(err)
						}
						if _, err := w.kv(node).Range(t.Context(), wholeRange); err != nil {
							t.Error(err)
						}
						continue
					}
					w.check(node, w.keyIn(1, "k"), "after")
				}
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("found after %v", took)
				}
			})
		})
	}
}

// A replica of this node that is of no use must not keep its requests.
func TestUselessReplicaIsPassedBy(t *testing.T) {
	for name, spoil := range map[string]func(*shardReplica){
		"it does not apply":       func(r *shardReplica) { r.frozen = true },
		"it hears of no leader":   func(r *shardReplica) { r.deaf = true },
		"it believes in another":  func(r *shardReplica) { r.deaf, r.heard = true, "n5" },
		"it was removed long ago": func(r *shardReplica) { r.deaf, r.frozen = true, true },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 5, 5, 3, nil)
				w.shards[1].replicas["n2"].change(spoil)
				start := time.Now()
				w.check("n2", w.keyIn(1, "k"), "v")
				if _, err := w.kv("n2").Range(t.Context(), wholeRange); err != nil {
					t.Error(err)
				}
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("after %v", took)
				}
			})
		})
	}
}

func TestNobodyLeads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 5, 5, 2, nil)
		key := w.keyIn(1, "k")
		w.put("n1", key, "v")
		w.shards[1].elect("")
		for _, node := range []string{"n1", "n4"} {
			kv := w.kv(node)
			start := time.Now()
			for _, err := range []error{
				second(kv.Put(t.Context(), putData(t, key, "v"))),
				second(kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})),
				second(kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key), Revision: 2})),
				second(kv.Range(t.Context(), wholeRange)),
				second(kv.Txn(t.Context(), readTxn(key))),
			} {
				sameStatus(t, err, rpctypes.ErrGRPCTimeout)
			}
			if took := time.Since(start); took != 25*time.Second {
				t.Errorf("five requests gave up after %v", took)
			}
			for _, r := range []*pb.RangeRequest{{Key: []byte(key), Serializable: true}, {Key: []byte{0}, RangeEnd: []byte{0}, Serializable: true}, {Key: []byte(key), Revision: 2, Serializable: true}} {
				resp, err := kv.Range(t.Context(), r)
				if r.Revision > 0 && node == "n4" {
					sameStatus(t, err, rpctypes.ErrGRPCTimeout) // no state here that could prove to be complete
					continue
				}
				if err != nil || len(resp.Kvs) == 0 {
					t.Errorf("%v by way of %s: %v, %v", r, node, resp, err)
				}
			}
			other := w.keyIn(2, "k")
			w.check(node, other, "v")
		}
	})
}

func second[T any](_ T, err error) error { return err }

// The group elects while a request waits.
func TestRequestsWaitForAnElection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 5, 5, 2, nil)
		key := w.keyIn(1, "k")
		w.put("n4", key, "v")
		w.shards[1].elect("")
		var waiting sync.WaitGroup
		for _, node := range w.nodes {
			waiting.Go(func() {
				w.put(node, key, node)
				if _, err := w.kv(node).Range(t.Context(), wholeRange); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(3 * time.Second) // virtual
		w.shards[1].elect(w.shards[1].order[1])
		waiting.Wait()
	})
}

// A forwarded write whose answer is lost must not be written twice.
func TestForwardedWriteOfUnknownOutcome(t *testing.T) {
	w := newWorld(t, 5, 5, 2, nil)
	w.onCall = func(_, _, method string) (error, error) {
		if method == methodPropose {
			return nil, errors.New("connection lost")
		}
		return nil, nil
	}
	_, err := w.kv("n4").Put(t.Context(), putData(t, w.keyIn(1, "k"), "v"))
	sameStatus(t, err, rpctypes.ErrGRPCTimeoutDueToLeaderFail)
	if n := len(w.shards[1].log); n != 1 {
		t.Fatalf("written %d times", n)
	}
}

// Nodes that send a request in circles do so at a bounded pace.
func TestCircularHints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 5, 5, 2, nil)
		s := w.shards[1]
		s.replicas["n1"].change(func(r *shardReplica) { r.deaf, r.heard = true, "n2" })
		s.replicas["n2"].change(func(r *shardReplica) { r.deaf, r.heard = true, "n1" })
		s.elect("")
		_, err := w.kv("n4").Put(t.Context(), putData(t, w.keyIn(1, "k"), "v"))
		sameStatus(t, err, rpctypes.ErrGRPCTimeout)
		if n := w.callsOf(methodPropose); n < 10 || n > 100 {
			t.Fatalf("%d calls in 5 s", n)
		}
	})
}

func TestHintsAreBounded(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	r := w.servers["n1"].router
	for _, hint := range []string{"", strings.Repeat("x", maxNodeName+1), "n1", "n2"} {
		if r.moved(1, "n2", hint); r.leaders.get(1) != "" {
			t.Errorf("learnt %q from n2", r.leaders.get(1))
		}
	}
	if r.moved(1, "n2", "n3"); r.leaders.get(1) != "n3" {
		t.Error("a good hint is not taken")
	}
	if r.leaders.forget(1, "n2"); r.leaders.get(1) != "n3" {
		t.Error("forgot another node than the one asked")
	}
}

func TestBeforeTheMapIsKnown(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	w.unknown.Store(true)
	kv := w.kv("n1")
	for name, err := range map[string]error{
		"put":         second(kv.Put(t.Context(), putData(t, "k", "v"))),
		"range":       second(kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("k")})),
		"whole range": second(kv.Range(t.Context(), wholeRange)),
		"delete":      second(kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})),
		"transaction": second(kv.Txn(t.Context(), &pb.TxnRequest{})),
		"compaction":  second(kv.Compact(t.Context(), &pb.CompactionRequest{Revision: 1})),
	} {
		if status.Code(err) != codes.Unavailable || reasonOf(err) != ReasonNotJoined {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRangesOfOneGroup(t *testing.T) {
	for _, c := range []struct {
		key, end string
		want     bool
	}{
		{"k", "", true},
		{"{t}", "", true},
		{"k", "k\x00", true},
		{"k", "k\x00\x00", false},
		{"k", "l", false},
		{"k", "\x00", false},
		{"k", "a", true}, // nothing
		{"{t}", "{t}\x00", true},
		{"{t}", "{t~", true},
		{"{t}", "{t}~", true},
		{"{t}a", "{t}b", true},
		{"{t}a", "{t~", true},
		{"{t}a", "{t~\x00", false},
		{"{t}", "{u", false},
		{"{t}", "\x00", false},
		{"{t", "{t~", false},
		{"{}a", "{}b", false},
		{"a{t}b{u}", "a{t}c", true},
		{"a{t}b", "a{t~", true},
		{"a{t}b", "b", false},
		{"{t}a", "{t}", true}, // nothing
	} {
		if got := oneGroup([]byte(c.key), []byte(c.end)); got != c.want {
			t.Errorf("from %q to %q: %v", c.key, c.end, got)
		}
	}
}

// If a range is said to have one group, no key of it is in another.
func TestOneGroupHolds(t *testing.T) {
	g := seeded(t)
	letters := "{}ab~|\x00\xff"
	word := func(most int) []byte {
		w := make([]byte, g.IntN(most))
		for i := range w {
			w[i] = letters[g.IntN(len(letters))]
		}
		return w
	}
	found := 0
	for range 200_000 {
		key, end := append(word(6), pick(g, "", "{a}", "{b", "}")...), word(7)
		if g.IntN(2) == 0 {
			end = append(slices.Clone(key[:g.IntN(len(key)+1)]), word(3)...)
		}
		if len(key) == 0 || len(end) == 0 || !oneGroup(key, end) {
			continue
		}
		other := append(slices.Clone(key[:g.IntN(len(key)+1)]), word(5)...)
		if string(other) < string(key) || string(other) >= string(end) {
			continue
		}
		found++
		if string(ring.Tag(other)) != string(ring.Tag(key)) {
			t.Fatalf("%q is between %q and %q, with another tag", other, key, end)
		}
	}
	if found < 200 {
		t.Fatalf("only %d keys were tried", found)
	}
}

func TestTransactionsAcrossShards(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	kv := w.kv("n1")
	put := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putData(t, key, "v")}}
	}
	get := func(key, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
	}
	del := func(key, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
	}
	nested := func(ops ...*pb.RequestOp) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: ops}}}
	}
	exists := func(key string) []*pb.Compare {
		return []*pb.Compare{{Key: []byte(key), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER}}
	}
	a, b := w.keyIn(1, "a"), w.keyIn(4, "b")
	for name, test := range map[string]struct {
		txn     *pb.TxnRequest
		refused string // part of the message; "" = it is executed
	}{
		"nothing":              {&pb.TxnRequest{}, ""},
		"one key":              {&pb.TxnRequest{Compare: exists(a), Success: []*pb.RequestOp{put(a)}, Failure: []*pb.RequestOp{get(a, "")}}, ""},
		"one tag":              {&pb.TxnRequest{Compare: exists("{t}a"), Failure: []*pb.RequestOp{put("{t}b"), get("{t}", "{t~"), del("{t}x", "{t}y"), nested(put("{t}c"))}}, ""},
		"two puts":             {&pb.TxnRequest{Success: []*pb.RequestOp{put(a), put(b)}}, fmt.Sprintf("key %q is in shard 0, key %q is in shard 3", a, b)},
		"two branches":         {&pb.TxnRequest{Success: []*pb.RequestOp{put(a)}, Failure: []*pb.RequestOp{put(b)}}, "is in shard 3"},
		"a compare":            {&pb.TxnRequest{Compare: exists(b), Success: []*pb.RequestOp{put(a)}}, "is in shard 3"},
		"reads":                {&pb.TxnRequest{Compare: append(exists(a), exists(b)...), Success: []*pb.RequestOp{get(a, ""), get(b, "")}, Failure: []*pb.RequestOp{get("a", "b")}}, ""},
		"a nested read":        {&pb.TxnRequest{Success: []*pb.RequestOp{get(a, ""), {Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{get(b, "")}}}}}}, "is in shard 3"},
		"a deletion":           {&pb.TxnRequest{Success: []*pb.RequestOp{put(a), del(b, "")}}, "is in shard 3"},
		"a nested one":         {&pb.TxnRequest{Success: []*pb.RequestOp{put(a), nested(nested(put(b)))}}, "is in shard 3"},
		"a range":              {&pb.TxnRequest{Success: []*pb.RequestOp{get("a", "b"), put(a)}}, `the range from "a" to "b" has keys in all shards`},
		"a long key":           {&pb.TxnRequest{Success: []*pb.RequestOp{put(a), put(w.keyIn(4, strings.Repeat("x", 1000)))}}, "..."},
		"many shards":          {&pb.TxnRequest{Success: []*pb.RequestOp{put(a), put(w.keyIn(2, "c")), put(w.keyIn(3, "c")), put(b), put(w.keyIn(5, "c"))}}, "shard 3"},
		"a compare of a range": {&pb.TxnRequest{Compare: []*pb.Compare{{Key: []byte("a"), RangeEnd: []byte("c")}}, Success: []*pb.RequestOp{put(a)}}, "has keys in all shards"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kv.Txn(t.Context(), test.txn)
			if test.refused == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if status.Code(err) != codes.InvalidArgument || reasonOf(err) != ReasonCrossShard ||
				!strings.Contains(err.Error(), test.refused) || !strings.Contains(err.Error(), "{tag}") || len(err.Error()) > 700 || strings.Contains(err.Error(), "\n") {
				t.Fatal(err)
			}
		})
	}
	if n := len(w.shards[4].log); n != 0 {
		t.Fatalf("refused transactions left %d entries", n)
	}
	one := newWorld(t, 1, 1, 1, nil)
	if _, err := one.kv("n1").Txn(t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{put("a"), put("b"), get("a", "z")}}); err != nil {
		t.Fatalf("with a single shard: %v", err)
	}
}

// Each node holds its own clients to its own limits, and takes what others let
// through.
func TestLimitsAreThoseOfTheNodeThatIsAsked(t *testing.T) {
	w := newWorld(t, 2, 2, 1, func(c *Config) {
		if c.Node == "n1" {
			c.MaxRequestBytes, c.MaxTxnOps = 1000, 2
		}
	})
	for _, group := range w.groups {
		key := w.keyIn(group, "k")
		for node, wants := range map[string][2]error{"n1": {rpctypes.ErrGRPCRequestTooLarge, rpctypes.ErrGRPCTooManyOps}, "n2": {}} {
			_, err := w.kv(node).Put(t.Context(), putData(t, key, strings.Repeat("v", 1001)))
			sameStatus(t, err, wants[0])
			for _, op := range []*pb.RequestOp{readOp(&pb.RangeRequest{Key: []byte(key)}), deleteOp(key, "")} {
				_, err = w.kv(node).Txn(t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{op, op, op}})
				sameStatus(t, err, wants[1])
				if _, err = w.kv(node).Txn(t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{op, op}}); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

// What no shard has to do with is answered at the newest revision of all.
func TestTransactionOfNothing(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	nothing := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{}}}}}
	for _, node := range w.nodes {
		for group := range w.shards {
			newest := w.put(node, w.keyIn(group, "k"), "v").Header.Revision
			resp, err := w.kv(node).Txn(t.Context(), &pb.TxnRequest{})
			if err != nil || !resp.Succeeded || len(resp.Responses) != 0 || resp.Header.Revision != newest || resp.Header.ClusterId == 0 {
				t.Errorf("%v, %v", resp, err)
			}
			resp, err = w.kv(node).Txn(t.Context(), nothing)
			if err != nil || !resp.Responses[0].GetResponseTxn().Succeeded || resp.Header.Revision != newest {
				t.Errorf("%v, %v", resp, err)
			}
		}
	}
}

// Transactions that read at revisions see all of them, wherever they are asked.
func TestReadTransactionAtRevisions(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	key := w.keyIn(1, "k")
	first := w.put("n1", key, "1").Header.Revision
	w.put("n1", key, "2")
	newest := w.put("n1", w.keyIn(2, "k"), "other").Header.Revision
	for _, node := range w.nodes {
		for revision, want := range map[int64]string{first: "1", newest: "2", 0: "2"} {
			txn := readTxn(key)
			txn.Success[0].GetRequestRange().Revision = revision
			resp, err := w.kv(node).Txn(t.Context(), txn)
			if err != nil || string(resp.Responses[0].GetResponseRange().Kvs[0].Value) != want {
				t.Errorf("at %d by way of %s: %v, %v", revision, node, resp, err)
			}
		}
		txn := readTxn(key)
		txn.Success[0].GetRequestRange().Revision = newest + 1
		_, err := w.kv(node).Txn(t.Context(), txn)
		sameStatus(t, err, rpctypes.ErrGRPCFutureRev)
		txn.Success[0].GetRequestRange().Revision = newest + 1
		txn.Success, txn.Failure = nil, txn.Success // not taken
		if _, err := w.kv(node).Txn(t.Context(), txn); err != nil {
			t.Error(err)
		}
	}
}

// A leader's node hangs, and for a while all others believe in it: reads by way
// of a node without the group find the next leader soon after there is one.
func TestHungLeaderIsLeftSoon(t *testing.T) {
	const election = 1500 * time.Millisecond
	for name, r := range map[string]*pb.RangeRequest{"all": wholeRange, "one": {Key: []byte("")}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 5, 5, 2, nil)
				key := w.keyIn(1, "k")
				w.check("n4", key, "v")
				if len(r.Key) == 0 {
					r.Key = []byte(key)
				}
				s := w.shards[1]
				w.mu.Lock()
				w.hung = map[string]bool{"n1": true}
				w.mu.Unlock()
				s.replicas["n2"].change(func(r *shardReplica) { r.deaf, r.heard = true, "n1" })
				start := time.Now()
				time.AfterFunc(election, func() {
					s.replicas["n2"].change(func(r *shardReplica) { r.deaf = false })
					s.elect("n2")
				})
				if _, err := w.kv("n4").Range(t.Context(), r); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(start); took > election+3*silence/2 {
					t.Errorf("answered after %v", took)
				}
			})
		})
	}
}

func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l silences[string]
		lasts := func(want time.Duration) {
			t.Helper()
			for range 20 { // at once
				l.answered("n1", false)
			}
			time.Sleep(want - time.Nanosecond)
			if !l.isSilent("n1") {
				t.Errorf("not silent for %v", want)
			}
			time.Sleep(time.Nanosecond)
			if l.isSilent("n1") {
				t.Errorf("silent for more than %v", want)
			}
		}
		lasts(silence)
		lasts(2 * silence)
		lasts(4 * silence)
		lasts(4 * silence)
		l.answered("n1", true)
		lasts(silence)
	})
}

func TestSilentNodesAreBounded(t *testing.T) {
	var l silences[string]
	for i := range 10 * maxSilent {
		l.answered(fmt.Sprint("n", i), false)
	}
	if len(l.silent) > maxSilent+1 {
		t.Fatalf("%d nodes are remembered", len(l.silent))
	}
}

// A replica that lags makes the first read wait, and not every one.
func TestLaggingReplicaIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 5, 5, 3, nil)
		key := w.keyIn(1, "k")
		r := w.shards[1].replicas["n2"]
		r.change(func(r *shardReplica) { r.frozen = true })
		w.put("n1", key, "v")
		read := func(serializable bool) time.Duration {
			start := time.Now()
			resp, err := w.kv("n2").Range(t.Context(), &pb.RangeRequest{Key: []byte(key), Serializable: serializable})
			if err != nil || len(resp.Kvs) != 1 && !serializable {
				t.Errorf("%v, %v", resp, err)
			}
			return time.Since(start)
		}
		if took := read(false); took != patience {
			t.Errorf("the first read took %v", took)
		}
		for range 5 {
			if took := read(false); took != 0 {
				t.Errorf("a later read took %v", took)
			}
		}
		if took := read(true); took != 0 {
			t.Errorf("a serializable read took %v", took)
		}
		start := time.Now()
		if _, err := w.kv("n2").Range(t.Context(), wholeRange); err != nil || time.Since(start) != 0 {
			t.Errorf("a read of all shards: %v after %v", err, time.Since(start))
		}
		r.change(func(r *shardReplica) { r.frozen = false })
		time.Sleep(silence)
		before := w.callsOf(methodPage)
		if took := read(false); took != 0 || w.callsOf(methodPage) != before {
			t.Errorf("when it has caught up a read took %v, and %d calls", took, w.callsOf(methodPage)-before)
		}
	})
}
