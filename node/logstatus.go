package node

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"os"

	"github.com/hashicorp/raft"

	"kvd/node/bootstrap"
	"kvd/placement"
)

// LogStatus is what is in the raft logs of a data directory.
type LogStatus struct {
	Kind      string       `json:"kind"`       // RaftLogShared or RaftLogBolt
	Files     int          `json:"files"`      // segments of the shared log, or one for each replica
	Spares    int          `json:"spares"`     // of the shared log: segments kept for later, not in Files
	SizeBytes int64        `json:"size_bytes"` // of the files
	LiveBytes int64        `json:"live_bytes"` // of the shared log: what of that is in use
	Replicas  []ReplicaLog `json:"replicas"`
}

// ReplicaLog is one replica's.
type ReplicaLog struct {
	Group     uint64 `json:"group"`
	ID        string `json:"id"`
	First     uint64 `json:"first"` // index; 0: no entries
	Last      uint64 `json:"last"`
	Term      uint64 `json:"term"`
	VoteTerm  uint64 `json:"vote_term"` // 0: never voted
	Vote      string `json:"vote"`
	SizeBytes int64  `json:"size_bytes"` // of the file, or the live bytes in the shared log
}

// ReadLogStatus looks at the raft logs of a data directory in which no node
// runs (bootstrap.ErrInUse).
func ReadLogStatus(dataDir string) (status LogStatus, err error) {
	dir, err := bootstrap.OpenOffline(dataDir)
	if err != nil {
		return status, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if status.Kind, err = kindOf(dir, dataDir); err != nil {
		return status, err
	}
	logs, err := openLogs(status.Kind, logConfig{dataDir: dataDir, logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return status, err
	}
	defer func() { err = errors.Join(err, logs.close()) }()
	replicas, err := logsIn(dataDir, dir, logs)
	if err != nil {
		return status, err
	}
	keys, err := logs.keys(replicas)
	if err != nil {
		return status, err
	}
	for _, r := range replicas {
		log, err := statusOf(logs, r, keys[r])
		if err != nil {
			return status, err
		}
		status.Replicas = append(status.Replicas, log)
	}
	return status, logs.measure(&status)
}

func statusOf(logs raftLogs, r placement.ReplicaRef, keys stableKeys) (status ReplicaLog, err error) {
	number := func(key string) uint64 {
		if len(keys[key]) != 8 {
			return 0
		}
		return binary.BigEndian.Uint64(keys[key])
	}
	status = ReplicaLog{Group: r.Group, ID: string(r.ID), Term: number(keyTerm), VoteTerm: number(keyVoteTerm), Vote: string(keys[keyVoteCandidate])}
	log, err := logs.open(r, nil, -1)
	if err != nil {
		return status, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	first, err1 := log.FirstIndex()
	last, err2 := log.LastIndex()
	status.First, status.Last = first, last
	return status, errors.Join(err1, err2)
}

func (b boltLogs) measure(status *LogStatus) error {
	status.Files = len(status.Replicas)
	for i := range status.Replicas {
		r := &status.Replicas[i]
		info, err := os.Stat(b.path(placement.ReplicaRef{Group: r.Group, ID: raft.ServerID(r.ID)}))
		if err != nil {
			return err
		}
		r.SizeBytes = info.Size()
		status.SizeBytes += r.SizeBytes
	}
	return nil
}

func (s *sharedLogs) measure(status *LogStatus) error {
	total := s.log.Status()
	status.Files, status.Spares, status.SizeBytes, status.LiveBytes = total.Segments, total.Spares, total.SizeBytes, total.LiveBytes
	for _, there := range total.Replicas {
		for i := range status.Replicas {
			r := &status.Replicas[i]
			if id, err := logID(placement.ReplicaRef{Group: r.Group, ID: raft.ServerID(r.ID)}); err == nil && id == there.ID {
				r.SizeBytes = there.LiveBytes
			}
		}
	}
	return nil
}
