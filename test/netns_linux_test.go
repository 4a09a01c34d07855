package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// namespaces is a network of its own for each node, with a cable to a bridge in one more, the hub, where the clients are.
// Nothing of it touches the network of this machine. What one node sends another is dropped or refused by the receiver's
// packet filter, so a cut may be in one direction, and TCP delivers later what was dropped.
type namespaces struct {
	t         *testing.T
	hub       string
	nodes     []string
	home, far *os.File // the namespaces of this process and of the hub
}

const netnsDir, netnsPrefix = "/run/netns", "raftstarter-test-"

var networksMade atomic.Uint32

// newNamespaces puts nodes that have not started into namespaces, or returns why it cannot.
func newNamespaces(t *testing.T, nodes []*proc) (wires, error) {
	t.Helper()
	removeNamespaces(func(pid int) bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }, "") // of a run that was killed
	prefix := fmt.Sprintf("%s%d-%d-", netnsPrefix, os.Getpid(), networksMade.Add(1))
	ns := &namespaces{t: t, hub: prefix + "hub"}
	t.Cleanup(func() { removeNamespaces(func(pid int) bool { return pid == os.Getpid() }, prefix) })
	commands := []string{
		"netns add " + ns.hub, "-n " + ns.hub + " link add hub type bridge",
		"-n " + ns.hub + " addr add " + inNet(-1) + "/24 dev hub", "-n " + ns.hub + " link set hub up",
	}
	for i := range nodes {
		name, port := fmt.Sprintf("%s%d", prefix, i), fmt.Sprintf("port%d", i)
		ns.nodes = append(ns.nodes, name)
		commands = append(
			commands, "netns add "+name, "-n "+ns.hub+" link add "+port+" type veth peer name eth0 netns "+name,
			"-n "+ns.hub+" link set "+port+" master hub up", "-n "+name+" addr add "+inNet(i)+"/24 dev eth0",
			"-n "+name+" link set eth0 up", "-n "+name+" link set lo up",
		)
	}
	for _, args := range commands {
		if out, err := exec.CommandContext(t.Context(), "ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	var err1, err2 error
	ns.home, err1 = os.Open("/proc/thread-self/ns/net") // any thread of this process may be dialing from a hub
	ns.far, err2 = os.Open(filepath.Join(netnsDir, ns.hub))
	if err := errors.Join(err1, err2, ns.filter(0, "")); err != nil {
		return nil, err
	}
	t.Cleanup(func() { _, _ = ns.home.Close(), ns.far.Close() })
	for i, p := range nodes {
		// ip netns exec would give it mounts of its own, too, and keep disks of other nodes mounted.
		p.within, p.dial = []string{"nsenter", "--net=/run/netns/" + ns.nodes[i]}, ns.dial
		p.env["HTTP_ADDR"], p.env["RAFT_ADDR"] = inNet(i), inNet(i)
	}
	setPeers(nodes, func(_, to int) string { return inNet(to) + ":" + nodes[to].env["RAFT_PORT"] })
	return ns, nil
}

// removeNamespaces removes the namespaces of test processes, and ends what still runs there.
func removeNamespaces(of func(pid int) bool, prefix string) {
	entries, _ := os.ReadDir(netnsDir) // it is missing as long as there never was one
	for _, entry := range entries {
		rest, ours := strings.CutPrefix(entry.Name(), netnsPrefix)
		owner, _, _ := strings.Cut(rest, "-")
		if pid, err := strconv.Atoi(owner); !ours || err != nil || !of(pid) || !strings.HasPrefix(entry.Name(), prefix) {
			continue
		}
		pids, _ := exec.CommandContext(context.Background(), "ip", "netns", "pids", entry.Name()).Output()
		for _, field := range strings.Fields(string(pids)) {
			if pid, err := strconv.Atoi(field); err == nil && pid != os.Getpid() { // its first thread may have been dialing
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		_ = exec.CommandContext(context.Background(), "ip", "netns", "delete", entry.Name()).Run()
	}
}

// inNet is the address of node i, or, with -1, of the hub.
func inNet(i int) string { return fmt.Sprintf("10.0.0.%d", i+2) }

// dial dials from the hub: a socket belongs to the namespace of the thread that made it.
func (ns *namespaces) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	runtime.LockOSThread()
	if err := unix.Setns(int(ns.far.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if unix.Setns(int(ns.home.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread() // else the thread ends with the goroutine
	}
	return conn, err
}

func (ns *namespaces) set(mode func(from, to int) linkMode) {
	for to := range ns.nodes {
		var rules strings.Builder
		for from := range ns.nodes {
			switch mode(from, to) {
			case linkOpen:
			case linkCut:
				fmt.Fprintf(&rules, "-A INPUT -s %s -p tcp -j REJECT --reject-with tcp-reset\n", inNet(from))
			default:
				fmt.Fprintf(&rules, "-A INPUT -s %s -j DROP\n", inNet(from))
			}
		}
		if err := ns.filter(to, rules.String()); err != nil {
			ns.t.Error(err)
		}
	}
}

// filter replaces the packet filter of a node.
func (ns *namespaces) filter(node int, rules string) error {
	cmd := exec.CommandContext(context.Background(), "nsenter", "--net=/run/netns/"+ns.nodes[node], "iptables-restore", "-w")
	cmd.Stdin = strings.NewReader("*filter\n:INPUT ACCEPT [0:0]\n" + rules + "COMMIT\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("iptables-restore: %w: %s", err, out)
	}
	return nil
}
