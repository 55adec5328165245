package snapshot

import (
	"context"
	"io"

	"golang.org/x/time/rate"
)

// Limit bounds how many streams are open at a time, and how many bytes they and backups send per second. A node that
// has been away lags in all its groups, and their leaders would all stream to it at once; and requests would wait
// behind what reads a whole state as fast as it can. A nil Limit does not limit.
type Limit struct {
	slots chan struct{}
	rate  *rate.Limiter
}

// limitBurst is what may be sent at once: small states do not wait.
const limitBurst = 1 << 20

// NewLimit returns a Limit of n streams, at least one, and of a number of bytes per second; 0 does not limit these.
func NewLimit(n, bytesPerSecond int) *Limit {
	l := &Limit{slots: make(chan struct{}, max(1, n)), rate: rate.NewLimiter(rate.Inf, limitBurst)}
	if bytesPerSecond > 0 {
		l.rate.SetLimit(rate.Limit(bytesPerSecond))
	}
	return l
}

// enter waits for room.
func (l *Limit) enter(ctx context.Context) error {
	if l == nil {
		return nil
	}
	select {
	case l.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ErrClosed
	}
}

func (l *Limit) leave() {
	if l != nil {
		<-l.slots
	}
}

// Wait returns when n more bytes may be sent, in turn with all who share the Limit, or with ctx's error.
func (l *Limit) Wait(ctx context.Context, n int) error {
	if l == nil {
		return nil
	}
	for ; n > 0; n -= limitBurst {
		if err := l.rate.WaitN(ctx, min(n, limitBurst)); err != nil {
			return err
		}
	}
	return nil
}

// Writer returns a writer to w that waits for each write.
func (l *Limit) Writer(ctx context.Context, w io.Writer) io.Writer {
	return &limitedWriter{ctx: ctx, limit: l, w: w}
}

type limitedWriter struct {
	ctx   context.Context // of the stream, which this lives no longer than
	limit *Limit
	w     io.Writer
}

func (w *limitedWriter) Write(b []byte) (int, error) {
	if err := w.limit.Wait(w.ctx, len(b)); err != nil {
		return 0, err
	}
	return w.w.Write(b)
}
