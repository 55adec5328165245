package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestExitCodes(t *testing.T) {
	healthy, failing, silent := startFake(t), startFake(t), startFake(t)
	failing.fail = rpctypes.ErrGRPCCompacted
	silent.hang = true
	lossy := startFake(t)
	lossy.backup, lossy.forget = []byte("a|b"), "anything"
	leaderless := startFake(t)
	leaderless.leader = 0
	unknown := startFake(t)
	unknown.fail = rpctypes.ErrGRPCTimeoutDueToLeaderFail
	dead := deadAddress(t)
	quick := "--command-timeout=50ms"

	for _, c := range []struct {
		name string
		args []string
		code int
		says string // in the error
	}{
		{"help", []string{}, exitOK, ""}, // cobra takes nil for the arguments of the process
		{"put", []string{"put", "k", "v", "--endpoints", healthy.addr}, exitOK, ""},
		{"missing key", []string{"get", "nothing", "--endpoints", healthy.addr}, exitOK, ""},
		{"refused", []string{"get", "k", "--endpoints", failing.addr}, exitFailed, "compacted; read at a newer --rev"},
		{"no such file", []string{"snapshot", "status", "/nonexistent/file"}, exitFailed, "no such file"},
		{"unknown command", []string{"gett"}, exitUsage, "did you mean get?"},
		{"unknown subcommand", []string{"member", "lst"}, exitUsage, "did you mean list?"},
		{"unknown flag", []string{"get", "k", "--bogus"}, exitUsage, "--bogus"},
		{"too few arguments", []string{"put"}, exitUsage, "a key and a value"},
		{"too many arguments", []string{"del", "a", "b", "c"}, exitUsage, "kvd del wants"},
		{"bad flag value", []string{"get", "k", "--order", "up"}, exitUsage, `"up" is not an order`},
		{"bad format", []string{"get", "k", "-w", "xml"}, exitUsage, `"xml" is not a format`},
		{"no table", []string{"put", "k", "v", "-w", "table", "--endpoints", healthy.addr}, exitUsage, "has no table"},
		{"bad endpoint", []string{"get", "k", "--endpoints", "here"}, exitUsage, `"here" is not host:port`},
		{"half of TLS", []string{"get", "k", "--cert", "x"}, exitUsage, "--cert and --key go together"},
		{"client flag of start", []string{"start", "--endpoints", "a:1"}, exitUsage, "no flag --endpoints"},
		{"too few demo nodes", []string{"demo", "--nodes", "2"}, exitUsage, "between 5"},
		{"bad transaction", []string{"txn"}, exitUsage, "wants a transaction"},
		{"no such member", []string{"move-leader", "n9", "--endpoints", healthy.addr}, exitUsage, "the members are n1 (a1), n2 (a2)"},
		{"unhealthy", []string{"health", "--endpoints", failing.addr}, exitUnhealthy, "1 of 1 endpoints"},
		{"no leader", []string{"status", "--endpoints", leaderless.addr}, exitUnhealthy, "1 of 1 nodes (n1 "},
		{"one node is down", []string{"status", "--endpoints", healthy.addr + "," + dead}, exitUnhealthy, dead},
		{"nobody there", []string{"get", "k", "--endpoints", dead, "--dial-timeout", "100ms"}, exitUnavailable, dead + " connection refused"},
		{"status of nobody", []string{"status", "--endpoints", dead}, exitUnavailable, "no endpoint can be reached"},
		{"no answer to a read", []string{"get", "k", "--endpoints", silent.addr, quick}, exitUnavailable, "no answer in time"},
		{"no answer to a write", []string{"put", "k", "v", "--endpoints", silent.addr, quick}, exitUnavailable, "may or may not have happened"},
		{"unknown outcome", []string{"put", "k", "v", "--endpoints", unknown.addr}, exitUnavailable, "may or may not have happened"},
		{"damaged on the way", []string{"snapshot", "save", filepath.Join(t.TempDir(), "b"), "--endpoints", lossy.addr}, exitDataLost, "digest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, _, errOut := kvd(t, "", c.args...)
			if code != c.code {
				t.Errorf("exit code %d, want %d: %s", code, c.code, errOut)
			}
			if (c.code == exitOK) != (errOut == "") || !strings.Contains(errOut, c.says) {
				t.Errorf("stderr %q, want %q in it", errOut, c.says)
			}
			if lines := strings.Count(errOut, "Error: "); c.code != exitOK && lines != 1 {
				t.Errorf("%d error lines: %q", lines, errOut)
			}
		})
	}
}

func TestInterruptedCommand(t *testing.T) {
	silent := startFake(t)
	silent.hang = true
	ctx, interrupt := context.WithCancel(t.Context())
	go func() {
		<-silent.asked
		interrupt()
	}()
	if code, _, errOut := kvdUntil(ctx, "", "put", "k", "v", "--endpoints", silent.addr); code != exitInterrupted {
		t.Errorf("exit code %d, want %d: %s", code, exitInterrupted, errOut)
	}
}

// The promise of the help texts: whatever kvd says about its exit codes is what scripts can rely on.
func TestExitCodesAreDocumented(t *testing.T) {
	_, help, _ := kvd(t, "", "--help")
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, code := range []string{"0", "1", "2", "3", "4", "5", "130"} {
		if !strings.Contains(help, "\n  "+code+" ") {
			t.Errorf("kvd --help lacks exit code %s", code)
		}
		if !strings.Contains(string(doc), "\n| "+code+" |") {
			t.Errorf("docs/cli.md lacks exit code %s", code)
		}
	}
}

func TestDescribeIsOneLine(t *testing.T) {
	if got := describe(nil, usagef("first\n\tsecond")); got != "first second" {
		t.Errorf("described as %q", got)
	}
}

func TestATooLargeRequestIsToldTheLimit(t *testing.T) {
	err := status.Error(codes.ResourceExhausted, "trying to send message larger than max (3000011 vs. 2097152)")
	if got := describe(nil, err); !strings.Contains(got, "1.5 MiB") {
		t.Errorf("%q", got)
	}
}
