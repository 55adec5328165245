package linearizability

import (
	"fmt"
	"hash/maphash"

	"github.com/anishathalye/porcupine"
)

// state is one key as the model knows it. create and mod are 0 while they are not known, which is so after a
// write whose answer nobody got; the first answer that shows them fills them in.
type state struct {
	kv KV
	// revision is the highest one answered so far: answers on one key never go back, whatever other keys do.
	// Snapshots don't count: theirs may be above that of every shard.
	revision int64
}

// model is one key of an etcd store. Besides values it follows revisions and versions, so that a write that
// takes effect twice, or a revision that goes back, is a violation too.
func model() porcupine.Model {
	seed := maphash.MakeSeed()
	return porcupine.Model{
		Partition: partition,
		Init:      func() any { return state{} },
		Step: func(s, in, out any) (bool, any) {
			next, ok := step(s.(state), in.(Input), out.(Output))
			return ok, next
		},
		Hash:              func(s any) uint64 { return maphash.Comparable(seed, s.(state)) },
		DescribeOperation: func(in, out any) string { return describe(in.(Input), out.(Output)) },
		DescribeState:     func(s any) string { return describeState(s.(state)) },
	}
}

// partition splits a history by key: linearizability is a local property.
func partition(history []porcupine.Operation) [][]porcupine.Operation {
	index := make(map[string]int)
	var parts [][]porcupine.Operation
	for _, op := range history {
		key := op.Input.(Input).Key
		i, ok := index[key]
		if !ok {
			i = len(parts)
			index[key] = i
			parts = append(parts, nil)
		}
		parts[i] = append(parts[i], op)
	}
	return parts
}

// step says whether the store could do in to s and answer out, and what it then holds.
func step(s state, in Input, out Output) (state, bool) {
	if out.Unknown {
		return stepUnknown(s, in), true
	}
	observes := Op{Input: in, Output: out}.observes()
	if observes {
		var ok bool
		if s.kv, ok = refine(s.kv, out.Seen); !ok {
			return s, false
		}
	}
	changes := Op{Input: in, Output: out}.Changes()
	if out.Revision < s.revision || changes && out.Revision == s.revision {
		return s, false
	}
	if !consistentCondition(s.kv, in, out) {
		return s, false
	}
	if !in.Snapshot {
		s.revision = out.Revision
	}
	if changes {
		s.kv = write(s.kv, in, out.Revision)
	}
	return s, true
}

// consistentCondition reports whether what the answer says of the operation's condition holds in kv.
func consistentCondition(kv KV, in Input, out Output) bool {
	switch in.Kind {
	case Delete:
		return out.Deleted == kv.Found
	case Swap:
		return out.Succeeded == holds(kv, in.Expect)
	default:
		return true
	}
}

// stepUnknown does what the operation does when it takes effect. One that never did is placed after
// everything else, where it disturbs nobody.
func stepUnknown(s state, in Input) state {
	switch {
	case in.Kind == Put, in.Kind == Delete, in.Kind == Swap && holds(s.kv, in.Expect):
		s.kv = write(s.kv, in, 0)
	}
	return s
}

func holds(kv KV, expect string) bool {
	if expect == "" {
		return !kv.Found
	}
	return kv.Found && kv.Value == expect
}

// write returns kv after a write at a revision (0 = not known).
func write(kv KV, in Input, revision int64) KV {
	if in.Kind == Delete {
		return KV{}
	}
	create := kv.Create
	if !kv.Found {
		create = revision
	}
	return KV{Found: true, Value: in.Value, Create: create, Mod: revision, Version: kv.Version + 1}
}

// refine compares what the model holds with what a client saw, and adopts the revisions it did not know.
func refine(kv, seen KV) (KV, bool) {
	if kv.Found != seen.Found || kv.Value != seen.Value || kv.Version != seen.Version {
		return kv, false
	}
	if kv.Mod != 0 && kv.Mod != seen.Mod || kv.Create != 0 && kv.Create != seen.Create {
		return kv, false
	}
	return seen, true
}

func describe(in Input, out Output) string {
	var request string
	switch in.Kind {
	case Put:
		request = fmt.Sprintf("put(%s, %s)", in.Key, in.Value)
	case Swap:
		request = fmt.Sprintf("swap(%s, %q -> %s)", in.Key, in.Expect, in.Value)
	default:
		request = fmt.Sprintf("%s(%s)", in.Kind, in.Key)
	}
	if out.Unknown {
		return request + " = unknown"
	}
	answer := fmt.Sprintf(" = r%d", out.Revision)
	switch in.Kind {
	case Swap:
		answer += fmt.Sprintf(" succeeded=%t", out.Succeeded)
	case Delete:
		answer += fmt.Sprintf(" deleted=%t", out.Deleted)
	}
	if (Op{Input: in, Output: out}).observes() {
		answer += " saw " + describeKV(out.Seen)
	}
	return request + answer
}

func describeKV(kv KV) string {
	if !kv.Found {
		return "nothing"
	}
	return fmt.Sprintf("%s (create %d, mod %d, version %d)", kv.Value, kv.Create, kv.Mod, kv.Version)
}

func describeState(s state) string {
	return fmt.Sprintf("%s at r%d", describeKV(s.kv), s.revision)
}
