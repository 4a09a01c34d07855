package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPathParts(t *testing.T) {
	for path, want := range map[string][]string{
		"/queue/":               {""},
		"/queue/mail":           {"mail"},
		"/queue/mail/7/take":    {"mail", "7", "take"},
		"/queue/a%2Fb//%25/":    {"a/b", "", "%", ""},
		"/queue/%C3%BC":         {"ü"},
		"/queue/%FF/not-utf-8":  nil,
		"/queue/mail/%FF":       nil,
		"/queue/mail/%2F..%252": {"mail", "/..%2"},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody)
		got, err := pathParts(r, "/queue/")
		known := new(httpError)
		if diff := cmp.Diff(want, got); diff != "" || (err == nil) != (want != nil) {
			t.Errorf("%s: got error %v (-want +got)\n%s", path, err, diff)
		}
		if err != nil && (!errors.As(err, &known) || known.status != http.StatusBadRequest) {
			t.Errorf("%s: got %v; want a 400", path, err)
		}
	}
}
