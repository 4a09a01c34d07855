package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	maxKeyBytes  = 1024
	defaultPage  = 1000 // keys of a listing
	maxPage      = 10000
	maxPageBytes = 4 << 20 // a page ends with the key that goes beyond
	keyPrefix    = "/key/"
)

// api is the HTTP API of a KV.
type api struct {
	cfg *Config
	kv  *KV
}

// routes returns what the server serves of the API.
func routes(cfg *Config, store *Store, machine *kvMachine) []route {
	a := &api{cfg, &KV{store, machine}}
	return []route{
		{path: "/key", get: a.listKeys, post: a.postKeys},
		{path: keyPrefix, get: a.getKey, put: a.putKey, delete: a.deleteKey},
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
	if err := refuse(r, "If-Match", "a GET changes nothing; If-None-Match is the precondition for it"); err != nil {
		return err
	}
	known, err := tags(r, "If-None-Match", true)
	if err != nil {
		return err
	}
	markStale(w, a.kv.store, consistency)
	item, err := a.kv.Get(r.Context(), key, consistency)
	if err != nil {
		return err
	}
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
	body := make([]byte, 0, len(key)+len(value)+8)
	body = append(appendJSONString(append(body, '{'), key), ':')
	body = append(append(body, value...), '}')
	return writeBody(w, jsonType, body)
}

func (a *api) putKey(w http.ResponseWriter, r *http.Request) error {
	key, condition, err := target(r)
	if err != nil {
		return err
	}
	value, err := readJSON(r)
	if err != nil {
		return err
	}
	written, err := a.kv.Set(r.Context(), []Pair{{key, string(value)}}, condition)
	if err != nil {
		return conditionFailed(err)
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
		return conditionFailed(err)
	}
	return wrote(w, written)
}

func (a *api) postKeys(w http.ResponseWriter, r *http.Request) error {
	for _, name := range []string{"If-Match", "If-None-Match", "If-Unmodified-Since"} {
		if err := refuse(r, name, "preconditions are for one key: use PUT /key/<key>"); err != nil {
			return err
		}
	}
	object, err := readJSON(r)
	if err != nil {
		return err
	}
	pairs, err := splitObject(string(object))
	if err != nil {
		return badRequest("%v", err)
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
	for _, name := range []string{"If-Match", "If-None-Match"} {
		if err := refuse(r, name, "a listing has no tag"); err != nil {
			return err
		}
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
	body, last, more := []byte{'{'}, "", false
	err = a.kv.List(r.Context(), query.Get("prefix"), query.Get("after"), consistency, func(key string, item Item) bool {
		if more = limit == 0 || len(body) > maxPageBytes; more {
			return false
		}
		if len(body) > 1 {
			body = append(body, ',')
		}
		body = append(append(appendJSONString(body, key), ':'), item.Value...)
		last = key
		limit--
		return true
	})
	if err != nil {
		return err
	}
	if more {
		query.Set("after", last)
		w.Header().Set("Link", `</key?`+query.Encode()+`>; rel="next"`)
	}
	return writeBody(w, jsonType, append(body, '}'))
}

// target returns the key that a write is for, and its preconditions.
func target(r *http.Request) (key string, c Condition, err error) {
	if key, err = pathKey(r); err == nil {
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
	if err := refuse(r, "If-Unmodified-Since", "keys have no time of modification; use If-Match"); err != nil {
		return c, err
	}
	if c.Match, err = tags(r, "If-Match", false); err != nil {
		return c, err
	}
	c.NoneMatch, err = tags(r, "If-None-Match", true)
	return c, err
}

// conditionFailed gives ErrCondition its status; other errors it leaves to the server.
func conditionFailed(err error) error {
	if errors.Is(err, ErrCondition) {
		return &httpError{http.StatusPreconditionFailed, ErrCondition.Error()}
	}
	return err
}

func refuse(r *http.Request, header, why string) error {
	if _, present := r.Header[header]; present {
		return badRequest("%s cannot be used here: %s", header, why)
	}
	return nil
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

// appendJSONString appends s as a JSON string.
func appendJSONString(b []byte, s string) []byte {
	for i := range len(s) {
		if s[i] < ' ' || s[i] == '"' || s[i] == '\\' {
			var quoted bytes.Buffer
			enc := json.NewEncoder(&quoted)
			enc.SetEscapeHTML(false)
			_ = enc.Encode(s) // a string is always encoded
			return append(b, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// splitObject returns the members of an object, given as valid JSON without insignificant white space. encoding/json
// would lose duplicate members, the digits of numbers and the way strings are escaped. What it returns shares the memory of
// what it is given, and takes little beside it: an object may have a million members.
func splitObject(object string) ([]Pair, error) {
	if object[0] != '{' {
		return nil, errors.New("the body must be a JSON object of keys and values")
	}
	var pairs []Pair
	for rest := object[1:]; rest[0] != '}'; rest = strings.TrimPrefix(rest, ",") {
		n := valueLen(rest)
		key, err := unquote(rest[:n])
		if err == nil {
			err = checkKey(key)
		}
		if err != nil {
			return nil, err
		}
		rest = rest[n+1:] // and the colon
		n = valueLen(rest)
		pairs = append(pairs, Pair{key, rest[:n]})
		rest = rest[n:]
	}
	keys := make([]string, len(pairs))
	for i, p := range pairs {
		keys[i] = p.Key
	}
	slices.Sort(keys)
	for i := range keys[min(1, len(keys)):] {
		if keys[i] == keys[i+1] {
			return nil, errors.New("a key is given more than once; which value is meant cannot be known")
		}
	}
	return pairs, nil
}

// valueLen returns the length of the JSON value at the beginning of s.
func valueLen(s string) int {
	depth, quoted := 0, false
	for i := 0; ; i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
			continue
		case c == '"':
			quoted = !quoted
		case quoted:
			continue
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			depth--
		}
		// A value ends with its closing quote or bracket; a number or name ends before what follows it.
		if depth == 0 && !quoted {
			switch {
			case s[i] == '"' || s[i] == '}' || s[i] == ']':
				return i + 1
			case i+1 == len(s) || strings.IndexByte(",:}]", s[i+1]) >= 0:
				return i + 1
			}
		}
	}
}

// unquote decodes a JSON string. encoding/json would replace a lone surrogate, and so make one key of many.
func unquote(quoted string) (string, error) {
	if strings.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : len(quoted)-1], nil
	}
	for i := 0; i < len(quoted); i++ {
		if quoted[i] != '\\' {
			continue
		}
		i++
		if quoted[i] != 'u' {
			continue
		}
		high := surrogate(quoted[i+1:])
		i += 4
		if high == 0 {
			continue
		}
		if high == 1 && strings.HasPrefix(quoted[i+1:], `\u`) && surrogate(quoted[i+3:]) == 2 {
			i += 6
			continue
		}
		return "", errors.New("a key holds half of a surrogate pair, so it is no text")
	}
	var s string
	err := json.Unmarshal([]byte(quoted), &s)
	return s, err
}

// surrogate says what four hexadecimal digits stand for: the first half of a surrogate pair (1), the second (2), or
// neither (0).
func surrogate(hex string) int {
	n, err := strconv.ParseUint(hex[:4], 16, 16)
	switch {
	case err != nil || n < 0xd800 || n > 0xdfff:
		return 0
	case n < 0xdc00:
		return 1
	default:
		return 2
	}
}
