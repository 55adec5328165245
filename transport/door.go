package transport

import (
	"net"
	"slices"
	"sync"
)

const (
	maxGuests  = 64 // connections of one host that are no known node's
	maxPerNode = 8  // connections of one known node for one purpose
)

// visitor is an accepted connection: a guest until it has shaken hands as a known node of this cluster.
// One that only asks stays a guest.
type visitor struct {
	conn    net.Conn
	host    string
	node    string // "" = guest
	purpose purpose
}

// door bounds the accepted connections. Whoever has enough of them loses the oldest, so that connections
// that nobody serves any more, or that strangers hold open, keep no node out.
type door struct {
	max int

	mu       sync.Mutex
	visitors []*visitor // oldest first
}

func newVisitor(nc net.Conn) *visitor {
	v := &visitor{conn: nc, host: nc.RemoteAddr().String()}
	if host, _, err := net.SplitHostPort(v.host); err == nil {
		v.host = host
	}
	return v
}

// enter lets v in, unless there are too many and all are known nodes'. The caller closes who had to leave.
func (d *door) enter(v *visitor) (gone *visitor, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	gone = d.evict(maxGuests, func(o *visitor) bool { return o.node == "" && o.host == v.host })
	if gone == nil && len(d.visitors) >= d.max {
		if gone = d.evict(0, func(o *visitor) bool { return o.node == "" }); gone == nil {
			return nil, false
		}
	}
	d.visitors = append(d.visitors, v)
	return gone, true
}

// known makes v a node's. The caller closes who had to leave.
func (d *door) known(v *visitor, node string, why purpose) (gone *visitor) {
	d.mu.Lock()
	defer d.mu.Unlock()
	gone = d.evict(maxPerNode, func(o *visitor) bool { return o.node == node && o.purpose == why })
	v.node, v.purpose = node, why
	return gone
}

// evict removes the oldest visitor of those who match, if they are at least max. It is called with d.mu held.
func (d *door) evict(max int, match func(*visitor) bool) *visitor {
	n, oldest := 0, -1
	for i, v := range d.visitors {
		if !match(v) {
			continue
		}
		if n++; oldest < 0 {
			oldest = i
		}
	}
	if oldest < 0 || n < max {
		return nil
	}
	gone := d.visitors[oldest]
	d.visitors = slices.Delete(d.visitors, oldest, oldest+1)
	return gone
}

// leave is called when v has ended.
func (d *door) leave(v *visitor) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if i := slices.Index(d.visitors, v); i >= 0 {
		d.visitors = slices.Delete(d.visitors, i, i+1)
	}
}

// admit serves one accepted connection, if there are not too many.
func (t *Transport) admit(nc net.Conn) {
	v := newVisitor(nc)
	gone, ok := t.door.enter(v)
	if !ok {
		t.metrics.refused.Inc()
		t.log.Warn("peer connection refused: too many", "remote", nc.RemoteAddr(), "limit", t.cfg.MaxInbound)
		_ = nc.Close()
		return
	}
	t.sendAway(gone)
	leave := func() {
		_ = nc.Close()
		t.door.leave(v)
	}
	if !t.spawn(func() {
		defer leave()
		t.serve(v)
	}) {
		leave()
	}
}

// sendAway closes who lost his place, beside the caller: the end of a TLS connection can take a while.
func (t *Transport) sendAway(v *visitor) {
	if v == nil {
		return
	}
	t.log.Warn("peer connection closed: too many, and it is the oldest", "remote", v.conn.RemoteAddr())
	t.spawn(func() { _ = v.conn.Close() })
}
