package test

import (
	"net"
	"os"
	"raftstarter/test/link"
	"strings"
	"testing"
)

// wires are what the nodes' messages to one another go through. set says what becomes of those from one node to another:
// for linkCut a connection that carries any is reset; with any other mode but linkOpen they are lost until TCP repeats them.
type wires interface {
	set(mode func(from, to int) linkMode)
}

// proxies are wires of a TCP proxy for each direction of calls, where there can be no network namespaces.
type proxies map[[2]int]*link.Link

func newProxies(t *testing.T, nodes []*proc) proxies {
	t.Helper()
	links := make(proxies)
	setPeers(nodes, func(from, to int) string {
		addr := nodes[to].env["RAFT_ADDR"] + ":" + nodes[to].env["RAFT_PORT"]
		if from != to {
			l := link.New(t, addr, nil)
			links[[2]int{from, to}], addr = l, l.Addr
		}
		return addr
	})
	return links
}

func (p proxies) set(mode func(from, to int) linkMode) {
	for pair, l := range p {
		calls, answers := mode(pair[0], pair[1]), mode(pair[1], pair[0])
		switch {
		case calls == linkCut || answers == linkCut:
			l.Set(linkCut)
		case calls != linkOpen:
			l.Set(linkHold)
		case answers != linkOpen:
			l.Set(linkHoldAnswers)
		default:
			l.Set(linkOpen)
		}
	}
}

// setPeers gives every node its PEERS, or PEERS_FILE if it has one. addr is where one node reaches another.
func setPeers(nodes []*proc, addr func(from, to int) string) {
	for i, p := range nodes {
		var peers []string
		for j, q := range nodes {
			peers = append(peers, q.name+"@"+addr(i, j))
		}
		if path := p.env["PEERS_FILE"]; path == "" {
			p.env["PEERS"] = strings.Join(peers, ",")
		} else if err := os.WriteFile(path, []byte(strings.Join(peers, "\n")+"\n"), 0o600); err != nil {
			p.t.Error(err)
		}
		p.env["RAFT_ADVERTISE_ADDR"], p.env["RAFT_ADVERTISE_PORT"], _ = net.SplitHostPort(addr(i, i))
	}
}

// What becomes of what is sent one way between two nodes: see package link.
type linkMode = link.Mode

const (
	linkOpen        = link.Open
	linkCut         = link.Cut
	linkHold        = link.Hold
	linkHoldAnswers = link.HoldAnswers
)
