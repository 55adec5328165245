package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func threeNodes(name string) Settings {
	return Settings{Name: name, Common: Common{Token: "t", Strategy: "full"}, Peers: map[string]string{"n1": "a:1", "n2": "b:1", "n3": "c:1"}}
}

func recordFor(d *Dir) *Record {
	r := &Record{ClusterID: 77, Common: d.set.Common}
	for _, name := range d.set.names() {
		incarnation := uint64(5)
		if name == d.set.Name {
			incarnation = d.Incarnation()
		}
		r.Members = append(r.Members, Member{name, incarnation, ReplicaID(name, 1)})
	}
	return r
}

func mustOpen(t *testing.T, path string, set Settings) *Dir {
	t.Helper()
	d, err := Open(path, set)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func mustClose(t *testing.T, d *Dir) {
	t.Helper()
	if err := errors.Join(d.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestDirKeepsWhatItIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "n2.kvd")
	d := mustOpen(t, path, threeNodes("n2"))
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("mode %v, error %v", info.Mode(), err)
	}
	first, record := d.Incarnation(), recordFor(d)
	if err := errors.Join(d.hold(record), d.finish(), d.MarkCreated(0, "n2/1"), d.MarkCreated(3, "n2/1"), d.MarkCreated(0, "n2/1")); err != nil {
		t.Fatal(err)
	}
	mustClose(t, d)
	if err := d.MarkCreated(0, "n2/9"); !errors.Is(err, ErrClosed) {
		t.Fatalf("a closed directory says %v", err)
	}

	d = mustOpen(t, path, threeNodes("n2"))
	id, kept := d.state()
	if id.Incarnation != first || id.ClusterID != 77 || id.Replica != "n2/1" || kept == nil || !kept.equal(record) {
		t.Fatalf("kept %+v %+v", id, kept)
	}
	if want := []Replica{{Group: 0, ID: "n2/1"}, {Group: 3, ID: "n2/1"}}; !slices.Equal(d.Replicas(), want) {
		t.Fatalf("replicas %v", d.Replicas())
	}
	if err := d.MayCreate(3, "n2/1"); !errors.Is(err, ErrReplicaUsed) {
		t.Fatalf("a used id: %v", err)
	}
	if err := d.MayCreate(4, "n2/1"); err != nil {
		t.Fatalf("an unused id: %v", err)
	}
	if err := d.MarkCreated(0, "n2/01"); !errors.Is(err, ErrInvalid) {
		t.Fatalf("a malformed id: %v", err)
	}
}

func TestDirIsLocked(t *testing.T) {
	path := t.TempDir()
	d := mustOpen(t, path, threeNodes("n1"))
	_, err := Open(path, threeNodes("n1"))
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "--data-dir") {
		t.Fatalf("second opening: %v", err)
	}
	mustClose(t, d)
	mustOpen(t, path, threeNodes("n1"))
}

// A fresh node may change its mind, as a new incarnation; a bound one may not.
func TestDirRefusesOtherSettings(t *testing.T) {
	other := map[string]func(*Settings){
		"--name":               func(s *Settings) { s.Name = "n3" },
		"--cluster-token":      func(s *Settings) { s.Token = "other" },
		"--strategy":           func(s *Settings) { s.Strategy = "consistent" },
		"--shards":             func(s *Settings) { s.Shards = 64 },
		"--replication-factor": func(s *Settings) { s.ReplicationFactor = 3 },
		"--witnesses":          func(s *Settings) { s.Witnesses = "auto" },
		"--peers":              func(s *Settings) { s.Peers = map[string]string{"n1": "a:1", "n2": "b:1"} },
	}
	for _, state := range []string{"fresh", "holding", "member"} {
		for flag, change := range other {
			t.Run(state+flag, func(t *testing.T) {
				path := t.TempDir()
				d := mustOpen(t, path, threeNodes("n2"))
				first := d.Incarnation()
				if state != "fresh" {
					if err := d.hold(recordFor(d)); err != nil {
						t.Fatal(err)
					}
				}
				if state == "member" {
					if err := d.finish(); err != nil {
						t.Fatal(err)
					}
				}
				mustClose(t, d)
				set := threeNodes("n2")
				change(&set)
				d, err := Open(path, set)
				if err == nil {
					defer d.Close()
				}
				var mismatch *MismatchError
				switch refused := errors.As(err, &mismatch); {
				case flag == "--name" || state != "fresh" && flag != "--peers":
					if !refused || mismatch.Flag != flag || !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), path) {
						t.Fatalf("changed %s: %v", flag, err)
					}
				case err != nil:
					t.Fatalf("changed %s: %v", flag, err)
				case (d.Incarnation() != first) != (state == "fresh"):
					t.Fatalf("changed %s: incarnation was %x, is %x", flag, first, d.Incarnation())
				}
			})
		}
	}
	path := t.TempDir()
	d := mustOpen(t, path, threeNodes("n2"))
	first := d.Incarnation()
	mustClose(t, d)
	moved := threeNodes("n2")
	moved.Peers["n1"] = "elsewhere:1"
	if d = mustOpen(t, path, moved); d.Incarnation() != first {
		t.Fatal("a new address made a new incarnation")
	}
}

func TestDirRefusesWhatIsDamagedOrForeign(t *testing.T) {
	flip := func(name, old, new string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			file := filepath.Join(path, name)
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			changed := bytes.Replace(data, []byte(old), []byte(new), 1)
			if bytes.Equal(changed, data) {
				t.Fatalf("no %q in %s", old, data)
			}
			if err := os.WriteFile(file, changed, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.Remove(filepath.Join(path, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		damage func(t *testing.T, path string)
		want   error
	}{
		"identity bit":     {flip(identityFile, `"name": "n2"`, `"name": "n3"`), ErrCorrupt},
		"identity case":    {flip(identityFile, `"crc32c"`, `"cRc32c"`), ErrCorrupt},
		"identity cut":     {func(t *testing.T, path string) { os.Truncate(filepath.Join(path, identityFile), 60) }, ErrCorrupt},
		"identity empty":   {func(t *testing.T, path string) { os.Truncate(filepath.Join(path, identityFile), 0) }, ErrCorrupt},
		"identity huge":    {func(t *testing.T, path string) { os.Truncate(filepath.Join(path, identityFile), maxFileBytes+1) }, ErrCorrupt},
		"identity missing": {remove(identityFile), ErrCorrupt},
		"identity newer":   {flip(identityFile, `"version": 1`, `"version": 3`), ErrVersion},
		"identity foreign": {flip(identityFile, "kvd identity", "etcd member"), ErrCorrupt},
		"record bit":       {flip(recordFile, `"cluster_id": "77"`, `"cluster_id": "78"`), ErrCorrupt},
		"record newer":     {flip(recordFile, `"version": 1`, `"version": 9`), ErrVersion},
		"replicas missing": {remove(replicasFile), ErrCorrupt},
		"replicas bit":     {flip(replicasFile, "n2/1", "n2/2"), ErrCorrupt},
		"files exchanged": {func(t *testing.T, path string) {
			os.Rename(filepath.Join(path, recordFile), filepath.Join(path, identityFile))
		}, ErrCorrupt},
		"only the groups": {func(t *testing.T, path string) { os.RemoveAll(path); os.MkdirAll(filepath.Join(path, "groups"), 0o700) }, ErrCorrupt},
		"a log of something else": {func(t *testing.T, path string) {
			os.RemoveAll(path)
			os.MkdirAll(filepath.Join(path, "log", "messages"), 0o700)
		}, ErrForeign},
		"a home directory": {func(t *testing.T, path string) {
			os.RemoveAll(path)
			os.MkdirAll(filepath.Join(path, "Documents"), 0o700)
		}, ErrForeign},
		"other's replicas": {func(t *testing.T, path string) { remove(identityFile)(t, path); remove(recordFile)(t, path) }, ErrCorrupt},
		"record of another": {func(t *testing.T, path string) {
			writeBody(t, path, recordFile, &Record{ClusterID: 1, Common: Common{Strategy: "full"}, Members: []Member{{"n2", 1, "n2/1"}}})
		}, ErrCorrupt},
		"invalid identity": {func(t *testing.T, path string) {
			writeBody(t, path, identityFile, identity{Name: "n2", Incarnation: 1, ClusterID: 77})
		}, ErrCorrupt},
		"unknown field": {func(t *testing.T, path string) {
			writeBody(t, path, replicasFile, []map[string]any{{"group": "0", "id": "n2/1", "x": 1}})
		}, ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "n2.kvd")
			d := mustOpen(t, path, threeNodes("n2"))
			if err := errors.Join(d.hold(recordFor(d)), d.finish(), d.MarkCreated(0, "n2/1")); err != nil {
				t.Fatal(err)
			}
			mustClose(t, d)
			c.damage(t, path)
			before := listing(t, path)
			_, err := Open(path, threeNodes("n2"))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("got %v", err)
			}
			if c.want == ErrForeign && !slices.Equal(before, listing(t, path)) {
				t.Fatalf("touched a foreign directory: %v", listing(t, path))
			}
			t.Log(err)
		})
	}
}

func writeBody(t *testing.T, path, name string, body any) {
	t.Helper()
	data, err := encodeFile(name, body)
	if err == nil {
		err = os.WriteFile(filepath.Join(path, name), data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func listing(t *testing.T, path string) (names []string) {
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

var errCrash = errors.New("the process died")

// crasher lets limit file steps happen and then stops the world, leaving a torn temporary file.
type crasher struct {
	dir   string
	limit int
	steps []string
}

func (c *crasher) fault(op, name string) error {
	c.steps = append(c.steps, op+" "+name)
	if len(c.steps) <= c.limit {
		return nil
	}
	if op == "write" {
		if err := os.WriteFile(filepath.Join(c.dir, name+tempSuffix), []byte(`{"format": "kvd id`), 0o600); err != nil {
			return err
		}
	}
	return errCrash
}

// After a crash at each step of everything that writes, the directory opens, is what it was before or after, and the
// interrupted work can be done again.
func TestDirSurvivesACrashAtEveryStep(t *testing.T) {
	keep := func(d *Dir) error { return nil }
	hold := func(d *Dir) error {
		if d.record != nil || d.id.ClusterID != 0 {
			return nil
		}
		return d.hold(recordFor(d))
	}
	finish := func(d *Dir) error {
		if err := hold(d); err != nil || d.id.ClusterID != 0 {
			return err
		}
		return d.finish()
	}
	rejoin := func(d *Dir) error {
		r := recordFor(d)
		r.Members[1].Incarnation = 4242 // our own old one
		return d.rejoin(77, "n2/2", r)
	}
	changed := threeNodes("n2")
	changed.Token = "changed"
	for name, c := range map[string]struct {
		before, work func(*Dir) error
		set          Settings
		good         func(*Dir) bool
	}{
		"first start":      {nil, keep, threeNodes("n2"), func(d *Dir) bool { return d.id.ClusterID == 0 && d.record == nil }},
		"hold and finish":  {keep, finish, threeNodes("n2"), func(d *Dir) bool { return d.id.ClusterID == 77 && d.record.Names("n2", d.Incarnation()) }},
		"abandon":          {hold, func(d *Dir) error { return d.abandon() }, threeNodes("n2"), func(d *Dir) bool { return d.id.ClusterID == 0 && d.record == nil }},
		"rejoin":           {keep, rejoin, threeNodes("n2"), func(d *Dir) bool { return d.id.Replica == "n2/2" && d.record.ClusterID == 77 }},
		"forget a replica": {func(d *Dir) error { return errors.Join(finish(d), d.MarkCreated(5, "n2/4")) }, func(d *Dir) error { return d.MarkDeleted(5, "n2/4") }, threeNodes("n2"), func(d *Dir) bool { return d.MayCreate(5, "n2/4") != nil && d.Replicas()[0].Through }},
		"mark a replica":   {finish, func(d *Dir) error { return d.MarkCreated(0, "n2/1") }, threeNodes("n2"), func(d *Dir) bool { return d.MayCreate(0, "n2/1") != nil }},
		"change the log":   {finish, func(d *Dir) error { return d.SetLog("shared") }, threeNodes("n2"), func(d *Dir) bool { return d.Log() == "shared" && d.id.ClusterID == 77 }},
		"changed settings": {keep, keep, changed, func(d *Dir) bool { return d.id.Token == "changed" }},
	} {
		t.Run(name, func(t *testing.T) {
			for limit := 0; ; limit++ {
				path := filepath.Join(t.TempDir(), "n2.kvd")
				if c.before != nil {
					d := mustOpen(t, path, threeNodes("n2"))
					if err := c.before(d); err != nil {
						t.Fatal(err)
					}
					mustClose(t, d)
				}
				crash := &crasher{dir: path, limit: limit}
				d, err := open(path, c.set, files{noSync: true, fault: crash.fault})
				if err == nil {
					err = c.work(d)
					mustClose(t, d)
				}
				if err == nil {
					checkOrder(t, crash.steps)
					return
				}
				if !errors.Is(err, errCrash) {
					t.Fatalf("after %d steps: %v", limit, err)
				}
				d = mustOpen(t, path, c.set)
				if err := c.work(d); err != nil {
					t.Fatalf("again after %d steps: %v", limit, err)
				}
				if mustClose(t, d); !c.good(d) {
					t.Fatalf("after %d steps: %+v %+v", limit, d.id, d.record)
				}
				if d = mustOpen(t, path, c.set); !c.good(d) {
					t.Fatalf("after %d steps and a restart: %+v %+v", limit, d.id, d.record)
				}
			}
		})
	}
}

// checkOrder wants each file synced before its rename, and the directory after it.
func checkOrder(t *testing.T, steps []string) {
	t.Helper()
	var text strings.Builder
	for _, s := range steps {
		op, name, _ := strings.Cut(s, " ")
		fmt.Fprintf(&text, "%s(%s) ", op, name)
	}
	rest := text.String()
	for _, name := range []string{identityFile, recordFile, replicasFile} {
		rest = strings.ReplaceAll(rest, fmt.Sprintf("create(%[1]s) write(%[1]s) sync(%[1]s) rename(%[1]s) syncdir(%[1]s) ", name), "")
		rest = strings.ReplaceAll(rest, fmt.Sprintf("remove(%[1]s) syncdir(%[1]s) ", name), "")
	}
	if rest != "" || len(steps) == 0 {
		t.Fatalf("steps out of order: %s", text.String())
	}
}

func TestSettingsValidate(t *testing.T) {
	many := map[string]string{}
	for i := range MaxMembers {
		many[fmt.Sprint("m", i)] = fmt.Sprint("h:", i)
	}
	long := strings.Repeat("x", MaxAddressBytes+1)
	for want, s := range map[string]Settings{
		"--name":               {Name: "a b", Common: Common{Strategy: "full"}},
		"--name:":              {Name: strings.Repeat("n", 64), Common: Common{Strategy: "full"}},
		"--strategy":           {Name: "n1"},
		"--cluster-token":      {Name: "n1", Common: Common{Token: long, Strategy: "full"}},
		"--shards":             {Name: "n1", Common: Common{Strategy: "full", Shards: -1}},
		"--replication-factor": {Name: "n1", Common: Common{Strategy: "full", ReplicationFactor: 8}},
		"--peers":              {Name: "n1", Common: Common{Strategy: "full"}, Peers: map[string]string{"n2": ""}},
		"--peers:":             {Name: "n1", Common: Common{Strategy: "full"}, Peers: map[string]string{"n2": long}},
		"--peers: ":            {Name: "n1", Common: Common{Strategy: "full"}, Peers: map[string]string{"/": "a:1"}},
		"n2 and n3":            {Name: "n1", Common: Common{Strategy: "full"}, Peers: map[string]string{"n2": "a:1", "n3": "a:1"}},
		"129 nodes":            {Name: "n1", Common: Common{Strategy: "full"}, Peers: many},
	} {
		if err := s.Validate(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %s, got %v", want, err)
		}
	}
	good := Settings{Name: "n1", Common: Common{Strategy: "full"}, Peers: map[string]string{"n1": "a:1", "n2": "b:1"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
}

// A directory may have a place for the log before its first start.
func TestAPlaceForTheLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n2")
	if err := os.MkdirAll(filepath.Join(path, logDir, lostFound), 0o700); err != nil {
		t.Fatal(err)
	}
	mustClose(t, mustOpen(t, path, threeNodes("n2")))
}

// What says where the logs are outlives the incarnation: they are open while a node that is no member yet starts a new
// one. Only a directory that says it is of the version that an earlier kvd refuses.
func TestTheLogIsRemembered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n2")
	versionOf := func() string {
		data, err := os.ReadFile(filepath.Join(path, identityFile))
		if err != nil {
			t.Fatal(err)
		}
		return string(regexp.MustCompile(`"version": (\d)`).FindSubmatch(data)[1])
	}
	d := mustOpen(t, path, threeNodes("n2"))
	if d.Log() != "" || versionOf() != "1" {
		t.Errorf("a new directory has log %q, version %s", d.Log(), versionOf())
	}
	first := d.Incarnation()
	if err := errors.Join(d.SetLog("shared"), d.hold(recordFor(d)), d.abandon()); err != nil {
		t.Fatal(err)
	}
	if d.Log() != "shared" || d.Incarnation() == first || versionOf() != "2" {
		t.Errorf("a new incarnation has log %q, version %s", d.Log(), versionOf())
	}
	mustClose(t, d)
	d, err := OpenOffline(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenOffline(path); !errors.Is(err, ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	if d.Log() != "shared" || d.Name() != "n2" || d.Replica() != "" {
		t.Errorf("offline: log %q of %s", d.Log(), d.Name())
	}
	if err := d.SetLog(""); err != nil || versionOf() != "1" {
		t.Errorf("version %s, %v", versionOf(), err)
	}
	mustClose(t, d)
	if _, err := OpenOffline(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an empty directory: %v", err)
	}
}

// However many replicas a node has had, the list is no longer than the groups
// and what is open, and nothing on it is ever made afresh.
func TestReplicasThatWereDeletedAreRemembered(t *testing.T) {
	d := mustOpen(t, t.TempDir(), threeNodes("n2"))
	defer d.Close()
	mark := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	used := func(group uint64, id string) {
		t.Helper()
		if err := d.MayCreate(group, id); !errors.Is(err, ErrReplicaUsed) {
			t.Errorf("%s of group %d may be made again: %v", id, group, err)
		}
	}
	mark(d.MarkCreated(9, "n2/3"))
	for number := range uint64(50) {
		id := ReplicaID("n2", number+10)
		mark(d.MarkCreated(7, id))
		mark(d.MarkCreated(7, id+"w"))
		mark(d.MarkDeleted(7, id+"w"))
		used(7, id)
		used(7, id+"w")
		if number%10 > 0 { // others are open for longer
			mark(d.MarkDeleted(7, id))
			mark(d.MarkDeleted(7, id))
		}
	}
	if n := len(d.Replicas()); n != 2 {
		t.Errorf("lists %v", d.Replicas())
	}
	mark(d.MarkDeleted(8, "n2/99"))
	mark(d.MarkDeleted(7, "n2/99"))
	mark(d.MarkDeleted(7, "lost+found"))
	used(9, "n2/3")
	used(7, "n2/1")
	if err := errors.Join(d.MayCreate(7, "n2/60"), d.MayCreate(8, "n2/4"), d.MayCreate(9, "n2/2")); err != nil {
		t.Error(err)
	}
}
