package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The calls that nodes of these tests answer.
const (
	opEcho  byte = 101 // with the request
	opFrom  byte = 102 // with who asked
	opError byte = 103 // with the request as an error
	opHold  byte = 104 // with the request, once it is let go, or with the error of the context
)

// peerNode is a node that makes and answers calls.
type peerNode struct {
	*peers
	net   *testNetNode
	held  atomic.Int32 // calls of opHold being served
	letGo chan struct{}
}

// newPeerNodes returns nodes that call one another, and ends them when the test ends.
func newPeerNodes(t *testing.T, ids ...string) (*testNet, []*peerNode) {
	t.Helper()
	all, nets := newTestNet(t, ids...)
	var nodes []*peerNode
	for _, n := range nets {
		nodes = append(nodes, startPeerNode(t, all, n))
	}
	return all, nodes
}

func startPeerNode(t *testing.T, all *testNet, n *testNetNode) *peerNode {
	t.Helper()
	all.start(n)
	node := &peerNode{net: n, letGo: make(chan struct{})}
	node.peers = newPeers(n.network, map[byte]handler{
		opEcho: func(_ context.Context, _ string, request []byte) ([]byte, error) { return request, nil },
		opFrom: func(_ context.Context, from string, _ []byte) ([]byte, error) { return []byte(from), nil },
		opWho: func(_ context.Context, from string, _ []byte) ([]byte, error) {
			return fmt.Appendf(nil, "%s to %s", n.server, from), nil
		},
		opError: func(_ context.Context, _ string, request []byte) ([]byte, error) {
			return nil, errors.New(string(request))
		},
		opHold: func(ctx context.Context, _ string, request []byte) ([]byte, error) {
			node.held.Add(1)
			defer node.held.Add(-1)
			select {
			case <-node.letGo:
				return request, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	})
	t.Cleanup(node.close) // before its network is closed, which waits for calls that are being served
	return node
}

// hold makes a call that is answered only when to is let go, and returns once it is being served.
func (n *peerNode) hold(t *testing.T, ctx context.Context, to *peerNode) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	before := to.held.Load()
	go func() {
		_, err := n.call(ctx, to.net.server, opHold, nil)
		done <- err
	}()
	waitFor(t, "the call to be served", func() bool { return to.held.Load() > before })
	return done
}

func checkCall(t *testing.T, from *peerNode, to, payload string) {
	t.Helper()
	if got, err := from.call(t.Context(), to, opEcho, []byte(payload)); err != nil || string(got) != payload {
		t.Errorf("got answer %.50q, error %v; want %.50q and none", got, err, payload)
	}
}

func checkAsk(t *testing.T, from *peerNode, node, want string) {
	t.Helper()
	if got, err := from.call(t.Context(), node, opWho, nil); err != nil || string(got) != want {
		t.Errorf("got answer %q, error %v; want %q and none", got, err, want)
	}
}

// kindOf names what a call's error promises.
func kindOf(err error) string {
	unmade := new(dialError)
	switch {
	case err == nil:
		return "none"
	case errors.As(err, &unmade):
		return "not made"
	case errors.Is(err, errRemote):
		return "remote"
	}
	return "unknown"
}

func TestCallsAndAnswers(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2", "node3")
	largest := strings.Repeat("x", maxCallBytes)
	for _, tt := range []struct {
		name, to      string
		op            byte
		request, want string
		errorKind     string
	}{
		{"an answer", "node2#1", opEcho, "hello", "hello", "none"},
		{"an empty answer", "node2#1", opEcho, "", "", "none"},
		{"an answer of bytes that are not text", "node2#1", opEcho, "\x00\xff\n", "\x00\xff\n", "none"},
		{"an answer of several reads", "node2#1", opEcho, strings.Repeat("y", 200_000), strings.Repeat("y", 200_000), "none"},
		{"the largest answer", "node3#1", opEcho, largest, largest, "none"},
		{"who asked", "node3#1", opFrom, "", "node1#1", "none"},
		{"an error", "node2#1", opError, "no such thing", `peer "node2#1": no such thing`, "remote"},
		{"an error without a text", "node2#1", opError, "", `peer "node2#1": `, "remote"},
		{"an unknown call", "node2#1", 250, "hello", `peer "node2#1": call 250 is not known`, "remote"},
		{"an unknown node", "node9#1", opEcho, "hello", "its address is not known", "not made"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answer, err := nodes[0].call(t.Context(), tt.to, tt.op, []byte(tt.request))
			if got := kindOf(err); got != tt.errorKind {
				t.Fatalf("got error %v, which is %s; want %s", err, got, tt.errorKind)
			}
			if err == nil && string(answer) != tt.want {
				t.Errorf("got %d bytes %.50q; want %d bytes %.50q", len(answer), answer, len(tt.want), tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v; want %q in it", err, tt.want)
			}
		})
	}
	if got := nodes[1].net.calls.Load() + nodes[2].net.calls.Load(); got != 2 {
		t.Errorf("got %d connections; want one to each node", got)
	}
}

// idle returns how many connections to a node wait for the next call, and how many calls to it are under way.
func (n *peerNode) idle(id string) (conns, calls int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, conn := range n.peers.peers[id].slots {
		if conn != nil {
			conns++
		}
	}
	return conns, callsPerPeer - len(n.peers.peers[id].slots)
}

// Each call has a connection of its own, which is then used again.
func TestConcurrentCalls(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	var calls sync.WaitGroup
	for i := range callsPerPeer {
		calls.Go(func() {
			for j := range 100 {
				checkCall(t, nodes[0], "node2#1", strings.Repeat(fmt.Sprintf("%d/%d ", i, j), 10*j))
				checkCall(t, nodes[1], "node1#1", fmt.Sprint(i))
			}
		})
	}
	calls.Wait()
	if a, b := nodes[0].net.calls.Load(), nodes[1].net.calls.Load(); a > callsPerPeer || b > callsPerPeer {
		t.Errorf("got %d and %d connections; want %d at most for each direction", a, b, callsPerPeer)
	}
}

func TestMoreCallsAtOnceThanThereMayBe(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	var held []<-chan error
	for range callsPerPeer {
		held = append(held, nodes[0].hold(t, t.Context(), nodes[1]))
	}
	began := time.Now()
	_, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil)
	if kindOf(err) != "not made" || !strings.Contains(err.Error(), "under way") || time.Since(began) > time.Second {
		t.Errorf("got error %v, which is %s, after %v; want not made, at once", err, kindOf(err), time.Since(began))
	}
	checkCall(t, nodes[1], "node1#1", "the other way")
	close(nodes[1].letGo)
	for _, done := range held {
		if err := <-done; err != nil {
			t.Errorf("got error %v; want none", err)
		}
	}
	checkCall(t, nodes[0], "node2#1", "after")
	if got := nodes[1].net.calls.Load(); got != callsPerPeer {
		t.Errorf("got %d connections; want %d", got, callsPerPeer)
	}
}

// A call that takes long holds up no other.
func TestSlowCallHoldsUpNoOther(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	slow := nodes[0].hold(t, t.Context(), nodes[1])
	checkCall(t, nodes[0], "node2#1", "quick")
	close(nodes[1].letGo)
	if err := <-slow; err != nil {
		t.Errorf("got error %v; want none", err)
	}
}

// A peer that answers later than the others holds up no majority, and is not dialed again for it.
func TestSlowPeerInAMajority(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2", "node3")
	close(nodes[1].letGo)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	for range 10 {
		if !majority([]string{"node2#1", "node3#1"}, 1, func(id string) bool {
			_, err := nodes[0].call(ctx, id, opHold, nil)
			return err == nil
		}) {
			t.Error("got no majority; want one by node2")
		}
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v; want node3 not to be waited for", took)
	}
	close(nodes[2].letGo)
	waitFor(t, "its calls to end", func() bool {
		_, calls := nodes[0].idle("node3#1")
		return calls == 0
	})
	slow := nodes[2].net.calls.Load()
	for range 10 {
		checkCall(t, nodes[0], "node3#1", "after")
	}
	if got := nodes[2].net.calls.Load(); got > callsPerPeer || got != slow {
		t.Errorf("got %d connections to the slow node; want those that there were, %d", got, slow)
	}
}

func TestPeerDiesInMidCall(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	done := nodes[0].hold(t, t.Context(), nodes[1])
	nodes[1].net.breakOff()
	if err := <-done; kindOf(err) != "unknown" {
		t.Errorf("got error %v, which is %s; want unknown", err, kindOf(err))
	}
	waitFor(t, "calls to work again", func() bool {
		_, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil)
		return err == nil
	})
}

func TestDeadPeerComesBack(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	checkCall(t, nodes[0], "node2#1", "before")
	addr := nodes[1].net.addr()
	nodes[1].close()
	if err := nodes[1].net.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "calls not to be made", func() bool {
		_, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil)
		if err == nil {
			t.Fatal("got an answer of a dead peer")
		}
		return kindOf(err) == "not made"
	})
	// It is known to be down, so until the next dial is due the answer costs nothing.
	for range 100 {
		if _, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil); kindOf(err) != "not made" {
			t.Fatalf("got error %v, which is %s; want not made", err, kindOf(err))
		}
	}
	startPeerNode(t, all, all.listen(t, "node2#1", addr))
	waitFor(t, "calls to work again", func() bool {
		_, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil)
		return err == nil
	})
}

// Its address is looked up at each dial.
func TestPeerMoves(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	checkCall(t, nodes[0], "node2#1", "before")
	nodes[1].close()
	if err := nodes[1].net.Close(); err != nil {
		t.Fatal(err)
	}
	startPeerNode(t, all, all.listen(t, "node2#1", "127.0.0.1:0"))
	waitFor(t, "calls to work again", func() bool {
		_, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil)
		return err == nil
	})
}

func TestCallEndsWithItsContext(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")

	for name, end := range map[string]func() (context.Context, context.CancelFunc){
		"its deadline": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 30*time.Millisecond)
		},
		"canceled": func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(30*time.Millisecond, cancel)
			return ctx, cancel
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := end()
			defer cancel()
			began := time.Now()
			before := nodes[1].net.calls.Load()
			_, err := nodes[0].call(ctx, "node2#1", opHold, nil)
			if !errors.Is(err, ctx.Err()) || kindOf(err) != "unknown" || time.Since(began) > 2*time.Second {
				t.Errorf("got error %v, which is %s, after %v; want %v, unknown", err, kindOf(err), time.Since(began), ctx.Err())
			}
			nodes[1].letGo <- struct{}{} // too late: its answer must not be taken for that to the next call
			checkCall(t, nodes[0], "node2#1", "after")
			if got := nodes[1].net.calls.Load() - before; got > 2 {
				t.Errorf("got %d connections; want 2", got)
			}
			if conns, calls := nodes[0].idle("node2#1"); conns != 1 || calls != 0 {
				t.Errorf("got %d connections and %d calls; want 1 and none", conns, calls)
			}
		})
	}
}

// A connection that the peer has closed is known to be lost before the next call is sent on it, so whoever restarts
// between two calls makes the outcome of none unknown.
func TestPeerRestartsBetweenCalls(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	addr, called := nodes[1].net.addr(), nodes[1]
	for range 200 {
		checkCall(t, nodes[0], "node2#1", "before")
		called.close()
		if err := called.net.Close(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the end of the connection to be noticed", func() bool {
			nodes[0].net.mu.Lock()
			defer nodes[0].net.mu.Unlock()
			return len(nodes[0].net.conns) == 0
		})
		called = startPeerNode(t, all, all.listen(t, "node2#1", addr))
		if got, err := nodes[0].call(t.Context(), "node2#1", opEcho, []byte("after")); string(got) != "after" {
			t.Fatalf("got answer %q, error %v, which is %s; want an answer", got, err, kindOf(err))
		}
	}
}

// A node that takes connections and says nothing costs a caller no more time than the caller has.
func TestCallEndsWithItsContextWhileItDials(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	all.set("silent", silent.Addr().String())
	for _, caller := range []string{"the first, for whom it is dialed", "another, who waits for that"} {
		done := make(chan string, 1)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		began := time.Now()
		go func() {
			_, err := nodes[0].call(ctx, "silent#1", opEcho, nil)
			done <- kindOf(err)
		}()
		<-ctx.Done()
		select {
		case kind := <-done:
			if kind != "not made" {
				t.Errorf("%s: got an error that is %s; want not made", caller, kind)
			}
		case <-time.After(500 * time.Millisecond):
			t.Errorf("%s: got no answer %v after the call; want one after 50 ms", caller, time.Since(began))
			t.Cleanup(func() { <-done })
		}
		cancel()
	}
}

// Calls pass only between servers of one cluster. Nodes ask one another who they are in any case.
func TestCallsBetweenClusters(t *testing.T) {
	for _, tt := range []struct {
		name         string
		mine, theirs string
		want         string // the kind of a call's error
	}{
		{"both of the same", "A", "A", "none"},
		{"both of none", "", "", "not made"},
		{"only the called one is of one", "", "A", "not made"},
		{"only the caller is of one", "A", "", "not made"},
		{"of two", "A", "B", "not made"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			all, nets := newTestNet(t, "node1", "node2")
			nets[0].cluster, nets[1].cluster = tt.mine, tt.theirs
			caller := startPeerNode(t, all, nets[0])
			startPeerNode(t, all, nets[1])
			for range 2 {
				if _, err := caller.call(t.Context(), "node2#1", opEcho, nil); kindOf(err) != tt.want {
					t.Errorf("got error %v, which is %s; want %s", err, kindOf(err), tt.want)
				}
				checkAsk(t, caller, "node2", "node2#1 to node1")
			}
		})
	}
}

// On a connection for questions the other node may be of any cluster, so no call is served there.
func TestCallsOnConnectionsOfTheOtherKind(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	for name, tt := range map[string]struct {
		to string
		op byte
	}{
		"a question to a server": {"node2#1", opWho},
		"a call to a node":       {"node2", opEcho},
		"an unknown call":        {"node2", 250},
	} {
		_, err := nodes[0].call(t.Context(), tt.to, tt.op, nil)
		if kindOf(err) != "remote" || !strings.Contains(err.Error(), "not for a connection of this kind") {
			t.Errorf("%s: got error %v, which is %s; want it refused", name, err, kindOf(err))
		}
	}
	checkCall(t, nodes[0], "node2#1", "a call to a server")
	checkAsk(t, nodes[0], "node2", "node2#1 to node1")
}

// A node that has lost its state is another server: calls to the one that is lost fail and say who lives there now.
func TestPeerComesBackAsAnotherServer(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	checkCall(t, nodes[0], "node2#1", "before")
	addr := nodes[1].net.addr()
	nodes[1].close()
	if err := nodes[1].net.Close(); err != nil {
		t.Fatal(err)
	}
	startPeerNode(t, all, all.listen(t, "node2#2", addr))
	checkCall(t, nodes[0], "node2#2", "after")
	waitFor(t, "the server to be known to be lost", func() bool {
		_, err := nodes[0].call(t.Context(), "node2#1", opEcho, nil)
		if err == nil {
			t.Fatal("got an answer of a lost server")
		}
		return kindOf(err) == "not made" && strings.Contains(err.Error(), `node "node2" is server "node2#2" now, not "node2#1"`)
	})
	checkAsk(t, nodes[0], "node2", "node2#2 to node1")
}

func TestCloseEndsTheCallsBeingServed(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	var calls []<-chan error
	for range 5 {
		calls = append(calls, nodes[0].hold(t, t.Context(), nodes[1]))
	}
	began := time.Now()
	nodes[1].close()
	for _, done := range calls {
		if err := <-done; kindOf(err) != "remote" {
			t.Errorf("got error %v, which is %s; want remote", err, kindOf(err))
		}
	}
	if err := nodes[1].net.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %v; want it at once", took)
	}
}

// frameHead returns the head of a message that announces so many bytes.
func frameHead(announced uint32, op byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, announced), op)
}

func TestMessageOfABadLengthEndsTheConnection(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	for _, tt := range []struct {
		name      string
		announced uint32
		refused   bool
	}{
		{"nothing", 0, true},
		{"no payload", 1, false},
		{"a byte more than there may be", maxCallBytes + 2, true},
		{"the most there can be", 1<<32 - 1, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := nodes[0].network.dial(t.Context(), "node2#1", kindCall)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err := conn.Write(frameHead(tt.announced, opFrom)); err != nil {
				t.Fatal(err)
			}
			answer, err := readFrame(bufio.NewReader(conn))
			if tt.refused && (err == nil || errors.Is(err, os.ErrDeadlineExceeded)) {
				t.Errorf("got answer %v, error %v; want the connection closed", answer, err)
			}
			if !tt.refused && (err != nil || string(answer.payload) != "node1#1") {
				t.Errorf("got answer %q, error %v; want node1 and none", answer.payload, err)
			}
			checkCall(t, nodes[0], "node2#1", "others go on")
		})
	}
}

func TestMessageTakesMemoryOnlyAsItComes(t *testing.T) {
	for _, tt := range []struct {
		name      string
		announced uint32
		comes     int
	}{
		{"too long", 1<<32 - 1, 1 << 10},
		{"a byte too long", maxCallBytes + 2, 1 << 10},
		{"as long as allowed, and cut short", maxCallBytes + 1, 1 << 10},
		{"as long as allowed, and cut short a little later", maxCallBytes + 1, 100 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			message := bytes.NewReader(append(frameHead(tt.announced, opEcho), make([]byte, tt.comes)...))
			r := bufio.NewReader(message)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := readFrame(r)
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Error("got no error; want one")
			}
			if took := after.TotalAlloc - before.TotalAlloc; took > 1<<20 {
				t.Errorf("got %d bytes allocated for %d that came; want far less than the %d announced", took, tt.comes, tt.announced)
			}
		})
	}
}

// A peer's answer is no more trusted than its calls.
func TestAnswerThatMakesNoSense(t *testing.T) {
	checkLeaks(t)
	all, nets := newTestNet(t, "node1", "node2")
	answers := make(chan []byte, 1)
	all.start(nets[1])
	nets[1].servePeers(func(conn *peerConn) {
		if _, err := readFrame(bufio.NewReader(conn)); err == nil {
			_, _ = conn.Write(<-answers)
			_, _ = io.Copy(io.Discard, conn)
		}
	})
	caller := startPeerNode(t, all, nets[0])
	good := append(frameHead(2, 0), 'x')
	for _, tt := range []struct {
		name   string
		answer []byte
		want   string
	}{
		{"too long", frameHead(1<<32-1, 0), "unknown"},
		{"too short", frameHead(0, 0), "unknown"},
		{"cut short, then silent", frameHead(50, 0), "unknown"},
		{"twice", append(good, good...), "none"},
		{"three times", append(append(good, good...), good...), "none"},
	} {
		answers <- tt.answer
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if got, err := caller.call(ctx, "node2#1", opEcho, []byte("x")); kindOf(err) != tt.want {
			t.Errorf("%s: got answer %q, error %v, which is %s; want %s", tt.name, got, err, kindOf(err), tt.want)
		}
		cancel()
		waitFor(t, "the connection not to be used again", func() bool {
			caller.mu.Lock()
			defer caller.mu.Unlock()
			slots := caller.peers.peers["node2#1"].slots
			for i, conn := range slots {
				if conn == nil {
					continue
				}
				if conn.usable() {
					return false
				}
				_ = conn.Close() // as acquire would
				slots[i] = nil
			}
			return true
		})
	}
}

func TestMajority(t *testing.T) {
	tests := []struct {
		name    string
		answers []string
		needed  int
		want    bool
		ends    bool // only when the context does
	}{
		{"nobody needed", nil, 0, true, false},
		{"nobody needed, others silent", []string{"silent", "silent"}, 0, true, false},
		{"all say yes", []string{"yes", "yes"}, 1, true, false},
		{"enough say yes, one no", []string{"no", "yes"}, 1, true, false},
		{"enough say yes, others silent", []string{"silent", "yes", "silent", "yes"}, 2, true, false},
		{"all say no", []string{"no", "no"}, 1, false, false},
		{"too many say no, others silent", []string{"no", "silent", "no", "no"}, 2, false, false},
		{"too few asked", []string{"yes"}, 2, false, false},
		{"too few say yes, others silent", []string{"silent", "yes", "silent", "no"}, 2, false, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // which makes sure that nothing is still being asked in the end
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				began := time.Now()
				got := majority(tt.answers, tt.needed, func(answer string) bool {
					if answer == "silent" {
						<-ctx.Done()
					}
					return answer == "yes"
				})
				if got != tt.want {
					t.Errorf("got %v; want %v", got, tt.want)
				}
				if ended := time.Since(began) > 0; ended != tt.ends {
					t.Errorf("got an answer after %v; want it only when the context ends: %v", time.Since(began), tt.ends)
				}
			})
		})
	}
}
