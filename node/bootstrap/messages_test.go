package bootstrap

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func goodRecord() *Record {
	return &Record{ClusterID: 7, Common: Common{Token: "t", Strategy: "full"}, Members: []Member{{"n1", 1, "n1/1"}, {"n2", 2, "n2/1"}}}
}

func goodStatus() *Status {
	return &Status{
		Version: 1, Name: "n1", Incarnation: 1, Common: Common{Token: "t", Strategy: "full"}, Founders: []string{"n1", "n2"},
		View: []Seen{{"n1", 1}, {"n2", 2}}, Record: goodRecord(), ClusterID: 7, Members: goodRecord().Members,
	}
}

func TestStatusCodec(t *testing.T) {
	payload, err := encodeMessage(goodStatus())
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeStatus(payload)
	if err != nil || !reflect.DeepEqual(got, goodStatus()) {
		t.Fatalf("%+v, %v", got, err)
	}
	newer := strings.Replace(string(payload), "{", `{"unknown":1,`, 1)
	if _, err := decodeStatus([]byte(newer)); err != nil {
		t.Fatalf("a field of a newer node: %v", err)
	}
	many := make([]Member, MaxMembers+1)
	long := strings.Repeat("x", 1000)
	for name, change := range map[string]func(*Status){
		"name":                 func(s *Status) { s.Name = "a/b" },
		"no incarnation":       func(s *Status) { s.Incarnation = 0 },
		"token":                func(s *Status) { s.Token = long },
		"strategy":             func(s *Status) { s.Strategy = "" },
		"shards":               func(s *Status) { s.Shards = MaxShards + 1 },
		"replication factor":   func(s *Status) { s.ReplicationFactor = MaxReplicas + 1 },
		"witnesses":            func(s *Status) { s.Witnesses = strings.Repeat("w", 64) },
		"founders":             func(s *Status) { s.Founders = make([]string, MaxMembers+1) },
		"founders order":       func(s *Status) { s.Founders = []string{"n2", "n1"} },
		"founder name":         func(s *Status) { s.Founders = []string{""} },
		"view":                 func(s *Status) { s.View = make([]Seen, MaxMembers+1) },
		"view name":            func(s *Status) { s.View = []Seen{{long, 1}} },
		"members":              func(s *Status) { s.Members = many },
		"members twice":        func(s *Status) { s.Members = []Member{{"n1", 1, "n1/1"}, {"n1", 2, "n1/2"}} },
		"member's replica":     func(s *Status) { s.Members = []Member{{"n1", 1, "n2/1"}} },
		"record id":            func(s *Status) { s.Record.ClusterID = 0 },
		"record empty":         func(s *Status) { s.Record.Members = nil },
		"record incarnation":   func(s *Status) { s.Record.Members[1].Incarnation = 0 },
		"record other cluster": func(s *Status) { s.Record.ClusterID = 8 },
		"record other token":   func(s *Status) { s.Record.Token = "u" },
		"record not its own":   func(s *Status) { s.ClusterID, s.Incarnation = 0, 5 },
	} {
		s := goodStatus()
		change(s)
		payload, err := encodeMessage(s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeStatus(payload); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := goodStatus()
	s.Version = 2
	payload, _ = encodeMessage(s)
	if _, err := decodeStatus(payload); !errors.Is(err, ErrVersion) {
		t.Errorf("a newer version: %v", err)
	}
	huge := []byte(`{"name":"` + strings.Repeat("x", MaxMessageBytes) + `"}`)
	if _, err := decodeStatus(huge); !errors.Is(err, ErrInvalid) {
		t.Errorf("a huge message: %v", err)
	}
	if _, err := encodeMessage(strings.Repeat("x", MaxMessageBytes)); !errors.Is(err, ErrInvalid) {
		t.Errorf("a huge answer: %v", err)
	}
}

// The largest cluster with the longest names still fits a message.
func TestLargestStatusFits(t *testing.T) {
	s := goodStatus()
	s.Token = strings.Repeat("t", MaxTokenBytes)
	s.Founders, s.View, s.Members = nil, nil, nil
	for i := range MaxMembers {
		name := strings.Repeat("n", MaxNameBytes-3) + string([]byte{'0' + byte(i/100), '0' + byte(i/10%10), '0' + byte(i%10)})
		s.Founders = append(s.Founders, name)
		s.View = append(s.View, Seen{name, 1<<64 - 1})
		s.Members = append(s.Members, Member{name, 1<<64 - 1, ReplicaID(name, 1<<64-1)})
	}
	s.Name, s.Record = s.Founders[0], &Record{ClusterID: 7, Common: Common{Token: s.Token, Strategy: "full"}, Members: s.Members}
	payload, err := encodeMessage(s)
	if err == nil {
		_, err = decodeStatus(payload)
	}
	if err != nil {
		t.Fatalf("%d bytes: %v", len(payload), err)
	}
}

func FuzzMessages(f *testing.F) {
	good, _ := encodeMessage(goodStatus())
	rejoin, _ := RejoinRequest{ClusterID: 7, Name: "n1", Incarnation: 3, Common: Common{Token: "t", Strategy: "full"}}.Encode()
	response, _ := RejoinResponse{ClusterID: 7, Replica: "n1/2", Record: goodRecord()}.Encode()
	for _, seed := range [][]byte{good, rejoin, response, []byte("{}"), []byte("[1]"), nil} {
		f.Add(seed)
	}
	d, err := open(f.TempDir(), threeNodes("n1"), files{noSync: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { d.Close() })
	formation, err := New(Config{Dir: d, Asker: unreachable})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		if s, err := decodeStatus(payload); err == nil {
			m := &formation.machine
			answers := map[string]answer{"n2": {status: s}, "n3": {status: s}}
			if next, err := m.next(answers); err == nil && next.do == decide {
				t.Fatalf("decided after %s", payload)
			}
		}
		if r, err := DecodeRejoinRequest(payload); err == nil {
			Cluster{ClusterID: r.ClusterID}.Judge(r)
		}
		DecodeRejoinResponse(payload)
		formation.HandleAsk(context.Background(), payload)
		var id identity
		decodeFile(identityFile, payload, &id)
	})
}

func TestHandleAskRefusesNonsense(t *testing.T) {
	d := mustOpen(t, t.TempDir(), threeNodes("n1"))
	f, err := New(Config{Dir: d, Asker: unreachable})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.HandleAsk(context.Background(), []byte("nonsense")); !errors.Is(err, ErrInvalid) {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := f.HandleAsk(context.Background(), []byte(`{"version":2}`)); !errors.Is(err, ErrVersion) {
		t.Errorf("a newer question: %v", err)
	}
	if _, err := New(Config{Dir: d}); !errors.Is(err, ErrInvalid) {
		t.Errorf("no asker: %v", err)
	}
}

// A member tells of its present members, which may not be those of the record.
func TestHandleAskTellsPresentMembers(t *testing.T) {
	d := mustOpen(t, t.TempDir(), threeNodes("n2"))
	record := recordFor(d)
	if err := errors.Join(d.hold(record), d.finish()); err != nil {
		t.Fatal(err)
	}
	var present []Member
	f, err := New(Config{Dir: d, Asker: unreachable, Members: func() []Member { return present }})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]Member{record.Members, {{"n2", d.Incarnation(), "n2/1"}, {"n9", 9, "n9/1"}}} {
		present = want
		reply, err := f.HandleAsk(context.Background(), []byte(`{"version":1}`))
		if err != nil {
			t.Fatal(err)
		}
		s, err := decodeStatus(reply)
		if err != nil || !reflect.DeepEqual(s.Members, want) || s.ClusterID != 77 {
			t.Fatalf("%+v, %v", s, err)
		}
		present = nil
	}
}

func TestRejoinIsJudged(t *testing.T) {
	alive := map[uint64]bool{2: true}
	cluster := Cluster{7, Common{Token: "t", Strategy: "full"}, goodRecord().Members, func(m Member) bool { return alive[m.Incarnation] }}
	for name, c := range map[string]struct {
		change  func(*RejoinRequest)
		reason  Reason
		retry   bool
		already bool
	}{
		"accepted":            {func(r *RejoinRequest) {}, "", false, false},
		"asked again":         {func(r *RejoinRequest) { r.Incarnation = 1 }, "", false, true},
		"other cluster":       {func(r *RejoinRequest) { r.ClusterID = 8 }, OtherCluster, false, false},
		"other token":         {func(r *RejoinRequest) { r.Token = "u" }, OtherSettings, false, false},
		"other shards":        {func(r *RejoinRequest) { r.Shards = 3 }, OtherSettings, false, false},
		"other replication":   {func(r *RejoinRequest) { r.ReplicationFactor = 3 }, OtherSettings, false, false},
		"other witnesses":     {func(r *RejoinRequest) { r.Witnesses = "0" }, OtherSettings, false, false},
		"unknown":             {func(r *RejoinRequest) { r.Name = "n3" }, UnknownName, false, false},
		"the old one reports": {func(r *RejoinRequest) { r.Name = "n2" }, StillReports, true, false},
	} {
		r := RejoinRequest{ClusterID: 7, Name: "n1", Incarnation: 99, Common: Common{Token: "t", Strategy: "full"}}
		c.change(&r)
		payload, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if r, err = DecodeRejoinRequest(payload); err != nil {
			t.Fatal(err)
		}
		m, already, refusal := cluster.Judge(r)
		if c.reason == "" {
			if refusal != nil || m != goodRecord().Members[0] || already != c.already {
				t.Errorf("%s: %+v %v %v", name, m, already, refusal)
			}
			continue
		}
		if refusal == nil || refusal.Reason != c.reason || refusal.Retryable() != c.retry {
			t.Errorf("%s: %v", name, refusal)
			continue
		}
		payload, err = Refuse(refusal).Encode()
		if err != nil {
			t.Fatal(err)
		}
		resp, err := DecodeRejoinResponse(payload)
		var back *RefusedError
		if err != nil || !errors.As(resp.Err(), &back) || *back != *refusal {
			t.Errorf("%s: came back as %+v, %v", name, resp, err)
		}
	}
	for name, payload := range map[string]string{
		"no replica":     `{"cluster_id":"7"}`,
		"no cluster":     `{"cluster_id":"0","replica":"n1/2"}`,
		"other cluster":  `{"cluster_id":"8","replica":"n1/2","record":{"cluster_id":"7","strategy":"full","members":[{"name":"n1","incarnation":"1","replica":"n1/1"}]}}`,
		"bad record":     `{"cluster_id":"7","replica":"n1/2","record":{"cluster_id":"7","strategy":"full"}}`,
		"a long refusal": `{"refused":"X","detail":"` + strings.Repeat("x", 5000) + `"}`,
	} {
		if _, err := DecodeRejoinResponse([]byte(payload)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, payload := range []string{`{}`, `{"name":"n1","strategy":"full"}`, `{"name":"n1","cluster_id":"7","incarnation":"1"}`, `nonsense`} {
		if _, err := DecodeRejoinRequest([]byte(payload)); !errors.Is(err, ErrInvalid) {
			t.Errorf("request %s: %v", payload, err)
		}
	}
}

// Only a node that belongs to no cluster completes a rejoin, under its own name and settings.
func TestCompleteRejoin(t *testing.T) {
	path := t.TempDir()
	d := mustOpen(t, path, threeNodes("n2"))
	f, err := New(Config{Dir: d, Asker: unreachable})
	if err != nil {
		t.Fatal(err)
	}
	other := goodRecord()
	other.Strategy = "consistent"
	for name, resp := range map[string]RejoinResponse{
		"refused":        {Refused: NotNow, Detail: "no leader"},
		"empty":          {},
		"other's":        {ClusterID: 7, Replica: "n1/2"},
		"other settings": {ClusterID: 7, Replica: "n2/2", Record: other},
	} {
		if out, err := f.CompleteRejoin(resp); err == nil || d.ClusterID() != 0 {
			t.Errorf("%s: %+v", name, out)
		}
	}
	out, err := f.CompleteRejoin(RejoinResponse{ClusterID: 7, Replica: "n2/2", Record: goodRecord()})
	if err != nil || out.ClusterID != 7 || out.Replica != "n2/2" || out.Founder || out.Record == nil || out.Rejoin != nil {
		t.Fatalf("%+v, %v", out, err)
	}
	if _, err := f.CompleteRejoin(RejoinResponse{ClusterID: 8, Replica: "n2/3"}); err == nil {
		t.Fatal("rejoined twice")
	}
	mustClose(t, d)
	d = mustOpen(t, path, threeNodes("n2"))
	if f, err = New(Config{Dir: d, Asker: unreachable}); err != nil {
		t.Fatal(err)
	}
	if again, err := f.Run(context.Background()); err != nil || !reflect.DeepEqual(again, out) {
		t.Fatalf("after a restart %+v, %v", again, err)
	}
}

func TestReplicaIDs(t *testing.T) {
	if node, number, err := ParseReplicaID(ReplicaID("n1", 12)); err != nil || node != "n1" || number != 12 {
		t.Fatal(node, number, err)
	}
	if node, number, err := ParseReplicaID("n1w/7w"); err != nil || node != "n1w" || number != 7 {
		t.Fatal(node, number, err)
	}
	for _, id := range []string{"", "w", "n1/w", "n1/1ww", "n1/1W", "n1/0w", "n1", "n1/", "n1/0", "n1/01", "n1/+1", "/1", "n1/1/1", "a b/1", "n1/18446744073709551616"} {
		if _, _, err := ParseReplicaID(id); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is accepted", id)
		}
	}
}

// Announcements win over --peers, and --peers over what an earlier process was told.
func TestBookPrefersTheNewest(t *testing.T) {
	path := t.TempDir()
	d := mustOpen(t, path, threeNodes("n1"))
	book := d.Book(quiet())
	want := func(name, addr string) {
		t.Helper()
		if got, ok := book.Resolve(name); got != addr || ok != (addr != "") {
			t.Fatalf("%s is at %q, want %q", name, got, addr)
		}
	}
	want("n2", "b:1")
	want("n9", "")
	for name, a := range map[string]Addresses{"n2": {"moved:1", "moved:2", "moved:3"}, "n9": {"nine:1", "", ""}, "n3": {"", "c:2", ""}} {
		if err := book.Announce(name, a); err != nil {
			t.Fatal(err)
		}
	}
	want("n2", "moved:1")
	want("n3", "c:1")
	want("n9", "nine:1")
	if err := book.Announce("n2", Addresses{Client: "moved:5"}); err != nil || book.Lookup("n2") != (Addresses{"moved:1", "moved:5", "moved:3"}) {
		t.Fatal(err, book.Lookup("n2"))
	}
	mustClose(t, d)

	d = mustOpen(t, path, threeNodes("n1"))
	book = d.Book(quiet())
	want("n2", "b:1")
	want("n9", "nine:1")
	if all := book.All(); len(all) != 4 || all["n2"] != (Addresses{"b:1", "moved:5", "moved:3"}) || all["n3"] != (Addresses{"c:1", "c:2", ""}) {
		t.Fatal(all)
	}
	if err := book.Announce("n2", Addresses{Peer: "moved:1"}); err != nil {
		t.Fatal(err)
	}
	want("n2", "moved:1")
}

func TestBookIsOnlyAHint(t *testing.T) {
	path := t.TempDir()
	d := mustOpen(t, path, threeNodes("n1"))
	if err := os.WriteFile(filepath.Join(path, addressesFile), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	book := d.Book(quiet())
	long := strings.Repeat("x", MaxAddressBytes+1)
	for name, a := range map[string]Addresses{"a/b": {Peer: "x:1"}, "n2": {Peer: long}, "n3": {HTTP: long}} {
		if err := book.Announce(name, a); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s %v: %v", name, a, err)
		}
	}
	for i := range 2 * MaxMembers {
		err := book.Announce(ReplicaID("x", uint64(i+1))[2:], Addresses{Peer: "x:1"})
		if (err == nil) != (i < MaxMembers) {
			t.Fatalf("announcement %d: %v", i, err)
		}
	}
	book.files.fault = func(string, string) error { return errCrash }
	if err := book.Announce("1", Addresses{Peer: "y:1"}); err != nil || book.Lookup("1").Peer != "y:1" {
		t.Fatalf("a full disk makes the book forget: %v", err)
	}
}
