package file

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// kind is one kind of open file, both directions.
type kind struct {
	name string
	// is tells the kind of a descriptor; the first that says yes has it.
	is func(s *Set, one *seen) bool
	// read fills in the record.
	read func(s *Set, d *Description) error
	// open adds the calls that open the file in a stub and returns the index
	// of the one whose result is the descriptor.
	open func(m *Maker, b *tracee.Batch, f *image.File) (int, error)
	// finish, if set, adds the calls that give the opened descriptor its state.
	finish func(m *Maker, b *tracee.Batch, fd int, f *image.File)
	// obtain, in the place of open and finish, opens a file about a task in this
	// process, host being that task's pid here, once all processes are there.
	obtain func(m *Maker, host int, f *image.File) (*os.File, error)
}

// kinds in the order in which they are asked. Stdio comes first: it is whatever
// the engine passed in.
var kinds []kind

func init() {
	kinds = []kind{stdio, pathKind, pipeKind, fifo, epoll, eventfd, timerfd, signalfd, inotify, fanotify, pidfd, nsfs, shmem, socket, ptmx, tty, mqueue, external, proc, tun, regular, directory, device}
}

func kindOf(name string) *kind {
	for i := range kinds {
		if kinds[i].name == name {
			return &kinds[i]
		}
	}
	return nil
}

func (s *seen) format() uint32 { return s.stat.Mode & unix.S_IFMT }

// statusFlags are the flags that F_SETFL can change but O_ASYNC, which Own sets.
const statusFlags = unix.O_APPEND | unix.O_NONBLOCK | unix.O_DIRECT | unix.O_NOATIME

// setFlags adds an fcntl that gives a descriptor its status flags.
func setFlags(b *tracee.Batch, fd int, flags uint32) {
	b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_SETFL), tracee.W(flags&statusFlags))
}
