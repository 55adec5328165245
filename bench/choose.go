package bench

import (
	"math"
	"math/rand/v2"
	"sync/atomic"
)

// chooser picks the number of a key.
type chooser interface{ next(rng *rand.Rand) int64 }

type uniform struct{ n int64 }

func (u uniform) next(rng *rand.Rand) int64 { return rng.Int64N(u.n) }

// sequence is shared by all clients.
type sequence struct {
	n    int64
	last *atomic.Int64
}

func (s sequence) next(*rand.Rand) int64 { return (s.last.Add(1) - 1) % s.n }

// zipfian picks 0 most often, 1 less often, and so on to n-1, by the algorithm of Gray, Sundaresan, Englert, Baclawski and
// Weinberger, "Quickly generating billion-record synthetic databases", SIGMOD 1994, section 3.2 (figure "zipf"), with
// YCSB's constant theta (Cooper et al., "Benchmarking cloud serving systems with YCSB", SoCC 2010).
type zipfian struct {
	n                       float64
	zetaN, alpha, eta, half float64
}

const theta = 0.99

func zeta(n int64) (sum float64) {
	for i := int64(1); i <= n; i++ {
		sum += 1 / math.Pow(float64(i), theta)
	}
	return sum
}

func newZipfian(n int64) zipfian { return zipfianOf(n, zeta(n)) }

func zipfianOf(n int64, zetaN float64) zipfian {
	return zipfian{
		n: float64(n), zetaN: zetaN, alpha: 1 / (1 - theta), half: math.Pow(0.5, theta),
		eta: (1 - math.Pow(2/float64(n), 1-theta)) / (1 - zeta(2)/zetaN),
	}
}

func (z zipfian) next(rng *rand.Rand) int64 {
	u := rng.Float64()
	switch uz := u * z.zetaN; {
	case uz < 1 || z.n < 2:
		return 0
	case uz < 1+z.half || z.n < 3:
		return 1
	}
	return min(int64(z.n*math.Pow(z.eta*u-z.eta+1, z.alpha)), int64(z.n)-1)
}

// scrambled spreads the keys that are chosen often over all n, as YCSB's ScrambledZipfianGenerator does: zipfian over ten
// billion items, whose zeta is known beforehand, then hashed by 64-bit FNV-1a.
type scrambled struct {
	n       int64
	zipfian zipfian
}

const (
	scrambledItems = 10_000_000_000
	scrambledZeta  = 26.46902820178302
)

func newScrambled(n int64) scrambled {
	return scrambled{n, zipfianOf(scrambledItems, scrambledZeta)}
}

func (s scrambled) next(rng *rand.Rand) int64 {
	return int64(fnvHash(uint64(s.zipfian.next(rng))) % uint64(s.n))
}

func fnvHash(v uint64) uint64 {
	hash := uint64(0xcbf29ce484222325)
	for range 8 {
		hash = (hash ^ v&0xff) * 1099511628211
		v >>= 8
	}
	return hash
}
