package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
)

// maxSecretFile is the most that a file of certificates, keys or tokens may hold, in bytes.
const maxSecretFile = 1 << 20

// readSecret returns what a file holds and who may read it. A file with nothing in it is an error.
func readSecret(path string) (content []byte, mode os.FileMode, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
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
	return content, info.Mode(), nil
}

// reloaded is what some files say, read again when they have changed: whoever renews them, Kubernetes for one, sends no
// signal. After a change for the worse, which is logged, what was read before stays.
type reloaded[T fmt.Stringer] struct {
	name  string // of what the files hold, for the log
	paths []string
	read  func() (T, error)
	log   hclog.Logger

	now   atomic.Pointer[T]
	mu    sync.Mutex    // guards what follows; held while files are read
	seen  []os.FileInfo // of paths, before they were last read; nil for one that was not there
	taken func(T)       // if not nil, it is called with what has replaced something else
}

// newReloaded reads the files, which must be good this first time.
func newReloaded[T fmt.Stringer](name string, log hclog.Logger, read func() (T, error), paths ...string) (*reloaded[T], error) {
	r := &reloaded[T]{name: name, paths: paths, read: read, log: log}
	r.seen = r.look()
	value, err := read()
	if err != nil {
		return nil, err
	}
	r.now.Store(&value)
	log.Info(name+" read", "what", value.String())
	return r, nil
}

// get returns what the files say, or said when they were last good.
func (r *reloaded[T]) get() T {
	if r.mu.TryLock() { // who comes while another looks takes what there is
		if seen := r.look(); !slices.EqualFunc(r.seen, seen, sameFile) {
			r.refresh(seen)
		}
		r.mu.Unlock()
	}
	return *r.now.Load()
}

// onChange has f called with what replaces what there is now. It may be set while others call get.
func (r *reloaded[T]) onChange(f func(T)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.taken = f
}

// reload reads the files, changed or not. Where there are none it does nothing.
func (r *reloaded[T]) reload() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh(r.look())
}

// refresh is called with mu held.
func (r *reloaded[T]) refresh(seen []os.FileInfo) {
	r.seen = seen
	value, err := r.read()
	if err != nil {
		r.log.Error(r.name+" cannot be used as they are now; what was read before stays in use", "error", err)
		return
	}
	r.now.Store(&value)
	r.log.Info(r.name+" read again", "what", value.String())
	if r.taken != nil {
		r.taken(value)
	}
}

func (r *reloaded[T]) look() []os.FileInfo {
	infos := make([]os.FileInfo, len(r.paths))
	for i, path := range r.paths {
		infos[i], _ = os.Stat(path) // one that is not there is read, to say so
	}
	return infos
}

func sameFile(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}
