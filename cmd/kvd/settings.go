package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"
	"gopkg.in/yaml.v3"
)

// envName is the environment variable of a flag: KVD_DATA_DIR of --data-dir.
func envName(flag string) string {
	return "KVD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// setFromEnv sets the flags that the command line left alone. An empty variable counts as unset.
func setFromEnv(flags *pflag.FlagSet, getenv func(string) string) error {
	var problems []error
	flags.VisitAll(func(f *pflag.Flag) {
		value := getenv(envName(f.Name))
		if f.Changed || value == "" || f.Name == "help" {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			problems = append(problems, usagef("%s: %q is not a value of --%s: %v", envName(f.Name), value, f.Name, cause(err)))
		}
	})
	return errors.Join(problems...)
}

// setFromFile sets the flags that neither the command line nor the environment has set. The file is a YAML
// mapping from flag names to values; peers may be a mapping, too. An unknown key is an error.
func setFromFile(flags *pflag.FlagSet, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return usagef("--config: %v", err)
	}
	var document yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil // empty
	} else if err != nil {
		return usagef("--config %s: %v", path, err)
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return usagef("--config %s: more than one YAML document", path)
	}
	mapping := document.Content[0]
	if mapping.Kind != yaml.MappingNode {
		return usagef("--config %s:%d: want lines of the form `name: value`", path, mapping.Line)
	}
	fromFile := make(map[string]bool)
	for i := 0; i < len(mapping.Content); i += 2 {
		key, node := mapping.Content[i], mapping.Content[i+1]
		at := fmt.Sprintf("--config %s:%d", path, key.Line)
		f := flags.Lookup(key.Value)
		switch {
		case f == nil, f.Name == "config", f.Name == "help":
			return usagef("%s: unknown key %q: the keys are the flags of kvd start", at, key.Value)
		case fromFile[f.Name]:
			return usagef("%s: %q appears twice", at, key.Value)
		}
		value, err := scalar(node)
		if err != nil {
			return usagef("%s: %s: %v", at, key.Value, err)
		}
		if f.Changed {
			continue
		}
		fromFile[f.Name] = true
		if err := flags.Set(f.Name, value); err != nil {
			return usagef("%s: %q is not a value of %s: %v", at, value, key.Value, cause(err))
		}
	}
	return nil
}

// scalar writes a YAML value as a flag's value: lists joined by commas, mappings as name=value.
func scalar(node *yaml.Node) (string, error) {
	switch node.Kind {
	case yaml.AliasNode:
		return scalar(node.Alias)
	case yaml.ScalarNode:
		if node.Tag == "!!null" {
			return "", errors.New("has no value")
		}
		return node.Value, nil
	}
	var parts []string
	for i := 0; i < len(node.Content); i++ {
		part := ""
		if node.Kind == yaml.MappingNode {
			part = node.Content[i].Value + "="
			i++
		}
		if node.Content[i].Kind != yaml.ScalarNode {
			return "", errors.New("is nested too deep")
		}
		parts = append(parts, part+node.Content[i].Value)
	}
	return strings.Join(parts, ","), nil
}

// cause is what pflag's error says beyond the flag and its value.
func cause(err error) error {
	if invalid, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		return invalid.Unwrap()
	}
	return err
}
