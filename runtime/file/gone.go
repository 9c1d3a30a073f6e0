package file

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Some descriptors outlive the task that they are about: a pidfd, a file of
// /proc/PID. To make one again takes a task that ends. It is a child of the init
// stub, with the pid where that is free, and is gone before threads of the image
// claim theirs.

// ended numbers tasks that are gone, by whatever tells one from another.
func (s *Set) ended(key string) uint32 {
	if s.endedTasks == nil {
		s.endedTasks = map[string]uint32{}
	}
	if s.endedTasks[key] == 0 {
		s.endedTasks[key] = uint32(len(s.endedTasks) + 1)
	}
	return s.endedTasks[key]
}

// outlived tells whether a file of /proc belongs to a task that is gone, and
// notes that.
func (s *Set) outlived(d *Description) (bool, error) {
	pid, v := d.Record.Pid, s.place(d)
	if pid == 0 || v.Ref != nil {
		return false, nil
	}
	if now, err := lstat(v.Root, d.seen.link); err == nil && now.Dev == d.seen.stat.Dev && now.Ino == d.seen.stat.Ino {
		return false, nil
	}
	rest, ok := strings.CutPrefix(d.Record.Path, fmt.Sprintf("/proc/%d", pid))
	if !ok {
		return false, nil
	}
	if strings.Count(rest, "/") > 1 {
		return false, fail.Refuse("", "it belongs to a thread, a descriptor or an area that is gone", "close it before the checkpoint")
	}
	d.Record.Gone, d.Record.Pid = &image.Gone{Number: s.ended(fmt.Sprint("pid ", pid)), Pid: pid}, 0
	return true, nil
}

// makeGone makes what is held of tasks that are gone. number is what the tasks of
// the image have for pids.
func (m *Maker) makeGone() error {
	tasks := map[uint32][]image.Ref{}
	for _, ref := range Refs(m.head) {
		if f := m.head.File(ref); f != nil && f.Gone != nil {
			tasks[f.Gone.Number] = append(tasks[f.Gone.Number], ref)
		}
	}
	for _, refs := range tasks {
		g := m.head.File(refs[0]).Gone
		ghost, inner, err := m.ghost(g.Pid)
		if err != nil {
			return err
		}
		for _, ref := range refs {
			if err = m.ofGone(ref, ghost, inner); err != nil {
				err = fail.On(m.head.File(ref).Kind, err)
				break
			}
		}
		if err = errors.Join(err, ghost.Exit(unix.WaitStatus(g.Status))); err != nil {
			return err
		}
	}
	return nil
}

// ghost makes a task that will end, with a pid of the container's if that is
// free, and returns the one that it has.
func (m *Maker) ghost(pid int32) (*tracee.Stub, int, error) {
	var pids []int32
	if pid > 0 && !slices.ContainsFunc(m.head.Tree.Processes, func(p image.Process) bool {
		return p.Pid == pid || slices.Contains(p.Threads, pid)
	}) {
		pids = []int32{pid}
	}
	var b tracee.Batch
	task.CloneProcess(&b, pids, int32(unix.SIGCHLD), 0)
	cloned, err := m.stub.Run(&b)
	if errors.Is(err, unix.EEXIST) && pids != nil {
		return m.ghost(0)
	}
	if err != nil {
		return nil, 0, err
	}
	child, err := m.stub.NewChild(cloned[0], cloned[0])
	return child, int(b.Calls[0].Ret), err
}

// ofGone makes one file of a ghost.
func (m *Maker) ofGone(ref image.Ref, ghost *tracee.Stub, pid int) error {
	f := m.head.File(ref)
	if k := kindOf(f.Kind); k.obtain != nil {
		var err error
		m.late[ref], err = k.obtain(m, ghost.Pid, f)
		return err
	}
	// It says nothing of the ghost once that is gone, so nobody is asked whether
	// he may open it; and it is not read, as a seek does, while the ghost is there.
	rest := strings.TrimPrefix(f.Path, "/proc/"+strconv.Itoa(int(f.Gone.Pid)))
	var b tracee.Batch
	i := openPath(&b, fmt.Sprintf("/proc/%d%s", pid, rest), f.Flags)
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	fd := int(b.Calls[i].Ret)
	var err error
	if m.late[ref], err = m.stub.Take(fd); err != nil {
		return err
	}
	var end tracee.Batch
	end.Add(unix.SYS_CLOSE, tracee.W(fd))
	_, err = m.stub.Run(&end)
	return err
}
