package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
)

// selfSigned is the certificate that stands for those that etcd would make itself.
type selfSigned struct{ cert, key string }

// etcdFlags are the flags of etcd that mean something to kvd.
type etcdFlags struct {
	name, dataDir, clusterToken       string
	listenClient, advertiseClient     string
	listenPeer, advertisePeer         string
	cluster, clusterState             string
	snapshotCount                     string
	maxRequestBytes, maxTxnOps        string
	cert, key, ca                     string
	peerCert, peerKey, peerCA         string
	clientCertAuth, autoTLS, peerAuto bool
}

// ignoredFlags are those that mean nothing to kvd, or that no test depends on which is run.
var ignoredFlags = map[string]string{
	"quota-backend-bytes":   "kvd has no quota: a disk that is nearly full refuses writes",
	"strict-reconfig-check": "kvd never changes members without a live quorum",
	"auth-token":            "kvd has no authentication",
}

// ignoredFlag takes any value, and none.
type ignoredFlag struct{}

func (ignoredFlag) String() string   { return "" }
func (ignoredFlag) Set(string) error { return nil }

// translate returns the arguments of kvd that mean what args mean to etcd. A flag that is neither known nor ignored is
// an error that names it.
func translate(args []string, own selfSigned) ([]string, error) {
	var e etcdFlags
	if err := e.parse(args); err != nil {
		return nil, err
	}
	if e.clusterState != "new" {
		return nil, fmt.Errorf("--initial-cluster-state=%s: only new clusters are started", e.clusterState)
	}
	out := []string{"start", "--listen-http", "none", "--name", shorten(e.name)}
	out = append(out, given([][2]string{
		{"--data-dir", e.dataDir}, {"--cluster-token", e.clusterToken}, {"--snapshot-entries", e.snapshotCount},
	})...)
	addresses, err := e.addresses()
	if err != nil {
		return nil, err
	}
	limits := given([][2]string{{"--max-request-bytes", e.maxRequestBytes}, {"--max-txn-ops", e.maxTxnOps}})
	return slices.Concat(out, addresses, e.tls(own), limits), nil
}

// given are the flags that have a value.
func given(flags [][2]string) []string {
	var out []string
	for _, f := range flags {
		if f[1] != "" {
			out = append(out, f[0], f[1])
		}
	}
	return out
}

func (e *etcdFlags) parse(args []string) error {
	f := flag.NewFlagSet("etcd", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	for name, at := range map[string]*string{
		"name": &e.name, "data-dir": &e.dataDir, "initial-cluster-token": &e.clusterToken,
		"listen-client-urls": &e.listenClient, "advertise-client-urls": &e.advertiseClient,
		"listen-peer-urls": &e.listenPeer, "initial-advertise-peer-urls": &e.advertisePeer,
		"initial-cluster": &e.cluster, "initial-cluster-state": &e.clusterState, "snapshot-count": &e.snapshotCount,
		"max-request-bytes": &e.maxRequestBytes, "max-txn-ops": &e.maxTxnOps,
		"cert-file": &e.cert, "key-file": &e.key, "trusted-ca-file": &e.ca,
		"peer-cert-file": &e.peerCert, "peer-key-file": &e.peerKey, "peer-trusted-ca-file": &e.peerCA,
	} {
		f.StringVar(at, name, "", "")
	}
	f.BoolVar(&e.clientCertAuth, "client-cert-auth", false, "")
	f.BoolVar(&e.autoTLS, "auto-tls", false, "")
	f.BoolVar(&e.peerAuto, "peer-auto-tls", false, "")
	for name, why := range ignoredFlags {
		f.Var(ignoredFlag{}, name, why)
	}
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("%q is no flag", f.Arg(0))
	}
	if e.name == "" || e.cluster == "" {
		return errors.New("--name and --initial-cluster are needed")
	}
	return nil
}

// addresses returns kvd's flags for etcd's URLs.
func (e *etcdFlags) addresses() ([]string, error) {
	var out []string
	for _, a := range []struct{ etcd, kvd, value string }{
		{"listen-client-urls", "--listen-client", e.listenClient}, {"advertise-client-urls", "--advertise-client", e.advertiseClient},
		{"listen-peer-urls", "--listen-peer", e.listenPeer}, {"initial-advertise-peer-urls", "--advertise-peer", e.advertisePeer},
	} {
		addr, err := hostPort(a.value)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", a.etcd, err)
		}
		out = append(out, a.kvd, addr)
	}
	var peers []string
	for item := range strings.SplitSeq(e.cluster, ",") {
		name, u, ok := strings.Cut(item, "=")
		addr, err := hostPort(u)
		if !ok || err != nil {
			return nil, fmt.Errorf("--initial-cluster: %q is not name=URL", item)
		}
		peers = append(peers, shorten(name)+"="+addr)
	}
	return append(out, "--peers", strings.Join(peers, ",")), nil
}

// tls returns kvd's flags for etcd's certificates.
func (e *etcdFlags) tls(own selfSigned) []string {
	client, peer := [3]string{e.cert, e.key, e.ca}, [3]string{e.peerCert, e.peerKey, e.peerCA}
	if e.autoTLS && e.cert == "" {
		client = [3]string{own.cert, own.key, ""}
	}
	if e.peerAuto && e.peerCert == "" {
		peer = [3]string{own.cert, own.key, own.cert}
	}
	var out []string
	for i, name := range []string{"cert-file", "key-file", "trusted-ca-file"} {
		if client[i] != "" {
			out = append(out, "--"+name, client[i])
		}
		if peer[i] != "" {
			out = append(out, "--peer-"+name, peer[i])
		}
	}
	if e.clientCertAuth {
		out = append(out, "--client-cert-auth")
	}
	return out
}

// hostPort is the address in a URL.
func hostPort(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return "", err
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Port() == "" || u.Path != "" {
		return "", fmt.Errorf("%q is not one http://host:port", raw)
	}
	return u.Host, nil
}

// maxName is how long a node's name may be.
const maxName = 63

// shorten leaves out the beginning of a name that is too long for kvd: its end tells the members apart.
func shorten(name string) string {
	if len(name) <= maxName {
		return name
	}
	return "x" + name[len(name)-maxName+1:]
}
