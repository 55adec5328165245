package cluster

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

// Ports come from below the range that the kernel hands out for outgoing connections: a port that a node
// gives up while it is down must not be taken by somebody's connection. Those below are of package bench/local, those above of integration/e2e.
const (
	firstPort = 13000
	lastPort  = 19999
)

var ports struct {
	mu   sync.Mutex
	used map[int]bool
}

// freeAddress returns a loopback address that nobody listens on and that this process has not had before.
// Another process may still take it before it is used: starting a node copes with that.
func freeAddress() (string, error) {
	ports.mu.Lock()
	defer ports.mu.Unlock()
	if ports.used == nil {
		ports.used = make(map[int]bool)
	}
	var errs []error
	for range 100 {
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		if ports.used[port] {
			continue
		}
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		listener, err := net.Listen("tcp", address)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		listener.Close()
		ports.used[port] = true
		return address, nil
	}
	return "", fmt.Errorf("no free port: %w", errors.Join(errs...))
}
