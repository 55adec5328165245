package compare

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// etcdctl runs the real etcdctl against some endpoints.
type etcdctl struct {
	binary    string
	endpoints []string
}

// printed is what a user sees of a command. Of stderr it is the line with the error; the rest is the client's log.
type printed struct {
	Stdout, Error string
	ExitCode      int
}

func (e etcdctl) run(t *testing.T, stdin string, args ...string) printed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	args = append([]string{"--endpoints", strings.Join(e.endpoints, ","), "--command-timeout", "20s"}, args...)
	cmd := exec.CommandContext(ctx, e.binary, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("etcdctl %q: %v", args, err)
	}
	p := printed{Stdout: stdout.String(), ExitCode: cmd.ProcessState.ExitCode()}
	for line := range strings.Lines(stderr.String()) {
		if strings.HasPrefix(line, "Error: ") {
			p.Error += line
		}
	}
	return p
}

// mustRun is run for a command that must succeed.
func (e etcdctl) mustRun(t *testing.T, args ...string) string {
	t.Helper()
	p := e.run(t, "", args...)
	if p.ExitCode != 0 {
		t.Fatalf("etcdctl %q: exit code %d\n%s%s", args, p.ExitCode, p.Stdout, p.Error)
	}
	return p.Stdout
}

func startEtcdctl(t *testing.T, endpoints []string) etcdctl {
	t.Helper()
	binary, err := buildEtcdctl()
	if err != nil {
		t.Fatal(err)
	}
	return etcdctl{binary, endpoints}
}

// own matches what is each server's own in the formats json and fields.
var own = regexp.MustCompile(`("(?:cluster_id|member_id|raft_term)":|"(?:ClusterID|MemberID|RaftTerm)" : )\d+`)

// etcdctlSession is a run of commands in which the later ones see what the earlier ones have done.
var etcdctlSession = []struct {
	args  string // separated by blanks, "" is an empty argument
	stdin string
	fails bool
}{
	{args: `get a`},
	{args: `put a 1`},
	{args: `put a 2 --prev-kv`},
	{args: `put b`, stdin: "from\nstdin\n"},
	{args: `put c 3 -w json`},
	{args: `put c 4 --prev-kv -w json`},
	{args: `put c 5 --prev-kv -w fields`},
	{args: `put c --ignore-value --prev-kv -w json`},
	{args: `put c x --ignore-lease`},
	{args: `put none --ignore-value`, fails: true},
	{args: `put c x --ignore-value`, fails: true},
	{args: `put c x --lease 7b`, fails: true},
	{args: `put "" x`, fails: true},
	{args: `put dir/1 one`},
	{args: `put dir/2 two`},
	{args: `put dir/3 three`},
	{args: `put dir/2 second`},
	{args: `get a`},
	{args: `get b --print-value-only`},
	{args: `get a -w json`},
	{args: `get a -w fields`},
	{args: `get a --hex`},
	{args: `get none`},
	{args: `get none -w json`},
	{args: `get "" --prefix`},
	{args: `get "" --from-key -w json`},
	{args: `get b dir/2`},
	{args: `get dir/ --prefix --keys-only`},
	{args: `get dir/ --prefix --keys-only -w json`},
	{args: `get dir/ --prefix --count-only -w fields`},
	{args: `get dir/ --prefix --limit 2 -w json`},
	{args: `get dir/ --prefix --sort-by VERSION --order DESCEND -w json`},
	{args: `get dir/ --prefix --sort-by MODIFY --limit 1`},
	{args: `get dir/ --prefix --sort-by CREATE --order DESCEND`},
	{args: `get dir/ --prefix --sort-by VALUE`},
	{args: `get dir/ --prefix --sort-by KEY --order DESCEND --limit 1 -w json`},
	{args: `get dir/ --prefix --min-mod-rev 10 -w json`},
	{args: `get dir/ --prefix --max-create-rev 10 -w json`},
	{args: `get dir/ --prefix --stream`},
	{args: `get a --rev 2 -w json`},
	{args: `get a --rev 1000`, fails: true},
	{args: `del a --prev-kv`},
	{args: `del a`},
	{args: `del a -w json`},
	{args: `get a --rev 3`},
	{args: `del dir/1 dir/3 --prev-kv -w json`},
	{args: `del dir/ --prefix -w fields`},
	{args: `del ""`, fails: true},
	{args: `txn`, stdin: "version(\"c\") > \"0\"\n\nput c then\nget c\n\nget b\n\n"},
	{args: `txn`, stdin: "value(\"c\") = \"other\"\n\nput c then\n\nget c\nput d else\ndel c\n\n"},
	{args: `txn -w json`, stdin: "create(\"e\") = \"0\"\nmod(\"d\") > \"1\"\n\nput e 1 --prev-kv\nget \"\" --prefix\ndel d --prev-kv\n\n\n"},
	{args: `txn`, stdin: "mod(\"e\") < \"1\"\n\n\n\n"},
	{args: `txn -w fields`, stdin: "\nput f 1\nget f\n\n\n"},
	{args: `txn`, stdin: "\nput f 1\nput f 2\n\n\n", fails: true},
	{args: `txn`, stdin: "mod(\"f\") x\n\nput f 2\n\n\n", fails: true},
	{args: `compaction 5`},
	{args: `compaction 5`, fails: true},
	{args: `compaction 4`, fails: true},
	{args: `compaction 1000`, fails: true},
	{args: `compaction 6 --physical`},
	{args: `compaction 8 -w json`},
	{args: `compaction x`, fails: true},
	{args: `get a --rev 7`, fails: true},
	{args: `get c --rev 8 -w json`},
	{args: `get "" --from-key -w json`},
}

// TestEtcdctlPrintsTheSame runs one session against a real etcd and against three kvd nodes.
func TestEtcdctlPrintsTheSame(t *testing.T) {
	etcd := startEtcdctl(t, []string{startEtcd(t)})
	kvd := startEtcdctl(t, startKVD(t, 3))
	for _, command := range etcdctlSession {
		args := strings.Fields(command.args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], `""`, "")
		}
		want, got := etcd.run(t, command.stdin, args...), kvd.run(t, command.stdin, args...)
		if failed := want.ExitCode != 0; failed != command.fails {
			t.Errorf("the session is wrong about %s: etcd answers %+v", command.args, want)
		}
		for _, p := range []*printed{&want, &got} {
			p.Stdout = own.ReplaceAllString(p.Stdout, "${1}X")
		}
		if want != got {
			t.Errorf("etcdctl %s (stdin %q)\nwant %+v\ngot  %+v", command.args, command.stdin, want, got)
		}
	}
}

// TestEtcdctlLooksAfterTheCluster runs the commands whose output is about the nodes themselves.
func TestEtcdctlLooksAfterTheCluster(t *testing.T) {
	endpoints := startKVD(t, 3)
	ctl := startEtcdctl(t, endpoints)
	for _, key := range []string{"a", "b", "c"} {
		ctl.mustRun(t, "put", key, "value")
	}
	waitAcquainted(t, ctl)
	t.Run("member list", func(t *testing.T) { checkMembers(t, ctl) })
	t.Run("endpoint status", func(t *testing.T) {
		checkStatus(t, ctl.mustRun(t, "endpoint", "status", "-w", "json"))
		checkStatus(t, ctl.mustRun(t, "endpoint", "status", "-w", "json", "--cluster"))
	})
	t.Run("endpoint health", func(t *testing.T) { checkHealth(t, ctl) })
	t.Run("endpoint hashkv", func(t *testing.T) { checkHashes(t, ctl) })
	t.Run("snapshot save", func(t *testing.T) { checkSnapshot(t, etcdctl{ctl.binary, endpoints[:1]}) })
	t.Run("move-leader", func(t *testing.T) { checkMoveLeader(t, ctl) })
	t.Run("alarm list", func(t *testing.T) {
		if out := ctl.mustRun(t, "alarm", "list"); out != "" {
			t.Errorf("alarms at rest: %s", out)
		}
	})
	t.Run("defrag", func(t *testing.T) {
		if out := ctl.mustRun(t, "defrag"); strings.Count(out, "Finished defragmenting") != len(endpoints) {
			t.Errorf("not every node: %s", out)
		}
	})
}

func decode(t *testing.T, out string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), into); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
}

// member is what member list says of one node.
type member struct {
	ID                   uint64
	Name                 string
	PeerURLs, ClientURLs []string
}

func (e etcdctl) members(t *testing.T) []member {
	var list struct{ Members []member }
	decode(t, e.mustRun(t, "member", "list", "-w", "json"), &list)
	return list.Members
}

// waitAcquainted returns when every node knows the addresses of all, which they tell each other after the start.
func waitAcquainted(t *testing.T, ctl etcdctl) {
	t.Helper()
	const patience = 20 * time.Second
	deadline := time.Now().Add(patience)
	for _, endpoint := range ctl.endpoints {
		for {
			members := etcdctl{ctl.binary, []string{endpoint}}.members(t)
			if !slices.ContainsFunc(members, func(m member) bool { return len(m.ClientURLs) == 0 || len(m.PeerURLs) == 0 }) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s still doesn't know every address: %+v", endpoint, members)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

func checkMembers(t *testing.T, ctl etcdctl) {
	members := ctl.members(t)
	names, ids, clients := map[string]bool{}, map[uint64]bool{}, map[string]bool{}
	for _, m := range members {
		names[m.Name], ids[m.ID] = true, true
		if len(m.PeerURLs) != 1 || len(m.ClientURLs) != 1 {
			t.Fatalf("%s has the URLs %q and %q", m.Name, m.PeerURLs, m.ClientURLs)
		}
		clients[m.ClientURLs[0]] = true
	}
	for i, name := range []string{"n1", "n2", "n3"} {
		if !names[name] || !clients["http://"+ctl.endpoints[i]] {
			t.Errorf("%s at %s is not listed", name, ctl.endpoints[i])
		}
	}
	if len(members) != 3 || len(ids) != 3 || ids[0] {
		t.Errorf("want 3 members with ids of their own: %+v", members)
	}
	if simple := ctl.mustRun(t, "member", "list"); strings.Count(simple, ", started, n") != 3 {
		t.Errorf("not three started members:\n%s", simple)
	}
}

// nodeStatus is what endpoint status says of one node.
type nodeStatus struct {
	Endpoint string
	Status   struct {
		Header struct {
			MemberID uint64 `json:"member_id"`
		}
		Version          string
		DBSize           int64
		Leader, RaftTerm uint64
		RaftIndex        uint64
		RaftAppliedIndex uint64
	}
}

func checkStatus(t *testing.T, out string) {
	t.Helper()
	var nodes []nodeStatus
	decode(t, out, &nodes)
	if len(nodes) != 3 {
		t.Fatalf("want three nodes: %s", out)
	}
	leads := 0
	for _, n := range nodes {
		s := n.Status
		if s.Leader == s.Header.MemberID {
			leads++
		}
		if s.Leader == 0 || s.Leader != nodes[0].Status.Leader || s.RaftTerm == 0 || s.RaftTerm != nodes[0].Status.RaftTerm {
			t.Errorf("%s disagrees about leader or term: %s", n.Endpoint, out)
		}
		if s.Version == "" || s.DBSize <= 0 || s.RaftIndex == 0 || s.RaftAppliedIndex == 0 || s.RaftAppliedIndex > s.RaftIndex {
			t.Errorf("%s has an implausible status: %s", n.Endpoint, out)
		}
	}
	if leads != 1 {
		t.Errorf("%d nodes say that they lead: %s", leads, out)
	}
}

func checkHealth(t *testing.T, ctl etcdctl) {
	for _, args := range [][]string{{"endpoint", "health", "-w", "json"}, {"endpoint", "health", "-w", "json", "--cluster"}} {
		var nodes []struct{ Health bool }
		out := ctl.mustRun(t, args...)
		decode(t, out, &nodes)
		if len(nodes) != 3 || !nodes[0].Health || !nodes[1].Health || !nodes[2].Health {
			t.Errorf("want three healthy nodes: %s", out)
		}
	}
	dead := etcdctl{ctl.binary, []string{"127.0.0.1:1"}}
	if p := dead.run(t, "", "endpoint", "health", "--dial-timeout", "1s", "--command-timeout", "1s"); p.ExitCode == 0 {
		t.Errorf("a node that isn't there is healthy: %+v", p)
	}
}

func checkHashes(t *testing.T, ctl etcdctl) {
	for _, endpoint := range ctl.endpoints { // a read brings each node up to the last write
		etcdctl{ctl.binary, []string{endpoint}}.mustRun(t, "get", "a")
	}
	var nodes []struct{ HashKV struct{ Hash uint32 } }
	out := ctl.mustRun(t, "endpoint", "hashkv", "-w", "json")
	decode(t, out, &nodes)
	if len(nodes) != 3 || nodes[0] != nodes[1] || nodes[0] != nodes[2] || nodes[0].HashKV.Hash == 0 {
		t.Errorf("want three equal hashes: %s", out)
	}
}

func checkSnapshot(t *testing.T, ctl etcdctl) {
	path := filepath.Join(t.TempDir(), "snapshot")
	if out := ctl.mustRun(t, "snapshot", "save", path); !strings.Contains(out, "Snapshot saved at "+path) {
		t.Errorf("unexpected output: %s", out)
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() == 0 {
		t.Fatalf("no snapshot: %v", err)
	}
	kvd, err := buildKVD()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), kvd, "snapshot", "status", path).CombinedOutput(); err != nil {
		t.Errorf("kvd can't read what etcdctl has saved: %v\n%s", err, out)
	}
}

func checkMoveLeader(t *testing.T, ctl etcdctl) {
	leader := func() (endpoint string, other uint64) {
		var nodes []nodeStatus
		decode(t, ctl.mustRun(t, "endpoint", "status", "-w", "json"), &nodes)
		for _, n := range nodes {
			if n.Status.Header.MemberID == n.Status.Leader {
				endpoint = n.Endpoint
			} else {
				other = n.Status.Header.MemberID
			}
		}
		return endpoint, other
	}
	before, other := leader()
	out := ctl.mustRun(t, "move-leader", strconv.FormatUint(other, 16))
	if after, _ := leader(); after == before {
		t.Errorf("%s still leads: %s", before, out)
	}
}
