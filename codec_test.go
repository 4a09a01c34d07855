package main

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

func TestDecoder(t *testing.T) {
	good := appendString(appendString([]byte{7}, "key"), []byte("value"))
	read := func(b []byte) (kind byte, key, value string, d decoder) {
		d = decoder{b: b}
		kind, key, value = d.byte(), string(d.bytes()), string(d.bytes())
		return kind, key, value, d
	}
	if kind, key, value, d := read(good); kind != 7 || key != "key" || value != "value" || d.bad || len(d.b) > 0 {
		t.Errorf("got %d, %q, %q, bad %v, %d bytes left; want what was encoded", kind, key, value, d.bad, len(d.b))
	}
	for size := range good {
		_, _, value, d := read(good[:size])
		if !d.bad || value != "" {
			t.Errorf("cut to %d bytes: got value %q, bad %v; want none, true", size, value, d.bad)
		}
		if d.b = good; d.uvarint() != 0 || d.byte() != 0 || d.bytes() != nil {
			t.Errorf("cut to %d bytes: got a value after a bad one", size)
		}
	}
}

func TestSnapshotCodec(t *testing.T) {
	b := binary.BigEndian.AppendUint64(nil, 1<<60)
	b = appendString(appendString(binary.AppendUvarint(b, 300), "key"), "")
	read := func(b []byte, longest uint64) error {
		d := newSnapshotDecoder(bytes.NewReader(b), longest)
		fixed, number, key, empty := d.uint64(), d.uvarint(), string(d.bytes(nil)), string(d.bytes(make([]byte, 9)))
		if err := d.end(); err != nil {
			return err
		}
		if fixed != 1<<60 || number != 300 || key != "key" || empty != "" {
			t.Errorf("got %d, %d, %q, %q; want what was encoded", fixed, number, key, empty)
		}
		return nil
	}
	if err := read(b, 3); err != nil {
		t.Errorf("got %v; want no error", err)
	}
	for size := range len(b) {
		if read(b[:size], 3) == nil {
			t.Errorf("cut to %d bytes: got no error", size)
		}
	}
	if read(append(b, 0), 3) == nil {
		t.Error("a byte too many: got no error")
	}
	if err := read(b, 2); err == nil || !strings.Contains(err.Error(), "3 bytes") {
		t.Errorf("a string that is too long: got %v; want an error that says how long", err)
	}
}
