package test

import (
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// faultClass is a kind of fault. To add one is to add a row to faultClasses.
type faultClass struct {
	name    string
	process bool                                           // it stops processes: of such there is only one at a time
	alone   bool                                           // it is not mixed with others
	applies func(store string, nodes int) bool             // nil: always
	prepare func(t *testing.T, p *proc)                    // if not nil: sets the environment of a node before it first starts
	inject  func(f *faulty, random *rand.Rand, leader int) // and heals: when it returns, all nodes run and are connected
}

func faultClasses() []faultClass {
	return append(diskClasses(), []faultClass{
		{name: "kill-one", process: true, inject: func(f *faulty, random *rand.Rand, _ int) {
			f.crash(random, random.IntN(len(f.nodes)))
		}},
		{name: "kill-leader", process: true, inject: func(f *faulty, random *rand.Rand, leader int) {
			f.measure(f.Now())
			f.crash(random, leader)
		}},
		{name: "kill-all", process: true, applies: onDisk, inject: killAll},
		{name: "quick-restart", process: true, inject: quickRestart},
		{name: "wipe", process: true, applies: onDisk, inject: wipe},
		{name: "wipe-two", process: true, applies: ofFive, inject: wipeTwo},
		{name: "wipe-cut", process: true, alone: true, inject: wipeAndCut},
		{name: "forgetful", process: true, alone: true, inject: forgetful},
		{name: "paused-replacement", process: true, inject: pausedReplacement},
		{name: "leader-in-change", process: true, inject: leaderInChange},
		{name: "pause-leader", process: true, inject: func(f *faulty, random *rand.Rand, leader int) { f.pause(random, leader) }},
		{name: "pause-follower", process: true, inject: func(f *faulty, random *rand.Rand, leader int) {
			f.pause(random, f.follower(random, leader))
		}},
		{name: "snapshots", process: true, prepare: snapshotStorm, inject: func(f *faulty, random *rand.Rand, _ int) {
			f.sleep(random, 500, 1500)
			f.crash(random, random.IntN(len(f.nodes)))
		}},
		{name: "resize", process: true, alone: true, applies: ofFive, prepare: listInFile, inject: resize},
		{name: "partition", inject: partition},
		{name: "one-way", inject: oneWay},
		{name: "bridge", inject: bridge},
		{name: "held-answers", inject: heldAnswers},
		{name: "flapping", inject: flapping},
		{name: "forwarding", inject: cutForwarding},
		{name: "clock", applies: func(string, int) bool { return *faultClock }, inject: stepClock},
	}...)
}

func classNames() []string {
	names := []string{"mixed"}
	for _, c := range faultClasses() {
		names = append(names, c.name)
	}
	return names
}

// choose returns the class of that name, as far as it applies to such a cluster, or all classes for mixed, and what sets
// the nodes' environment.
func choose(name, store string, nodes int) (classes []faultClass, prepare func(*testing.T, *proc)) {
	for _, c := range faultClasses() {
		if (name == c.name || name == "mixed" && !c.alone) && (c.applies == nil || c.applies(store, nodes)) {
			classes, prepare = append(classes, c), c.prepare
		}
	}
	if name == "mixed" && *faultSeed%2 == 1 {
		prepare = snapshotStorm
	} else if name == "mixed" {
		prepare = nil
	}
	return classes, prepare
}

// snapshotStorm makes a node take snapshots all the time, and keep so few log entries that others often need those.
func snapshotStorm(_ *testing.T, p *proc) {
	p.env["SNAPSHOT_THRESHOLD"], p.env["SNAPSHOT_INTERVAL"], p.env["TRAILING_LOGS"] = "50", "50ms", "10"
}

// onDisk is where there is something to wipe that outlives a kill.
func onDisk(store string, _ int) bool { return store == storeBolt }

// ofFive is where two nodes are a minority.
func ofFive(_ string, nodes int) bool { return nodes >= 5 }

func (f *faulty) follower(random *rand.Rand, leader int) int {
	return (leader + 1 + random.IntN(len(f.nodes)-1)) % len(f.nodes)
}

// crash kills a node, and starts it again at once or somewhat later.
func (f *faulty) crash(random *rand.Rand, node int) {
	f.end(os.Kill, node)
	f.sleep(random, 1, 2500)
	f.start(node)
}

func killAll(f *faulty, random *rand.Rand, _ int) {
	nodes := random.Perm(len(f.nodes))
	f.end(os.Kill, nodes...)
	for _, i := range nodes {
		f.sleep(random, 1, 200)
		f.start(i)
	}
}

// quickRestart restarts one node after another, each as soon as the one before is ready. Some are asked to end, as in a
// rolling restart, and some are killed.
func quickRestart(f *faulty, random *rand.Rand, _ int) {
	for _, i := range random.Perm(len(f.nodes)) {
		f.end([]os.Signal{os.Kill, syscall.SIGTERM}[random.IntN(2)], i)
		f.start(i)
		f.awaitReady(f.Now(), i)
	}
}

// wipe wipes one node after another, each when the one before has been replaced.
func wipe(f *faulty, random *rand.Rand, _ int) {
	for _, i := range random.Perm(len(f.nodes))[:1+random.IntN(len(f.nodes))] {
		f.wipe(i)
		f.sleep(random, 1, 1000)
		f.start(i)
		f.awaitReady(f.Now(), i)
	}
}

// wipeTwo wipes one node while another is being replaced, and the next as soon as one of them is ready.
func wipeTwo(f *faulty, random *rand.Rand, _ int) {
	for _, i := range random.Perm(len(f.nodes))[:2+random.IntN(len(f.nodes)-1)] {
		f.wipe(i)
		f.start(i)
		f.sleep(random, 1, 500)
	}
}

// wipeAndCut wipes nodes while links are cut, come back, and are cut again.
func wipeAndCut(f *faulty, random *rand.Rand, leader int) {
	cuts := []func(*faulty, *rand.Rand, int){partition, oneWay, bridge, heldAnswers, flapping}
	var cutting sync.WaitGroup
	defer cutting.Wait()
	chance := rand.New(rand.NewPCG(random.Uint64(), 0))
	cutting.Go(func() {
		for range 2 + chance.IntN(2) {
			cuts[chance.IntN(len(cuts))](f, chance, leader)
			f.sleep(chance, 1, 300)
		}
	})
	f.sleep(random, 1, 1000)
	wipe(f, random, leader)
}

// pausedReplacement pauses a node and wipes another; or it wipes a node, and pauses it in the midst of its replacement.
func pausedReplacement(f *faulty, random *rand.Rand, _ int) {
	nodes := random.Perm(len(f.nodes))
	if wiped := nodes[0]; random.IntN(2) == 0 {
		f.wipe(wiped)
		f.start(wiped)
		f.sleep(random, 1, 1000)
		f.pause(random, wiped)
		return
	}
	paused, wiped := nodes[0], nodes[1]
	f.nodes[paused].signal(syscall.SIGSTOP)
	f.wipe(wiped)
	f.start(wiped)
	f.sleep(random, 1000, 6000) // of five the others can replace it meanwhile; of three one is too few
	f.nodes[paused].signal(syscall.SIGCONT)
}

// leaderInChange wipes a follower, and kills or pauses the leader while it replaces that.
func leaderInChange(f *faulty, random *rand.Rand, leader int) {
	wiped := f.follower(random, leader)
	f.wipe(wiped)
	f.start(wiped)
	f.sleep(random, 1, 2000)
	if keeps := f.store == storeBolt || f.minority() >= 2; keeps && random.IntN(2) == 0 {
		f.crash(random, leader)
	} else {
		f.pause(random, leader)
	}
}

// forgetful lets a majority acknowledge writes that the others do not get; then all of it but the leader lose their
// state, come back, and are left alone with the others. They must not elect one of those.
func forgetful(f *faulty, random *rand.Rand, leader int) {
	rest, few := random.Perm(len(f.nodes)), len(f.nodes)/2
	rest = slices.DeleteFunc(rest, func(i int) bool { return i == leader })
	behind, wiped := rest[:few], rest[few:]
	f.wires.set(when(func(from, to int) bool {
		return slices.Contains(behind, from) != slices.Contains(behind, to)
	}, linkHold))
	f.sleep(random, 100, 1500)
	f.wipe(wiped...)
	away := when(func(from, to int) bool { return from == leader || to == leader }, linkCut)
	if random.IntN(2) == 0 { // they see the leader before it is away
		f.start(wiped...)
		f.sleep(random, 50, 600)
	} else {
		f.wires.set(away)
		f.start(wiped...)
	}
	f.cut(random, 1000, 4000, away)
}

// pause stops a process for a while, with requests under way in it and more to come.
func (f *faulty) pause(random *rand.Rand, node int) {
	f.nodes[node].signal(syscall.SIGSTOP)
	f.sleep(random, 500, 4000)
	f.nodes[node].signal(syscall.SIGCONT)
}

// cut sets what becomes of messages for a while, and then lets all pass.
func (f *faulty) cut(random *rand.Rand, least, most int, mode func(from, to int) linkMode) {
	f.wires.set(mode)
	f.sleep(random, least, most)
	f.wires.set(func(int, int) linkMode { return linkOpen })
}

// when is a mode for messages for which condition holds.
func when(condition func(from, to int) bool, mode linkMode) func(from, to int) linkMode {
	return func(from, to int) linkMode {
		if condition(from, to) {
			return mode
		}
		return linkOpen
	}
}

func anyMode(random *rand.Rand) linkMode {
	return []linkMode{linkHold, linkHold, linkCut}[random.IntN(3)]
}

// partition parts a minority from the rest, more often than not with the leader in it.
func partition(f *faulty, random *rand.Rand, leader int) {
	few := random.Perm(len(f.nodes))[:1+random.IntN(len(f.nodes)/2)]
	if !slices.Contains(few, leader) && random.IntN(2) == 0 {
		few[0] = leader
	}
	f.cut(random, 500, 4000, when(func(from, to int) bool {
		return slices.Contains(few, from) != slices.Contains(few, to)
	}, anyMode(random)))
}

// oneWay takes from a node either its ears or its voice.
func oneWay(f *faulty, random *rand.Rand, leader int) {
	node, deaf := leader, random.IntN(2) == 0
	if random.IntN(2) == 0 {
		node = f.follower(random, leader)
	}
	f.cut(random, 500, 4000, when(func(from, to int) bool {
		return deaf && to == node || !deaf && from == node
	}, linkHold))
}

// bridge parts the nodes into two halves, and leaves one node that sees both.
func bridge(f *faulty, random *rand.Rand, _ int) {
	place := random.Perm(len(f.nodes)) // of each node in a row; the one in the middle is the bridge
	middle := len(f.nodes) / 2
	f.cut(random, 500, 4000, when(func(from, to int) bool {
		return (place[from]-middle)*(place[to]-middle) < 0
	}, anyMode(random)))
}

// heldAnswers holds back what followers say to the leader, then cuts it off until there is another, and delivers it then.
func heldAnswers(f *faulty, random *rand.Rand, leader int) {
	f.wires.set(when(func(_, to int) bool { return to == leader }, linkHold))
	f.sleep(random, 1, 1000)
	f.wires.set(when(func(from, to int) bool { return from == leader || to == leader }, linkHold))
	f.sleep(random, 1000, 3500)
	f.wires.set(when(func(from, _ int) bool { return from == leader }, linkHold))
	f.sleep(random, 1, 1000)
	f.wires.set(func(int, int) linkMode { return linkOpen })
}

// flapping changes links at random, several times a second.
func flapping(f *faulty, random *rand.Rand, _ int) {
	for range 4 + random.IntN(8) {
		seed := random.Uint64()
		f.wires.set(func(from, to int) linkMode {
			link := rand.New(rand.NewPCG(seed, uint64(from*len(f.nodes)+to)))
			return when(func(int, int) bool { return link.IntN(3) == 0 }, anyMode(link))(from, to)
		})
		f.sleep(random, 50, 500)
	}
	f.wires.set(func(int, int) linkMode { return linkOpen })
}

// cutForwarding breaks connections between the leader and a follower, again and again, while writes are passed on through them.
func cutForwarding(f *faulty, random *rand.Rand, leader int) {
	follower := f.follower(random, leader)
	for range 3 + random.IntN(5) {
		f.cut(random, 20, 500, when(func(from, to int) bool {
			return from == leader && to == follower || from == follower && to == leader
		}, linkCut))
		f.sleep(random, 50, 500)
	}
}

var (
	clock     sync.Mutex   // of this machine: held by the cluster that sets it
	wallClock = time.Now() // is right, and the monotonic clock tells how long ago it was
)

// stepClock sets the machine's clock by up to half a minute, and back.
func stepClock(f *faulty, random *rand.Rand, _ int) {
	clock.Lock()
	defer clock.Unlock()
	set := func(off time.Duration) {
		tv := syscall.NsecToTimeval(wallClock.Add(time.Since(wallClock) + off).UnixNano())
		if err := syscall.Settimeofday(&tv); err != nil {
			f.Violation("set the clock: %v", err)
		}
	}
	defer set(0)
	for range 1 + random.IntN(3) {
		set(time.Duration(random.IntN(60)-30) * time.Second)
		f.sleep(random, 200, 1000)
	}
}
