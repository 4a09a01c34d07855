package main

import (
	"iter"
	"net/http"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// This file is GET /backup: the state at one instant, as bodies of POST /key.

const (
	maxBackups  = 2
	backupLine  = 256 << 10        // bytes of a line, unless one member alone is larger
	backupRate  = 1 << 20          // bytes a second that a reader takes at least,
	backupGrace = 10 * time.Second // and for how long it may fall behind that
	backupPiece = 16 << 10         // bytes that are written at once
)

// backupSlack is by how many bytes a POST of a single member may exceed MAX_BODY_BYTES: a value that only just fits a PUT must fit
// a line of a backup, with a key each byte of which is escaped as six.
const backupSlack = 8 << 10

// backups answers GET /backup.
type backups struct {
	cfg     *Config
	store   *Store
	capture captureFunc
	turns   chan struct{} // holds a token for each backup under way
}

// captureFunc returns the keys that begin with prefix and their values, as JSON, in any order, of one instant, and the last tag that had
// been given then.
type captureFunc func(prefix string) (pairs iter.Seq2[string, string], at uint64)

func newBackups(cfg *Config, store *Store, capture captureFunc) *backups {
	return &backups{cfg, store, capture, make(chan struct{}, maxBackups)}
}

func (b *backups) get(w http.ResponseWriter, r *http.Request) error {
	query, err := readQuery(r, "prefix", "consistency")
	if err != nil {
		return err
	}
	if err := refuse(r, "a backup has no tag", "If-Match", "If-None-Match", "If-Unmodified-Since"); err != nil {
		return err
	}
	consistency, err := consistency(b.cfg, query)
	if err != nil {
		return err
	}
	markStale(w, b.store, consistency)
	if err := b.store.Read(r.Context(), consistency, func() {}); err != nil {
		return err
	}
	w.Header().Set("Content-Type", ndjsonType)
	if r.Method == http.MethodHead {
		return nil
	}
	select {
	case b.turns <- struct{}{}:
		defer func() { <-b.turns }()
	default:
		return &httpError{http.StatusServiceUnavailable, "two backups are under way; ask again when one has ended"}
	}
	return b.write(w, query.Get("prefix"))
}

// write writes the lines. An error after the first of them ends the connection, so that the client sees that lines are missing.
func (b *backups) write(w http.ResponseWriter, prefix string) error {
	pairs, at := b.capture(prefix)
	setRaftTag(w, at)
	out := &pacedWriter{w: w, control: http.NewResponseController(w), began: time.Now()}
	limit := min(backupLine, int(b.cfg.MaxBodyBytes)-1) // some tools post a line with its newline
	var line []byte                                     // without its last brace
	for key, value := range pairs {
		start := len(line)
		line, _ = jsontext.AppendQuote(append(line, ','), key) // keys are valid UTF-8
		line = append(append(line, ':'), value...)
		if start > 0 && len(line) >= limit { // with the brace it would be too long
			if err := out.writeLine(line[:start]); err != nil {
				return err
			}
			line = append(line[:0], line[start:]...)
		}
		line[0] = '{'
	}
	if len(line) > 0 {
		if err := out.writeLine(line); err != nil {
			return err
		}
	}
	return out.writeLine([]byte{'{'}) // {} says that this was all
}

// pacedWriter writes to a client that must read at least at backupRate.
type pacedWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	began   time.Time
	written int64
}

func (p *pacedWriter) writeLine(line []byte) error {
	for len(line) > 0 {
		piece := line[:min(len(line), backupPiece)]
		if err := p.write(piece); err != nil {
			return err
		}
		line = line[len(piece):]
	}
	return p.write([]byte("}\n"))
}

func (p *pacedWriter) write(piece []byte) error {
	allowed := backupGrace + time.Duration(p.written)*time.Second/backupRate
	_ = p.control.SetWriteDeadline(p.began.Add(allowed)) // what is no connection has none
	n, err := p.w.Write(piece)
	p.written += int64(n)
	return err
}
