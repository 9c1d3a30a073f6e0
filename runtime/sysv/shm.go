package sysv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	shmSize = 112 // sizeof(struct shmid64_ds), asm-generic/shmbuf.h

	shmAttached = 88 // shm_nattch in it

	shmRemoved = 0o1000 // SHM_DEST
	shmLocked  = 0o2000 // SHM_LOCKED
	shmLock    = 11     // SHM_LOCK
	ipcRemove  = 0      // IPC_RMID
)

func (s *Set) readSegment(id int, ids IDs) error {
	b := make([]byte, shmSize)
	if err := control(unix.SYS_SHMCTL, id, ipcStat, b); err != nil {
		return gone(err)
	}
	rec := &image.Shmem{Size: binary.NativeEndian.Uint64(b[permSize:])}
	mode := binary.NativeEndian.Uint32(b[20:])
	rec.SysV = &image.SysVSegment{Perm: perm(id, b, ids), Removed: mode&shmRemoved != 0, Locked: mode&shmLocked != 0}
	s.Segments = append(s.Segments, rec)
	s.Attached = append(s.Attached, binary.NativeEndian.Uint64(b[shmAttached:]))
	return nil
}

// gone forgives an object of a running container that has been removed.
func gone(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EIDRM) {
		return nil
	}
	return err
}

// OpenUnattached opens the memory of a segment that nobody has attached, in the
// ipc namespace of the calling thread. Attaching it for a moment is the only way
// to reach it; huge is the size of its pages where they are hugetlb's. It shows in its shm_atime, shm_dtime and shm_lpid.
func OpenUnattached(id int32) (f *os.File, huge uint64, err error) {
	addr, _, errno := unix.Syscall(unix.SYS_SHMAT, uintptr(id), 0, unix.SHM_RDONLY)
	if errno != 0 {
		return nil, 0, fmt.Errorf("shmat: %w", errno)
	}
	defer func() { _, _, _ = unix.Syscall(unix.SYS_SHMDT, addr, 0, 0) }()
	if f, err = openMapping("/proc/self/", uint64(addr), os.O_RDONLY); err != nil {
		return nil, 0, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		huge = uint64(fs.Bsize)
	}
	return f, huge, nil
}

// openMapping opens the file that is mapped at an address.
func openMapping(proc string, addr uint64, flags int) (*os.File, error) {
	dir, err := os.ReadDir(proc + "map_files")
	if err != nil {
		return nil, err
	}
	for _, e := range dir {
		var start, end uint64
		if n, _ := fmt.Sscanf(e.Name(), "%x-%x", &start, &end); n == 2 && start == addr {
			return os.OpenFile(proc+"map_files/"+e.Name(), flags, 0)
		}
	}
	return nil, fmt.Errorf("nothing is mapped at %x", addr)
}

func (m *Maker) makeSegment(rec *image.Shmem) error {
	p := &rec.SysV.Perm
	err := m.create("shm", p, func(b *tracee.Batch) int {
		return b.Add(unix.SYS_SHMGET, tracee.W(p.Key), tracee.W(rec.Size), tracee.W(uint64(uint32(ipcFlags)|p.Mode)|mm.HugeSegment(rec.HugePage)))
	})
	if rec.HugePage != 0 && (errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EPERM)) {
		err = &fail.Error{
			Cause:  fmt.Errorf("huge pages of %d KiB: %w", rec.HugePage>>10, err),
			Remedy: "set more of them aside (vm.nr_hugepages), and give the bundle CAP_IPC_LOCK or its group vm.hugetlb_shm_group",
		}
	}
	if err != nil || !given(p) {
		return err
	}
	_, err = m.Stub.AsItself(func(b *tracee.Batch) {
		b.Add(unix.SYS_SHMCTL, tracee.W(p.ID), tracee.W(ipcSet), b.Put(permBytes(p, shmSize)))
	})
	return err
}

// attachAt is where the stub attaches a segment for a moment.
const attachAt = 0x200000000000

// Memory opens a segment that has been made, in this process, to fill it.
func (m *Maker) Memory(pid int, rec *image.Shmem) (*os.File, error) {
	if _, err := m.Stub.AsItself(func(b *tracee.Batch) {
		b.Add(unix.SYS_SHMAT, tracee.W(rec.SysV.Perm.ID), tracee.W(uint64(attachAt)), tracee.W(0))
	}); err != nil {
		return nil, err
	}
	f, err := openMapping(fmt.Sprintf("/proc/%d/", pid), attachAt, os.O_RDWR)
	_, e := m.Stub.AsItself(func(b *tracee.Batch) { b.Add(unix.SYS_SHMDT, tracee.W(uint64(attachAt))) })
	return f, errors.Join(err, e)
}

// Finish locks segments that were, and marks for removal those that go with the
// last who has them attached.
func (m *Maker) Finish() error {
	for _, ref := range m.refs {
		rec := m.head.Shmem(ref)
		if rec == nil || !rec.SysV.Removed && !rec.SysV.Locked {
			continue
		}
		what := fmt.Sprintf("System V shm %d", rec.SysV.Perm.ID)
		_, err := m.Stub.AsItself(func(b *tracee.Batch) {
			if rec.SysV.Locked {
				b.Add(unix.SYS_SHMCTL, tracee.W(rec.SysV.Perm.ID), tracee.W(shmLock), tracee.W(0))
			}
			if rec.SysV.Removed {
				b.Add(unix.SYS_SHMCTL, tracee.W(rec.SysV.Perm.ID), tracee.W(ipcRemove), tracee.W(0))
			}
		})
		if err != nil {
			return fail.On(what, err)
		}
	}
	return nil
}
