package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// This file is the transaction, POST /txn: a comparison of tags and the writes that depend on it, as one command.

// Txn sets and deletes keys if all that it expects holds. No key is both set and deleted.
type Txn struct {
	If     []Expectation
	Set    []Pair
	Delete []Pair // keys alone
}

// Expectation is what must hold of a key.
type Expectation struct {
	Key  string
	Kind expectationKind
	Tag  Tag // for expectTag; 0 for a tag that no key ever has
}

// expectationKind is part of the format of a command.
type expectationKind byte

const (
	expectAbsent  expectationKind = 0 // the key is not there
	expectPresent expectationKind = 1 // it is there
	expectTag     expectationKind = 2 // it is there with this tag
)

func (e Expectation) holds(tag Tag) bool {
	switch e.Kind {
	case expectAbsent:
		return tag == 0
	case expectPresent:
		return tag != 0
	default:
		return tag != 0 && tag == e.Tag
	}
}

// unmet returns the indexes of what does not hold of a state.
func (t Txn) unmet(items *btree.Map[string, Item]) (indexes []uint64) {
	for i, e := range t.If {
		if item, _ := items.Get(e.Key); !e.holds(item.Tag) {
			indexes = append(indexes, uint64(i))
		}
	}
	return indexes
}

// Txn executes a transaction. If not all that it expects holds it writes nothing, and the error is an *UnmetError. One that writes
// nothing anyway is a linearizable read, needs no place in the log and has no tag.
func (kv *KV) Txn(ctx context.Context, t Txn) (written Written, err error) {
	var unmet []uint64
	if len(t.Set)+len(t.Delete) == 0 {
		if len(t.If) > 0 {
			err = kv.store.Read(ctx, Linearizable, func() { unmet = t.unmet(kv.machine.items) })
		}
		return Written{}, errors.Join(err, t.failed(unmet))
	}
	result, err := kv.store.Apply(ctx, t.encode())
	if err != nil {
		return Written{}, err
	}
	tag, unmet, err := t.decodeResult(result.Data)
	if err != nil {
		return Written{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	if err := t.failed(unmet); err != nil {
		return Written{}, err
	}
	return Written{Index: result.Index, Tag: tag}, nil
}

// UnmetError names the keys of which a transaction expected something else. Nothing was written.
type UnmetError struct{ Keys []string }

func (e *UnmetError) Error() string { return ErrCondition.Error() }

// failedKeys is for the answer.
func (e *UnmetError) failedKeys() []string { return e.Keys }

// Unwrap makes it an ErrCondition, and one that has a status.
func (e *UnmetError) Unwrap() []error {
	return []error{ErrCondition, &httpError{http.StatusPreconditionFailed, `"if" does not hold of the keys in "failed"`}}
}

func (t Txn) failed(unmet []uint64) error {
	if len(unmet) == 0 {
		return nil
	}
	e := new(UnmetError)
	for _, i := range unmet {
		e.Keys = append(e.Keys, t.If[i].Key)
	}
	return e
}

// The format of a transaction as a command: a version byte; the number of expectations, and of each its key, its kind and, for
// expectTag, the tag; the number of pairs to set, and of each its key and value; the number of keys to delete, and these. Strings
// stand behind their lengths; numbers are uvarints. The result is the new tag as 8 bytes, or 8 zeros and the indexes of the
// expectations that did not hold.
const txnVersion = 2

// CommandVersion returns the newest version that Apply can read: a command begins with its version.
func (m *kvMachine) CommandVersion() byte { return txnVersion }

func (t Txn) encode() []byte {
	b := binary.AppendUvarint([]byte{txnVersion}, uint64(len(t.If)))
	for _, e := range t.If {
		b = append(appendString(b, e.Key), byte(e.Kind))
		if e.Kind == expectTag {
			b = binary.AppendUvarint(b, uint64(e.Tag))
		}
	}
	b = binary.AppendUvarint(b, uint64(len(t.Set)))
	for _, p := range t.Set {
		b = appendString(appendString(b, p.Key), p.Value)
	}
	b = binary.AppendUvarint(b, uint64(len(t.Delete)))
	for _, p := range t.Delete {
		b = appendString(b, p.Key)
	}
	return b
}

// decodeTxn copies what it returns out of b.
func decodeTxn(b []byte) (t Txn, err error) {
	d := decoder{b: b}
	if version := d.byte(); version != txnVersion {
		return t, fmt.Errorf("command version %d is no transaction", version)
	}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		e := Expectation{Key: string(d.take(d.uvarint())), Kind: expectationKind(d.byte())}
		switch e.Kind {
		case expectAbsent, expectPresent:
		case expectTag:
			e.Tag = Tag(d.uvarint())
		default:
			return t, fmt.Errorf("expectation %d is not known to this binary; was it written by a newer one?", e.Kind)
		}
		t.If = append(t.If, e)
	}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		key, value := d.take(d.uvarint()), d.take(d.uvarint())
		t.Set = append(t.Set, newPair(key, value))
	}
	for n := d.uvarint(); n > 0 && !d.bad; n-- {
		t.Delete = append(t.Delete, Pair{Key: string(d.take(d.uvarint()))})
	}
	if d.bad || len(d.b) > 0 || len(t.Set)+len(t.Delete) == 0 {
		return t, errors.New("malformed command")
	}
	return t, nil
}

func (m *kvMachine) applyTxn(encoded []byte, at time.Time) ([]byte, error) {
	t, err := decodeTxn(encoded)
	if err != nil {
		return nil, err
	}
	unmet := t.unmet(m.items)
	if len(unmet) == 0 {
		return m.write(t.Set, t.Delete, at), nil
	}
	result := make([]byte, 8)
	for _, i := range unmet {
		result = binary.AppendUvarint(result, i)
	}
	return result, nil
}

func (t Txn) decodeResult(b []byte) (tag Tag, unmet []uint64, err error) {
	d := decoder{b: b}
	if head := d.take(8); head != nil {
		tag = Tag(binary.BigEndian.Uint64(head))
	}
	for len(d.b) > 0 && !d.bad {
		i := d.uvarint()
		d.bad = d.bad || i >= uint64(len(t.If))
		unmet = append(unmet, i)
	}
	if d.bad || (tag == 0) != (len(unmet) > 0) {
		return 0, nil, fmt.Errorf("the result %x cannot be read", b)
	}
	return tag, unmet, nil
}

// postTxn answers POST /txn.
func (a *api) postTxn(w http.ResponseWriter, r *http.Request) error {
	if _, err := readQuery(r); err != nil {
		return err
	}
	if err := refuse(r, `what a transaction depends on stands in its body, as "if"`,
		"If-Match", "If-None-Match", "If-Unmodified-Since", "If-Modified-Since"); err != nil {
		return err
	}
	txn, err := readTxn(r)
	if err != nil {
		return err
	}
	written, err := a.kv.Txn(r.Context(), txn)
	if err != nil || written.Tag == 0 {
		return err
	}
	setTag(w, written.Tag)
	return wrote(w, written)
}

// readTxn reads the body of POST /txn.
func readTxn(r *http.Request) (t Txn, err error) {
	body, err := readBody(r)
	if err != nil {
		return t, err
	}
	body, err = compactJSON(body, maxDepth+2) // a value to set stands in two objects
	if err != nil {
		return t, err
	}
	parts, err := members(body)
	if err != nil {
		return t, err
	}
	for _, part := range parts {
		switch part.Key {
		case "if":
			t.If, err = readExpectations(part.Value)
		case "set":
			t.Set, err = readMembers(part)
		case "delete":
			t.Delete, err = readKeys(part.Value)
		default:
			err = badRequest("the member %.40q is not known; a transaction has if, set and delete", part.Key)
		}
		if err != nil {
			return t, err
		}
	}
	for _, p := range t.Delete {
		if _, both := slices.BinarySearchFunc(t.Set, p.Key, compareKey); both {
			return t, badRequest("the key %.40q is in both set and delete; which is meant cannot be known", p.Key)
		}
	}
	return t, nil
}

func compareKey(p Pair, key string) int { return strings.Compare(p.Key, key) }

// readMembers returns the members of a part that must be an object, in the order of their keys.
func readMembers(part Pair) ([]Pair, error) {
	if part.Value[0] != '{' {
		return nil, badRequest("%s must be an object", part.Key)
	}
	return members([]byte(part.Value))
}

func readExpectations(part string) (list []Expectation, err error) {
	pairs, err := readMembers(Pair{"if", part})
	if err != nil {
		return nil, err
	}
	for _, p := range pairs {
		e := Expectation{Key: p.Key}
		if p.Value != "null" {
			if e.Kind, e.Tag, err = readExpected(p.Value); err != nil {
				return nil, badRequest(`if: %.40q is expected to be %.40s: say "*", null, or an ETag with its quotes, like "\"17\""`, p.Key, p.Value)
			}
		}
		list = append(list, e)
	}
	return list, nil
}

// readExpected reads "*" or an ETag. One that is weak, or that this service never gave, is that of no key.
func readExpected(value string) (expectationKind, Tag, error) {
	var text string
	if err := json.Unmarshal([]byte(value), &text); err != nil {
		return 0, 0, err
	}
	if text == "*" {
		return expectPresent, 0, nil
	}
	opaque, rest, ok := cutTag(strings.TrimPrefix(text, "W/"))
	if !ok || rest != "" {
		return 0, 0, errors.New("no entity tag")
	}
	n, err := strconv.ParseUint(opaque, 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != opaque || strings.HasPrefix(text, "W/") {
		n = 0
	}
	return expectTag, Tag(n), nil
}

// readKeys reads an array of keys. To delete one twice is to delete it.
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
