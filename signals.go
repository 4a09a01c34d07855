package main

import (
	"os"
	"os/signal"
	"syscall"
	"time"
)

// sameSignal is how long after a signal another is still the same: a terminal and its process manager both send one.
const sameSignal = time.Second

// signals tells what the process is asked to do from outside.
type signals struct {
	stop   chan os.Signal // SIGINT and SIGTERM: the first asks for a graceful stop, the second for an end
	reload chan os.Signal // SIGHUP
}

// notifySignals begins to listen; from then on none of these signals ends the process by itself.
func notifySignals() signals {
	signal.Ignore(syscall.SIGPIPE) // whoever reads stderr may end: a write then fails, which ends nothing
	s := signals{stop: make(chan os.Signal, 1), reload: make(chan os.Signal, 1)}
	signal.Notify(s.reload, syscall.SIGHUP)
	all := make(chan os.Signal, 1)
	signal.Notify(all, syscall.SIGINT, syscall.SIGTERM)
	go func() { // as long as the process runs
		for sig := range all {
			s.stop <- sig
			time.Sleep(sameSignal)
			select {
			case <-all:
			default:
			}
		}
	}()
	return s
}
