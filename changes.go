package main

import (
	"cmp"
	"context"
	"errors"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// This file is GET /changes: a feed as a stream of lines.

const (
	maxStreams  = 1000                   // at once
	maxWait     = 10 * time.Minute       // that a client may ask for
	defaultWait = 10 * time.Second       // unless it does
	aheadWait   = 5 * time.Second        // for this node to execute what a client has seen elsewhere
	tagEvery    = 30 * time.Second       // a stream says how far it has seen
	streamWait  = 10 * time.Second       // for a client to read a piece,
	stopWait    = 500 * time.Millisecond // or all that is left when the node shuts down
	ndjsonType  = "application/x-ndjson"
)

// streams answers GET /changes.
type streams struct {
	store   *Store
	feed    *feed
	running chan struct{} // a semaphore: one element for each stream

	tagEvery, streamWait time.Duration // see the constants; tests change them
}

func newStreams(store *Store, f *feed) *streams {
	return &streams{store, f, make(chan struct{}, maxStreams), tagEvery, streamWait}
}

// streamQuery is what a client asks for.
type streamQuery struct {
	since  *uint64 // nil for what is new from now on
	prefix string
	wait   time.Duration
	limit  int // lines of changes
}

func (s *streams) get(w http.ResponseWriter, r *http.Request) error {
	q, err := readStreamQuery(r)
	if err != nil {
		return err
	}
	select {
	case s.running <- struct{}{}:
		defer func() { <-s.running }()
	default:
		return statusError(http.StatusServiceUnavailable, "%d streams are open on this node: ask another",
			cap(s.running))
	}
	c, err := s.find(r.Context(), q)
	if err != nil {
		return err
	}
	defer s.feed.close(c)
	w.Header().Set("Content-Type", ndjsonType)
	w.Header().Set("X-Accel-Buffering", "no") // nginx would hold lines back
	if r.Method == http.MethodHead {
		return nil
	}
	st := &stream{
		streams: s, cursor: c, w: w, control: http.NewResponseController(w), stopping: stopping(r),
		buf: make([]byte, pieceBytes),
	}
	return st.run(r.Context(), q.wait)
}

func readStreamQuery(r *http.Request) (q streamQuery, err error) {
	query, err := readQuery(r, "since", "prefix", "wait", "limit")
	if err != nil {
		return q, err
	}
	if err := rejectHeaders(r, "a stream has no tag", "If-Match", "If-None-Match", "If-Unmodified-Since"); err != nil {
		return q, err
	}
	q = streamQuery{prefix: query.Get("prefix"), wait: defaultWait, limit: math.MaxInt}
	if asked := query.Get("since"); query.Has("since") {
		since, err := strconv.ParseUint(asked, 10, 64)
		if err != nil {
			return q, badRequest("since: %.40q is not the number of a tag, without quotes", asked)
		}
		q.since = &since
	}
	if asked := query.Get("wait"); query.Has("wait") {
		if q.wait, err = time.ParseDuration(asked); err != nil || q.wait < 0 || q.wait > maxWait {
			return q, badRequest("wait: %.40q is not a duration from 0 to 10m, such as 90s", asked)
		}
	}
	if asked := query.Get("limit"); query.Has("limit") {
		if q.limit, err = strconv.Atoi(asked); err != nil || q.limit < 1 {
			return q, badRequest("limit: %.40q is not a number from 1 on", asked)
		}
	}
	return q, nil
}

// find finds a client's place in the history. If the client has seen more than this node has executed, it has asked
// another node before, or another cluster that was here earlier: the leader's state decides.
func (s *streams) find(ctx context.Context, q streamQuery) (*cursor, error) {
	if q.since == nil { // what a node that has just started has is old: that is not "now"
		if err := s.store.Read(ctx, Stale, func() {}); err != nil {
			return nil, err
		}
	}
	c, err := s.feed.open(q.prefix, q.since)
	if errors.Is(err, errAhead) {
		ctx, cancel := context.WithTimeout(ctx, aheadWait)
		defer cancel()
		if err := s.store.Read(ctx, Linearizable, func() {}); err != nil {
			return nil, err
		}
		c, err = s.feed.open(q.prefix, q.since)
	}
	if err != nil {
		return nil, statusError(http.StatusGone,
			"%v: list the keys again, and follow from the Raft-Tag of that answer", err)
	}
	c.left = q.limit
	return c, nil
}

// stream is one answer.
type stream struct {
	*streams
	cursor   *cursor
	w        http.ResponseWriter
	control  *http.ResponseController
	stopping context.Context // done when the node begins to shut down
	buf      []byte          // of what is written next

	mu     sync.Mutex // held while the deadline for writes is set
	stopBy time.Time  // when the stream must have ended; zero before the node shuts down
}

// run writes lines until the time is over, the client has all that it wants, it falls behind, or the node shuts down.
func (s *stream) run(ctx context.Context, wait time.Duration) error {
	defer context.AfterFunc(s.stopping, s.setDeadline)()
	newest := s.feed.newest()
	over, tick := time.NewTimer(wait), time.NewTicker(s.tagEvery)
	defer over.Stop()
	defer tick.Stop()
	if err := s.writeTag(); err != nil {
		return err
	}
	for ended, tagDue := false, false; ; {
		s.cursor.pause = ended || tagDue // since a line is not left half written
		err := s.advance()
		atLineStart := s.cursor.atLineStart()
		switch {
		case err != nil && (!errors.Is(err, errTooOld) || !atLineStart):
			return err
		case !atLineStart:
		case err != nil, ended, s.cursor.left == 0, wait == 0 && s.cursor.seen >= newest:
			return s.writeTag()
		case tagDue:
			if err := s.writeTag(); err != nil {
				return err
			}
			tagDue = false
		}
		select {
		case <-s.feed.wait(s.cursor):
		case <-tick.C:
			tagDue = true
		case <-over.C:
			ended = wait > 0
		case <-s.stopping.Done():
			ended = true
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// advance writes what is there, up to a piece of an answer, and flushes it.
func (s *stream) advance() error {
	n, err := s.feed.read(s.cursor, s.buf)
	if n == 0 {
		return err
	}
	return cmp.Or(s.write(s.buf[:n]), err)
}

func (s *stream) writeTag() error { return s.write(tagLine(s.cursor.seen)) }

func (s *stream) write(line []byte) error {
	s.setDeadline()
	if _, err := s.w.Write(line); err != nil {
		return err
	}
	return s.control.Flush()
}

// setDeadline limits the time for writes, those under way included. When the node shuts down all that is left must be
// written within stopWait.
func (s *stream) setDeadline() {
	s.mu.Lock()
	defer s.mu.Unlock()
	deadline := time.Now().Add(s.streamWait)
	if s.stopping.Err() != nil {
		if s.stopBy.IsZero() {
			s.stopBy = time.Now().Add(stopWait)
		}
		deadline = s.stopBy
	}
	_ = s.control.SetWriteDeadline(deadline) // fails only in tests, which have no connection
}
