package transport

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/hashicorp/raft"
)

// A snapshot travels over a connection of its own: a raft request, data frames, an end frame with the
// total, and back comes one raft answer, with pings before it while the receiver works. The receiver may
// answer early; then it reads on until the sender has seen the answer and closes.

var errStreamSize = errors.New("snapshot is not as long as announced")

// InstallSnapshot implements raft.Transport. It ends early when the peer refuses, when nothing moves for
// Config.StreamTimeout, and when the Group closes (but cannot interrupt data.Read).
func (g *Group) InstallSnapshot(_ raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := g.usable(); err != nil {
		return err
	}
	node, err := nodeOf(target)
	if err != nil {
		return err
	}
	addr, err := g.t.address(node)
	if err != nil {
		return err
	}
	w, _, err := g.t.dial(g.ctx, addr, node, purposeStream)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(g.ctx)
	answered := make(chan answer, 1)
	if !g.t.spawn(func() { answered <- awaitAnswer(w, g.t.cfg.StreamTimeout, cancel) }) {
		_ = w.Close()
		return ErrClosed
	}
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	defer func() {
		stop()
		_ = w.Close()
	}()
	header := appendString(appendUint(nil, g.key.group), target)
	s := &streamSender{w: w, timeout: g.t.cfg.StreamTimeout, answered: answered}
	payload, err := s.run(ctx, appendRequest(header, args), data, args.Size, g.t.cfg.InstallTimeout)
	switch {
	case g.ctx.Err() != nil:
		err = ErrClosed
	case err != nil && ctx.Err() != nil:
		err = context.Cause(ctx) // what broke the connection, rather than what the break did to a write
	}
	if err != nil {
		return fmt.Errorf("snapshot stream to %s: %w", node, err)
	}
	return decodeResponse(payload, resp)
}

// streamSender sends one snapshot.
type streamSender struct {
	w        *wire
	timeout  time.Duration
	answered chan answer
	early    *answer // came before all was sent
	out      []byte
}

func (s *streamSender) run(ctx context.Context, request []byte, data io.Reader, size int64, installTimeout time.Duration) ([]byte, error) {
	if err := s.send(request, data, size); err != nil {
		return nil, err
	}
	return s.wait(ctx, installTimeout)
}

// send sends the request, the data and the end. It returns nil early if the answer is already there.
func (s *streamSender) send(request []byte, data io.Reader, size int64) error {
	if err := s.frame(kindRaftRequest, request); err != nil {
		return err
	}
	buf := make([]byte, fragmentBytes)
	total := int64(0)
	for {
		n, readErr := io.ReadFull(data, buf)
		if total += int64(n); total > size {
			return fmt.Errorf("%w: over %d bytes", errStreamSize, size)
		}
		if n > 0 {
			if err := s.frame(kindStreamData, buf[:n]); err != nil {
				return err
			}
		}
		if s.early != nil {
			return nil
		}
		if readErr == io.EOF || readErr == io.ErrUnexpectedEOF {
			break
		}
		if readErr != nil {
			return fmt.Errorf("read the snapshot: %w", readErr)
		}
	}
	if total != size {
		return fmt.Errorf("%w: %d bytes instead of %d", errStreamSize, total, size)
	}
	return s.frame(kindStreamEnd, binary.LittleEndian.AppendUint64(nil, uint64(total)))
}

// frame writes one frame, unless the answer is already there.
func (s *streamSender) frame(k kind, payload []byte) error {
	if s.poll() {
		return nil
	}
	_ = s.w.SetWriteDeadline(time.Now().Add(s.timeout))
	s.out = appendFrame(s.out[:0], k, 0, payload)
	s.w.traffic.framesOut.Inc()
	if _, err := s.w.Write(s.out); err != nil && !s.poll() {
		return err
	}
	return nil
}

func (s *streamSender) poll() bool {
	if s.early == nil {
		select {
		case a := <-s.answered:
			s.early = &a
		default:
		}
	}
	return s.early != nil
}

func (s *streamSender) wait(ctx context.Context, timeout time.Duration) ([]byte, error) {
	if s.poll() {
		return s.early.payload, s.early.err
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case a := <-s.answered:
		return a.payload, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-timer.C:
		return nil, fmt.Errorf("install: %w", ErrTimeout)
	}
}

// awaitAnswer reads until the answer comes. The receiver's pings show from the beginning that it is alive.
func awaitAnswer(w *wire, timeout time.Duration, broken context.CancelCauseFunc) answer {
	for {
		_ = w.SetReadDeadline(time.Now().Add(timeout))
		m, err := w.frames.next()
		if err == nil {
			w.traffic.framesIn.Inc()
		}
		switch {
		case err != nil:
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			err = fmt.Errorf("%w: %w", ErrConnectionLost, err)
			broken(err)
			return answer{err: err}
		case m.kind == kindPing:
		case m.kind == kindRaftResponse:
			payload, err := parseOutcome(m.payload)
			return answer{payload, err}
		default:
			err := fmt.Errorf("%w: kind %d in a snapshot stream", errMalformed, m.kind)
			broken(err)
			return answer{err: err}
		}
	}
}

// receiveSnapshot serves an accepted snapshot stream.
func (t *Transport) receiveSnapshot(w *wire, from Peer) {
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	stop := context.AfterFunc(t.ctx, func() { _ = w.Close() })
	defer stop()
	log := t.log.With("node", from.Node, "remote", w.RemoteAddr())
	group, replica, req, err := t.streamRequest(w)
	if err != nil {
		log.Warn("snapshot stream refused", "error", err)
		return
	}
	r, data := io.Pipe()
	pumped := make(chan struct{})
	if !t.spawn(func() {
		defer close(pumped)
		err := t.pump(w, data, req.Size)
		cancel(err)
	}) {
		return
	}
	outcome := t.installing(w, cancel, func() []byte { return t.runInstall(ctx, replicaKey{group, replica}, req, r) })
	_ = r.CloseWithError(errors.New("the snapshot's receiver has finished"))
	_ = w.SetWriteDeadline(time.Now().Add(t.cfg.StreamTimeout))
	if _, err := w.Write(appendFrame(nil, kindRaftResponse, 0, outcome)); err != nil {
		log.Warn("answer to a snapshot stream is lost", "error", err)
		_ = w.Close()
	}
	// The sender closes once it has the answer; closing first could destroy it on its way.
	defer time.AfterFunc(t.cfg.StreamTimeout, func() { _ = w.Close() }).Stop()
	<-pumped
}

// streamRequest reads the request that a snapshot stream begins with.
func (t *Transport) streamRequest(w *wire) (group uint64, replica string, req *raft.InstallSnapshotRequest, err error) {
	_ = w.SetReadDeadline(time.Now().Add(t.cfg.StreamTimeout))
	m, err := w.frames.next()
	if err != nil {
		return 0, "", nil, err
	}
	d := decoder{b: m.payload}
	group, replica = d.uint(), d.string()
	if m.kind != kindRaftRequest || d.bad {
		return 0, "", nil, fmt.Errorf("%w: snapshot request", errMalformed)
	}
	decoded, err := decodeRequest(typeInstallSnapshot, d.b)
	if err != nil {
		return 0, "", nil, err
	}
	return group, replica, decoded.(*raft.InstallSnapshotRequest), nil
}

// installing runs f and pings the sender meanwhile. A ping that fails is how a broken connection is noticed
// while f does not read.
func (t *Transport) installing(w *wire, broken context.CancelCauseFunc, f func() []byte) []byte {
	done := make(chan []byte, 1)
	go func() { done <- f() }()
	ticker := time.NewTicker(t.cfg.StreamTimeout / 4)
	defer ticker.Stop()
	for {
		select {
		case outcome := <-done:
			return outcome
		case <-ticker.C:
			_ = w.SetWriteDeadline(time.Now().Add(t.cfg.StreamTimeout))
			if _, err := w.Write(appendFrame(nil, kindPing, 0, nil)); err != nil {
				broken(fmt.Errorf("%w: %w", ErrConnectionLost, err))
				_ = w.Close()
			}
		}
	}
}

// runInstall calls the InstallFunc of a replica, one at a time, and returns the wire form of its outcome.
func (t *Transport) runInstall(ctx context.Context, key replicaKey, req *raft.InstallSnapshotRequest, data io.Reader) []byte {
	t.mu.Lock()
	g := t.groups[key]
	_, busy := t.installs[key]
	if g != nil && !busy {
		t.installs[key] = struct{}{}
	}
	t.mu.Unlock()
	if g == nil {
		t.metrics.dropped.WithLabelValues("unknown_replica").Inc()
		return appendError(nil, ErrUnknownReplica)
	}
	if busy {
		return appendError(nil, ErrBusy)
	}
	defer func() {
		t.mu.Lock()
		delete(t.installs, key)
		t.mu.Unlock()
	}()
	resp, err := g.install(ctx, req, data)
	if err != nil {
		return appendFailure(nil, err)
	}
	return appendResponse([]byte{byte(statusOK)}, resp)
}

// pump passes the data of a stream on and then waits for the sender to close. What comes after the
// reader has finished is discarded. The error says why the stream is over.
func (t *Transport) pump(w *wire, data *io.PipeWriter, size int64) error {
	err := t.pumpData(w, data, size)
	_ = data.CloseWithError(err) // nil = io.EOF
	if err != nil {
		_ = w.Close()
		return err
	}
	_ = w.SetReadDeadline(time.Now().Add(t.cfg.InstallTimeout + t.cfg.StreamTimeout))
	if m, err := w.frames.next(); err == nil {
		_ = w.Close()
		return fmt.Errorf("%w: kind %d after the end of a snapshot stream", errMalformed, m.kind)
	}
	return fmt.Errorf("%w: the sender has closed the stream", ErrConnectionLost)
}

func (t *Transport) pumpData(w *wire, data *io.PipeWriter, size int64) error {
	received := int64(0)
	for {
		_ = w.SetReadDeadline(time.Now().Add(t.cfg.StreamTimeout))
		m, err := w.frames.next()
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("snapshot stream: %w", err)
		}
		w.traffic.framesIn.Inc()
		switch m.kind {
		case kindStreamData:
			if received += int64(len(m.payload)); received > size {
				return fmt.Errorf("%w: over %d bytes", errStreamSize, size)
			}
			_, _ = data.Write(m.payload) // fails only when the reader has finished
		case kindStreamEnd:
			d := decoder{b: m.payload}
			if len(d.b) != 8 || int64(binary.LittleEndian.Uint64(d.b)) != received || received != size {
				return fmt.Errorf("%w: %d bytes instead of %d", errStreamSize, received, size)
			}
			return nil
		default:
			return fmt.Errorf("%w: kind %d in a snapshot stream", errMalformed, m.kind)
		}
	}
}
