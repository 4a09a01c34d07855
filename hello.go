package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"unicode"
)

// Every connection to the Raft port begins with a hello. It says what the connection carries, who made it, which
// server it is meant for, and to which cluster its maker belongs. This is a format: helloMagic, whose last byte is
// the version; a byte for the kind; then sender, target and cluster id, each after a byte with its length. The answer
// is a byte with a length and that many bytes that say why the connection is refused; length 0 accepts it.
const helloMagic = "RSTRAFT\x02"

// What a connection carries. The values are a format. Raft's messages and calls pass only between servers of one
// cluster. A question passes between any two nodes that know each other.
const (
	kindRaft byte = 'R' // Raft's own messages
	kindCall byte = 'C' // the calls in peers.go, all but opWho
	kindAsk  byte = 'A' // opWho
)

const maxName = 128 // bytes of a server's name or a cluster's id

// hello begins a connection.
type hello struct {
	kind           byte
	sender, target string // names of servers, such as node1#1; for kindAsk ids of nodes
	cluster        string // the sender's; "" for kindAsk
}

func (h hello) encode() []byte {
	b := append([]byte(helloMagic), h.kind)
	for _, s := range []string{h.sender, h.target, h.cluster} {
		b = append(append(b, byte(len(s))), s...)
	}
	return b
}

// readHello reads a hello from r, and not a byte more: what follows is for whoever serves the connection.
func readHello(r io.Reader) (h hello, err error) {
	head := make([]byte, len(helloMagic)+1)
	if _, err := io.ReadFull(r, head); err != nil {
		return h, err
	}
	if head[0] == 0x16 { // the first byte of a TLS handshake
		return h, errors.New("no hello of this service, but TLS, which this node has not: " +
			"set the TLS files on all nodes or on none")
	}
	if string(head[:len(helloMagic)]) != helloMagic {
		return h, errors.New("no hello of this service, or one of another version")
	}
	h.kind = head[len(helloMagic)]
	for _, s := range []*string{&h.sender, &h.target, &h.cluster} {
		if *s, err = readShort(r); err != nil {
			return h, err
		}
	}
	return h, nil
}

// sendHello sends a hello and waits for the answer to it. An error says that the connection was refused, or lost.
func sendHello(conn net.Conn, h hello) error {
	if _, err := conn.Write(h.encode()); err != nil {
		return err
	}
	reason, err := readShort(conn)
	if err != nil {
		return fmt.Errorf("no answer to the hello: %w", err)
	}
	if strings.ContainsFunc(reason, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return errors.New("what listens there is no node of this service")
	}
	if reason != "" {
		return fmt.Errorf("refused: %s", reason)
	}
	return nil
}

// readShort reads a byte with a length, and that many bytes.
func readShort(r io.Reader) (string, error) {
	var b [256]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return "", err
	}
	text := b[1 : 1+int(b[0])]
	_, err := io.ReadFull(r, text)
	return string(text), err
}
