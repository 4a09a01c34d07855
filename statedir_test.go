package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

// tree is all that is at a path and below it, by its names.
func tree(t *testing.T, path string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	err := filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		var content []byte
		if info.Mode().IsRegular() {
			content, err = os.ReadFile(path)
		}
		found[path] = strings.Join([]string{info.Mode().String(), info.ModTime().Format(time.RFC3339Nano), string(content)}, " ")
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return found
}

// chmod is os.Chmod with the mode as chmod(1) takes it, whatever the umask is.
func chmod(t *testing.T, path string, mode uint32) {
	t.Helper()
	if err := syscall.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// giveAway makes path a stranger's, and returns who this user is then: only root can give a file away, so for anybody else
// it is this user who becomes another.
func giveAway(t *testing.T, path string) (uid int) {
	t.Helper()
	const stranger = 4711
	if uid = os.Geteuid(); uid != 0 {
		return stranger
	}
	if err := os.Lchown(path, stranger, -1); err != nil {
		t.Fatal(err)
	}
	return uid
}

// plantState makes a state directory with the files that node1 would have there.
func plantState(t *testing.T, dir string) {
	t.Helper()
	snapshot := filepath.Join(snapshotsDir, "1-2-3")
	err := os.MkdirAll(filepath.Join(dir, snapshot), 0o700)
	for _, name := range []string{dbName, filepath.Join(snapshot, stateName)} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte("node1\n"), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	chmod(t, dir, 0o700)
}

// linkInPlaceOf renames path, and puts a symbolic link to it in its place.
func linkInPlaceOf(t *testing.T, path string) {
	t.Helper()
	if err := errors.Join(os.Rename(path, path+".elsewhere"), os.Symlink(path+".elsewhere", path)); err != nil {
		t.Fatal(err)
	}
}

func TestPlantedStateDirs(t *testing.T) {
	t.Parallel()
	me := os.Geteuid()
	for _, tc := range []struct {
		name string
		// plant changes what is at dir, a state directory of node1 but for that, and returns who this user is.
		plant func(t *testing.T, dir string) (uid int)
		want  string // in the error
	}{
		{"a link to a directory", func(t *testing.T, dir string) int {
			t.Helper()
			linkInPlaceOf(t, dir)
			return me
		}, "symbolic link"},
		{"a link to nothing", func(t *testing.T, dir string) int {
			t.Helper()
			linkInPlaceOf(t, dir)
			if err := os.RemoveAll(dir + ".elsewhere"); err != nil {
				t.Fatal(err)
			}
			return me
		}, "symbolic link"},
		{"a file", func(t *testing.T, dir string) int {
			t.Helper()
			if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, []byte("somebody's"), 0o600)); err != nil {
				t.Fatal(err)
			}
			return me
		}, "it is no directory"},
		{"a pipe", func(t *testing.T, dir string) int {
			t.Helper()
			if err := errors.Join(os.RemoveAll(dir), syscall.Mkfifo(dir, 0o600)); err != nil {
				t.Fatal(err)
			}
			return me
		}, "it is no directory"},
		{"a stranger's directory", func(t *testing.T, dir string) int {
			t.Helper()
			return giveAway(t, dir)
		}, "chown it"},
		{"a directory that all can write", func(t *testing.T, dir string) int {
			t.Helper()
			chmod(t, dir, 0o777)
			return me
		}, "chmod o-w it"},
		{"a sticky directory that all can write", func(t *testing.T, dir string) int {
			t.Helper()
			chmod(t, dir, 0o1777)
			return me
		}, "chmod o-w it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			above := t.TempDir()
			dir := filepath.Join(above, "node1")
			plantState(t, dir)
			uid := tc.plant(t, dir)
			before := tree(t, above)
			for _, path := range []string{dir, dir + "/"} {
				err := openStateDir(path, uid, hclog.NewNullLogger())
				for _, want := range []string{"STATE_DIR", dir, tc.want} {
					if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("got error %v; want one with %q", err, want)
					}
				}
				if uid == me {
					if s, err := openStorage(&Config{KVStore: storeBolt, NodeID: "node1", StateDir: path}, hclog.NewNullLogger(), newMetrics(), &testStorageNode{}); err == nil {
						t.Error("the storage was opened")
						_ = s.close()
					}
				}
			}
			if diff := cmp.Diff(before, tree(t, above)); diff != "" {
				t.Errorf("it was touched (-before +after):\n%s", diff)
			}
		})
	}
}

func TestStateDirsThatAreTaken(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		mode uint32
		warn string // in the log, "" for nothing there
	}{
		{"for its user alone", 0o700, ""},
		{"for a group, too", 0o2770, ""},
		{"that all can read", 0o755, "chmod o-rwx it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "node1")
			plantState(t, dir)
			chmod(t, dir, tc.mode)
			before := tree(t, dir)
			var log bytes.Buffer
			if err := openStateDir(dir, os.Geteuid(), hclog.New(&hclog.LoggerOptions{Output: &log})); err != nil {
				t.Error(err)
			}
			if got := log.String(); !strings.Contains(got, tc.warn) || tc.warn == "" && strings.Contains(got, "chmod") {
				t.Errorf("got log %q; want %q", got, tc.warn)
			}
			if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
				t.Errorf("it was touched (-before +after):\n%s", diff)
			}
		})
	}
	t.Run("below a link", func(t *testing.T) {
		t.Parallel()
		above := filepath.Join(t.TempDir(), "above")
		plantState(t, filepath.Join(above, "node1"))
		linkInPlaceOf(t, above)
		if err := openStateDir(filepath.Join(above, "node1"), os.Geteuid(), hclog.NewNullLogger()); err != nil {
			t.Error(err)
		}
	})
	t.Run("root's", func(t *testing.T) {
		t.Parallel()
		if _, err := checkStateDir("/", 4711); err != nil { // it only looks
			t.Error(err)
		}
	})
}
