package cluster

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// echo is a server that sends every line back; it reports what it gets.
type echo struct {
	listener net.Listener
	lines    chan string
}

func newEcho(t *testing.T) *echo {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{listener: listener, lines: make(chan string, 100)}
	var group sync.WaitGroup
	t.Cleanup(func() { listener.Close(); group.Wait() })
	group.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer conn.Close()
				scanner := bufio.NewScanner(conn)
				for scanner.Scan() {
					e.lines <- scanner.Text()
					fmt.Fprintln(conn, scanner.Text())
				}
			})
		}
	})
	return e
}

// peer is a client of a link.
type peer struct {
	net.Conn
	*bufio.Reader
}

func dial(t *testing.T, l *Link) peer {
	conn, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return peer{conn, bufio.NewReader(conn)}
}

// say sends a line and returns what comes back.
func (p peer) say(line string) (string, error) {
	if _, err := fmt.Fprintln(p.Conn, line); err != nil {
		return "", err
	}
	answer, err := p.ReadString('\n')
	return strings.TrimSpace(answer), err
}

func startLink(t *testing.T, target func() string) *Link {
	l, err := newLink(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func TestLinkCarriesBothWays(t *testing.T) {
	e := newEcho(t)
	p := dial(t, startLink(t, e.listener.Addr().String))
	if answer, err := p.say("hello"); err != nil || answer != "hello" {
		t.Fatalf("%q, %v", answer, err)
	}
}

func TestCutLinkResetsAndRefuses(t *testing.T) {
	e := newEcho(t)
	l := startLink(t, e.listener.Addr().String)
	p := dial(t, l)
	if _, err := p.say("before"); err != nil {
		t.Fatal(err)
	}
	l.Cut()
	if _, err := p.say("cut"); err == nil {
		t.Fatal("a cut link answered")
	}
	if conn, err := net.Dial("tcp", l.Addr()); err == nil { // it may be reset before or after
		defer conn.Close()
		if _, err := (peer{conn, bufio.NewReader(conn)}).say("new"); err == nil {
			t.Fatal("a cut link took a new connection")
		}
	}
	l.Heal()
	if _, err := dial(t, l).say("after"); err != nil {
		t.Fatal(err)
	}
	l.Close()
	close(e.lines)
	for line := range e.lines {
		if line == "cut" || line == "new" {
			t.Fatalf("%q came through a cut link", line)
		}
	}
}

func TestFrozenLinkDeliversLate(t *testing.T) {
	e := newEcho(t)
	l := startLink(t, e.listener.Addr().String)
	p := dial(t, l)
	if _, err := p.say("before"); err != nil {
		t.Fatal(err)
	}
	<-e.lines
	l.Freeze()
	late := dial(t, l)
	for _, q := range []peer{p, late} {
		if _, err := fmt.Fprintln(q.Conn, "late"); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case line := <-e.lines:
		t.Fatalf("%q came through a frozen link", line)
	case <-time.After(50 * time.Millisecond): // cannot be too short: it only gives a fault the time to show
	}
	l.Heal()
	for _, q := range []peer{p, late} {
		if answer, err := q.ReadString('\n'); err != nil || answer != "late\n" {
			t.Fatalf("%q, %v", answer, err)
		}
	}
	if err := func() error {
		l.Freeze()
		fmt.Fprintln(p.Conn, "never")
		l.Cut()
		_, err := p.ReadString('\n')
		return err
	}(); err == nil {
		t.Fatal("a cut link answered")
	}
}

func TestLinkFollowsItsTarget(t *testing.T) {
	first, second := newEcho(t), newEcho(t)
	var mu sync.Mutex
	target := first.listener.Addr().String()
	l := startLink(t, func() string { mu.Lock(); defer mu.Unlock(); return target })
	if _, err := dial(t, l).say("one"); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	target = second.listener.Addr().String()
	mu.Unlock()
	if _, err := dial(t, l).say("two"); err != nil {
		t.Fatal(err)
	}
	if a, b := <-first.lines, <-second.lines; a != "one" || b != "two" {
		t.Fatalf("%q, %q", a, b)
	}
}
