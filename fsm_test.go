package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
	"weak"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

// sameCommands compares commands; an empty list is no list.
var sameCommands = cmp.Options{cmp.AllowUnexported(command{}), cmpopts.EquateEmpty()}

func genTags() *rapid.Generator[*Tags] {
	return rapid.Custom(func(t *rapid.T) *Tags {
		if rapid.Bool().Draw(t, "absent") {
			return nil
		}
		return &Tags{
			Any:  rapid.Bool().Draw(t, "any"),
			List: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Tag { return Tag(rapid.Uint64().Draw(t, "tag")) }), 0, 5).Draw(t, "list"),
		}
	})
}

// genText makes strings of any bytes, now and then long ones.
func genText() *rapid.Generator[string] {
	return rapid.OneOf(
		rapid.String(),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 20), func(b []byte) string { return string(b) }),
		rapid.Map(rapid.IntRange(120, 300), func(n int) string { return strings.Repeat("x", n) }),
	)
}

func genCommand() *rapid.Generator[command] {
	return rapid.Custom(func(t *rapid.T) command {
		c := command{
			op:        rapid.SampledFrom([]operation{opSet, opDelete}).Draw(t, "op"),
			condition: Condition{Match: genTags().Draw(t, "match"), NoneMatch: genTags().Draw(t, "none match")},
		}
		for range rapid.IntRange(1, 4).Draw(t, "pairs") {
			p := Pair{Key: genText().Draw(t, "key")}
			if c.op == opSet {
				p.Value = genText().Draw(t, "value")
			}
			c.pairs = append(c.pairs, p)
		}
		return c
	})
}

func TestCommandRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := genCommand().Draw(t, "command")
		got, err := decodeCommand(want.encode())
		if err != nil {
			t.Fatalf("got error %v; want none", err)
		}
		if diff := cmp.Diff(want, got, sameCommands); diff != "" {
			t.Fatalf("commands differ (-want +got):\n%s", diff)
		}
	})
}

// The bytes of commands and snapshots are formats: nodes of another version of this program read them. TestTxnFormat has
// those of a transaction.
func TestCommandFormat(t *testing.T) {
	pairs := []Pair{{"a", "1"}, {"bc", `"v"`}}
	for golden, want := range map[string]command{
		// version, operation, condition; pairs
		"01 01 00" + "02 0161 0131 026263 03227622": {op: opSet, pairs: pairs},
		"01 02 00" + "01 0161":                      {op: opDelete, pairs: []Pair{{"a", ""}}},
		"01 01 01 02 ac02 07" + "01 0161 0131":      {op: opSet, condition: Condition{Match: &Tags{List: []Tag{300, 7}}}, pairs: pairs[:1]},
		"01 01 0c 00" + "01 0161 0131":              {op: opSet, condition: Condition{NoneMatch: &Tags{Any: true}}, pairs: pairs[:1]},
		"01 02 07 00 01 ac02" + "01 0161":           {op: opDelete, condition: Condition{Match: &Tags{Any: true}, NoneMatch: &Tags{List: []Tag{300}}}, pairs: []Pair{{"a", ""}}},
	} {
		b, err := hex.DecodeString(strings.ReplaceAll(golden, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if written := want.encode(); !bytes.Equal(written, b) {
			t.Errorf("got %x written; want %x", written, b)
		}
		if got, err := decodeCommand(b); err != nil {
			t.Errorf("%s: got error %v; want none", golden, err)
		} else if diff := cmp.Diff(want, got, sameCommands); diff != "" {
			t.Errorf("%s read (-want +got):\n%s", golden, diff)
		}
	}

	// last tag, number of keys; for each key and value with their lengths, and the tag
	b, err := hex.DecodeString("000000000000012c" + "0000000000000002" + "0161" + "0131" + "07" + "026263" + "03227622" + "ac02")
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine()
	install, err := m.Restore(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	install()
	a, _ := m.items.Get("a")
	bc, _ := m.items.Get("bc")
	if want := (Item{"1", 7}); a != want || bc != (Item{`"v"`, 300}) || m.lastTag != 300 || m.Len() != 2 {
		t.Errorf("got %v, %v, last tag %d, %d keys; want what was written", a, bc, m.lastTag, m.Len())
	}
	var written bytes.Buffer
	if err := m.Snapshot()(&written); err != nil || !bytes.Equal(written.Bytes(), b) {
		t.Errorf("got %x, %v written; want %x", written.Bytes(), err, b)
	}
	result, err := m.Apply(command{op: opDelete, pairs: []Pair{{"a", ""}}}.encode(), testTime)
	if err != nil || hex.EncodeToString(result) != "000000000000012d" {
		t.Errorf("got result %x, %v; want the tag 301", result, err)
	}
}

// checkDecoded makes sure that bytes which are not those of an encoder are refused or are a whole command all the same:
// one that can be executed, and that is no larger than they are.
func checkDecoded(b []byte) error {
	c, err := decodeCommand(b)
	if err != nil {
		return nil
	}
	if c.op != opSet && c.op != opDelete || len(c.pairs) == 0 {
		return fmt.Errorf("%x: got operation %d with %d pairs", b, c.op, len(c.pairs))
	}
	again := c.encode()
	if len(again) > len(b) {
		return fmt.Errorf("%x: got a command of %d bytes out of %d", b, len(again), len(b))
	}
	same, err := decodeCommand(again)
	if err != nil {
		return fmt.Errorf("%x: got error %w when encoded and decoded again", b, err)
	}
	if !reflect.DeepEqual(c, same) { // cmp is too slow for this many
		return fmt.Errorf("%x: got %+v when encoded and decoded again; want %+v", b, same, c)
	}
	return nil
}

func TestDamagedCommand(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		good := genCommand().Draw(t, "command").encode()
		for size := range good {
			if c, err := decodeCommand(good[:size]); err == nil {
				t.Fatalf("cut to %d of %d bytes: got %+v; want an error", size, len(good), c)
			}
		}
		if c, err := decodeCommand(append(bytes.Clone(good), 0)); err == nil {
			t.Fatalf("a byte too many: got %+v; want an error", c)
		}
		flip := rapid.ByteRange(1, 255).Draw(t, "flip")
		for i := range good {
			damaged := bytes.Clone(good)
			damaged[i] ^= flip
			if err := checkDecoded(damaged); err != nil {
				t.Fatalf("byte %d flipped: %v", i, err)
			}
		}
	})
}

func TestCommandThatCannotBeRead(t *testing.T) {
	huge := binary.AppendUvarint(nil, math.MaxUint64)
	tests := []struct {
		name  string
		bytes []byte
		want  string
	}{
		{"nothing", nil, "malformed command"},
		{"version 0", []byte{0, 1, 0, 1, 1, 'k', 0}, "command version 0 is not known"},
		{"a newer version", []byte{commandVersion + 1, 1, 0, 1, 1, 'k', 0}, "command version 2 is not known"},
		{"operation 0", []byte{1, 0, 0, 1, 1, 'k', 0}, "operation 0 is not known"},
		{"a newer operation", []byte{1, 3, 0, 1, 1, 'k', 0}, "operation 3 is not known"},
		{"an unknown bit in the condition", []byte{1, 1, 16, 1, 1, 'k', 0}, "malformed command"},
		{"no pairs", []byte{1, 1, 0, 0}, "malformed command"},
		{"fewer pairs than announced", []byte{1, 2, 0, 2, 1, 'k'}, "malformed command"},
		{"more pairs than memory holds", append([]byte{1, 1, 0}, huge...), "malformed command"},
		{"more tags than memory holds", append([]byte{1, 1, 1}, huge...), "malformed command"},
		{"a key longer than memory", append([]byte{1, 1, 0, 1}, huge...), "malformed command"},
		{"a number of more than 64 bits", append([]byte{1, 1, 0}, bytes.Repeat([]byte{0xff}, 11)...), "malformed command"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := decodeCommand(tt.bytes)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %+v, error %v; want error %q", c, err, tt.want)
			}
			machine := newMachine()
			if _, err := machine.Apply(tt.bytes, testTime); err == nil {
				t.Error("apply: got no error; want one")
			}
			if machine.items.Len() != 0 || machine.lastTag != 0 {
				t.Errorf("got state %+v; want none", stateOf(machine))
			}
		})
	}
}

func TestCondition(t *testing.T) {
	const missing, mine, another, third = Tag(0), Tag(5), Tag(6), Tag(7)
	anyTag := &Tags{Any: true}
	list := func(tags ...Tag) *Tags { return &Tags{List: tags} }
	tests := []struct {
		name      string
		condition Condition
		tag       Tag
		want      bool
	}{
		{"none, of an existing key", Condition{}, mine, true},
		{"none, of a missing key", Condition{}, missing, true},

		{"match any, of an existing key", Condition{Match: anyTag}, mine, true},
		{"match any, of a missing key", Condition{Match: anyTag}, missing, false},
		{"match its tag", Condition{Match: list(mine)}, mine, true},
		{"match its tag among others", Condition{Match: list(another, mine, third)}, mine, true},
		{"match other tags", Condition{Match: list(another, third)}, mine, false},
		{"match tags, of a missing key", Condition{Match: list(mine, another)}, missing, false},
		{"match tag 0, of a missing key", Condition{Match: list(0)}, missing, false},
		{"match no tags, of an existing key", Condition{Match: list()}, mine, false},
		{"match no tags, of a missing key", Condition{Match: list()}, missing, false},
		{"match any beside other tags", Condition{Match: &Tags{Any: true, List: []Tag{another}}}, mine, true},

		{"none-match any, of an existing key", Condition{NoneMatch: anyTag}, mine, false},
		{"none-match any, of a missing key", Condition{NoneMatch: anyTag}, missing, true},
		{"none-match its tag", Condition{NoneMatch: list(mine)}, mine, false},
		{"none-match its tag among others", Condition{NoneMatch: list(another, third, mine)}, mine, false},
		{"none-match other tags", Condition{NoneMatch: list(another, third)}, mine, true},
		{"none-match tags, of a missing key", Condition{NoneMatch: list(mine)}, missing, true},
		{"none-match tag 0, of a missing key", Condition{NoneMatch: list(0)}, missing, true},
		{"none-match no tags, of an existing key", Condition{NoneMatch: list()}, mine, true},
		{"none-match any beside other tags", Condition{NoneMatch: &Tags{Any: true, List: []Tag{another}}}, mine, false},

		{"both hold", Condition{Match: list(mine), NoneMatch: list(another)}, mine, true},
		{"only match holds", Condition{Match: anyTag, NoneMatch: list(mine)}, mine, false},
		{"only none-match holds", Condition{Match: list(another), NoneMatch: list(third)}, mine, false},
		{"neither holds", Condition{Match: list(another), NoneMatch: anyTag}, mine, false},
		{"both of any, of a missing key", Condition{Match: anyTag, NoneMatch: anyTag}, missing, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.condition.met(tt.tag); got != tt.want {
				t.Errorf("got %v; want %v", got, tt.want)
			}
			// The state machine decides the same about a key with this tag, for either operation.
			for _, op := range []operation{opSet, opDelete} {
				machine := newMachine()
				machine.lastTag = 100
				if tt.tag != missing {
					machine.items.Set("k", Item{Value: "old", Tag: tt.tag})
				}
				before := stateOf(machine)
				c := command{op: op, condition: tt.condition, pairs: []Pair{{Key: "k"}, {Key: "other"}}}
				if got := applyTag(t, machine, c) != 0; got != tt.want {
					t.Errorf("operation %d: got applied %v; want %v", op, got, tt.want)
				}
				if diff := cmp.Diff(before, stateOf(machine)); diff != "" && !tt.want {
					t.Errorf("operation %d was refused and changed the state (-before +after):\n%s", op, diff)
				}
			}
		})
	}
}

// applyTag has machine execute c and returns the tag that comes of it.
func applyTag(t interface {
	Helper()
	Fatalf(format string, args ...any)
}, m *kvMachine, c command,
) Tag {
	t.Helper()
	return applyTagAt(t, m, c, testTime)
}

func applyTagAt(t interface {
	Helper()
	Fatalf(format string, args ...any)
}, m *kvMachine, c command, at time.Time,
) Tag {
	t.Helper()
	result, err := m.Apply(c.encode(), at)
	if err != nil || len(result) != 8 {
		t.Fatalf("apply: got result %x, error %v; want 8 bytes and none", result, err)
	}
	return Tag(binary.BigEndian.Uint64(result))
}

func setCommand(pairs ...Pair) command { return command{op: opSet, pairs: pairs} }

func deleteCommand(key string) command { return command{op: opDelete, pairs: []Pair{{Key: key}}} }

func keyTag(m *kvMachine, key string) Tag {
	item, _ := m.items.Get(key)
	return item.Tag
}

func TestTags(t *testing.T) {
	first := Tag(testTime.UnixMicro()) + 1
	t.Run("begin at the time of the first command and grow by one", func(t *testing.T) {
		m := newMachine()
		steps := []struct {
			command command
			at      time.Time
		}{
			{setCommand(Pair{"a", "1"}), testTime},
			{setCommand(Pair{"a", "1"}), testTime.Add(time.Hour)},
			{setCommand(Pair{"b", "1"}), testTime.Add(-time.Hour)},
			{deleteCommand("a"), testTime},
			{deleteCommand("never there"), testTime},
			{setCommand(Pair{"a", "1"}), testTime},
		}
		for i, step := range steps {
			if got, want := applyTagAt(t, m, step.command, step.at), first+Tag(i); got != want {
				t.Errorf("step %d: got tag %d; want %d", i, got, want)
			}
		}
		if got, want := keyTag(m, "a"), first+5; got != want {
			t.Errorf("got tag %d for a key set, deleted and set; want %d", got, want)
		}
	})
	t.Run("are shared by the members of one set", func(t *testing.T) {
		m := newMachine()
		tag := applyTag(t, m, setCommand(Pair{"a", "1"}, Pair{"b", "2"}, Pair{"c", "3"}))
		for _, key := range []string{"a", "b", "c"} {
			if got := keyTag(m, key); got != tag || got != first {
				t.Errorf("got tag %d for %s; want %d", got, key, first)
			}
		}
	})
	t.Run("are not taken by a refused condition", func(t *testing.T) {
		m := newMachine()
		refused := setCommand(Pair{"a", "1"})
		refused.condition.Match = &Tags{Any: true}
		if got := applyTagAt(t, m, refused, testTime.Add(-time.Hour)); got != 0 || m.lastTag != 0 {
			t.Errorf("got tag %d, last tag %d; want none", got, m.lastTag)
		}
		if got := applyTag(t, m, setCommand(Pair{"b", "1"})); got != first {
			t.Errorf("got tag %d after a refused command; want %d", got, first)
		}
		if got := applyTag(t, m, refused); got != 0 {
			t.Errorf("got tag %d; want none", got)
		}
		if got := applyTag(t, m, setCommand(Pair{"b", "1"})); got != first+1 {
			t.Errorf("got tag %d after another refused command; want %d", got, first+1)
		}
	})
	t.Run("survive a snapshot, even of no keys", func(t *testing.T) {
		m := newMachine()
		applyTag(t, m, setCommand(Pair{"a", "1"}))
		applyTag(t, m, deleteCommand("a"))
		restored := restoredFrom(t, m)
		// Not at the time of this command, although it is the first that this machine executes.
		if got := applyTagAt(t, restored, setCommand(Pair{"a", "1"}), testTime.Add(time.Hour)); got != first+2 {
			t.Errorf("got tag %d; want %d", got, first+2)
		}
	})
}

// plainKV is what kvMachine should be, as simply as it can be said.
type plainKV struct {
	items map[string]Item
	last  Tag
}

func (p *plainKV) apply(c command, at time.Time) Tag {
	current := p.items[c.pairs[0].Key].Tag
	among := func(tags *Tags) bool {
		if current == 0 {
			return false
		}
		for _, tag := range tags.List {
			if tag == current {
				return true
			}
		}
		return tags.Any
	}
	if c.condition.Match != nil && !among(c.condition.Match) || c.condition.NoneMatch != nil && among(c.condition.NoneMatch) {
		return 0
	}
	if p.last == 0 {
		p.last = Tag(at.UnixMicro())
	}
	p.last++
	for _, pair := range c.pairs {
		if delete(p.items, pair.Key); c.op == opSet {
			p.items[pair.Key] = Item{pair.Value, p.last}
		}
	}
	return p.last
}

func TestMachineAgainstPlainMap(t *testing.T) {
	keys := rapid.Custom(func(t *rapid.T) string { return fmt.Sprint("k", rapid.IntRange(0, 12).Draw(t, "n")) })
	rapid.Check(t, func(t *rapid.T) {
		machine, plain := newMachine(), &plainKV{items: make(map[string]Item)}
		var captured func(io.Writer) error // a snapshot
		var capturedPlain plainKV          // what it must hold
		tags := rapid.Custom(func(t *rapid.T) *Tags {
			all := []Tag{0, 1, plain.last, plain.last - 1, plain.last - 2, plain.items["k0"].Tag, plain.items["k1"].Tag}
			return &Tags{Any: rapid.Bool().Draw(t, "any"), List: rapid.SliceOfN(rapid.SampledFrom(all), 0, 4).Draw(t, "list")}
		})
		t.Repeat(map[string]func(*rapid.T){
			"apply": func(t *rapid.T) {
				c := command{op: rapid.SampledFrom([]operation{opSet, opSet, opDelete}).Draw(t, "op")}
				for range rapid.IntRange(1, 5).Draw(t, "pairs") {
					p := Pair{Key: keys.Draw(t, "key")}
					if c.op == opSet {
						p.Value = rapid.StringN(0, 4, -1).Draw(t, "value")
					}
					c.pairs = append(c.pairs, p)
				}
				switch rapid.IntRange(0, 4).Draw(t, "condition") {
				case 0:
					c.condition.Match = tags.Draw(t, "match")
				case 1:
					c.condition.NoneMatch = tags.Draw(t, "none match")
				}
				at := time.UnixMicro(rapid.Int64Range(1, 1<<50).Draw(t, "at"))
				if got, want := applyTagAt(t, machine, c, at), plain.apply(c, at); got != want {
					t.Fatalf("got tag %d; want %d", got, want)
				}
			},
			"get": func(t *rapid.T) {
				key := keys.Draw(t, "key")
				if got, _ := machine.items.Get(key); got != plain.items[key] {
					t.Fatalf("got %v; want %v", got, plain.items[key])
				}
			},
			"capture": func(*rapid.T) {
				captured = machine.Snapshot()
				capturedPlain = plainKV{maps.Clone(plain.items), plain.last}
			},
			"restore": func(t *rapid.T) {
				if captured == nil {
					t.Skip("nothing captured")
				}
				var snapshot bytes.Buffer
				if err := captured(&snapshot); err != nil {
					t.Fatal(err)
				}
				install, err := machine.Restore(&snapshot)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(kvState{plain.items, plain.last}, stateOf(machine)); diff != "" {
					t.Fatalf("reading a snapshot changed the state (-want +got):\n%s", diff)
				}
				install()
				plain = &plainKV{maps.Clone(capturedPlain.items), capturedPlain.last}
			},
			"": func(t *rapid.T) {
				if diff := cmp.Diff(kvState{plain.items, plain.last}, stateOf(machine)); diff != "" {
					t.Fatalf("states differ (-want +got):\n%s", diff)
				}
				if got := machine.items.Len(); got != len(plain.items) {
					t.Fatalf("got %d keys; want %d", got, len(plain.items))
				}
			},
		})
	})
}

func TestMachineKeepsNothingOfTheCommand(t *testing.T) {
	machine := newMachine()
	encoded := setCommand(Pair{"key", "value"}, Pair{"another key", "another value"}).encode()
	result, err := machine.Apply(encoded, testTime)
	if err != nil {
		t.Fatal(err)
	}
	before := stateOf(machine)
	wantItems := map[string]Item{"key": {"value", machine.lastTag}, "another key": {"another value", machine.lastTag}}
	for i := range encoded {
		encoded[i] = 'X'
	}
	for i := range result {
		result[i] = 'X'
	}
	if diff := cmp.Diff(kvState{wantItems, before.LastTag}, stateOf(machine)); diff != "" {
		t.Errorf("the state changed with the command's bytes (-want +got):\n%s", diff)
	}
}

func TestMachineKeepsNothingOfTheSnapshot(t *testing.T) {
	machine := newMachine()
	applyTag(t, machine, setCommand(Pair{"key", "value"}))
	var snapshot bytes.Buffer
	if err := machine.Snapshot()(&snapshot); err != nil {
		t.Fatal(err)
	}
	restored := newMachine()
	install, err := restored.Restore(bytes.NewReader(snapshot.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	for i := range snapshot.Bytes() {
		snapshot.Bytes()[i] = 'X'
	}
	install()
	if diff := cmp.Diff(stateOf(machine), stateOf(restored)); diff != "" {
		t.Errorf("states differ (-want +got):\n%s", diff)
	}
}

func TestRestoredMachineKeepsNoOldValues(t *testing.T) {
	const keys = 1000
	value := strings.Repeat("1", 256)
	setAll := func(m *kvMachine) {
		for i := range keys {
			applyTag(t, m, setCommand(Pair{fmt.Sprint(i), value}))
		}
	}
	m := newMachine()
	setAll(m)
	restored := restoredFrom(t, m)
	var old []weak.Pointer[byte]
	restored.items.Scan(func(_ string, item Item) bool {
		old = append(old, weak.Make(unsafe.StringData(item.Value)))
		return true
	})
	setAll(restored)
	runtime.GC()
	kept := 0
	for _, p := range old {
		if p.Value() != nil {
			kept++
		}
	}
	if kept > 0 {
		t.Errorf("got %d of %d old values that are still in memory; want none", kept, len(old))
	}
	runtime.KeepAlive(restored)
}

func TestMachineRefusesSnapshotsThatMakeNoSense(t *testing.T) {
	machine := newMachine()
	applyTag(t, machine, setCommand(Pair{"a", "1"}, Pair{"b", "2"}))
	var good bytes.Buffer
	if err := machine.Snapshot()(&good); err != nil {
		t.Fatal(err)
	}
	head := func(count uint64) []byte { return binary.BigEndian.AppendUint64(make([]byte, 8), count) }
	type test struct {
		name  string
		bytes []byte
	}
	tests := []test{
		{"a byte too many", append(bytes.Clone(good.Bytes()), 0)},
		{"fewer keys than announced", head(1)},
		{"more keys than memory holds", head(math.MaxUint64)},
		{"a key longer than allowed", binary.AppendUvarint(head(1), maxBodyBytes+1)},
		{"a key longer than memory", binary.AppendUvarint(head(1), math.MaxUint64)},
	}
	for size := range good.Len() {
		tests = append(tests, test{fmt.Sprintf("cut to %d bytes", size), good.Bytes()[:size]})
	}
	for _, tt := range tests {
		if _, err := newMachine().Restore(bytes.NewReader(tt.bytes)); err == nil {
			t.Errorf("%s: got no error; want one", tt.name)
		}
	}
}

const benchmarkKeys = 1_000_000

func benchmarkKey(i int) string { return fmt.Sprintf("user/%08d/profile", i) }

// fullMachine and fullMap hold the same million keys. Benchmarks leave them as large as they were.
var fullMachine = sync.OnceValue(func() *kvMachine {
	m := newMachine()
	m.lastTag = 1
	for i := range benchmarkKeys {
		m.items.Set(benchmarkKey(i), Item{Value: `{"name":"somebody","visits":1}`, Tag: 1})
	}
	return m
})

var fullMap = sync.OnceValue(func() map[string]Item {
	m := make(map[string]Item)
	for i := range benchmarkKeys {
		m[benchmarkKey(i)] = Item{Value: `{"name":"somebody","visits":1}`, Tag: 1}
	}
	return m
})

// benchmarkCommands are sets of one key each, all over the million.
var benchmarkCommands = sync.OnceValue(func() [][]byte {
	random := rand.New(rand.NewPCG(1, 2))
	commands := make([][]byte, 1<<16)
	for i := range commands {
		commands[i] = setCommand(Pair{benchmarkKey(random.IntN(benchmarkKeys)), `{"name":"somebody else","visits":2}`}).encode()
	}
	return commands
})

func BenchmarkApplySetMillionKeys(b *testing.B) {
	commands := benchmarkCommands()
	b.Run("btree", func(b *testing.B) {
		machine := fullMachine()
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if _, err := machine.Apply(commands[i%len(commands)], testTime); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("btree after a snapshot every 10000", func(b *testing.B) {
		machine := fullMachine()
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if i%10_000 == 0 {
				machine.Snapshot()
			}
			if _, err := machine.Apply(commands[i%len(commands)], testTime); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("map", func(b *testing.B) {
		plain := &plainKV{items: fullMap(), last: 1}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			c, err := decodeCommand(commands[i%len(commands)])
			if err != nil {
				b.Fatal(err)
			}
			current := plain.items[c.pairs[0].Key]
			if plain.last++; c.condition.met(current.Tag) {
				plain.items[c.pairs[0].Key] = Item{c.pairs[0].Value, plain.last}
			}
			_ = binary.BigEndian.AppendUint64(nil, uint64(plain.last))
		}
	})
}

func BenchmarkGetMillionKeys(b *testing.B) {
	random := rand.New(rand.NewPCG(3, 4))
	keys := make([]string, 1<<16)
	for i := range keys {
		keys[i] = benchmarkKey(random.IntN(benchmarkKeys))
	}
	b.Run("btree", func(b *testing.B) {
		machine := fullMachine()
		for i := 0; b.Loop(); i++ {
			if _, found := machine.items.Get(keys[i%len(keys)]); !found {
				b.Fatal("a key is missing")
			}
		}
	})
	b.Run("map", func(b *testing.B) {
		plain := fullMap()
		for i := 0; b.Loop(); i++ {
			if _, found := plain[keys[i%len(keys)]]; !found {
				b.Fatal("a key is missing")
			}
		}
	})
}

// BenchmarkSnapshotMillionKeys is of what holds commands up: the call alone, without the writing.
func BenchmarkSnapshotMillionKeys(b *testing.B) {
	r := &replica{machine: fullMachine(), metrics: newMetrics()}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Snapshot(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPersistMillionKeys(b *testing.B) {
	r := &replica{machine: fullMachine(), metrics: newMetrics()}
	for b.Loop() {
		captured, err := r.Snapshot()
		if err != nil {
			b.Fatal(err)
		}
		sink := &countingSink{}
		if err := captured.Persist(sink); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(sink.size)
	}
}

func BenchmarkRestoreMillionKeys(b *testing.B) {
	source := &replica{machine: fullMachine(), metrics: newMetrics()}
	captured, err := source.Snapshot()
	if err != nil {
		b.Fatal(err)
	}
	sink := &bufferSink{room: math.MaxInt}
	if err := captured.Persist(sink); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(sink.Len()))
	b.ReportAllocs()
	for b.Loop() {
		machine := newMachine()
		if err := restoreFrom(&replica{machine: machine, metrics: newMetrics()}, sink.Bytes()); err != nil || machine.items.Len() != benchmarkKeys {
			b.Fatalf("got %d keys, error %v; want %d and none", machine.items.Len(), err, benchmarkKeys)
		}
	}
}

// countingSink is a raft.SnapshotSink that keeps nothing.
type countingSink struct{ size int64 }

func (s *countingSink) Write(p []byte) (int, error) {
	s.size += int64(len(p))
	return len(p), nil
}

func (s *countingSink) ID() string    { return "test" }
func (s *countingSink) Close() error  { return nil }
func (s *countingSink) Cancel() error { return nil }

// restoredFrom returns a machine with the state of m, by way of a snapshot.
func restoredFrom(t *testing.T, m *kvMachine) *kvMachine {
	t.Helper()
	var snapshot bytes.Buffer
	if err := m.Snapshot()(&snapshot); err != nil {
		t.Fatal(err)
	}
	restored := newMachine()
	install, err := restored.Restore(&snapshot)
	if err != nil {
		t.Fatal(err)
	}
	install()
	return restored
}
