package main

import (
	"errors"
	"io"
	"os"
	"os/signal"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// relay connects a container's terminal, of which master is our side, to our own
// standard streams. The function returned gives our terminal its settings back
// when the container has ended and everything it wrote is out.
func relay(master *os.File) (done func() error, err error) {
	theirs, err := console.ConsoleFromFile(master)
	if err != nil {
		return nil, err
	}
	restore := func() error { return nil }
	if own, err := console.ConsoleFromFile(os.Stdin); err == nil { // else it is no terminal
		if err := own.SetRaw(); err != nil {
			return nil, err
		}
		restore = own.Reset
		follow(theirs, own)
	}
	// A pty's output side is as it leaves the container: raw already.
	written := make(chan error, 1)
	go func() {
		_, err := io.Copy(os.Stdout, master)
		written <- err
	}()
	go func() { _, _ = io.Copy(master, os.Stdin) }()
	return func() error {
		err := <-written
		if errors.Is(err, unix.EIO) { // nobody has the slave open any more
			err = nil
		}
		return errors.Join(err, restore(), master.Close())
	}, nil
}

// follow gives the container's terminal the size of ours, now and whenever it
// changes.
func follow(theirs, own console.Console) {
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, unix.SIGWINCH)
	go func() {
		for {
			_ = theirs.ResizeFrom(own)
			<-resized
		}
	}()
}
