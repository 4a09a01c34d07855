package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	watchTick  = 250 * time.Millisecond
	stuckAfter = 5 * time.Second  // a disk that has not answered for so long hangs
	lostAfter  = 15 * time.Second // a short call that takes so long hangs, even if the disk answers others

	stuckTicks = int(stuckAfter / watchTick)
	lostTicks  = int(lostAfter / watchTick)
	noLimit    = math.MaxInt // for a call that may have a lot to do
)

// watchdog ends the process when its disk hangs. A call that does not return is as bad as one that fails, and nothing
// can interrupt it. When the storage is open every call to the disk is made through watch.
//
// Two things look like a disk that hangs and are none. In both the watchdog must wait:
//   - The process is paused, or gets no processor time. So the watchdog looks at no clock: it counts ticks, and in each
//     it sleeps in a system call. A tick shows that goroutines that return from the kernel get to run.
//   - The call has a lot to do, such as reading a large snapshot. So before the watchdog ends the process it writes to
//     the disk itself (the probe). If that returns, the disk works.
//
// A nil watchdog watches nothing.
type watchdog struct {
	probe func() error // writes a little to the disk. It matters that it returns, not what
	tick  time.Duration
	fail  func(error) // called once, with the reason

	stopped atomic.Bool

	mu         sync.Mutex // guards what follows
	calls      map[*diskCall]struct{}
	probing    bool // the probe is running
	sinceProbe int  // ticks since the probe began or, if it is not running, since it returned
}

// diskCall is a call to the disk that is running.
type diskCall struct {
	op    string // names it in messages
	limit int    // ticks after which it hangs, even if the disk answers others
	ticks int    // since it began
}

// newWatchdog starts a watchdog, which stop ends.
func newWatchdog(probe func() error, tick time.Duration, fail func(error)) *watchdog {
	w := &watchdog{probe: probe, tick: tick, fail: fail, calls: make(map[*diskCall]struct{})}
	go w.run()
	return w
}

// diskProbe returns a probe that writes to the disk that dir is on.
func diskProbe(dir string) func() error {
	path := filepath.Join(dir, "probe"+tmpSuffix)
	return func() error {
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		_, err = file.WriteString("x")
		return errors.Join(err, file.Sync(), file.Close(), os.Remove(path))
	}
}

// watch makes a call to the disk. The op names it in messages. After limit ticks the call counts as hanging even if the
// probe returns.
func (w *watchdog) watch(op string, limit int, call func() error) error {
	if w == nil {
		return call()
	}
	running := &diskCall{op: op, limit: limit}
	w.mu.Lock()
	w.calls[running] = struct{}{}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.calls, running)
		w.mu.Unlock()
	}()
	return call()
}

// run counts ticks until stop is called or the disk hangs. It makes no call to the disk itself.
func (w *watchdog) run() {
	for !w.stopped.Load() {
		for sleep := w.tick; sleep > 0; {
			if _, err := unix.Poll(nil, int(sleep.Milliseconds())); err == nil {
				break // else a signal interrupted it
			}
		}
		if err := w.countTick(); err != nil {
			w.fail(err)
			return
		}
	}
}

// countTick counts a tick. When a call has been running for half of stuckTicks it starts the probe. When all of them
// are over and neither has returned, it returns an error.
func (w *watchdog) countTick() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sinceProbe++
	for call := range w.calls {
		call.ticks++
		overdue := call.ticks >= stuckTicks/2 && w.sinceProbe >= stuckTicks/2
		switch {
		case overdue && w.probing && call.ticks >= stuckTicks:
			return fmt.Errorf("storage: %s has not returned for %v, nor has a small write: the disk hangs",
				call.op, stuckAfter)
		case call.ticks >= call.limit:
			return fmt.Errorf("storage: %s has not returned for %v, though small writes do: the disk hangs in part",
				call.op, lostAfter)
		case overdue && !w.probing:
			w.probing, w.sinceProbe = true, 0
			go w.runProbe()
		}
	}
	return nil
}

// runProbe ends when the disk answers.
func (w *watchdog) runProbe() {
	_ = w.probe() // an error is an answer, too
	w.mu.Lock()
	defer w.mu.Unlock()
	w.probing, w.sinceProbe = false, 0
}

// stop ends the watchdog's goroutine, at its next tick.
func (w *watchdog) stop() { w.stopped.Store(true) }
