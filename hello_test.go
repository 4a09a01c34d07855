package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
)

func TestHelloRoundTrip(t *testing.T) {
	long := strings.Repeat("n", 255)
	tests := []struct {
		name  string
		hello hello
	}{
		{"of a call", testHello},
		{"of a question", hello{kind: kindAsk, sender: "node1", target: "node2"}},
		{"of raft", hello{kind: kindRaft, sender: "a", target: "b", cluster: "c"}},
		{"with nothing", hello{kind: kindRaft}},
		{"with the longest names", hello{kind: kindRaft, sender: long, target: long, cluster: long}},
		{"with names that are not text", hello{kind: 0, sender: "\x00\xff", target: "\x01", cluster: "\n"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := bytes.NewReader(append(tt.hello.encode(), "what follows"...))
			got, err := readHello(r)
			if err != nil || got != tt.hello {
				t.Errorf("got %+v, error %v; want %+v and none", got, err, tt.hello)
			}
			if rest, _ := io.ReadAll(r); string(rest) != "what follows" {
				t.Errorf("got %q left to read; want what follows the hello", rest)
			}
		})
	}
}

func TestReadHelloOfOtherBytes(t *testing.T) {
	good := testHello.encode()
	for size := range good {
		if h, err := readHello(bytes.NewReader(good[:size])); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut to %d of %d bytes: got %+v, error %v; want an early end", size, len(good), h, err)
		}
	}
	// Not a byte more is read than shows that it is no hello.
	endless := strings.NewReader(strings.Repeat("\xff", 1<<20))
	for name, r := range map[string]io.Reader{
		"http":              strings.NewReader("GET /key/a HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"tls":               bytes.NewReader(append([]byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc}, make([]byte, 512)...)),
		"another version":   strings.NewReader("RSTRAFT\x01" + string(good[8:])),
		"endless":           endless,
		"zeros":             bytes.NewReader(make([]byte, 1000)),
		"another program's": strings.NewReader("RSTSNAP\x01" + string(good[8:])),
	} {
		if h, err := readHello(r); err == nil || !strings.Contains(err.Error(), "no hello") {
			t.Errorf("%s: got %+v, error %v; want one that says no hello", name, h, err)
		}
	}
	if read := 1<<20 - endless.Len(); read > 16 {
		t.Errorf("got %d bytes read of garbage; want no more than a hello's head", read)
	}
}

func TestCheckHello(t *testing.T) {
	unauthorized := errors.New("unauthorized")
	long := strings.Repeat("x", 200)
	const lost = `node "node2" is server "node2#1" now, not "node2#0"`
	type check struct {
		name    string
		hello   hello
		cluster string // of the one that checks, node2#1
		auth    error  // what authorize returns
		want    string // in the refusal, "" for none
	}
	tests := []check{
		{"a call", testHello, "CLUSTER", nil, ""},
		{"raft", hello{kindRaft, "node1#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, ""},
		{"another peer", hello{kindRaft, "node3#7", "node2#1", "CLUSTER"}, "CLUSTER", nil, ""},
		{"a question", hello{kindAsk, "node1", "node2", ""}, "CLUSTER", nil, ""},
		{"a question to a server of no cluster", hello{kindAsk, "node1", "node2", ""}, "", nil, ""},
		{"a question out of another cluster", hello{kindAsk, "node1", "node2", "OTHER"}, "CLUSTER", nil, ""},

		{"a call to a lost server", hello{kindCall, "node1#1", "node2#0", "CLUSTER"}, "CLUSTER", nil, lost},
		{"raft for a lost server", hello{kindRaft, "node1#1", "node2#0", "CLUSTER"}, "CLUSTER", nil, lost},
		{"raft for a lost server, of no cluster now", hello{kindRaft, "node1#1", "node2#0", "CLUSTER"}, "", nil, lost},
		{"a call to a node", hello{kindCall, "node1#1", "node2", "CLUSTER"}, "CLUSTER", nil, `node "node2" is server "node2#1" now, not "node2"`},
		{"another node is meant", hello{kindCall, "node1#1", "node3#1", "CLUSTER"}, "CLUSTER", nil, `this is node "node2", not "node3"`},
		{"another node is asked", hello{kindAsk, "node1", "node3", ""}, "CLUSTER", nil, `this is node "node2", not "node3"`},
		{"nobody is meant", hello{kindCall, "node1#1", "", "CLUSTER"}, "CLUSTER", nil, `this is node "node2", not ""`},
		{"a stranger", hello{kindCall, "node9#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "node9" is neither in the PEERS`},
		{"a stranger's question", hello{kindAsk, "node9", "node2", ""}, "CLUSTER", nil, `node "node9" is neither in the PEERS`},
		{"a stranger without a name", hello{kindCall, "", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "" is neither in the PEERS`},
		{"the server itself", hello{kindCall, "node2#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "node2" is neither in the PEERS`},
		{"another state of its node", hello{kindCall, "node2#0", "node2#1", "CLUSTER"}, "CLUSTER", nil, `node "node2" is neither in the PEERS`},
		{"an unknown kind", hello{'X', "node1#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, "connection kind 'X' is not known"},
		{"kind 0", hello{0, "node1#1", "node2#1", "CLUSTER"}, "CLUSTER", nil, "connection kind"},
		{"not authorized", testHello, "CLUSTER", unauthorized, "unauthorized"},
		{"a question that is not authorized", hello{kindAsk, "node1", "node2", ""}, "CLUSTER", unauthorized, "unauthorized"},
		{"a reason longer than the answer may be", hello{kindCall, long, long, "CLUSTER"}, "CLUSTER", nil, "this is node"},
	}
	for _, kind := range []byte{kindRaft, kindCall} {
		for _, clusters := range [][2]string{{"CLUSTER", "OTHER"}, {"CLUSTER", ""}, {"", "CLUSTER"}, {"", ""}} {
			says, is := clusters[0], clusters[1]
			tests = append(tests, check{
				fmt.Sprintf("kind %c of cluster %q at one of %q", kind, says, is),
				hello{kind, "node1#1", "node2#1", says},
				is, nil,
				fmt.Sprintf(`server "node1#1" is of cluster %q, server "node2#1" of cluster %q`, says, is),
			})
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			all, nodes := newTestNet(t, "node1", "node2", "node3")
			server := nodes[1]
			server.refusal = tt.auth
			server.cluster = tt.cluster
			all.startEcho(server)
			err := server.checkHello(tt.hello, nil)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got error %v; want %q", err, tt.want)
			}
			if tt.auth != nil && !errors.Is(err, tt.auth) {
				t.Errorf("got error %v; want %v", err, tt.auth)
			}
			// The one who is refused hears why.
			err = sendHello(dialRaw(t, server), tt.hello)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), "refused: "+tt.want)) {
				t.Errorf("got answer %v; want %q", err, tt.want)
			}
		})
	}
}

// A web server where a peer should be: its words are no reason, and would break the lines of the log.
func TestHelloToAnotherService(t *testing.T) {
	conn, other := net.Pipe()
	go func() {
		_, _ = other.Read(make([]byte, 512))
		_, _ = io.WriteString(other, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"+strings.Repeat("x", 100))
	}()
	err := sendHello(conn, hello{kindAsk, "node1", "node2", ""})
	if err == nil || err.Error() != "what listens there is no node of this service" {
		t.Errorf("got %q; want that it is another service", err)
	}
}
