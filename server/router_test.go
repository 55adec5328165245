package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// scripted answers proposals with the given outcomes, one after the other; the
// last one stays.
func scripted(outcomes ...error) (propose func(context.Context, fsm.Request) (fsm.Result, error), calls *atomic.Int64) {
	calls = new(atomic.Int64)
	return func(context.Context, fsm.Request) (fsm.Result, error) {
		i := min(int(calls.Add(1)), len(outcomes)) - 1
		if err := outcomes[i]; err != nil {
			return fsm.Result{}, err
		}
		return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{Revision: 42}}}, nil
	}, calls
}

// follower is a node n1 that forwards to n2, which answers from its replica.
func follower(t *testing.T, edit func(*Config)) (s *Server, mine, theirs *fakeReplica, peers *fakePeers) {
	t.Helper()
	peers = &fakePeers{}
	mine = newFakeReplica(nil, shard.Leader{Node: "n2", ID: "n2/1", Term: 3})
	theirs = newFakeReplica(nil, shard.Leader{Node: "n2", ID: "n2/1", Term: 3, Self: true})
	cfg := testConfig(mine, peers)
	if edit != nil {
		edit(&cfg)
	}
	s = newTestServer(t, cfg)
	other := testConfig(theirs, peers)
	other.Node = "n2"
	for method, h := range newTestServer(t, other).Handlers() {
		peers.serve("n2", method, h)
	}
	return s, mine, theirs, peers
}

func put(ctx context.Context, s *Server) (*pb.PutResponse, error) {
	return s.KV().Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: []byte("v")})
}

// Every class of error, on this node and on another one: what is definite is
// tried again, what is not never is.
func TestWriteOutcomes(t *testing.T) {
	lost := fmt.Errorf("%w: leadership lost", shard.ErrUnknownOutcome)
	for name, test := range map[string]struct {
		outcomes []error
		want     error
		calls    int64 // 0: many
	}{
		"success":               {[]error{nil}, nil, 1},
		"not leader, then good": {[]error{shard.ErrNotLeader, shard.ErrNotLeader, nil}, nil, 3},
		"not proposed":          {[]error{shard.ErrNotProposed, nil}, nil, 2},
		"never a leader":        {[]error{shard.ErrNotLeader}, rpctypes.ErrGRPCTimeout, 0},
		"unknown":               {[]error{lost, nil}, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"definite, unknown":     {[]error{shard.ErrNotLeader, lost, nil}, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 2},
		"any other error":       {[]error{errors.New("surprise"), nil}, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"both at once":          {[]error{fmt.Errorf("%w: %w", lost, shard.ErrNotLeader), nil}, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"closed":                {[]error{shard.ErrClosed, nil}, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"overloaded":            {[]error{shard.ErrOverloaded, nil}, rpctypes.ErrGRPCRequestTooManyRequests, 1},
		"too large":             {[]error{shard.ErrTooLarge, nil}, rpctypes.ErrGRPCRequestTooLarge, 1},
	} {
		for _, where := range []string{"here", "there"} {
			t.Run(name+" "+where, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, mine, theirs, _ := follower(t, nil)
					propose, calls := scripted(test.outcomes...)
					if where == "here" {
						mine.elect("n1", true)
						mine.onPropose = propose
					} else {
						theirs.onPropose = propose
					}
					start := time.Now()
					resp, err := put(t.Context(), s)
					sameStatus(t, err, test.want)
					if err == nil && resp.Header.Revision != 42 {
						t.Fatalf("response %v", resp)
					}
					if got := calls.Load(); test.calls != 0 && got != test.calls || got == 0 {
						t.Fatalf("proposed %d times, want %d", got, test.calls)
					}
					if name == "never a leader" && time.Since(start) != 5*time.Second {
						t.Fatalf("gave up after %v", time.Since(start))
					}
				})
			})
		}
	}
}

// The planted fault must be what TestWriteOutcomes looks for.
func TestRetriedUnknownOutcomeIsCaught(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, mine, _, _ := follower(t, func(c *Config) { c.faults.retryUnknown = true })
		mine.elect("n1", true)
		propose, calls := scripted(shard.ErrUnknownOutcome, nil)
		mine.onPropose = propose
		if _, err := put(t.Context(), s); err != nil || calls.Load() != 2 {
			t.Fatalf("%d proposals, %v: the fault does not show", calls.Load(), err)
		}
	})
}

// Errors of the network between the nodes.
func TestForwardingErrors(t *testing.T) {
	for name, test := range map[string]struct {
		reply []byte
		err   error
		want  error
		calls int64
	}{
		"lost":          {nil, errors.New("connection lost"), rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"never sent":    {nil, errNeverSent, rpctypes.ErrGRPCTimeout, 0},
		"empty":         {[]byte{}, nil, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"other version": {[]byte{9, 0, 0}, nil, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"other code":    {[]byte{protocolVersion, 99}, nil, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"bad response":  {[]byte{protocolVersion, 0, 0xff}, nil, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"malformed":     {answer(codeMalformed), nil, rpctypes.ErrGRPCTimeout, 0},
		"no space":      {answer(codeNoSpace), nil, rpctypes.ErrGRPCNoSpace, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _, _, peers := follower(t, nil)
				var calls atomic.Int64
				peers.serve("n2", methodPropose, func(context.Context, string, []byte) ([]byte, error) {
					calls.Add(1)
					return test.reply, test.err
				})
				_, err := put(t.Context(), s)
				sameStatus(t, err, test.want)
				if got := calls.Load(); test.calls != 0 && got != test.calls {
					t.Fatalf("%d calls", got)
				}
				if test.calls == 0 && calls.Load() < 10 {
					t.Fatalf("only %d attempts in 5 s", calls.Load())
				}
			})
		})
	}
}

// Refusals of the state machine and its responses arrive unchanged.
func TestForwardedAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, theirs, _ := follower(t, nil)
		var result fsm.Result
		theirs.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) { return result, nil }
		for _, known := range refusals {
			result = fsm.Result{Err: fmt.Errorf("wrapped: %w", known.err)}
			_, err := put(t.Context(), s)
			sameStatus(t, err, known.grpc)
		}
		result = fsm.Result{Err: errors.New("something else")}
		_, err := put(t.Context(), s)
		sameStatus(t, err, errors.New("something else"))

		result = fsm.Result{Response: &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 9}, Succeeded: true}}
		resp, err := s.KV().Txn(t.Context(), &pb.TxnRequest{Success: list(opPut("k"))})
		if err != nil || !resp.Succeeded || resp.Header.Revision != 9 || resp.Header.MemberId != 0xa1 || resp.Header.RaftTerm != 3 {
			t.Fatalf("%v, %v", resp, err)
		}
	})
}

func TestForwardedRequestIsTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, mine, theirs, _ := follower(t, nil)
		var seen []fsm.Request
		var left time.Duration
		record := func(ctx context.Context, r fsm.Request) (fsm.Result, error) {
			seen = append(seen, fsm.Request{Space: r.Space, Data: bytes.Clone(r.Data)})
			deadline, _ := ctx.Deadline()
			left = time.Until(deadline)
			return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{}}}, nil
		}
		mine.onPropose, theirs.onPropose = record, record
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := put(ctx, s); err != nil {
			t.Fatal(err)
		}
		if left != 3*time.Second {
			t.Fatalf("the leader has %v left", left)
		}
		mine.elect("n1", true)
		if _, err := put(ctx, s); err != nil {
			t.Fatal(err)
		}
		if len(seen) != 2 || !bytes.Equal(seen[0].Data, seen[1].Data) || seen[0].Space != seen[1].Space {
			t.Fatalf("forwarded %q, local %q", seen[0].Data, seen[1].Data)
		}
	})
}

// A request waits through an election and goes on the moment it is over.
func TestWaitsThroughElection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, mine, theirs, _ := follower(t, nil)
		theirs.onPropose, _ = scripted(nil)
		theirs.onReadIndex = func(context.Context) (uint64, error) { return 7, nil }
		mine.elect("", false)
		start := time.Now()
		time.AfterFunc(1700*time.Millisecond, func() { mine.elect("n2", false) })
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := put(t.Context(), s); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if index, err := s.router.readIndex(t.Context(), userGroup); index != 7 || err != nil {
				t.Errorf("read index %d, %v", index, err)
			}
		})
		wg.Wait()
		if took := time.Since(start); took != 1700*time.Millisecond {
			t.Fatalf("took %v", took)
		}
	})
}

// What waits for a leader inside the process does not outlive the server.
func TestWaitingEndsWithTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, mine, _, _ := follower(t, nil)
		mine.elect("", false)
		start := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := put(t.Context(), s)
			sameStatus(t, err, rpctypes.ErrGRPCStopped)
		})
		wg.Go(func() {
			_, err := s.KV().Range(t.Context(), &pb.RangeRequest{Key: []byte("k")})
			sameStatus(t, err, rpctypes.ErrGRPCStopped)
		})
		synctest.Wait()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if took := time.Since(start); took >= time.Second {
			t.Fatalf("took %v", took)
		}
	})
}

func TestWriteDeadlines(t *testing.T) {
	hang := func(ctx context.Context, _ fsm.Request) (fsm.Result, error) {
		<-ctx.Done()
		return fsm.Result{}, fmt.Errorf("%w: %w", shard.ErrUnknownOutcome, ctx.Err())
	}
	queue := func(ctx context.Context, _ fsm.Request) (fsm.Result, error) {
		<-ctx.Done()
		return fsm.Result{}, fmt.Errorf("%w: %w", shard.ErrNotProposed, ctx.Err())
	}
	for name, test := range map[string]struct {
		propose func(context.Context, fsm.Request) (fsm.Result, error)
		timeout time.Duration // 0: none; negative: cancelled
		took    time.Duration
		want    error
	}{
		"default":   {hang, 0, 5 * time.Second, rpctypes.ErrGRPCTimeoutDueToLeaderFail},
		"shorter":   {hang, time.Second, time.Second, rpctypes.ErrGRPCTimeoutDueToLeaderFail},
		"longer":    {hang, 20 * time.Second, 20 * time.Second, rpctypes.ErrGRPCTimeoutDueToLeaderFail},
		"queued":    {queue, 0, 5 * time.Second, rpctypes.ErrGRPCTimeout},
		"cancelled": {hang, -time.Second, time.Second, rpctypes.ErrGRPCCanceled},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, mine, _, _ := follower(t, nil)
				mine.elect("n1", true)
				mine.onPropose = test.propose
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				switch {
				case test.timeout > 0:
					ctx, cancel = context.WithTimeout(ctx, test.timeout)
					defer cancel()
				case test.timeout < 0:
					time.AfterFunc(-test.timeout, cancel)
				}
				start := time.Now()
				_, err := put(ctx, s)
				sameStatus(t, err, test.want)
				if took := time.Since(start); took != test.took {
					t.Fatalf("took %v, want %v", took, test.took)
				}
			})
		})
	}
}

// Bytes under way are bounded, and given back.
func TestWritesAreShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, mine, _, _ := follower(t, func(c *Config) { c.MaxRequestBytes, c.MaxPendingBytes = 1000, 1000 })
		mine.elect("n1", true)
		release := make(chan struct{})
		mine.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
			<-release
			return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{}}}, nil
		}
		large := &pb.PutRequest{Key: []byte("k"), Value: make([]byte, 600)}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.KV().Put(t.Context(), large); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		_, err := s.KV().Put(t.Context(), large)
		sameStatus(t, err, rpctypes.ErrGRPCRequestTooManyRequests)
		close(release)
		wg.Wait()
		if _, err := s.KV().Put(t.Context(), large); err != nil {
			t.Fatal(err)
		}
		if left := s.router.pending.Load(); left != 0 {
			t.Fatalf("%d bytes pending", left)
		}
	})
}

// A full disk of the leader refuses what makes the state grow, wherever the
// request came in.
func TestNoSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, mine, theirs, peers := follower(t, nil)
		full := testConfig(theirs, peers)
		full.Node, full.NoSpace = "n2", func() bool { return true }
		leader := newTestServer(t, full)
		for method, h := range leader.Handlers() {
			peers.serve("n2", method, h)
		}
		s := newTestServer(t, testConfig(mine, peers))
		theirs.onPropose = func(_ context.Context, r fsm.Request) (fsm.Result, error) {
			return fsm.Result{Response: &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{}}}, nil
		}
		for _, s := range []*Server{s, leader} {
			_, err := put(t.Context(), s)
			sameStatus(t, err, rpctypes.ErrGRPCNoSpace)
			_, err = s.KV().Txn(t.Context(), &pb.TxnRequest{Success: list(opTxn(nil, list(opPut("a"))))})
			sameStatus(t, err, rpctypes.ErrGRPCNoSpace)
			if _, err := s.KV().DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("k")}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestNoReplica(t *testing.T) {
	s := newTestServer(t, testConfig(nil, &fakePeers{}))
	_, err := put(t.Context(), s)
	sameStatus(t, err, notJoined())
	_, err = s.KV().Range(t.Context(), &pb.RangeRequest{Key: []byte("k")})
	sameStatus(t, err, notJoined())
	_, err = s.KV().Range(t.Context(), &pb.RangeRequest{Key: []byte("k"), Serializable: true})
	sameStatus(t, err, notJoined())
}

// Peers may send anything.
func TestHandlersSurviveAnything(t *testing.T) {
	replica := newFakeReplica(nil, shard.Leader{Node: "n1", Self: true})
	replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) { panic("bug") }
	replica.onReadIndex = func(context.Context) (uint64, error) { panic("bug") }
	s := newTestServer(t, testConfig(replica, &fakePeers{}))
	header := make([]byte, proposeHeader)
	header[0], header[11] = protocolVersion, 1
	with := func(r *pb.InternalRaftRequest) []byte {
		data, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Concat(header, data)
	}
	put, del := putData(t, "k", "v"), &pb.DeleteRangeRequest{Key: []byte("k")}
	valid := with(&pb.InternalRaftRequest{Put: put})
	systemSpace := bytes.Clone(valid)
	systemSpace[2] = byte(fsm.System)
	wrongSpace := bytes.Clone(valid)
	wrongSpace[2] = 7
	wrongGroup := bytes.Clone(valid)
	wrongGroup[10] = 7
	for name, test := range map[string]struct {
		method  string
		payload []byte
		want    code
	}{
		"empty":              {methodPropose, nil, codeMalformed},
		"short":              {methodPropose, valid[:14], codeMalformed},
		"nothing":            {methodPropose, header, codeMalformed},
		"garbage":            {methodPropose, append(bytes.Clone(header), "garbage!"...), codeMalformed},
		"cut off":            {methodPropose, valid[:len(valid)-1], codeMalformed},
		"unknown command":    {methodPropose, with(&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{ID: 1}}), codeMalformed},
		"two commands":       {methodPropose, with(&pb.InternalRaftRequest{Put: put, DeleteRange: del}), codeMalformed},
		"put without key":    {methodPropose, with(&pb.InternalRaftRequest{Put: &pb.PutRequest{}}), codeMalformed},
		"delete without key": {methodPropose, with(&pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{}}), codeMalformed},
		"empty operation":    {methodPropose, with(&pb.InternalRaftRequest{Txn: &pb.TxnRequest{Success: []*pb.RequestOp{{}}}}), codeMalformed},
		"system space":       {methodPropose, systemSpace, codeMalformed},
		"version":            {methodPropose, bytes.Repeat([]byte{9}, 40), codeMalformed},
		"space":              {methodPropose, wrongSpace, codeMalformed},
		"group":              {methodPropose, wrongGroup, codeNotLeader},
		"panic":              {methodPropose, valid, codeUnknown},
		"empty read index":   {methodReadIndex, nil, codeMalformed},
		"long read index":    {methodReadIndex, header, codeMalformed},
		"panic of readindex": {methodReadIndex, header[:readIndexHeader], codeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			reply, err := s.Handlers()[test.method](t.Context(), "n2", test.payload)
			if err != nil || len(reply) < answerHeader || code(reply[1]) != test.want {
				t.Fatalf("reply %v, %v; want code %d", reply, err, test.want)
			}
		})
	}
}
