// Package history judges what clients were told by a cluster. Tests of processes and simulations share it.
//
// A history is what clients did to a cluster and what they were told. It is right if there is an order of the operations,
// each between its call and its answer, in which every answer is right (Herlihy and Wing's linearizability). The keys are
// independent of one another, so each key's part is judged by itself, which is quick as long as the parts are short and
// hold few operations that nobody knows the outcome of.
package history

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
)

// Op is an operation. Every value that is put is put once: by PUT, or by POST on two keys with one tag.
type Op struct {
	Kind             string // "put", "post", "delete", "get" or "stale"
	Key, Other       string // Other is the second key of a POST
	Value            string // that is put
	Match, NoneMatch uint64 // the tag in If-Match and If-None-Match; 0 for none
}

// AnyTag is * in a precondition.
const AnyTag = math.MaxUint64

// Answer is what came of it.
type Answer struct {
	Known  bool   // false: it may or may not have happened
	Failed bool   // its precondition
	Value  string // of a get
	Tag    uint64 // of the value that was put or got; 0 when there is none, or nobody was told it
}

// register is a key's state. Tags grow with every write, which leaves few orders to be tried.
type register struct {
	value string // "null" for none
	tag   uint64 // 0 when there is no value, or nobody was told its tag
	least uint64 // the tags of later writes are above it
}

func (s register) has(tag uint64) bool { return s.value != "null" && (tag == AnyTag || tag == s.tag) }

var model = porcupine.Model{
	Init: func() any { return register{value: "null"} },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(register), input.(Op), output.(Answer)
		if in.Kind == "get" {
			return out.Value == s.value && (out.Tag == s.tag || out.Tag == 0), s
		}
		holds := (in.Match == 0 || s.has(in.Match)) && (in.NoneMatch == 0 || !s.has(in.NoneMatch))
		switch {
		case out.Known && out.Failed == holds:
			return false, s
		case !holds:
			return out.Tag == 0, s // what has a tag was seen, so its precondition did hold
		case in.Kind == "delete":
			return true, register{"null", 0, s.least}
		case out.Tag == 0:
			return true, register{in.Value, 0, s.least}
		}
		return out.Tag > s.least, register{in.Value, out.Tag, out.Tag}
	},
}

// History is what was done to a cluster, and what of it was wrong. Its maps and counts may be read when all clients have ended.
type History struct {
	report     func(format string, args ...any) // of violations
	start      time.Time                        // all times are since then, by the monotonic clock
	Violations atomic.Int64                     // of anything that was promised
	Lossy      bool                             // a majority may lose its state: a survivor gives another tag to what it executes again

	mu      sync.Mutex // guards what follows
	Ops     map[string][]porcupine.Operation
	Count   int               // of Ops
	Unknown int               // of Ops
	refused map[string]string // why a value was certainly not written
	seen    map[string]int64  // when somebody first knew that a value was written
	tags    map[string]uint64 // by value
	values  map[uint64]string // by tag
}

// New returns an empty history. report is told the first violations.
func New(report func(format string, args ...any)) *History {
	return &History{
		report: report, start: time.Now(), Ops: make(map[string][]porcupine.Operation), refused: make(map[string]string),
		seen: make(map[string]int64), tags: make(map[string]uint64), values: make(map[uint64]string),
	}
}

// Now returns the time since the history began.
func (h *History) Now() time.Duration { return time.Since(h.start) }

// Violation counts something that must not be, and reports it.
func (h *History) Violation(format string, args ...any) {
	if n := h.Violations.Add(1); n <= 20 {
		h.report("violation after %v: "+format, append([]any{h.Now().Round(time.Millisecond)}, args...)...)
	}
}

// Add writes down an operation that was made, or may have been.
func (h *History) Add(client int, op Op, out Answer, call, back time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	written := op.Kind == "put" || op.Kind == "post"
	if value := out.Value; out.Known && !out.Failed && (written || value != "null" && value != "") {
		if written {
			value = op.Value
		}
		h.see(value, out.Tag, int64(back))
	}
	done := porcupine.Operation{ClientId: client, Input: op, Output: out, Call: int64(call), Return: int64(back)}
	switch {
	case op.Kind == "stale":
		return
	case !out.Known && op.Kind == "get":
		return // it tells nothing
	case !out.Known:
		done.Return = math.MaxInt64
		h.Unknown++
	case out.Failed:
		h.refuse(op.Value, "its precondition failed")
	}
	h.Count++
	h.Ops[op.Key] = append(h.Ops[op.Key], done)
	if op.Kind == "post" {
		h.Ops[op.Other] = append(h.Ops[op.Other], done)
	}
}

// see takes note that a value is known to have been written. The caller holds h.mu.
func (h *History) see(value string, tag uint64, at int64) {
	if why, refused := h.refused[value]; refused {
		h.Violation("%s was written; want that it was not: %s", value, why)
	}
	if since, seen := h.seen[value]; !seen || at < since {
		h.seen[value] = at
	}
	if tag == 0 {
		return
	}
	if was, known := h.values[tag]; known && was != value {
		h.Violation("tag %d is on %s and on %s; want one value for each tag", tag, was, value)
	}
	if was, known := h.tags[value]; known && was != tag && !h.Lossy {
		h.Violation("%s has the tags %d and %d; want one tag for each write", value, was, tag)
	}
	h.values[tag], h.tags[value] = value, tag
}

// Keys returns the keys of all operations, in order.
func (h *History) Keys() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.Ops))
}

// Refuse takes note that a value was certainly not written, and why.
func (h *History) Refuse(value, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refuse(value, why)
}

// refuse is Refuse for a caller that holds h.mu.
func (h *History) refuse(value, why string) {
	if value == "" {
		return // not a put
	}
	if _, seen := h.seen[value]; seen {
		h.Violation("%s was written; want that it was not: %s", value, why)
	}
	h.refused[value] = why
}

// Judge judges the history, when all clients have ended.
func (h *History) Judge() {
	h.mu.Lock()
	defer h.mu.Unlock()
	keys := make(chan string, len(h.Ops))
	for key := range h.Ops {
		keys <- key
	}
	close(keys)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for key := range keys {
				ops := h.Refine(h.Ops[key])
				if got := Check(ops); got != porcupine.Ok {
					h.Violation("the history of %s, with %d operations, is %v; want it linearizable:%s", key, len(ops), got, Describe(ops))
				}
			}
		})
	}
	wg.Wait()
}

// Refine adds to a key's operations what was learnt later: tags, and of writes without an answer, that somebody saw them.
func (h *History) Refine(ops []porcupine.Operation) []porcupine.Operation {
	ops = slices.Clone(ops)
	for i, op := range ops {
		in, out := op.Input.(Op), op.Output.(Answer)
		if in.Kind == "get" || in.Kind == "delete" || out.Failed {
			continue
		}
		out.Tag = h.tags[in.Value]
		if at, seen := h.seen[in.Value]; seen {
			ops[i].Return = min(op.Return, at)
		}
		ops[i].Output = out
	}
	return ops
}

// Check looks for a right order. What nobody heard of may have happened after everything else, so the operations that are
// left without it need only be in order by themselves; mostly they are. If not, what nobody heard of may explain it.
func Check(ops []porcupine.Operation) porcupine.CheckResult {
	heard := slices.DeleteFunc(slices.Clone(ops), func(op porcupine.Operation) bool { return op.Return == math.MaxInt64 })
	if porcupine.CheckOperationsTimeout(model, heard, time.Minute) == porcupine.Ok {
		return porcupine.Ok
	}
	return porcupine.CheckOperationsTimeout(model, ops, 2*time.Minute)
}

// Describe writes operations one a line, by the time of their call.
func Describe(ops []porcupine.Operation) string {
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
