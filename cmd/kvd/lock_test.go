package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"kvd/node"
)

// startRealNode runs a cluster of one node in this process, and returns its client address.
func startRealNode(t *testing.T, strategy string) string {
	t.Helper()
	for {
		client, err := tryRealNode(t, strategy)
		switch {
		case err == nil:
			return client
		case !errors.Is(err, syscall.EADDRINUSE): // else somebody has got a port that was free
			t.Fatal(err)
		}
	}
}

func tryRealNode(t *testing.T, strategy string) (client string, err error) {
	t.Helper()
	address := func() string {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		return listener.Addr().String()
	}
	client = address()
	args := []string{"--data-dir", filepath.Join(t.TempDir(), "n1"), "--strategy", strategy, "--listen-client", client, "--listen-peer", address(), "--listen-http", "none"}
	if strategy == node.StrategyConsistent {
		args = append(args, "--shards", "4")
	}
	o, err := resolve(t, args, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := o.nodeConfig()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Logger = slog.New(slog.DiscardHandler)
	n, err := node.Start(t.Context(), cfg)
	if err != nil {
		return "", err
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	<-n.Ready()
	return client, nil
}

// lineWriter calls do with the first line.
type lineWriter struct {
	mu   sync.Mutex
	all  strings.Builder
	do   func(line string)
	once sync.Once
}

func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	w.all.Write(b)
	line, _, whole := strings.Cut(w.all.String(), "\n")
	w.mu.Unlock()
	if whole {
		w.once.Do(func() { w.do(line) })
	}
	return len(b), nil
}

func TestLocksAndElections(t *testing.T) {
	for _, strategy := range []string{node.StrategyFull, node.StrategyConsistent} {
		t.Run(strategy, func(t *testing.T) {
			address := startRealNode(t, strategy)
			in := func(args ...string) (code int, out, errOut string) {
				return kvd(t, "", append([]string{"--endpoints", address}, args...)...)
			}
			const report = `echo "$KVD_LOCK_KEY $KVD_LOCK_REV $ETCD_LOCK_KEY"; exit 7`
			code, out, errOut := in("lock", "l", "--", "sh", "-c", report)
			fields := strings.Fields(out)
			if code != 7 || errOut != "" || len(fields) != 3 || !strings.HasPrefix(fields[0], "l/") || fields[0] != fields[2] {
				t.Fatalf("printed %q and %q with exit code %d", out, errOut, code)
			}
			if _, out, _ := in("lease", "list"); out != "found 0 leases\n" {
				t.Errorf("a lease is left: %s", out)
			}

			// One holds it until it is told to end; the other one gets it then, and its token is greater.
			ctx, release := context.WithCancel(t.Context())
			holder := &lineWriter{do: func(string) { release() }}
			var holding sync.WaitGroup
			holding.Go(func() {
				if code := run(ctx, []string{"--endpoints", address, "lock", "l"}, strings.NewReader(""), holder, io.Discard); code != exitOK {
					t.Errorf("the holder ended with %d", code)
				}
			})
			_, next, _ := in("lock", "l", "--", "sh", "-c", report)
			holding.Wait()
			if nextFields := strings.Fields(next); len(nextFields) != 3 || atoi(t, nextFields[1]) <= atoi(t, fields[1]) {
				t.Errorf("tokens do not grow: %q after %q", next, out)
			}

			// Who loses it is told.
			for _, lose := range []func(key string){
				func(key string) { in("lease", "revoke", key[strings.LastIndexByte(key, '/')+1:]) },
				func(key string) { in("del", key) },
			} {
				var said strings.Builder
				if code := run(t.Context(), []string{"--endpoints", address, "elect", "e", "me", "--ttl", "3600"}, strings.NewReader(""), &lineWriter{do: lose}, &said); code != exitFailed || !strings.Contains(said.String(), "the leadership was lost") {
					t.Errorf("lost: exit code %d, %s", code, said.String())
				}
			}

			// Listeners see who leads.
			ctx, stop := context.WithCancel(t.Context())
			seen := make(chan string, 1)
			listener := &lineWriter{do: func(key string) {
				seen <- key
				stop()
			}}
			var listening sync.WaitGroup
			listening.Go(func() {
				if code := run(ctx, []string{"--endpoints", address, "elect", "e", "--listen"}, strings.NewReader(""), listener, io.Discard); code != exitOK {
					t.Errorf("the listener ended with %d", code)
				}
			})
			leadCtx, resign := context.WithCancel(t.Context())
			var key string
			leader := &lineWriter{do: func(line string) {
				key = line
				go func() {
					listening.Wait()
					resign()
				}()
			}}
			run(leadCtx, []string{"--endpoints", address, "elect", "e", "you"}, strings.NewReader(""), leader, io.Discard)
			if got := <-seen; got != key || !strings.HasPrefix(key, "e/") {
				t.Errorf("the listener saw %q, the leader is %q", got, key)
			}
			if _, out, _ := in("get", "", "--prefix", "--keys-only"); out != "" {
				t.Errorf("left: %q", out)
			}
		})
	}
}

func atoi(t *testing.T, s string) (n int64) {
	t.Helper()
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return n
}
