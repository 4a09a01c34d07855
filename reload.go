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

const (
	reloadInterval = 5 * time.Second // between two looks at the files that may be renewed
	maxSecretFile  = 1 << 20         // bytes that a file of certificates, keys or tokens may hold
)

// readSecret returns what a file holds and who may read it. A file with nothing in it is an error, as is one to which
// everybody can add a token or an authority, and one that could have the reader wait, such as a named pipe.
func readSecret(path string) (content []byte, mode os.FileMode, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // or the call would wait for a pipe's other end
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	mode = info.Mode()
	switch {
	case !mode.IsRegular():
		return nil, 0, fmt.Errorf("%s is a directory, a pipe or a device, and no regular file", path)
	case mode&0o002 != 0:
		return nil, 0, fmt.Errorf("everybody can write %s (its mode is %#o; chmod o-w it)", path, mode.Perm())
	}
	content, err = io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	switch {
	case err != nil:
		return nil, 0, err
	case len(content) == 0:
		return nil, 0, fmt.Errorf("%s is empty", path)
	case len(content) > maxSecretFile:
		return nil, 0, fmt.Errorf("%s has more than %d bytes", path, maxSecretFile)
	}
	return content, mode, nil
}

// reloaded is what some files say. Whoever renews them, Kubernetes for one, sends no signal, so they are read again
// every few seconds. After a change for the worse, which is logged, what was read before stays.
type reloaded[T fmt.Stringer] struct {
	name    string // of what the files hold, for the log
	paths   []string
	parse   func(contents [][]byte) (T, error)
	log     hclog.Logger
	now     atomic.Pointer[T]
	seen    [sha256.Size]byte // of what the files held, or of why they could not be read; only reload uses it
	changed chan struct{}     // receives when now has changed
}

// newReloaded reads the files, which must be good this first time.
func newReloaded[T fmt.Stringer](name string, log hclog.Logger, parse func(contents [][]byte) (T, error),
	paths ...string,
) (*reloaded[T], error) {
	r := &reloaded[T]{name: name, paths: paths, parse: parse, log: log, changed: make(chan struct{}, 1)}
	value, err := r.read()
	if err != nil {
		return nil, err
	}
	r.now.Store(&value)
	log.Info(name+" read", "what", value.String())
	return r, nil
}

// get returns what the files say, or said when they were last good.
func (r *reloaded[T]) get() T { return *r.now.Load() }

// reload reads the files again, and does nothing if they have not changed, unless somebody has asked for it. It may wait
// for as long as the files let it, and is for one goroutine at a time. Where there are no files it does nothing.
func (r *reloaded[T]) reload(asked bool) {
	if r == nil {
		return
	}
	before := r.seen
	value, err := r.read()
	switch {
	case r.seen == before && !asked:
	case err != nil:
		r.log.Error(r.name+" cannot be used as they are now; what was read before stays in use", "error", err)
	default:
		r.now.Store(&value)
		r.log.Info(r.name+" read again", "what", value.String())
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
}

func (r *reloaded[T]) read() (value T, err error) {
	contents := make([][]byte, len(r.paths))
	for i, path := range r.paths {
		if contents[i], _, err = readSecret(path); err != nil {
			r.seen = sha256.Sum256([]byte(err.Error()))
			return value, err
		}
	}
	r.seen = sha256.Sum256(bytes.Join(contents, []byte{0}))
	return r.parse(contents)
}
