package sim

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/linearizability"
)

// chain checks reads across shards. A writer puts a number to one key after the
// other, each in its own shard, and goes on only when the last put has been
// acknowledged; then the next number. At any moment the keys before some point
// of the chain have one number, and the rest the one before. A read of all keys
// must show such a moment, and none before the read began.
type chain struct {
	keys []string

	mu    sync.Mutex
	acked int   // puts acknowledged, in all
	bad   error // the first read that was wrong
	reads int
	moved int // reads that saw the chain between two numbers
}

var errTorn = errors.New("sim: a read across shards shows a moment that never was")

// newChain spreads keys over shards, one each.
func newChain(keys int) *chain {
	c := &chain{}
	for i := range keys {
		c.keys = append(c.keys, fmt.Sprintf("chain/%02d", i))
	}
	return c
}

// write goes on until ctx is done. An unknown outcome is put again, which
// changes nothing but revisions.
func (c *chain) write(ctx context.Context, services []linearizability.Service) {
	for n := 0; ctx.Err() == nil; n++ {
		key, number := c.keys[n%len(c.keys)], n/len(c.keys)+1
		for i := 0; ctx.Err() == nil; i++ {
			attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
			_, err := services[(n+i)%len(services)].Put(attempt, &pb.PutRequest{Key: []byte(key), Value: []byte(strconv.Itoa(number))})
			cancel()
			if err == nil {
				c.mu.Lock()
				c.acked = n + 1
				c.mu.Unlock()
				break
			}
			pause(ctx, 100*time.Millisecond)
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// read goes on until ctx is done.
func (c *chain) read(ctx context.Context, service linearizability.Service, every time.Duration) {
	for pause(ctx, every) {
		c.mu.Lock()
		least := c.acked
		c.mu.Unlock()
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		answer, err := service.Range(attempt, &pb.RangeRequest{Key: []byte("chain/"), RangeEnd: []byte("chain0")})
		cancel()
		if err == nil {
			c.judge(answer, least)
		}
	}
}

func (c *chain) judge(answer *pb.RangeResponse, least int) {
	seen := make([]int, len(c.keys))
	at := make(map[string]int)
	for i, key := range c.keys {
		at[key] = i
	}
	for _, kv := range answer.Kvs {
		n, err := strconv.Atoi(string(kv.Value))
		i, known := at[string(kv.Key)]
		if err != nil || !known {
			c.fail(fmt.Errorf("%w: %q = %q", errTorn, kv.Key, kv.Value))
			return
		}
		seen[i] = n
	}
	total := 0
	for i, n := range seen {
		total += n
		if i > 0 && (n > seen[i-1] || n < seen[0]-1) {
			c.fail(fmt.Errorf("%w: %v at revision %d", errTorn, seen, answer.Header.Revision))
			return
		}
	}
	if total < least {
		c.fail(fmt.Errorf("%w: %v at revision %d, but %d puts had been acknowledged before it began", errTorn, seen, answer.Header.Revision, least))
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	if seen[0] != seen[len(seen)-1] {
		c.moved++
	}
}

func (c *chain) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bad == nil {
		c.bad = err
	}
}
