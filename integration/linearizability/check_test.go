package linearizability

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A row is one operation of a hand-written history on key k.
type row struct {
	call, ret int64
	in        Input
	out       Output
}

func history(rows ...row) []Op {
	var ops []Op
	for i, r := range rows {
		if r.in.Key == "" {
			r.in.Key = "k"
		}
		ops = append(ops, Op{Client: i, Txn: int64(i + 1), Call: r.call, Return: r.ret, Input: r.in, Output: r.out})
	}
	return ops
}

func put(value string) Input          { return Input{Kind: Put, Value: value} }
func swap(expect, value string) Input { return Input{Kind: Swap, Expect: expect, Value: value} }
func at(revision int64) Output        { return Output{Revision: revision} }
func saw(revision int64, kv KV) Output {
	return Output{Revision: revision, Seen: kv}
}
func kv(value string, create, mod, version int64) KV {
	return KV{Found: true, Value: value, Create: create, Mod: mod, Version: version}
}

var (
	get     = Input{Kind: Get}
	del     = Input{Kind: Delete}
	unknown = Output{Unknown: true}
)

func TestCheckHandWritten(t *testing.T) {
	tests := map[string]struct {
		ops []Op
		bad bool
	}{
		"sequential": {ops: history(
			row{1, 2, get, saw(1, KV{})},
			row{3, 4, put("a"), at(2)},
			row{5, 6, get, saw(2, kv("a", 2, 2, 1))},
			row{7, 8, swap("a", "b"), Output{Revision: 3, Succeeded: true}},
			row{9, 10, swap("a", "c"), saw(3, kv("b", 2, 3, 2))},
			row{11, 12, del, Output{Revision: 4, Deleted: true}},
			row{13, 14, del, Output{Revision: 4}},
			row{15, 16, put("d"), at(5)},
			row{17, 18, get, saw(5, kv("d", 5, 5, 1))},
		)},
		"stale read": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, put("b"), at(3)},
			row{5, 6, get, saw(2, kv("a", 2, 2, 1))},
		)},
		"stale value with a new revision": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, put("b"), at(3)},
			row{5, 6, get, saw(3, kv("a", 2, 2, 1))},
		)},
		"a serializable read may be stale": {ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, put("b"), at(3)},
			row{5, 6, Input{Kind: Stale}, saw(2, kv("a", 2, 2, 1))},
		)},
		"a serializable read of a state that never was": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, put("b"), at(3)},
			row{5, 6, Input{Kind: Stale}, saw(3, kv("a", 2, 2, 1))},
		)},
		"lost write": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, get, saw(2, KV{})},
		)},
		"write without an answer, applied late": {ops: history(
			row{1, Open, put("a"), unknown},
			row{2, 3, get, saw(1, KV{})},
			row{4, 5, get, saw(2, kv("a", 2, 2, 1))},
		)},
		"write without an answer, never applied": {ops: history(
			row{1, Open, put("a"), unknown},
			row{2, 3, get, saw(1, KV{})},
			row{4, 5, put("b"), at(2)},
			row{6, 7, get, saw(2, kv("b", 2, 2, 1))},
		)},
		"write without an answer, unseen but counted": {ops: history(
			row{1, Open, put("a"), unknown},
			row{2, 3, put("b"), at(3)},
			row{4, 5, get, saw(3, kv("b", 2, 3, 2))},
		)},
		"write that takes effect and then never did": {bad: true, ops: history(
			row{1, Open, put("a"), unknown},
			row{2, 3, get, saw(2, kv("a", 2, 2, 1))},
			row{4, 5, get, saw(2, KV{})},
		)},
		"write applied twice": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, get, saw(3, kv("a", 2, 3, 2))},
		)},
		"swap on the wrong value": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 4, put("b"), at(3)},
			row{5, 6, swap("a", "c"), Output{Revision: 4, Succeeded: true}},
		)},
		"two swaps of one value": {bad: true, ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, 10, swap("a", "b"), Output{Revision: 3, Succeeded: true}},
			row{4, 9, swap("a", "c"), Output{Revision: 4, Succeeded: true}},
		)},
		"swap without an answer that failed changes nothing": {ops: history(
			row{1, 2, put("a"), at(2)},
			row{3, Open, swap("x", "b"), unknown},
			row{4, 5, get, saw(2, kv("a", 2, 2, 1))},
		)},
		"deletion of nothing": {bad: true, ops: history(
			row{1, 2, del, Output{Revision: 2, Deleted: true}},
		)},
		"revision went back": {bad: true, ops: history(
			row{1, 2, put("a"), at(7)},
			row{3, 4, put("b"), at(6)},
		)},
		"overlapping writes, either order": {ops: history(
			row{1, 10, put("a"), at(3)},
			row{2, 9, put("b"), at(2)},
			row{11, 12, get, saw(3, kv("a", 2, 3, 2))},
		)},
		"revisions order overlapping writes": {bad: true, ops: history(
			row{1, 10, put("a"), at(3)},
			row{2, 9, put("b"), at(2)},
			row{11, 12, get, saw(3, kv("b", 3, 2, 2))},
		)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			err := Check(test.ops, Config{Dir: dir, OneOrder: true, Timeout: 10 * time.Second})
			if !test.bad {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, ErrViolation) {
				t.Fatalf("not caught: %v", err)
			}
			pictures, _ := filepath.Glob(filepath.Join(dir, "*.html"))
			if len(pictures) != 1 || !strings.Contains(err.Error(), pictures[0]) {
				t.Fatalf("pictures %v, error %v", pictures, err)
			}
			if info, err := os.Stat(pictures[0]); err != nil || info.Size() == 0 {
				t.Fatalf("empty picture: %v", err)
			}
		})
	}
}

// What only the order between keys shows.
func TestCheckBetweenKeys(t *testing.T) {
	x, y := Input{Kind: Put, Key: "x", Value: "v"}, Input{Kind: Put, Key: "y", Value: "v"}
	getX, getY := Input{Kind: Get, Key: "x"}, Input{Kind: Get, Key: "y"}
	tests := map[string]struct {
		ops []Op
		bad bool
	}{
		"transaction seen whole": {ops: []Op{
			{Client: 0, Txn: 1, Call: 1, Return: 2, Input: x, Output: at(2)},
			{Client: 0, Txn: 1, Call: 1, Return: 2, Input: y, Output: at(2)},
			{Client: 0, Txn: 2, Call: 3, Return: 4, Input: getX, Output: saw(2, kv("v", 2, 2, 1))},
			{Client: 0, Txn: 2, Call: 3, Return: 4, Input: getY, Output: saw(2, kv("v", 2, 2, 1))},
		}},
		"transaction without an answer, torn": {bad: true, ops: []Op{
			{Client: 0, Txn: 1, Call: 1, Return: Open, Input: x, Output: unknown},
			{Client: 0, Txn: 1, Call: 1, Return: Open, Input: y, Output: unknown},
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getX, Output: saw(2, kv("v", 2, 2, 1))},
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getY, Output: saw(2, KV{})},
		}},
		"transaction at two revisions": {bad: true, ops: []Op{
			{Client: 0, Txn: 1, Call: 1, Return: Open, Input: x, Output: unknown},
			{Client: 0, Txn: 1, Call: 1, Return: Open, Input: y, Output: unknown},
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getX, Output: saw(3, kv("v", 2, 2, 1))},
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getY, Output: saw(3, kv("v", 3, 3, 1))},
		}},
		"two changes at one revision": {bad: true, ops: []Op{
			{Client: 0, Txn: 1, Call: 1, Return: 5, Input: x, Output: at(2)},
			{Client: 1, Txn: 2, Call: 2, Return: 4, Input: Input{Kind: Put, Key: "y", Value: "w"}, Output: at(2)},
		}},
		"revision went back on another key": {bad: true, ops: []Op{
			{Client: 0, Txn: 1, Call: 1, Return: 2, Input: x, Output: at(5)},
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getY, Output: saw(4, KV{})},
		}},
		"a value that nobody wrote": {bad: true, ops: []Op{
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getY, Output: saw(4, kv("z", 2, 2, 1))},
		}},
		"seen under a revision at which it was not there": {bad: true, ops: []Op{
			{Client: 0, Txn: 1, Call: 1, Return: 6, Input: x, Output: at(5)},
			{Client: 1, Txn: 2, Call: 3, Return: 4, Input: getX, Output: saw(4, kv("v", 5, 5, 1))},
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := Check(test.ops, Config{Dir: t.TempDir(), OneOrder: true})
			if test.bad != errors.Is(err, ErrViolation) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestUndecidedIsAnError(t *testing.T) {
	// Writes without an answer and a last read that nothing explains: every subset has to be tried.
	var rows []row
	for i := range int64(40) {
		rows = append(rows, row{i + 1, Open, Input{Kind: Swap, Expect: "?", Value: string(rune('A' + i))}, unknown})
		rows = append(rows, row{i + 1, Open, Input{Kind: Put, Value: string(rune('a' + i))}, unknown})
	}
	rows = append(rows, row{100, 101, get, saw(2, kv("?", 1, 1, 99))})
	err := Check(history(rows...), Config{Dir: t.TempDir(), Timeout: 200 * time.Millisecond})
	if !errors.Is(err, ErrUndecided) {
		t.Fatalf("got %v", err)
	}
}

func TestVacuous(t *testing.T) {
	full := Summary{Puts: 1, Swaps: 1, RefusedSwaps: 1, Deletes: 1, Reads: 1, Overlaps: 1, ChangesDuring: map[string]int{"kill": 1}}
	if err := full.Vacuous(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Summary){
		"no overlap":               func(s *Summary) { s.Overlaps = 0 },
		"no put":                   func(s *Summary) { s.Puts = 0 },
		"no successful swap":       func(s *Summary) { s.Swaps = 0 },
		"no refused swap":          func(s *Summary) { s.RefusedSwaps = 0 },
		"no deletion":              func(s *Summary) { s.Deletes = 0 },
		"no read":                  func(s *Summary) { s.Reads = 0 },
		"no change during a fault": func(s *Summary) { s.ChangesDuring = map[string]int{"kill": 1, "pause": 0} },
	} {
		s := full
		spoil(&s)
		if err := s.Vacuous(); !errors.Is(err, ErrVacuous) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSummarize(t *testing.T) {
	ops := history(
		row{1, 5, put("a"), at(2)},
		row{3, 8, get, saw(2, kv("a", 2, 2, 1))},
		row{10, 12, swap("a", "b"), Output{Revision: 3, Succeeded: true}},
		row{13, Open, put("c"), unknown},
		row{14, 15, del, Output{Revision: 4, Deleted: true}},
	)
	s := Summarize(ops, []Window{{Fault: "kill", From: 9, To: 16}, {Fault: "pause", From: 11, To: 13}})
	if s.Operations != 5 || s.Unknown != 1 || s.Puts != 1 || s.Reads != 1 || s.Swaps != 1 || s.Deletes != 1 || s.Overlaps != 1 {
		t.Errorf("%+v", s)
	}
	if s.ChangesDuring["kill"] != 2 || s.ChangesDuring["pause"] != 0 {
		t.Errorf("%v", s.ChangesDuring)
	}
	if _, ok := s.ChangesDuring["pause"]; !ok {
		t.Error("a kind of fault without changes is missing")
	}
}

// The file is what clients did to one key of a shard that stood still for two minutes: 89 of 130 operations are open.
// Tried everywhere, they keep the search from an end.
func TestManyOpenOutcomesAreDecided(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("testdata", "many-open.json"))
	if err != nil {
		t.Fatal(err)
	}
	var ops []Op
	if err := json.Unmarshal(text, &ops); err != nil {
		t.Fatal(err)
	}
	if err := Check(ops, Config{Dir: t.TempDir(), Timeout: 5 * time.Second}); err != nil {
		t.Fatal(err)
	}
}
