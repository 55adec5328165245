package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// markdown is the whole result: what was measured where, the targets, then all figures.
func (c *comparison) markdown() string {
	var s strings.Builder
	fmt.Fprintf(&s, "Measured %s.\n\n", c.machine)
	fmt.Fprintf(&s, "%s, %v for each load, %d keys in the store for memory, restart and disruption, %d watchers, %d leases, and %d that end; it took %v. %s\n",
		plural(c.o.rounds, "round"), c.o.duration, c.o.keys, c.o.watchers, c.o.leases, c.o.ending, c.took.Round(time.Second), c.noise())
	if c.o.quick {
		s.WriteString("\n**A quick run: it shows that everything works, and its figures mean nothing.**\n")
	}
	if table := c.targetTable(); len(table) > 1 {
		s.WriteString("\n### Targets\n\nIn brackets the least and the most of all rounds.\n\n" + align(table))
	}
	for _, section := range sections {
		if table := c.sectionTable(section); len(table) > 1 {
			fmt.Fprintf(&s, "\n### %s\n\n%s", section, align(table))
		}
	}
	if len(c.failures) > 0 {
		s.WriteString("\n### Failed\n")
		for _, f := range c.failures {
			fmt.Fprintf(&s, "\nround %d, %s, %s:\n\n```\n%s\n```\n", f.Round, f.Stage, f.Server, f.Error)
		}
	}
	return s.String()
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// noise says what else the machine did.
func (c *comparison) noise() string {
	if len(c.others) == 0 {
		return ""
	}
	s := spread(c.others)
	return fmt.Sprintf("Other processes used %.2f of %d processors in the median of all loads, %.2f at most.", s.median(), runtime.NumCPU(), s.max())
}

func (c *comparison) targetTable() [][]string {
	table := [][]string{{"", "of", "target", "kvd full", "", "kvd consistent", ""}}
	for _, t := range targets {
		if c.o.only != "" && len(c.figures[t.row]) == 0 {
			continue
		}
		line := []string{t.title, t.over(), t.String(), "", "", "", ""}
		for _, server := range t.of {
			column := 3
			if server != full {
				column = 5
			}
			line[column], line[column+1] = c.judge(t, server)
		}
		table = append(table, line)
	}
	return table
}

// over is what a target is a ratio of.
func (t target) over() string {
	if t.base == "" {
		return ""
	}
	return "/ " + t.base
}

const (
	met    = "met"
	notMet = "**not met**"
)

func (c *comparison) judge(t target, server string) (figure, verdict string) {
	s := t.measure(c.figures, server)
	if len(s) == 0 {
		return "", "not measured"
	}
	verdict = notMet
	if t.met(s.median()) {
		verdict = met
	}
	return s.format(2), verdict
}

func (s spread) format(decimals int) string {
	if len(s) == 0 {
		return ""
	}
	r := row{decimals: decimals}
	if len(s) == 1 {
		return r.format(s.median())
	}
	return fmt.Sprintf("%s (%s–%s)", r.format(s.median()), r.format(s.min()), r.format(s.max()))
}

// ratioPairs are those whose ratios the tables show.
var ratioPairs = [][2]string{{full, etcd}, {consistent, etcd}, {consistent, full}, {full, floor}}

func (c *comparison) sectionTable(section string) [][]string {
	servers := c.servers(section)
	header := append([]string{"", "unit"}, servers...)
	var pairs [][2]string
	for _, pair := range ratioPairs {
		if slices.Contains(servers, pair[0]) && slices.Contains(servers, pair[1]) {
			pairs = append(pairs, pair)
			header = append(header, pair[0]+" / "+pair[1])
		}
	}
	table := [][]string{header}
	for _, r := range rows {
		if r.section != section || len(c.figures[r.key]) == 0 {
			continue
		}
		line := []string{r.title, r.unit}
		for _, server := range servers {
			line = append(line, c.figures.of(r.key, server).format(r.decimals))
		}
		for _, pair := range pairs {
			line = append(line, c.figures.ratios(r.key, pair[0], pair[1]).format(2))
		}
		table = append(table, line)
	}
	return table
}

// servers lists those that have a figure in a section.
func (c *comparison) servers(section string) (found []string) {
	for _, server := range []string{etcd, full, consistent, consistent256, floor} {
		for _, r := range rows {
			if r.section == section && len(c.figures[r.key][server]) > 0 {
				found = append(found, server)
				break
			}
		}
	}
	return found
}

// align writes a Markdown table that is readable as text, too. Figures stand on the right.
func align(table [][]string) string {
	width := make([]int, len(table[0]))
	for _, line := range table {
		for i, cell := range line {
			width[i] = max(width[i], utf8.RuneCountInString(cell), 3)
		}
	}
	var s strings.Builder
	for n, line := range table {
		for i, cell := range line {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if i == 0 {
				fmt.Fprintf(&s, "| %s%s ", cell, pad)
			} else {
				fmt.Fprintf(&s, "| %s%s ", pad, cell)
			}
		}
		s.WriteString("|\n")
		if n == 0 {
			for i, w := range width {
				if i == 0 {
					fmt.Fprintf(&s, "|%s", strings.Repeat("-", w+2))
				} else {
					fmt.Fprintf(&s, "|%s:", strings.Repeat("-", w+1))
				}
			}
			s.WriteString("|\n")
		}
	}
	return s.String()
}

// Markers in a Markdown file around the part that -out replaces.
const (
	beginMarker = "<!-- compare: begin -->\n"
	endMarker   = "<!-- compare: end -->\n"
)

// checkMarkers tells whether a file can take the table. No file at all is right, too.
func checkMarkers(file string) error {
	_, _, err := aroundMarkers(file)
	return err
}

func aroundMarkers(file string) (before, after string, err error) {
	if file == "" {
		return "", "", nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", "", err
	}
	before, rest, begins := strings.Cut(string(text), beginMarker)
	_, after, ends := strings.Cut(rest, endMarker)
	if !begins || !ends {
		return "", "", fmt.Errorf("%s has not the lines %q and %q, between which the table goes", file, beginMarker, endMarker)
	}
	return before, after, nil
}

func replaceBetweenMarkers(file, text string) error {
	if file == "" {
		return nil
	}
	before, after, err := aroundMarkers(file)
	if err != nil {
		return err
	}
	return os.WriteFile(file, []byte(before+beginMarker+"\n"+text+"\n"+endMarker+after), 0o644)
}

// fileReport is the result as JSON.
type fileReport struct {
	Machine  machine       `json:"machine"`
	Rounds   int           `json:"rounds"`
	Duration time.Duration `json:"load_nanoseconds"`
	Keys     int           `json:"keys"`
	Watchers int           `json:"watchers"`
	Leases   int           `json:"leases"`
	Ending   int           `json:"leases_that_end"`
	Quick    bool          `json:"quick"`
	Seconds  float64       `json:"took_seconds"`
	Others   []float64     `json:"processors_used_by_others"` // during each load

	Rows     []rowReport    `json:"rows"`
	Targets  []targetReport `json:"targets"`
	Failures []failure      `json:"failures"`
}

type rowReport struct {
	Key     string                     `json:"key"`
	Title   string                     `json:"title"`
	Unit    string                     `json:"unit"`
	Figures map[string]map[int]float64 `json:"figures"` // by server and round, from 0
	Ratios  map[string]spreadReport    `json:"ratios"`
}

type spreadReport struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

type targetReport struct {
	Title  string       `json:"title"`
	Row    string       `json:"row"`
	Server string       `json:"server"`
	Base   string       `json:"base,omitempty"` // the figure is a ratio to this server's
	Target string       `json:"target"`
	Figure spreadReport `json:"figure"`
	Met    bool         `json:"met"`
}

func (s spread) report() spreadReport { return spreadReport{s.min(), s.median(), s.max()} }

// report is everything as JSON has it.
func (c *comparison) report() fileReport {
	r := fileReport{
		Machine: c.machine, Rounds: c.o.rounds, Duration: c.o.duration, Keys: c.o.keys, Watchers: c.o.watchers, Leases: c.o.leases,
		Ending: c.o.ending, Quick: c.o.quick, Seconds: c.took.Seconds(), Others: c.others, Failures: c.failures,
	}
	for _, row := range rows {
		if len(c.figures[row.key]) == 0 {
			continue
		}
		line := rowReport{row.key, row.title, row.unit, c.figures[row.key], map[string]spreadReport{}}
		for _, pair := range ratioPairs {
			if s := c.figures.ratios(row.key, pair[0], pair[1]); len(s) > 0 {
				line.Ratios[pair[0]+" / "+pair[1]] = s.report()
			}
		}
		r.Rows = append(r.Rows, line)
	}
	for _, t := range targets {
		for _, server := range t.of {
			if s := t.measure(c.figures, server); len(s) > 0 {
				r.Targets = append(r.Targets, targetReport{t.title, t.row, server, t.base, t.String(), s.report(), t.met(s.median())})
			}
		}
	}
	return r
}
