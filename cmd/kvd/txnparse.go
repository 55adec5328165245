package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// txnReader reads a transaction line by line.
type txnReader struct {
	in     *bufio.Reader
	number int // of the lines read
}

// part gives the lines up to the next empty one to parse.
func (r *txnReader) part(parse func(line string) error) error {
	for {
		line, err := r.in.ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read the transaction from standard input: %w", err)
		}
		if line != "" {
			r.number++
		}
		if line = strings.TrimSpace(line); line == "" {
			return nil
		}
		if err := parse(line); err != nil {
			return usagef("line %d: %w", r.number, err)
		}
	}
}

// compareSyntax is target(key) operator value. Keys are quoted; values may be.
var compareSyntax = regexp.MustCompile(`^(\w+)\s*\(\s*("(?:[^"\\]|\\.)*")\s*\)\s*([^\s"\w-]+)\s*("(?:[^"\\]|\\.)*"|[^\s"]+)$`)

// parseCompare reads a compare such as mod("key") > "7".
func parseCompare(line string) (c clientv3.Cmp, err error) {
	m := compareSyntax.FindStringSubmatch(line)
	if m == nil {
		return c, fmt.Errorf(`%q is not a compare such as mod("key") > "7"`, line)
	}
	target, operator, operand := m[1], m[3], m[4]
	key, err := strconv.Unquote(m[2])
	if err == nil && operand[0] == '"' {
		operand, err = strconv.Unquote(operand)
	}
	if err != nil {
		return c, fmt.Errorf("%q has a quoted word that cannot be read", line)
	}
	switch operator {
	case "=", "!=", "<", ">":
	default:
		return c, fmt.Errorf("%q has the operator %q: use = != < or >", line, operator)
	}
	number := func(base int) (n int64) {
		n, err = strconv.ParseInt(operand, base, 64)
		return n
	}
	switch target {
	case "val", "value":
		c = clientv3.Compare(clientv3.Value(key), operator, operand)
	case "ver", "version":
		c = clientv3.Compare(clientv3.Version(key), operator, number(10))
	case "c", "create":
		c = clientv3.Compare(clientv3.CreateRevision(key), operator, number(10))
	case "m", "mod":
		c = clientv3.Compare(clientv3.ModRevision(key), operator, number(10))
	case "lease":
		c = clientv3.Compare(clientv3.LeaseValue(key), operator, number(16))
	default:
		return c, fmt.Errorf("%q compares %q: use value, version, create, mod or lease", line, target)
	}
	if err != nil {
		return c, fmt.Errorf("%q compares with %q, which is not a number", line, operand)
	}
	return c, nil
}

// parseRequest reads a request such as put key "a value" --prev-kv.
func parseRequest(line string) (op clientv3.Op, err error) {
	words, err := splitWords(line)
	if err != nil {
		return op, err
	}
	flags := pflag.NewFlagSet(words[0], pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	var build func(args []string) (clientv3.Op, error)
	switch words[0] {
	case "put":
		var o putOptions
		o.AddFlags(flags)
		build = func(args []string) (clientv3.Op, error) { return o.op(args, nil) }
	case "get":
		var o getOptions
		o.AddFlags(flags)
		build = o.op
	case "del":
		var o delOptions
		o.AddFlags(flags)
		build = o.op
	default:
		return op, fmt.Errorf("%q is not a request: use put, get or del", words[0])
	}
	if err := flags.Parse(words[1:]); err != nil {
		return op, fmt.Errorf("%s: %w", words[0], err)
	}
	return build(flags.Args())
}

// splitWords splits at spaces. A word that begins with a quote goes on to the next one; in double quotes there are
// Go's escapes, in single quotes none. Quotes inside a word are part of it, so {"a":1} is one word.
func splitWords(line string) (words []string, err error) {
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		var word string
		switch line[0] {
		case '"':
			quoted, err := strconv.QuotedPrefix(line)
			if err != nil {
				return nil, fmt.Errorf("%s has a double quote that is not closed, or a bad escape", line)
			}
			if word, err = strconv.Unquote(quoted); err != nil {
				return nil, fmt.Errorf("%s cannot be read: %w", quoted, err)
			}
			line = line[len(quoted):]
		case '\'':
			end := strings.IndexByte(line[1:], '\'')
			if end < 0 {
				return nil, fmt.Errorf("%s has a single quote that is not closed", line)
			}
			word, line = line[1:1+end], line[end+2:]
		default:
			end := strings.IndexAny(line, " \t")
			if end < 0 {
				end = len(line)
			}
			words, line = append(words, line[:end]), line[end:]
			continue
		}
		if line != "" && !strings.ContainsAny(line[:1], " \t") {
			return nil, fmt.Errorf("want a space between a closing quote and %s", line)
		}
		words = append(words, word)
	}
	return words, nil
}
