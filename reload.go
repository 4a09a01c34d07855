package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

const reloadInterval = 5 * time.Second // between two reads of the files that may be renewed

// maxFile is how many bytes a file may hold that configures this node.
const maxFile = 1 << 20

// readFile returns the content and the mode of a regular file: to read a named pipe could take for ever.
func readFile(path string) (content []byte, mode os.FileMode, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // or the call would wait for a pipe's other end
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is a directory, a pipe or a device, and no regular file", path)
	}
	content, err = io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(content) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return content, info.Mode(), err
}

// readSecret is readFile for a file of certificates, keys or tokens. It is an error if it is empty, or if everybody can
// write it, for they could add a token or an authority.
func readSecret(path string) (content []byte, mode os.FileMode, err error) {
	content, mode, err = readFile(path)
	switch {
	case err != nil:
		return nil, 0, err
	case mode&0o002 != 0:
		return nil, 0, fmt.Errorf("everybody can write %s (its mode is %#o; chmod o-w it)", path, mode.Perm())
	case len(content) == 0:
		return nil, 0, fmt.Errorf("%s is empty", path)
	}
	return content, mode, nil
}

// reloaded is a value that is parsed from files. The files are read again every few seconds, since those who renew
// them, such as Kubernetes, send no signal. When they cannot be used any more, that is logged and the value stays as
// it is.
type reloaded[T fmt.Stringer] struct {
	name    string // of the value, for the log
	paths   []string
	parse   func(contents [][]byte) (T, error)
	log     hclog.Logger
	value   atomic.Pointer[T]
	digest  [sha256.Size]byte // of the contents, or of the error, when the files were last read; only reload uses it
	failed  bool              // they could not be used then; likewise
	changed chan struct{}     // receives after a change of value
}

// newReloaded reads and parses the files. An error is that of the first file that cannot be used.
func newReloaded[T fmt.Stringer](name string, log hclog.Logger, parse func(contents [][]byte) (T, error),
	paths ...string,
) (*reloaded[T], error) {
	r := &reloaded[T]{name: name, paths: paths, parse: parse, log: log, changed: make(chan struct{}, 1)}
	value, err := r.read()
	if err != nil {
		return nil, err
	}
	r.value.Store(&value)
	log.Info(name+" read", "what", value.String())
	return r, nil
}

// get returns the value that was last parsed without an error. Any goroutine may call it.
func (r *reloaded[T]) get() T { return *r.value.Load() }

// reload reads the files again. If their contents are the same it does nothing more, unless somebody has asked for it,
// or they can be used now and could not before: a certificate may not have been valid yet. It takes as long as reading
// the files takes, and is for one goroutine at a time. On nil it does nothing.
func (r *reloaded[T]) reload(asked bool) {
	if r == nil {
		return
	}
	before := r.digest
	value, err := r.read()
	switch {
	case r.digest == before && !asked && (err != nil) == r.failed: // nothing is new
	case err != nil:
		r.failed = true
		r.log.Error(r.name+" cannot be used as they are now; what was read before stays in use", "error", err)
	default:
		r.failed = false
		r.value.Store(&value)
		r.log.Info(r.name+" read again", "what", value.String())
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
}

// read reads and parses the files, and sets digest.
func (r *reloaded[T]) read() (value T, err error) {
	contents := make([][]byte, len(r.paths))
	for i, path := range r.paths {
		if contents[i], _, err = readSecret(path); err != nil {
			r.digest = sha256.Sum256([]byte(err.Error()))
			return value, err
		}
	}
	r.digest = sha256.Sum256(bytes.Join(contents, []byte{0}))
	return r.parse(contents)
}
