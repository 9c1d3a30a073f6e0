package namespace

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// ipc holds System V objects and POSIX message queues (ipc_namespaces(7)). What is
// in it is the business of package sysv and of message queues in package file.
var ipc = kind{name: "ipc", flag: unix.CLONE_NEWIPC}

// IPC is an ipc namespace that tasks have made.
type IPC struct {
	Path   string // leads to it
	Inode  uint64
	Task   string // that is in it, for messages
	Record *image.NestedNamespace
}

// IPCs lists the ipc namespaces of the set.
func (s *Set) IPCs() (out []IPC) {
	for _, n := range s.list {
		if n.Record.Type == "ipc" {
			out = append(out, IPC{n.path, n.Record.Inode, n.name, &n.Record})
		}
	}
	return out
}

// Visit is a visit of the container's init stub to an ipc namespace that a task
// has made, where it makes what is in it with the rights and the numbers of ids
// that it has for the container's own. It is the numbers of descriptors of both
// namespaces; nil stays where it is.
type Visit struct{ There, Back int }

// Calls adds calls that are made there.
func (v *Visit) Calls(b *tracee.Batch, add func()) {
	if v != nil {
		b.Add(unix.SYS_SETNS, tracee.W(v.There), tracee.W(unix.CLONE_NEWIPC))
	}
	add()
	if v != nil {
		b.Add(unix.SYS_SETNS, tracee.W(v.Back), tracee.W(unix.CLONE_NEWIPC))
	}
}

// OpenQueues opens the directory of the calling thread's POSIX message queues. They
// are files of a file system of which each ipc namespace has one; it can be mounted
// for a look without a place (fsmount(2)), unlike through anybody's /dev/mqueue.
func OpenQueues() (*os.File, error) {
	fs, err := unix.Fsopen("mqueue", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("message queues: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("message queues: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("message queues: %w", err)
	}
	defer unix.Close(mount)
	fd, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("message queues: %w", err)
	}
	return os.NewFile(uintptr(fd), "mqueue"), nil
}
