package main

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"

	"kvd/node"
	"kvd/node/bootstrap"
	"kvd/shard/raftlog"
	"kvd/shard/wal"
)

// newLogCommand looks at, and converts, the raft logs of a node that does not run.
func newLogCommand(client *clientOptions) *cobra.Command {
	return newParentCommand("log", "Look at or convert the raft logs of a node that does not run",
		newLogStatusCommand(client), newLogConvertCommand(client))
}

func newLogStatusCommand(client *clientOptions) *cobra.Command {
	var dataDir string
	cmd := &cobra.Command{
		Use:   "status --data-dir <dir>",
		Short: "Show what is in the raft logs of a node that does not run",
		Long: `Show what is in the raft logs of a node that does not run: of each replica the entries that it has, its term, and
for whom it voted last.`,
		Example: `  kvd log status --data-dir ./n1.kvd`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			status, err := node.ReadLogStatus(dataDir)
			if err != nil {
				return logError(dataDir, err)
			}
			return client.printer(cmd).logStatus(status)
		},
	}
	addDataDir(cmd, &dataDir)
	return cmd
}

func newLogConvertCommand(client *clientOptions) *cobra.Command {
	var dataDir, to string
	cmd := &cobra.Command{
		Use:   "convert --data-dir <dir> --to shared|boltdb",
		Short: "Bring the raft logs of a node that does not run into the other form",
		Long: `Bring the raft logs of a node that does not run into the other form: shared is one log for all replicas of the node,
boltdb a file for each. The old form stays until the new one is on the disk and has been compared with it, so there
must be room for both; whenever it is interrupted, the node starts with one of them, and nothing is lost.`,
		Example: `  kvd log convert --data-dir ./n1.kvd --to shared`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			if to != node.RaftLogShared && to != node.RaftLogBolt {
				return usagef("--to: %q is not a form: use %s or %s", to, node.RaftLogShared, node.RaftLogBolt)
			}
			done, err := node.ConvertLog(cmd.Context(), dataDir, to)
			if err != nil {
				return logError(dataDir, err)
			}
			return p.conversion(dataDir, done)
		},
	}
	addDataDir(cmd, &dataDir)
	cmd.Flags().StringVar(&to, "to", "", "shared or boltdb")
	if err := errors.Join(cmd.MarkFlagRequired("to"), cmd.RegisterFlagCompletionFunc("to",
		cobra.FixedCompletions([]string{node.RaftLogShared, node.RaftLogBolt}, cobra.ShellCompDirectiveNoFileComp))); err != nil {
		panic(err)
	}
	return cmd
}

func addDataDir(cmd *cobra.Command, dataDir *string) {
	cmd.Flags().StringVar(dataDir, "data-dir", "", "the node's directory")
	if err := errors.Join(cmd.MarkFlagRequired("data-dir"), cmd.MarkFlagDirname("data-dir")); err != nil {
		panic(err)
	}
}

// damagedLog is an error about a node's directory that says itself what is damaged. It is an errDamaged.
type damagedLog struct{ error }

func (e damagedLog) Unwrap() error        { return e.error }
func (e damagedLog) Is(target error) bool { return target == errDamaged }

// logError turns an error about the logs in a directory into one that says what to do.
func logError(dataDir string, err error) error {
	switch {
	case errors.Is(err, bootstrap.ErrInUse):
		return fmt.Errorf("data directory %s is %w: stop the node first", dataDir, bootstrap.ErrInUse)
	case errors.Is(err, wal.ErrCorrupt), errors.Is(err, raftlog.ErrCorrupt), errors.Is(err, bootstrap.ErrCorrupt):
		return damagedLog{err}
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is no node's directory: correct --data-dir", dataDir)
	}
	return err
}

func (p *printer) logStatus(s node.LogStatus) error {
	if p.format == formatJSON {
		return p.json(s)
	}
	header := []string{"GROUP", "REPLICA", "FIRST", "LAST", "TERM", "VOTE", "SIZE"}
	var rows [][]string
	for _, r := range s.Replicas {
		vote := "-"
		if r.VoteTerm > 0 {
			vote = fmt.Sprintf("%s in %d", r.Vote, r.VoteTerm)
		}
		rows = append(rows, []string{fmt.Sprint(r.Group), r.ID, fmt.Sprint(r.First), fmt.Sprint(r.Last), fmt.Sprint(r.Term), vote, size(r.SizeBytes)})
	}
	summary := [][]string{{"log", s.Kind}, {"replicas", fmt.Sprint(len(s.Replicas))}, {"files", fmt.Sprint(s.Files)}, {"size", size(s.SizeBytes)}}
	if s.Kind == node.RaftLogShared {
		summary = append(summary, []string{"in use", size(s.LiveBytes)}, []string{"spare files", fmt.Sprint(s.Spares)})
	}
	p.columns(summary)
	fmt.Fprintln(p.out)
	if p.format == formatTable {
		p.table(header, rows)
	} else {
		p.columns(append([][]string{header}, rows...))
	}
	return nil
}

func (p *printer) conversion(dataDir string, c node.Conversion) error {
	if p.format == formatJSON {
		return p.json(c)
	}
	if c.From == c.To {
		fmt.Fprintf(p.out, "%s has %s already\n", dataDir, c.To)
		return nil
	}
	fmt.Fprintf(p.out, "%s: %d entries of %d replicas moved from %s to %s\n", dataDir, c.Entries, c.Replicas, c.From, c.To)
	return nil
}
