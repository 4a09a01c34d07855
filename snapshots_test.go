package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const stateName = "state.bin" // of the state in a snapshot's directory: raft's file store names it so

// framed returns a snapshot of no commands, with that state.
func framed(state string) string { return framedAt(0, state) }

func framedAt(index uint64, state string) string {
	var b bytes.Buffer
	captured := &snapshot{index: index, write: func(w io.Writer) error { _, err := io.WriteString(w, state); return err }}
	if err := captured.writeTo(&b); err != nil {
		panic(err) // a bytes.Buffer takes everything
	}
	return b.String()
}

// newSnapshot creates a snapshot with some bytes, and does not close it.
func newSnapshot(t *testing.T, store raft.SnapshotStore, index uint64, data string) raft.SnapshotSink {
	t.Helper()
	members := raft.Configuration{Servers: []raft.Server{{ID: "node1", Address: "node1"}}}
	_, transport := raft.NewInmemTransport("node1")
	sink, err := store.Create(raft.SnapshotVersionMax, index, 2, members, 1, transport)
	if err != nil {
		t.Fatalf("create a snapshot: %v", err)
	}
	if n, err := io.WriteString(sink, data); err != nil || n != len(data) {
		t.Fatalf("got %d bytes written, error %v; want %d and none", n, err, len(data))
	}
	return sink
}

func writeSnapshot(t *testing.T, store raft.SnapshotStore, index uint64, data string) (id string) {
	t.Helper()
	sink := newSnapshot(t, store, index, data)
	if err := sink.Close(); err != nil {
		t.Fatalf("close a snapshot: %v", err)
	}
	return sink.ID()
}

// readSnapshots returns the index and data of all that store lists.
func readSnapshots(t *testing.T, store raft.SnapshotStore) (all []string) {
	t.Helper()
	metas, err := store.List()
	if err != nil {
		t.Fatalf("list snapshots: %v", err)
	}
	for _, listed := range metas {
		meta, source, err := store.Open(listed.ID)
		if err != nil {
			t.Fatalf("open snapshot %q: %v", listed.ID, err)
		}
		data, err := io.ReadAll(source)
		if err != nil || source.Close() != nil {
			t.Fatalf("read snapshot %q: %v", listed.ID, err)
		}
		if meta.Size != int64(len(data)) || meta.ID != listed.ID {
			t.Errorf("got meta %+v of %d bytes listed as %q", meta, len(data), listed.ID)
		}
		all = append(all, fmt.Sprintf("%d: %s", meta.Index, data))
	}
	return all
}

func TestMemorySnapshots(t *testing.T) {
	check := func(t *testing.T, store raft.SnapshotStore, want ...string) {
		t.Helper()
		if got := readSnapshots(t, store); !reflect.DeepEqual(got, want) {
			t.Errorf("got snapshots %q; want %q", got, want)
		}
	}
	t.Run("none at first", func(t *testing.T) {
		store := &memorySnapshots{}
		check(t, store)
		if _, _, err := store.Open("1-1-1"); err == nil {
			t.Error("open of what is not there: got no error; want one")
		}
	})
	t.Run("not there before it is closed", func(t *testing.T) {
		store := &memorySnapshots{}
		sink := newSnapshot(t, store, 5, "five")
		check(t, store)
		if _, _, err := store.Open(sink.ID()); err == nil {
			t.Error("open before close: got no error; want one")
		}
		if err := sink.Close(); err != nil {
			t.Fatal(err)
		}
		check(t, store, "5: five")
		next := newSnapshot(t, store, 6, "six")
		check(t, store, "5: five")
		if err := next.Close(); err != nil {
			t.Fatal(err)
		}
		check(t, store, "6: six")
		if _, _, err := store.Open(sink.ID()); err == nil {
			t.Error("open of a former snapshot: got no error; want one")
		}
	})
	t.Run("canceled, which leaves the former", func(t *testing.T) {
		store := &memorySnapshots{}
		writeSnapshot(t, store, 5, "five")
		if err := newSnapshot(t, store, 6, "half of si").Cancel(); err != nil {
			t.Fatal(err)
		}
		check(t, store, "5: five")
	})
	t.Run("read on while a newer one comes", func(t *testing.T) {
		store := &memorySnapshots{}
		_, source, err := store.Open(writeSnapshot(t, store, 5, "five"))
		if err != nil {
			t.Fatal(err)
		}
		writeSnapshot(t, store, 6, "six")
		if data, err := io.ReadAll(source); err != nil || string(data) != "five" {
			t.Errorf("got %q, error %v; want five and none", data, err)
		}
	})
	t.Run("with what raft needs to know", func(t *testing.T) {
		store := &memorySnapshots{}
		id := writeSnapshot(t, store, 5, "five")
		metas, err := store.List()
		if err != nil || len(metas) != 1 {
			t.Fatalf("got %d snapshots, error %v; want 1 and none", len(metas), err)
		}
		want := &raft.SnapshotMeta{
			Version: raft.SnapshotVersionMax, ID: id, Index: 5, Term: 2, ConfigurationIndex: 1, Size: 4,
			Configuration: raft.Configuration{Servers: []raft.Server{{ID: "node1", Address: "node1"}}},
		}
		if diff := cmp.Diff(want, metas[0]); diff != "" {
			t.Errorf("meta differs (-want +got):\n%s", diff)
		}
		metas[0].Index = 99
		if got, err := store.List(); err != nil || got[0].Index != 5 {
			t.Errorf("got index %d, error %v; want 5: what List returns is a copy", got[0].Index, err)
		}
	})
}

// A node takes a snapshot of its own while the leader's, which is newer, arrives and is installed.
func TestOvertakenSnapshotIsNotPublished(t *testing.T) {
	for _, kind := range []string{storeBolt, storeMemory} {
		st := openTestStorage(t, kind, t.TempDir())
		own := newSnapshot(t, st.snapshots, 4, framed("the state of four"))
		writeSnapshot(t, st.snapshots, 9, framed("the state of nine"))
		if err := own.Close(); !errors.Is(err, errNewerSnapshot) {
			t.Errorf("%s: got %v; want %v", kind, err, errNewerSnapshot)
		}
		if newest := st.log.snapshotIndex.Load(); newest != 9 {
			t.Errorf("%s: got %d for the newest index; want 9", kind, newest)
		}
		if got := readSnapshots(t, st.snapshots); len(got) != 1 {
			t.Errorf("%s: got %q; want the state of nine alone", kind, got)
		}
	}
}

// The newest snapshot is never passed over for an older one, and never restored or sent on otherwise than it was written:
// either the node does not start, or it stops when it opens the snapshot. Nothing is deleted.
func TestDamagedNewestSnapshotStopsTheNode(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTestStorage(t, storeBolt, dir)
	writeSnapshot(t, s.snapshots, 5, framed("the state of five"))
	id := writeSnapshot(t, s.snapshots, 10, framed("the state of ten"))
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	newest := filepath.Join(dir, snapshotsDir, id)
	read := func() error {
		store, err := openSnapshotFiles(dir, hclog.NewNullLogger())
		if err != nil {
			return err
		}
		node := &testStorageNode{}
		files := newTestSnapshots(t, store, filepath.Join(dir, snapshotsDir), nil, node)
		list, err := files.List()
		if err != nil || len(list) != 2 || list[0].ID != id {
			t.Errorf("got %v, error %v; want two snapshots, %s first", list, err, id)
			return err
		}
		_, source, err := files.Open(id)
		if err != nil {
			return errors.Join(append(node.failed, err)...)
		}
		return errors.Join(append(node.failed, source.Close())...)
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{metaName, stateName} {
		path := filepath.Join(newest, name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		altered := map[string][]byte{"": nil, "half of it": good[:len(good)/2], "garbage": bytes.Repeat([]byte("x"), len(good))}
		if name == metaName {
			altered["another term"] = bytes.Replace(good, []byte(`"Term":2`), []byte(`"Term":3`), 1)
			altered["another index"] = bytes.Replace(good, []byte(`"Index":10`), []byte(`"Index":11`), 1)
		}
		for i := 0; name == stateName && i < len(good); i++ { // it has a checksum over every byte
			altered[fmt.Sprint("flipped at ", i)] = slices.Concat(good[:i], []byte{good[i] ^ 0x10}, good[i+1:])
		}
		for what, b := range altered {
			if bytes.Equal(b, good) {
				t.Fatalf("%s, %s: it is not altered", name, what)
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := read(); err == nil || !strings.Contains(err.Error(), newest+" is damaged (") {
				t.Errorf("%s, %s: got error %v; want one that says that %s is damaged", name, what, err, newest)
			}
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := read(); err != nil {
		t.Errorf("got error %v with the files as they were; want none", err)
	}
}

// Whatever is altered in the newest snapshot's description counts, while the node runs and when it starts. What is recorded of
// another, which is gone, does not count.
func TestDescriptionOfASnapshotIsAltered(t *testing.T) {
	dir := t.TempDir()
	node := &testStorageNode{}
	cfg := &Config{KVStore: storeBolt, StateDir: dir}
	s, err := openStorage(cfg, hclog.NewNullLogger(), newMetrics(), node)
	if err != nil {
		t.Fatal(err)
	}
	writeSnapshot(t, s.snapshots, 5, framed("five"))
	id := writeSnapshot(t, s.snapshots, 10, framed("ten"))
	path := filepath.Join(dir, snapshotsDir, id, metaName)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	described, err := s.snapshots.List()
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		write(slices.Concat(good[:i], []byte{good[i] ^ 1}, good[i+1:]))
		node.failed = nil
		list, err := s.snapshots.List()
		if err == nil && cmp.Equal(list, described) { // the last bits of base64, for example
			continue
		}
		if err == nil || len(node.failed) != 1 || !strings.Contains(err.Error(), id+" is damaged (") {
			t.Fatalf("byte %d: got error %v and %v; want the process stopped because %s is damaged", i, err, node.failed, id)
		}
	}
	write(bytes.Replace(good, []byte(`"Suffrage":0`), []byte(`"Suffrage":1`), 1))
	node.failed = nil
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.snapshots.List(); !errors.Is(err, errClosed) || len(node.failed) != 0 {
		t.Errorf("after close: got %v, failures %v; want %v and none of it", err, node.failed, errClosed)
	}
	if _, err := openStorage(cfg, hclog.NewNullLogger(), newMetrics(), node); err == nil {
		t.Error("started with another configuration; want an error")
	}
	write(good)
	s, err = openStorage(cfg, hclog.NewNullLogger(), newMetrics(), &testStorageNode{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.disk.Set(keySnapshotMeta, []byte("2-9-1795000000000 sum")), s.close()); err != nil {
		t.Fatal(err)
	}
	s, err = openStorage(cfg, hclog.NewNullLogger(), newMetrics(), &testStorageNode{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
}

// What the node does not need does not keep it from starting: older snapshots that are damaged, of which a crash may have
// left a part, and what a crash has left half written, which goes.
func TestOnlyTheNewestSnapshotIsNeeded(t *testing.T) {
	t.Parallel()
	for _, damage := range []func(old string) error{
		func(old string) error { return os.Remove(filepath.Join(old, metaName)) },
		func(old string) error { return os.Remove(filepath.Join(old, stateName)) },
		func(old string) error { return os.WriteFile(filepath.Join(old, metaName), []byte("{"), 0o600) },
		func(old string) error { return os.WriteFile(filepath.Join(old, stateName), []byte("x"), 0o600) },
	} {
		dir := t.TempDir()
		s := openTestStorage(t, storeBolt, dir)
		old := filepath.Join(dir, snapshotsDir, writeSnapshot(t, s.snapshots, 9, framed("nine")))
		id := writeSnapshot(t, s.snapshots, 10, framed("ten")) // newer by number, not by name
		half := filepath.Join(dir, snapshotsDir, "2-11-1700000000000"+tmpSuffix)
		if err := errors.Join(s.close(), damage(old), os.Mkdir(half, 0o700)); err != nil {
			t.Fatal(err)
		}
		s = openTestStorage(t, storeBolt, dir)
		list, err := s.snapshots.List()
		if err != nil || len(list) == 0 || list[0].ID != id || s.log.snapshotIndex.Load() != 10 {
			t.Errorf("got %v, newest %d, error %v; want %s first", list, s.log.snapshotIndex.Load(), err, id)
		}
		if _, source, err := s.snapshots.Open(id); err != nil || source.Close() != nil {
			t.Errorf("got error %v; want the newest snapshot", err)
		}
		if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v for what a crash left half written; want it gone", err)
		}
	}
}

// Three would take three times the state's size on the disk.
func TestOlderSnapshotGoesBeforeAThirdIsWritten(t *testing.T) {
	dir := t.TempDir()
	s := openTestStorage(t, storeBolt, dir)
	writeSnapshot(t, s.snapshots, 9, framed("nine"))
	newest := writeSnapshot(t, s.snapshots, 10, framed("ten"))
	sink := newSnapshot(t, s.snapshots, 11, framed("eleven"))
	defer func() { _ = sink.Cancel() }()
	entries, err := os.ReadDir(filepath.Join(dir, snapshotsDir))
	if err != nil || len(entries) != 2 || entries[0].Name() != newest {
		t.Errorf("got %v, %v; want %s, and the one that is being written", entries, err, newest)
	}
}

// Raft only logs that a snapshot could not be written, and goes on.
func TestSnapshotThatCannotBeWrittenStopsTheNode(t *testing.T) {
	dir := t.TempDir()
	store, err := openSnapshotFiles(dir, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	node := &testStorageNode{}
	files := newTestSnapshots(t, store, filepath.Join(dir, snapshotsDir), nil, node)
	sink := newSnapshot(t, files, 5, framed("five"))
	if err := os.RemoveAll(filepath.Join(dir, snapshotsDir)); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err == nil || len(node.failed) != 1 {
		t.Errorf("complete: got error %v, failures %v; want one of each", err, node.failed)
	}
	if err := os.WriteFile(filepath.Join(dir, snapshotsDir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := files.Create(raft.SnapshotVersionMax, 6, 2, raft.Configuration{}, 1, nil); err == nil || len(node.failed) != 2 {
		t.Errorf("begin: got error %v, failures %v; want two failures", err, node.failed)
	}
	if _, err := files.List(); err == nil || len(node.failed) != 3 {
		t.Errorf("list: got error %v, failures %v; want three failures", err, node.failed)
	}
}
