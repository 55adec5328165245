// Package layout checks that imports run one way (docs/design.md section 3).
package layout

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

// floor is the height of a top-level folder: a package may import its own
// folder and lower ones. transport and ring import nothing of kvd.
var floor = map[string]int{
	"cmd": 6, "node": 5, "bench": 5, "server": 4, "placement": 4, "shard": 3, "fsm": 2, "snapshot": 1, "transport": 0, "ring": 0,
	"integration": 100,
}

func violation(importer, imported string) string {
	from, to := folder(importer), folder(imported)
	above, known1 := floor[from]
	below, known2 := floor[to]
	switch {
	case !known1 || !known2:
		return "a folder that docs/design.md does not name"
	case importer == "kvd/server/lessor":
		return "it is pure"
	case from == to:
		return ""
	case below >= above:
		return "imports run down only"
	}
	return ""
}

func folder(path string) string {
	path = strings.TrimPrefix(path, "kvd/")
	top, _, _ := strings.Cut(path, "/")
	return top
}

func TestImportsRunOneWay(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}{{range .TestImports}} {{.}}{{end}}`, "kvd/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	packages := 0
	for line := range bytes.Lines(out) {
		fields := strings.Fields(string(line))
		packages++
		for _, imported := range fields[1:] {
			if !strings.HasPrefix(imported, "kvd/") {
				continue
			}
			if why := violation(fields[0], imported); why != "" {
				t.Errorf("%s imports %s: %s", fields[0], imported, why)
			}
		}
	}
	if packages < 5 {
		t.Fatalf("go list found %d packages only", packages)
	}
}

func TestAnUpwardImportIsSeen(t *testing.T) {
	for _, pair := range [][2]string{{"kvd/fsm", "kvd/shard"}, {"kvd/transport", "kvd/fsm"}, {"kvd/server", "kvd/placement"}, {"kvd/unheard/of", "kvd/fsm"}, {"kvd/server/lessor", "kvd/server"}} {
		if violation(pair[0], pair[1]) == "" {
			t.Errorf("%s importing %s passed", pair[0], pair[1])
		}
	}
}
