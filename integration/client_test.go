package integration

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"kvd/integration/cluster"
)

// etcd's Go client, unchanged, against all nodes in turn: every node answers every request.
func TestGoClient(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	testClient(t, c, goClient{})
	t.Run("many endpoints, balanced, as clients use it", func(t *testing.T) { testFailoverOfAClient(t, c) })
}

// The same client, as unchanged, against shards: what the keys of a test have in braces keeps them in one of them.
func TestGoClientWithShards(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(3, 8, 2, quick...))
	testClient(t, c, goClient{sharded: true})
	t.Run("many endpoints, balanced, as clients use it", func(t *testing.T) { testFailoverOfAClient(t, c) })
}

// goClient tests a client. With shards, revisions grow as well, but may leave some out.
type goClient struct{ sharded bool }

// next reports whether a revision is that of the change after another one.
func (g goClient) next(before, after int64) bool {
	return after == before+1 || g.sharded && after > before
}

// same reports whether a revision is that of an answer which changed nothing since another one.
func (g goClient) same(before, after int64) bool {
	return after == before || g.sharded && after >= before
}

func testClient(t *testing.T, c *cluster.Cluster, g goClient) {
	for _, name := range c.Names() {
		for _, step := range []struct {
			what string
			test func(*testing.T, *clientv3.Client, string)
		}{
			{"put and get", g.testPutGet}, {"ranges", testRanges}, {"delete", g.testDelete},
			{"transactions", g.testTransactions}, {"compaction", testCompaction}, {"refusals", testRefusals}, {"maintenance", testMaintenance},
		} {
			t.Run(step.what+" through "+name, func(t *testing.T) {
				step.test(t, client(t, c, name), "{"+step.what+"/"+name+"}/")
			})
		}
	}
	t.Run("leadership moves", func(t *testing.T) { testMoveLeader(t, c) })
}

func (g goClient) testPutGet(t *testing.T, cl *clientv3.Client, prefix string) {
	ctx, key := liveness(t), prefix+"k"
	first, err := cl.Put(ctx, key, "one")
	must(t, err)
	second, err := cl.Put(ctx, key, "two", clientv3.WithPrevKV())
	must(t, err)
	if !g.next(first.Header.Revision, second.Header.Revision) || string(second.PrevKv.Value) != "one" {
		t.Fatalf("%v, then %v", first, second)
	}
	now, err := cl.Get(ctx, key)
	must(t, err)
	kv := now.Kvs[0]
	if string(kv.Value) != "two" || kv.Version != 2 || kv.CreateRevision != first.Header.Revision || kv.ModRevision != second.Header.Revision {
		t.Fatalf("%v", now)
	}
	then, err := cl.Get(ctx, key, clientv3.WithRev(first.Header.Revision))
	must(t, err)
	if string(then.Kvs[0].Value) != "one" {
		t.Fatalf("%v", then)
	}
	_, err = cl.Put(ctx, key, "", clientv3.WithIgnoreValue())
	must(t, err)
	stale, err := cl.Get(ctx, key, clientv3.WithSerializable())
	must(t, err)
	if len(stale.Kvs) != 1 {
		t.Fatalf("a node has not got what it acknowledged: %v", stale)
	}
	if missing, err := cl.Get(ctx, prefix+"missing"); err != nil || missing.Count != 0 {
		t.Fatalf("%v, %v", missing, err)
	}
}

func testRanges(t *testing.T, cl *clientv3.Client, prefix string) {
	ctx := liveness(t)
	for _, k := range []string{"c", "a", "b", "d"} {
		_, err := cl.Put(ctx, prefix+k, "value of "+k)
		must(t, err)
	}
	keys := func(opts ...clientv3.OpOption) (got string, resp *clientv3.GetResponse) {
		resp, err := cl.Get(ctx, prefix, append([]clientv3.OpOption{clientv3.WithPrefix()}, opts...)...)
		must(t, err)
		for _, kv := range resp.Kvs {
			got += string(kv.Key[len(prefix):])
		}
		return got, resp
	}
	for want, opts := range map[string][]clientv3.OpOption{
		"abcd": nil,
		"dcba": {clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend)},
		"cabd": {clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortAscend)},
		"ab":   {clientv3.WithLimit(2)},
	} {
		if got, resp := keys(opts...); got != want || resp.Count != 4 || resp.More != (len(want) < 4) {
			t.Errorf("got %q (count %d, more %t), want %q", got, resp.Count, resp.More, want)
		}
	}
	if got, resp := keys(clientv3.WithCountOnly()); got != "" || resp.Count != 4 {
		t.Errorf("count only: %v", resp)
	}
	if _, resp := keys(clientv3.WithKeysOnly()); len(resp.Kvs) != 4 || len(resp.Kvs[0].Value) != 0 {
		t.Errorf("keys only: %v", resp)
	}
	if resp, err := cl.Get(ctx, prefix+"b", clientv3.WithRange(prefix+"d")); err != nil || resp.Count != 2 {
		t.Errorf("range: %v, %v", resp, err)
	}
}

func (g goClient) testDelete(t *testing.T, cl *clientv3.Client, prefix string) {
	ctx := liveness(t)
	for _, k := range []string{"a", "b", "c"} {
		_, err := cl.Put(ctx, prefix+k, k)
		must(t, err)
	}
	one, err := cl.Delete(ctx, prefix+"a", clientv3.WithPrevKV())
	must(t, err)
	if one.Deleted != 1 || string(one.PrevKvs[0].Value) != "a" {
		t.Errorf("%v", one)
	}
	rest, err := cl.Delete(ctx, prefix, clientv3.WithPrefix())
	must(t, err)
	if rest.Deleted != 2 || !g.next(one.Header.Revision, rest.Header.Revision) {
		t.Errorf("%v", rest)
	}
	none, err := cl.Delete(ctx, prefix, clientv3.WithPrefix())
	must(t, err)
	if none.Deleted != 0 || !g.same(rest.Header.Revision, none.Header.Revision) {
		t.Errorf("%v", none)
	}
}

func (g goClient) testTransactions(t *testing.T, cl *clientv3.Client, prefix string) {
	ctx, a, b := liveness(t), prefix+"a", prefix+"b"
	put, err := cl.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(a), "=", 0)).
		Then(clientv3.OpPut(a, "1"), clientv3.OpPut(b, "2"), clientv3.OpGet(a)).Commit()
	must(t, err)
	if !put.Succeeded || string(put.Responses[2].GetResponseRange().Kvs[0].Value) != "1" {
		t.Fatalf("%v", put)
	}
	refused, err := cl.Txn(ctx).If(clientv3.Compare(clientv3.Value(a), ">", "1")).
		Then(clientv3.OpDelete(a)).Else(clientv3.OpGet(b), clientv3.OpTxn(
		[]clientv3.Cmp{clientv3.Compare(clientv3.Version(b), "=", 1)}, []clientv3.Op{clientv3.OpPut(b, "3")}, nil)).Commit()
	must(t, err)
	if refused.Succeeded || string(refused.Responses[0].GetResponseRange().Kvs[0].Value) != "2" ||
		!refused.Responses[1].GetResponseTxn().Succeeded || !g.next(put.Header.Revision, refused.Header.Revision) {
		t.Fatalf("%v", refused)
	}
	both, err := cl.Get(ctx, prefix, clientv3.WithPrefix())
	must(t, err)
	if len(both.Kvs) != 2 || both.Kvs[0].ModRevision != put.Header.Revision || string(both.Kvs[1].Value) != "3" {
		t.Fatalf("%v", both)
	}
}

func testCompaction(t *testing.T, cl *clientv3.Client, prefix string) {
	ctx, key := liveness(t), prefix+"k"
	first, err := cl.Put(ctx, key, "one")
	must(t, err)
	second, err := cl.Put(ctx, key, "two")
	must(t, err)
	_, err = cl.Compact(ctx, second.Header.Revision, clientv3.WithCompactPhysical())
	must(t, err)
	if _, err := cl.Get(ctx, key, clientv3.WithRev(first.Header.Revision)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("a read below the compaction: %v", err)
	}
	if resp, err := cl.Get(ctx, key, clientv3.WithRev(second.Header.Revision)); err != nil || string(resp.Kvs[0].Value) != "two" {
		t.Errorf("a read at the compaction: %v, %v", resp, err)
	}
	if _, err := cl.Compact(ctx, first.Header.Revision); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("a second compaction: %v", err)
	}
}

func testRefusals(t *testing.T, cl *clientv3.Client, prefix string) {
	ctx := liveness(t)
	twice := []clientv3.Op{clientv3.OpPut(prefix+"k", "1"), clientv3.OpPut(prefix+"k", "2")}
	for what, test := range map[string]struct {
		want error
		do   func() error
	}{
		"empty key":                {rpctypes.ErrEmptyKey, func() error { _, err := cl.Put(ctx, "", "x"); return err }},
		"future revision":          {rpctypes.ErrFutureRev, func() error { _, err := cl.Get(ctx, "k", clientv3.WithRev(1<<40)); return err }},
		"compaction of the future": {rpctypes.ErrFutureRev, func() error { _, err := cl.Compact(ctx, 1<<40); return err }},
		"a key put twice":          {rpctypes.ErrDuplicateKey, func() error { _, err := cl.Txn(ctx).Then(twice...).Commit(); return err }},
		"too many operations": {rpctypes.ErrTooManyOps, func() error {
			_, err := cl.Txn(ctx).Then(bytesOf(129, clientv3.OpGet("k"))...).Commit()
			return err
		}},
		"too large": {rpctypes.ErrRequestTooLarge, func() error {
			_, err := cl.Put(ctx, prefix+"k", string(bytes.Repeat([]byte("x"), 1600<<10)))
			return err
		}},
		"a value kept that is not there": {rpctypes.ErrKeyNotFound, func() error {
			_, err := cl.Put(ctx, prefix+"missing", "", clientv3.WithIgnoreValue())
			return err
		}},
		"an unknown lease": {rpctypes.ErrLeaseNotFound, func() error { _, err := cl.Put(ctx, prefix+"k", "x", clientv3.WithLease(77)); return err }},
	} {
		if err := test.do(); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", what, err, test.want)
		}
	}
}

func bytesOf[T any](n int, x T) []T {
	out := make([]T, n)
	for i := range out {
		out[i] = x
	}
	return out
}

func testMaintenance(t *testing.T, cl *clientv3.Client, _ string) {
	ctx, endpoint := liveness(t), cl.Endpoints()[0]
	members, err := cl.MemberList(ctx)
	must(t, err)
	status, err := cl.Status(ctx, endpoint)
	must(t, err)
	known := 0
	for _, m := range members.Members {
		if m.ID == status.Leader || m.ID == status.Header.MemberId {
			known++
		}
	}
	if len(members.Members) != 3 || known == 0 || status.RaftTerm == 0 || status.RaftAppliedIndex == 0 {
		t.Errorf("members %v, status %v", members.Members, status)
	}
	_, err = cl.HashKV(ctx, endpoint, 0)
	must(t, err)
	_, err = cl.Defragment(ctx, endpoint)
	must(t, err)
	_, err = cl.AlarmList(ctx)
	must(t, err)
	snapshot, err := cl.Snapshot(ctx)
	must(t, err)
	n, err := io.Copy(io.Discard, snapshot)
	if closeErr := snapshot.Close(); err != nil || closeErr != nil || n == 0 {
		t.Errorf("a snapshot of %d bytes: %v, %v", n, err, closeErr)
	}
}

func testMoveLeader(t *testing.T, c *cluster.Cluster) {
	from := leader(t, c)
	to := others(c, from)[0]
	status, err := c.Status(liveness(t), to)
	must(t, err)
	_, err = client(t, c, from).MoveLeader(liveness(t), status.Header.MemberId)
	must(t, err)
	eventually(t, to+" leads", func(ctx context.Context) (bool, error) {
		now, err := c.Leader(ctx)
		return now == to, err
	})
	read(t, c, from, nil)
	write(t, c, from, pairs("moved-leader", 0, 10))
}

// A client with all endpoints and etcd's own retries does not notice that the leader dies, apart from waiting
// and from writes of which it is told that their outcome is unknown.
func testFailoverOfAClient(t *testing.T, c *cluster.Cluster) {
	var endpoints []string
	for _, name := range c.Names() {
		endpoints = append(endpoints, client(t, c, name).Endpoints()...)
	}
	cl, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	must(t, err)
	defer cl.Close()
	_, err = cl.Put(liveness(t), "failover", "before")
	must(t, err)
	victim := leader(t, c)
	must(t, c.Node(victim).Kill())
	eventually(t, "a read after the failover", func(ctx context.Context) (bool, error) {
		resp, err := cl.Get(ctx, "failover")
		return err == nil && string(resp.Kvs[0].Value) == "before", err
	})
	must(t, c.StartNodes(liveness(t), victim))
}
