package test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// disk is an ext4 filesystem of its own, in a file on a loop device, on which real faults can be made.
type disk struct {
	t          testing.TB
	image, dir string
	frozen     bool
}

// newDisk makes and mounts a disk. Where that is not allowed the test is skipped, but for CI, where it must be.
func newDisk(t testing.TB, mib int64) *disk {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("this test must run as root: it mounts a disk of its own")
		}
		t.Skip("only root can mount a disk of its own")
	}
	d := &disk{t: t, image: filepath.Join(t.TempDir(), "disk.ext4"), dir: filepath.Join(t.TempDir(), "disk")}
	file, err := os.Create(d.image)
	if err != nil {
		t.Fatal(err)
	}
	if err := file.Truncate(mib << 20); err != nil {
		t.Fatal(err)
	}
	_ = file.Close()
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d.command("mkfs.ext4", "-q", "-m0", d.image)
	d.mount()
	t.Cleanup(func() {
		for range 50 { // a process that was killed may need a moment to let go
			if exec.Command("umount", d.dir).Run() == nil { //nolint:noctx // the test's context has ended
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Errorf("the disk %s is still in use", d.dir)
	})
	return d
}

func (d *disk) command(name string, args ...string) {
	d.t.Helper()
	if out, err := exec.CommandContext(d.t.Context(), name, args...).CombinedOutput(); err != nil {
		d.t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

func (d *disk) mount() {
	d.t.Helper()
	d.command("mount", "-o", "loop", d.image, d.dir)
}

// loseUnsynced makes every call to the disk fail from now on, and forgets all that was not synced, journal included: what
// a power failure does. When nobody uses it any more, remount brings it back.
func (d *disk) loseUnsynced() {
	d.t.Helper()
	const shutdown, noLogFlush = 0x8004587d, uint32(2) // FS_IOC_SHUTDOWN and its flag
	root, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer root.Close()
	flag := noLogFlush
	if _, _, err := syscall.Syscall(syscall.SYS_IOCTL, root.Fd(), shutdown, uintptr(unsafe.Pointer(&flag))); err != 0 {
		d.t.Fatalf("shut the disk down: %v", err)
	}
}

func (d *disk) remount() {
	d.t.Helper()
	d.command("umount", d.dir)
	d.mount()
}

// freeze makes every write to the disk wait until thaw.
func (d *disk) freeze() {
	d.t.Helper()
	d.frozen = true
	d.t.Cleanup(d.thaw) // before the cleanup of a process that could not end while the disk is frozen
	d.command("fsfreeze", "--freeze", d.dir)
}

func (d *disk) thaw() {
	if d.frozen {
		d.frozen = false
		_ = exec.Command("fsfreeze", "--unfreeze", d.dir).Run() //nolint:noctx // also when the test's context has ended
	}
}

// fill takes all space that is left; free gives it back.
func (d *disk) fill() {
	d.t.Helper()
	file, err := os.Create(filepath.Join(d.dir, "filler"))
	if err != nil {
		d.t.Fatal(err)
	}
	defer file.Close()
	for size := 1 << 20; size >= 512; { // large pieces first, then small ones into what is left
		if _, err = file.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	_ = file.Sync()
}

func (d *disk) free() {
	d.t.Helper()
	if err := os.Remove(filepath.Join(d.dir, "filler")); err != nil {
		d.t.Fatal(err)
	}
}

// onDisk has nodes keep their state on a disk.
func (d *disk) onDisk(nodes ...*proc) []*proc {
	for _, p := range nodes {
		p.env["STATE_DIR"] = filepath.Join(d.dir, p.name)
	}
	return nodes
}

// The power of all three nodes fails under load, several times. What was acknowledged is there each time.
func TestProcessPowerLoss(t *testing.T) {
	t.Parallel()
	d := newDisk(t, 128)
	nodes := startAll(d.onDisk(newProcs(t, map[string]string{
		"SNAPSHOT_THRESHOLD": "50", "SNAPSHOT_INTERVAL": "20ms", "TRAILING_LOGS": "10",
	})...)...)
	for i := range 3 {
		load := startLoad(fmt.Sprintf("power%d", i), nodes...)
		load.flow(t)
		d.loseUnsynced()
		for _, p := range nodes {
			_ = p.cmd.Process.Kill() // if it has not stopped by itself
			<-p.ended
		}
		load.end()
		d.remount()
		startAll(nodes...)
		load.check(t, nodes)
	}
}

// A disk that runs full stops the node; when there is space again it has all that was acknowledged.
func TestProcessDiskFull(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 3} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			d := newDisk(t, 16)
			nodes := newProcs(t, nil)
			if n == 1 {
				delete(nodes[0].env, "PEERS")
				nodes = nodes[:1]
			}
			d.onDisk(nodes[0])
			startAll(nodes...)
			victim, others := nodes[0], nodes[1:]
			load := startLoad("full", nodes...)
			load.flow(t)
			d.fill()
			// The file grows in steps, so there may be some room in it.
			big := strconv.Quote(strings.Repeat("x", 100_000))
			waitFor(t, "the node to stop", func() bool {
				_, _ = nodes[len(nodes)-1].ask(http.MethodPut, "/key/big", big)
				select {
				case <-victim.ended:
					return true
				default:
					return false
				}
			})
			victim.exits(exitFailed, time.Second)
			victim.logs("storage: .*no space left on device")
			for _, p := range others {
				p.await(http.StatusOK, http.MethodPut, "/key/on", "1")
			}
			load.end()
			d.free()
			startAll(victim)
			load.check(t, nodes)
			victim.end(syscall.SIGTERM, exitOK)
		})
	}
}

// A disk that does not answer for a while is waited for; one that does not answer for longer stops the node, and another
// leads. The kernel keeps the process until the disk answers, but nobody hears of it any more.
func TestProcessFrozenDisk(t *testing.T) {
	t.Parallel()
	d := newDisk(t, 64)
	nodes := newProcs(t, nil)
	for _, p := range nodes {
		p.env["STATE_DIR"] = filepath.Join(t.TempDir(), "state")
	}
	d.onDisk(nodes[0])
	startAll(nodes...)
	victim, others := nodes[0], nodes[1:]
	for leader, _ := pick(nodes, true); leader != victim; leader, _ = pick(nodes, true) {
		leader.end(syscall.SIGTERM, exitOK)
		startAll(leader)
	}
	load := startLoad("frozen", nodes...)
	load.flow(t)
	d.freeze()
	time.Sleep(2 * time.Second) // by the wall clock: that is what people would call a while
	d.thaw()
	load.flow(t)
	if leader, _ := pick(nodes, true); leader != victim {
		t.Errorf("got another leader after two seconds; want the watchdog to wait")
	}
	d.freeze()
	began := time.Now()
	waitFor(t, "another leader", func() bool {
		a, _ := others[0].ask(http.MethodPut, "/key/on", "1")
		return a.status == http.StatusOK && others[0].status().Leader != victim.name
	})
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the others took %v to go on; want at most 10s", took)
	}
	if _, err := victim.ask(http.MethodGet, "/livez", ""); err == nil {
		t.Error("a node whose disk hangs answers; want its port closed")
	}
	load.end()
	d.thaw()
	victim.exits(exitFailed, 10*time.Second)
	victim.logs("storage: .*the disk hangs")
	startAll(victim)
	load.check(t, nodes)
	victim.end(syscall.SIGTERM, exitOK)
}

// A node on whose disk a few bits have changed either refuses to start, saying what to do, and touches nothing, or stops
// when it reads them; it never serves other data than were written.
func TestProcessFlippedBits(t *testing.T) {
	t.Parallel()
	const seed = 1
	random := rand.New(rand.NewPCG(seed, 0))
	origin := startAll(newProc(t, map[string]string{"SNAPSHOT_THRESHOLD": "50", "SNAPSHOT_INTERVAL": "20ms", "TRAILING_LOGS": "10"}))[0]
	load := startLoad("flip", origin)
	load.flow(t)
	load.end()
	origin.end(syscall.SIGTERM, exitOK)
	var files []string
	for _, pattern := range []string{dbName, filepath.Join(snapshotsDir, "*", "*")} {
		found, err := filepath.Glob(filepath.Join(origin.env["STATE_DIR"], pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("got %q, error %v for %s; want files", found, err, pattern)
		}
		files = append(files, found...)
	}
	stopped, served := 0, 0
	for range 25 {
		p := newProc(t, nil)
		if err := os.CopyFS(p.env["STATE_DIR"], os.DirFS(origin.env["STATE_DIR"])); err != nil {
			t.Fatal(err)
		}
		file, _ := filepath.Rel(origin.env["STATE_DIR"], files[random.IntN(2)*random.IntN(len(files))]) // raft.db, which is first, more often
		at, bit := flip(t, filepath.Join(p.env["STATE_DIR"], file), random)
		p.start()
		waitFor(t, "the node to be ready, or to stop", func() bool {
			a, _ := p.ask(http.MethodGet, "/readyz", "")
			select {
			case <-p.ended:
				return true
			default:
				return a.status == http.StatusOK
			}
		})
		t.Logf("%s, byte %d, bit %d", file, at, bit)
		select {
		case <-p.ended:
			stopped++
			if strings.Contains(p.read(p.stderr), "panic: freepages: failed to get all reachable pages") {
				break // bbolt has ended the process, in a goroutine of its own
			}
			p.exits(exitFailed, time.Second)
			p.logs("is damaged|STATE_DIR")
		default:
			served++
			for i, w := range load.writes {
				if w.answer.status == http.StatusOK && i%10 == 0 {
					p.has(w.key, w.value, "")
				}
			}
			p.end(syscall.SIGTERM, exitOK)
		}
	}
	if t.Logf("%d stopped, %d served; seed %d", stopped, served, seed); stopped == 0 || served == 0 {
		t.Errorf("got %d that stopped and %d that served; want some of both", stopped, served)
	}
}

// flip changes one bit of a file in its place.
func flip(t testing.TB, path string, random *rand.Rand) (at int64, bit int) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil || size == 0 {
		t.Fatalf("%s: %d bytes, error %v", path, size, err)
	}
	at, bit = random.Int64N(size), random.IntN(8)
	var b [1]byte
	if _, err = file.ReadAt(b[:], at); err == nil {
		b[0] ^= 1 << bit
		_, err = file.WriteAt(b[:], at)
	}
	if err != nil {
		t.Fatal(err)
	}
	return at, bit
}
