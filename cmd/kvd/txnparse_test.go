package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

func TestParseCompare(t *testing.T) {
	for line, want := range map[string]*pb.Compare{
		`val("k") = "v"`:         {Key: []byte("k"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("v")}},
		`value("a b\n") != "\""`: {Key: []byte("a b\n"), Target: pb.Compare_VALUE, Result: pb.Compare_NOT_EQUAL, TargetUnion: &pb.Compare_Value{Value: []byte(`"`)}},
		`value("(k)")="=v"`:      {Key: []byte("(k)"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("=v")}},
		`ver("k") > "1"`:         {Key: []byte("k"), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{Version: 1}},
		`version("k")<2`:         {Key: []byte("k"), Target: pb.Compare_VERSION, Result: pb.Compare_LESS, TargetUnion: &pb.Compare_Version{Version: 2}},
		`version("k")!=2`:        {Key: []byte("k"), Target: pb.Compare_VERSION, Result: pb.Compare_NOT_EQUAL, TargetUnion: &pb.Compare_Version{Version: 2}},
		`c("k") = "0"`:           {Key: []byte("k"), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{}},
		`create("k") = 3`:        {Key: []byte("k"), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 3}},
		`m("k") = "-4"`:          {Key: []byte("k"), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: -4}},
		`mod("k") > -4`:          {Key: []byte("k"), Target: pb.Compare_MOD, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_ModRevision{ModRevision: -4}},
		`lease("k") = "ff"`:      {Key: []byte("k"), Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: 255}},
	} {
		c, err := parseCompare(line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
		} else if !proto.Equal(c.GetCompare(), want) {
			t.Errorf("%s: read as %v, want %v", line, c.GetCompare(), want)
		}
	}
	for _, line := range []string{
		"", "nonsense", `mod(k) = "1"`, `mod("k") = `, `mod("k") "1"`, `mod("k") == "1"`, `mod("k") => "1"`, `mod("k") = "x"`,
		`size("k") = "1"`, `val("k) = "v"`, `val("k") = "v" extra`, `val("\q") = "v"`, `lease("k") = "xyz"`,
	} {
		if c, err := parseCompare(line); err == nil {
			t.Errorf("%s: read as %v", line, c.GetCompare())
		}
	}
}

func TestSplitWords(t *testing.T) {
	for line, want := range map[string][]string{
		"put k v":                {"put", "k", "v"},
		"  put\tk   v  ":         {"put", "k", "v"},
		`put "a b" 'c "d"'`:      {"put", "a b", `c "d"`},
		`put k "x\n\x00\"y"`:     {"put", "k", "x\n\x00\"y"},
		`put k {"a":1}`:          {"put", "k", `{"a":1}`},
		`put k ""`:               {"put", "k", ""},
		`put k ''`:               {"put", "k", ""},
		`put k it's`:             {"put", "k", "it's"},
		`put k 'back\slash'`:     {"put", "k", `back\slash`},
		`put k --lease=1 -- "-"`: {"put", "k", "--lease=1", "--", "-"},
	} {
		words, err := splitWords(line)
		if err != nil || !slices.Equal(words, want) {
			t.Errorf("%s: split into %q, %v; want %q", line, words, err, want)
		}
	}
	for _, line := range []string{`put "a`, `put 'a`, `put "a"b`, `put "\q"`} {
		if words, err := splitWords(line); err == nil {
			t.Errorf("%s: split into %q", line, words)
		}
	}
}

func TestReadTxn(t *testing.T) {
	const whole = "mod(\"k\") > \"0\"\nver(\"k\") = \"1\"\n\nput k \"a b\"\nget k\n\ndel k --prefix\n\nnever read\n"
	var prompt bytes.Buffer
	got, err := readTxn(bufio.NewReader(strings.NewReader(whole)), &prompt)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.compares) != 2 || len(got.success) != 2 || len(got.failure) != 1 {
		t.Errorf("read %d compares, %d and %d requests", len(got.compares), len(got.success), len(got.failure))
	}
	if string(got.success[0].ValueBytes()) != "a b" || !got.success[1].IsGet() || !got.failure[0].IsDelete() {
		t.Errorf("read the requests as %v, %v", got.success, got.failure)
	}
	if want := "compares:\nsuccess requests (get, put, del):\nfailure requests (get, put, del):\n"; prompt.String() != want {
		t.Errorf("prompts %q, want %q", prompt.String(), want)
	}
}

func TestReadTxnEndsWithItsInput(t *testing.T) {
	for in, want := range map[string][3]int{
		"\n\n\n":                    {0, 0, 0},
		"\nput k v":                 {0, 1, 0},
		"mod(\"k\") = 0":            {1, 0, 0},
		"\r\n put k v\r\n\r\nget k": {0, 1, 1},
	} {
		got, err := readTxn(bufio.NewReader(strings.NewReader(in)), io.Discard)
		if counts := [3]int{len(got.compares), len(got.success), len(got.failure)}; err != nil || counts != want {
			t.Errorf("%q: read %v, %v; want %v", in, counts, err, want)
		}
	}
}

func TestReadTxnErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":                       "wants a transaction",
		"what\n":                 "line 1:",
		"\nput k v\nfrob k\n":    `line 3: "frob" is not a request`,
		"\nput k\n":              "line 2: put wants a key and a value",
		"\nput k v --bogus\n":    "line 2: put: unknown flag",
		"\nget k --order x\n":    "line 2: --order",
		"\nput k v --lease q\n":  "line 2: --lease",
		"\nput \"k\n":            "double quote",
		"\n\nget k --help\n":     "line 3:",
		"\n\nget a --prefix b\n": "line 3:",
	} {
		_, err := readTxn(bufio.NewReader(strings.NewReader(in)), io.Discard)
		var usage *usageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", in, err, want)
		}
	}
	if _, err := readTxn(bufio.NewReader(io.MultiReader(strings.NewReader("\nget"), brokenReader{})), io.Discard); !errors.Is(err, errTest) {
		t.Errorf("a read error became %v", err)
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errTest }
