package main

import (
	"cmp"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// readQuery returns the query, in which no parameter may stand but those named, and each once: to ignore what a client
// asks for would be to do something else.
func readQuery(r *http.Request, names ...string) (url.Values, error) {
	if r.URL.RawQuery == "" {
		return nil, nil
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("the query cannot be read: %v", err)
	}
	for name, values := range query {
		switch {
		case !slices.Contains(names, name):
			known := cmp.Or(strings.Join(names, ", "), "none")
			return nil, badRequest("the query parameter %.40q is not known; this request knows %s", name, known)
		case len(values) > 1:
			return nil, badRequest("%s is given %d times; give it once", name, len(values))
		case !utf8.ValidString(values[0]):
			return nil, badRequest("%s must be valid UTF-8", name)
		}
	}
	return query, nil
}

// refuse says why headers cannot be used here, if one of them is.
func refuse(r *http.Request, why string, headers ...string) error {
	for _, header := range headers {
		if _, present := r.Header[header]; present {
			return badRequest("%s cannot be used here: %s", header, why)
		}
	}
	return nil
}
