package main

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// This file reads node ids, hosts, ports and PEERS.

// Peer is one member of the cluster as PEERS names it.
type Peer struct {
	ID   string
	Addr string // host:port, an IPv6 host in brackets; a DNS name stays a name
}

// What messages say is allowed.
const (
	idRule   = "ASCII letters, digits, ., _ and -, at most 64, no leading . or -"
	hostRule = "an IPv4 address, an IPv6 address or a DNS name"
	portRule = "a number from 1 to 65535"
)

// parsePeers reads PEERS or PEERS_FILE, whichever name says, and returns the peers in the order of their ids, and all
// problems. A peer with a bad address has the address "".
func parsePeers(name, text string) (peers []Peer, problems []error) {
	for i, entry := range strings.Split(text, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			problems = append(problems,
				fmt.Errorf("%s=%q is empty at entry %d: remove the stray comma, or unset %[1]s", name, text, i+1))
			continue
		}
		peer, whys := parsePeer(entry)
		if slices.ContainsFunc(peers, func(p Peer) bool { return p.ID == peer.ID }) {
			whys = append(whys, "has the same id as one before it: give every node its own")
		}
		sameAddr := func(p Peer) bool { return strings.EqualFold(p.Addr, peer.Addr) }
		if peer.Addr != "" && slices.ContainsFunc(peers, sameAddr) {
			whys = append(whys, "has the same address as one before it: give every node its own")
		}
		for _, why := range whys {
			problems = append(problems, fmt.Errorf("%s entry %q %s", name, entry, why))
		}
		if peer.ID != "" {
			peers = append(peers, peer)
		}
	}
	slices.SortFunc(peers, func(a, b Peer) int { return strings.Compare(a.ID, b.ID) })
	return peers, problems
}

// parsePeer reads one entry of PEERS. whys says what is wrong with it; peer has what could be read.
func parsePeer(entry string) (peer Peer, whys []string) {
	problem := func(format string, args ...any) { whys = append(whys, fmt.Sprintf(format, args...)) }
	id, addr, found := strings.Cut(entry, "@")
	switch {
	case strings.Contains(addr, "@") && strings.ContainsAny(addr, "; \t\r\n"):
		return Peer{}, []string{"is more than one: separate entries with commas"}
	case !found:
		return Peer{}, []string{"has no id: write it as id@host:port"}
	case !validID(id):
		problem("has a bad id %q: use %s", id, idRule)
	}
	peer.ID = id
	colon := strings.LastIndexByte(addr, ':')
	switch {
	case isIPv6(addr) || colon > 0 && isIPv6(addr[:colon]):
		problem("can be read in two ways: write an IPv6 host in brackets, as in id@[host]:port")
		return peer, whys
	case colon < 0 || strings.HasSuffix(addr, "]"):
		problem("has no port: write it as id@host:port")
		return peer, whys
	}
	host, why := parsePeerHost(addr[:colon])
	if why != "" {
		problem("has a host %q that %s: write it as id@host:port, the host being %s that peers reach it by",
			addr[:colon], why, hostRule)
	}
	port, ok := parsePort(addr[colon+1:])
	if !ok {
		problem("has a bad port %q: use %s", addr[colon+1:], portRule)
	}
	if why == "" && ok {
		peer.Addr = net.JoinHostPort(host, port)
	}
	return peer, whys
}

func validID(s string) bool {
	return s != "" && len(s) <= 64 && s[0] != '.' && s[0] != '-' && !strings.ContainsFunc(s, notNameRune)
}

func notNameRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.'
}

// parsePort returns the port without leading zeros, so that equal ports are equal strings.
func parsePort(s string) (port string, ok bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return "", false
	}
	return strconv.FormatUint(n, 10), true
}

// parseHost reads an IP address or a DNS name, or says why it is neither. It returns an IP without brackets and in one
// spelling, so that equal addresses are equal strings, and a name as it is.
func parseHost(s string) (host, why string) {
	bare := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		bare = s[1 : len(s)-1]
	}
	if ip, err := netip.ParseAddr(bare); err == nil && (bare == s || ip.Is6()) {
		return ip.Unmap().String(), ""
	}
	name := strings.TrimSuffix(s, ".")
	labels := strings.Split(name, ".")
	badLabel := slices.ContainsFunc(labels, func(label string) bool { return label == "" || len(label) > 63 })
	// No top-level domain is all digits, so a name that ends in such a label is a mistyped IPv4 address.
	mistyped := strings.Trim(labels[len(labels)-1], "0123456789") == ""
	if badLabel || mistyped || len(name) > 253 || strings.ContainsFunc(name, notNameRune) {
		return "", "is not an address"
	}
	return s, ""
}

// parsePeerHost is parseHost for a host that other machines must be able to dial.
func parsePeerHost(s string) (host, why string) {
	host, why = parseHost(s)
	if isUnspecified(host) {
		return "", "is unspecified, which no peer can dial"
	}
	if strings.Contains(host, "%") {
		return "", "has a zone, which means nothing on another machine"
	}
	return host, why
}

func isUnspecified(host string) bool { return host == "0.0.0.0" || host == "::" }

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.IsLoopback()
}

func isIPv6(host string) bool {
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Is6()
}
