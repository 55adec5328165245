package transport

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// pair is a Group on each of two nodes; the test plays raft on both.
type pair struct {
	net  *testNet
	a, b *Transport
	ga   *Group
	gb   *Group
}

func newPair(t *testing.T, tweak func(*Config)) *pair {
	net := newTestNet(t, true)
	p := &pair{net: net, a: net.start("a", tweak), b: net.start("b", tweak)}
	p.ga, p.gb = mustGroup(t, p.a, 1, "a/1"), mustGroup(t, p.b, 1, "b/1")
	return p
}

func mustGroup(t *testing.T, tr *Transport, id uint64, local raft.ServerAddress) *Group {
	t.Helper()
	g, err := tr.Group(id, local, noInstall)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// serve answers what arrives at a group with f, until the group closes.
func serve(g *Group, f func(req any) (any, error)) {
	g.tasks.Go(func() {
		for {
			select {
			case rpc := <-g.Consumer():
				rpc.Respond(f(rpc.Command))
			case <-g.ctx.Done():
				return
			}
		}
	})
}

func succeed(req any) (any, error) {
	return &raft.AppendEntriesResponse{Term: req.(*raft.AppendEntriesRequest).Term, Success: true}, nil
}

func heartbeat(term uint64) *raft.AppendEntriesRequest { return &raft.AppendEntriesRequest{Term: term} }

func entries(term, from uint64, n, size int) *raft.AppendEntriesRequest {
	r := &raft.AppendEntriesRequest{Term: term, PrevLogEntry: from - 1, PrevLogTerm: term}
	for i := range uint64(n) {
		r.Entries = append(r.Entries, &raft.Log{Index: from + i, Term: term, Data: bytes.Repeat([]byte{byte(i)}, size)})
	}
	return r
}

func TestEveryMessageArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		header := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("a/1"), Addr: []byte("a/1")}
		answer := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("b/1"), Addr: []byte("b/1")}
		serve(p.gb, func(req any) (any, error) {
			if h := req.(raft.WithRPCHeader).GetRPCHeader(); string(h.ID) != "a/1" || string(h.Addr) != "a/1" || h.ProtocolVersion != 3 {
				t.Errorf("%T arrived with header %+v", req, h)
			}
			switch r := req.(type) {
			case *raft.AppendEntriesRequest:
				return &raft.AppendEntriesResponse{RPCHeader: answer, Term: r.Term, LastLog: 9, NoRetryBackoff: true}, nil
			case *raft.RequestVoteRequest:
				return &raft.RequestVoteResponse{RPCHeader: answer, Term: r.Term, Granted: true}, nil
			case *raft.RequestPreVoteRequest:
				return &raft.RequestPreVoteResponse{RPCHeader: answer, Term: r.Term, Granted: true}, nil
			case *raft.TimeoutNowRequest:
				return &raft.TimeoutNowResponse{RPCHeader: answer}, nil
			}
			return nil, fmt.Errorf("unexpected %T", req)
		})
		var ae raft.AppendEntriesResponse
		if err := p.ga.AppendEntries("b/1", "b/1", &raft.AppendEntriesRequest{RPCHeader: header, Term: 3}, &ae); err != nil || ae.LastLog != 9 || !ae.NoRetryBackoff || string(ae.ID) != "b/1" {
			t.Errorf("%+v, %v", ae, err)
		}
		var rv raft.RequestVoteResponse
		if err := p.ga.RequestVote("b/1", "b/1", &raft.RequestVoteRequest{RPCHeader: header, Term: 3}, &rv); err != nil || !rv.Granted || rv.Term != 3 {
			t.Errorf("%+v, %v", rv, err)
		}
		var pv raft.RequestPreVoteResponse
		if err := p.ga.RequestPreVote("b/1", "b/1", &raft.RequestPreVoteRequest{RPCHeader: header, Term: 3}, &pv); err != nil || !pv.Granted || pv.Term != 3 {
			t.Errorf("%+v, %v", pv, err)
		}
		var tn raft.TimeoutNowResponse
		if err := p.ga.TimeoutNow("b/1", "b/1", &raft.TimeoutNowRequest{RPCHeader: header}, &tn); err != nil || string(tn.ID) != "b/1" {
			t.Errorf("%+v, %v", tn, err)
		}
	})
}

func TestRaftErrorsTravel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		serve(p.gb, func(any) (any, error) { return nil, raft.ErrUnsupportedProtocol })
		resp := raft.AppendEntriesResponse{Success: true, Term: 1}
		err := p.ga.AppendEntries("b/1", "b/1", heartbeat(1), &resp)
		if err == nil || err.Error() != raft.ErrUnsupportedProtocol.Error() {
			t.Error(err)
		}
		if !p.ga.Acked("b/1", 1).IsZero() {
			t.Error("an error counts as an answer")
		}
	})
}

// ackedLate returns by how much Acked is later than the moment before the send, for a plain and for a
// pipelined request that take half a second each.
func ackedLate(t *testing.T, planted faults) (plain, pipelined time.Duration) {
	p := newPair(t, nil)
	p.a.faults = planted
	serve(p.gb, func(req any) (any, error) {
		time.Sleep(300 * time.Millisecond)
		return succeed(req)
	})
	p.net.memory.Delay("a", "b", 200*time.Millisecond)
	pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = pl.Close() }()
	before := time.Now()
	if err := p.ga.AppendEntries("b/1", "b/1", heartbeat(5), new(raft.AppendEntriesResponse)); err != nil {
		t.Fatal(err)
	}
	plain = p.ga.Acked("b/1", 5).Sub(before)
	select {
	case <-p.ga.AckNotify():
	default:
		t.Error("no notification")
	}
	before = time.Now()
	f, err := pl.AppendEntries(entries(5, 1, 3, 10), new(raft.AppendEntriesResponse))
	if err != nil || f.Error() != nil {
		t.Fatal(err, f.Error())
	}
	if d := time.Since(before); d != 500*time.Millisecond {
		t.Errorf("the pipelined request took %v", d)
	}
	pipelined = p.ga.Acked("b/1", 5).Sub(before)
	return plain, pipelined
}

func TestAckedIsTheSendTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if plain, pipelined := ackedLate(t, faults{}); plain != 0 || pipelined != 0 {
			t.Errorf("acked %v after the send, pipelined %v", plain, pipelined)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		if plain, pipelined := ackedLate(t, faults{ackedAtAnswer: true}); plain == 0 || pipelined == 0 {
			t.Error("the planted fault was not noticed")
		}
	})
}

func TestAckedRules(t *testing.T) {
	net := newTestNet(t, true)
	g := mustGroup(t, net.start("a", nil), 1, "a/1")
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	ok := func(term uint64) *raft.AppendEntriesResponse {
		return &raft.AppendEntriesResponse{Term: term, Success: true}
	}
	check := func(what string, term uint64, acked time.Time, match uint64) {
		t.Helper()
		if got := g.Acked("b/1", term); !got.Equal(acked) {
			t.Errorf("%s: acked %v, want %v", what, got, acked)
		}
		if got := g.MatchIndex("b/1", term); got != match {
			t.Errorf("%s: match %d, want %d", what, got, match)
		}
	}
	check("nothing yet", 0, time.Time{}, 0)
	g.record("b/1", at(10), heartbeat(3), ok(3))
	check("a heartbeat proves contact, no match", 3, at(10), 0)
	g.record("b/1", at(11), entries(3, 7, 2, 1), ok(3))
	check("entries match up to the last", 3, at(11), 8)
	g.record("b/1", at(12), &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: 20}, ok(3))
	check("no entries match up to the previous one", 3, at(12), 20)
	g.record("b/1", at(5), entries(3, 2, 1, 1), ok(3))
	check("older answers change nothing", 3, at(12), 20)
	g.record("b/1", at(13), heartbeat(3), ok(4))
	check("success in another term does not count", 3, at(12), 20)
	g.record("b/1", at(13), heartbeat(3), &raft.AppendEntriesResponse{Term: 3})
	check("no success does not count", 3, at(12), 20)
	if !g.Acked("b/1", 2).IsZero() || !g.Acked("b/1", 4).IsZero() || !g.Acked("c/1", 3).IsZero() {
		t.Error("another term's or peer's question is answered")
	}
	g.record("b/1", at(1), heartbeat(4), ok(4))
	check("a new term begins anew", 4, at(1), 0)
	check("the old term is forgotten", 3, time.Time{}, 0)
	g.record("b/1", at(99), entries(3, 50, 1, 1), ok(3))
	check("a late answer of the old term changes nothing", 4, at(1), 0)
}

func TestSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		serve(p.ga, succeed)
		serve(p.gb, succeed)
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		p.ga.Suspend(true)
		start := time.Now()
		_, pipelined := pl.AppendEntries(entries(1, 1, 1, 1), new(raft.AppendEntriesResponse))
		_, opened := p.ga.AppendEntriesPipeline("b/1", "b/1")
		for what, err := range map[string]error{
			"AppendEntries":    p.ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)),
			"RequestVote":      p.ga.RequestVote("b/1", "b/1", &raft.RequestVoteRequest{}, new(raft.RequestVoteResponse)),
			"RequestPreVote":   p.ga.RequestPreVote("b/1", "b/1", &raft.RequestPreVoteRequest{}, new(raft.RequestPreVoteResponse)),
			"TimeoutNow":       p.ga.TimeoutNow("b/1", "b/1", &raft.TimeoutNowRequest{}, new(raft.TimeoutNowResponse)),
			"InstallSnapshot":  p.ga.InstallSnapshot("b/1", "b/1", &raft.InstallSnapshotRequest{}, nil, nil),
			"pipelined append": pipelined,
			"new pipeline":     opened,
		} {
			if !errors.Is(err, ErrSuspended) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if err := p.gb.AppendEntries("a/1", "a/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
			t.Errorf("a suspended group does not answer: %v", err)
		}
		if time.Since(start) != 0 {
			t.Errorf("took %v", time.Since(start))
		}
		p.ga.Suspend(false)
		if err := p.ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		_ = pl.Close()
	})
}

func TestUnknownReplica(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		for _, target := range []raft.ServerAddress{"b/2", "b/10"} {
			if err := p.ga.AppendEntries("x", target, heartbeat(1), new(raft.AppendEntriesResponse)); !errors.Is(err, ErrUnknownReplica) {
				t.Errorf("%s: %v", target, err)
			}
		}
		other := mustGroup(t, p.a, 2, "a/1")
		if err := other.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); !errors.Is(err, ErrUnknownReplica) {
			t.Errorf("another group: %v", err)
		}
		if n := counted(p.b.metrics.dropped.WithLabelValues("unknown_replica")); n != 3 {
			t.Errorf("%v dropped", n)
		}
		for _, bad := range []raft.ServerAddress{"", "b", "/1", raft.ServerAddress(strings.Repeat("x", 200) + "/1")} {
			if err := p.ga.AppendEntries("x", bad, heartbeat(1), new(raft.AppendEntriesResponse)); err == nil {
				t.Errorf("replica id %q is accepted", bad)
			}
			if _, err := p.a.Group(1, bad, noInstall); err == nil {
				t.Errorf("replica id %q is opened", bad)
			}
		}
	})
}

// TestTwoReplicasOnANode: a group's replicas on one node reach each other like all others.
func TestTwoReplicasOnANode(t *testing.T) {
	net := newTestNet(t, false)
	tr := net.start("a", nil)
	delete(net.addrs, "a") // the node need not be able to resolve itself
	g1, g2 := mustGroup(t, tr, 1, "a/1"), mustGroup(t, tr, 1, "a/2")
	serve(g2, succeed)
	if err := g1.AppendEntries("a/2", "a/2", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
		t.Error(err)
	}
}

func TestGroupOpensOnce(t *testing.T) {
	net := newTestNet(t, true)
	tr := net.start("a", nil)
	g := mustGroup(t, tr, 1, "a/1")
	if _, err := tr.Group(1, "a/1", noInstall); !errors.Is(err, errDuplicate) {
		t.Error(err)
	}
	mustGroup(t, tr, 2, "a/1")
	mustGroup(t, tr, 1, "a/2")
	_, _ = g.Close(), g.Close()
	again := mustGroup(t, tr, 1, "a/1")
	_ = g.Close() // must not close its successor
	if tr.groups[again.key] != again {
		t.Error("the second Close of a group has removed its successor")
	}
	if err := g.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// TestStuckMainLoop: a group whose raft does not take messages fails its own and leaves the others alone.
func TestStuckMainLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, func(c *Config) { c.InboxBytes = 1 << 20; c.RPCTimeout = time.Minute })
		a2, b2 := mustGroup(t, p.a, 2, "a/1"), mustGroup(t, p.b, 2, "b/1")
		serve(b2, succeed)
		var busy int
		results := make(chan error, 20)
		for i := range cap(results) {
			go func() {
				results <- p.ga.AppendEntries("b/1", "b/1", entries(1, 1+uint64(i), 1, 200<<10), new(raft.AppendEntriesResponse))
			}()
			synctest.Wait()
			if err := a2.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
				t.Fatalf("the other group: %v", err)
			}
		}
		for len(results) > 0 {
			if err := <-results; !errors.Is(err, ErrBusy) {
				t.Error(err)
			}
			busy++
		}
		if busy < 10 {
			t.Errorf("%d of 20 large messages were refused", busy)
		}
		// What the senders have given up is not handed to raft later.
		time.Sleep(2 * time.Minute)
		serve(p.gb, func(req any) (any, error) {
			if r := req.(*raft.AppendEntriesRequest); len(r.Entries) > 0 && r.Entries[0].Index > 1 {
				t.Errorf("a message that its sender gave up a minute ago, with index %d", r.Entries[0].Index)
			}
			return succeed(req)
		})
		if err := p.ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
			t.Error(err)
		}
	})
}

func TestDeadlinesOfRaftMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil) // nobody takes messages from b's group, but pings are answered
		for what, c := range map[string]struct {
			req  *raft.AppendEntriesRequest
			want time.Duration
		}{"heartbeat": {heartbeat(1), 2 * time.Second}, "entries": {entries(1, 1, 1, 1), 10 * time.Second}} {
			start := time.Now()
			err := p.ga.AppendEntries("b/1", "b/1", c.req, new(raft.AppendEntriesResponse))
			if !errors.Is(err, ErrTimeout) || time.Since(start) != c.want {
				t.Errorf("%s: %v after %v", what, err, time.Since(start))
			}
		}
	})
}

func TestGroupCloseFreesWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		results := make(chan error, 4)
		go func() {
			results <- p.ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse))
		}()
		go func() {
			results <- p.ga.RequestVote("b/1", "b/1", &raft.RequestVoteRequest{}, new(raft.RequestVoteResponse))
		}()
		for range 2 { // fills the window
			if _, err := pl.AppendEntries(entries(1, 1, 1, 1), new(raft.AppendEntriesResponse)); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			go func() {
				_, err := pl.AppendEntries(entries(1, 1, 1, 1), new(raft.AppendEntriesResponse))
				results <- err
			}()
		}
		synctest.Wait()
		start := time.Now()
		_ = p.ga.Close()
		for range cap(results) {
			if err := <-results; err == nil {
				t.Error("an answer from nowhere")
			}
		}
		_ = pl.Close()
		if time.Since(start) != 0 {
			t.Errorf("took %v", time.Since(start))
		}
	})
}

func TestLargeAppendIsFragmented(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		wide := func(c *Config) {
			c.MaxAppendBytes = c.MaxMessageBytes
			c.RPCTimeout, c.HeartbeatTimeout = time.Minute, time.Minute // a busy machine takes its time
		}
		a := net.start("a", func(c *Config) { c.MaxMessageBytes = 100 << 20; wide(c) })
		b := net.start("b", func(c *Config) { c.MaxMessageBytes = 100 << 20; wide(c) })
		ga, gb := mustGroup(t, a, 1, "a/1"), mustGroup(t, b, 1, "b/1")
		want := entries(1, 1, 64, 1<<20)
		want.Entries[3].AppendedAt, want.Entries[4].Extensions = time.Unix(1, 2), []byte("extra")
		serve(gb, func(req any) (any, error) {
			got := req.(*raft.AppendEntriesRequest)
			if len(got.Entries) == 0 {
				return succeed(req)
			}
			if len(got.Entries) != 64 || !got.Entries[3].AppendedAt.Equal(time.Unix(1, 2)) || string(got.Entries[4].Extensions) != "extra" {
				t.Errorf("%d entries arrived", len(got.Entries))
			}
			for i, e := range got.Entries {
				if !bytes.Equal(e.Data, want.Entries[i].Data) {
					t.Errorf("entry %d is not what was sent", i)
				}
			}
			return succeed(req)
		})
		done := make(chan error, 1)
		go func() { done <- ga.AppendEntries("b/1", "b/1", want, new(raft.AppendEntriesResponse)) }()
		heartbeats := 0
		for {
			select {
			case err := <-done:
				if err != nil || len(want.Entries) != 64 {
					t.Fatalf("%v, %d entries left", err, len(want.Entries))
				}
				t.Logf("%d heartbeats meanwhile", heartbeats)
				return
			default:
				if err := ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
					t.Fatal(err)
				}
				heartbeats++
			}
		}
	})
}

func TestAppendIsShortened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, func(c *Config) { c.MaxMessageBytes, c.MaxAppendBytes = 4<<20, 4<<20 })
		var got int
		serve(p.gb, func(req any) (any, error) { got = len(req.(*raft.AppendEntriesRequest).Entries); return succeed(req) })
		for _, c := range []struct{ n, size, want int }{{20, 300 << 10, 13}, {2, 3 << 20, 1}, {100, 10, 100}, {maxEntries + 5, 1, maxEntries}} {
			req := entries(1, 1, c.n, c.size)
			if err := p.ga.AppendEntries("b/1", "b/1", req, new(raft.AppendEntriesResponse)); err != nil {
				t.Fatal(err)
			}
			if got != c.want || len(req.Entries) != c.want {
				t.Errorf("%d entries of %d bytes: %d arrived, %d left, want %d", c.n, c.size, got, len(req.Entries), c.want)
			}
		}
	})
}
