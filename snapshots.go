package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
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
	metaName      = "meta.json" // in a snapshot's directory. This is the name in Raft's file store
)

// snapshotStore is the raft.SnapshotStore of this node, over one on the disk or in memory. It stores no snapshot that
// is older than the newest, and tells the log of each new one. Like diskStore it stops the process when a snapshot
// cannot be written, or reads otherwise than it was written: Raft would log that and go on without the snapshot.
type snapshotStore struct {
	store    raft.SnapshotStore // Raft's file store, or memorySnapshots
	dir      string             // of the file store; "" in memory
	stable   raft.StableStore   // has what must not change in the newest snapshot: see checkMeta
	watchdog *watchdog          // nil in memory
	log      *logStore

	storing sync.Mutex   // held while a snapshot is compared with the newest and completed
	begun   atomic.Int64 // when this node began to write the newest snapshot, in Unix milliseconds; 0 for none
}

// errNewerSnapshot is why a snapshot is not stored: while this node wrote it, the leader sent a newer one. Raft would
// use the older one from then on, and refuse all entries that follow the newer.
var errNewerSnapshot = errors.New("a newer snapshot has come meanwhile")

// newSnapshotStore returns a store of the snapshots in store. It makes the log agree with the newest of them.
func newSnapshotStore(store raft.SnapshotStore, dir string, stable raft.StableStore, w *watchdog, log *logStore,
) (*snapshotStore, error) {
	s := &snapshotStore{store: store, dir: dir, stable: stable, watchdog: w, log: log}
	newest, err := s.newest()
	if err == nil && newest.Index > 0 {
		err = s.setNewest(newest.ID, newest.Index, newest.Term, newest.Size)
	}
	return s, err
}

// setNewest records the newest snapshot. Its size is 0 if nothing has been written yet (see lateSink). Its id ends in
// the time, in Raft's file store and in memorySnapshots.
func (s *snapshotStore) setNewest(id string, index, term uint64, size int64) error {
	if size > 0 {
		s.log.stateSize.Store(size)
	}
	begun, _ := strconv.ParseInt(id[strings.LastIndexByte(id, '-')+1:], 10, 64)
	s.begun.Store(begun)
	return errors.Join(s.recordMeta(), s.log.setSnapshot(index, term))
}

// keySnapshotMeta is where the stable store has the id of the newest snapshot, and a checksum of its description.
// Raft's file store reads that from a file of its own whenever it sends or restores a snapshot, and has no checksum for
// it: with a flipped bit in the index a follower would lack entries, and with one in the members a node could count
// itself for a majority.
var keySnapshotMeta = []byte("SnapshotMeta")

// describe returns what the stable store has of a snapshot.
func describe(meta *raft.SnapshotMeta) []byte {
	b, _ := json.Marshal(meta) // it holds what came from JSON
	return binary.BigEndian.AppendUint32([]byte(meta.ID), checksum(keySnapshotMeta, b))
}

// recordMeta records how the newest snapshot is described.
func (s *snapshotStore) recordMeta() error {
	if s.dir == "" {
		return nil
	}
	list, err := s.store.List()
	if err != nil || len(list) == 0 {
		return err
	}
	now := describe(list[0])
	if before, err := s.stable.Get(keySnapshotMeta); err == nil && bytes.Equal(before, now) {
		return nil
	}
	return s.stable.Set(keySnapshotMeta, now)
}

// checkMeta says whether the snapshot that was recorded when it was the newest is in the list, as it was. Raft's file
// store passes over one whose description it cannot read.
func (s *snapshotStore) checkMeta(recorded []byte, list []*raft.SnapshotMeta) error {
	if recorded == nil {
		return nil
	}
	id := string(recorded[:len(recorded)-checksumSize])
	i := slices.IndexFunc(list, func(meta *raft.SnapshotMeta) bool { return meta.ID == id })
	if i >= 0 && bytes.Equal(describe(list[i]), recorded) || i < 0 && s.isGone(id) { // newer ones have replaced it
		return nil
	}
	return damaged(filepath.Join(s.dir, id), errors.New(metaName+" is missing, or not what was written"))
}

// recordedMeta returns what recordMeta has recorded last; nil for nothing.
func (s *snapshotStore) recordedMeta() ([]byte, error) {
	if s.dir == "" {
		return nil, nil
	}
	recorded, err := s.stable.Get(keySnapshotMeta)
	if isNotFound(err) {
		return nil, nil
	}
	return recorded, err
}

// do makes a call to the store, and stops the process if that fails. It has no time limit, since the call may read or
// write a large state. The op names it in messages.
func (s *snapshotStore) do(op string, call func() error) error {
	err := s.watchdog.watch(op, noLimit, call)
	if err != nil && !errors.Is(err, errClosed) {
		err = fmt.Errorf("storage: %s: %w", op, err)
		s.log.node.fail(err)
	}
	return err
}

// Create begins a snapshot. All but the newest one go before it, so that there are never three on the disk.
func (s *snapshotStore) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, t raft.Transport,
) (raft.SnapshotSink, error) {
	sink := &snapshotSink{store: s, index: index, term: term, written: s.log.written.Load()}
	return sink, s.do("begin a snapshot", func() error {
		list, err := s.store.List()
		for _, old := range list[min(1, len(list)):] { // there is only one in memory
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.dir, old.ID)))
		}
		if err == nil {
			sink.SnapshotSink, err = s.store.Create(version, index, term, configuration, configurationIndex, t)
		}
		return err
	})
}

func (s *snapshotStore) List() (list []*raft.SnapshotMeta, err error) {
	err = s.do("list snapshots", func() (err error) {
		recorded, err := s.recordedMeta() // before the list: a newer one may be completed meanwhile
		if err == nil {
			list, err = s.store.List()
		}
		return cmp.Or(err, s.checkMeta(recorded, list))
	})
	return list, err
}

// newest returns the newest snapshot; its index is 0 if there is none.
func (s *snapshotStore) newest() (raft.SnapshotMeta, error) {
	list, err := s.List()
	if err != nil || len(list) == 0 {
		return raft.SnapshotMeta{}, err
	}
	return *list[0], nil
}

// Open returns a snapshot, which the caller closes. Raft's file store reads all of it first, to compare its checksum. A
// snapshot that does not match is damage and stops the process: Raft would restore the one before.
func (s *snapshotStore) Open(id string) (meta *raft.SnapshotMeta, state io.ReadCloser, err error) {
	var gone error
	err = s.do("open a snapshot", func() (err error) {
		meta, state, err = s.store.Open(id)
		if err != nil && s.isGone(id) {
			gone = err
			return nil
		}
		if err != nil {
			err = damaged(filepath.Join(s.dir, id), err)
		}
		return err
	})
	if err := errors.Join(err, gone); err != nil {
		return nil, nil, err
	}
	s.log.stateSize.Store(meta.Size)
	return meta, &snapshotState{state, s}, nil
}

// isGone says whether newer snapshots have replaced one, which is no damage. In memory nothing else can happen to it.
func (s *snapshotStore) isGone(id string) bool {
	_, err := os.Stat(filepath.Join(s.dir, id))
	return s.dir == "" || errors.Is(err, fs.ErrNotExist)
}

// snapshotState is the state in a snapshot. An error while it is read stops the process.
type snapshotState struct {
	io.ReadCloser
	store *snapshotStore
}

func (s *snapshotState) Read(p []byte) (n int, err error) {
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

// snapshotSink is a snapshot that this node or, through Raft, the leader writes. Its Close makes it the newest.
type snapshotSink struct {
	raft.SnapshotSink
	store *snapshotStore
	index uint64 // of the last entry that it covers
	term  uint64 // of that entry
	size  int64  // bytes that have been written

	written int64 // bytes of the log when it was begun
	late    bool  // they are written later, when somebody reads them
	closed  bool
}

func (s *snapshotSink) Write(p []byte) (n int, err error) {
	err = s.store.do("write a snapshot", func() (err error) { n, err = s.SnapshotSink.Write(p); return err })
	s.size += int64(n)
	return n, err
}

func (s *snapshotSink) writeLater(write func(io.Writer) error) bool {
	sink, ok := s.SnapshotSink.(lateSink)
	s.late = ok && sink.writeLater(write)
	return s.late
}

// Close completes the snapshot, unless there is a newer one. Example: this node is writing its own snapshot up to
// entry 40 while it receives and completes the leader's, up to 90. Its own must not become the newest after that.
func (s *snapshotSink) Close() error {
	if s.closed { // Raft closes it again after Persist
		return nil
	}
	s.closed = true
	s.store.storing.Lock()
	defer s.store.storing.Unlock()
	if s.index < s.store.log.snapshotIndex.Load() {
		return errors.Join(errNewerSnapshot, s.Cancel())
	}
	if err := s.store.do("complete a snapshot", s.SnapshotSink.Close); err != nil {
		return err
	}
	s.store.log.received.Store(s.store.dir == "" && !s.late)
	s.store.log.covered.Store(s.written)
	return s.store.setNewest(s.ID(), s.index, s.term, s.size)
}

func (s *snapshotSink) Cancel() error {
	s.closed = true
	return s.store.do("remove a snapshot", s.SnapshotSink.Cancel)
}

// openSnapshotFiles opens the snapshots in a directory of the state directory, and removes those that a crash has left
// half written. It fails if Raft's file store does not list the newest one, since that would pass over it for the one
// before, after which the log may lack entries. An older one that is damaged does not matter.
func openSnapshotFiles(stateDir string, log hclog.Logger) (*raft.FileSnapshotStore, error) {
	store, err := raft.NewFileSnapshotStoreWithLogger(stateDir, snapshotsKept, log)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(stateDir, snapshotsDir)
	// A directory whose name ends in tmpSuffix is not complete.
	half, err := filepath.Glob(filepath.Join(dir, "*"+tmpSuffix))
	for _, path := range half {
		err = errors.Join(err, os.RemoveAll(path))
	}
	newest, err2 := newestSnapshot(dir)
	list, err3 := store.List()
	if err := errors.Join(err, err2, err3); err != nil || newest == "" {
		return store, err
	}
	if len(list) > 0 && list[0].ID == newest {
		// The name must agree with what the file says: meta.json has no checksum.
		if strings.HasPrefix(newest, fmt.Sprintf("%d-%d-", list[0].Term, list[0].Index)) {
			return store, nil
		}
	}
	return nil, damaged(filepath.Join(dir, newest), errors.New(metaName+" is missing, or not what was written"))
}

// newestSnapshot returns the name of the newest snapshot's directory, "" if there is none. Raft's file store names a
// snapshot by term, index and time, and orders them by these.
func newestSnapshot(dir string) (name string, err error) {
	entries, err := os.ReadDir(dir)
	var newest [3]uint64
	for _, entry := range entries {
		var numbers [3]uint64
		n, _ := fmt.Sscanf(entry.Name(), "%d-%d-%d", &numbers[0], &numbers[1], &numbers[2])
		if n == len(numbers) && slices.Compare(numbers[:], newest[:]) > 0 {
			newest, name = numbers, entry.Name()
		}
	}
	return name, err
}

// memorySnapshots keeps the newest complete snapshot in memory. One of this node's own is kept as the func that writes
// it, and shares with the state what has not changed since; one that the leader sent is kept as bytes. (Raft's own
// in-memory store lists a snapshot before its bytes are there.)
type memorySnapshots struct {
	mu     sync.Mutex      // guards newest
	newest *memorySnapshot // nil before the first
}

type memorySnapshot struct {
	store  *memorySnapshots
	meta   raft.SnapshotMeta
	write  func(io.Writer) error // writes the snapshot
	chunks [][]byte              // of one that the leader sent
}

func (m *memorySnapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport,
) (raft.SnapshotSink, error) {
	s := &memorySnapshot{store: m, meta: raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixMilli()),
		Index: index, Term: term, Configuration: configuration, ConfigurationIndex: configurationIndex,
	}}
	s.write = s.writeChunks
	return s, nil
}

// List returns the newest snapshot. The size of one of this node's own is 0: nothing has been written yet.
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
	size, err := io.Copy(io.Discard, s.reader()) // Raft sends the size before the snapshot
	if err != nil {
		return nil, nil, err
	}
	meta := s.meta
	meta.Size = size
	return &meta, s.reader(), nil
}

// reader returns the snapshot's bytes. A goroutine writes them until all are read, or the reader is closed.
func (s *memorySnapshot) reader() io.ReadCloser {
	r, w := io.Pipe()
	go func() { w.CloseWithError(s.write(w)) }()
	return r
}

// writeChunks writes a snapshot that the leader sent.
func (s *memorySnapshot) writeChunks(w io.Writer) error {
	for _, p := range s.chunks {
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// writeLater keeps the func: while it is kept, the snapshot shares memory with the state instead of being a second
// copy.
func (s *memorySnapshot) writeLater(write func(io.Writer) error) bool {
	s.write = write
	return true
}

func (s *memorySnapshot) Write(p []byte) (int, error) {
	s.chunks = append(s.chunks, bytes.Clone(p))
	s.meta.Size += int64(len(p))
	return len(p), nil
}

func (s *memorySnapshot) ID() string    { return s.meta.ID }
func (s *memorySnapshot) Cancel() error { return nil }

// Close makes it the newest snapshot.
func (s *memorySnapshot) Close() error {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.store.newest = s
	return nil
}
