package main

import (
	"bytes"
	"errors"
	"net/http"

	"github.com/go-json-experiment/json/jsontext"
)

// This file reads JSON that clients send. Values stay as they were sent, byte for byte, except for insignificant white
// space.

// maxDepth is how many levels of objects and arrays a value may have. Common clients cannot read deeper ones, and would
// fail on every listing that has such a value (jq 1.6 at 256).
const maxDepth = 128

// readJSON returns the body, one JSON value, without insignificant white space.
func readJSON(r *http.Request) ([]byte, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	return compactJSON(body, maxDepth)
}

// compactJSON removes the white space from body, in place. The result is one JSON value in UTF-8, with no half of a
// surrogate pair (RFC 7493), and with at most depth levels.
func compactJSON(body []byte, depth int) ([]byte, error) {
	if nestsDeeper(body, depth) { // checked first, because Compact recurses
		return nil, badRequest("a value has at most %d levels of objects and arrays, this one has more", maxDepth)
	}
	value := jsontext.Value(body)
	err := value.Compact(jsontext.AllowInvalidUTF8(false))
	if where := new(jsontext.SyntacticError); errors.As(err, &where) { // its own text may quote the body at any length
		return nil, badRequest("the body is not one JSON value: %v, at byte %d", where.Err, where.ByteOffset)
	}
	return value, err
}

// nestsDeeper reports whether b, as far as it is JSON, has more than depth levels of objects and arrays.
func nestsDeeper(b []byte, depth int) bool {
	if bytes.Count(b, []byte("{"))+bytes.Count(b, []byte("[")) <= depth {
		return false // most bodies
	}
	d := jsontext.NewDecoder(bytes.NewBuffer(b), jsontext.AllowDuplicateNames(true))
	var err error
	for err == nil && d.StackDepth() <= depth {
		_, err = d.ReadToken()
	}
	return d.StackDepth() > depth
}
