package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/hashicorp/raft"
	"github.com/spf13/cobra"

	"kvd/snapshot"
)

func newSnapshotCommand(client *clientOptions) *cobra.Command {
	return newParentCommand("snapshot", "Save, check and restore backups",
		newSnapshotSaveCommand(client), newSnapshotStatusCommand(client), newSnapshotRestoreCommand(client))
}

func newSnapshotStatusCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "status <file>",
		Short: "Check every byte of a backup and say what is in it",
		Args:  arguments(1, 1, "a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := checkBackup(cmd, args[0])
			if err != nil {
				return err
			}
			return client.printer(cmd).backup(report)
		},
	}
}

// backupReport is what a backup says about itself.
type backupReport struct {
	File            string   `json:"file"`
	SizeBytes       int64    `json:"size"`
	ClusterID       string   `json:"cluster_id"`
	Revision        int64    `json:"revision"`
	CompactRevision int64    `json:"compact_revision"`
	Keys            int64    `json:"keys"`
	Index           uint64   `json:"raft_index"`
	Term            uint64   `json:"raft_term"`
	Members         []string `json:"members"`
}

func newBackupReport(file string, sizeBytes int64, meta snapshot.Meta) backupReport {
	r := backupReport{
		File: file, SizeBytes: sizeBytes, ClusterID: fmt.Sprintf("%016x", meta.ClusterID), Revision: meta.Revision,
		CompactRevision: meta.CompactRevision, Keys: meta.Keys, Index: meta.Index, Term: meta.Term,
	}
	for _, s := range meta.Configuration.Servers {
		name, _, _ := strings.Cut(string(s.ID), "/")
		if s.Suffrage != raft.Voter {
			name += " (learner)"
		}
		r.Members = append(r.Members, name)
	}
	return r
}

func checkBackup(cmd *cobra.Command, path string) (backupReport, error) {
	info, err := os.Stat(path)
	if err != nil {
		return backupReport{}, err
	}
	file, err := snapshot.OpenFile(path)
	if err != nil {
		return backupReport{}, damaged(path, err)
	}
	defer file.Close()
	bar := newProgress(cmd.ErrOrStderr(), "checking", info.Size())
	meta, err := snapshot.Verify(cmd.Context(), io.TeeReader(file, bar))
	bar.clear()
	if err != nil {
		return backupReport{}, damaged(path, err)
	}
	return newBackupReport(path, info.Size(), meta), nil
}

// damaged turns the verdict on a backup into an error that says what to do.
func damaged(path string, err error) error {
	switch {
	case errors.Is(err, snapshot.ErrForeign):
		return fmt.Errorf("%s cannot be used: %w", path, err)
	case errors.Is(err, snapshot.ErrVersion):
		return fmt.Errorf("%s cannot be used by this version of kvd: %w", path, err)
	case errors.Is(err, snapshot.ErrCorrupt), errors.Is(err, snapshot.ErrTruncated):
		return fmt.Errorf("%s is %w and cannot be restored: %w", path, errDamaged, err)
	}
	return err
}

func (p *printer) backup(r backupReport) error {
	if p.format == formatJSON {
		return p.json(r)
	}
	compacted := "never"
	if r.CompactRevision >= 0 {
		compacted = fmt.Sprintf("at revision %d", r.CompactRevision)
	}
	rows := [][]string{
		{"file", r.File}, {"size", size(r.SizeBytes)}, {"cluster", r.ClusterID},
		{"revision", fmt.Sprint(r.Revision)}, {"compacted", compacted}, {"keys", fmt.Sprint(r.Keys)},
		{"raft index", fmt.Sprint(r.Index)}, {"raft term", fmt.Sprint(r.Term)}, {"members", strings.Join(r.Members, ", ")},
	}
	if p.format == formatTable {
		p.table([]string{"FIELD", "VALUE"}, rows)
	} else {
		p.columns(rows)
	}
	return nil
}
