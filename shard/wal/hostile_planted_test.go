package wal

import (
	"errors"
	"testing"

	"kvd/shard/wal/vfs"
)

// What the tests of this package are worth: each of them finds the fault that it is for.
func TestPlantedFaults(t *testing.T) {
	for name, p := range map[string]struct {
		faults faults
		disk   func(vfs.Op) error
		run    func(*crasher) error
	}{
		"sync left out":              {faults: faults{skipSync: true}, run: crashScript},
		"disk that lies about syncs": {disk: lie(vfs.OpSync), run: crashScript},
		"disk that forgets names":    {disk: lie(vfs.OpSyncDir), run: crashScript},
		"disk that loses writes":     {disk: lieAt(vfs.OpWrite, 40), run: crashScript},
		"salt ignored":               {faults: faults{ignoreSalt: true}, run: func(c *crasher) error { return c.run(monotone) }},
		"truncation forgotten":       {faults: faults{forgetBounds: true}, run: crashScript},
		"segments let go early":      {faults: faults{retireEarly: true}, run: crashScript},
		"broken batch accepted":      {faults: faults{acceptBroken: true}, run: flipScript},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(10) {
				w := newTrial(seeded(seed), 3, Options{SegmentBytes: hostileSegmentBytes, faults: p.faults})
				c := &crasher{w: w, crashes: 2, seed: seed << 32, fault: p.disk}
				if err := p.run(c); err != nil {
					if errors.Is(err, errViolated) {
						t.Fatalf("seed %d: the violation itself is lost: %v", seed, err)
					}
					t.Logf("seed %d: %.300v", seed, err)
					return
				}
			}
			t.Error("nobody has noticed")
		})
	}
}

func crashScript(c *crasher) error { return c.run(script) }

func flipScript(c *crasher) error {
	s, err := newSpecimen(c.w.options, votes, c.seed, false)
	if err != nil {
		return err
	}
	s.vague = true
	_, _, err = s.flip()
	return err
}

func lie(kind vfs.Kind) func(vfs.Op) error { return lieAt(kind, 0) }

// lieAt makes all operations of a kind from the n-th on do nothing, with success.
func lieAt(kind vfs.Kind, n int) func(vfs.Op) error {
	return func(op vfs.Op) error {
		if op.Kind != kind {
			return nil
		}
		if n--; n >= 0 {
			return nil
		}
		return &vfs.Fault{}
	}
}
