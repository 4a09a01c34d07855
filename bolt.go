package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

const lockTimeout = 3 * time.Second // how long we wait for another process that has the database open

// openBolt opens the database, and creates it where there is none. The errors name what to do. The caller closes the
// database.
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
		case errors.Is(err, syscall.ENOSPC):
			return fmt.Errorf("open %s: %w: make room; if this was the node's first start, remove the file", path, err)
		case errors.As(err, new(syscall.Errno)):
			return fmt.Errorf("open %s: %w; STATE_DIR must be a directory that this user can write", path, err)
		case err != nil:
			return damaged(path, err)
		}
		return nil
	})
	return db, err
}

// recovered makes a call to the database at path, and returns an error when it panics. bbolt panics on many kinds of
// damage, and memory that maps a file faults where the file cannot be read or has been cut short. A panic in a
// goroutine of bbolt's own cannot be recovered from: it ends the process.
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

// checkFile looks for damage that bbolt or raft-boltdb would repair in silence, and lose acknowledged writes with it.
// It writes nothing. A file that is missing or empty is not damaged.
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

// checkMeta checks both of bbolt's meta pages. If one is damaged bbolt uses the other, which may be the older. That
// would undo the last commit in silence, and it may be a vote or an acknowledged entry.
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
	at := int64(0) // the second page comes after the first, whose meta data says how long a page is
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
