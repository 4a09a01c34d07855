package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// This file helps a state machine with its bytes: appendString writes, decoder reads commands and results, and
// snapshotDecoder reads snapshots. A number is a uvarint, as in encoding/binary, or 8 bytes in big-endian order
// where the method's name says so. A string or a slice of bytes follows its length, which is a uvarint.

// appendString appends s, after its length, to b and returns the extended slice.
func appendString[T string | []byte](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// decoder reads values from the front of a slice of bytes. When a value is malformed or missing, bad becomes true; that
// value and all after it are zero. So callers check bad once, at the end.
type decoder struct {
	b   []byte // what has not been read yet
	bad bool
}

// next returns the next n bytes, which share b's memory.
func (d *decoder) next(n uint64) []byte {
	if d.bad = d.bad || n > uint64(len(d.b)); d.bad {
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

// bytes returns the bytes after a length. They share b's memory.
func (d *decoder) bytes() []byte { return d.next(d.uvarint()) }

func (d *decoder) byte() byte {
	if p := d.next(1); p != nil {
		return p[0]
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

// snapshotDecoder reads the same from a stream. After an error all values are zero; callers check end once, and in
// loops err, since the number of rounds may be damaged, too.
type snapshotDecoder struct {
	r       *bufio.Reader
	longest uint64 // length of a string that is read; the longer ones are errors
	err     error
}

// newSnapshotDecoder returns a decoder that reads from r. No string is longer than longest bytes: a damaged length must
// not make us allocate more.
func newSnapshotDecoder(r io.Reader, longest uint64) *snapshotDecoder {
	return &snapshotDecoder{r: bufio.NewReader(r), longest: longest}
}

func (d *snapshotDecoder) uint64() uint64 {
	var b [8]byte
	d.read(b[:])
	return binary.BigEndian.Uint64(b[:])
}

func (d *snapshotDecoder) uvarint() (v uint64) {
	if d.err == nil {
		v, d.err = binary.ReadUvarint(d.r)
	}
	return v
}

// bytes returns a string's bytes. They are in buf's memory if they fit there.
func (d *snapshotDecoder) bytes(buf []byte) []byte {
	size := d.uvarint()
	if d.err == nil && size > d.longest {
		d.err = fmt.Errorf("a string of %d bytes is longer than %d", size, d.longest)
	}
	if d.err != nil {
		return buf[:0]
	}
	buf = slices.Grow(buf[:0], int(size))[:size]
	d.read(buf)
	return buf
}

func (d *snapshotDecoder) read(p []byte) {
	if d.err == nil {
		_, d.err = io.ReadFull(d.r, p)
	}
}

// end returns the error that there has been, or one if bytes are left.
func (d *snapshotDecoder) end() error {
	if d.err != nil {
		return d.err
	}
	if _, err := d.r.ReadByte(); !errors.Is(err, io.EOF) {
		return errors.Join(errors.New("bytes follow the end"), err)
	}
	return nil
}
