package main

import (
	"bytes"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func golden(t *testing.T, what string, p printer, print func(*printer) error, want string) {
	t.Helper()
	var out bytes.Buffer
	p.out = &out
	if err := print(&p); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if want = strings.TrimPrefix(want, "\n"); out.String() != want {
		t.Errorf("%s: printed\n%s\nwant\n%s", what, out.String(), want)
	}
}

func TestPrintedPairs(t *testing.T) {
	header := &pb.ResponseHeader{ClusterId: 1, MemberId: 2, Revision: 9, RaftTerm: 3}
	a := &mvccpb.KeyValue{Key: []byte("a"), Value: []byte("<1>"), CreateRevision: 2, ModRevision: 5, Version: 3, Lease: 255}
	b := &mvccpb.KeyValue{Key: []byte("b"), Value: []byte("\x00ü"), CreateRevision: 4, ModRevision: 4, Version: 1}
	both := &pb.RangeResponse{Header: header, Kvs: []*mvccpb.KeyValue{a, b}, Count: 7, More: true}
	get := func(countOnly bool) func(p *printer) error {
		return func(p *printer) error { return p.get(both, countOnly) }
	}
	golden(t, "get", printer{format: formatSimple}, get(false), "a\n<1>\nb\n\x00ü\n")
	golden(t, "get --hex", printer{format: formatSimple, hex: true}, get(false), `
\x61
\x3c\x31\x3e
\x62
\x00\xc3\xbc
`)
	golden(t, "get --print-value-only", printer{format: formatSimple, valueOnly: true}, get(false), "<1>\n\x00ü\n")
	golden(t, "get --count-only", printer{format: formatSimple}, get(true), "7\n")
	golden(t, "get -w json", printer{format: formatJSON}, get(false), `
{"header":{"cluster_id":1,"member_id":2,"revision":9,"raft_term":3},"kvs":[{"key":"YQ==","create_revision":2,"mod_revision":5,"version":3,"value":"PDE+","lease":255},{"key":"Yg==","create_revision":4,"mod_revision":4,"version":1,"value":"AMO8"}],"more":true,"count":7}
`)
	both.Kvs[1].Value = []byte("ü")
	golden(t, "get -w table", printer{format: formatTable}, get(false), `
┌─────┬───────┬─────────┬──────────┬─────────┬───────┐
│ KEY │ VALUE │ CREATED │ MODIFIED │ VERSION │ LEASE │
├─────┼───────┼─────────┼──────────┼─────────┼───────┤
│ a   │ <1>   │ 2       │ 5        │ 3       │ ff    │
│ b   │ ü     │ 4       │ 4        │ 1       │ 0     │
└─────┴───────┴─────────┴──────────┴─────────┴───────┘
`)
	golden(t, "put", printer{format: formatSimple}, func(p *printer) error { return p.put(&pb.PutResponse{}) }, "OK\n")
	golden(t, "put --prev-kv", printer{format: formatSimple}, func(p *printer) error { return p.put(&pb.PutResponse{PrevKv: a}) }, "OK\na\n<1>\n")
	golden(t, "del --prev-kv", printer{format: formatSimple}, func(p *printer) error {
		return p.del(&pb.DeleteRangeResponse{Deleted: 1, PrevKvs: []*mvccpb.KeyValue{a}})
	}, "1\na\n<1>\n")
}

func TestPrintedTransactions(t *testing.T) {
	r := &pb.TxnResponse{Succeeded: true, Responses: []*pb.ResponseOp{
		{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}},
		{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: []byte("a"), Value: []byte("1")}}, Count: 1}}},
		{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: &pb.DeleteRangeResponse{Deleted: 4}}},
	}}
	txn := func(p *printer) error { return p.txn(r) }
	golden(t, "txn", printer{format: formatSimple}, txn, "SUCCESS\n\nOK\n\na\n1\n\n4\n")
	golden(t, "txn -w json", printer{format: formatJSON}, txn, `
{"succeeded":true,"responses":[{"Response":{"response_put":{}}},{"Response":{"response_range":{"kvs":[{"key":"YQ==","value":"MQ=="}],"count":1}}},{"Response":{"response_delete_range":{"deleted":4}}}]}
`)
	golden(t, "failed txn", printer{format: formatSimple}, func(p *printer) error { return p.txn(&pb.TxnResponse{}) }, "FAILURE\n")
	unknown := &pb.TxnResponse{Responses: []*pb.ResponseOp{{}}}
	if err := (&printer{out: new(bytes.Buffer), format: formatSimple}).txn(unknown); err == nil {
		t.Error("an operation of unknown type is printed as if it were known")
	}
}

func TestPrintedMembers(t *testing.T) {
	list := &clientv3.MemberListResponse{Header: &pb.ResponseHeader{ClusterId: 255, MemberId: 16}, Members: []*pb.Member{
		{ID: 0xa1, Name: "n1", PeerURLs: []string{"http://a:1", "http://b:1"}, ClientURLs: []string{"http://a:2"}},
		{ID: 0xa2, IsLearner: true},
	}}
	members := func(p *printer) error { return p.members(list) }
	golden(t, "member list", printer{format: formatSimple}, members, `
a1, started, n1, http://a:1,http://b:1, http://a:2, false
a2, unstarted, , , , true
`)
	golden(t, "member list -w json --hex", printer{format: formatJSON, hex: true}, members, `
{"header":{"cluster_id":"ff","member_id":"10"},"members":[{"ID":"a1","name":"n1","peerURLs":["http://a:1","http://b:1"],"clientURLs":["http://a:2"]},{"ID":"a2","isLearner":true}]}
`)
	golden(t, "member list -w table", printer{format: formatTable}, members, `
┌────┬───────────┬──────┬───────────────────────┬──────────────┬────────────┐
│ ID │ STATUS    │ NAME │ PEER ADDRS            │ CLIENT ADDRS │ IS LEARNER │
├────┼───────────┼──────┼───────────────────────┼──────────────┼────────────┤
│ a1 │ started   │ n1   │ http://a:1,http://b:1 │ http://a:2   │ false      │
│ a2 │ unstarted │      │                       │              │ true       │
└────┴───────────┴──────┴───────────────────────┴──────────────┴────────────┘
`)
}

func TestPrintedStatus(t *testing.T) {
	status := func(member uint64, learner bool, errs ...string) *pb.StatusResponse {
		return &pb.StatusResponse{Header: &pb.ResponseHeader{MemberId: member, Revision: 7}, Leader: 0xa1, RaftTerm: 3,
			RaftIndex: 12, RaftAppliedIndex: 11, DbSize: 20480, IsLearner: learner, Errors: errs}
	}
	nodes := []nodeStatus{
		{name: "n1", endpoint: "a:1", resp: status(0xa1, false)},
		{name: "n2", endpoint: "b:1", resp: status(0xa2, false, "disk is slow")},
		{name: "n3", endpoint: "c:1", resp: status(0xa3, true)},
		{endpoint: "d:1", err: errTest},
	}
	print := func(p *printer) error { return p.status(nodes, nil) }
	golden(t, "status", printer{format: formatSimple}, print, `
NODE  ENDPOINT  ID  ROLE      TERM  REVISION  INDEX  APPLIED  DB SIZE  HEALTH
n1    a:1       a1  leader    3     7         12     11       20 kB    ok
n2    b:1       a2  follower  3     7         12     11       20 kB    disk is slow
n3    c:1       a3  learner   3     7         12     11       20 kB    ok
-     d:1       -   -         -     -         -      -        -        planted
`)
	golden(t, "status -w table", printer{format: formatTable}, func(p *printer) error { return p.status(nodes[3:], nil) }, `
┌──────┬──────────┬────┬──────┬──────┬──────────┬───────┬─────────┬─────────┬─────────┐
│ NODE │ ENDPOINT │ ID │ ROLE │ TERM │ REVISION │ INDEX │ APPLIED │ DB SIZE │ HEALTH  │
├──────┼──────────┼────┼──────┼──────┼──────────┼───────┼─────────┼─────────┼─────────┤
│ -    │ d:1      │ -  │ -    │ -    │ -        │ -     │ -       │ -       │ planted │
└──────┴──────────┴────┴──────┴──────┴──────────┴───────┴─────────┴─────────┴─────────┘
`)
	golden(t, "status -w json", printer{format: formatJSON}, func(p *printer) error { return p.status(nodes[2:], nil) }, `
[{"Endpoint":"c:1","Name":"n3","Status":{"header":{"member_id":163,"revision":7},"dbSize":20480,"leader":161,"raftIndex":12,"raftTerm":3,"raftAppliedIndex":11,"isLearner":true}},{"Endpoint":"d:1","Error":"planted"}]
`)
}

func TestCommandsPrint(t *testing.T) {
	f := startFake(t)
	for line, want := range map[string]string{
		"compaction 7":   "compacted revision 7\n",
		"move-leader n2": "Leadership transferred from a1 to a2\n",
		"version":        "kvd version: " + version + "\nAPI version: " + apiVersion + "\n",
		"member list":    "a1, started, n1, http://127.0.0.1:2380, http://" + f.addr + ", false\na2, started, n2, http://10.0.0.2:2380, , false\n",
	} {
		args := strings.Fields(line)
		if line != "version" {
			args = append(args, "--endpoints", f.addr)
		}
		if code, out, errOut := kvd(t, "", args...); code != exitOK || out != want {
			t.Errorf("%s: printed %q and %q with exit code %d, want %q", line, out, errOut, code, want)
		}
	}
	if code, out, _ := kvd(t, "", "health", "--endpoints", f.addr); code != exitOK || !strings.HasPrefix(out, f.addr+" is healthy: successfully committed proposal: took = ") {
		t.Errorf("health: printed %q with exit code %d", out, code)
	}
}

func TestSize(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 9949: "9.9 kB", 9950: "10 kB", 20480: "20 kB", 999_499: "999 kB", 999_500: "1.0 MB",
		2_147_483_648: "2.1 GB", 1 << 62: "4.6 EB",
	} {
		if got := size(bytes); got != want {
			t.Errorf("%d bytes are %q, want %q", bytes, got, want)
		}
	}
}
