package server

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"kvd/shard"
)

func (n *node) request(t *testing.T, method, path, body string) (int, http.Header, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, n.httpURL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

func (n *node) expect(t *testing.T, method, path, body string, status int, answer string) {
	t.Helper()
	gotStatus, _, got := n.request(t, method, path, body)
	if gotStatus != status || !strings.Contains(got, answer) {
		t.Fatalf("%s %s: %d %q, want %d and %q", method, path, gotStatus, got, status, answer)
	}
}

func TestHealthEndpoints(t *testing.T) {
	n := startNode(t, nil)
	n.expect(t, "GET", "/health", "", 200, `{"health":"true","reason":""}`)
	n.expect(t, "GET", "/livez", "", 200, "ok\n")
	n.expect(t, "GET", "/readyz", "", 200, "ok\n")
	n.expect(t, "GET", "/readyz?verbose", "", 200, "[+]linearizable_read ok\n")
	n.expect(t, "POST", "/health", "", 405, "")

	n.replica.elect("", false)
	n.expect(t, "GET", "/health", "", 503, `{"health":"false","reason":"RAFT NO LEADER"}`)
	n.expect(t, "GET", "/health?serializable=true", "", 200, `"true"`)
	n.expect(t, "GET", "/livez", "", 200, "ok\n")
	n.replica.elect("n1", true)
	n.expect(t, "GET", "/readyz", "", 200, "ok\n")
	n.Drain()
	n.expect(t, "GET", "/readyz", "", 503, "[-]serving failed")
	n.expect(t, "GET", "/livez", "", 200, "ok\n")
}

func TestHealthOfANodeThatCannotRead(t *testing.T) {
	n := startNode(t, func(c *Config) { c.RequestTimeout = 50 * time.Millisecond })
	n.replica.elect("", false)
	n.expect(t, "GET", "/readyz", "", 503, "[-]linearizable_read failed: ")
	n.replica.elect("n1", true)
	n.replica.onReadIndex = func(context.Context) (uint64, error) { return 0, shard.ErrNotLeader }
	n.expect(t, "GET", "/health", "", 503, `"reason":"RANGE ERROR:`)
}

// Before the node has joined a cluster, HTTP already answers.
func TestHTTPBeforeTheReplica(t *testing.T) {
	n := startNode(t, func(c *Config) { c.Replica = func(uint64) Replica { return nil } })
	n.expect(t, "GET", "/livez", "", 200, "ok\n")
	n.expect(t, "GET", "/health", "", 503, "RAFT NO LEADER")
	n.expect(t, "GET", "/readyz", "", 503, "does not serve the key space yet")
	n.expect(t, "POST", "/v3/maintenance/status", "{}", 503, "does not serve the key space yet")
	n.expect(t, "POST", "/v3/maintenance/alarm", "{}", 200, "header")
}

func TestVersionAndMetrics(t *testing.T) {
	n := startNode(t, func(c *Config) { c.Version = "1.2.3" })
	n.expect(t, "GET", "/version", "", 200, `{"etcdserver":"3.7.3","etcdcluster":"3.7.0","storage":"3.7.0","kvd":"1.2.3"}`)
	n.expect(t, "GET", "/metrics", "", 200, "kvd_server_read_rounds_total 0")
	n.expect(t, "GET", "/debug/pprof/", "", 404, "")
	n.expect(t, "GET", "/nothing", "", 404, "")
	asked := startNode(t, func(c *Config) { c.Pprof, c.Gatherer = true, nil })
	asked.expect(t, "GET", "/debug/pprof/", "", 200, "goroutine")
	asked.expect(t, "GET", "/metrics", "", 404, "")
}

func TestGateway(t *testing.T) {
	n := startNode(t, nil)
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	n.expect(t, "POST", "/v3/kv/put", `{"key":"`+b64("k")+`","value":"`+b64("v")+`"}`, 200, `"revision":"2"`)
	status, header, body := n.request(t, "POST", "/v3/kv/range", `{"key":"`+b64("k")+`"}`)
	var got struct {
		Header struct {
			ClusterID string `json:"cluster_id"`
			RaftTerm  string `json:"raft_term"`
		}
		Kvs []struct {
			Key, Value  string
			ModRevision string `json:"mod_revision"`
		}
		Count string
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil || status != 200 || header.Get("Content-Type") != "application/json" {
		t.Fatalf("%d %v %s, %v", status, header, body, err)
	}
	if got.Header.ClusterID != "193" || got.Header.RaftTerm != "7" || got.Count != "1" || got.Kvs[0].Value != b64("v") || got.Kvs[0].ModRevision != "2" {
		t.Fatalf("%s", body)
	}
	if strings.Contains(body, "more") {
		t.Fatalf("unset fields are sent: %s", body)
	}
	n.expect(t, "POST", "/v3/kv/txn", `{"compare":[{"key":"`+b64("k")+`","target":"MOD","mod_revision":"2"}],
		"success":[{"request_put":{"key":"`+b64("k")+`","value":"`+b64("w")+`"}}]}`, 200, `"succeeded":true`)
	n.expect(t, "POST", "/v3/kv/deleterange", `{"key":"`+b64("k")+`"}`, 200, `"deleted":"1"`)
	n.expect(t, "POST", "/v3/cluster/member/list", `{}`, 200, `"name":"n2"`)
	n.expect(t, "POST", "/v3/maintenance/status", `{}`, 200, `"version":"3.7.3"`)
	n.expect(t, "POST", "/v3/kv/put", `{"key":"`+b64("k")+`","a_new_field":1}`, 200, `"revision"`)

	n.expect(t, "POST", "/v3/kv/range", `{}`, 400, `"message":"etcdserver: key is not provided"`)
	n.expect(t, "POST", "/v3/kv/range", `{"key":"`+b64("k")+`","revision":"99"}`, 400, `"code":11`)
	n.expect(t, "POST", "/v3/kv/range", `not json`, 400, "")
	n.expect(t, "POST", "/v3/lease/grant", `{"ID":7,"TTL":5}`, 200, `"TTL":"5"`)
	n.expect(t, "POST", "/v3/lease/keepalive", `{"ID":7}`, 200, `"TTL":"5"`)
	for _, path := range []string{"/v3/lease/", "/v3/kv/lease/"} { // etcd's names, old and new
		n.expect(t, "POST", path+"leases", `{}`, 200, `"ID":"7"`)
		n.expect(t, "POST", path+"timetolive", `{"ID":7}`, 200, `"grantedTTL":"5"`)
		n.expect(t, "POST", path+"timetolive", `{"ID":8}`, 200, `"TTL":"-1"`)
		n.expect(t, "POST", path+"revoke", `{"ID":8}`, 404, "requested lease not found")
	}
	n.expect(t, "POST", "/v3/kv/lease/revoke", `{"ID":7}`, 200, `"revision"`)
	n.expect(t, "GET", "/v3/kv/range", "", 501, "")

	large := `{"key":"` + b64("k") + `","value":"` + strings.Repeat("A", 5<<20) + `"}`
	if status, _, _ := n.request(t, "POST", "/v3/kv/put", large); status < 400 {
		t.Fatalf("a body of 5 MiB: %d", status)
	}
	fits := strings.Repeat("A", (3<<19-64)/3*4)
	n.expect(t, "POST", "/v3/kv/put", `{"key":"`+b64("k")+`","value":"`+fits+`"}`, 200, "revision")
	n.expect(t, "POST", "/v3/kv/range", `{"key":"`+b64("k")+`"}`, 200, fits)
}

func TestConfigIsValidated(t *testing.T) {
	for name, spoil := range map[string]func(*Config){
		"no name":       func(c *Config) { c.Node = "" },
		"no peers":      func(c *Config) { c.Peers = nil },
		"no classes":    func(c *Config) { c.NotDelivered = nil },
		"huge requests": func(c *Config) { c.MaxRequestBytes = 1 << 31 },
		"little room":   func(c *Config) { c.MaxPendingBytes = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(nil, &fakePeers{})
			spoil(&cfg)
			if s, err := New(cfg); err == nil {
				t.Fatal(errors.Join(errors.New("accepted"), s.Close()))
			}
		})
	}
}
