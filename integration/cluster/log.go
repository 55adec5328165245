package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
)

// maxLogBytes is how much of a node's log stays in memory; the file has all of it.
const maxLogBytes = 2 << 20

// Log is what a node has written to its standard output and error, over all its lives.
type Log struct {
	file *os.File

	mu      sync.Mutex
	text    []byte
	dropped int           // bytes that have left text
	mark    int           // where the present life began, in bytes since the first
	grown   chan struct{} // closed at the next write
}

func newLog(path string) (*Log, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	return &Log{file: file, grown: make(chan struct{})}, nil
}

// Write implements io.Writer for a process's output.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if excess := len(l.text) - maxLogBytes; excess > maxLogBytes/2 {
		l.text = append([]byte(nil), l.text[excess:]...)
		l.dropped += excess
	}
	close(l.grown)
	l.grown = make(chan struct{})
	if _, err := l.file.Write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// begin marks the start of a new life.
func (l *Log) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mark = l.dropped + len(l.text)
}

// Contains reports whether the node has written text in its present life.
func (l *Log) Contains(text string) bool {
	found, _ := l.look(text)
	return found
}

func (l *Log) look(text string) (bool, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.text[max(0, l.mark-l.dropped):], []byte(text)), l.grown
}

// WaitFor waits until the node has written text in its present life.
func (l *Log) WaitFor(ctx context.Context, text string) error { return l.waitFor(ctx, nil, text) }

// waitFor also ends when the process has: with ErrExited.
func (l *Log) waitFor(ctx context.Context, exited <-chan struct{}, text string) error {
	for {
		ended := false
		select {
		case <-exited: // first, so that the look below sees all it has written
			ended = true
		default:
		}
		found, grown := l.look(text)
		if found {
			return nil
		}
		if ended {
			return ErrExited
		}
		select {
		case <-grown:
		case <-exited:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %q in the log: %w", text, ctx.Err())
		}
	}
}

// Size is how many bytes the node has written in all its lives.
func (l *Log) Size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped + len(l.text)
}

// Since returns what the node has written after the first size bytes, as far as it is still in memory.
func (l *Log) Since(size int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text[min(len(l.text), max(0, size-l.dropped)):])
}

func (l *Log) all() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// Life returns what the node has written in its present life.
func (l *Log) Life() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text[max(0, l.mark-l.dropped):])
}

// Tail returns the last lines.
func (l *Log) Tail(lines int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := strings.Split(strings.TrimRight(string(l.text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
