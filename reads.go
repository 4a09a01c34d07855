package main

import (
	"context"
	"sync"
	"time"
)

const confirmTimeout = 2 * time.Second // for a majority to confirm the leader's term

// readRounds finds the index that a linearizable read must see applied, for many reads at once: those that wait share
// a round, those that arrive while it is under way share the next (the ReadIndex of Ongaro's dissertation, 6.4).
// DESIGN.md has the argument why the answer is right.
type readRounds struct {
	// find runs one round.
	find    func() (uint64, error)
	metrics *metrics
	wake    chan struct{} // holds one token: there may be somebody waiting

	mu      sync.Mutex // guards waiting
	waiting []chan readIndex
}

// readIndex is an index, or the error that stands in its place.
type readIndex struct {
	index uint64
	err   error
}

func newReadRounds(m *metrics, find func() (uint64, error)) *readRounds {
	return &readRounds{find: find, metrics: m, wake: make(chan struct{}, 1)}
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
		r.metrics.round.Observe(float64(len(batch)))
		index, err := r.find()
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
