package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"io"
	"os"
	"slices"

	"github.com/hashicorp/raft"
)

// bbolt has a checksum over its meta pages and over nothing else, so we put our own, CRC-32C, beside each value and entry.
const checksumSize = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var errChecksum = errors.New("checksum mismatch")

func damaged(path string, cause any) error {
	err, ok := cause.(error)
	if !ok {
		err = fmt.Errorf("%v", cause) // what a library panicked with
	}
	return fmt.Errorf("%s is damaged (%w); nothing was changed: restore the disk, or move the whole state directory "+
		"away and start this node without state, to be filled by the others", path, err)
}

// seal returns value followed by a CRC-32C over key and value.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(slices.Clip(value), valueSum(key, value))
}

// unseal returns what was sealed.
func unseal(key, sealed []byte) ([]byte, error) {
	n := len(sealed) - checksumSize
	if n < 0 || binary.BigEndian.Uint32(sealed[n:]) != valueSum(key, sealed[:n]) {
		return nil, fmt.Errorf("value of %q: %w", key, errChecksum)
	}
	return sealed[:n], nil
}

func valueSum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}

func entrySum(l *raft.Log) uint32 {
	var head [17]byte
	binary.BigEndian.PutUint64(head[:], l.Index)
	binary.BigEndian.PutUint64(head[8:], l.Term)
	head[16] = byte(l.Type)
	return crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, l.Data)
}

// sealEntries returns copies of the entries with their checksums as Extensions, which nobody else uses. The entries
// themselves are shared with goroutines that send them.
func sealEntries(entries []*raft.Log) []*raft.Log {
	copies := make([]raft.Log, len(entries))
	sums := make([]byte, 0, checksumSize*len(entries))
	sealed := make([]*raft.Log, len(entries))
	for i, l := range entries {
		sums = binary.BigEndian.AppendUint32(sums, entrySum(l))
		copies[i] = *l
		copies[i].Extensions = sums[checksumSize*i:]
		sealed[i] = &copies[i]
	}
	return sealed
}

// unsealEntry checks the entry that was read at index and takes its checksum away.
func unsealEntry(index uint64, l *raft.Log) error {
	if len(l.Extensions) != checksumSize || binary.BigEndian.Uint32(l.Extensions) != entrySum(l) {
		return fmt.Errorf("log entry %d: %w", index, errChecksum)
	}
	if l.Index != index {
		return fmt.Errorf("log entry %d says that it is entry %d", index, l.Index)
	}
	l.Extensions = nil
	return nil
}

// checkMeta says whether both of bbolt's meta pages are valid. With one that is not, bbolt takes the other, which may be
// the older: without a word the last commit is lost, and it may be a vote or an entry that was acknowledged.
func checkMeta(path string) error {
	const (
		head = 16 // of a page
		size = 64 // of the meta data after it, the last 8 bytes of which are the checksum
	)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	at := int64(0)
	for page := range 2 {
		var meta [size]byte
		if _, err := f.ReadAt(meta[:], at+head); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		hash := fnv.New64a()
		_, _ = hash.Write(meta[:size-8])
		if binary.NativeEndian.Uint32(meta[:]) != 0xED0CDAED || binary.NativeEndian.Uint32(meta[4:]) != 2 ||
			binary.NativeEndian.Uint64(meta[size-8:]) != hash.Sum64() {
			return fmt.Errorf("meta page %d is not valid", page)
		}
		at = int64(binary.NativeEndian.Uint32(meta[8:]))
	}
	return nil
}
