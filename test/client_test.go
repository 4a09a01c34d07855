package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"raftstarter/test/history"
	"strconv"
	"strings"
	"sync"
	"time"
)

// recorder makes operations through HTTP and keeps their history.
type recorder struct{ *history.History }

// errMoveOn says that a client had better try another node, after a rest.
var errMoveOn = errors.New("not served")

// do makes an operation through the node at base and writes it down, unless it certainly did not happen.
func (h *recorder) do(web *http.Client, base string, client int, op history.Op) (history.Answer, error) {
	method, path, body := http.MethodGet, "/key/"+op.Key, op.Value
	switch op.Kind {
	case "put":
		method = http.MethodPut
	case "post":
		method, path, body = http.MethodPost, "/key", fmt.Sprintf(`{%q:%s,%q:%s}`, op.Key, op.Value, op.Other, op.Value)
	case "delete":
		method = http.MethodDelete
	case "stale":
		path += "?consistency=stale"
	}
	req, err := http.NewRequestWithContext(context.Background(), method, base+path, strings.NewReader(body))
	if err != nil {
		return history.Answer{}, err
	}
	for name, tag := range map[string]uint64{"If-Match": op.Match, "If-None-Match": op.NoneMatch} {
		if tag == history.AnyTag {
			req.Header.Set(name, "*")
		} else if tag != 0 {
			req.Header.Set(name, strconv.Quote(strconv.FormatUint(tag, 10)))
		}
	}
	call := h.Now()
	a, err := roundTrip(web, req)
	back := h.Now()
	if back-call > 15*time.Second+slack {
		h.Violation("%+v through %s took %v; want an answer within 15s", op, base, back-call)
	}
	out, read := history.Answer{}, op.Kind == "get" || op.Kind == "stale"
	switch unsent := new(net.OpError); {
	case errors.As(err, &unsent) && unsent.Op == "dial":
		return out, errMoveOn
	case err != nil:
		err = errMoveOn
	case a.status == http.StatusOK:
		out.Known = true
		if read {
			out.Value = strings.TrimSuffix(strings.TrimPrefix(a.body, `{"`+op.Key+`":`), "}")
		}
		if tag, err := strconv.Unquote(a.header.Get("ETag")); err == nil {
			out.Tag, _ = strconv.ParseUint(tag, 10, 64)
		}
	case a.status == http.StatusPreconditionFailed && (op.Match != 0 || op.NoneMatch != 0):
		out.Known, out.Failed = true, true
	case a.status == http.StatusServiceUnavailable && (read || strings.Contains(a.body, `"outcome":"not-applied"`)):
		h.Refuse(op.Value, "it was answered "+a.body)
		return out, errMoveOn
	case a.status == http.StatusGatewayTimeout && !read && strings.Contains(a.body, `"outcome":"unknown"`):
		err = errMoveOn
	default:
		h.Violation("got %d %s for %+v through %s; want none of that", a.status, a.body, op, base)
		err = errMoveOn
	}
	h.Add(client, op, out, call, back)
	return out, err
}

// roundTrip makes a request and reads the answer to its end.
func roundTrip(web *http.Client, req *http.Request) (answerTo, error) {
	response, err := web.Do(req)
	if err != nil {
		return answerTo{}, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	return answerTo{response.StatusCode, response.Header, string(data)}, err
}

// list reads all keys through the node at base, page by page, and returns the pages. A page of linearizable reads goes
// into the history.
func (h *recorder) list(web *http.Client, base, consistency string) (string, error) {
	keys := h.Keys()
	var pages strings.Builder
	for after, more := "", true; more; {
		path := "/key?limit=10000&consistency=" + consistency + "&after=" + url.QueryEscape(after)
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, base+path, nil)
		if err != nil {
			return "", err
		}
		call := h.Now()
		a, err := roundTrip(web, req)
		back := h.Now()
		page := make(map[string]json.RawMessage)
		if err == nil && a.status == http.StatusOK {
			err = json.Unmarshal([]byte(a.body), &page)
		}
		if err != nil || a.status != http.StatusOK {
			return "", fmt.Errorf("%d %s: %w", a.status, path, err)
		}
		pages.WriteString(a.body)
		more = a.header.Get("Link") != ""
		last := ""
		for key := range page {
			last = max(last, key)
		}
		for ; len(keys) > 0 && (!more || keys[0] <= last); keys = keys[1:] {
			value := "null"
			if v, there := page[keys[0]]; there {
				value = string(v)
			}
			if consistency == "linearizable" && keys[0] > after {
				h.Add(-1, history.Op{Kind: "get", Key: keys[0]}, history.Answer{Known: true, Value: value}, call, back)
			}
		}
		after = last
	}
	return pages.String(), nil
}

// team is some clients that work on the same two keys. They move on to fresh keys after some operations, and as soon as
// there are a few of unknown outcome, so that the history of each key is quickly judged.
type team struct {
	name string

	mu      sync.Mutex // guards what follows
	round   int
	ops     int
	unknown int
	tags    map[string]uint64 // last heard of, by key
}

const (
	opsPerRound     = 100
	unknownPerRound = 2
)

// fresh moves the team to fresh keys.
func (t *team) fresh() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.round++
	t.ops, t.unknown, t.tags = 0, 0, make(map[string]uint64)
}

// key returns one of the two keys.
func (t *team) key(i int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.keyOf(i)
}

func (t *team) keyOf(i int) string { return fmt.Sprintf("%s-%d-%c", t.name, t.round, "ab"[i%2]) }

// next returns the next operation, which a value is made for.
func (t *team) next(random *rand.Rand, value string) history.Op {
	t.mu.Lock()
	due := t.ops == opsPerRound || t.unknown >= unknownPerRound
	t.mu.Unlock()
	if due {
		t.fresh()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ops++
	i := random.IntN(2)
	op := history.Op{Key: t.keyOf(i)}
	switch n := random.IntN(100); {
	case n < 40:
		op.Kind = "put"
	case n < 45:
		op.Kind, op.Other = "post", t.keyOf(1-i)
	case n < 55:
		op.Kind = "delete"
	case n < 95:
		op.Kind = "get"
	default:
		op.Kind = "stale"
	}
	if op.Kind == "put" || op.Kind == "post" {
		op.Value = value
	}
	if tag := t.tags[op.Key]; op.Kind == "put" || op.Kind == "delete" {
		switch random.IntN(8) {
		case 0, 1, 2:
			op.Match = tag
		case 3:
			op.NoneMatch = tag
		case 4:
			op.NoneMatch = history.AnyTag
		case 5:
			op.Match = history.AnyTag
		}
	}
	return op
}

// learn hears what came of an operation.
func (t *team) learn(op history.Op, out history.Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if out.Known && out.Tag != 0 && op.Kind != "stale" {
		t.tags[op.Key] = max(out.Tag, t.tags[op.Key])
	} else if !out.Known && op.Kind != "get" && op.Kind != "stale" {
		t.unknown++
	}
}
