package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// Whatever a node sends about leases, the answer is one, and nothing gets into the log that would halt a state machine.
func TestMalformedCallsOfLeases(t *testing.T) {
	w := newWorld(t, 3, 3, 1, nil)
	handlers := w.servers["n1"].Handlers() // leads group 1
	call := func(group uint64, body ...byte) []byte {
		b := make([]byte, leaseHeader)
		b[0] = protocolVersion
		binary.BigEndian.PutUint64(b[1:], group)
		binary.BigEndian.PutUint32(b[9:], 1000)
		return append(b, body...)
	}
	id := appendID(nil, 7)
	proposal := func(space fsm.Space, data []byte) []byte {
		b := make([]byte, proposeHeader)
		b[0], b[2] = protocolVersion, byte(space)
		binary.BigEndian.PutUint64(b[3:], 1)
		binary.BigEndian.PutUint32(b[11:], 1000)
		return append(b, data...)
	}
	raft := func(r *pb.InternalRaftRequest) []byte {
		data, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return proposal(fsm.User, data)
	}
	grant := func(id, ttl int64) []byte {
		return raft(&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{ID: id, TTL: ttl}})
	}
	register := fsm.LeaseCommand{Kind: fsm.LeaseRegister, ID: 7, Group: 2}.Request().Data
	for name, test := range map[string]struct {
		method  string
		payload []byte
		want    code
	}{
		"renew":                    {methodLeaseRenew, call(1, id...), codeOK},
		"renew nothing":            {methodLeaseRenew, call(1), codeMalformed},
		"renew half an id":         {methodLeaseRenew, call(1, id[:4]...), codeMalformed},
		"renew too many":           {methodLeaseRenew, call(1, bytes.Repeat(id, maxRenewals+1)...), codeMalformed},
		"renew of another version": {methodLeaseRenew, append([]byte{9}, call(1, id...)[1:]...), codeMalformed},
		"renew of the map":         {methodLeaseRenew, call(0, id...), codeNotLeader},
		"renew elsewhere":          {methodLeaseRenew, call(2, id...), codeNotLeader},
		"empty":                    {methodLeaseRenew, nil, codeMalformed},
		"finish":                   {methodLeaseFinish, call(1, id...), codeOK},
		"finish two":               {methodLeaseFinish, call(1, append(id[:8:8], id...)...), codeMalformed},
		"look":                     {methodLeaseLook, call(1, append(id[:8:8], 1)...), codeOK},
		"look at what":             {methodLeaseLook, call(1, append(id[:8:8], 2)...), codeMalformed},
		"look at half":             {methodLeaseLook, call(1, id...), codeMalformed},
		"keys":                     {methodLeaseKeys, call(1, id...), codeOK},
		"keys of nothing":          {methodLeaseKeys, call(1), codeMalformed},
		"list":                     {methodLeaseList, call(1), codeOK},
		"list of one":              {methodLeaseList, call(1, id...), codeMalformed},
		"grant":                    {methodPropose, grant(8, 60), codeOK},
		"grant without id":         {methodPropose, grant(0, 60), codeMalformed},
		"grant without time":       {methodPropose, grant(8, 0), codeMalformed},
		"grant for too long":       {methodPropose, grant(8, maxLeaseTTL+1), codeMalformed},
		"checkpoint":               {methodPropose, raft(&pb.InternalRaftRequest{LeaseCheckpoint: &pb.LeaseCheckpointRequest{}}), codeMalformed},
		"revoke":                   {methodPropose, raft(&pb.InternalRaftRequest{LeaseRevoke: &pb.LeaseRevokeRequest{ID: 7}}), codeRefused},
		"register":                 {methodPropose, proposal(fsm.LeaseCommands, register), codeRefused},
		"register, cut off":        {methodPropose, proposal(fsm.LeaseCommands, register[:len(register)-1]), codeMalformed},
		"a step of no kind":        {methodPropose, proposal(fsm.LeaseCommands, append([]byte{99}, register[1:]...)), codeMalformed},
		"a step as a write":        {methodPropose, proposal(fsm.User, register), codeMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			reply, err := handlers[test.method](t.Context(), "n2", test.payload)
			if err != nil || len(reply) < answerHeader || code(reply[1]) != test.want {
				t.Fatalf("reply %v, %v; want code %d", reply, err, test.want)
			}
		})
	}
}

// What a node answers is not trusted either.
func TestBadAnswersAboutLeases(t *testing.T) {
	for name, body := range map[string][]byte{"nothing": nil, "garbage": []byte("garbage!!"), "too short": {1, 2, 3}} {
		t.Run(name, func(t *testing.T) {
			peers := &fakePeers{}
			bad := func(context.Context, string, []byte) ([]byte, error) { return answer(codeOK, body...), nil }
			for _, method := range []string{methodLeaseRenew, methodLeaseFinish, methodLeaseLook, methodLeaseList} {
				peers.serve("n2", method, bad)
			}
			s := newTestServer(t, testConfig(newFakeReplica(openStore(t), shard.Leader{Node: "n2", ID: "n2/1", Term: 7}), peers))
			l := &s.router.leases
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err1 := l.renewThere(ctx, userGroup, "n2", []int64{1, 2})
			_, err2 := l.finishThere(ctx, userGroup, "n2", 1)
			_, err3 := l.lookThere(ctx, userGroup, "n2", 1, true)
			_, err4 := l.listThere(ctx, userGroup, "n2")
			for _, err := range []error{err1, err2, err3, err4} {
				if !errors.Is(err, errBadAnswer) {
					t.Error(err)
				}
			}
		})
	}
}
