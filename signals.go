package main

import (
	"os"
	"os/signal"
	"syscall"
)

// signals tells what the process is asked to do from outside.
type signals struct {
	stop   chan os.Signal // SIGINT and SIGTERM: the first asks for a graceful stop, the second for an end
	reload chan os.Signal // SIGHUP
}

// notifySignals begins to listen; from then on none of these signals ends the process by itself.
func notifySignals() signals {
	signal.Ignore(syscall.SIGPIPE) // whoever reads stderr may end: a write then fails, which ends nothing
	s := signals{stop: make(chan os.Signal, 2), reload: make(chan os.Signal, 1)}
	signal.Notify(s.stop, syscall.SIGINT, syscall.SIGTERM)
	signal.Notify(s.reload, syscall.SIGHUP)
	return s
}
