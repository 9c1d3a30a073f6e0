package file

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Threads but the first of a process come to be when everybody's descriptors are
// in place. What is about one of them, a pidfd (PIDFD_THREAD) or a file below
// /proc/PID/task, comes into the tables of its own process then; those of others
// may be complete.

// ofThread notes that a description is about a thread.
func (s *Set) ofThread(d *Description, tid int32) error {
	if tid == d.Record.Pid {
		return nil
	}
	d.Record.Thread = tid
	for _, t := range s.tables {
		for _, e := range t.entries {
			if e.desc == d && t.proc.Inner != int(d.Record.Pid) {
				return fail.Refuse("", fmt.Sprintf("it is about thread %d of task %d, and task %d holds it too, whose descriptors are complete before that thread is made", tid, d.Record.Pid, t.proc.Inner), "close it before the checkpoint")
			}
		}
	}
	return nil
}

// threadInPath is the thread that a file of a process in /proc belongs to, that of
// the process where it is about the whole of it.
func threadInPath(path string, pid int32) int32 {
	_, rest, ok := strings.Cut(path, fmt.Sprintf("/%d/task/", pid))
	first, _, _ := strings.Cut(rest, "/")
	if tid, err := strconv.ParseInt(first, 10, 32); ok && err == nil {
		return int32(tid)
	}
	return pid
}

// AboutThreads reports whether a table has what is about threads.
func (m *Maker) AboutThreads(files *image.Files) bool {
	if files == nil {
		return false
	}
	for _, d := range files.Descriptors {
		if m.head.File(d.File).Thread != 0 {
			return true
		}
	}
	return false
}

// aboutDescriptor reports a file of /proc/PID/fdinfo: it is there when the
// descriptor is.
func aboutDescriptor(f *image.File) bool {
	return f.Kind == image.KindProc && f.Pid != 0 && strings.HasPrefix(f.Path, fmt.Sprintf("/proc/%d/fdinfo/", f.Pid))
}

// OpenAbout puts files about descriptors into a table, when all others are in
// place.
func (m *Maker) OpenAbout(s *tracee.Stub, files *image.Files) error {
	for _, d := range files.Descriptors {
		if aboutDescriptor(m.head.File(d.File)) {
			if err := m.openLate(s, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// OpenThreads puts what is about threads into a table, when they are there. host
// is the pid here of a thread.
func (m *Maker) OpenThreads(s *tracee.Stub, files *image.Files, host func(tid int32) int) error {
	for _, d := range files.Descriptors {
		f := m.head.File(d.File)
		if f.Thread == 0 {
			continue
		}
		k := kindOf(f.Kind)
		if m.late[d.File] == nil && k.obtain != nil {
			var err error
			if m.late[d.File], err = k.obtain(m, host(f.Thread), f); err != nil {
				return fail.On(fmt.Sprintf("%s of thread %d", f.Kind, f.Thread), err)
			}
		}
		if err := m.openLate(s, d); err != nil {
			return err
		}
	}
	return m.OpenAbout(s, files)
}
