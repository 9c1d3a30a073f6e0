package guardian

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// lastBreath bounds how long the guardian waits, once the journal has ended, for
// the coordinator to be gone altogether.
const lastBreath = 2 * time.Second

// Main is the guardian's whole life: it keeps the journal until the coordinator
// is done or dead, puts back what stands in the latter case, and exits. The exit
// status is 0, 1 if something could not be put back, 2 if the program was not
// started by Start. Main never returns.
func Main() {
	// Whoever sends these to all of ocickpt, as service managers do, wants
	// the coordinator to end. That is when the guardian is needed.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE, unix.SIGQUIT)
	kind, err := unix.GetsockoptInt(journalFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		fmt.Fprintln(os.Stderr, "ocickpt: the guardian is started by checkpoint and restore, not by hand")
		os.Exit(2)
	}
	dropInherited()
	surviveShortages()
	if send(journalFD, frame{Answer: true}) != nil {
		os.Exit(1)
	}
	stands, done := keepJournal()
	if done {
		os.Exit(0)
	}
	_ = unix.Close(journalFD)
	awaitExit(coordinatorFD, lastBreath)
	os.Exit(undoAll(stands))
}

// kept is how many files besides its own the guardian was given to keep open.
func kept() int {
	if len(os.Args) < 3 {
		return 0
	}
	n, _ := strconv.Atoi(os.Args[2])
	return n
}

// dropInherited closes what the coordinator had inherited itself, such as the
// pipe an image goes through: its reader waits until the last copy is closed. A
// descriptor that came through exec has no close-on-exec flag, one that the Go
// runtime has opened since has it.
func dropInherited() {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil || fd <= coordinatorFD+kept() {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
	unix.CloseOnExec(journalFD)
	unix.CloseOnExec(coordinatorFD)
}

// surviveShortages makes the guardian the last one the OOM killer takes, where
// CAP_SYS_RESOURCE allows it, and gives it a name that ps shows: after the exec
// of /proc/self/exe it is called "exe".
func surviveShortages() {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	_ = os.WriteFile("/proc/self/comm", []byte("ocickpt-guard"), 0)
}

// keepJournal follows the journal until its end and returns what then stands, or
// that the coordinator is done.
func keepJournal() (stands []standing, done bool) {
	for {
		// The dead send nothing more: a journal found empty after the
		// death was seen is complete, even if a copy of the
		// coordinator's end is still open somewhere.
		dead := awaitFrameOrDeath()
		if dead && !readable(journalFD) {
			return stands, false
		}
		f, err := receive(journalFD)
		if err != nil {
			return stands, false
		}
		if f.Done {
			return nil, true
		}
		stands = f.apply(stands)
	}
}

// apply carries out one entry of the journal on the list of what stands.
func (f frame) apply(stands []standing) []standing {
	if f.Undo != nil {
		return append(stands, standing{f.Entry, *f.Undo, f.Ready})
	}
	if f.Seal {
		return sealed(stands)
	}
	stands, _ = without(stands, f.Entry)
	return stands
}

// awaitFrameOrDeath sleeps until a frame or the end of the journal can be read,
// or the coordinator has died. A pidfd becomes readable when the last thread of
// its process has exited, zombies included.
func awaitFrameOrDeath() (dead bool) {
	fds := []unix.PollFd{{Fd: journalFD, Events: unix.POLLIN}, {Fd: coordinatorFD, Events: unix.POLLIN}}
	err := retryEINTR(func() error {
		_, err := unix.Poll(fds, -1)
		return err
	})
	return err != nil || fds[1].Revents != 0
}

// readable tells whether a read of the descriptor would not block.
func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	var n int
	err := retryEINTR(func() (err error) {
		n, err = unix.Poll(fds, 0)
		return err
	})
	return err == nil && n > 0
}

// awaitExit waits until the process of a pidfd has exited, or the time is over,
// and tells which.
//
// The end of the journal comes earlier in a process's death (exit_files) than
// the release of its tracees (exit_ptrace in exit_notify), so after a dead
// coordinator's last word its tasks may still be traced.
func awaitExit(pidfd int, limit time.Duration) bool {
	deadline := time.Now().Add(limit)
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		left := max(0, time.Until(deadline))
		n, err := unix.Poll(fds, int(left.Milliseconds()))
		if n > 0 {
			return true
		}
		if left == 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
			return false
		}
	}
}

// undoAll undoes what stands, the last first, and returns the exit status. There
// is nobody left to tell what failed: the rest is put back all the same.
func undoAll(stands []standing) (status int) {
	for i := len(stands) - 1; i >= 0; i-- {
		if !stands[i].ready && stands[i].undo.Do() != nil {
			status = 1
		}
	}
	return status
}
