package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"kvd/node"
	"kvd/snapshot"
)

func newSnapshotRestoreCommand(client *clientOptions) *cobra.Command {
	var o startOptions
	cmd := &cobra.Command{
		Use:   "restore <file> --data-dir <dir>",
		Short: "Make the directory of a new cluster's first node from a backup",
		Long: `Make the directory of a new cluster's first node from a backup: all keys with their revisions and history.
It talks to no server. Start the node with the same flags and those of its own; the other nodes of --peers
join it when they start with empty directories.`,
		Example: `  kvd snapshot restore backup.kvd --data-dir ./n1.kvd && kvd start
  kvd snapshot restore backup.kvd --name n1 --data-dir ./n1.kvd --peers n1=10.0.0.1:2380,n2=10.0.0.2:2380,n3=10.0.0.3:2380`,
		Args: arguments(1, 1, "a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := client.printer(cmd)
			if err := setFromEnv(cmd.LocalFlags(), os.Getenv); err != nil {
				return err
			}
			if err := o.fitStrategy(cmd.LocalFlags()); err != nil {
				return err
			}
			peers, err := o.founders()
			if err != nil {
				return err
			}
			cfg := node.Config{Name: o.name, DataDir: cmp.Or(o.dataDir, "./"+o.name+".kvd"), Peers: peers, ClusterToken: o.clusterToken,
				Strategy: o.strategy, Shards: o.shards, ReplicationFactor: o.replicationFactor, Witnesses: o.witnesses, RaftLog: o.raftLog}
			info, err := os.Stat(args[0])
			if err != nil {
				return err
			}
			file, err := snapshot.OpenFile(args[0])
			if err != nil {
				return damaged(args[0], err)
			}
			defer file.Close()
			bar := newProgress(cmd.ErrOrStderr(), "restoring", info.Size())
			meta, err := node.Restore(cmd.Context(), cfg, io.TeeReader(file, bar))
			bar.clear()
			if errors.Is(err, node.ErrNotEmpty) {
				return err
			}
			if err != nil {
				return damaged(args[0], err)
			}
			if p.format != formatSimple {
				return p.backup(newBackupReport(args[0], info.Size(), meta))
			}
			fmt.Fprintf(p.out, "Restored %d keys at revision %d to %s\n", meta.Keys, meta.Revision, cfg.DataDir)
			return nil
		},
	}
	o.addClusterFlags(cmd.Flags())
	o.addRaftLogFlag(cmd.Flags())
	return cmd
}
