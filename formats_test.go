package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// The formats of what is on disk and between nodes, byte by byte: nodes of another version of this program read them, and
// so does this node after an upgrade. Nothing here may change; a new version of a format gets bytes of its own.

// format is one of them: what is written, and what those bytes mean to a reader.
type format struct {
	bytes string // in hex, with spaces between its parts; or JSON
	write func() []byte
	read  func(golden []byte) (got any, err error)
	want  any // from read
}

// checkFormat checks both ways.
func checkFormat(t *testing.T, f format) {
	t.Helper()
	golden := []byte(f.bytes)
	if !strings.HasPrefix(f.bytes, "{") {
		var err error
		if golden, err = hex.DecodeString(strings.ReplaceAll(f.bytes, " ", "")); err != nil {
			t.Fatal(err)
		}
	}
	if written := f.write(); !bytes.Equal(written, golden) {
		t.Errorf("got %x (%q) written; want %x (%q)", written, written, golden, golden)
	}
	if got, err := f.read(golden); err != nil {
		t.Errorf("got error %v when read; want none", err)
	} else if diff := cmp.Diff(f.want, got); diff != "" {
		t.Errorf("read (-want +got):\n%s", diff)
	}
}

func TestFormats(t *testing.T) {
	members := []member{{"node1#A", "host1:12000", true}, {"node2#B", "[::1]:12000", false}}
	who := nodeInfo{
		Server: "node1#A", Cluster: "node1#A", Address: "host1:12000", Peers: []string{"node1", "node2"},
		LastTerm: 7, LastIndex: 300, Applied: 299, Ready: true, Members: members, Commands: 2, Lowest: 1, Behind: "node2", WaitsFor: "w", Resize: "r",
	}
	frames := func(b []byte) (any, error) {
		f, err := readFrame(bufio.NewReader(bytes.NewReader(b)))
		return []any{f.op, string(f.payload)}, err
	}
	snapshots := func(b []byte) (any, error) {
		m := &goldenMachine{}
		r := newTestReplica(t, m)
		err := restoreFrom(r, b)
		return []any{r.applied.load(), r.maxVersion.Load(), string(m.state)}, err
	}
	for name, f := range map[string]format{
		"log entry": {
			// version, CRC-32C, microseconds, two commands
			"01 8dbdfd12 00060a24181e4000 03010203 00",
			func() []byte { return encodeEntry(testTime, [][]byte{{1, 2, 3}, {}}) },
			func(b []byte) (any, error) {
				at, commands, err := decodeEntry(b)
				return []any{at, commands}, err
			},
			[]any{testTime.UTC(), [][]byte{{1, 2, 3}, {}}},
		},
		"snapshot of commands of version 1": {
			// magic, index, state, CRC-32C
			"52 53 54 53 4e 41 50 02 000000000000012c 7374617465 4aeb498c",
			func() []byte { return goldenSnapshot(t, 1) },
			snapshots,
			[]any{uint64(300), uint32(1), "state"},
		},
		"snapshot of commands of version 2": {
			// magic, index, version, state, CRC-32C
			"52 53 54 53 4e 41 50 03 000000000000012c 02 7374617465 8ad826a4",
			func() []byte { return goldenSnapshot(t, 2) },
			snapshots,
			[]any{uint64(300), uint32(2), "state"},
		},
		"hello": {
			// magic, kind, sender, target, cluster
			"52 53 54 52 41 46 54 02 43 07 6e6f64653123 41 07 6e6f646532 2342 07 6e6f64653123 41",
			hello{'C', "node1#A", "node2#B", "node1#A"}.encode,
			func(b []byte) (any, error) {
				h, err := readHello(bytes.NewReader(b))
				return []any{h.kind, h.sender, h.target, h.cluster}, err
			},
			[]any{kindCall, "node1#A", "node2#B", "node1#A"},
		},
		"call": {
			// length of the rest, op, payload
			"00000009 02 000000000000012c",
			frameOf(frame{opReadIndex, []byte("\x00\x00\x00\x00\x00\x00\x01\x2c")}),
			frames,
			[]any{byte(2), "\x00\x00\x00\x00\x00\x00\x01\x2c"},
		},
		"answer":                  {"00000002 00 01", frameOf(frame{0, []byte{1}}), frames, []any{byte(0), "\x01"}},
		"answer that is an error": {"00000003 01 6e6f", frameOf(frame{1, []byte("no")}), frames, []any{byte(1), "no"}},
		"commands that are forwarded": {
			"03010203 00",
			func() []byte { return appendCommands(nil, [][]byte{{1, 2, 3}, {}}) },
			func(b []byte) (any, error) { return decodeCommands(b) },
			[][]byte{{1, 2, 3}, {}},
		},
		"outcome of them": {
			// status, index, two results
			"00 ac02 03010203 00",
			func() []byte { return encodeOutcome(outcome{index: 300, results: [][]byte{{1, 2, 3}, {}}}) },
			readGoldenOutcome,
			[]any{"", uint64(300), [][]byte{{1, 2, 3}, {}}},
		},
		"outcome without a leader": {"01 00", outcomeOfError(ErrNotLeader), readGoldenOutcome, noOutcome(ErrNotLeader)},
		"outcome overloaded":       {"02 00", outcomeOfError(ErrOverloaded), readGoldenOutcome, noOutcome(ErrOverloaded)},
		"outcome not in time":      {"03 00", outcomeOfError(ErrNotInTime), readGoldenOutcome, noOutcome(ErrNotInTime)},
		"outcome unknown":          {"04 00", outcomeOfError(ErrUnknownOutcome), readGoldenOutcome, noOutcome(ErrUnknownOutcome)},
		"who a node is": {
			`{"server":"node1#A","cluster":"node1#A","address":"host1:12000","peers":["node1","node2"],"last_term":7,"last_index":300,"applied":299,"ready":true,` +
				`"members":[{"server":"node1#A","address":"host1:12000","voter":true},{"server":"node2#B","address":"[::1]:12000","voter":false}],` +
				`"commands":2,"lowest":1,"behind":"node2","resize":"r","waits_for":"w"}`,
			func() []byte { b, _ := json.Marshal(who); return b },
			func(b []byte) (got any, err error) {
				var info nodeInfo
				err = json.Unmarshal(b, &info)
				return info, err
			},
			who,
		},
		"identity": {
			`{"version":1,"server":"node1#A","cluster":"node1#A","bootstrap":[{"server":"node1#A","address":"host1:12000","voter":true},` +
				`{"server":"node2#B","address":"[::1]:12000","voter":false}]}`,
			func() []byte {
				b, _ := json.Marshal(identity{identityVersion, "node1#A", "node1#A", members})
				return b
			},
			func(b []byte) (any, error) {
				var id identity
				err := json.Unmarshal(b, &id)
				return id, err
			},
			identity{1, "node1#A", "node1#A", members},
		},
		"vote in the database": {
			// term, candidate, CRC-32C of key and value
			"0000000000000007 6e6f64653223 42 49514ff9",
			func() []byte { return writeGoldenVote(t) },
			func(b []byte) (any, error) {
				mem := raft.NewInmemStore()
				disk := newDiskStore(mem, "", nil, newMetrics(), &testStorageNode{t: t})
				votes := &stableStore{StableStore: disk}
				if err := mem.Set([]byte("Vote"), b); err != nil {
					return nil, err
				}
				term, candidate, err := votes.vote()
				return []any{term, string(candidate)}, err
			},
			[]any{uint64(7), "node2#B"},
		},
	} {
		t.Run(name, func(t *testing.T) { checkFormat(t, f) })
	}
}

// Names and numbers that are parts of formats.
func TestNamesInFormats(t *testing.T) {
	got := []string{
		dbName, snapshotsDir, metaName, tmpSuffix,
		string(keyIdentity), string(keyCurrentTerm), string(keyVote),
		string([]byte{kindRaft, kindCall, kindAsk}), string([]byte{opApply, opReadIndex, opTerm, opWho}),
		string(raftAddress("node1#A", "host1:12000")),
	}
	want := []string{
		"raft.db", "snapshots", "meta.json", ".tmp",
		"Identity", "CurrentTerm", "Vote",
		"RCA", "\x01\x02\x03\x04",
		"node1#A@host1:12000",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func frameOf(f frame) func() []byte {
	return func() []byte {
		var b bytes.Buffer
		_ = writeFrame(&b, f)
		return b.Bytes()
	}
}

func outcomeOfError(err error) func() []byte {
	return func() []byte { return encodeOutcome(outcome{err: err}) }
}

// noOutcome is what readGoldenOutcome returns then.
func noOutcome(err error) []any { return []any{err.Error(), uint64(0), [][]byte(nil)} }

func readGoldenOutcome(b []byte) (any, error) {
	o, err := decodeOutcome(b)
	reason := ""
	if o.err != nil {
		reason = o.err.Error()
	}
	return []any{reason, o.index, o.results}, err
}

// goldenMachine knows commands of version 2.
type goldenMachine struct{ blobMachine }

func (*goldenMachine) CommandVersion() byte { return 2 }

func goldenSnapshot(t *testing.T, version uint32) []byte {
	t.Helper()
	r := newTestReplica(t, &goldenMachine{blobMachine{[]byte("state")}})
	r.applied.advance(300)
	r.maxVersion.Store(version)
	return snapshotOf(t, r)
}

func writeGoldenVote(t *testing.T) []byte {
	t.Helper()
	mem := raft.NewInmemStore()
	castVote(t, &stableStore{StableStore: newDiskStore(mem, "", nil, newMetrics(), &testStorageNode{t: t})}, 7, "node2#B")
	b, err := mem.Get([]byte("Vote"))
	if err != nil {
		t.Error(err)
	}
	return b
}
