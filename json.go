package main

import (
	"bytes"
	"errors"
	"net/http"

	"github.com/go-json-experiment/json/jsontext"
)

// This file reads JSON that clients send. Values stay as they were sent, byte for byte, but for insignificant white
// space.

// maxDepth is how many levels of objects and arrays a value may have: with more of them common clients fail on the
// whole listing that the value is in (jq 1.6 at 256).
const maxDepth = 128

// readJSON returns the body, one JSON value, without insignificant white space.
func readJSON(r *http.Request) ([]byte, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	return compactJSON(body, maxDepth)
}

// compactJSON takes the white space out of body, in place, and makes sure that what is left is one JSON value of UTF-8,
// without half a surrogate pair anywhere (RFC 7493), and not nested deeper than that.
func compactJSON(body []byte, depth int) ([]byte, error) {
	if nestsDeeper(body, depth) { // before anything recurses
		return nil, badRequest("a value has at most %d levels of objects and arrays, this one has more", maxDepth)
	}
	value := jsontext.Value(body)
	err := value.Compact(jsontext.AllowInvalidUTF8(false))
	if where := new(jsontext.SyntacticError); errors.As(err, &where) { // its own text may quote the body at any length
		return nil, badRequest("the body is not one JSON value: %v, at byte %d", where.Err, where.ByteOffset)
	}
	return value, err
}

// nestsDeeper says whether b, as far as it is JSON, has more than that many levels of objects and arrays.
func nestsDeeper(b []byte, depth int) bool {
	if bytes.Count(b, []byte("{"))+bytes.Count(b, []byte("[")) <= depth {
		return false // which spares most bodies the rest
	}
	d := jsontext.NewDecoder(bytes.NewBuffer(b), jsontext.AllowDuplicateNames(true))
	var err error
	for err == nil && d.StackDepth() <= depth {
		_, err = d.ReadToken()
	}
	return d.StackDepth() > depth
}
