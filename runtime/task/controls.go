package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// What prctl(2) sets for a thread beside its credentials and its scheduling.
const (
	personalityQuery = 0xffffffff

	prSetMDWE        = 65
	prGetMDWE        = 66
	prSetMemoryMerge = 67
	prGetMemoryMerge = 68

	tscSigsegv = 2 // PR_TSC_SIGSEGV

	mceKillSet = 1 // PR_MCE_KILL_SET
	// The kernel counts late 0, early 1, default 2; the image default 0.
	mceLate, mceEarly = 0, 1

	specControllable = 1     // PR_SPEC_PRCTL
	specRestricting  = 4 | 8 // PR_SPEC_DISABLE, PR_SPEC_FORCE_DISABLE
	specNoExec       = 16    // PR_SPEC_DISABLE_NOEXEC
	specL1DFlush     = 2     // where "enable" is what restricts
	specEnable       = 2     // PR_SPEC_ENABLE

	pfIOFlusher = 0x00080000 | 0x00100000 // PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE (include/linux/sched.h)
)

// mceKill are the policies of PR_MCE_KILL by their number in the image.
var mceKill = [...]struct{ set, policy uint32 }{{0, 0}, {mceKillSet, mceEarly}, {mceKillSet, mceLate}}

// askControls adds the calls that read a thread's controls. The default of its
// timer slack has no call: PR_SET_TIMERSLACK 0 falls back to it. slack, the one
// that is in force, is set again right behind; a real-time thread has none.
func askControls(b *tracee.Batch, slack uint64) func() image.Controls {
	person := b.Try(unix.SYS_PERSONALITY, tracee.W(personalityQuery))
	tsc := b.Reserve(8)
	b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_GET_TSC), tsc)
	mce := b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_MCE_KILL_GET))
	flusher := b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_GET_IO_FLUSHER))
	var spec [3]int
	for i := range spec {
		spec[i] = b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_GET_SPECULATION_CTRL), tracee.W(i))
	}
	own := -1
	if slack != 0 {
		b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_SET_TIMERSLACK), tracee.W(0))
		own = b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_GET_TIMERSLACK))
		b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_SET_TIMERSLACK), tracee.W(slack))
	}
	cpuid := askCPUID(b)
	return func() (c image.Controls) {
		c.Personality = uint32(b.Calls[person].Ret)
		c.NoTSC = binary.LittleEndian.Uint32(b.At(tsc, 4)) == tscSigsegv
		c.NoCPUID = cpuid()
		if own >= 0 {
			c.TimerSlack = uint64(b.Calls[own].Ret)
		}
		switch b.Calls[mce].Ret {
		case mceEarly:
			c.MCEKill = 1
		case mceLate:
			c.MCEKill = 2
		}
		c.IOFlusher = b.Calls[flusher].Ret == 1
		for i, call := range spec {
			if v := b.Calls[call].Ret; restricted(i, v) {
				c.Speculation[i] = uint32(v)
			}
		}
		return c
	}
}

// restricted tells a speculation control that the thread has set from one that
// the processor or the kernel's command line decides.
func restricted(which int, state int64) bool {
	limits := int64(specRestricting | specNoExec)
	if which == specL1DFlush {
		limits = specEnable
	}
	return state > 0 && state&specControllable != 0 && state&limits != 0
}

// restoreControls adds the calls that set them, but for what only a tracer or
// the thread's maker can set.
func restoreControls(b *tracee.Batch, c *image.Controls) {
	if c.Personality != 0 {
		b.Add(unix.SYS_PERSONALITY, tracee.W(c.Personality))
	}
	if c.NoTSC {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_TSC), tracee.W(tscSigsegv))
	}
	if c.MCEKill != 0 {
		k := mceKill[c.MCEKill]
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_MCE_KILL), tracee.W(k.set), tracee.W(k.policy))
	}
	if c.IOFlusher {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_IO_FLUSHER), tracee.W(1))
	}
	for i, v := range c.Speculation {
		if v != 0 {
			b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_SPECULATION_CTRL), tracee.W(i), tracee.W(v&^specControllable))
		}
	}
	if c.NoCPUID {
		restoreCPUID(b)
	}
}

// SlackForChild adds the call by which a stub makes the default timer slack of
// the tasks that it clones from then on: a task's default is what its maker has
// in force (copy_process in kernel/fork.c), and nothing sets it later.
func SlackForChild(b *tracee.Batch, c *image.Controls) {
	if c.TimerSlack != 0 {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_TIMERSLACK), tracee.W(c.TimerSlack))
	}
}

// outsideControls reads what a tracer sees of a thread.
func outsideControls(t *tracee.Thread, c *image.Controls) error {
	d, err := t.Dispatch()
	if err != nil {
		return fmt.Errorf("system call dispatch: %w", err)
	}
	if d.Mode != 0 {
		c.Dispatch = &image.Dispatch{Mode: d.Mode, Selector: d.Selector, Offset: d.Offset, Length: d.Length}
	}
	if c.TLS, err = t.ThreadAreas(); err != nil {
		return fmt.Errorf("thread-local segments: %w", err)
	}
	return nil
}

// restoreTraced sets what a tracer can set of a thread's controls.
func restoreTraced(s *tracee.Stub, c *image.Controls) error {
	for _, area := range c.TLS {
		if err := s.SetThreadArea(area); err != nil {
			return fmt.Errorf("thread-local segment: %w", err)
		}
	}
	if d := c.Dispatch; d != nil {
		if err := s.SetDispatch(tracee.Dispatch{Mode: d.Mode, Selector: d.Selector, Offset: d.Offset, Length: d.Length}); err != nil {
			return fmt.Errorf("system call dispatch: %w", err)
		}
	}
	return nil
}

// unseenFlusher finds a thread that is an I/O flusher and may not be asked:
// PR_GET_IO_FLUSHER takes CAP_SYS_RESOURCE like PR_SET_IO_FLUSHER, and what has
// been set stays when the capability goes. /proc/PID/stat shows the task's flags.
func unseenFlusher(tid int) (bool, error) {
	const statFlags = 9
	stat, err := ReadStat(tid)
	if err != nil {
		return false, err
	}
	return stat.Field(statFlags)&pfIOFlusher == pfIOFlusher, nil
}

// coredumpFilter reads which memory a core dump of the process would hold.
func coredumpFilter(pid int) (uint32, error) {
	v, err := procNumber(pid, "coredump_filter", 16)
	return uint32(v), err
}

// RestoreCoredumpFilter sets it. Processes inherit it, the stub from us.
func RestoreCoredumpFilter(pid int, filter uint32) error {
	if own, err := coredumpFilter(os.Getpid()); err == nil && own == filter {
		return nil
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/coredump_filter", pid), fmt.Appendf(nil, "%#x", filter), 0)
}

// NoLoginUID is the login uid of a task that no login has made.
const NoLoginUID = ^uint32(0)

// LoginUID reads who logged in to start the process (pam_loginuid(8)).
func LoginUID(pid int) (uint32, error) {
	v, err := procNumber(pid, "loginuid", 10)
	if errors.Is(err, tracee.ErrGone) && !Ended(pid) {
		return NoLoginUID, nil // a kernel without CONFIG_AUDIT
	}
	return uint32(v), err
}

// RestoreLoginUID makes a stub write its own login uid, as only the thread
// itself may. It must still see the container's /proc.
func RestoreLoginUID(s *tracee.Stub, uid uint32) error {
	var b tracee.Batch
	b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String("/proc/thread-self/loginuid"), tracee.W(unix.O_WRONLY|unix.O_CLOEXEC))
	if _, err := s.Run(&b); err != nil {
		return err
	}
	fd := tracee.W(b.Calls[0].Ret)
	b.Reset()
	text := fmt.Sprint(uid)
	wrote := b.Try(unix.SYS_WRITE, fd, b.String(text), tracee.W(len(text)))
	b.Add(unix.SYS_CLOSE, fd)
	if _, err := s.Run(&b); err != nil {
		return err
	}
	return b.Err(wrote)
}

// askProcessControls adds the calls that read what a process has set for itself
// as a whole.
func askProcessControls(b *tracee.Batch, t *image.Task) func() {
	thp := b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_GET_THP_DISABLE))
	mdwe := b.Try(unix.SYS_PRCTL, tracee.W(prGetMDWE))
	merge := b.Try(unix.SYS_PRCTL, tracee.W(prGetMemoryMerge))
	features := askXFeatures(b)
	return func() {
		t.THPDisable = uint32(max(b.Calls[thp].Ret, 0))
		t.MDWE = uint32(max(b.Calls[mdwe].Ret, 0))
		t.MemoryMerge = b.Calls[merge].Ret > 0
		t.XFeatures = features()
	}
}

// restoreProcessControls adds the calls that set them, but for MDWE.
func restoreProcessControls(b *tracee.Batch, t *image.Task) {
	if t.THPDisable != 0 {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_THP_DISABLE), tracee.W(1), tracee.W(t.THPDisable&^1))
	}
	if t.MemoryMerge {
		b.Add(unix.SYS_PRCTL, tracee.W(prSetMemoryMerge), tracee.W(1))
	}
	restoreXFeatures(b, t.XFeatures)
}

// restoreMDWE adds the call that denies memory which is, or becomes, writable
// and executable. It comes when all areas have their protection.
func restoreMDWE(b *tracee.Batch, t *image.Task) {
	if t.MDWE != 0 {
		b.Add(unix.SYS_PRCTL, tracee.W(prSetMDWE), tracee.W(t.MDWE))
	}
}

// Foreign refuses what cannot be made again, told by a thread's status.
func (s *Status) Foreign() error {
	switch {
	case s.Features != "":
		return fail.Refuse("shadow stack ("+s.Features+")", "it is not supported", "start the program without it (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)")
	case s.UntagMask != 0 && s.UntagMask != ^uint64(0):
		return fail.Refuse("tagged addresses (ARCH_ENABLE_TAGGED_ADDR)", "they are not supported", "")
	}
	return nil
}
