package main

import (
	"errors"
	"io"
	"maps"
	"strings"
	"testing"
	"time"

	"kvd/node"
)

func TestParsePeers(t *testing.T) {
	for list, want := range map[string]map[string]string{
		"":                              {},
		"n1=a:1":                        {"n1": "a:1"},
		"n1=127.0.0.1:2380, n2=[::1]:2": {"n1": "127.0.0.1:2380", "n2": "[::1]:2"},
	} {
		if got, err := parsePeers(list); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: parsed as %v, %v; want %v", list, got, err, want)
		}
	}
	for _, list := range []string{"n1", "n1=", "=a:1", "n1=a", "n1=a:", "n1=:1", "n1=a:1,", "n1=a:1,n1=b:2", "n1=http://a:1"} {
		if got, err := parsePeers(list); err == nil {
			t.Errorf("%q: parsed as %v", list, got)
		}
	}
}

func TestDefaultsOfStart(t *testing.T) {
	o, err := resolve(t, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := o.nodeConfig()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, got, want string }{
		{"name", cfg.Name, "n1"}, {"data", cfg.DataDir, "./n1.kvd"}, {"strategy", cfg.Strategy, "full"},
		{"client", cfg.ListenClient, "127.0.0.1:2379"}, {"advertised client", cfg.AdvertiseClient, "127.0.0.1:2379"},
		{"peer", cfg.ListenPeer, "127.0.0.1:2380"}, {"advertised peer", cfg.AdvertisePeer, "127.0.0.1:2380"},
		{"HTTP", cfg.ListenHTTP, "127.0.0.1:2381"},
	} {
		if c.got != c.want {
			t.Errorf("%s is %q, want %q", c.what, c.got, c.want)
		}
	}
}

func TestStrategiesOfStart(t *testing.T) {
	of := func(args ...string) node.Config {
		o, err := resolve(t, args, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := o.nodeConfig()
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	if c := of(); c.Shards != 0 || c.ReplicationFactor != 0 || c.Witnesses != "" || c.DownAfter != 30*time.Second || c.Weight != 1 {
		t.Errorf("full: %+v", c)
	}
	if c := of("--strategy", "consistent"); c.Strategy != node.StrategyConsistent || c.Shards != 64 || c.ReplicationFactor != 3 || c.Witnesses != "auto" {
		t.Errorf("consistent: %+v", c)
	}
	c := of("--strategy", "consistent", "--shards", "8", "--replication-factor", "2", "--witnesses", "0", "--down-after", "3s", "--weight", "0.5", "--join", "a:1")
	if c.Shards != 8 || c.ReplicationFactor != 2 || c.Witnesses != "0" || c.DownAfter != 3*time.Second || c.Weight != 0.5 || c.Join != "a:1" {
		t.Errorf("all flags: %+v", c)
	}
}

func TestAddressesOfStart(t *testing.T) {
	peers := "n1=10.0.0.1:7000,n2=10.0.0.2:7000"
	for _, c := range []struct {
		args             []string
		listen, announce string // of peers
	}{
		{[]string{"--name", "n2", "--peers", peers}, "10.0.0.2:7000", "10.0.0.2:7000"},
		{[]string{"--name", "n2", "--peers", peers, "--listen-peer", "0.0.0.0:7000"}, "0.0.0.0:7000", "10.0.0.2:7000"},
		{[]string{"--listen-peer", "127.0.0.1:7001"}, "127.0.0.1:7001", "127.0.0.1:7001"},
		{[]string{"--listen-peer", ":7001", "--advertise-peer", "here:7001"}, ":7001", "here:7001"},
	} {
		o, err := resolve(t, c.args, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := o.nodeConfig()
		if err != nil || cfg.ListenPeer != c.listen || cfg.AdvertisePeer != c.announce {
			t.Errorf("%v: listens on %q, announces %q, %v; want %q, %q", c.args, cfg.ListenPeer, cfg.AdvertisePeer, err, c.listen, c.announce)
		}
	}
	if o, err := resolve(t, []string{"--listen-http", ""}, nil, ""); err != nil {
		t.Fatal(err)
	} else if cfg, err := o.nodeConfig(); err != nil || cfg.ListenHTTP != "none" {
		t.Errorf("an empty HTTP address became %q, %v", cfg.ListenHTTP, err)
	}
}

func TestBadStart(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--peers", "n2=a:1"}, "this node, n1, is not among"},
		{[]string{"--peers", "n1"}, "--peers:"},
		{[]string{"--listen-client", ":2379"}, "--advertise-client: others cannot connect to"},
		{[]string{"--listen-peer", "0.0.0.0:2380"}, "--advertise-peer: others cannot connect to"},
		{[]string{"--listen-peer", "[::]:2380"}, "--advertise-peer: others cannot connect to"},
		{[]string{"--listen-client", "here"}, "--listen-client"},
		{[]string{"--strategy", "magic"}, "--strategy"},
		{[]string{"--name", "a/b"}, "--name"},
		{[]string{"--peers", "n1=a:1", "--join", "b:1"}, "--join: not together with --peers"},
		{[]string{"--join", "b"}, `--join: "b" is not host:port`},
		{[]string{"--strategy", "consistent", "--shards", "0"}, "--shards: 0 is not between 1 and 4096"},
		{[]string{"--strategy", "consistent", "--shards", "4097"}, "--shards: 4097"},
		{[]string{"--strategy", "consistent", "--replication-factor", "0"}, "--replication-factor: 0 is not between 1 and 7"},
		{[]string{"--strategy", "consistent", "--replication-factor", "8"}, "--replication-factor: 8"},
		{[]string{"--strategy", "consistent", "--witnesses", "2"}, `--witnesses: "2" is neither auto nor 0`},
		{[]string{"--strategy", "consistent", "--weight", "0"}, "--weight: 0 is not between"},
		{[]string{"--strategy", "consistent", "--weight", "NaN"}, "--weight: NaN is not between"},
		{[]string{"--strategy", "consistent", "--down-after", "0s"}, "--down-after: 0s is below 2s"},
		{[]string{"--down-after", "1s"}, "--down-after: 1s is below 2s"},
		{[]string{"--shards", "64"}, "--shards: means nothing with --strategy full"},
		{[]string{"--replication-factor", "3"}, "--replication-factor: means nothing"},
		{[]string{"--witnesses", "auto"}, "--witnesses: means nothing"},
		{[]string{"--weight", "2"}, "--weight: means nothing"},
		{[]string{"--grpc-server", "x"}, "--grpc-server"},
		{[]string{"--heartbeat-timeout", "1ms"}, "--heartbeat-timeout"},
		{[]string{"--max-request-bytes", "0"}, "--max-request-bytes: 0 is not between 256 and 10485760"},
		{[]string{"--max-request-bytes", "10485761"}, "--max-request-bytes: 10485761"},
		{[]string{"--max-txn-ops", "0"}, "--max-txn-ops: 0 is not between 1 and 16384"},
		{[]string{"--max-txn-ops", "16385"}, "--max-txn-ops: 16385"},
	} {
		o, err := resolve(t, c.args, nil, "")
		if err == nil {
			_, err = o.nodeConfig()
		}
		var usage *usageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: error %v, want one line with %q", c.args, err, c.want)
		}
	}
}

func TestLogFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		ok   bool
	}{
		{nil, true}, {[]string{"--log-level", "debug", "--log-format", "json"}, true}, {[]string{"--log-level", "WARN"}, true},
		{[]string{"--log-level", "loud"}, false}, {[]string{"--log-format", "xml"}, false},
	} {
		o, err := resolve(t, c.args, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.logger(io.Discard); (err == nil) != c.ok {
			t.Errorf("%v: %v", c.args, err)
		}
	}
}
