package main

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

const (
	leaderWait    = 5 * time.Second // for a leader to be there, within requestTimeout
	leaderGrace   = 500 * time.Millisecond
	retryInterval = 20 * time.Millisecond
)

// RaftState is where this node stands, as far as it knows.
type RaftState struct {
	State  string // "forming", "starting", "follower", "candidate", "leader" or "shutdown"
	Leader string // the leader's node id, "" when there is none
	Term   uint64

	server string // the leader
	left   bool   // it is to leave the cluster or has left it, and knows no leader
}

// leadership is the newest RaftState, for all who wait for another one.
type leadership struct{ now atomic.Pointer[moment] }

// moment is a state and a channel that is closed when it is over.
type moment struct {
	RaftState
	over chan struct{}
}

func newLeadership(first RaftState) *leadership {
	l := new(leadership)
	l.now.Store(&moment{first, make(chan struct{})})
	return l
}

// set is called by one goroutine alone. It returns the state before, and whether it was another one.
func (l *leadership) set(state RaftState) (before RaftState, changed bool) {
	last := l.now.Load()
	if last.RaftState != state {
		l.now.Store(&moment{state, make(chan struct{})})
		close(last.over)
	}
	return last.RaftState, last.RaftState != state
}

// try calls f when there is a leader, and again as long as f finds that the leader is not the leader any more: it
// moves, and we hear of it a moment later.
func (l *leadership) try(ctx context.Context, f func() error) error {
	giveUp := time.Now().Add(leaderWait)
	for {
		m := l.now.Load()
		err := ErrNoLeader
		if m.left {
			return ErrLeft
		}
		if m.Leader != "" {
			if err = f(); !errors.Is(err, ErrNotLeader) && !errors.Is(err, ErrNoLeader) {
				return err
			}
		}
		if time.Now().After(giveUp) {
			return err
		}
		timer := time.NewTimer(retryInterval)
		select {
		case <-m.over:
		case <-timer.C:
		case <-ctx.Done():
			return err
		}
		timer.Stop()
	}
}

// during returns a context for a call to the leader. It ends leaderGrace after this node hears that another leads: what
// hangs in a leader that has stopped answering must not hold up what the next one could do.
func (l *leadership) during(ctx context.Context, server string, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	go func() {
		for m := l.now.Load(); m.server == server; m = l.now.Load() {
			select {
			case <-m.over:
			case <-ctx.Done():
				return
			}
		}
		timer := time.AfterFunc(leaderGrace, cancel)
		<-ctx.Done()
		timer.Stop()
	}()
	return ctx, cancel
}
