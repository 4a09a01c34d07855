package main

import (
	"context"
	"errors"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// This file is GET /changes: the feed of changes as a stream of lines.

const (
	maxStreams     = 1000
	streamPiece    = 16 << 10 // bytes that are written at once
	streamBeat     = 30 * time.Second
	streamPatience = 10 * time.Second
	streamFarewell = 300 * time.Millisecond // patience when the node stops
	aheadWait      = 5 * time.Second        // for this node to execute what a client has seen elsewhere
	defaultWait    = 10 * time.Second
	maxWait        = 10 * time.Minute
	ndjsonType     = "application/x-ndjson"
)

// streams answers GET /changes.
type streams struct {
	store *Store
	feed  *feed
	turns chan struct{} // holds a token for each stream

	beat     time.Duration // how often a stream says how far it has seen
	patience time.Duration // with a client that does not read
}

func newStreams(store *Store, f *feed) *streams {
	return &streams{store, f, make(chan struct{}, maxStreams), streamBeat, streamPatience}
}

// streamQuery is what a client wants of the feed.
type streamQuery struct {
	since  *uint64 // nil for what is new from now on
	prefix string
	wait   time.Duration
	limit  int
}

func (s *streams) get(w http.ResponseWriter, r *http.Request) error {
	if err := refuse(r, "a stream has no tag", "If-Match", "If-None-Match", "If-Unmodified-Since"); err != nil {
		return err
	}
	q, err := readStreamQuery(r)
	if err != nil {
		return err
	}
	select {
	case s.turns <- struct{}{}:
		defer func() { <-s.turns }()
	default:
		return &httpError{http.StatusServiceUnavailable, "too many streams are open on this node: " + strconv.Itoa(maxStreams)}
	}
	c, err := s.open(r.Context(), q)
	if err != nil {
		return err
	}
	defer s.feed.close(c)
	h := w.Header()
	h.Set("Content-Type", ndjsonType)
	h.Set("X-Accel-Buffering", "no") // nginx would hold lines back
	if r.Method == http.MethodHead {
		return nil
	}
	st := &stream{streams: s, cursor: c, w: w, control: http.NewResponseController(w), stopping: stopping(r)}
	return st.run(r.Context(), q.wait)
}

func readStreamQuery(r *http.Request) (q streamQuery, err error) {
	query, err := readQuery(r, "since", "prefix", "wait", "limit")
	if err != nil {
		return q, err
	}
	q = streamQuery{prefix: query.Get("prefix"), wait: defaultWait, limit: math.MaxInt}
	if query.Has("since") {
		n, err := strconv.ParseUint(query.Get("since"), 10, 64)
		if err != nil {
			return q, badRequest("since: %.40q is not a tag's number; it has no quotes", query.Get("since"))
		}
		q.since = &n
	}
	if query.Has("wait") {
		if q.wait, err = time.ParseDuration(query.Get("wait")); err != nil || q.wait < 0 || q.wait > maxWait {
			return q, badRequest("wait: %.40q is not a duration from 0 to 10m, such as 90s", query.Get("wait"))
		}
	}
	return q, readLimit(query, &q.limit)
}

func readLimit(query url.Values, limit *int) (err error) {
	if query.Has("limit") {
		if *limit, err = strconv.Atoi(query.Get("limit")); err != nil || *limit < 1 {
			return badRequest("limit: %.40q is not a number from 1 on", query.Get("limit"))
		}
	}
	return nil
}

// open finds a client's place in the history. One that has seen more than this node has executed was at another node, or in another
// life of the cluster: the leader's state decides.
func (s *streams) open(ctx context.Context, q streamQuery) (*cursor, error) {
	if q.since == nil { // "now" of a node that has just started is long ago
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
		return nil, &httpError{http.StatusGone, err.Error() + ": list the keys again, and follow from the Raft-Tag of that answer"}
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
	stopping context.Context // ends when the node is about to stop
	buf      []byte          // nil until there is something to write
}

// run writes lines until the time is over, all are written that the client wants, it falls behind, or the node stops.
func (s *stream) run(ctx context.Context, wait time.Duration) error {
	defer context.AfterFunc(s.stopping, s.hurry)()
	there := s.feed.newest()
	over, beat := time.NewTimer(wait), time.NewTicker(s.beat)
	defer over.Stop()
	defer beat.Stop()
	if err := s.writeTag(); err != nil {
		return err
	}
	for {
		wake, err := s.advance()
		switch {
		case err != nil && (!errors.Is(err, errLeft) || !s.cursor.between()):
			return err
		case err != nil, s.cursor.left == 0, wait == 0 && s.cursor.seen >= there && s.cursor.between():
			return s.writeTag()
		case !s.cursor.between():
			continue
		case wake == nil:
			wake = always
		}
		select {
		case <-wake:
		case <-beat.C:
			err = s.writeTag()
		case <-over.C:
			if wait > 0 {
				return s.writeTag()
			}
		case <-s.stopping.Done():
			return s.writeTag()
		case <-ctx.Done():
			return ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

// always is ready.
var always = func() <-chan struct{} { c := make(chan struct{}); close(c); return c }()

// advance writes what is there, as much as a piece of an answer holds, and flushes it.
func (s *stream) advance() (wake <-chan struct{}, err error) {
	if s.buf == nil {
		s.buf = make([]byte, streamPiece)
	}
	n, wake, err := s.feed.read(s.cursor, s.buf)
	if n > 0 {
		if err := s.write(s.buf[:n]); err != nil {
			return nil, err
		}
	}
	return wake, err
}

func (s *stream) writeTag() error {
	s.feed.skip(s.cursor)
	return s.write(tagLine(s.cursor.seen))
}

func (s *stream) write(b []byte) error {
	_ = s.control.SetWriteDeadline(time.Now().Add(s.patience))
	if s.stopping.Err() != nil { // also if it has ended just now, and hurry was too early
		s.hurry()
	}
	if _, err := s.w.Write(b); err != nil {
		return err
	}
	return s.control.Flush()
}

// hurry has a client that does not read not hold up the end of the node.
func (s *stream) hurry() { _ = s.control.SetWriteDeadline(time.Now().Add(streamFarewell)) }

// setRaftTag says which was the last tag given in the state that an answer is from: who follows the changes begins there.
func setRaftTag(w http.ResponseWriter, at uint64) {
	w.Header()["Raft-Tag"] = []string{strconv.FormatUint(at, 10)}
}
