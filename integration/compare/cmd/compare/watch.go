package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/integration/compare/servers"
)

const (
	watchRate   = 200 // puts per second
	fanWatchers = 100
)

// watchLoad measures the time from a put to the event at watchers.
type watchLoad struct{ watchers int }

var watches = []watchLoad{{1}, {100}}

func (w watchLoad) key() string { return fmt.Sprintf("watch-%d", w.watchers) }

func (w watchLoad) title() string {
	return fmt.Sprintf("%s, %d puts/s", plural(w.watchers, "watcher"), watchRate)
}

// watch measures watches of a server that has them.
func (t *trial) watch(ctx context.Context) error {
	if has, err := t.hasWatch(ctx); err != nil || !has {
		return err
	}
	for _, w := range watches {
		event, err := t.benchWatch(ctx, w.watchers, "--rate", strconv.Itoa(watchRate), "--clients", "100")
		if err != nil {
			return err
		}
		t.note(w.key()+"/p50", event.Latency.P50/1000)
		t.note(w.key()+"/p99", event.Latency.P99/1000)
	}
	event, err := t.benchWatch(ctx, fanWatchers, "--rate", "0", "--clients", "10")
	if err != nil {
		return err
	}
	t.note("watch-fan/rate", event.PerSecond)
	return nil
}

func (t *trial) benchWatch(ctx context.Context, watchers int, args ...string) (benchOperation, error) {
	r, err := t.bench(ctx, append([]string{
		"bench", "watch", "--watchers", strconv.Itoa(watchers), "--duration", t.o.duration.String(),
		"--val-size", strconv.Itoa(valueBytes), "--endpoints", strings.Join(t.cluster.Endpoints(), ","),
	}, args...)...)
	if err != nil {
		return benchOperation{}, err
	}
	if r.Total.Failed > 0 || r.Missing > 0 {
		return benchOperation{}, fmt.Errorf("watch: %d puts failed, %d events are missing: %s", r.Total.Failed, r.Missing, r.Total.Errors)
	}
	for _, o := range r.Operations {
		if o.Operation == "event" {
			return o, nil
		}
	}
	return benchOperation{}, fmt.Errorf("watch: kvd bench tells of no events")
}

// hasWatch asks the server to watch a key.
func (t *trial) hasWatch(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := servers.Dial(t.cluster.Endpoints()[0])
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stream, err := pb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		return false, err
	}
	// What is wrong shows when the answer is read.
	stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k")}}})
	response, err := stream.Recv()
	if status.Code(err) == codes.Unimplemented {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return response.Created, nil
}
