package transport

import (
	"testing"
	"testing/synctest"
	"time"
)

// deathWatch is a node that watches another, b.
func deathWatch(t *testing.T, net *testNet, fault bool) (watcher *Group, peer *Transport) {
	t.Helper()
	a := net.start("a", nil)
	a.faults.silenceIsDeath = fault
	g, err := a.Group(1, "a/1", noInstall)
	if err != nil {
		t.Fatal(err)
	}
	b := net.start("b", nil)
	b.Handle("echo", echo)
	a.Handle("echo", echo)
	for from, to := range map[*Transport]string{a: "b", b: "a"} {
		if _, err := from.Call(t.Context(), to, "echo", nil); err != nil {
			t.Fatal(err)
		}
	}
	return g, b
}

func noticed(g *Group) bool {
	synctest.Wait()
	select {
	case <-g.DeathNotify():
		return true
	default:
		return false
	}
}

func TestAProcessWhoseAddressRefusesIsDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		g, b := deathWatch(t, net, false)
		if g.Dead("b/1") {
			t.Fatal("dead before anything happened")
		}
		_ = b.Close()
		time.Sleep(50 * time.Millisecond)
		if !g.Dead("b/1") || !noticed(g) {
			t.Fatal("not found dead")
		}
		if g.Dead("c/1") || g.Dead("nonsense") {
			t.Error("others are dead too")
		}
		// Another process begins at the same address.
		net.start("b", nil).Handle("echo", echo)
		if _, err := g.t.Call(t.Context(), "b", "echo", nil); err != nil {
			time.Sleep(time.Second) // the pause between two attempts
			if _, err = g.t.Call(t.Context(), "b", "echo", nil); err != nil {
				t.Fatal(err)
			}
		}
		if g.Dead("b/1") {
			t.Error("still dead although it answers")
		}
	})
}

// One that is started again at once is alive, whatever the first attempts met.
func TestAProcessThatIsStartedAgainIsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		g, b := deathWatch(t, net, false)
		_ = b.Close()
		net.start("b", nil)
		time.Sleep(time.Second)
		if g.Dead("b/1") {
			t.Error("a living process is dead")
		}
	})
}

// Nothing but a refusal counts: neither silence, nor attempts that get nowhere, nor a broken connection.
func TestSilenceIsNotDeath(t *testing.T) {
	for name, fault := range map[string]bool{"as it is": false, "planted: silence counts": true} {
		synctest.Test(t, func(t *testing.T) {
			net := newTestNet(t, true)
			g, _ := deathWatch(t, net, fault)
			net.memory.Isolate("b")
			time.Sleep(20 * time.Second)
			net.memory.Drop("a", "b")
			time.Sleep(20 * time.Second)
			if dead := g.Dead("b/1"); dead != fault {
				t.Errorf("%s: dead = %v", name, dead)
			}
		})
	}
}

// A node that cannot be reached, but reaches this one, is alive.
func TestANodeThatIsHeardIsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		g, b := deathWatch(t, net, false)
		net.memory.Refuse("a", "b", true)
		net.memory.Drop("a", "b")
		if _, err := b.Call(t.Context(), "a", "echo", nil); err != nil {
			time.Sleep(60 * time.Millisecond)
			if _, err = b.Call(t.Context(), "a", "echo", nil); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		if g.Dead("b/1") {
			t.Error("dead although it is heard")
		}
	})
}
