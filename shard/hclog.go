package shard

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// raftLogger brings raft's log lines into slog. Raft reports every failed call
// to a dead peer as an error, several times a second, and elections as
// warnings; its levels are lowered by one, and a message that repeats within
// repeatAfter is counted instead of printed.
type raftLogger struct {
	hclog.Logger // the methods that raft does not use
	slog         *slog.Logger
	repeats      *repeats
}

type repeats struct {
	mu   sync.Mutex
	seen map[string]*repeat
}

type repeat struct {
	last    time.Time
	skipped int
}

const repeatAfter = 10 * time.Second

func newRaftLogger(to *slog.Logger) hclog.Logger {
	return &raftLogger{
		Logger:  hclog.NewNullLogger(),
		slog:    to,
		repeats: &repeats{seen: make(map[string]*repeat)},
	}
}

func (g *raftLogger) write(level slog.Level, msg string, args []any) {
	if !g.slog.Enabled(context.Background(), level) {
		return
	}
	skipped, show := g.repeats.count(msg)
	if !show {
		return
	}
	for i, arg := range args {
		if f, ok := arg.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(f[0].(string), f[1:]...)
		}
	}
	if skipped > 0 {
		args = append(args, "repeated", skipped)
	}
	g.slog.Log(context.Background(), level, "raft: "+msg, args...)
}

// count bounds itself: raft's messages are constants.
func (r *repeats) count(msg string) (skipped int, show bool) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.seen[msg]
	if e == nil {
		if len(r.seen) > 1000 {
			clear(r.seen)
		}
		r.seen[msg] = &repeat{last: now}
		return 0, true
	}
	if now.Sub(e.last) < repeatAfter {
		e.skipped++
		return 0, false
	}
	skipped, e.skipped, e.last = e.skipped, 0, now
	return skipped, true
}

func (g *raftLogger) Log(level hclog.Level, msg string, args ...any) {
	switch level {
	case hclog.Error:
		g.Error(msg, args...)
	case hclog.Warn:
		g.Warn(msg, args...)
	default:
		g.Debug(msg, args...)
	}
}

func (g *raftLogger) Trace(string, ...any)          {}
func (g *raftLogger) Debug(msg string, args ...any) { g.write(slog.LevelDebug-4, msg, args) }
func (g *raftLogger) Info(msg string, args ...any)  { g.write(slog.LevelDebug, msg, args) }
func (g *raftLogger) Warn(msg string, args ...any)  { g.write(slog.LevelInfo, msg, args) }
func (g *raftLogger) Error(msg string, args ...any) { g.write(slog.LevelWarn, msg, args) }

func (g *raftLogger) IsDebug() bool { return g.slog.Enabled(context.Background(), slog.LevelDebug-4) }
func (g *raftLogger) IsInfo() bool  { return g.slog.Enabled(context.Background(), slog.LevelDebug) }
func (g *raftLogger) IsWarn() bool  { return g.slog.Enabled(context.Background(), slog.LevelInfo) }
func (g *raftLogger) IsError() bool { return g.slog.Enabled(context.Background(), slog.LevelWarn) }

func (g *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{Logger: g.Logger, slog: g.slog.With(args...), repeats: g.repeats}
}
func (g *raftLogger) Named(string) hclog.Logger      { return g }
func (g *raftLogger) ResetNamed(string) hclog.Logger { return g }

func (g *raftLogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return io.Discard }
func (g *raftLogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return log.New(io.Discard, "", 0)
}
