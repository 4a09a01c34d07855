package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// storage is what a node stores: the log, its votes and terms, and snapshots. With KV_STORE=memory nothing of it
// outlives the process. From top to bottom:
//
//	logStore       bounds the log in bytes, keeps its newest entries in memory, keeps it in line with the snapshots
//	stableStore    stores a vote as one value
//	diskStore      below both: the database, which stops the process when it fails
//	snapshotStore  snapshots, which do so, too; tells logStore of each new one
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
	files, err := openSnapshotFiles(cfg.StateDir, newRaftLogger(log.Named("snapshot")))
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
	s.snapshots, err = newSnapshotStore(snapshots, dir, stable, w, log)
	return s, err
}

// close closes the storage when all of the log is on the disk. Raft must have stopped.
func (s *storage) close() error {
	if s.db == nil {
		return nil
	}
	err := s.disk.close()
	s.watchdog.stop()
	return errors.Join(err, s.db.Close())
}

// The keys of a vote in the stable store, which are a format: Raft's two, and ours for both in one.
var (
	keyLastVoteTerm = []byte("LastVoteTerm")
	keyLastVoteCand = []byte("LastVoteCand")
	keyVote         = []byte("Vote")
)

// stableStore stores a vote's term and candidate as one value. Raft writes the term first and then the candidate.
// After a crash in between the node would have the new term with the candidate of an older vote, and would grant that
// candidate a vote without comparing logs (hashicorp/raft issue 661). Only Raft's main goroutine writes votes, so
// nothing is locked. Format: 8 bytes of term, then the candidate.
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
	if entry.Term < term { // see logStore.setSnapshot: it was never committed
		return index, term, nil
	}
	return last, entry.Term, nil
}
