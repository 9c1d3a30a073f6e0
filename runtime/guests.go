package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Guests are processes that were brought into the container (runc exec): their
// parent is outside its pid namespace, so that inside it is 0. They are saved
// like all others and come back as guests, but nobody waits for them any more.

// admitGuest accepts a process whose parent is not in the container.
func (c *container) admitGuest(p *process) error {
	ppid := p.status[0].PPid
	if c.refuseGuests {
		return fail.Refuse("", "it was brought into the container (runc exec), and such processes are not to be kept", "end it before the checkpoint, or keep it with --exec-sessions=keep")
	}
	if s, err := task.ReadStatus(ppid); err == nil && len(s.NSpid) >= c.pidDepth {
		return fail.Refuse("", fmt.Sprintf("its parent (host %d) is in the container's pid namespace but not in its cgroup", ppid), "move it to the container's cgroup")
	}
	p.guest = true
	return nil
}

// warnOfGuests notes what becomes of them, and for which the bundle would have
// to give more than it does.
func (k *checkpoint) warnOfGuests() {
	g, err := grantsOf(k.c.spec)
	for _, p := range k.census.procs {
		if !p.guest {
			continue
		}
		k.c.warn("%s was brought in by exec: it is restored, but nobody waits for its end", p.name())
		if err != nil {
			continue
		}
		if e := g.checkProcess(p.state.Task, p.place.UserRecord()); e != nil {
			k.c.warn("%s has more than the bundle gives and will not be restored from it: %v", p.name(), e)
		}
	}
	for _, w := range k.census.files.Warnings {
		k.c.warn("%s", w)
	}
}

// guests are the pids of an image's processes that are no descendants of init.
func guests(t *image.Tree) (pids []int) {
	for i := range t.Processes[1:] {
		if p := &t.Processes[1+i]; p.Ppid == 0 {
			pids = append(pids, int(p.Pid))
		}
	}
	return pids
}

// helper is the pid under which the stubs know the one that guests come from.
const helper = 0

// bringHelper brings a stub into the container as runc exec would, so that
// libcontainer decides on its cgroups, namespaces, seccomp filters and keyring.
// The guests are cloned from it with the same parent that it has, which is us;
// when we are gone, they are whose such processes always are. Only the pid is
// left to chance. It returns that.
func (r *restore) bringHelper(taken map[int]bool) (int, error) {
	s, err := r.startHelper()
	if err != nil {
		return 0, fmt.Errorf("helper for processes brought in by exec: %w", err)
	}
	r.stubs[helper] = s
	if err := s.AttachService(file.ServiceFD, r.hole); err != nil {
		return 0, err
	}
	if err := r.maker.Share(s); err != nil {
		return 0, err
	}
	var b tracee.Batch
	task.ResetSignals(&b)
	task.ChildSignals(&b, true)
	if _, err := s.Run(&b); err != nil {
		return 0, err
	}
	status, err := task.ReadStatus(s.Pid)
	if err != nil {
		return 0, err
	}
	if pid := task.Innermost(status.NSpid); !taken[pid] {
		return pid, nil
	}
	return r.replaceHelper(taken)
}

// replaceHelper lets the helper make way: its pid is one of the image's.
func (r *restore) replaceHelper(taken map[int]bool) (pid int, err error) {
	for pid = 2; taken[pid]; pid++ {
	}
	old := r.stubs[helper]
	var b, own tracee.Batch
	task.CloneSibling(&b, int32(pid))
	if err := r.runSteps(old, &b, helper, []int{helper}); err != nil {
		return 0, err
	}
	own.Add(unix.SYS_SETSID) // a session holds on to the pid of its leader
	if _, err := r.stubs[helper].Run(&own); err != nil {
		return 0, err
	}
	return pid, old.Exit(0)
}

func (r *restore) startHelper() (s *tracee.Stub, err error) {
	exe, err := tracee.GuestExecutable()
	if err != nil {
		return nil, err
	}
	defer exe.Close()
	// At the end of this, the helper leaves, if we die before we trace it.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "helper's socket")
	defer theirs.Close()
	no := false
	process := &libcontainer.Process{
		Args: []string{fmt.Sprintf("/proc/self/fd/%d", file.StubExeFD)}, Env: []string{}, Cwd: "/",
		ExtraFiles: []*os.File{exe, r.service.File(), theirs}, NoNewPrivileges: &no, LogLevel: "4",
	}
	if err := r.made.lib.Start(process); err != nil {
		return nil, err
	}
	pid, err := process.Pid()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil { // the init cannot end before it is reaped
			_ = unix.Kill(pid, unix.SIGKILL)
			reapAll([]int{pid})
		}
	}()
	if err := awaitExecutable(pid); err != nil {
		return nil, err
	}
	return tracee.NewGuest(pid, r.service, func() error {
		_, err := unix.Write(pair[0], []byte{0})
		return err
	})
}

// awaitExecutable waits until libcontainer's process executes the stub, which
// it does soon after its start has been reported.
func awaitExecutable(pid int) error {
	const patience = 5 * time.Second
	for begin := time.Now(); ; time.Sleep(100 * time.Microsecond) {
		exe, err := os.Readlink(filepath.Join("/proc", fmt.Sprint(pid), "exe"))
		if err == nil && strings.HasPrefix(exe, "/memfd:ocickpt-stub") {
			return nil
		}
		if err != nil || time.Since(begin) > patience {
			return errors.Join(fmt.Errorf("process %d executes %q instead of the stub", pid, exe), err)
		}
	}
}

// reapGuests waits for the ends of guests, which are our children for as long
// as we live: the init's own end waits for theirs.
func (r *Restored) reapGuests() {
	for _, pid := range r.made.guests {
		go func() {
			for {
				if _, err := unix.Wait4(pid, nil, unix.WALL, nil); !errors.Is(err, unix.EINTR) {
					return
				}
			}
		}()
	}
}

// idsOf lists every id that an image's processes, threads, groups and sessions
// have.
func idsOf(all []forest.Process, reserved []int) map[int]bool {
	ids := map[int]bool{1: true}
	for _, p := range all {
		for _, id := range []int{p.Pid, p.Pgid, p.Sid} {
			ids[id] = true
		}
	}
	for _, id := range reserved {
		ids[id] = true
	}
	return ids
}
