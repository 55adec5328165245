package snapshot

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimitOfBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := NewLimit(4, 1<<20)
		start := time.Now()
		var writers sync.WaitGroup
		for range 2 { // together, not each
			writers.Go(func() {
				w := limit.Writer(t.Context(), io.Discard)
				for range 3 {
					if n, err := w.Write(make([]byte, 5<<19)); n != 5<<19 || err != nil { // larger than the burst
						t.Errorf("wrote %d bytes: %v", n, err)
					}
				}
			})
		}
		writers.Wait()
		if took := time.Since(start).Round(time.Millisecond); took != 14*time.Second {
			t.Errorf("15 MiB at 1 MiB/s, the first of them at once, took %v", took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := limit.Wait(ctx, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("a stream that has ended waited: %v", err)
		}
		for _, unlimited := range []*Limit{nil, NewLimit(1, 0)} {
			if err := unlimited.Wait(t.Context(), 1<<40); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(start).Round(time.Millisecond); took != 14*time.Second {
			t.Errorf("what has no limit waited: %v", took)
		}
	})
}
