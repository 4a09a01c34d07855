package main

import (
	"os"
	"os/signal"
	"syscall"
	"time"
)

// sameSignal is how long after a signal another one is taken for the same: on Ctrl-C the terminal and a process manager
// both send one.
const sameSignal = time.Second

// signals are what the process is asked to do from outside.
type signals struct {
	stop   chan os.Signal // SIGINT and SIGTERM: the first asks for a graceful stop, the second to end at once
	reload chan os.Signal // SIGHUP
}

// notifySignals catches the signals; from then on none of them ends the process by itself.
func notifySignals() signals {
	signal.Ignore(syscall.SIGPIPE) // the reader of stderr may end; then writes fail, and the node runs on
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
