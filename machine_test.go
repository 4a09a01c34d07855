package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// testTime is when commands of these tests are taken, unless they say otherwise.
var testTime = time.UnixMicro(1_700_000_000_000_000)

func TestEntryRoundTrip(t *testing.T) {
	tests := []struct {
		name     string
		at       time.Time
		commands [][]byte
	}{
		{"no commands", testTime, nil},
		{"an empty command", testTime, [][]byte{{}}},
		{"one command", testTime, [][]byte{[]byte("set")}},
		{"many commands, some of them empty", testTime, [][]byte{[]byte("a"), {}, []byte("bb"), {}, []byte("a")}},
		{"a command whose length takes two bytes", testTime, [][]byte{bytes.Repeat([]byte{7}, 128), []byte("next")}},
		{"a command of a mebibyte", testTime, [][]byte{bytes.Repeat([]byte{0xff}, 1<<20), []byte("next")}},
		{"a clock that begins in 1970", time.UnixMicro(0), [][]byte{[]byte("a")}},
		{"a clock before 1970", time.UnixMicro(-1), [][]byte{[]byte("a")}},
		{"a clock far in the future", time.UnixMicro(1 << 62), [][]byte{[]byte("a")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			at, commands, err := decodeEntry(encodeEntry(tt.at, tt.commands))
			if err != nil {
				t.Fatalf("got error %v; want none", err)
			}
			if !at.Equal(tt.at) {
				t.Errorf("got time %v; want %v", at, tt.at)
			}
			if !slices.EqualFunc(commands, tt.commands, bytes.Equal) {
				t.Errorf("got commands %.100q; want %.100q", commands, tt.commands)
			}
		})
	}
}

func TestEntryOfUnknownVersion(t *testing.T) {
	entry := encodeEntry(testTime, [][]byte{[]byte("a")})
	for _, version := range []byte{0, entryVersion + 1, 255} {
		entry[0] = version
		want := fmt.Sprintf("entry version %d", version)
		if _, _, err := decodeEntry(entry); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v; want one with %q", err, want)
		}
	}
}

func TestDamagedEntryIsAnError(t *testing.T) {
	entry := encodeEntry(testTime, [][]byte{[]byte("first"), {}, bytes.Repeat([]byte("x"), 200), []byte("last")})
	for size := range entry {
		if _, _, err := decodeEntry(entry[:size]); err == nil {
			t.Errorf("cut to %d of %d bytes: got no error; want one", size, len(entry))
		}
	}
	for i := range entry {
		for flip := 1; flip < 256; flip++ {
			damaged := bytes.Clone(entry)
			damaged[i] ^= byte(flip)
			if _, _, err := decodeEntry(damaged); err == nil {
				t.Errorf("byte %d flipped by %#x: got no error; want one", i, flip)
			}
		}
	}
	if _, _, err := decodeEntry(append(bytes.Clone(entry), 0)); err == nil {
		t.Error("a byte too many: got no error; want one")
	}
}

// A checksum only says that the bytes are those that were written; what a mistaken writer made of them must not panic.
func TestEntryWithBadLengthsIsAnError(t *testing.T) {
	tests := []struct {
		name     string
		commands []byte
	}{
		{"longer than the entry", []byte{5, 'a'}},
		{"longer than any entry", binary.AppendUvarint(nil, 1<<63)},
		{"a length of more than 64 bits", bytes.Repeat([]byte{0xff}, 11)},
		{"a length that does not end", []byte{0x80}},
		{"a good command before it", []byte{1, 'a', 2, 'b'}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if commands, err := decodeCommands(tt.commands); err == nil {
				t.Errorf("got commands %q; want an error", commands)
			}
		})
	}
}

// bufferSink is a raft.SnapshotSink in memory. It takes room bytes before its writes fail.
type bufferSink struct {
	bytes.Buffer
	room             int
	closed, canceled bool
}

var errSinkFull = errors.New("no space left on device")

func (s *bufferSink) Write(p []byte) (int, error) {
	if s.room -= len(p); s.room < 0 {
		return 0, errSinkFull
	}
	return s.Buffer.Write(p)
}

func (s *bufferSink) ID() string    { return "test" }
func (s *bufferSink) Close() error  { s.closed = true; return nil }
func (s *bufferSink) Cancel() error { s.canceled = true; return nil }

// persist returns the bytes of a captured snapshot.
func persist(t *testing.T, captured raft.FSMSnapshot) []byte {
	t.Helper()
	sink := &bufferSink{room: 1 << 30}
	if err := captured.Persist(sink); err != nil {
		t.Fatalf("persist: %v", err)
	}
	captured.Release()
	if !sink.closed || sink.canceled {
		t.Fatalf("got closed %v, canceled %v; want true, false", sink.closed, sink.canceled)
	}
	return sink.Bytes()
}

// snapshotOf returns a snapshot of r's present state.
func snapshotOf(t *testing.T, r *replica) []byte {
	t.Helper()
	captured, err := r.Snapshot()
	if err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	return persist(t, captured)
}

func restoreFrom(r *replica, snapshot []byte) error {
	return r.restore(bytes.NewReader(snapshot))
}

// newTestReplica returns a replica whose failure fails the test.
func newTestReplica(t *testing.T, machine StateMachine) *replica {
	t.Helper()
	return &replica{machine: machine, metrics: newMetrics(), fail: func(err error) { t.Errorf("the replica failed: %v", err) }}
}

// applySet has r execute one entry with one command that sets all pairs.
func applySet(r *replica, index uint64, pairs ...testPair) {
	set := testSet(pairs...)
	r.Apply(&raft.Log{Index: index, Data: encodeEntry(testTime, [][]byte{set})})
}

// blobMachine is a state machine that believes whatever it reads, so only the framing finds damage.
func (*blobMachine) Len() int { return 0 }

type blobMachine struct {
	state []byte
}

func (m *blobMachine) Apply(command []byte, _ time.Time) ([]byte, error) {
	m.state = append(m.state, command...)
	return nil, nil
}

func (m *blobMachine) Snapshot() func(io.Writer) error {
	state := bytes.Clone(m.state)
	return func(w io.Writer) error {
		_, err := w.Write(state)
		return err
	}
}

func (m *blobMachine) Restore(r io.Reader) (func(), error) {
	state, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return func() { m.state = state }, nil
}

// lazyMachine reads only the first bytes of a snapshot.
type lazyMachine struct {
	blobMachine
	reads int
}

func (m *lazyMachine) Restore(r io.Reader) (func(), error) {
	state := make([]byte, m.reads)
	_, err := io.ReadFull(r, state)
	return func() { m.state = state }, err
}

func TestSnapshotRoundTrip(t *testing.T) {
	tests := []struct {
		name    string
		entries [][]testPair
	}{
		{"an empty state", nil},
		{"one key", [][]testPair{{{"k", "1"}}}},
		{"an empty value", [][]testPair{{{"k", ""}}}},
		{"keys and values that are not text", [][]testPair{{{"\x00", "\xff\xfe"}, {"\xff", "\x00"}}}},
		{"keys set by several entries", [][]testPair{{{"b", "1"}, {"a", "2"}}, {{"c", "3"}}, {{"a", "4"}}}},
		{"a value as long as the buffer", [][]testPair{{{"k", strings.Repeat("v", snapshotBuffer)}}}},
		{"a value longer than many buffers", [][]testPair{{{"j", "1"}, {"k", strings.Repeat("v", 5*snapshotBuffer+1)}, {"l", "1"}}}},
		{"the longest value", [][]testPair{{{"k", strings.Repeat("v", maxBodyBytes)}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			machine := newTestMachine()
			source := newTestReplica(t, machine)
			for i, pairs := range tt.entries {
				applySet(source, uint64(i)+3, pairs...)
			}
			restored := newTestMachine()
			target := newTestReplica(t, restored)
			applySet(target, 1, testPair{"of the state before", "1"})
			if err := restoreFrom(target, snapshotOf(t, source)); err != nil {
				t.Fatalf("restore: %v", err)
			}
			if diff := cmp.Diff(machine, restored, cmp.AllowUnexported(testMachine{})); diff != "" {
				t.Errorf("states differ (-want +got):\n%s", diff)
			}
			if got, want := target.applied.load(), max(1, source.applied.load()); got != want {
				t.Errorf("got applied index %d; want %d", got, want)
			}
		})
	}
}

// damages calls try with every damaged form of good: cut after each byte, each byte altered, and more bytes behind it.
// Only the bytes for which at says so are cut or altered.
func damages(good []byte, at func(int) bool, try func(name string, damaged []byte)) {
	for i := range good {
		if !at(i) {
			continue
		}
		try(fmt.Sprintf("cut to %d of %d bytes", i, len(good)), good[:i])
		for _, flip := range []byte{0x01, 0x80, 0xff} {
			damaged := bytes.Clone(good)
			damaged[i] ^= flip
			try(fmt.Sprintf("byte %d of %d flipped by %#x", i, len(good), flip), damaged)
		}
	}
	try("a byte behind it", append(bytes.Clone(good), 0))
	try("the same again behind it", append(bytes.Clone(good), good...))
}

func TestDamagedSnapshotLeavesTheStateAlone(t *testing.T) {
	everywhere := func(int) bool { return true }
	// More than the buffer holds at once.
	second := snapshotBuffer
	tests := []struct {
		name  string
		pairs []testPair
		at    func(int) bool
	}{
		{"an empty state", nil, everywhere},
		{"less than the buffer", []testPair{{"a", "1"}, {"b", `{"x":[1,2,3]}`}, {"c", ""}}, everywhere},
		{
			"more than the buffer, damaged around its ends",
			[]testPair{{"a", strings.Repeat("v", snapshotBuffer)}, {"b", "1"}},
			func(i int) bool { return i < 64 || i >= second-32 },
		},
	}
	machines := []struct {
		name string
		make func() StateMachine
	}{
		{"the map", func() StateMachine { return newTestMachine() }},
		{"a machine that believes all it reads", func() StateMachine { return new(blobMachine) }},
	}
	for _, machine := range machines {
		for _, tt := range tests {
			t.Run(machine.name+"/"+tt.name, func(t *testing.T) {
				source := newTestReplica(t, machine.make())
				if tt.pairs != nil {
					applySet(source, 9, tt.pairs...)
				}
				target := newTestReplica(t, machine.make())
				applySet(target, 5, testPair{"kept", "1"}, testPair{"a", "kept as well"})
				before := snapshotOf(t, target)
				damages(snapshotOf(t, source), tt.at, func(name string, damaged []byte) {
					if err := restoreFrom(target, damaged); err == nil {
						t.Fatalf("%s: got no error; want one", name)
					}
					if after := snapshotOf(t, target); !bytes.Equal(after, before) {
						t.Fatalf("%s: got state %q; want %q as before", name, after, before)
					}
				})
			})
		}
	}
}

func TestStateMachineMustReadItsSnapshotToTheEnd(t *testing.T) {
	const size = snapshotBuffer + 10
	snapshot := snapshotOf(t, newTestReplica(t, &blobMachine{state: make([]byte, size)}))
	for _, tt := range []struct {
		name  string
		reads int
		fails bool
	}{
		{"nothing read", 0, true},
		{"a byte read", 1, true},
		{"more than the end left", snapshotBuffer, true},
		{"a byte left", size - 1, true},
		{"all read, without asking for more", size, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			machine := &lazyMachine{reads: tt.reads}
			machine.state = []byte("before")
			err := restoreFrom(newTestReplica(t, machine), snapshot)
			if (err != nil) != tt.fails {
				t.Errorf("got error %v; want one: %v", err, tt.fails)
			}
			if tt.fails && string(machine.state) != "before" {
				t.Errorf("got state %q; want it untouched", machine.state)
			}
		})
	}
	t.Run("all read of a snapshot that lost its end", func(t *testing.T) {
		for cut := 1; cut <= 8; cut++ {
			if err := restoreFrom(newTestReplica(t, &lazyMachine{reads: size}), snapshot[:len(snapshot)-cut]); err == nil {
				t.Errorf("%d bytes cut off: got no error; want one", cut)
			}
		}
	})
}

func TestRestoreReturnsTheErrorOfItsSource(t *testing.T) {
	snapshot := snapshotOf(t, newTestReplica(t, &blobMachine{state: make([]byte, 100)}))
	broken := errors.New("input/output error")
	for read := range snapshot {
		source := io.MultiReader(bytes.NewReader(snapshot[:read]), iotest.ErrReader(broken))
		err := newTestReplica(t, new(blobMachine)).restore(source)
		if !errors.Is(err, broken) {
			t.Fatalf("after %d bytes: got error %v; want %v", read, err, broken)
		}
	}
}

func TestPersistCancelsWhatItCouldNotWrite(t *testing.T) {
	machine := newTestMachine()
	r := newTestReplica(t, machine)
	applySet(r, 1, testPair{"a", "1"}, testPair{"b", strings.Repeat("v", snapshotBuffer)})
	for room := range snapshotOf(t, r) {
		if room > 100 && room%997 != 0 { // each place of the same kind a few times is enough
			continue
		}
		captured, err := r.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		sink := &bufferSink{room: room}
		if err := captured.Persist(sink); !errors.Is(err, errSinkFull) || !sink.canceled || sink.closed {
			t.Errorf("room for %d bytes: got error %v, canceled %v, closed %v; want %v, true, false",
				room, err, sink.canceled, sink.closed, errSinkFull)
		}
	}
}

func TestSnapshotCapturesTheStateBeforeLaterCommands(t *testing.T) {
	machine := newTestMachine()
	r := newTestReplica(t, machine)
	key := func(i int) string { return fmt.Sprintf("key%04d", i) }
	for i := range 2000 {
		applySet(r, uint64(i)+1, testPair{key(i), "old"})
	}
	want, wantState := snapshotOf(t, r), machine.clone()
	captured, err := r.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var later sync.WaitGroup
	later.Go(func() {
		for i := range 4000 {
			applySet(r, uint64(i)+2001, testPair{key(i), "new"})
		}
		remove := testCommand{remove: true, pairs: []testPair{{Key: key(7)}}}.encode()
		r.Apply(&raft.Log{Index: 6001, Data: encodeEntry(testTime, [][]byte{remove})})
	})
	during := persist(t, captured)
	later.Wait()
	for name, got := range map[string][]byte{"during the later commands": during, "after them": persist(t, captured)} {
		if !bytes.Equal(got, want) {
			t.Errorf("written %s: got another snapshot than the one captured", name)
		}
	}
	restored := newTestMachine()
	target := newTestReplica(t, restored)
	if err := restoreFrom(target, during); err != nil {
		t.Fatalf("restore: %v", err)
	}
	if diff := cmp.Diff(wantState, restored, cmp.AllowUnexported(testMachine{})); diff != "" {
		t.Errorf("states differ (-want +got):\n%s", diff)
	}
	if got := target.applied.load(); got != 2000 {
		t.Errorf("got applied index %d; want 2000", got)
	}
}

func TestEqualStatesGiveEqualSnapshots(t *testing.T) {
	pairs := make([]testPair, 10_000)
	for i := range pairs {
		pairs[i] = testPair{fmt.Sprint("key", i), fmt.Sprint(i)}
	}
	straight := newTestReplica(t, newTestMachine())
	applySet(straight, 1, testPair{"x", "1"})
	applySet(straight, 2, pairs...)
	want := snapshotOf(t, straight)

	random := rand.New(rand.NewPCG(1, 2))
	for range 3 {
		// The same tags are given out, but the keys come and go in another order.
		shuffled := slices.Clone(pairs)
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		machine := newTestMachine()
		r := newTestReplica(t, machine)
		applySet(r, 1, append(shuffled[:5000:5000], testPair{"x", "1"})...)
		applySet(r, 2, shuffled...)
		if got := snapshotOf(t, r); !bytes.Equal(got, want) {
			t.Error("the keys in another order: got another snapshot; want the same")
		}
	}
	restored := newTestReplica(t, newTestMachine())
	if err := restoreFrom(restored, want); err != nil {
		t.Fatal(err)
	}
	if got := snapshotOf(t, restored); !bytes.Equal(got, want) {
		t.Error("a restored state: got another snapshot; want the same")
	}
}

func TestUnreadableEntryFailsAndIsNotSkipped(t *testing.T) {
	set := testSet(testPair{"k", "2"})
	good := encodeEntry(testTime, [][]byte{set})
	damaged := bytes.Clone(good)
	damaged[len(damaged)-1] ^= 1
	newer := bytes.Clone(good)
	newer[0]++
	unknown := append([]byte{testCommandVersion + 1}, set[1:]...)
	tests := []struct {
		name  string
		entry []byte
		want  string
		state string // of k afterwards
	}{
		{"a damaged entry", damaged, "log entry 8: checksum mismatch", "1"},
		{"an entry of a newer version", newer, "log entry 8: entry version 2", "1"},
		{"an empty entry", nil, "log entry 8: 0 bytes", "1"},
		{"an unreadable command", encodeEntry(testTime, [][]byte{unknown}), "log entry 8, command 0: command version 2", "1"},
		{"an unreadable command before others", encodeEntry(testTime, [][]byte{{}, set}), "log entry 8, command 0: malformed", "1"},
		{"an unreadable command after others", encodeEntry(testTime, [][]byte{set, {}}), "log entry 8, command 1: malformed", "2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var failed []error
			machine := newTestMachine()
			r := &replica{machine: machine, metrics: newMetrics(), fail: func(err error) { failed = append(failed, err) }}
			applySet(r, 7, testPair{"k", "1"})
			result := r.Apply(&raft.Log{Index: 8, Data: tt.entry})
			if len(failed) != 1 || !strings.HasPrefix(failed[0].Error(), tt.want) {
				t.Errorf("got failures %q; want one that begins with %q", failed, tt.want)
			}
			if result != nil {
				t.Errorf("got result %v; want none", result)
			}
			if got := r.applied.load(); got != 7 {
				t.Errorf("got applied index %d; want 7", got)
			}
			if item := machine.items["k"]; item.Value != tt.state {
				t.Errorf("got k = %s; want %s", item.Value, tt.state)
			}
		})
	}
}

// panickingMachine panics whatever it is asked for.
type panickingMachine struct{ *testMachine }

func (panickingMachine) Apply([]byte, time.Time) ([]byte, error) { panic("a nil map") }
func (panickingMachine) Snapshot() func(io.Writer) error         { panic("a nil map") }
func (panickingMachine) Restore(io.Reader) (func(), error)       { panic("a nil map") }

func TestStateMachineThatPanicsStopsTheNode(t *testing.T) {
	var good bytes.Buffer
	if err := (&snapshot{index: 7, write: newTestMachine().Snapshot()}).writeTo(&good); err != nil {
		t.Fatal(err)
	}
	for want, do := range map[string]func(r *replica){
		"log entry 8":        func(r *replica) { r.Apply(&raft.Log{Index: 8, Data: encodeEntry(testTime, [][]byte{{1}})}) },
		"take a snapshot":    func(r *replica) { _, _ = r.Snapshot() },
		"restore a snapshot": func(r *replica) { _ = r.Restore(io.NopCloser(&good)) },
	} {
		var failed []error
		fail := func(err error) { failed = append(failed, err) }
		do(&replica{machine: panickingMachine{newTestMachine()}, metrics: newMetrics(), fail: fail})
		want += ": the state machine panicked: a nil map\ngoroutine"
		if len(failed) != 1 || !strings.HasPrefix(failed[0].Error(), want) {
			t.Errorf("got failures %q; want one that begins with %q", failed, want)
		}
	}
}

func TestApplyReturnsOneResultForEachCommand(t *testing.T) {
	r := newTestReplica(t, newTestMachine())
	set := testSet(testPair{"k", "1"})
	never := testCommand{match: 1, pairs: []testPair{{"k", "2"}}}.encode()
	first := uint64(testTime.UnixMicro())
	for _, tt := range []struct {
		name     string
		commands [][]byte
		want     []uint64
	}{
		{"no commands", nil, nil},
		{"several", [][]byte{set, never, set}, []uint64{first + 1, 0, first + 2}},
		{"one", [][]byte{set}, []uint64{first + 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			results, _ := r.Apply(&raft.Log{Index: 1, Data: encodeEntry(testTime, tt.commands)}).([][]byte)
			var got []uint64
			for _, result := range results {
				got = append(got, binary.BigEndian.Uint64(result))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("results differ (-want +got):\n%s", diff)
			}
		})
	}
}

func TestProgress(t *testing.T) {
	t.Run("only grows", func(t *testing.T) {
		var p progress
		for _, step := range []struct{ to, want uint64 }{{3, 3}, {2, 3}, {0, 3}, {4, 4}} {
			if p.advance(step.to); p.load() != step.want {
				t.Errorf("advanced to %d: got %d; want %d", step.to, p.load(), step.want)
			}
		}
	})
	t.Run("wait for what is reached", func(t *testing.T) {
		var p progress
		p.advance(5)
		ended, end := context.WithCancel(t.Context())
		end()
		for _, want := range []uint64{0, 4, 5} {
			if err := p.wait(ended, want); err != nil {
				t.Errorf("wait for %d at 5: got error %v; want none", want, err)
			}
		}
	})
	t.Run("wait for what comes later", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var p progress
			woken := make(chan error, 3)
			for _, want := range []uint64{2, 3, 3} {
				go func() { woken <- p.wait(t.Context(), want) }()
			}
			for _, step := range []struct {
				to   uint64
				want int // waits that have ended
			}{{0, 0}, {1, 0}, {2, 1}, {2, 1}, {9, 3}} {
				p.advance(step.to)
				synctest.Wait()
				if len(woken) != step.want {
					t.Fatalf("at %d: got %d waits that ended; want %d", step.to, len(woken), step.want)
				}
			}
			for range cap(woken) {
				if err := <-woken; err != nil {
					t.Errorf("got error %v; want none", err)
				}
			}
		})
	})
	t.Run("wait until the context ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var p progress
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			go func() {
				time.Sleep(time.Second)
				p.advance(1) // not enough: it goes on waiting
			}()
			began := time.Now()
			err := p.wait(ctx, 2)
			if waited := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || waited != time.Minute {
				t.Errorf("got %v after %v; want %v after %v", err, waited, context.DeadlineExceeded, time.Minute)
			}
		})
	})
}

// Raft would go on with an older snapshot.
func TestSnapshotThatCannotBeRestoredStopsTheNode(t *testing.T) {
	var failed []error
	r := &replica{machine: new(blobMachine), metrics: newMetrics(), fail: func(err error) { failed = append(failed, err) }}
	if err := r.Restore(io.NopCloser(strings.NewReader(framed("five")[:20]))); err == nil || len(failed) != 1 {
		t.Errorf("got error %v, failures %v; want one of each", err, failed)
	}
}
