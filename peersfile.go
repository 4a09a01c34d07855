package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

const peersFileInterval = 2 * time.Second // for which PEERS_FILE must stay the same before it counts

// peerList says which nodes the cluster should have. PEERS says so once. PEERS_FILE may change while the node runs.
type peerList struct {
	path string // of PEERS_FILE; "" for PEERS
	log  hclog.Logger

	now atomic.Pointer[[]Peer]
	bad atomic.Bool // the file cannot be used as it is now, so an older list is in use

	// For look alone: what the file held or why it could not be read, since when, and what was last dealt with.
	seen, handled string
	since         time.Time
}

// newPeerList returns the list that cfg was loaded with.
func newPeerList(cfg *Config, log hclog.Logger) *peerList {
	l := &peerList{path: cfg.PeersFile, log: log, handled: "\x00nothing yet"}
	peers := cfg.Peers
	l.now.Store(&peers)
	return l
}

// get returns the nodes in the order of their ids.
func (l *peerList) get() []Peer { return *l.now.Load() }

// removes says whether a node that is not in the list is to leave the cluster.
func (l *peerList) removes() bool { return l.path != "" }

// follow reads PEERS_FILE again and again until ctx ends. It may hang in a look if the file is on a dead mount.
// It returns at once where the list comes from PEERS.
func (l *peerList) follow(ctx context.Context) {
	if l.path == "" {
		return
	}
	tick := time.NewTicker(peersFileInterval / 2)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.look(time.Now())
		case <-ctx.Done():
			return
		}
	}
}

// look reads PEERS_FILE. A new list counts when it has been the same for peersFileInterval: a file that is half written
// may hold a list that is valid and shorter.
func (l *peerList) look(now time.Time) {
	content, mode, err := readFile(l.path)
	found := string(content)
	if err != nil {
		found = "\x00" + err.Error() // no list holds such a byte
	}
	if found != l.seen {
		l.seen, l.since = found, now
	}
	if found == l.handled || now.Sub(l.since) < peersFileInterval {
		return
	}
	l.handled = found
	if mode&0o002 != 0 {
		l.log.Warn("everybody can write PEERS_FILE, and so remove nodes from the cluster: chmod o-w it", "PEERS_FILE", l.path)
	}
	peers, problems := []Peer(nil), []error{err}
	if err == nil {
		peers, problems = parsePeersFile(found)
	}
	if err := errors.Join(problems...); err != nil {
		l.bad.Store(true)
		l.log.Warn("PEERS_FILE cannot be used as it is now; the list that was read before stays in use", "error", err)
		return
	}
	if !l.bad.Swap(false) && slices.Equal(peers, l.get()) {
		return
	}
	l.now.Store(&peers)
	l.log.Info("PEERS_FILE read again", "peers", peerIDs(peers))
}

// parsePeersFile reads what PEERS_FILE holds: what PEERS would, one entry a line or separated by commas. Blank lines
// are skipped, as is what follows a #.
func parsePeersFile(text string) ([]Peer, []error) {
	var entries []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.Trim(line, " \t\r\n,"); line != "" {
			entries = append(entries, line)
		}
	}
	if len(entries) == 0 {
		return nil, []error{errors.New("PEERS_FILE names no node: write one entry a line, as id@host:port")}
	}
	return parsePeers("PEERS_FILE", strings.Join(entries, ","))
}
