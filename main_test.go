package main

import (
	"io"
	"os"
	"syscall"
	"testing"
	"time"
)

// A signal ends the process also while it waits for what may never come: files on a mount that is dead, say.
func TestSignalWhileTheNodeStarts(t *testing.T) {
	sig := signals{stop: make(chan os.Signal, 1), reload: make(chan os.Signal)}
	asked, hang := make(chan struct{}), make(chan struct{})
	defer close(hang)
	code := make(chan int)
	go func() {
		code <- run(nil, func(name string) string {
			if name == "TLS_CA_FILE" {
				close(asked)
				<-hang
			}
			return ""
		}, sig, io.Discard, io.Discard)
	}()
	<-asked
	sig.stop <- syscall.SIGTERM
	select {
	case got := <-code:
		if got != exitOK {
			t.Errorf("got exit code %d; want %d", got, exitOK)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the process goes on")
	}
}

// A node that cannot start ends also when nobody reads stderr.
func TestNobodyReadsStderr(t *testing.T) {
	r, w := io.Pipe() // whoever writes waits for a reader
	defer r.Close()
	ended := make(chan int, 1)
	go func() { ended <- run([]string{"--bogus"}, testEnv{}.get, signals{}, io.Discard, w) }()
	select {
	case code := <-ended:
		if code != exitUsage {
			t.Errorf("got exit code %d; want %d", code, exitUsage)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for a reader")
	}
}

func TestURLOfAnAddressWithAZone(t *testing.T) {
	if got := localURL(&Config{HTTPAddr: "[fe80::1%eth0]:11000"}, "localhost"); got != "http://[fe80::1%25eth0]:11000" {
		t.Errorf("got %s; want one with an escaped zone", got)
	}
}
