package main

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// tickedWatchdog has its ticks counted by the test.
type tickedWatchdog struct {
	*watchdog
	t       *testing.T
	probes  chan chan error // what each probe waits for
	release chan struct{}   // ends the call
}

// hungCall is a watchdog that watches a call that does not come back.
func hungCall(t *testing.T, short bool) *tickedWatchdog {
	t.Helper()
	w := &tickedWatchdog{t: t, probes: make(chan chan error, 1), release: make(chan struct{})}
	w.watchdog = &watchdog{calls: make(map[*diskCall]struct{}), probe: func() error {
		answer := make(chan error)
		w.probes <- answer
		return <-answer
	}}
	w.call(short)
	t.Cleanup(func() { close(w.release) })
	return w
}

func (w *tickedWatchdog) call(short bool) {
	began := make(chan struct{})
	go func() {
		limit := noLimit
		if short {
			limit = lostTicks
		}
		_ = w.watch("this call", limit, func() error { close(began); <-w.release; return nil })
	}()
	<-began
}

// ticks lets n ticks pass, none of which ends the process.
func (w *tickedWatchdog) ticks(n int) {
	w.t.Helper()
	for i := range n {
		if err := w.countTick(); err != nil {
			w.t.Fatalf("got %v at tick %d of %d", err, i+1, n)
		}
	}
}

// probed waits for the probe, and has it come back with an error, or not.
func (w *tickedWatchdog) probed(err error) {
	w.t.Helper()
	<-w.probes <- err
	waitFor(w.t, "the probe to be seen back", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return !w.probing })
}

func TestWatchdogEndsOnlyWhatHangs(t *testing.T) {
	t.Parallel()
	t.Run("nothing answers", func(t *testing.T) {
		t.Parallel()
		w := hungCall(t, false)
		w.call(false) // and another
		w.ticks(stuckTicks/2 - 1)
		if len(w.probes) > 0 {
			t.Error("it probed before half of the time was over")
		}
		w.ticks(1)
		hung := <-w.probes
		w.ticks(stuckTicks/2 - 1)
		for _, want := range []string{"storage: this call ", "the disk hangs"} {
			if err := w.countTick(); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v; want an end with %q", err, want)
			}
		}
		hung <- nil
	})
	t.Run("the call comes back", func(t *testing.T) {
		t.Parallel()
		w := hungCall(t, true)
		w.ticks(stuckTicks - 1)
		w.release <- struct{}{}
		waitFor(t, "the call to end", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.calls) == 0 })
		w.ticks(2 * lostTicks)
		w.call(false) // the probe is out all the while, but this one has its time
		w.ticks(stuckTicks - 1)
		if err := w.countTick(); err == nil {
			t.Error("got no end of the next call, with the probe out all the time")
		}
		<-w.probes <- nil
	})
	for name, err := range map[string]error{"the probe comes back": nil, "with an error": errors.New("disk full")} {
		for _, short := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				w := hungCall(t, short)
				for range lostTicks/stuckTicks*2 - 1 {
					w.ticks(stuckTicks / 2)
					w.probed(err)
				}
				w.ticks(stuckTicks/2 - 1)
				if err := w.countTick(); (err != nil) != short || short && !strings.Contains(err.Error(), "this call") {
					t.Errorf("got %v when a call, short %v, had been under way for %v on a disk that works", err, short, lostAfter)
				}
				if !short {
					w.probed(err)
				}
			})
		}
	}
	t.Run("the disk hangs after it has answered", func(t *testing.T) {
		t.Parallel()
		w := hungCall(t, false)
		for range 5 {
			w.ticks(stuckTicks / 2)
			w.probed(nil)
		}
		w.ticks(stuckTicks - 1)
		if err := w.countTick(); err == nil {
			t.Errorf("got no end %v after the disk had last answered", stuckAfter)
		}
		<-w.probes <- nil
	})
}

// slowDisk is all that is stored, on a disk that hangs until it is told not to.
type slowDisk struct {
	*raft.InmemStore
	raft.SnapshotStore
	io.ReadCloser
	hangs chan struct{}
}

func (d slowDisk) StoreLogs(l []*raft.Log) error {
	<-d.hangs
	return d.InmemStore.StoreLogs(l)
}

func (d slowDisk) DeleteRange(first, last uint64) error {
	<-d.hangs
	return d.InmemStore.DeleteRange(first, last)
}

func (d slowDisk) Create(raft.SnapshotVersion, uint64, uint64, raft.Configuration, uint64, raft.Transport) (
	raft.SnapshotSink, error,
) {
	<-d.hangs
	return d, nil
}
func (d slowDisk) List() ([]*raft.SnapshotMeta, error) { <-d.hangs; return nil, nil }
func (d slowDisk) Open(string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	<-d.hangs
	return new(raft.SnapshotMeta), d, nil
}
func (d slowDisk) Read([]byte) (int, error)  { <-d.hangs; return 0, io.EOF }
func (d slowDisk) Write([]byte) (int, error) { <-d.hangs; return 0, nil }
func (d slowDisk) Close() error              { <-d.hangs; return nil }
func (d slowDisk) Cancel() error             { <-d.hangs; return nil }
func (d slowDisk) ID() string                { return "1-2-3" }

// However the node reaches the disk, it is noticed that the disk hangs; and not that it was slow.
func TestWatchdogSeesEveryWayToTheDisk(t *testing.T) {
	t.Parallel()
	const tick = 20 * time.Millisecond
	ignored := func(_ any, err error) error { return err }
	for name, call := range map[string]func(s *diskStore, f *snapshotStore, d slowDisk) error{
		"store logs":     func(s *diskStore, _ *snapshotStore, _ slowDisk) error { return s.StoreLog(&raft.Log{Index: 1}) },
		"delete logs":    func(s *diskStore, _ *snapshotStore, _ slowDisk) error { return s.DeleteRange(1, 1) },
		"list snapshots": func(_ *diskStore, f *snapshotStore, _ slowDisk) error { _, err := f.List(); return err },
		"read a snapshot": func(_ *diskStore, f *snapshotStore, d slowDisk) error {
			return ignored(io.ReadAll(&snapshotState{d, f}))
		},
		"write a snapshot": func(_ *diskStore, f *snapshotStore, d slowDisk) error {
			return ignored((&snapshotSink{SnapshotSink: d, store: f}).Write(nil))
		},
		"complete a snapshot": func(_ *diskStore, f *snapshotStore, d slowDisk) error {
			return (&snapshotSink{SnapshotSink: d, store: f}).Close()
		},
		"remove a snapshot": func(_ *diskStore, f *snapshotStore, d slowDisk) error {
			return (&snapshotSink{SnapshotSink: d, store: f}).Cancel()
		},
		"open a snapshot": func(_ *diskStore, f *snapshotStore, _ slowDisk) error {
			_, _, err := f.Open("1-2-3")
			return err
		},
		"begin a snapshot": func(_ *diskStore, f *snapshotStore, _ slowDisk) error {
			_, err := f.Create(raft.SnapshotVersionMax, 2, 1, raft.Configuration{}, 1, nil)
			return err
		},
	} {
		for _, hangs := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				d := slowDisk{InmemStore: raft.NewInmemStore(), hangs: make(chan struct{})}
				probe := func() error {
					if hangs {
						<-d.hangs
					}
					return nil
				}
				failed := make(chan error, 1)
				w := newWatchdog(probe, tick, func(err error) { failed <- err })
				defer w.stop()
				done := make(chan error, 1)
				go func() {
					node := &testStorageNode{t: t}
					done <- call(newDiskStore(d, "", w, newMetrics(), node), newTestSnapshots(t, d, t.TempDir(), w, node), d)
				}()
				if hangs {
					if err := <-failed; !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "the disk hangs") {
						t.Errorf("got %v; want an end that names the call", err)
					}
					close(d.hangs)
					if err := <-done; err != nil {
						t.Error(err)
					}
					return
				}
				select {
				case err := <-failed:
					t.Errorf("got %v with a disk that works", err)
				case <-time.After(2 * time.Duration(stuckTicks) * tick):
				}
				close(d.hangs)
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// The probe is on the disk of the state, and leaves nothing there.
func TestDiskProbe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := diskProbe(dir)(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("got %v left, error %v; want nothing", left, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := diskProbe(dir)(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v without the directory; want %v", err, os.ErrNotExist)
	}
}

// The storage that a node opens is watched, and no longer when it is closed.
func TestStorageIsWatched(t *testing.T) {
	t.Parallel()
	s := openTestStorage(t, storeBolt, t.TempDir())
	w := s.disk.watchdog
	if w == nil || s.snapshots.watchdog != w || w.tick != watchTick || w.probe() != nil {
		t.Errorf("got watchdogs %p and %p; want one, that works", w, s.snapshots.watchdog)
	}
	if err := s.close(); err != nil || !w.stopped.Load() {
		t.Errorf("got error %v, stopped %v; want none, true", err, w.stopped.Load())
	}
}
