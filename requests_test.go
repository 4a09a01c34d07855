package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// answerTo is what an HTTP request came to.
type answerTo struct {
	status int
	header http.Header
	body   string
}

// request makes an HTTP request; headers are given as name, value, ...
func request(t testing.TB, method, url, body string, headers ...string) answerTo {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	response, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return answerTo{response.StatusCode, response.Header, string(data)}
}

// exchange sends text to addr as it stands, over a connection of its own: net/http's client would clean paths. The text
// asks for the connection to be closed, so that whatever follows the answer is found too.
func exchange(ctx context.Context, addr, method, text string) (a answerTo, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return a, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(15 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil {
		return a, err
	}
	r := bufio.NewReader(conn)
	response, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		return a, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return a, err
	}
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		return a, fmt.Errorf("%q and error %w follow the answer", rest, err)
	}
	return answerTo{response.StatusCode, response.Header, string(body)}, nil
}

// requestText is a request as exchange sends it; headers are given as name, value, ...
func requestText(method, target, body string, headers ...string) string {
	text := method + " " + target + " HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
	if !slices.Contains(headers, "Transfer-Encoding") {
		headers = append(headers, "Content-Length", strconv.Itoa(len(body)))
	}
	for pair := range slices.Chunk(headers, 2) {
		text += pair[0] + ": " + pair[1] + "\r\n"
	}
	return text + "\r\n" + body
}

// ask sends a request to a node that leads and checks what is true of every answer.
func ask(t *testing.T, n *testNode, method, target, body string, headers ...string) answerTo {
	t.Helper()
	a, err := exchange(t.Context(), n.web.Listener.Addr().String(), method, requestText(method, target, body, headers...))
	if err != nil {
		t.Fatalf("%s %.200s: %v", method, target, err)
	}
	id := []string{n.cfg.NodeID}
	if got := a.header.Get("Cache-Control"); got != "no-cache" {
		t.Errorf("%s %.200s: got Cache-Control %q; want no-cache", method, target, got)
	}
	if h := a.header; !slices.Equal(h["Raft-Served-By"], id) || !slices.Equal(h["Raft-Leader"], id) || h["Raft-Stale"] != nil {
		t.Errorf("%s %.200s: got %v; want it served and led by %s, and nothing stale", method, target, h, id)
	}
	if a.status >= 400 {
		checkProblem(t, method, a, "not-applied")
	} else if method != http.MethodGet && a.body != "" {
		t.Errorf("%s %.200s: got body %q; want none", method, target, a.body)
	}
	return a
}

// want asks and checks the status.
func want(t *testing.T, n *testNode, status int, method, target, body string, headers ...string) answerTo {
	t.Helper()
	a := ask(t, n, method, target, body, headers...)
	if a.status != status {
		t.Errorf("%s %.200s %.200q %.200q: got %d %.200q; want %d", method, target, headers, body, a.status, a.body, status)
	}
	return a
}

// checkProblem checks that an error is told as RFC 9457 has it, with its outcome if it is one of a write.
func checkProblem(t *testing.T, method string, a answerTo, outcome string) {
	t.Helper()
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("%d to %s: got content type %q; want application/problem+json", a.status, method, got)
	}
	if method == http.MethodHead {
		return
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(a.body), &got); err != nil || strings.Contains(strings.TrimSuffix(a.body, "\n"), "\n") {
		t.Errorf("%d to %s: got %q, %v; want a JSON object in one line", a.status, method, a.body, err)
	}
	detail, _ := got["detail"].(string)
	if detail == "" || strings.Contains(detail, "<nil>") || strings.Contains(detail, "%!") {
		t.Errorf("%d to %s: got detail %q; want a reason", a.status, method, detail)
	}
	expected := map[string]any{
		"type": "about:blank", "title": http.StatusText(a.status), "status": float64(a.status), "detail": got["detail"],
	}
	switch method {
	case http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch:
		expected["outcome"] = outcome
	case http.MethodGet:
	default:
		delete(got, "outcome") // neither a read nor a write
	}
	if a.status == http.StatusPreconditionFailed {
		delete(got, "failed") // of a transaction
	}
	if diff := cmp.Diff(expected, got); diff != "" {
		t.Errorf("%d to %s: -want +got:\n%s", a.status, method, diff)
	}
}
