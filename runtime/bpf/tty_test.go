package bpf

import (
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

func TestTerminals(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	q, err := NewTerminals()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	index, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sleep", "1000")
	c.Stdin, c.Stdout = slave, os.NewFile(master.Fd(), "master")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	traced(t, c.Process.Pid)
	quiet, err := q.Unread()
	if err != nil || len(quiet) != 0 {
		t.Fatalf("before anything was written: %v, %v", quiet, err)
	}
	// An echo would come whenever the kernel's worker gets to it.
	termios, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	termios.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(slave.Fd()), unix.TCSETS, termios); err != nil {
		t.Fatal(err)
	}
	if _, err := master.Write([]byte("a\n\x04part")); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("0123456789", 1000) // more than a line discipline takes
	fd := int(slave.Fd())                      // which makes it blocking
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	n, err := unix.Write(fd, []byte(long))
	if err != nil {
		t.Fatal(err)
	}
	var in, out Unread
	for range 1000 { // until the kernel's worker has handed on what it can
		all, err := q.Unread()
		if err != nil {
			t.Fatal(err)
		}
		in, out = all[Side{index, false}], all[Side{index, true}]
		if len(in.Rest) == 0 && len(out.Data) == ttyBufferSize-1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if got := string(in.Data); got != "a\n\x00part" || !reflect.DeepEqual(in.Ends, []bool{false, true, true, false, false, false, false}) {
		t.Errorf("input is %q, lines end at %v", got, in.Ends)
	}
	got, want := string(out.Data)+string(out.Rest), long[:n]
	if got != want {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		t.Errorf("output of %d and %d bytes differs from what was written, %d bytes, at %d: %.20q, want %.20q", len(out.Data), len(out.Rest), n, at, got[at:], want[at:])
	}
}
