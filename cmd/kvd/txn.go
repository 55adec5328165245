package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/term"
)

func newTxnCommand(client *clientOptions) *cobra.Command {
	var interactive bool
	cmd := &cobra.Command{
		Use:   "txn",
		Short: "Run several operations as one transaction",
		Long: `Run several operations as one transaction, read from standard input in three parts, each ended by an empty line:

  compares             value("key") = "v"   mod("key") > "7"   create("key") = "0"   version("key") != "2"
                       lease("key") = "1f" (hexadecimal); operators = != < >
  requests if all compares hold    put key value | get key | del key, with the flags of these commands
  requests if not

Words with spaces go in "double" (with \n, \x00, ...) or 'single' quotes. It prints SUCCESS or FAILURE and the
answers of the requests that ran.`,
		Example: `  kvd txn <<'END'
  create("lock") = "0"

  put lock me

  get lock

  END`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			t, err := readTxn(bufio.NewReader(cmd.InOrStdin()), prompts(cmd, interactive))
			if err != nil {
				return err
			}
			var resp *clientv3.TxnResponse
			err = client.call(cmd.Context(), func(ctx context.Context, c *clientv3.Client) (err error) {
				resp, err = c.Txn(ctx).If(t.compares...).Then(t.success...).Else(t.failure...).Commit()
				return err
			})
			if err != nil {
				return err
			}
			return p.txn((*pb.TxnResponse)(resp))
		},
	}
	cmd.Flags().BoolVarP(&interactive, "interactive", "i", false, "say what is expected next")
	return cmd
}

// prompts is where to ask for the parts of a transaction: standard output with -i, as etcdctl; standard error
// if somebody types.
func prompts(cmd *cobra.Command, interactive bool) io.Writer {
	if interactive {
		return cmd.OutOrStdout()
	}
	if file, ok := cmd.InOrStdin().(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return cmd.ErrOrStderr()
	}
	return io.Discard
}

type txn struct {
	compares []clientv3.Cmp
	success  []clientv3.Op
	failure  []clientv3.Op
}

// readTxn reads the three parts. The end of the input ends a part as an empty line does.
func readTxn(in *bufio.Reader, prompt io.Writer) (t txn, err error) {
	lines := &txnReader{in: in}
	fmt.Fprintln(prompt, "compares:")
	err = lines.part(func(line string) error {
		c, err := parseCompare(line)
		t.compares = append(t.compares, c)
		return err
	})
	if err != nil {
		return t, err
	}
	for _, part := range []struct {
		title string
		ops   *[]clientv3.Op
	}{
		{"success requests (get, put, del):", &t.success},
		{"failure requests (get, put, del):", &t.failure},
	} {
		fmt.Fprintln(prompt, part.title)
		err = lines.part(func(line string) error {
			op, err := parseRequest(line)
			*part.ops = append(*part.ops, op)
			return err
		})
		if err != nil {
			return t, err
		}
	}
	if lines.number == 0 {
		return t, usagef("txn wants a transaction on standard input: see kvd txn --help")
	}
	return t, nil
}
