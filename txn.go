package main

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/tidwall/btree"
)

// This file is the transaction, POST /txn: one command that compares the tags of some keys, and then sets and deletes
// keys if all comparisons hold.

// txn is a transaction. No key is both set and deleted.
type txn struct {
	compare []comparison
	set     []Pair
	remove  []Pair // keys alone
}

// comparison is what must be true of a key.
type comparison struct {
	key  string
	kind comparisonKind
	tag  Tag // for hasTag; 0 for a tag that no key ever has
}

// comparisonKind is part of the format of a command.
type comparisonKind byte

const (
	isAbsent  comparisonKind = 0 // the key does not exist
	isPresent comparisonKind = 1 // the key exists
	hasTag    comparisonKind = 2 // the key exists and has this tag
)

func (c comparison) holds(tag Tag) bool {
	switch c.kind {
	case isAbsent:
		return tag == 0
	case isPresent:
		return tag != 0
	default:
		return tag != 0 && tag == c.tag
	}
}

// check returns the indexes of the comparisons that do not hold.
func (t txn) check(items *btree.Map[string, Item]) (failed []uint64) {
	for i, c := range t.compare {
		if item, _ := items.Get(c.key); !c.holds(item.Tag) {
			failed = append(failed, uint64(i))
		}
	}
	return failed
}

// The format of a transaction, in the log and between nodes: a version byte; the number of comparisons, and for each
// its key, its kind and, for hasTag, the tag; the number of pairs to set, and for each its key and value; the number
// of keys to delete, and these. Strings follow their length; numbers are uvarints. The result is the new tag as 8
// bytes, or 8 zeros and the indexes of the comparisons that do not hold.
const txnVersion = 2

// CommandVersion returns the newest version that Apply can read: a command begins with its version.
func (m *kvMachine) CommandVersion() byte { return txnVersion }

func (t txn) encode() []byte {
	b := binary.AppendUvarint([]byte{txnVersion}, uint64(len(t.compare)))
	for _, c := range t.compare {
		b = append(appendString(b, c.key), byte(c.kind))
		if c.kind == hasTag {
			b = binary.AppendUvarint(b, uint64(c.tag))
		}
	}
	b = binary.AppendUvarint(b, uint64(len(t.set)))
	for _, p := range t.set {
		b = appendString(appendString(b, p.Key), p.Value)
	}
	b = binary.AppendUvarint(b, uint64(len(t.remove)))
	for _, p := range t.remove {
		b = appendString(b, p.Key)
	}
	return b
}

// decodeTxn keeps no reference to b.
func decodeTxn(b []byte) (t txn, err error) {
	d := decoder{b: b}
	if version := d.byte(); version != txnVersion {
		return t, fmt.Errorf("command version %d is no transaction", version)
	}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		c := comparison{key: string(d.bytes()), kind: comparisonKind(d.byte())}
		switch c.kind {
		case isAbsent, isPresent:
		case hasTag:
			c.tag = Tag(d.uvarint())
		default:
			return t, fmt.Errorf("comparison %d is not known to this binary; was it written by a newer one?", c.kind)
		}
		t.compare = append(t.compare, c)
	}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		key, value := d.bytes(), d.bytes()
		t.set = append(t.set, newPair(key, value))
	}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		t.remove = append(t.remove, Pair{Key: string(d.bytes())})
	}
	if d.bad || len(d.b) > 0 || len(t.set)+len(t.remove) == 0 {
		return t, errors.New("malformed transaction")
	}
	return t, nil
}

func (m *kvMachine) applyTxn(encoded []byte, at time.Time) ([]byte, error) {
	t, err := decodeTxn(encoded)
	if err != nil {
		return nil, err
	}
	failed := t.check(m.items)
	if len(failed) == 0 {
		return m.write(t.set, t.remove, at), nil
	}
	result := make([]byte, 8)
	for _, i := range failed {
		result = binary.AppendUvarint(result, i)
	}
	return result, nil
}

// decodeResult reads what applyTxn returned.
func (t txn) decodeResult(result []byte) (tag Tag, failed []uint64, err error) {
	d := decoder{b: result}
	if head := d.next(8); head != nil {
		tag = Tag(binary.BigEndian.Uint64(head))
	}
	for len(d.b) > 0 && !d.bad {
		i := d.uvarint()
		d.bad = d.bad || i >= uint64(len(t.compare))
		failed = append(failed, i)
	}
	if d.bad || (tag == 0) != (len(failed) > 0) { // from a leader of another version
		return 0, nil, fmt.Errorf("%w: the result is %x", ErrUnknownOutcome, result)
	}
	return tag, failed, nil
}

// failedError returns a 412 that names the keys whose comparisons do not hold, or nil if there are none.
func (t txn) failedError(failed []uint64) error {
	if len(failed) == 0 {
		return nil
	}
	e := &httpError{
		status: http.StatusPreconditionFailed, detail: `"if" does not hold for the keys in "failed"`, refused: true,
	}
	for _, i := range failed {
		e.failed = append(e.failed, t.compare[i].key)
	}
	return e
}

func (a *api) postTxn(w http.ResponseWriter, r *http.Request) error {
	t, err := readTxn(r)
	if err != nil {
		return err
	}
	var tag Tag
	var failed []uint64
	switch {
	case len(t.set)+len(t.remove) > 0:
		var result []byte
		if result, err = applyCommand(w, r, a.store, t.encode()); err == nil {
			tag, failed, err = t.decodeResult(result)
		}
	case len(t.compare) > 0: // it changes nothing, and needs no log entry
		err = a.store.Read(r.Context(), Linearizable, func() { failed = t.check(a.machine.items) })
	}
	if err == nil && tag != 0 {
		setTag(w, tag)
	}
	return cmp.Or(err, t.failedError(failed))
}

// readTxn reads a request for a transaction.
func readTxn(r *http.Request) (t txn, err error) {
	if _, err := readParameters(r, `the preconditions of a transaction are "if" in its body`, preconditions); err != nil {
		return t, err
	}
	parts, _, err := readObject(r, maxDepth+1) // a value to set is in an object of a member
	for _, part := range parts {
		switch {
		case err != nil:
		case part.Key == "if":
			t.compare, err = readComparisons(part)
		case part.Key == "set":
			t.set, err = members(part.Key, part.Value)
		case part.Key == "delete":
			t.remove, err = readKeys(part.Value)
		default:
			err = badRequest("the member %.40q is not known; a transaction has if, set and delete", part.Key)
		}
	}
	if err != nil {
		return t, err
	}
	if key, both := keyTwice(slices.Concat(t.set, t.remove)); both {
		return t, badRequest("the key %.40q is in both set and delete; which is meant cannot be known", key)
	}
	return t, nil
}

func readComparisons(part Pair) (list []comparison, err error) {
	pairs, err := members(part.Key, part.Value)
	if err != nil {
		return nil, err
	}
	for _, p := range pairs {
		c, ok := readComparison(p)
		if !ok {
			return nil, badRequest(`if: %.40q has the value %.40s; use "*", null, or an ETag with its quotes: `+
				`"\"17\""`, p.Key, p.Value)
		}
		list = append(list, c)
	}
	return list, nil
}

// readComparison reads null, "*" or an ETag.
func readComparison(p Pair) (c comparison, ok bool) {
	var text *string
	if json.Unmarshal([]byte(p.Value), &text) != nil {
		return c, false
	}
	if text == nil {
		return comparison{key: p.Key, kind: isAbsent}, true
	}
	if *text == "*" {
		return comparison{key: p.Key, kind: isPresent}, true
	}
	tag, weak, rest, ok := cutTag(*text)
	if weak {
		tag = 0 // it never matches
	}
	return comparison{p.Key, hasTag, tag}, ok && rest == ""
}

// readKeys reads an array of keys, each of which may be named more than once.
func readKeys(part string) (list []Pair, err error) {
	var keys []string
	if err := json.Unmarshal([]byte(part), &keys); err != nil || part == "null" {
		return nil, badRequest("delete must be an array of keys")
	}
	slices.Sort(keys)
	for _, key := range slices.Compact(keys) {
		if err := checkKey(key); err != nil {
			return nil, badRequest("delete: %v", err)
		}
		list = append(list, Pair{Key: key})
	}
	return list, nil
}
