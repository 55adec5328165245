package placement

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// leading is a leader's report: of n1/1, which leads, and these members. A name
// that ends in "?" is a learner's; one that ends in "!" does not answer; one that
// ends in "-" lags.
func leading(members ...string) GroupReport {
	report := GroupReport{Group: 1, Replica: "n1/1", Term: 3, Commit: 1000, Last: 1000, ConfigurationIndex: 40,
		Leading: &Leading{Committed: true, Followers: make(map[raft.ServerID]Following)}}
	for _, m := range members {
		id := raft.ServerID(strings.TrimRight(m, "?!-"))
		report.Leading.Members = append(report.Leading.Members, shard.Member{ID: id, Node: shard.NodeOf(id), Voter: !strings.Contains(m, "?")})
		f := Following{Match: 990, Acked: time.Second}
		if strings.Contains(m, "!") {
			f.Acked = time.Minute
		}
		if strings.Contains(m, "-") {
			f.Match = 1000 - maxLag - 1
		}
		if id != report.Replica {
			report.Leading.Followers[id] = f
		}
	}
	return report
}

func TestCheck(t *testing.T) {
	for name, test := range map[string]struct {
		members string
		step    ShardStep
		refused string // what the error says; empty = none
	}{
		"create": {"n1/1 n2/2 n3/3", ShardStep{Action: Create, Node: "n4"}, ""},

		"add":                {"n1/1 n2/2 n3/3", ShardStep{Action: AddLearner, Replica: "n4/4"}, ""},
		"add, one dead":      {"n1/1 n2/2! n3/3", ShardStep{Action: AddLearner, Replica: "n4/4"}, ""},
		"add, no quorum":     {"n1/1 n2/2! n3/3!", ShardStep{Action: AddLearner, Replica: "n4/4"}, "1 of 3 voters have answered"},
		"add again":          {"n1/1 n2/2 n4/4?", ShardStep{Action: AddLearner, Replica: "n4/4"}, "already"},
		"add nobody":         {"n1/1 n2/2 n3/3", ShardStep{Action: AddLearner, Replica: "n4"}, "no valid"},
		"add beside a pair":  {"n1/1 n2/2 n3/3w n3/4", ShardStep{Action: AddLearner, Replica: "n5/5"}, "n3 has two voters"},
		"transfer":           {"n1/1 n2/2 n3/3w", ShardStep{Action: Transfer, Replica: "n2/2"}, ""},
		"transfer beside":    {"n1/1 n2/2 n3/3w n3/4", ShardStep{Action: Transfer, Replica: "n2/2"}, ""},
		"transfer to a lag":  {"n1/1 n2/2- n3/3w", ShardStep{Action: Transfer, Replica: "n2/2"}, "no data voter that lives"},
		"transfer: witness":  {"n1/1 n2/2 n3/3w", ShardStep{Action: Transfer, Replica: "n3/3w"}, "no data voter"},
		"transfer: learner":  {"n1/1 n2/2 n3/3?", ShardStep{Action: Transfer, Replica: "n3/3"}, "no data voter"},
		"transfer: stranger": {"n1/1 n2/2 n3/3", ShardStep{Action: Transfer, Replica: "n4/4"}, "no data voter"},

		"promote":                    {"n1/1 n2/2 n3/3 n4/4?", ShardStep{Action: Promote, Replica: "n4/4"}, ""},
		"promote, one dead":          {"n1/1 n2/2! n3/3 n4/4?", ShardStep{Action: Promote, Replica: "n4/4"}, ""},
		"promote, one dead, one lag": {"n1/1 n2/2! n3/3- n4/4?", ShardStep{Action: Promote, Replica: "n4/4"}, "2 of 4 voters would live"},
		"promote a lag":              {"n1/1 n2/2 n3/3 n4/4-?", ShardStep{Action: Promote, Replica: "n4/4"}, "not been measured"},
		"promote the silent":         {"n1/1 n2/2 n3/3 n4/4?!", ShardStep{Action: Promote, Replica: "n4/4"}, "not been measured"},
		"promote a voter":            {"n1/1 n2/2 n3/3", ShardStep{Action: Promote, Replica: "n3/3"}, "votes already"},
		"promote a stranger":         {"n1/1 n2/2 n3/3", ShardStep{Action: Promote, Replica: "n4/4"}, "not in the group"},
		"promote beside a witness":   {"n1/1 n2/2! n3/3w n3/4?", ShardStep{Action: Promote, Replica: "n3/4"}, ""},
		"promote beside data":        {"n1/1 n2/2 n3/3 n3/4w?", ShardStep{Action: Promote, Replica: "n3/4w"}, "n3/3 on its node votes"},
		"promote beside the lost":    {"n1/1 n2/2 n3/3! n3/4?", ShardStep{Action: Promote, Replica: "n3/4"}, ""},
		"promote a third witness":    {"n1/1 n2/2 n3/3w n4/4w n5/5w?", ShardStep{Action: Promote, Replica: "n5/5w"}, "without any of the 2 data"},
		"promote a witness for data": {"n1/1 n2/2! n3/3w n4/4w?", ShardStep{Action: Promote, Replica: "n4/4w"}, "without any of the 1 data"},

		"remove a learner":         {"n1/1 n2/2 n3/3 n4/4?!", ShardStep{Action: Remove, Replica: "n4/4"}, ""},
		"remove a surplus copy":    {"n1/1 n2/2 n3/3 n4/4", ShardStep{Action: Remove, Replica: "n4/4"}, ""},
		"remove a needed copy":     {"n1/1 n2/2 n3/3 n4/4-", ShardStep{Action: Remove, Replica: "n3/3"}, "2 of 3 data replicas"},
		"remove the dead":          {"n1/1 n2/2 n3/3! n4/4", ShardStep{Action: Remove, Replica: "n3/3"}, ""},
		"remove the dead early":    {"n1/1 n2/2 n3/3!", ShardStep{Action: Remove, Replica: "n3/3"}, "2 of 3 voters would be left"},
		"remove the lost":          {"n1/1 n2/2 n3/3! n4/4?", ShardStep{Action: Remove, Replica: "n3/3"}, ""},
		"remove the lost early":    {"n1/1 n2/2 n3/3! n4/4?-", ShardStep{Action: Remove, Replica: "n3/3"}, "may come back"},
		"remove for a witness":     {"n1/1 n2/2! n3/3 n4/4 n5/5w?", ShardStep{Action: Remove, Replica: "n2/2"}, ""},
		"no quorum after":          {"n1/1 n2/2 n3/3! n4/4!", ShardStep{Action: Remove, Replica: "n2/2", Copies: 1}, "2 of 4 voters have answered"},
		"lagging quorum after":     {"n1/1 n2/2 n3/3-", ShardStep{Action: Remove, Replica: "n2/2", Copies: 1}, "1 of 2 voters would live"},
		"remove the leader":        {"n1/1 n2/2 n3/3 n4/4", ShardStep{Action: Remove, Replica: "n1/1"}, "it leads"},
		"remove the second vote":   {"n1/1 n2/2! n3/3w n3/4", ShardStep{Action: Remove, Replica: "n3/3w"}, ""},
		"remove another first":     {"n1/1 n2/2! n3/3w n3/4", ShardStep{Action: Remove, Replica: "n2/2"}, "n3 has two voters"},
		"remove another, needed":   {"n1/1 n2/2! n3/3w n3/4 n5/5!", ShardStep{Action: Remove, Replica: "n2/2"}, ""},
		"downgrade":                {"n1/1 n2/2 n5/5 n3/3 n3/4w?", ShardStep{Action: Remove, Replica: "n3/3"}, ""},
		"downgrade early":          {"n1/1 n2/2 n3/3 n3/4w?", ShardStep{Action: Remove, Replica: "n3/3"}, "2 of 3 data replicas"},
		"remove what is not there": {"n1/1 n2/2 n3/3", ShardStep{Action: Remove, Replica: "n4/4"}, "not in the group"},

		"forget":           {"n1/1 n2/2 n3/3", ShardStep{Action: Forget, Replica: "n4/4"}, ""},
		"forget early":     {"n1/1 n2/2 n3/3 n4/4?", ShardStep{Action: Forget, Replica: "n4/4"}, "in the group's configuration"},
		"led by a learner": {"n1/1? n2/2 n3/3", ShardStep{Action: AddLearner, Replica: "n4/4"}, "no data voter"},
		"unknown":          {"n1/1 n2/2 n3/3", ShardStep{Action: "dance", Replica: "n2/2"}, "unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			step := test.step
			step.Group, step.Prev, step.Voters = 1, 40, 3
			if step.Copies == 0 {
				step.Copies = 3
			}
			expect(t, Check(step, leading(strings.Fields(test.members)...)), test.refused)
		})
	}
}

func expect(t *testing.T, err error, refused string) {
	t.Helper()
	switch {
	case refused == "" && err != nil:
		t.Errorf("refused: %v", err)
	case refused != "" && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), refused)):
		t.Errorf("%v, want one that says %q", err, refused)
	}
}

// A step applies to the configuration that it was planned on, to the group that
// it is for, and on the leader alone.
func TestCheckOfWhatChangedMeanwhile(t *testing.T) {
	step := ShardStep{Action: AddLearner, Group: 1, Replica: "n4/4", Prev: 40}
	own := leading("n1/1", "n2/2", "n3/3")
	expect(t, Check(step, own), "")

	late := step
	late.Prev = 39
	expect(t, Check(late, own), "planned on configuration 39")
	late.Prev = 0
	expect(t, Check(late, own), "planned on configuration 0")
	other := step
	other.Group = 2
	expect(t, Check(other, own), "another group")

	own.Leading.Committed = false
	expect(t, Check(step, own), "not committed")
	own.Leading = nil
	expect(t, Check(step, own), "does not lead")
}
