package test

import (
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// The classes of faults of disks: every node has one of its own.

func diskClasses() []faultClass {
	classes := []faultClass{
		{name: "power-loss", inject: losePower},
		{name: "disk-full", inject: fillDisk},
		{name: "disk-hangs", inject: hangDisk},
		{name: "flipped-bits", inject: flipBits},
	}
	for i := range classes {
		classes[i].process, classes[i].alone, classes[i].prepare = true, true, ownDisk
		classes[i].applies = func(store string, _ int) bool { return store == storeBolt }
	}
	return classes
}

var disks sync.Map // by *proc

func ownDisk(t *testing.T, p *proc) {
	t.Helper()
	d := newDisk(t, 64)
	d.onDisk(p)
	disks.Store(p, d)
	p.env["SNAPSHOT_THRESHOLD"], p.env["SNAPSHOT_INTERVAL"], p.env["TRAILING_LOGS"] = "100", "100ms", "20"
}

func (f *faulty) disk(node int) *disk {
	d, _ := disks.Load(f.nodes[node])
	return d.(*disk)
}

// stop kills a node that may have ended by itself.
func (f *faulty) stop(node int) {
	_ = f.nodes[node].cmd.Process.Kill()
	<-f.nodes[node].ended
}

// losePower fails the power of some nodes, or of all, at one moment.
func losePower(f *faulty, random *rand.Rand, _ int) {
	nodes := random.Perm(len(f.nodes))[:1+random.IntN(len(f.nodes))]
	if random.IntN(2) == 0 {
		nodes = random.Perm(len(f.nodes))
	}
	for _, i := range nodes {
		f.asked[i].Store(true)
		f.disk(i).loseUnsynced()
	}
	for _, i := range nodes {
		f.stop(i)
		f.disk(i).remount()
		f.start(i)
	}
}

// fillDisk leaves a node no space for a while, in which it should end.
func fillDisk(f *faulty, random *rand.Rand, leader int) {
	node := leader
	if random.IntN(2) == 0 {
		node = f.follower(random, leader)
	}
	f.asked[node].Store(true)
	f.disk(node).fill()
	f.sleep(random, 1000, 4000)
	f.stop(node)
	f.disk(node).free()
	f.start(node)
}

// hangDisk has a node's disk not answer, for so short that it must go on or for so long that it must end.
func hangDisk(f *faulty, random *rand.Rand, leader int) {
	node := leader
	if random.IntN(2) == 0 {
		node = f.follower(random, leader)
	}
	long := random.IntN(2) == 0
	f.asked[node].Store(long)
	f.disk(node).freeze()
	if long {
		f.measure(f.Now() + diskHangs)
		f.sleep(random, 7000, 9000)
	} else {
		f.sleep(random, 200, 3000)
	}
	f.disk(node).thaw()
	if long {
		f.await("a node whose disk hangs to end", f.Now(), 5*time.Second, func() bool {
			select {
			case <-f.nodes[node].ended:
				return true
			default:
				return false
			}
		})
		f.start(node)
	}
}

// flipBits changes a few bits on a node's disk while it is down. If it does not start, it gets an empty disk, as it says.
func flipBits(f *faulty, random *rand.Rand, _ int) {
	node := random.IntN(len(f.nodes))
	p := f.nodes[node]
	f.end(os.Kill, node)
	files := []string{filepath.Join(p.env["STATE_DIR"], dbName)}
	if found, err := filepath.Glob(filepath.Join(p.env["STATE_DIR"], snapshotsDir, "*[0-9]", "*")); err == nil {
		files = append(files, found...)
	}
	for range 1 + random.IntN(3) {
		flip(f.t, files[random.IntN(2)*random.IntN(len(files))], random)
	}
	f.start(node)
	f.asked[node].Store(true)
	f.await("the node to be ready, or to end", f.Now(), 10*time.Second, func() bool {
		select {
		case <-p.ended:
			return true
		default:
			a, err := f.ask(node, http.MethodGet, "/readyz", "")
			return err == nil && a.status == http.StatusOK
		}
	})
	if f.sleep(random, 10, 500); p.cmd.ProcessState == nil {
		f.asked[node].Store(false)
		return
	}
	f.lose(node)
	f.remove(node)
	f.start(node)
}
