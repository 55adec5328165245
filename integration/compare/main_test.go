package compare

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"

	"kvd/integration/compare/servers"
)

var (
	seedFlag      = flag.Uint64("seed", 0, "`seed` of the random calls; 0 draws a new one")
	sequencesFlag = flag.Int("sequences", 2, "sequences of random calls, each on fresh servers; more if they cover too little")
	callsFlag     = flag.Int("calls", 2500, "calls in a sequence")
)

// buildDir holds the binaries that the tests have built.
var buildDir string

// atOnce is how many tests run beside each other unless -parallel is set. They mostly wait for their servers.
const atOnce = 4

func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", strconv.Itoa(atOnce)); err != nil {
		panic(err)
	}
	flag.Parse()
	var err error
	if buildDir, err = os.MkdirTemp("", "kvd-compare-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

var (
	buildKVD     = sync.OnceValues(func() (string, error) { return servers.Build(context.Background(), servers.KVD, buildDir) })
	buildEtcdctl = sync.OnceValues(func() (string, error) { return servers.Build(context.Background(), servers.Etcdctl, buildDir) })
)

// consistent are the flags of a kvd cluster with shards, in which of three nodes two have a key.
var consistent = []string{"--strategy", "consistent", "--shards", "5", "--replication-factor", "2"}

// startKVD starts a fresh kvd cluster of real processes, with further flags of theirs, and returns its client addresses.
func startKVD(t testing.TB, nodes int, flags ...string) []string {
	t.Helper()
	binary, err := buildKVD()
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := servers.StartKVD(t.Context(), binary, t.TempDir(), nodes, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the nodes' logs:\n%s", cluster.Logs())
		}
		cluster.Close()
	})
	return cluster.Endpoints()
}
