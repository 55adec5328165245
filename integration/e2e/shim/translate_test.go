package main

import (
	"slices"
	"strings"
	"testing"
)

var cluster = []string{
	"--name=a", "--listen-client-urls=http://localhost:1", "--advertise-client-urls=http://localhost:1", "--listen-peer-urls=http://localhost:2",
	"--initial-advertise-peer-urls=http://localhost:2", "--initial-cluster=a=http://localhost:2,b=http://localhost:3", "--initial-cluster-state=new",
}

func TestTranslate(t *testing.T) {
	want := []string{"start", "--listen-http", "none", "--name", "a", "--data-dir", "d", "--snapshot-entries", "5", "--listen-client", "localhost:1",
		"--advertise-client", "localhost:1", "--listen-peer", "localhost:2", "--advertise-peer", "localhost:2", "--peers", "a=localhost:2,b=localhost:3"}
	for _, c := range []struct{ args, want []string }{
		{nil, nil},
		{[]string{"--quota-backend-bytes=5", "--strict-reconfig-check=false"}, nil},
		{[]string{"--cert-file", "c", "--key-file", "k", "--trusted-ca-file", "ca", "--client-cert-auth"},
			[]string{"--cert-file", "c", "--key-file", "k", "--trusted-ca-file", "ca", "--client-cert-auth"}},
		{[]string{"--max-txn-ops=7", "--max-request-bytes", "1000"}, []string{"--max-request-bytes", "1000", "--max-txn-ops", "7"}},
		{[]string{"--auto-tls"}, []string{"--cert-file", "own.crt", "--key-file", "own.key"}},
		{[]string{"--peer-auto-tls"}, []string{"--peer-cert-file", "own.crt", "--peer-key-file", "own.key", "--peer-trusted-ca-file", "own.crt"}},
	} {
		args := append(append(slices.Clone(cluster), "--data-dir", "d", "--snapshot-count=5"), c.args...)
		got, err := translate(args, selfSigned{cert: "own.crt", key: "own.key"})
		if err != nil || !slices.Equal(got, append(slices.Clone(want), c.want...)) {
			t.Errorf("%v became %q, %v; want %q and %q", c.args, got, err, want, c.want)
		}
	}
}

func TestTranslateRefuses(t *testing.T) {
	for flag, named := range map[string]string{
		"--pre-vote=false": "pre-vote", "--initial-cluster-state=existing": "initial-cluster-state", "--listen-peer-urls=unix://a:1": "listen-peer-urls",
		"--listen-client-urls=http://a:1,http://b:1": "listen-client-urls", "--initial-cluster=a": "initial-cluster", "--name=": "--name", "more": "more",
	} {
		if got, err := translate(append(slices.Clone(cluster), flag), selfSigned{}); err == nil || !strings.Contains(err.Error(), named) {
			t.Errorf("%s became %q, error %v; want an error about %q", flag, got, err, named)
		}
	}
}

func TestShorten(t *testing.T) {
	long := strings.Repeat("TestOfALongName", 5) + "-test-"
	one, two := shorten(long+"1"), shorten(long+"2")
	if len(one) > maxName || one == two || shorten("m1") != "m1" {
		t.Errorf("shortened to %q and %q", one, two)
	}
}
