package namespace

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// ipc holds System V objects and POSIX message queues (ipc_namespaces(7)). Only
// an empty one can be made again so far.
var ipc = kind{
	name: "ipc", flag: unix.CLONE_NEWIPC,
	read: func(_ *Set, n *Namespace) error { return nsutil.Inside(n.path, CheckIPC) },
}

// CheckIPC refuses objects in the calling thread's ipc namespace: they would be
// gone after the restore, whoever has them attached or not.
func CheckIPC() error {
	for _, kind := range []string{"shm", "sem", "msg"} {
		// The file shows the namespace of the thread that opens it.
		b, err := os.ReadFile("/proc/sysvipc/" + kind)
		if err != nil {
			return fmt.Errorf("reading System V ipc: %w", err)
		}
		if n := bytes.Count(b, []byte{'\n'}) - 1; n > 0 {
			return fail.Refuse("System V ipc", fmt.Sprintf("it has %d objects of type %s; they are not supported yet", n, kind), "remove them before the checkpoint (ipcrm)")
		}
	}
	dir, err := OpenQueues()
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err == nil && len(names) > 0 {
		return fail.Refuse("message queue /"+names[0], "POSIX message queues in an ipc namespace that a task has made are not supported yet", "remove it before the checkpoint (mq_unlink)")
	}
	return err
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
