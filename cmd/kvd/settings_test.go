package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// resolve reads `kvd start` options from a command line, an environment and a file.
func resolve(t *testing.T, args []string, env map[string]string, file string) (*startOptions, error) {
	t.Helper()
	var o startOptions
	flags := pflag.NewFlagSet("start", pflag.ContinueOnError)
	o.AddFlags(flags)
	if file != "" {
		path := filepath.Join(t.TempDir(), "kvd.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return &o, o.complete(flags, func(name string) string { return env[name] })
}

func TestSettingsPrecedence(t *testing.T) {
	const file = "name: file\ncluster-token: file\nstrategy: file\nheartbeat-timeout: 3s\npprof: true\nsnapshot-entries: 12\n"
	env := map[string]string{"KVD_NAME": "env", "KVD_CLUSTER_TOKEN": "env", "KVD_STRATEGY": "", "KVD_LISTEN_HTTP": "none", "KVD_HELP": "1"}
	o, err := resolve(t, []string{"--name", "flag"}, env, file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, got, want string }{
		{"a flag beats all", o.name, "flag"},
		{"the environment beats the file", o.clusterToken, "env"},
		{"the file beats an empty variable", o.strategy, "file"},
		{"the environment beats the default", o.listenHTTP, "none"},
		{"the default is left", o.listenClient, defaultClient},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %q, want %q", c.what, c.got, c.want)
		}
	}
	if o.heartbeatTimeout != 3*time.Second || !o.pprof || o.snapshotEntries != 12 {
		t.Errorf("read %v, %v, %d from the file", o.heartbeatTimeout, o.pprof, o.snapshotEntries)
	}
}

func TestConfigFileFromEnvironment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvd.yaml")
	if err := os.WriteFile(path, []byte("name: file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := resolve(t, nil, map[string]string{"KVD_CONFIG": path}, "")
	if err != nil || o.name != "file" {
		t.Errorf("name %q, %v", o.name, err)
	}
}

func TestConfigFileForms(t *testing.T) {
	for file, want := range map[string]string{
		"peers: n1=a:1,n2=b:2":                  "n1=a:1,n2=b:2",
		"peers: [n1=a:1, n2=b:2]":               "n1=a:1,n2=b:2",
		"peers:\n  n1: a:1\n  n2: b:2\n":        "n1=a:1,n2=b:2",
		"x-peers: &p n1=a:1\npeers: *p":         "",
		"# only a comment\n":                    "",
		"---\npeers: n1=a:1\n":                  "n1=a:1",
		"name: &p n1=a:1\npeers: *p\nname2: ''": "",
	} {
		o, err := resolve(t, nil, nil, file)
		if strings.Contains(file, "x-peers") || strings.Contains(file, "name2") {
			if err == nil {
				t.Errorf("%q: an unknown key is accepted", file)
			}
			continue
		}
		if err != nil || o.peers != want {
			t.Errorf("%q: peers %q, %v; want %q", file, o.peers, err, want)
		}
	}
}

func TestBadSettings(t *testing.T) {
	for file, want := range map[string]string{
		"nmae: n1":                `kvd.yaml:1: unknown key "nmae"`,
		"name: n1\n\ndata_dir: x": `kvd.yaml:3: unknown key "data_dir"`,
		"config: other.yaml":      `unknown key "config"`,
		"help: true":              `unknown key "help"`,
		"endpoints: a:1":          `unknown key "endpoints"`,
		"name: a\nname: b":        `"name" appears twice`,
		"name:":                   "name: has no value",
		"heartbeat-timeout: soon": `"soon" is not a value of heartbeat-timeout`,
		"pprof: maybe":            `"maybe" is not a value of pprof`,
		"peers: {n1: {host: a}}":  "nested too deep",
		"- name":                  "want lines of the form",
		"name: [":                 "kvd.yaml:",
		"name: a\n---\nname: b":   "more than one YAML document",
		"just text":               "want lines of the form",
	} {
		_, err := resolve(t, nil, nil, file)
		var usage *usageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", file, err, want)
		}
	}
	if _, err := resolve(t, nil, map[string]string{"KVD_ELECTION_TIMEOUT": "7"}, ""); err == nil || !strings.Contains(err.Error(), "KVD_ELECTION_TIMEOUT") {
		t.Errorf("a bad variable: %v", err)
	}
	if _, err := resolve(t, []string{"--config", "/nonexistent.yaml"}, nil, ""); err == nil || !strings.Contains(err.Error(), "/nonexistent.yaml") {
		t.Errorf("a file that is not there: %v", err)
	}
}
