package raftlog

import (
	"fmt"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// A replica that has voted for A in term 2 crashes while it votes for B in term 3. Wherever that happens, it
// must not vote for A in term 3, whose log is behind by then. Raft itself does the voting.
func TestCrashInsideAVote(t *testing.T) {
	if granted, crashes := votesForStaleCandidate(t, false); granted != 0 || crashes < 2 {
		t.Errorf("%d of %d crashes lead to a vote for a candidate with a stale log", granted, crashes)
	}
}

// Storing term and candidate one after the other, as raft does, is what the guard is for.
func TestUnguardedVotesAreSeen(t *testing.T) {
	if granted, crashes := votesForStaleCandidate(t, true); granted == 0 {
		t.Errorf("none of %d crashes leads to a vote for a candidate with a stale log", crashes)
	}
}

func votesForStaleCandidate(t *testing.T, unguarded bool) (granted, crashes int) {
	s := newStore(t, Options{})
	s.hooks.unguardedVotes = unguarded
	must(t, raft.BootstrapCluster(raftConfig(), s, s, raft.NewDiscardSnapshotStore(), inmem("n1/1"), raft.Configuration{
		Servers: []raft.Server{{ID: "n1/1", Address: "n1/1"}, {ID: "a/1", Address: "a/1"}, {ID: "b/1", Address: "b/1"}},
	}))
	r := newVoter(t, s)
	if !r.ask("a/1", 2, 1, 1) {
		t.Fatal("no vote for A in term 2")
	}
	r.stop()
	for index := uint64(2); index <= 5; index++ {
		must(t, s.StoreLog(&raft.Log{Index: index, Term: 2, Type: raft.LogNoop}))
	}

	images := images(t, s)
	r = newVoter(t, s)
	if !r.ask("b/1", 3, 5, 2) {
		t.Fatal("no vote for B in term 3")
	}
	r.stop()
	for _, path := range *images {
		crashed := open(t, Options{Path: path})
		crashed.hooks.unguardedVotes = unguarded
		r := newVoter(t, crashed)
		if r.ask("a/1", 3, 1, 1) {
			granted++
		}
		// The vote that may or may not have been stored is still B's to get.
		if !unguarded && !r.ask("b/1", 3, 5, 2) {
			t.Errorf("%s: no vote for B in term 3", filepath.Base(path))
		}
		r.stop()
	}
	return granted, len(*images)
}

// Once a vote is stored, nobody else gets one in that term, whatever restarts there are.
func TestOneVotePerTerm(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	s := open(t, Options{Path: path})
	must(t, raft.BootstrapCluster(raftConfig(), s, s, raft.NewDiscardSnapshotStore(), inmem("n1/1"), raft.Configuration{
		Servers: []raft.Server{{ID: "n1/1", Address: "n1/1"}, {ID: "a/1", Address: "a/1"}, {ID: "b/1", Address: "b/1"}},
	}))
	for term := uint64(2); term < 6; term++ {
		winner, loser := raft.ServerID("a/1"), raft.ServerID("b/1")
		if term%2 == 0 {
			winner, loser = loser, winner
		}
		for restart, want := range []raft.ServerID{winner, loser, winner} {
			r := newVoter(t, s)
			if got := r.ask(want, term, 1, 1); got != (want == winner) {
				t.Errorf("term %d after %d restarts: vote for %s is %v", term, restart, want, got)
			}
			r.stop()
			must(t, s.Close())
			s = open(t, Options{Path: path})
		}
	}
}

// voter is a raft that never stands for election.
type voter struct {
	t     *testing.T
	raft  *raft.Raft
	peer  *raft.InmemTransport
	local *raft.InmemTransport
}

func raftConfig() *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = "n1/1"
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = time.Hour, time.Hour, time.Hour
	c.Logger = hclog.New(&hclog.LoggerOptions{Output: io.Discard})
	return c
}

func inmem(address raft.ServerAddress) *raft.InmemTransport {
	_, trans := raft.NewInmemTransportWithTimeout(address, time.Minute)
	return trans
}

func newVoter(t *testing.T, s *Store) *voter {
	t.Helper()
	v := &voter{t: t, local: inmem("n1/1"), peer: inmem("peer")}
	v.peer.Connect("n1/1", v.local)
	var err error
	v.raft, err = raft.NewRaft(raftConfig(), &raft.MockFSM{}, s, s, raft.NewDiscardSnapshotStore(), v.local)
	must(t, err)
	return v
}

func (v *voter) stop() {
	must(v.t, v.raft.Shutdown().Error())
	must(v.t, v.local.Close())
	must(v.t, v.peer.Close())
}

// ask requests a vote for candidate, whose last log entry has the given index and term.
func (v *voter) ask(candidate raft.ServerID, term, lastIndex, lastTerm uint64) bool {
	v.t.Helper()
	var resp raft.RequestVoteResponse
	err := v.peer.RequestVote("n1/1", "n1/1", &raft.RequestVoteRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(candidate), Addr: []byte(candidate)},
		Term:         term,
		LastLogIndex: lastIndex,
		LastLogTerm:  lastTerm,
	}, &resp)
	must(v.t, err)
	if resp.Term != term {
		v.t.Fatal(fmt.Errorf("answered in term %d, asked in %d", resp.Term, term))
	}
	return resp.Granted
}
