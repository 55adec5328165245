package integration

import (
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvd/integration/cluster"
)

// kvd runs a command that is expected to end by itself, and returns its exit code and what it has written.
func kvd(t *testing.T, env []string, args ...string) (code int, output string) {
	t.Helper()
	path, err := cluster.Binary()
	must(t, err)
	cmd := exec.CommandContext(liveness(t), path, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// refused checks that a process ended with an exit code of its own and one line that says why.
func refused(t *testing.T, code int, output string, says ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(output), "\n")
	last := lines[len(lines)-1]
	if code <= 0 || !strings.HasPrefix(last, "Error: ") || strings.Count(output, "Error: ") != 1 || len(last) > 600 {
		t.Errorf("exit code %d, and not one line of error at the end:\n%s", code, output)
	}
	for _, trace := range []string{"panic", "goroutine ", "SIG", "fatal error"} {
		if strings.Contains(output, trace) {
			t.Errorf("the output has %q:\n%s", trace, output)
		}
	}
	for _, want := range says {
		if !strings.Contains(last, want) {
			t.Errorf("%q does not say %q", last, want)
		}
	}
	t.Log(last)
}

func TestWrongFlags(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	must(t, os.WriteFile(config, []byte("nmae: n1\n"), 0o600))
	for name, test := range map[string]struct {
		args, env []string
		says      []string
	}{
		"unknown flag":                    {args: []string{"--no-such-flag"}, says: []string{"--no-such-flag"}},
		"an argument":                     {args: []string{"n1"}},
		"unknown strategy":                {args: []string{"--strategy=some"}, says: []string{"--strategy", "some"}},
		"a name with a space":             {args: []string{"--name=n 1"}, says: []string{"--name"}},
		"peers without an address":        {args: []string{"--peers=n1"}, says: []string{"--peers"}},
		"peers without this node":         {args: []string{"--peers=n7=127.0.0.1:1,n8=127.0.0.1:2"}, says: []string{"--peers", "n1"}},
		"the same peer twice":             {args: []string{"--peers=n1=127.0.0.1:1,n1=127.0.0.1:2"}, says: []string{"--peers", "n1"}},
		"no port":                         {args: []string{"--listen-client=127.0.0.1"}, says: []string{"--listen-client"}},
		"no duration":                     {args: []string{"--election-timeout=soon"}, says: []string{"--election-timeout", "soon"}},
		"election before heartbeat":       {args: []string{"--election-timeout=100ms", "--heartbeat-timeout=1s"}, says: []string{"--election-timeout", "--heartbeat-timeout"}},
		"no such certificate":             {args: []string{"--cert-file=/no/such/file", "--key-file=/no/such/key"}, says: []string{"/no/such/file"}},
		"a certificate without key":       {args: []string{"--cert-file=/no/such/file"}, says: []string{"--key-file"}},
		"no such configuration file":      {args: []string{"--config=/no/such/config"}, says: []string{"/no/such/config"}},
		"unknown key in the file":         {args: []string{"--config=" + config}, says: []string{"nmae"}},
		"a wrong value from environment":  {env: []string{"KVD_ELECTION_TIMEOUT=soon"}, says: []string{"KVD_ELECTION_TIMEOUT", "soon"}},
		"a log level that does not exist": {args: []string{"--log-level=loud"}, says: []string{"--log-level", "loud"}},
		"a data directory that is a file": {args: []string{"--data-dir=" + config}, says: []string{config}},
	} {
		t.Run(name, func(t *testing.T) {
			args := []string{"start", "--data-dir", filepath.Join(t.TempDir(), "data"), "--listen-client=127.0.0.1:0", "--listen-peer=127.0.0.1:0", "--listen-http=none"}
			code, output := kvd(t, test.env, append(args, test.args...)...)
			refused(t, code, output, test.says...)
		})
	}
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	for _, flag := range []string{"--listen-client", "--listen-peer", "--listen-http"} {
		args := []string{"start", "--data-dir", filepath.Join(t.TempDir(), "data"), "--listen-client=127.0.0.1:0", "--listen-peer=127.0.0.1:0", "--listen-http=none"}
		code, output := kvd(t, nil, append(args, flag, taken.Addr().String())...)
		refused(t, code, output, flag, taken.Addr().String(), "in use")
	}
}

// start starts a cluster's nodes and waits until they serve.
func start(t *testing.T, c *cluster.Cluster, names ...string) {
	t.Helper()
	must(t, c.StartNodes(liveness(t), names...))
}

// refusesToStart starts a node and checks that it ends with a line that says why.
func refusesToStart(t *testing.T, n *cluster.Node, says ...string) {
	t.Helper()
	must(t, n.Start())
	code, err := n.Exit(liveness(t))
	must(t, err)
	refused(t, code, n.Log.Life(), says...)
}

// A directory in use, of another node, or of another cluster.
func TestDirectoryOfAnother(t *testing.T) {
	t.Parallel()
	first := cluster.Run(t, cluster.Config{Nodes: 1, Args: quick})
	write(t, first, "n1", pairs("first", 0, 5))
	dir := first.Node("n1").Dir
	single := func(name, dir string, flags ...string) *cluster.Node {
		c := cluster.New(t, cluster.Config{Nodes: 1, Args: append([]string{"--name", name}, flags...), Dirs: map[string]string{"n1": dir}})
		return c.Node("n1")
	}
	refusesToStart(t, single("n1", dir), dir, "in use")
	must(t, first.Node("n1").Kill())
	refusesToStart(t, single("n2", dir), dir, "--name")
	refusesToStart(t, single("n1", dir, "--cluster-token=other"), dir, "--cluster-token")
	foreign := t.TempDir()
	must(t, os.WriteFile(filepath.Join(foreign, "holiday.jpg"), []byte("x"), 0o600))
	refusesToStart(t, single("n1", foreign), foreign, "--data-dir")

	// A member of one cluster with the peers of another.
	other := cluster.Run(t, cluster.Config{Nodes: 3, Args: quick})
	must(t, other.Node("n1").Kill())
	must(t, other.Node("n1").Wipe())
	must(t, os.Rename(dir, other.Node("n1").Dir))
	refusesToStart(t, other.Node("n1"), other.Node("n1").Dir)
	data := pairs("other", 0, 5)
	write(t, other, "n2", data)
	read(t, other, "n3", data)
}

// damage is something that happens to a file.
type damage struct {
	what string
	do   func(path string, random *rand.Rand) error
	// may: the node may notice and refuse, or go on; it must not crash.
	may bool
}

var damages = []damage{
	{what: "removed", do: func(path string, _ *rand.Rand) error { return os.Remove(path) }},
	{what: "emptied", do: func(path string, _ *rand.Rand) error { return os.Truncate(path, 0) }},
	{what: "cut short", do: func(path string, _ *rand.Rand) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, min(info.Size()/2, 5*4096)) // bbolt's files are longer than what they use
	}},
	{what: "overwritten at the beginning", do: func(path string, random *rand.Rand) error {
		return overwrite(path, 0, func(b []byte) {
			for i := range b {
				b[i] = byte(random.Uint32())
			}
		})
	}},
	{what: "with a flipped bit", may: true, do: func(path string, random *rand.Rand) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return overwrite(path, random.Int64N(info.Size()), func(b []byte) { b[0] ^= 1 << random.IntN(8) })
	}},
	{what: "with damaged page headers", may: true, do: func(path string, random *rand.Rand) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		for page := int64(2); page*4096 < info.Size(); page++ { // bbolt's pages begin with id, flags and count
			if err := overwrite(path, page*4096+random.Int64N(16), func(b []byte) { b[0] ^= 1 << random.IntN(8) }); err != nil {
				return err
			}
		}
		return nil
	}},
}

// overwrite changes up to 8 KiB of a file in place.
func overwrite(path string, offset int64, change func([]byte)) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	buffer := make([]byte, 8<<10)
	n, err := file.ReadAt(buffer, offset)
	if n > 0 {
		change(buffer[:n])
		_, err = file.WriteAt(buffer[:n], offset)
	}
	return errors.Join(err, file.Close())
}

// canDoWithout are files without which a node may still have everything: a member has no more need of the
// record of how its cluster began, and a log that still begins at its first entry holds the whole state. The
// log itself holds the votes. Without the mark of a clean stop the shared log is as after a crash.
var canDoWithout = map[string]bool{"bootstrap.json": true, "groups/0/state.db": true, "log/closed": true}

// A node whose files are damaged says so and does not start; it does not crash, nor serve from a part of its
// data as if that were all.
func TestDamagedFiles(t *testing.T) {
	t.Parallel()
	for _, kind := range raftLogs {
		t.Run(kind, func(t *testing.T) { testDamagedFiles(t, kind) })
	}
}

func testDamagedFiles(t *testing.T, raftLog string) {
	random := rand.New(rand.NewPCG(seed(t), 0))
	c := cluster.Run(t, cluster.Config{Nodes: 1, Args: append(shortLog, "--raft-log="+raftLog)})
	n := c.Node("n1")
	data := pairs("damaged", 0, 300)
	write(t, c, "n1", data)
	if code, err := n.Stop(liveness(t)); code != 0 || err != nil {
		t.Fatalf("exit code %d, %v", code, err)
	}
	sound := n.Dir + ".sound"
	must(t, os.Rename(n.Dir, sound))
	for _, file := range files(t, sound) {
		for _, damage := range damages {
			if damage.may && filepath.Ext(file) == ".json" && damage.what != "with a flipped bit" {
				continue
			}
			t.Run(file+" "+damage.what, func(t *testing.T) {
				must(t, os.RemoveAll(n.Dir))
				must(t, os.CopyFS(n.Dir, os.DirFS(sound)))
				must(t, damage.do(filepath.Join(n.Dir, file), random))
				must(t, n.Start())
				err := c.WaitReady(liveness(t), "n1")
				switch {
				case err == nil && damage.may && (filepath.Ext(file) == ".db" || filepath.Ext(file) == ".segment"):
					must(t, n.Kill())
				case err == nil && canDoWithout[file]:
					read(t, c, "n1", data)
					must(t, n.Kill())
				case errors.Is(err, cluster.ErrExited):
					code, _ := n.Exit(liveness(t))
					refused(t, code, n.Log.Life(), n.Dir)
				default:
					t.Errorf("it starts, or hangs: %v", err)
					must(t, n.Kill())
				}
			})
		}
	}
	must(t, os.RemoveAll(n.Dir))
	must(t, os.Rename(sound, n.Dir))
	start(t, c, "n1")
	read(t, c, "n1", data[:20])
}

// files lists what a data directory holds, but for the lock.
func files(t *testing.T, dir string) (names []string) {
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && entry.Name() != "lock" {
			name, _ := filepath.Rel(dir, path)
			names = append(names, name)
		}
		return err
	})
	must(t, err)
	if len(names) < 3 {
		t.Fatalf("the data directory has only %v", names)
	}
	return names
}

// The second signal ends a node at once, the first in order.
func TestGracefulStop(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	data := pairs("stop", 0, 20)
	write(t, c, "n1", data)
	lead := leader(t, c)
	if code, err := c.Node(lead).Stop(liveness(t)); code != 0 || err != nil {
		t.Fatalf("exit code %d, %v", code, err)
	}
	if text := c.Node(lead).Log.Life(); strings.Contains(text, "level=ERROR") {
		t.Errorf("an orderly stop logs an error:\n%s", text)
	}
	next := leader(t, c, lead)
	read(t, c, next, data)
	start(t, c, lead)
	read(t, c, lead, data)
}
