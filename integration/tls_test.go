package integration

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"kvd/integration/cluster"
)

// A cluster with certificates between nodes and for clients; nobody without them gets in.
func TestTLS(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]cluster.TLS{"server certificates": cluster.ServerTLS, "mutual": cluster.MutualTLS} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := cluster.Run(t, cluster.Config{TLS: mode, Args: quick})
			data := pairs("tls", 0, 10)
			write(t, c, "n2", data) // forwarded to the leader by one of the nodes at least
			write(t, c, "n3", data)
			victim := leader(t, c)
			must(t, c.Node(victim).Kill())
			for _, name := range others(c, victim) {
				read(t, c, name, data)
			}
			address := c.Node(others(c, victim)[0]).ClientAddr()
			anonymous, err := c.Certs.ClientConfig(false)
			must(t, err)
			answers(t, "without TLS", clientv3.Config{Endpoints: []string{"http://" + address}}, false)
			answers(t, "that trusts nobody", clientv3.Config{Endpoints: []string{"https://" + address}, TLS: &tls.Config{}}, false)
			answers(t, "without a certificate", clientv3.Config{Endpoints: []string{"https://" + address}, TLS: anonymous}, mode == cluster.ServerTLS)
		})
	}
}

// answers checks whether a client gets an answer.
func answers(t *testing.T, what string, cfg clientv3.Config, want bool) {
	t.Helper()
	cfg.Logger, cfg.MaxUnaryRetries = zap.NewNop(), 1
	cl, err := clientv3.New(cfg)
	must(t, err)
	defer cl.Close()
	timeout := 2 * time.Second // for a refusal, which looks like a server that does not answer
	if want {
		timeout = cluster.Liveness
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	_, err = cl.Get(ctx, "tls/00000")
	if (err == nil) != want {
		t.Errorf("a client %s: %v", what, err)
	}
}
