package page

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// browser is a headless Chromium with one tab. It is told what to do in the DevTools protocol, over two pipes.
type browser struct {
	t       *testing.T
	session string // of the tab, "" before there is one
	to      io.Writer
	lastID  int
	answers chan message
	ended   chan error

	mu         sync.Mutex // guards complaints
	complaints []string   // errors of the script, and what the policy has blocked
}

type message struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  any             `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// newBrowser starts a browser with an empty tab. It ends with the test.
func newBrowser(t *testing.T) *browser {
	t.Helper()
	fromTest, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, toTest, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "page-test-") //nolint:usetesting // the browser's helpers may write there a little longer
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"--headless=new", "--remote-debugging-pipe", "--user-data-dir=" + dir}
	args = append(args, "--disable-gpu", "--hide-scrollbars", "--lang=en-US")
	if os.Geteuid() == 0 {
		args = append(args, "--no-sandbox") // which it does not have as root
	}
	cmd := exec.CommandContext(t.Context(), "chromium", args...)
	cmd.ExtraFiles = []*os.File{fromTest, toTest} // its descriptors 3 and 4
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = fromTest.Close(), toTest.Close()
	b := &browser{t: t, to: to, answers: make(chan message, 1), ended: make(chan error, 1)}
	go b.listen(from) // until the browser has ended
	t.Cleanup(func() {
		_ = to.Close() // which ends it
		_ = cmd.Wait()
		_ = from.Close()
		for end := time.Now().Add(5 * time.Second); os.RemoveAll(dir) != nil && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
		}
	})
	var made struct{ TargetID, SessionID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &made)
	b.call("Target.attachToTarget", map[string]any{"targetId": made.TargetID, "flatten": true}, &made)
	b.session = made.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

func (b *browser) listen(from io.Reader) {
	for r := bufio.NewReader(from); ; {
		line, err := r.ReadBytes(0)
		if err != nil {
			b.ended <- err
			return
		}
		line = line[:len(line)-1]
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			b.ended <- err
			return
		}
		network := strings.Contains(string(line), `"source":"network"`) // such as a node that does not answer
		switch {
		case m.ID != 0:
			b.answers <- m
		case m.Method == "Runtime.exceptionThrown", m.Method == "Log.entryAdded" && !network:
			b.mu.Lock()
			b.complaints = append(b.complaints, string(line))
			b.mu.Unlock()
		}
	}
}

// call has the browser do something, and puts what it answers into result.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	b.lastID++
	text, err := json.Marshal(message{ID: b.lastID, Session: b.session, Method: method, Params: params})
	if err == nil {
		_, err = b.to.Write(append(text, 0))
	}
	var m message
	if err == nil {
		select {
		case m = <-b.answers:
		case err = <-b.ended:
		case <-time.After(20 * time.Second):
			err = errors.New("no answer within 20 s")
		}
	}
	if err == nil && m.Error != nil {
		err = errors.New(m.Error.Message)
	}
	if err == nil && result != nil {
		err = json.Unmarshal(m.Result, result)
	}
	if err != nil {
		b.t.Fatalf("browser: %s: %v", method, err)
	}
}

func (b *browser) open(url string) {
	b.t.Helper()
	b.call("Page.navigate", map[string]any{"url": url}, nil)
}

// eval runs an expression in the page and returns its value as text.
func (b *browser) eval(expression string) string {
	b.t.Helper()
	var got struct {
		Result           struct{ Value any }
		ExceptionDetails any
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &got)
	if got.ExceptionDetails != nil {
		return fmt.Sprint("exception: ", got.ExceptionDetails)
	}
	return fmt.Sprint(got.Result.Value)
}

// until waits until an expression's value contains each of the texts.
func (b *browser) until(expression string, texts ...string) {
	b.t.Helper()
	var got string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		missing := false
		got = b.eval(expression)
		for _, text := range texts {
			missing = missing || !strings.Contains(got, text)
		}
		if !missing {
			return
		}
	}
	b.t.Fatalf("%s: got %q within 20 s; want %q", expression, got, texts)
}

// texts is the expression for the visible text of all elements of a selector.
func texts(selector string) string {
	return "[...document.querySelectorAll(" + quote(selector) + ")].map(e => e.innerText).join(' | ')"
}

// click and typeIn do what a hand does.
func (b *browser) click(selector string) {
	b.t.Helper()
	b.eval("document.querySelector(" + quote(selector) + ").click()")
}

func (b *browser) typeIn(selector, text string) {
	b.t.Helper()
	b.eval("document.querySelector(" + quote(selector) + ").focus()")
	b.call("Input.insertText", map[string]any{"text": text}, nil)
}

// picture leaves the whole page as a PNG, so many pixels wide, and fails the test if it is wider than that.
func (b *browser) picture(name string, width int, scheme string) {
	b.t.Helper()
	prefers := map[string]any{"name": "prefers-color-scheme", "value": scheme}
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{prefers}}, nil)
	b.call("Emulation.setDeviceMetricsOverride",
		map[string]any{"width": width, "height": 320, "deviceScaleFactor": 1, "mobile": width < 500}, nil)
	if got := b.eval("document.documentElement.scrollWidth"); got != fmt.Sprint(width) {
		b.t.Errorf("%s: the page is %s pixels wide; want %d", name, got, width)
	}
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	if err == nil {
		err = os.WriteFile(filepath.Join(os.Getenv("PICTURES"), name+".png"), png, 0o600)
	}
	if err != nil {
		b.t.Error(err)
	}
}

// quiet fails the test if the script has failed, or wanted what the policy forbids.
func (b *browser) quiet() {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, complaint := range b.complaints {
		b.t.Errorf("the browser complains: %s", complaint)
	}
}

func quote(text string) string {
	quoted, _ := json.Marshal(text) // a string always can
	return string(quoted)
}
