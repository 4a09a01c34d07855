package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func FuzzHello(f *testing.F) {
	f.Add(hello{kindRaft, "node1", "node2", "cluster"}.encode())
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("RSTRAFT\x02R\x05node1\x05node2\x00"))
	f.Add([]byte("\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h hello
		var err error
		r := bytes.NewReader(b)
		checkMemory(t, len(b), 64<<10, func() { h, err = readHello(r) })
		if err == nil && !bytes.Equal(b[:len(b)-r.Len()], h.encode()) {
			t.Errorf("got %v out of %q, and took %d bytes", h, b, len(b)-r.Len())
		}
	})
}

func FuzzCallFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, opTerm, 'x'})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, opTerm})
	f.Add(frameHead(maxCallBytes+callFrameHead-4, opApply))
	f.Add(frameHead(maxCallBytes+callFrameHead-3, opApply))
	f.Fuzz(func(t *testing.T, b []byte) {
		var called frame
		var err error
		checkMemory(t, len(b), 1<<20, func() { called, err = readFrame(bufio.NewReader(bytes.NewReader(b))) })
		again := append(frameHead(uint32(len(called.payload)+callFrameHead-4), called.op), called.payload...)
		if err == nil && !bytes.HasPrefix(b, again) {
			t.Errorf("got op %d, %q out of %q", called.op, called.payload, b)
		}
	})
}

// pipes is a port with connections in memory, and its directory.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	close(p.closed)
	return nil
}

func (p *pipes) Addr() net.Addr { return nodeAddr("pipes") }

func (p *pipes) DialContext(context.Context, string, string) (net.Conn, error) {
	return nil, errors.New("nobody is there")
}

func (p *pipes) address(id string) (string, bool) { return "", id == "node2" }
func (p *pipes) cluster() string                  { return "c" }
func (p *pipes) welcome(hello) error              { return nil }

// watchedConn says when it is closed, and what was read from it until then.
type watchedConn struct {
	net.Conn
	ended chan struct{}
}

func (c *watchedConn) Close() error {
	err := c.Conn.Close()
	select {
	case <-c.ended:
	default:
		close(c.ended)
	}
	return err
}

// Whatever arrives at the Raft port: at once, behind the hello of a peer, or behind that of a peer's Raft.
func FuzzRaftPort(f *testing.F) {
	hellos := [][]byte{nil, hello{kindPeer, "node2", "node1", "c"}.encode(), hello{kindRaft, "node2", "node1", "c"}.encode()}
	f.Add(byte(0), []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add(byte(0), []byte("\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"))
	f.Add(byte(0), hello{'X', "node2", "node1", "c"}.encode())
	f.Add(byte(0), hello{kindRaft, "node3", "node1", "c"}.encode())
	f.Add(byte(0), append(hello{kindPeer, "node2", "node1", ""}.encode(), 0, 0, 0, 1, opTerm))
	f.Add(byte(1), append(frameHead(4, opTerm), "abc"...))
	f.Add(byte(1), frameHead(maxCallBytes, opApply))
	f.Add(byte(2), []byte{rpcAppendEntries})
	f.Add(byte(2), []byte{rpcAppendEntries, 0x81, 0xa7, 'E', 'n', 't', 'r', 'i', 'e', 's', 0xdd, 0xff, 0xff, 0xff, 0xff, 0x80})
	f.Add(byte(2), []byte{rpcAppendEntries, 0x81, 0xa6, 'L', 'e', 'a', 'd', 'e', 'r', 0xc6, 0xff, 0xff, 0xff, 0xff, 1})
	f.Add(byte(2), []byte{rpcAppendEntries, 0x81, 0xa6, 'L', 'e', 'a', 'd', 'e', 'r', 0xdb, 0x7f, 0xff, 0xff, 0xff, 1})
	f.Add(byte(2), []byte{rpcRequestVote, 0x82, 0xa4, 'T', 'e', 'r', 'm', 0xcf, 1, 2, 3, 4, 5, 6, 7, 8, 0xa9, 'C', 'a', 'n', 'd', 'i', 'd', 'a', 't', 'e', 0xc4, 1, 'x'})
	f.Add(byte(2), []byte{rpcInstallSnapshot, 0x81, 0xa4, 'S', 'i', 'z', 'e', 0xcf, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 'x', 'y'})
	port := &pipes{make(chan net.Conn), make(chan struct{})}
	n := newNetwork("node1", port, nil, port, newMetrics().refusals, hclog.NewNullLogger())
	f.Cleanup(func() { _ = n.Close() })
	newPeers(n, nil)
	no := func() bool { return false }
	raftPort := newTransport(n, hclog.NewNullLogger(), transportHooks{
		gated: no, doubtful: no, following: func(uint64) bool { return false }, applied: func() uint64 { return 0 }, newest: func() uint64 { return 7 },
	})
	go func() { // as Raft's main thread, for as long as the process is there
		for rpc := range raftPort.Consumer() {
			if rpc.Reader != nil {
				_, _ = io.Copy(io.Discard, rpc.Reader)
			}
			rpc.Respond(&raft.AppendEntriesResponse{}, errors.New("no"))
		}
	}()
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		first := hellos[int(kind)%len(hellos)]
		var heard bytes.Buffer
		checkMemory(t, len(b), 4<<20, func() { speak(t, port, append(bytes.Clone(first), b...), &heard) })
		if first == nil && !bytes.HasPrefix(b, []byte(helloMagic)) && heard.Len() > 0 {
			t.Errorf("got %q for an answer to %q", heard.String(), b)
		}
	})
}

// speak connects to the port, sends b, hears what it is answered until the other end hangs up, or until it has been sent all
// and hangs up itself, and waits until the connection is no more.
func speak(t *testing.T, port *pipes, b []byte, heard *bytes.Buffer) {
	t.Helper()
	near, far := net.Pipe()
	served := &watchedConn{far, make(chan struct{})}
	port.conns <- served
	listened := make(chan struct{})
	go func() {
		defer close(listened)
		_, _ = io.Copy(heard, near)
	}()
	_ = near.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, _ = near.Write(b)
	_ = near.Close()
	select {
	case <-served.ended:
	case <-time.After(10 * time.Second):
		t.Error("the connection never ends")
	}
	<-listened
}

// What a member of the cluster may ask, with any bytes for its request. Commands that no state machine can read are left
// out: a log that holds one stops all nodes, and a member can write to the log.
func FuzzCalls(f *testing.F) {
	for op := opApply; op <= opAdmit+1; op++ {
		f.Add(op, []byte{})
		f.Add(op, []byte{0, 0, 0, 0, 0, 0, 0, 1})
	}
	f.Add(opApply, appendCommands(nil, [][]byte{command{op: opSet, pairs: []Pair{{"k", "1"}}}.encode()}))
	node := newTestNode(f, storeMemory)
	from := hello{kindPeer, "node1", "node1", node.form.id()}
	f.Fuzz(func(t *testing.T, op byte, b []byte) {
		commands, err := decodeCommands(b)
		for _, c := range commands {
			if _, err := decodeCommand(c); err != nil && op == opApply {
				return
			}
		}
		var answer frame
		checkMemory(t, len(b), 4<<20, func() { answer = node.peers.handle(from, frame{op, b}) })
		status, reply := answer.op, answer.payload
		switch {
		case status > 1 || status == 1 && len(reply) == 0:
			t.Errorf("got status %d, reply %q", status, reply)
		case status == 0 && (op < opApply || op > opAdmit):
			t.Errorf("got reply %q to call %d", reply, op)
		case status == 0 && op == opApply:
			if o, err2 := decodeOutcome(reply); err != nil || err2 != nil || o.err == nil && len(o.results) != len(commands) {
				t.Errorf("got outcome %+v, error %v, of %d commands", o, err2, len(commands))
			}
		}
		select {
		case err := <-node.Failed():
			t.Fatalf("the node stops: %v", err)
		default:
		}
		if err := node.Ready(); err != nil {
			t.Errorf("the node is not ready: %v", err)
		}
	})
}

// What other nodes say that they hold, and what this one makes of it.
func FuzzHoldings(f *testing.F) {
	f.Add([]byte(`{"lost":true}`), []byte(`{"lost":true}`), []byte(`{}`))
	f.Add([]byte(`{"cluster":"c","last_term":2,"last_index":7,"leads":true,"votes":true}`), []byte(`{"cluster":"c","votes":true}`), []byte(`{"lost":true}`))
	f.Add([]byte(`{"cluster":"c","last_term":1,"last_index":1,"fresh":true,"votes":true}`), []byte(`{"cluster":"d","last_index":1,"fresh":true}`), []byte(`null`))
	f.Add([]byte(`{"cluster":"c","last_index":18446744073709551615}`), []byte(`{"lost":true}`), []byte(`{"lost":true}`))
	f.Fuzz(func(t *testing.T, first, second, third []byte) {
		answers := make(map[string]holding)
		for i, b := range [][]byte{first, second, third} {
			var h holding
			if json.Unmarshal(b, &h) == nil {
				answers[fmt.Sprintf("node%d", i+1)] = h
			}
		}
		c := newCensus(3, answers)
		for _, patient := range []bool{false, true} {
			if node := c.forms(patient); node != "" && (!answers[node].Lost || c.complete != "" || len(c.lost) < 2) {
				t.Errorf("node %q is to form a cluster out of %+v", node, answers)
			}
		}
		survivors := 0
		for node, h := range answers {
			switch c.stance(node, storeMemory) {
			case isSurvivor:
				survivors++
			case isOutdone, forgets:
				if others := 3 - len(answers); !h.Lost && !h.nothing() && c.ruling == "" && others == 0 {
					t.Errorf("node %s gives up what it has in %+v", node, answers)
				}
			}
			if form := (&formation{cfg: &Config{NodeID: node, KVStore: storeBolt}}); form.advice(c) == "" {
				t.Errorf("got no advice in %+v", answers)
			}
		}
		if survivors > 1 || survivors == 1 && !c.majorityLost() {
			t.Errorf("%d survivors of %+v", survivors, answers)
		}
		if !strings.HasPrefix(c.String(), fmt.Sprintf("%d of 3 nodes answer", len(answers))) {
			t.Errorf("got %s of %+v", c, answers)
		}
	})
}
