package file

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// pidfd stands for a task (pidfd_open(2)): one that lives, one that has ended
// and waits to be reaped, or one that is gone.
var pidfd = kind{
	name: image.KindPidfd,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[pidfd]" },
	read: func(s *Set, d *Description) error {
		d.Record.Kind = image.KindPidfd
		host := int(int32(d.seen.number("Pid", 10)))
		if d.seen.field("Pid") == "-1" {
			return s.goneTask(d)
		}
		tid, pid, err := s.Task(host)
		switch {
		case err != nil:
			return err
		case pid == 0:
			comm, _ := task.Comm(host)
			return fail.Refuse("", fmt.Sprintf("it stands for process %d (%s) of the host, which is not a task of the container", host, comm), "close it before the checkpoint")
		}
		d.Record.Pid = pid
		return s.ofThread(d, tid)
	},
	obtain: func(_ *Maker, host int, f *image.File) (*os.File, error) {
		fd, err := unix.PidfdOpen(host, int(f.Flags&(unix.PIDFD_NONBLOCK|unix.O_EXCL)))
		if err != nil {
			return nil, fmt.Errorf("pidfd_open: %w", err)
		}
		return os.NewFile(uintptr(fd), "pidfd"), nil
	},
}

// goneTask notes the end of a task that nobody can name any more. All its pidfds
// are one inode.
func (s *Set) goneTask(d *Description) error {
	f, err := d.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	// struct pidfd_info of PIDFD_GET_INFO (include/uapi/linux/pidfd.h), Linux 6.15.
	const (
		getInfo  = 0xc040ff0b
		infoExit = 1 << 3
		exitAt   = 60
	)
	d.Record.Gone = &image.Gone{Number: s.ended(fmt.Sprint("inode ", d.seen.stat.Ino))}
	var info [64]byte
	*(*uint64)(unsafe.Pointer(&info)) = infoExit
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getInfo, uintptr(unsafe.Pointer(&info))); errno == 0 {
		d.Record.Gone.Status = *(*uint32)(unsafe.Pointer(&info[exitAt]))
	}
	return nil
}
