//go:build unix

package e2e

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

// skip is a line of skips.txt: tests of etcd that are not run, and why.
type skip struct {
	line     string
	strategy string // or "all"
	pkg      string
	test     *regexp.Regexp // whole names of tests
	parts    string         // of these, only the subtests that this matches, as -test.skip does; "" = the test as a whole
	reason   string
	used     bool
}

// readSkips reads the lines that hold for a strategy: strategy, package:test or package:test/subtest, reason.
func readSkips(file, strategy string) ([]*skip, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var skips []*skip
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		s, err := parseSkip(line)
		if err != nil {
			return nil, fmt.Errorf("%s: %q: %w", file, line, err)
		}
		if s.strategy == "all" || s.strategy == strategy {
			skips = append(skips, s)
		}
	}
	return skips, nil
}

func parseSkip(line string) (*skip, error) {
	fields := strings.Fields(line)
	if len(fields) < 3 {
		return nil, fmt.Errorf("it is not: strategy, package:test, reason")
	}
	if !slices.Contains([]string{"all", full, consistent}, fields[0]) {
		return nil, fmt.Errorf("%q is no strategy", fields[0])
	}
	pkg, test, ok := strings.Cut(fields[1], ":")
	if !ok {
		return nil, fmt.Errorf("%q is not package:test", fields[1])
	}
	test, parts, _ := strings.Cut(test, "/")
	pattern, err := regexp.Compile("^(" + test + ")$")
	if err != nil {
		return nil, err
	}
	return &skip{line: line, strategy: fields[0], pkg: pkg, test: pattern, parts: parts, reason: strings.Join(fields[2:], " ")}, nil
}

// skipsOf returns why a test is not run, "" if it is, and the subtests that are left out of it.
func skipsOf(skips []*skip, pkg, test string) (reason string, parts []*skip) {
	for _, s := range skips {
		if s.pkg != pkg || !s.test.MatchString(test) {
			continue
		}
		s.used = true
		if s.parts == "" {
			return s.reason, nil
		}
		parts = append(parts, s)
	}
	return "", parts
}
