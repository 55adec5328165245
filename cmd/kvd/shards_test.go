package main

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/server/kvdpb"
)

func dataOn(node, id string, state string, match uint64) *kvdpb.Replica {
	return &kvdpb.Replica{Id: id, Node: node, Role: "data", State: state, Alive: true, Match: match, Commit: 20}
}

// testView is a cluster in which n3 is down and one shard moves.
func testView() *kvdpb.ShardsResponse {
	down := dataOn("n3", "n3/3", "voter", 7)
	down.Alive = false
	return &kvdpb.ShardsResponse{
		Config: &kvdpb.ClusterConfig{Strategy: "consistent", Shards: 3, ReplicationFactor: 2, Witnesses: "auto"},
		Nodes: []*kvdpb.Node{
			{Name: "n1", State: "alive", Weight: 1, Shards: 3, Leaders: 2, DiskFree: 5_000_000_000},
			{Name: "n2", State: "suspect", Weight: 0.5, Shards: 1},
			{Name: "n3", State: "down", Weight: 1, Shards: 1, Waits: "n3 still has replicas of 1 shard: 1"},
		},
		Shards: []*kvdpb.Shard{
			{
				Number: 0, Leader: "n1", State: "ok", Tolerates: 1,
				Replicas: []*kvdpb.Replica{dataOn("n1", "n1/1", "voter", 20), dataOn("n2", "n2/1", "voter", 20), {Id: "n4/1w", Node: "n4", Role: "witness", State: "voter", Alive: true}},
			},
			{
				Number: 1, Leader: "n1", State: "moving", Tolerates: 0,
				Replicas: []*kvdpb.Replica{dataOn("n1", "n1/2", "voter", 20), down, dataOn("n2", "n2/2", "learner", 15)},
				Target:   []*kvdpb.TargetReplica{{Node: "n1", Role: "data"}, {Node: "n2", Role: "data"}, {Node: "n4", Role: "witness"}},
				Why:      []string{"n3 is down since 40 s: its copy is made on n2.", "Nothing needs to be done."},
			},
			{Number: 2, State: "no quorum", Replicas: []*kvdpb.Replica{{Id: "n5/9", Node: "n5", Role: "data", State: "lost"}, {Id: "n6/8", Node: "n6", Role: "data", State: "removing"}, {Id: "n7/8", Node: "n7", Role: "data", State: "unknown", Alive: true}, {Id: "n8/8", Node: "n8", Role: "data", State: "unknown"}}},
		},
	}
}

func fakeWithShards(t *testing.T, views ...*kvdpb.ShardsResponse) *fakeServer {
	f := startFake(t)
	f.views = views
	return f
}

// wantOutput runs a command and compares what it prints.
func wantOutput(t *testing.T, code int, want string, args ...string) {
	t.Helper()
	got, out, errOut := kvd(t, "", args...)
	if got != code || out != strings.TrimPrefix(want, "\n") {
		t.Errorf("%v: exit code %d, want %d; %s\nprinted\n%s\nwant\n%s", args, got, code, errOut, out, want)
	}
}

func TestShards(t *testing.T) {
	f := fakeWithShards(t, testView())
	wantOutput(t, exitOK, `
SHARD  STATE      LEADER  DATA                                   WITNESSES   SURVIVES
0      ok         n1      n1 n2                                  n4          1
1      moving     n1      n1 n3(down) n2(joining,5 behind)       n4(wanted)  0
2      no quorum  -       n5(lost) n6(leaving,down) n7 n8(down)  -           -

3 shards with 2 copies of each key: 1 ok, 1 moving, 1 no quorum. Keys of 1 shard cannot be read or written now
`, "shards", "--endpoints", f.addr)
	wantOutput(t, exitOK, `
┌───────┬────────┬────────┬──────────────────────────────────┬────────────┬──────────┐
│ SHARD │ STATE  │ LEADER │ DATA                             │ WITNESSES  │ SURVIVES │
├───────┼────────┼────────┼──────────────────────────────────┼────────────┼──────────┤
│ 1     │ moving │ n1     │ n1 n3(down) n2(joining,5 behind) │ n4(wanted) │ 0        │
└───────┴────────┴────────┴──────────────────────────────────┴────────────┴──────────┘
`, "shards", "-w", "table", "--endpoints", fakeWithShards(t, onlyShard(testView(), 1)).addr)
	wantOutput(t, exitOK, `
{"config":{"strategy":"consistent","shards":3,"replication_factor":2,"witnesses":"auto"},"nodes":[{"name":"n1","state":"alive","weight":1,"shards":0,"leaders":0,"disk_free":0}],"shards":[{"number":0,"leader":"n1","state":"ok","replicas":[{"id":"n1/1","node":"n1","role":"data","state":"voter","alive":true,"match":20,"commit":20}],"target":[],"tolerates":1,"why":[]}]}
`, "shards", "-w", "json", "--endpoints", fakeWithShards(t, &kvdpb.ShardsResponse{
		Config: testView().Config, Nodes: []*kvdpb.Node{{Name: "n1", State: "alive", Weight: 1}},
		Shards: []*kvdpb.Shard{{Leader: "n1", State: "ok", Tolerates: 1, Replicas: []*kvdpb.Replica{dataOn("n1", "n1/1", "voter", 20)}}},
	}).addr)
	if _, out, _ := kvd(t, "", "shards", "--not-ok", "--endpoints", f.addr); strings.Contains(out, "\n0 ") || !strings.Contains(out, "\n1 ") {
		t.Errorf("--not-ok prints\n%s", out)
	}
	calm := fakeWithShards(t, onlyShard(testView(), 0))
	wantOutput(t, exitOK, "1 shard with 2 copies of each key: 1 ok. Each survives 1 more node failure\n", "shards", "--not-ok", "--endpoints", calm.addr)
	full := startFake(t)
	wantOutput(t, exitOK, noShards+"\n", "shards", "--endpoints", full.addr)
	wantOutput(t, exitOK, `{"config":null,"nodes":[],"shards":[]}`+"\n", "shards", "-w", "json", "--endpoints", full.addr)
}

func onlyShard(view *kvdpb.ShardsResponse, number int) *kvdpb.ShardsResponse {
	view.Shards = view.Shards[number : number+1]
	return view
}

func TestSummary(t *testing.T) {
	view := testView()
	view.Shards = view.Shards[:1]
	for _, c := range []struct {
		change func()
		want   string
	}{
		{func() {}, "1 shard with 2 copies of each key: 1 ok. Each survives 1 more node failure"},
		{func() { view.Shards[0].Tolerates = 2 }, "1 shard with 2 copies of each key: 1 ok. Each survives 2 more node failures"},
		{func() { view.Shards = append(view.Shards, testView().Shards[1]) }, "2 shards with 2 copies of each key: 1 ok, 1 moving. One more node failure stops some of them"},
		{func() { view.Shards = view.Shards[:1]; view.Nodes[2].State = "leaving"; view.Nodes = view.Nodes[1:] }, "1 shard with one copy of each key (2 are wanted: add nodes): 1 ok. Each survives 2 more node failures"},
		{func() { view.Shards = nil }, "the shards have not been made yet"},
	} {
		c.change()
		if got := summary(overviewOf(view)); got != c.want {
			t.Errorf("summed up as %q, want %q", got, c.want)
		}
	}
}

func TestExplain(t *testing.T) {
	f := fakeWithShards(t, testView())
	wantOutput(t, exitOK, `
shard 1 of 3 (group 2): moving, survives 0 more node failures

NODE  REPLICA  ROLE     STATE    ALIVE  BEHIND  WANTED
n1    n1/2     data     leader   yes    0       yes
n3    n3/3     data     voter    no     13      no
n2    n2/2     data     learner  yes    5       yes
n4    -        witness  -        -      -       yes

- n3 is down since 40 s: its copy is made on n2.
- Nothing needs to be done.
`, "explain", "1", "--endpoints", f.addr)
	wantOutput(t, exitOK, `
shard 2 of 3 (group 3): no quorum

┌──────┬─────────┬──────┬──────────┬───────┬────────┬────────┐
│ NODE │ REPLICA │ ROLE │ STATE    │ ALIVE │ BEHIND │ WANTED │
├──────┼─────────┼──────┼──────────┼───────┼────────┼────────┤
│ n5   │ n5/9    │ data │ lost     │ no    │ -      │ no     │
│ n6   │ n6/8    │ data │ removing │ no    │ -      │ no     │
│ n7   │ n7/8    │ data │ unknown  │ yes   │ -      │ no     │
│ n8   │ n8/8    │ data │ unknown  │ no    │ -      │ no     │
└──────┴─────────┴──────┴──────────┴───────┴────────┴────────┘
`, "explain", "2", "-w", "table", "--endpoints", f.addr)
	if _, out, _ := kvd(t, "", "explain", "1", "-w", "json", "--endpoints", f.addr); !strings.HasPrefix(out, `{"number":1,"leader":"n1","state":"moving"`) || !strings.Contains(out, `"why":["n3 is down`) {
		t.Errorf("explain -w json printed %s", out)
	}
	wantOutput(t, exitFailed, "", "explain", "9", "--endpoints", f.addr)
	for _, bad := range []string{"x", "1.5", "99999999999"} {
		wantOutput(t, exitUsage, "", "explain", bad, "--endpoints", f.addr)
	}
}

func TestLocate(t *testing.T) {
	f := fakeWithShards(t, testView())
	wantOutput(t, exitOK, `
key        {user}
hashed by  user
shard      1 of 3 (group 2)
state      moving
leader     n1
data       n1 n3(down) n2(joining,5 behind)
witnesses  n4(wanted)
`, "locate", "{user}", "--endpoints", f.addr)
	if _, out, _ := kvd(t, "", "locate", "k", "-w", "table", "--endpoints", f.addr); !strings.Contains(out, "│ hashed by │ the whole key") {
		t.Errorf("a key without a tag: %s", out)
	}
	if _, out, _ := kvd(t, "", "locate", "k", "-w", "json", "--endpoints", f.addr); !strings.HasPrefix(out, `{"key":"aw==","tag":"aw==","shard":1,"group":2,"place":{"number":1,`) {
		t.Errorf("locate -w json printed %s", out)
	}
	wantOutput(t, exitOK, noShards+"\n", "locate", "k", "--endpoints", startFake(t).addr)
	f.fail = status.Error(codes.Unavailable, "no leader")
	if code, _, errOut := kvd(t, "", "locate", "k", "--endpoints", f.addr); code != exitUnavailable || !strings.Contains(errOut, "the key is in shard 1, but") {
		t.Errorf("without a leader: %d, %s", code, errOut)
	}
}

func TestStatusOfShards(t *testing.T) {
	view := testView()
	view.Shards = view.Shards[:2]
	f := fakeWithShards(t, view)
	wantOutput(t, exitOK, strings.ReplaceAll(`
NODE  ENDPOINT         ROLE    STATE  SHARDS  LEADS  WEIGHT  REVISION  DB SIZE  DISK FREE  HEALTH
n1    127.0.0.1:PORTS  leader  alive  3       2      1       7         20 kB    5.0 GB     ok

2 shards with 2 copies of each key: 1 ok, 1 moving. One more node failure stops some of them.
n3 still has replicas of 1 shard: 1.
`, "127.0.0.1:PORTS", f.addr), "status", "--endpoints", f.addr)
	if _, out, _ := kvd(t, "", "status", "-w", "json", "--endpoints", f.addr); !strings.Contains(out, `"Node":{"name":"n1","state":"alive","weight":1,"shards":3,"leaders":2,"disk_free":5000000000}`) {
		t.Errorf("status -w json printed %s", out)
	}
	f.fail = status.Error(codes.Unavailable, "no leader of group 0")
	if _, out, _ := kvd(t, "", "status", "--endpoints", f.addr); !strings.Contains(out, "where the shards are is not known now: no leader of group 0") {
		t.Errorf("without a leader: %s", out)
	}
	stopped := fakeWithShards(t, testView())
	if code, _, errOut := kvd(t, "", "status", "--endpoints", stopped.addr); code != exitUnhealthy || !strings.Contains(errOut, "1 of 3 shards (2) do not serve: kvd explain 2 says why") {
		t.Errorf("a shard stands still: exit code %d, %s", code, errOut)
	}
}

func TestMemberRemove(t *testing.T) {
	waiting, other, gone := testView(), testView(), testView()
	waiting.Nodes[1].Waits, other.Nodes[1].Waits = "n2 still has replicas", ""
	gone.Nodes = gone.Nodes[:1]
	f := fakeWithShards(t, waiting, waiting, other, gone)
	code, out, errOut := kvd(t, "", "member", "remove", "n2", "--force", "--endpoints", f.addr)
	out = strings.Replace(out, "n2 is leaving\n", "", 1) // said only if it takes long
	if code != exitOK || !strings.HasPrefix(out, "n2 still has replicas\nn2 has left the cluster after ") ||
		!strings.HasSuffix(out, ": its process ends by itself, its directory can be deleted\n") {
		t.Errorf("exit code %d, %s, printed %s", code, errOut, out)
	}
	if !proto.Equal(f.last(), &kvdpb.RemoveMemberRequest{Name: "n2", Force: true}) {
		t.Errorf("asked %v", f.last())
	}
	f.views = []*kvdpb.ShardsResponse{gone}
	wantOutput(t, exitOK, `{"member":"n2","state":"left"}`+"\n", "member", "remove", "a2", "-w", "json", "--endpoints", f.addr)
	if !proto.Equal(f.last(), &kvdpb.RemoveMemberRequest{Name: "n2"}) {
		t.Errorf("by id: asked %v", f.last())
	}
	wantOutput(t, exitOK, "n2 is leaving: kvd status shows how far it is\n", "member", "remove", "n2", "--no-wait", "--endpoints", f.addr)
	wantOutput(t, exitOK, `{"member":"n1","state":"leaving"}`+"\n", "member", "replace", "n1", "n2", "--no-wait", "-w", "json", "--endpoints", f.addr)
	if !proto.Equal(f.last(), &kvdpb.ReplaceMemberRequest{Old: "n1", New: "n2"}) {
		t.Errorf("asked %v", f.last())
	}
	wantOutput(t, exitUsage, "", "member", "remove", "n9", "--endpoints", f.addr)
	wantOutput(t, exitUsage, "", "member", "replace", "n1", "n9", "--endpoints", f.addr)
	wantOutput(t, exitUsage, "", "member", "remove", "n2", "-w", "table", "--endpoints", f.addr)
	f.refuse = status.Error(codes.FailedPrecondition, "kvd: 1 node would be left")
	if code, _, errOut := kvd(t, "", "member", "remove", "n2", "--endpoints", f.addr); code != exitFailed || !strings.Contains(errOut, "1 node would be left") {
		t.Errorf("a refusal: exit code %d, %s", code, errOut)
	}
}

// Ctrl-C ends the waiting, and says that the leaving goes on; a node without an answer is waited for.
func TestMemberRemoveInterrupted(t *testing.T) {
	view := testView()
	view.Nodes[1].Waits = "for ever"
	f := fakeWithShards(t, view)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for _, isRemoval := f.last().(*kvdpb.RemoveMemberRequest); !isRemoval; _, isRemoval = f.last().(*kvdpb.RemoveMemberRequest) {
			<-f.asked
		}
		cancel()
	}()
	code, _, errOut := kvdUntil(ctx, "", "member", "remove", "n2", "--endpoints", f.addr)
	if code != exitInterrupted {
		t.Errorf("exit code %d, %s", code, errOut)
	}
}

func TestEndpointsWithout(t *testing.T) {
	f := startFake(t)
	members, _ := f.MemberList(t.Context(), nil)
	got := endpointsWithout(members.Members, "n2", []string{f.addr, "10.0.0.9:1"})
	if strings.Join(got, " ") != "10.0.0.9:1 "+f.addr {
		t.Errorf("without n2: %v", got)
	}
	if got := endpointsWithout(members.Members, "n1", []string{f.addr, "10.0.0.9:1"}); strings.Join(got, " ") != "10.0.0.9:1" {
		t.Errorf("without n1: %v", got)
	}
}
