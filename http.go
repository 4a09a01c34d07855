package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/tidwall/btree"
)

// This file is the HTTP API of the key-value service. To make the service your own, replace it and fsm.go. Handlers
// reach the state machine with readState and applyCommand, and return their errors for the server to answer.

const (
	maxKeyBytes  = 1024
	defaultPage  = 1000 // keys of a listing
	maxPage      = 10000
	maxPageBytes = 1 << 20 // a page ends with the key that exceeds it
	keyPrefix    = "/key/"
)

// A listing costs memory and time, so only some are under way at once, from before the work to the end of the answer.
const (
	maxListings = 32
	listingWait = 4 * time.Second // for another to end; then the answer is 503
)

// api has the handlers.
type api struct {
	store    *Store
	machine  *kvMachine
	listings chan struct{} // a semaphore: one element for each listing under way
	backups  chan struct{} // likewise
}

// routes returns what this service answers. The server adds the paths for probes and operators.
func routes(store *Store, machine *kvMachine) []route {
	a := &api{store, machine, make(chan struct{}, maxListings), make(chan struct{}, maxBackups)}
	return []route{
		{path: "/key", get: a.listKeys, post: a.postKeys, slack: backupSlack},
		{path: keyPrefix, get: a.getKey, put: a.putKey, delete: a.deleteKey},
		{path: "/txn", post: a.postTxn},
		{path: "/changes", get: newStreams(store, machine.feed).get},
		{path: "/backup", get: a.getBackup},
	}
}

func (a *api) getKey(w http.ResponseWriter, r *http.Request) error {
	key, err := pathKey(r)
	if err != nil {
		return err
	}
	const why = "a GET changes nothing; If-None-Match is the precondition for it"
	query, err := readParameters(r, why, []string{"If-Match", "If-Unmodified-Since"}, "consistency")
	if err != nil {
		return err
	}
	cached, err := readTags(r, "If-None-Match", true) // of what the client has
	if err != nil {
		return err
	}
	var item Item
	var last Tag
	err = readState(w, r, a.store, query, func() {
		item, _ = a.machine.items.Get(key)
		last = a.machine.lastTag
	})
	if err != nil {
		return err
	}
	setRaftTag(w, last)
	if item.Tag == 0 {
		return writePair(w, key, "null")
	}
	setTag(w, item.Tag)
	if cached != nil && cached.has(item.Tag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writePair(w, key, item.Value)
}

func (a *api) putKey(w http.ResponseWriter, r *http.Request) error {
	key, condition, err := readTarget(r)
	if err != nil {
		return err
	}
	if err := rejectHeaders(r, "a value is put as a whole", "Content-Range"); err != nil {
		return err
	}
	value, err := readJSON(r)
	if err != nil {
		return err
	}
	tag, err := a.apply(w, r, command{op: opSet, condition: condition, pairs: []Pair{{key, string(value)}}})
	if err != nil {
		return err
	}
	setTag(w, tag)
	return nil
}

func (a *api) deleteKey(w http.ResponseWriter, r *http.Request) error {
	key, condition, err := readTarget(r)
	if err != nil {
		return err
	}
	_, err = a.apply(w, r, command{op: opDelete, condition: condition, pairs: []Pair{{Key: key}}})
	return err
}

func (a *api) postKeys(w http.ResponseWriter, r *http.Request) error {
	if _, err := readParameters(r, "preconditions are for one key: use PUT /key/<key>", preconditions); err != nil {
		return err
	}
	pairs, size, err := readObject(r, maxDepth)
	if err != nil {
		return err
	}
	limit := a.store.cfg.MaxBodyBytes
	if size > limit && (len(pairs) != 1 || int64(len(pairs[0].Value)) > limit) { // see backupSlack
		return errTooLarge(limit)
	}
	if len(pairs) == 0 { // {} changes nothing, and needs no log entry
		return nil
	}
	_, err = a.apply(w, r, command{op: opSet, pairs: pairs})
	return err
}

// apply has c executed and returns its tag. If its condition was not met, the error is a 412.
func (a *api) apply(w http.ResponseWriter, r *http.Request, c command) (Tag, error) {
	result, err := applyCommand(w, r, a.store, c.encode())
	if err != nil {
		return 0, err
	}
	tag, err := decodeResult(result)
	if err != nil || tag != 0 {
		return tag, err
	}
	detail := "the precondition does not hold"
	quotes := strings.Count(strings.Join(r.Header["If-Match"], ","), `"`)
	if match := c.condition.Match; match != nil && quotes > 2*len(match.List) {
		detail += "; If-Match has a tag that never matches: one that is weak (W/) or that this service does not give"
	}
	return 0, refused(http.StatusPreconditionFailed, "%s", detail)
}

// listing is a request for one page of a listing.
type listing struct {
	query         url.Values
	prefix, after string
	limit         int // keys
}

func (a *api) listKeys(w http.ResponseWriter, r *http.Request) error {
	l, err := readListing(r)
	if err != nil {
		return err
	}
	// The wait for a leader comes before the wait for other listings: a listing that needs no leader must not wait for
	// one.
	if err := readState(w, r, a.store, l.query, func() {}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), listingWait)
	defer cancel()
	select {
	case a.listings <- struct{}{}:
		defer func() { <-a.listings }()
	case <-ctx.Done():
		return statusError(http.StatusServiceUnavailable, "too many listings are under way")
	}
	var state *kvMachine
	a.store.Capture(func() { state = a.machine.clone() })
	setRaftTag(w, state.lastTag)
	page, next := l.page(state.items)
	if next != "" {
		w.Header().Set("Link", next)
	}
	return writeLarge(w, jsonType, len(page), bytes.NewReader(page))
}

func readListing(r *http.Request) (l listing, err error) {
	l.query, err = readParameters(r, "a listing has no tag", readPreconditions, "prefix", "after", "limit", "consistency")
	if err != nil {
		return l, err
	}
	if !l.query.Has("prefix") && !l.query.Has("after") && !l.query.Has("limit") {
		return l, badRequest("which key? GET /key/<key> reads one, GET /key?prefix=<prefix> lists those that begin so")
	}
	l.prefix, l.after, l.limit = l.query.Get("prefix"), l.query.Get("after"), defaultPage
	if asked := l.query.Get("limit"); l.query.Has("limit") {
		if l.limit, err = strconv.Atoi(asked); err != nil || l.limit < 1 || l.limit > maxPage {
			return l, badRequest("limit: %q is not a number from 1 to %d", asked, maxPage)
		}
	}
	return l, nil
}

// page returns a JSON object of the keys, in byte order, and the header Link for the next page, "" for none.
func (l listing) page(items *btree.Map[string, Item]) (page []byte, next string) {
	page, last, more := []byte{'{'}, "", false
	items.Ascend(max(l.prefix, l.after), func(key string, item Item) bool {
		if key == l.after {
			return true
		}
		if !strings.HasPrefix(key, l.prefix) {
			return false
		}
		if more = l.limit == 0 || len(page) > maxPageBytes; more {
			return false
		}
		if len(page) > 1 {
			page = append(page, ',')
		}
		page, _ = jsontext.AppendQuote(page, key) // keys are valid UTF-8
		page = append(append(page, ':'), item.Value...)
		last = key
		l.limit--
		return true
	})
	if more {
		l.query.Set("after", last)
		next = "<?" + l.query.Encode() + `>; rel="next"`
	}
	return append(page, '}'), next
}

// writePair answers with {"<key>":<value>}.
func writePair(w http.ResponseWriter, key, value string) error {
	body := make([]byte, 0, len(key)+min(len(value), pieceBytes)+8)
	body, _ = jsontext.AppendQuote(append(body, '{'), key) // keys are valid UTF-8
	body = append(body, ':')
	if len(value) <= pieceBytes {
		return writeBody(w, jsonType, append(append(body, value...), '}'))
	}
	parts := io.MultiReader(bytes.NewReader(body), strings.NewReader(value), strings.NewReader("}"))
	return writeLarge(w, jsonType, len(body)+len(value)+1, parts) // many may ask for a large value, so it is not copied
}

// readTarget returns the key that a write is for, and its preconditions.
func readTarget(r *http.Request) (key string, c Condition, err error) {
	if key, err = pathKey(r); err != nil {
		return "", c, err
	}
	const why = "keys have no time of modification; use If-Match"
	if _, err = readParameters(r, why, []string{"If-Unmodified-Since", "If-Modified-Since"}); err != nil {
		return "", c, err
	}
	if c.Match, err = readTags(r, "If-Match", false); err != nil {
		return "", c, err
	}
	c.NoneMatch, err = readTags(r, "If-None-Match", true)
	return key, c, err
}

// The preconditions of HTTP (RFC 9110, 13.1): of all requests, and of reads, which If-Modified-Since does not harm.
var (
	preconditions     = []string{"If-Match", "If-None-Match", "If-Unmodified-Since", "If-Modified-Since"}
	readPreconditions = preconditions[:3]
)

// readParameters returns the query, as readQuery does, of a request that must not have some headers; why says why.
func readParameters(r *http.Request, why string, headers []string, names ...string) (url.Values, error) {
	if err := rejectHeaders(r, why, headers...); err != nil {
		return nil, err
	}
	return readQuery(r, names...)
}

// pathKey returns the key that a path names: all that follows /key/.
func pathKey(r *http.Request) (string, error) {
	key, err := pathRest(r, keyPrefix)
	if err != nil {
		return "", err
	}
	return key, checkKey(key)
}

func checkKey(key string) error {
	switch {
	case key == "":
		return badRequest("a key has 1 to %d bytes, this one is empty", maxKeyBytes)
	case len(key) > maxKeyBytes:
		return badRequest("a key has at most %d bytes, this one has %d", maxKeyBytes, len(key))
	case !utf8.ValidString(key):
		return badRequest("a key must be valid UTF-8")
	}
	return nil
}

// readTags reads a header that lists entity tags (RFC 9110, 13.1). It returns nil if there is no such header. Tags that
// this service never gave out are left out, since no key has them. So are weak ones, unless weak says that they match.
func readTags(r *http.Request, header string, weak bool) (*Tags, error) {
	values, present := r.Header[header]
	if !present {
		return nil, nil // no condition is not an error
	}
	rest := strings.Trim(strings.Join(values, ","), " \t,")
	if rest == "*" {
		return &Tags{Any: true}, nil
	}
	if rest == "" {
		return nil, badRequest("%s is empty", header)
	}
	set := &Tags{}
	for rest != "" {
		tag, isWeak, after, ok := cutTag(rest)
		if !ok {
			return nil, badRequest(`%s: %q is neither * nor a list of entity tags such as "17"`,
				header, strings.Join(values, ","))
		}
		if tag != 0 && (weak || !isWeak) {
			set.List = append(set.List, tag)
		}
		rest = strings.TrimLeft(after, " \t,")
		if rest != "" && !strings.Contains(after[:len(after)-len(rest)], ",") {
			return nil, badRequest("%s: entity tags must be separated by commas", header)
		}
	}
	return set, nil
}

// cutTag cuts an entity tag off the front of s. It is 0, the tag of no key, if this service never gives such a tag.
func cutTag(s string) (tag Tag, weak bool, rest string, ok bool) {
	s, weak = strings.CutPrefix(s, "W/")
	s, opened := strings.CutPrefix(s, `"`)
	opaque, rest, closed := strings.Cut(s, `"`)
	control := strings.ContainsFunc(opaque, func(c rune) bool { return c <= ' ' || c == 0x7f })
	if n, err := strconv.ParseUint(opaque, 10, 64); err == nil && strconv.FormatUint(n, 10) == opaque {
		tag = Tag(n)
	}
	return tag, weak, rest, opened && closed && !control
}

// setTag sets ETag, by its canonical name, which saves http.Header's look at it.
func setTag(w http.ResponseWriter, tag Tag) {
	w.Header()["Etag"] = []string{`"` + strconv.FormatUint(uint64(tag), 10) + `"`}
}

// setRaftTag says which was the last tag in the state that the answer is from. Clients follow the changes from there.
func setRaftTag(w http.ResponseWriter, last Tag) {
	w.Header()["Raft-Tag"] = []string{strconv.FormatUint(uint64(last), 10)}
}

// readObject returns the members of the body, and its size. It must be a JSON object with no member twice, whose values
// have at most depth levels.
func readObject(r *http.Request, depth int) (pairs []Pair, size int64, err error) {
	body, err := readBody(r)
	if err != nil {
		return nil, 0, err
	}
	object, err := compactJSON(body, depth+1) // the object itself is no level of its values
	if err != nil {
		return nil, 0, err
	}
	pairs, err = members("the body", object)
	return pairs, int64(len(body)), err
}

// members returns the members of an object, given as one valid JSON value, in the order of their keys.
func members[T string | []byte](what string, object T) ([]Pair, error) {
	if object[0] != '{' {
		return nil, badRequest("%s must be a JSON object", what)
	}
	var pairs []Pair
	d := jsontext.NewDecoder(bytes.NewBuffer([]byte(object)), jsontext.AllowDuplicateNames(true))
	_, _ = d.ReadToken() // the bracket; nothing here can fail, for the object is valid
	for d.PeekKind() == jsontext.KindString {
		name, _ := d.ReadToken()
		key := name.String()
		value, _ := d.ReadValue()
		if err := checkKey(key); err != nil {
			return nil, err
		}
		pairs = append(pairs, Pair{key, string(value)})
	}
	if key, found := keyTwice(pairs); found {
		return nil, badRequest("the key %.40q is given more than once; which value is meant cannot be known", key)
	}
	return pairs, nil
}

// keyTwice returns the first key that two of the pairs have. It sorts them by their keys.
func keyTwice(pairs []Pair) (key string, found bool) {
	slices.SortFunc(pairs, func(a, b Pair) int { return strings.Compare(a.Key, b.Key) })
	for i := 1; i < len(pairs); i++ {
		if pairs[i-1].Key == pairs[i].Key {
			return pairs[i].Key, true
		}
	}
	return "", false
}
