package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// nextFuture returns the next completed future, which must be at hand.
func nextFuture(t *testing.T, p raft.AppendPipeline) raft.AppendFuture {
	t.Helper()
	synctest.Wait()
	select {
	case f := <-p.Consumer():
		return f
	default:
		t.Fatal("no future is complete")
		return nil
	}
}

func TestPipelineKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, func(c *Config) { c.PipelineWindow = 8 })
		next := uint64(1)
		serve(p.gb, func(req any) (any, error) {
			if r := req.(*raft.AppendEntriesRequest); r.Entries[0].Index != next {
				t.Errorf("index %d came instead of %d", r.Entries[0].Index, next)
			}
			next++
			return succeed(req)
		})
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		r := seeded(t)
		go func() {
			for i := range uint64(100) {
				size := 10
				if r.IntN(4) == 0 {
					size = 2 * fragmentBytes
				}
				if _, err := pl.AppendEntries(entries(1, 1+i, 1, size), new(raft.AppendEntriesResponse)); err != nil {
					t.Error(err)
				}
			}
		}()
		for i := range uint64(100) {
			f := <-pl.Consumer()
			if err := f.Error(); err != nil || !f.Response().Success || f.Request().Entries[0].Index != i+1 || f.Start().IsZero() {
				t.Fatalf("future %d: %v, %+v", i, err, f.Response())
			}
		}
		if m := p.ga.MatchIndex("b/1", 1); m != 100 {
			t.Errorf("match %d", m)
		}
		_, _ = pl.Close(), pl.Close()
		if _, err := pl.AppendEntries(entries(1, 1, 1, 1), nil); !errors.Is(err, raft.ErrPipelineShutdown) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestPipelineWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, func(c *Config) { c.PipelineWindow = 3 })
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		sent := make(chan error, 10)
		for range cap(sent) {
			go func() {
				_, err := pl.AppendEntries(entries(1, 1, 1, 1), new(raft.AppendEntriesResponse))
				sent <- err
			}()
		}
		synctest.Wait()
		if len(sent) != 3 {
			t.Errorf("%d requests in flight", len(sent))
		}
		start := time.Now()
		for range cap(sent) {
			if err := <-sent; err != nil && time.Since(start) > 10*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		}
		if f := nextFuture(t, pl); !errors.Is(f.Error(), ErrTimeout) {
			t.Errorf("the first request: %v", f.Error())
		}
		_ = pl.Close()
	})
}

// wedge makes raft's side of a pipeline do what it does when an answer is without success: it stops
// reading the answers (pipelineDecode returns) while the sender goes on until a send fails. It returns how
// many sends it took, and an error if a send did not return within an hour.
func wedge(pl raft.AppendPipeline) (sends int, err error) {
	failed := make(chan int, 1)
	go func() {
		for n := 1; ; n++ {
			if _, err := pl.AppendEntries(entries(1, 1, 1, 1), new(raft.AppendEntriesResponse)); err != nil {
				failed <- n
				return
			}
		}
	}()
	if f := <-pl.Consumer(); f.Response().Success {
		return 0, errors.New("the first answer is a success")
	}
	select {
	case n := <-failed:
		return n, nil
	case <-time.After(time.Hour):
		return 0, errors.New("a send has not returned for an hour")
	}
}

// reject answers heartbeats with success and everything else without.
func reject(req any) (any, error) {
	return &raft.AppendEntriesResponse{Term: 1, Success: isHeartbeat(req.(*raft.AppendEntriesRequest))}, nil
}

func TestPipelineNeverWedges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		serve(p.gb, reject)
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if n, err := wedge(pl); err != nil || n > 10 || time.Since(start) > time.Second {
			t.Errorf("%d sends in %v, %v", n, time.Since(start), err)
		}
		if err := p.ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
			t.Errorf("heartbeats: %v", err)
		}
		_ = pl.Close()
	})
}

// memoryLayer gives raft's own transport the memory network.
type memoryLayer struct {
	net.Listener
	n *MemoryNetwork
}

func (l memoryLayer) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return l.n.Dial(ctx, l.Addr().String(), string(addr))
}

// TestWedgeIsNoticed: raft's own pipeline has the fault (hashicorp/raft#612), so wedge must find it there.
func TestWedgeIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemoryNetwork()
		transport := func(name string) *raft.NetworkTransport {
			l, err := n.Listen(name)
			if err != nil {
				t.Fatal(err)
			}
			return raft.NewNetworkTransport(memoryLayer{l, n}, 3, 10*time.Second, io.Discard)
		}
		a, b := transport("a"), transport("b")
		stop := make(chan struct{})
		go func() {
			for {
				select {
				case rpc := <-b.Consumer():
					rpc.Respond(reject(rpc.Command))
				case <-stop:
					return
				}
			}
		}()
		pl, err := a.AppendEntriesPipeline("b", "b")
		if err != nil {
			t.Fatal(err)
		}
		if sends, err := wedge(pl); err == nil {
			t.Errorf("a pipeline known to wedge passed after %d sends", sends)
		}
		_, _, _ = pl.Close(), a.Close(), b.Close()
		b.CloseStreams()
		close(stop)
	})
}

// TestPipelineFailsWithItsConnection: all that is in flight fails, and so do later sends.
func TestPipelineFailsWithItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, nil)
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		resp := &raft.AppendEntriesResponse{Success: true, Term: 1} // must not survive
		for range 2 {
			if _, err := pl.AppendEntries(entries(1, 1, 1, 1), resp); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		p.net.memory.Drop("a", "b")
		for i := range 2 {
			if f := nextFuture(t, pl); f.Error() == nil || f.Response().Success {
				t.Errorf("future %d: %v, %+v", i, f.Error(), f.Response())
			}
		}
		if _, err := pl.AppendEntries(entries(1, 1, 1, 1), resp); err == nil {
			t.Error("a send after the failure")
		}
		if !p.ga.Acked("b/1", 1).IsZero() {
			t.Error("something was acknowledged")
		}
		// A new pipeline works over a new connection.
		time.Sleep(time.Second)
		serve(p.gb, succeed)
		again, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := again.AppendEntries(entries(1, 1, 1, 1), resp); err != nil {
			t.Fatal(err)
		}
		if f := nextFuture(t, again); f.Error() != nil || !f.Response().Success {
			t.Errorf("over the new connection: %v", f.Error())
		}
		_, _ = pl.Close(), again.Close()
	})
}

// Raft sends an AppendEntries each CommitTimeout, in every group. One that tells the peer nothing stays here; one
// with entries or a newer commit index does not, nor the first after a while or on a broken connection.
func TestPipelineDropsWhatTellsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, func(c *Config) { c.RepeatAfter = time.Minute })
		came := 0
		serve(p.gb, func(req any) (any, error) {
			came++
			return succeed(req)
		})
		pl, err := p.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = pl.Close() }()
		tell := func(commit, last uint64) *raft.AppendEntriesRequest {
			return &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: last, PrevLogTerm: 3, LeaderCommitIndex: commit}
		}
		withEntry := entries(3, 11, 1, 10)
		withEntry.LeaderCommitIndex = 10
		for _, step := range []struct {
			what string
			req  *raft.AppendEntriesRequest
			goes bool
		}{
			{"the first", tell(10, 10), true},
			{"the same again", tell(10, 10), false},
			{"an entry", withEntry, true},
			{"nothing behind it", tell(10, 11), false},
			{"its commit", tell(11, 11), true},
			{"nothing", tell(11, 11), false},
			{"a commit index beyond the log", tell(20, 11), true},
			{"and again: the peer can have taken 11 only", tell(20, 11), true},
			{"a log that the peer is not known to have", tell(11, 12), true},
		} {
			before := came
			f, err := pl.AppendEntries(step.req, new(raft.AppendEntriesResponse))
			if err != nil {
				t.Fatalf("%s: %v", step.what, err)
			}
			synctest.Wait()
			if goes := came > before; goes != step.goes {
				t.Errorf("%s: sent is %v", step.what, goes)
			}
			if len(pl.Consumer()) > 0 != step.goes {
				t.Errorf("%s: %d futures", step.what, len(pl.Consumer()))
			}
			if step.goes {
				<-pl.Consumer()
			} else if f.Error() != nil {
				t.Errorf("%s: %v", step.what, f.Error())
			}
		}
		before := came
		send := func() error {
			_, err := pl.AppendEntries(tell(11, 12), new(raft.AppendEntriesResponse))
			synctest.Wait()
			return err
		}
		time.Sleep(59 * time.Second)
		if err := send(); err != nil || came != before {
			t.Errorf("before RepeatAfter: %v, sent %d", err, came-before)
		}
		time.Sleep(time.Second)
		if err := send(); err != nil || came != before+1 {
			t.Errorf("after RepeatAfter: %v, sent %d", err, came-before)
		}
		<-pl.Consumer()
		_ = p.b.Close()
		synctest.Wait()
		if err := send(); err == nil {
			t.Error("on a broken connection: raft must notice")
		}
	})
}
