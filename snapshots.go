package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
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
	stateName     = "state.bin"
	sealName      = "seal" // ours, beside them
)

// checkedSnapshots is a raft.SnapshotStore that publishes no snapshot but one whose checksums are right to its end, be it
// this node's own or one that the leader has sent; raft would publish it first and read it after.
type checkedSnapshots struct {
	raft.SnapshotStore
	log *entries

	publishing sync.Mutex // held while a snapshot is published: one after the other

	size  atomic.Int64 // of the newest snapshot, in bytes
	begun atomic.Int64 // when this node began to write it, in Unix milliseconds; 0 for none
}

// errOvertaken is why a snapshot is not published: the leader has sent a newer one while this node took its own. Raft would
// go by the older one from then on, and refuse all entries that follow the newer.
var errOvertaken = errors.New("a newer snapshot has come meanwhile")

func newCheckedSnapshots(store raft.SnapshotStore, log *entries) (*checkedSnapshots, error) {
	c := &checkedSnapshots{SnapshotStore: store, log: log}
	list, err := store.List()
	if err == nil && len(list) > 0 {
		err = c.note(list[0].Index, list[0].Term, list[0].ID, list[0].Size)
	}
	return c, err
}

// note takes note of the newest snapshot. Raft's file store ends a snapshot's id with the time, and so does ours in memory.
func (c *checkedSnapshots) note(index, term uint64, id string, size int64) error {
	c.size.Store(size)
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
	r, w := io.Pipe()
	checked := &checkedSink{SnapshotSink: sink, store: c, index: index, term: term, w: w, verdict: make(chan error, 1)}
	go func() { // ended by Close or Cancel, which close w
		err := checkFrames(r, index)
		_ = r.CloseWithError(err) // ends the Write that waits for more to be read
		checked.verdict <- err
	}()
	return checked, nil
}

type checkedSink struct {
	raft.SnapshotSink
	store   *checkedSnapshots
	index   uint64 // of the last entry that it covers
	term    uint64 // likewise
	size    int64  // in bytes, of what has been written
	w       *io.PipeWriter
	verdict chan error
	closed  bool
}

func (s *checkedSink) Write(p []byte) (int, error) {
	if _, err := s.w.Write(p); err != nil {
		return 0, err
	}
	n, err := s.SnapshotSink.Write(p)
	s.size += int64(n)
	return n, err
}

func (s *checkedSink) Close() error {
	if s.closed { // raft closes what Persist has closed
		return nil
	}
	s.closed = true
	_ = s.w.Close()
	err := <-s.verdict
	s.store.publishing.Lock()
	defer s.store.publishing.Unlock()
	if err == nil && s.index < s.store.log.newest() {
		err = errOvertaken
	}
	if err != nil {
		return errors.Join(err, s.SnapshotSink.Cancel())
	}
	if err = s.SnapshotSink.Close(); err != nil {
		return err
	}
	return s.store.note(s.index, s.term, s.ID(), s.size)
}

func (s *checkedSink) Cancel() error {
	s.closed = true
	_ = s.w.CloseWithError(io.ErrUnexpectedEOF)
	return s.SnapshotSink.Cancel()
}

// checkFrames reads a snapshot of the log up to index and says whether all its checksums are right.
func checkFrames(r io.Reader, index uint64) error {
	frames := &frameReader{r: bufio.NewReader(r)}
	applied, err := frames.header()
	switch {
	case err != nil:
		return err
	case applied > index:
		return fmt.Errorf("the snapshot of entry %d says that it is of %d", index, applied)
	}
	if _, err := io.Copy(io.Discard, frames); err != nil {
		return err
	}
	return frames.end()
}

// fileSnapshots keeps snapshots in STATE_DIR. It is fail-stop like guard: a snapshot that cannot be written, or that
// reads otherwise than it was written, goes to fail. Raft would say so in its log and go on without it.
//
// Raft has a checksum over a snapshot's state but none over what describes it, so a seal lies beside each.
type fileSnapshots struct {
	raft.SnapshotStore
	dir  string
	dog  *watchdog
	fail func(error)
}

// openSnapshots opens the snapshots in a state directory and checks what describes them.
func openSnapshots(stateDir string, log hclog.Logger, dog *watchdog, fail func(error)) (*fileSnapshots, error) {
	store, err := raft.NewFileSnapshotStoreWithLogger(stateDir, snapshotsKept, log)
	if err != nil {
		return nil, err
	}
	f := &fileSnapshots{store, filepath.Join(stateDir, snapshotsDir), dog, fail}
	kept, rest, err := f.directories()
	if err != nil {
		return nil, err
	}
	for _, id := range kept {
		if err := f.check(id); err != nil {
			return nil, damaged(filepath.Join(f.dir, id), err)
		}
	}
	for _, name := range rest {
		if err := os.RemoveAll(filepath.Join(f.dir, name)); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// directories returns the names of the newest snapshots, newest first, and of what a crash may have left half written or,
// of older ones, half removed.
func (f *fileSnapshots) directories() (kept, rest []string, err error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, nil, err
	}
	type id struct{ term, index, at uint64 } // as raft's file store names a snapshot
	var ids []id
	for _, entry := range entries {
		var i id
		if n, _ := fmt.Sscanf(entry.Name(), "%d-%d-%d", &i.term, &i.index, &i.at); strings.HasSuffix(entry.Name(), tmpSuffix) {
			rest = append(rest, entry.Name())
		} else if n == 3 {
			ids = append(ids, i)
		}
	}
	slices.SortFunc(ids, func(a, b id) int {
		return cmp.Or(cmp.Compare(b.term, a.term), cmp.Compare(b.index, a.index), cmp.Compare(b.at, a.at))
	})
	for _, i := range ids {
		name := fmt.Sprintf("%d-%d-%d", i.term, i.index, i.at)
		if len(kept) < snapshotsKept {
			kept = append(kept, name)
		} else {
			rest = append(rest, name)
		}
	}
	return kept, rest, nil
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

// sealOf is the CRC-32C over what describes a snapshot and raft's store has no checksum for.
func sealOf(id string, index, term, configurationIndex uint64, configuration raft.Configuration) []byte {
	b := []byte(id)
	for _, n := range []uint64{index, term, configurationIndex} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	b = append(b, raft.EncodeConfiguration(configuration)...)
	return fmt.Appendf(nil, "%08x\n", crc32.Checksum(b, castagnoli))
}

// check says whether what describes a snapshot is what was written.
func (f *fileSnapshots) check(id string) error {
	dir := filepath.Join(f.dir, id)
	description, err1 := os.ReadFile(filepath.Join(dir, metaName))
	seal, err2 := os.ReadFile(filepath.Join(dir, sealName))
	state, err3 := os.Stat(filepath.Join(dir, stateName))
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	var m struct {
		raft.SnapshotMeta
		CRC []byte
	}
	if err := json.Unmarshal(description, &m); err != nil {
		return fmt.Errorf("%s: %w", metaName, err)
	}
	if m.Version != raft.SnapshotVersionMax || m.ID != id || m.Size != state.Size() ||
		!bytes.Equal(seal, sealOf(m.ID, m.Index, m.Term, m.ConfigurationIndex, m.Configuration)) {
		return fmt.Errorf("%s is not what was written", metaName)
	}
	return nil
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
		if err != nil {
			return err
		}
		path := filepath.Join(f.dir, sink.ID()+tmpSuffix, sealName)
		return writeSynced(path, sealOf(sink.ID(), index, term, configurationIndex, configuration))
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
	var gone error // the reason why there is no such snapshot any more
	err = f.do("open a snapshot", func() error {
		err := f.check(id)
		if err == nil {
			meta, state, err = f.SnapshotStore.Open(id)
		}
		if err == nil {
			return nil
		}
		if kept, _, _ := f.directories(); !slices.Contains(kept, id) { // newer ones have taken its place
			gone = err
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

// memorySnapshots keeps the newest complete snapshot in memory. Raft's own in-memory store publishes a snapshot before
// its bytes are there.
type memorySnapshots struct {
	mu     sync.Mutex      // guards newest
	newest *memorySnapshot // nil before the first
}

type memorySnapshot struct {
	store *memorySnapshots
	meta  raft.SnapshotMeta
	data  bytes.Buffer
}

func (m *memorySnapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport,
) (raft.SnapshotSink, error) {
	return &memorySnapshot{store: m, meta: raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixMilli()),
		Index: index, Term: term, Configuration: configuration, ConfigurationIndex: configurationIndex,
	}}, nil
}

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
	defer m.mu.Unlock()
	if m.newest == nil || m.newest.meta.ID != id {
		return nil, nil, fmt.Errorf("snapshot %q is gone", id)
	}
	meta := m.newest.meta
	return &meta, io.NopCloser(bytes.NewReader(m.newest.data.Bytes())), nil
}

func (s *memorySnapshot) Write(p []byte) (int, error) { return s.data.Write(p) }
func (s *memorySnapshot) ID() string                  { return s.meta.ID }
func (s *memorySnapshot) Cancel() error               { return nil }

// Close publishes the snapshot, unless there is a newer one.
func (s *memorySnapshot) Close() error {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.meta.Size = int64(s.data.Len())
	if s.store.newest == nil || s.store.newest.meta.Index <= s.meta.Index {
		s.store.newest = s
	}
	return nil
}
