package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// A history is what clients did to a cluster and what they were told. It is right if there is an order of the operations,
// each between its call and its answer, in which every answer is right (Herlihy and Wing's linearizability). The keys are
// independent of one another, so each key's part is judged by itself, which is quick as long as the parts are short and
// hold few operations that nobody knows the outcome of; see team.

// kvOp is an operation. Every value that is put is put once: by PUT, or by POST on two keys with one tag.
type kvOp struct {
	kind             string // "put", "post", "delete", "get" or "stale"
	key, other       string // other is the second key of a POST
	value            string // that is put
	match, noneMatch uint64 // the tag in If-Match and If-None-Match; 0 for none
}

// anyTag is * in a precondition.
const anyTag = math.MaxUint64

// kvAnswer is what came of it.
type kvAnswer struct {
	known  bool   // false: it may or may not have happened
	failed bool   // its precondition
	value  string // of a get
	tag    uint64 // of the value that was put or got; 0 when there is none, or nobody was told it
}

// register is a key's state. Tags grow with every write, which leaves few orders to be tried.
type register struct {
	value string // "null" for none
	tag   uint64 // 0 when there is no value, or nobody was told its tag
	least uint64 // the tags of later writes are above it
}

func (s register) has(tag uint64) bool { return s.value != "null" && (tag == anyTag || tag == s.tag) }

var kvModel = porcupine.Model{
	Init: func() any { return register{value: "null"} },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(register), input.(kvOp), output.(kvAnswer)
		if in.kind == "get" {
			return out.value == s.value && (out.tag == s.tag || out.tag == 0), s
		}
		holds := (in.match == 0 || s.has(in.match)) && (in.noneMatch == 0 || !s.has(in.noneMatch))
		switch {
		case out.known && out.failed == holds:
			return false, s
		case !holds:
			return out.tag == 0, s // what has a tag was seen, so its precondition did hold
		case in.kind == "delete":
			return true, register{"null", 0, s.least}
		case out.tag == 0:
			return true, register{in.value, 0, s.least}
		}
		return out.tag > s.least, register{in.value, out.tag, out.tag}
	},
}

type history struct {
	report     func(format string, args ...any) // of violations
	start      time.Time                        // all times are since then, by the monotonic clock
	violations atomic.Int64                     // of anything that was promised
	lossy      bool                             // a majority may lose its state: a survivor gives another tag to what it executes again

	mu      sync.Mutex // guards what follows
	ops     map[string][]porcupine.Operation
	count   int               // of ops
	unknown int               // of ops
	refused map[string]string // why a value was certainly not written
	seen    map[string]int64  // when somebody first knew that a value was written
	tags    map[string]uint64 // by value
	values  map[uint64]string // by tag
}

func newHistory(report func(format string, args ...any)) *history {
	return &history{
		report: report, start: time.Now(), ops: make(map[string][]porcupine.Operation), refused: make(map[string]string),
		seen: make(map[string]int64), tags: make(map[string]uint64), values: make(map[uint64]string),
	}
}

func (h *history) now() time.Duration { return time.Since(h.start) }

func (h *history) violation(format string, args ...any) {
	if n := h.violations.Add(1); n <= 20 {
		h.report("violation after %v: "+format, append([]any{h.now().Round(time.Millisecond)}, args...)...)
	}
}

// add writes down an operation that was made, or may have been.
func (h *history) add(client int, op kvOp, out kvAnswer, call, back time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	written := op.kind == "put" || op.kind == "post"
	if value := out.value; out.known && !out.failed && (written || value != "null" && value != "") {
		if written {
			value = op.value
		}
		h.see(value, out.tag, int64(back))
	}
	done := porcupine.Operation{ClientId: client, Input: op, Output: out, Call: int64(call), Return: int64(back)}
	switch {
	case op.kind == "stale":
		return
	case !out.known && op.kind == "get":
		return // it tells nothing
	case !out.known:
		done.Return = math.MaxInt64
		h.unknown++
	case out.failed:
		h.refuse(op.value, "its precondition failed")
	}
	h.count++
	h.ops[op.key] = append(h.ops[op.key], done)
	if op.kind == "post" {
		h.ops[op.other] = append(h.ops[op.other], done)
	}
}

// see takes note that a value is known to have been written. The caller holds h.mu.
func (h *history) see(value string, tag uint64, at int64) {
	if why, refused := h.refused[value]; refused {
		h.violation("%s was written; want that it was not: %s", value, why)
	}
	if since, seen := h.seen[value]; !seen || at < since {
		h.seen[value] = at
	}
	if tag == 0 {
		return
	}
	if was, known := h.values[tag]; known && was != value {
		h.violation("tag %d is on %s and on %s; want one value for each tag", tag, was, value)
	}
	if was, known := h.tags[value]; known && was != tag && !h.lossy {
		h.violation("%s has the tags %d and %d; want one tag for each write", value, was, tag)
	}
	h.values[tag], h.tags[value] = value, tag
}

// refuse takes note that a value was certainly not written. The caller holds h.mu.
func (h *history) refuse(value, why string) {
	if value == "" {
		return // not a put
	}
	if _, seen := h.seen[value]; seen {
		h.violation("%s was written; want that it was not: %s", value, why)
	}
	h.refused[value] = why
}

// errMoveOn says that a client had better try another node, after a rest.
var errMoveOn = errors.New("not served")

// do makes an operation through the node at base and writes it down, unless it certainly did not happen.
func (h *history) do(web *http.Client, base string, client int, op kvOp) (kvAnswer, error) {
	method, path, body := http.MethodGet, "/key/"+op.key, op.value
	switch op.kind {
	case "put":
		method = http.MethodPut
	case "post":
		method, path, body = http.MethodPost, "/key", fmt.Sprintf(`{%q:%s,%q:%s}`, op.key, op.value, op.other, op.value)
	case "delete":
		method = http.MethodDelete
	case "stale":
		path += "?consistency=stale"
	}
	req, err := http.NewRequestWithContext(context.Background(), method, base+path, strings.NewReader(body))
	if err != nil {
		return kvAnswer{}, err
	}
	for name, tag := range map[string]uint64{"If-Match": op.match, "If-None-Match": op.noneMatch} {
		if tag == anyTag {
			req.Header.Set(name, "*")
		} else if tag != 0 {
			req.Header.Set(name, strconv.Quote(strconv.FormatUint(tag, 10)))
		}
	}
	call := h.now()
	a, err := roundTrip(web, req)
	back := h.now()
	if back-call > 15*time.Second+slack {
		h.violation("%+v through %s took %v; want an answer within 15s", op, base, back-call)
	}
	out, read := kvAnswer{}, op.kind == "get" || op.kind == "stale"
	switch unsent := new(net.OpError); {
	case errors.As(err, &unsent) && unsent.Op == "dial":
		return out, errMoveOn
	case err != nil:
		err = errMoveOn
	case a.status == http.StatusOK:
		out.known = true
		if read {
			out.value = strings.TrimSuffix(strings.TrimPrefix(a.body, `{"`+op.key+`":`), "}")
		}
		if tag, err := strconv.Unquote(a.header.Get("ETag")); err == nil {
			out.tag, _ = strconv.ParseUint(tag, 10, 64)
		}
	case a.status == http.StatusPreconditionFailed && (op.match != 0 || op.noneMatch != 0):
		out.known, out.failed = true, true
	case a.status == http.StatusServiceUnavailable && (read || strings.Contains(a.body, `"outcome":"not-applied"`)):
		h.mu.Lock()
		h.refuse(op.value, "it was answered "+a.body)
		h.mu.Unlock()
		return out, errMoveOn
	case a.status == http.StatusGatewayTimeout && !read && strings.Contains(a.body, `"outcome":"unknown"`):
		err = errMoveOn
	default:
		h.violation("got %d %s for %+v through %s; want none of that", a.status, a.body, op, base)
		err = errMoveOn
	}
	h.add(client, op, out, call, back)
	return out, err
}

// roundTrip makes a request and reads the answer to its end.
func roundTrip(web *http.Client, req *http.Request) (answerTo, error) {
	response, err := web.Do(req)
	if err != nil {
		return answerTo{}, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	return answerTo{response.StatusCode, response.Header, string(data)}, err
}

// list reads all keys through the node at base, page by page, and returns the pages. A page of linearizable reads goes
// into the history.
func (h *history) list(web *http.Client, base, consistency string) (string, error) {
	h.mu.Lock()
	keys := make([]string, 0, len(h.ops))
	for key := range h.ops {
		keys = append(keys, key)
	}
	h.mu.Unlock()
	slices.Sort(keys)
	var pages strings.Builder
	for after, more := "", true; more; {
		path := "/key?limit=10000&consistency=" + consistency + "&after=" + url.QueryEscape(after)
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, base+path, nil)
		if err != nil {
			return "", err
		}
		call := h.now()
		a, err := roundTrip(web, req)
		back := h.now()
		page := make(map[string]json.RawMessage)
		if err == nil && a.status == http.StatusOK {
			err = json.Unmarshal([]byte(a.body), &page)
		}
		if err != nil || a.status != http.StatusOK {
			return "", fmt.Errorf("%d %s: %w", a.status, path, err)
		}
		pages.WriteString(a.body)
		more = a.header.Get("Link") != ""
		last := ""
		for key := range page {
			last = max(last, key)
		}
		for ; len(keys) > 0 && (!more || keys[0] <= last); keys = keys[1:] {
			value := "null"
			if v, there := page[keys[0]]; there {
				value = string(v)
			}
			if consistency == "linearizable" && keys[0] > after {
				h.add(-1, kvOp{kind: "get", key: keys[0]}, kvAnswer{known: true, value: value}, call, back)
			}
		}
		after = last
	}
	return pages.String(), nil
}

// judge judges the history, when all clients have ended.
func (h *history) judge() {
	h.mu.Lock()
	defer h.mu.Unlock()
	keys := make(chan string, len(h.ops))
	for key := range h.ops {
		keys <- key
	}
	close(keys)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for key := range keys {
				ops := h.refine(h.ops[key])
				if got := check(ops); got != porcupine.Ok {
					h.violation("the history of %s, with %d operations, is %v; want it linearizable:%s", key, len(ops), got, describe(ops))
				}
			}
		})
	}
	wg.Wait()
}

// refine adds to a key's operations what was learnt later: tags, and of writes without an answer, that somebody saw them.
func (h *history) refine(ops []porcupine.Operation) []porcupine.Operation {
	ops = slices.Clone(ops)
	for i, op := range ops {
		in, out := op.Input.(kvOp), op.Output.(kvAnswer)
		if in.kind == "get" || in.kind == "delete" || out.failed {
			continue
		}
		out.tag = h.tags[in.value]
		if at, seen := h.seen[in.value]; seen {
			ops[i].Return = min(op.Return, at)
		}
		ops[i].Output = out
	}
	return ops
}

// check looks for a right order. What nobody heard of may have happened after everything else, so the operations that are
// left without it need only be in order by themselves; mostly they are. If not, what nobody heard of may explain it.
func check(ops []porcupine.Operation) porcupine.CheckResult {
	heard := slices.DeleteFunc(slices.Clone(ops), func(op porcupine.Operation) bool { return op.Return == math.MaxInt64 })
	if porcupine.CheckOperationsTimeout(kvModel, heard, time.Minute) == porcupine.Ok {
		return porcupine.Ok
	}
	return porcupine.CheckOperationsTimeout(kvModel, ops, 2*time.Minute)
}

func describe(ops []porcupine.Operation) string {
	var b strings.Builder
	slices.SortFunc(ops, func(x, y porcupine.Operation) int { return int(x.Call - y.Call) })
	for _, op := range ops {
		back := "no answer"
		if op.Return != math.MaxInt64 {
			back = time.Duration(op.Return).String()
		}
		fmt.Fprintf(&b, "\n  %v to %s, client %d: %+v: %+v", time.Duration(op.Call), back, op.ClientId, op.Input, op.Output)
	}
	return b.String()
}

// team is some clients that work on the same two keys. They move on to fresh keys after some operations, and as soon as
// there are a few of unknown outcome, so that the history of each key is quickly judged.
type team struct {
	name string

	mu      sync.Mutex // guards what follows
	round   int
	ops     int
	unknown int
	tags    map[string]uint64 // last heard of, by key
}

const (
	opsPerRound     = 100
	unknownPerRound = 2
)

// fresh moves the team to fresh keys.
func (t *team) fresh() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.round++
	t.ops, t.unknown, t.tags = 0, 0, make(map[string]uint64)
}

// key returns one of the two keys.
func (t *team) key(i int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.keyOf(i)
}

func (t *team) keyOf(i int) string { return fmt.Sprintf("%s-%d-%c", t.name, t.round, "ab"[i%2]) }

// next returns the next operation, which a value is made for.
func (t *team) next(random *rand.Rand, value string) kvOp {
	t.mu.Lock()
	due := t.ops == opsPerRound || t.unknown >= unknownPerRound
	t.mu.Unlock()
	if due {
		t.fresh()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ops++
	i := random.IntN(2)
	op := kvOp{key: t.keyOf(i)}
	switch n := random.IntN(100); {
	case n < 40:
		op.kind = "put"
	case n < 45:
		op.kind, op.other = "post", t.keyOf(1-i)
	case n < 55:
		op.kind = "delete"
	case n < 95:
		op.kind = "get"
	default:
		op.kind = "stale"
	}
	if op.kind == "put" || op.kind == "post" {
		op.value = value
	}
	if tag := t.tags[op.key]; op.kind == "put" || op.kind == "delete" {
		switch random.IntN(8) {
		case 0, 1, 2:
			op.match = tag
		case 3:
			op.noneMatch = tag
		case 4:
			op.noneMatch = anyTag
		case 5:
			op.match = anyTag
		}
	}
	return op
}

// learn hears what came of an operation.
func (t *team) learn(op kvOp, out kvAnswer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if out.known && out.tag != 0 && op.kind != "stale" {
		t.tags[op.key] = max(out.tag, t.tags[op.key])
	} else if !out.known && op.kind != "get" && op.kind != "stale" {
		t.unknown++
	}
}

// TestHistory shows that the judge knows right from wrong.
func TestHistory(t *testing.T) {
	type step struct {
		call, back int64 // back 0: no answer
		op         kvOp
		out        kvAnswer
	}
	put := func(call, back int64, value string, tag uint64) step {
		return step{call, back, kvOp{kind: "put", value: value}, kvAnswer{known: back > 0, tag: tag}}
	}
	get := func(call, back int64, value string, tag uint64) step {
		return step{call, back, kvOp{kind: "get"}, kvAnswer{known: true, value: value, tag: tag}}
	}
	remove := func(call, back int64) step { return step{call, back, kvOp{kind: "delete"}, kvAnswer{known: back > 0}} }
	post := func(call, back int64, value string) step {
		return step{call, back, kvOp{kind: "post", value: value, other: "other"}, kvAnswer{known: back > 0}}
	}
	cas := func(call, back int64, value string, match, tag uint64) step {
		return step{call, back, kvOp{kind: "put", value: value, match: match}, kvAnswer{known: back > 0, failed: tag == 0, tag: tag}}
	}
	for _, tc := range []struct {
		name  string
		right bool
		steps []step
	}{
		{"a read after a write", true, []step{put(1, 2, "a", 1), get(3, 4, "a", 1)}},
		{"a stale read", false, []step{put(1, 2, "a", 1), put(3, 4, "b", 2), get(5, 6, "a", 1)}},
		{"a read beside a write", true, []step{put(1, 2, "a", 1), put(3, 6, "b", 2), get(4, 5, "a", 1)}},
		{"a read that goes back", false, []step{put(1, 2, "a", 1), put(3, 9, "b", 2), get(4, 5, "b", 2), get(6, 7, "a", 1)}},
		{"a lost write", false, []step{put(1, 2, "a", 1), get(3, 4, "null", 0)}},
		{"an unknown deletion explains it", true, []step{put(1, 2, "a", 1), remove(1, 0), get(3, 4, "null", 0)}},
		{"it cannot explain it twice", false, []step{
			put(1, 2, "a", 1), remove(1, 0), get(3, 4, "null", 0), put(5, 6, "b", 2), get(7, 8, "null", 0),
		}},
		{"an unknown write that was seen", true, []step{put(1, 2, "a", 1), put(3, 0, "b", 0), get(4, 5, "a", 1), get(6, 7, "b", 2)}},
		{"an unknown write that was seen and undone", false, []step{
			put(1, 2, "a", 1), put(3, 0, "b", 0), get(4, 5, "b", 2), get(6, 7, "a", 1),
		}},
		{"an unknown write that was applied twice", false, []step{
			put(1, 0, "a", 0), get(2, 3, "a", 1), put(4, 5, "b", 2), get(6, 7, "a", 3),
		}},
		{"an unknown write that nobody saw explains a failure", true, []step{
			put(1, 2, "a", 1), put(3, 0, "b", 0), cas(4, 5, "c", 1, 0), put(6, 7, "d", 3),
		}},
		{"nothing explains a failure", false, []step{put(1, 2, "a", 1), cas(4, 5, "c", 1, 0)}},
		{"a precondition that holds", true, []step{put(1, 2, "a", 1), cas(4, 5, "c", 1, 2), get(6, 7, "c", 2)}},
		{"a precondition that does not hold", false, []step{put(1, 2, "a", 1), put(3, 4, "b", 2), cas(5, 6, "c", 1, 3)}},
		{"a value whose precondition had failed", false, []step{
			put(1, 2, "a", 1), cas(3, 4, "b", 7, 0), cas(3, 4, "c", 1, 2), get(5, 6, "b", 3),
		}},
		{"tags that go back", false, []step{put(1, 2, "a", 2), put(3, 4, "b", 1)}},
		{"two values with one tag", false, []step{put(1, 2, "a", 1), put(3, 4, "b", 1)}},
		{"two keys with one tag", false, []step{
			put(1, 2, "a", 1), {3, 4, kvOp{kind: "put", key: "other", value: "b"}, kvAnswer{known: true, tag: 1}},
		}},
		{"a post", true, []step{put(1, 2, "a", 1), post(3, 4, "b"), get(5, 6, "b", 2)}},
		{"a post on one of two keys", false, []step{
			post(1, 0, "a"), get(2, 3, "a", 1), {4, 5, kvOp{kind: "get", key: "other"}, kvAnswer{known: true, value: "null"}},
		}},
	} {
		h := newHistory(func(string, ...any) {})
		for _, s := range tc.steps {
			h.add(0, s.op, s.out, time.Duration(s.call), time.Duration(s.back))
		}
		h.judge()
		if got := h.violations.Load() == 0; got != tc.right {
			t.Errorf("%s: got right %v; want %v", tc.name, got, tc.right)
		}
	}
}
