package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/hashicorp/go-hclog"
)

// The names in STATE_DIR are a format: a node that did not find them would start without state.
const (
	dbName       = "raft.db"
	snapshotsDir = "snapshots" // the name in Raft's file store
	tmpSuffix    = ".tmp"      // of what is not complete
)

// openStateDir creates the state directory if there is none. If there is one, nobody else may have been able to write
// to it: this node would believe what it finds. (The default is in /tmp, where anybody can create it first.) A
// directory that is refused is not changed. uid is the user's that runs this process.
func openStateDir(dir string, uid int, log hclog.Logger) error {
	// What this process creates from now on is for its user alone, also where a library asks for more.
	syscall.Umask(0o077)
	dir = filepath.Clean(dir) // without a slash at the end, for which Lstat would follow a link
	err := os.MkdirAll(filepath.Dir(dir), 0o700)
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("STATE_DIR %q: %w; set STATE_DIR to a directory that this user can write", dir, err)
	}
	info, err := checkStateDir(dir, uid)
	if err != nil {
		return fmt.Errorf("STATE_DIR %q: %w; nothing was changed", dir, err)
	}
	if ownerOf(info) == uid && info.Mode().Perm()&0o007 != 0 {
		log.Warn("STATE_DIR can be read by everybody: chmod o-rwx it", "STATE_DIR", dir)
	}
	return nil
}

// checkStateDir returns an error that says what is wrong with the state directory, and what to do. A group may write
// to it: Kubernetes gives volumes to one.
func checkStateDir(dir string, uid int) (fs.FileInfo, error) {
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	owner := ownerOf(info)
	switch {
	case info.Mode().Type() == fs.ModeSymlink:
		err = errors.New("it is a symbolic link: remove it, or set STATE_DIR to a directory without links")
	case !info.IsDir():
		err = errors.New("it is no directory: set STATE_DIR to a directory, or to a name that is not taken")
	case owner != uid && owner != 0:
		err = fmt.Errorf("it belongs to user %d, neither to root nor to user %d, who runs this node: chown it if it "+
			"is this node's, or set another STATE_DIR", owner, uid)
	case info.Mode().Perm()&0o002 != 0:
		err = errors.New("it can be written by everybody: if nobody has put anything there, chmod o-w it; otherwise " +
			"set another STATE_DIR")
	}
	return info, err
}

// ownerOf returns the id of the user who owns a file.
func ownerOf(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }
