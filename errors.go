package main

import "errors"

// What a command or a read can end in. After any of these but ErrUnknownOutcome a command was certainly not executed,
// and never will be.
//
// The way of an error, when node2 forwards a write to node1, which it takes for the leader:
//
//	peers.go       call: *dialError if node2 could not send it; errRemote if node1 answered that it refuses it
//	leadership.go  callLeader: both are ErrNotLeader, since nothing was executed; all others are ErrUnknownOutcome
//	writes.go      forward: each write of the batch gets this error as its outcome
//	leadership.go  retry: ErrNotLeader and ErrNoLeader are tried again for up to 5 s, the others never
//	store.go       Apply returns it
//	response.go    statusOf: ErrNotLeader is answered with 503 "not-applied", ErrUnknownOutcome with 504 "unknown"
var (
	ErrNoLeader       = errors.New("the cluster has no leader that this node knows of")
	ErrNotLeader      = errors.New("the node that was taken for the leader is not the leader")
	ErrOverloaded     = errors.New("too many commands are waiting")
	ErrNotInTime      = errors.New("the command did not get its turn in time")
	ErrUnknownOutcome = errors.New("the command may or may not have been executed")
	ErrNotConfirmed   = errors.New("no majority confirmed the leader in time")
	ErrLeft           = errors.New("this node has left the cluster: ask another one")
	ErrNotUpgraded    = errors.New("a node of the cluster does not know this kind of command yet")
	ErrStarting       = errors.New("this node has not caught up with a leader since it started")
)
