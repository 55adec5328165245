package server

import (
	"context"
	"encoding/binary"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/shard"
)

// Methods of the node-to-node protocol for leases. They go to the leader of a group, which is the lease's home, but for
// methodLeaseKeys. Requests and answers, beside what forward.go says, in big endian:
//
//	request: version 1, group 8, timeout 4 (ms) | body
//	answer:  version 1, code 1 | body
//
//	renew:  ids, 8 each                  -> revision 8, and for each id its TTL 8
//	finish: id 8                         -> revision 8
//	look:   id 8, 1 if keys are wanted 1 -> LeaseTimeToLiveResponse
//	keys:   id 8                         -> LeaseTimeToLiveResponse that has keys only
//	list:                                -> LeaseLeasesResponse
const (
	methodLeaseRenew  = "lease.renew"
	methodLeaseFinish = "lease.finish"
	methodLeaseLook   = "lease.look"
	methodLeaseKeys   = "lease.keys"
	methodLeaseList   = "lease.list"

	leaseHeader = 13
)

func (l *leases) handlers() map[string]HandlerFunc {
	return map[string]HandlerFunc{
		methodLeaseRenew:  l.handle(l.handleRenew),
		methodLeaseFinish: l.handle(l.handleFinish),
		methodLeaseLook:   l.handle(l.handleLook),
		methodLeaseKeys:   l.handle(l.handleKeys),
		methodLeaseList:   l.handle(l.handleList),
	}
}

// handle is for a method's part that is its own. Its errors are those of Replica.
func (l *leases) handle(serve func(ctx context.Context, group uint64, replica Replica, body []byte) ([]byte, error)) HandlerFunc {
	r := l.router
	return r.guarded(func(ctx context.Context, _ string, payload []byte) ([]byte, error) {
		if len(payload) < leaseHeader || payload[0] != protocolVersion {
			return answer(codeMalformed), nil
		}
		group := binary.BigEndian.Uint64(payload[1:])
		replica := r.ofKeys(group)
		if replica == nil {
			return r.decline(group, nil, shard.ErrNotLeader), nil
		}
		ctx, cancel := withMost(ctx, binary.BigEndian.Uint32(payload[9:]))
		defer cancel()
		body, err := serve(ctx, group, replica, payload[leaseHeader:])
		switch {
		case err == nil:
			return append(answer(codeOK), body...), nil
		case isRefusal(err):
			return answer(codeRefused, encodeRefusal(err)...), nil
		}
		return r.decline(group, replica, err), nil
	})
}

// ask calls a node that is thought to lead the group. What the answer's error is worth onLeader knows.
func (l *leases) ask(ctx context.Context, group uint64, node, method string, body []byte) ([]byte, error) {
	payload := make([]byte, leaseHeader, leaseHeader+len(body))
	payload[0] = protocolVersion
	binary.BigEndian.PutUint64(payload[1:], group)
	binary.BigEndian.PutUint32(payload[9:], timeoutMillis(ctx))
	c, reply, err := l.router.ask(ctx, group, node, method, append(payload, body...))
	switch {
	case err != nil:
		return nil, err
	case c == codeRefused:
		return nil, decodeRefusal(reply)
	case c != codeOK:
		return nil, c.err()
	}
	return reply, nil
}

func (l *leases) handleRenew(ctx context.Context, group uint64, replica Replica, body []byte) ([]byte, error) {
	if len(body)%8 != 0 || len(body) == 0 || len(body) > 8*maxRenewals {
		return nil, errMalformed
	}
	ids := make([]int64, 0, len(body)/8)
	for ; len(body) > 0; body = body[8:] {
		ids = append(ids, idOf(body))
	}
	out, err := l.renewHere(ctx, group, replica, ids)
	if err != nil {
		return nil, err
	}
	reply := appendID(nil, out.revision)
	for _, ttl := range out.ttls {
		reply = appendID(reply, ttl)
	}
	return reply, nil
}

func (l *leases) renewThere(ctx context.Context, group uint64, node string, ids []int64) (renewals, error) {
	var body []byte
	for _, id := range ids {
		body = appendID(body, id)
	}
	reply, err := l.ask(ctx, group, node, methodLeaseRenew, body)
	if err != nil {
		return renewals{}, err
	}
	if len(reply) != 8+8*len(ids) {
		return renewals{}, errBadAnswer
	}
	out := renewals{revision: idOf(reply)}
	for reply = reply[8:]; len(reply) > 0; reply = reply[8:] {
		out.ttls = append(out.ttls, idOf(reply))
	}
	return out, nil
}

func (l *leases) handleFinish(ctx context.Context, group uint64, replica Replica, body []byte) ([]byte, error) {
	if len(body) != 8 {
		return nil, errMalformed
	}
	revision, err := l.finishHere(ctx, group, replica, idOf(body))
	return appendID(nil, revision), err
}

func (l *leases) finishThere(ctx context.Context, group uint64, node string, id int64) (int64, error) {
	reply, err := l.ask(ctx, group, node, methodLeaseFinish, appendID(nil, id))
	switch {
	case err != nil:
		return 0, err
	case len(reply) != 8:
		return 0, errBadAnswer
	}
	return idOf(reply), nil
}

func (l *leases) handleLook(ctx context.Context, group uint64, replica Replica, body []byte) ([]byte, error) {
	if len(body) != 9 || body[8] > 1 {
		return nil, errMalformed
	}
	resp, err := l.look(ctx, group, replica, idOf(body), body[8] == 1)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(resp)
}

func (l *leases) lookThere(ctx context.Context, group uint64, node string, id int64, keys bool) (*pb.LeaseTimeToLiveResponse, error) {
	body := append(appendID(nil, id), 0)
	if keys {
		body[8] = 1
	}
	resp := &pb.LeaseTimeToLiveResponse{}
	if err := l.askFor(ctx, group, node, methodLeaseLook, body, resp); err != nil {
		return nil, err
	}
	if resp.Header == nil {
		return nil, errBadAnswer
	}
	return resp, nil
}

func (l *leases) handleKeys(ctx context.Context, _ uint64, replica Replica, body []byte) ([]byte, error) {
	if len(body) != 8 {
		return nil, errMalformed
	}
	keys, err := l.keysHere(ctx, replica, idOf(body))
	if err != nil {
		return nil, err
	}
	return proto.Marshal(&pb.LeaseTimeToLiveResponse{Keys: keys})
}

func (l *leases) keysThere(ctx context.Context, group uint64, node string, id int64) ([][]byte, error) {
	resp := &pb.LeaseTimeToLiveResponse{}
	err := l.askFor(ctx, group, node, methodLeaseKeys, appendID(nil, id), resp)
	return resp.Keys, err
}

func (l *leases) handleList(ctx context.Context, _ uint64, replica Replica, body []byte) ([]byte, error) {
	if len(body) != 0 {
		return nil, errMalformed
	}
	resp, err := l.listHere(ctx, replica)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(resp)
}

func (l *leases) listThere(ctx context.Context, group uint64, node string) (*pb.LeaseLeasesResponse, error) {
	resp := &pb.LeaseLeasesResponse{}
	if err := l.askFor(ctx, group, node, methodLeaseList, nil, resp); err != nil {
		return nil, err
	}
	if resp.Header == nil {
		return nil, errBadAnswer
	}
	return resp, nil
}

// askFor is ask for an answer that is a message.
func (l *leases) askFor(ctx context.Context, group uint64, node, method string, body []byte, resp proto.Message) error {
	reply, err := l.ask(ctx, group, node, method, body)
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(reply, resp); err != nil {
		return errors.Join(errBadAnswer, err)
	}
	return nil
}

func appendID(b []byte, id int64) []byte { return binary.BigEndian.AppendUint64(b, uint64(id)) }

func idOf(b []byte) int64 { return int64(binary.BigEndian.Uint64(b)) }
