package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

type getOptions struct {
	prefix, fromKey            bool
	limit, rev                 int64
	order, sortBy              string
	consistency                string
	keysOnly, countOnly        bool
	printValueOnly, stream     bool
	minModRev, maxModRev       int64
	minCreateRev, maxCreateRev int64
}

func (o *getOptions) AddFlags(f *pflag.FlagSet) {
	f.BoolVar(&o.prefix, "prefix", false, "all keys that begin with <key>")
	f.BoolVar(&o.fromKey, "from-key", false, "all keys from <key> on, in byte order")
	f.Int64Var(&o.limit, "limit", 0, "no more than this many keys (0: all)")
	f.Int64Var(&o.rev, "rev", 0, "as of this revision (0: the newest)")
	f.StringVar(&o.order, "order", "", "ASCEND or DESCEND (default ASCEND)")
	f.StringVar(&o.sortBy, "sort-by", "", "KEY, VERSION, CREATE, MODIFY or VALUE (default KEY)")
	f.StringVar(&o.consistency, "consistency", "l", "l: linearizable; s: serializable, what one node has, maybe stale")
	f.BoolVar(&o.keysOnly, "keys-only", false, "keys without values")
	f.BoolVar(&o.countOnly, "count-only", false, "only how many keys there are")
	f.BoolVar(&o.printValueOnly, "print-value-only", false, "only values, in simple output")
	f.Int64Var(&o.minModRev, "min-mod-rev", 0, "only keys modified at this revision or later")
	f.Int64Var(&o.maxModRev, "max-mod-rev", 0, "only keys modified at this revision or earlier")
	f.Int64Var(&o.minCreateRev, "min-create-rev", 0, "only keys created at this revision or later")
	f.Int64Var(&o.maxCreateRev, "max-create-rev", 0, "only keys created at this revision or earlier")
	f.BoolVar(&o.stream, "stream", false, "let the server send the keys in parts (RangeStream)")
}

func newGetCommand(client *clientOptions) *cobra.Command {
	var o getOptions
	cmd := &cobra.Command{
		Use:   "get <key> [<range-end>]",
		Short: "Read a key or a range of keys",
		Long: `Read a key, the keys from <key> up to but without <range-end>, or those that --prefix or --from-key say.

A key that does not exist prints nothing and is no error.`,
		Example: `  kvd get greeting
  kvd get --prefix config/ --keys-only
  kvd get "" --from-key --count-only
  kvd get greeting --rev 7 -w json`,
		Args: arguments(1, 2, "a key and perhaps the end of a range"),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, client, args) },
	}
	o.AddFlags(cmd.Flags())
	for flag, values := range map[string][]string{
		"order": {"ASCEND", "DESCEND"}, "sort-by": {"KEY", "VERSION", "CREATE", "MODIFY", "VALUE"}, "consistency": {"l", "s"},
	} {
		if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err)
		}
	}
	return cmd
}

func (o *getOptions) run(cmd *cobra.Command, client *clientOptions, args []string) error {
	op, err := o.op(args)
	if err != nil {
		return err
	}
	p := client.printer(cmd)
	p.valueOnly = o.printValueOnly
	if o.printValueOnly && p.format != formatSimple {
		return usagef("--print-value-only is for simple output only")
	}
	var resp *clientv3.GetResponse
	err = client.call(cmd.Context(), func(ctx context.Context, c *clientv3.Client) error {
		if !o.stream {
			answer, err := c.Do(ctx, op)
			resp = answer.Get()
			return err
		}
		parts, err := c.GetStream(ctx, args[0], func(streamed *clientv3.Op) { *streamed = op })
		if err != nil {
			return err
		}
		resp, err = clientv3.GetStreamToGetResponse(parts)
		return err
	})
	if err != nil {
		return err
	}
	return p.get((*pb.RangeResponse)(resp), o.countOnly)
}

// op is the request.
func (o *getOptions) op(args []string) (op clientv3.Op, err error) {
	key, opts, err := keyRange("get", args, o.prefix, o.fromKey)
	if err != nil {
		return op, err
	}
	order, okOrder := map[string]clientv3.SortOrder{
		"": clientv3.SortNone, "ASCEND": clientv3.SortAscend, "DESCEND": clientv3.SortDescend,
	}[strings.ToUpper(o.order)]
	target, okTarget := map[string]clientv3.SortTarget{
		"": clientv3.SortByKey, "KEY": clientv3.SortByKey, "VERSION": clientv3.SortByVersion, "VALUE": clientv3.SortByValue,
		"CREATE": clientv3.SortByCreateRevision, "MODIFY": clientv3.SortByModRevision,
	}[strings.ToUpper(o.sortBy)]
	switch {
	case !okOrder:
		return op, usagef("--order: %q is not an order: use ASCEND or DESCEND", o.order)
	case !okTarget:
		return op, usagef("--sort-by: %q cannot be sorted by: use KEY, VERSION, CREATE, MODIFY or VALUE", o.sortBy)
	case o.consistency != "l" && o.consistency != "s":
		return op, usagef("--consistency: %q is neither l (linearizable) nor s (serializable)", o.consistency)
	case o.keysOnly && o.countOnly:
		return op, usagef("--keys-only and --count-only exclude each other: choose one")
	case o.limit < 0 || o.rev < 0 || o.minModRev < 0 || o.maxModRev < 0 || o.minCreateRev < 0 || o.maxCreateRev < 0:
		return op, usagef("limits and revisions must not be negative")
	case o.maxModRev > 0 && o.minModRev > o.maxModRev:
		return op, usagef("--min-mod-rev %d is above --max-mod-rev %d", o.minModRev, o.maxModRev)
	case o.maxCreateRev > 0 && o.minCreateRev > o.maxCreateRev:
		return op, usagef("--min-create-rev %d is above --max-create-rev %d", o.minCreateRev, o.maxCreateRev)
	}
	opts = append(opts, clientv3.WithLimit(o.limit), clientv3.WithRev(o.rev), clientv3.WithSort(target, order),
		clientv3.WithMinModRev(o.minModRev), clientv3.WithMaxModRev(o.maxModRev),
		clientv3.WithMinCreateRev(o.minCreateRev), clientv3.WithMaxCreateRev(o.maxCreateRev))
	if o.consistency == "s" {
		opts = append(opts, clientv3.WithSerializable())
	}
	if o.keysOnly {
		opts = append(opts, clientv3.WithKeysOnly())
	}
	if o.countOnly {
		opts = append(opts, clientv3.WithCountOnly())
	}
	return clientv3.OpGet(key, opts...), nil
}

// keyRange turns a key, perhaps the end of a range, --prefix and --from-key into a request's key and options.
func keyRange(command string, args []string, prefix, fromKey bool) (key string, opts []clientv3.OpOption, err error) {
	switch {
	case len(args) < 1 || len(args) > 2:
		return "", nil, usagef("%s wants a key and perhaps the end of a range", command)
	case prefix && fromKey:
		return "", nil, usagef("--prefix and --from-key exclude each other: choose one")
	case len(args) == 2 && (prefix || fromKey):
		return "", nil, usagef("%s takes one key with --prefix or --from-key", command)
	case len(args) == 2:
		return args[0], []clientv3.OpOption{clientv3.WithRange(args[1])}, nil
	case args[0] == "" && (prefix || fromKey):
		return "\x00", []clientv3.OpOption{clientv3.WithFromKey()}, nil
	case prefix:
		return args[0], []clientv3.OpOption{clientv3.WithPrefix()}, nil
	case fromKey:
		return args[0], []clientv3.OpOption{clientv3.WithFromKey()}, nil
	}
	return args[0], nil, nil
}
