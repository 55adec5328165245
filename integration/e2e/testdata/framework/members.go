package integration

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/testutil"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	framecfg "go.etcd.io/etcd/tests/v3/framework/config"
)

// This file makes the members of etcd's integration tests processes of kvd. The functions of the framework that it
// replaces have been renamed.

// Environment that the runner sets.
const (
	envBinary = "KVD_E2E_BINARY"    // kvd
	envFlags  = "KVD_E2E_FLAGS"     // further flags of kvd start, separated by spaces
	envPort   = "KVD_E2E_BASE_PORT" // ports from here on are this process's own
	envLogs   = "KVD_E2E_LOGS"      // directory for the logs of the nodes
)

// Tests wait for a few of these ticks of 10 ms until a leader that is gone is missed.
func init() { ElectionTicks = 60 }

// readyTimeout and stopTimeout bound the start and the orderly end of a node.
const (
	readyTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
)

// node is what a member is besides what etcd's framework knows of it.
type node struct {
	client, peer string // addresses
	bridge       string // address, "" before it is used
	log          string // file
	cmd          *exec.Cmd
	exited       chan struct{} // closed when cmd has been waited for
	id           types.ID      // 0 until it is known
}

var (
	nodesMu  sync.Mutex
	nodes    = make(map[*Member]*node)
	peers    = make(map[string]string) // addresses of peers, by those that etcd's framework has chosen
	nextPort int
)

// freeAddress returns an address that nobody listens on. Call with nodesMu held.
func freeAddress() string {
	if nextPort == 0 {
		port, err := strconv.Atoi(os.Getenv(envPort))
		if err != nil {
			panic(fmt.Sprintf("%s: %v", envPort, err))
		}
		nextPort = port
	}
	for {
		address := fmt.Sprintf("localhost:%d", nextPort)
		nextPort++
		l, err := net.Listen("tcp", address)
		if err == nil {
			l.Close()
			return address
		}
	}
}

func peerAddress(of string) string {
	nodesMu.Lock()
	defer nodesMu.Unlock()
	if peers[of] == "" {
		peers[of] = freeAddress()
	}
	return peers[of]
}

func (m *Member) node() *node {
	peer := peerAddress(m.PeerURLs[0].Host)
	nodesMu.Lock()
	defer nodesMu.Unlock()
	if nodes[m] == nil {
		n := &node{client: freeAddress(), peer: peer}
		n.log = filepath.Join(os.Getenv(envLogs), fmt.Sprintf("%s-%s.log", m.Name, n.client))
		nodes[m] = n
	}
	return nodes[m]
}

func (n *node) running() bool {
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// listenGRPC only chooses addresses: the node listens itself, on TCP whatever the test wants.
func (m *Member) listenGRPC() error {
	n := m.node()
	m.UseTCP = true
	scheme := "http"
	if m.ClientTLSInfo != nil {
		scheme = "https"
	}
	address := n.client
	if m.UseIP {
		address = strings.Replace(address, "localhost", "127.0.0.1", 1)
	}
	_, m.Port, _ = net.SplitHostPort(address)
	if m.UseBridge {
		if n.bridge == "" {
			nodesMu.Lock()
			n.bridge = freeAddress()
			nodesMu.Unlock()
		}
		l, err := net.Listen("tcp", n.bridge)
		if err != nil {
			return err
		}
		m.GRPCBridge = newBridge(dialer{network: "tcp", addr: address}, l)
		address = n.bridge
	}
	m.GRPCURL = scheme + "://" + address
	m.GRPCListener = m.ClientListeners[0] // so that Restart comes here again
	return nil
}

// Launch starts the process and returns when it listens, as etcd's does: a member that starts again may have no leader.
func (m *Member) Launch() error {
	n := m.node()
	args := append([]string{"start"}, m.flags(n)...)
	n.cmd, n.exited = exec.Command(os.Getenv(envBinary), args...), make(chan struct{})
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	n.cmd.Stdout, n.cmd.Stderr = log, log
	if err := n.cmd.Start(); err != nil {
		return err
	}
	go func(cmd *exec.Cmd, exited chan struct{}) {
		cmd.Wait()
		close(exited)
	}(n.cmd, n.exited)
	if err := n.await("listens", n.listens); err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	m.Closed = false
	if m.Client == nil {
		m.Client, err = NewClientV3(m)
	}
	return err
}

func (m *Member) flags(n *node) []string {
	var cluster []string
	for name, urls := range m.InitialPeerURLsMap {
		cluster = append(cluster, name+"="+peerAddress(urls[0].Host))
	}
	flags := []string{
		"--name", m.Name, "--data-dir", m.DataDir, "--cluster-token", m.InitialClusterToken, "--peers", strings.Join(cluster, ","),
		"--listen-client", n.client, "--listen-peer", n.peer, "--listen-http", "none",
		"--snapshot-entries", fmt.Sprint(m.SnapshotCount), "--trailing-entries", fmt.Sprint(m.SnapshotCatchUpEntries),
		"--max-request-bytes", fmt.Sprint(m.MaxRequestBytes), "--max-txn-ops", fmt.Sprint(m.MaxTxnOps),
	}
	// Tests set the one of a member or that of all servers in this process.
	interval := cmp.Or(m.WatchProgressNotifyInterval, v3rpc.GetProgressReportInterval())
	flags = append(flags, "--watch-progress-notify-interval", interval.String())
	flags = append(flags, tlsFlags("", m.ClientTLSInfo)...)
	flags = append(flags, tlsFlags("peer-", m.PeerTLSInfo)...)
	if m.ClientTLSInfo != nil && m.ClientTLSInfo.ClientCertAuth {
		flags = append(flags, "--client-cert-auth")
	}
	return append(flags, strings.Fields(os.Getenv(envFlags))...)
}

func tlsFlags(of string, info *transport.TLSInfo) []string {
	if info == nil {
		return nil
	}
	ca := info.TrustedCAFile
	if ca == "" {
		ca = info.CertFile
	}
	return []string{"--" + of + "cert-file", info.CertFile, "--" + of + "key-file", info.KeyFile, "--" + of + "trusted-ca-file", ca}
}

// await returns when the process does something.
func (n *node) await(what string, does func() bool) error {
	for deadline := time.Now().Add(readyTimeout); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if does() {
			return nil
		}
		if !n.running() {
			return fmt.Errorf("ended before it %s", what)
		}
	}
	return fmt.Errorf("after %v it is not so that it %s", readyTimeout, what)
}

func (n *node) listens() bool {
	conn, err := net.Dial("tcp", n.client)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// serves is whether the node has logged that it has answered a linearizable read, in any of its lives.
func (n *node) serves() bool {
	log, err := os.ReadFile(n.log)
	return err == nil && bytes.Contains(log, []byte("ready to serve client requests"))
}

// Close stops the node in order, as an operator does.
func (m *Member) Close() { m.end(syscall.SIGTERM) }

// Terminate ends the node at once and removes its data.
func (m *Member) Terminate(t testutil.TB) {
	m.end(syscall.SIGKILL)
	if !m.KeepDataDirTerminate {
		if err := os.RemoveAll(m.DataDir); err != nil {
			t.Fatal(err)
		}
	}
}

func (m *Member) end(signal syscall.Signal) {
	if m.GRPCBridge != nil {
		m.GRPCBridge.Close()
		m.GRPCBridge = nil
	}
	if m.ServerClient != nil { // only tests set it
		m.ServerClient.Close()
		m.ServerClient = nil
	}
	for _, l := range append(slices.Clone(m.PeerListeners), m.ClientListeners...) {
		l.Close()
	}
	m.Closed = true
	n := m.node()
	if !n.running() {
		return
	}
	n.cmd.Process.Signal(syscall.SIGCONT) // it may be paused
	n.cmd.Process.Signal(signal)
	select {
	case <-n.exited:
	case <-time.After(stopTimeout):
		n.cmd.Process.Kill()
		<-n.exited
	}
}

// Pause stops the process from doing anything.
func (m *Member) Pause() { m.node().cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets it go on.
func (m *Member) Resume() { m.node().cmd.Process.Signal(syscall.SIGCONT) }

// status asks the member itself. The client lives as long as the call: the member's own may be the test's to close.
func (m *Member) status() (*clientv3.StatusResponse, error) {
	if !m.node().running() {
		return nil, errors.New("it does not run")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	cli, err := NewClientV3(m)
	if err != nil {
		return nil, err
	}
	defer cli.Close()
	return cli.Status(ctx, m.GRPCURL)
}

// ID is the member's id, which only the member itself knows.
func (m *Member) ID() types.ID {
	n := m.node()
	for n.id == 0 {
		s, err := m.status()
		if err != nil {
			panic(fmt.Sprintf("%s: its id: %v", m.Name, err))
		}
		n.id = types.ID(s.Header.MemberId)
	}
	return n.id
}

// StopNotify is closed when the process has ended.
func (m *Member) StopNotify() <-chan struct{} { return m.node().exited }

// ReadyNotify is closed when the process serves.
func (m *Member) ReadyNotify() <-chan struct{} {
	ready := make(chan struct{})
	close(ready) // Launch has waited
	return ready
}

// WaitOK returns when the member knows a leader.
func (m *Member) WaitOK(t testutil.TB) {
	m.WaitStarted(t)
	for {
		if s, err := m.status(); err == nil && s.Leader != 0 {
			return
		}
		time.Sleep(framecfg.TickDuration)
	}
}

// ElectionTimeout is how long a node hears nothing before it stands for election, as the runner sets it.
func (m *Member) ElectionTimeout() time.Duration { return 300 * time.Millisecond }

// CheckLeaderTransition returns the next leader that the member knows.
func CheckLeaderTransition(m *Member, oldLead uint64) uint64 {
	for {
		if s, err := m.status(); err == nil && s.Leader != 0 && s.Leader != oldLead {
			return s.Leader
		}
		time.Sleep(framecfg.TickDuration)
	}
}

// Metric fails: kvd's metrics are not etcd's.
func (m *Member) Metric(name string, _ ...string) (string, error) {
	return "", fmt.Errorf("kvd has no metric %s", name)
}

// InjectPartition has no counterpart in processes.
func (m *Member) InjectPartition(t testutil.TB, _ ...*Member) {
	t.Skip("kvd's processes have no switch that cuts them off from each other")
}

// RecoverPartition is never reached.
func (m *Member) RecoverPartition(testutil.TB, ...*Member) {}

// NewCluster starts a cluster, or skips the test if it needs a setting that kvd does not have.
func NewCluster(t testutil.TB, cfg *ClusterConfig) *Cluster {
	t.Helper()
	for setting, set := range map[string]bool{
		"a quota":                            cfg.QuotaBackendBytes != 0,
		"discovery":                          cfg.DiscoveryURL != "",
		"tokens for authentication":          cfg.AuthToken != "",
		"options of its gRPC server":         len(cfg.GRPCAdditionalServerOptions) != 0,
		"checkpoints of leases at intervals": cfg.EnableLeaseCheckpoint,
		"periodic checks for corruption":     cfg.CorruptCheckTime != 0,
	} {
		if set {
			t.Skip("kvd has no setting for " + setting)
		}
	}
	return etcdNewCluster(t, cfg)
}

// WaitMembersMatch returns when every member lists the members that there should be.
func (c *Cluster) WaitMembersMatch(t testutil.TB, membs []*pb.Member) {
	ctx, cancel := context.WithTimeout(context.Background(), RequestTimeout)
	defer cancel()
	want := memberNames(membs)
	for _, m := range c.Members {
		for m.node().running() {
			resp, err := ToGRPC(m.Client).Cluster.MemberList(ctx, &pb.MemberListRequest{})
			if ctx.Err() != nil {
				t.Fatalf("%s lists %v, %v; want %v", m.Name, resp, err, want)
			}
			if err == nil && slices.Equal(memberNames(resp.Members), want) {
				break
			}
			time.Sleep(framecfg.TickDuration)
		}
	}
}

func memberNames(members []*pb.Member) []string {
	var names []string
	for _, m := range members {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return names
}

// RemoveMember asks for it and waits until the node has left.
func (c *Cluster) RemoveMember(t testutil.TB, cc *clientv3.Client, id uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), RequestTimeout)
	defer cancel()
	if _, err := cc.MemberRemove(ctx, id); err != nil {
		return err
	}
	i := slices.IndexFunc(c.Members, func(m *Member) bool { return uint64(m.ID()) == id })
	gone := c.Members[i]
	c.Members = slices.Delete(slices.Clone(c.Members), i, i+1)
	c.WaitMembersMatch(t, c.ProtoMembers())
	gone.Client.Close()
	gone.Terminate(t)
	return nil
}

// waitVersion waits until all serve, in the place of a version of the cluster that kvd's nodes do not agree on.
func (c *Cluster) waitVersion() {
	for _, m := range c.Members {
		if err := m.node().await("serves", m.node().serves); err != nil {
			panic(fmt.Sprintf("%s: %v", m.Name, err))
		}
	}
}

// waitMembersForLeader returns the member that those that run call the leader.
func (c *Cluster) waitMembersForLeader(ctx context.Context, t testing.TB, membs []*Member) int {
	for ctx.Err() == nil {
		leaders := make(map[uint64]bool)
		for _, m := range membs {
			if !m.node().running() {
				continue
			}
			s, err := m.status()
			if err != nil {
				leaders[0] = true
				break
			}
			leaders[s.Leader] = true
		}
		if len(leaders) == 1 && !leaders[0] {
			for i, m := range membs {
				if m.node().running() && leaders[uint64(m.ID())] {
					return i
				}
			}
		}
		time.Sleep(framecfg.TickDuration)
	}
	return -1
}

// WaitMembersNoLeader returns when none of those that run knows a leader.
func (c *Cluster) WaitMembersNoLeader(membs []*Member) {
	for _, m := range membs {
		for m.node().running() {
			if s, err := m.status(); err == nil && s.Leader == 0 {
				break
			}
			time.Sleep(framecfg.TickDuration)
		}
	}
}
