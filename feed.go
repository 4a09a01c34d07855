package main

import (
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

// This file keeps the newest changes of the state machine in memory, for any number of readers that follow them, each at its own
// pace. The state machine adds to the feed and never waits for a reader; a reader that falls too far behind is told so.

const (
	feedBytes  = 16 << 20               // of history, unless one write alone is larger
	pulseEvery = 50 * time.Millisecond  // readers that wait are woken that often at most,
	pulseShare = 500 * time.Microsecond // and less often where many are: so much time for each of them, most of it for others
	maxSkipped = 1000                   // records that a reader looks at before it lets others have the feed
)

var (
	errLeft  = errors.New("the history does not reach back so far")
	errAhead = errors.New("this node has not executed so much")
)

// keyChange is what a write did to a key. Its strings share memory with the map.
type keyChange struct {
	key, value string
	deleted    bool
}

// record is a write that changed something.
type record struct {
	tag     uint64 // of the ETag counter, or whatever numbers a state machine's commands
	changes []keyChange

	once sync.Once // makes what follows, when the first reader needs it; all readers share it
	text []byte    // the record's line
	ends []int     // where the text of each change ends
}

// cost is an upper bound of the memory that a record takes, its text included, in bytes.
func (r *record) cost() int {
	size := 256
	for _, c := range r.changes {
		size += 96 + 9*len(c.key) + 2*len(c.value) // a byte of a key can become six in JSON, which grow as they are appended
	}
	return size
}

const recordEnd = "]}\n"

// render makes {"tag":1796,"changes":[{"key":"a","value":1},{"key":"b","deleted":true}]}.
func (r *record) render() {
	size := 0
	for _, c := range r.changes {
		size += 40 + len(c.key) + len(c.value)
	}
	b := append(make([]byte, 0, size+40), `{"tag":`...)
	b = append(strconv.AppendUint(b, r.tag, 10), `,"changes":[`...)
	r.ends = make([]int, 0, len(r.changes)+1)
	r.ends = append(r.ends, len(b))
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

// feed is the history: every write with a tag above base, up to last, that changed something.
type feed struct {
	mu      sync.RWMutex      // guards what follows. It is held for moments only: the state machine takes it with each command
	records []*record         // in the order of their tags
	start   uint64            // position of the first of them; positions only grow
	bytes   int               // the sum of their costs
	base    uint64            // 0 while no write has left the history
	first   uint64            // that was ever given, while base is 0: tags below it are of another life of the cluster
	last    uint64            // that was given
	groups  map[string]*group // readers, by prefix
	pulsing bool              // a pulse is under way
	pulsed  time.Time         // when the last one was,
	pause   time.Duration     // and how long there is none after it
	told    uint64            // position up to which pulses have looked
}

// group is all readers of one prefix: one look at a record serves them all, and those whom it does not concern are not woken.
type group struct {
	readers int
	turn    *turn // what readers of all that there is wait for
}

// turn is the time until something that concerns a group happens.
type turn struct {
	over chan struct{} // closed when it does
	pos  uint64        // position up to which nothing does
	seen uint64        // tag up to which nothing does
}

func newFeed() *feed { return &feed{groups: make(map[string]*group)} }

// add takes note of a write. It is called in the order of tags.
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
	f.records = append(f.records, r)
	f.bytes += r.cost()
	for f.bytes > feedBytes && len(f.records) > 1 {
		oldest := f.records[0]
		f.base, f.bytes = oldest.tag, f.bytes-oldest.cost()
		f.records[0] = nil
		f.records, f.start = f.records[1:], f.start+1
	}
	f.plan()
}

// plan has a pulse come as soon as may be, if anybody can be waiting for it. It is called with mu held.
func (f *feed) plan() {
	if len(f.groups) > 0 && !f.pulsing {
		f.pulsing = true
		time.AfterFunc(max(0, f.pause-time.Since(f.pulsed)), f.pulse)
	}
}

// pulse wakes the readers whom what has happened since the last pulse concerns.
func (f *feed) pulse() {
	f.mu.Lock()
	lost := f.told < f.start && f.base > 0 // what nobody has looked at may have left
	fresh := slices.Clone(f.records[max(f.told, f.start)-f.start:])
	f.told = f.start + uint64(len(f.records))
	told, seen, groups := f.told, f.last, maps.Clone(f.groups)
	f.mu.Unlock()
	maps.DeleteFunc(groups, func(prefix string, _ *group) bool { // while Apply goes on
		return !lost && !slices.ContainsFunc(fresh, func(r *record) bool { return r.concerns(prefix) })
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	woken := 0
	for prefix, g := range f.groups {
		if groups[prefix] == g {
			g.wake()
			woken += g.readers
		} else { // whoever waits had read all when this pulse or one before it began to look
			g.turn.pos, g.turn.seen = told, seen
		}
	}
	f.pulsing, f.pulsed, f.pause = false, time.Now(), max(pulseEvery, time.Duration(woken)*pulseShare)
	if f.told < f.start+uint64(len(f.records)) {
		f.plan()
	}
}

// wake ends the group's turn.
func (g *group) wake() {
	close(g.turn.over)
	g.turn = newTurn()
}

func newTurn() *turn { return &turn{over: make(chan struct{})} }

// reset empties the history, as another state has taken the place of the one that it led to: readers are told that they fell behind.
func (f *feed) reset(last uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.start += uint64(len(f.records)) + 1
	f.records, f.bytes, f.base, f.first, f.last = nil, 0, last, 0, last
	for _, g := range f.groups {
		g.wake()
	}
}

// cursor is how far a reader has come.
type cursor struct {
	prefix string // of the keys that it is told of
	seen   uint64
	left   int    // records that it still wants
	pos    uint64 // of the record that is next
	part   int    // of that record's text: 0 for its head, n for its nth change
	off    int    // of that part's bytes
	none   bool   // no change of that record was copied yet
	turn   *turn  // that it waits for; nil while it does not
}

// open returns the cursor of a new reader that has seen all up to tag since, or else all that there is. The error is errAhead for a
// tag not executed yet, and errLeft for one that the history does not know. Who has no error calls close in the end.
func (f *feed) open(prefix string, since *uint64) (*cursor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := &cursor{prefix: prefix, seen: f.last, left: math.MaxInt}
	if since != nil {
		c.seen = *since
	}
	switch {
	case c.seen > f.last:
		return nil, errAhead
	case c.seen < f.base, 0 < c.seen && c.seen < f.first:
		return nil, errLeft
	}
	i, _ := slices.BinarySearchFunc(f.records, c.seen+1, func(r *record, tag uint64) int {
		if r.tag < tag {
			return -1
		}
		return 1
	})
	c.pos = f.start + uint64(i)
	g := f.groups[prefix]
	if g == nil {
		g = &group{turn: newTurn()}
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

// skip is called with mu held.
func (c *cursor) skip() {
	if c.turn != nil && c.turn.pos > c.pos {
		c.pos, c.seen = c.turn.pos, c.turn.seen
	}
}

// newest returns the last tag that was given.
func (f *feed) newest() uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.last
}

// read copies what follows the cursor into buf, as far as it fits: lines, whose last one may go on with the next call. When there is
// nothing more, wake is not nil and is closed when there is. Memory of the feed is not kept between calls, so a reader that is stuck
// keeps no more than its buf. The error is errLeft for one that fell too far behind.
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

// next returns the record that is next for a reader, if there is one.
func (f *feed) next(c *cursor) (*record, <-chan struct{}, error) {
	for {
		f.mu.RLock()
		c.skip()
		c.turn = nil
		if c.pos < f.start {
			f.mu.RUnlock()
			return nil, nil, errLeft
		}
		some := f.records[c.pos-f.start:]
		for _, r := range some[:min(len(some), maxSkipped)] {
			if r.concerns(c.prefix) {
				f.mu.RUnlock()
				return r, nil, nil
			}
			c.pos, c.seen = c.pos+1, r.tag
		}
		if len(some) <= maxSkipped {
			c.seen, c.turn = f.last, f.groups[c.prefix].turn
			f.mu.RUnlock()
			return nil, c.turn.over, nil
		}
		f.mu.RUnlock()
	}
}

// concerns says whether a change is one of a key with the prefix.
func (r *record) concerns(prefix string) bool {
	for i := range r.changes {
		if strings.HasPrefix(r.changes[i].key, prefix) {
			return true
		}
	}
	return false
}

// copyTo copies what is left of the record's line for a reader, with the changes that concern it, and says whether that was all.
func (r *record) copyTo(buf []byte, c *cursor) (n int, all bool) {
	r.once.Do(r.render)
	for ; c.part <= len(r.changes)+1; c.part++ {
		var part []byte
		switch {
		case c.part == 0:
			part, c.none = r.text[:r.ends[0]], true
		case c.part > len(r.changes):
			part = r.text[r.ends[len(r.changes)]:]
		case strings.HasPrefix(r.changes[c.part-1].key, c.prefix):
			part = r.text[r.ends[c.part-1]:r.ends[c.part]]
			if c.none && c.part > 1 {
				part = part[1:] // without the comma
			}
		}
		copied := copy(buf[n:], part[c.off:])
		n, c.off = n+copied, c.off+copied
		if c.off < len(part) {
			return n, false
		}
		c.off = 0
		c.none = c.none && (len(part) == 0 || c.part == 0)
	}
	c.part = 0
	return n, true
}

// between says whether the cursor is between two lines.
func (c *cursor) between() bool { return c.part == 0 && c.off == 0 }

// tagLine is the line that says how far a reader has seen.
func tagLine(tag uint64) []byte {
	return append(strconv.AppendUint([]byte(`{"tag":`), tag, 10), "}\n"...)
}
