package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// progress draws a bar while bytes pass. It draws nothing where nobody looks.
type progress struct {
	out        io.Writer // nil: draw nothing
	title      string
	totalBytes int64 // 0: unknown
	doneBytes  int64
	drawn      time.Time
}

const progressWidth = 30

// newProgress draws on out if that is a terminal.
func newProgress(out io.Writer, title string, totalBytes int64) *progress {
	p := &progress{title: title, totalBytes: totalBytes}
	if file, ok := out.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		p.out = out
	}
	return p
}

// Write counts b.
func (p *progress) Write(b []byte) (int, error) {
	p.doneBytes += int64(len(b))
	if p.out != nil && time.Since(p.drawn) > 100*time.Millisecond {
		p.drawn = time.Now()
		fmt.Fprintf(p.out, "\r%s\x1b[K", p.line())
	}
	return len(b), nil
}

func (p *progress) line() string {
	if p.totalBytes <= 0 {
		return fmt.Sprintf("%s %s", p.title, size(p.doneBytes))
	}
	done := min(p.doneBytes, p.totalBytes)
	return fmt.Sprintf("%s %s of %s", p.title, bar(float64(done)/float64(p.totalBytes)), size(p.totalBytes))
}

// bar draws how much of something is done, 0 to 1.
func bar(fraction float64) string {
	filled := int(progressWidth * fraction)
	return fmt.Sprintf("[%s%s] %3d%%", strings.Repeat("#", filled), strings.Repeat(".", progressWidth-filled), int(100*fraction))
}

// clear removes the bar.
func (p *progress) clear() {
	if p.out != nil && !p.drawn.IsZero() {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
