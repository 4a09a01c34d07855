package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// feedLine is a line of the feed as a client reads it.
type feedLine struct {
	Tag     uint64       `json:"tag"`
	Changes []lineChange `json:"changes"`
}

type lineChange struct {
	Key     string          `json:"key"`
	Value   json.RawMessage `json:"value"`
	Deleted bool            `json:"deleted"`
}

// fataler is a test, or a check of rapid's.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// parseLines parses whole lines.
func parseLines(t fataler, text string) (lines []feedLine) {
	t.Helper()
	for text != "" {
		line, rest, whole := strings.Cut(text, "\n")
		var l feedLine
		if err := json.Unmarshal([]byte(line), &l); err != nil || !whole {
			t.Fatalf("got the line %q, %v; want JSON and a newline", line, err)
		}
		lines, text = append(lines, l), rest
	}
	return lines
}

// told makes of changes what a reader of a prefix is told of them.
func told(tag uint64, changes []keyChange, prefix string) (line feedLine, any bool) {
	line.Tag = tag
	for _, c := range changes {
		switch {
		case !strings.HasPrefix(c.key, prefix):
		case c.deleted:
			line.Changes = append(line.Changes, lineChange{Key: c.key, Deleted: true})
		default:
			line.Changes = append(line.Changes, lineChange{Key: c.key, Value: json.RawMessage(c.value)})
		}
	}
	return line, len(line.Changes) > 0
}

// A reader is told of every write that changed something under its prefix, once and in order, into however small
// pieces it reads.
func TestFeedAgainstAModel(t *testing.T) {
	genKey := rapid.StringMatching(`[an"\\\n\x01é<]{1,3}`)
	rapid.Check(t, func(t *rapid.T) {
		f := newFeed()
		prefix := rapid.StringMatching(`[an"\\\n\x01é<]{0,2}`).Draw(t, "prefix")
		since := uint64(rapid.IntRange(100, 120).Draw(t, "since"))
		f.add(100, nil)
		var want []feedLine
		last := uint64(100)
		for tag := uint64(101); tag < 100+uint64(rapid.IntRange(1, 20).Draw(t, "writes")); tag++ {
			var changes []keyChange
			for range rapid.IntRange(0, 4).Draw(t, "changes") {
				c := keyChange{key: genKey.Draw(t, "key"), deleted: rapid.Bool().Draw(t, "deleted")}
				if !c.deleted {
					c.value = rapid.SampledFrom([]string{"1", `"long enough to be cut"`, "[]"}).Draw(t, "value")
				}
				changes = append(changes, c)
			}
			f.add(tag, changes)
			last = tag
			if line, any := told(tag, changes, prefix); any && tag > since {
				want = append(want, line)
			}
		}
		c, err := f.open(prefix, &since)
		if since > last {
			if !errors.Is(err, errAhead) {
				t.Fatalf("got %v for a tag beyond the last; want errAhead", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		for {
			buf := make([]byte, rapid.IntRange(1, 100).Draw(t, "piece"))
			n, err := f.read(c, buf)
			if err != nil {
				t.Fatal(err)
			}
			if got.Write(buf[:n]); n == 0 {
				break
			}
		}
		if diff := cmp.Diff(want, parseLines(t, got.String())); diff != "" || c.seen != last {
			t.Fatalf("got seen %d; want %d; lines (-want +got)\n%s", c.seen, last, diff)
		}
	})
}

func TestFeedKnowsItsTags(t *testing.T) {
	full := func(f *feed) { // the first write has left
		for tag := uint64(501); tag <= 504; tag++ {
			f.add(tag, []keyChange{{key: "k", value: strings.Repeat("1", feedBytes/4)}})
		}
	}
	small := func(f *feed) {
		f.add(501, []keyChange{{key: "k", value: "1"}})
		f.add(502, nil)
	}
	tests := []struct {
		name    string
		make    func(*feed)
		since   uint64
		wantErr error
	}{
		{"0 where nothing was written", func(*feed) {}, 0, nil},
		{"more where nothing was written", func(*feed) {}, 1, errAhead},
		{"0 while nothing has left", small, 0, nil},
		{"the first", small, 501, nil},
		{"below the first", small, 500, errTooOld},
		{"of a write that changed nothing", small, 502, nil},
		{"beyond the last", small, 503, errAhead},
		{"0 when something has left", full, 0, errTooOld},
		{"before what has left", full, 500, errTooOld},
		{"of what has left last", full, 501, nil},
		{"0 after a snapshot", func(f *feed) { small(f); f.reset(502) }, 0, errTooOld},
		{"below a snapshot", func(f *feed) { small(f); f.reset(502) }, 501, errTooOld},
		{"of a snapshot", func(f *feed) { small(f); f.reset(502) }, 502, nil},
		{"0 after a snapshot in which nothing was written", func(f *feed) { f.reset(0); small(f) }, 0, nil},
		{"of another life, after such a snapshot", func(f *feed) { f.reset(0); small(f) }, 1, errTooOld},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFeed()
			tt.make(f)
			if _, err := f.open("", &tt.since); !errors.Is(err, tt.wantErr) {
				t.Errorf("got %v; want %v", err, tt.wantErr)
			}
		})
	}
}

// A reader hears of a reset also when it had read all, and of a history that has moved on while it was in the middle
// of a line.
func TestFeedReadersThatFallBehind(t *testing.T) {
	f := newFeed()
	f.add(1, []keyChange{{key: "k", value: strings.Repeat("1", feedBytes/3)}})
	since := uint64(0)
	behind, _ := f.open("", &since)
	buf := make([]byte, 100)
	if _, err := f.read(behind, buf); err != nil || behind.atLineStart() {
		t.Fatalf("got %v, %+v; want part of a line", err, behind)
	}
	for tag := uint64(2); tag < 5; tag++ {
		f.add(tag, []keyChange{{key: "k", value: strings.Repeat("1", feedBytes/3)}})
	}
	if _, err := f.read(behind, buf); !errors.Is(err, errTooOld) {
		t.Errorf("got %v; want errTooOld", err)
	}
	head, _ := f.open("", nil)
	wake := f.wait(head)
	f.reset(5)
	select {
	case <-wake:
	case <-time.After(5 * time.Second):
		t.Fatal("a reset wakes nobody")
	}
	if _, err := f.read(head, buf); !errors.Is(err, errTooOld) {
		t.Errorf("got %v after a reset; want errTooOld", err)
	}
}

// The history takes no more memory than feedBytes.
func TestFeedIsBounded(t *testing.T) {
	for name, write := range map[string]func(i int) keyChange{
		"small values": func(i int) keyChange { return keyChange{key: strings.Clone("some-key"), value: fmt.Sprint(i)} },
		"large values": func(i int) keyChange {
			return keyChange{key: strings.Clone("some-key"), value: fmt.Sprintf("%01000d", i)}
		},
		"keys that need escapes": func(i int) keyChange {
			return keyChange{key: strings.Repeat("\x01", 1000), value: fmt.Sprint(i)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			heap := func() int {
				var s runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&s)
				return int(s.HeapAlloc)
			}
			before := heap()
			f := newFeed()
			for i := range 100_000 {
				f.add(uint64(i+1), []keyChange{write(i)})
			}
			if took := heap() - before; took > feedBytes+1<<20 || took < feedBytes/4 {
				t.Errorf("got %d bytes for a history of %d; want no more", took, feedBytes)
			}
			runtime.KeepAlive(f)
		})
	}
}

// A reader is woken at once after a quiet time, and no more than twenty times a second however fast writes come.
func TestFeedWakesReadersNotTooOften(t *testing.T) {
	f := newFeed()
	c, _ := f.open("", nil)
	buf, woken := make([]byte, 1<<20), 0
	wake := f.wait(c)
	f.add(1, oneChange("1"))
	began := time.Now()
	<-wake
	if took := time.Since(began); took > wakeEvery/2 {
		t.Errorf("woken %v after the first write; want at once", took)
	}
	done := make(chan struct{})
	go func() { // until the time is over
		defer close(done)
		for tag := uint64(2); time.Since(began) < time.Second; tag++ {
			f.add(tag, oneChange("1"))
			time.Sleep(100 * time.Microsecond)
		}
	}()
	for {
		if _, err := f.read(c, buf); err != nil {
			t.Fatal(err)
		}
		select {
		case <-f.wait(c):
			woken++
			continue
		case <-time.After(300 * time.Millisecond):
		}
		break
	}
	<-done
	if woken > 22 || woken < 5 || c.seen != f.newest() {
		t.Errorf("got woken %d times in a second, seen %d of %d; want at most 20 or so", woken, c.seen, f.newest())
	}
}

// A reader of a prefix under which nothing happens is not woken, and does not fall behind, however much happens elsewhere
// and whether it waits or reads.
func TestFeedLeavesOthersAlone(t *testing.T) {
	f := newFeed()
	waits, _ := f.open("mine", nil)
	reads, _ := f.open("mine", nil)
	buf := make([]byte, 100)
	wake := f.wait(waits)
	for tag := uint64(1); tag <= 30; tag++ { // five times the history
		f.add(tag, []keyChange{{key: "other", value: strings.Repeat("1", feedBytes/6)}})
		if n, err := f.read(reads, buf); n > 0 || err != nil || reads.seen != tag {
			t.Fatalf("got %d bytes, %v, seen %d; want it to have seen %d", n, err, reads.seen, tag)
		}
		waitFor(t, "the one that waits to be moved on", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return waits.seen == tag
		})
	}
	select {
	case <-wake:
		t.Error("it was woken by what does not concern it")
	default:
	}
	f.add(31, []keyChange{{key: "of all", value: "0"}, {key: "mine", value: "1"}})
	<-wake
	for _, c := range []*cursor{waits, reads} {
		if n, err := f.read(c, buf); err != nil || string(buf[:n]) != `{"tag":31,"changes":[{"key":"mine","value":1}]}`+"\n" {
			t.Errorf("got %q, %v; want the change that concerns it", buf[:n], err)
		}
	}
}
