package main

import (
	"context"
	"sync"
	"time"
)

const (
	confirmTimeout = 2 * time.Second       // for a majority to confirm the leader's term
	askAgain       = 20 * time.Millisecond // after a peer did not confirm, within a round
)

// readIndex is an index and the error that stands in its place.
type readIndex struct {
	index uint64
	err   error
}

// readRounds finds the index that a linearizable read must see applied, for many reads at once: those that wait share
// a round, those that arrive while it is under way share the next (the ReadIndex of Ongaro's dissertation, 6.4). DESIGN.md
// has the argument why the answer is right.
type readRounds struct {
	// find runs one round.
	find func(ctx context.Context) (uint64, error)
	wake chan struct{} // holds one token: there may be somebody waiting

	mu      sync.Mutex // guards waiting
	waiting []chan readIndex
}

func newReadRounds(find func(context.Context) (uint64, error)) *readRounds {
	return &readRounds{find: find, wake: make(chan struct{}, 1)}
}

// run runs rounds until ctx ends.
func (r *readRounds) run(ctx context.Context) {
	for {
		select {
		case <-r.wake:
		case <-ctx.Done():
			return
		}
		r.mu.Lock()
		batch := r.waiting
		r.waiting = nil
		r.mu.Unlock()
		if len(batch) == 0 {
			continue
		}
		index, err := r.find(ctx)
		for _, done := range batch {
			done <- readIndex{index, err}
		}
	}
}

// next returns the index that the next round finds: every write acknowledged before the call is at or below it.
func (r *readRounds) next(ctx context.Context) (uint64, error) {
	done := make(chan readIndex, 1)
	r.mu.Lock()
	r.waiting = append(r.waiting, done)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
	select {
	case found := <-done:
		return found.index, found.err
	case <-ctx.Done():
		return 0, ErrNotConfirmed
	}
}

// confirmer asks the other nodes whether a leader's term is still theirs. A goroutine for each node asks it at most one
// question at a time, so a node that does not answer costs nothing but itself.
type confirmer struct {
	// ask returns whether the node is in that term; an error counts as no.
	ask func(ctx context.Context, id string, term uint64) (bool, error)

	mu     sync.Mutex // guards what follows
	change sync.Cond  // signalled when any of it changes
	round  uint64     // the newest round
	term   uint64     // that the round is about
	active bool       // the round still needs answers
	yes    map[string]uint64
	closed bool
}

func newConfirmer(ask func(context.Context, string, uint64) (bool, error)) *confirmer {
	c := &confirmer{ask: ask, yes: make(map[string]uint64)}
	c.change.L = &c.mu
	return c
}

// serve asks one node in every round, until close.
func (c *confirmer) serve(ctx context.Context, id string) {
	for {
		c.mu.Lock()
		for !c.closed && (!c.active || c.yes[id] == c.round) {
			c.change.Wait()
		}
		round, term, closed := c.round, c.term, c.closed
		c.mu.Unlock()
		if closed {
			return
		}
		askCtx, cancel := context.WithTimeout(ctx, confirmTimeout)
		yes, err := c.ask(askCtx, id, term)
		cancel()
		if err != nil || !yes {
			time.Sleep(askAgain)
			continue
		}
		c.mu.Lock()
		c.yes[id] = round // the question was asked after the round began, whichever round it is by now
		c.change.Broadcast()
		c.mu.Unlock()
	}
}

// confirm returns true once as many of the nodes as needed have said, each after the call, that they are in term. It
// returns false after confirmTimeout, or when stop returns true. One call at a time.
func (c *confirmer) confirm(term uint64, nodes []string, needed int, stop func() bool) bool {
	if needed <= 0 {
		return true
	}
	late := false
	timer := time.AfterFunc(confirmTimeout, func() {
		c.mu.Lock()
		late = true
		c.mu.Unlock()
		c.change.Broadcast()
	})
	defer timer.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.round++
	c.term, c.active = term, true
	c.change.Broadcast()
	defer func() { c.active = false }()
	for {
		agreed := 0
		for _, id := range nodes {
			if c.yes[id] == c.round {
				agreed++
			}
		}
		if agreed >= needed {
			return true
		}
		if late || c.closed || stop() {
			return false
		}
		c.change.Wait()
	}
}

// wakeUp makes a round look at its stop func again.
func (c *confirmer) wakeUp() { c.change.Broadcast() }

// close ends the round under way and every serve.
func (c *confirmer) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.change.Broadcast()
}
