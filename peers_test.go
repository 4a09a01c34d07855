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
	links atomic.Int32 // connections of peers that were served
	held  atomic.Int32 // calls of opHold being served
	most  atomic.Int32 // of held
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
	node := &peerNode{peers: newPeers(n.network), net: n, letGo: make(chan struct{})}
	node.handlers = map[byte]handler{
		opEcho:    func(_ context.Context, _ string, request []byte) ([]byte, error) { return request, nil },
		opFrom:    func(_ context.Context, from string, _ []byte) ([]byte, error) { return []byte(from), nil },
		opHolding: func(context.Context, string, []byte) ([]byte, error) { return []byte("held"), nil },
		opGrant:   func(context.Context, string, []byte) ([]byte, error) { return []byte("granted"), nil },
		opError: func(_ context.Context, _ string, request []byte) ([]byte, error) {
			return nil, errors.New(string(request))
		},
		opHold: func(ctx context.Context, _ string, request []byte) ([]byte, error) {
			held := node.held.Add(1)
			defer node.held.Add(-1)
			for most := node.most.Load(); held > most && !node.most.CompareAndSwap(most, held); {
				most = node.most.Load()
			}
			select {
			case <-node.letGo:
				return request, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	}
	n.peer = func(conn net.Conn, h hello) {
		node.links.Add(1)
		node.serve(conn, h)
	}
	all.start(n)
	t.Cleanup(node.close) // before its network is closed, which waits for calls that are being served
	return node
}

// hold makes a call that is answered only when to is let go, and returns once it is being served.
func (n *peerNode) hold(t *testing.T, ctx context.Context, to *peerNode) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	before := to.held.Load()
	go func() {
		_, err := n.call(ctx, to.net.self, opHold, nil)
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
		{"an answer", "node2", opEcho, "hello", "hello", "none"},
		{"an empty answer", "node2", opEcho, "", "", "none"},
		{"an answer of bytes that are not text", "node2", opEcho, "\x00\xff\n", "\x00\xff\n", "none"},
		{"an answer of several reads", "node2", opEcho, strings.Repeat("y", 200_000), strings.Repeat("y", 200_000), "none"},
		{"the largest answer", "node3", opEcho, largest, largest, "none"},
		{"who asked", "node3", opFrom, "", "node1", "none"},
		{"an error", "node2", opError, "no such thing", `peer "node2": no such thing`, "remote"},
		{"an error without a text", "node2", opError, "", `peer "node2": `, "remote"},
		{"an unknown call", "node2", 250, "hello", `peer "node2": call 250 is not known`, "remote"},
		{"an unknown node", "node9", opEcho, "hello", "its address is not known", "not made"},
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
	if got := nodes[1].links.Load() + nodes[2].links.Load(); got != 2 {
		t.Errorf("got %d connections; want one to each node", got)
	}
}

func TestConcurrentCallsShareALink(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	var calls sync.WaitGroup
	for i := range 300 {
		calls.Go(func() {
			for j := range 5 {
				checkCall(t, nodes[0], "node2", strings.Repeat(fmt.Sprintf("%d/%d ", i, j), i))
			}
		})
		calls.Go(func() { checkCall(t, nodes[1], "node1", fmt.Sprint(i)) })
	}
	calls.Wait()
	if a, b := nodes[0].links.Load(), nodes[1].links.Load(); a != 1 || b != 1 {
		t.Errorf("got %d and %d connections; want one for each direction", a, b)
	}
}

func TestMoreCallsAtOnceThanAreServed(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	var calls sync.WaitGroup
	for i := range 3 * callsPerLink {
		calls.Go(func() {
			want := fmt.Sprint(i)
			if got, err := nodes[0].call(t.Context(), "node2", opHold, []byte(want)); err != nil || string(got) != want {
				t.Errorf("got answer %q, error %v; want %q and none", got, err, want)
			}
		})
	}
	waitFor(t, "as many calls as are served at once", func() bool { return nodes[1].held.Load() == callsPerLink })
	close(nodes[1].letGo)
	calls.Wait()
	if got := nodes[1].most.Load(); got != callsPerLink {
		t.Errorf("got %d calls served at once; want %d", got, callsPerLink)
	}
}

// A call that takes long holds up no other.
func TestCallsPassOneAnother(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	slow := nodes[0].hold(t, t.Context(), nodes[1])
	checkCall(t, nodes[0], "node2", "quick")
	close(nodes[1].letGo)
	if err := <-slow; err != nil {
		t.Errorf("got error %v; want none", err)
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
		_, err := nodes[0].call(t.Context(), "node2", opEcho, nil)
		return err == nil
	})
}

func TestDeadPeerComesBack(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	checkCall(t, nodes[0], "node2", "before")
	addr := nodes[1].net.addr()
	nodes[1].close()
	if err := nodes[1].net.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "calls not to be made", func() bool {
		_, err := nodes[0].call(t.Context(), "node2", opEcho, nil)
		if err == nil {
			t.Fatal("got an answer of a dead peer")
		}
		return kindOf(err) == "not made"
	})
	// It is known to be down, so until the next dial is due the answer costs nothing.
	for range 100 {
		if _, err := nodes[0].call(t.Context(), "node2", opEcho, nil); kindOf(err) != "not made" {
			t.Fatalf("got error %v, which is %s; want not made", err, kindOf(err))
		}
	}
	startPeerNode(t, all, all.listen(t, "node2", addr))
	waitFor(t, "calls to work again", func() bool {
		_, err := nodes[0].call(t.Context(), "node2", opEcho, nil)
		return err == nil
	})
}

// Its address is looked up at each dial.
func TestPeerMoves(t *testing.T) {
	checkLeaks(t)
	all, nodes := newPeerNodes(t, "node1", "node2")
	checkCall(t, nodes[0], "node2", "before")
	nodes[1].close()
	if err := nodes[1].net.Close(); err != nil {
		t.Fatal(err)
	}
	startPeerNode(t, all, all.listen(t, "node2", "127.0.0.1:0"))
	waitFor(t, "calls to work again", func() bool {
		_, err := nodes[0].call(t.Context(), "node2", opEcho, nil)
		return err == nil
	})
}

func TestCallEndsWithItsContext(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")

	t.Run("canceled, which the link survives", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := nodes[0].hold(t, ctx, nodes[1])
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || kindOf(err) != "unknown" {
			t.Errorf("got error %v, which is %s; want %v, unknown", err, kindOf(err), context.Canceled)
		}
		checkCall(t, nodes[0], "node2", "after")
		if got := nodes[1].links.Load(); got != 1 {
			t.Errorf("got %d connections; want 1", got)
		}
	})
	t.Run("past its deadline, and others go on", func(t *testing.T) {
		other := nodes[0].hold(t, t.Context(), nodes[1])
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := nodes[0].call(ctx, "node2", opHold, nil)
		if !errors.Is(err, context.DeadlineExceeded) || kindOf(err) != "unknown" || time.Since(began) > 2*time.Second {
			t.Errorf("got error %v, which is %s, after %v; want %v, unknown", err, kindOf(err), time.Since(began), context.DeadlineExceeded)
		}
		// The node may be gone without a word, so later calls try another connection; the other call keeps the old one.
		checkCall(t, nodes[0], "node2", "after")
		if got := nodes[1].links.Load(); got != 2 {
			t.Errorf("got %d connections; want 2", got)
		}
		close(nodes[1].letGo)
		if err := <-other; err != nil {
			t.Errorf("the other call: got error %v; want none", err)
		}
	})
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
			_, err := nodes[0].call(ctx, "silent", opEcho, nil)
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

// A node of no cluster asks what others hold and whether it may form one; all else is only for those of the same.
func TestCallsBetweenClusters(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	caller, called := nodes[0], nodes[1]
	for _, tt := range []struct {
		name         string
		mine, theirs string
		all          bool
	}{
		{"both of none", "", "", true},
		{"only the called one is of one", "", "A", false},
		{"both of the same", "A", "A", true},
		{"only the caller is of one", "A", "", false},
		{"of two", "A", "B", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			caller.net.cluster.Store(tt.mine)
			called.net.cluster.Store(tt.theirs)
			caller.redial()
			for op, want := range map[byte]string{opHolding: "held", opGrant: "granted"} {
				if got, err := caller.call(t.Context(), "node2", op, nil); err != nil || string(got) != want {
					t.Errorf("call %d: got answer %q, error %v; want %q and none", op, got, err, want)
				}
			}
			want := "none"
			if !tt.all {
				want = "remote"
			}
			for _, op := range []byte{opEcho, opFrom} {
				if _, err := caller.call(t.Context(), "node2", op, nil); kindOf(err) != want {
					t.Errorf("call %d: got error %v, which is %s; want %s", op, err, kindOf(err), want)
				}
			}
		})
	}
}

// The called node goes by its own cluster at the time of the call, and by the caller's at the time of the dial.
func TestCalledNodeJoinsAClusterMeanwhile(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	checkCall(t, nodes[0], "node2", "both of none")
	nodes[1].net.cluster.Store("A")
	if _, err := nodes[0].call(t.Context(), "node2", opEcho, nil); kindOf(err) != "remote" {
		t.Errorf("got error %v, which is %s; want remote", err, kindOf(err))
	}
	nodes[0].net.cluster.Store("A")
	nodes[0].redial()
	checkCall(t, nodes[0], "node2", "both of the same")
}

func TestRedialLeavesCallsUnderWayAlone(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	done := nodes[0].hold(t, t.Context(), nodes[1])
	nodes[0].redial()
	checkCall(t, nodes[0], "node2", "on a new connection")
	if got := nodes[1].links.Load(); got != 2 {
		t.Errorf("got %d connections; want 2", got)
	}
	close(nodes[1].letGo)
	if err := <-done; err != nil {
		t.Errorf("got error %v; want none", err)
	}
	waitFor(t, "the old connection to close", func() bool {
		nodes[1].net.mu.Lock()
		defer nodes[1].net.mu.Unlock()
		return len(nodes[1].net.conns) == 1
	})
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
func frameHead(announced uint32, id uint32, op byte) []byte {
	head := binary.BigEndian.AppendUint32(nil, announced)
	return append(binary.BigEndian.AppendUint32(head, id), op)
}

func TestMessageOfABadLengthEndsTheLink(t *testing.T) {
	checkLeaks(t)
	_, nodes := newPeerNodes(t, "node1", "node2")
	for _, tt := range []struct {
		name      string
		announced uint32
		refused   bool
	}{
		{"less than its own head", 4, true},
		{"nothing", 0, true},
		{"no payload", 5, false},
		{"a byte more than there may be", maxCallBytes + 6, true},
		{"the most there can be", 1<<32 - 1, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := nodes[0].network.dial(t.Context(), "node2", kindPeer)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err := conn.Write(frameHead(tt.announced, 1, opFrom)); err != nil {
				t.Fatal(err)
			}
			_, status, payload, err := readFrame(bufio.NewReader(conn))
			if tt.refused && (err == nil || errors.Is(err, os.ErrDeadlineExceeded)) {
				t.Errorf("got answer %d %q, error %v; want the connection closed", status, payload, err)
			}
			if !tt.refused && (err != nil || string(payload) != "node1") {
				t.Errorf("got answer %q, error %v; want node1 and none", payload, err)
			}
			checkCall(t, nodes[0], "node2", "others go on")
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
		{"a byte too long", maxCallBytes + 6, 1 << 10},
		{"as long as allowed, and cut short", maxCallBytes + 5, 1 << 10},
		{"as long as allowed, and cut short a little later", maxCallBytes + 5, 100 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			message := bytes.NewReader(append(frameHead(tt.announced, 1, opEcho), make([]byte, tt.comes)...))
			r := bufio.NewReader(message)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, _, _, err := readFrame(r)
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
	nets[1].peer = func(conn net.Conn, _ hello) {
		if _, _, _, err := readFrame(bufio.NewReader(conn)); err == nil {
			_, _ = conn.Write(<-answers)
			_, _ = io.Copy(io.Discard, conn)
		}
	}
	all.start(nets[1])
	caller := startPeerNode(t, all, nets[0])
	for name, answer := range map[string][]byte{
		"too long":               frameHead(1<<32-1, 1, 0),
		"too short":              frameHead(1, 1, 0),
		"to a call nobody made":  frameHead(5, 77, 0),
		"cut short, then silent": frameHead(50, 1, 0),
	} {
		answers <- answer
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if got, err := caller.call(ctx, "node2", opEcho, []byte("x")); kindOf(err) != "unknown" {
			t.Errorf("%s: got answer %q, error %v, which is %s; want unknown", name, got, err, kindOf(err))
		}
		cancel()
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
				got := majority(ctx, tt.answers, tt.needed, func(ctx context.Context, answer string) bool {
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

// A call on a connection that was already lost has reached nobody, and must not be taken for one whose outcome is unknown.
func TestCallOnALostLinkWasNotMade(t *testing.T) {
	l := &link{id: "node2", calls: make(map[uint32]chan answer), err: io.EOF}
	if _, err := l.call(t.Context(), opApply, nil); !errors.As(err, new(*dialError)) {
		t.Errorf("got %v; want a *dialError", err)
	}
}
