package main

import (
	"cmp"
	"errors"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// This file keeps the newest changes of a state machine in memory, for any number of readers, each of which follows
// them at its own pace. The state machine adds to the feed and never waits for a reader. A reader that falls too far
// behind gets an error. The feed knows nothing of Raft, HTTP or this service's commands.

const (
	feedBytes  = 16 << 20               // of history, unless a single write is larger
	wakeEvery  = 50 * time.Millisecond  // readers that wait are woken at most that often,
	wakePause  = 500 * time.Microsecond // and with this pause for each of them, so that a thousand disturb nobody,
	wakeBytes  = feedBytes / 4          // unless so much of the history is new that they could fall behind
	maxSkipped = 1000                   // records that a reader looks at before it releases the feed's mutex
)

// These are parts of the format of a line.
const (
	lineStart     = `{"tag":`
	recordChanges = `,"changes":[`
	recordEnd     = "]}\n"
)

var (
	errTooOld = errors.New("the history does not reach back so far")
	errAhead  = errors.New("this node has not executed so much")
)

// keyChange is what a write did to a key. Its strings may share memory with the state, but not with a command.
type keyChange struct {
	key, value string
	deleted    bool
}

// record is a write that changed something.
type record struct {
	tag     uint64
	changes []keyChange

	once sync.Once // makes what follows, when the first reader needs it; all readers share it
	text []byte    // the record's line
	ends []int     // where the line's head ends, and then each change
}

// cost is an upper bound of the memory that a record takes, with its text, in bytes.
func (r *record) cost() int {
	size := 256
	for _, c := range r.changes {
		size += 96 + 9*len(c.key) + 2*len(c.value) // a byte of a key can become six in JSON, in a slice that grows
	}
	return size
}

// render makes {"tag":1796,"changes":[{"key":"a","value":1},{"key":"b","deleted":true}]}.
func (r *record) render() {
	size := 0
	for _, c := range r.changes {
		size += 40 + len(c.key) + len(c.value)
	}
	b := append(make([]byte, 0, size+40), lineStart...)
	b = append(strconv.AppendUint(b, r.tag, 10), recordChanges...)
	r.ends = append(make([]int, 0, len(r.changes)+1), len(b))
	for i, c := range r.changes {
		if i > 0 {
			b = append(b, ',')
		}
		b, _ = jsontext.AppendQuote(append(b, `{"key":`...), c.key) // keys are valid UTF-8
		if c.deleted {
			b = append(b, `,"deleted":true}`...)
		} else {
			b = append(append(append(b, `,"value":`...), c.value...), '}')
		}
		r.ends = append(r.ends, len(b))
	}
	r.text = append(b, recordEnd...)
}

// concerns says whether a change is one of a key with the prefix.
func (r *record) concerns(prefix string) bool {
	return slices.ContainsFunc(r.changes, func(c keyChange) bool { return strings.HasPrefix(c.key, prefix) })
}

// tagLine is the line that says how far a reader has seen.
func tagLine(tag uint64) []byte {
	return append(strconv.AppendUint([]byte(lineStart), tag, 10), "}\n"...)
}

// feed is the history: all writes with a tag above base, up to last, that changed something. Tags are numbers that grow
// with each write.
type feed struct {
	mu      sync.RWMutex      // guards what follows; it is held for moments only, because the state machine needs it
	records []*record         // in the order of their tags
	start   uint64            // position of records[0]; the position of a record never changes
	bytes   int               // sum of their costs
	base    uint64            // 0 while no write has left the history
	first   uint64            // tag that was ever given, while base is 0: lower ones are of an earlier cluster
	last    uint64            // tag that was given
	groups  map[string]*group // of readers, by prefix

	waking   bool          // a wake-up is due or under way
	timer    *time.Timer   // for it
	urgent   bool          // it is due for the sake of wakeBytes
	newBytes int           // cost of the records since the last wake-up
	wokenAt  time.Time     // when that was
	pause    time.Duration // until the next one
	checked  uint64        // position up to which it looked at records
}

// group is all readers of one prefix. One look at a record serves them all.
type group struct {
	readers int
	wait    *wait
}

// wait is what the readers of a group wait for.
type wait struct {
	over chan struct{} // closed when there is something for them
	pos  uint64        // position up to which there is nothing
	seen uint64        // tag up to which there is nothing
}

func newWait() *wait { return &wait{over: make(chan struct{})} }

// wake ends the wait.
func (g *group) wake() {
	close(g.wait.over)
	g.wait = newWait()
}

func newFeed() *feed { return &feed{groups: make(map[string]*group)} }

// add adds a write, which may have changed nothing. It is called in the order of tags.
func (f *feed) add(tag uint64, changes []keyChange) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = tag
	if f.base == 0 && f.first == 0 {
		f.first = tag
	}
	if len(changes) == 0 {
		return
	}
	r := &record{tag: tag, changes: changes}
	cost := r.cost()
	f.records = append(f.records, r)
	f.bytes += cost
	f.newBytes += cost
	for f.bytes > feedBytes && len(f.records) > 1 {
		oldest := f.records[0]
		f.base, f.bytes = oldest.tag, f.bytes-oldest.cost()
		f.records[0] = nil
		f.records, f.start = f.records[1:], f.start+1
	}
	f.planWakeUp()
}

// planWakeUp has readers woken as soon as they may be. It is called with mu held.
func (f *feed) planWakeUp() {
	urgent := f.newBytes > wakeBytes
	if len(f.groups) == 0 || f.waking && (f.urgent || !urgent) {
		return
	}
	pause := f.pause
	if urgent {
		pause = wakeEvery
	}
	delay := max(0, pause-time.Since(f.wokenAt))
	switch {
	case !f.waking:
		f.timer = time.AfterFunc(delay, f.wakeReaders)
	case f.timer.Stop(): // or else it has fired already
		f.timer.Reset(delay)
	}
	f.waking, f.urgent = true, urgent
}

// wakeReaders wakes the readers for whom something has happened since the last time.
func (f *feed) wakeReaders() {
	f.mu.Lock()
	missed := f.checked < f.start && f.base > 0 // records have left at which nobody has looked
	fresh := slices.Clone(f.records[max(f.checked, f.start)-f.start:])
	f.checked, f.newBytes = f.start+uint64(len(f.records)), 0
	checked, seen, concerned := f.checked, f.last, maps.Clone(f.groups)
	f.mu.Unlock()
	maps.DeleteFunc(concerned, func(prefix string, _ *group) bool { // while the state machine goes on
		return !missed && !slices.ContainsFunc(fresh, func(r *record) bool { return r.concerns(prefix) })
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	woken := 0
	for prefix, g := range f.groups {
		if concerned[prefix] == g {
			g.wake()
			woken += g.readers
		} else { // those who wait had seen all when this look or an earlier one began
			g.wait.pos, g.wait.seen = checked, seen
		}
	}
	f.waking, f.urgent = false, false
	f.wokenAt, f.pause = time.Now(), max(wakeEvery, time.Duration(woken)*wakePause)
	if f.checked < f.start+uint64(len(f.records)) {
		f.planWakeUp()
	}
}

// reset empties the history, because another state with this last tag takes the place of the one that it led to.
// Readers get errTooOld.
func (f *feed) reset(last uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.start += uint64(len(f.records)) + 1
	f.records, f.bytes, f.base, f.first, f.last = nil, 0, last, 0, last
	for _, g := range f.groups {
		g.wake()
	}
}

// newest returns the last tag that was given.
func (f *feed) newest() uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.last
}

// cursor is how far a reader has come.
type cursor struct {
	prefix string // of the keys that it wants
	left   int    // records that it still wants
	seen   uint64 // tag up to which it has seen all
	pos    uint64 // of the next record
	part   int    // of that record's text: 0 for its head, n for its nth change
	off    int    // of that part's bytes
	empty  bool   // no change of that record has been copied yet
	wait   *wait  // nil while it does not wait
}

// open returns the cursor of a new reader that has seen all up to the tag since, or, if that is nil, all that there is.
// The error is errAhead for a tag that has not been executed yet, and errTooOld for one that the history does not know.
// The caller calls close in the end, unless there was an error.
func (f *feed) open(prefix string, since *uint64) (*cursor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := &cursor{prefix: prefix, left: math.MaxInt, seen: f.last}
	if since != nil {
		c.seen = *since
	}
	switch {
	case c.seen > f.last:
		return nil, errAhead
	case c.seen < f.base, 0 < c.seen && c.seen < f.first:
		return nil, errTooOld
	}
	i, found := slices.BinarySearchFunc(f.records, c.seen, func(r *record, tag uint64) int {
		return cmp.Compare(r.tag, tag)
	})
	if found {
		i++
	}
	c.pos = f.start + uint64(i)
	g := f.groups[prefix]
	if g == nil {
		g = &group{wait: newWait()}
		f.groups[prefix] = g
	}
	g.readers++
	return c, nil
}

func (f *feed) close(c *cursor) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.groups[c.prefix]; g.readers > 1 {
		g.readers--
	} else {
		delete(f.groups, c.prefix)
	}
}

// skip moves a reader that waits past all that does not concern it.
func (f *feed) skip(c *cursor) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	c.skip()
}

// skip is called with the feed's mu held.
func (c *cursor) skip() {
	if c.wait != nil && c.wait.pos > c.pos {
		c.pos, c.seen = c.wait.pos, c.wait.seen
	}
}

// atLineStart says whether the cursor is between two lines.
func (c *cursor) atLineStart() bool { return c.part == 0 && c.off == 0 }

// read copies lines after the cursor into buf, as far as they fit. The last one may go on with the next call. If there
// are no more, wake is not nil and is closed when there are. The error is errTooOld for a reader that fell behind. The
// reader keeps no memory of the feed between calls, so one that is stuck takes no more than buf.
func (f *feed) read(c *cursor, buf []byte) (n int, wake <-chan struct{}, err error) {
	for n < len(buf) && c.left > 0 {
		var r *record
		if r, wake, err = f.next(c); r == nil {
			return n, wake, err
		}
		copied, all := r.copyTo(buf[n:], c)
		n += copied
		if all {
			c.pos, c.seen, c.left = c.pos+1, r.tag, c.left-1
		}
	}
	return n, nil, nil
}

// next returns the next record for a reader, or nil and a channel that is closed when there is one.
func (f *feed) next(c *cursor) (r *record, wake <-chan struct{}, err error) {
	for more := true; more; {
		if r, more, err = f.look(c); r != nil || err != nil {
			return r, nil, err
		}
	}
	return nil, c.wait.over, nil
}

// look looks at some records after the cursor, and returns the first one that concerns the reader. If there is none and
// no more, the reader waits.
func (f *feed) look(c *cursor) (r *record, more bool, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	c.skip()
	c.wait = nil
	if c.pos < f.start {
		return nil, false, errTooOld
	}
	records := f.records[c.pos-f.start:]
	for _, r := range records[:min(len(records), maxSkipped)] {
		if r.concerns(c.prefix) {
			return r, true, nil
		}
		c.pos, c.seen = c.pos+1, r.tag
	}
	if len(records) > maxSkipped {
		return nil, true, nil
	}
	c.seen, c.wait = f.last, f.groups[c.prefix].wait
	return nil, false, nil
}

// copyTo copies what is left of the record's line for a reader, with the changes that concern it, and says whether that
// was all.
func (r *record) copyTo(buf []byte, c *cursor) (n int, all bool) {
	r.once.Do(r.render)
	for ; c.part <= len(r.changes)+1; c.part++ {
		var part []byte
		switch {
		case c.part == 0:
			part, c.empty = r.text[:r.ends[0]], true
		case c.part > len(r.changes):
			part = r.text[r.ends[len(r.changes)]:]
		case strings.HasPrefix(r.changes[c.part-1].key, c.prefix):
			part = r.text[r.ends[c.part-1]:r.ends[c.part]]
			if c.empty && c.part > 1 {
				part = part[1:] // without the comma
			}
		}
		copied := copy(buf[n:], part[c.off:])
		n, c.off = n+copied, c.off+copied
		if c.off < len(part) {
			return n, false
		}
		c.off = 0
		c.empty = c.empty && (len(part) == 0 || c.part == 0)
	}
	c.part = 0
	return n, true
}
