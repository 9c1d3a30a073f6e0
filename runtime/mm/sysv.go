package mm

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// System V shared memory is shared memory with an id. What is attached is
// attached again by shmat(2), for shmdt(2) and the count of attachments; the
// inode of such a mapping is the segment's id (newseg in ipc/shm.c).

const sysvPrefix = "/SYSV"

// sysvKey is a segment's ipc namespace, by inode, and its id there.
type sysvKey struct {
	ns uint64
	id int32
}

// SysV makes a segment of an ipc namespace known, which as many areas are of as
// the kernel says. ref tells the namespace's reference when it is written.
func (s *Shared) SysV(ns uint64, rec *image.Shmem, attached uint64, ref func() image.Ref) *Segment {
	seg := &Segment{Record: rec, NS: ns, attached: attached}
	seg.Object = object.Object{Type: image.TypeShmem, Record: rec, Complete: func() { rec.SysV.Perm.NS = ref() }}
	s.sysv[sysvKey{ns, rec.SysV.Perm.ID}] = seg
	s.order = append(s.order, seg)
	return seg
}

// CheckAttached refuses segments whose attachments are not those that were found:
// the inode of a mapping is the segment's id, whatever its namespace is, so that
// those that a process has taken along from another namespace look like those of
// its own. All processes are stopped.
func (s *Shared) CheckAttached() error {
	for _, seg := range s.order {
		if seg.Record.SysV != nil && seg.found != seg.attached {
			return fail.Refuse(fmt.Sprintf("System V shm %d", seg.Record.SysV.Perm.ID), fmt.Sprintf("%d areas are attached to it, and %d seem to be, by tasks of its ipc namespace: some task has taken its attachments along to another", seg.attached, seg.found), "detach it there before the checkpoint (shmdt)")
		}
	}
	return nil
}

// Unattached reports a segment that nobody has been found to have attached.
func (s *Segment) Unattached() bool { return s.path == "" }

// Through makes a segment be read through a file that the caller has open.
func (s *Segment) Through(f *os.File) { s.path = fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// attached finds the segment behind a mapping.
func (s *Shared) attached(ns uint64, a *image.Area, m *mapping, link string) (*object.Object, error) {
	seg := s.sysv[sysvKey{ns, int32(m.inode)}]
	if seg == nil {
		return nil, fail.Refuse("", "System V shared memory of another ipc namespace than the task is in", "detach it before the checkpoint")
	}
	seg.found++
	if seg.path == "" {
		seg.path = link
	}
	seg.Record.HugePage = a.HugePage
	a.Kind = image.AreaShmem
	if m.has(writable) {
		a.Flags = append(a.Flags, writable)
	}
	return &seg.Object, nil
}

// checkAttached refuses what shmat cannot make again: other memory within the
// range of a segment, of which a part was unmapped.
func (s *Space) checkAttached() error {
	for i, f := range s.files {
		a := &s.Record.Areas[i]
		rec, ok := sysvOf(f)
		if !ok {
			continue
		}
		base := a.Start - a.Offset
		for j := range s.Record.Areas {
			b := &s.Record.Areas[j]
			if b.Start < base+rec.Span() && b.End > base && (s.files[j] != f || b.Start-b.Offset != base) {
				return fail.Refuse(describe(a), "other memory lies where a part of a System V segment was", "detach it before the checkpoint (shmdt)")
			}
		}
	}
	return nil
}

// Attaches reports whether it has System V segments attached.
func (s *Space) Attaches() bool {
	return slices.ContainsFunc(s.files, func(f *object.Object) bool { _, ok := sysvOf(f); return ok })
}

func sysvOf(o *object.Object) (*image.Shmem, bool) {
	if o == nil {
		return nil, false
	}
	rec, ok := o.Record.(*image.Shmem)
	return rec, ok && rec.SysV != nil
}

// attach adds the calls that attach a segment where areas[i] is the first piece
// left of it; the others come with that. What was unmapped of it goes again.
func attach(b *tracee.Batch, areas []image.Area, i int, rec *image.Shmem) {
	a := &areas[i]
	base := a.Start - a.Offset
	same := func(b *image.Area) bool { return b.File == a.File && b.Start-b.Offset == base }
	if i > 0 && same(&areas[i-1]) {
		return
	}
	flags, prot := unix.SHM_RDONLY, uint32(unix.PROT_READ)
	if has(a, writable) {
		flags, prot = 0, unix.PROT_READ|unix.PROT_WRITE
	}
	b.Add(unix.SYS_SHMAT, tracee.W(rec.SysV.Perm.ID), tracee.W(base), tracee.W(flags))
	at := base
	unmap := func(end uint64) {
		if end > at {
			b.Add(unix.SYS_MUNMAP, tracee.W(at), tracee.W(end-at))
		}
	}
	for ; i < len(areas) && same(&areas[i]); i++ {
		unmap(areas[i].Start)
		if areas[i].Prot != prot {
			b.Add(unix.SYS_MPROTECT, tracee.W(areas[i].Start), tracee.W(areas[i].Size()), tracee.W(areas[i].Prot))
		}
		bind(b, &areas[i])
		at = areas[i].End
	}
	unmap(base + rec.Span())
}
