package runtime

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// admitThreads refuses what a process's threads are in themselves, as far as it
// shows while they run.
func admitThreads(p *process) error {
	for i, s := range p.status {
		object := ""
		if i > 0 {
			object = fmt.Sprintf("thread %d", task.Innermost(s.NSpid))
		}
		if s.TracerPid != 0 && s.TracerPid != unix.Gettid() {
			return fail.Refuse(object, "it is being traced by "+tracerName(s.TracerPid)+", and nobody else can stop it", "detach the debugger before the checkpoint")
		}
		if err := s.Foreign(); err != nil {
			return fail.On(object, err)
		}
	}
	return nil
}

// tracerName names a debugger, which may be inside of the container or outside.
func tracerName(pid int) string {
	s, err := task.ReadStatus(pid)
	if err != nil {
		return fmt.Sprintf("process %d", pid)
	}
	comm, _ := task.Comm(pid)
	return task.Name(task.Innermost(s.NSpid), pid, comm)
}

// checkCalls refuses, before anything is stopped, processes that cannot make system
// calls for us: those of another kind, and those whose limits leave no room for a batch.
func (n *census) checkCalls() error {
	for _, p := range n.procs {
		err := checkABI(p.pid)
		if err == nil {
			err = checkRoom(p)
		}
		if err != nil {
			return fail.In(p.name(), err)
		}
	}
	return nil
}

// checkRoom compares what a process may map with what a batch needs: a few
// pages for its calls, and more where there are many areas to ask about.
func checkRoom(p *process) error {
	const batch, anArea = 32 << 10, 96
	need := uint64(batch + anArea*len(p.space.Record.Areas))
	limits, err := task.Limits(p.pid)
	if err != nil {
		return err
	}
	s := p.status[0]
	for _, l := range []struct {
		name string
		used uint64
		soft uint64
	}{
		{"RLIMIT_AS", s.VMSize, limits[unix.RLIMIT_AS].Cur},
		{"RLIMIT_DATA", s.VMData, limits[unix.RLIMIT_DATA].Cur},
	} {
		if l.soft != unix.RLIM_INFINITY && l.used+need > l.soft {
			return fail.Refuse("", fmt.Sprintf("its limit %s of %d bytes leaves %d, and the system calls it has to make take %d", l.name, l.soft, max(l.soft, l.used)-l.used, need),
				"raise the limit for the time of the checkpoint (prlimit --pid)")
		}
	}
	return nil
}
