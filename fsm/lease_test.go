package fsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/snapshot"
)

func grant(id, ttl int64) *pb.LeaseGrantRequest { return &pb.LeaseGrantRequest{ID: id, TTL: ttl} }

func revoke(id int64) *pb.LeaseRevokeRequest { return &pb.LeaseRevokeRequest{ID: id} }

func checkpoint(id, remaining int64) *pb.LeaseCheckpointRequest {
	return &pb.LeaseCheckpointRequest{Checkpoints: []*pb.LeaseCheckpoint{{ID: id, Remaining_TTL: remaining}}}
}

func leased(key string, id int64) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(key), Value: []byte("v"), Lease: id}
}

func step(c LeaseCommand) leaseStep { return leaseStep{LeaseCommand: c} }

// must fails the test if one of the results is an error.
func must(t testing.TB, results []Result) []Result {
	t.Helper()
	for i, r := range results {
		if r.Err != nil {
			t.Fatalf("request %d: %v", i, r.Err)
		}
	}
	return results
}

// expect applies one message and compares its error.
func expect(t testing.TB, s *Store, want error, m proto.Message) {
	t.Helper()
	if r := apply(t, s, m)[0]; !errors.Is(r.Err, want) {
		t.Errorf("%v: %v, want %v", m, r.Err, want)
	}
}

func keysOf(s *Store, id int64) string {
	var keys []string
	for _, k := range s.LeaseKeys(id, 0) {
		keys = append(keys, string(k))
	}
	return strings.Join(keys, " ")
}

func revisionOf(r Result) int64 {
	return r.Response.(interface{ GetHeader() *pb.ResponseHeader }).GetHeader().GetRevision()
}

func TestRevokeDeletesTheKeysInOneRevision(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	r := must(t, apply(t, s, grant(7, 30), leased("c", 7), leased("a", 7), leased("b", 7), put("d", "1")))
	if g := r[0].Response.(*pb.LeaseGrantResponse); g.ID != 7 || g.TTL != 30 || g.Header.Revision != 1 {
		t.Errorf("granted %v", g)
	}
	if got := keysOf(s, 7); got != "a b c" {
		t.Errorf("attached: %s", got)
	}
	r = must(t, apply(t, s, revoke(7)))
	if revisionOf(r[0]) != 6 || s.Revision(User) != 6 {
		t.Errorf("revoked at %v, the newest revision is %d", r[0].Response, s.Revision(User))
	}
	if get(t, s, "a")+get(t, s, "b")+get(t, s, "c") != "" || get(t, s, "d") != "1" {
		t.Error("the wrong keys are left")
	}
	if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
		t.Fatal(err)
	}
	rows := storedRows(t, s, 10)
	for i, key := range []string{"a", "b", "c"} { // ascending, whatever the order of the puts was
		if want := fmt.Sprintf("6.%d true 0a01%x\n", i, key); !strings.Contains(rows, want) {
			t.Errorf("no %s in\n%s", want, rows)
		}
	}
	if _, ok := s.Lease(7); ok || len(s.Leases()) != 0 {
		t.Error("the lease is still there")
	}
	expect(t, s, ErrLeaseNotFound, leased("a", 7))
	expect(t, s, ErrLeaseNotFound, revoke(7))
	must(t, apply(t, s, grant(7, 1)))
	if r := must(t, apply(t, s, revoke(7))); revisionOf(r[0]) != 6 || s.Revision(User) != 6 {
		t.Errorf("a lease without keys was revoked at %v, the newest revision is %d", r[0].Response, s.Revision(User))
	}
}

func TestKeysMoveBetweenLeases(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	check := func(seven, eight string) {
		t.Helper()
		if a, b := keysOf(s, 7), keysOf(s, 8); a != seven || b != eight {
			t.Errorf("keys of the leases: %q and %q, want %q and %q", a, b, seven, eight)
		}
	}
	must(t, apply(t, s, grant(7, 1), grant(8, 1), leased("a", 7), leased("b", 7)))
	check("a b", "")
	must(t, apply(t, s, leased("a", 8)))
	check("b", "a")
	must(t, apply(t, s, put("b", "1")))
	check("", "a")
	must(t, apply(t, s, &pb.PutRequest{Key: []byte("a"), Value: []byte("2"), IgnoreLease: true}))
	check("", "a")
	must(t, apply(t, s, &pb.PutRequest{Key: []byte("a"), IgnoreValue: true, Lease: 7}))
	check("a", "")
	must(t, apply(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp(leased("x", 8)), putOp(leased("y", 7)), putOp(leased("a", 8))}}))
	check("y", "a x")
	must(t, apply(t, s, &pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("y")}))
	check("y", "")
	expect(t, s, ErrLeaseNotFound, &pb.TxnRequest{Success: []*pb.RequestOp{putOp(leased("y", 8)), putOp(leased("z", 9))}})
	check("y", "")
	must(t, apply(t, s, revoke(8)))
	if get(t, s, "y") != "v" {
		t.Error("a key of another lease is gone")
	}
}

func TestGrantsAreRefused(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	must(t, apply(t, s, grant(7, 1), grant(-1, 1), grant(math.MinInt64, 1)))
	expect(t, s, ErrLeaseExists, grant(7, 5))
	expect(t, s, ErrLeaseNotFound, grant(0, 5))
	if l, _ := s.Lease(7); l.TTL != 1 || !l.Home || l.Incarnation != 1+1<<placeBits {
		t.Errorf("%+v", l)
	}
	if all := s.Leases(); len(all) != 3 || all[0].ID != math.MinInt64 || all[2].ID != 7 {
		t.Errorf("%+v", all)
	}
	some, next, more := s.HomeLeases(math.MinInt64, 2)
	if len(some) != 2 || some[1].ID != -1 || next != 7 || !more {
		t.Errorf("%+v, %d, %t", some, next, more)
	}
	if some, _, more = s.HomeLeases(next, 1); len(some) != 1 || some[0].ID != 7 || more {
		t.Errorf("%+v, %t", some, more)
	}
}

func TestLeasesAreOfTheClientsKeys(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	must(t, apply(t, s, grant(7, 1), leased("a", 7)))
	if r := applySystem(t, s, leased("a", 7)); !errors.Is(r.Err, ErrLeaseNotFound) {
		t.Errorf("a system key with a lease: %v", r.Err)
	}
	must(t, []Result{applySystem(t, s, put("a", "1"))})
	if keysOf(s, 7) != "a" {
		t.Error("a put in the system key space took the clients' key from its lease")
	}
	in := request(t, grant(8, 1))
	in.Space = System
	var b EntryBuilder
	b.Add(in)
	if _, err := s.Apply(s.AppliedIndex()+1, 1, b.Bytes()); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("a grant in the system key space: %v", err)
	}
}

func TestCheckpoints(t *testing.T) {
	config := testConfig(tempPath(t))
	s := open(t, config)
	must(t, apply(t, s, grant(7, 100), grant(8, 100)))
	must(t, apply(t, s, &pb.LeaseCheckpointRequest{Checkpoints: []*pb.LeaseCheckpoint{{ID: 7, Remaining_TTL: 40}, {ID: 9, Remaining_TTL: 1}}}))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, config)
	if l, _ := s.Lease(7); l.Remaining != 40 || l.TTL != 100 {
		t.Errorf("%+v", l)
	}
	must(t, apply(t, s, checkpoint(7, 0)))
	if l, _ := s.Lease(7); l.Remaining != 0 {
		t.Errorf("%+v", l)
	}
}

func TestLateDecisionsAreRefused(t *testing.T) {
	for _, fault := range []bool{false, true} {
		config := testConfig(tempPath(t))
		config.faults.anyTerm = fault
		s := open(t, config)
		must(t, apply(t, s, grant(7, 1), leased("a", 7), grant(8, 1)))
		late := []proto.Message{decidedIn{revoke(7), decision{term: 2}}, decidedIn{checkpoint(8, 5), decision{term: 2}}, step(LeaseCommand{Kind: LeaseEnd, ID: 8, Term: 2})} // entries are of term 1
		for _, m := range late {
			if r := apply(t, s, m)[0]; errors.Is(r.Err, ErrLeaseStale) == fault {
				t.Errorf("with the fault %t: %v", fault, r.Err)
			}
		}
		if l, ok := s.Lease(8); ok == false || l.Ending != fault {
			t.Errorf("with the fault %t: %+v", fault, l)
		}
		if got := get(t, s, "a") != ""; got == fault {
			t.Errorf("with the fault %t, a key is left: %t", fault, got)
		}
		if !fault {
			must(t, apply(t, s, decidedIn{revoke(7), decision{term: 1}}, step(LeaseCommand{Kind: LeaseEnd, ID: 8, Term: 1})))
		}
	}
}

// What was decided about a lease does not hold for a later one with its id.
func TestDecisionsAreAboutAnIncarnation(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	must(t, apply(t, s, grant(7, 100)))
	first, _ := s.Lease(7)
	must(t, apply(t, s, revoke(7), grant(7, 100), revoke(7), grant(7, 100), put("a", "1")))
	second, _ := s.Lease(7)
	if second.Incarnation <= first.Incarnation+1<<placeBits {
		t.Errorf("incarnation %d after %d", second.Incarnation, first.Incarnation)
	}
	was := first.Incarnation
	expect(t, s, ErrLeaseNotFound, decidedIn{revoke(7), decision{incarnation: was}})
	expect(t, s, ErrLeaseNotFound, step(LeaseCommand{Kind: LeaseEnd, ID: 7, Incarnation: was}))
	expect(t, s, nil, decidedIn{checkpoint(7, 50), decision{incarnation: was}})
	if l, _ := s.Lease(7); l.Ending || l.Remaining != 0 {
		t.Errorf("%+v", l)
	}
	now := second.Incarnation
	expect(t, s, nil, decidedIn{checkpoint(7, 50), decision{incarnation: now}})
	if l, _ := s.Lease(7); l.Remaining != 50 {
		t.Errorf("%+v", l)
	}
	expect(t, s, nil, step(LeaseCommand{Kind: LeaseEnd, ID: 7, Incarnation: now}))
	expect(t, s, nil, decidedIn{revoke(7), decision{incarnation: now}})
}

// homeAndGuest are two groups with one counter of revisions. The first is the home of lease 7.
type homeAndGuest struct {
	home, guest *Store
	next        int64
}

func newHomeAndGuest(t testing.TB, change func(*Config)) *homeAndGuest {
	home, guest := testConfig(tempPath(t)), testConfig(tempPath(t))
	guest.Group = 2
	for _, c := range []*Config{&home, &guest} {
		c.maxDrops = 2
		change(c)
	}
	return &homeAndGuest{open(t, home), open(t, guest), 10}
}

func (x *homeAndGuest) apply(t testing.TB, s *Store, m proto.Message) Result {
	t.Helper()
	x.next++
	return applyAt(t, s, x.next, m)[0]
}

// register returns the command that attaches the lease to the guest.
func (x *homeAndGuest) register(t testing.TB, id int64) (LeaseCommand, error) {
	t.Helper()
	r := x.apply(t, x.home, step(LeaseCommand{Kind: LeaseRegister, ID: id, Group: 2}))
	if r.Err != nil {
		return LeaseCommand{}, r.Err
	}
	about := r.Response.(*pb.LeaseTimeToLiveResponse)
	return LeaseCommand{Kind: LeaseAttach, ID: id, Incarnation: about.TTL, Revision: about.Header.Revision}, nil
}

// end ends a lease as its home's leader does.
func (x *homeAndGuest) end(t testing.TB, id int64) {
	t.Helper()
	ended := must(t, []Result{x.apply(t, x.home, step(LeaseCommand{Kind: LeaseEnd, ID: id}))})[0]
	incarnation := ended.Response.(*pb.LeaseTimeToLiveResponse).TTL
	l, _ := x.home.Lease(id)
	if slices.Contains(l.Groups, 2) {
		must(t, []Result{x.apply(t, x.guest, step(LeaseCommand{Kind: LeaseDrop, ID: id, Incarnation: incarnation}))})
	}
	must(t, []Result{x.apply(t, x.home, step(LeaseCommand{Kind: LeaseForget, ID: id, Incarnation: incarnation}))})
}

func TestLeaseWithKeysInTwoGroups(t *testing.T) {
	x := newHomeAndGuest(t, func(*Config) {})
	must(t, []Result{x.apply(t, x.home, grant(7, 9)), x.apply(t, x.home, leased("h", 7))})
	if r := x.apply(t, x.guest, leased("g", 7)); !errors.Is(r.Err, ErrLeaseNotFound) {
		t.Fatalf("a put with a lease that is not attached: %v", r.Err)
	}
	attach, err := x.register(t, 7)
	if err != nil {
		t.Fatal(err)
	}
	must(t, []Result{x.apply(t, x.guest, step(attach)), x.apply(t, x.guest, step(attach)), x.apply(t, x.guest, leased("g", 7))})
	if l, _ := x.home.Lease(7); !l.Home || fmt.Sprint(l.Groups) != "[2]" || l.Incarnation != attach.Incarnation || l.Keys != 1 {
		t.Errorf("at home: %+v", l)
	}
	if l, _ := x.guest.Lease(7); l.Home || l.TTL != 0 || l.Incarnation != attach.Incarnation || l.Keys != 1 {
		t.Errorf("the guest: %+v", l)
	}
	if r := x.apply(t, x.home, revoke(7)); !errors.Is(r.Err, ErrLeaseStale) {
		t.Errorf("revoked although there are keys elsewhere: %v", r.Err)
	}
	if r := x.apply(t, x.home, step(LeaseCommand{Kind: LeaseForget, ID: 7, Incarnation: attach.Incarnation})); !errors.Is(r.Err, ErrLeaseStale) {
		t.Errorf("forgotten before its end: %v", r.Err)
	}
	must(t, []Result{x.apply(t, x.home, step(LeaseCommand{Kind: LeaseEnd, ID: 7}))})
	if r := x.apply(t, x.home, leased("h2", 7)); !errors.Is(r.Err, ErrLeaseNotFound) {
		t.Errorf("a put with a lease that is ending: %v", r.Err)
	}
	if _, err := x.register(t, 7); !errors.Is(err, ErrLeaseNotFound) {
		t.Errorf("registered although it is ending: %v", err)
	}
	must(t, []Result{x.apply(t, x.guest, leased("g2", 7))}) // the guest has not heard of it
	x.end(t, 7)
	for key, s := range map[string]*Store{"h": x.home, "g": x.guest, "g2": x.guest} {
		if get(t, s, key) != "" {
			t.Errorf("%s is left", key)
		}
	}
	if len(x.home.Leases())+len(x.guest.Leases()) != 0 {
		t.Error("the lease is left")
	}
	for _, s := range []*Store{x.guest, x.home} {
		if r := x.apply(t, s, step(attach)); !errors.Is(r.Err, ErrLeaseNotFound) {
			t.Errorf("attached after its end: %v", r.Err)
		}
	}
	must(t, []Result{x.apply(t, x.home, grant(7, 9))})
	if again, err := x.register(t, 7); err != nil || again.Incarnation <= attach.Incarnation {
		t.Errorf("granted again as %+v, %v", again, err)
	} else {
		must(t, []Result{x.apply(t, x.guest, step(again)), x.apply(t, x.guest, leased("g", 7))})
	}
	if r := x.apply(t, x.guest, step(attach)); !errors.Is(r.Err, ErrLeaseNotFound) {
		t.Errorf("an earlier incarnation attached: %v", r.Err)
	}
}

// An attachment that comes after the drop is refused, however many drops there were since then; and what remembers
// that survives a restart.
func TestLateAttachmentsAreRefused(t *testing.T) {
	for _, fault := range []bool{false, true} {
		for between := range 5 {
			x := newHomeAndGuest(t, func(c *Config) { c.faults.lateAttachments = fault })
			must(t, []Result{x.apply(t, x.home, grant(7, 9))})
			attach, err := x.register(t, 7)
			if err != nil {
				t.Fatal(err)
			}
			x.end(t, 7)
			for i := range between {
				id := int64(100 + i)
				must(t, []Result{x.apply(t, x.home, grant(id, 9))})
				other, err := x.register(t, id)
				if err != nil {
					t.Fatal(err)
				}
				must(t, []Result{x.apply(t, x.guest, step(other))})
				x.end(t, id)
			}
			if between%2 == 1 {
				if err := x.guest.Close(); err != nil {
					t.Fatal(err)
				}
				x.guest = open(t, x.guest.config)
			}
			want := ErrLeaseNotFound
			if between >= 2 { // the drop is forgotten
				want = ErrLeaseStale
			}
			r := x.apply(t, x.guest, step(attach))
			left := x.apply(t, x.guest, leased("g", 7)).Err == nil
			if left != fault || !fault && !errors.Is(r.Err, want) {
				t.Errorf("after %d more drops, with the fault %t: %v, and a key is left: %t", between, fault, r.Err, left)
			}
			if fault {
				continue
			}
			must(t, []Result{x.apply(t, x.home, grant(8, 9))}) // leases that live are never shut out
			if attach, err = x.register(t, 8); err != nil {
				t.Fatal(err)
			}
			must(t, []Result{x.apply(t, x.guest, step(attach))})
		}
	}
}

func TestFaultsOfAttachmentsAreCaught(t *testing.T) {
	run := func(t *testing.T, fault func(*Config)) error {
		c := newCluster(1)
		config := testConfig(tempPath(t))
		fault(&config)
		r := c.open(t, config)
		for range 1000 {
			c.grow(t)
			if c.log[len(c.log)-1].configuration != nil {
				c.follow(t, r, len(c.log)-1, len(c.log))
				continue
			}
			results, err := r.Apply(uint64(len(c.log)), 1, c.log[len(c.log)-1].data)
			if err != nil {
				return err
			}
			for i, want := range c.want[len(c.log)-1] {
				if !sameResult(results[i], want) {
					return fmt.Errorf("%v, %v, want %v, %v", results[i].Response, results[i].Err, want.Response, want.Err)
				}
			}
			if err := c.compareLeases(r.Store); err != nil {
				return err
			}
		}
		return nil
	}
	if err := run(t, func(c *Config) { c.maxDrops = 3 }); err != nil {
		t.Errorf("without a fault: %v", err)
	}
	for name, fault := range map[string]func(*Config){
		"attachment lost":  func(c *Config) { c.maxDrops, c.faults.attachmentLost = 3, true },
		"key forgotten":    func(c *Config) { c.maxDrops, c.faults.keyForgotten = 3, func() bool { return true } },
		"late attachments": func(c *Config) { c.maxDrops, c.faults.lateAttachments = 3, true },
		"any term":         func(c *Config) { c.maxDrops, c.faults.anyTerm = 3, true },
		"longer memory":    func(c *Config) { c.maxDrops = 4 },
	} {
		if err := run(t, fault); err == nil {
			t.Errorf("%s: nothing was noticed", name)
		}
	}
}

// A key that the end of its lease has left behind is noticed at the next start.
func TestKeyWithoutItsLeaseIsCaught(t *testing.T) {
	var fault once
	config := testConfig(tempPath(t))
	config.faults.keyForgotten = fault.strike
	s := open(t, config)
	must(t, apply(t, s, grant(7, 1), leased("a", 7), leased("b", 7)))
	fault.armed.Store(true)
	must(t, apply(t, s, revoke(7)))
	if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
		t.Fatal(err)
	}
	if _, err := reopenAfterCrash(t, s); !errors.Is(err, ErrCorruptState) {
		t.Errorf("reopened with a key whose lease is gone: %v", err)
	}
}

func TestLeaseChanges(t *testing.T) {
	config := testConfig(tempPath(t))
	s := open(t, config)
	_, since, all := s.LeaseChanges(0)
	if !all {
		t.Error("a new consumer is not told to look at everything")
	}
	changed := func(m proto.Message, want ...int64) {
		t.Helper()
		notified := s.LeaseNotify()
		must(t, apply(t, s, m))
		select {
		case <-notified:
			if len(want) == 0 {
				t.Errorf("%v: notified of nothing", m)
			}
		default:
			if len(want) > 0 {
				t.Errorf("%v: not notified", m)
			}
		}
		ids, next, all := s.LeaseChanges(since)
		if all || !slices.Equal(ids, want) {
			t.Errorf("%v: changes %v, %t, want %v", m, ids, all, want)
		}
		since = next
	}
	changed(grant(7, 1), 7)
	changed(leased("a", 7))
	changed(grant(8, 1), 8)
	changed(checkpoint(7, 1), 7)
	changed(checkpoint(7, 1))
	changed(step(LeaseCommand{Kind: LeaseEnd, ID: 8}), 8)
	changed(step(LeaseCommand{Kind: LeaseEnd, ID: 8}))
	changed(revoke(7), 7)
	first := since
	for range maxLeaseChanges/2 - 1 {
		must(t, apply(t, s, grant(7, 1), revoke(7)))
	}
	if ids, _, all := s.LeaseChanges(first); all || len(ids) != maxLeaseChanges-2 {
		t.Errorf("%d changes, %t", len(ids), all)
	}
	must(t, apply(t, s, grant(7, 1), revoke(7), grant(7, 1)))
	if _, _, all := s.LeaseChanges(first); !all {
		t.Error("changes are missing")
	}
	if _, _, all := s.LeaseChanges(since + 2*maxLeaseChanges); !all {
		t.Error("changes that have not been are known")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, config)
	if _, _, all := s.LeaseChanges(0); !all || len(s.Leases()) != 2 {
		t.Errorf("after a restart: %t, %+v", all, s.Leases())
	}
}

func TestLeaseCommandsAreStoredByHand(t *testing.T) {
	for _, c := range []LeaseCommand{
		{Kind: LeaseRegister, ID: 7, Group: math.MaxUint64},
		{Kind: LeaseAttach, ID: -7, Incarnation: math.MaxInt64, Revision: 9},
		{Kind: LeaseEnd, ID: 1, Term: 3, Incarnation: 8},
		{Kind: LeaseDrop, ID: math.MinInt64, Incarnation: 4},
		{Kind: LeaseForget, ID: 1 << 40, Incarnation: 5},
	} {
		r := c.Request()
		if got, err := ParseLeaseCommand(r.Data); err != nil || got != c || r.Space != LeaseCommands {
			t.Errorf("%+v became %+v, %v", c, got, err)
		}
		for n := range r.Data {
			if _, err := ParseLeaseCommand(r.Data[:n]); !errors.Is(err, ErrMalformedEntry) {
				t.Errorf("%+v cut to %d bytes: %v", c, n, err)
			}
		}
		if _, err := ParseLeaseCommand(append(r.Data, 0)); !errors.Is(err, ErrMalformedEntry) {
			t.Errorf("%+v with one byte more: %v", c, err)
		}
	}
	for _, kind := range []byte{0, 6, 255} {
		if _, err := ParseLeaseCommand(append([]byte{kind}, make([]byte, 24)...)); !errors.Is(err, ErrUnknownCommand) {
			t.Errorf("kind %d: %v", kind, err)
		}
	}
	s := open(t, testConfig(tempPath(t)))
	var b EntryBuilder
	b.Add(Request{Space: LeaseCommands, Data: []byte{99, 0, 0, 0, 0, 0, 0, 0, 0}})
	if _, err := s.Apply(1, 1, b.Bytes()); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("an unknown kind is applied: %v", err)
	}
}

// leaseBuckets is what a store's file says about leases.
func leaseBuckets(t *testing.T, s *Store) (format byte, table, dropped int) {
	t.Helper()
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer rollback(tx)
	if b := tx.Bucket(leaseBucket); b != nil {
		table, dropped = b.Stats().KeyN, tx.Bucket(dropBucket).Stats().KeyN
	}
	return tx.Bucket(metaBucket).Get(formatKey)[0], table, dropped
}

// TestStatesFromBeforeLeases opens a file that was written before there were leases (testdata/format1.db: two keys,
// one deleted, compacted at 3). It stays as it is until the first lease.
func TestStatesFromBeforeLeases(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "format1.db"))
	if err != nil {
		t.Fatal(err)
	}
	config := testConfig(tempPath(t))
	if err := os.WriteFile(config.Path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, config)
	if get(t, s, "a") != "2" || get(t, s, "b") != "" || s.Revision(User) != 5 || s.CompactRevision(User) != 3 || len(s.Leases()) != 0 {
		t.Errorf("revision %d, compacted %d", s.Revision(User), s.CompactRevision(User))
	}
	reopen := func() {
		t.Helper()
		if err := errors.Join(s.Flush(t.Context(), s.AppliedIndex()), s.Defragment(t.Context()), s.Close()); err != nil {
			t.Fatal(err)
		}
		s = open(t, config)
	}
	expect(t, s, ErrLeaseNotFound, leased("a", 7))
	must(t, apply(t, s, put("c", "1")))
	reopen()
	if format, _, _ := leaseBuckets(t, s); format != formatVersion {
		t.Errorf("without a lease it has format %d", format)
	}
	must(t, apply(t, s, grant(7, 1), leased("a", 7)))
	reopen()
	if format, table, _ := leaseBuckets(t, s); format != formatLeases || table != 1 || keysOf(s, 7) != "a" {
		t.Errorf("with a lease it has format %d, %d leases, keys %s", format, table, keysOf(s, 7))
	}
	must(t, apply(t, s, revoke(7)))
	reopen()
	if format, table, _ := leaseBuckets(t, s); format != formatLeases || table != 0 || get(t, s, "a") != "" {
		t.Errorf("after the last lease it has format %d, %d leases", format, table)
	}
}

func TestContradictingLeasesAreRefused(t *testing.T) {
	whole := testConfig(tempPath(t))
	s := open(t, whole)
	must(t, apply(t, s, grant(7, 1), leased("a", 7), step(LeaseCommand{Kind: LeaseDrop, ID: 9, Incarnation: 1}), step(LeaseCommand{Kind: LeaseDrop, ID: 10, Incarnation: 1})))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	seven := appendLeaseKey(nil, 7)
	number := func(n byte) []byte { return []byte{0, 0, 0, 0, 0, 0, 0, n} }
	for name, c := range map[string]struct {
		damage func(tx *bbolt.Tx) error
		want   error
	}{
		"nothing":      {func(*bbolt.Tx) error { return nil }, nil},
		"newer format": {func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(formatKey, []byte{3}) }, ErrUnknownFormat},
		"older format": {func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(formatKey, []byte{formatVersion}) }, ErrCorruptState},
		"no table":     {func(tx *bbolt.Tx) error { return tx.DeleteBucket(leaseBucket) }, ErrCorruptState},
		"no drops":     {func(tx *bbolt.Tx) error { return tx.DeleteBucket(dropBucket) }, ErrCorruptState},
		"lease gone":   {func(tx *bbolt.Tx) error { return tx.Bucket(leaseBucket).Delete(seven) }, ErrCorruptState},
		"short record": {func(tx *bbolt.Tx) error { return tx.Bucket(leaseBucket).Put(seven, make([]byte, 24)) }, ErrCorruptState},
		"half a group": {func(tx *bbolt.Tx) error { return tx.Bucket(leaseBucket).Put(seven, make([]byte, 29)) }, ErrCorruptState},
		"unknown flag": {func(tx *bbolt.Tx) error {
			return tx.Bucket(leaseBucket).Put(seven, append([]byte{4}, make([]byte, 24)...))
		}, ErrCorruptState},
		"short id":       {func(tx *bbolt.Tx) error { return tx.Bucket(leaseBucket).Put([]byte("x"), make([]byte, 25)) }, ErrCorruptState},
		"no id":          {func(tx *bbolt.Tx) error { return tx.Bucket(leaseBucket).Put(make([]byte, 8), make([]byte, 25)) }, ErrCorruptState},
		"short drop":     {func(tx *bbolt.Tx) error { return tx.Bucket(dropBucket).Put(number(2), make([]byte, 23)) }, ErrCorruptState},
		"a drop missing": {func(tx *bbolt.Tx) error { return tx.Bucket(dropBucket).Put(number(3), make([]byte, 24)) }, ErrCorruptState},
		"forgotten":      {func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(forgottenKey, []byte{1}) }, ErrCorruptState},
	} {
		config := testConfig(tempPath(t))
		data, err := os.ReadFile(whole.Path)
		if err == nil {
			err = os.WriteFile(config.Path, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(config.Path, 0o600, nil)
		if err == nil {
			err = errors.Join(db.Update(c.damage), db.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(config)
		if !errors.Is(err, c.want) || err == nil && c.want != nil {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil {
			_ = s.Close()
		}
	}
}

// States that were installed from streams have the same leases, also after a defragmentation and a restart.
func TestInstalledStatesHaveTheLeases(t *testing.T) {
	seeds(t, 4, func(t *testing.T, seed uint64) {
		c := newCluster(seed)
		c.floors, c.model.maxDrops = seed%2 == 0, rememberedDrops
		s := c.open(t, testConfig(tempPath(t)))
		var installed []*replica
		for range 6 {
			for range 30 {
				c.grow(t)
			}
			c.follow(t, s, int(s.AppliedIndex()), len(c.log))
			if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
				t.Fatal(err)
			}
			other := install(t, s.Store)
			installed = append(installed, &replica{other, other.config})
		}
		for _, r := range installed {
			c.follow(t, r, 0, len(c.log))
			c.sameLeases(t, r)
			if err := errors.Join(r.Defragment(t.Context()), r.Close()); err != nil {
				t.Fatal(err)
			}
			r = c.open(t, r.config)
			c.sameLeases(t, r)
			c.same(t, s, r)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Whoever looks at leases beside apply and flushes sees keys of them that were there, and misses no change.
func TestLeasesAreReadBesideApply(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c := newCluster(seed)
	c.model.maxDrops = rememberedDrops
	for range 400 {
		c.grow(t)
	}
	s := c.open(t, testConfig(tempPath(t)))
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	readers.Go(func() {
		for ctx.Err() == nil {
			for _, l := range s.Leases() {
				if keys := s.LeaseKeys(l.ID, 0); !slices.IsSortedFunc(keys, bytes.Compare) {
					t.Errorf("keys of %d: %q", l.ID, keys)
				}
			}
			_, _, _ = s.HomeLeases(math.MinInt64, 2)
		}
	})
	known := map[int64]LeaseInfo{}
	readers.Go(func() {
		for since := uint64(0); ; {
			notified, done := s.LeaseNotify(), ctx.Err() != nil
			ids, next, all := s.LeaseChanges(since)
			if since = next; all {
				clear(known)
				for _, l := range s.Leases() {
					ids = append(ids, l.ID)
				}
			}
			for _, id := range ids {
				if l, ok := s.Lease(id); ok {
					l.Keys = 0
					known[id] = l
				} else {
					delete(known, id)
				}
			}
			if done {
				return
			}
			select {
			case <-notified:
			case <-ctx.Done():
			}
		}
	})
	c.follow(t, s, 0, len(c.log))
	cancel()
	readers.Wait()
	c.sameLeases(t, s)
	for _, l := range s.Leases() {
		if l.Keys = 0; !reflect.DeepEqual(known[l.ID], l) {
			t.Errorf("%+v is known as %+v", l, known[l.ID])
		}
	}
	if len(known) != len(s.Leases()) {
		t.Errorf("%d leases are known of %d", len(known), len(s.Leases()))
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// A flush that fails, or a crash before it, loses changes of leases and of keys together.
func TestCrashBetweenFlushes(t *testing.T) {
	config := testConfig(tempPath(t))
	config.FlushInterval = 1 << 40
	s := open(t, config)
	must(t, apply(t, s, grant(7, 1), leased("a", 7)))
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	must(t, apply(t, s, revoke(7), grant(8, 1), leased("b", 8)))
	must(t, apply(t, s, step(LeaseCommand{Kind: LeaseAttach, ID: 9, Incarnation: 5}), step(LeaseCommand{Kind: LeaseDrop, ID: 9, Incarnation: 5})))
	again, err := reopenAfterCrash(t, s)
	if err != nil {
		t.Fatal(err)
	}
	if all := again.Leases(); len(all) != 1 || all[0].ID != 7 || keysOf(again, 7) != "a" || get(t, again, "b") != "" {
		t.Errorf("before the flush: %+v", all)
	}
	must(t, apply(t, again, step(LeaseCommand{Kind: LeaseAttach, ID: 9, Incarnation: 5})))
	if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
		t.Fatal(err)
	}
	if again, err = reopenAfterCrash(t, s); err != nil {
		t.Fatal(err)
	}
	if all := again.Leases(); len(all) != 1 || all[0].ID != 8 || keysOf(again, 8) != "b" || get(t, again, "a") != "" {
		t.Errorf("after the flush: %+v", all)
	}
	expect(t, again, ErrLeaseNotFound, step(LeaseCommand{Kind: LeaseAttach, ID: 9, Incarnation: 5}))
}

func TestRestoredLeases(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	must(t, apply(t, s, grant(7, 100), grant(8, 100), grant(9, 100), leased("a", 7), leased("b", 7), put("b", "1"), leased("c", 9), leased("d", 9)))
	must(t, apply(t, s, step(LeaseCommand{Kind: LeaseRegister, ID: 7, Group: 3}), step(LeaseCommand{Kind: LeaseEnd, ID: 7}), checkpoint(8, 5)))
	page, err := s.RowsPage(t.Context(), User, nil, s.Revision(User), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	homes, _, more := s.HomeLeases(math.MinInt64, 10)
	if len(homes) != 3 || more {
		t.Fatalf("%+v, %t", homes, more)
	}
	if homes, err = ParseLeases(AppendLeases(nil, homes)); err != nil {
		t.Fatal(err)
	}
	b, err := NewBuilder(tempPath(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.Add(page.Rows), b.AddLeases(homes[:1]), b.AddLeases(homes[1:2]), b.AddLeases(nil)); err != nil {
		t.Fatal(err)
	}
	if err := b.Finish(snapshot.Meta{Index: 5, Revision: 50, CompactRevision: -1, Keys: page.Keys}); err != nil {
		t.Fatal(err)
	}
	if err := b.AddLeases(homes); !errors.Is(err, ErrClosed) {
		t.Errorf("leases after the end: %v", err)
	}
	if _, err := Open(testConfig(b.path)); !errors.Is(err, ErrCorruptState) {
		t.Errorf("opened with keys whose lease it does not have: %v", err)
	}
	named := map[string]int64{}
	all, err := RestoredLeases(t.Context(), b.path, func(key []byte, id int64) { named[string(key)] = id })
	if err != nil {
		t.Fatal(err)
	}
	want := []LeaseInfo{
		{ID: 7, TTL: 100, Incarnation: 50, Home: true}, {ID: 8, TTL: 100, Remaining: 5, Incarnation: 50, Home: true},
		{ID: 9, TTL: strayTTL, Incarnation: 50, Home: true}, // ended while the backup was taken
	}
	if !reflect.DeepEqual(all, want) || fmt.Sprint(named) != "map[a:7 c:9 d:9]" {
		t.Errorf("%+v, %v", all, named)
	}
	if err := Adopt(b.path, snapshot.Meta{Index: 1, Term: 1}); err != nil {
		t.Fatal(err)
	}
	config := testConfig(b.path)
	s = open(t, config)
	want[0].Keys, want[2].Keys = 1, 2
	if got := s.Leases(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	must(t, apply(t, s, revoke(9), grant(9, 1)))
	if l, _ := s.Lease(9); l.Incarnation <= 50 || get(t, s, "c")+get(t, s, "d") != "" {
		t.Errorf("%+v", l)
	}
}

func FuzzLeases(f *testing.F) {
	f.Add(AppendLeases(nil, []LeaseInfo{{ID: 7, TTL: 1, Home: true, Groups: []uint64{1, 2}}, {ID: -1, Ending: true}}))
	f.Add(LeaseCommand{Kind: LeaseAttach, ID: 1, Revision: 3}.Request().Data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if all, err := ParseLeases(data); err == nil {
			if again, err := ParseLeases(AppendLeases(nil, all)); err != nil || !reflect.DeepEqual(again, all) {
				t.Errorf("%+v became %+v, %v", all, again, err)
			}
		} else if !errors.Is(err, ErrMalformedRows) {
			t.Error(err)
		}
		if c, err := ParseLeaseCommand(data); err == nil {
			if again := c.Request().Data; !bytes.Equal(again, data) {
				t.Errorf("%x became %x", data, again)
			}
		}
	})
}
