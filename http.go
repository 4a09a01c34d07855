package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

const (
	maxKeyBytes  = 1024
	defaultPage  = 1000 // keys of a listing
	maxPage      = 10000
	maxPageBytes = 1 << 20 // a page ends with the key that goes beyond
	keyPrefix    = "/key/"
)

// A listing costs memory and time that others need as well, so only some are at work at once, from before the work to
// the end of the answer. Clients that do not read what they have asked for are not waited for.
const (
	maxListings = 32
	listingWait = 4 * time.Second // for a turn
	pieceBytes  = 16 << 10        // of a large answer, which the client has to take
	pieceWait   = 2 * time.Second // in that time
)

// api is the HTTP API of a KV.
type api struct {
	cfg      *Config
	kv       *KV
	listings chan struct{} // holds a token for each listing at work
}

// routes returns what the server serves of the API.
func routes(cfg *Config, store *Store, machine *kvMachine) []route {
	a := &api{cfg, &KV{store, machine}, make(chan struct{}, maxListings)}
	return []route{
		{path: "/key", get: a.listKeys, post: a.postKeys, slack: backupSlack},
		{path: keyPrefix, get: a.getKey, put: a.putKey, delete: a.deleteKey},
		{path: "/txn", post: a.postTxn},
		{path: "/changes", get: newStreams(store, machine.feed).get},
		{path: "/backup", get: newBackups(cfg, store, a.kv.pairs).get},
	}
}

func (a *api) getKey(w http.ResponseWriter, r *http.Request) error {
	key, err := pathKey(r)
	if err != nil {
		return err
	}
	query, err := readQuery(r, "consistency")
	if err != nil {
		return err
	}
	consistency, err := consistency(a.cfg, query)
	if err != nil {
		return err
	}
	err = refuse(r, "a GET changes nothing; If-None-Match is the precondition for it", "If-Match", "If-Unmodified-Since")
	if err != nil {
		return err
	}
	known, err := tags(r, "If-None-Match", true)
	if err != nil {
		return err
	}
	markStale(w, a.kv.store, consistency)
	item, at, err := a.kv.getAt(r.Context(), key, consistency)
	if err != nil {
		return err
	}
	setRaftTag(w, uint64(at))
	value := item.Value
	if item.Tag == 0 {
		value = "null"
	} else {
		setTag(w, item.Tag)
		if known != nil && known.has(item.Tag) {
			w.WriteHeader(http.StatusNotModified)
			return nil
		}
	}
	body := make([]byte, 0, len(key)+min(len(value), pieceBytes)+8)
	body, _ = jsontext.AppendQuote(append(body, '{'), key) // keys are valid UTF-8
	body = append(body, ':')
	if len(value) <= pieceBytes {
		return writeBody(w, jsonType, append(append(body, value...), '}'))
	}
	announce(w, len(body)+len(value)+1)
	writePieces(w, body)
	writePieces(w, value) // which is not copied as a whole: many may ask for it
	writePieces(w, "}")
	return nil
}

func (a *api) putKey(w http.ResponseWriter, r *http.Request) error {
	key, condition, err := target(r)
	if err != nil {
		return err
	}
	if err := refuse(r, "a value is put as a whole", "Content-Range"); err != nil {
		return err
	}
	value, err := readJSON(r)
	if err != nil {
		return err
	}
	written, err := a.kv.Set(r.Context(), []Pair{{key, string(value)}}, condition)
	if err != nil {
		return conditionFailed(r, condition, err)
	}
	setTag(w, written.Tag)
	return wrote(w, written)
}

func (a *api) deleteKey(w http.ResponseWriter, r *http.Request) error {
	key, condition, err := target(r)
	if err != nil {
		return err
	}
	written, err := a.kv.Delete(r.Context(), key, condition)
	if err != nil {
		return conditionFailed(r, condition, err)
	}
	return wrote(w, written)
}

func (a *api) postKeys(w http.ResponseWriter, r *http.Request) error {
	if _, err := readQuery(r); err != nil {
		return err
	}
	if err := refuse(r, "preconditions are for one key: use PUT /key/<key>",
		"If-Match", "If-None-Match", "If-Unmodified-Since", "If-Modified-Since"); err != nil {
		return err
	}
	pairs, err := readObject(r, a.cfg.MaxBodyBytes)
	if err != nil {
		return err
	}
	if len(pairs) == 0 {
		return nil // nothing to write, so nothing for the log
	}
	written, err := a.kv.Set(r.Context(), pairs, Condition{})
	if err != nil {
		return err
	}
	return wrote(w, written)
}

func (a *api) listKeys(w http.ResponseWriter, r *http.Request) error {
	query, err := readQuery(r, "prefix", "after", "limit", "consistency")
	if err != nil {
		return err
	}
	if !query.Has("prefix") && !query.Has("after") && !query.Has("limit") {
		return badRequest("which key? GET /key/<key> reads one, GET /key?prefix=<prefix> lists those that begin so")
	}
	if err := refuse(r, "a listing has no tag", "If-Match", "If-None-Match", "If-Unmodified-Since"); err != nil {
		return err
	}
	consistency, err := consistency(a.cfg, query)
	if err != nil {
		return err
	}
	limit := defaultPage
	if asked := query.Get("limit"); query.Has("limit") {
		if limit, err = strconv.Atoi(asked); err != nil || limit < 1 || limit > maxPage {
			return badRequest("limit: %q is not a number from 1 to %d", asked, maxPage)
		}
	}
	markStale(w, a.kv.store, consistency)
	// Before its turn, so that one that waits for a leader does not hold up those that need none.
	if err := a.kv.store.Read(r.Context(), consistency, func() {}); err != nil {
		return err
	}
	turn, cancel := context.WithTimeout(r.Context(), listingWait)
	defer cancel()
	select {
	case a.listings <- struct{}{}:
		defer func() { <-a.listings }()
	case <-turn.Done():
		return &httpError{http.StatusServiceUnavailable, "too many listings are under way"}
	}
	body, last, more := []byte{'{'}, "", false
	at := a.kv.List(query.Get("prefix"), query.Get("after"), func(key string, item Item) bool {
		if more = limit == 0 || len(body) > maxPageBytes; more {
			return false
		}
		if len(body) > 1 {
			body = append(body, ',')
		}
		body, _ = jsontext.AppendQuote(body, key)
		body = append(append(body, ':'), item.Value...)
		last = key
		limit--
		return true
	})
	setRaftTag(w, uint64(at))
	if more {
		query.Set("after", last)
		w.Header().Set("Link", "<?"+query.Encode()+`>; rel="next"`)
	}
	body = append(body, '}')
	announce(w, len(body))
	writePieces(w, body)
	return nil
}

// announce sets the headers of a JSON answer of so many bytes.
func announce(w http.ResponseWriter, size int) {
	h := w.Header()
	h["Content-Type"] = []string{jsonType}
	h["Content-Length"] = []string{strconv.Itoa(size)}
}

// writePieces writes a part of a large answer piece by piece. A client that does not take one in time gets no more of it, and
// since it is less than what was announced, net/http closes the connection.
func writePieces[T []byte | string](w http.ResponseWriter, part T) {
	control := http.NewResponseController(w)
	for len(part) > 0 {
		n := min(len(part), pieceBytes)
		_ = control.SetWriteDeadline(time.Now().Add(pieceWait)) // what is no connection has none
		if _, err := w.Write([]byte(part[:n])); err != nil {
			return
		}
		part = part[n:]
	}
}

// target returns the key that a write is for, and its preconditions.
func target(r *http.Request) (key string, c Condition, err error) {
	if key, err = pathKey(r); err == nil {
		_, err = readQuery(r)
	}
	if err == nil {
		c, err = condition(r)
	}
	return key, c, err
}

// pathKey returns the key that a path names: all that follows /key/.
func pathKey(r *http.Request) (string, error) {
	key, err := pathRest(r, keyPrefix)
	if err != nil {
		return "", err
	}
	if err := checkKey(key); err != nil {
		return "", badRequest("%v", err)
	}
	return key, nil
}

func checkKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("a key has 1 to %d bytes, this one is empty", maxKeyBytes)
	case len(key) > maxKeyBytes:
		return fmt.Errorf("a key has at most %d bytes, this one has %d", maxKeyBytes, len(key))
	case !utf8.ValidString(key):
		return errors.New("a key must be valid UTF-8")
	}
	return nil
}

// condition returns the preconditions of a write to one key.
func condition(r *http.Request) (c Condition, err error) {
	err = refuse(r, "keys have no time of modification; use If-Match", "If-Unmodified-Since", "If-Modified-Since")
	if err != nil {
		return c, err
	}
	if c.Match, err = tags(r, "If-Match", false); err != nil {
		return c, err
	}
	c.NoneMatch, err = tags(r, "If-None-Match", true)
	return c, err
}

// conditionFailed gives ErrCondition its status; other errors it leaves to the server.
func conditionFailed(r *http.Request, c Condition, err error) error {
	if !errors.Is(err, ErrCondition) {
		return err
	}
	detail := ErrCondition.Error()
	quotes := strings.Count(strings.Join(r.Header["If-Match"], ","), `"`)
	if c.Match != nil && quotes > 2*len(c.Match.List) {
		detail += "; If-Match has a tag that never matches: one that is weak (W/) or that this service does not give"
	}
	return &httpError{http.StatusPreconditionFailed, detail}
}

// tags reads a header that lists entity tags (RFC 9110, 13.1), nil when there is none. A weak tag stands for the same
// as a strong one where weak says so, and otherwise for nothing, like any tag that this service never gave out.
func tags(r *http.Request, header string, weak bool) (*Tags, error) {
	values, present := r.Header[header]
	if !present {
		return nil, nil // no condition is not an error
	}
	rest := strings.Trim(strings.Join(values, ","), " \t,")
	if rest == "*" {
		return &Tags{Any: true}, nil
	}
	set, count := &Tags{}, 0
	for rest != "" {
		isWeak := strings.HasPrefix(rest, "W/")
		opaque, after, ok := cutTag(strings.TrimPrefix(rest, "W/"))
		if !ok {
			return nil, badRequest(`%s: %q is neither * nor a list of entity tags such as "17"`, header, strings.Join(values, ","))
		}
		count++
		if n, err := strconv.ParseUint(opaque, 10, 64); err == nil && strconv.FormatUint(n, 10) == opaque && (weak || !isWeak) {
			set.List = append(set.List, Tag(n))
		}
		rest = strings.TrimLeft(after, " \t,")
		if rest != "" && !strings.Contains(after[:len(after)-len(rest)], ",") {
			return nil, badRequest("%s: entity tags must be separated by commas", header)
		}
	}
	if count == 0 {
		return nil, badRequest("%s is empty", header)
	}
	return set, nil
}

// cutTag takes a quoted tag off the front of s.
func cutTag(s string) (opaque, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		return "", s, false
	}
	opaque, rest, ok = strings.Cut(s[1:], `"`)
	if strings.ContainsFunc(opaque, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return "", s, false
	}
	return opaque, rest, ok
}

// setTag sets the ETag, under the spelling that net/http would have to find for it each time.
func setTag(w http.ResponseWriter, tag Tag) {
	w.Header()["Etag"] = []string{`"` + strconv.FormatUint(uint64(tag), 10) + `"`}
}

// wrote answers a successful write: 200 and no body.
func wrote(w http.ResponseWriter, written Written) error {
	w.Header()["Raft-Index"] = []string{strconv.FormatUint(written.Index, 10)}
	return nil
}

// readObject returns the members of the body, a JSON object in which each is named once. The body may be larger than limit, as far as
// the server lets it, if it has one member alone, whose value is not.
func readObject(r *http.Request, limit int64) ([]Pair, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	size := int64(len(body))
	object, err := compactJSON(body, maxDepth+1) // the object itself is no level of its values
	if err != nil {
		return nil, err
	}
	pairs, err := members(object)
	if err == nil && size > limit && (len(pairs) != 1 || int64(len(pairs[0].Value)) > limit) {
		return nil, errTooLarge(limit)
	}
	return pairs, err
}

// members returns the members of an object, given as one JSON value.
func members(object []byte) ([]Pair, error) {
	if object[0] != '{' {
		return nil, badRequest("the body must be a JSON object of keys and values")
	}
	var pairs []Pair
	d := jsontext.NewDecoder(bytes.NewBuffer(object), jsontext.AllowDuplicateNames(true))
	_, _ = d.ReadToken() // the bracket; nothing here can fail, for the object is valid
	for d.PeekKind() == jsontext.KindString {
		name, _ := d.ReadToken()
		key := name.String()
		value, _ := d.ReadValue()
		if err := checkKey(key); err != nil {
			return nil, badRequest("%v", err)
		}
		pairs = append(pairs, Pair{key, string(value)})
	}
	slices.SortFunc(pairs, func(a, b Pair) int { return strings.Compare(a.Key, b.Key) })
	for i := range pairs[min(1, len(pairs)):] {
		if pairs[i].Key == pairs[i+1].Key {
			return nil, badRequest("the key %.40q is given more than once; which value is meant cannot be known", pairs[i].Key)
		}
	}
	return pairs, nil
}
