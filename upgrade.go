package main

import (
	"context"
	"fmt"
	"math"
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

// lowestVersion returns the newest version that all voters know, 0 if one does not answer, and the node of one that
// knows no more than that. What a voter answered before does not count: it may be down because it goes back to an older
// binary.
func (v view) lowestVersion() (lowest byte, behind string) {
	lowest = math.MaxUint8
	for _, m := range voting(v.mine().Members) {
		known := byte(0)
		if v.present(m) {
			known = v.answers[nodeOf(m.Server)].Commands
		}
		if known < lowest {
			lowest, behind = known, nodeOf(m.Server)
		}
	}
	return lowest, behind
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
