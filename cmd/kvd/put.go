package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

type putOptions struct {
	lease       string
	prevKV      bool
	ignoreValue bool
	ignoreLease bool
}

func (o *putOptions) AddFlags(f *pflag.FlagSet) {
	f.StringVar(&o.lease, "lease", "0", "id (hexadecimal) of the lease to attach to the key")
	f.BoolVar(&o.prevKV, "prev-kv", false, "print what the key held before")
	f.BoolVar(&o.ignoreValue, "ignore-value", false, "keep the key's value")
	f.BoolVar(&o.ignoreLease, "ignore-lease", false, "keep the key's lease")
}

func newPutCommand(client *clientOptions) *cobra.Command {
	var o putOptions
	cmd := &cobra.Command{
		Use:   "put <key> [<value>]",
		Short: "Write a key",
		Long: `Write a key. Without <value>, the value is what comes from standard input, to its end.

A value that begins with - goes after --:  kvd put key -- -value`,
		Example: `  kvd put greeting hello
  kvd put config/app < app.json
  kvd put greeting --prev-kv "hello again"`,
		Args: arguments(1, 2, "a key and a value"),
		RunE: func(cmd *cobra.Command, args []string) error {
			op, err := o.op(args, cmd.InOrStdin())
			if err != nil {
				return err
			}
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			resp, err := client.do(cmd.Context(), op)
			if err != nil {
				return err
			}
			return p.put((*pb.PutResponse)(resp.Put()))
		},
	}
	o.AddFlags(cmd.Flags())
	return cmd
}

// op is the request; a value that args lacks comes from in.
func (o *putOptions) op(args []string, in io.Reader) (op clientv3.Op, err error) {
	if len(args) < 1 || len(args) > 2 {
		return op, usagef("put wants a key and a value")
	}
	var value string
	switch {
	case o.ignoreValue && len(args) > 1:
		return op, usagef("put takes no value with --ignore-value")
	case o.ignoreValue:
	case len(args) > 1:
		value = args[1]
	default:
		if value, err = readValue(in); err != nil {
			return op, err
		}
	}
	lease, err := parseLease(o.lease)
	if err != nil {
		return op, usagef("--lease: %v", err)
	}
	var opts []clientv3.OpOption
	if lease != clientv3.NoLease {
		opts = append(opts, clientv3.WithLease(lease))
	}
	if o.prevKV {
		opts = append(opts, clientv3.WithPrevKV())
	}
	if o.ignoreValue {
		opts = append(opts, clientv3.WithIgnoreValue())
	}
	if o.ignoreLease {
		opts = append(opts, clientv3.WithIgnoreLease())
	}
	return clientv3.OpPut(args[0], value, opts...), nil
}

func readValue(in io.Reader) (string, error) {
	if in == nil {
		return "", usagef("put wants a key and a value")
	}
	value, err := io.ReadAll(in)
	if err != nil {
		return "", fmt.Errorf("read the value from standard input: %w", err)
	}
	if len(value) == 0 {
		return "", usagef(`put wants a value: standard input is empty, too (an empty value is "")`)
	}
	return string(value), nil
}

func parseLease(s string) (clientv3.LeaseID, error) {
	id, err := strconv.ParseInt(s, 16, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a lease id in hexadecimal: %w", s, errors.Unwrap(err))
	}
	return clientv3.LeaseID(id), nil
}
