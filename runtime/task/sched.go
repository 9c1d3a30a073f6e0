package task

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
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

// limitNames are the rows of /proc/PID/limits in the order of RLIMIT_*.
var limitNames = [rlimits]string{
	"Max cpu time", "Max file size", "Max data size", "Max stack size", "Max core file size", "Max resident set",
	"Max processes", "Max open files", "Max locked memory", "Max address space", "Max file locks", "Max pending signals",
	"Max msgqueue size", "Max nice priority", "Max realtime priority", "Max realtime timeout",
}

// resourceLimits reads a process's resource limits. prlimit(2) would take
// CAP_SYS_RESOURCE for a process of another user; the file does not.
func resourceLimits(pid int) ([]image.Rlimit, error) {
	b, err := readProc(pid, "limits")
	if err != nil {
		return nil, err
	}
	out := make([]image.Rlimit, rlimits)
	for i, name := range limitNames {
		_, rest, ok := bytes.Cut(b, []byte(name+" "))
		if !ok {
			return nil, fmt.Errorf("/proc/%d/limits: no %q", pid, name)
		}
		var soft, hard string
		if _, err := fmt.Sscan(string(rest[:min(len(rest), 60)]), &soft, &hard); err != nil {
			return nil, fmt.Errorf("/proc/%d/limits: %q: %w", pid, name, err)
		}
		out[i] = image.Rlimit{Cur: limit(soft), Max: limit(hard)}
	}
	return out, nil
}

func limit(s string) uint64 {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil { // "unlimited"
		return unix.RLIM_INFINITY
	}
	return v
}

// restoreLimits adds the calls that set the process's resource limits. They
// come last in a process, for our own work must not run into them. Raising a
// hard limit above the restoring process's takes CAP_SYS_RESOURCE.
func restoreLimits(b *tracee.Batch, limits []image.Rlimit) {
	for i, l := range limits {
		raw := binary.LittleEndian.AppendUint64(nil, l.Cur)
		raw = binary.LittleEndian.AppendUint64(raw, l.Max)
		b.Add(unix.SYS_SETRLIMIT, tracee.W(i), b.Put(raw))
	}
}
