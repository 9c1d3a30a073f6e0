package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// schedAttr is struct sched_attr without the utilization clamps.
type schedAttr struct {
	Size     uint32
	Policy   uint32
	Flags    uint64
	Nice     int32
	Priority uint32
	Runtime  uint64
	Deadline uint64
	Period   uint64
}

const ioprioWhoProcess = 1

// scheduling reads a thread's scheduling attributes, cpu affinity and io
// priority.
func scheduling(tid int, t *image.Thread) error {
	var a schedAttr
	if _, _, e := unix.Syscall6(unix.SYS_SCHED_GETATTR, uintptr(tid), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a), 0, 0, 0); e != 0 {
		return fmt.Errorf("sched_getattr: %w", e)
	}
	t.Sched = image.Sched{Policy: a.Policy, Flags: a.Flags, Nice: a.Nice, Priority: a.Priority, Runtime: a.Runtime, Deadline: a.Deadline, Period: a.Period}
	mask := make([]byte, 1024) // 8192 cpus
	n, _, e := unix.Syscall(unix.SYS_SCHED_GETAFFINITY, uintptr(tid), uintptr(len(mask)), uintptr(unsafe.Pointer(&mask[0])))
	if e != 0 {
		return fmt.Errorf("sched_getaffinity: %w", e)
	}
	t.Affinity = mask[:n]
	prio, _, e := unix.Syscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, uintptr(tid), 0)
	if e != 0 {
		return fmt.Errorf("ioprio_get: %w", e)
	}
	t.IOPrio = int32(prio)
	return nil
}

// restoreScheduling adds the calls that set them for the calling thread. The
// affinity is a wish: on a machine with other cpus the container's cpuset
// decides, as it does when cpus go offline.
func restoreScheduling(b *tracee.Batch, t *image.Thread) {
	a := schedAttr{
		Policy: t.Sched.Policy, Flags: t.Sched.Flags, Nice: t.Sched.Nice, Priority: t.Sched.Priority,
		Runtime: t.Sched.Runtime, Deadline: t.Sched.Deadline, Period: t.Sched.Period,
	}
	a.Size = uint32(unsafe.Sizeof(a))
	raw, _ := binary.Append(nil, binary.LittleEndian, a)
	b.Add(unix.SYS_SCHED_SETATTR, tracee.W(0), b.Put(raw), tracee.W(0))
	if len(t.Affinity) > 0 {
		b.Try(unix.SYS_SCHED_SETAFFINITY, tracee.W(0), tracee.W(len(t.Affinity)), b.Put(t.Affinity))
	}
	b.Add(unix.SYS_IOPRIO_SET, tracee.W(ioprioWhoProcess), tracee.W(0), tracee.W(t.IOPrio))
}

const rlimits = 16 // RLIM_NLIMITS

// resourceLimits reads a process's resource limits.
func resourceLimits(pid int) ([]image.Rlimit, error) {
	out := make([]image.Rlimit, rlimits)
	for i := range out {
		var l unix.Rlimit
		if err := unix.Prlimit(pid, i, nil, &l); err != nil {
			return nil, fmt.Errorf("prlimit %d: %w", i, err)
		}
		out[i] = image.Rlimit{Cur: l.Cur, Max: l.Max}
	}
	return out, nil
}

// RestoreLimits sets a process's resource limits. It is among the last things,
// for our own work must not run into them. Raising a hard limit takes
// CAP_SYS_RESOURCE: without it a limit below ours is refused by the kernel.
func RestoreLimits(pid int, limits []image.Rlimit) error {
	for i, l := range limits {
		set := unix.Rlimit{Cur: l.Cur, Max: l.Max}
		if err := unix.Prlimit(pid, i, &set, nil); err != nil {
			if errors.Is(err, unix.EPERM) {
				err = fmt.Errorf("%w (raising a hard limit takes CAP_SYS_RESOURCE)", err)
			}
			return fmt.Errorf("resource limit %d to %d/%d: %w", i, l.Cur, l.Max, err)
		}
	}
	return nil
}
