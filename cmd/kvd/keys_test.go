package main

import (
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
)

// What each command line asks the server for.
func TestRequests(t *testing.T) {
	f := startFake(t)
	for line, want := range map[string]proto.Message{
		"put k v":                       &pb.PutRequest{Key: []byte("k"), Value: []byte("v")},
		"put k <from stdin":             &pb.PutRequest{Key: []byte("k"), Value: []byte("from stdin")},
		"put k -- -v":                   &pb.PutRequest{Key: []byte("k"), Value: []byte("-v")},
		"put k v --lease ff --prev-kv":  &pb.PutRequest{Key: []byte("k"), Value: []byte("v"), Lease: 255, PrevKv: true},
		"put k --ignore-value":          &pb.PutRequest{Key: []byte("k"), IgnoreValue: true},
		"put k v --ignore-lease":        &pb.PutRequest{Key: []byte("k"), Value: []byte("v"), IgnoreLease: true},
		"get k":                         &pb.RangeRequest{Key: []byte("k")},
		"get k l":                       &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")},
		"get k --prefix":                &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")},
		"get k --from-key --limit 3":    &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte{0}, Limit: 3},
		"get '' --prefix":               &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}},
		"get k --rev 9 --consistency s": &pb.RangeRequest{Key: []byte("k"), Revision: 9, Serializable: true},
		"get k --prefix --order descend --sort-by modify": &pb.RangeRequest{
			Key: []byte("k"), RangeEnd: []byte("l"), SortOrder: pb.RangeRequest_DESCEND, SortTarget: pb.RangeRequest_MOD},
		"get k --keys-only":                           &pb.RangeRequest{Key: []byte("k"), KeysOnly: true},
		"get k --count-only":                          &pb.RangeRequest{Key: []byte("k"), CountOnly: true},
		"get k --min-mod-rev 1 --max-mod-rev 2":       &pb.RangeRequest{Key: []byte("k"), MinModRevision: 1, MaxModRevision: 2},
		"get k --min-create-rev 3 --max-create-rev 4": &pb.RangeRequest{Key: []byte("k"), MinCreateRevision: 3, MaxCreateRevision: 4},
		"del k":                      &pb.DeleteRangeRequest{Key: []byte("k")},
		"del k l --range --prev-kv":  &pb.DeleteRangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), PrevKv: true},
		"del k --from-key":           &pb.DeleteRangeRequest{Key: []byte("k"), RangeEnd: []byte{0}},
		"compact 7":                  &pb.CompactionRequest{Revision: 7},
		"compaction 7 --physical":    &pb.CompactionRequest{Revision: 7, Physical: true},
		"lease grant 60":             &pb.LeaseGrantRequest{TTL: 60},
		"lease revoke 1e":            &pb.LeaseRevokeRequest{ID: 0x1e},
		"lease keep-alive 1e --once": &pb.LeaseKeepAliveRequest{ID: 0x1e},
		"lease timetolive 1e":        &pb.LeaseTimeToLiveRequest{ID: 0x1e},
		"lease timetolive 1e --keys": &pb.LeaseTimeToLiveRequest{ID: 0x1e, Keys: true},
		"lease list":                 &pb.LeaseLeasesRequest{},
		"move-leader n2":             &pb.MoveLeaderRequest{TargetID: 0xa2},
		"move-leader a2":             &pb.MoveLeaderRequest{TargetID: 0xa2},
		"txn <create(\"k\") = \"0\"\n\nput k v\n\nget k\n": &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte("k"), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("k")}}}},
		},
	} {
		t.Run(line, func(t *testing.T) {
			command, in, _ := strings.Cut(line, " <")
			args := append(strings.Fields(strings.ReplaceAll(command, "''", "\x01")), "")
			for i, arg := range args {
				args[i] = strings.ReplaceAll(arg, "\x01", "")
			}
			args = append([]string{"--endpoints", f.addr}, args[:len(args)-1]...)
			if code, _, errOut := kvd(t, in, args...); code != exitOK {
				t.Fatalf("exit code %d: %s", code, errOut)
			}
			if got := f.last(); !proto.Equal(got, want) {
				t.Errorf("asked for %T %s, want %T %s", got, prototext.Format(got), want, prototext.Format(want))
			}
		})
	}
}

// Nothing reaches the server from a command line that makes no sense.
func TestNonsenseIsRefused(t *testing.T) {
	f := startFake(t)
	for _, line := range []string{
		"put k v --ignore-value", "put k v --lease xyz", "get k --prefix --from-key", "get k l --prefix", "get k --keys-only --count-only",
		"get k --consistency x", "get k --sort-by x", "get k --limit -1", "get k --min-mod-rev 5 --max-mod-rev 2",
		"get k --min-create-rev 5 --max-create-rev 2", "get k --print-value-only -w json", "del k l --from-key", "compaction x", "compaction -- -1",
		"member list --consistency x", "lease grant 0", "lease grant x", "lease revoke x", "lease timetolive", "lease keep-alive 1e 1f",
		"watch", "watch a b c", "watch a b --prefix", "watch k --rev -1", "watch k --", "watch k -w table", "lock", "lock l --ttl 0",
		"elect e", "elect e v --listen", "elect --listen",
	} {
		if code, _, _ := kvd(t, "", append([]string{"--endpoints", f.addr}, strings.Fields(line)...)...); code != exitUsage {
			t.Errorf("%s: exit code %d, want %d", line, code, exitUsage)
		}
	}
	if f.last() != nil {
		t.Errorf("the server was asked for %v", f.last())
	}
}

func TestEnvironmentOfClientFlags(t *testing.T) {
	f := startFake(t)
	t.Setenv("KVD_ENDPOINTS", f.addr)
	if code, _, errOut := kvd(t, "", "put", "k", "v"); code != exitOK {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	t.Setenv("KVD_DIAL_TIMEOUT", "soon")
	if code, _, errOut := kvd(t, "", "put", "k", "v"); code != exitUsage || !strings.Contains(errOut, "KVD_DIAL_TIMEOUT") {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	if code, _, errOut := kvd(t, "", "put", "k", "v", "--dial-timeout", "60s"); code != exitOK {
		t.Fatalf("a flag does not beat the environment: exit code %d: %s", code, errOut)
	}
}
