package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// This file is the service's own state machine, a map from keys to JSON values, and all that knows it: its commands,
// its snapshots, and KV, through which the HTTP handlers use it. To make the service yours, replace it and http.go.

// Tag tells the states of a key apart: no two writes of a key ever have the same. 0 stands for a key that is not there.
type Tag uint64

// Item is the value of a key, as JSON without insignificant white space, and the tag of the write that set it.
type Item struct {
	Value string
	Tag   Tag
}

// Pair is a key and the value that it gets.
type Pair struct{ Key, Value string }

// newPair copies key and value into one piece of memory: a million small ones cost more than half a million larger ones.
func newPair(key, value []byte) Pair {
	var both strings.Builder
	both.Grow(len(key) + len(value))
	both.Write(key)
	both.Write(value)
	return Pair{both.String()[:len(key)], both.String()[len(key):]}
}

// Tags is a set of tags, or all that a key can have.
type Tags struct {
	Any  bool
	List []Tag
}

func (t *Tags) has(tag Tag) bool {
	if tag == 0 {
		return false
	}
	found := t.Any
	for _, other := range t.List {
		found = found || other == tag
	}
	return found
}

// Condition is what must hold of a key for a command to be executed. The zero value always holds.
type Condition struct {
	Match     *Tags // if not nil, the key is there with one of these
	NoneMatch *Tags // if not nil, the key is not there, or with none of these
}

func (c Condition) holds(tag Tag) bool {
	return (c.Match == nil || c.Match.has(tag)) && (c.NoneMatch == nil || !c.NoneMatch.has(tag))
}

// ErrCondition says that a condition did not hold, and that nothing was written.
var ErrCondition = errors.New("the precondition does not hold")

// KV is the key-value service on top of a Store.
type KV struct {
	store   *Store
	machine *kvMachine
}

// Written is what became of a successful write.
type Written struct {
	Index uint64 // of the log entry that holds it
	Tag   Tag
}

// Set sets all pairs or none. A condition is one on the first pair's key.
func (kv *KV) Set(ctx context.Context, pairs []Pair, condition Condition) (Written, error) {
	return kv.apply(ctx, command{op: opSet, condition: condition, pairs: pairs})
}

// Delete removes a key, if it is there.
func (kv *KV) Delete(ctx context.Context, key string, condition Condition) (Written, error) {
	return kv.apply(ctx, command{op: opDelete, condition: condition, pairs: []Pair{{Key: key}}})
}

func (kv *KV) apply(ctx context.Context, c command) (Written, error) {
	result, err := kv.store.Apply(ctx, c.encode())
	if err != nil {
		return Written{}, err
	}
	if len(result.Data) != 8 {
		return Written{}, fmt.Errorf("%w: the result has %d bytes", ErrUnknownOutcome, len(result.Data))
	}
	tag := Tag(binary.BigEndian.Uint64(result.Data))
	if tag == 0 {
		return Written{}, ErrCondition
	}
	return Written{Index: result.Index, Tag: tag}, nil
}

// Get returns the item of a key, with Tag 0 when it is not there.
func (kv *KV) Get(ctx context.Context, key string, consistency Consistency) (item Item, err error) {
	err = kv.store.Read(ctx, consistency, func() { item, _ = kv.machine.items.Get(key) })
	return item, err
}

// List calls f with the keys that begin with prefix and come after the key after, in byte order, until f returns false.
// They are of one moment of what this node has; f holds nobody up. For a linearizable listing call Store.Read before.
func (kv *KV) List(prefix, after string, f func(key string, item Item) bool) {
	var items *btree.Map[string, Item] // shares all that is not written to later, as a snapshot does
	kv.store.Capture(func() { items = kv.machine.items.Copy() })
	items.Ascend(max(prefix, after), func(key string, item Item) bool {
		if key == after {
			return true
		}
		return strings.HasPrefix(key, prefix) && f(key, item)
	})
}

// kvMachine is the state: an ordered map that is copied in no time for a snapshot. It is a StateMachine.
type kvMachine struct {
	items   *btree.Map[string, Item]
	lastTag Tag
}

func newMachine() *kvMachine {
	return &kvMachine{items: new(btree.Map[string, Item])}
}

// Len returns the number of keys.
func (m *kvMachine) Len() int { return m.items.Len() }

// Apply executes a command. The result is the command's tag, or 0 when its condition did not hold.
func (m *kvMachine) Apply(encoded []byte, at time.Time) ([]byte, error) {
	c, err := decodeCommand(encoded)
	if err != nil {
		return nil, err
	}
	if c.condition != (Condition{}) { // else there is no need to look
		if current, _ := m.items.Get(c.pairs[0].Key); !c.condition.holds(current.Tag) {
			return make([]byte, 8), nil
		}
	}
	if m.lastTag == 0 {
		// A cluster that lost everything and forms anew begins above all tags it has ever given out, since no cluster
		// executes a command in each microsecond.
		m.lastTag = Tag(at.UnixMicro())
	}
	m.lastTag++
	for _, p := range c.pairs {
		if c.op == opDelete {
			m.items.Delete(p.Key)
		} else {
			m.items.Set(p.Key, Item{Value: p.Value, Tag: m.lastTag})
		}
	}
	return binary.BigEndian.AppendUint64(nil, uint64(m.lastTag)), nil
}

// The format of a snapshot: the last tag given out and the number of keys, as 8 bytes each; then for every key, in byte
// order, key and value behind their lengths, and the tag, all numbers as uvarints.

// Snapshot captures the state in constant time: the copy shares all nodes that are not written to later.
func (m *kvMachine) Snapshot() func(io.Writer) error {
	items, lastTag := m.items.Copy(), m.lastTag
	return func(w io.Writer) error {
		e := snapshotEncoder{w: w}
		e.uint64(uint64(lastTag))
		e.uint64(uint64(items.Len()))
		items.Scan(func(key string, item Item) bool {
			e.string(key)
			e.string(item.Value)
			e.uvarint(uint64(item.Tag))
			return e.err == nil
		})
		return e.err
	}
}

// Restore reads a snapshot into a new map.
func (m *kvMachine) Restore(source io.Reader) (install func(), err error) {
	d := newSnapshotDecoder(source, maxBodyBytes)
	lastTag, count := Tag(d.uint64()), d.uint64()
	items := new(btree.Map[string, Item])
	var key, value []byte
	for i := uint64(0); i < count && d.err == nil; i++ {
		key, value = d.bytes(key), d.bytes(value)
		p := newPair(key, value)
		items.Load(p.Key, Item{Value: p.Value, Tag: Tag(d.uvarint())}) // quicker than Set: the keys come in order
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	return func() { m.items, m.lastTag = items, lastTag }, nil
}

// The format of a command, in the log and between nodes: a version byte, the operation, the condition, the number of
// pairs, and each pair's key and value behind their lengths (a deletion has no value); numbers are uvarints. A condition
// is a byte of bits that say which of its two sets are there and which are Any, then each set's size and tags.
const commandVersion = 1

type operation byte

const (
	opSet    operation = 1
	opDelete operation = 2
)

const (
	bitMatch = 1 << iota
	bitMatchAny
	bitNoneMatch
	bitNoneMatchAny
	bitsKnown = 1<<iota - 1
)

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

// decodeCommand copies what it returns out of b.
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
