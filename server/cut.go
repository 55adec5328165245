package server

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kvd/shard"
)

// cut is a revision at which all groups are complete for ever: every write up
// to it is applied wherever a state has applied the group's index, and no other
// will come (docs/design.md section 6).
type cut struct {
	done     chan struct{} // closed when all else is set
	revision int64         // the newest when the cut was made
	gates    []gate        // by group, ascending
	err      error
}

// gate is one group's part of a cut.
type gate struct {
	group uint64
	index uint64
	node  string // that led the group; "" = this one
}

// cuts makes one cut at a time, for all reads of this node that wait for one.
// A read never shares a cut that was begun before it arrived, whose revision
// may miss writes that were acknowledged in between.
type cuts struct {
	router *router

	mu        sync.Mutex
	gathering *cut
	running   bool
	begun     *cut // the cut that is being made
}

// cutTimeout bounds one try to make a cut, and gateTimeout the first answer of
// a node in it.
const (
	cutTimeout  = 4 * time.Second
	gateTimeout = 500 * time.Millisecond
)

// take waits for a cut that is begun after the call. Errors are gRPC statuses.
func (q *cuts) take(ctx context.Context) (*cut, error) {
	ctx, cancel := q.router.withDeadline(ctx)
	defer cancel()
	for a := (attempts{router: q.router}); ; {
		c, err := q.join(ctx)
		if err == nil {
			return c, nil
		}
		if errors.Is(err, shard.ErrClosed) || !a.again(ctx, nil, err) {
			return nil, q.router.readStatus(ctx, err)
		}
	}
}

func (q *cuts) join(ctx context.Context) (*cut, error) {
	q.mu.Lock()
	mine := q.gathering
	if q.router.cfg.faults.joinBegunCut && q.begun != nil {
		mine = q.begun
	}
	if mine == nil {
		mine = &cut{done: make(chan struct{})}
		q.gathering = mine
	}
	if !q.running && !q.router.spawn(q.run) {
		q.gathering = nil
		q.mu.Unlock()
		return nil, shard.ErrClosed
	}
	q.running = true
	q.mu.Unlock()
	select {
	case <-mine.done:
		return mine, mine.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run makes cuts until nobody waits.
func (q *cuts) run() {
	for {
		q.mu.Lock()
		next := q.gathering
		q.gathering, q.begun = nil, next
		q.running = next != nil
		q.mu.Unlock()
		if next == nil {
			return
		}
		next.err = q.router.makeCut(next)
		close(next.done)
	}
}

func (r *router) makeCut(c *cut) error {
	ctx, cancel := context.WithTimeout(r.ctx, cutTimeout)
	defer cancel()
	r.metrics.cuts.Inc()
	var err error
	if c.revision, err = r.cfg.Revisions.Latest(ctx); err != nil {
		return fmt.Errorf("server: ask for the newest revision: %w", err)
	}
	groups := r.cfg.Groups.All()
	if r.cfg.faults.missShard {
		groups = groups[1:]
	}
	c.gates, err = r.gates(ctx, c.revision, groups)
	return err
}

// gates makes groups complete at a revision, by way of their leaders, until
// ctx ends.
func (r *router) gates(ctx context.Context, at int64, groups []uint64) ([]gate, error) {
	done := make([]gate, 0, len(groups))
	if r.cfg.faults.skipGates {
		for _, group := range groups {
			done = append(done, gate{group: group})
		}
		return done, nil
	}
	for a := (attempts{router: r}); len(groups) > 0; {
		passed, err := r.tryGates(ctx, at, groups, &a)
		done = append(done, passed...)
		groups = without(groups, passed)
		if len(groups) > 0 && !a.again(ctx, r.cfg.leaderChanged(groups[0]), err) {
			return nil, err
		}
	}
	slices.SortFunc(done, func(a, b gate) int { return cmp.Compare(a.group, b.group) })
	return done, nil
}

// without are the groups that have not passed.
func without(groups []uint64, passed []gate) []uint64 {
	if len(passed) == len(groups) {
		return nil
	}
	through := make(map[uint64]bool, len(passed))
	for _, g := range passed {
		through[g.group] = true
	}
	return slices.DeleteFunc(slices.Clone(groups), func(group uint64) bool { return through[group] })
}

// leaderChanged is of this node's replica, if it has one.
func (c *Config) leaderChanged(group uint64) <-chan struct{} {
	if replica := c.Replica(group); replica != nil {
		return replica.LeaderChanged()
	}
	return nil
}

// tryGates makes one attempt for each group, with one call for all groups that
// a node leads. It returns those that succeeded, and an error if any failed.
func (r *router) tryGates(ctx context.Context, at int64, groups []uint64, a *attempts) ([]gate, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout(gateTimeout))
	defer cancel()
	byNode := make(map[string][]uint64) // "" = this one
	var failed error
	for _, group := range groups {
		to := r.target(group, &attempts{n: a.n})
		switch {
		case to.here:
			byNode[""] = append(byNode[""], group)
		case to.node == "":
			failed = errNoLeader
		default:
			byNode[to.node] = append(byNode[to.node], group)
		}
	}
	var (
		asking sync.WaitGroup
		mu     sync.Mutex
		passed []gate
	)
	for node, groups := range byNode {
		asking.Go(func() {
			ask := r.gatesThere
			if node == "" {
				ask = r.gatesHere
			}
			gates, err := ask(ctx, node, at, groups)
			mu.Lock()
			defer mu.Unlock()
			passed = append(passed, gates...)
			if err != nil {
				failed = err
			}
		})
	}
	asking.Wait()
	return passed, failed
}

// gatesHere asks this node's replicas, which must lead. It returns those that
// succeeded, and an error if any failed.
func (r *router) gatesHere(ctx context.Context, _ string, at int64, groups []uint64) ([]gate, error) {
	var (
		asking sync.WaitGroup
		mu     sync.Mutex
		passed []gate
		failed error
	)
	for _, group := range groups {
		asking.Go(func() {
			index, err := r.gateHere(ctx, group, at)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			passed = append(passed, gate{group: group, index: index})
		})
	}
	asking.Wait()
	return passed, failed
}

func (r *router) gateHere(ctx context.Context, group uint64, at int64) (uint64, error) {
	replica := r.ofKeys(group)
	if replica == nil {
		return 0, shard.ErrNotLeader
	}
	return leaderIndex(ctx, replica, at)
}

// The request to pass gates and its answer, beside what forward.go says:
//
//	gate:   version 1, at 8, timeout 4 (ms) | groups, 8 each, ascending
//	answer: version 1, code 1 | for each group its code 1, and then its index 8
//	        if that is 0, else size 1 and name of the node that leads it
const (
	gateHeader    = 13
	maxGateGroups = 1 << 12
	maxGating     = 1 << 14 // groups that other nodes wait for at a time; for more they are told to come back
)

// gatesThere asks a node that is thought to lead all of the groups.
func (r *router) gatesThere(ctx context.Context, node string, at int64, groups []uint64) ([]gate, error) {
	var all []gate
	var failed error
	for part := range slices.Chunk(groups, maxGateGroups) {
		gates, err := r.askGates(ctx, node, at, part)
		all = append(all, gates...)
		if err != nil {
			failed = err
		}
	}
	return all, failed
}

func (r *router) askGates(ctx context.Context, node string, at int64, groups []uint64) ([]gate, error) {
	payload := make([]byte, gateHeader, gateHeader+8*len(groups))
	payload[0] = protocolVersion
	binary.BigEndian.PutUint64(payload[1:], uint64(at))
	binary.BigEndian.PutUint32(payload[9:], timeoutMillis(ctx))
	for _, group := range groups {
		payload = binary.BigEndian.AppendUint64(payload, group)
	}
	c, body, err := r.call(ctx, node, methodGate, payload)
	if err == nil && c != codeOK {
		err = c.err()
	}
	if err != nil {
		if !errors.Is(err, shard.ErrOverloaded) && !errors.Is(ctx.Err(), context.Canceled) {
			for _, group := range groups {
				r.leaders.forget(group, node)
			}
		}
		return nil, err
	}
	return r.readGates(node, groups, body)
}

// readGates takes the answer for each group, and what it says about leaders.
func (r *router) readGates(node string, groups []uint64, body []byte) (passed []gate, failed error) {
	for _, group := range groups {
		if len(body) < 2 {
			return nil, errBadAnswer
		}
		c := code(body[0])
		if c == codeOK {
			if len(body) < 9 {
				return nil, errBadAnswer
			}
			passed = append(passed, gate{group, binary.BigEndian.Uint64(body[1:]), node})
			body = body[9:]
			r.leaders.learn(group, node)
			continue
		}
		size := int(body[1])
		if size > len(body)-2 {
			return nil, errBadAnswer
		}
		hint := string(body[2:][:size])
		body = body[2+size:]
		r.leaders.forget(group, node)
		if failed = c.err(); c == codeNotLeader {
			failed = r.moved(group, node, hint)
		}
	}
	if len(body) > 0 {
		return nil, errBadAnswer
	}
	return passed, failed
}

func (r *router) handleGate(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	at, ms, groups, err := decodeGate(payload)
	if err != nil {
		return answer(codeMalformed), nil
	}
	defer r.gating.Add(-int64(len(groups)))
	if r.gating.Add(int64(len(groups))) > maxGating {
		return answer(codeOverloaded), nil
	}
	ctx, cancel := withMost(ctx, ms)
	defer cancel()
	passed, _ := r.gatesHere(ctx, "", at, groups)
	indexes := make(map[uint64]uint64, len(passed))
	for _, g := range passed {
		indexes[g.group] = g.index
	}
	reply := answer(codeOK)
	for _, group := range groups {
		if index, ok := indexes[group]; ok {
			reply = binary.BigEndian.AppendUint64(append(reply, byte(codeOK)), index)
			continue
		}
		hint := r.hint(group, r.cfg.Replica(group))
		reply = append(append(reply, byte(codeNotLeader), byte(len(hint))), hint...)
	}
	return reply, nil
}

func decodeGate(payload []byte) (at int64, ms uint32, groups []uint64, err error) {
	if len(payload) < gateHeader || payload[0] != protocolVersion {
		return 0, 0, nil, errMalformed
	}
	at, ms = int64(binary.BigEndian.Uint64(payload[1:])), binary.BigEndian.Uint32(payload[9:])
	list := payload[gateHeader:]
	if at <= 0 || len(list)%8 != 0 || len(list) == 0 || len(list) > 8*maxGateGroups {
		return 0, 0, nil, errMalformed
	}
	for ; len(list) > 0; list = list[8:] {
		group := binary.BigEndian.Uint64(list)
		if len(groups) > 0 && group <= groups[len(groups)-1] {
			return 0, 0, nil, errMalformed
		}
		groups = append(groups, group)
	}
	return at, ms, groups, nil
}
