package bench

import (
	"encoding/binary"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"testing"
)

// seeded prints its seed.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// deviation is how far, in standard deviations, hits in so many draws are from what probability lets expect.
func deviation(hits, draws int, probability float64) float64 {
	return math.Abs(float64(hits)-float64(draws)*probability) / math.Sqrt(float64(draws)*probability*(1-probability))
}

// The algorithm is exact for the first two items and approximates the sum of the others by an integral, so the
// distribution function is compared there.
func TestZipfianFollowsZipfsLaw(t *testing.T) {
	const n, draws = 1000, 300_000
	rng, z := seeded(t), newZipfian(n)
	var hits [n]int
	for range draws {
		hits[z.next(rng)]++
	}
	total := zeta(n)
	for i := range 2 {
		if d := deviation(hits[i], draws, 1/math.Pow(float64(i+1), theta)/total); d > 6 {
			t.Errorf("item %d was chosen %d times of %d, %.1f standard deviations off", i, hits[i], draws, d)
		}
	}
	below := 0
	for i, h := range hits {
		if below += h; i < 9 {
			continue
		}
		if got, want := float64(below)/draws, zeta(int64(i+1))/total; math.Abs(got-want) > 0.02 {
			t.Fatalf("%.3f of the draws are of the first %d items, want %.3f", got, i+1, want)
		}
	}
}

func TestZipfianOfFewItems(t *testing.T) {
	rng := seeded(t)
	for n := int64(1); n < 5; n++ {
		z := newZipfian(n)
		seen := map[int64]bool{}
		for range 1000 {
			v := z.next(rng)
			if v < 0 || v >= n {
				t.Fatalf("item %d of %d", v, n)
			}
			seen[v] = true
		}
		if len(seen) != int(n) {
			t.Errorf("%d items of %d were chosen", len(seen), n)
		}
	}
}

// The known zeta is that of ten billion items: a sum over the first, and Euler and Maclaurin's formula for the others.
func TestScrambledZeta(t *testing.T) {
	const first = 1_000_000
	power := func(x float64) float64 { return math.Pow(x, 1-theta) / (1 - theta) }
	f := func(x float64) float64 { return 1 / math.Pow(x, theta) }
	sum := zeta(first) + power(scrambledItems) - power(first) + (f(scrambledItems)-f(first))/2
	if math.Abs(sum-scrambledZeta) > 1e-6 {
		t.Errorf("%v, not %v", sum, scrambledZeta)
	}
}

func TestScrambledSpreadsTheFavourites(t *testing.T) {
	const n, draws = 100, 200_000
	rng, s := seeded(t), newScrambled(n)
	hits := map[int64]int{}
	for range draws {
		v := s.next(rng)
		if v < 0 || v >= n {
			t.Fatalf("item %d of %d", v, n)
		}
		hits[v]++
	}
	// Others land on the favourite's place, too.
	favourite := int64(fnvOf(0) % n)
	if least := 1 / scrambledZeta; float64(hits[favourite])/draws < least {
		t.Errorf("the favourite has %d of %d draws, want %.3f of them at least", hits[favourite], draws, least)
	}
	for item, h := range hits {
		if h > hits[favourite] {
			t.Errorf("item %d has %d draws, the favourite %d", item, h, hits[favourite])
		}
	}
	if len(hits) != n {
		t.Errorf("%d of %d items were chosen", len(hits), n)
	}
}

func fnvOf(v uint64) uint64 {
	h := fnv.New64a()
	h.Write(binary.LittleEndian.AppendUint64(nil, v))
	return h.Sum64()
}

func TestHash(t *testing.T) {
	for _, v := range []uint64{0, 1, 255, 256, math.MaxUint64, 9_999_999_999} {
		if fnvHash(v) != fnvOf(v) {
			t.Errorf("%d: %x, want %x", v, fnvHash(v), fnvOf(v))
		}
	}
}

func TestNewestWaitsForAllBefore(t *testing.T) {
	n := newNewest(10)
	a, b, c := n.reserve(), n.reserve(), n.reserve()
	if a != 10 || b != 11 || c != 12 {
		t.Fatal(a, b, c)
	}
	n.settle(c, true)
	n.settle(a, true)
	if n.load() != a {
		t.Errorf("%d, though %d is not there", n.load(), b)
	}
	n.settle(b, false)
	if again := n.reserve(); again != b {
		t.Errorf("%d comes after the failure of %d", again, b)
	}
	n.settle(b, true)
	if n.load() != c || len(n.ahead) != 0 {
		t.Errorf("%d is the newest, %v ahead", n.load(), n.ahead)
	}
}
