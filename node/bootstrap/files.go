package bootstrap

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	formatVersion   = 1
	identityVersion = 2 // of an identity that says where the logs are
	maxFileBytes    = 16 << 20
	tempSuffix      = ".tmp"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// envelope is the shape of every file of this package.
type envelope struct {
	Format  string          `json:"format"` // "kvd identity"
	Version int             `json:"version"`
	CRC32C  string          `json:"crc32c"` // of Body without insignificant white space
	Body    json.RawMessage `json:"body"`
}

// files reads and atomically replaces the small files of one directory.
type files struct {
	dir    string
	noSync bool                        // tests only: the crash that matters there is of the process
	fault  func(op, name string) error // tests only: called before each step; an error stops there
}

func (f *files) step(op, name string) error {
	if f.fault != nil {
		return f.fault(op, name)
	}
	return nil
}

// write replaces the file. When it returns nil the new content is durable; on an error the old content or the new
// one is there after a crash, never a mixture.
func (f *files) write(name string, body any) error {
	data, err := encodeFile(name, body)
	if err != nil {
		return err
	}
	temp := filepath.Join(f.dir, name+tempSuffix)
	if err := f.writeTemp(temp, name, data); err != nil {
		return err
	}
	if err := f.step("rename", name); err != nil {
		return err
	}
	if err := os.Rename(temp, filepath.Join(f.dir, name)); err != nil {
		return err
	}
	return f.syncDir(name)
}

func (f *files) writeTemp(temp, name string, data []byte) error {
	if err := f.step("create", name); err != nil {
		return err
	}
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = f.step("write", name)
	if err == nil {
		_, err = file.Write(data)
	}
	if err == nil {
		err = f.step("sync", name)
	}
	if err == nil && !f.noSync {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// remove deletes the file durably; a missing file is fine.
func (f *files) remove(name string) error {
	if err := f.step("remove", name); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.syncDir(name)
}

func (f *files) syncDir(name string) error {
	if err := f.step("syncdir", name); err != nil || f.noSync {
		return err
	}
	return syncDir(f.dir)
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// read fills body from the file: fs.ErrNotExist, ErrCorrupt or ErrVersion where that fails.
func (f *files) read(name string, body any) error {
	file, err := os.Open(filepath.Join(f.dir, name))
	if err != nil {
		return err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err != nil {
		return err
	}
	if err := decodeFile(name, data, body); err != nil {
		return fmt.Errorf("data directory %s: %w", f.dir, err)
	}
	return nil
}

func encodeFile(name string, body any) ([]byte, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	version := formatVersion
	if id, ok := body.(identity); ok {
		version = id.version()
	}
	data, err := json.MarshalIndent(envelope{fileFormat(name), version, checksum(raw), raw}, "", "  ")
	if err == nil && len(data) >= maxFileBytes {
		err = fmt.Errorf("%s would grow beyond %d bytes", name, maxFileBytes)
	}
	return append(data, '\n'), err
}

func decodeFile(name string, data []byte, body any) error {
	if len(data) > maxFileBytes {
		return corrupt(name, fmt.Errorf("larger than %d bytes", maxFileBytes))
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return corrupt(name, err)
	}
	if e.Format != fileFormat(name) {
		return corrupt(name, fmt.Errorf("its format is %.40q, not %q", e.Format, fileFormat(name)))
	}
	newest := formatVersion
	if name == identityFile {
		newest = identityVersion
	}
	if e.Version < formatVersion || e.Version > newest {
		return fmt.Errorf("%w: %s has version %d, this kvd reads up to %d: start the kvd that wrote it", ErrVersion, name, e.Version, newest)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, e.Body); err != nil {
		return corrupt(name, err)
	}
	if got := checksum(compact.Bytes()); got != e.CRC32C {
		return corrupt(name, fmt.Errorf("its checksum is %s, not %.16q", got, e.CRC32C))
	}
	// The names of the fields may have changed case, which encoding/json takes for the same.
	if again, err := json.MarshalIndent(e, "", "  "); err != nil || !bytes.Equal(append(again, '\n'), data) {
		return corrupt(name, errors.New("it is not as it was written"))
	}
	strict := json.NewDecoder(&compact)
	strict.DisallowUnknownFields()
	if err := strict.Decode(body); err != nil {
		return corrupt(name, err)
	}
	return nil
}

func corrupt(name string, cause error) error {
	return fmt.Errorf("%w: %s is damaged (%w): delete the contents of the data directory so that the node rejoins its cluster with an empty one, or restore a backup if it was alone; an older copy of the directory loses writes", ErrCorrupt, name, cause)
}

func checksum(data []byte) string { return fmt.Sprintf("%08x", crc32.Checksum(data, castagnoli)) }

func fileFormat(name string) string {
	return "kvd " + name[:len(name)-len(filepath.Ext(name))]
}
