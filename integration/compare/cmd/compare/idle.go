package main

import (
	"context"
	"time"
)

const (
	idleSettle = 3 * time.Second
	idleWindow = 8 * time.Second
)

// idle measures what a cluster takes that nobody uses.
func (t *trial) idle(ctx context.Context) error {
	if err := t.rest(ctx, idleSettle); err != nil {
		return err
	}
	used, err := t.cluster.CPU()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := t.rest(ctx, idleWindow); err != nil {
		return err
	}
	now, err := t.cluster.CPU()
	if err != nil {
		return err
	}
	t.note("idle", 100*float64(now-used)/float64(time.Since(start)))
	return nil
}
