package main

import (
	"strings"
	"testing"
)

func TestLeaseCommandsPrint(t *testing.T) {
	f := startFake(t)
	for line, want := range map[string]string{
		"lease grant 60":             "lease 000000000000001e granted with TTL(60s)\n",
		"lease revoke 1e":            "lease 000000000000001e revoked\n",
		"lease keep-alive 1e --once": "lease 000000000000001e keepalived with TTL(1)\n",
		"lease timetolive 1e":        "lease 000000000000001e granted with TTL(9s), remaining(7s)\n",
		"lease timetolive 1e --keys": "lease 000000000000001e granted with TTL(9s), remaining(7s), attached keys([a b])\n",
		"lease timetolive dead":      "lease 000000000000dead already expired\n",
		"lease list":                 "found 2 leases\n000000000000001e\n000000000000001f\n",
		"lease grant 60 -w json":     `{"cluster_id":193,"member_id":161,"revision":7,"raft_term":3,"ID":30,"TTL":60,"Error":""}` + "\n",
		"lease timetolive 1e --keys -w json": `{"cluster_id":193,"member_id":161,"revision":7,"raft_term":3,"id":30,"ttl":7,"granted-ttl":9,"keys":["YQ==","Yg=="]}` +
			"\n",
	} {
		code, out, errOut := kvd(t, "", append(strings.Fields(line), "--endpoints", f.addr)...)
		if code != exitOK || out != want {
			t.Errorf("%s: printed %q and %q with exit code %d, want %q", line, out, errOut, code, want)
		}
	}
}

// keptAlive keeps a lease alive that ends when it is first told to have been renewed.
func keptAlive(t *testing.T, f *fakeServer) {
	t.Helper()
	out, errOut := &lineWriter{do: func(string) { f.ended.Store(true) }}, new(strings.Builder)
	code := run(t.Context(), []string{"lease", "keep-alive", "1e", "--command-timeout", "60s", "--endpoints", f.addr}, strings.NewReader(""), out, errOut)
	const renewed = "lease 000000000000001e keepalived with TTL(1)\n"
	if printed := out.all.String(); code != exitFailed || printed == "" || strings.ReplaceAll(printed, renewed, "") != "" || !strings.Contains(errOut.String(), "expired or was revoked: 000000000000001e") {
		t.Errorf("printed %q and %q with exit code %d", printed, errOut, code)
	}
}

func TestKeepAliveEndsWithTheLease(t *testing.T) { keptAlive(t, startFake(t)) }

// A node that is stopped does not answer, and does not refuse either.
func TestKeepAliveDoesNotRelyOnOneStream(t *testing.T) {
	f := startFake(t)
	f.ignored.Store(1)
	keptAlive(t, f)
}
