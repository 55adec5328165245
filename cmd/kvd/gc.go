package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// leastGarbageBytes may gather before it is collected. Go's own measure, as much as there is live memory, makes a
// node with few keys collect all the time: its requests leave far more garbage than it has state.
const leastGarbageBytes = 64 << 20

// paceGC makes garbage collections leastGarbageBytes apart at least. It takes that much more memory than Go's default
// where little is live, and none where more than leastGarbageBytes are. GOGC and GOMEMLIMIT, if set, are left alone.
// It goes on as long as the process.
func paceGC() {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	pacer{percent: defaultGCPercent}.step()
}

const defaultGCPercent = 100

type pacer struct{ percent int }

// step sets the pace to the live memory that the last collection has found, and again after the next one: that is
// when what step leaves behind is gone.
func (p pacer) step() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if percent := gcPercent(live[0].Value.Uint64()); percent*8 < p.percent*7 || percent*7 > p.percent*8 { // setting it stops the world
		debug.SetGCPercent(percent)
		p.percent = percent
	}
	type mark struct{ p *pacer }
	runtime.AddCleanup(&mark{&p}, pacer.step, p)
}

// gcPercent is how much garbage may gather, in percent of the live memory.
func gcPercent(live uint64) int {
	const most = 100 * 16
	if live == 0 {
		return most // nothing has been collected yet; Go counts 4 MiB as live at least
	}
	return max(defaultGCPercent, int(min(100*leastGarbageBytes/live, most)))
}
