package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"
)

// fragments returns the frames of a message, cut at fragmentBytes.
func fragments(k kind, id uint64, payload []byte) [][]byte {
	b := &bulk{frame: append(make([]byte, headerBytes), payload...), kind: k, id: id}
	var frames [][]byte
	for off := headerBytes; off < len(b.frame); off += fragmentBytes {
		frames = append(frames, b.appendFragment(nil, off))
	}
	return frames
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// seeded returns a source of randomness whose seed is shown when the test fails.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

func TestFramesRoundTrip(t *testing.T) {
	r := seeded(t)
	large := randomBytes(r, 3*fragmentBytes+17)
	small := [][]byte{{}, randomBytes(r, 1), randomBytes(r, fragmentBytes)}
	var stream []byte
	for i, f := range fragments(kindCall, 99, large) { // small messages come between the fragments
		stream = append(stream, f...)
		if i < len(small) {
			stream = appendFrame(stream, kindCallReply, uint64(i), small[i])
		}
	}
	// Reads that return a few bytes at a time must not matter.
	fr := newFrameReader(&dribble{b: stream, r: r}, len(large))
	for i := range small {
		m, err := fr.next()
		if err != nil || m.kind != kindCallReply || m.id != uint64(i) || !bytes.Equal(m.payload, small[i]) {
			t.Fatalf("small message %d: kind %d id %d, %d bytes, %v", i, m.kind, m.id, len(m.payload), err)
		}
	}
	m, err := fr.next()
	if err != nil || m.kind != kindCall || m.id != 99 || !bytes.Equal(m.payload, large) {
		t.Fatalf("large message: kind %d id %d, %d bytes, %v", m.kind, m.id, len(m.payload), err)
	}
	if _, err := fr.next(); err != io.EOF {
		t.Fatalf("end of stream: %v", err)
	}
}

// dribble yields its bytes in random small pieces.
type dribble struct {
	b []byte
	r *rand.Rand
}

func (d *dribble) Read(p []byte) (int, error) {
	if len(d.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 1+d.r.IntN(5000))], d.b)
	d.b = d.b[n:]
	return n, nil
}

func TestFramesRefused(t *testing.T) {
	const limit = 1 << 20
	frame := appendFrame(nil, kindCall, 1, []byte("payload"))
	edit := func(f func(b []byte) []byte) []byte { return f(slices.Clone(frame)) }
	reseal := func(b []byte) []byte { putHeader(b, kind(b[8]), b[9], 1); return b }
	large := make([]byte, 2*fragmentBytes)
	parts := fragments(kindCall, 1, large)
	for name, c := range map[string]struct {
		stream []byte
		want   error
	}{
		"flipped payload bit":          {edit(func(b []byte) []byte { b[headerBytes] ^= 1; return b }), errMalformed},
		"flipped kind":                 {edit(func(b []byte) []byte { b[8] ^= 1; return b }), errMalformed},
		"flipped id":                   {edit(func(b []byte) []byte { b[12] ^= 1; return b }), errMalformed},
		"too short":                    {edit(func(b []byte) []byte { binary.LittleEndian.PutUint32(b, 9); return b }), errMalformed},
		"too long":                     {edit(func(b []byte) []byte { binary.LittleEndian.PutUint32(b, maxFrameBytes+1); return b }), errMalformed},
		"unknown flags":                {edit(func(b []byte) []byte { b[9] = 7; return reseal(b) }), errMalformed},
		"over the limit":               {appendFrame(nil, kindCall, 1, make([]byte, limit+1)), errMalformed},
		"cut in the header":            {frame[:5], io.ErrUnexpectedEOF},
		"cut in the payload":           {frame[:len(frame)-1], io.ErrUnexpectedEOF},
		"fragment of nothing":          {parts[1], errMalformed},
		"two first fragments":          {slices.Concat(parts[0], parts[0]), errMalformed},
		"another message's fragment":   {slices.Concat(parts[0], fragments(kindCall, 2, large)[1]), errMalformed},
		"fragments too long in sum":    {slices.Concat(parts[0], appendFragment(nil, kindCall, 0, 1, 0, large)), errMalformed},
		"last fragment too early":      {slices.Concat(parts[0], appendFragment(nil, kindCall, flagLast, 1, 0, large[:1])), errMalformed},
		"complete without last":        {slices.Concat(parts[0], appendFragment(nil, kindCall, 0, 1, 0, large[:fragmentBytes])), errMalformed},
		"empty fragment":               {slices.Concat(parts[0], appendFragment(nil, kindCall, 0, 1, 0, nil)), errMalformed},
		"fragmented over the limit":    {appendFragment(nil, kindCall, flagFirst, 1, limit+1, large), errMalformed},
		"total less than first":        {appendFragment(nil, kindCall, flagFirst, 1, 10, large), errMalformed},
		"first fragment without total": {reseal(append(appendFrame(nil, kindCall, 1, nil)[:9], append([]byte{flagFirst}, make([]byte, 12)...)...)), errMalformed},
	} {
		m, err := newFrameReader(bytes.NewReader(c.stream), limit).next()
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got kind %d, error %v, want %v", name, m.kind, err, c.want)
		}
	}
}

// TestHostileLengthAllocatesLittle feeds headers that announce much and bring little.
func TestHostileLengthAllocatesLittle(t *testing.T) {
	whole := appendFrame(nil, kindCall, 1, make([]byte, 100))
	binary.LittleEndian.PutUint32(whole, maxFrameBytes)
	first := appendFragment(nil, kindCall, flagFirst, 1, 1<<30, make([]byte, 100))
	for name, b := range map[string][]byte{"frame": whole, "fragmented message": first} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := newFrameReader(bytes.NewReader(b), 1<<30).next()
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
			t.Errorf("%s: %d bytes allocated for %d bytes of input", name, got, len(b))
		}
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(nil, kindCall, 1, []byte("payload")))
	f.Add(slices.Concat(fragments(kindCall, 1, make([]byte, fragmentBytes+1))...))
	f.Add(appendFragment(nil, kindCall, flagFirst, 1, 1<<20, []byte("x")))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 20
		fr := newFrameReader(bytes.NewReader(b), limit)
		for sum := 0; ; {
			m, err := fr.next()
			if err != nil {
				return
			}
			if sum += len(m.payload); len(m.payload) > limit || sum > len(b) {
				t.Fatalf("%d bytes of payload out of %d", sum, len(b))
			}
		}
	})
}
