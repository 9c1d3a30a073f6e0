package mm

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// advice gives VmFlags of smaps back that madvise(2) has set.
var advice = map[string]int{
	"sr": unix.MADV_SEQUENTIAL, "rr": unix.MADV_RANDOM, "dc": unix.MADV_DONTFORK, "wf": unix.MADV_WIPEONFORK,
	"dd": unix.MADV_DONTDUMP, "hg": unix.MADV_HUGEPAGE, "nh": unix.MADV_NOHUGEPAGE, "mg": unix.MADV_MERGEABLE,
}

// The names that prctl(2) PR_SET_VMA_ANON_NAME gives, as smaps shows them.
const (
	namedPrivate = "[anon:"
	namedShared  = "[anon_shmem:"
)

// LockFuture finds out how a process locks what it maps: at once, or when it is
// touched. A new page that is locked at once is there (mincore(2)).
func (s *Space) LockFuture(run func(*tracee.Batch) error) error {
	at, err := Hole(s.Narrow(), s.Record)
	if err != nil {
		return err
	}
	var b tracee.Batch
	there := b.Reserve(1)
	page, size := tracee.W(at), tracee.W(PageSize)
	b.Add(unix.SYS_MMAP, page, size, tracee.W(unix.PROT_READ|unix.PROT_WRITE), tracee.W(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE), tracee.W(^uint64(0)), tracee.W(0))
	b.Add(unix.SYS_MINCORE, page, size, there)
	b.Add(unix.SYS_MUNMAP, page, size)
	if err := run(&b); err != nil {
		return fmt.Errorf("how mlockall locks: %w", err)
	}
	s.Record.LockFuture = unix.MCL_FUTURE
	if b.At(there, 1)[0]&1 == 0 {
		s.Record.LockFuture |= unix.MCL_ONFAULT
	}
	return nil
}

// manyCalls is how long a batch may get: far below what the service area holds.
const manyCalls = 16 << 10

// Protect adds the calls that give areas their guards, protection, advice, names,
// locks and seals, once their contents are in. It runs the batch when that gets
// long.
//
// The order: guards cannot be put into locked memory, locking faults pages in
// by the right that the area has, and what is sealed takes nothing else.
func (f *Filler) Protect(s *tracee.Stub, b *tracee.Batch, ref image.Ref, m *image.MM) error {
	flush := func() error {
		if len(b.Calls) < manyCalls {
			return nil
		}
		_, err := s.Run(b)
		b.Reset()
		return err
	}
	for _, g := range f.guards[ref] {
		b.Add(unix.SYS_MADVISE, tracee.W(g.start), tracee.W(g.end-g.start), tracee.W(unix.MADV_GUARD_INSTALL))
		if err := flush(); err != nil {
			return fail.On("guard pages", err)
		}
	}
	for i := range m.Areas {
		a := &m.Areas[i]
		if a.VDSO() {
			continue
		}
		protect(b, a)
		if err := flush(); err != nil {
			return err
		}
	}
	if m.LockFuture != 0 {
		b.Add(unix.SYS_MLOCKALL, tracee.W(m.LockFuture))
	}
	return nil
}

func protect(b *tracee.Batch, a *image.Area) {
	at, size := tracee.W(a.Start), tracee.W(a.End-a.Start)
	if opened(a) {
		b.Add(unix.SYS_MPROTECT, at, size, tracee.W(a.Prot))
	}
	for _, f := range a.Flags {
		if adv, ok := advice[f]; ok {
			b.Add(unix.SYS_MADVISE, at, size, tracee.W(adv))
		}
	}
	if name := givenName(a); name != "" { // EINVAL from kernels without CONFIG_ANON_VMA_NAME
		b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_SET_VMA), tracee.W(unix.PR_SET_VMA_ANON_NAME), at, size, b.String(name))
	}
	if has(a, locked) {
		late := 0
		if has(a, lockedLate) {
			late = unix.MLOCK_ONFAULT
		}
		// It locks and then fails where there is nothing to fault in: memory that
		// cannot be accessed, a file that is shorter. CheckLocked tells.
		b.Try(unix.SYS_MLOCK2, at, size, tracee.W(late))
	}
	if has(a, sealed) {
		b.Add(unix.SYS_MSEAL, at, size, tracee.W(0))
	}
}

// givenName is the name that the program gave an area, or "".
func givenName(a *image.Area) string {
	for _, prefix := range []string{namedPrivate, namedShared} {
		if name, ok := strings.CutPrefix(a.Name, prefix); ok {
			return strings.TrimSuffix(name, "]")
		}
	}
	return ""
}

// Locked is how much of an address space is locked, in bytes.
func Locked(m *image.MM) (total uint64) {
	for i := range m.Areas {
		if has(&m.Areas[i], locked) {
			total += m.Areas[i].Size()
		}
	}
	return total
}

// CheckLocked makes sure that a process has as much locked memory as it had.
func CheckLocked(pid int, m *image.MM) error {
	want := Locked(m)
	if want == 0 {
		return nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	var have uint64
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmLck:")); ok {
			if _, err := fmt.Sscanf(string(rest), "%d", &have); err != nil {
				return fmt.Errorf("VmLck of process %d: %w", pid, err)
			}
		}
	}
	if have <<= 10; have < want {
		return fail.Refuse("locked memory", fmt.Sprintf("%d bytes of %d could be locked (mlock)", have, want), "raise RLIMIT_MEMLOCK here, or give CAP_IPC_LOCK")
	}
	return nil
}
