package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	snapshotsKept = 2
	metaName      = "meta.json" // in a snapshot's directory: raft's file store names it so
)

// checkedSnapshots is a raft.SnapshotStore that publishes no snapshot when there is a newer one, and has the log agree
// with each that is published. Whether a snapshot is whole is checked when it is read.
type checkedSnapshots struct {
	raft.SnapshotStore
	log *entries

	publishing sync.Mutex // held while a snapshot is published: one after the other

	begun atomic.Int64 // when this node began to write the newest, in Unix milliseconds; 0 for none
}

// keeper is a snapshot that can be kept as what was captured of the state, in place of the bytes that this writes.
type keeper interface {
	// keep returns false where it cannot.
	keep(write func(io.Writer) error) bool
}

// errOvertaken is why a snapshot is not published: the leader has sent a newer one while this node took its own. Raft
// would go by the older one from then on, and refuse all entries that follow the newer.
var errOvertaken = errors.New("a newer snapshot has come meanwhile")

func newCheckedSnapshots(store raft.SnapshotStore, log *entries) (*checkedSnapshots, error) {
	c := &checkedSnapshots{SnapshotStore: store, log: log}
	list, err := store.List()
	if err == nil && len(list) > 0 {
		err = c.note(list[0].Index, list[0].Term, list[0].ID, list[0].Size)
	}
	if err == nil {
		err = log.load()
	}
	return c, err
}

// note takes note of the newest snapshot, whose size is 0 where it is kept without being written. Raft's file store ends
// a snapshot's id with the time, and so does ours in memory.
func (c *checkedSnapshots) note(index, term uint64, id string, size int64) error {
	if size > 0 {
		c.log.state.Store(size)
	}
	begun, _ := strconv.ParseInt(id[strings.LastIndexByte(id, '-')+1:], 10, 64)
	c.begun.Store(begun)
	return c.log.cover(index, term)
}

func (c *checkedSnapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, t raft.Transport,
) (raft.SnapshotSink, error) {
	sink, err := c.SnapshotStore.Create(version, index, term, configuration, configurationIndex, t)
	if err != nil {
		return nil, err
	}
	return &checkedSink{SnapshotSink: sink, store: c, index: index, term: term}, nil
}

func (c *checkedSnapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, state, err := c.SnapshotStore.Open(id)
	if err == nil {
		c.log.state.Store(meta.Size)
	}
	return meta, state, err
}

type checkedSink struct {
	raft.SnapshotSink
	store  *checkedSnapshots
	index  uint64 // of the last entry that it covers
	term   uint64 // likewise
	size   int64  // in bytes, of what has been written
	closed bool
}

func (s *checkedSink) Write(p []byte) (int, error) {
	n, err := s.SnapshotSink.Write(p)
	s.size += int64(n)
	return n, err
}

func (s *checkedSink) keep(write func(io.Writer) error) bool {
	k, ok := s.SnapshotSink.(keeper)
	return ok && k.keep(write)
}

func (s *checkedSink) Close() error {
	if s.closed { // raft closes what Persist has closed
		return nil
	}
	s.closed = true
	s.store.publishing.Lock()
	defer s.store.publishing.Unlock()
	if s.index < s.store.log.newest() {
		return errors.Join(errOvertaken, s.SnapshotSink.Cancel())
	}
	if err := s.SnapshotSink.Close(); err != nil {
		return err
	}
	return s.store.note(s.index, s.term, s.ID(), s.size)
}

func (s *checkedSink) Cancel() error {
	s.closed = true
	return s.SnapshotSink.Cancel()
}

// fileSnapshots keeps snapshots in STATE_DIR. It is fail-stop like guard: a snapshot that cannot be written, or that
// reads otherwise than it was written, goes to fail. Raft would say so in its log and go on without it.
type fileSnapshots struct {
	raft.SnapshotStore
	dir  string
	dog  *watchdog
	fail func(error)
}

// openSnapshots opens the snapshots in a state directory, and removes what a crash has left half written. If the
// newest cannot be listed this is an error: Raft would go on with the one before, after which entries may be missing
// from the log. An older one that cannot be listed is not needed.
func openSnapshots(stateDir string, log hclog.Logger, dog *watchdog, fail func(error)) (*fileSnapshots, error) {
	store, err := raft.NewFileSnapshotStoreWithLogger(stateDir, snapshotsKept, log)
	if err != nil {
		return nil, err
	}
	f := &fileSnapshots{store, filepath.Join(stateDir, snapshotsDir), dog, fail}
	half, err := filepath.Glob(filepath.Join(f.dir, "*"+tmpSuffix))
	for _, path := range half {
		err = errors.Join(err, os.RemoveAll(path))
	}
	newest, err2 := f.newest()
	list, err3 := store.List()
	if err := errors.Join(err, err2, err3); err != nil {
		return nil, err
	}
	listed := func(m *raft.SnapshotMeta) bool {
		return m.ID == newest && strings.HasPrefix(newest, fmt.Sprintf("%d-%d-", m.Term, m.Index))
	}
	if newest != "" && (len(list) == 0 || !listed(list[0])) {
		return nil, damaged(filepath.Join(f.dir, newest), errors.New(metaName+" is missing, or not what was written"))
	}
	return f, nil
}

// newest returns the id of the newest snapshot by the directories that there are, "" if there is none.
func (f *fileSnapshots) newest() (id string, err error) {
	dirs, err := os.ReadDir(f.dir)
	var newest [3]uint64
	for _, dir := range dirs {
		var is [3]uint64 // term, index and time: so raft's file store names a snapshot, and orders them
		n, _ := fmt.Sscanf(dir.Name(), "%d-%d-%d", &is[0], &is[1], &is[2])
		if n == len(is) && slices.Compare(is[:], newest[:]) > 0 {
			newest, id = is, dir.Name()
		}
	}
	return id, err
}

// setAsideSnapshots renames what snapshots there are: without a database beside them nobody knows of which cluster they
// are, so the node counts as one that has lost its state. It returns the new name, "" when there was none.
func setAsideSnapshots(stateDir string) (string, error) {
	dir := filepath.Join(stateDir, snapshotsDir)
	if _, err := os.Stat(filepath.Join(stateDir, dbName)); !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if found, err := filepath.Glob(filepath.Join(dir, "*", metaName)); err != nil || len(found) == 0 {
		return "", err
	}
	aside := fmt.Sprintf("%s.without-raft.db.%d", dir, time.Now().UnixMilli())
	return aside, os.Rename(dir, aside)
}

// do makes a call to the disk. An error of it goes to fail.
func (f *fileSnapshots) do(op string, call func() error) error {
	err := f.dog.during(op, call)
	if err != nil {
		err = fmt.Errorf("storage: %s: %w", op, err)
		f.fail(err)
	}
	return err
}

func (f *fileSnapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, t raft.Transport,
) (sink raft.SnapshotSink, err error) {
	err = f.do("begin a snapshot", func() (err error) {
		sink, err = f.SnapshotStore.Create(version, index, term, configuration, configurationIndex, t)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &fileSink{sink, f}, nil
}

func (f *fileSnapshots) List() (list []*raft.SnapshotMeta, err error) {
	err = f.do("list snapshots", func() (err error) { list, err = f.SnapshotStore.List(); return err })
	return list, err
}

// Open reads the whole snapshot, to compare it with its checksum, before it returns it.
func (f *fileSnapshots) Open(id string) (meta *raft.SnapshotMeta, state io.ReadCloser, err error) {
	var gone error
	err = f.do("open a snapshot", func() (err error) {
		if meta, state, err = f.SnapshotStore.Open(id); err == nil {
			return nil
		}
		if _, missing := os.Stat(filepath.Join(f.dir, id)); errors.Is(missing, fs.ErrNotExist) {
			gone = err // newer ones have taken its place
			return nil
		}
		return damaged(filepath.Join(f.dir, id), err)
	})
	if err := errors.Join(err, gone); err != nil {
		return nil, nil, err
	}
	return meta, &fileState{state, f}, nil
}

// fileState is the state of a snapshot, being read.
type fileState struct {
	io.ReadCloser
	store *fileSnapshots
}

func (s *fileState) Read(p []byte) (n int, err error) {
	failed := s.store.do("read a snapshot", func() error {
		if n, err = s.ReadCloser.Read(p); errors.Is(err, io.EOF) {
			return nil
		}
		return err
	})
	if failed != nil {
		err = failed
	}
	return n, err
}

// fileSink is a snapshot, being written.
type fileSink struct {
	raft.SnapshotSink
	store *fileSnapshots
}

func (s *fileSink) Write(p []byte) (n int, err error) {
	err = s.store.do("write a snapshot", func() (err error) { n, err = s.SnapshotSink.Write(p); return err })
	return n, err
}

func (s *fileSink) Close() error  { return s.store.do("complete a snapshot", s.SnapshotSink.Close) }
func (s *fileSink) Cancel() error { return s.store.do("remove a snapshot", s.SnapshotSink.Cancel) }

// memorySnapshots keeps the newest complete snapshot in memory: what this node has captured of its state, which shares
// with the state what has not changed since, or the bytes that the leader has sent. Raft's own in-memory store publishes a
// snapshot before its bytes are there.
type memorySnapshots struct {
	mu     sync.Mutex      // guards newest
	newest *memorySnapshot // nil before the first
}

type memorySnapshot struct {
	store    *memorySnapshots
	meta     raft.SnapshotMeta
	captured func(io.Writer) error // writes it; nil where it was received
	received [][]byte
}

func (m *memorySnapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport,
) (raft.SnapshotSink, error) {
	return &memorySnapshot{store: m, meta: raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixMilli()),
		Index: index, Term: term, Configuration: configuration, ConfigurationIndex: configurationIndex,
	}}, nil
}

// List returns the newest snapshot. Its size is not known before it is opened, if this node has taken it itself.
func (m *memorySnapshots) List() ([]*raft.SnapshotMeta, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.newest == nil {
		return nil, nil
	}
	meta := m.newest.meta
	return []*raft.SnapshotMeta{&meta}, nil
}

func (m *memorySnapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	m.mu.Lock()
	s := m.newest
	m.mu.Unlock()
	if s == nil || s.meta.ID != id {
		return nil, nil, fmt.Errorf("snapshot %q is gone", id)
	}
	var size byteCount
	if err := s.writeTo(&size); err != nil {
		return nil, nil, err
	}
	meta := s.meta
	meta.Size = int64(size)
	r, w := io.Pipe()
	go func() { w.CloseWithError(s.writeTo(w)) }() // until all is read, or the reader closed
	return &meta, r, nil
}

// byteCount counts what is written to it.
type byteCount int64

func (n *byteCount) Write(p []byte) (int, error) {
	*n += byteCount(len(p))
	return len(p), nil
}

func (s *memorySnapshot) writeTo(w io.Writer) error {
	if s.captured != nil {
		return s.captured(w)
	}
	for _, p := range s.received {
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

func (s *memorySnapshot) keep(write func(io.Writer) error) bool {
	s.captured = write
	return true
}

func (s *memorySnapshot) Write(p []byte) (int, error) {
	s.received = append(s.received, bytes.Clone(p))
	s.meta.Size += int64(len(p))
	return len(p), nil
}

func (s *memorySnapshot) ID() string    { return s.meta.ID }
func (s *memorySnapshot) Cancel() error { return nil }

// Close publishes the snapshot, unless there is a newer one.
func (s *memorySnapshot) Close() error {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	if s.store.newest == nil || s.store.newest.meta.Index <= s.meta.Index {
		s.store.newest = s
	}
	return nil
}
