package main

import (
	"context"
	"errors"
	"log/slog"

	"kvd/node"
)

// serve runs a node until ctx ends or the node cannot go on.
func serve(ctx context.Context, cfg node.Config, log *slog.Logger) error {
	paceGC()
	life, end := context.WithCancelCause(ctx)
	defer end(nil)
	cfg.Logger = log
	cfg.OnFatal = end
	log.Info("starting", "version", version, "node", cfg.Name, "data", cfg.DataDir, "client", cfg.ListenClient, "peer", cfg.ListenPeer, "http", cfg.ListenHTTP)
	n, err := node.Start(life, cfg)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil // told to stop while it waited for its peers
	}
	if err != nil {
		return err
	}
	<-life.Done()
	if ctx.Err() == nil {
		return context.Cause(life) // no orderly stop: it might wait for the disk that failed
	}
	log.Info("stopping: a second signal ends the process at once")
	if err := n.Close(); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}
