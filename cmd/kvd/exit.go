package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit codes. They are part of kvd's interface (docs/cli.md): scripts rely on them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnhealthy   = 3
	exitUnavailable = 4
	exitDataLost    = 5
	exitInterrupted = 130
)

const exitCodesHelp = `Exit codes:
  0    done (a get that finds nothing and a txn whose compares fail are done, too)
  1    the server refused, or something here failed: nothing was written
  2    wrong flags, arguments or input
  3    status or health found a node that does not serve
  4    no server answered, or not in time: a write may or may not have happened
  5    data is lost or damaged
  130  interrupted`

var (
	// errUnhealthy: a node was found that does not serve.
	errUnhealthy = errors.New("unhealthy")
	// errUnreachable: no connection to any endpoint.
	errUnreachable = errors.New("no endpoint can be reached")
	// errDataLost: acknowledged data is missing.
	errDataLost = errors.New("data lost")
	// errDamaged: a backup is not what it was when it was made.
	errDamaged = errors.New("damaged")
	// errInterrupted: a signal ended the command before it was done.
	errInterrupted = errors.New("interrupted")
)

// usageError is a mistake in flags, arguments or input.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// exitCode maps the error of a command to its exit code. ctx is the process's: it ends with the first signal.
func exitCode(ctx context.Context, err error) int {
	var usage *usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, errDataLost), errors.Is(err, errDamaged):
		return exitDataLost
	case ctx.Err() != nil, errors.Is(err, errInterrupted):
		return exitInterrupted
	case errors.Is(err, errUnhealthy):
		return exitUnhealthy
	case errors.Is(err, errUnreachable), isUnavailable(err):
		return exitUnavailable
	}
	return exitFailed
}

// isUnavailable tells whether err says nothing about what the server did.
func isUnavailable(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return true
	}
	switch grpcCode(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return false
}

func grpcCode(err error) codes.Code {
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		return e.Code()
	}
	return status.Code(err)
}

func isCommand(cmd *cobra.Command, names ...string) bool {
	return cmd != nil && slices.Contains(names, cmd.Name())
}

// describe says in one line what went wrong and, where it is not obvious, what to do.
func describe(cmd *cobra.Command, err error) string {
	text := err.Error()
	if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
		text = s.Message()
	}
	var hint string
	switch {
	case errors.Is(err, errUnreachable), errors.Is(err, errUnhealthy), errors.Is(err, errDataLost):
	case errors.Is(err, syscall.ENOSPC) && isCommand(cmd, "start"):
		hint = "make room on the disk and start the node again"
	case errors.Is(err, rpctypes.ErrCompacted) && isCommand(cmd, "get"):
		hint = "read at a newer --rev, or without it"
	case errors.Is(err, rpctypes.ErrCompacted) && isCommand(cmd, "watch"):
		hint = "watch from there, or without --rev"
	case errors.Is(err, rpctypes.ErrLeaseNotFound), errors.Is(err, errLeaseEnded):
		hint = "kvd lease list shows the leases there are"
	case errors.Is(err, rpctypes.ErrFutureRev):
		hint = "kvd status shows the newest revision"
	case errors.Is(err, rpctypes.ErrTooManyRequests):
		hint = "the server is overloaded and did nothing; try again later"
	case grpcCode(err) == codes.ResourceExhausted && strings.Contains(text, "larger than max"):
		hint = "a request may have what --max-request-bytes of kvd start says, 1.5 MiB if nothing"
	case isUnavailable(err) && isCommand(cmd, "put", "del", "txn", "compact"):
		hint = "the write may or may not have happened: read the key before you try again (kvd status shows the nodes)"
	case isUnavailable(err):
		hint = "no answer in time: kvd status shows the nodes, --command-timeout waits longer"
	case grpcCode(err) == codes.Unimplemented:
		hint = "this server does not offer it"
	}
	if hint != "" {
		text += "; " + hint
	}
	return strings.Join(strings.Fields(text), " ")
}

// changedFlags lists the flags that were given on the command line.
func changedFlags(cmd *cobra.Command) (names []string) {
	cmd.Flags().Visit(func(f *pflag.Flag) { names = append(names, f.Name) })
	return names
}
