package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// This file is the state machine of this service: an ordered map from keys to JSON values. It defines the commands that
// change the map and the format of a snapshot, and knows nothing of Raft, HTTP or the network. To make the service your
// own, replace this file and http.go; docs/fork.md shows how.

// Tag is the version of a key: no two writes of a key ever have the same. 0 stands for a key that does not exist.
type Tag uint64

// Item is the value of a key, as JSON without insignificant white space, and the tag of the write that set it.
type Item struct {
	Value string
	Tag   Tag
}

// Pair is a key and the value that it gets.
type Pair struct{ Key, Value string }

// newPair copies key and value into one piece of memory, because a million small pieces cost more than half as many.
func newPair(key, value []byte) Pair {
	var both strings.Builder
	both.Grow(len(key) + len(value))
	both.Write(key)
	both.Write(value)
	return Pair{both.String()[:len(key)], both.String()[len(key):]}
}

// Tags is a set of tags, or (Any) the set of all tags that a key can have.
type Tags struct {
	Any  bool
	List []Tag
}

// has reports whether a key with that tag exists and its tag is in the set.
func (t *Tags) has(tag Tag) bool {
	return tag != 0 && (t.Any || slices.Contains(t.List, tag))
}

// Condition is what must be true of a key, or else the command changes nothing. The zero value is always met.
type Condition struct {
	Match     *Tags // if not nil, the key exists and has one of these tags
	NoneMatch *Tags // if not nil, the key does not exist or has none of these tags
}

func (c Condition) met(tag Tag) bool {
	return (c.Match == nil || c.Match.has(tag)) && (c.NoneMatch == nil || !c.NoneMatch.has(tag))
}

// kvMachine is the map with its counter of tags. It is a StateMachine.
type kvMachine struct {
	items   *btree.Map[string, Item]
	lastTag Tag   // the last one given out
	feed    *feed // of its changes; no part of the state. nil for none
}

func newMachine() *kvMachine {
	return &kvMachine{items: new(btree.Map[string, Item]), feed: newFeed()}
}

// clone returns a copy in constant time: the two share every tree node that neither has written to since. It has no
// feed.
func (m *kvMachine) clone() *kvMachine { return &kvMachine{items: m.items.Copy(), lastTag: m.lastTag} }

// Len returns the number of keys.
func (m *kvMachine) Len() int { return m.items.Len() }

// Apply executes a command. The result is the tag of the write as 8 bytes, or 0 if the condition was not met.
// That of a transaction is described in txn.go.
func (m *kvMachine) Apply(encoded []byte, at time.Time) ([]byte, error) {
	if len(encoded) > 0 && encoded[0] == txnVersion {
		return m.applyTxn(encoded, at)
	}
	c, err := decodeCommand(encoded)
	if err != nil {
		return nil, err
	}
	if c.condition != (Condition{}) { // most commands have none, and need no look at the key
		if current, _ := m.items.Get(c.pairs[0].Key); !c.condition.met(current.Tag) {
			return make([]byte, 8), nil
		}
	}
	if c.op == opDelete {
		return m.write(nil, c.pairs, at), nil
	}
	return m.write(c.pairs, nil, at), nil
}

// write sets and deletes keys with one new tag, adds the changes to the feed, and returns the tag as a result.
func (m *kvMachine) write(set, remove []Pair, at time.Time) []byte {
	if m.lastTag == 0 {
		// The counter begins at the clock, in microseconds. A cluster that begins anew after a loss of all state thus
		// begins above every tag given out before, because no cluster executes a command in each microsecond.
		m.lastTag = Tag(at.UnixMicro())
	}
	m.lastTag++
	changes := make([]keyChange, 0, len(set)+len(remove))
	for _, p := range set {
		m.items.Set(p.Key, Item{Value: p.Value, Tag: m.lastTag})
		changes = append(changes, keyChange{key: p.Key, value: p.Value})
	}
	for _, p := range remove {
		if _, existed := m.items.Delete(p.Key); existed {
			changes = append(changes, keyChange{key: p.Key, deleted: true})
		}
	}
	if m.feed != nil {
		m.feed.add(uint64(m.lastTag), changes)
	}
	return binary.BigEndian.AppendUint64(nil, uint64(m.lastTag))
}

// decodeResult reads what Apply returned.
func decodeResult(result []byte) (Tag, error) {
	if len(result) != 8 { // from a leader of another version
		return 0, fmt.Errorf("%w: the result has %d bytes", ErrUnknownOutcome, len(result))
	}
	return Tag(binary.BigEndian.Uint64(result)), nil
}

// The format of a snapshot, on disk and between nodes: the last tag and the number of keys, as 8 bytes each,
// big-endian. Then for every key, in byte order: the length of the key, the key, the length of the value, the value,
// and the tag. Lengths and tags are uvarints.

// Snapshot captures the state in constant time: the copy shares every tree node that is not written to later.
func (m *kvMachine) Snapshot() func(io.Writer) error {
	items, lastTag := m.items.Copy(), m.lastTag
	return func(w io.Writer) error {
		b := binary.BigEndian.AppendUint64(nil, uint64(lastTag))
		_, err := w.Write(binary.BigEndian.AppendUint64(b, uint64(items.Len())))
		items.Scan(func(key string, item Item) bool {
			b = appendString(appendString(b[:0], key), item.Value)
			if err == nil {
				_, err = w.Write(binary.AppendUvarint(b, uint64(item.Tag)))
			}
			return err == nil
		})
		return err
	}
}

// Restore reads a snapshot into a new map, while readers still use the old one.
func (m *kvMachine) Restore(source io.Reader) (install func(), err error) {
	d := newSnapshotDecoder(source, maxBodyBytes)
	lastTag, count := Tag(d.uint64()), d.uint64()
	items := new(btree.Map[string, Item])
	var key, value []byte
	for i := uint64(0); i < count && d.err == nil; i++ {
		key, value = d.bytes(key), d.bytes(value)
		p := newPair(key, value)
		items.Load(p.Key, Item{Value: p.Value, Tag: Tag(d.uvarint())}) // faster than Set: the keys are in order
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	// A node that is split shares its memory with its other half. So the nodes that Load leaves would hold on to values
	// of their neighbours when these have others. Writing to a copy of the map gives each node memory of its own.
	items = items.Copy()
	items.ScanMut(func(string, Item) bool { return true })
	return func() {
		m.items, m.lastTag = items, lastTag
		m.feed.reset(uint64(lastTag))
	}, nil
}

// The format of a command, in the log and between nodes (see txn.go for transactions): a version byte, a byte for
// the operation, the condition, the number of pairs, and for each pair the length of the key, the key, and (to set
// it) the length of the value and the value. A condition is a byte of the bits below, then for each set that exists
// the number of its tags, and the tags. Numbers are uvarints.
const commandVersion = 1

type operation byte

const (
	opSet    operation = 1
	opDelete operation = 2
)

// The bits of a condition: which of its sets exist, and which of them are Any.
const (
	bitMatch = 1 << iota
	bitMatchAny
	bitNoneMatch
	bitNoneMatchAny
	bitsKnown = 1<<iota - 1
)

// command sets or deletes its pairs, all or none. Its condition is on the key of the first pair.
type command struct {
	op        operation
	condition Condition
	pairs     []Pair // at least one
}

func (c command) encode() []byte {
	size := 16
	for _, p := range c.pairs {
		size += len(p.Key) + len(p.Value) + 2*binary.MaxVarintLen32
	}
	b := append(make([]byte, 0, size), commandVersion, byte(c.op), c.condition.bits())
	for _, set := range []*Tags{c.condition.Match, c.condition.NoneMatch} {
		if set == nil {
			continue
		}
		b = binary.AppendUvarint(b, uint64(len(set.List)))
		for _, tag := range set.List {
			b = binary.AppendUvarint(b, uint64(tag))
		}
	}
	b = binary.AppendUvarint(b, uint64(len(c.pairs)))
	for _, p := range c.pairs {
		b = appendString(b, p.Key)
		if c.op == opSet {
			b = appendString(b, p.Value)
		}
	}
	return b
}

func (c Condition) bits() (bits byte) {
	if c.Match != nil {
		bits |= bitMatch
		if c.Match.Any {
			bits |= bitMatchAny
		}
	}
	if c.NoneMatch != nil {
		bits |= bitNoneMatch
		if c.NoneMatch.Any {
			bits |= bitNoneMatchAny
		}
	}
	return bits
}

// decodeCommand keeps no reference to b.
func decodeCommand(b []byte) (c command, err error) {
	d := decoder{b: b}
	if version := d.byte(); !d.bad && version != commandVersion {
		return c, fmt.Errorf("command version %d is not known to this binary; was it written by a newer one?", version)
	}
	c.op = operation(d.byte())
	if !d.bad && c.op != opSet && c.op != opDelete {
		return c, fmt.Errorf("operation %d is not known to this binary; was it written by a newer one?", c.op)
	}
	bits := d.byte()
	c.condition.Match = d.tags(bits&bitMatch != 0, bits&bitMatchAny != 0)
	c.condition.NoneMatch = d.tags(bits&bitNoneMatch != 0, bits&bitNoneMatchAny != 0)
	count := d.uvarint()
	for i := uint64(0); i < count && !d.bad; i++ {
		key, value := d.bytes(), []byte(nil)
		if c.op == opSet {
			value = d.bytes()
		}
		c.pairs = append(c.pairs, newPair(key, value))
	}
	if d.bad || len(d.b) > 0 || len(c.pairs) == 0 || bits&^bitsKnown != 0 {
		return c, errors.New("malformed command")
	}
	return c, nil
}

func (d *decoder) tags(present, anyTag bool) *Tags {
	if !present {
		return nil
	}
	set := &Tags{Any: anyTag}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		set.List = append(set.List, Tag(d.uvarint()))
	}
	return set
}
