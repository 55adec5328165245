package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
)

// A small heap may gather garbage, a large one is collected as Go does.
func TestGCPercent(t *testing.T) {
	for live, want := range map[uint64]int{
		0:                     1600,
		1 << 20:               1600,
		leastGarbageBytes / 4: 400,
		leastGarbageBytes:     100,
		8 << 30:               100,
	} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d%% with %d bytes live, want %d%%", got, live, want)
		}
	}
}

// The pace follows the live memory from collection to collection, unless the user has set one.
func TestPaceGC(t *testing.T) {
	for _, name := range []string{"GOGC", "GOMEMLIMIT"} {
		t.Setenv(name, "") // restored at the end
	}
	was := debug.SetGCPercent(defaultGCPercent)
	t.Cleanup(func() { debug.SetGCPercent(was) })
	present := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	for name, value := range map[string]string{"GOGC": "100", "GOMEMLIMIT": "1GiB"} {
		if err := os.Setenv(name, value); err != nil {
			t.Fatal(err)
		}
		paceGC()
		if got := present(); got != defaultGCPercent {
			t.Fatalf("with %s=%s the pace is %d%%", name, value, got)
		}
		if err := os.Setenv(name, ""); err != nil {
			t.Fatal(err)
		}
	}
	paceGC()
	if got := present(); got <= defaultGCPercent {
		t.Fatalf("a small heap has the pace %d%%", got)
	}
	large := make([]byte, 4*leastGarbageBytes)
	for present() != defaultGCPercent {
		runtime.GC()
		runtime.Gosched()
	}
	runtime.KeepAlive(large)
	large = nil
	for present() == defaultGCPercent {
		runtime.GC()
		runtime.Gosched()
	}
}
