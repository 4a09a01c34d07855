package main

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Every parser of bytes that come from outside this process, or that lay on a disk, has a target here or in the two files
// beside it. Run one with go test -run '^$' -fuzz 'FuzzCommand$'; without -fuzz they run over their seeds.

// checkMemory runs f, which is given n foreign bytes, and fails the test if it allocates more than a fixed amount and a
// fixed multiple of what it is given: no byte may announce a thousand others and have memory made ready for them.
func checkMemory(t *testing.T, n, fixed int, f func()) {
	t.Helper()
	const multiple = 256
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	if got, most := after.TotalAlloc-before.TotalAlloc, uint64(fixed+multiple*n); got > most {
		t.Errorf("got %d bytes allocated for %d; want at most %d", got, n, most)
	}
}

func FuzzEntry(f *testing.F) {
	entry := encodeEntry(time.UnixMicro(1e15), [][]byte{[]byte("a"), nil, []byte("b")})
	f.Add(entry)
	f.Add(entry[entryHeader:])
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var commands [][]byte
		var err error
		checkMemory(t, len(b), 1<<20, func() { commands, err = decodeCommands(b) })
		if at, whole, err := decodeEntry(b); err == nil {
			if again, same, err := decodeEntry(encodeEntry(at, whole)); err != nil || again != at || cmp.Diff(whole, same) != "" {
				t.Errorf("got %q of %v, error %v; want %q of %v", same, again, err, whole, at)
			}
		}
		if err != nil {
			return
		}
		_, again, err := decodeEntry(encodeEntry(time.UnixMicro(1), commands))
		if diff := cmp.Diff(commands, again); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	})
}

func FuzzOutcome(f *testing.F) {
	f.Add(encodeOutcome(outcome{index: 7, results: [][]byte{[]byte("x"), nil}}))
	f.Add(encodeOutcome(outcome{err: ErrUnknownOutcome}))
	f.Add([]byte{0, 7, 1, 'x', 0})
	f.Add([]byte{0, 7, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var o outcome
		var err error
		checkMemory(t, len(b), 1<<20, func() { o, err = decodeOutcome(b) })
		if err != nil {
			return
		}
		again, err := decodeOutcome(encodeOutcome(o))
		if diff := cmp.Diff(o, again, cmp.AllowUnexported(outcome{}), cmpopts.EquateErrors()); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	})
}

// readFormat returns the content of a snapshot.
func readFormat(b []byte) (index uint64, content []byte, err error) {
	r := &snapshotReader{r: bufio.NewReader(bytes.NewReader(b))}
	if index, _, err = r.header(); err == nil {
		content, err = io.ReadAll(r)
	}
	if err == nil {
		_, err = r.finish()
	}
	return index, content, err
}

func FuzzSnapshotFormat(f *testing.F) {
	f.Add([]byte(framedAt(7, "content")))
	f.Add([]byte(snapshotMagic + "\x00\x00\x00\x00\x00\x00\x00\x07\xff\xff\xff\xff1234"))
	f.Add([]byte(snapshotMagic + "\x00\x00\x00\x00\x00\x00\x00\x07\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var content []byte
		var err error
		checkMemory(t, len(b), 1<<20, func() { _, content, err = readFormat(b) })
		if err == nil && len(content) > len(b) {
			t.Errorf("got %d bytes out of %d", len(content), len(b))
		}
	})
}

// Whatever is written comes back, in writes of any size, and no bit of it can change without being noticed.
func FuzzSnapshotRoundTrip(f *testing.F) {
	f.Add([]byte("content"), uint16(3), uint(77))
	f.Add([]byte{}, uint16(1), uint(0))
	f.Fuzz(func(t *testing.T, content []byte, size uint16, at uint) {
		var b bytes.Buffer
		captured := &snapshot{index: 7, write: func(w io.Writer) error {
			for chunk := range slices.Chunk(content, int(size)+1) {
				if _, err := w.Write(chunk); err != nil {
					return err
				}
			}
			return nil
		}}
		if err := captured.writeTo(&b); err != nil {
			t.Fatal(err)
		}
		index, got, err := readFormat(b.Bytes())
		if err != nil || index != 7 || !bytes.Equal(got, content) {
			t.Errorf("got %q of entry %d, error %v; want %q of 7", got, index, err, content)
		}
		at %= uint(8 * b.Len())
		b.Bytes()[at/8] ^= 1 << (at % 8)
		if _, _, err := readFormat(b.Bytes()); err == nil {
			t.Errorf("bit %d changed, and nobody noticed", at)
		}
	})
}

// What beside the log is kept with a checksum.
func FuzzChecksum(f *testing.F) {
	f.Add([]byte("Vote"), []byte("12345678node1"))
	f.Add([]byte("Vote"), appendChecksum([]byte("Vote"), []byte("12345678node1")))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, key, b []byte) {
		if value, err := checkChecksum(key, b); err == nil && !bytes.Equal(appendChecksum(key, value), b) {
			t.Errorf("got %q out of %q, whose checksum is another", value, b)
		}
		if value, err := checkChecksum(key, appendChecksum(key, b)); err != nil || !bytes.Equal(value, b) {
			t.Errorf("got %q, error %v; want %q", value, err, b)
		}
	})
}

// loadText loads the configuration that lines of NAME=value make up. Files that are named are not for fuzzing.
func loadText(text string) (*Config, error) {
	env := make(map[string]string)
	for line := range strings.Lines(text) {
		if name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "="); !strings.HasSuffix(name, "_FILE") {
			env[name] = value
		}
	}
	return loadConfig(func(name string) string { return env[name] }, system{hostname: "a", hostIPv4: func() string { return "127.0.0.1" }})
}

func FuzzConfig(f *testing.F) {
	for _, text := range []string{
		"", "NODE_ID=node1\nHTTP_PORT=1\nRAFT_PORT=65535", "HTTP_PORT=tcp://10.0.0.1:80\nRAFT_PORT=0", "KV_STORE=memory\nLOG_LEVEL=OFF\nLOG_FORMAT=json",
		"RAFT_ADDR=[::1]\nHTTP_ADDR=::\nHTTP_PORT=007\nRAFT_PORT=7", "SHUTDOWN_TIMEOUT=1m30s\nSNAPSHOT_INTERVAL=-5ms\nTRAILING_LOGS=18446744073709551616",
		"RAFT_ADVERTISE_ADDR=host\nRAFT_ADVERTISE_PORT=9\nPEERS=a@h:1,b@10.0.0.1:2", "NODE_ID=../../etc", "MAX_BODY_BYTES=16777217\nSTATE_DIR=\x00",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		cfg, err := loadText(text)
		if err != nil {
			for line := range strings.Lines(err.Error()) {
				named := func(name string) bool { return strings.Contains(line, name) }
				if !slices.ContainsFunc(variableNames(), named) {
					t.Errorf("got problem %q, which names no variable", line)
				}
			}
			return
		}
		for _, addr := range []string{cfg.HTTPAddr, cfg.RaftAddr, cfg.RaftAdvertise} {
			host, port, err := net.SplitHostPort(addr)
			if n, err2 := strconv.Atoi(port); err != nil || err2 != nil || host == "" || n < 1 || n > 65535 || strconv.Itoa(n) != port {
				t.Errorf("got address %q", addr)
			}
		}
		self := func(p Peer) bool { return p.ID == cfg.NodeID && p.Addr == cfg.RaftAdvertise }
		if !validID(cfg.NodeID) || !slices.ContainsFunc(cfg.Peers, self) || cfg.MaxBodyBytes < 1 || cfg.MaxBodyBytes > maxBodyBytes ||
			cfg.ShutdownTimeout <= 0 || cfg.SnapshotInterval <= 0 || cfg.StateDir == "" {
			t.Errorf("got %+v", cfg)
		}
	})
}

// What PEERS was understood as is understood as the same again.
func FuzzPeers(f *testing.F) {
	for _, s := range []string{
		"a@h:1", "a@10.0.0.1:1,b@[::1]:2", "a@::1:5,", "@:", "a@h:0", "a@1.2.3:4", "a@h:1,a@h:1", "a@h:01, b@H:1", "a@[::ffff:1.2.3.4]:1", "a@[fe80::1%eth0]:1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if strings.Contains(s, "\n") {
			return // loadText would take it for a variable
		}
		cfg, err := loadText("NODE_ID=a\nPEERS=" + s)
		if err != nil {
			return
		}
		var entries []string
		for _, p := range cfg.Peers {
			if host, port, err := net.SplitHostPort(p.Addr); err != nil || host == "" || port == "" || !validID(p.ID) {
				t.Errorf("got peer %v out of %q", p, s)
			}
			entries = append(entries, p.ID+"@"+p.Addr)
		}
		again, err := loadText("NODE_ID=a\nPEERS=" + strings.Join(entries, ","))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(cfg.Peers, again.Peers); diff != "" {
			t.Errorf("read, written and read again (-want +got):\n%s", diff)
		}
	})
}
