package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
	"kvd/integration/linearizability"
	"kvd/node"
	"kvd/server"
	"kvd/shard"
	"kvd/transport"
)

// shape is what kind of cluster a world is.
type shape struct {
	nodes    int  // that found it
	spare    bool // one more node joins and leaves, again and again
	strategy string
	shards   int // with StrategyConsistent
	copies   int
	think    time.Duration // a client's mean pause
	faults   shard.Faults
	server   server.Faults
	state    fsm.Faults
	lies     bool // the disks say that they have synced, and have not
	cuts     bool // all that happens is that the founder slowest to give up its leadership is cut off
	hands    bool // all that happens is that leaders hand over, all the time
}

// world is one cluster in one synctest bubble.
type world struct {
	shape
	network *transport.MemoryNetwork
	peers   map[string]string
	names   []string
	hosts   map[string]*host
	spare   *host // nil, or the node that joins and leaves
	logs    io.Writer
	halted  func(node string, err error)
}

// host is one machine: its disk survives, what runs on it does not.
type host struct {
	w    *world
	name string
	disk *disk

	mu      sync.Mutex
	running *life
	via     string // the address to join through; empty: one of the founders
	left    bool   // it has left the cluster, and says so
}

// life is one run of the node process.
type life struct {
	cancel context.CancelFunc
	done   chan struct{} // the node has stopped
	cut    atomic.Bool   // what it says from now on nobody hears
	dead   chan struct{} // closed when its streams break: it is cut, or stops

	mu   sync.Mutex
	node *node.Node // nil until it has started
}

func newWorld(s shape, dir string, logs io.Writer, halted func(string, error)) *world {
	w := &world{
		shape: s, network: transport.NewMemoryNetwork(), peers: make(map[string]string), hosts: make(map[string]*host),
		logs: logs, halted: halted,
	}
	for i := range s.nodes {
		name := fmt.Sprintf("n%d", i+1)
		w.names = append(w.names, name)
		w.peers[name] = address(name)
		w.hosts[name] = &host{w: w, name: name, disk: newDisk(filepath.Join(dir, name), s.lies)}
	}
	for _, h := range w.hosts {
		h.start()
	}
	if s.spare {
		w.spare = &host{w: w, name: fmt.Sprintf("n%d", s.nodes+1), disk: newDisk(filepath.Join(dir, "spare"), s.lies)}
	}
	return w
}

func address(name string) string { return name + ":1" }

// network of one host.
type hostNetwork struct {
	*transport.MemoryNetwork
	dial func(context.Context, string) (net.Conn, error)
}

func (n hostNetwork) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return n.dial(ctx, addr)
}

func (h *host) start() {
	ctx, cancel := context.WithCancel(context.Background())
	l := &life{cancel: cancel, done: make(chan struct{}), dead: make(chan struct{})}
	h.mu.Lock()
	h.running = l
	h.mu.Unlock()
	go func() {
		defer close(l.done)
		n, err := node.Start(ctx, h.config(l))
		if err != nil {
			if ctx.Err() == nil && !l.cut.Load() {
				h.w.halted(h.name, err)
			}
			return
		}
		l.mu.Lock()
		l.node = n
		l.mu.Unlock()
		<-ctx.Done()
		if err := n.Abort(); err != nil && !l.cut.Load() {
			h.w.halted(h.name, err)
		}
	}()
}

func (h *host) config(l *life) node.Config {
	peers := h.w.peers
	if h.via != "" {
		peers = nil
	}
	return node.Config{
		Name: h.name, DataDir: h.disk.dir, Peers: peers, Join: h.via,
		Strategy: h.w.strategy, Shards: h.w.shards, ReplicationFactor: h.w.copies, DownAfter: 20 * time.Second,
		ListenClient: "none", ListenHTTP: "none", ListenPeer: address(h.name),
		// Small, so that an hour sees many truncations and snapshots.
		SnapshotEntries: 200, TrailingEntries: 50,
		MinDiskFree: 1,
		// A leader that is slow to give up meets followers that are quick to
		// elect another.
		HeartbeatTimeout: time.Duration(1+slices.Index(h.w.names, h.name)) * time.Second,
		Network:          hostNetwork{h.w.network, h.w.network.Dialer(address(h.name))},
		RaftLog:          node.RaftLogShared,
		LogFS:            h.disk.logFS(),
		LogSegmentBytes:  256 << 10, // used again and again in an hour
		NoSync:           true,
		Logger:           slog.New(slog.NewTextHandler(h.w.logs, &slog.HandlerOptions{Level: slog.LevelInfo})).With("on", h.name),
		OnFatal: func(err error) {
			if !l.cut.Load() {
				h.fatal(err)
			}
		},
		Faults: h.w.faults, ServerFaults: h.w.server, StateFaults: h.w.state,
	}
}

// fatal is told why the node must end.
func (h *host) fatal(err error) {
	if h.via == "" || !strings.Contains(err.Error(), "has left the cluster") {
		h.w.halted(h.name, err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.left = true
}

func (h *host) hasLeft() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.left
}

// stop ends the process on the host for good.
func (h *host) stop() {
	if l := h.end(false); l != nil {
		h.w.network.DropAll(address(h.name))
		l.cancel()
		<-l.done
	}
}

// crash ends the process on the host, or cuts the power: the others see its
// connections break, and the next process finds what was on the disk at that
// moment.
func (h *host) crash(rng *rand.Rand) {
	seed, kill := rng.Uint64(), rng.IntN(3) == 0
	l := h.end(true)
	if l == nil {
		return
	}
	h.w.network.Isolate(address(h.name))
	synctest.Wait() // until nothing writes
	next, err := h.disk.cut(seed, kill)
	if err != nil {
		h.w.halted(h.name, err)
		return
	}
	h.w.network.DropAll(address(h.name))
	l.cancel()
	<-l.done
	if err := next(); err != nil {
		h.w.halted(h.name, err)
	}
	h.w.network.Rejoin(address(h.name))
}

// end takes the process from the host; nil if there is none. If it is cut, nobody
// hears of it any more.
func (h *host) end(cut bool) *life {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.running
	h.running = nil
	if l != nil {
		l.cut.Store(cut)
		close(l.dead)
	}
	return l
}

func (h *host) node() *node.Node {
	n, _ := h.current()
	return n
}

func (h *host) current() (*node.Node, *life) {
	h.mu.Lock()
	l := h.running
	h.mu.Unlock()
	if l == nil {
		return nil, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.node, l
}

// digests are those of the host's states, by group; none while it does not run.
func (h *host) digests(ctx context.Context) (map[uint64]digest, error) {
	n := h.node()
	if n == nil || n.Replica() == nil {
		return nil, nil
	}
	all := make(map[uint64]digest)
	for _, r := range append(n.Shards(), n.Replica()) {
		if r.Witness() {
			continue
		}
		state, release, err := r.AcquireState(ctx, 0)
		if err != nil {
			return nil, err
		}
		var d digest
		d.index, d.sum = state.Digest()
		all[r.Status().Group] = d
		release()
	}
	return all, nil
}

// digest is that of a state at an applied index.
type digest struct{ index, sum uint64 }

func (w *world) stop() {
	w.network.HealAll()
	for _, h := range w.hosts {
		h.stop()
	}
	if w.spare != nil {
		w.spare.stop()
	}
}

// moveSpare lets the spare node join if it is out, and leave if it is in. One
// that has left comes back as another one, under the same name.
func (w *world) moveSpare(ctx context.Context, rng *rand.Rand) (event string, err error) {
	w.sweepSpare()
	via := w.names[rng.IntN(len(w.names))]
	h := w.spare
	if h.via == "" {
		h.via = address(via)
		h.start()
		return "join", nil
	}
	n := w.hosts[via].node()
	if n == nil {
		return "", nil
	}
	return "leave", n.Leave(ctx, h.name, false)
}

// sweepSpare ends the spare node if it has left, and throws its disk away.
func (w *world) sweepSpare() {
	h := w.spare
	if h == nil || !h.hasLeft() {
		return
	}
	h.stop()
	if err := h.disk.wipe(); err != nil {
		w.halted(h.name, err)
	}
	h.via, h.left = "", false
}

// leader is the name of the node that serves as leader; empty if there is none.
func (w *world) leader() string {
	for _, name := range w.names {
		if n := w.hosts[name].node(); n != nil && n.Replica() != nil && n.Replica().Serving() {
			return name
		}
	}
	return ""
}

// service is the key-value service of one host, as a client of it sees it.
type service struct{ h *host }

func call[Q, A any](ctx context.Context, h *host, do func(pb.KVServer, context.Context, Q) (A, error), request Q) (A, error) {
	return callNode(ctx, h, func(n *node.Node) (A, error) { return do(n.KV(), ctx, request) })
}

func callLease[Q, A any](ctx context.Context, h *host, do func(pb.LeaseServer, context.Context, Q) (A, error), request Q) (A, error) {
	return callNode(ctx, h, func(n *node.Node) (A, error) { return do(n.Lease(), ctx, request) })
}

func callNode[A any](ctx context.Context, h *host, do func(*node.Node) (A, error)) (A, error) {
	var none A
	n, l := h.current()
	if n == nil {
		return none, fmt.Errorf("%w: the node is down", linearizability.ErrNotSent)
	}
	answer, err := do(n)
	if l.cut.Load() {
		return none, errCut
	}
	return answer, err
}

// errCut: whether the request was done, nobody knows.
var errCut = status.Error(codes.Unavailable, "the node has died")

func (s service) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return call(ctx, s.h, pb.KVServer.Range, r)
}

func (s service) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	return call(ctx, s.h, pb.KVServer.Put, r)
}

func (s service) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	return call(ctx, s.h, pb.KVServer.DeleteRange, r)
}

func (s service) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	return call(ctx, s.h, pb.KVServer.Txn, r)
}

// nemesis breaks one thing at a time until ctx is done, and repairs it.
func (w *world) nemesis(ctx context.Context, rng *rand.Rand, h *linearizability.History, counts map[string]int, broke func(from, to time.Time)) []linearizability.Window {
	var windows []linearizability.Window
	if w.hands {
		for pause(ctx, time.Duration(500+rng.IntN(1500))*time.Millisecond) {
			w.handOver(ctx, w.names)
			counts[handingOver]++
		}
		return nil
	}
	for {
		if !pause(ctx, time.Duration(2+rng.IntN(8))*time.Second) {
			return windows
		}
		if w.spare != nil && rng.IntN(3) == 0 {
			event, err := w.moveSpare(ctx, rng)
			if err == nil && event != "" {
				counts[event]++
			}
		}
		began := time.Now()
		fault, repair := w.inject(rng)
		from := h.Now()
		ok := pause(ctx, time.Duration(3+rng.IntN(12))*time.Second)
		windows = append(windows, linearizability.Window{Fault: fault, From: from, To: h.Now()})
		counts[fault]++
		repair()
		broke(began, time.Now().Add(settling))
		if !ok {
			return windows
		}
	}
}

const (
	cutOff      = 2 // of what inject does
	handingOver = "hand-over"
)

// settling is how long a cluster may need after a fault until everything is as it was.
const settling = 20 * time.Second

func (w *world) inject(rng *rand.Rand) (fault string, repair func()) {
	victim := w.names[rng.IntN(len(w.names))]
	if leader := w.leader(); leader != "" && rng.IntN(2) == 0 {
		victim = leader
	}
	what := rng.IntN(8)
	if w.cuts {
		victim, what = w.names[len(w.names)-1], cutOff
	}
	others := slices.DeleteFunc(slices.Clone(w.names), func(n string) bool { return n == victim })
	switch what {
	case 0:
		w.hosts[victim].crash(rng)
		return "crash", w.hosts[victim].start
	case 1:
		for _, name := range w.names {
			w.hosts[name].crash(rng)
		}
		for _, name := range w.names {
			w.hosts[name].start()
		}
		return "crash of all", func() {}
	case cutOff:
		w.network.Isolate(address(victim))
		return "isolation", func() { w.network.Rejoin(address(victim)) }
	case 3: // one way: the victim is heard, but hears nothing
		for _, name := range others {
			w.network.Partition(address(name), address(victim))
		}
		return "deafness", func() {
			for _, name := range others {
				w.network.Heal(address(name), address(victim))
			}
		}
	case 4:
		for _, name := range others {
			w.network.Partition(address(victim), address(name))
		}
		return "muteness", func() {
			for _, name := range others {
				w.network.Heal(address(victim), address(name))
			}
		}
	case 5: // a leader that cannot notice that it has been replaced
		w.hosts[victim].disk.stall(time.Now().Add(time.Duration(2+rng.IntN(8)) * time.Second))
		w.network.Isolate(address(victim))
		return "isolation with a stalled disk", func() {
			w.hosts[victim].disk.stall(time.Time{})
			w.network.Rejoin(address(victim))
		}
	case 6:
		w.handOver(context.Background(), []string{victim})
		return handingOver, func() {}
	default:
		slow := time.Duration(20+rng.IntN(600)) * time.Millisecond
		for _, name := range others {
			w.network.Delay(address(victim), address(name), slow)
			w.network.Delay(address(name), address(victim), slow)
		}
		return "slow links", func() {
			for _, name := range others {
				w.network.Delay(address(victim), address(name), 0)
				w.network.Delay(address(name), address(victim), 0)
			}
		}
	}
}

// handOver has nodes give away all groups that they lead.
func (w *world) handOver(ctx context.Context, nodes []string) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for _, name := range nodes {
		n := w.hosts[name].node()
		if n == nil || n.Replica() == nil {
			continue
		}
		for _, r := range append(n.Shards(), n.Replica()) {
			if r.Leader().Self {
				all.Go(func() { _ = r.TransferLeadership(ctx, "") }) // those that fail may go on
			}
		}
	}
	all.Wait()
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

var (
	errNotConverged = errors.New("sim: the nodes did not converge")
	errDiverged     = errors.New("sim: replicas differ at the same applied index")
)

// converge waits until all replicas of each group have applied the same index,
// and checks that they have the same state then (I4).
func (w *world) converge() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for pause(ctx, time.Second) {
		w.sweepSpare()
		hosts := slices.Collect(maps.Values(w.hosts))
		if w.spare != nil && w.spare.via != "" {
			hosts = append(hosts, w.spare)
		}
		groups := make(map[uint64]map[digest]int) // how many have it
		for _, h := range hosts {
			digests, err := h.digests(ctx)
			if err != nil {
				return err
			}
			for group, d := range digests {
				if groups[group] == nil {
					groups[group] = make(map[digest]int)
				}
				groups[group][d]++
			}
		}
		even, err := w.compare(groups, len(hosts))
		if even || err != nil {
			return err
		}
	}
	return errNotConverged
}

// compare reports whether each group has one digest, and as many copies of it
// as there are to be.
func (w *world) compare(groups map[uint64]map[digest]int, members int) (even bool, err error) {
	even = len(groups) == w.shards+1
	for group, digests := range groups {
		indexes := make(map[uint64]bool)
		copies := 0
		for d, n := range digests {
			if indexes[d.index] {
				return false, fmt.Errorf("%w %d of group %d", errDiverged, d.index, group)
			}
			indexes[d.index] = true
			copies += n
		}
		wanted := members
		if group > 0 {
			wanted = w.copies
		}
		even = even && len(digests) == 1 && !indexes[0] && copies == wanted
	}
	return even, nil
}
