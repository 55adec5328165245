package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Config of a Formation. Zero durations and bounds mean the defaults.
type Config struct {
	Dir    *Dir
	Asker  Asker
	Logger *slog.Logger

	// Members tells peers of a member who its cluster's members are now, in the order of their names. Nil, or an
	// empty result, means those of the bootstrap record. Called concurrently; must not block.
	Members func() []Member

	Interval          time.Duration // between two rounds, 100 ms
	AskTimeout        time.Duration // for one question, 1 s
	LogInterval       time.Duration // between two equal messages about whom the node waits for, 10 s
	MaxConcurrentAsks int           // 8
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Members == nil {
		c.Members = func() []Member { return nil }
	}
	for _, d := range []struct {
		value    *time.Duration
		standard time.Duration
	}{{&c.Interval, 100 * time.Millisecond}, {&c.AskTimeout, time.Second}, {&c.LogInterval, 10 * time.Second}} {
		if *d.value == 0 {
			*d.value = d.standard
		}
	}
	if c.MaxConcurrentAsks == 0 {
		c.MaxConcurrentAsks = 8
	}
	return c
}

// Validate reports what is missing or negative.
func (c Config) Validate() error {
	if c.Dir == nil || c.Asker == nil {
		return fmt.Errorf("%w: a formation needs a Dir and an Asker", ErrInvalid)
	}
	if c.Interval < 0 || c.AskTimeout < 0 || c.LogInterval < 0 || c.MaxConcurrentAsks < 0 {
		return fmt.Errorf("%w: a formation's intervals and bounds cannot be negative", ErrInvalid)
	}
	return nil
}

// Outcome is the end of Run: this node is a member (Rejoin is nil), or must rejoin (Rejoin is not).
type Outcome struct {
	ClusterID   uint64
	Incarnation uint64
	Replica     string  // this node's replica of group 0, to open or to create
	Record      *Record // the bootstrap record if this node has it; equal on all nodes of the cluster
	Founder     bool    // the record names this incarnation: a replica that is created starts with the record's configuration, else empty
	Rejoin      *Rejoin
}

// Rejoin says that the node's earlier incarnation was a member of a running cluster: send a RejoinRequest to any of
// these addresses, and give the answer to CompleteRejoin.
type Rejoin struct {
	ClusterID uint64
	Via       []string
}

// Formation is a node's part in forming its cluster. HandleAsk serves from New on, for as long as the node runs,
// because others may form later; Run is called once at a time.
type Formation struct {
	cfg     Config
	machine machine
	current atomic.Pointer[Status] // what HandleAsk answers; everything in it is durable

	lastWaiting string
	lastLogged  time.Time
}

// New prepares a formation. It owns no goroutine and needs no Close; the Dir must stay open.
func New(cfg Config) (*Formation, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	f := &Formation{cfg: cfg.withDefaults()}
	f.machine.set = cfg.Dir.set
	f.publish()
	return f, nil
}

// publish makes HandleAsk answer with what the directory holds.
func (f *Formation) publish() {
	id, record := f.cfg.Dir.state()
	f.machine.become(id, record)
	f.current.Store(f.machine.status(nil))
}

// HandleAsk answers a peer's MethodStatus question. Concurrent calls are fine; it doesn't block.
func (f *Formation) HandleAsk(_ context.Context, payload []byte) ([]byte, error) {
	var req statusRequest
	if err := decodeMessage(payload, &req); err != nil {
		return nil, err
	}
	if req.Version != protocolVersion {
		return nil, fmt.Errorf("%w: status request %d", ErrVersion, req.Version)
	}
	s := *f.current.Load()
	if members := f.cfg.Members(); s.ClusterID != 0 && len(members) > 0 {
		s.Members = members
	}
	return encodeMessage(&s)
}

// Run returns when this node is a member (after one round of questions if it was one before), or knows that it
// must rejoin; or with an error: the context's, the file system's, or one that tells the operator what to correct.
// After an error of the file system the process should end; after any other, Run may be called again.
func (f *Formation) Run(ctx context.Context) (Outcome, error) {
	if f.machine.id.ClusterID != 0 {
		if err := f.machine.stranded(f.round(ctx, f.machine.others())); err != nil {
			return Outcome{}, fmt.Errorf("data directory %s: %w", f.cfg.Dir.path, err)
		}
	}
	for f.machine.id.ClusterID == 0 {
		answers := f.round(ctx, f.machine.peers())
		if err := ctx.Err(); err != nil {
			return Outcome{}, err
		}
		f.machine.observe(answers)
		next, err := f.machine.next(answers)
		if err != nil {
			return Outcome{}, err
		}
		if err := f.take(next); err != nil {
			return Outcome{}, err
		}
		f.publish()
		switch next.do {
		case rejoin:
			return Outcome{ClusterID: next.rejoin.ClusterID, Incarnation: f.machine.id.Incarnation, Rejoin: next.rejoin}, nil
		case wait:
			if err := f.pause(ctx, next.waiting); err != nil {
				return Outcome{}, err
			}
		}
	}
	return f.outcome(), nil
}

func (f *Formation) outcome() Outcome {
	id, record := f.machine.id, f.machine.record
	return Outcome{ClusterID: id.ClusterID, Incarnation: id.Incarnation, Replica: id.Replica, Record: record, Founder: record.Names(id.Name, id.Incarnation)}
}

// take makes a step durable.
func (f *Formation) take(s step) error {
	log := f.cfg.Logger.With("node", f.machine.set.Name)
	switch s.do {
	case decide:
		log.Info("all peers are new: forming a cluster", "cluster", hex(s.record.ClusterID), "members", strings.Join(s.record.names(), ","))
		return f.cfg.Dir.hold(s.record)
	case adopt:
		log.Info("adopting the bootstrap record", "cluster", hex(s.record.ClusterID), "members", strings.Join(s.record.names(), ","))
		return f.cfg.Dir.hold(s.record)
	case finish:
		log.Info("member of the cluster", "cluster", hex(f.machine.record.ClusterID))
		return f.cfg.Dir.finish()
	case abandon:
		log.Warn("too many members lost their directories before the cluster was formed: starting over", "cluster", hex(f.machine.record.ClusterID))
		return f.cfg.Dir.abandon()
	}
	return nil
}

// round asks each of the named peers once and returns when all have answered or failed.
func (f *Formation) round(ctx context.Context, names []string) map[string]answer {
	payload, _ := encodeMessage(statusRequest{protocolVersion}) // of constant size
	var (
		mu      sync.Mutex
		wg      sync.WaitGroup
		answers = map[string]answer{}
		slots   = make(chan struct{}, f.cfg.MaxConcurrentAsks)
	)
	for _, name := range names {
		addr, ok := f.machine.set.Peers[name]
		if !ok {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			s, err := f.ask(ctx, addr, payload)
			mu.Lock()
			answers[name] = answer{s, err}
			mu.Unlock()
			<-slots
		})
	}
	wg.Wait()
	return answers
}

func (f *Formation) ask(ctx context.Context, addr string, payload []byte) (*Status, error) {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.AskTimeout)
	defer cancel()
	reply, err := f.cfg.Asker.Ask(ctx, addr, MethodStatus, payload)
	if err != nil {
		return nil, err
	}
	return decodeStatus(reply)
}

// pause waits for the next round and says for whom, when that has changed and now and then.
func (f *Formation) pause(ctx context.Context, waiting []string) error {
	slices.Sort(waiting)
	text := strings.Join(waiting, "; ")
	if text != f.lastWaiting && time.Since(f.lastLogged) > time.Second || time.Since(f.lastLogged) > f.cfg.LogInterval {
		f.lastWaiting, f.lastLogged = text, time.Now()
		f.cfg.Logger.Info("waiting to form the cluster", "node", f.machine.set.Name, "for", text)
	}
	timer := time.NewTimer(f.cfg.Interval)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// CompleteRejoin makes the node the member that the cluster has let back in, and returns what Run would now.
// After an error of the file system the process should end; a refusal or a malformed response changes nothing.
func (f *Formation) CompleteRejoin(resp RejoinResponse) (Outcome, error) {
	if err := resp.Err(); err != nil {
		return Outcome{}, err
	}
	if err := resp.validate(); err != nil {
		return Outcome{}, err
	}
	if node, _, _ := ParseReplicaID(resp.Replica); node != f.machine.set.Name {
		return Outcome{}, fmt.Errorf("%w: rejoin gave this node the replica %s", ErrInvalid, resp.Replica)
	}
	if r := resp.Record; r != nil {
		if err := f.machine.set.compare(r.Common, "the cluster", "start it with the cluster's"); err != nil {
			return Outcome{}, err
		}
	}
	if id, record := f.cfg.Dir.state(); id.ClusterID != 0 || record != nil {
		return Outcome{}, errors.New("rejoin: this node is bound to a cluster already")
	}
	if err := f.cfg.Dir.rejoin(resp.ClusterID, resp.Replica, resp.Record); err != nil {
		return Outcome{}, err
	}
	f.publish()
	return f.outcome(), nil
}

func hex(id uint64) string { return fmt.Sprintf("%016x", id) }
