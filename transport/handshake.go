package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

// The protocol versions that this node speaks.
const (
	minVersion = 1
	maxVersion = 1
)

const (
	helloMagic      = "KVDP"
	maxHelloBytes   = 4 << 10
	maxAddressBytes = 255
	maxNodeBytes    = 63
)

// purpose says what a connection is for.
type purpose uint8

const (
	purposePeer   purpose = 1 + iota // raft messages and calls between two nodes
	purposeAsk                       // one Ask
	purposeStream                    // one snapshot
)

// Peer is what a node says of itself when a connection begins.
type Peer struct {
	ClusterID   uint64 // 0 = not yet in a cluster
	Node        string // 1 to 63 of A-Z a-z 0-9 . _ -
	Incarnation uint64 // random, new whenever the node starts on an empty directory
	PeerAddr    string // where its Transport listens
	ClientAddr  string
	HTTPAddr    string
}

func (p *Peer) validate() error {
	if len(p.Node) == 0 || len(p.Node) > maxNodeBytes {
		return fmt.Errorf("node name of %d bytes, want 1 to %d", len(p.Node), maxNodeBytes)
	}
	for _, c := range []byte(p.Node) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return fmt.Errorf("node name %q: want A-Z a-z 0-9 . _ -", p.Node)
		}
	}
	for _, a := range []string{p.PeerAddr, p.ClientAddr, p.HTTPAddr} {
		if len(a) > maxAddressBytes {
			return fmt.Errorf("address of %d bytes, want at most %d", len(a), maxAddressBytes)
		}
	}
	return nil
}

func appendPeer(b []byte, p *Peer) []byte {
	b = appendUint(appendString(appendUint(b, p.ClusterID), p.Node), p.Incarnation)
	return appendString(appendString(appendString(b, p.PeerAddr), p.ClientAddr), p.HTTPAddr)
}

func (d *decoder) peer() Peer {
	return Peer{ClusterID: d.uint(), Node: d.string(), Incarnation: d.uint(),
		PeerAddr: d.string(), ClientAddr: d.string(), HTTPAddr: d.string()}
}

// hello opens a connection.
type hello struct {
	minVersion, maxVersion uint8
	purpose                purpose
	to                     string // the node that the dialer wants; "" = whoever answers
	from                   Peer
}

func appendHello(b []byte, h *hello) []byte {
	b = append(b, helloMagic...)
	b = append(b, h.minVersion, h.maxVersion, byte(h.purpose))
	return appendPeer(appendString(b, h.to), &h.from)
}

// parseHello ignores what follows the fields it knows: a later version may say more.
func parseHello(b []byte) (hello, error) {
	if len(b) < len(helloMagic) || string(b[:len(helloMagic)]) != helloMagic {
		return hello{}, fmt.Errorf("%w: not a kvd node", errMalformed)
	}
	d := decoder{b: b[len(helloMagic):]}
	h := hello{minVersion: d.byte(), maxVersion: d.byte(), purpose: purpose(d.byte()), to: d.string(), from: d.peer()}
	if d.bad {
		return hello{}, fmt.Errorf("%w: hello ends too early", errMalformed)
	}
	if err := h.from.validate(); err != nil {
		return hello{}, fmt.Errorf("%w: hello: %w", errMalformed, err)
	}
	return h, nil
}

// verdict is the answer to a hello.
type verdict uint8

const (
	verdictWelcome verdict = iota
	verdictVersion
	verdictCluster
	verdictWrongNode
	verdictRefused
)

var verdictErrors = map[verdict]error{
	verdictVersion:   ErrVersion,
	verdictCluster:   ErrClusterMismatch,
	verdictWrongNode: ErrWrongNode,
	verdictRefused:   errors.New("connection refused by the peer"),
}

type helloReply struct {
	version uint8
	verdict verdict
	from    Peer
	reason  string // for people
}

func appendHelloReply(b []byte, r *helloReply) []byte {
	b = append(append(b, helloMagic...), r.version, byte(r.verdict))
	return appendString(appendPeer(b, &r.from), r.reason)
}

func parseHelloReply(b []byte) (helloReply, error) {
	if len(b) < len(helloMagic) || string(b[:len(helloMagic)]) != helloMagic {
		return helloReply{}, fmt.Errorf("%w: not a kvd node", errMalformed)
	}
	d := decoder{b: b[len(helloMagic):]}
	r := helloReply{version: d.byte(), verdict: verdict(d.byte()), from: d.peer(), reason: d.string()}
	if d.bad {
		return helloReply{}, fmt.Errorf("%w: hello reply ends too early", errMalformed)
	}
	if err := r.from.validate(); err != nil {
		return helloReply{}, fmt.Errorf("%w: hello reply: %w", errMalformed, err)
	}
	return r, nil
}

// judge decides on a hello.
func judge(h *hello, self *Peer) (verdict, string) {
	switch {
	case h.minVersion > maxVersion || h.maxVersion < minVersion:
		return verdictVersion, fmt.Sprintf("%s speaks versions %d to %d, %s speaks %d to %d",
			h.from.Node, h.minVersion, h.maxVersion, self.Node, minVersion, maxVersion)
	case h.to != "" && h.to != self.Node:
		return verdictWrongNode, fmt.Sprintf("%s was expected, this is %s", h.to, self.Node)
	case h.purpose == purposeAsk:
		return verdictWelcome, ""
	case h.purpose != purposePeer && h.purpose != purposeStream:
		return verdictRefused, fmt.Sprintf("unknown purpose %d", h.purpose)
	case h.from.ClusterID != self.ClusterID || self.ClusterID == 0:
		return verdictCluster, clusterText(&h.from, self)
	}
	return verdictWelcome, ""
}

func clusterText(a, b *Peer) string {
	name := func(p *Peer) string {
		if p.ClusterID == 0 {
			return fmt.Sprintf("%s is in no cluster yet", p.Node)
		}
		return fmt.Sprintf("%s is in cluster %016x", p.Node, p.ClusterID)
	}
	return name(a) + ", " + name(b)
}

// wire is a connection that counts what passes and remembers when it last received something.
type wire struct {
	net.Conn
	frames   *frameReader
	lastRead atomic.Int64 // time since origin, in ns
	origin   time.Time
	traffic  *traffic // nil until the peer is known
}

func newWire(nc net.Conn, limit int) *wire {
	w := &wire{Conn: nc, origin: time.Now()}
	w.frames = newFrameReader(w, limit)
	return w
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if n > 0 {
		w.lastRead.Store(int64(time.Since(w.origin)))
		if w.traffic != nil {
			w.traffic.bytesIn.Add(float64(n))
		}
	}
	return n, err
}

func (w *wire) Write(b []byte) (int, error) {
	n, err := w.Conn.Write(b)
	if w.traffic != nil {
		w.traffic.bytesOut.Add(float64(n))
	}
	return n, err
}

// silence is how long nothing has been received.
func (w *wire) silence() time.Duration {
	return time.Since(w.origin) - time.Duration(w.lastRead.Load())
}

var aLongTimeAgo = time.Unix(1, 0) // a deadline that has passed

// interruptible makes reads and writes of nc fail at the end of ctx, until stop is called. stop returns
// the context's error if it came to that.
func interruptible(ctx context.Context, nc net.Conn) (stop func() error) {
	if deadline, ok := ctx.Deadline(); ok {
		_ = nc.SetDeadline(deadline)
	}
	done := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		_ = nc.SetDeadline(aLongTimeAgo)
		close(done)
	})
	return func() error {
		if !cancel() {
			<-done
			return context.Cause(ctx)
		}
		return nc.SetDeadline(time.Time{})
	}
}

// dial connects to addr for the purpose and exchanges hellos. All its errors are definite and wrap
// ErrUnreachable: nothing but the hello was sent.
func (t *Transport) dial(ctx context.Context, addr, to string, why purpose) (*wire, Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.DialTimeout)
	defer cancel()
	defer context.AfterFunc(t.ctx, cancel)()
	unreachable := func(err error) (*wire, Peer, error) {
		if t.ctx.Err() != nil {
			return nil, Peer{}, fmt.Errorf("%w: %w", ErrUnreachable, ErrClosed)
		}
		return nil, Peer{}, fmt.Errorf("%w: %s: %w", ErrUnreachable, strings.TrimSpace(to+" "+addr), err)
	}
	self := t.cfg.Identity()
	if why != purposeAsk && self.ClusterID == 0 {
		return unreachable(fmt.Errorf("%w: %s is in no cluster yet", ErrClusterMismatch, self.Node))
	}
	nc, err := t.cfg.Dial(ctx, addr)
	if err != nil {
		return unreachable(err)
	}
	w := newWire(nc, t.cfg.MaxMessageBytes)
	stop := interruptible(ctx, nc)
	peer, err := greet(w, &hello{minVersion, maxVersion, why, to, self})
	if stopErr := stop(); err == nil {
		err = stopErr
	}
	if err != nil {
		_ = nc.Close()
		return unreachable(err)
	}
	w.traffic = t.metrics.traffic(peer.Node)
	t.cfg.OnPeer(peer)
	return w, peer, nil
}

// greet is the dialer's half of the handshake.
func greet(w *wire, h *hello) (Peer, error) {
	if _, err := w.Write(appendFrame(nil, kindHello, 0, appendHello(nil, h))); err != nil {
		return Peer{}, fmt.Errorf("handshake: %w", err)
	}
	m, err := firstMessage(w, kindHelloReply)
	if err != nil {
		return Peer{}, fmt.Errorf("handshake: %w", err)
	}
	r, err := parseHelloReply(m)
	if err != nil {
		return Peer{}, fmt.Errorf("handshake: %w", err)
	}
	if r.verdict != verdictWelcome {
		known, ok := verdictErrors[r.verdict]
		if !ok {
			known = verdictErrors[verdictRefused]
		}
		return Peer{}, fmt.Errorf("handshake: %w: %s", known, r.reason)
	}
	// The peer has judged; but it may be wrong, so this side judges as well.
	answer := &hello{r.version, r.version, h.purpose, "", r.from}
	if v, reason := judge(answer, &h.from); v != verdictWelcome {
		return Peer{}, fmt.Errorf("handshake: %w: %s", verdictErrors[v], reason)
	}
	if h.to != "" && r.from.Node != h.to {
		return Peer{}, fmt.Errorf("handshake: %w: this is %s", ErrWrongNode, r.from.Node)
	}
	return r.from, nil
}

// welcome is the accepting side's half of the handshake.
func (t *Transport) welcome(w *wire) (hello, error) {
	m, err := firstMessage(w, kindHello)
	if err != nil {
		return hello{}, err
	}
	h, err := parseHello(m)
	if err != nil {
		return hello{}, err
	}
	self := t.cfg.Identity()
	r := helloReply{version: min(h.maxVersion, maxVersion), from: self}
	r.verdict, r.reason = judge(&h, &self)
	if _, err := w.Write(appendFrame(nil, kindHelloReply, 0, appendHelloReply(nil, &r))); err != nil {
		return hello{}, err
	}
	if r.verdict != verdictWelcome {
		return h, fmt.Errorf("%w: %s", verdictErrors[r.verdict], r.reason)
	}
	return h, nil
}

// firstMessage reads the one message that a handshake consists of in each direction.
func firstMessage(w *wire, k kind) ([]byte, error) {
	limit := w.frames.limit
	w.frames.limit = maxHelloBytes
	defer func() { w.frames.limit = limit }()
	m, err := w.frames.next()
	if err != nil {
		return nil, err
	}
	if m.kind != k {
		return nil, fmt.Errorf("%w: kind %d instead of a hello", errMalformed, m.kind)
	}
	w.frames.frames = 0
	return m.payload, nil
}
