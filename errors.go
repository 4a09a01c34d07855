package main

import (
	"errors"
	"time"
)

// What can become of a command or a read. After any of these but ErrUnknownOutcome a command was certainly not executed
// and never will be.
var (
	ErrNoLeader       = errors.New("the cluster has no leader that this node knows of")
	ErrNotLeader      = errors.New("the node that was taken for the leader is not the leader")
	ErrOverloaded     = errors.New("too many commands are waiting")
	ErrNotInTime      = errors.New("the command did not get its turn in time")
	ErrUnknownOutcome = errors.New("the command may or may not have been executed")
	ErrNotConfirmed   = errors.New("no majority confirmed the leader in time")
	ErrLeft           = errors.New("this node has left the cluster: ask another one")
	ErrStarting       = errors.New("this node has not caught up with a leader since it started")
)

// requestTimeout bounds a command or a read, from beginning to end, on whichever nodes it visits; a command that comes with
// a deadline of its own goes by that.
const requestTimeout = 10 * time.Second
