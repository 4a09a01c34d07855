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
	"pgregory.net/rapid"
)

func genTxn() *rapid.Generator[Txn] {
	return rapid.Custom(func(t *rapid.T) (txn Txn) {
		for range rapid.IntRange(0, 3).Draw(t, "if") {
			e := Expectation{Key: genText().Draw(t, "key"), Kind: expectationKind(rapid.IntRange(0, 2).Draw(t, "kind"))}
			if e.Kind == expectTag {
				e.Tag = Tag(rapid.Uint64().Draw(t, "tag"))
			}
			txn.If = append(txn.If, e)
		}
		for range rapid.IntRange(0, 3).Draw(t, "set") {
			txn.Set = append(txn.Set, Pair{genText().Draw(t, "key"), genText().Draw(t, "value")})
		}
		for range rapid.IntRange(0, 3).Draw(t, "delete") {
			txn.Delete = append(txn.Delete, Pair{Key: genText().Draw(t, "key")})
		}
		if len(txn.Set)+len(txn.Delete) == 0 {
			txn.Delete = []Pair{{Key: "k"}}
		}
		return txn
	})
}

func TestTxnRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := genTxn().Draw(t, "txn")
		b := want.encode()
		got, err := decodeTxn(b)
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
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
	txn := Txn{
		If:     []Expectation{{Key: "a", Kind: expectAbsent}, {Key: "b", Kind: expectPresent}, {Key: "c", Kind: expectTag, Tag: 300}},
		Set:    []Pair{{"a", `"v"`}},
		Delete: []Pair{{Key: "b"}, {Key: "cc"}},
	}
	const want = "02" + "03" + "016100" + "016201" + "016302ac02" + "01" + "0161" + "03227622" + "02" + "0162" + "026363"
	if got := hex.EncodeToString(txn.encode()); got != want {
		t.Errorf("got %s; want %s", got, want)
	}
	m := newMachine()
	result, err := m.Apply(txn.encode(), testTime)
	if err != nil || hex.EncodeToString(result) != "0000000000000000"+"0102" {
		t.Errorf("got %x, %v; want no tag and the indexes 1 and 2", result, err)
	}
	txn.If = txn.If[:1]
	if result, err = m.Apply(txn.encode(), testTime); err != nil || len(result) != 8 || bytes.Equal(result, make([]byte, 8)) {
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
	n := newTestNode(t, storeMemory)
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
			before := n.kv.machine.feed.newest()
			if failed != "" {
				for _, writes := range []string{"", `,"set":{"w":1},"delete":["a"]`} {
					a := want(t, n, 412, http.MethodPost, "/txn", `{"if":`+cond+writes+`}`)
					if after := n.kv.machine.feed.newest(); !strings.Contains(a.body, `"failed":`+failed) || after != before {
						t.Errorf("got %s, tag %d; want %s failed and the tag still %d", a.body, after, failed, before)
					}
				}
				return
			}
			a := want(t, n, 200, http.MethodPost, "/txn", `{"if":`+cond+`}`)
			if after := n.kv.machine.feed.newest(); a.header["Etag"] != nil || a.header["Raft-Index"] != nil || after != before {
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
	n := newTestNode(t, storeMemory)
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
	c := newTestCluster(t, 3, storeMemory)
	if _, err := c.nodes[0].kv.Set(t.Context(), []Pair{{"x", "1000"}, {"y", "1000"}}, Condition{}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 6 {
		kv := c.nodes[i%3].kv
		wg.Go(func() {
			for done := 0; done < 10; {
				var amounts [2]int
				txn := Txn{}
				for j, key := range []string{"x", "y"} {
					item, err := kv.Get(t.Context(), key, Linearizable)
					if err != nil {
						t.Error(err)
						return
					}
					_, _ = fmt.Sscan(item.Value, &amounts[j])
					txn.If = append(txn.If, Expectation{Key: key, Kind: expectTag, Tag: item.Tag})
				}
				txn.Set = []Pair{{"x", fmt.Sprint(amounts[0] - 1)}, {"y", fmt.Sprint(amounts[1] + 1)}}
				if _, err := kv.Txn(t.Context(), txn); err == nil {
					done++
				}
			}
		})
	}
	wg.Wait()
	for key, value := range map[string]string{"x": "940", "y": "1060"} {
		if item, err := c.nodes[0].kv.Get(t.Context(), key, Linearizable); err != nil || item.Value != value {
			t.Errorf("got %s=%s, %v; want %s", key, item.Value, err, value)
		}
	}
}
