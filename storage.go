package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

const lockTimeout = 3 * time.Second // how long we wait for another process that holds the database

// storage is what a node stores: the log, its votes and terms, and snapshots. With KV_STORE=memory nothing of it
// outlives the process.
type storage struct {
	log       *logStore
	logs      raft.LogStore // log, as Raft uses it; a test may put something around it
	stable    raft.StableStore
	snapshots *snapshotStore

	// These are nil in memory.
	disk     *diskStore // below log and stable
	db       *raftboltdb.BoltStore
	watchdog *watchdog
}

// storageNode is what the storage asks of its node. The Store is one.
type storageNode interface {
	// fail stops the process with a reason. It does not return.
	fail(reason error)
	// lastApplied returns the index of the last log entry that the state machine has executed.
	lastApplied() uint64
	// commitsWithOthers says whether this node leads a cluster in which it cannot commit an entry alone.
	commitsWithOthers() bool
}

// openStorage opens the node's storage, and creates it where there is none. The caller closes it. Once it is open any
// failure of it goes to node.fail; nobody else sees it.
func openStorage(cfg *Config, log hclog.Logger, m *metrics, node storageNode) (*storage, error) {
	if cfg.KVStore == storeMemory {
		mem := raft.NewInmemStore()
		return newStorage(cfg, mem, mem, &memorySnapshots{}, nil, node)
	}
	if err := openStateDir(cfg.StateDir, os.Geteuid(), log); err != nil {
		return nil, err
	}
	w := newWatchdog(diskProbe(cfg.StateDir), watchTick, node.fail)
	var s *storage
	err := w.watch("open the storage", noLimit, func() (err error) {
		s, err = openFiles(cfg, log, m, w, node)
		return err
	})
	if err != nil {
		w.stop()
		return nil, fmt.Errorf("STATE_DIR %q: %w", cfg.StateDir, err)
	}
	return s, nil
}

// openFiles opens the database and the snapshots in the state directory.
func openFiles(cfg *Config, log hclog.Logger, m *metrics, w *watchdog, node storageNode) (*storage, error) {
	path := filepath.Join(cfg.StateDir, dbName)
	db, err := openBolt(path)
	if err != nil {
		return nil, err
	}
	files, err := openSnapshotFiles(cfg.StateDir, newRaftLog(log.Named("snapshot")))
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	disk := newDiskStore(db, path, w, m, node)
	s, err := newStorage(cfg, disk, disk, files, w, node)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s.disk, s.db = disk, db
	return s, nil
}

// newStorage returns a storage over stores that are open, on a disk that w watches or, if w is nil, in memory.
func newStorage(cfg *Config, logs raft.LogStore, stable raft.StableStore, snapshots raft.SnapshotStore, w *watchdog,
	node storageNode,
) (*storage, error) {
	dir := ""
	if cfg.KVStore != storeMemory {
		dir = filepath.Join(cfg.StateDir, snapshotsDir)
	}
	log := newLogStore(logs, cfg, node)
	s := &storage{log: log, logs: log, stable: &stableStore{StableStore: stable}, watchdog: w}
	var err error
	s.snapshots, err = newSnapshotStore(snapshots, dir, w, log)
	return s, err
}

// close closes the storage when all of the log is on the disk. Nobody may use it any more.
func (s *storage) close() error {
	if s.db == nil {
		return nil
	}
	err := s.disk.waitAllStored()
	s.watchdog.stop()
	return errors.Join(err, s.db.Close())
}

// openBolt opens the database, and creates it where there is none.
func openBolt(path string) (db *raftboltdb.BoltStore, err error) {
	err = recovered(path, func() (err error) {
		if err = checkFile(path); err == nil {
			db, err = raftboltdb.New(raftboltdb.Options{
				Path: path,
				BoltOptions: &bbolt.Options{
					Timeout: lockTimeout,
					// bbolt finds the free pages when it opens the file, instead of writing them with each commit.
					NoFreelistSync: true,
					FreelistType:   bbolt.FreelistMapType,
				},
			})
		}
		switch {
		case errors.Is(err, bbolterrors.ErrTimeout):
			return fmt.Errorf("%s is locked by another process: stop it, or set another STATE_DIR", path)
		case errors.As(err, new(syscall.Errno)):
			return fmt.Errorf("open %s: %w; STATE_DIR must be a directory that this user can write", path, err)
		case err != nil:
			return damaged(path, err)
		}
		return nil
	})
	return db, err
}

// recovered makes a call to the database at path, and returns an error when it panics. bbolt panics on many kinds of damage,
// and memory that maps a file faults where the file cannot be read or has been cut short. A panic in a goroutine of bbolt's
// own cannot be recovered from: it ends the process.
func recovered(path string, call func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if cause := recover(); cause != nil {
			err = damaged(path, fmt.Errorf("%v", cause))
		}
	}()
	return call()
}

// damaged returns an error that says what is wrong with the file or directory at path, and what to do.
func damaged(path string, cause error) error {
	return fmt.Errorf("%s is damaged (%w); nothing was changed: restore the disk, or move the whole state directory "+
		"away and start this node without state, to be filled by the others", path, cause)
}

// checkFile looks for damage that bbolt or raft-boltdb would repair in silence, and lose acknowledged writes with it. It
// writes nothing. A file that is missing or empty is not damaged.
func checkFile(path string) error {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return nil // if something is wrong, opening it says what
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err != nil {
		return err
	}
	if err := checkMeta(path); err != nil {
		return errors.Join(err, db.Close())
	}
	err = db.View(func(tx *bbolt.Tx) error {
		if info.Size() < tx.Size() {
			return fmt.Errorf("it has %d bytes, and %d are in use", info.Size(), tx.Size())
		}
		// raft-boltdb creates both buckets in its first transaction. If a bucket's name were damaged it would create an
		// empty one.
		if fresh := tx.ID() < 2; !fresh && (tx.Bucket([]byte("conf")) == nil || tx.Bucket([]byte("logs")) == nil) {
			return errors.New("a bucket is missing")
		}
		return nil
	})
	return errors.Join(err, db.Close())
}

// checkMeta checks both of bbolt's meta pages. If one is damaged bbolt uses the other, which may be the older. That would
// undo the last commit in silence, and it may be a vote or an acknowledged entry.
func checkMeta(path string) error {
	// Sizes in bbolt's file format, in bytes.
	const (
		head = 16 // of a page
		size = 64 // of the meta data that follows; the last 8 are its checksum
	)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	at := int64(0)
	for page := range 2 {
		var meta [size]byte
		if _, err := f.ReadAt(meta[:], at+head); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		hash := fnv.New64a()
		_, _ = hash.Write(meta[:size-8])
		if binary.NativeEndian.Uint32(meta[:]) != 0xED0CDAED || binary.NativeEndian.Uint32(meta[4:]) != 2 ||
			binary.NativeEndian.Uint64(meta[size-8:]) != hash.Sum64() {
			return fmt.Errorf("meta page %d is not valid", page)
		}
		at = int64(binary.NativeEndian.Uint32(meta[8:]))
	}
	return nil
}

// The keys of a vote in the stable store, which are a format: Raft's two, and ours for both in one.
var (
	keyLastVoteTerm = []byte("LastVoteTerm")
	keyLastVoteCand = []byte("LastVoteCand")
	keyVote         = []byte("Vote")
)

// stableStore stores a vote's term and candidate as one value. Raft writes the term first and then the candidate. After a
// crash in between the node would have the new term with the candidate of an older vote, and would grant that candidate a
// vote without comparing logs (hashicorp/raft issue 661). Only Raft's main goroutine writes votes, so nothing is locked.
// Format: 8 bytes of term, then the candidate.
type stableStore struct {
	raft.StableStore
	term uint64 // of the vote whose candidate Raft writes next
}

func (s *stableStore) SetUint64(key []byte, val uint64) error {
	if !bytes.Equal(key, keyLastVoteTerm) {
		return s.StableStore.SetUint64(key, val)
	}
	s.term = val
	return nil
}

func (s *stableStore) Set(key, val []byte) error {
	if !bytes.Equal(key, keyLastVoteCand) {
		return s.StableStore.Set(key, val)
	}
	return s.StableStore.Set(keyVote, append(binary.BigEndian.AppendUint64(nil, s.term), val...))
}

func (s *stableStore) GetUint64(key []byte) (uint64, error) {
	if !bytes.Equal(key, keyLastVoteTerm) {
		return s.StableStore.GetUint64(key)
	}
	term, _, err := s.vote()
	return term, err
}

func (s *stableStore) Get(key []byte) ([]byte, error) {
	if !bytes.Equal(key, keyLastVoteCand) {
		return s.StableStore.Get(key)
	}
	_, candidate, err := s.vote()
	return candidate, err
}

func (s *stableStore) vote() (term uint64, candidate []byte, err error) {
	vote, err := s.StableStore.Get(keyVote)
	if err == nil && len(vote) < 8 {
		err = raftboltdb.ErrKeyNotFound
	}
	if err != nil {
		return 0, nil, err
	}
	return binary.BigEndian.Uint64(vote), vote[8:], nil
}

// lastEntry returns the index and term of the newest entry that is stored, or that a stored snapshot covers.
func (s *storage) lastEntry() (index, term uint64, err error) {
	snapshot, err := s.snapshots.newest()
	if err != nil {
		return 0, 0, fmt.Errorf("list snapshots: %w", err)
	}
	index, term = snapshot.Index, snapshot.Term
	last, err := s.logs.LastIndex()
	if err != nil || last <= index {
		return index, term, err
	}
	var entry raft.Log
	if err := s.logs.GetLog(last, &entry); err != nil {
		if errors.Is(err, raft.ErrLogNotFound) { // a snapshot has just taken its place, or a leader's entries
			return s.lastEntry()
		}
		return 0, 0, fmt.Errorf("read log entry %d: %w", last, err)
	}
	return last, entry.Term, nil
}
