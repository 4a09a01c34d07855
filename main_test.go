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
