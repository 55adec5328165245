package nemesis

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fakeCluster records what is done to it.
type fakeCluster struct {
	names                []string
	dead, paused, broken map[string]bool
	actions              []string
	unsettled            bool
}

func newFake(n int) *fakeCluster {
	f := &fakeCluster{dead: make(map[string]bool), paused: make(map[string]bool), broken: make(map[string]bool)}
	for i := range n {
		f.names = append(f.names, fmt.Sprintf("n%d", i+1))
	}
	return f
}

func (f *fakeCluster) did(format string, args ...any) error {
	f.actions = append(f.actions, fmt.Sprintf(format, args...))
	return nil
}

func (f *fakeCluster) Names() []string { return slices.Clone(f.names) }
func (f *fakeCluster) Leader(context.Context) (string, error) {
	if f.whole() {
		return "n2", nil
	}
	return "", errors.New("no leader")
}
func (f *fakeCluster) Kill(name string) error   { f.dead[name] = true; return f.did("kill %s", name) }
func (f *fakeCluster) Start(name string) error  { delete(f.dead, name); return nil }
func (f *fakeCluster) Pause(name string) error  { f.paused[name] = true; return f.did("pause %s", name) }
func (f *fakeCluster) Resume(name string) error { delete(f.paused, name); return nil }
func (f *fakeCluster) Cut(from, to string) {
	f.broken[from+to] = true
	f.did("cut %s %s", from, to)
}
func (f *fakeCluster) Freeze(from, to string) {
	f.broken[from+to] = true
	f.did("freeze %s %s", from, to)
}
func (f *fakeCluster) HealAll() { clear(f.broken) }
func (f *fakeCluster) Settle(context.Context) error {
	if f.unsettled {
		return errors.New("not settled")
	}
	if !f.whole() {
		return errors.New("not mended")
	}
	return nil
}
func (f *fakeCluster) whole() bool { return len(f.dead)+len(f.paused)+len(f.broken) == 0 }

// run lets the nemesis loose on a fake for some minutes of virtual time.
func run(t *testing.T, f *fakeCluster, seed uint64, progress func(int64) bool) (actions []string, windows int, err error) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		var clock int64
		ws, runErr := Run(ctx, f, Config{Seed: seed, Hold: time.Second, Rest: time.Second, Timeout: time.Minute,
			Now: func() int64 { clock++; return clock }, Progress: progress, Logf: t.Logf})
		for _, w := range ws {
			if w.From >= w.To || w.Fault == "" {
				t.Errorf("window %+v", w)
			}
		}
		actions, windows, err = f.actions, len(ws), runErr
	})
	return actions, windows, err
}

func yes(int64) bool { return true }

func TestEveryFaultStrikesAndIsMended(t *testing.T) {
	for _, n := range []int{3, 5} {
		f := newFake(n)
		actions, windows, err := run(t, f, 7, yes)
		if err != nil || !f.whole() {
			t.Fatalf("whole %t: %v", f.whole(), err)
		}
		live := 0
		for _, fault := range Faults() {
			if fault.Live {
				live++
			}
		}
		if windows < 2*live {
			t.Errorf("%d windows of %d live faults in five minutes", windows, live)
		}
		all := strings.Join(actions, "\n")
		for _, want := range []string{"kill n", "pause n", "kill n2", "pause n2", "cut n2 n1", "cut n1 n2", "freeze n2 n1", "freeze n1 n2"} {
			if !strings.Contains(all, want) {
				t.Errorf("never did %q", want)
			}
		}
	}
}

func TestSeedDecides(t *testing.T) {
	a, _, _ := run(t, newFake(5), 1, yes)
	b, _, _ := run(t, newFake(5), 1, yes)
	c, _, _ := run(t, newFake(5), 2, yes)
	if !slices.Equal(a, b) || slices.Equal(a, c) {
		t.Fatalf("equal seeds equal: %t; different seeds equal: %t", slices.Equal(a, b), slices.Equal(a, c))
	}
}

func TestLiveFaultsLeaveAMajority(t *testing.T) {
	for _, fault := range Faults() {
		t.Run(fault.Name, func(t *testing.T) {
			f := newFake(5)
			for seed := range uint64(20) {
				*f = *newFake(5)
				if _, err := fault.Inject(t.Context(), f, rand.New(rand.NewPCG(seed, 0))); err != nil {
					t.Fatal(err)
				}
				if f.whole() {
					t.Fatal("nothing is broken")
				}
				if down := len(f.dead) + len(f.paused); fault.Live && down > 2 {
					t.Fatalf("%d of 5 nodes down", down)
				}
			}
		})
	}
}

func TestStuckClusterIsReported(t *testing.T) {
	f := newFake(3)
	if _, _, err := run(t, f, 3, func(int64) bool { return false }); !errors.Is(err, ErrStuck) || !f.whole() {
		t.Fatalf("whole %t: %v", f.whole(), err)
	}
	f = newFake(3)
	f.unsettled = true
	if _, _, err := run(t, f, 3, yes); !errors.Is(err, ErrStuck) {
		t.Fatal(err)
	}
}
