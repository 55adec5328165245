package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"kvd/fsm"
	"kvd/shard"
)

type clientAlarm = clientv3.AlarmMember

// reasonOf is the reason that kvd gave for an error.
func wantUnsupported(t *testing.T, err error) {
	t.Helper()
	if status.Code(err) != codes.Unimplemented || reasonOf(err) != ReasonUnsupported || !strings.Contains(err.Error(), "not supported") {
		t.Fatalf("%v (reason %q)", err, reasonOf(err))
	}
}

func TestUnsupportedServices(t *testing.T) {
	n := startNode(t, nil)
	conn := n.dial(t)
	_, err := pb.NewAuthClient(conn).AuthEnable(t.Context(), &pb.AuthEnableRequest{})
	wantUnsupported(t, err)
}

func TestPanicsAreContained(t *testing.T) {
	n := startNode(t, nil)
	n.replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) { panic("bug") }
	kv := pb.NewKVClient(n.dial(t))
	_, err := kv.Put(t.Context(), putData(t, "k", "v"))
	if status.Code(err) != codes.Internal || reasonOf(err) != ReasonInternal || strings.Contains(err.Error(), "bug") {
		t.Fatal(err)
	}
	n.replica.onReadIndex = func(context.Context) (uint64, error) { panic("bug") }
	stream, err := kv.RangeStream(t.Context(), &pb.RangeRequest{Key: []byte("k")})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Internal {
		t.Fatal(err)
	}
	var counted dto.Metric
	if err := n.metrics.panics.Write(&counted); err != nil || counted.Counter.GetValue() != 2 {
		t.Fatalf("%v panics counted, %v", counted.Counter.GetValue(), err)
	}
	n.replica.onPropose, n.replica.onReadIndex = nil, nil
	if _, err := kv.Put(t.Context(), putData(t, "k", "v")); err != nil {
		t.Fatal(err)
	}
}

func TestClientMetadata(t *testing.T) {
	n := startNode(t, nil)
	kv := pb.NewKVClient(n.dial(t))
	get := func(key, value string) error {
		ctx := metadata.AppendToOutgoingContext(t.Context(), key, value)
		_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		return err
	}
	sameStatus(t, get(rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader), nil)
	n.replica.elect("", false)
	sameStatus(t, get(rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader), rpctypes.ErrGRPCNoLeader)
	sameStatus(t, get(rpctypes.MetadataRequireLeaderKey, "whatever"), nil)
	sameStatus(t, get(rpctypes.MetadataClientAPIVersionKey, "3.7.0"), nil)
	if err := n.admit(metadata.NewIncomingContext(t.Context(), metadata.Pairs(rpctypes.MetadataClientAPIVersionKey, "\xff"))); !errors.Is(err, rpctypes.ErrGRPCInvalidClientAPIVersion) {
		t.Fatal(err)
	}
}

func TestHealthService(t *testing.T) {
	n := startNode(t, nil)
	c := healthpb.NewHealthClient(n.dial(t))
	check := func() healthpb.HealthCheckResponse_ServingStatus {
		r, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	if got := check(); got != healthpb.HealthCheckResponse_SERVING {
		t.Fatal(got)
	}
	n.Drain()
	if got := check(); got != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Fatal(got)
	}
}

func TestReflection(t *testing.T) {
	n := startNode(t, nil)
	stream, err := reflectionpb.NewServerReflectionClient(n.dial(t)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "etcdserverpb.KV"}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := stream.Recv()
	if err != nil || len(r.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Fatalf("%v, %v", r, err)
	}
}

func TestGRPCMetrics(t *testing.T) {
	n := startNode(t, nil)
	if _, err := n.client(t).Put(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	families, err := n.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, f := range families {
		names[f.GetName()] = true
	}
	for _, name := range []string{"grpc_server_handled_total", "grpc_server_handling_seconds", "kvd_server_retries_total", "kvd_server_panics_total"} {
		if !names[name] {
			t.Errorf("no metric %s", name)
		}
	}
}

// Requests under way end before the server does; new ones are turned away.
func TestCloseWaitsForRequests(t *testing.T) {
	n := startNode(t, nil)
	entered, release := make(chan struct{}), make(chan struct{})
	n.replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
		close(entered)
		<-release
		return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{Revision: 5}}}, nil
	}
	kv := pb.NewKVClient(n.dial(t))
	var wg sync.WaitGroup
	wg.Go(func() {
		if r, err := kv.Put(t.Context(), putData(t, "k", "v")); err != nil || r.Header.Revision != 5 {
			t.Errorf("%v, %v", r, err)
		}
	})
	<-entered
	closed := make(chan error)
	go func() { closed <- n.Close() }()
	for {
		if c, err := net.Dial("tcp", n.address); err != nil {
			break
		} else {
			_ = c.Close()
		}
	}
	close(release)
	wg.Wait()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}

// A request that never ends does not keep the server from closing.
func TestCloseIsBounded(t *testing.T) {
	n := startNode(t, func(c *Config) { c.DrainTimeout = 10 * time.Millisecond })
	entered := make(chan struct{})
	n.replica.onPropose = func(ctx context.Context, _ fsm.Request) (fsm.Result, error) {
		close(entered)
		<-ctx.Done()
		return fsm.Result{}, shard.ErrUnknownOutcome
	}
	ended := make(chan error)
	go func() {
		_, err := pb.NewKVClient(n.dial(t)).Put(context.Background(), putData(t, "k", "v"))
		ended <- err
	}()
	<-entered
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Fatal("the request was answered")
	}
}

// testTLS is a certificate for 127.0.0.1 and a client's trust in it.
func testTLS(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kvd"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(certificate)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server = &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	client = &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool}
	return server, client
}

// With client certificates demanded, neither gRPC nor HTTP nor the JSON gateway
// lets anybody in without.
func TestTLS(t *testing.T) {
	serverTLS, clientTLS := testTLS(t)
	n := startNode(t, func(c *Config) { c.TLS = serverTLS })
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{n.address}, TLS: clientTLS, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Put(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	url := strings.Replace(n.httpURL, "http:", "https:", 1) + "/v3/kv/range"
	anonymous := clientTLS.Clone()
	anonymous.Certificates = nil
	post := func(conf *tls.Config) (*http.Response, error) {
		transport := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
		t.Cleanup(transport.CloseIdleConnections)
		return (&http.Client{Transport: transport}).Post(url, "application/json", strings.NewReader(`{"key":"aw=="}`))
	}
	resp, err := post(clientTLS)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || !strings.Contains(string(body), `"value":"dg=="`) || resp.ProtoMajor != 2 {
		t.Fatalf("%s %s, %v", resp.Proto, body, err)
	}
	if resp, err = post(anonymous); err == nil {
		_ = resp.Body.Close()
		t.Fatal("the gateway let somebody in without a certificate")
	}
	if _, err := pb.NewKVClient(n.dial(t)).Range(t.Context(), &pb.RangeRequest{Key: []byte("k")}); status.Code(err) != codes.Unavailable {
		t.Fatalf("plain text: %v", err)
	}
}
