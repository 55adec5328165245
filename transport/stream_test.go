package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// installPair is a Group on each of two nodes, where b receives snapshots with the given function.
func installPair(t *testing.T, net *testNet, install InstallFunc) (ga, gb *Group) {
	t.Helper()
	a, b := net.start("a", nil), net.start("b", nil)
	gb, err := b.Group(1, "b/1", install)
	if err != nil {
		t.Fatal(err)
	}
	return mustGroup(t, a, 1, "a/1"), gb
}

func installRequest(size int) *raft.InstallSnapshotRequest {
	return &raft.InstallSnapshotRequest{RPCHeader: raft.RPCHeader{ID: []byte("a/1"), Addr: []byte("a/1")}, Term: 3,
		LastLogIndex: 100, LastLogTerm: 2, Configuration: testConfiguration, ConfigurationIndex: 9, Size: int64(size)}
}

var installed = &raft.InstallSnapshotResponse{Term: 3, Success: true}

func readThen(resp *raft.InstallSnapshotResponse) InstallFunc {
	return func(_ context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
		if _, err := io.Copy(io.Discard, data); err != nil {
			return nil, err
		}
		return resp, nil
	}
}

// zeros is an endless source, a snapshot whose size does not matter in memory.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func TestSnapshotArrives(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		r := seeded(t)
		for _, size := range []int{0, 1, fragmentBytes, 3<<20 + 17} {
			data := randomBytes(r, size)
			var got []byte
			ga, gb := installPair(t, net, func(_ context.Context, req *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
				if req.LastLogIndex != 100 || !bytes.Equal(req.Configuration, testConfiguration) || string(req.Addr) != "a/1" || req.Size != int64(size) {
					t.Errorf("request %+v", req)
				}
				var err error
				got, err = io.ReadAll(data)
				return installed, err
			})
			resp := raft.InstallSnapshotResponse{}
			if err := ga.InstallSnapshot("b/1", "b/1", installRequest(size), &resp, bytes.NewReader(data)); err != nil || !resp.Success || resp.Term != 3 {
				t.Fatalf("%d bytes: %v, %+v", size, err, resp)
			}
			if !bytes.Equal(got, data) {
				t.Errorf("%d of %d bytes arrived as they were", len(got), size)
			}
			_, _ = ga.t.Close(), gb.t.Close()
		}
	})
}

// TestInstallOutlivesItsGroup: the handler closes its own group and opens it again.
func TestInstallOutlivesItsGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		var gb *Group
		ga, first := installPair(t, net, func(ctx context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
			if _, err := io.CopyN(io.Discard, data, 1000); err != nil {
				return nil, err
			}
			_ = gb.Close()
			if _, err := io.Copy(io.Discard, data); err != nil {
				return nil, err
			}
			time.Sleep(time.Minute) // longer than any silence that is tolerated
			again, err := gb.t.Group(1, "b/1", noInstall)
			if err != nil {
				return nil, err
			}
			serve(again, succeed)
			return installed, ctx.Err()
		})
		gb = first
		resp := raft.InstallSnapshotResponse{}
		if err := ga.InstallSnapshot("b/1", "b/1", installRequest(3<<20), &resp, io.LimitReader(zeros{}, 3<<20)); err != nil || !resp.Success {
			t.Fatalf("%v, %+v", err, resp)
		}
		if err := ga.AppendEntries("b/1", "b/1", heartbeat(3), new(raft.AppendEntriesResponse)); err != nil {
			t.Errorf("the new group: %v", err)
		}
	})
}

// TestEarlyAnswerStopsTheStream: an endless stream is refused after a few bytes.
func TestEarlyAnswerStopsTheStream(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		for _, c := range []struct {
			name   string
			target raft.ServerAddress
			want   func(resp *raft.InstallSnapshotResponse, err error) bool
		}{
			{"refused by the handler", "b/1", func(_ *raft.InstallSnapshotResponse, err error) bool {
				var remote *RemoteError
				return errors.As(err, &remote) && remote.Code == 7
			}},
			{"unknown replica", "b/2", func(_ *raft.InstallSnapshotResponse, err error) bool {
				return errors.Is(err, ErrUnknownReplica)
			}},
		} {
			ga, gb := installPair(t, net, func(_ context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
				_, err := io.CopyN(io.Discard, data, 100)
				return nil, errors.Join(err, &RemoteError{Code: 7, Message: "stale"})
			})
			req := installRequest(0)
			req.Size = 1 << 60
			resp := raft.InstallSnapshotResponse{}
			if err := ga.InstallSnapshot("b/1", c.target, req, &resp, zeros{}); !c.want(&resp, err) {
				t.Errorf("%s: %v, %+v", c.name, err, resp)
			}
			_, _ = ga.t.Close(), gb.t.Close()
		}
	})
}

func TestOneInstallAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		release := make(chan struct{})
		ga, _ := installPair(t, net, func(context.Context, *raft.InstallSnapshotRequest, io.Reader) (*raft.InstallSnapshotResponse, error) {
			<-release
			return installed, nil
		})
		first := make(chan error, 1)
		go func() {
			first <- ga.InstallSnapshot("b/1", "b/1", installRequest(1), new(raft.InstallSnapshotResponse), strings.NewReader("x"))
		}()
		synctest.Wait()
		if err := ga.InstallSnapshot("b/1", "b/1", installRequest(1), new(raft.InstallSnapshotResponse), strings.NewReader("x")); !errors.Is(err, ErrBusy) {
			t.Errorf("a second install: %v", err)
		}
		close(release)
		if err := <-first; err != nil {
			t.Error(err)
		}
		if err := ga.InstallSnapshot("b/1", "b/1", installRequest(1), new(raft.InstallSnapshotResponse), strings.NewReader("x")); err != nil {
			t.Errorf("after the first: %v", err)
		}
	})
}

func TestSnapshotOfWrongSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		received := make(chan error, 10)
		ga, _ := installPair(t, net, func(_ context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
			_, err := io.Copy(io.Discard, data)
			received <- err
			return installed, err
		})
		broken := errors.New("the disk is broken")
		for name, c := range map[string]struct {
			data io.Reader
			want error
		}{
			"short":  {strings.NewReader("12345"), errStreamSize},
			"long":   {strings.NewReader(strings.Repeat("x", 1000)), errStreamSize},
			"broken": {io.MultiReader(strings.NewReader("12345"), &failing{broken}), broken},
		} {
			resp := raft.InstallSnapshotResponse{Success: true}
			if err := ga.InstallSnapshot("b/1", "b/1", installRequest(10), &resp, c.data); !errors.Is(err, c.want) {
				t.Errorf("%s: %v", name, err)
			}
			// The handler must not take what it got for the whole.
			if err := <-received; err == nil {
				t.Errorf("%s: the handler read to a proper end", name)
			}
			synctest.Wait()
		}
	})
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

// TestHostileStreams: what a sender outside the protocol gets across.
func TestHostileStreams(t *testing.T) {
	request := func(size int) []byte {
		return appendFrame(nil, kindRaftRequest, 0, appendRequest(appendString(appendUint(nil, 1), "b/1"), installRequest(size)))
	}
	data := func(s string) []byte { return appendFrame(nil, kindStreamData, 0, []byte(s)) }
	end := func(n byte) []byte { return appendFrame(nil, kindStreamEnd, 0, []byte{n, 0, 0, 0, 0, 0, 0, 0}) }
	flipped := data("abc")
	flipped[headerBytes] ^= 1
	for name, frames := range map[string][][]byte{
		"too much data":      {request(3), data("abcd"), end(4)},
		"too little data":    {request(3), data("ab"), end(2)},
		"wrong total":        {request(3), data("abc"), end(2)},
		"flipped bit":        {request(3), flipped, end(3)},
		"another kind":       {request(3), appendFrame(nil, kindCall, 0, nil)},
		"no data at all":     {request(3)},
		"end without total":  {request(3), data("abc"), appendFrame(nil, kindStreamEnd, 0, nil)},
		"cut":                {request(3), data("abc")},
		"frame after refuse": {request(3), data("abc")[:20]},
	} {
		synctest.Test(t, func(t *testing.T) {
			net := newTestNet(t, true)
			read := make(chan error, 1)
			installPair(t, net, func(_ context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
				_, err := io.Copy(io.Discard, data)
				read <- err
				return nil, errors.New("bad stream")
			})
			w := net.dialAs(t, "x", "b", purposeStream)
			for _, f := range frames {
				if _, err := w.Write(f); err != nil {
					t.Fatal(err)
				}
			}
			if strings.HasPrefix(name, "cut") {
				_ = w.Close()
			}
			start := time.Now()
			if err := <-read; err == nil {
				t.Errorf("%s: the handler read to a proper end", name)
			}
			if d := time.Since(start); d > 30*time.Second {
				t.Errorf("%s: noticed after %v", name, d)
			}
		})
	}
	// And without a request.
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		installPair(t, net, noInstall)
		w := net.dialAs(t, "x", "b", purposeStream)
		if _, err := w.Write(data("abc")); err != nil {
			t.Fatal(err)
		}
		if _, err := w.frames.next(); err == nil {
			t.Error("data without a request is answered")
		}
	})
}

// TestStalledStreams: nothing moves for StreamTimeout, on either side, and both ends notice.
func TestStalledStreams(t *testing.T) {
	for name, c := range map[string]struct {
		stall func(net *MemoryNetwork) // while the handler has read a little
		want  time.Duration            // at most
	}{
		"partition":                   {func(n *MemoryNetwork) { n.Isolate("b") }, 31 * time.Second},
		"data do not arrive":          {func(n *MemoryNetwork) { n.Partition("a", "b") }, 31 * time.Second},
		"signs of life do not arrive": {func(n *MemoryNetwork) { n.Partition("b", "a") }, 31 * time.Second},
		"connection breaks":           {func(n *MemoryNetwork) { n.Drop("a", "b") }, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			net := newTestNet(t, true)
			ended := make(chan time.Time, 1)
			ga, _ := installPair(t, net, func(ctx context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
				_, err := io.CopyN(io.Discard, data, 1000)
				c.stall(net.memory)
				<-ctx.Done()
				ended <- time.Now()
				return nil, errors.Join(err, ctx.Err())
			})
			start := time.Now()
			req := installRequest(0)
			req.Size = 1 << 40
			err := ga.InstallSnapshot("b/1", "b/1", req, new(raft.InstallSnapshotResponse), zeros{})
			if d := time.Since(start); err == nil || d > c.want {
				t.Errorf("%s: the sender: %v after %v", name, err, d)
			}
			net.memory.HealAll()
			if d := (<-ended).Sub(start); d > c.want+8*time.Second { // the receiver pings every 7.5 s
				t.Errorf("%s: the handler's context ended after %v", name, d)
			}
		})
	}
}

// TestHandlerThatDoesNotRead: the process is alive and says so, but the data do not move.
func TestHandlerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		ga, _ := installPair(t, net, func(ctx context.Context, _ *raft.InstallSnapshotRequest, _ io.Reader) (*raft.InstallSnapshotResponse, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		})
		start := time.Now()
		req := installRequest(0)
		req.Size = 1 << 40
		err := ga.InstallSnapshot("b/1", "b/1", req, new(raft.InstallSnapshotResponse), zeros{})
		if d := time.Since(start); err == nil || d != 30*time.Second {
			t.Errorf("%v after %v", err, d)
		}
	})
}

func TestInstallIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		ended := make(chan struct{})
		ga, _ := installPair(t, net, func(ctx context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
			_, _ = io.Copy(io.Discard, data)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		})
		start := time.Now()
		err := ga.InstallSnapshot("b/1", "b/1", installRequest(1), new(raft.InstallSnapshotResponse), strings.NewReader("x"))
		if !errors.Is(err, ErrTimeout) || time.Since(start) != 10*time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		<-ended
	})
}

func TestGroupCloseCancelsItsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		ended := make(chan error, 1)
		ga, _ := installPair(t, net, func(ctx context.Context, _ *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
			_, _ = io.Copy(io.Discard, data)
			<-ctx.Done()
			ended <- ctx.Err()
			return nil, ctx.Err()
		})
		start := time.Now()
		time.AfterFunc(time.Second, func() { _ = ga.Close() })
		err := ga.InstallSnapshot("b/1", "b/1", installRequest(1), new(raft.InstallSnapshotResponse), strings.NewReader("x"))
		if !errors.Is(err, ErrClosed) || time.Since(start) != time.Second {
			t.Errorf("the sender: %v after %v", err, time.Since(start))
		}
		if err := <-ended; err == nil || time.Since(start) != time.Second {
			t.Errorf("the handler: %v after %v", err, time.Since(start))
		}
	})
}

// TestStreamLeavesHeartbeatsAlone: heartbeats pass while a snapshot is under way.
func TestStreamLeavesHeartbeatsAlone(t *testing.T) {
	net := newTestNet(t, false)
	ga, gb := installPair(t, net, readThen(installed))
	serve(gb, succeed)
	done := make(chan error, 1)
	const size = 64 << 20
	go func() {
		done <- ga.InstallSnapshot("b/1", "b/1", installRequest(size), new(raft.InstallSnapshotResponse), io.LimitReader(zeros{}, size))
	}()
	for heartbeats := 1; ; heartbeats++ {
		if err := ga.AppendEntries("b/1", "b/1", heartbeat(1), new(raft.AppendEntriesResponse)); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d heartbeats meanwhile", heartbeats)
			return
		default:
		}
	}
}
