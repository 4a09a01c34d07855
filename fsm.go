package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
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
	item, _, err = kv.getAt(ctx, key, consistency)
	return item, err
}

// getAt is Get, and returns the last tag that had been given when the key was read.
func (kv *KV) getAt(ctx context.Context, key string, consistency Consistency) (item Item, at Tag, err error) {
	err = kv.store.Read(ctx, consistency, func() {
		item, _ = kv.machine.items.Get(key)
		at = kv.machine.lastTag
	})
	return item, at, err
}

// List calls f with the keys that begin with prefix and come after the key after, in byte order, until f returns false.
// They are of one moment of what this node has, when the last tag given was at; f holds nobody up. For a linearizable listing call
// Store.Read before.
func (kv *KV) List(prefix, after string, f func(key string, item Item) bool) (at Tag) {
	items, at := kv.capture()
	items.Ascend(max(prefix, after), func(key string, item Item) bool {
		if key == after {
			return true
		}
		return strings.HasPrefix(key, prefix) && f(key, item)
	})
	return at
}

// pairs returns the keys that begin with prefix and their values, as List does.
func (kv *KV) pairs(prefix string) (pairs iter.Seq2[string, string], at uint64) {
	items, tag := kv.capture()
	return func(yield func(key, value string) bool) {
		items.Ascend(prefix, func(key string, item Item) bool {
			return strings.HasPrefix(key, prefix) && yield(key, item.Value)
		})
	}, uint64(tag)
}

// capture returns a copy of all that this node has, which shares what is not written to later, and the last tag given.
func (kv *KV) capture() (items *btree.Map[string, Item], at Tag) {
	kv.store.Capture(func() { items, at = kv.machine.items.Copy(), kv.machine.lastTag })
	return items, at
}

// kvMachine is the state: an ordered map that is copied in no time for a snapshot. It is a StateMachine.
type kvMachine struct {
	items   *btree.Map[string, Item]
	lastTag Tag
	feed    *feed // of its changes
}

func newMachine() *kvMachine {
	return &kvMachine{items: new(btree.Map[string, Item]), feed: newFeed()}
}

// Len returns the number of keys.
func (m *kvMachine) Len() int { return m.items.Len() }

// Apply executes a command. The result is the command's tag, or 0 when its condition did not hold.
func (m *kvMachine) Apply(encoded []byte, at time.Time) ([]byte, error) {
	if len(encoded) > 0 && encoded[0] == txnVersion {
		return m.applyTxn(encoded, at)
	}
	c, err := decodeCommand(encoded)
	if err != nil {
		return nil, err
	}
	if c.condition != (Condition{}) { // else there is no need to look
		if current, _ := m.items.Get(c.pairs[0].Key); !c.condition.holds(current.Tag) {
			return make([]byte, 8), nil
		}
	}
	if c.op == opDelete {
		return m.write(nil, c.pairs, at), nil
	}
	return m.write(c.pairs, nil, at), nil
}

// write sets and deletes keys under one new tag, which is its result, and adds the changes to the feed.
func (m *kvMachine) write(set, remove []Pair, at time.Time) []byte {
	if m.lastTag == 0 {
		// A cluster that lost everything and forms anew begins above all tags it has ever given out, since no cluster
		// executes a command in each microsecond.
		m.lastTag = Tag(at.UnixMicro())
	}
	m.lastTag++
	changes := make([]keyChange, 0, len(set)+len(remove))
	for _, p := range set {
		m.items.Set(p.Key, Item{Value: p.Value, Tag: m.lastTag})
		changes = append(changes, keyChange{key: p.Key, value: p.Value})
	}
	for _, p := range remove {
		if _, was := m.items.Delete(p.Key); was {
			changes = append(changes, keyChange{key: p.Key, deleted: true})
		}
	}
	m.feed.add(uint64(m.lastTag), changes)
	return binary.BigEndian.AppendUint64(nil, uint64(m.lastTag))
}

// The format of a snapshot: the last tag given out and the number of keys, as 8 bytes each; then for every key, in byte
// order, key and value behind their lengths, and the tag, all numbers as uvarints.

// Snapshot captures the state in constant time: the copy shares all nodes that are not written to later.
func (m *kvMachine) Snapshot() func(io.Writer) error {
	items, lastTag := m.items.Copy(), m.lastTag
	return func(w io.Writer) error {
		b := binary.BigEndian.AppendUint64(nil, uint64(lastTag))
		b = binary.BigEndian.AppendUint64(b, uint64(items.Len()))
		_, err := w.Write(b)
		items.Scan(func(key string, item Item) bool {
			if err == nil {
				b = appendString(appendString(b[:0], key), item.Value)
				_, err = w.Write(binary.AppendUvarint(b, uint64(item.Tag)))
			}
			return err == nil
		})
		return err
	}
}

// Restore reads a snapshot into a new map.
func (m *kvMachine) Restore(source io.Reader) (install func(), err error) {
	r := bufio.NewReader(source)
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	lastTag, count := Tag(binary.BigEndian.Uint64(head[:])), binary.BigEndian.Uint64(head[8:])
	items := new(btree.Map[string, Item])
	var key, value []byte
	for range count {
		var err1, err2 error
		key, err1 = readBytes(r, key)
		value, err2 = readBytes(r, value)
		tag, err3 := binary.ReadUvarint(r)
		if err := errors.Join(err1, err2, err3); err != nil {
			return nil, err
		}
		p := newPair(key, value)
		items.Load(p.Key, Item{Value: p.Value, Tag: Tag(tag)}) // quicker than Set: the keys come in order
	}
	if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
		return nil, errors.Join(errors.New("bytes follow the last key"), err)
	}
	return func() {
		m.items, m.lastTag = items, lastTag
		m.feed.reset(uint64(lastTag))
	}, nil
}

// readBytes reads a length and so many bytes, into buf if they fit.
func readBytes(r *bufio.Reader, buf []byte) ([]byte, error) {
	size, err := binary.ReadUvarint(r)
	if err != nil {
		return buf, err
	}
	if size > maxBodyBytes {
		return buf, fmt.Errorf("a string of %d bytes is longer than allowed", size)
	}
	buf = slices.Grow(buf[:0], int(size))[:size]
	_, err = io.ReadFull(r, buf)
	return buf, err
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
		key, value := d.take(d.uvarint()), []byte(nil)
		if c.op == opSet {
			value = d.take(d.uvarint())
		}
		c.pairs = append(c.pairs, newPair(key, value))
	}
	if d.bad || len(d.b) > 0 || len(c.pairs) == 0 || bits&^bitsKnown != 0 {
		return c, errors.New("malformed command")
	}
	return c, nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// decoder takes values off the front of b; once bad, all that it returns is zero.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n uint64) []byte {
	if d.bad = d.bad || n > uint64(len(d.b)); d.bad {
		return nil
	}
	taken := d.b[:n]
	d.b = d.b[n:]
	return taken
}

func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if d.bad = d.bad || n <= 0; d.bad {
		return 0
	}
	d.b = d.b[n:]
	return v
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
