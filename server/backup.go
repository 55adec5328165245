package server

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"time"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"kvd/fsm"
	"kvd/snapshot"
)

// Snapshot streams a backup of what this node has applied, followed by its
// SHA-256. The stream's size is a multiple of 512 bytes, so that clients can
// tell by the size whether the digest is there.
func (s *maintenance) Snapshot(_ *pb.SnapshotRequest, stream grpc.ServerStreamingServer[pb.SnapshotResponse]) error {
	select {
	case s.backups <- struct{}{}:
		defer func() { <-s.backups }()
	default:
		return kvdError(codes.ResourceExhausted, ReasonBusy, fmt.Sprintf("%d backups are being sent already", cap(s.backups)))
	}
	ctx := stream.Context()
	if s.router.sharded {
		return s.snapshotShards(ctx, stream)
	}
	state, release, err := s.local(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := s.sendSnapshot(ctx, state, stream); err != nil {
		s.router.cfg.Logger.Warn("backup failed", "error", err)
		return refusal(err)
	}
	return nil
}

func (s *maintenance) sendSnapshot(ctx context.Context, state *fsm.Store, stream grpc.ServerStreamingServer[pb.SnapshotResponse]) error {
	// The file lags behind what has been applied, and may have been acknowledged.
	if err := state.Flush(ctx, state.AppliedIndex()); err != nil {
		return err
	}
	if _, ok := state.SnapshotMeta(); !ok {
		return kvdError(codes.Unavailable, ReasonNoState, "this node has nothing to back up yet")
	}
	return state.ViewSnapshot(ctx, s.sender(ctx, stream))
}

// sender sends a state as a backup.
func (s *maintenance) sender(ctx context.Context, stream grpc.ServerStreamingServer[pb.SnapshotResponse]) func(*bbolt.Tx, snapshot.Meta) error {
	return func(tx *bbolt.Tx, meta snapshot.Meta) error {
		w := &snapshotWriter{router: s.router, stream: stream, left: snapshot.StreamSize(tx, meta), digest: sha256.New()}
		n, err := snapshot.WriteStream(ctx, s.router.cfg.Streams.Writer(ctx, w), tx, meta)
		s.router.metrics.snapshotBytes.Add(float64(n))
		if err != nil {
			return err
		}
		return w.finish()
	}
}

// snapshotMessageBytes is the size of the messages that a backup is cut into.
const snapshotMessageBytes = 64 << 10

// snapshotWriter cuts what is written to it into messages.
type snapshotWriter struct {
	router *router
	stream grpc.ServerStreamingServer[pb.SnapshotResponse]
	digest hash.Hash
	left   int64 // bytes still to be sent
	buf    []byte
}

func (w *snapshotWriter) Write(p []byte) (int, error) {
	_, _ = w.digest.Write(p) // never fails
	for rest := p; len(rest) > 0; {
		n := min(len(rest), snapshotMessageBytes-len(w.buf))
		w.buf = append(w.buf, rest[:n]...)
		rest = rest[n:]
		if len(w.buf) == snapshotMessageBytes {
			if err := w.flush(); err != nil {
				return len(p) - len(rest), err
			}
		}
	}
	return len(p), nil
}

func (w *snapshotWriter) flush() error {
	w.left -= int64(len(w.buf))
	message := &pb.SnapshotResponse{RemainingBytes: uint64(max(w.left, 0)), Blob: w.buf}
	w.buf = make([]byte, 0, snapshotMessageBytes) // gRPC may still read the old one
	return w.send(message)
}

// send does not wait for ever: a client that stops reading would hold a read
// transaction, and with it space in the file. gRPC ends a Send left behind when
// the request ends.
func (w *snapshotWriter) send(message *pb.SnapshotResponse) error {
	message.Version = storageVersion
	sent := make(chan error, 1)
	if !w.router.spawn(func() { sent <- w.stream.Send(message) }) {
		return context.Canceled
	}
	timer := time.NewTimer(w.router.cfg.SnapshotTimeout)
	defer timer.Stop()
	select {
	case err := <-sent:
		return err
	case <-timer.C:
		return kvdError(codes.DeadlineExceeded, ReasonStalled, fmt.Sprintf("the client has not read the backup for %v", w.router.cfg.SnapshotTimeout))
	}
}

// finish sends what is left and the digest in a message of its own.
func (w *snapshotWriter) finish() error {
	if len(w.buf) > 0 {
		if err := w.flush(); err != nil {
			return err
		}
	}
	if w.left != 0 {
		return fmt.Errorf("server: backup is %d bytes off its announced size", w.left)
	}
	return w.send(&pb.SnapshotResponse{Blob: w.digest.Sum(nil)})
}
