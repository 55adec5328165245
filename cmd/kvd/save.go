package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

func newSnapshotSaveCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "save <file>",
		Short: "Save a backup of the whole store",
		Long: `Save a backup of the whole store, as one of --endpoints has it, while it goes on serving.
The file appears under its name when it is complete, checked against the server's digest, and on the disk.
There is no time limit unless --command-timeout is given.`,
		Args: arguments(1, 1, "a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			ctx := cmd.Context()
			if client.commandTimeoutGiven {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, client.commandTimeout)
				defer cancel()
			}
			c, err := client.connect(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			source, err := openSnapshot(ctx, c.ActiveConnection())
			if err != nil {
				return err
			}
			if err := saveFile(args[0], source, newProgress(cmd.ErrOrStderr(), "saving", source.totalBytes)); err != nil {
				return fmt.Errorf("snapshot save: %w", err)
			}
			if p.format == formatJSON {
				return p.json(map[string]any{"file": args[0], "version": source.version, "revision": source.revision})
			}
			fmt.Fprintf(p.out, "Snapshot saved at %s\n", args[0])
			if source.version != "" {
				fmt.Fprintf(p.out, "Server version %s\n", source.version)
			}
			return nil
		},
	}
}

// snapshotSource is a snapshot that a server sends.
type snapshotSource struct {
	stream     grpc.ServerStreamingClient[pb.SnapshotResponse]
	pending    []byte
	totalBytes int64 // as the server announced; without the digest at the end
	version    string
	revision   int64
}

func openSnapshot(ctx context.Context, conn *grpc.ClientConn) (*snapshotSource, error) {
	stream, err := pb.NewMaintenanceClient(conn).Snapshot(ctx, &pb.SnapshotRequest{})
	if err != nil {
		return nil, err
	}
	first, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	return &snapshotSource{
		stream: stream, pending: first.GetBlob(), version: first.GetVersion(), revision: first.GetHeader().GetRevision(),
		totalBytes: int64(first.GetRemainingBytes()) + int64(len(first.GetBlob())),
	}, nil
}

func (s *snapshotSource) Read(b []byte) (int, error) {
	for len(s.pending) == 0 {
		next, err := s.stream.Recv()
		if err != nil {
			return 0, err
		}
		s.pending = next.GetBlob()
	}
	n := copy(b, s.pending)
	s.pending = s.pending[n:]
	return n, nil
}

// saveFile writes what source sends to path.part, checks the SHA-256 at its end, makes it durable and names it path.
// If that fails, path is as it was and nothing else is left.
func saveFile(path string, source io.Reader, bar *progress) error {
	part := path + ".part"
	err := saveDurably(part, source, bar)
	bar.clear()
	if err == nil {
		err = os.Rename(part, path)
	}
	if err != nil {
		os.Remove(part)
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("%s is complete, but its name may not be on the disk yet: %w", path, err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func saveDurably(path string, source io.Reader, bar *progress) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	digest := &trailingDigest{sum: sha256.New()}
	if _, err := io.Copy(io.MultiWriter(file, digest, bar), source); err != nil {
		return fmt.Errorf("after %s: %w", size(bar.doneBytes), err)
	}
	if err := digest.check(); err != nil {
		return err
	}
	return file.Sync()
}

// trailingDigest hashes everything but the last 32 bytes, which are to be the hash.
type trailingDigest struct {
	sum  hash.Hash
	tail []byte
}

func (d *trailingDigest) Write(b []byte) (int, error) {
	d.tail = append(d.tail, b...)
	if body := len(d.tail) - sha256.Size; body > 0 {
		d.sum.Write(d.tail[:body])
		d.tail = append(d.tail[:0], d.tail[body:]...)
	}
	return len(b), nil
}

func (d *trailingDigest) check() error {
	if len(d.tail) < sha256.Size || !bytes.Equal(d.tail, d.sum.Sum(nil)) {
		return fmt.Errorf("what arrived is %w, it does not match the server's digest: try again", errDamaged)
	}
	return nil
}
