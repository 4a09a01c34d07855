package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

func genTxn() *rapid.Generator[txn] {
	return rapid.Custom(func(t *rapid.T) (drawn txn) {
		for range rapid.IntRange(0, 3).Draw(t, "if") {
			c := comparison{key: genText().Draw(t, "key"), kind: comparisonKind(rapid.IntRange(0, 2).Draw(t, "kind"))}
			if c.kind == hasTag {
				c.tag = Tag(rapid.Uint64().Draw(t, "tag"))
			}
			drawn.compare = append(drawn.compare, c)
		}
		for range rapid.IntRange(0, 3).Draw(t, "set") {
			drawn.set = append(drawn.set, Pair{genText().Draw(t, "key"), genText().Draw(t, "value")})
		}
		for range rapid.IntRange(0, 3).Draw(t, "delete") {
			drawn.remove = append(drawn.remove, Pair{Key: genText().Draw(t, "key")})
		}
		if len(drawn.set)+len(drawn.remove) == 0 {
			drawn.remove = []Pair{{Key: "k"}}
		}
		return drawn
	})
}

func TestTxnRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := genTxn().Draw(t, "txn")
		b := want.encode()
		got, err := decodeTxn(b)
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmp.AllowUnexported(txn{}, comparison{})); err != nil || diff != "" {
			t.Fatalf("got %v, (-want +got)\n%s", err, diff)
		}
		for size := range b {
			if _, err := decodeTxn(b[:size]); err == nil {
				t.Fatalf("cut to %d of %d bytes: got no error", size, len(b))
			}
		}
		if _, err := decodeTxn(append(bytes.Clone(b), 0)); err == nil {
			t.Fatal("a byte too many: got no error")
		}
	})
}

// The bytes of a transaction are a format: nodes of another version of this program read them.
func TestTxnFormat(t *testing.T) {
	x := txn{
		compare: []comparison{{key: "a", kind: isAbsent}, {key: "b", kind: isPresent}, {key: "c", kind: hasTag, tag: 300}},
		set:     []Pair{{"a", `"v"`}},
		remove:  []Pair{{Key: "b"}, {Key: "cc"}},
	}
	const want = "02" + "03" + "016100" + "016201" + "016302ac02" + "01" + "0161" + "03227622" + "02" + "0162" + "026363"
	if got := hex.EncodeToString(x.encode()); got != want {
		t.Errorf("got %s; want %s", got, want)
	}
	m := newMachine()
	result, err := m.Apply(x.encode(), testTime)
	if err != nil || hex.EncodeToString(result) != "0000000000000000"+"0102" {
		t.Errorf("got %x, %v; want no tag and the indexes 1 and 2", result, err)
	}
	x.compare = x.compare[:1]
	if result, err = m.Apply(x.encode(), testTime); err != nil || len(result) != 8 || bytes.Equal(result, make([]byte, 8)) {
		t.Errorf("got %x, %v; want a tag", result, err)
	}
	for _, bad := range []string{"02", "0200000000", "020101610300010000", "03000001016b"} {
		b, _ := hex.DecodeString(bad)
		if _, err := m.Apply(b, testTime); err == nil {
			t.Errorf("%s: got no error", bad)
		}
	}
}

func TestTxn(t *testing.T) {
	n := newKVNode(t)
	tag := put(t, n, "a", "1")
	current, old := fmt.Sprintf(`"\"%d\""`, tag), fmt.Sprintf(`"\"%d\""`, tag-1)
	weak, foreign := strings.Replace(current, `"\"`, `"W/\"`, 1), `"\"ours?\""`

	for cond, failed := range map[string]string{ // by "if"
		`{"a":` + current + `}`:             "",
		`{"a":"*"}`:                         "",
		`{"nil":null}`:                      "",
		`{"a":"*","nil":null}`:              "",
		`{}`:                                "",
		`{"a":` + old + `}`:                 `["a"]`,
		`{"a":` + weak + `}`:                `["a"]`,
		`{"a":` + foreign + `}`:             `["a"]`,
		`{"a":null}`:                        `["a"]`,
		`{"nil":"*"}`:                       `["nil"]`,
		`{"nil":"\"0\""}`:                   `["nil"]`,
		`{"nil":"*","a":null,"other":null}`: `["a","nil"]`,
	} {
		t.Run("if "+cond, func(t *testing.T) {
			before := kvOf(n).machine.feed.newest()
			if failed != "" {
				for _, writes := range []string{"", `,"set":{"w":1},"delete":["a"]`} {
					a := want(t, n, 412, http.MethodPost, "/txn", `{"if":`+cond+writes+`}`)
					if after := kvOf(n).machine.feed.newest(); !strings.Contains(a.body, `"failed":`+failed) || after != before {
						t.Errorf("got %s, tag %d; want %s failed and the tag still %d", a.body, after, failed, before)
					}
				}
				return
			}
			a := want(t, n, 200, http.MethodPost, "/txn", `{"if":`+cond+`}`)
			if after := kvOf(n).machine.feed.newest(); a.header["Etag"] != nil || a.header["Raft-Index"] != nil || after != before {
				t.Errorf("got %v, tag %d; want no tag where nothing is written", a.header, after)
			}
			value := fmt.Sprint(before)
			a = want(t, n, 200, http.MethodPost, "/txn", `{"if":`+cond+`,"set":{"w":`+value+`},"delete":["gone"]}`)
			indexOf(t, a)
			if got := tagOf(t, a); got != before+1 || wantValue(t, n, "w", value).header.Get("Etag") != quoted(got) {
				t.Errorf("got tag %d; want %d, which the key has, too", got, before+1)
			}
		})
	}
	want(t, n, 200, http.MethodPost, "/txn", `{}`)
	want(t, n, 200, http.MethodPost, "/txn", ` {"set":{},"delete":[],"if":{}} `)
	put(t, n, "b", "1")
	want(t, n, 200, http.MethodPost, "/txn", `{"delete":["b","b","never"],"set":{"deep":`+nested("[", "]", maxDepth)+`}}`)
	wantValue(t, n, "b", "null")
	wantValue(t, n, "deep", nested("[", "]", maxDepth))
}

func TestTxnThatCannotBeRead(t *testing.T) {
	n := newKVNode(t)
	before := put(t, n, "a", "1")
	for name, body := range map[string]string{
		"no object": `[]`, "null": `null`, "no JSON": `{`, "an unknown member": `{"iff":{}}`, "a member twice": `{"set":{"a":2},"set":{"a":2}}`,
		"a key twice in set": `{"set":{"a":2,"a":3}}`, "a key twice in if": `{"if":{"a":"*","a":null},"set":{"a":2}}`,
		"set is null": `{"set":null}`, "set is an array": `{"set":["a"]}`, "if is null": `{"if":null}`, "delete is null": `{"delete":null}`,
		"delete is an object": `{"delete":{"a":1}}`, "delete holds a number": `{"delete":[1]}`, "delete holds null": `{"delete":[null]}`,
		"an empty key to delete": `{"delete":[""]}`, "an empty key to set": `{"set":{"":1}}`, "an empty key in if": `{"if":{"":null},"set":{"a":2}}`,
		"set and delete of one key": `{"set":{"a":2},"delete":["b","\u0061"]}`, "a number for a tag": `{"if":{"a":17},"set":{"a":2}}`,
		"a tag without quotes": `{"if":{"a":"17"},"set":{"a":2}}`, "two tags": `{"if":{"a":"\"1\", \"2\""},"set":{"a":2}}`,
		"a value too deep": `{"set":{"a":` + nested("[", "]", maxDepth+1) + `}}`, "true for a tag": `{"if":{"a":true},"set":{"a":2}}`,
	} {
		t.Run(name, func(t *testing.T) {
			checkProblem(t, http.MethodPost, want(t, n, 400, http.MethodPost, "/txn", body), "not-applied")
		})
	}
	for _, header := range []string{"If-Match", "If-None-Match", "If-Unmodified-Since", "If-Modified-Since"} {
		want(t, n, 400, http.MethodPost, "/txn", `{"set":{"a":2}}`, header, `"1"`)
	}
	want(t, n, 400, http.MethodPost, "/txn?x=1", `{"set":{"a":2}}`)
	if a := want(t, n, 405, http.MethodGet, "/txn", ""); a.header.Get("Allow") != "POST" {
		t.Errorf("got Allow %q; want POST", a.header.Get("Allow"))
	}
	if got := wantValue(t, n, "a", "1").header.Get("Etag"); got != quoted(before) {
		t.Errorf("got tag %s; want %d still", got, before)
	}
}

// Transfers between two accounts, by many clients at once through all nodes: none is lost and none is done by halves.
func TestTxnsAtOnce(t *testing.T) {
	t.Parallel()
	c := newKVCluster(t, 3)
	if err := kvOf(c.nodes[0]).set(t.Context(), Pair{"x", "1000"}, Pair{"y", "1000"}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 6 {
		kv := kvOf(c.nodes[i%3])
		wg.Go(func() {
			for done := 0; done < 10; {
				var amounts [2]int
				transfer := txn{}
				for j, key := range []string{"x", "y"} {
					item, err := kv.get(t.Context(), key)
					if err != nil {
						t.Error(err)
						return
					}
					_, _ = fmt.Sscan(item.Value, &amounts[j])
					transfer.compare = append(transfer.compare, comparison{key: key, kind: hasTag, tag: item.Tag})
				}
				transfer.set = []Pair{{"x", fmt.Sprint(amounts[0] - 1)}, {"y", fmt.Sprint(amounts[1] + 1)}}
				tag, err := kv.txn(t.Context(), transfer)
				if err != nil {
					t.Error(err)
					return
				}
				if tag != 0 {
					done++
				}
			}
		})
	}
	wg.Wait()
	for key, value := range map[string]string{"x": "940", "y": "1060"} {
		if item, err := kvOf(c.nodes[0]).get(t.Context(), key); err != nil || item.Value != value {
			t.Errorf("got %s=%s, %v; want %s", key, item.Value, err, value)
		}
	}
}

// A node that knows no transactions must not take a snapshot with the effects of one: the log after it may have more.
func TestSnapshotAfterATxn(t *testing.T) {
	older := func() *replica { // kindsMachine is not asked for more than the version that it knows
		return &replica{machine: &kindsMachine{version: firstCommandVersion}, metrics: newMetrics()}
	}
	encoded := func(r *replica) []byte {
		t.Helper()
		taken, err := r.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := taken.(*snapshot).writeTo(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	r := &replica{machine: newMachine(), metrics: newMetrics(), fail: func(err error) { t.Error(err) }}
	apply := func(index uint64, command []byte) {
		r.Apply(&raft.Log{Index: index, Data: encodeEntry(testTime, [][]byte{command})})
	}
	apply(1, setCommand(Pair{"a", "1"}).encode())
	before := encoded(r)
	if !bytes.HasPrefix(before, []byte(snapshotMagic)) {
		t.Errorf("got %q before a transaction; want version 2", before[:8])
	}
	if err := older().restore(bytes.NewReader(before)); err != nil {
		t.Errorf("before a transaction: got %v; want it readable by an older node", err)
	}
	apply(2, txn{set: []Pair{{"a", "2"}}}.encode())
	after := encoded(r)
	// The tag counter began at testTime. The key has the tag of the second write.
	const want = "525354534e415003" + "0000000000000002" + "02" + "00060a24181e4002" + "0000000000000001" +
		"0161" + "0132" + "8280f9c0c1c48203"
	if got := hex.EncodeToString(after[:len(after)-checksumSize]); got != want {
		t.Errorf("got %s; want %s", got, want)
	}
	if err := older().restore(bytes.NewReader(after)); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("after a transaction: got %v from an older node; want it refused, and the version named", err)
	}
	again := &replica{machine: newMachine(), metrics: newMetrics()}
	if err := again.restore(bytes.NewReader(after)); err != nil || again.maxVersion.Load() != txnVersion {
		t.Errorf("got %v, executed %d; want it read by a node of this version", err, again.maxVersion.Load())
	}
}
