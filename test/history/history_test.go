package history

import (
	"testing"
	"time"
)

// TestHistory shows that the judge knows right from wrong.
func TestHistory(t *testing.T) {
	type step struct {
		call, back int64 // back 0: no answer
		op         Op
		out        Answer
	}
	put := func(call, back int64, value string, tag uint64) step {
		return step{call, back, Op{Kind: "put", Value: value}, Answer{Known: back > 0, Tag: tag}}
	}
	get := func(call, back int64, value string, tag uint64) step {
		return step{call, back, Op{Kind: "get"}, Answer{Known: true, Value: value, Tag: tag}}
	}
	remove := func(call, back int64) step { return step{call, back, Op{Kind: "delete"}, Answer{Known: back > 0}} }
	post := func(call, back int64, value string) step {
		return step{call, back, Op{Kind: "post", Value: value, Other: "other"}, Answer{Known: back > 0}}
	}
	cas := func(call, back int64, value string, match, tag uint64) step {
		return step{call, back, Op{Kind: "put", Value: value, Match: match}, Answer{Known: back > 0, Failed: tag == 0, Tag: tag}}
	}
	for _, tc := range []struct {
		name  string
		right bool
		steps []step
	}{
		{"a read after a write", true, []step{put(1, 2, "a", 1), get(3, 4, "a", 1)}},
		{"a stale read", false, []step{put(1, 2, "a", 1), put(3, 4, "b", 2), get(5, 6, "a", 1)}},
		{"a read beside a write", true, []step{put(1, 2, "a", 1), put(3, 6, "b", 2), get(4, 5, "a", 1)}},
		{"a read that goes back", false, []step{put(1, 2, "a", 1), put(3, 9, "b", 2), get(4, 5, "b", 2), get(6, 7, "a", 1)}},
		{"a lost write", false, []step{put(1, 2, "a", 1), get(3, 4, "null", 0)}},
		{"an unknown deletion explains it", true, []step{put(1, 2, "a", 1), remove(1, 0), get(3, 4, "null", 0)}},
		{"it cannot explain it twice", false, []step{
			put(1, 2, "a", 1), remove(1, 0), get(3, 4, "null", 0), put(5, 6, "b", 2), get(7, 8, "null", 0),
		}},
		{"an unknown write that was seen", true, []step{put(1, 2, "a", 1), put(3, 0, "b", 0), get(4, 5, "a", 1), get(6, 7, "b", 2)}},
		{"an unknown write that was seen and undone", false, []step{
			put(1, 2, "a", 1), put(3, 0, "b", 0), get(4, 5, "b", 2), get(6, 7, "a", 1),
		}},
		{"an unknown write that was applied twice", false, []step{
			put(1, 0, "a", 0), get(2, 3, "a", 1), put(4, 5, "b", 2), get(6, 7, "a", 3),
		}},
		{"an unknown write that nobody saw explains a failure", true, []step{
			put(1, 2, "a", 1), put(3, 0, "b", 0), cas(4, 5, "c", 1, 0), put(6, 7, "d", 3),
		}},
		{"nothing explains a failure", false, []step{put(1, 2, "a", 1), cas(4, 5, "c", 1, 0)}},
		{"a precondition that holds", true, []step{put(1, 2, "a", 1), cas(4, 5, "c", 1, 2), get(6, 7, "c", 2)}},
		{"a precondition that does not hold", false, []step{put(1, 2, "a", 1), put(3, 4, "b", 2), cas(5, 6, "c", 1, 3)}},
		{"a value whose precondition had failed", false, []step{
			put(1, 2, "a", 1), cas(3, 4, "b", 7, 0), cas(3, 4, "c", 1, 2), get(5, 6, "b", 3),
		}},
		{"tags that go back", false, []step{put(1, 2, "a", 2), put(3, 4, "b", 1)}},
		{"two values with one tag", false, []step{put(1, 2, "a", 1), put(3, 4, "b", 1)}},
		{"two keys with one tag", false, []step{
			put(1, 2, "a", 1), {3, 4, Op{Kind: "put", Key: "other", Value: "b"}, Answer{Known: true, Tag: 1}},
		}},
		{"a post", true, []step{put(1, 2, "a", 1), post(3, 4, "b"), get(5, 6, "b", 2)}},
		{"a post on one of two keys", false, []step{
			post(1, 0, "a"), get(2, 3, "a", 1), {4, 5, Op{Kind: "get", Key: "other"}, Answer{Known: true, Value: "null"}},
		}},
	} {
		h := New(func(string, ...any) {})
		for _, s := range tc.steps {
			h.Add(0, s.op, s.out, time.Duration(s.call), time.Duration(s.back))
		}
		h.Judge()
		if got := h.Violations.Load() == 0; got != tc.right {
			t.Errorf("%s: got right %v; want %v", tc.name, got, tc.right)
		}
	}
}
