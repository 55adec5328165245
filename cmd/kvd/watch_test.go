package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func watchEvents(revision int64, events ...*mvccpb.Event) *pb.WatchResponse {
	return &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: revision}, Events: events}
}

func putEvent(key, value string, revision int64) *mvccpb.Event {
	return &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), CreateRevision: revision, ModRevision: revision, Version: 1}}
}

func deleteEvent(key string, revision int64, before string) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision},
		PrevKv: &mvccpb.KeyValue{Key: []byte(key), Value: []byte(before)}}
}

// compactedWatch is what ends a watch, and with it the command.
var compactedWatch = &pb.WatchResponse{Header: &pb.ResponseHeader{}, Canceled: true, CompactRevision: 40}

func TestWatchPrints(t *testing.T) {
	for format, want := range map[string]string{
		"simple": "PUT\na\n1\nDELETE\nb\nold\nb\n\nprogress notify: 9\n",
		"json":   `{"Header":{"revision":8},"Events":[{"kv":{"key":"YQ==","create_revision":8,"mod_revision":8,"version":1,"value":"MQ=="}},{"type":1,"kv":{"key":"Yg==","mod_revision":8},"prev_kv":{"key":"Yg==","value":"b2xk"}}],"CompactRevision":0,"Canceled":false,"Created":false,"CancelReason":""}` + "\n" + `{"Header":{"revision":9},"Events":null,"CompactRevision":0,"Canceled":false,"Created":false,"CancelReason":""}` + "\n",
	} {
		f := startFake(t)
		f.watches = [][]*pb.WatchResponse{{watchEvents(8, putEvent("a", "1", 8), deleteEvent("b", 8, "old")), watchEvents(9), compactedWatch}}
		code, out, errOut := kvd(t, "", "watch", "--prefix", "", "-w", format, "--endpoints", f.addr)
		if code != exitFailed || out != want {
			t.Errorf("%s: printed\n%s\nwant\n%s\nand %q with exit code %d", format, out, want, errOut, code)
		}
		if !strings.Contains(errOut, "before revision 40 is forgotten; watch from there") {
			t.Errorf("the error does not say what to do: %q", errOut)
		}
	}
}

// seenOutput tells the server that something has been printed.
type seenOutput struct {
	bytes.Buffer
	seen chan<- struct{}
}

func (s *seenOutput) Write(b []byte) (int, error) {
	n, err := s.Buffer.Write(b)
	if bytes.HasSuffix(b, []byte("1\n")) || bytes.HasPrefix(b, []byte("progress")) {
		s.seen <- struct{}{}
	}
	return n, err
}

// While there is no leader it waits, and misses nothing.
func TestWatchGoesOnWhereItWas(t *testing.T) {
	f := startFake(t)
	f.watches = [][]*pb.WatchResponse{{watchEvents(8, putEvent("a", "1", 8))}, {watchEvents(12)}, {compactedWatch}}
	f.seen = make(chan struct{}, 1)
	out, errOut := &seenOutput{seen: f.seen}, new(bytes.Buffer)
	run(t.Context(), []string{"watch", "a", "--endpoints", f.addr}, strings.NewReader(""), out, errOut)
	if out.String() != "PUT\na\n1\nprogress notify: 12\n" || strings.Count(errOut.String(), "no leader") != 1 {
		t.Errorf("printed %q and %q", out, errOut)
	}
	var from []int64
	for _, r := range all[*pb.WatchCreateRequest](f) {
		from = append(from, r.GetStartRevision())
	}
	if want := []int64{0, 9, 13}; !slices.Equal(from, want) {
		t.Errorf("watched from revisions %d, want %d", from, want)
	}
}

// A watch from now on that has not seen anything goes on from when it began.
func TestWatchGoesOnWhereItBegan(t *testing.T) {
	for start, want := range map[int64]int64{0: 8, 3: 3} {
		f := &follower{next: start}
		watch := make(chan clientv3.WatchResponse, 1)
		watch <- clientv3.WatchResponse{Header: &pb.ResponseHeader{Revision: 7}, Created: true}
		close(watch)
		if err := f.follow(t.Context(), watch); err == nil || f.next != want {
			t.Errorf("from %d: goes on from %d, want %d (%v)", start, f.next, want, err)
		}
	}
}

func TestWatchRequests(t *testing.T) {
	for line, want := range map[string]*pb.WatchCreateRequest{
		"k":                        {Key: []byte("k")},
		"k l --rev 5":              {Key: []byte("k"), RangeEnd: []byte("l"), StartRevision: 5},
		"k --prefix --prev-kv":     {Key: []byte("k"), RangeEnd: []byte("l"), PrevKv: true},
		"k --from-key --progress":  {Key: []byte("k"), RangeEnd: []byte{0}, ProgressNotify: true},
		"k --progress-notify":      {Key: []byte("k"), ProgressNotify: true},
		"k l -- sh -c exit --flag": {Key: []byte("k"), RangeEnd: []byte("l")},
	} {
		f := startFake(t)
		f.watches = [][]*pb.WatchResponse{{compactedWatch}}
		kvd(t, "", append([]string{"watch", "--endpoints", f.addr}, strings.Fields(line)...)...)
		got, ok := f.last().(*pb.WatchCreateRequest)
		if !ok || string(got.Key) != string(want.Key) || string(got.RangeEnd) != string(want.RangeEnd) || got.StartRevision != want.StartRevision ||
			got.PrevKv != want.PrevKv || got.ProgressNotify != want.ProgressNotify {
			t.Errorf("%s: asked for %v, want %v", line, f.last(), want)
		}
	}
}

func TestWatchRunsCommands(t *testing.T) {
	const script = `echo "$KVD_WATCH_EVENT_TYPE|$KVD_WATCH_KEY|${KVD_WATCH_VALUE-unset}|${KVD_WATCH_PREV_VALUE-unset}|$KVD_WATCH_REVISION|$(wc -c)"
echo "$ETCD_WATCH_EVENT_TYPE|$ETCD_WATCH_KEY|$ETCD_WATCH_VALUE|$ETCD_WATCH_REVISION"`
	f := startFake(t)
	f.watches = [][]*pb.WatchResponse{{watchEvents(9, putEvent("a", "x y", 8), putEvent("n", "a\x00b", 9)), watchEvents(10, deleteEvent("b", 10, "old")), compactedWatch}}
	_, out, errOut := kvd(t, "", "watch", "a", "--endpoints", f.addr, "--", "sh", "-c", script)
	want := "PUT\na\nx y\nPUT\nn\na\x00b\n" +
		"PUT|a|x y|unset|8|3\n" + `"PUT"|"a"|"x y"|9` + "\n" +
		"PUT|n|unset|unset|9|3\n" + `"PUT"|"n"|"a\x00b"|9` + "\n" +
		"DELETE\nb\nold\nb\n\n" +
		"DELETE|b||old|10|0\n" + `"DELETE"|"b"|""|10` + "\n"
	if out != want {
		t.Errorf("printed\n%s\nwant\n%s\n%s", out, want, errOut)
	}
}

func TestWatchEndsWhenItsCommandFails(t *testing.T) {
	f := startFake(t)
	f.watches = [][]*pb.WatchResponse{{watchEvents(9, putEvent("a", "1", 8), putEvent("b", "2", 9))}}
	code, out, errOut := kvd(t, "", "watch", "a", "--endpoints", f.addr, "--", "sh", "-c", `echo ran; exit 3`)
	if code != exitFailed || strings.Count(out, "ran") != 1 || !strings.Contains(errOut, "sh failed at revision 8: exit code 3") {
		t.Errorf("printed %q and %q with exit code %d", out, errOut, code)
	}
}
