package compare

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvd/integration/compare/servers"
)

// post is a request to the JSON gateway.
type post struct{ path, body string }

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// posts are what clients send that are wrong, or mean harm, to the services that random calls do not reach, and some that
// are right in between. Leases have ids of the client's, so that keys are the same.
var posts = []post{
	// What is no request at all.
	{"/v3/kv/put", ``}, {"/v3/kv/put", `null`}, {"/v3/kv/put", `[]`}, {"/v3/kv/put", `{`}, {"/v3/kv/put", `{} {}`}, {"/v3/kv/put", `"x"`},
	{"/v3/kv/put", `{"key": "***"}`}, {"/v3/kv/put", `{"key": 5}`}, {"/v3/kv/put", `{"key": null}`}, {"/v3/kv/put", `{"nothing": 5, "key": "Zm9v"}`},
	{"/v3/kv/range", `{"key": "Zm9v", "revision": 1e30}`}, {"/v3/kv/range", `{"key": "Zm9v", "revision": "1.5"}`}, {"/v3/kv/range", `{"key": "Zm9v", "sort_order": "FOO"}`},
	{"/v3/kv/range", `{"key": "Zm9v", "sort_order": 9}`}, {"/v3/nothing", `{}`}, {"/v3/kv/range", `{"key": "Zm9v", "limit": "-9223372036854775808"}`},
	// Keys.
	{"/v3/kv/put", `{}`}, {"/v3/kv/put", `{"key": "Zm9v", "value": "YmFy"}`}, {"/v3/kv/put", `{"key": "AAE=", "lease": "-1"}`}, {"/v3/kv/put", `{"key": "AAE="}`},
	{"/v3/kv/range", `{}`}, {"/v3/kv/range", `{"key": "Zm9v", "range_end": "AA=="}`}, {"/v3/kv/range", `{"key": "Zm9v", "range_end": "YQ=="}`},
	{"/v3/kv/range", `{"key": "Zm9v", "range_end": ""}`}, {"/v3/kv/range", `{"key": "Zm9v", "revision": "-1"}`}, {"/v3/kv/range", `{"key": "Zm9v", "revision": "9223372036854775807"}`},
	{"/v3/kv/deleterange", `{}`}, {"/v3/kv/deleterange", `{"key": "Zm9v", "range_end": "YQ=="}`},
	{"/v3/kv/txn", `{}`}, {"/v3/kv/txn", `{"compare": [{}]}`}, {"/v3/kv/txn", `{"compare": [null]}`}, {"/v3/kv/txn", `{"success": [{}]}`}, {"/v3/kv/txn", `{"success": [null]}`},
	{"/v3/kv/txn", `{"success": [{"request_range": {}}]}`}, {"/v3/kv/txn", `{"success": [{"request_put": null}]}`}, {"/v3/kv/txn", `{"success": [{"request_txn": {}}]}`},
	{"/v3/kv/txn", `{"success": [{"request_put": {"key": "Zm9v"}, "request_range": {"key": "Zm9v"}}]}`},
	{"/v3/kv/txn", `{"compare": [{"key": "Zm9v", "range_end": "YQ==", "target": "VALUE", "value": "eA=="}], "success": [{"request_put": {"key": "Zm9v"}}]}`},
	{"/v3/kv/txn", `{"success": [{"request_put": {"key": "Zm9v", "lease": "404"}}]}`}, {"/v3/kv/txn", `{"success": [{"request_put": {"key": "bm8=", "ignore_value": true}}]}`},
	{"/v3/kv/compaction", `{"revision": "-1"}`}, {"/v3/kv/compaction", `{"revision": "9223372036854775807"}`},
	// Leases.
	{"/v3/lease/grant", `{"ID": "77", "TTL": "1000"}`}, {"/v3/lease/grant", `{"ID": "77", "TTL": "5"}`}, {"/v3/lease/grant", `{"ID": "78", "TTL": "9223372036854775807"}`},
	{"/v3/lease/grant", `{"ID": "79", "TTL": "9000000001"}`}, {"/v3/lease/grant", `{"ID": "-9223372036854775808", "TTL": "9000000000"}`}, {"/v3/lease/grant", `{"ID": "9223372036854775807", "TTL": "600"}`},
	{"/v3/lease/revoke", `{}`}, {"/v3/lease/revoke", `{"ID": "404"}`}, {"/v3/kv/lease/revoke", `{"ID": "9223372036854775807"}`}, {"/v3/lease/revoke", `{"ID": "-9223372036854775808"}`},
	{"/v3/lease/timetolive", `{}`}, {"/v3/lease/timetolive", `{"ID": "-1", "keys": true}`}, {"/v3/lease/leases", `{}`}, {"/v3/kv/lease/leases", `{}`},
	{"/v3/lease/keepalive", `{}`}, {"/v3/lease/keepalive", `{"ID": "404"}`}, {"/v3/lease/keepalive", `{"ID": "77"}`}, {"/v3/lease/keepalive", `{"ID": -1}`}, {"/v3/lease/keepalive", `nonsense`},
	// Locks.
	{"/v3/lock/lock", `{"lease": "77"}`}, {"/v3/lock/lock", `{"lease": "77"}`}, {"/v3/lock/lock", `{"name": "AAE=", "lease": "77"}`}, {"/v3/lock/lock", `{"name": "bA==", "lease": "404"}`},
	{"/v3/lock/lock", `{"name": "bA==", "lease": "-1"}`}, {"/v3/lock/lock", `{"name": "//////8=", "lease": "77"}`}, {"/v3/lock/lock", `{"name": "bA==", "lease": "77"}`},
	{"/v3/lock/unlock", `{}`}, {"/v3/lock/unlock", `{"key": "bm9uZQ=="}`}, {"/v3/lock/unlock", fmt.Sprintf(`{"key": %q}`, b64("l/4d"))}, {"/v3/lock/unlock", fmt.Sprintf(`{"key": %q}`, b64("/4d"))},
	// Elections.
	{"/v3/election/leader", `{}`}, {"/v3/election/leader", `{"name": "bm9uZQ=="}`},
	{"/v3/election/campaign", `{"lease": "77", "value": "YQ=="}`}, {"/v3/election/campaign", `{"name": "ZQ==", "lease": "404"}`}, {"/v3/election/campaign", `{"name": "ZQ==", "lease": "-1"}`},
	{"/v3/election/campaign", `{"name": "ZQ==", "lease": "77"}`}, {"/v3/election/campaign", `{"name": "ZQ==", "lease": "77", "value": "Yg=="}`}, {"/v3/election/leader", `{"name": "ZQ=="}`},
	{"/v3/election/leader", `{}`}, {"/v3/election/proclaim", `{}`}, {"/v3/election/proclaim", `{"leader": null}`}, {"/v3/election/proclaim", `{"leader": {"lease": "77"}}`},
	{"/v3/election/proclaim", fmt.Sprintf(`{"leader": {"name": "ZQ==", "key": %q, "rev": "-1", "lease": "77"}, "value": "Yw=="}`, b64("e/4d"))},
	{"/v3/election/proclaim", fmt.Sprintf(`{"leader": {"name": "ZQ==", "key": %q, "rev": "9223372036854775807", "lease": "404"}, "value": "Yw=="}`, b64("e/4d"))},
	{"/v3/election/resign", `{}`}, {"/v3/election/resign", `{"leader": {"lease": "77"}}`}, {"/v3/election/resign", fmt.Sprintf(`{"leader": {"name": "ZQ==", "key": %q, "rev": "1", "lease": "77"}}`, b64("e/4d"))},
	{"/v3/election/observe", `{"name": "ZQ=="}`},
	// Watches, of which the first answer counts.
	{"/v3/watch", `{"create_request": {"start_revision": "-1"}}`}, {"/v3/watch", `{"create_request": {"key": "Yg==", "range_end": "YQ=="}}`}, {"/v3/watch", `{"create_request": {"key": "Yg==", "watch_id": "-1"}}`},
	{"/v3/watch", `{"create_request": {"key": "Yg==", "watch_id": "9223372036854775807", "start_revision": "9223372036854775807"}}`}, {"/v3/watch", `{"create_request": {}}`},
	{"/v3/watch", `{"cancel_request": {"watch_id": "404"}} {"create_request": null} {} {"progress_request": {}} {"create_request": {"filters": [9, "NOPUT"]}}`},
	// What is too long.
	{"/v3/lock/lock", fmt.Sprintf(`{"name": %q, "lease": "77"}`, b64(strings.Repeat("n", 100<<10)))},
	{"/v3/kv/put", fmt.Sprintf(`{"key": %q}`, b64(strings.Repeat("k", maxRequestBytes)))}, {"/v3/kv/put", fmt.Sprintf(`{"key": %q}`, b64(strings.Repeat("k", maxMessageBytes)))},
	// What is left.
	{"/v3/lease/revoke", `{"ID": "77"}`}, {"/v3/election/leader", `{"name": "ZQ=="}`}, {"/v3/kv/range", `{"key": "AA==", "range_end": "AA=="}`},
}

// send returns the status and the answer, of streams that go on the first one, but for some fields.
func (p post) send(ctx context.Context, address string, without []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address+p.path, strings.NewReader(p.body))
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	line, err := bufio.NewReaderSize(response.Body, 1<<20).ReadBytes('\n')
	if err != nil && len(line) == 0 && response.ContentLength > 0 {
		return "", err
	}
	return response.Status + " " + plainJSON(line, without), nil
}

// ownFields are each server's own, and with shards the revisions, too.
var (
	ownFields       = []string{"cluster_id", "member_id", "raft_term", "details"}
	revisionsFields = []string{"revision", "create_revision", "mod_revision", "rev"}
)

// plainJSON leaves out fields, wherever they are. Some builds of a program have other spaces than others in the errors of
// package proto.
func plainJSON(text []byte, without []string) string {
	text = bytes.ReplaceAll(text, []byte("\u00a0"), []byte(" "))
	var value any
	if json.Unmarshal(bytes.TrimSpace(text), &value) != nil {
		return string(text)
	}
	var prune func(any)
	prune = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, name := range without {
				delete(v, name)
			}
			for _, inner := range v {
				prune(inner)
			}
		case []any:
			for _, inner := range v {
				prune(inner)
			}
		}
	}
	prune(value)
	out, err := json.MarshalIndent(value, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// TestServicesAnswerAsEtcd has etcd and kvd answer the same requests over HTTP: of locks and elections, too, which are
// etcd's own code on both sides, but not what is below them.
func TestServicesAnswerAsEtcd(t *testing.T) {
	for name, test := range map[string]struct{ flags, without []string }{
		"full":       {nil, ownFields},
		"consistent": {[]string{"--strategy", "consistent", "--shards", "5"}, slices.Concat(ownFields, revisionsFields)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addresses, err := servers.FreeAddresses(1)
			if err != nil {
				t.Fatal(err)
			}
			startKVD(t, 1, append(test.flags, "--listen-http", addresses[0])...)
			etcd := startEtcd(t)
			for _, p := range posts {
				want, err := p.send(t.Context(), etcd, test.without)
				if err != nil {
					t.Fatalf("%s %.200s: etcd: %v", p.path, p.body, err)
				}
				got, err := p.send(t.Context(), addresses[0], test.without)
				if err != nil {
					t.Fatalf("%s %.200s: kvd: %v", p.path, p.body, err)
				}
				if want != got {
					t.Errorf("%s %.200s\n%.3000s", p.path, p.body, cmp.Diff(want, got))
				}
			}
		})
	}
}
