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
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func FuzzHello(f *testing.F) {
	f.Add(hello{kindRaft, "node1#1", "node2#1", "node1#1"}.encode())
	f.Add(hello{kindAsk, "node1", "node2", ""}.encode())
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("RSTRAFT\x02C\x07node1#1\x07node2#1\x00"))
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

func (p *pipes) self() (server, cluster string)     { return "node1#1", "c" }
func (p *pipes) address(node string) (string, bool) { return "", node == "node2" }
func (p *pipes) authorize(hello) error              { return nil }

// And the node of a transport.
func (p *pipes) leadsIn(uint64) bool  { return false }
func (p *pipes) isIn(uint64) bool     { return false }
func (p *pipes) appliedIndex() uint64 { return 0 }
func (p *pipes) members() []member    { return nil }

func (p *pipes) isMember(string) (bool, bool) { return false, false }

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

// Whatever arrives at the Raft port: at once, or behind the hello of a peer for a call, for Raft or for a question.
func FuzzRaftPort(f *testing.F) {
	hellos := [][]byte{
		nil, hello{kindCall, "node2#1", "node1#1", "c"}.encode(), hello{kindRaft, "node2#1", "node1#1", "c"}.encode(),
		hello{kindAsk, "node2", "node1", ""}.encode(),
	}
	f.Add(byte(0), []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add(byte(0), []byte("\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"))
	f.Add(byte(0), hello{'X', "node2#1", "node1#1", "c"}.encode())
	f.Add(byte(0), hello{kindRaft, "node3#1", "node1#1", "c"}.encode())
	f.Add(byte(0), hello{kindRaft, "node2#1", "node1#0", "c"}.encode())
	f.Add(byte(0), append(hello{kindCall, "node2#1", "node1#1", ""}.encode(), 0, 0, 0, 1, opTerm))
	f.Add(byte(1), append(frameHead(4, opTerm), "abc"...))
	f.Add(byte(1), frameHead(maxCallBytes, opApply))
	f.Add(byte(3), frameHead(1, opWho))
	f.Add(byte(3), frameHead(1, opTerm))
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
	st := &storage{log: &logStore{}}
	st.log.snapshotIndex.Store(7)
	raftPort := newTransport(n, st, port, newRaftLogger(hclog.NewNullLogger()))
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

// What a peer may ask, with any bytes for its request. Commands that no state machine can read are left out: a log that
// holds one stops all nodes, and a member can write to the log.
func FuzzCalls(f *testing.F) {
	for op := opApply; op <= opWho+1; op++ {
		f.Add(op, []byte{})
		f.Add(op, []byte{0, 0, 0, 0, 0, 0, 0, 1})
	}
	f.Add(opApply, appendCommands(nil, [][]byte{testSet(testPair{"k", "1"})}))
	node := newTestNode(f, storeMemory)
	server, cluster := node.self()
	member, asks := hello{kindCall, server, server, cluster}, hello{kindAsk, "node1", "node1", ""}
	f.Fuzz(func(t *testing.T, op byte, b []byte) {
		commands, err := decodeCommands(b)
		for _, c := range commands {
			if _, err := decodeTestCommand(c); err != nil && op == opApply {
				return
			}
		}
		from, other := member, asks
		if op == opWho {
			from, other = asks, member
		}
		var answer frame
		checkMemory(t, len(b), 4<<20, func() { answer = node.peers.handle(from, frame{op, b}) })
		status, reply := answer.op, answer.payload
		switch {
		case status > 1 || status == 1 && len(reply) == 0:
			t.Errorf("got status %d, reply %q", status, reply)
		case status == 0 && (op < opApply || op > opWho):
			t.Errorf("got reply %q to call %d", reply, op)
		case status == 0 && op == opApply:
			if o, err2 := decodeOutcome(reply); err != nil || err2 != nil || o.err == nil && len(o.results) != len(commands) {
				t.Errorf("got outcome %+v, error %v, of %d commands", o, err2, len(commands))
			}
		}
		if answer := node.peers.handle(other, frame{op, b}); answer.op != 1 {
			t.Errorf("got reply %q to call %d on a connection of the other kind", answer.payload, op)
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

// asker is the Store of node1, which runs no Raft, beside peers that answer what a test wants when they are asked who they
// are.
type asker struct {
	*Store
	answers map[string]*atomic.Pointer[[]byte] // by node
}

func newAsker(t testing.TB) *asker {
	t.Helper()
	all, nets := newTestNet(t, "node1", "node2", "node3")
	cfg := &Config{NodeID: "node1", KVStore: storeMemory}
	for _, n := range nets {
		cfg.Peers = append(cfg.Peers, Peer{ID: n.id, Addr: n.addr()})
	}
	a := &asker{NewStore(cfg, newTestMachine(), newMetrics(), hclog.NewNullLogger()), make(map[string]*atomic.Pointer[[]byte])}
	t.Cleanup(a.cancel)
	for _, n := range nets {
		all.start(n)
		answer := new(atomic.Pointer[[]byte])
		p := newPeers(n.network, map[byte]handler{
			opWho: func(context.Context, string, []byte) ([]byte, error) { return *answer.Load(), nil },
		})
		t.Cleanup(p.close)
		if n.id == cfg.NodeID {
			a.network, a.peers = n.network, p
		} else {
			a.answers[n.id] = answer
		}
	}
	var err error
	if a.storage, err = openStorage(cfg, a.log, a.metrics, a); err != nil {
		t.Fatal(err)
	}
	if err := a.membership.open(a.storage); err != nil {
		t.Fatal(err)
	}
	return a
}

// ask asks a node, which gives the answer in JSON, who it is.
func (a *asker) ask(t *testing.T, node string, answer []byte) (nodeInfo, error) {
	t.Helper()
	a.answers[node].Store(&answer)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return a.askWho(ctx, node)
}

// An answer that this node could not do anything with is as good as none.
func TestAnswersThatCountAsSilence(t *testing.T) {
	checkLeaks(t)
	a := newAsker(t)
	fits := strings.Repeat("x", maxName-len("node2#"))
	members, err := json.Marshal(slices.Repeat([]member{{"node3#1", "127.0.0.1:1", true}}, 40_000))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		answer string
		want   string // in the error, "" for none
	}{
		"a blank server":           {`{"server":"node2#1"}`, ""},
		"of a cluster":             {`{"server":"node2#1","cluster":"node1#1","last_index":7,"ready":true}`, ""},
		"more than we know of":     {`{"server":"node2#1","stars":5}`, ""},
		"a huge list of members":   {`{"server":"node2#1","members":` + string(members) + `}`, ""},
		"the longest name":         {`{"server":"node2#` + fits + `"}`, ""},
		"too long a name":          {`{"server":"node2#x` + fits + `"}`, "no node \"node2\" can be"},
		"too long a cluster's":     {`{"server":"node2#1","cluster":"node1#x` + fits + `"}`, "no node \"node2\" can be"},
		"another node's name":      {`{"server":"node3#1"}`, `calls itself server "node3#1"`},
		"a name that begins as it": {`{"server":"node22#1"}`, `calls itself server "node22#1"`},
		"no name":                  {`{"cluster":"node1#1"}`, `calls itself server ""`},
		"null":                     {`null`, `calls itself server ""`},
		"nothing":                  {``, "JSON"},
		"no JSON":                  {`node2#1`, "invalid character"},
		"half of it":               {`{"server":"node2#1"`, "JSON"},
		"two of it":                {`{"server":"node2#1"}{}`, "after top-level value"},
		"a list":                   {`[{"server":"node2#1"}]`, "cannot unmarshal"},
		"an index that is none":    {`{"server":"node2#1","last_index":-1}`, "cannot unmarshal"},
		"members that are none":    {`{"server":"node2#1","members":{"node1":true}}`, "cannot unmarshal"},
	} {
		info, err := a.ask(t, "node2", []byte(tt.answer))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got server %.50q, error %.200v; want error %q", name, info.Server, err, tt.want)
		}
	}

	// Silence is what the others see, too.
	for node, answer := range map[string]string{"node2": `{"server":"node2#1"}`, "node3": `{"server":"node2#1"}`} {
		answer := []byte(answer)
		a.answers[node].Store(&answer)
	}
	waitFor(t, "one to answer and one not to", func() bool {
		v := a.askAll(t.Context())
		_, answers := v.answers["node3"]
		return v.answers["node2"].Server == "node2#1" && !answers && strings.Contains(fmt.Sprint(v.silent["node3"]), "calls itself")
	})
}

// What other nodes say that they are, and what this one makes of it.
func FuzzWho(f *testing.F) {
	f.Add(byte(0), []byte(`{"server":"node2#1","peers":["node1","node2","node3"],"cluster":"node1#1"}`),
		[]byte(`{"server":"node3#1","peers":["node1","node2","node3"],"cluster":"node1#1"}`))
	f.Add(byte(0), []byte(`{"server":"node2#1","peers":["node1","node2","node3"],"cluster":"node1#1"}`),
		[]byte(`{"server":"node3#1","peers":["node1","node2","node3"],"cluster":"node1#1","last_index":1}`))
	f.Add(byte(0), []byte(`{"server":"node2#1","peers":["node1","node2","node3"],"cluster":"node1#1"}`),
		[]byte(`{"server":"node3#1","peers":["node1","node2","node3"]}`))
	f.Add(byte(1), []byte(`{"server":"node2#1","cluster":"node2#1","last_term":2,"last_index":7,"running":true,"ready":true,`+
		`"members":[{"server":"node1#0","address":"h:1","voter":true},{"server":"node2#1","voter":true}]}`),
		[]byte(`{"server":"node3#1","cluster":"c","last_index":18446744073709551615}`))
	f.Add(byte(2), []byte(`{"server":"node2#2","cluster":"c","applied":9}`), []byte(`{"server":"node3#1","cluster":"c","last_term":3}`))
	f.Add(byte(2), []byte(`{"server":"node2#1","cluster":"c","applied":9}`), []byte(`null`))
	f.Add(byte(2), []byte(`null`), []byte(`{"server":"node3#2","cluster":"d","ready":true}`))
	f.Add(byte(2), []byte(`{"server":"node3#1"}`), []byte(`{"server":"node3#`+strings.Repeat("x", maxName)+`","cluster":"c"}`))
	f.Add(byte(0), []byte(`null`), []byte(`{"server":"node3","members":[{}],"waits_for":"you"}`))
	a := newAsker(f)
	f.Fuzz(func(t *testing.T, as byte, second, third []byte) {
		v := a.askAll(canceled(t)) // itself
		for node, answer := range map[string][]byte{"node2": second, "node3": third} {
			if info, err := a.ask(t, node, answer); err != nil {
				v.silent[node] = err
			} else {
				v.answers[node] = info
				if nodeOf(info.Server) != node || len(info.Server) > maxName || len(info.Cluster) > maxName || !json.Valid(answer) {
					t.Errorf("got an answer of %s out of %q", node, answer)
				}
			}
		}
		mine := v.mine()
		mine.Server = "node1#1"
		switch as % 3 { // else of no cluster
		case 1:
			mine.Cluster = "node1#1"
		case 2: // a leader, to which a server that was lost still belongs
			mine.Cluster, mine.LastIndex, mine.Ready = "c", 8, true
			mine.Members = []member{
				{mine.Server, "h:1", true}, {"node2#1", "h:2", true}, {"node2#2", "h:2", false}, {"node3#1", "h:3", true},
			}
		}
		v.answers[v.self] = mine
		checkView(t, v)
	})
}

// canceled returns a context in which nobody can be asked anything.
func canceled(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// checkView checks that node1, which sees v, does nothing that the rules do not have.
func checkView(t *testing.T, v view) {
	t.Helper()
	mine := v.mine()
	if v.String() == "" {
		t.Error("got nothing to say to people")
	}
	if peers := v.status(mine.Members); len(peers) > len(v.peers) {
		t.Errorf("got %d nodes in the status", len(peers))
	}
	if best := v.mostComplete(); best != "" && mine.Cluster != "" && v.answers[best].Cluster != mine.Cluster {
		t.Errorf("got %s of another cluster for the most complete", best)
	}
	all, fromLeader := len(v.answers) == len(v.peers), false
	for _, info := range v.answers {
		fromLeader = fromLeader || info.Ready
	}
	if cluster := v.toJoin(); len(cluster) > maxName || cluster != "" && !fromLeader {
		t.Errorf("is to join %q", cluster) // node1 is the one that bootstraps
	}
	begun := v.toBootstrap()
	if begun != nil && (!all || len(begun) != len(v.peers)) {
		t.Errorf("bootstraps %v", begun)
	}
	for _, m := range begun {
		node := nodeOf(m.Server)
		info, joined := v.answers[node], mine.Server
		if node == v.self {
			joined = "" // it stores its cluster together with the log's beginning
		}
		if m.Server != info.Server || info.LastIndex > 0 || info.Cluster != joined {
			t.Errorf("bootstraps with %+v", info)
		}
	}
	step, there := v.plan(false, 0).next()
	if !there {
		return
	}
	present, answers := v.answers[nodeOf(step.Server)]
	isIn := slices.ContainsFunc(mine.Members, func(m member) bool { return m.Server == step.Server })
	ok := answers && present.Cluster == mine.Cluster
	switch step.command {
	case raft.RemoveServer: // it is gone, and another server of its node stays
		ok = ok && isIn && present.Server != step.Server &&
			slices.ContainsFunc(mine.Members, func(m member) bool { return m.Server == present.Server })
	case raft.AddNonvoter:
		ok = ok && present.Server == step.Server && (!isIn || step.Address == present.Address)
	default:
		ok = ok && isIn && present.Server == step.Server
	}
	if !ok {
		t.Errorf("got step %+v when %s answers %+v", step, nodeOf(step.Server), present)
	}
}
