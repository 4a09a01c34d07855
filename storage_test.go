package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// openTestStorage opens a storage that fails the test when it fails, and closes it when the test ends, if the test has
// not done so by calling its close.
func openTestStorage(t *testing.T, kvStore, dir string) *storage {
	t.Helper()
	s, err := openStorage(&Config{KVStore: kvStore, StateDir: dir}, hclog.NewNullLogger(), newMetrics(), &testStorageNode{t: t})
	if err != nil {
		t.Fatalf("open storage: %v", err)
	}
	t.Cleanup(func() { _ = s.close() })
	return s
}

// testStorageNode is the node of a storage under test.
type testStorageNode struct {
	t       *testing.T // fails with the storage, unless it is nil
	failed  []error    // the reasons why it did
	applied uint64
	leads   bool
}

func (n *testStorageNode) fail(err error) {
	n.failed = append(n.failed, err)
	if n.t != nil {
		n.t.Errorf("the storage failed: %v", err)
	}
}

func (n *testStorageNode) lastApplied() uint64 { return n.applied }

func (n *testStorageNode) commitsWithOthers() bool { return n.leads }

// newTestSnapshots returns a store of snapshots over another, with an empty log.
func newTestSnapshots(t *testing.T, store raft.SnapshotStore, dir string, w *watchdog, node storageNode) *snapshotStore {
	t.Helper()
	return &snapshotStore{
		store: store, dir: dir, stable: raft.NewInmemStore(), watchdog: w,
		log: newLogStore(raft.NewInmemStore(), &Config{}, node),
	}
}

// recordingStable notes what is written to it.
type recordingStable struct {
	raft.StableStore
	writes []string
}

func (r *recordingStable) Set(key, val []byte) error {
	r.writes = append(r.writes, fmt.Sprintf("%s=%q", key, val))
	return r.StableStore.Set(key, val)
}

func (r *recordingStable) SetUint64(key []byte, val uint64) error {
	r.writes = append(r.writes, fmt.Sprintf("%s=%d", key, val))
	return r.StableStore.SetUint64(key, val)
}

// castVote writes a vote as raft does.
func castVote(t *testing.T, s raft.StableStore, term uint64, candidate string) {
	t.Helper()
	if err := errors.Join(s.SetUint64(keyLastVoteTerm, term), s.Set(keyLastVoteCand, []byte(candidate))); err != nil {
		t.Fatalf("vote: %v", err)
	}
}

// checkVote reads a vote as raft does.
func checkVote(t *testing.T, s raft.StableStore, wantTerm uint64, wantCandidate string) {
	t.Helper()
	term, err := s.GetUint64(keyLastVoteTerm)
	if err != nil || term != wantTerm {
		t.Errorf("got term %d, error %v; want %d and none", term, err, wantTerm)
	}
	candidate, err := s.Get(keyLastVoteCand)
	if err != nil || string(candidate) != wantCandidate {
		t.Errorf("got candidate %q, error %v; want %q and none", candidate, err, wantCandidate)
	}
}

func TestVoteIsOneWrite(t *testing.T) {
	below := &recordingStable{StableStore: raft.NewInmemStore()}
	s := &stableStore{StableStore: below}
	castVote(t, s, 7, "node2")
	want := []string{fmt.Sprintf("Vote=%q", "\x00\x00\x00\x00\x00\x00\x00\x07node2")}
	if diff := cmp.Diff(want, below.writes); diff != "" {
		t.Errorf("writes differ (-want +got):\n%s", diff)
	}
	checkVote(t, s, 7, "node2")
	checkVote(t, &stableStore{StableStore: below}, 7, "node2")
}

func TestOtherKeysPassThroughTheStableStore(t *testing.T) {
	below := &recordingStable{StableStore: raft.NewInmemStore()}
	s := &stableStore{StableStore: below}
	if err := errors.Join(s.SetUint64([]byte("CurrentTerm"), 4), s.Set([]byte("Cluster"), []byte("+x"))); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"CurrentTerm=4", `Cluster="+x"`}, below.writes); diff != "" {
		t.Errorf("writes differ (-want +got):\n%s", diff)
	}
	if term, err := s.GetUint64([]byte("CurrentTerm")); err != nil || term != 4 {
		t.Errorf("got %d, error %v; want 4 and none", term, err)
	}
	if cluster, err := s.Get([]byte("Cluster")); err != nil || string(cluster) != "+x" {
		t.Errorf("got %q, error %v; want +x and none", cluster, err)
	}
}

// Raft takes an error with exactly this text for a first start, and any other for a broken store.
func TestVoteThatIsNotThere(t *testing.T) {
	for _, kvStore := range []string{storeBolt, storeMemory} {
		t.Run(kvStore, func(t *testing.T) {
			s := openTestStorage(t, kvStore, t.TempDir()).stable
			if term, err := s.GetUint64(keyLastVoteTerm); err == nil || err.Error() != "not found" {
				t.Errorf("got term %d, error %v; want not found", term, err)
			}
			if candidate, err := s.Get(keyLastVoteCand); err == nil || err.Error() != "not found" {
				t.Errorf("got candidate %q, error %v; want not found", candidate, err)
			}
		})
	}
}

func TestCrashBetweenTheTwoWritesOfAVote(t *testing.T) {
	for _, tt := range []struct {
		name      string
		term      uint64 // of an earlier vote, 0 for none
		candidate string
	}{
		{"after an earlier vote", 3, "node2"},
		{"of the first vote", 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openTestStorage(t, storeBolt, dir)
			if tt.term > 0 {
				castVote(t, s.stable, tt.term, tt.candidate)
			}
			if err := s.stable.SetUint64(keyLastVoteTerm, tt.term+1); err != nil {
				t.Fatal(err)
			}
			if err := s.close(); err != nil {
				t.Fatal(err)
			}
			s = openTestStorage(t, storeBolt, dir)
			if tt.term > 0 {
				checkVote(t, s.stable, tt.term, tt.candidate)
			} else if term, err := s.stable.GetUint64(keyLastVoteTerm); !isNotFound(err) {
				t.Errorf("got term %d, error %v; want not found", term, err)
			}
			castVote(t, s.stable, tt.term+2, "node3")
			checkVote(t, s.stable, tt.term+2, "node3")
		})
	}
}

func TestStorageKeepsItsStateWhenOpenedAgain(t *testing.T) {
	for _, tt := range []struct {
		kvStore string
		keeps   bool
	}{{storeBolt, true}, {storeMemory, false}} {
		t.Run(tt.kvStore, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "made", "when", "opened")
			s := openTestStorage(t, tt.kvStore, dir)
			castVote(t, s.stable, 9, "node1")
			err := errors.Join(
				s.stable.SetUint64([]byte("CurrentTerm"), 9),
				s.logs.StoreLogs([]*raft.Log{{Type: raft.LogConfiguration, Index: 4, Term: 8, Data: []byte("four")}, {Type: raft.LogNoop, Index: 5, Term: 9, Data: []byte("five")}}),
			)
			if err != nil {
				t.Fatal(err)
			}
			writeSnapshot(t, s.snapshots, 3, framed("state"))
			if err := s.close(); err != nil {
				t.Fatalf("close: %v", err)
			}
			s = openTestStorage(t, tt.kvStore, dir)
			if !tt.keeps {
				if last, _, err := s.lastEntry(); err != nil || last != 0 {
					t.Errorf("got last index %d, error %v; want 0 and none", last, err)
				}
				if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("got %v for the state directory; want it not made", err)
				}
				return
			}
			checkVote(t, s.stable, 9, "node1")
			if term, err := s.stable.GetUint64([]byte("CurrentTerm")); err != nil || term != 9 {
				t.Errorf("got term %d, error %v; want 9 and none", term, err)
			}
			var entry raft.Log
			if err := s.logs.GetLog(4, &entry); err != nil || string(entry.Data) != "four" || entry.Term != 8 {
				t.Errorf("got entry %+v, error %v; want the one stored and none", entry, err)
			}
			if got := readSnapshots(t, s.snapshots); !reflect.DeepEqual(got, []string{"3: " + framed("state")}) {
				t.Errorf("got snapshots %q; want the one stored", got)
			}
		})
	}
}

func TestLastIndex(t *testing.T) {
	for _, kvStore := range []string{storeBolt, storeMemory} {
		for _, tt := range []struct {
			name      string
			snapshots []uint64
			logs      []uint64
			want      uint64
		}{
			{"nothing", nil, nil, 0},
			{"entries alone", nil, []uint64{1, 2, 3}, 3},
			{"a snapshot alone", []uint64{8}, nil, 8},
			{"two snapshots", []uint64{8, 12}, nil, 12},
			{"entries after the snapshot", []uint64{8}, []uint64{7, 8, 9, 10}, 10},
			{"a snapshot after the entries", []uint64{20}, []uint64{7, 8, 9, 10}, 20},
		} {
			t.Run(kvStore+"/"+tt.name, func(t *testing.T) {
				s := openTestStorage(t, kvStore, t.TempDir())
				for _, index := range tt.snapshots {
					writeSnapshot(t, s.snapshots, index, framed("state"))
				}
				for _, index := range tt.logs {
					if err := s.logs.StoreLog(&raft.Log{Type: raft.LogNoop, Index: index, Term: 2}); err != nil {
						t.Fatal(err)
					}
				}
				if got, _, err := s.lastEntry(); err != nil || got != tt.want {
					t.Errorf("got %d, error %v; want %d and none", got, err, tt.want)
				}
			})
		}
	}
}

// What a leader that nobody followed has left above a later snapshot is not the newest that a node has.
func TestLastEntryIsNotBelowTheSnapshot(t *testing.T) {
	s := openTestStorage(t, storeBolt, t.TempDir())
	for i := uint64(5); i <= 10; i++ {
		if err := s.logs.StoreLog(&raft.Log{Type: raft.LogNoop, Index: i, Term: 1}); err != nil {
			t.Fatal(err)
		}
	}
	writeSnapshot(t, s.snapshots, 9, framed("state")) // of term 2
	if index, term, err := s.lastEntry(); index != 9 || term != 2 || err != nil {
		t.Errorf("got entry %d of term %d, error %v; want 9 of 2", index, term, err)
	}
}

func TestLastIndexOfABrokenStorage(t *testing.T) {
	broken := errors.New("input/output error")
	snapshots := func(store raft.SnapshotStore) *snapshotStore {
		return newTestSnapshots(t, store, "", nil, &testStorageNode{})
	}
	for name, s := range map[string]*storage{
		"log":       {logs: &brokenStore{err: broken}, snapshots: snapshots(&memorySnapshots{})},
		"snapshots": {logs: raft.NewInmemStore(), snapshots: snapshots(brokenSnapshots{err: broken})},
	} {
		if index, _, err := s.lastEntry(); !errors.Is(err, broken) {
			t.Errorf("%s: got %d, error %v; want %v", name, index, err, broken)
		}
	}
}

type brokenSnapshots struct {
	raft.SnapshotStore
	err error
}

func (b brokenSnapshots) List() ([]*raft.SnapshotMeta, error) { return nil, b.err }

// brokenStore is a log and a stable store of which each call returns err beside something.
type brokenStore struct{ err error }

func (b *brokenStore) FirstIndex() (uint64, error) { return 1, b.err }
func (b *brokenStore) LastIndex() (uint64, error)  { return 2, b.err }
func (b *brokenStore) GetLog(_ uint64, l *raft.Log) error {
	l.Index, l.Data = 3, encodeEntry(time.Time{}, nil)
	return b.err
}
func (b *brokenStore) StoreLog(*raft.Log) error      { return b.err }
func (b *brokenStore) StoreLogs([]*raft.Log) error   { return b.err }
func (b *brokenStore) DeleteRange(_, _ uint64) error { return b.err }
func (b *brokenStore) Set(_, _ []byte) error         { return b.err }
func (b *brokenStore) Get([]byte) ([]byte, error) {
	return appendChecksum(nil, []byte("12345678")), b.err
}
func (b *brokenStore) SetUint64([]byte, uint64) error   { return b.err }
func (b *brokenStore) GetUint64([]byte) (uint64, error) { return 5, b.err }

func TestDiskStore(t *testing.T) {
	var entry raft.Log
	type call func(*diskStore) (value any, err error)
	calls := []struct {
		name string
		call call
		want any
	}{
		{"FirstIndex", func(d *diskStore) (any, error) { return d.FirstIndex() }, uint64(1)},
		{"LastIndex", func(d *diskStore) (any, error) { return d.LastIndex() }, uint64(2)},
		{"GetLog", func(d *diskStore) (any, error) { err := d.GetLog(3, &entry); return entry.Index, err }, uint64(3)},
		{"StoreLog", func(d *diskStore) (any, error) { return nil, d.StoreLog(&entry) }, nil},
		{"StoreLogs", func(d *diskStore) (any, error) { return nil, d.StoreLogs([]*raft.Log{&entry}) }, nil},
		{"DeleteRange", func(d *diskStore) (any, error) { return nil, d.DeleteRange(1, 2) }, nil},
		{"Set", func(d *diskStore) (any, error) { return nil, d.Set(nil, nil) }, nil},
		{"Get", func(d *diskStore) (any, error) { v, err := d.Get(nil); return string(v), err }, "12345678"},
		{"SetUint64", func(d *diskStore) (any, error) { return nil, d.SetUint64(nil, 1) }, nil},
		{"GetUint64", func(d *diskStore) (any, error) { return d.GetUint64(nil) }, uint64(0x3132333435363738)},
	}
	if got, want := reflect.TypeFor[*diskStore]().NumMethod(), len(calls); got != want {
		t.Errorf("got %d exported methods of diskStore; want the %d that are tested here", got, want)
	}
	errs := []struct {
		name  string
		err   error
		fails bool
	}{
		{"no error", nil, false},
		{"log not found", raft.ErrLogNotFound, false},
		{"log not found, wrapped", fmt.Errorf("get: %w", raft.ErrLogNotFound), false},
		{"key not found", raftboltdb.ErrKeyNotFound, false},
		{"key not found, of another store", errors.New("not found"), false},
		{"disk full", syscall.ENOSPC, true},
		{"input/output error", &os.PathError{Op: "write", Path: "raft.db", Err: syscall.EIO}, true},
		{"database closed", io.ErrClosedPipe, true},
		{"not found in another text", errors.New("page 7 not found"), true},
	}
	for _, call := range calls {
		for _, tt := range errs {
			t.Run(call.name+"/"+tt.name, func(t *testing.T) {
				node := &testStorageNode{}
				d := newDiskStore(&brokenStore{err: tt.err}, "", nil, newMetrics(), node)
				value, err := call.call(d)
				if !errors.Is(err, tt.err) || (err == nil && value != call.want) {
					t.Errorf("got %v, error %v; want %v, %v", value, err, call.want, tt.err)
				}
				switch failed := node.failed; {
				case !tt.fails && len(failed) > 0:
					t.Errorf("got failures %v; want none", failed)
				case tt.fails && (len(failed) != 1 || !errors.Is(failed[0], tt.err) || !strings.HasPrefix(failed[0].Error(), "storage: ")):
					t.Errorf("got failures %v; want one of the storage, with %v", failed, tt.err)
				}
			})
		}
	}
}

// The database is closed under the storage, so every call of it is an error.
func TestStorageFailsStop(t *testing.T) {
	node := &testStorageNode{}
	s, err := openStorage(&Config{KVStore: storeBolt, StateDir: t.TempDir()}, hclog.NewNullLogger(), newMetrics(), node)
	if err != nil {
		t.Fatal(err)
	}
	defer s.watchdog.stop()
	if err := s.db.Close(); err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"the log":             func() error { return s.logs.StoreLogs([]*raft.Log{{Index: 1}}) },
		"a vote":              func() error { return s.stable.Set(keyLastVoteCand, []byte("node1")) },
		"a vote that is read": func() error { _, err := s.stable.GetUint64(keyLastVoteTerm); return err },
		"a term":              func() error { return s.stable.SetUint64([]byte("CurrentTerm"), 1) },
	} {
		node.failed = nil
		if err := call(); err == nil || len(node.failed) != 1 {
			t.Errorf("%s: got error %v, failures %v; want one of each", name, err, node.failed)
		}
	}
}

func TestDatabaseThatIsLocked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	openTestStorage(t, storeBolt, dir)
	began := time.Now()
	_, err := openStorage(&Config{KVStore: storeBolt, StateDir: dir}, hclog.NewNullLogger(), newMetrics(), &testStorageNode{})
	if waited := time.Since(began); waited > 5*time.Second {
		t.Errorf("got an answer after %v; want one within 5 s", waited)
	}
	for _, want := range []string{filepath.Join(dir, "raft.db"), "locked by another process", "STATE_DIR"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v; want one with %q", err, want)
		}
	}
}

func TestStateDirThatCannotBeUsed(t *testing.T) {
	parent := t.TempDir()
	file := filepath.Join(parent, "file")
	if err := os.WriteFile(file, []byte("somebody's"), 0o600); err != nil {
		t.Fatal(err)
	}
	withDir := filepath.Join(parent, "with-a-directory-for-a-database")
	if err := os.MkdirAll(filepath.Join(withDir, "raft.db"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{
		"a file":                      file,
		"below a file":                filepath.Join(file, "state"),
		"its database is a directory": withDir,
	} {
		t.Run(name, func(t *testing.T) {
			s, err := openStorage(&Config{KVStore: storeBolt, StateDir: dir}, hclog.NewNullLogger(), newMetrics(), &testStorageNode{})
			if err == nil {
				_ = s.close()
			}
			for _, want := range []string{dir, "STATE_DIR"} {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got error %v; want one with %q", err, want)
				}
			}
		})
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "somebody's" {
		t.Errorf("got %q, error %v; want the file unchanged", got, err)
	}
}

// childDatabase names a file for TestOpenBoltInAChild to open.
const childDatabase = "RAFTSTARTER_TEST_DATABASE"

// TestOpenBoltInAChild is run by TestDamagedDatabase, in a process of its own: not every panic can be recovered from.
func TestOpenBoltInAChild(t *testing.T) {
	path := os.Getenv(childDatabase)
	if path == "" {
		t.Skip("only run by TestDamagedDatabase")
	}
	db, err := openBolt(path)
	if err != nil {
		fmt.Println("refused:", err)
		return
	}
	last, err := db.LastIndex()
	fmt.Printf("opened: last index %d, error %v\n", last, err)
	_ = db.Close()
}

func TestDamagedDatabase(t *testing.T) {
	t.Parallel()
	const page = 4096 // of bbolt, which takes the system's
	if os.Getpagesize() != page {
		t.Skipf("written for pages of %d bytes", page)
	}
	good := goodDatabase(t)
	garbage := func(size int) []byte { return bytes.Repeat([]byte("garbage!"), (size+7)/8)[:size] }
	with := func(at int, b []byte) []byte {
		damaged := bytes.Clone(good)
		copy(damaged[at:], b)
		return damaged
	}
	// bbolt numbers the pages in their heads; a page in use that says another number is damaged.
	inUse := func(n int) []byte { return with(n*page, garbage(page)) }
	newest := good // of its two meta pages: it names the root page and, after three more numbers, its transaction
	if binary.LittleEndian.Uint64(good[page+16+48:]) > binary.LittleEndian.Uint64(good[16+48:]) {
		newest = good[page:]
	}
	root := int(binary.LittleEndian.Uint64(newest[16+16:]))
	if root < 2 || root >= len(good)/page {
		t.Fatalf("got root page %d; want one of the %d pages", root, len(good)/page)
	}
	const refused = "refused: "
	tests := []struct {
		name string
		file []byte
		want string // how what the child says begins
	}{
		{"a good one", good, "opened: last index 300, error <nil>"},
		{"an empty file", nil, "opened: last index 0, error <nil>"},
		{"a byte of garbage", garbage(1), refused},
		{"a line of garbage", garbage(100), refused},
		{"two pages of garbage", garbage(2 * page), refused},
		{"64 KiB of garbage", garbage(64 << 10), refused},
		{"64 KiB of zeros", make([]byte, 64<<10), refused},
		{"garbage before a database", append(garbage(page), good...), refused},
		{"cut in the first meta page", good[:50], refused},
		{"cut after the first meta page", good[:page], refused},
		{"cut after both meta pages", good[:2*page], refused},
		{"cut in the middle of the pages in use", good[:len(good)/4+100], refused},
		{"cut to a half", good[:len(good)/2], refused},
		{"both meta pages overwritten", with(0, garbage(2*page)), refused},
		{"one meta page overwritten", with(page, garbage(page)), refused},
		{"root page overwritten", inUse(root), refused},
		{"all but the meta pages overwritten", with(2*page, garbage(len(good)-2*page)), refused},
		{"all but the meta pages zeros", with(2*page, make([]byte, len(good)-2*page)), refused},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, dbName)
			if err := os.WriteFile(path, tt.file, 0o600); err != nil {
				t.Fatal(err)
			}
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOpenBoltInAChild$", "-test.count=1")
			child.Env = append(os.Environ(), childDatabase+"="+path, "GORACE=atexit_sleep_ms=0")
			output, err := child.CombinedOutput()
			if after, err := os.ReadFile(path); tt.want == refused && (err != nil || !bytes.Equal(after, tt.file)) {
				t.Errorf("the file was changed (error %v)", err)
			}
			if err != nil && tt.want == refused && strings.Contains(string(output), "panic: freepages: failed to get all reachable pages") {
				return // in a goroutine of bbolt's own
			}
			if err != nil || !strings.HasPrefix(string(output), tt.want) {
				t.Fatalf("got error %v and output %.300q; want none and output that begins with %q", err, output, tt.want)
			}
			if tt.want != refused {
				return
			}
			for _, want := range []string{path, "is damaged", "move the whole state directory away"} {
				if !strings.Contains(string(output), want) {
					t.Errorf("got %.300q; want %q in it", output, want)
				}
			}
			if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
				t.Errorf("got files %v, error %v; want the database alone", files, err)
			}
		})
	}
}

// goodDatabase returns the bytes of a database with 300 log entries, a term and a vote.
func goodDatabase(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	s := openTestStorage(t, storeBolt, dir)
	for batch := range 3 {
		var entries []*raft.Log
		for i := range 100 {
			entries = append(entries, &raft.Log{Index: uint64(batch*100 + i + 1), Term: 1, Data: bytes.Repeat([]byte("x"), 1000)})
		}
		if err := s.logs.StoreLogs(entries); err != nil {
			t.Fatal(err)
		}
	}
	castVote(t, s.stable, 1, "node1")
	if err := errors.Join(s.stable.SetUint64([]byte("CurrentTerm"), 1), s.close()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, dbName))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDeleteRangeGoesInSteps(t *testing.T) {
	const entries = 3*deleteStep + 10
	for _, tt := range []struct {
		name                   string
		first, last, wantFirst uint64
		wantLast               uint64
		calls                  int
	}{
		{"the oldest", 1, 3 * deleteStep, 3*deleteStep + 1, entries, 3},
		{"a few of the oldest", 1, 7, 8, entries, 1},
		{"the newest, in one", 8, entries, 1, 7, 1},
		{"all, in one", 1, entries, 0, 0, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := &countingStore{InmemStore: raft.NewInmemStore()}
			d := newDiskStore(db, "", nil, newMetrics(), &testStorageNode{t: t})
			for i := range entries {
				if err := d.StoreLog(&raft.Log{Index: uint64(i + 1)}); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.DeleteRange(tt.first, tt.last); err != nil {
				t.Fatal(err)
			}
			first, _ := d.FirstIndex()
			last, _ := d.LastIndex()
			if first != tt.wantFirst || last != tt.wantLast || db.deletes != tt.calls {
				t.Errorf("got entries %d to %d after %d calls; want %d to %d after %d", first, last, db.deletes, tt.wantFirst, tt.wantLast, tt.calls)
			}
		})
	}
}

type countingStore struct {
	*raft.InmemStore
	deletes int
}

func (c *countingStore) DeleteRange(first, last uint64) error {
	c.deletes++
	return c.InmemStore.DeleteRange(first, last)
}

func TestCutOfTheLog(t *testing.T) {
	for _, tt := range []struct {
		name                  string
		snapshot, applied     uint64
		first, last, wantLast uint64
		refused, stops        bool
	}{
		{"the end, not executed", 0, 6, 7, 10, 6, false, false},
		{"the end, some of it executed", 0, 7, 7, 10, 10, true, true},
		{"the oldest", 0, 10, 1, 5, 10, false, false},
		{"the oldest, in the snapshot", 7, 10, 1, 5, 10, false, false},
		{"all, in the snapshot", 10, 10, 1, 10, 0, false, false},
		{"all, in a snapshot of more", 12, 12, 1, 10, 0, false, false},
		{"more than there is", 0, 6, 7, 12, 6, false, false},
		{"the end, after the snapshot", 5, 5, 6, 10, 5, false, false},
		{"the end, executed after the snapshot", 5, 6, 6, 10, 10, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			node := &testStorageNode{applied: tt.applied}
			e := newLogStore(raft.NewInmemStore(), &Config{}, node)
			e.snapshotIndex.Store(tt.snapshot)
			for i := range uint64(10) {
				if err := e.StoreLog(&raft.Log{Index: i + 1}); err != nil {
					t.Fatal(err)
				}
			}
			err := e.DeleteRange(tt.first, tt.last)
			if last, _ := e.LastIndex(); (err != nil) != tt.refused || (len(node.failed) > 0) != tt.stops || last != tt.wantLast {
				t.Errorf("got error %v, failures %v, last index %d; want refused %v, stops %v, %d", err, node.failed, last, tt.refused, tt.stops, tt.wantLast)
			}
		})
	}
}

func TestNewestSnapshotIsKnown(t *testing.T) {
	for _, kind := range []string{storeBolt, storeMemory} {
		dir := t.TempDir()
		s := openTestStorage(t, kind, dir)
		if got := s.log.snapshotIndex.Load(); got != 0 {
			t.Errorf("%s: got %v; want none", kind, got)
		}
		writeSnapshot(t, s.snapshots, 5, framed("five"))
		if err := newSnapshot(t, s.snapshots, 6, "no snapshot").Cancel(); err != nil || s.log.snapshotIndex.Load() != 5 {
			t.Errorf("%s: got %v, error %v; want entry 5", kind, s.log.snapshotIndex.Load(), err)
		}
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
		if s = openTestStorage(t, kind, dir); kind == storeBolt && s.log.snapshotIndex.Load() != 5 {
			t.Errorf("opened again: got %v; want entry 5", s.log.snapshotIndex.Load())
		}
	}
}

// alteredStore is a database that another value or entry is read from than was written, or that panics.
type alteredStore struct {
	*raft.InmemStore
	alter func(*raft.Log)
}

func (a alteredStore) GetLog(index uint64, l *raft.Log) error {
	err := a.InmemStore.GetLog(index, l)
	a.alter(l)
	return err
}

func (a alteredStore) Get(key []byte) ([]byte, error) {
	b, err := a.InmemStore.Get(key)
	if len(b) > 0 {
		b = bytes.Clone(b)
		b[0] ^= 1
	}
	return b, err
}

func TestAlteredDataStopsTheNode(t *testing.T) {
	node := &testStorageNode{}
	store := &alteredStore{InmemStore: raft.NewInmemStore()}
	d := newDiskStore(store, "raft.db", nil, newMetrics(), node)
	stored := &raft.Log{Index: 3, Term: 1, Type: raft.LogCommand, Data: encodeEntry(time.Now(), [][]byte{[]byte("three")})}
	if err := errors.Join(d.StoreLog(stored), d.SetUint64([]byte("n"), 5), d.Set([]byte("k"), []byte("v"))); err != nil {
		t.Fatal(err)
	}
	getLog := func(alter func(*raft.Log)) func() error {
		return func() error { store.alter = alter; return d.GetLog(3, new(raft.Log)) }
	}
	for name, call := range map[string]func() error{
		"index":   getLog(func(l *raft.Log) { l.Index++ }),
		"data":    getLog(func(l *raft.Log) { l.Data = append(bytes.Clone(l.Data), 0) }),
		"version": getLog(func(l *raft.Log) { l.Data = slices.Concat([]byte{9}, l.Data[1:]) }),
		"no data": getLog(func(l *raft.Log) { l.Data = nil }),
		"a panic": getLog(func(*raft.Log) { panic("page 7: unexpected type") }),
		"number":  func() error { _, err := d.GetUint64([]byte("n")); return err },
		"value":   func() error { _, err := d.Get([]byte("k")); return err },
	} {
		node.failed = nil
		err := call()
		if err == nil || len(node.failed) != 1 || !strings.Contains(node.failed[0].Error(), "raft.db is damaged (") {
			t.Errorf("%s: got error %v, failures %v; want one of each that says that raft.db is damaged", name, err, node.failed)
		}
	}
	node.failed = nil
	var got raft.Log
	if err := getLog(func(*raft.Log) {})(); err != nil || d.GetLog(3, &got) != nil || !bytes.Equal(got.Data, stored.Data) || len(node.failed) > 0 {
		t.Errorf("got %+v, error %v, failures %v; want the entry as it was", got, err, node.failed)
	}
}
