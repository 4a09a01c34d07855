package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"raftstarter/test/history"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// simMachine is a state machine that takes note of what it executes.
type simMachine struct {
	*testMachine
	node *simNode
}

func (m *simMachine) Apply(encoded []byte, at time.Time) ([]byte, error) {
	result, err := m.testMachine.Apply(encoded, at)
	if err != nil {
		return nil, err
	}
	if tag := binary.BigEndian.Uint64(result); tag != 0 {
		s := m.node.sim
		s.mu.Lock()
		before, known := s.commands[tag]
		s.commands[tag] = string(encoded)
		s.mu.Unlock()
		if known && before != string(encoded) {
			s.t.Errorf("%s executes %q with tag %d, which was that of %q", m.node.id, encoded, tag, before)
		}
	}
	return result, nil
}

// simHistory is all that clients did.
type simHistory struct {
	mu      sync.Mutex // guards what follows
	ops     []porcupine.Operation
	refused []string // values of which the Store said that they were certainly not written
}

func (h *simHistory) add(op porcupine.Operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

func (h *simHistory) all() []porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ops)
}

func (h *simHistory) refuse(value string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = append(h.refused, value)
}

// client makes operations until ctx ends, on a few keys that change every second, so that histories stay short.
func (s *sim) client(ctx context.Context, id int) {
	tags := make(map[string]uint64) // last seen, by key
	for ctx.Err() == nil {
		time.Sleep(rand.N(200 * time.Millisecond))
		op := history.Op{Key: fmt.Sprintf("%d-%d", time.Now().Unix(), rand.IntN(3))}
		switch op.Kind = []string{"put", "put", "put", "get", "get", "get", "get", "delete"}[rand.IntN(8)]; {
		case op.Kind == "get":
		case rand.IntN(2) == 0:
			op.Match = tags[op.Key]
		}
		if out, ok := s.do(id, s.nodes[rand.IntN(len(s.nodes))], op); ok && !out.Failed && out.Tag != 0 {
			tags[op.Key] = out.Tag
		}
	}
}

// put writes a new value to the key k through a node, and says whether that was acknowledged.
func (s *sim) put(n *simNode) bool {
	out, ok := s.do(99, n, history.Op{Kind: "put", Key: "k"})
	return ok && !out.Failed
}

// do makes an operation through a node and writes it down, unless it certainly did not happen. What a process says when
// it has crashed was never heard.
func (s *sim) do(id int, n *simNode, op history.Op) (out history.Answer, ok bool) {
	r := n.run.Load()
	if r == nil {
		return out, false
	}
	if op.Kind == "put" && op.Value == "" {
		op.Value = strconv.FormatInt(s.value.Add(1), 10)
	}
	done := porcupine.Operation{ClientId: id, Input: op, Call: s.clock.Add(1), Return: math.MaxInt64}
	type answer struct {
		history.Answer
		err error
	}
	heard := make(chan answer, 1)
	go func() {
		out, err := r.do(op)
		heard <- answer{out, err}
	}()
	a := answer{err: ErrUnknownOutcome}
	select {
	case a = <-heard:
	case <-r.gone:
	}
	if r.dead.Load() {
		a = answer{err: ErrUnknownOutcome}
	}
	switch {
	case a.err == nil:
		a.Known, done.Return = true, s.clock.Add(1)
	case op.Kind == "put" && !errors.Is(a.err, ErrUnknownOutcome):
		s.h.refuse(op.Value)
		return out, false
	case op.Kind == "get" || !errors.Is(a.err, ErrUnknownOutcome):
		return out, false
	}
	done.Output, done.Metadata = a.Answer, r.store.membership.cluster()
	s.h.add(done)
	return a.Answer, a.Known
}

func (r *simRun) do(op history.Op) (out history.Answer, err error) {
	var w testWritten
	command := testCommand{match: op.Match, pairs: []testPair{{op.Key, op.Value}}}
	switch op.Kind {
	case "get":
		item, err := r.client.get(context.Background(), op.Key, Linearizable)
		return simItem(item), err
	case "put":
		if w, err = r.client.apply(context.Background(), command); err == nil {
			out.Tag = w.Version
		}
	case "delete":
		command.remove = true
		_, err = r.client.apply(context.Background(), command)
	}
	if errors.Is(err, errTestMatch) {
		return history.Answer{Failed: true}, nil
	}
	return out, err
}

func simItem(item testItem) history.Answer {
	if item.Version == 0 {
		return history.Answer{Value: "null"}
	}
	return history.Answer{Value: item.Value, Tag: item.Version}
}

// compare has every node tell all it has. That ends the history.
func (s *sim) compare() {
	keys := make(map[string]bool)
	for _, op := range s.h.all() {
		keys[op.Input.(history.Op).Key] = true
	}
	for _, n := range s.nodes {
		r := n.run.Load()
		if r == nil || !n.belongs() {
			continue
		}
		if err := r.store.Read(context.Background(), Linearizable, func() {
			for key := range keys {
				item := r.client.machine.items[key]
				s.h.add(porcupine.Operation{
					Input: history.Op{Kind: "get", Key: key}, Output: func() history.Answer { a := simItem(item); a.Known = true; return a }(),
					Call: s.clock.Add(1), Return: s.clock.Add(1), Metadata: r.store.membership.cluster(),
				})
			}
		}); err != nil {
			s.t.Errorf("%s cannot be read at the end: %v", n.id, err)
		}
	}
}

// judge looks for an order in which all answers are right, key by key. A key whose history goes on in another cluster,
// after a majority had lost its state, is not judged. Tags grow with time in any case.
func (s *sim) judge() {
	keys := make(map[string][]porcupine.Operation)
	cluster := make(map[string]string) // by key
	first := make(map[string]int64)    // when a cluster acknowledged its first write
	var writes []porcupine.Operation
	h := history.New(s.t.Errorf)
	h.Lossy = s.lossy
	for _, value := range s.h.refused {
		h.Refuse(value, "the Store said so")
	}
	for _, op := range s.h.all() {
		in, out := op.Input.(history.Op), op.Output.(history.Answer)
		h.Add(op.ClientId, in, out, time.Duration(op.Call), time.Duration(op.Return))
		keys[in.Key] = append(keys[in.Key], op)
		if !out.Known {
			continue
		}
		of := op.Metadata.(string)
		if at, dead := s.deaths[of]; dead && op.Call > at {
			s.t.Errorf("%+v was answered with %+v by a cluster of which a majority had lost its state before", in, out)
		}
		if was, known := cluster[in.Key]; known && was != of {
			of = "several"
		}
		cluster[in.Key] = of
		if in.Kind == "put" && !out.Failed {
			writes = append(writes, op)
			if at, known := first[op.Metadata.(string)]; !known || op.Return < at {
				first[op.Metadata.(string)] = op.Return
			}
		}
	}
	if len(first) > 1 && !s.lossy {
		s.t.Errorf("%d clusters have acknowledged writes; want one", len(first))
	}
	slices.SortFunc(writes, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	byReturn := slices.Clone(writes)
	slices.SortFunc(byReturn, func(a, b porcupine.Operation) int { return int(a.Return - b.Return) })
	newest := uint64(0)
	for _, op := range writes {
		for ; len(byReturn) > 0 && byReturn[0].Return < op.Call; byReturn = byReturn[1:] {
			newest = max(newest, simTag(byReturn[0]))
		}
		if simTag(op) <= newest {
			s.t.Errorf("%+v got tag %d, after tag %d had been given out", op.Input, simTag(op), newest)
		}
		for other, at := range first {
			if of := op.Metadata.(string); other != of && at < op.Call && first[of] < at {
				s.t.Errorf("cluster %s acknowledged %+v, which began when cluster %s had acknowledged another write", of, op.Input, other)
			}
		}
	}
	for key, ops := range keys {
		if cluster[key] == "several" || s.restored[key] {
			continue
		}
		if got := history.Check(h.Refine(ops)); got != porcupine.Ok {
			s.t.Errorf("the history of %s, with %d operations, is %v; want it linearizable:%s", key, len(ops), got, history.Describe(ops))
		}
	}
}

func simTag(op porcupine.Operation) uint64 { return op.Output.(history.Answer).Tag }
