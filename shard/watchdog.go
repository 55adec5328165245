package shard

import (
	"fmt"
	"time"
)

// watchState ends the process when the state can no longer be made durable: the
// log could never be truncated again.
func (l *life) watchState() {
	select {
	case <-l.state.store.Failed():
		l.r.fail(l.state.store.Err())
	case <-l.done:
	}
}

// watchDisk guards against a disk that stalls: raft's main loop is stuck in the
// write, but its heartbeats go on and would keep a leader that cannot commit
// in office. Silencing the transport lets the others elect a new one.
func (l *life) watchDisk() {
	interval := max(l.r.cfg.DiskStepDown/5, 10*time.Millisecond)
	timer := time.NewTimer(untilBeat(interval))
	defer timer.Stop()
	silent := false
	for {
		select {
		case <-timer.C:
		case <-l.done:
			return
		}
		timer.Reset(untilBeat(interval))
		if err := l.r.log.Err(); err != nil {
			l.r.fail(err)
			return
		}
		stalled := l.r.log.WriteStalled()
		if slow := stalled >= l.r.cfg.DiskStepDown; slow != silent {
			silent = slow
			l.transport.Suspend(silent)
			if silent {
				l.r.metrics.diskStalls.Inc()
				l.r.slog.Error("a write to the raft log is stalled; this replica is silent until it ends: check the disk", "stalled", stalled)
			} else {
				l.r.slog.Info("the raft log takes writes again")
			}
		}
		if stalled >= l.r.cfg.DiskFatal {
			l.r.fail(fmt.Errorf("a write to the raft log has been stalled for %v: check the disk under %s", stalled, l.r.cfg.Dir))
			return
		}
	}
}
