package file

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// ownerGroup is F_OWNER_PGRP (include/uapi/asm-generic/fcntl.h).
const ownerGroup = 2

// ownerEx is struct f_owner_ex of fcntl(2).
type ownerEx struct{ kind, pid int32 }

// readOwner reads who gets signals about a description, and which. The kernel
// keeps it in the description, where a descriptor of ours sees it too.
func (s *Set) readOwner(d *Description) error {
	if d.seen.flags&unix.O_PATH != 0 {
		return nil
	}
	f, err := d.seen.hold()
	if err != nil {
		return err
	}
	defer f.Close()
	var owner ownerEx
	if _, _, errno := unix.Syscall(unix.SYS_FCNTL, f.Fd(), unix.F_GETOWN_EX, uintptr(unsafe.Pointer(&owner))); errno != 0 {
		return fmt.Errorf("F_GETOWN_EX: %w", errno)
	}
	signal, err := unix.FcntlInt(f.Fd(), unix.F_GETSIG, 0)
	if err != nil {
		return fmt.Errorf("F_GETSIG: %w", err)
	}
	if owner.pid == 0 && signal == 0 {
		return nil
	}
	if d.seen.format() == unix.S_IFDIR {
		return fail.Refuse("", "it has an owner for signals, as F_NOTIFY gives a directory, and what that watches cannot be asked", "close it before the checkpoint, or use inotify")
	}
	d.Record.Owner = &image.Owner{Type: owner.kind, Signal: int32(signal)}
	d.Record.Owner.ID, err = s.ownerInside(owner)
	return err
}

// ownerInside translates an owner into the container's pids.
func (s *Set) ownerInside(o ownerEx) (int32, error) {
	if o.pid == 0 {
		return 0, nil
	}
	for _, t := range s.tables {
		status, err := task.ReadStatus(t.proc.Pid)
		if err != nil {
			return 0, err
		}
		if o.kind == ownerGroup && status.NSpgid[0] == int(o.pid) {
			return int32(task.Innermost(status.NSpgid)), nil
		}
		if o.kind == ownerGroup {
			continue
		}
		one, err := task.ReadStatus(int(o.pid))
		if errors.Is(err, tracee.ErrGone) {
			break
		}
		if err != nil {
			return 0, err
		}
		if len(one.NSpid) == len(status.NSpid) && t.proc.Pid == one.Tgid {
			return int32(task.Innermost(one.NSpid)), nil
		}
	}
	return 0, fail.Refuse("", fmt.Sprintf("it sends signals to %d, which is not a task of the container", o.pid), "close it before the checkpoint")
}

// Own adds the calls that give the descriptions that a task opened their owners,
// in the task itself and with its credentials, for the kernel keeps those and
// lets them decide who may be sent a signal (sigio_perm in fs/fcntl.c). Signals
// that what still happens to the files would send are late enough here to be
// true ones.
func (m *Maker) Own(b *tracee.Batch, files *image.Files, pid int32) {
	if files == nil {
		return
	}
	for _, d := range files.Descriptors {
		f := m.head.File(d.File)
		if f.Owner == nil && f.Flags&unix.O_ASYNC == 0 || f.Opener != pid || m.owned[d.File] {
			continue
		}
		m.owned[d.File] = true
		fd := tracee.W(d.FD)
		if o := f.Owner; o != nil {
			if o.ID != 0 {
				ex := ownerEx{o.Type, o.ID}
				b.Add(unix.SYS_FCNTL, fd, tracee.W(unix.F_SETOWN_EX), b.Put(unsafe.Slice((*byte)(unsafe.Pointer(&ex)), unsafe.Sizeof(ex))))
			}
			b.Add(unix.SYS_FCNTL, fd, tracee.W(unix.F_SETSIG), tracee.W(o.Signal))
		}
		if f.Flags&unix.O_ASYNC != 0 {
			b.Add(unix.SYS_FCNTL, fd, tracee.W(unix.F_SETFL), tracee.W(f.Flags&(statusFlags|unix.O_ASYNC)))
		}
	}
}
