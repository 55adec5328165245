package bootstrap

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// machine is the protocol of the package comment without its surroundings: what one node knows, and which step
// follows from a round of answers. It does no I/O and is used by one goroutine.
type machine struct {
	set    Settings
	id     identity
	record *Record
	view   map[string]uint64 // by name: the incarnation that answered last

	faults faults
}

// faults are planted by tests, which must notice them.
type faults struct {
	decideEarly bool // decide when a majority has answered
	adoptAny    bool // adopt a record that names another incarnation
	ignoreViews bool // decide although the others have heard of other incarnations
	finishAlone bool // finish without a majority
}

// answer is what came of asking one peer in one round: a status or an error.
type answer struct {
	status *Status
	err    error
}

type verb int

const (
	wait verb = iota
	decide
	adopt
	finish
	abandon
	rejoin
)

// step is what to do next.
type step struct {
	do      verb
	record  *Record  // decide, adopt
	rejoin  *Rejoin  // rejoin
	waiting []string // wait: for whom and why
}

func (m *machine) self() Seen { return Seen{m.set.Name, m.id.Incarnation} }

// observe remembers who answered a round. Answers to one name must be observed in the order of the questions.
func (m *machine) observe(answers map[string]answer) {
	view := maps.Clone(m.view)
	if view == nil {
		view = map[string]uint64{}
	}
	for name, a := range answers {
		if a.status != nil && a.status.Name == name {
			view[name] = a.status.Incarnation
		}
	}
	m.view = view
}

// become replaces what the node durably is. Another incarnation starts with an empty view.
func (m *machine) become(id identity, record *Record) {
	if id.Incarnation != m.id.Incarnation {
		m.view = nil
	}
	m.id, m.record = id, record
}

func (m *machine) seen() []Seen {
	seen := []Seen{m.self()}
	for name, incarnation := range m.view {
		seen = append(seen, Seen{name, incarnation})
	}
	slices.SortFunc(seen, func(a, b Seen) int { return strings.Compare(a.Name, b.Name) })
	return seen
}

func (m *machine) status(members []Member) *Status {
	s := &Status{
		Version: protocolVersion, Name: m.set.Name, Incarnation: m.id.Incarnation,
		Common: m.set.Common, Founders: m.set.names(),
		View: m.seen(), Record: m.record, ClusterID: m.id.ClusterID,
	}
	if s.ClusterID != 0 {
		s.Members = members
		if len(members) == 0 && m.record != nil {
			s.Members = m.record.Members
		}
	}
	return s
}

// next chooses the step after a round of answers, which were all asked for after the previous step.
func (m *machine) next(answers map[string]answer) (step, error) {
	if m.record != nil {
		return m.nextHolding(answers)
	}
	if members := m.members(answers); len(members) > 0 {
		return m.nextToMembers(answers, members)
	}
	if err := m.mismatch(answers); err != nil {
		return step{}, err
	}
	if s, found := m.adoptable(answers); found {
		return s, nil
	}
	return m.nextAmongFresh(answers), nil
}

// peers are the founders that a node with a record, or without, has to hear from.
func (m *machine) peers() []string {
	names := m.set.names()
	if m.record != nil {
		names = m.record.names()
	}
	return slices.DeleteFunc(names, func(name string) bool { return name == m.set.Name })
}

// others are the nodes in --peers but for this one.
func (m *machine) others() []string {
	return slices.DeleteFunc(m.set.names(), func(name string) bool { return name == m.set.Name })
}

// stranded is for a node that is a member: it refuses to go on if every other node in --peers is a member of one
// and the same other cluster. One that is not must not keep this node from starting.
func (m *machine) stranded(answers map[string]answer) error {
	var cluster uint64
	for _, name := range m.others() {
		s := answers[name].status
		if s == nil || s.Name != name || s.ClusterID == 0 || s.ClusterID == m.id.ClusterID || cluster != 0 && s.ClusterID != cluster {
			return nil
		}
		cluster = s.ClusterID
	}
	if cluster == 0 {
		return nil
	}
	return fmt.Errorf("%w: it is of cluster %016x, and all others in --peers are of %016x: correct --peers, or choose another --data-dir",
		ErrOtherCluster, m.id.ClusterID, cluster)
}

func (m *machine) source(name string) string {
	return fmt.Sprintf("node %s (%s)", name, m.set.Peers[name])
}

// check compares a peer's settings with our own. The founders matter only until one of us is a member.
func (m *machine) check(name string, s *Status) error {
	if s.Name != name {
		return &MismatchError{"--peers", name, s.Name, "the node at " + m.set.Peers[name], "correct its address"}
	}
	err := m.set.compare(s.Common, m.source(name), "start all nodes with the same value")
	if err == nil && s.ClusterID == 0 && !slices.Equal(s.Founders, m.set.names()) {
		err = &MismatchError{"--peers", strings.Join(m.set.names(), ","), strings.Join(s.Founders, ","), m.source(name), "start all nodes with the same names"}
	}
	return err
}

func (m *machine) mismatch(answers map[string]answer) error {
	for _, name := range m.peers() {
		if s := answers[name].status; s != nil {
			if err := m.check(name, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// members lists the peers that are members of a cluster and are who they should be.
func (m *machine) members(answers map[string]answer) (names []string) {
	for _, name := range m.peers() {
		if s := answers[name].status; s != nil && s.Name == name && s.ClusterID != 0 {
			names = append(names, name)
		}
	}
	return names
}

// nextToMembers is for a fresh node some of whose peers already belong to a cluster.
func (m *machine) nextToMembers(answers map[string]answer, members []string) (step, error) {
	first := answers[members[0]].status
	r := &Rejoin{ClusterID: first.ClusterID}
	for _, name := range members {
		s := answers[name].status
		if err := m.check(name, s); err != nil {
			return step{}, err
		}
		if s.ClusterID != first.ClusterID {
			return step{}, fmt.Errorf("--peers: %w: %s is a member of %016x, %s of %016x: name the nodes of one cluster only",
				ErrTwoClusters, m.source(first.Name), first.ClusterID, m.source(name), s.ClusterID)
		}
		if len(s.Members) == 0 {
			continue
		}
		self, known := findMember(s.Members, m.set.Name)
		if !known {
			return step{}, fmt.Errorf("%w: %s belongs to cluster %016x, which has no node %q: join it instead of forming it with --peers",
				ErrUnknownMember, m.source(name), s.ClusterID, m.set.Name)
		}
		if m.names(s.Record) && self.Incarnation == m.id.Incarnation {
			return step{do: adopt, record: s.Record}, nil
		}
		r.Via = append(r.Via, m.set.Peers[name])
	}
	if len(r.Via) == 0 {
		return step{waiting: []string{strings.Join(members, ", ") + ": does not know the members of its cluster yet"}}, nil
	}
	return step{do: rejoin, rejoin: r}, nil
}

// names reports whether this incarnation may adopt the record.
func (m *machine) names(r *Record) bool {
	if m.faults.adoptAny && r != nil {
		return true
	}
	return r.Names(m.set.Name, m.id.Incarnation)
}

// adoptable looks for a record that a peer holds and that names us.
func (m *machine) adoptable(answers map[string]answer) (step, bool) {
	var found *Record
	for _, name := range m.peers() {
		s := answers[name].status
		if s == nil || !m.names(s.Record) {
			continue
		}
		if found != nil && !found.equal(s.Record) {
			return step{waiting: []string{name + ": holds another bootstrap record than its peers"}}, true
		}
		found = s.Record
	}
	return step{do: adopt, record: found}, found != nil
}

// nextAmongFresh decides, if that is ours to do and everybody agrees about who everybody is.
func (m *machine) nextAmongFresh(answers map[string]answer) step {
	own := m.seen()
	var waiting []string
	for _, name := range m.peers() {
		switch a := answers[name]; {
		case a.status == nil:
			waiting = append(waiting, m.noAnswer(name, a))
		case !a.status.fresh():
			waiting = append(waiting, name+": is finishing a formation with an earlier incarnation of this node")
		case !slices.Equal(a.status.View, own) && !m.faults.ignoreViews:
			waiting = append(waiting, name+": "+viewDifference(own, a.status.View))
		}
	}
	early := m.faults.decideEarly && 2*len(waiting) < len(m.set.names())
	if decider := m.set.names()[0]; decider != m.set.Name {
		return step{waiting: append(waiting, decider+": to decide")}
	}
	if len(waiting) > 0 && !early {
		return step{waiting: waiting}
	}
	return step{do: decide, record: m.newRecord()}
}

func (m *machine) noAnswer(name string, a answer) string {
	switch {
	case a.status != nil:
		return fmt.Sprintf("%s: node %s answers at its address %s", name, a.status.Name, m.set.Peers[name])
	case a.err == nil:
		return name + ": has no address in --peers"
	}
	return fmt.Sprintf("%s (%s): %v", name, m.set.Peers[name], a.err)
}

// viewDifference says whom a peer hasn't heard of, or knows under another incarnation.
func viewDifference(own, theirs []Seen) string {
	known := map[string]uint64{}
	for _, s := range theirs {
		known[s.Name] = s.Incarnation
	}
	for _, s := range own {
		switch known[s.Name] {
		case s.Incarnation:
		case 0:
			return "has not heard " + s.Name + " yet"
		default:
			return "hears another node under the name of " + s.Name + " (is the name used twice?)"
		}
	}
	return "has not heard all peers yet"
}

func (m *machine) newRecord() *Record {
	r := &Record{ClusterID: randomID(), Common: m.set.Common}
	for _, s := range m.seen() {
		r.Members = append(r.Members, Member{s.Name, s.Incarnation, ReplicaID(s.Name, 1)})
	}
	return r
}

// nextHolding finishes or abandons the record, or waits for more to hold it.
func (m *machine) nextHolding(answers map[string]answer) (step, error) {
	majority := len(m.record.Members)/2 + 1
	holders, possible, answered := 1, 1, true
	var waiting []string
	for _, name := range m.peers() {
		s := answers[name].status
		if s == nil || s.Name != name {
			waiting, answered = append(waiting, m.noAnswer(name, answers[name])), false
			continue
		}
		if s.ClusterID == m.record.ClusterID {
			return m.nextToFinished(name, s)
		}
		switch {
		case s.holds(m.record.ClusterID):
			holders++
			possible++
		case s.fresh() && m.record.Names(name, s.Incarnation):
			possible++
			waiting = append(waiting, name+": to adopt the bootstrap record")
		default:
			waiting = append(waiting, name+": is not what the bootstrap record names (has it lost its directory?)")
		}
	}
	switch {
	case holders >= majority || m.faults.finishAlone:
		return step{do: finish}, nil
	case answered && possible < majority:
		return step{do: abandon}, nil
	}
	return step{waiting: waiting}, nil
}

// nextToFinished is for a node whose record a peer has finished.
func (m *machine) nextToFinished(name string, s *Status) (step, error) {
	if len(s.Members) == 0 {
		return step{do: finish}, nil
	}
	self, known := findMember(s.Members, m.set.Name)
	switch {
	case !known:
		return step{}, fmt.Errorf("%w: %s belongs to cluster %016x, which has no node %q any more: delete the data directory and join it anew",
			ErrUnknownMember, m.source(name), s.ClusterID, m.set.Name)
	case self.Incarnation != m.id.Incarnation:
		return step{}, fmt.Errorf("%w: in the cluster of %s another node %q took this one's place: stop one of them, or delete this one's data directory to replace that one",
			ErrReplaced, m.source(name), m.set.Name)
	}
	return step{do: finish}, nil
}
