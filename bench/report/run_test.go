package report

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/bench"
	"kvd/bench/local"
)

// forgetful is a server that keeps pairs, but for one.
type forgetful struct {
	pb.UnimplementedKVServer
	addr   string
	forget string

	mu    sync.Mutex
	pairs map[string]string
}

func startForgetful(t *testing.T, forget string) *forgetful {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forgetful{addr: listener.Addr().String(), forget: forget, pairs: make(map[string]string)}
	server := grpc.NewServer()
	pb.RegisterKVServer(server, f)
	var done sync.WaitGroup
	done.Go(func() {
		if err := server.Serve(listener); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { server.Stop(); done.Wait() })
	return f
}

func (f *forgetful) Put(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if string(r.GetKey()) != f.forget {
		f.pairs[string(r.GetKey())] = string(r.GetValue())
	}
	return &pb.PutResponse{Header: &pb.ResponseHeader{}}, nil
}

func (f *forgetful) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{}}
	if value, ok := f.pairs[string(r.GetKey())]; ok {
		resp.Kvs = []*mvccpb.KeyValue{{Key: r.GetKey(), Value: []byte(value)}}
	}
	return resp, nil
}

func clusterOf(addresses ...string) *cluster {
	c := &cluster{Cluster: new(local.Cluster), layout: Layout{Strategy: Full, Nodes: len(addresses)}}
	for i, address := range addresses {
		c.Nodes = append(c.Nodes, local.Given([]string{"n1", "n2", "n3"}[i], address))
	}
	return c
}

// A test whose cluster forgets an acknowledged pair fails, through whichever node it is missing; so does a failure.
func TestLossIsSeen(t *testing.T) {
	for _, forget := range []string{"", keyPrefix + "test/0007"} {
		f := startForgetful(t, forget)
		c := clusterOf(f.addr, f.addr)
		pairs := make(ledger)
		if err := pairs.write(t.Context(), c, "test/", 10); err != nil {
			t.Fatal(err)
		}
		test := &Test{Number: 1, Written: len(pairs)}
		if err := test.killAndRead(t.Context(), c, pairs); err != nil {
			t.Fatal(err)
		}
		var failure Failure
		if err := failure.readBack(t.Context(), c, pairs, c.Nodes[0]); err != nil {
			t.Fatal(err)
		}
		if lost := forget != ""; test.Passed() == lost || (failure.Lost == 1) != lost || failure.Acknowledged != 10 {
			t.Errorf("with %q forgotten: %d of %d read, %d lost", forget, test.Read, test.Written, failure.Lost)
		}
	}
}

// A pair that one node lacks is lost, even if the others have it; so is one with another value.
func TestEveryNodeCounts(t *testing.T) {
	good, bad := startForgetful(t, ""), startForgetful(t, "")
	pairs := make(ledger)
	if err := pairs.write(t.Context(), clusterOf(good.addr), "x/", 3); err != nil {
		t.Fatal(err)
	}
	for key, value := range pairs {
		bad.pairs[key] = value
	}
	bad.pairs[keyPrefix+"x/0001"] = "something else"
	c := clusterOf(good.addr, bad.addr)
	if n, err := pairs.readAll(t.Context(), c, c.Nodes); n != 2 || err != nil {
		t.Errorf("%d of 3 pairs are right, %v", n, err)
	}
}

// What never was acknowledged is no loss.
func TestOnlyAcknowledgedPairsCount(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	pairs := make(ledger)
	if err := pairs.write(ctx, clusterOf(startForgetful(t, "").addr), "x/", 3); !errors.Is(err, context.Canceled) || len(pairs) != 0 {
		t.Errorf("%v, %v", pairs, err)
	}
}

func left(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("it left %v, %v", entries, err)
	}
}

// Nodes that do not start are in the report: every step is, as failed, and nothing is left behind.
func TestClusterThatDoesNotForm(t *testing.T) {
	dir := t.TempDir()
	var steps, ended int
	r, err := Run(t.Context(), Options{Quick: true, Dir: dir, Kvd: "/bin/false", Progress: func(s Step) {
		if s.Err == nil {
			steps++
		} else {
			ended++
		}
		if s.Number > s.Total {
			t.Errorf("step %d of %d", s.Number, s.Total)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	left(t, dir)
	if want := 3*stepsPerCluster + 6; steps != want || ended != want {
		t.Errorf("%d steps began and %d failed, not %d", steps, ended, want)
	}
	if got, want := len(r.Problems()), 3*stepsPerCluster+6; got != want {
		t.Errorf("%d problems, not %d", got, want)
	}
	if why := r.Clusters[0].Error; !strings.Contains(why, " ended") {
		t.Errorf("it failed because of %q", why)
	}
	render(t, r.Page)
	if text := render(t, r.Markdown); !strings.Contains(text, "0 of 6 fault tolerance tests passed") {
		t.Error("tests passed without a cluster")
	}
}

func TestInterrupted(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Run(ctx, Options{Quick: true, Dir: dir, Kvd: "/bin/cat", Progress: func(Step) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	left(t, dir)
	if _, err := Run(t.Context(), Options{Dir: dir + "/nowhere"}); err == nil {
		t.Error("it measured a disk that is not there")
	}
}

func TestValidate(t *testing.T) {
	for _, o := range []Options{{Pairs: -1}, {Pairs: maxPairs + 1}, {ValueBytes: 2 << 20}, {Clients: -1}, {Rate: math.NaN()}, {Rate: math.Inf(1)}} {
		if _, err := Run(t.Context(), o); !errors.Is(err, ErrOptions) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if err := (Options{}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestSamplesBefore(t *testing.T) {
	zero := time.Now()
	at := func(d time.Duration) time.Time { return zero.Add(d) }
	got := samplesBefore([]bench.Sample{
		{Operation: "get", Begin: at(2 * time.Second), End: at(3 * time.Second), Err: status.Error(codes.Unavailable, "x")},
		{Operation: "put", Begin: at(-time.Second), End: at(time.Second)},
		{Operation: "put", Begin: at(4 * time.Second), End: at(6 * time.Second), Err: status.Error(codes.Canceled, "the end")},
	}, zero, at(5*time.Second))
	want := []Sample{{Due: -time.Second, Took: 2 * time.Second}, {Due: 2 * time.Second, Took: time.Second, Read: true, Code: "Unavailable"}}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("samples are %+v", got)
	}
	s := Samples{List: got}
	if s.Failed()["Unavailable"] != 1 || s.Longest() != 2*time.Second {
		t.Errorf("%v failed, the longest took %v", s.Failed(), s.Longest())
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 µs", 250 * time.Microsecond: "250 µs", 1999 * time.Microsecond: "2.0 ms", 9949 * time.Microsecond: "9.9 ms", 9960 * time.Microsecond: "10 ms",
		258 * ms: "258 ms", 999400 * time.Microsecond: "999 ms", 999600 * time.Microsecond: "1.00 s", 2821 * ms: "2.82 s", 9996 * ms: "10.0 s", 60 * time.Second: "60.0 s",
	} {
		if got := strings.ReplaceAll(Short(d), "\u00a0", " "); got != want {
			t.Errorf("%v is %q, not %q", d, got, want)
		}
	}
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := number(n); got != want {
			t.Errorf("%d is %q", n, got)
		}
	}
	for d, want := range map[time.Duration]string{5 * ms: "10 times less than", 20 * ms: "2.5 times less than", 50 * ms: "as much as", 100 * ms: "2.0 times more than"} {
		if got := times(50*ms, d); got != want {
			t.Errorf("%v beside 50 ms is %q", d, got)
		}
	}
}

func TestFileSystem(t *testing.T) {
	mounts := []byte("/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\nbroken\n/dev/vdb /tmp/x xfs rw 0 0\n")
	for dir, want := range map[string]string{"/home": "ext4", "/tmp": "tmpfs", "/tmp/y": "tmpfs", "/tmp/x/y": "xfs", "/tmpx": "ext4"} {
		if got := fileSystem(mounts, dir); got != want {
			t.Errorf("%s is on %q, not %q", dir, got, want)
		}
	}
	if got := fileSystem(nil, "/"); got != "" {
		t.Errorf("without mounts it is %q", got)
	}
}

func TestThisMachine(t *testing.T) {
	m, err := thisMachine(t.TempDir())
	if err != nil || m.Cores < 1 || m.Sync <= 0 || m.Words() == "" {
		t.Errorf("%+v, %v", m, err)
	}
}
