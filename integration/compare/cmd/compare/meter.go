package main

import (
	"context"
	"slices"
	"time"

	"kvd/integration/compare/servers"
)

// meter reads processor times again and again, since only kvd bench knows when what it measures begins and ends.
type meter struct {
	stop   func()
	result chan []reading
}

type reading struct {
	at               time.Time
	servers, machine float64 // seconds
	err              error
}

const meterEach = 20 * time.Millisecond

func (t *trial) startMeter() *meter {
	ctx, stop := context.WithCancel(context.Background())
	m := &meter{stop, make(chan []reading, 1)}
	go func() {
		var all []reading
		for {
			servers, machine, err := t.processorTimes()
			all = append(all, reading{time.Now(), servers.Seconds(), machine.Seconds(), err})
			if sleep(ctx, meterEach) != nil {
				m.result <- all
				return
			}
		}
	}()
	return m
}

func (t *trial) processorTimes() (cluster, machine time.Duration, err error) {
	if cluster, err = t.cluster.CPU(); err == nil {
		machine, err = servers.MachineCPU()
	}
	return cluster, machine, err
}

// between stops the meter and returns what was used in a time that is over.
func (m *meter) between(start time.Time, seconds float64) (reading, error) {
	m.stop()
	all := <-m.result
	for _, r := range all {
		if r.err != nil {
			return reading{}, r.err
		}
	}
	from, to := readAt(all, start), readAt(all, start.Add(time.Duration(seconds*float64(time.Second))))
	return reading{servers: to.servers - from.servers, machine: to.machine - from.machine}, nil
}

// readAt is the reading nearest to a time.
func readAt(all []reading, at time.Time) reading {
	return slices.MinFunc(all, func(a, b reading) int {
		return int(a.at.Sub(at).Abs() - b.at.Sub(at).Abs())
	})
}
