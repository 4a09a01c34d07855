package test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"raftstarter/test/history"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// While faults are injected, a reader follows every node's feed. What it was sent is then compared with the history, and
// with what the readers of other nodes were sent. Nobody is told the tag of a deletion, so one that is lost is noticed only
// where another node has sent it, or where nothing came after it.

// feedLine is a line of GET /changes.
type feedLine struct {
	Tag     uint64       `json:"tag"`
	Changes []feedChange `json:"changes,omitempty"`
}

type feedChange struct {
	Key     string          `json:"key"`
	Value   json.RawMessage `json:"value,omitempty"`
	Deleted bool            `json:"deleted,omitempty"`
}

func (l feedLine) String() string {
	text, _ := json.Marshal(l)
	return string(text)
}

// stretch is what a node's feed has sent without a gap: all writes with a tag above from, up to to.
type stretch struct {
	node     string
	from, to uint64
	lines    map[uint64]feedLine // with changes, by tag
}

func newStretch(node string, from uint64) *stretch {
	return &stretch{node: node, from: from, to: from, lines: make(map[uint64]feedLine)}
}

// add adds the next line, or says what is wrong with it.
func (s *stretch) add(text string) error {
	var line feedLine
	if err := json.Unmarshal([]byte(text), &line); err != nil || line.String()+"\n" != text {
		return fmt.Errorf("%s sent %q; want a line", s.node, text)
	}
	if line.Tag < s.to || line.Tag == s.to && line.Changes != nil {
		return fmt.Errorf("%s sent %q after tag %d; want tags that grow", s.node, text, s.to)
	}
	if s.to = line.Tag; line.Changes != nil {
		s.lines[s.to] = line
	}
	return nil
}

// feedGap is where a node could not go on with its feed. That is right if it has restarted since it was last asked, or
// has installed a snapshot.
type feedGap struct {
	node, run int
	restarted bool
}

// followers are the readers of a cluster's feeds.
type followers struct {
	*faulty
	cancel  context.CancelFunc
	readers sync.WaitGroup
	until   atomic.Uint64 // the tag at which they end, when it is known

	mu        sync.Mutex // guards what follows
	stretches []*stretch
	gaps      []feedGap
}

// follow has every node's feed followed until judge is called.
func (f *faulty) follow() *followers {
	ctx, cancel := context.WithCancel(f.t.Context())
	r := &followers{faulty: f, cancel: cancel}
	for node := range f.nodes {
		r.readers.Go(func() { r.run(ctx, node) })
	}
	return r
}

// run follows a node's feed from its beginning, and after a gap from where the node is then.
func (r *followers) run(ctx context.Context, node int) {
	s, since, run := newStretch(r.nodes[node].name, 0), "0", 1
	for ctx.Err() == nil {
		if until := r.until.Load(); until > 0 && s.to >= until {
			break
		}
		before := r.runOf(node)
		status, err := r.read(ctx, node, since, s)
		switch {
		case err != nil:
			r.Violation("%v", err)
			return
		case status == http.StatusOK:
			since, run = strconv.FormatUint(s.to, 10), before
		case status == http.StatusGone:
			now := r.runOf(node)
			r.keep(s, &feedGap{node, now, now != run})
			s, since, run = newStretch(s.node, 0), "", now
		default:
			time.Sleep(20 * time.Millisecond)
		}
	}
	r.keep(s, nil)
	if until := r.until.Load(); s.to < until {
		r.Violation("the feed of %s has come to tag %d; want %d", s.node, s.to, until)
	}
}

func (r *followers) keep(s *stretch, gap *feedGap) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stretches = append(r.stretches, s)
	if gap != nil {
		r.gaps = append(r.gaps, *gap)
	}
}

// read reads one answer into s, as far as it comes, and returns its status; 0 for no answer. The error says what is wrong
// with it.
func (r *followers) read(ctx context.Context, node int, since string, s *stretch) (status int, err error) {
	target := r.nodes[node].url() + "/changes?wait=2s"
	if since != "" {
		target += "&since=" + since
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, http.NoBody)
	if err != nil {
		return 0, err
	}
	response, err := r.web.Do(req)
	if err != nil {
		return 0, nil // the node does not run, or not now
	}
	defer response.Body.Close()
	body := bufio.NewReader(response.Body)
	switch response.StatusCode {
	case http.StatusServiceUnavailable:
		return 0, nil
	case http.StatusGone:
		if text, err := io.ReadAll(body); err == nil && !strings.Contains(string(text), "history does not reach back") {
			return 0, fmt.Errorf("%s knows nothing of tag %s: %s", s.node, since, text)
		}
		return http.StatusGone, nil
	case http.StatusOK:
	default:
		return 0, fmt.Errorf("%s answered %s for its feed", s.node, response.Status)
	}
	for lines, last := 0, ""; ; lines++ {
		text, err := body.ReadString('\n')
		switch whole := errors.Is(err, io.EOF); {
		case whole && (text != "" || strings.Contains(last, "changes")):
			return 0, fmt.Errorf("%s ended its feed with %q, %q; want a tag", s.node, last, text)
		case whole:
			return http.StatusOK, nil
		case err != nil && lines == 0:
			return 0, nil
		case err != nil: // cut off
			return http.StatusOK, nil
		case lines == 0 && since == "": // from now
			_, err = fmt.Sscanf(text, `{"tag":%d}`, &s.from)
			s.to = s.from
		case lines == 0 && text != feedLine{Tag: s.to}.String()+"\n":
			err = fmt.Errorf("%s began its feed after tag %d with %q", s.node, s.to, text)
		}
		if err = cmp.Or(err, s.add(text)); err != nil {
			return 0, err
		}
		last = text
	}
}

// judge waits until the readers have seen the last write, and judges what they were sent.
func (r *followers) judge() (lines, unseen int) {
	r.await("the last tag", r.Now(), 15*time.Second, func() bool {
		a, err := r.ask(0, http.MethodGet, "/key/none", "")
		last, _ := strconv.ParseUint(a.header.Get("Raft-Tag"), 10, 64)
		r.until.Store(last)
		return err == nil && last > 0
	})
	defer time.AfterFunc(20*time.Second, r.cancel).Stop()
	r.readers.Wait()
	gaps := make(map[feedGap]int)
	for _, gap := range r.gaps {
		if gap.restarted {
			continue
		}
		gaps[gap]++
		log := r.nodes[gap.node].read(r.logs[gap.node][gap.run-1])
		if strings.Count(log, "Installed remote snapshot") < gaps[gap] {
			r.Violation("the feed of %s has a gap, and it has neither restarted nor installed a snapshot", r.nodes[gap.node].name)
		}
	}
	return checkFeeds(r.History, r.stretches)
}

// checkFeeds compares what feeds have sent with one another and with a history, when all clients have ended. It returns
// how many lines there were, and how many acknowledged writes may all be in gaps.
func checkFeeds(h *history.History, stretches []*stretch) (lines, unseen int) {
	all := make(map[uint64]feedLine) // by tag
	for _, s := range stretches {
		for tag, line := range s.lines {
			if other, known := all[tag]; known && other.String() != line.String() {
				h.Violation("%s sent %v; another node sent %v", s.node, line, other)
			}
			all[tag] = line
		}
	}
	tags := slices.Sorted(maps.Keys(all))
	for _, s := range stretches {
		for _, tag := range tags {
			if _, sent := s.lines[tag]; !sent && s.covers(tag-1, tag) {
				h.Violation("%s has left out %v", s.node, all[tag])
			}
		}
		if len(tags) > 0 && s.to >= tags[len(tags)-1] {
			checkEnd(h, s)
		}
	}
	w := newWrites(h)
	for _, tag := range tags {
		if err := w.explain(all[tag]); err != nil {
			h.Violation("a feed sent %v: %v", all[tag], err)
		}
	}
	for value, op := range w.ops {
		if w.sent[value] || !op.Output.(history.Answer).Known {
			continue
		}
		above, upTo := w.bounds(value)
		if i := slices.IndexFunc(stretches, func(s *stretch) bool { return s.covers(above, upTo) }); i >= 0 {
			h.Violation("%s has left out %+v, which was acknowledged", stretches[i].node, op.Input)
		} else {
			unseen++
		}
	}
	return len(all), unseen
}

// covers says whether a write whose tag is above one tag, and not above another, is in the stretch.
func (s *stretch) covers(above, upTo uint64) bool { return s.from <= above && upTo <= s.to }

// checkEnd checks that a stretch that has come to the end leads to what the last reads found, deletions included.
func checkEnd(h *history.History, s *stretch) {
	state := make(map[string]string)
	for _, tag := range slices.Sorted(maps.Keys(s.lines)) {
		for _, c := range s.lines[tag].Changes {
			state[c.Key] = cmp.Or(string(c.Value), "null")
		}
	}
	for key, ops := range h.Ops {
		last := slices.MaxFunc(ops, func(x, y porcupine.Operation) int { return cmp.Compare(x.Call, y.Call) })
		later := slices.ContainsFunc(ops, func(op porcupine.Operation) bool {
			return op.Input.(history.Op).Kind != "get" && op.Return >= last.Call // or nobody knows
		})
		value, sent := state[key]
		if later || !sent && s.from > 0 {
			continue
		}
		if read := last.Output.(history.Answer).Value; read != cmp.Or(value, "null") {
			h.Violation("%s has sent %s as the last of %s; a read found %s", s.node, cmp.Or(value, "null"), key, read)
		}
	}
}

// writes is what a history says of writes, but for those that certainly did not happen, and which of them feeds have sent.
type writes struct {
	ops     map[string]porcupine.Operation // by value
	tags    map[string]uint64              // by value, as far as anybody was told
	deletes map[string]int                 // by key: so many may still be sent
	sent    map[string]bool                // by value
}

func newWrites(h *history.History) *writes {
	w := &writes{make(map[string]porcupine.Operation), make(map[string]uint64), make(map[string]int), make(map[string]bool)}
	for key, ops := range h.Ops {
		for _, op := range ops {
			in, out := op.Input.(history.Op), op.Output.(history.Answer)
			switch {
			case out.Failed:
			case in.Kind == "delete":
				w.deletes[key]++
			case in.Kind != "get":
				w.ops[in.Value] = op
			}
			if out.Tag != 0 {
				w.tags[cmp.Or(in.Value, out.Value)] = out.Tag
			}
		}
	}
	return w
}

// explain returns an error if nothing in the history explains a line that is new.
func (w *writes) explain(line feedLine) error {
	first := line.Changes[0]
	if first.Key == "recovery" || strings.HasPrefix(first.Key, "round-") {
		return nil // the suite writes them without a history
	}
	want := feedLine{line.Tag, []feedChange{{Key: first.Key, Deleted: true}}}
	value := string(first.Value)
	op, known := w.ops[value]
	switch in, _ := op.Input.(history.Op); {
	case first.Deleted:
		w.deletes[first.Key]--
		known = w.deletes[first.Key] >= 0
	case in.Kind == "post": // its members come in the order of their keys
		want.Changes = []feedChange{{Key: min(in.Key, in.Other), Value: first.Value}, {Key: max(in.Key, in.Other), Value: first.Value}}
	default:
		want.Changes = []feedChange{{Key: in.Key, Value: first.Value}}
	}
	switch tag := w.tags[value]; {
	case !known:
		return errors.New("no client did that, or it was told that it was not done")
	case line.String() != want.String():
		return fmt.Errorf("want %v", want)
	case w.sent[value]:
		return errors.New("it was sent before, with another tag")
	case tag != 0 && tag != line.Tag:
		return fmt.Errorf("want the tag %d", tag)
	}
	w.sent[value] = !first.Deleted
	return nil
}

// bounds returns two tags between which the tag of a write that was acknowledged must be: above the first, and not above
// the second.
func (w *writes) bounds(value string) (above, upTo uint64) {
	if tag := w.tags[value]; tag != 0 {
		return tag - 1, tag
	}
	op, upTo := w.ops[value], math.MaxUint64
	for other, tag := range w.tags {
		if w.ops[other].Return < op.Call {
			above = max(above, tag)
		} else if w.ops[other].Call > op.Return {
			upTo = min(upTo, tag)
		}
	}
	return above, upTo
}

// TestFeedChecker shows that the checker knows right from wrong.
func TestFeedChecker(t *testing.T) {
	put := `{"tag":11,"changes":[{"key":"a","value":"1"}]}`
	post := `{"tag":12,"changes":[{"key":"a","value":"2"},{"key":"b","value":"2"}]}`
	last := `{"tag":13,"changes":[{"key":"a","value":"3"}]}`
	unknown := `{"tag":14,"changes":[{"key":"c","value":"4"}]}`
	deleted := `{"tag":15,"changes":[{"key":"a","deleted":true}]}`
	end := `{"tag":15}`
	feed := func(lines ...string) []string { return lines }
	right := feed(put, post, last, deleted, end)
	for _, tc := range []struct {
		name  string
		right bool
		feeds [][]string // of nodes, each from tag 10 on
	}{
		{"what was written", true, [][]string{right, right}},
		{"with the write of unknown outcome", true, [][]string{feed(put, post, last, unknown, deleted), feed(put, post)}},
		{"tags between", true, [][]string{feed(`{"tag":10}`, put, `{"tag":11}`, post, `{"tag":12}`, last, deleted, end)}},
		{"a lost line", false, [][]string{right, feed(put, last, deleted, end)}},
		{"a line that all have lost", false, [][]string{feed(post, last, deleted, end), feed(post, last, deleted, end)}},
		{"a post that all have lost", false, [][]string{feed(put, last, deleted, end)}},
		{"a deletion that all have lost", false, [][]string{feed(put, post, last, end)}},
		{"the last line, which is lost", false, [][]string{right, feed(put, post, last, end)}},
		{"a line twice", false, [][]string{feed(put, put, post, last, deleted, end)}},
		{"a line again later", false, [][]string{feed(put, post, put, last, deleted, end)}},
		{"a write twice", false, [][]string{feed(put, post, last, `{"tag":14,"changes":[{"key":"a","value":"1"}]}`, deleted)}},
		{"lines out of order", false, [][]string{feed(post, put, last, deleted, end)}},
		{"tags out of order", false, [][]string{feed(put, post, last, deleted, end, `{"tag":14}`)}},
		{"a split line", false, [][]string{feed(put[:20], put[20:], post, last, deleted, end)}},
		{"two lines in one", false, [][]string{feed(put+post, last, deleted, end)}},
		{"a post in two lines", false, [][]string{feed(
			put, `{"tag":12,"changes":[{"key":"a","value":"2"}]}`, `{"tag":12,"changes":[{"key":"b","value":"2"}]}`, last, deleted,
		)}},
		{"half a post", false, [][]string{feed(put, `{"tag":12,"changes":[{"key":"a","value":"2"}]}`, last, deleted)}},
		{"another value", false, [][]string{feed(put, post, `{"tag":13,"changes":[{"key":"a","value":"7"}]}`, deleted, end)}},
		{"another key", false, [][]string{feed(put, post, `{"tag":13,"changes":[{"key":"b","value":"3"}]}`, deleted, end)}},
		{"another tag", false, [][]string{feed(put, post, `{"tag":14,"changes":[{"key":"a","value":"3"}]}`, deleted, end)}},
		{"what was not applied", false, [][]string{feed(put, post, last, `{"tag":14,"changes":[{"key":"c","value":"5"}]}`, deleted)}},
		{"a deletion that nobody made", false, [][]string{feed(put, post, last, `{"tag":14,"changes":[{"key":"b","deleted":true}]}`, deleted)}},
		{"nodes that do not agree", false, [][]string{
			feed(put, post, last, unknown, deleted), feed(put, post, last, `{"tag":14,"changes":[{"key":"recovery","value":1}]}`, deleted),
		}},
	} {
		h := history.New(func(string, ...any) {})
		for i, step := range []struct {
			op  history.Op
			out history.Answer
		}{
			{history.Op{Kind: "put", Key: "a", Value: `"1"`}, history.Answer{Known: true, Tag: 11}},
			{history.Op{Kind: "post", Key: "a", Other: "b", Value: `"2"`}, history.Answer{Known: true}},
			{history.Op{Kind: "put", Key: "a", Value: `"3"`}, history.Answer{Known: true, Tag: 13}},
			{history.Op{Kind: "put", Key: "c", Value: `"4"`}, history.Answer{}},
			{history.Op{Kind: "put", Key: "c", Value: `"5"`}, history.Answer{Known: true, Failed: true}},
			{history.Op{Kind: "delete", Key: "a"}, history.Answer{Known: true}},
			{history.Op{Kind: "get", Key: "a"}, history.Answer{Known: true, Value: "null"}},
			{history.Op{Kind: "get", Key: "b"}, history.Answer{Known: true, Value: `"2"`}},
		} {
			h.Add(0, step.op, step.out, time.Duration(10*i), time.Duration(10*i+1))
		}
		var stretches []*stretch
		for _, lines := range tc.feeds {
			s := newStretch("a node", 10)
			for _, line := range lines {
				if err := s.add(line + "\n"); err != nil {
					h.Violation("%v", err)
				}
			}
			stretches = append(stretches, s)
		}
		checkFeeds(h, stretches)
		if got := h.Violations.Load() == 0; got != tc.right {
			t.Errorf("%s: got right %v; want %v", tc.name, got, tc.right)
		}
	}
}
