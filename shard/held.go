package shard

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"sync"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

// held bounds the log of a witness. While a data voter is away for long, the
// witness keeps all that this one lacks. At the bound it takes no more commands,
// rather than to remove what may live nowhere else: the group goes on without it
// if it can, and otherwise serves reads only, until the data voter is back or
// replaced. It warns at half of that.
type held struct {
	log        *slog.Logger
	limitBytes int64
	empty      []byte // a command that changes nothing
	refused    prometheus.Counter

	mu     sync.Mutex
	parts  []part // in order, each behind the one before it
	bytes  int64
	warned bool
}

// part is a run of entries whose sizes are about the same.
type part struct {
	first, last uint64
	bytes       int64
}

const (
	partEntries  = 1024
	sizesSampled = 256 // entries whose sizes are looked at when the log is opened
)

var errLogFull = errors.New("shard: the log of this witness is full: a data replica of the group has been away for long")

// measure finds about how large the log is that is there.
func (h *held) measure(log raft.LogStore) error {
	first, err1 := log.FirstIndex()
	last, err2 := log.LastIndex()
	if err := errors.Join(err1, err2); err != nil || first == 0 {
		return err
	}
	count := last - first + 1
	step := max(1, count/sizesSampled)
	var sum, n int64
	for i := first; i <= last; i += step {
		var entry raft.Log
		if err := log.GetLog(i, &entry); err != nil {
			return err
		}
		sum += sizeOf(&entry)
		n++
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bytes = sum / n * int64(count)
	h.parts = []part{{first, last, h.bytes}}
	return nil
}

// admit refuses commands while the log is at its bound. What a leader needs to
// begin with is always taken: this witness may have to feed the others.
func (h *held) admit(entries []*raft.Log) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.warn()
	if h.bytes < h.limitBytes {
		return nil
	}
	for _, entry := range entries {
		if entry.Type == raft.LogCommand && !bytes.Equal(entry.Data, h.empty) {
			h.refused.Inc()
			return errLogFull
		}
	}
	return nil
}

// warn tells once each time that the log has grown beyond half of its bound.
// h.mu is held.
func (h *held) warn() {
	large := h.bytes > h.limitBytes/2
	if large && !h.warned {
		h.log.Warn("the log of this witness grows, because a data replica of the group lacks the beginning of it: bring its node back or replace it; at the limit the group may refuse writes",
			"first", h.parts[0].first, "bytes", h.bytes, "limit", h.limitBytes)
	}
	h.warned = large
}

// add counts entries that have been stored.
func (h *held) add(entries []*raft.Log) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, entry := range entries {
		n := len(h.parts)
		if n == 0 || h.parts[n-1].last+1 != entry.Index || entry.Index-h.parts[n-1].first >= partEntries {
			h.parts = append(h.parts, part{first: entry.Index})
			n++
		}
		h.parts[n-1].last = entry.Index
		h.parts[n-1].bytes += sizeOf(entry)
		h.bytes += sizeOf(entry)
	}
}

// keep forgets what is not from first to last; first 0 is an empty log.
func (h *held) keep(first, last uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bytes = 0
	h.parts = slices.DeleteFunc(h.parts, func(p part) bool { return first == 0 || p.last < first || p.first > last })
	for i := range h.parts {
		p := &h.parts[i]
		from, to := max(p.first, first), min(p.last, last)
		p.bytes = p.bytes / int64(p.last-p.first+1) * int64(to-from+1)
		p.first, p.last = from, to
		h.bytes += p.bytes
	}
}

func (h *held) reset() { h.keep(0, 0) }

func (h *held) sizeBytes() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bytes
}
