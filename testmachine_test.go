package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// The tests of all but fsm.go and http.go run this state machine, a small map, and the routes below. So whoever puts a
// state machine of their own in the place of fsm.go and http.go still has all these tests.

// testItem is the value of a key, and the version of the write that set it; 0 is the version of a key that is not there.
type testItem struct {
	Value   string
	Version uint64
}

// testPair is a key and the value that it gets.
type testPair struct{ Key, Value string }

// testCommand sets all of its pairs or deletes their keys.
type testCommand struct {
	remove bool
	match  uint64 // if not 0, the command is executed only if the first key has this version
	pairs  []testPair
}

// testCommandVersion is what a command begins with. Then come strings behind their lengths: the kind, match, and each
// key with its value.
const testCommandVersion = 1

func (c testCommand) encode() []byte {
	fields := []string{strconv.FormatBool(c.remove), strconv.FormatUint(c.match, 10)}
	for _, p := range c.pairs {
		fields = append(fields, p.Key, p.Value)
	}
	return appendStrings([]byte{testCommandVersion}, fields...)
}

func decodeTestCommand(b []byte) (c testCommand, err error) {
	malformed := errors.New("malformed command")
	if len(b) == 0 {
		return c, malformed
	}
	if b[0] != testCommandVersion {
		return c, fmt.Errorf("command version %d is not known", b[0])
	}
	fields, err := decodeStrings(b[1:])
	if err != nil || len(fields) < 4 || len(fields)%2 != 0 {
		return c, malformed
	}
	var err1, err2 error
	c.remove, err1 = strconv.ParseBool(fields[0])
	c.match, err2 = strconv.ParseUint(fields[1], 10, 64)
	for pair := range slices.Chunk(fields[2:], 2) {
		c.pairs = append(c.pairs, testPair{pair[0], pair[1]})
	}
	return c, errors.Join(err1, err2)
}

// testSet returns a command that sets pairs.
func testSet(pairs ...testPair) []byte { return testCommand{pairs: pairs}.encode() }

func appendStrings(b []byte, fields ...string) []byte {
	for _, s := range fields {
		b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
	}
	return b
}

func decodeStrings(b []byte) (fields []string, err error) {
	for len(b) > 0 {
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return nil, errors.New("a string is cut short")
		}
		b = b[n:]
		fields, b = append(fields, string(b[:size])), b[size:]
	}
	return fields, nil
}

// testMachine is a StateMachine.
type testMachine struct {
	items map[string]testItem
	last  uint64          // version that was given out
	hold  <-chan struct{} // if not nil, Apply and Restore wait for an element
}

func newTestMachine() *testMachine { return &testMachine{items: make(map[string]testItem)} }

func (m *testMachine) Len() int { return len(m.items) }

func (m *testMachine) wait() {
	if m.hold != nil {
		<-m.hold
	}
}

func (m *testMachine) clone() *testMachine {
	return &testMachine{items: maps.Clone(m.items), last: m.last}
}

// Apply returns the command's version, or 0 if it was not executed. Versions only grow, even if a cluster has lost all
// of its state and begins anew: it begins with the clock.
func (m *testMachine) Apply(encoded []byte, at time.Time) ([]byte, error) {
	m.wait()
	c, err := decodeTestCommand(encoded)
	if err != nil {
		return nil, err
	}
	if c.match != 0 && m.items[c.pairs[0].Key].Version != c.match {
		return make([]byte, 8), nil
	}
	if m.last == 0 {
		m.last = uint64(at.UnixMicro())
	}
	m.last++
	for _, p := range c.pairs {
		if c.remove {
			delete(m.items, p.Key)
		} else {
			m.items[p.Key] = testItem{p.Value, m.last}
		}
	}
	return binary.BigEndian.AppendUint64(nil, m.last), nil
}

// Snapshot writes the last version, then each key, in order, with its value and version.
func (m *testMachine) Snapshot() func(io.Writer) error {
	captured := m.clone()
	return func(w io.Writer) error {
		if _, err := w.Write(appendStrings(nil, fmt.Sprint(captured.last))); err != nil {
			return err
		}
		for _, key := range slices.Sorted(maps.Keys(captured.items)) {
			item := captured.items[key]
			if _, err := w.Write(appendStrings(nil, key, item.Value, fmt.Sprint(item.Version))); err != nil {
				return err
			}
		}
		return nil
	}
}

func (m *testMachine) Restore(source io.Reader) (install func(), err error) {
	m.wait()
	b, err := io.ReadAll(source)
	if err != nil {
		return nil, err
	}
	fields, err := decodeStrings(b)
	if err != nil || len(fields)%3 != 1 {
		return nil, errors.New("malformed snapshot")
	}
	restored := newTestMachine()
	restored.last, err = strconv.ParseUint(fields[0], 10, 64)
	for item := range slices.Chunk(fields[1:], 3) {
		version, err1 := strconv.ParseUint(item[2], 10, 64)
		err = errors.Join(err, err1)
		restored.items[item[0]] = testItem{item[1], version}
	}
	return func() { *m = *restored }, err
}

// testClient uses a testMachine through a Store.
type testClient struct {
	store   *Store
	machine *testMachine
}

// testWritten is what became of a successful write.
type testWritten struct {
	Index   uint64 // of its log entry
	Version uint64
}

// errTestMatch says that a key had another version than the one asked for, so nothing was written.
var errTestMatch = errors.New("the key has another version")

func (c *testClient) set(ctx context.Context, key, value string) (testWritten, error) {
	return c.apply(ctx, testCommand{pairs: []testPair{{key, value}}})
}

func (c *testClient) apply(ctx context.Context, command testCommand) (testWritten, error) {
	result, err := c.store.Apply(ctx, command.encode())
	if err != nil {
		return testWritten{}, err
	}
	version := binary.BigEndian.Uint64(result.Data)
	if version == 0 {
		return testWritten{}, errTestMatch
	}
	return testWritten{result.Index, version}, nil
}

func (c *testClient) get(ctx context.Context, key string, consistency Consistency) (item testItem, err error) {
	err = c.store.Read(ctx, consistency, func() { item = c.machine.items[key] })
	return item, err
}

// copyAll returns all that a node has, as it is saved where there is no majority.
func copyAll(ctx context.Context, store *Store, machine *testMachine) (all *testMachine, err error) {
	err = store.CaptureAll(ctx, func() { all = machine.clone() }, func(command []byte, at time.Time) error {
		_, err := all.Apply(command, at)
		return err
	})
	return all, err
}

// list returns what this node has, be it stale.
func (c *testClient) list() (items map[string]testItem) {
	c.store.Capture(func() { items = maps.Clone(c.machine.items) })
	return items
}

// testService is what the nodes of a test's cluster run on their Store.
type testService interface {
	newMachine() StateMachine
	routes(cfg *Config, store *Store, machine StateMachine) []route
}

// tinyService is the testService of all tests but those of the key-value service.
type tinyService struct{}

func (tinyService) newMachine() StateMachine { return newTestMachine() }

// routes serves a key's value, as it is, at /value/KEY. A POST to /value sets the key "posted".
func (tinyService) routes(cfg *Config, store *Store, machine StateMachine) []route {
	a := &tinyAPI{cfg, &testClient{store, machine.(*testMachine)}}
	return []route{
		{path: "/value", get: a.list, post: a.post},
		{path: "/value/", get: a.get, put: a.put, delete: a.delete},
	}
}

type tinyAPI struct {
	cfg    *Config
	client *testClient
}

func (a *tinyAPI) get(w http.ResponseWriter, r *http.Request) error {
	var item testItem
	key := r.URL.Path[len("/value/"):]
	err := readState(w, r, a.client.store, r.URL.Query(), func() { item = a.client.machine.items[key] })
	if err != nil {
		return err
	}
	return writeBody(w, "text/plain", []byte(item.Value))
}

func (a *tinyAPI) list(w http.ResponseWriter, _ *http.Request) error {
	return writeBody(w, "text/plain", []byte(fmt.Sprint(a.client.list())))
}

func (a *tinyAPI) put(_ http.ResponseWriter, r *http.Request) error {
	return a.write(r, r.URL.Path[len("/value/"):], false)
}

func (a *tinyAPI) delete(_ http.ResponseWriter, r *http.Request) error {
	return a.write(r, r.URL.Path[len("/value/"):], true)
}

func (a *tinyAPI) post(_ http.ResponseWriter, r *http.Request) error {
	return a.write(r, "posted", false)
}

func (a *tinyAPI) write(r *http.Request, key string, remove bool) error {
	body, err := readBody(r)
	if err != nil {
		return err
	}
	_, err = a.client.apply(r.Context(), testCommand{remove: remove, pairs: []testPair{{key, string(body)}}})
	return err
}
