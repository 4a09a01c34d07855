package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
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

const (
	lockTimeout     = 3 * time.Second // how long another process may hold the database before we give up
	logCacheEntries = 256             // entries kept in memory for followers that are a little behind
)

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

	// survivor says that it was the most complete of what was left when a majority had lost its state.
	survivor bool
	executed uint64 // by a survivor, before it went on alone: the index of the last entry
}

// openStorage opens the node's storage, making it where there is none. From then on any failure of the log or of the
// stable store goes to fail and to nobody else: see guard.
func openStorage(cfg *Config, log hclog.Logger, fail func(error)) (*storage, error) {
	if cfg.KVStore == storeMemory {
		mem := raft.NewInmemStore()
		rules := &entries{LogStore: mem, fail: fail}
		snapshots, err := newCheckedSnapshots(&memorySnapshots{}, rules)
		return &storage{
			logs: rules, stable: &stableStore{StableStore: mem}, snapshots: snapshots, close: func() error { return nil }, rules: rules,
		}, err
	}
	if err := openStateDir(cfg.StateDir, cfg.NodeID, os.Geteuid(), log); err != nil {
		return nil, err
	}
	aside, err := setAsideSnapshots(cfg.StateDir)
	if err != nil {
		return nil, fmt.Errorf("STATE_DIR %q: %w", cfg.StateDir, err)
	}
	if aside != "" {
		log.Warn(dbName+" is missing: this node counts as one without state; the snapshots that were beside it are kept", "in", aside)
	}
	dog := newWatchdog(diskProbe(cfg.StateDir), watchTick, fail)
	s, err := openStores(cfg, log, dog, fail)
	if err != nil {
		dog.stop()
		return nil, fmt.Errorf("STATE_DIR %q: %w", cfg.StateDir, err)
	}
	return s, nil
}

// openStores opens the database, and the snapshots beside it.
func openStores(cfg *Config, log hclog.Logger, dog *watchdog, fail func(error)) (*storage, error) {
	path := filepath.Join(cfg.StateDir, dbName)
	var db *raftboltdb.BoltStore
	err := dog.during("open "+path, func() (err error) { db, err = openBolt(path); return err })
	if err != nil {
		return nil, err
	}
	guarded := &guard{db: db, dog: dog, fail: fail, path: path}
	cache, err := raft.NewLogCache(logCacheEntries, guarded)
	if err == nil {
		err = claimStateDir(cfg.StateDir, cfg.NodeID, log)
	}
	var files *fileSnapshots
	if err == nil {
		files, err = openSnapshots(cfg.StateDir, log.Named("snapshot"), dog, fail)
	}
	rules := &entries{LogStore: cache, fail: fail}
	var snapshots *checkedSnapshots
	if err == nil {
		snapshots, err = newCheckedSnapshots(files, rules)
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &storage{
		logs: rules, stable: &stableStore{StableStore: guarded}, snapshots: snapshots, rules: rules, disk: guarded, stats: db.Stats,
		close: func() error {
			err := guarded.drain()
			dog.stop()
			return errors.Join(err, db.Close())
		},
	}, nil
}

// openBolt opens the database. bbolt panics on many kinds of damage; here that becomes an error that names the cure.
func openBolt(path string) (db *raftboltdb.BoltStore, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = damaged(path, cause)
		}
	}()
	err = readThrough(path)
	if err == nil {
		db, err = openForRaft(path)
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

func openForRaft(path string) (*raftboltdb.BoltStore, error) {
	return raftboltdb.New(raftboltdb.Options{
		Path: path,
		BoltOptions: &bbolt.Options{
			Timeout: lockTimeout,
			// The list of free pages is found again when the file is opened, instead of being written with each commit.
			NoFreelistSync: true,
			FreelistType:   bbolt.FreelistMapType,
		},
	})
}

// readThrough reads every page in use of the database, if it is there. bbolt itself does so when it looks for the free
// pages, but in a goroutine of its own, where a panic cannot be caught.
func readThrough(path string) error {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return nil // there is nothing to read; to open it says what is wrong
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a file cut short faults where it is mapped
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err != nil {
		return err
	}
	if err := checkMeta(path); err != nil {
		return errors.Join(err, db.Close())
	}
	sum := byte(0)
	err = db.View(func(tx *bbolt.Tx) error {
		// Both buckets are made in the first transaction after bbolt's own. A name that is damaged would be one of another
		// bucket, and an empty one be made instead.
		if fresh := tx.ID() < 2; !fresh && (tx.Bucket([]byte("conf")) == nil || tx.Bucket([]byte("logs")) == nil) {
			return errors.New("a bucket is missing")
		}
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			var last []byte
			return b.ForEach(func(key, value []byte) error {
				if last != nil && bytes.Compare(last, key) >= 0 {
					return fmt.Errorf("the keys of bucket %q are out of order", name)
				}
				if err := checkPair(path, name, last, key, value); err != nil {
					return err
				}
				last = key
				for i := len(value) - 1; i >= 0; i -= 4096 { // a byte of each page
					sum ^= value[i]
				}
				return nil
			})
		})
	})
	return errors.Join(err, db.Close())
}

// checkPair checks one key and value, last being the key before it in the bucket. The names are those of raft-boltdb.
func checkPair(path string, bucket, last, key, value []byte) error {
	switch {
	case string(bucket) == "conf":
		_, err := unseal(key, value)
		return err
	case string(bucket) == "logs" && len(key) != 8:
		return fmt.Errorf("a log entry has the key %x", key)
	case string(bucket) == "logs" && last != nil:
		if a, b := binary.BigEndian.Uint64(last), binary.BigEndian.Uint64(key); b != a+1 {
			return checkGap(filepath.Dir(path), a, b)
		}
	}
	return nil
}

// checkGap says whether the entries between last and next, two indexes that follow each other in the log, may be
// missing: Raft keeps its old entries when it installs a snapshot that is ahead of them, and goes on after the snapshot.
func checkGap(stateDir string, last, next uint64) error {
	missing := fmt.Errorf("log entry %d is followed by %d", last, next)
	if _, err := os.Stat(filepath.Join(stateDir, snapshotsDir)); err != nil {
		return missing
	}
	snapshots, err := raft.NewFileSnapshotStoreWithLogger(stateDir, snapshotsKept, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	list, err := snapshots.List()
	if err == nil && (len(list) == 0 || list[0].Index < next-1) {
		err = missing
	}
	return err
}

// entries is the log, on disk or in memory. What it holds of what the newest snapshot covers is what was committed.
type entries struct {
	raft.LogStore
	covered progress                // index up to which the newest snapshot covers it
	applied func() uint64           // index up to which the state machine has executed the log. Set before Raft runs, as is settle
	settle  func(last uint64) error // called before entries up to last are stored
	fail    func(error)
}

// newest returns the index up to which the newest snapshot covers the log.
func (e *entries) newest() uint64 { return e.covered.load() }

// cover takes note of a snapshot whose last entry has that index and term, when it has been published or found, and drops
// from the log what it shows to be of a fallen leader. Raft itself only ever shortens the log when it has installed a
// snapshot, and would, once this node leads, send what is left to a follower that starts without state, as if it had been
// committed. What comes after the snapshot stays: Raft goes by where the log ended, and replaces it when the leader's
// entries come.
//
// An entry of the same term at that index is the leader's, and then so is all before it. That is so after each snapshot
// that this node has taken itself, unless the leader's, which was newer, has come meanwhile; then nothing is left to drop.
func (e *entries) cover(index, term uint64) error {
	e.covered.advance(index)
	var entry raft.Log
	if err := e.GetLog(index, &entry); err == nil && entry.Term == term {
		return nil
	} else if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	first, err1 := e.FirstIndex()
	last, err2 := e.LastIndex()
	if err := errors.Join(err1, err2); err != nil || last == 0 || first > index {
		return err
	}
	return e.LogStore.DeleteRange(first, min(index, last))
}

func (e *entries) StoreLog(l *raft.Log) error { return e.StoreLogs([]*raft.Log{l}) }

func (e *entries) StoreLogs(l []*raft.Log) error {
	if e.settle != nil && len(l) > 0 {
		if err := e.settle(l[len(l)-1].Index); err != nil {
			return err
		}
	}
	return e.LogStore.StoreLogs(l)
}

// DeleteRange deletes the oldest entries, or the end of the log where the leader has other entries.
//
// An end that is executed in part does not go: this node has executed what the leader has not, and stops.
func (e *entries) DeleteRange(first, last uint64) error {
	end, err := e.LastIndex()
	if err != nil || end == 0 || last == 0 { // of an empty log raft.InmemStore would take itself for endless
		return err
	}
	if e.applied != nil && last >= end && last > e.newest() && first <= e.applied() {
		err := fmt.Errorf("the leader's log differs from entry %d on, but this node has executed its own up to %d: a node "+
			"of the cluster has lost what it had stored; nothing was changed: compare the nodes' data, then move the state "+
			"directory of each that is wrong away and start it without state, to be filled by the others", first, e.applied())
		e.fail(err)
		return err
	}
	return e.LogStore.DeleteRange(first, last)
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
