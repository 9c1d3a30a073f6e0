package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// stream opens one of the standard descriptors for an image, so that waiting
// for the other side ends with ctx: a reader that does not read must not keep a
// container stopped for ever.
//
// A pipe is opened anew, as non-blocking is a property of the open file, which
// others may share. What cannot be opened anew (a socket) is used as it is.
func stream(ctx context.Context, fd, mode int) *os.File {
	name := [...]string{"/dev/stdin", "/dev/stdout"}[fd]
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return os.NewFile(uintptr(fd), name)
	}
	n, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), mode|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewFile(uintptr(fd), name)
	}
	f := os.NewFile(uintptr(n), name)
	context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Now()) })
	return f
}
