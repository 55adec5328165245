package fsm

import (
	"errors"
	"testing"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/snapshot"
)

// TestHashKVIsEtcds holds hashes against those that etcd 3.7.3 computes for the same requests.
func TestHashKVIsEtcds(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	check := func(rev int64, want uint32, wantCompacted, wantRev int64) {
		t.Helper()
		h, compacted, at, err := s.HashKV(t.Context(), rev)
		if err != nil || h != want || compacted != wantCompacted || at != wantRev {
			t.Errorf("hash %d, %d, %d, %v, want %d, %d, %d", h, compacted, at, err, want, wantCompacted, wantRev)
		}
	}
	check(0, 1084519789, -1, 1)
	apply(t, s, put("a", "1"), put("b", "2"), put("a", "3"), &pb.DeleteRangeRequest{Key: []byte("b")}, put("c", "4"))
	check(0, 2750537463, -1, 6)
	apply(t, s, &pb.CompactionRequest{Revision: 5})
	check(0, 168415639, 5, 6)
	if err := s.WaitCompacted(t.Context(), User, 5); err != nil {
		t.Fatal(err)
	}
	check(6, 168415639, 5, 6)
	check(5, 3184071396, 5, 5) // as one that has been restarted since: until then it may answer what it remembers
	if _, _, _, err := s.HashKV(t.Context(), 4); !errors.Is(err, ErrCompacted) {
		t.Errorf("a compacted revision: %v", err)
	}
	if _, _, _, err := s.HashKV(t.Context(), 7); !errors.Is(err, ErrFutureRevision) {
		t.Errorf("a future revision: %v", err)
	}
	apply(t, s, &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	check(0, 4246996720, 5, 7)
	apply(t, s, &pb.CompactionRequest{Revision: 7})
	check(7, 1084519789, 7, 7)
	if err := s.WaitCompacted(t.Context(), User, 7); err != nil {
		t.Fatal(err)
	}
	check(0, 1084519789, 7, 7)
}

func TestHashCoversBothSpaces(t *testing.T) {
	var stores [2]*Store
	for i := range stores {
		stores[i] = open(t, testConfig(tempPath(t)))
		apply(t, stores[i], put("a", "1"))
	}
	sum := func(s *Store) uint32 {
		t.Helper()
		h, err := s.Hash(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	if sum(stores[0]) != sum(stores[1]) {
		t.Error("equal stores have different hashes")
	}
	applySystem(t, stores[0], put("member", "1"))
	applySystem(t, stores[1], put("member", "2"))
	if sum(stores[0]) == sum(stores[1]) {
		t.Error("the system key space is not hashed")
	}
}

func applySystem(t *testing.T, s *Store, m *pb.PutRequest) Result {
	t.Helper()
	r := request(t, m)
	r.Space = System
	var b EntryBuilder
	b.Add(r)
	results, err := s.Apply(s.AppliedIndex()+1, 1, b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return results[0]
}

func TestSpacesAreApart(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", "1"), put("a", "2"))
	if rev := applySystem(t, s, put("a", "system")).Response.(*pb.PutResponse).Header.Revision; rev != 2 {
		t.Errorf("the first revision of the system key space is %d", rev)
	}
	apply(t, s, &pb.CompactionRequest{Revision: 3})
	if s.Revision(User) != 3 || s.Revision(System) != 2 || s.CompactRevision(User) != 3 || s.CompactRevision(System) != -1 {
		t.Errorf("revisions %d and %d, compacted at %d and %d", s.Revision(User), s.Revision(System), s.CompactRevision(User), s.CompactRevision(System))
	}
	resp, err := s.Range(t.Context(), System, &pb.RangeRequest{Key: []byte("a")})
	if err != nil || len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != "system" || get(t, s, "a") != "2" {
		t.Errorf("got %v, %v", resp, err)
	}
	if _, err := s.Range(t.Context(), spaces, &pb.RangeRequest{Key: []byte("a")}); !errors.Is(err, ErrUnknownSpace) {
		t.Errorf("a space that does not exist: %v", err)
	}
	if _, err := s.ReadTxn(t.Context(), User, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put("a", "3")}}}}); !errors.Is(err, ErrNotReadOnly) {
		t.Errorf("a writing transaction: %v", err)
	}
}

func TestAdopt(t *testing.T) {
	config := testConfig(tempPath(t))
	config.Group, config.ClusterID = 1, 7
	s := open(t, config)
	apply(t, s, put("a", "1"), put("a", "2"), put("b", "1"), &pb.CompactionRequest{Revision: 2})
	applySystem(t, s, put("member", "1"))
	if err := Adopt(config.Path, snapshot.Meta{}); err == nil {
		t.Error("adopted a file in use")
	}
	if err := Adopt(config.Path+"x", snapshot.Meta{}); err == nil {
		t.Error("adopted a file that does not exist")
	}
	hash, _, _, err := s.HashKV(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want := snapshot.Meta{
		ClusterID: 8, Group: 0, Index: 5, Term: 2, ConfigurationIndex: 5,
		Configuration: raft.Configuration{Servers: []raft.Server{{ID: "n/1", Address: "n/1"}}},
	}
	if err := Adopt(config.Path, want); err != nil {
		t.Fatal(err)
	}
	config.Group, config.ClusterID = 0, 8
	s = open(t, config)
	want.Revision, want.CompactRevision, want.Keys = 4, 2, 2
	if meta, ok := s.SnapshotMeta(); !ok || !equalMeta(meta, want) {
		t.Errorf("adopted as %+v, want %+v", meta, want)
	}
	if again, _, _, err := s.HashKV(t.Context(), 0); err != nil || again != hash {
		t.Errorf("hash %x became %x, %v", hash, again, err)
	}
	if s.Revision(System) != 1 {
		t.Errorf("the system key space is at revision %d", s.Revision(System))
	}
	apply(t, s, put("c", "1"))
	if s.Revision(User) != 5 {
		t.Errorf("revision %d", s.Revision(User))
	}
}

func equalMeta(a, b snapshot.Meta) bool {
	return string(appendConfiguration(nil, a.Configuration)) == string(appendConfiguration(nil, b.Configuration)) &&
		a.ClusterID == b.ClusterID && a.Group == b.Group && a.Index == b.Index && a.Term == b.Term && a.ConfigurationIndex == b.ConfigurationIndex &&
		a.Revision == b.Revision && a.CompactRevision == b.CompactRevision && a.Keys == b.Keys
}

// TestStoresShareARegisterer: the store of an installed snapshot is opened while the old one is still there.
func TestStoresShareARegisterer(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	for range 2 {
		config := testConfig(tempPath(t))
		config.Registerer = registry
		s := open(t, config)
		apply(t, s, put("a", "1"), put("b", "1"))
		if err := s.Flush(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		values[f.GetName()] = f.GetMetric()[0].GetCounter().GetValue() + f.GetMetric()[0].GetGauge().GetValue()
	}
	if values["kvd_fsm_applied_requests_total"] != 4 || values["kvd_fsm_applied_index"] != 1 || values["kvd_fsm_flushed_rows_total"] != 4 {
		t.Errorf("got %v", values)
	}
}

func TestConfigurationIsStoredByHand(t *testing.T) {
	c := raft.Configuration{Servers: []raft.Server{{ID: "n1/1", Address: "n1/1"}, {Suffrage: raft.Nonvoter, ID: "", Address: "x"}}}
	data := appendConfiguration(nil, c)
	got, err := parseConfiguration(data)
	if err != nil || len(got.Servers) != 2 || got.Servers[0] != c.Servers[0] || got.Servers[1] != c.Servers[1] {
		t.Errorf("%v, %v", got, err)
	}
	for n := range data {
		if _, err := parseConfiguration(data[:n]); !errors.Is(err, ErrCorruptState) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := parseConfiguration(append(data, 0)); !errors.Is(err, ErrCorruptState) {
		t.Errorf("one byte more: %v", err)
	}
}

func TestConfigIsValidated(t *testing.T) {
	for _, c := range []Config{{}, {Path: "x", FlushBytes: -1}, {Path: "x", FlushBytes: 2, MaxLagBytes: 1}} {
		if c.Validate() == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	if err := (Config{Path: "x"}).withDefaults().Validate(); err != nil {
		t.Error(err)
	}
}
