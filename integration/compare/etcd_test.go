package compare

import (
	"errors"
	"net/url"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"kvd/integration/compare/servers"
)

// startEtcd starts a fresh etcd of one node inside this process and returns its client address.
func startEtcd(t testing.TB) string {
	t.Helper()
	const attempts = 5 // a port may be taken between its choice and its use
	var err error
	for range attempts {
		var endpoint string
		if endpoint, err = tryEtcd(t); err == nil {
			return endpoint
		}
	}
	t.Fatalf("etcd does not start: %v", err)
	return ""
}

func tryEtcd(t testing.TB) (endpoint string, err error) {
	addresses, err := servers.FreeAddresses(2)
	if err != nil {
		return "", err
	}
	client, peer := url.URL{Scheme: "http", Host: addresses[0]}, url.URL{Scheme: "http", Host: addresses[1]}
	config := embed.NewConfig()
	config.Dir = t.TempDir()
	config.LogLevel = "panic"
	config.UnsafeNoFsync = true
	config.TickMs, config.ElectionMs = 10, 100 // alone it need not wait long before it elects itself
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	server, err := embed.StartEtcd(config)
	if err != nil {
		return "", err
	}
	t.Cleanup(server.Close)
	select {
	case <-server.Server.ReadyNotify():
		return client.Host, nil
	case <-time.After(30 * time.Second):
		return "", errors.New("not ready after 30 s")
	}
}
