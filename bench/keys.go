package bench

import (
	"math/rand/v2"
	"strconv"
)

// keyspace makes keys of numbers: a prefix, and the number in decimal, so that keys sort as numbers do.
type keyspace struct {
	prefix string
	digits int
}

// append writes key number n to b.
func (k keyspace) append(b []byte, n int64) []byte {
	b = append(b, k.prefix...)
	var digits [20]byte
	number := strconv.AppendInt(digits[:0], n, 10)
	for range k.digits - len(number) {
		b = append(b, '0')
	}
	return append(b, number...)
}

// after appends the end of the range of all keys.
func (k keyspace) after(b []byte) []byte {
	return append(append(b, k.prefix...), '9'+1)
}

// values are slices of one random block, each from another place: nothing is made for a request, and no two compress.
type values struct {
	block []byte
	size  int
}

const valueOffsets = 1 << 20

func newValues(size int, seed uint64) values {
	block := make([]byte, valueOffsets+size)
	var s [32]byte
	for i := range 8 {
		s[i] = byte(seed >> (8 * i))
	}
	rand.NewChaCha8(s).Read(block)
	return values{block, size}
}

func (v values) pick(rng *rand.Rand) []byte {
	at := rng.IntN(valueOffsets)
	return v.block[at : at+v.size : at+v.size]
}
