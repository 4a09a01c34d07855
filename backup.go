package main

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/tidwall/btree"
)

// This file is GET /backup: the keys at one instant, as bodies of POST /key.

const (
	maxBackups   = 2                // under way at once
	backupLine   = 256 << 10        // bytes of a line, unless a single member is larger
	backupBuffer = 256 << 10        // see sendBuffer
	backupRate   = 1 << 20          // bytes a second: a client that reads more slowly
	backupGrace  = 10 * time.Second // for longer than this is cut off
)

// backupSlack is by how many bytes a POST of a single member may exceed MAX_BODY_BYTES. So a value that only just fits
// a PUT fits a line of a backup, even if each byte of its key becomes six in JSON.
const backupSlack = 8 << 10

func (a *api) getBackup(w http.ResponseWriter, r *http.Request) error {
	query, err := readParameters(r, "a backup has no tag", readPreconditions, "prefix", "consistency")
	if err != nil {
		return err
	}
	if err := readState(w, r, a.store, query, func() {}); err != nil {
		return err
	}
	w.Header().Set("Content-Type", ndjsonType)
	if r.Method == http.MethodHead {
		return nil
	}
	select {
	case a.backups <- struct{}{}:
		defer func() { <-a.backups }()
	default:
		return statusError(http.StatusServiceUnavailable, "%d backups are under way: try again later", maxBackups)
	}
	var state *kvMachine
	capture := func() { state = a.machine.clone() }
	err = captureState(r, a.store, query, capture, func(command []byte, at time.Time) error {
		if w.Header().Get("Raft-Tag") == "" {
			setRaftTag(w, state.lastTag)
			_ = http.NewResponseController(w).Flush() // a long log takes time
		}
		_, err := state.Apply(command, at)
		return err
	})
	if err != nil {
		return err
	}
	setRaftTag(w, state.lastTag)
	// No more than the send buffer is on its way at once: over a link of 60 ms its usual size makes 1 MiB a second.
	clientOf(r).setSendBuffer(backupBuffer)
	defer clientOf(r).setSendBuffer(sendBuffer)
	return a.writeBackup(w, state.items, query.Get("prefix"))
}

// writeBackup writes the lines. An error after the first of them ends the connection, so that the client sees that
// lines are missing.
func (a *api) writeBackup(w http.ResponseWriter, items *btree.Map[string, Item], prefix string) (err error) {
	out := &pacedWriter{w: w, control: http.NewResponseController(w)}
	limit := min(backupLine, int(a.store.cfg.MaxBodyBytes)-1) // some tools send a line with its newline
	var line, pair []byte                                     // each with a comma before it
	items.Ascend(prefix, func(key string, item Item) bool {
		if !strings.HasPrefix(key, prefix) {
			return false
		}
		pair, _ = jsontext.AppendQuote(append(pair[:0], ','), key) // keys are valid UTF-8
		pair = append(append(pair, ':'), item.Value...)
		if len(line) > 0 && len(line)+len(pair) >= limit { // with the brace it is too long
			err = out.writeLine(line)
			line = line[:0]
		}
		line = append(line, pair...)
		return err == nil
	})
	if err == nil && len(line) > 0 {
		err = out.writeLine(line)
	}
	if err != nil {
		return err
	}
	return out.writeLine([]byte{','}) // {} says that this was all
}

// pacedWriter writes to a client that has to read at backupRate at least.
type pacedWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	late    time.Duration // that the client is behind; to have been fast once is no credit
}

// writeLine writes members, each after a comma, as a line that is an object.
func (p *pacedWriter) writeLine(members []byte) error {
	members[0] = '{'
	line := append(members, "}\n"...)
	began, allowed := time.Now(), time.Duration(len(line))*time.Second/backupRate
	_ = p.control.SetWriteDeadline(began.Add(backupGrace + allowed - p.late)) // fails only in tests without a connection
	var err error
	for piece := range slices.Chunk(line, pieceBytes) { // one call for more than the send buffer holds waits for many ACKs
		if _, err = p.w.Write(piece); err != nil {
			break
		}
	}
	p.late = max(0, p.late+time.Since(began)-allowed)
	return err
}
