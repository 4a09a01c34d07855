package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	watchTick  = 250 * time.Millisecond
	stuckAfter = 5 * time.Second  // a disk that has not answered for so long never will, for all we know
	lostAfter  = 15 * time.Second // a brief call that has not come back for so long never will, whatever the disk does

	stuckTicks = int(stuckAfter / watchTick)
	lostTicks  = int(lostAfter / watchTick)
)

// watchdog ends the process when its disk hangs: a call that does not come back is as bad as one that fails, and
// nothing can end it. Every call to the disk is made through it, once the storage is open.
//
// Two things look like a hung disk and are none. One is a process that is paused, or gets no time on the processor. So
// the watchdog counts its own ticks, not the clock's time, and sleeps in a system call: a tick shows that what comes
// back from the kernel gets to run. The other is a call that has much to do, such as to read a large snapshot. So the
// watchdog writes to the disk itself before it takes it for hung.
//
// A nil watchdog watches nothing.
type watchdog struct {
	probe func() error // writes a little to the disk; that it comes back is what counts, with an error or without
	tick  time.Duration
	fail  func(error)

	mu         sync.Mutex // guards what follows
	calls      map[*diskCall]struct{}
	probing    bool // the probe is under way
	sinceProbe int  // ticks since it began or, if it is not under way, since it came back
	stopped    bool
}

// diskCall is a call to the disk that is under way.
type diskCall struct {
	op    string
	brief bool // whatever it does is a little
	ticks int  // since it began
}

// newWatchdog starts a watchdog, which stop ends. It calls fail once, with the reason.
func newWatchdog(probe func() error, tick time.Duration, fail func(error)) *watchdog {
	w := &watchdog{probe: probe, tick: tick, fail: fail, calls: make(map[*diskCall]struct{})}
	go w.run()
	return w
}

// diskProbe returns a probe of the disk that dir is on.
func diskProbe(dir string) func() error {
	path := filepath.Join(dir, "probe"+tmpSuffix)
	return func() error { return errors.Join(writeSynced(path, []byte("x")), os.Remove(path)) }
}

// during makes a call to the disk, which may take as long as it needs while the disk works.
func (w *watchdog) during(op string, f func() error) error {
	return w.watch(&diskCall{op: op}, f)
}

// briefly makes a call to the disk that is brief if the disk works.
func (w *watchdog) briefly(op string, f func() error) error {
	return w.watch(&diskCall{op: op, brief: true}, f)
}

func (w *watchdog) watch(call *diskCall, f func() error) error {
	if w == nil {
		return f()
	}
	w.mu.Lock()
	w.calls[call] = struct{}{}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.calls, call)
		w.mu.Unlock()
	}()
	return f()
}

// run looks once a tick, until stop is called or the disk hangs. It never waits for the disk itself.
func (w *watchdog) run() {
	for {
		for sleep := w.tick; sleep > 0; {
			if _, err := unix.Poll(nil, int(sleep.Milliseconds())); err == nil {
				break // else a signal came
			}
		}
		stopped, err := w.look()
		if err != nil {
			w.fail(err)
		}
		if stopped || err != nil {
			return
		}
	}
}

// look counts a tick. A call that is under way for half the time makes it send the probe; if both are still under way
// when all of it is over, the error says so.
func (w *watchdog) look() (stopped bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sinceProbe++
	for call := range w.calls {
		call.ticks++
		overdue := call.ticks >= stuckTicks/2 && w.sinceProbe >= stuckTicks/2
		switch {
		case overdue && w.probing && call.ticks >= stuckTicks:
			return false, fmt.Errorf("storage: %s has not come back for %v, nor has a small write: the disk hangs",
				call.op, stuckAfter)
		case call.brief && call.ticks >= lostTicks:
			return false, fmt.Errorf("storage: %s has not come back for %v, though small writes do: the disk hangs in part",
				call.op, lostAfter)
		case overdue && !w.probing:
			w.probing, w.sinceProbe = true, 0
			go w.send()
		}
	}
	return w.stopped, nil
}

// send sends the probe. It ends when the disk answers.
func (w *watchdog) send() {
	_ = w.probe() // whatever it says, the disk has answered
	w.mu.Lock()
	defer w.mu.Unlock()
	w.probing, w.sinceProbe = false, 0
}

// stop ends the watchdog's goroutine, at its next tick.
func (w *watchdog) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
}

func writeSynced(path string, b []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(b)
	return errors.Join(err, file.Sync(), file.Close())
}
