package task

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// schedAttr is struct sched_attr.
type schedAttr struct {
	Size     uint32
	Policy   uint32
	Flags    uint64
	Nice     int32
	Priority uint32
	Runtime  uint64
	Deadline uint64
	Period   uint64
	UtilMin  uint32
	UtilMax  uint32
}

const (
	ioprioWhoProcess = 1

	schedFlagUtilClamp = 0x20 | 0x40 // SCHED_FLAG_UTIL_CLAMP_MIN, _MAX
	utilMax            = 1024        // SCHED_CAPACITY_SCALE: no clamp
)

// Usual is how the scheduler treats threads that have asked for nothing.
type Usual struct {
	Slice uint64 // of time, as sched_getattr(2) shows it for those with none of their own
	CPUs  []byte // the container may use, as a mask
}

// NewUsual looks at this thread, and at the cpus of the file given (cpuset(7):
// cpuset.cpus.effective) or else at all that are online.
func NewUsual(cpus string) (Usual, error) {
	list, err := os.ReadFile(cpus)
	if err != nil || len(bytes.TrimSpace(list)) == 0 {
		list, err = os.ReadFile("/sys/devices/system/cpu/online")
	}
	if err != nil {
		return Usual{}, err
	}
	a, err := attributes(0)
	if err != nil {
		return Usual{}, err
	}
	return Usual{Slice: a.Runtime, CPUs: cpuMask(string(list))}, nil
}

// cpuMask makes a mask of a list like "0-3,8" (cpuset(7), "List format").
func cpuMask(list string) (mask []byte) {
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		to, e := strconv.Atoi(last)
		if err != nil || e != nil || to > maxCPUs {
			continue
		}
		for cpu := from; cpu <= to; cpu++ {
			for len(mask) <= cpu/8 {
				mask = append(mask, 0)
			}
			mask[cpu/8] |= 1 << (cpu % 8)
		}
	}
	return mask
}

// maxCPUs is above CONFIG_NR_CPUS of any kernel.
const maxCPUs = 8192

func attributes(tid int) (a schedAttr, err error) {
	if _, _, e := unix.Syscall6(unix.SYS_SCHED_GETATTR, uintptr(tid), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a), 0, 0, 0); e != 0 {
		return a, fmt.Errorf("sched_getattr: %w", e)
	}
	return a, nil
}

// scheduling reads a thread's scheduling attributes, cpu affinity and io
// priority. A slice and an affinity that are the usual ones are left out: the
// thread is to have those of the machine that it is restored on.
func scheduling(tid int, t *image.Thread, usual *Usual) error {
	a, err := attributes(tid)
	if err != nil {
		return err
	}
	t.Sched = image.Sched{
		Policy: a.Policy, Flags: a.Flags, Nice: a.Nice, Priority: a.Priority,
		Runtime: a.Runtime, Deadline: a.Deadline, Period: a.Period,
	}
	if a.Policy != unix.SCHED_DEADLINE && a.Runtime == usual.Slice {
		t.Sched.Runtime = 0
	}
	// Without CONFIG_UCLAMP_TASK both are zero.
	if a.UtilMin != 0 || a.UtilMax != 0 && a.UtilMax != utilMax {
		t.Sched.UtilMin, t.Sched.UtilMax = a.UtilMin, a.UtilMax
	}
	mask := make([]byte, maxCPUs/8)
	n, _, e := unix.Syscall(unix.SYS_SCHED_GETAFFINITY, uintptr(tid), uintptr(len(mask)), uintptr(unsafe.Pointer(&mask[0])))
	if e != 0 {
		return fmt.Errorf("sched_getaffinity: %w", e)
	}
	if !bytes.Equal(bytes.TrimRight(mask, "\x00"), usual.CPUs) {
		t.Affinity = mask[:n]
	}
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
	if t.Sched.UtilMin != 0 || t.Sched.UtilMax != 0 {
		a.Flags |= schedFlagUtilClamp
		a.UtilMin, a.UtilMax = t.Sched.UtilMin, t.Sched.UtilMax
	}
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

// Limits reads a process's resource limits. prlimit(2) would take
// CAP_SYS_RESOURCE for a process of another user; the file does not.
func Limits(pid int) ([]image.Rlimit, error) {
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
