package compare

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
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

// etcdctlSession is a run of commands in which the later ones see what the earlier ones have done. {t} begins all keys
// but where they are to be in different shards; #5 is the server's revision for etcd's 5.
var etcdctlSession = []struct {
	args  string // separated by blanks, "" is an empty argument
	stdin string
	fails bool
}{
	{args: `get {t}a`},
	{args: `put {t}a 1`},
	{args: `put {t}a 2 --prev-kv`},
	{args: `put {t}b`, stdin: "from\nstdin\n"},
	{args: `put {t}c 3 -w json`},
	{args: `put {t}c 4 --prev-kv -w json`},
	{args: `put {t}c 5 --prev-kv -w fields`},
	{args: `put {t}c --ignore-value --prev-kv -w json`},
	{args: `put {t}c x --ignore-lease`},
	{args: `put {t}none --ignore-value`, fails: true},
	{args: `put {t}c x --ignore-value`, fails: true},
	{args: `put {t}c x --lease 7b`, fails: true},
	{args: `put "" x`, fails: true},
	{args: `put {t}dir/1 one`},
	{args: `put {t}dir/2 two`},
	{args: `put {t}dir/3 three`},
	{args: `put {t}dir/2 second`},
	{args: `get {t}a`},
	{args: `get {t}b --print-value-only`},
	{args: `get {t}a -w json`},
	{args: `get {t}a -w fields`},
	{args: `get {t}a --hex`},
	{args: `get {t}none`},
	{args: `get {t}none -w json`},
	{args: `get "" --prefix`},
	{args: `get "" --from-key -w json`},
	{args: `get {t}b {t}dir/2`},
	{args: `get {t}dir/ --prefix --keys-only`},
	{args: `get {t}dir/ --prefix --keys-only -w json`},
	{args: `get {t}dir/ --prefix --count-only -w fields`},
	{args: `get {t}dir/ --prefix --limit 2 -w json`},
	{args: `get {t}dir/ --prefix --sort-by VERSION --order DESCEND -w json`},
	{args: `get {t}dir/ --prefix --sort-by MODIFY --limit 1`},
	{args: `get {t}dir/ --prefix --sort-by CREATE --order DESCEND`},
	{args: `get {t}dir/ --prefix --sort-by VALUE`},
	{args: `get {t}dir/ --prefix --sort-by KEY --order DESCEND --limit 1 -w json`},
	{args: `get {t}dir/ --prefix --min-mod-rev #10 -w json`},
	{args: `get {t}dir/ --prefix --max-create-rev #10 -w json`},
	{args: `get {t}dir/ --prefix --stream`},
	{args: `get {t}a --rev #2 -w json`},
	{args: `get {t}a --rev #1000`, fails: true},
	{args: `del {t}a --prev-kv`},
	{args: `del {t}a`},
	{args: `del {t}a -w json`},
	{args: `get {t}a --rev #3`},
	{args: `del {t}dir/1 {t}dir/3 --prev-kv -w json`},
	{args: `del {t}dir/ --prefix -w fields`},
	{args: `del ""`, fails: true},
	{args: `txn`, stdin: "version(\"{t}c\") > \"0\"\n\nput {t}c then\nget {t}c\n\nget {t}b\n\n"},
	{args: `txn`, stdin: "value(\"{t}c\") = \"other\"\n\nput {t}c then\n\nget {t}c\nput {t}d else\ndel {t}c\n\n"},
	{args: `txn -w json`, stdin: "create(\"{t}e\") = \"0\"\nmod(\"{t}d\") > \"#1\"\n\nput {t}e 1 --prev-kv\nget \"{t}\" --prefix\ndel {t}d --prev-kv\n\n\n"},
	{args: `txn`, stdin: "mod(\"{t}e\") < \"#1\"\n\n\n\n"},
	{args: `txn -w fields`, stdin: "\nput {t}f 1\nget {t}f\n\n\n"},
	{args: `txn`, stdin: "\nput {t}f 1\nput {t}f 2\n\n\n", fails: true},
	{args: `txn`, stdin: "mod(\"{t}f\") x\n\nput {t}f 2\n\n\n", fails: true},
	{args: `compaction #5`},
	{args: `compaction #5`, fails: true},
	{args: `compaction #4`, fails: true},
	{args: `compaction #1000`, fails: true},
	{args: `compaction #6 --physical`},
	{args: `compaction #8 -w json`},
	{args: `compaction x`, fails: true},
	{args: `get {t}a --rev #7`, fails: true},
	{args: `get {t}c --rev #8 -w json`},
	{args: `get "" --from-key -w json`},
}

// session is etcdctl beside a real etcd.
type session struct {
	tag   string   // in place of {t}
	flags []string // of the kvd nodes

	etcd, kvd          etcdctl
	reference, subject *client
	revisions          *revisions // nil if they must be equal
}

// TestEtcdctlPrintsTheSame runs the session against a real etcd and against three kvd nodes.
func TestEtcdctlPrintsTheSame(t *testing.T) {
	for name, s := range map[string]*session{
		"full":        {},
		"one shard":   {tag: "{t}", flags: consistent},
		"many shards": {flags: consistent},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s.start(t)
			for _, c := range etcdctlSession {
				if s.spansShards() && strings.HasPrefix(c.args, "txn") {
					continue // refused, as TestEtcdctlLooksAfterShards sees
				}
				s.compare(t, c.args, c.stdin, c.fails)
			}
		})
	}
}

func (s *session) start(t *testing.T) {
	etcd, kvd := []string{startEtcd(t)}, startKVD(t, 3, s.flags...)
	s.etcd, s.kvd = startEtcdctl(t, etcd), startEtcdctl(t, kvd)
	s.reference, s.subject = mustDial(t, etcd), mustDial(t, kvd)
	if s.flags != nil {
		s.revisions = newRevisions(s.subject.latest)
	}
}

func (s *session) spansShards() bool { return s.flags != nil && s.tag == "" }

func (s *session) compare(t *testing.T, args, stdin string, fails bool) {
	t.Helper()
	run := func(ctl etcdctl, toRevision func(string) string) printed {
		edit := func(text string) string {
			return numbered.ReplaceAllStringFunc(strings.ReplaceAll(text, "{t}", s.tag), toRevision)
		}
		words := strings.Fields(edit(args))
		for i := range words {
			words[i] = strings.ReplaceAll(words[i], `""`, "")
		}
		return ctl.run(t, edit(stdin), words...)
	}
	want := run(s.etcd, func(number string) string { return number[1:] })
	if failed := want.ExitCode != 0; failed != fails {
		t.Errorf("the session is wrong about %s: etcd answers %+v", args, want)
	}
	got := run(s.kvd, func(number string) string { return s.toSubject(t, number[1:]) })
	s.observe(t)
	for _, p := range []*printed{&want, &got} {
		p.Stdout = own.ReplaceAllString(p.Stdout, "${1}X")
		if s.spansShards() { // each key's shard has a revision of its own
			p.Stdout = header.ReplaceAllString(p.Stdout, "${1}X")
		}
	}
	got.Stdout = revision.ReplaceAllStringFunc(got.Stdout, func(text string) string { return s.fromSubject(t, text) })
	if want != got {
		t.Errorf("etcdctl %s (stdin %q)\nwant %+v\ngot  %+v", args, stdin, want, got)
	}
}

var (
	// own is what is each server's own in the formats json and fields, header the revision in a header, revision any
	// revision, numbered one in a command of the session.
	own      = regexp.MustCompile(`("(?:cluster_id|member_id|raft_term)":|"(?:ClusterID|MemberID|RaftTerm)" : )\d+`)
	header   = regexp.MustCompile(`("revision":|"Revision" : )\d+`)
	revision = regexp.MustCompile(`("(?:create_|mod_)?revision":|"(?:Prev)?(?:Create|Mod)?Revision" : |compacted revision )\d+`)
	numbered = regexp.MustCompile(`#\d+`)
)

// toSubject is kvd's revision for one of etcd's.
func (s *session) toSubject(t *testing.T, number string) string {
	n, err := strconv.ParseInt(number, 10, 64)
	if err == nil && s.revisions != nil {
		n, err = s.revisions.first(t.Context(), n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return strconv.FormatInt(n, 10)
}

// fromSubject is what kvd has printed about a revision, with etcd's.
func (s *session) fromSubject(t *testing.T, text string) string {
	if s.revisions == nil {
		return text
	}
	name := strings.TrimRight(text, "0123456789")
	n, err := strconv.ParseInt(text[len(name):], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	field := "revision"
	if lower := strings.ToLower(name); strings.Contains(lower, "create") || strings.Contains(lower, "mod") {
		field = "mod_revision"
	}
	return name + strconv.FormatInt(s.revisions.translate(field, n), 10)
}

// observe learns how far both are.
func (s *session) observe(t *testing.T) {
	if s.revisions == nil {
		return
	}
	everything := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	want, got := s.reference.ask(t.Context(), call{request: everything}), s.subject.ask(t.Context(), call{request: everything})
	if want.response == nil || got.response == nil {
		t.Fatalf("cannot read everything: %v, %v", want, got)
	}
	reference, all := headerOf(want.response).Revision, got.response.(*pb.RangeResponse)
	for _, kv := range all.Kvs { // what has been put last
		if kv.ModRevision > s.revisions.spans[s.revisions.newest()].last {
			s.revisions.extend(reference, kv.ModRevision, false)
		}
	}
	s.revisions.extend(reference, all.Header.Revision, false)
}

// TestEtcdctlLooksAfterTheCluster runs the commands whose output is about the nodes themselves.
func TestEtcdctlLooksAfterTheCluster(t *testing.T) {
	t.Parallel()
	lookAfter(t, startKVD(t, 3))
}

// TestEtcdctlLooksAfterShards is the same for a cluster with shards.
func TestEtcdctlLooksAfterShards(t *testing.T) {
	t.Parallel()
	endpoints := startKVD(t, 3, consistent...)
	lookAfter(t, endpoints)
	t.Run("txn over shards", func(t *testing.T) {
		var puts strings.Builder // keys of one shard only would be bad luck
		for i := range 20 {
			fmt.Fprintf(&puts, "put key%d value\n", i)
		}
		p := startEtcdctl(t, endpoints).run(t, "\n"+puts.String()+"\n\n", "txn")
		if p.ExitCode == 0 || !strings.Contains(p.Error, "is in shard") || !strings.Contains(p.Error, "{tag}") {
			t.Errorf("not refused with the shards and what to do: %+v", p)
		}
	})
}

func lookAfter(t *testing.T, endpoints []string) {
	t.Helper()
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
