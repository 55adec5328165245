package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/placement"
	"kvd/server/kvdpb"
	"kvd/transport"
)

// fakeAdministration answers with what it is made of, and records what it was told.
type fakeAdministration struct {
	view placement.Overview
	fail error
	told string
}

func (f *fakeAdministration) overview(context.Context) (placement.Overview, error) {
	return f.view, f.fail
}

func (f *fakeAdministration) leave(_ context.Context, name string, force bool) error {
	f.told = fmt.Sprint("leave ", name, " ", force)
	return f.fail
}

func (f *fakeAdministration) replaceMember(_ context.Context, old, next string) error {
	f.told = fmt.Sprint("replace ", old, " ", next)
	return f.fail
}

func (f *fakeAdministration) locate(key []byte) ([]byte, int, uint64) { return key[:1], 3, 4 }

func TestAdminShowsShards(t *testing.T) {
	cluster := &fakeAdministration{view: placement.Overview{
		Config: &placement.ClusterConfig{Strategy: "consistent", Shards: 2, ReplicationFactor: 2, Witnesses: "auto"},
		Nodes:  []placement.NodeOverview{{Name: "n1", State: "leaving", Weight: 0.5, Shards: 2, Leaders: 1, DiskFree: 1 << 40, Waits: "for 2 shards"}},
		Shards: []placement.ShardOverview{
			{Number: 0, Leader: "n1", State: "ok", Tolerates: 1},
			{
				Number: 1, State: "moving", Why: []string{"a", "b"},
				Replicas: []placement.ReplicaOverview{{ID: "n1/7w", Node: "n1", Role: placement.Witness, State: "voter", Alive: true, Match: 5, Commit: 6}},
				Target:   []placement.TargetReplica{{Node: "n2", Role: placement.Data}},
			},
		},
	}}
	a := newAdmin(cluster)
	second := &kvdpb.Shard{
		Number: 1, State: "moving", Why: []string{"a", "b"},
		Replicas: []*kvdpb.Replica{{Id: "n1/7w", Node: "n1", Role: "witness", State: "voter", Alive: true, Match: 5, Commit: 6}},
		Target:   []*kvdpb.TargetReplica{{Node: "n2", Role: "data"}},
	}
	want := &kvdpb.ShardsResponse{
		Config: &kvdpb.ClusterConfig{Strategy: "consistent", Shards: 2, ReplicationFactor: 2, Witnesses: "auto"},
		Nodes:  []*kvdpb.Node{{Name: "n1", State: "leaving", Weight: 0.5, Shards: 2, Leaders: 1, DiskFree: 1 << 40, Waits: "for 2 shards"}},
		Shards: []*kvdpb.Shard{{Leader: "n1", State: "ok", Tolerates: 1}, second},
	}
	got, err := a.Shards(t.Context(), &kvdpb.ShardsRequest{})
	if err != nil || !proto.Equal(got, want) {
		t.Errorf("all shards: %v, %v; want %v", got, err, want)
	}
	want.Shards = []*kvdpb.Shard{second}
	got, err = a.Shards(t.Context(), &kvdpb.ShardsRequest{Shards: []int32{1}})
	if err != nil || !proto.Equal(got, want) {
		t.Errorf("one shard: %v, %v; want %v", got, err, want)
	}
	for _, number := range []int32{-1, 2} {
		if _, err := a.Shards(t.Context(), &kvdpb.ShardsRequest{Shards: []int32{number}}); status.Code(err) != codes.NotFound {
			t.Errorf("shard %d: %v", number, err)
		}
	}
	cluster.view = placement.Overview{}
	if got, err := a.Shards(t.Context(), &kvdpb.ShardsRequest{}); err != nil || got.Config != nil || len(got.Shards) != 0 {
		t.Errorf("without shards: %v, %v", got, err)
	}
	if _, err := a.Shards(t.Context(), &kvdpb.ShardsRequest{Shards: []int32{0}}); status.Code(err) != codes.NotFound {
		t.Errorf("shard 0 of none: %v", err)
	}
}

func TestAdminChangesMembers(t *testing.T) {
	cluster := &fakeAdministration{}
	a := newAdmin(cluster)
	remove := func(name string, force bool) error {
		_, err := a.RemoveMember(t.Context(), &kvdpb.RemoveMemberRequest{Name: name, Force: force})
		return err
	}
	replace := func(old, next string) error {
		_, err := a.ReplaceMember(t.Context(), &kvdpb.ReplaceMemberRequest{Old: old, New: next})
		return err
	}
	if err := remove("n1", true); err != nil || cluster.told != "leave n1 true" {
		t.Errorf("told to %q, %v", cluster.told, err)
	}
	if err := replace("n1", "n2"); err != nil || cluster.told != "replace n1 n2" {
		t.Errorf("told to %q, %v", cluster.told, err)
	}
	cluster.told = ""
	for _, err := range []error{remove("", false), replace("", "n2"), replace("n1", ""), replace("n1", "n1")} {
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("a member that is not named: %v", err)
		}
	}
	if cluster.told != "" {
		t.Errorf("told to %q", cluster.told)
	}
	if at, err := a.Locate(t.Context(), &kvdpb.LocateRequest{Key: []byte("key")}); err != nil || string(at.Tag) != "k" || at.Shard != 3 || at.Group != 4 {
		t.Errorf("located at %v, %v", at, err)
	}
}

func TestAdminErrors(t *testing.T) {
	cluster := &fakeAdministration{}
	a := newAdmin(cluster)
	check := func(cause error, code codes.Code) {
		t.Helper()
		_, err1 := a.Shards(t.Context(), &kvdpb.ShardsRequest{})
		_, err2 := a.RemoveMember(t.Context(), &kvdpb.RemoveMemberRequest{Name: "n1"})
		_, err3 := a.ReplaceMember(t.Context(), &kvdpb.ReplaceMemberRequest{Old: "n1", New: "n2"})
		for _, err := range []error{err1, err2, err3} {
			if status.Code(err) != code {
				t.Errorf("%v became %v", cause, err)
			}
		}
	}
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{status.Error(codes.ResourceExhausted, "x"), codes.ResourceExhausted},
		{fmt.Errorf("wrapped: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{fmt.Errorf("%w: n9", placement.ErrUnknownMember), codes.NotFound},
		{placement.ErrTooFew, codes.FailedPrecondition},
		{placement.ErrQuorum, codes.FailedPrecondition},
		{fmt.Errorf("%w: n1", placement.ErrLast), codes.FailedPrecondition},
		{placement.ErrMemberExists, codes.FailedPrecondition},
		{placement.ErrConflict, codes.Unavailable},
		{errors.New("no leader"), codes.Unavailable},
		{&transport.RemoteError{Message: "a bug"}, codes.Unavailable},
	} {
		cluster.fail = c.err
		check(c.err, c.code)
		cluster.fail = fmt.Errorf("forwarded: %w", remoteAdminError(c.err))
		check(c.err, c.code)
	}
	if err := adminError(remoteAdminError(placement.ErrLast)); !errors.Is(rpctypes.Error(err), rpctypes.ErrMemberNotEnoughStarted) {
		t.Errorf("etcd's clients are told %v", err)
	}
	if text := adminError(fmt.Errorf("%w: n9", placement.ErrUnknownMember)).Error(); !strings.HasSuffix(text, "desc = kvd: no such member: n9") {
		t.Error(text)
	}
}

// A caller hears why nobody answers before its own patience ends.
func TestAdministrationSaysInTimeThatNobodyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, patience := range []time.Duration{time.Second, adminPatience, time.Hour} {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := new(Node).overview(ctx)
			if s := status.Convert(err); ctx.Err() != nil || s.Code() != codes.Unavailable || !strings.Contains(s.Message(), "group 0, which has the cluster map, does not answer: this node is starting") {
				t.Errorf("patience %v (%v): %v", patience, ctx.Err(), err)
			}
		}
	})
}
