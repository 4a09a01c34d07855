package main

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// kindsMachine counts commands. It knows those up to a version.
type kindsMachine struct {
	version byte
	state   []byte
}

func (m *kindsMachine) Apply(command []byte, _ time.Time) ([]byte, error) {
	if command[0] > m.version {
		return nil, errors.New("this version is not known")
	}
	m.state = append(m.state, command[0])
	return nil, nil
}

func (m *kindsMachine) Snapshot() func(io.Writer) error {
	state := bytes.Clone(m.state)
	return func(w io.Writer) error { _, err := w.Write(state); return err }
}

func (m *kindsMachine) Restore(r io.Reader) (func(), error) {
	state, err := io.ReadAll(r)
	return func() { m.state = state }, err
}

func (m *kindsMachine) Len() int             { return len(m.state) }
func (m *kindsMachine) CommandVersion() byte { return m.version }

type kindsService struct{ version byte }

func (s kindsService) newMachine() StateMachine { return &kindsMachine{version: s.version} }

func (kindsService) routes(*Config, *Store, StateMachine) []route { return nil }

// Nobody may use a newer version of commands before every voter knows it. The answer names who does not.
func TestNewerCommandsWaitForAllVoters(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeBolt)
	start := func(i int, version byte) {
		c.service = kindsService{version: version}
		c.start(i)
	}
	for i := range c.nodes {
		start(i, 1)
	}
	apply := func(i int, version byte) error {
		_, err := c.nodes[i].Apply(t.Context(), []byte{version})
		return err
	}
	for i := range c.nodes {
		c.stop(i) // one after the other, as an upgrade goes
		start(i, 2)
		waitFor(t, "the node to be ready", func() bool { return c.nodes[i].Ready() == nil })
		if err := apply(i, 1); err != nil {
			t.Errorf("a command of version 1 through node%d: %v", i+1, err)
		}
		if i == 2 {
			break
		}
		for j := range c.nodes[:i+1] { // also while the leader is still to find out about the others
			if err := apply(j, 2); !errors.Is(err, ErrNotUpgraded) || !strings.Contains(err.Error(), "node") {
				t.Errorf("a command of version 2 through node%d when %d of 3 are upgraded: got %v; want that one does not know it", j+1, i+1, err)
			}
		}
	}
	waitFor(t, "commands of version 2 to be taken", func() bool { return apply(0, 2) == nil })
	leader := c.leader()
	c.stop(c.followers(leader)[0]) // of which the next leader never hears
	c.stop(leader)
	start(leader, 2)
	waitFor(t, "them to be taken again", func() bool { return apply(leader, 2) == nil })
}

// The first command of a newer version does not hang with a leader that has stopped answering. The next one refuses it,
// as it cannot ask that node.
func TestNewerCommandDoesNotWaitForASilentLeader(t *testing.T) {
	t.Parallel()
	c := unstartedCluster(t, 3, storeMemory)
	c.service = kindsService{version: 2}
	c.startAll()
	leader := c.leader()
	c.cut(leader, linkHold)
	began := time.Now()
	_, err := c.nodes[c.followers(leader)[0]].Apply(t.Context(), []byte{2})
	silent := c.nodes[leader].cfg.NodeID
	if !errors.Is(err, ErrNotUpgraded) || !strings.Contains(err.Error(), silent) || time.Since(began) > leaderWait+time.Second {
		t.Errorf("got %v after %v; want that the next leader says that %s has not answered", err, time.Since(began), silent)
	}
}

// A leader that has led before must ask all voters again: meanwhile one of them may have gone back to an older binary.
func TestVersionsAreOfThisTerm(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t, 3, storeMemory)
	leader := c.nodes[c.leader()]
	waitFor(t, "the leader to have heard of all versions", func() bool {
		info, err := leader.info()
		return err == nil && info.Lowest > 0
	})
	before := *leader.membership.found.Load()
	before.term-- // as if it had heard that when it led before, and not yet looked again
	leader.membership.found.Store(&before)
	if info, err := leader.info(); err != nil || info.Lowest != 0 || info.Behind != "" {
		t.Errorf("got version %d (%q), error %v; want none before it has asked in this term", info.Lowest, info.Behind, err)
	}
}

// Once a newer command has been executed, an older binary can use neither the log nor a snapshot; until then it can use both.
func TestSnapshotSaysWhichCommandsAreInIt(t *testing.T) {
	for _, tt := range []struct {
		executed []byte
		magic    string
		reads    byte // the version of the binary that reads it
		error    string
	}{
		{[]byte{1, 1}, snapshotMagic, 1, ""},
		{[]byte{1, 2, 1}, snapshotMagic3, 2, ""},
		{[]byte{1, 2, 1}, snapshotMagic3, 1, "start this node with the newer binary"},
	} {
		r := newTestReplica(t, &kindsMachine{version: 2})
		for i, version := range tt.executed {
			r.Apply(&raft.Log{Index: uint64(i + 1), Data: encodeEntry(time.Now(), [][]byte{{version}})})
		}
		s, err := r.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		var written bytes.Buffer
		if err := s.(*snapshot).writeTo(&written); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(written.Bytes(), []byte(tt.magic)) {
			t.Errorf("%v: got a snapshot that begins with %q; want %q", tt.executed, written.Bytes()[:8], tt.magic)
		}
		again := newTestReplica(t, &kindsMachine{version: tt.reads})
		err = again.restore(&written)
		if tt.error == "" && (err != nil || again.maxVersion.Load() != r.maxVersion.Load()) || tt.error != "" && (err == nil || !strings.Contains(err.Error(), tt.error)) {
			t.Errorf("%v, read by version %d: got %v, executed %d; want %q, %d", tt.executed, tt.reads, err, again.maxVersion.Load(), tt.error, r.maxVersion.Load())
		}
	}
}
