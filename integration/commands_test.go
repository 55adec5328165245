package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
)

// TestCommandsOutliveServers runs kvd watch, lock and elect as processes while the leader is killed, and then a node that
// serves a watch: watches see everything, once, in order; who has a lock keeps it, and nobody else gets it. Then the
// holders are killed, and the next ones get it when the leases have ended.
func TestCommandsOutliveServers(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]cluster.Config{"full": {Nodes: 3, Args: quick}, "consistent": sharded(3, 8, 2, quick...)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := cluster.Run(t, config)
			lock, election := contend(t, c, "lock", "job"), contend(t, c, "elect", "boss", "me")
			listener := listen(t, c, election.key, "me")
			began := time.Now()
			testWatches(t, c)
			time.Sleep(time.Until(began.Add(contestTTL + time.Second))) // a lease that nobody renews would have ended
			lock.unchanged(t)
			election.unchanged(t)
			lock.killFirst(t)
			election.killFirst(t)
			lock.passesOn(t)
			election.passesOn(t)
			listener.hears(t, election.next, "me")
			lock.second.CloseInput()
			lock.ends(t, 0)
			must(t, election.second.Signal(os.Interrupt))
			election.ends(t, 128+int(syscall.SIGTERM))
		})
	}
}

// contestTTL is how long the lease of a contest's first process lives when nobody renews it. A machine that is held up for
// most of that does not fail the test.
const contestTTL = 10 * time.Second

// contest is about a lock or a leadership that one process has and another one waits for.
type contest struct {
	c             *cluster.Cluster
	name          string
	first, second *cluster.Process
	key           string    // of the first one
	revision      int64     // that created it: the token
	next          string    // the key of the second one, when that has it
	until         time.Time // the first one's lease lives until then at least
}

// firstScript says what is held, and is there until it is told to end.
const firstScript = `trap 'echo told; exit' TERM; echo "${KVD_LOCK_KEY-$KVD_ELECT_KEY} ${KVD_LOCK_REV-$KVD_ELECT_REV}"; while kill -0 $PPID; do sleep 0.1; done`

// secondScript says what is held, and which keys there are then, and is there until its input ends.
const secondScript = `echo "${KVD_LOCK_KEY-$KVD_ELECT_KEY} ${KVD_LOCK_REV-$KVD_ELECT_REV}" $("$0" get "$1/" --prefix --keys-only) end; exec cat`

// contend starts a contest, which the first process has won when it returns.
func contend(t *testing.T, c *cluster.Cluster, command, name string, value ...string) *contest {
	t.Helper()
	x := &contest{c: c, name: name}
	args := append([]string{command, name}, value...)
	x.first = c.Begin(t, c.Names(), append(slices.Clip(args), fmt.Sprintf("--ttl=%d", int(contestTTL.Seconds())), "--", "sh", "-c", firstScript)...)
	out, err := x.first.WaitOutput(liveness(t), func(out string) bool { return strings.Contains(out, "\n") })
	must(t, err)
	_, err = fmt.Sscan(out, &x.key, &x.revision)
	must(t, err)
	x.second = c.Begin(t, c.Names(), append(slices.Clip(args), "--", "sh", "-c", secondScript, c.Binary(), name)...)
	eventually(t, "the second process waits", func(context.Context) (bool, error) { return len(x.keys(t)) == 2, nil })
	return x
}

// keys are those of the processes that have it and that wait for it.
func (x *contest) keys(t *testing.T) (keys []*mvccpb.KeyValue) {
	t.Helper()
	must(t, cluster.Until(liveness(t), func(ctx context.Context) error {
		resp, err := client(t, x.c, "n1").Get(ctx, x.name+"/", clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
		if err == nil {
			keys = resp.Kvs
		}
		return err
	}))
	return keys
}

// unchanged fails the test unless the first process has it, and the second one still waits.
func (x *contest) unchanged(t *testing.T) {
	t.Helper()
	keys := x.keys(t)
	if len(keys) != 2 || string(keys[0].Key) != x.key || keys[0].CreateRevision != x.revision {
		t.Errorf("the first of the keys is not %s of revision %d: %v", x.key, x.revision, keys)
	}
	if x.first.Done() || x.second.Output() != "" {
		t.Errorf("it has changed hands\n%s\n%s", x.first, x.second)
	}
}

// killFirst kills the process that has it, and renews its lease once more.
func (x *contest) killFirst(t *testing.T) {
	t.Helper()
	must(t, x.first.Signal(os.Kill))
	if runtime.GOOS == "linux" {
		_, err := x.first.WaitOutput(liveness(t), func(out string) bool { return strings.Contains(out, "told") })
		must(t, err)
	}
	lease, err := strconv.ParseInt(x.key[strings.LastIndexByte(x.key, '/')+1:], 16, 64)
	must(t, err)
	must(t, cluster.Until(liveness(t), func(ctx context.Context) error {
		sent := time.Now()
		renewed, err := client(t, x.c, "n1").KeepAliveOnce(ctx, clientv3.LeaseID(lease))
		if err == nil {
			x.until = sent.Add(time.Duration(renewed.TTL) * time.Second)
		}
		return err
	}))
}

// passesOn waits until the second process has it, which is when the lease has ended, with its key, and not before.
func (x *contest) passesOn(t *testing.T) {
	t.Helper()
	out, err := x.second.WaitOutput(liveness(t), func(out string) bool { return strings.Contains(out, " end\n") })
	must(t, err)
	if early := time.Until(x.until); early > 0 {
		t.Errorf("the second process got it %v before the lease could end", early)
	}
	var revision int64
	var only string
	_, err = fmt.Sscan(out, &x.next, &revision, &only)
	must(t, err)
	if only != x.next || strings.Contains(out, x.key) || revision <= x.revision {
		t.Errorf("it was %s of revision %d; then the second process has printed %q", x.key, x.revision, out)
	}
}

// ends waits for the end of the second process, with which its key must be gone.
func (x *contest) ends(t *testing.T, code int) {
	t.Helper()
	if got, err := x.second.Wait(liveness(t)); err != nil || got != code {
		t.Errorf("%s: exit code %d, want %d (%v)", x.second, got, code, err)
	}
	if left := x.keys(t); len(left) != 0 {
		t.Errorf("keys are left: %v", left)
	}
}

// listener is kvd elect --listen.
type listener struct {
	*cluster.Process
	heard []string
}

// listen begins to listen to an election, and hears who leads.
func listen(t *testing.T, c *cluster.Cluster, leader, value string) *listener {
	t.Helper()
	l := &listener{Process: c.Begin(t, c.Names(), "elect", "--listen", "boss")}
	l.hears(t, leader, value)
	return l
}

// hears waits until it has printed one more leader, and nothing else.
func (l *listener) hears(t *testing.T, leader, value string) {
	t.Helper()
	l.heard = append(l.heard, leader, value)
	out, err := l.WaitOutput(liveness(t), func(out string) bool { return len(strings.Fields(out)) >= len(l.heard) })
	must(t, err)
	if !slices.Equal(strings.Fields(out), l.heard) {
		t.Errorf("%s\nwant %q", l, l.heard)
	}
}

// testWatches watches by way of one node, and of any, while the leader is killed, and then the node that any was.
func testWatches(t *testing.T, c *cluster.Cluster) {
	ctx, victim := liveness(t), leader(t, c)
	through := others(c, victim)[0]
	began, err := client(t, c, through).Get(ctx, "watched/")
	must(t, err)
	args := []string{"watch", "--prefix", "watched/", "--write-out=json", fmt.Sprintf("--rev=%d", began.Header.Revision+1)}
	one, anyNode := c.Begin(t, []string{through}, args...), c.Begin(t, c.Names(), args...)
	put := 0
	more := func(name string, watches ...*cluster.Process) {
		t.Helper()
		create(t, c, name, pairs("watched", put, put+20))
		put += 20
		for _, watch := range watches {
			awaitEvents(t, watch, put)
		}
	}
	more(through, one, anyNode)
	must(t, c.Node(victim).Kill())
	more(through, one, anyNode)
	must(t, c.StartNodes(ctx, victim))

	member := lastOf(awaitEvents(t, anyNode, put)).Header.Member
	victim = c.Names()[slices.IndexFunc(c.Names(), func(name string) bool {
		status, err := c.Status(ctx, name)
		must(t, err)
		return status.Header.MemberId == member
	})]
	must(t, c.Node(victim).Kill())
	more(others(c, victim)[0], anyNode)
	if now := lastOf(awaitEvents(t, anyNode, put)).Header.Member; now == member {
		t.Errorf("%s is dead, and serves a watch", victim)
	}
	must(t, c.StartNodes(ctx, victim))
	more(through, one, anyNode)

	want, err := client(t, c, through).Get(ctx, "watched/", clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortAscend))
	must(t, err)
	for _, watch := range []*cluster.Process{one, anyNode} {
		var got []watchedPair
		for _, answer := range awaitEvents(t, watch, put) {
			for _, event := range answer.Events {
				got = append(got, event.Kv)
			}
		}
		if !slices.EqualFunc(want.Kvs, got, func(kv *mvccpb.KeyValue, e watchedPair) bool {
			return string(kv.Key) == string(e.Key) && string(kv.Value) == string(e.Value) && kv.ModRevision == e.Revision
		}) {
			t.Errorf("%s\nthere are %v", watch, want.Kvs)
		}
		must(t, watch.Signal(os.Interrupt))
		if code, err := watch.Wait(ctx); err != nil || code != 130 {
			t.Errorf("%s: exit code %d (%v)", watch, code, err)
		}
	}
}

// create puts keys that are not there, each of them once, whatever becomes of single requests.
func create(t *testing.T, c *cluster.Cluster, name string, pairs []pair) {
	t.Helper()
	ctx, cl := liveness(t), client(t, c, name)
	for _, p := range pairs {
		must(t, cluster.Until(ctx, func(ctx context.Context) error {
			_, err := cl.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(p.key), "=", 0)).Then(clientv3.OpPut(p.key, p.value)).Commit()
			return err
		}))
	}
}

// watchAnswer is a line of kvd watch -w json.
type watchAnswer struct {
	Header struct {
		Member uint64 `json:"member_id"`
	}
	Events []struct{ Kv watchedPair }
}

type watchedPair struct {
	Key, Value []byte
	Revision   int64 `json:"mod_revision"`
}

// awaitEvents waits until a watch has printed so many events, and returns all that it has printed.
func awaitEvents(t *testing.T, watch *cluster.Process, events int) (answers []watchAnswer) {
	t.Helper()
	_, err := watch.WaitOutput(liveness(t), func(out string) bool {
		count := 0
		answers = nil
		for line := range strings.Lines(out) {
			var answer watchAnswer
			if !strings.HasSuffix(line, "\n") {
				break
			}
			must(t, json.Unmarshal([]byte(line), &answer))
			answers = append(answers, answer)
			count += len(answer.Events)
		}
		return count >= events
	})
	must(t, err)
	return answers
}

func lastOf(answers []watchAnswer) watchAnswer { return answers[len(answers)-1] }
