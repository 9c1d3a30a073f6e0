package tracee

import (
	"encoding/binary"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Regs are the general registers of a stopped thread, struct user_regs_struct.
type Regs struct{ unix.PtraceRegs }

// RegsSize is the size of the register set in an image.
const RegsSize = int(unsafe.Sizeof(Regs{}))

// noSyscall in orig_rax tells the kernel that the thread is in no system call,
// so that it neither restarts one nor touches rax on the way out.
const noSyscall = ^uint64(0)

// Kernel-internal results that a thread stopped inside a system call shows in
// rax (include/linux/errno.h). User space never sees them: on the way out the
// kernel turns them into a restart or into EINTR.
const (
	eRestartSys     = 512
	eRestartNoIntr  = 513
	eRestartNoHand  = 514
	eRestartBlock   = 516
	restartSyscall  = unix.SYS_RESTART_SYSCALL
	restartNarrow   = 0 // restart_syscall(2) of 32-bit code
	syscallInsnSize = 2 // 0f 05, cd 80
)

// Regs reads the thread's general registers.
func (t *Thread) Regs() (r Regs, err error) {
	_, err = ptrace(unix.PTRACE_GETREGS, t.Tid, 0, uintptr(unsafe.Pointer(&r)))
	return r, err
}

// SetRegs writes the thread's general registers.
func (t *Thread) SetRegs(r Regs) error {
	_, err := ptrace(unix.PTRACE_SETREGS, t.Tid, 0, uintptr(unsafe.Pointer(&r)))
	return err
}

// XState reads the extended state (x87, SSE, AVX, PKRU ...) in the layout of
// the xsave instruction.
func (t *Thread) XState() ([]byte, error) {
	return t.RegSet(ntX86XState, make([]byte, 16<<10))
}

// SetXState writes the extended state.
func (t *Thread) SetXState(b []byte) error { return t.SetRegSet(ntX86XState, b) }

// KernelRegs makes the registers of the struct pt_regs with which a thread has
// entered the kernel; the bases of its segments the kernel keeps apart, and the
// selectors of ds, es, fs and gs.
func KernelRegs(raw []byte, fs, gs uint64, selectors [4]uint16) (r Regs, err error) {
	if _, err = binary.Decode(append(slices.Clone(raw), make([]byte, RegsSize-len(raw))...), binary.LittleEndian, &r.PtraceRegs); err == nil {
		r.Fs_base, r.Gs_base = fs, gs
		r.Ds, r.Es, r.Fs, r.Gs = uint64(selectors[0]), uint64(selectors[1]), uint64(selectors[2]), uint64(selectors[3])
	}
	return r, err
}

// SetResult makes the registers those of a thread whose system call has returned
// v.
func (r *Regs) SetResult(v uint64) { r.Rax, r.Orig_rax = v, noSyscall }

// In64BitMode tells of a thread that runs code of 64 bits, as ours is.
func (r *Regs) In64BitMode() bool { return r.Cs == userCS64 }

// Encode returns the registers as they stand in an image: user_regs_struct in
// its order, little endian.
func (r *Regs) Encode() []byte {
	b := make([]byte, RegsSize)
	_, _ = binary.Encode(b, binary.LittleEndian, &r.PtraceRegs)
	return b
}

// DecodeRegs is the reverse of Encode; b must be RegsSize long.
func DecodeRegs(b []byte) (r Regs, err error) {
	_, err = binary.Decode(b, binary.LittleEndian, &r.PtraceRegs)
	return r, err
}

// IP and SP are the instruction and the stack pointer.
func (r *Regs) IP() uint64 { return r.Rip }

// SP is the stack pointer.
func (r *Regs) SP() uint64 { return r.Rsp }

// Narrow reports a thread that runs 32-bit code. Its system calls have numbers
// and arguments of their own.
func (r *Regs) Narrow() bool { return r.Cs == userCS32 }

// foreign says why a thread cannot run our code and find its way back.
func (r *Regs) foreign() string {
	switch {
	case r.Cs != userCS64 && !r.Narrow():
		return "it runs in a code segment of its own (modify_ldt)"
	case r.Narrow() && r.Ss != userDS:
		return "its stack is in a segment of its own (modify_ldt)"
	}
	return ""
}

// Syscall returns the number of the system call the thread is stopped in and
// the result the kernel holds for it; ok is false outside of one.
func (r *Regs) Syscall() (nr uint64, result int64, ok bool) {
	if r.Narrow() {
		return uint64(uint32(r.Orig_rax)), int64(int32(r.Rax)), int32(r.Orig_rax) >= 0
	}
	return r.Orig_rax, int64(r.Rax), int64(r.Orig_rax) >= 0
}

// Args are the arguments of the system call the thread is stopped in.
func (r *Regs) Args() [6]uint64 {
	if r.Narrow() {
		a := [6]uint64{r.Rbx, r.Rcx, r.Rdx, r.Rsi, r.Rdi, r.Rbp}
		for i := range a {
			a[i] = uint64(uint32(a[i]))
		}
		return a
	}
	return [6]uint64{r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9}
}

// NeedsRestartBlock reports a call that ended with ERESTART_RESTARTBLOCK: the
// kernel keeps what it needs to go on in the task, outside the registers.
func (r *Regs) NeedsRestartBlock() bool {
	_, result, ok := r.Syscall()
	return ok && result == -eRestartBlock
}

// Reenter makes the thread issue the call it is stopped in again, arguments
// unchanged, by stepping back over the syscall instruction. (32-bit code that has
// come in by sysenter stands behind an int $0x80 of the vdso's.)
func (r *Regs) Reenter() {
	r.Rax, r.Orig_rax = r.Orig_rax, noSyscall
	r.Rip -= syscallInsnSize
}

// LoadedNumber looks for the instruction (mov $nr, %eax) that loads one of the
// given system call numbers shortly before the syscall instruction that the
// thread has just executed. The nearest one counts.
func (t *Thread) LoadedNumber(r *Regs, numbers []uint64) (nr uint64, ok bool) {
	const movEAX = 0xb8
	code := make([]byte, 48)
	if t.Read(r.Rip-syscallInsnSize-uint64(len(code)), code) != nil {
		return 0, false
	}
	for i := len(code) - 5; i >= 0; i-- {
		if code[i] != movEAX {
			continue
		}
		if n := uint64(binary.LittleEndian.Uint32(code[i+1:])); slices.Contains(numbers, n) {
			return n, true
		}
	}
	return 0, false
}

// Resumed returns the registers of a thread that has been put back into call
// nr with the given result: one that the kernel restarts by itself is left to
// it, any other is what the call returns.
func (r Regs) Resumed(nr uint64, result int64) Regs {
	r.Rax = uint64(result)
	r.Orig_rax = noSyscall
	switch -result {
	case eRestartSys, eRestartNoIntr, eRestartNoHand, eRestartBlock:
		r.Orig_rax = nr
	}
	return r
}

// userView is what the kernel would make of the registers on the way out with
// no signal to deliver. A thread that restores itself, untraced, needs them
// like this: the kernel's own restart happens only on its own way out. A
// restart block lives on in the task and restart_syscall(2) uses it.
func (r Regs) userView() Regs {
	if nr, result, ok := r.Syscall(); ok {
		switch -result {
		case eRestartSys, eRestartNoIntr, eRestartNoHand:
			r.Rax, r.Rip = nr, r.Rip-syscallInsnSize
		case eRestartBlock:
			r.Rax, r.Rip = restartSyscall, r.Rip-syscallInsnSize
			if r.Narrow() {
				r.Rax = restartNarrow
			}
		}
	}
	r.Orig_rax = noSyscall
	return r
}
