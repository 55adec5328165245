package vfs

import "errors"

// Kind is a kind of operation.
type Kind string

// The kinds.
const (
	OpMkdir       Kind = "mkdir"
	OpOpen        Kind = "open"
	OpList        Kind = "list"
	OpRename      Kind = "rename"
	OpRemove      Kind = "remove"
	OpSyncDir     Kind = "syncdir"
	OpLock        Kind = "lock"
	OpFree        Kind = "free"
	OpRead        Kind = "read"
	OpWrite       Kind = "write"
	OpSync        Kind = "sync"
	OpSize        Kind = "size"
	OpTruncate    Kind = "truncate"
	OpPreallocate Kind = "preallocate"
)

// Changes says whether an operation of this kind may change what a crash leaves.
func (k Kind) Changes() bool {
	switch k {
	case OpList, OpFree, OpRead, OpSize:
		return false
	}
	return true
}

// Op is an operation that is about to begin.
type Op struct {
	Kind   Kind
	Name   string // of the file, as it is called now, or directory; the new one of a rename
	From   string // the old name of a rename
	Offset int64  // of a read or write
	Bytes  int64  // of a read or write; the size of a truncate or preallocate
}

// Fault is an error for Memory.Inject that says what is done nevertheless. A Fault whose Err is nil is a lie:
// the operation, if it is one that changes something and returns only an error, reports success.
type Fault struct {
	Err   error // what the operation returns
	Bytes int   // of a write: so many bytes of it are written
	Flip  int64 // of a write: after it, this bit of the file has changed; 0 = none
}

func (f *Fault) Error() string {
	if f.Err == nil {
		return "success, in appearance"
	}
	return f.Err.Error()
}

func (f *Fault) Unwrap() error { return f.Err }

// succeed turns a lie into a success.
func succeed(err error) error {
	var fault *Fault
	if errors.As(err, &fault) {
		return fault.Err
	}
	return err
}
