package main

import (
	"bytes"
	"cmp"
	"errors"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// This file keeps the newest changes of a state machine in memory, for any number of readers, each of which follows
// them at its own pace. The state machine adds to the feed and never waits for a reader. A reader that falls too far
// behind gets an error. The feed knows nothing of Raft, HTTP or this service's commands.

const (
	feedBytes = 16 << 20               // of history, unless a single write is larger
	feedPiece = 100                    // records that a reader takes at a time
	wakeEvery = 50 * time.Millisecond  // readers are woken at most that often,
	wakePause = 100 * time.Microsecond // and with this pause for each one that was woken
)

// These are parts of the format of a line.
const (
	lineStart     = `{"tag":`
	recordChanges = `,"changes":[`
	changeKey     = `{"key":`
	recordEnd     = "]}\n"
)

var (
	errTooOld = errors.New("the history does not reach back so far")
	errAhead  = errors.New("there is no such tag yet")
)

// keyChange is what a write did to a key.
type keyChange struct {
	key, value string
	deleted    bool
}

// record is a write that changed something. All readers share its line, which never changes.
type record struct {
	tag  uint64
	line []byte // with all changes
	ends []int  // where the parts of the line end: its head, each change with the comma before it, its tail
}

// newRecord makes the line {"tag":1796,"changes":[{"key":"a","value":1},{"key":"b","deleted":true}]}.
func newRecord(tag uint64, changes []keyChange) *record {
	size := 40
	for _, c := range changes {
		size += 30 + len(c.key) + len(c.value)
	}
	b := append(make([]byte, 0, size), lineStart...)
	b = append(strconv.AppendUint(b, tag, 10), recordChanges...)
	ends := append(make([]int, 0, len(changes)+2), len(b))
	for i, c := range changes {
		if i > 0 {
			b = append(b, ',')
		}
		b, _ = jsontext.AppendQuote(append(b, changeKey...), c.key) // keys are valid UTF-8
		if c.deleted {
			b = append(b, `,"deleted":true}`...)
		} else {
			b = append(append(append(b, `,"value":`...), c.value...), '}')
		}
		ends = append(ends, len(b))
	}
	b = append(b, recordEnd...)
	return &record{tag, b, append(ends, len(b))}
}

// cost is an upper bound of the memory that the record takes, in bytes: Go's allocator rounds up by a quarter at most.
func (r *record) cost() int { return 128 + cap(r.line)*5/4 + 8*cap(r.ends) }

// fromKey returns the line from the key of a change on.
func (r *record) fromKey(part int) []byte {
	start := r.ends[part-1] + len(changeKey)
	if part > 1 {
		start++ // the comma
	}
	return r.line[start:]
}

// find returns the first part of the line, from the given one on, that is a change of a key with the prefix, or its
// tail. The prefix is quoted as keys are in a line.
func (r *record) find(part int, prefix []byte) int {
	for part < len(r.ends)-1 && !bytes.HasPrefix(r.fromKey(part), prefix) {
		part++
	}
	return part
}

// tagLine is the line that says how far a reader has seen.
func tagLine(tag uint64) []byte {
	return append(strconv.AppendUint([]byte(lineStart), tag, 10), "}\n"...)
}

// feed is the history: all writes with a tag above base, up to last, that changed something. Tags are numbers that grow
// with each write.
type feed struct {
	mu      sync.Mutex // guards what follows; it is held for moments only, because the state machine needs it
	records []*record  // in the order of their tags
	bytes   int        // sum of their costs
	base    uint64     // 0 while no write has left the history
	first   uint64     // tag that was ever given, while base is 0: lower ones are of an earlier cluster
	last    uint64     // tag that was given

	waiting map[*cursor]chan struct{} // readers, each of which is woken by closing its channel
	looked  uint64                    // tag up to which wakeReaders has looked; those who have seen less are woken
	waking  bool                      // it is due or under way
	nextAt  time.Time                 // not before
}

func newFeed() *feed { return &feed{waiting: make(map[*cursor]chan struct{})} }

// add adds a write, which may have changed nothing. It is called in the order of tags.
func (f *feed) add(tag uint64, changes []keyChange) {
	var r *record
	if len(changes) > 0 {
		r = newRecord(tag, changes)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = tag
	if f.base == 0 && f.first == 0 {
		f.first = tag
	}
	if r == nil {
		return
	}
	f.records = append(f.records, r)
	f.bytes += r.cost()
	for f.bytes > feedBytes && len(f.records) > 1 {
		oldest := f.records[0]
		f.base, f.bytes = oldest.tag, f.bytes-oldest.cost()
		f.records[0] = nil
		f.records = f.records[1:]
	}
	f.planWakeUp()
}

// reset empties the history, because another state with this last tag takes the place of the one that it led to.
// Readers that have not seen so much get errTooOld.
func (f *feed) reset(last uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records, f.bytes, f.base, f.first, f.last = nil, 0, last, 0, last
	f.planWakeUp()
}

// planWakeUp has readers woken as soon as they may be. It is called with mu held.
func (f *feed) planWakeUp() {
	if !f.waking && len(f.waiting) > 0 {
		f.waking = true
		time.AfterFunc(time.Until(f.nextAt), f.wakeReaders)
	}
}

// wakeReaders wakes the readers that are concerned by what is new, and moves the others past it. To look for a prefix
// in sorted keys is so quick that a thousand readers whom nothing concerns cost next to nothing.
func (f *feed) wakeReaders() {
	f.mu.Lock()
	from, last := max(f.looked, f.base), f.last
	fresh := slices.Clone(f.after(from))
	f.mu.Unlock()
	var keys [][]byte
	for _, r := range fresh { // while the state machine goes on
		for part := 1; part < len(r.ends)-1; part++ {
			keys = append(keys, r.fromKey(part))
		}
	}
	slices.SortFunc(keys, bytes.Compare)
	f.mu.Lock()
	defer f.mu.Unlock()
	woken := 0
	for c, wake := range f.waiting {
		i, _ := slices.BinarySearchFunc(keys, c.prefix, bytes.Compare) // the only key that need be looked at
		if c.seen < from || i < len(keys) && bytes.HasPrefix(keys[i], c.prefix) {
			delete(f.waiting, c)
			close(wake)
			woken++
		} else {
			c.seen = max(c.seen, last)
		}
	}
	f.looked, f.waking, f.nextAt = last, false, time.Now().Add(max(wakeEvery, time.Duration(woken)*wakePause))
	if f.last > last {
		f.planWakeUp()
	}
}

// after returns the records with a tag above seen. It is called with mu held.
func (f *feed) after(seen uint64) []*record {
	i, _ := slices.BinarySearchFunc(f.records, seen+1, func(r *record, tag uint64) int { return cmp.Compare(r.tag, tag) })
	return f.records[i:]
}

// newest returns the last tag that was given.
func (f *feed) newest() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

// cursor is how far a reader has come. While the reader waits it belongs to the feed.
type cursor struct {
	prefix []byte // of the keys that it wants, quoted as in a line
	left   int    // records that it still wants
	pause  bool   // read stops at the end of a line
	full   bool   // the last read has filled its buffer, so there may be more
	seen   uint64 // tag up to which it has seen all

	// Of the next line, when it has begun to read that:
	part  int // that comes next; 0 for none of it read
	off   int // in that part
	first int // part of the first change that concerns it
}

// open returns the cursor of a new reader that has seen all up to the tag since, or, if that is nil, all that there is.
// The error is errAhead for a tag that has not been executed yet, and errTooOld for one that the history does not know.
// The prefix is valid UTF-8. The caller calls close in the end, unless there was an error.
func (f *feed) open(prefix string, since *uint64) (*cursor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	quoted, _ := jsontext.AppendQuote(nil, prefix)
	c := &cursor{prefix: quoted[:len(quoted)-1], left: math.MaxInt, seen: f.last}
	if since != nil {
		c.seen = *since
	}
	switch {
	case c.seen > f.last:
		return nil, errAhead
	case c.seen < f.base, 0 < c.seen && c.seen < f.first:
		return nil, errTooOld
	}
	return c, nil
}

// atLineStart says whether the cursor is between two lines.
func (c *cursor) atLineStart() bool { return c.part == 0 && c.off == 0 }

// read copies lines after the cursor into buf, as far as they fit. The last one may go on with the next call. The error
// is errTooOld for a reader that fell behind. The reader keeps no memory of the feed between calls, so one that is
// stuck takes no more than buf.
func (f *feed) read(c *cursor, buf []byte) (n int, err error) {
	var records [feedPiece]*record
	for c.full = false; ; {
		count, err := f.next(c, records[:])
		if count == 0 {
			return n, err
		}
		for _, r := range records[:count] {
			copied, all := r.copyTo(buf[n:], c)
			n, c.full = n+copied, !all
			if c.full || c.pause || c.left == 0 {
				return n, nil
			}
		}
	}
}

// next copies the records after the cursor into records, as far as they fit, so that readers look at them while the
// state machine goes on.
func (f *feed) next(c *cursor, records []*record) (n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.waiting, c)
	if c.seen < f.base {
		return 0, errTooOld
	}
	if n = copy(records, f.after(c.seen)); n == 0 {
		c.seen = f.last
	}
	return n, nil
}

// wait returns a channel that is closed when there may be more for a reader, at the next wake-up or a later one. The
// wait ends with the next call of read, or of close.
func (f *feed) wait(c *cursor) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	wake := make(chan struct{})
	if c.full {
		close(wake)
		return wake
	}
	if len(f.waiting) == 0 {
		f.looked = c.seen
	}
	f.waiting[c] = wake
	if c.seen < f.last {
		f.planWakeUp()
	}
	return wake
}

// close ends the wait of a reader that leaves.
func (f *feed) close(c *cursor) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.waiting, c)
}

// copyTo copies what is left of the record's line for a reader, with the changes that concern it, and moves the reader
// on. It says whether that was all.
func (r *record) copyTo(buf []byte, c *cursor) (n int, all bool) {
	if c.atLineStart() {
		if c.first = r.find(1, c.prefix); c.first == len(r.ends)-1 {
			c.seen = r.tag
			return 0, true
		}
	}
	for c.part < len(r.ends) {
		start := 0
		if c.part > 0 {
			start = r.ends[c.part-1]
		}
		if c.part == c.first && c.part > 1 {
			start++ // without the comma
		}
		part := r.line[start+c.off : r.ends[c.part]]
		copied := copy(buf[n:], part)
		n += copied
		if copied < len(part) {
			c.off += copied
			return n, false
		}
		c.part, c.off = r.find(c.part+1, c.prefix), 0
	}
	c.part, c.seen, c.left = 0, r.tag, c.left-1
	return n, true
}
