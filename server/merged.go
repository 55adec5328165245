package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"

	"kvd/fsm"
	"kvd/shard"
	"kvd/snapshot"
)

// tempPrefix begins the names of the directories that backups are put together
// in.
const tempPrefix = "kvd-backup-"

// removeBackups removes what a crash has left of backups.
func removeBackups(dir string) error {
	if dir == "" { // shared with others
		return nil
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// snapshotShards streams a backup of all shards at one revision, as one state
// with all of their keys. It is put together in a file first: its pages have
// another order than the shards'.
func (s *maintenance) snapshotShards(ctx context.Context, stream grpc.ServerStreamingServer[pb.SnapshotResponse]) error {
	dir, err := os.MkdirTemp(s.router.cfg.TempDir, tempPrefix+"*")
	if err != nil {
		return refusal(fmt.Errorf("server: make room for a backup: %w", err))
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			s.router.cfg.Logger.Warn("what is left of a backup cannot be removed", "path", dir, "error", err)
		}
	}()
	path := filepath.Join(dir, "state.db")
	for {
		err = s.mergeShards(ctx, path)
		// The cut has been compacted meanwhile: take another one.
		if !errors.Is(err, fsm.ErrCompacted) || ctx.Err() != nil {
			break
		}
	}
	if err == nil {
		err = fsm.ViewFile(ctx, path, s.sender(ctx, stream))
	}
	if err != nil {
		s.router.cfg.Logger.Warn("backup failed", "error", err)
		return refusal(err)
	}
	return nil
}

func (s *maintenance) mergeShards(ctx context.Context, path string) (err error) {
	meta, err := s.backupMeta(ctx)
	if err != nil {
		return err
	}
	c, err := s.router.cuts.take(ctx)
	if err != nil {
		return err
	}
	b, err := fsm.NewBuilder(path)
	if err != nil {
		return err
	}
	defer func() {
		if lost := b.Discard(); err == nil {
			err = lost
		}
	}()
	pageBytes := max(min(s.router.sizes.mergeBytes/max(len(c.gates), 1), s.router.sizes.pageBytes), minBackupPage)
	var sources []fsm.RowsSource
	for _, g := range c.gates {
		sources = append(sources, s.rowsOf(g, c.revision, pageBytes))
	}
	for _, g := range c.gates {
		if err := s.addLeases(ctx, b, g); err != nil {
			return err
		}
	}
	meta.Revision = c.revision
	if meta.CompactRevision, meta.Keys, err = b.Merge(ctx, sources); err != nil {
		return err
	}
	return b.Finish(meta)
}

const (
	rowsTimeout   = time.Minute // for a group to have the next page
	minBackupPage = 32 << 10
)

// backupMeta describes the cluster: no log belongs to a state that is merged.
func (s *maintenance) backupMeta(ctx context.Context) (snapshot.Meta, error) {
	state, release, err := s.local(ctx)
	if err != nil {
		return snapshot.Meta{}, err
	}
	defer release()
	meta := snapshot.Meta{ClusterID: s.router.cfg.Cluster.ClusterID(), Group: userGroup}
	meta.Configuration, meta.ConfigurationIndex = state.Configuration()
	meta.Index, meta.Term = max(state.AppliedIndex(), 1), 1
	if replica := s.router.cfg.Replica(userGroup); replica != nil {
		meta.Term = max(replica.Leader().Term, 1)
	}
	return meta, nil
}

// rowsOf reads the rows of one group up to the cut.
func (s *maintenance) rowsOf(g gate, upTo int64, pageBytes int) fsm.RowsSource {
	r := s.router
	return func(ctx context.Context, cursor []byte) (page fsm.RowsPage, err error) {
		if r.cfg.NoSpace() {
			return page, rpctypes.ErrGRPCNoSpace
		}
		here := func(ctx context.Context, replica Replica) error {
			var release func()
			if page, release, err = r.rowsHere(ctx, replica, g.index, cursor, upTo, pageBytes); err == nil {
				release()
			}
			return err
		}
		there := func(ctx context.Context, node string) error {
			page, err = r.rowsThere(ctx, node, g, cursor, upTo, pageBytes)
			return err
		}
		attempt, cancel := context.WithTimeout(ctx, rowsTimeout)
		defer cancel()
		if err := r.onState(attempt, g.group, g.node, here, there); err != nil {
			return page, err
		}
		return page, r.cfg.Streams.Wait(ctx, len(page.Rows))
	}
}

// rowsHere reads a page from this node's replica. It counts until release.
func (r *router) rowsHere(ctx context.Context, replica Replica, index uint64, cursor []byte, upTo int64, pageBytes int) (fsm.RowsPage, func(), error) {
	state, unpin, err := pinFor(ctx, replica, index)
	if err != nil {
		return fsm.RowsPage{}, nil, err
	}
	defer unpin()
	ctx, release := r.answers.metered(ctx)
	page, err := state.RowsPage(ctx, fsm.User, cursor, upTo, pageBytes)
	if err != nil {
		release()
		return fsm.RowsPage{}, nil, err
	}
	return page, release, nil
}

// The request for rows and its answer, beside what forward.go says:
//
//	rows:   version 1, group 8, timeout 4 (ms), index 8, up to 8, bytes 4 | cursor
//	answer: version 1, code 1 | fsm.RowsPage
const rowsHeader = 33

func (r *router) rowsThere(ctx context.Context, node string, g gate, cursor []byte, upTo int64, pageBytes int) (fsm.RowsPage, error) {
	payload := []byte{protocolVersion}
	payload = binary.BigEndian.AppendUint64(payload, g.group)
	payload = binary.BigEndian.AppendUint32(payload, timeoutMillis(ctx))
	payload = binary.BigEndian.AppendUint64(payload, g.index)
	payload = binary.BigEndian.AppendUint64(payload, uint64(upTo))
	payload = binary.BigEndian.AppendUint32(payload, uint32(pageBytes))
	c, body, err := r.call(ctx, node, methodRows, append(payload, cursor...))
	switch {
	case err != nil:
		return fsm.RowsPage{}, err
	case c == codeRefused:
		return fsm.RowsPage{}, decodeRefusal(body)
	case c != codeOK:
		return fsm.RowsPage{}, c.err()
	}
	return fsm.ParseRowsPage(body)
}

func (r *router) handleRows(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	if len(payload) < rowsHeader || payload[0] != protocolVersion {
		return answer(codeMalformed), nil
	}
	group := binary.BigEndian.Uint64(payload[1:])
	index, upTo := binary.BigEndian.Uint64(payload[13:]), int64(binary.BigEndian.Uint64(payload[21:]))
	pageBytes := min(int(binary.BigEndian.Uint32(payload[29:])), r.sizes.pageBytes)
	var cursor []byte
	if len(payload) > rowsHeader {
		cursor = payload[rowsHeader:]
	}
	replica := r.ofKeys(group)
	if replica == nil {
		return r.decline(group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMost(ctx, binary.BigEndian.Uint32(payload[9:]))
	defer cancel()
	page, release, err := r.rowsHere(ctx, replica, index, cursor, upTo, pageBytes)
	if err != nil {
		return r.declineRead(group, replica, err), nil
	}
	defer release()
	return page.Append(answer(codeOK)), nil
}
