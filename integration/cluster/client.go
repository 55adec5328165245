package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// pollEvery is how often the harness looks whether something has happened.
const pollEvery = 50 * time.Millisecond

// attemptTimeout bounds one look.
const attemptTimeout = 3 * time.Second

// quickBackoff: nodes come back soon.
var quickBackoff = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond}

// ErrNoLeader says that no node is known to lead.
var ErrNoLeader = errors.New("cluster: no leader")

// Until calls look until it succeeds. It returns the last error with ctx's.
func Until(ctx context.Context, look func(ctx context.Context) error) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := look(attempt)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(pollEvery):
		}
	}
}

// tls is what clients use; nil if the cluster has none.
func (c *Cluster) tls() (*tls.Config, error) {
	if c.cfg.TLS == Plain {
		return nil, nil
	}
	return c.Certs.ClientConfig(c.cfg.TLS == MutualTLS)
}

// Client returns the client of one node: one endpoint, one attempt per request. The cluster closes it.
func (c *Cluster) Client(name string) (*clientv3.Client, error) {
	address := c.Node(name).ClientAddr()
	c.mu.Lock()
	defer c.mu.Unlock()
	if client, ok := c.clients[address]; ok {
		return client, nil
	}
	client, err := c.newClient(address)
	if err == nil {
		c.clients[address] = client
	}
	return client, err
}

func (c *Cluster) newClient(endpoints ...string) (*clientv3.Client, error) {
	tlsConfig, err := c.tls()
	if err != nil {
		return nil, err
	}
	scheme := "http://"
	if tlsConfig != nil {
		scheme = "https://"
	}
	for i := range endpoints {
		endpoints[i] = scheme + endpoints[i]
	}
	return clientv3.New(clientv3.Config{Endpoints: endpoints, TLS: tlsConfig, MaxUnaryRetries: 1, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: quickBackoff})}})
}

// Dial returns a connection to one node without anything of an etcd client's on top of it: what is asked
// through it is sent at most once. The caller closes it.
func (c *Cluster) Dial(name string) (*grpc.ClientConn, error) {
	tlsConfig, err := c.tls()
	if err != nil {
		return nil, err
	}
	creds := insecure.NewCredentials()
	if tlsConfig != nil {
		creds = credentials.NewTLS(tlsConfig)
	}
	return grpc.NewClient("passthrough:///"+c.Node(name).ClientAddr(), grpc.WithTransportCredentials(creds),
		grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: quickBackoff}))
}

// WaitServing waits until a node answers a linearizable read.
func (c *Cluster) WaitServing(ctx context.Context, name string) error {
	client, err := c.Client(name)
	if err != nil {
		return err
	}
	err = Until(ctx, func(ctx context.Context) error {
		_, err := client.Get(ctx, "a-key-that-nobody-writes")
		return err
	})
	if err != nil {
		return fmt.Errorf("node %s does not serve: %w", name, err)
	}
	return nil
}

// Status asks a node for its status.
func (c *Cluster) Status(ctx context.Context, name string) (*clientv3.StatusResponse, error) {
	client, err := c.Client(name)
	if err != nil {
		return nil, err
	}
	return client.Status(ctx, client.Endpoints()[0])
}

// Leader returns the node that takes itself for the leader, in the highest term if there are several. Nodes
// that don't answer are passed over.
func (c *Cluster) Leader(ctx context.Context) (string, error) {
	type answer struct {
		name string
		term uint64
	}
	names := c.Names()
	answers := make(chan answer, len(names))
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for _, name := range names {
		go func() { // ends with ctx; the channel takes every answer
			status, err := c.Status(ctx, name)
			if err != nil || status.Leader != status.Header.MemberId {
				answers <- answer{}
				return
			}
			answers <- answer{name, status.RaftTerm}
		}()
	}
	var best answer
	for range names {
		if a := <-answers; a.term > best.term {
			best = a
		}
	}
	if best.name == "" {
		return "", ErrNoLeader
	}
	return best.name, nil
}

// WaitLeader waits for a leader, other than the given ones, that answers a linearizable read.
func (c *Cluster) WaitLeader(ctx context.Context, not ...string) (string, error) {
	var leader string
	err := Until(ctx, func(ctx context.Context) error {
		var err error
		if leader, err = c.Leader(ctx); err != nil {
			return err
		}
		for _, name := range not {
			if leader == name {
				return fmt.Errorf("%s still leads", name)
			}
		}
		client, err := c.Client(leader)
		if err != nil {
			return err
		}
		_, err = client.Get(ctx, "a-key-that-nobody-writes")
		return err
	})
	return leader, err
}

// scraper keeps no connections: nodes die.
var scraper = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// Metrics are a node's metrics by name.
type Metrics map[string]*dto.MetricFamily

// Metrics reads a node's metrics.
func (c *Cluster) Metrics(ctx context.Context, name string) (Metrics, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.Node(name).HTTPAddr()+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := scraper.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("metrics of %s: %s", name, resp.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(resp.Body)
}

// Sum adds up the values of a counter, gauge or histogram's count over all labels. A metric that does not
// exist is an error: a test must not take a misspelt name for zero.
func (m Metrics) Sum(name string) (float64, error) {
	family, ok := m[name]
	if !ok {
		return 0, fmt.Errorf("no metric %q", name)
	}
	var sum float64
	for _, metric := range family.Metric {
		switch family.GetType() {
		case dto.MetricType_COUNTER:
			sum += metric.GetCounter().GetValue()
		case dto.MetricType_GAUGE:
			sum += metric.GetGauge().GetValue()
		case dto.MetricType_HISTOGRAM:
			sum += float64(metric.GetHistogram().GetSampleCount())
		default:
			sum += metric.GetUntyped().GetValue()
		}
	}
	return sum, nil
}

// Metric reads one metric of a node.
func (c *Cluster) Metric(ctx context.Context, name, metric string) (float64, error) {
	metrics, err := c.Metrics(ctx, name)
	if err != nil {
		return 0, err
	}
	return metrics.Sum(metric)
}
