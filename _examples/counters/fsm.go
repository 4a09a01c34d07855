package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"time"
)

// This file is a state machine: counters with names, none of which is ever negative. Commands, results and snapshots
// are JSON, which is the shortest to write; a format of your own (see codec.go) is faster.

// counters is the state. It is a StateMachine, so it needs no locks.
type counters struct {
	values map[string]int64
}

func newMachine() *counters { return &counters{values: make(map[string]int64)} }

// command is what the log holds. It begins with its kind, so that later versions can have others.
type command struct {
	Op   string `json:"op"` // opAdd
	Name string `json:"name"`
	N    int64  `json:"n"`
}

const opAdd = "add"

// result is what became of a command.
type result struct {
	Value   int64 `json:"value"`
	Refused bool  `json:"refused,omitempty"` // nothing was changed
}

// Len returns the number of counters.
func (c *counters) Len() int { return len(c.values) }

// Apply adds to a counter. What it refuses to do is a result like any other: only a command that it cannot read is an
// error, which stops the node.
func (c *counters) Apply(encoded []byte, _ time.Time) ([]byte, error) {
	var cmd command
	if err := json.Unmarshal(encoded, &cmd); err != nil {
		return nil, err
	}
	if cmd.Op != opAdd {
		return nil, fmt.Errorf("the operation %q is not known to this binary; was it written by a newer one?", cmd.Op)
	}
	value := c.values[cmd.Name]
	if cmd.N < -value || cmd.N > math.MaxInt64-value {
		return json.Marshal(result{Value: value, Refused: true})
	}
	c.values[cmd.Name] = value + cmd.N
	return json.Marshal(result{Value: value + cmd.N})
}

// Snapshot copies the state, since commands are executed while the copy is written. For millions of counters use a
// btree.Map, whose copy takes no time. JSON has the names of a map in order, so equal states give equal bytes.
func (c *counters) Snapshot() func(io.Writer) error {
	values := maps.Clone(c.values)
	return func(w io.Writer) error { return json.NewEncoder(w).Encode(values) }
}

// Restore reads what Snapshot wrote. The state is replaced only when the returned function is called.
func (c *counters) Restore(r io.Reader) (install func(), err error) {
	encoded, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	values := make(map[string]int64)
	if err := json.Unmarshal(encoded, &values); err != nil {
		return nil, err
	}
	return func() { c.values = values }, nil
}
