package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"sync"
)

// Addresses are where a node can be reached; an empty one is unknown.
type Addresses struct {
	Peer   string `json:"peer"`
	Client string `json:"client"`
	HTTP   string `json:"http"`
}

func (a Addresses) validate() error {
	for _, addr := range []string{a.Peer, a.Client, a.HTTP} {
		if len(addr) > MaxAddressBytes {
			return fmt.Errorf("%w: an address longer than %d bytes", ErrInvalid, MaxAddressBytes)
		}
	}
	return nil
}

// Book knows the nodes' addresses: what a node has announced since this process started, else --peers, else what
// was announced to an earlier process (addresses.json, a hint that may be lost or wrong). Safe for concurrent use.
type Book struct {
	files  files
	logger *slog.Logger
	flags  map[string]string

	mu        sync.Mutex
	known     map[string]Addresses // persisted
	announced map[string]bool      // in this process
}

// Book opens the directory's address book. It never fails: a damaged book is empty, and logged.
func (d *Dir) Book(logger *slog.Logger) *Book {
	b := &Book{files: d.files, logger: logger, flags: d.set.Peers, known: map[string]Addresses{}, announced: map[string]bool{}}
	known := map[string]Addresses{}
	err := b.files.read(addressesFile, &known)
	if err == nil {
		err = validateAddresses(known)
	}
	switch {
	case err == nil && known != nil:
		b.known = known
	case !errors.Is(err, fs.ErrNotExist):
		logger.Warn("ignoring the stored addresses", "file", filepath.Join(d.path, addressesFile), "error", err)
	}
	return b
}

func validateAddresses(known map[string]Addresses) error {
	if len(known) > MaxMembers {
		return fmt.Errorf("%w: addresses of %d nodes", ErrInvalid, len(known))
	}
	for name, a := range known {
		if err := errors.Join(checkName(name), a.validate()); err != nil {
			return err
		}
	}
	return nil
}

// ErrBookFull: the book has the addresses of MaxMembers other nodes. Some may not be members any more (Retain).
var ErrBookFull = fmt.Errorf("%w: addresses of more than %d nodes", ErrInvalid, MaxMembers)

// Retain forgets the nodes of other names than these.
func (b *Book) Retain(is func(name string) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.known, func(name string, _ Addresses) bool { return !is(name) })
	maps.DeleteFunc(b.announced, func(name string, _ bool) bool { return !is(name) })
}

// Announce notes what a node says of itself, and tries to keep it for the next start. An address that the node
// leaves empty stays as it was. Errors: ErrBookFull, or ErrInvalid for a malformed announcement, which is ignored.
func (b *Book) Announce(name string, a Addresses) error {
	if err := errors.Join(checkName(name), a.validate()); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old, known := b.known[name]
	if !known && len(b.known) >= MaxMembers {
		return ErrBookFull
	}
	b.announced[name] = b.announced[name] || a.Peer != ""
	for _, pair := range [][2]*string{{&a.Peer, &old.Peer}, {&a.Client, &old.Client}, {&a.HTTP, &old.HTTP}} {
		if *pair[0] == "" {
			*pair[0] = *pair[1]
		}
	}
	if known && a == old {
		return nil
	}
	b.known[name] = a
	if err := b.files.write(addressesFile, b.known); err != nil {
		b.logger.Warn("cannot store the nodes' addresses", "error", err)
	}
	return nil
}

// Lookup returns what is known of a node's addresses. The peer address is the one to dial now.
func (b *Book) Lookup(name string) Addresses {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.known[name]
	if flag := b.flags[name]; flag != "" && !b.announced[name] {
		a.Peer = flag
	}
	return a
}

// Resolve returns the peer address to dial for a node, if one is known.
func (b *Book) Resolve(name string) (addr string, ok bool) {
	a := b.Lookup(name)
	return a.Peer, a.Peer != ""
}

// All returns a copy of the book, --peers included.
func (b *Book) All() map[string]Addresses {
	b.mu.Lock()
	names := maps.Clone(b.flags)
	if names == nil {
		names = map[string]string{}
	}
	for name := range b.known {
		names[name] = ""
	}
	b.mu.Unlock()
	all := make(map[string]Addresses, len(names))
	for name := range names {
		all[name] = b.Lookup(name)
	}
	return all
}
