package main

import (
	"context"
	"fmt"
	"math"
	"sync"
)

// A rolling upgrade runs nodes of two versions side by side. What an older one cannot execute must not get into the log
// before all voters can: else the older ones would stop. So a command begins with a byte, the version of commands that
// it needs; each node says which is the newest that it knows; and the first command of a newer version is taken only
// when every voter has just answered that it knows it. Once such a command has been executed, all voters knew
// it, and nobody has to ask any more. Until then all nodes can go back to the older version.

// firstCommandVersion is known to all nodes.
const firstCommandVersion = 1

// versionedMachine is a StateMachine with commands of several versions. The first byte of each command is its version.
type versionedMachine interface {
	// CommandVersion returns the newest version that this binary knows.
	CommandVersion() byte
}

// commandVersion returns the version that a command needs.
func (r *replica) commandVersion(command []byte) byte {
	if _, versioned := r.machine.(versionedMachine); !versioned || len(command) == 0 {
		return firstCommandVersion
	}
	return command[0]
}

// knownVersion returns the newest version of commands that this node knows.
func (r *replica) knownVersion() byte {
	if m, versioned := r.machine.(versionedMachine); versioned {
		return m.CommandVersion()
	}
	return firstCommandVersion
}

// voterVersions is what a leader has heard of the versions that the voters know.
type voterVersions struct {
	mu     sync.Mutex // guards what follows
	term   uint64     // in which this node led
	lowest byte       // of all voters; 0 if one did not answer
	behind string     // the node of one that knows no more than that
}

// note takes note of what all nodes have just answered. What a voter answered before does not count: it may be down
// because it goes back to an older binary.
func (w *voterVersions) note(v view, term uint64, members []member) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.term, w.lowest, w.behind = term, math.MaxUint8, ""
	for _, m := range members {
		info, known := v.answers[nodeOf(m.Server)], byte(0)
		if info.Server == m.Server {
			known = info.Commands
		}
		if m.Voter && known < w.lowest {
			w.lowest, w.behind = known, nodeOf(m.Server)
		}
	}
}

// get returns what note has found in a term. What it found in an earlier one may be wrong: node1 leads, node2 takes
// over, node3 goes back to an older binary, and node1 leads again.
func (w *voterVersions) get(term uint64) (lowest byte, behind string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.term != term {
		return 0, ""
	}
	return w.lowest, w.behind
}

// checkVersion returns an error that wraps ErrNotUpgraded, and names a node, if a voter may not know the command.
func (s *Store) checkVersion(ctx context.Context, command []byte) error {
	version := s.replica.commandVersion(command)
	if version <= max(firstCommandVersion, byte(s.replica.maxVersion.Load())) {
		return nil
	}
	return s.leadership.retry(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		leader, err := s.askWho(ctx, s.Leader())
		switch {
		case err != nil || !leader.Ready || leader.Behind == "": // it has not asked the voters yet
			return ErrNotLeader
		case leader.Lowest < version:
			return fmt.Errorf("%w: start %s with a newer version, or wait for its answer", ErrNotUpgraded,
				leader.Behind)
		}
		return nil
	})
}
