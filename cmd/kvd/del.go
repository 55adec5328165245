package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// delGrace is how long a del with a range-end and without --range can still be interrupted, as in etcdctl.
const delGrace = 2 * time.Second

type delOptions struct {
	prefix, fromKey, prevKV, isRange bool
}

func (o *delOptions) AddFlags(f *pflag.FlagSet) {
	f.BoolVar(&o.prefix, "prefix", false, "all keys that begin with <key>")
	f.BoolVar(&o.fromKey, "from-key", false, "all keys from <key> on, in byte order")
	f.BoolVar(&o.prevKV, "prev-kv", false, "print what was deleted")
	f.BoolVar(&o.isRange, "range", false, "delete up to <range-end> without a pause to think")
}

func newDelCommand(client *clientOptions) *cobra.Command {
	var o delOptions
	cmd := &cobra.Command{
		Use:   "del <key> [<range-end>]",
		Short: "Delete a key or a range of keys",
		Long: `Delete a key, the keys from <key> up to but without <range-end>, or those that --prefix or --from-key say.
It prints how many keys were deleted.`,
		Example: `  kvd del greeting
  kvd del --prefix config/ --prev-kv
  kvd del --range a c`,
		Args: arguments(1, 2, "a key and perhaps the end of a range"),
		RunE: func(cmd *cobra.Command, args []string) error {
			op, err := o.op(args)
			if err != nil {
				return err
			}
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			if len(args) == 2 && !o.isRange {
				fmt.Fprintf(cmd.ErrOrStderr(), "All keys from %q up to %q will be deleted in %v: Ctrl-C stops it, --range skips this pause.\n",
					args[0], args[1], delGrace)
				select {
				case <-time.After(delGrace):
				case <-cmd.Context().Done():
					return errInterrupted
				}
			}
			resp, err := client.do(cmd.Context(), op)
			if err != nil {
				return err
			}
			return p.del((*pb.DeleteRangeResponse)(resp.Del()))
		},
	}
	o.AddFlags(cmd.Flags())
	return cmd
}

// op is the request.
func (o *delOptions) op(args []string) (op clientv3.Op, err error) {
	key, opts, err := keyRange("del", args, o.prefix, o.fromKey)
	if err != nil {
		return op, err
	}
	if o.prevKV {
		opts = append(opts, clientv3.WithPrevKV())
	}
	return clientv3.OpDelete(key, opts...), nil
}
