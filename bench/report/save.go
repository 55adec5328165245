package report

import (
	"bytes"
	_ "embed" // of the templates
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"os"
	"path/filepath"
	"strings"
	text "text/template"
)

//go:embed report.md.tmpl
var markdownSource string

//go:embed report.html.tmpl
var pageSource string

var markdownTemplate = text.Must(text.New("report.md").Funcs(text.FuncMap{"cell": cell, "join": func(s []string) string { return cell(strings.Join(s, " ")) }}).Parse(markdownSource))

var pageTemplate = template.Must(template.New("report.html").Funcs(template.FuncMap{
	"pc":      func(percent float64) string { return fmt.Sprintf("%.2f%%", percent) },
	"up":      func(percent float64) float64 { return 100 - percent },
	"rows":    func(n int) int { return markHeight * (n + 1) },
	"markTop": func(row int) int { return -markHeight * (row + 1) },
	"columns": func(clusters []*Cluster) int { return len(clusters) + 1 },
}).Parse(pageSource))

// markHeight is that of a row of numbers above a plot, in pixels.
const markHeight = 20

// cell makes text fit in a line of Markdown, whatever is in it.
func cell(s string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "`", "'", "[", `\[`).Replace(oneLine(s))
}

// Markdown writes the report as text.
func (r *Report) Markdown(w io.Writer) error { return markdownTemplate.Execute(w, r) }

// Page writes the report as one HTML file, which needs nothing else.
func (r *Report) Page(w io.Writer) error { return pageTemplate.Execute(w, r) }

// JSON writes all figures.
func (r *Report) JSON(w io.Writer) error { return json.NewEncoder(w).Encode(r) }

// Save writes report.md, report.html and report.json into dir, and returns their paths.
func (r *Report) Save(dir string) (files []string, err error) {
	for _, f := range []struct {
		name  string
		write func(io.Writer) error
	}{{"report.md", r.Markdown}, {"report.html", r.Page}, {"report.json", r.JSON}} {
		var b bytes.Buffer
		if err := f.write(&b); err != nil {
			return files, err
		}
		path := filepath.Join(dir, f.name)
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			return files, err
		}
		files = append(files, path)
	}
	return files, nil
}
