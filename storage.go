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
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

const lockTimeout = 3 * time.Second // how long another process may hold the database before we give up

// storage is what a node keeps: the log, its votes and terms, and snapshots. With KV_STORE=memory nothing of it
// outlives the process.
type storage struct {
	logs      raft.LogStore
	stable    raft.StableStore
	snapshots *checkedSnapshots
	close     func() error
	rules     *entries           // of logs
	disk      *guard             // the database that they are in; nil in memory
	stats     func() bbolt.Stats // of the database; nil in memory
}

// openStorage opens the node's storage, making it where there is none. From then on any failure of the log or of the
// stable store goes to fail and to nobody else: see guard.
func openStorage(cfg *Config, log hclog.Logger, fail func(error)) (*storage, error) {
	if cfg.KVStore == storeMemory {
		mem := raft.NewInmemStore()
		rules := newEntries(mem, cfg.TrailingLogs, fail)
		rules.inMemory = true
		snapshots, err := newCheckedSnapshots(&memorySnapshots{}, rules)
		return &storage{
			logs: rules, stable: &stableStore{StableStore: mem}, snapshots: snapshots, rules: rules,
			close: func() error { return nil },
		}, err
	}
	if err := openStateDir(cfg.StateDir, os.Geteuid(), log); err != nil {
		return nil, err
	}
	aside, err := setAsideSnapshots(cfg.StateDir)
	if err != nil {
		return nil, fmt.Errorf("STATE_DIR %q: %w", cfg.StateDir, err)
	}
	if aside != "" {
		log.Warn(dbName+" is missing: this node counts as one without state; the snapshots that were beside it are kept",
			"in", aside)
	}
	dog := newWatchdog(diskProbe(cfg.StateDir), watchTick, fail)
	var s *storage
	err = dog.during("open the storage", func() (err error) { s, err = openStores(cfg, log, dog, fail); return err })
	if err != nil {
		dog.stop()
		return nil, fmt.Errorf("STATE_DIR %q: %w", cfg.StateDir, err)
	}
	return s, nil
}

// openStores opens the database, and the snapshots beside it.
func openStores(cfg *Config, log hclog.Logger, dog *watchdog, fail func(error)) (_ *storage, err error) {
	path := filepath.Join(cfg.StateDir, dbName)
	db, err := openBolt(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	files, err := openSnapshots(cfg.StateDir, newRaftLogger(log.Named("snapshot")), dog, fail)
	if err != nil {
		return nil, err
	}
	guarded := &guard{db: db, dog: dog, fail: fail, path: path}
	rules := newEntries(guarded, cfg.TrailingLogs, fail)
	snapshots, err := newCheckedSnapshots(files, rules)
	if err != nil {
		return nil, err
	}
	return &storage{
		logs: rules, stable: &stableStore{StableStore: guarded}, snapshots: snapshots, rules: rules,
		disk: guarded, stats: db.Stats,
		close: func() error {
			err := guarded.drain()
			dog.stop()
			return errors.Join(err, db.Close())
		},
	}, nil
}

// openBolt opens the database. bbolt panics on many kinds of damage; where that can be caught it becomes an error that
// names the cure. Where it cannot, in a goroutine of bbolt's own, the process ends all the same.
func openBolt(path string) (db *raftboltdb.BoltStore, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = damaged(path, cause)
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a file cut short faults where it is mapped
	if err = checkFile(path); err == nil {
		db, err = raftboltdb.New(raftboltdb.Options{
			Path: path,
			BoltOptions: &bbolt.Options{
				Timeout: lockTimeout,
				// The list of free pages is found again when the file is opened, instead of being written with each commit.
				NoFreelistSync: true,
				FreelistType:   bbolt.FreelistMapType,
			},
		})
	}
	switch {
	case errors.Is(err, bbolterrors.ErrTimeout):
		return nil, fmt.Errorf("%s is locked by another process: stop it, or set another STATE_DIR", path)
	case errors.As(err, new(syscall.Errno)):
		return nil, fmt.Errorf("open %s: %w; STATE_DIR must be a directory that this user can write", path, err)
	case err != nil:
		return nil, damaged(path, err)
	}
	return db, nil
}

func damaged(path string, cause any) error {
	err, ok := cause.(error)
	if !ok {
		err = fmt.Errorf("%v", cause) // what a library panicked with
	}
	return fmt.Errorf("%s is damaged (%w); nothing was changed: restore the disk, or move the whole state directory "+
		"away and start this node without state, to be filled by the others", path, err)
}

// checkFile looks, before anything is written, for the kinds of damage that bbolt or raft-boltdb would mend without a
// word and lose with it what was acknowledged. It finds nothing wrong with a file that is not there.
func checkFile(path string) error {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return nil // to open it says what is wrong
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
		// Both buckets are made in the first transaction after bbolt's own. Instead of one whose name is damaged an empty
		// one would be made.
		if fresh := tx.ID() < 2; !fresh && (tx.Bucket([]byte("conf")) == nil || tx.Bucket([]byte("logs")) == nil) {
			return errors.New("a bucket is missing")
		}
		return nil
	})
	return errors.Join(err, db.Close())
}

// checkMeta says whether both of bbolt's meta pages are valid. With one that is not, bbolt takes the other, which may
// be the older: without a word the last commit is lost, and it may be a vote or an entry that was acknowledged.
func checkMeta(path string) error {
	const (
		head = 16 // of a page
		size = 64 // of the meta data after it, the last 8 bytes of which are the checksum
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

// Raft's names for the two halves of a vote, and ours for the whole.
var (
	keyLastVoteTerm = []byte("LastVoteTerm")
	keyLastVoteCand = []byte("LastVoteCand")
	keyVote         = []byte("Vote")
)

// stableStore keeps a vote, its term and its candidate, under one key. Raft writes the term first and the candidate
// after it: a crash in between leaves the new term with the candidate of an older vote, to whom the node would then
// grant a vote without comparing logs (hashicorp/raft issue 661). Format: 8 bytes of term, then the candidate.
type stableStore struct {
	raft.StableStore
	mu   sync.Mutex // guards term
	term uint64     // of the vote that raft is about to write
}

func (s *stableStore) SetUint64(key []byte, val uint64) error {
	if !bytes.Equal(key, keyLastVoteTerm) {
		return s.StableStore.SetUint64(key, val)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.term = val
	return nil
}

func (s *stableStore) Set(key, val []byte) error {
	if !bytes.Equal(key, keyLastVoteCand) {
		return s.StableStore.Set(key, val)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.StableStore.Set(keyVote, append(binary.BigEndian.AppendUint64(nil, s.term), val...))
}

func (s *stableStore) GetUint64(key []byte) (uint64, error) {
	if !bytes.Equal(key, keyLastVoteTerm) {
		return s.StableStore.GetUint64(key)
	}
	vote, err := s.vote()
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(vote), nil
}

func (s *stableStore) Get(key []byte) ([]byte, error) {
	if !bytes.Equal(key, keyLastVoteCand) {
		return s.StableStore.Get(key)
	}
	vote, err := s.vote()
	if err != nil {
		return nil, err
	}
	return vote[8:], nil
}

func (s *stableStore) vote() ([]byte, error) {
	vote, err := s.StableStore.Get(keyVote)
	if err == nil && len(vote) < 8 {
		return nil, raftboltdb.ErrKeyNotFound
	}
	return vote, err
}

// lastEntry returns the index and term of the newest entry that is stored, or that a stored snapshot covers.
func (s *storage) lastEntry() (index, term uint64, err error) {
	snapshots, err := s.snapshots.List()
	if err != nil {
		return 0, 0, fmt.Errorf("list snapshots: %w", err)
	}
	if len(snapshots) > 0 {
		index, term = snapshots[0].Index, snapshots[0].Term
	}
	last, err := s.logs.LastIndex()
	if err != nil || last <= index {
		return index, term, err
	}
	var entry raft.Log
	if err := s.logs.GetLog(last, &entry); err != nil {
		if errors.Is(err, raft.ErrLogNotFound) { // it has been replaced at this moment
			return s.lastEntry()
		}
		return 0, 0, fmt.Errorf("read log entry %d: %w", last, err)
	}
	return last, entry.Term, nil
}

// configurationIndex returns the index of the newest configuration that a stored snapshot holds.
func (s *storage) configurationIndex() (uint64, error) {
	snapshots, err := s.snapshots.List()
	if err != nil || len(snapshots) == 0 {
		return 0, err
	}
	return snapshots[0].ConfigurationIndex, nil
}
