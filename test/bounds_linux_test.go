package test

import (
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// What is written passes through the log, so memory and disk must not grow with it. Nor may a node keep what it no longer
// needs.
func TestProcessIsBoundedByItsState(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		store       string
		writes, len int
		wantMemory  int // MiB
		wantDisk    int // MiB
		wantQuiet   int // MiB of its own memory, some seconds after the last write
	}{
		{storeMemory, 300, 500_000, 150, 0, 55}, // 16 MiB of history, and the log
		{storeMemory, 3_000, 50_000, 150, 0, 55},
		{storeBolt, 48, 2_000_000, 220, 80, 75}, // four bodies at once, and raft.db is mapped; 16 entries stay in memory
		{storeBolt, 1_200, 100_000, 150, 80, 45},
	} {
		t.Run(fmt.Sprintf("%s, %d writes of %d bytes", tt.store, tt.writes, tt.len), func(t *testing.T) {
			t.Parallel()
			p := newProc(t, map[string]string{"KV_STORE": tt.store, "MAX_BODY_BYTES": "2097152", "NODE_ID": "node1"})
			startAll(p)
			value := `"` + strings.Repeat("v", tt.len-2) + `"`
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					for range tt.writes / 4 {
						if a, err := p.ask(http.MethodPut, "/key/k", value); err != nil || a.status != http.StatusOK {
							t.Errorf("got %v, %v; want 200", a, err)
							return
						}
					}
				})
			}
			clients.Wait()
			if got := p.peakMemory() >> 20; got > tt.wantMemory {
				t.Errorf("got up to %d MiB resident; want %d or less", got, tt.wantMemory)
			}
			if got := p.diskUsed() >> 20; got > tt.wantDisk {
				t.Errorf("got %d MiB on disk; want %d or less", got, tt.wantDisk)
			}
			t.Logf("up to %d MiB resident, %d MiB on disk", p.peakMemory()>>20, p.diskUsed()>>20)
			waitFor(t, "memory to be given back by a node that is quiet", func() bool { return p.memory("RssAnon")>>20 <= tt.wantQuiet })
		})
	}
}

// diskUsed returns the size of all files in STATE_DIR.
func (p *proc) diskUsed() (bytes int) {
	_ = filepath.WalkDir(p.env["STATE_DIR"], func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if info, err := d.Info(); err == nil {
				bytes += int(info.Size())
			}
		}
		return nil
	})
	return bytes
}
