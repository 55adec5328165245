package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Values of --write-out.
const (
	formatSimple = "simple"
	formatJSON   = "json"
	formatTable  = "table"
)

var formats = []string{formatSimple, formatJSON, formatTable}

// printer writes answers. Simple output is etcdctl's where etcdctl has the command.
type printer struct {
	out       io.Writer
	format    string
	hex       bool
	valueOnly bool // of a key and its value
}

func (o *clientOptions) printer(cmd *cobra.Command) *printer {
	return &printer{out: cmd.OutOrStdout(), format: o.writeOut, hex: o.hex}
}

// noTable is a usage error if a table is asked for. Call it before the request.
func (p *printer) noTable(cmd *cobra.Command) error {
	if p.format == formatTable {
		return usagef("%s has no table: use --write-out simple or json", cmd.CommandPath())
	}
	return nil
}

func (p *printer) json(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(p.out, "%s\n", data)
	return err
}

func (p *printer) bytes(b []byte) string {
	if !p.hex {
		return string(b)
	}
	var s strings.Builder
	for _, c := range b {
		fmt.Fprintf(&s, `\x%02x`, c)
	}
	return s.String()
}

func (p *printer) pairs(kvs ...*mvccpb.KeyValue) {
	for _, kv := range kvs {
		if !p.valueOnly {
			fmt.Fprintln(p.out, p.bytes(kv.GetKey()))
		}
		fmt.Fprintln(p.out, p.bytes(kv.GetValue()))
	}
}

func (p *printer) put(r *pb.PutResponse) error {
	if p.format == formatJSON {
		return p.json(r)
	}
	fmt.Fprintln(p.out, "OK")
	if r.GetPrevKv() != nil {
		p.pairs(r.GetPrevKv())
	}
	return nil
}

// get prints a range; countOnly: just how many keys there are.
func (p *printer) get(r *pb.RangeResponse, countOnly bool) error {
	switch {
	case p.format == formatJSON:
		return p.json(r)
	case countOnly:
		fmt.Fprintln(p.out, r.GetCount())
	case p.format == formatTable:
		var rows [][]string
		for _, kv := range r.GetKvs() {
			rows = append(rows, []string{p.bytes(kv.GetKey()), p.bytes(kv.GetValue()), fmt.Sprint(kv.GetCreateRevision()),
				fmt.Sprint(kv.GetModRevision()), fmt.Sprint(kv.GetVersion()), fmt.Sprintf("%x", kv.GetLease())})
		}
		p.table([]string{"KEY", "VALUE", "CREATED", "MODIFIED", "VERSION", "LEASE"}, rows)
	default:
		p.pairs(r.GetKvs()...)
	}
	return nil
}

func (p *printer) del(r *pb.DeleteRangeResponse) error {
	if p.format == formatJSON {
		return p.json(r)
	}
	fmt.Fprintln(p.out, r.GetDeleted())
	p.pairs(r.GetPrevKvs()...)
	return nil
}

func (p *printer) txn(r *pb.TxnResponse) error {
	if p.format == formatJSON {
		return p.json(newTxnJSON(r))
	}
	if r.GetSucceeded() {
		fmt.Fprintln(p.out, "SUCCESS")
	} else {
		fmt.Fprintln(p.out, "FAILURE")
	}
	for _, op := range r.GetResponses() {
		fmt.Fprintln(p.out)
		var err error
		switch v := op.GetResponse().(type) {
		case *pb.ResponseOp_ResponsePut:
			err = p.put(v.ResponsePut)
		case *pb.ResponseOp_ResponseRange:
			err = p.get(v.ResponseRange, false)
		case *pb.ResponseOp_ResponseDeleteRange:
			err = p.del(v.ResponseDeleteRange)
		default:
			err = fmt.Errorf("the server answered with an operation of unknown type %T", v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// txnJSON is a TxnResponse as etcdctl writes it; the generated type cannot be read back from JSON.
type txnJSON struct {
	Header    *pb.ResponseHeader `json:"header,omitempty"`
	Succeeded bool               `json:"succeeded,omitempty"`
	Responses []opJSON           `json:"responses,omitempty"`
}

type opJSON struct {
	Response struct {
		Range       *pb.RangeResponse       `json:"response_range,omitempty"`
		Put         *pb.PutResponse         `json:"response_put,omitempty"`
		DeleteRange *pb.DeleteRangeResponse `json:"response_delete_range,omitempty"`
		Txn         *txnJSON                `json:"response_txn,omitempty"`
	} `json:"Response"`
}

func newTxnJSON(r *pb.TxnResponse) *txnJSON {
	if r == nil {
		return nil
	}
	t := &txnJSON{Header: r.GetHeader(), Succeeded: r.GetSucceeded()}
	for _, op := range r.GetResponses() {
		var o opJSON
		o.Response.Range = op.GetResponseRange()
		o.Response.Put = op.GetResponsePut()
		o.Response.DeleteRange = op.GetResponseDeleteRange()
		o.Response.Txn = newTxnJSON(op.GetResponseTxn())
		t.Responses = append(t.Responses, o)
	}
	return t
}

// columns writes rows, aligned by spaces.
func (p *printer) columns(rows [][]string) {
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
}

// table writes rows under a header in a frame.
func (p *printer) table(header []string, rows [][]string) {
	width := make([]int, len(header))
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	rule := func(left, middle, right string) {
		parts := make([]string, len(width))
		for i, w := range width {
			parts[i] = strings.Repeat("─", w+2)
		}
		fmt.Fprintln(p.out, left+strings.Join(parts, middle)+right)
	}
	line := func(row []string) {
		for i, cell := range row {
			fmt.Fprintf(p.out, "│ %-*s ", width[i], cell)
		}
		fmt.Fprintln(p.out, "│")
	}
	rule("┌", "┬", "┐")
	line(header)
	rule("├", "┼", "┤")
	for _, row := range rows {
		line(row)
	}
	rule("└", "┴", "┘")
}

// size writes a number of bytes for people: 20 kB, 2.1 GB.
func size(bytes int64) string {
	if bytes < 1000 {
		return fmt.Sprintf("%d B", bytes)
	}
	value, unit := float64(bytes), -1
	for value >= 999.5 && unit < len("kMGTPE")-1 {
		value /= 1000
		unit++
	}
	if value < 9.95 {
		return fmt.Sprintf("%.1f %cB", value, "kMGTPE"[unit])
	}
	return fmt.Sprintf("%.0f %cB", value, "kMGTPE"[unit])
}
