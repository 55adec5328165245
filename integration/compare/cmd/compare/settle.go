package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// settleTimeout bounds how long shards may take to find their places.
const settleTimeout = 3 * time.Minute

// settle waits until every shard is led from where it is to be led.
func settle(ctx context.Context, kvd string, endpoints []string) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		out, err := exec.CommandContext(ctx, kvd, "shards", "--endpoints", strings.Join(endpoints, ","), "-w", "json").Output()
		if err == nil {
			var at bool
			if at, err = atHome(out); at {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the shards do not come to rest: %w\n%s", err, out)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// atHome tells from the output of kvd shards whether all shards are at rest.
func atHome(shards []byte) (bool, error) {
	var view struct {
		Shards []struct {
			State, Leader string
			Target        []struct{ Node string }
		}
	}
	if err := json.Unmarshal(shards, &view); err != nil {
		return false, err
	}
	for _, s := range view.Shards {
		if s.State != "ok" || len(s.Target) == 0 || s.Leader != s.Target[0].Node {
			return false, nil
		}
	}
	return len(view.Shards) > 0, nil
}
