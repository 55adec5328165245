//go:build unix

package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// testsModule is etcd's module of tests; its version is that of go.mod.
const testsModule = "go.etcd.io/etcd/tests/v3"

// envKVD names a kvd binary to use instead of building one.
const envKVD = "KVD_INTEGRATION_BINARY"

// built is a file that is there once all has been built.
const built = "built"

// tree is a copy of etcd's tests, with what is built of it.
type tree struct {
	dir string // the copy
	bin string // etcd or the shim in its place, etcdctl, kvd, and etcd's tests
}

// newTree copies etcd's tests into dir and builds all that is needed to run the packages against etcd or kvd.
func newTree(ctx context.Context, dir string, packages []string, kvd bool) (*tree, error) {
	t := &tree{dir: filepath.Join(dir, "tests"), bin: filepath.Join(dir, "bin")}
	if _, err := os.Stat(filepath.Join(t.bin, built)); err == nil {
		return t, t.buildKVD(ctx, kvd)
	}
	if err := t.copy(ctx, dir); err != nil {
		return nil, err
	}
	if err := t.choosePorts(); err != nil {
		return nil, err
	}
	if err := t.tag(); err != nil {
		return nil, err
	}
	if kvd {
		if err := t.replaceMembers(); err != nil {
			return nil, err
		}
	}
	return t, t.build(ctx, dir, packages, kvd)
}

// copy puts etcd's tests where they can be changed, and a go.mod that uses them there.
func (t *tree) copy(ctx context.Context, dir string) error {
	if err := run(ctx, "", "go", "mod", "download", testsModule); err != nil {
		return err
	}
	source, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", testsModule).Output()
	if err != nil {
		return fmt.Errorf("go list %s: %w", testsModule, err)
	}
	if err := os.CopyFS(t.dir, os.DirFS(strings.TrimSpace(string(source)))); err != nil {
		return err
	}
	for _, link := range []string{"integration/fixtures", "integration/clientv3/fixtures", "integration/clientv3/experimental/fixtures"} {
		// modules have no symbolic links
		if err := os.Symlink(filepath.Join(t.dir, "fixtures"), filepath.Join(t.dir, link)); err != nil {
			return err
		}
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		return err
	}
	mod = fmt.Appendf(mod, "\nreplace %s => %s\n", testsModule, t.dir)
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), mod, 0o644); err != nil {
		return err
	}
	sum, err := os.ReadFile("go.sum")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "go.sum"), sum, 0o644)
}

// choosePorts lets the environment choose the ports of processes, so that tests can run beside each other.
func (t *tree) choosePorts() error {
	file := filepath.Join(t.dir, "framework", "e2e", "cluster.go")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	const constant, variable = "const EtcdProcessBasePort = 20000", "var EtcdProcessBasePort = basePort()"
	if bytes.Count(text, []byte(constant)) != 1 {
		return fmt.Errorf("%s: no %q", file, constant)
	}
	if err := os.WriteFile(file, bytes.Replace(text, []byte(constant), []byte(variable), 1), 0o644); err != nil {
		return err
	}
	const basePort = `package e2e

import (
	"os"
	"strconv"
)

func basePort() int {
	port, err := strconv.Atoi(os.Getenv("` + envPort + `"))
	if err != nil {
		panic(err)
	}
	return port
}
`
	return os.WriteFile(filepath.Join(t.dir, "framework", "e2e", "ports.go"), []byte(basePort), 0o644)
}

// tagged are second ones of packages, whose keys have a {tag}. Of each, those tests are run that skips.txt leaves out of
// the first one.
var tagged = []string{"integration/clientv3/concurrency" + tagSuffix, "integration/clientv3/experimental/recipes" + tagSuffix}

const tagSuffix = "tagged"

// names are what the keys of these tests begin with.
var names = regexp.MustCompile(`"(accts|prq|testprq)\b`)

// tag makes the second packages. What a transaction compares and writes is in one shard, which keys choose by a {tag}.
func (t *tree) tag() error {
	for _, pkg := range tagged {
		to := filepath.Join(t.dir, filepath.FromSlash(pkg))
		from := strings.TrimSuffix(to, tagSuffix)
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			return err
		}
		files, err := filepath.Glob(filepath.Join(to, "*.go"))
		if err != nil {
			return err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if err := os.WriteFile(file, names.ReplaceAll(text, []byte(`"{${1}}`)), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// replaced are the functions of etcd's framework that testdata/framework/members.go has in their place.
var replaced = []string{
	"Cluster.RemoveMember", "Cluster.WaitMembersMatch", "Cluster.WaitMembersNoLeader", "Cluster.waitMembersForLeader", "Cluster.waitVersion",
	"Member.Close", "Member.ElectionTimeout", "Member.ID", "Member.InjectPartition", "Member.Launch", "Member.Metric", "Member.Pause", "Member.ReadyNotify",
	"Member.RecoverPartition", "Member.Resume", "Member.StopNotify", "Member.Terminate", "Member.WaitOK", "Member.listenGRPC",
	"CheckLeaderTransition", "NewCluster",
}

// replaceMembers makes the members of etcd's clusters processes of kvd. What is replaced stays under another name, so
// that all that the rest of the file declares and imports is still used.
func (t *tree) replaceMembers() error {
	file := filepath.Join(t.dir, "framework", "integration", "cluster.go")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	renamed, err := rename(text, replaced)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := os.WriteFile(file, renamed, 0o644); err != nil {
		return err
	}
	members, err := os.ReadFile(filepath.Join("testdata", "framework", "members.go"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(t.dir, "framework", "integration", "members.go"), members, 0o644)
}

// rename gives functions, Name or Type.Name, the name etcdName where they are declared.
func rename(text []byte, names []string) ([]byte, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "", text, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	left := slices.Clone(names)
	var out []byte
	from := 0
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		i := slices.Index(left, declared(f))
		if i < 0 {
			continue
		}
		left = slices.Delete(left, i, i+1)
		at := set.Position(f.Name.Pos()).Offset
		out = append(append(out, text[from:at]...), "etcd"+strings.ToUpper(f.Name.Name[:1])...)
		from = at + 1
	}
	if len(left) > 0 {
		return nil, fmt.Errorf("it does not declare %s", strings.Join(left, ", "))
	}
	return append(out, text[from:]...), nil
}

// declared is Name or Type.Name.
func declared(f *ast.FuncDecl) string {
	if f.Recv == nil {
		return f.Name.Name
	}
	of := f.Recv.List[0].Type
	if star, ok := of.(*ast.StarExpr); ok {
		of = star.X
	}
	name, ok := of.(*ast.Ident)
	if !ok {
		return ""
	}
	return name.Name + "." + f.Name.Name
}

// build builds the servers, etcdctl and the packages' tests into t.bin.
func (t *tree) build(ctx context.Context, dir string, packages []string, kvd bool) error {
	if err := os.MkdirAll(t.bin, 0o755); err != nil {
		return err
	}
	into := func(name string) string { return filepath.Join(t.bin, name) }
	steps := [][]string{{"go", "build", "-o", into("etcdctl"), "go.etcd.io/etcd/etcdctl/v3"}}
	if kvd {
		steps = append(steps, []string{"go", "build", "-o", into("etcd"), "./shim"})
	} else {
		steps = append(steps, []string{"go", "build", "-o", into("etcd"), "go.etcd.io/etcd/server/v3"})
	}
	test := []string{"go", "test", "-c", "-ldflags", "-s -w", "-tags", "e2e", "-modfile", filepath.Join(dir, "go.mod"), "-o", t.bin + string(filepath.Separator)}
	for _, p := range packages {
		test = append(test, testsModule+"/"+p)
	}
	for _, s := range append(steps, test) {
		if err := run(ctx, "", s...); err != nil {
			return err
		}
	}
	if err := selfSign(into("own.crt"), into("own.key")); err != nil {
		return err
	}
	if err := t.buildKVD(ctx, kvd); err != nil {
		return err
	}
	return os.WriteFile(into(built), nil, 0o644)
}

func (t *tree) buildKVD(ctx context.Context, kvd bool) error {
	if !kvd {
		return nil
	}
	to := filepath.Join(t.bin, "kvd")
	if path := os.Getenv(envKVD); path != "" {
		path, err := filepath.Abs(path)
		if err != nil {
			return err
		}
		os.Remove(to)
		return os.Symlink(path, to)
	}
	return run(ctx, filepath.Join("..", ".."), "go", "build", "-o", to, "kvd/cmd/kvd") // with kvd's own go.mod
}

func run(ctx context.Context, dir string, command ...string) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(command, " "), err, out)
	}
	return nil
}

// selfSign writes a certificate for this machine that is its own authority, and its key.
func selfSign(certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644); err != nil {
		return err
	}
	return os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}
