package servers

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// Dial returns a connection to an endpoint that is tried again soon after it has failed, so that what is measured when
// servers start is the server and not the client's patience.
func Dial(endpoint string) (*grpc.ClientConn, error) {
	return grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))
}

// InUse returns what the nodes' heaps and stacks hold after a garbage collection, in bytes.
func (c *Cluster) InUse(ctx context.Context) (int64, error) {
	var sum int64
	for _, p := range c.nodes {
		var page []byte
		for range 2 { // the second time, what pools have kept goes, too
			var err error
			if page, err = get(ctx, "http://"+p.http+"/debug/pprof/heap?gc=1&debug=1"); err != nil {
				return 0, fmt.Errorf("%s: %w", p.name, err)
			}
		}
		for _, name := range []string{"HeapAlloc", "Stack"} {
			_, rest, _ := strings.Cut(string(page), "\n# "+name+" = ")
			end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
			n, err := strconv.ParseInt(rest[:max(end, 0)], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: no %s in its heap profile", p.name, name)
			}
			sum += n
		}
	}
	return sum, nil
}

func get(ctx context.Context, url string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, response.Status)
	}
	return io.ReadAll(response.Body)
}

// Metric returns a metric of a node: the sum of all lines with that name, whatever their labels. 0 if there is none.
func (c *Cluster) Metric(ctx context.Context, node int, name string) (float64, error) {
	p := c.nodes[node]
	page, err := get(ctx, "http://"+p.http+"/metrics")
	if err != nil {
		return 0, fmt.Errorf("%s: %w", p.name, err)
	}
	var sum float64
	lines := bufio.NewScanner(bytes.NewReader(page))
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		value, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("metrics of %s: %w", p.name, err)
		}
		sum += value
	}
	return sum, lines.Err()
}
