package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// errLost: what was held belongs to others now, or soon will.
var errLost = errors.New("was lost")

func newLockCommand(client *clientOptions) *cobra.Command {
	var o holdOptions
	cmd := &cobra.Command{
		Use:   "lock <name> [-- <command> [<argument>...]]",
		Short: "Wait for a lock, and hold it while a command runs",
		Long: `Wait for a lock, hold it while a command runs, and end with the command's exit code; without a command, print the
lock's key, and hold it until a signal comes. SIGTERM and Ctrl-C are passed on to the command as SIGTERM.

The lock is bound to a lease of --ttl seconds. If that cannot be renewed, or somebody deletes the lock's key, others get
the lock: the command is told to end, and killed ` + lostGrace.String() + ` later. A process that is stopped for longer than that may not know: let what it writes be
checked. The command has
  KVD_LOCK_KEY   the lock's key, which exists as long as the lock is held
  KVD_LOCK_REV   the revision that created it: later holders have greater ones
and etcdctl's ETCD_LOCK_KEY and ETCD_LOCK_REV.`,
		Example: `  kvd lock nightly -- ./backup.sh
  kvd lock '{job}/lock' -- sh -c 'kvd txn <<END
  create("$KVD_LOCK_KEY") = "$KVD_LOCK_REV"

  put {job}/result done


  END'`,
		Args: atLeast(1, "the lock's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			h := &holder{cmd: cmd, client: client, ttl: o.ttl, what: "the lock", name: args[0], command: args[1:]}
			h.environment = h.lockEnvironment
			return h.run()
		},
	}
	o.AddFlags(cmd.Flags())
	return cmd
}

// atLeast accepts low arguments and more; want names them.
func atLeast(low int, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= low {
			return nil
		}
		return fmt.Errorf("%s wants %s: see %s --help", cmd.CommandPath(), want, cmd.CommandPath())
	}
}

type holdOptions struct{ ttl int64 }

func (o *holdOptions) AddFlags(f *pflag.FlagSet) {
	f.Int64Var(&o.ttl, "ttl", 10, "seconds after which others get it when this process is gone")
}

// holder waits for a lock or a leadership, holds it and releases it. Both are had by the oldest of the keys below a
// name, each of which is bound to its owner's lease: Mutex and Election of etcd's client agree on that. It uses the
// latter for both, because that tells the key's revision.
type holder struct {
	cmd         *cobra.Command
	client      *clientOptions
	ttl         int64
	what        string // for people
	name, value string
	command     []string
	environment func() []string

	etcd     *clientv3.Client
	session  *concurrency.Session
	election *concurrency.Election
	first    *clientv3.GetResponse // shows that the key is the oldest
	gone     <-chan struct{}       // closed when it is lost
}

func (h *holder) run() (err error) {
	if h.ttl < 1 {
		return usagef("--ttl: want a number of seconds")
	}
	p := h.client.printer(h.cmd)
	if h.etcd, err = h.client.connect(h.cmd.Context()); err != nil {
		return err
	}
	defer h.etcd.Close()
	if err := h.begin(); err != nil {
		return err
	}
	defer func() {
		if released := h.release(); err == nil {
			err = released
		}
	}()
	if err := h.acquire(); err != nil {
		return err
	}
	h.watch()
	if len(h.command) > 0 {
		return h.runCommand()
	}
	if err := p.get((*pb.RangeResponse)(h.first), false); err != nil {
		return err
	}
	select {
	case <-h.cmd.Context().Done():
		return nil
	case <-h.gone:
		return h.lost()
	}
}

// begin gets a lease, and keeps it alive from now on.
func (h *holder) begin() error {
	ctx, cancel := h.timeout()
	defer cancel()
	sent := time.Now()
	lease, err := h.etcd.Grant(ctx, h.ttl)
	if err != nil {
		return err
	}
	steadyLeases(h.etcd, time.Duration(lease.TTL)*time.Second-time.Since(sent))
	h.session, err = concurrency.NewSession(h.etcd, concurrency.WithLease(lease.ID))
	return err
}

func (h *holder) timeout() (context.Context, context.CancelFunc) {
	return context.WithTimeout(h.cmd.Context(), h.client.commandTimeout)
}

// acquire waits as long as the lease can be kept alive, whatever becomes of single requests: to ask again keeps the
// place in the queue.
func (h *holder) acquire() error {
	ctx, cancel := context.WithCancel(h.cmd.Context())
	defer cancel()
	defer context.AfterFunc(h.session.Ctx(), cancel)()
	for {
		err := h.tryAcquire(ctx)
		switch {
		case h.cmd.Context().Err() != nil:
			return errInterrupted
		case ctx.Err() != nil:
			return h.lost()
		case !isUnavailable(err):
			return err
		}
		select {
		case <-time.After(watchPause):
		case <-ctx.Done():
		}
	}
}

func (h *holder) tryAcquire(ctx context.Context) (err error) {
	h.election = concurrency.NewElection(h.session, h.name)
	if err := h.election.Campaign(ctx, h.value); err != nil {
		return err
	}
	h.first, err = h.election.Leader(ctx)
	switch {
	case errors.Is(err, concurrency.ErrElectionNoLeader):
		return h.lost()
	case err != nil:
		return err
	}
	if first := h.first.Kvs[0]; string(first.GetKey()) != h.election.Key() || first.GetCreateRevision() != h.election.Rev() {
		return h.lost()
	}
	h.first.Count, h.first.More = 1, false // of this key
	return nil
}

func (h *holder) lost() error {
	return fmt.Errorf("%s %w: its lease of %d s was revoked or could not be renewed, or its key was deleted", h.what, errLost, h.ttl)
}

// watch closes gone when the key goes away, or the session ends: when the key's lease could not be renewed, or was
// released.
func (h *holder) watch() {
	gone := make(chan struct{})
	h.gone = gone
	deleted := h.etcd.Watch(h.session.Ctx(), h.election.Key(), clientv3.WithRev(h.first.Header.GetRevision()+1), clientv3.WithFilterPut())
	go func() {
		defer close(gone)
		for r := range deleted {
			if len(r.Events) > 0 {
				return
			}
		}
		<-h.session.Done()
	}()
}

func (h *holder) runCommand() error {
	run := newCommand(h.cmd, h.command, h.environment())
	run.Stdin, run.SysProcAttr = h.cmd.InOrStdin(), endWithParent()
	err := runCommand(h.cmd.Context(), run, h.gone)
	select {
	case <-h.gone:
		return h.lost()
	default:
		return err
	}
}

// release ends the lease, and the key with it. A node that does not answer is not waited for.
func (h *holder) release() error {
	h.session.Orphan()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(h.cmd.Context()), h.client.commandTimeout)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, h.client.commandTimeout/4)
		_, err := h.etcd.Revoke(attempt, h.session.Lease())
		done()
		switch {
		case err == nil, errors.Is(err, rpctypes.ErrLeaseNotFound):
			return nil
		case ctx.Err() != nil, !isUnavailable(err):
			return fmt.Errorf("%s could not be released, and stays held for up to %d s: %w", h.what, h.ttl, err)
		}
		select {
		case <-time.After(renewalPause):
		case <-ctx.Done():
		}
	}
}

func (h *holder) lockEnvironment() []string {
	return []string{
		"KVD_LOCK_KEY=" + h.election.Key(), fmt.Sprintf("KVD_LOCK_REV=%d", h.election.Rev()),
		"ETCD_LOCK_KEY=" + h.election.Key(), fmt.Sprintf("ETCD_LOCK_REV=%d", h.first.Header.GetRevision()),
	}
}
