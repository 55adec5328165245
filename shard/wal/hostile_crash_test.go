package wal

import (
	"errors"
	"flag"
	"fmt"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"kvd/shard/wal/vfs"
)

var deepFlag = flag.Int("deep", 1, "how many times as many hostile runs as usual")

// crasher looks at every operation of a trial's file system at what a crash leaves there.
type crasher struct {
	w       *trial
	crashes int                // for each operation
	skip    func() bool        // nil: look at every operation
	fault   func(vfs.Op) error // nil: the disk works

	// Under w.mu.
	seed uint64
	seen int
	err  error // the first violation
}

var errViolated = errors.New("the test has found something, and ends")

// start makes the crasher see what w does from now on.
func (c *crasher) start() { c.w.fs.Inject(c.before) }

func (c *crasher) before(op vfs.Op) error {
	if !op.Kind.Changes() {
		return nil
	}
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	if c.err == nil && (c.skip == nil || !c.skip()) {
		if err := c.look(); err != nil {
			c.err = c.w.failure(fmt.Sprintf("crash before %+v", op), err)
		}
	}
	if c.err != nil {
		return errViolated
	}
	if c.fault != nil {
		return c.fault(op)
	}
	return nil
}

// look judges some crashes at this moment. The caller holds w.mu.
func (c *crasher) look() error {
	allowed := c.w.allowed()
	for i := range c.crashes + 1 {
		c.seed++
		image := c.w.fs.Kill()
		if i > 0 {
			image = c.w.fs.Crash(c.seed)
		}
		if err := c.judge(image, allowed); err != nil {
			return fmt.Errorf("image %d of seed %d: %w", i, c.seed, err)
		}
	}
	return nil
}

// Of so many images one is looked at more closely, if the tests are not deep.
const (
	sampleInOpen = 11
	sampleAgain  = 3
	sampleGoOn   = 7
)

func (c *crasher) sampled(oneIn int) bool { return c.seen%max(1, oneIn / *deepFlag) == 0 }

// judge opens what a crash has left, now and then crashes while it is opened, and goes on with it.
func (c *crasher) judge(image *vfs.Memory, allowed map[ID][]*state) error {
	c.seen++
	inOpen := func() error { return nil }
	if c.sampled(sampleInOpen) {
		inOpen = c.crashInOpen(image, allowed)
	}
	log, found, err := inspect(image, c.w.options, allowed)
	image.Inject(nil)
	defer closeLog(log)
	if err != nil {
		return err
	}
	if err := inOpen(); err != nil {
		return fmt.Errorf("crash while it was opened: %w", err)
	}
	if c.sampled(sampleAgain) {
		if err := c.again(image, found); err != nil {
			return fmt.Errorf("after having been read once: %w", err)
		}
	}
	if c.sampled(sampleGoOn) {
		return c.goOn(image.Kill(), found)
	}
	return nil
}

// crashInOpen looks at crashes at every operation on image from now on. It returns what has been found up to then.
func (c *crasher) crashInOpen(image *vfs.Memory, allowed map[ID][]*state) func() error {
	var mu sync.Mutex
	var found error
	seed := c.seed
	image.Inject(func(op vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if op.Kind.Changes() && found == nil {
			seed++
			log, _, err := inspect(image.Crash(seed), c.w.options, allowed)
			found = errors.Join(err, closeLog(log))
		}
		return nil
	})
	return func() error {
		mu.Lock()
		defer mu.Unlock()
		return found
	}
}

// again crashes once more. Whoever has read something may count on it: it must be durable by then.
func (c *crasher) again(image *vfs.Memory, found map[ID][]*state) error {
	for _, again := range []*vfs.Memory{image.Kill(), image.Crash(c.seed)} {
		log, _, err := inspect(again, c.w.options, found)
		if err = errors.Join(err, closeLog(log)); err != nil {
			return err
		}
	}
	return nil
}

func closeLog(log *Log) error {
	if log == nil {
		return nil
	}
	return log.Close()
}

// goOn works with what a crash has left, crashes again, and closes.
func (c *crasher) goOn(image *vfs.Memory, found map[ID][]*state) error {
	w := &trial{choose: seeded(c.seed), options: c.w.options, cache: c.w.cache, fs: image, step: c.w.step + 1000, mu: new(sync.Mutex)}
	for _, r := range c.w.replicas {
		next := newModel(r.id)
		next.durable, next.nonce = found[r.id][0], 1<<40
		w.replicas = append(w.replicas, next)
	}
	if err := w.open(); err != nil {
		return fmt.Errorf("open again: %w", err)
	}
	defer func() { closeLog(w.log) }()
	for range 4 {
		if err := w.random(); err != nil {
			return w.failure("going on", err)
		}
	}
	if err := w.check(); err != nil {
		return w.failure("going on", err)
	}
	log, _, err := inspect(image.Crash(c.seed), w.options, w.allowed())
	if err := errors.Join(err, closeLog(log)); err != nil {
		return w.failure("second crash", err)
	}
	if err := w.log.Close(); err != nil {
		return err
	}
	log, _, err = inspect(image.Crash(c.seed), w.options, w.allowed())
	return errors.Join(err, closeLog(log))
}

// failure says what came before err. The caller holds w.mu, or nobody else uses w.
func (w *trial) failure(what string, err error) error {
	return fmt.Errorf("%s: %w\nlast steps:\n  %s", what, err, strings.Join(w.trace, "\n  "))
}

// run makes the directory, does the steps, and closes, with crashes all the way.
func (c *crasher) run(steps func(*trial) error) error {
	c.start()
	err := c.w.open()
	if err == nil {
		err = steps(c.w)
	}
	if err == nil {
		err = c.w.check()
	}
	err = errors.Join(err, closeLog(c.w.log))
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if err == nil {
		err = c.look()
	}
	if err != nil {
		return c.w.failure("run", err)
	}
	return nil
}

const hostileSegmentBytes = 32 << 10

// script goes through everything that moves files: it fills segments and frees them, so that they are used
// again, while two replicas that write little have to be copied forward; it votes, conflicts and removes.
func script(w *trial) error {
	for _, r := range w.replicas {
		if err := each(r, w.create, w.append, w.vote, w.key); err != nil {
			return err
		}
	}
	for range 6 {
		if err := each(w.replicas[0], w.burst, w.burst, w.burst); err != nil {
			return err
		}
		for _, cold := range w.replicas[1:] {
			if err := each(cold, w.vote, w.append); err != nil {
				return err
			}
		}
	}
	return scriptEnd(w)
}

func scriptEnd(w *trial) error {
	hot, cold := w.replicas[0], w.replicas[1]
	if err := each(hot, w.end, w.end, w.reset, w.append, w.all, w.all, w.misplaced, w.burst); err != nil {
		return err
	}
	if err := each(cold, w.removeNow, w.create); err != nil {
		return err
	}
	return each(hot, w.burst, w.burst, w.append)
}

// each does the steps with r until one fails.
func each(r *modelReplica, steps ...func(*modelReplica) error) error {
	for _, step := range steps {
		if err := step(r); err != nil {
			return err
		}
	}
	return nil
}

// A crash at every operation of the script leaves what was acknowledged, and what was under way or not.
func TestCrashEverywhere(t *testing.T) {
	for seed := range uint64(*deepFlag) {
		c := &crasher{w: newTrial(seeded(seed), 3, Options{SegmentBytes: hostileSegmentBytes}), crashes: 1, seed: seed << 32}
		if err := c.run(script); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		t.Logf("seed %d: %d crashes", seed, c.seen)
	}
}

// The same with random steps.
func TestRandomCrashes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		choose := drawn(rt)
		w := newTrial(choose, 1+choose(4, "replicas"), Options{SegmentBytes: hostileSegmentBytes})
		c := &crasher{w: w, crashes: 1, seed: rapid.Uint64().Draw(rt, "crash seed")}
		ops, offset := 0, choose(4, "offset")
		c.skip = func() bool { ops++; return *deepFlag == 1 && ops%4 != offset }
		if err := c.run(func(w *trial) error { return w.randomSteps(15) }); err != nil {
			rt.Fatal(err)
		}
	})
}

func drawn(rt *rapid.T) chooser {
	return func(n int, what string) int { return rapid.IntRange(0, n-1).Draw(rt, what) }
}

func (w *trial) randomSteps(count int) error {
	for range count {
		if err := w.random(); err != nil {
			return err
		}
	}
	return nil
}
