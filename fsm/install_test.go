package fsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/snapshot"
)

// randomEntries write and delete few keys, and compact now and then.
func randomEntries(t *testing.T, n int) [][]byte {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	entries := make([][]byte, n)
	for i := range entries {
		var messages []proto.Message
		for range 1 + rnd.IntN(4) {
			key := fmt.Sprintf("k%02d", rnd.IntN(60))
			p := put(key, fmt.Sprint(key, "=", i))
			switch rnd.IntN(8) {
			case 0, 1:
				messages = append(messages, &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(key + "~")})
			case 2:
				p.PrevKv = true
				messages = append(messages, p)
			case 3:
				messages = append(messages, &pb.TxnRequest{Success: []*pb.RequestOp{putOp(p), putOp(put("k", fmt.Sprint("k=", i)))}})
			default:
				messages = append(messages, p)
			}
		}
		if i%40 == 39 { // every entry may have been one revision
			messages = append(messages, &pb.CompactionRequest{Revision: int64(i / 2)})
		}
		entries[i] = entryOf(t, messages...)
	}
	return entries
}

// applyFrom applies entries[from:]; entry i has index i+1.
func applyFrom(t *testing.T, s *Store, entries [][]byte, from int) {
	t.Helper()
	for i := from; i < len(entries); i++ {
		if _, err := s.Apply(uint64(i+1), 1, entries[i]); err != nil {
			t.Fatal(err)
		}
	}
}

// install makes a store of a stream of s, as a follower does.
func install(t *testing.T, s *Store) *Store {
	t.Helper()
	var stream bytes.Buffer
	if err := s.ViewSnapshot(t.Context(), func(tx *bbolt.Tx, meta snapshot.Meta) error {
		_, err := snapshot.WriteStream(t.Context(), &stream, tx, meta)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	staged, err := snapshot.Stage(t.Context(), &stream, dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "state.db")
	if err := staged.Commit(path); err != nil {
		t.Fatal(err)
	}
	return open(t, testConfig(path))
}

// fingerprint is what replicas compare.
func fingerprint(t *testing.T, s *Store) string {
	t.Helper()
	index, digest := s.Digest()
	hash, compacted, rev, err := s.HashKV(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("index %d, digest %x, hash %x, compacted %d, revision %d", index, digest, hash, compacted, rev)
}

// Replicas that were installed from streams taken anywhere, also in the middle of a physical compaction, end up the
// same as the one that has applied everything (I4), also after a defragmentation and a restart.
func TestInstalledStatesStayEqual(t *testing.T) {
	entries := randomEntries(t, 600)
	config := testConfig(tempPath(t))
	config.CompactionBatch = 2
	s := open(t, config)
	var installed []*Store
	for i := range entries {
		applyFrom(t, s, entries[:i+1], i)
		if i%50 != 41 {
			continue
		}
		if err := s.Flush(t.Context(), uint64(i)); err != nil {
			t.Fatal(err)
		}
		installed = append(installed, install(t, s))
	}
	want := fingerprint(t, s)
	for i, other := range installed {
		applyFrom(t, other, entries, 0) // what it has is skipped
		if got := fingerprint(t, other); got != want {
			t.Errorf("installed: %s, want %s", got, want)
		}
		if i > 2 {
			continue
		}
		if err := errors.Join(other.Defragment(t.Context()), other.Close()); err != nil {
			t.Fatal(err)
		}
		if got := fingerprint(t, open(t, other.config)); got != want {
			t.Errorf("after a restart: %s, want %s", got, want)
		}
	}
}

// Reads, hashes, streams and defragmentations run beside apply, flush and compaction. No read misses a row, and
// whenever two replicas hash the same revision and compaction, they agree.
func TestReadsBesideEverything(t *testing.T) {
	entries := randomEntries(t, 600)
	one, other := testConfig(tempPath(t)), testConfig(tempPath(t))
	one.CompactionBatch, one.FlushBytes, one.MaxLagBytes = 2, 1<<10, 1<<12
	stores := []*Store{open(t, one), open(t, other)}
	ctx, cancel := context.WithCancel(t.Context())
	var readers, writers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	repeat := func(do func() error) {
		readers.Go(func() {
			for ctx.Err() == nil {
				if err := do(); err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var mu sync.Mutex
	hashes := map[[2]int64]uint32{}
	for _, s := range stores {
		repeat(func() error { return readAnywhere(ctx, s) })
		repeat(func() error { return s.Defragment(ctx) })
		repeat(func() error {
			hash, compacted, rev, err := s.HashKV(ctx, 0)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if was, ok := hashes[[2]int64{rev, compacted}]; ok && was != hash {
				return fmt.Errorf("hash %x and %x at revision %d, compacted at %d", was, hash, rev, compacted)
			}
			hashes[[2]int64{rev, compacted}] = hash
			return nil
		})
		writers.Go(func() {
			for i, e := range entries {
				if _, err := s.Apply(uint64(i+1), 1, e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	cancel()
	readers.Wait()
	if a, b := fingerprint(t, stores[0]), fingerprint(t, stores[1]); a != b {
		t.Errorf("%s, and %s", a, b)
	}
}

// readAnywhere reads all keys at a revision between the compaction and the newest, and checks what it can.
func readAnywhere(ctx context.Context, s *Store) error {
	rev, oldest := s.Revision(User), max(1, s.CompactRevision(User))
	rev -= rand.Int64N(max(1, rev-oldest+1))
	r, err := s.Range(ctx, User, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: rev})
	if errors.Is(err, ErrCompacted) { // meanwhile
		return nil
	}
	if err != nil {
		return err
	}
	for _, kv := range r.Kvs {
		if kv.ModRevision > rev || !bytes.HasPrefix(kv.Value, append(kv.Key[:len(kv.Key):len(kv.Key)], '=')) {
			return fmt.Errorf("at revision %d: %v", rev, kv)
		}
	}
	return nil
}
