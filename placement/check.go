package placement

import (
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// ErrRefused: the group's leader must not carry out the step (from Check).
// Nothing has changed; the next plan is made from what is then.
var ErrRefused = errors.New("placement: step refused")

// Check says why the group's leader must not carry out the step now; nil if it
// may. own is the leader's own report, made just before. It goes by nothing that
// the planner has said of other replicas. Errors wrap ErrRefused.
func Check(step ShardStep, own GroupReport) error {
	reason := ""
	switch c := newChecker(own); {
	case own.Leading == nil:
		reason = "this replica does not lead the group"
	case step.Group != own.Group:
		reason = "it is for another group"
	case step.Action == Create:
	case !own.Leading.Committed:
		reason = "another change of members is not committed yet"
	case step.Prev == 0 || step.Prev != own.ConfigurationIndex:
		reason = fmt.Sprintf("it was planned on configuration %d, and %d is in force", step.Prev, own.ConfigurationIndex)
	default:
		reason = c.check(step)
	}
	if reason != "" {
		return fmt.Errorf("%w: %s %s: %s", ErrRefused, step.Action, step.Replica, reason)
	}
	return nil
}

// checker judges by what the leader has measured.
type checker struct {
	own    GroupReport
	voters []shard.Member
	member map[raft.ServerID]shard.Member
}

func newChecker(own GroupReport) checker {
	c := checker{own: own, member: make(map[raft.ServerID]shard.Member)}
	if own.Leading == nil {
		return c
	}
	for _, m := range own.Leading.Members {
		c.member[m.ID] = m
		if m.Voter {
			c.voters = append(c.voters, m)
		}
	}
	return c
}

func (c checker) alive(id raft.ServerID) bool {
	f, ok := c.own.Leading.Followers[id]
	return id == c.own.Replica || ok && f.Acked >= 0 && f.Acked <= ackedWithin
}

func (c checker) caughtUp(id raft.ServerID) bool {
	return id == c.own.Replica || c.alive(id) && near(c.own.Leading.Followers[id].Match, c.own.Commit)
}

// count counts the voters without one of them that satisfy is.
func (c checker) count(without raft.ServerID, is func(shard.Member) bool) int {
	n := 0
	for _, m := range c.voters {
		if m.ID != without && is(m) {
			n++
		}
	}
	return n
}

func anyVoter(shard.Member) bool      { return true }
func isDataVoter(m shard.Member) bool { return RoleOf(m.ID) == Data }

func (c checker) check(step ShardStep) string {
	self := c.member[c.own.Replica]
	m, in := c.member[step.Replica]
	alive := c.count("", func(m shard.Member) bool { return c.alive(m.ID) })
	twice, second := c.twice()
	must := twice && !c.needsAll(second) && !(step.Action == Remove && m.Voter && m.Node == second)
	switch {
	case !self.Voter || RoleOf(self.ID) != Data:
		return "the leader is no data voter of the group"
	case 2*alive <= len(c.voters):
		return fmt.Sprintf("only %d of %d voters have answered lately", alive, len(c.voters))
	case step.Action == Forget && in:
		return "it is in the group's configuration"
	case step.Action == Forget:
		return ""
	case step.Action == Transfer && (!m.Voter || RoleOf(m.ID) != Data || !c.caughtUp(m.ID)):
		return "it is no data voter that lives and has caught up"
	case step.Action == Transfer:
		return ""
	case must:
		return fmt.Sprintf("%s has two voters, one of which must leave first", second)
	case step.Action == AddLearner && in:
		return "it is in the group already"
	case step.Action == AddLearner && shard.NodeOf(step.Replica) == "":
		return "it has no valid replica id"
	case step.Action == AddLearner:
		return ""
	case !in:
		return "it is not in the group"
	case step.Action == Promote:
		return c.checkPromote(m, twice)
	case step.Action == Remove:
		return c.checkRemove(step, m, twice)
	}
	return "the action is unknown"
}

// twice names a node that has more than one voter.
func (c checker) twice() (bool, string) {
	nodes := make(map[string]bool)
	for _, m := range c.voters {
		if nodes[m.Node] {
			return true, m.Node
		}
		nodes[m.Node] = true
	}
	return false, ""
}

// needsAll reports whether none of the node's voters can leave yet: too few of
// the others live and have caught up.
func (c checker) needsAll(node string) bool {
	for _, m := range c.voters {
		if m.Node == node && m.ID != c.own.Replica && c.majorityWithout(m.ID) {
			return false
		}
	}
	return true
}

func (c checker) majorityWithout(id raft.ServerID) bool {
	return 2*c.count(id, func(m shard.Member) bool { return c.caughtUp(m.ID) }) > c.count(id, anyVoter)
}

func (c checker) checkPromote(m shard.Member, twice bool) string {
	if m.Voter {
		return "it votes already"
	}
	if !c.caughtUp(m.ID) {
		return fmt.Sprintf("it has not been measured to have caught up: log %d of %d", c.own.Leading.Followers[m.ID].Match, c.own.Commit)
	}
	for _, other := range c.voters {
		if other.Node == m.Node && c.alive(other.ID) && (RoleOf(other.ID) != Witness || RoleOf(m.ID) != Data || twice) {
			return fmt.Sprintf("%s on its node votes", other.ID)
		}
	}
	data := c.count("", func(m shard.Member) bool { return isDataVoter(m) && c.caughtUp(m.ID) })
	if RoleOf(m.ID) == Witness && !dataInEveryQuorum(data, len(c.voters)+1) {
		return fmt.Sprintf("with it, a quorum could be without any of the %d data replicas that live", data)
	}
	ready := c.count("", func(m shard.Member) bool { return c.caughtUp(m.ID) }) + 1
	if 2*ready <= len(c.voters)+1 {
		return fmt.Sprintf("only %d of %d voters would live and have caught up", ready, len(c.voters)+1)
	}
	return ""
}

func (c checker) checkRemove(step ShardStep, m shard.Member, twice bool) string {
	if m.ID == c.own.Replica {
		return "it leads the group"
	}
	if !m.Voter {
		return ""
	}
	left := c.count(m.ID, anyVoter)
	ready := c.count(m.ID, func(m shard.Member) bool { return c.caughtUp(m.ID) })
	copies := c.count(m.ID, func(m shard.Member) bool { return RoleOf(m.ID) == Data && c.caughtUp(m.ID) })
	switch {
	case 2*ready <= left:
		return fmt.Sprintf("only %d of %d voters would live and have caught up", ready, left)
	case RoleOf(m.ID) == Data && c.alive(m.ID) && copies < max(1, step.Copies):
		return fmt.Sprintf("only %d of %d data replicas would live and have caught up", copies, step.Copies)
	case twice, c.followed(m, copies >= step.Copies):
		return ""
	case c.alive(m.ID):
		return ""
	case left < step.Voters:
		return fmt.Sprintf("it may come back, and only %d of %d voters would be left", left, step.Voters)
	case RoleOf(m.ID) == Data && c.count(m.ID, isDataVoter) < step.Copies:
		return fmt.Sprintf("it may come back, and only %d of %d data replicas would be left", c.count(m.ID, isDataVoter), step.Copies)
	}
	return ""
}

// followed reports whether a learner is ready to take over: on the same node, or
// anywhere from a replica that does not answer. Whether that one is lost for
// ever, so that this is right, the leader cannot know. A witness follows a data
// replica only where there is enough data.
func (c checker) followed(m shard.Member, enoughData bool) bool {
	for _, next := range c.member {
		if next.Voter || !c.caughtUp(next.ID) {
			continue
		}
		if next.Node == m.Node || !c.alive(m.ID) && (RoleOf(next.ID) == Data || RoleOf(m.ID) == Witness || enoughData) {
			return true
		}
	}
	return false
}
