package tracee

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Service is the memory through which stubs are told what to do: one page of
// code and an area for entries and data, a memfd that every stub and the
// coordinator map. Stubs work one at a time, so they share it.
//
// It is not the memfd of the stub's executable: the kernel refuses to change
// /proc/PID/exe while a mapping of the old executable is left (KERNEL:
// replace_mm_exe_file in kernel/fork.c), and the service outlives it.
type Service struct {
	file *os.File
	mem  []byte
}

// ServiceSize is the size in bytes of the service area in a stub.
const ServiceSize = 8 << 20

const serviceData = 4096 // behind the code page

// NewService makes the memory; Close frees the coordinator's part of it.
func NewService() (*Service, error) {
	f, err := memfd("ocickpt-service", 0)
	if err != nil {
		return nil, err
	}
	s := &Service{file: f}
	if err = f.Truncate(ServiceSize); err == nil {
		s.mem, err = unix.Mmap(int(f.Fd()), 0, ServiceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("service memory: %w", err), f.Close())
	}
	copy(s.mem, serviceCode())
	return s, nil
}

// File is the memfd, to be handed to the first stub.
func (s *Service) File() *os.File { return s.file }

// Close unmaps and closes the coordinator's part.
func (s *Service) Close() error {
	return errors.Join(unix.Munmap(s.mem), s.file.Close())
}

// StubExecutable is a memfd with the executable that a container's init starts
// as. The caller closes it.
func StubExecutable() (*os.File, error) { return executable("") }

// GuestExecutable is the same for a process that is brought into a container,
// which nobody holds back until we trace it: it begins with reading a byte from
// descriptor 5, and leaves if there is none.
func GuestExecutable() (*os.File, error) { return executable(awaitByte) }

func executable(begin string) (*os.File, error) {
	const mfdExec = 0x10 // MFD_EXEC, Linux 6.3; before it every memfd is executable
	f, err := memfd("ocickpt-stub", mfdExec)
	if errors.Is(err, unix.EINVAL) {
		f, err = memfd("ocickpt-stub", 0)
	}
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(stubELF(begin)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func memfd(name string, flags int) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|flags)
	if err != nil {
		return nil, fmt.Errorf("memfd_create %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Stub is a stopped task of a container being restored that runs our code. It
// dies with us (StubOptions).
type Stub struct {
	*Thread
	service *Service
	base    uint64 // of the service area in the task, 0 before AttachService
	code    uint64 // of the service code
	regs    Regs   // what a call starts from
}

// allSignalsButTrap is blocked in a stub: an INT3 whose SIGTRAP is blocked
// would make the kernel unblock it and reset its handler (force_sig).
const allSignalsButTrap = ^uint64(1 << (unix.SIGTRAP - 1))

// NewGuest takes over a process that executes GuestExecutable and has not been
// sent its byte yet. send does that.
func NewGuest(pid int, s *Service, send func() error) (*Stub, error) {
	t, err := Seize(pid, pid, StubOptions)
	if err == nil {
		err = t.Interrupt()
	}
	if err == nil {
		err = t.WaitInterrupt(guestPatience)
	}
	if err == nil {
		err = send()
	}
	if err != nil {
		return nil, err
	}
	return NewStub(t, s)
}

// guestPatience bounds the wait for a guest to stop.
const guestPatience = 5 * time.Second

// NewStub takes over a thread that executes StubExecutable and rests at a stop
// before its INT3: the exec, as a rule. Registers written there would be overwritten
// by execve's own return value, so it runs on to the INT3 first.
func NewStub(t *Thread, s *Service) (*Stub, error) {
	if err := t.SetSigMask(allSignalsButTrap); err != nil {
		return nil, err
	}
	stub := &Stub{Thread: t, service: s, code: stubCode}
	if _, err := stub.toTrap(); err != nil {
		return nil, err
	}
	var err error
	stub.regs, err = t.Regs()
	return stub, err
}

// NewChild takes over a task that a stub has cloned, at its first stop.
func (s *Stub) NewChild(pid, tid int) (*Stub, error) {
	c := *s
	c.Thread = &Thread{Pid: pid, Tid: tid}
	stop, err := c.Wait()
	if err != nil {
		return nil, err
	}
	if stop.Exited {
		return nil, fmt.Errorf("new task %d: %w", tid, ErrGone)
	}
	return &c, nil
}

// ErrFault is wrapped when a stub has met an instruction that it may not execute.
var ErrFault = errors.New("its stub faulted")

// toTrap resumes the stub until its INT3 and returns the ids of the tasks that
// it cloned on the way.
func (s *Stub) toTrap() (cloned []int, err error) {
	if err := s.Cont(0); err != nil {
		return nil, err
	}
	for {
		stop, err := s.Wait()
		switch {
		case err != nil:
			return cloned, err
		case stop.Exited:
			return cloned, fmt.Errorf("task %d: %w", s.Tid, ErrGone)
		case stop.Event == 0 && stop.Signal == unix.SIGTRAP:
			return cloned, nil
		case stop.Event == unix.PTRACE_EVENT_FORK, stop.Event == unix.PTRACE_EVENT_VFORK, stop.Event == unix.PTRACE_EVENT_CLONE:
			id, err := s.EventMessage()
			if err != nil {
				return cloned, err
			}
			cloned = append(cloned, id)
		case stop.Event == 0 && stop.Signal == unix.SIGSEGV:
			return cloned, fmt.Errorf("task %d: %w", s.Tid, ErrFault)
		}
		if err := s.Cont(0); err != nil {
			return cloned, err
		}
	}
}

// AttachService maps the service area at addr; fd is the service memfd's
// number in the stub. The previous mapping, if any, stays for the caller to
// unmap.
func (s *Stub) AttachService(fd int, addr uint64) error {
	const fixed = unix.MAP_SHARED | unix.MAP_FIXED_NOREPLACE
	if _, err := s.call(unix.SYS_MMAP, addr, serviceData, unix.PROT_READ|unix.PROT_EXEC, fixed, uint64(fd), 0); err != nil {
		return fmt.Errorf("map the service code at %#x: %w", addr, err)
	}
	if _, err := s.call(unix.SYS_MMAP, addr+serviceData, ServiceSize-serviceData, unix.PROT_READ|unix.PROT_WRITE, fixed, uint64(fd), serviceData); err != nil {
		return fmt.Errorf("map the service data at %#x: %w", addr, err)
	}
	s.base, s.code = addr, addr
	return nil
}

// Service returns where the service area lies in the stub.
func (s *Stub) Service() uint64 { return s.base }

// call makes one call with no memory to pass.
func (s *Stub) call(nr uintptr, args ...uint64) (int64, error) {
	var a [6]uint64
	copy(a[:], args)
	if err := s.SetRegs(s.regs.forCall(s.code+serviceCall, nr, a)); err != nil {
		return 0, err
	}
	if _, err := s.toTrap(); err != nil {
		return 0, err
	}
	r, err := s.Thread.Regs()
	if err != nil {
		return 0, err
	}
	return r.result(), (&Batch{Calls: []Call{{Ret: r.result()}}}).Err(0)
}

// Run makes the stub run the batch and returns the ids of the tasks that it
// cloned, in order. A failing call that is not tolerated ends the batch with a
// *CallError. One with more calls than the service area holds runs in parts.
func (s *Stub) Run(b *Batch) (cloned []int, err error) {
	if len(b.Calls) == 0 {
		return nil, nil
	}
	entries := s.service.mem[serviceData:]
	dataAt := (len(b.Calls)*entrySize + 15) &^ 15
	switch {
	case dataAt+len(b.Data) <= len(entries):
	case len(b.Calls) > 1:
		return s.runParts(b, len(b.Calls)/2)
	default:
		return nil, fmt.Errorf("batch of %d bytes is larger than the service area", len(b.Data))
	}
	data := s.base + serviceData + uint64(dataAt)
	b.encode(entries, data)
	b.fill(entries[dataAt:], data)
	if err := s.SetRegs(s.regs.forBatch(s.code+serviceBatch, s.base+serviceData, len(b.Calls))); err != nil {
		return nil, err
	}
	if cloned, err = s.toTrap(); err != nil {
		return cloned, err
	}
	r, err := s.Thread.Regs()
	if err != nil {
		return cloned, err
	}
	b.decode(entries)
	copy(b.Data, entries[dataAt:])
	if made := len(b.Calls) - r.left(); made < len(b.Calls) && (made == 0 || b.Err(made-1) == nil) {
		return cloned, fmt.Errorf("task %d: a batch ended after %d of %d calls, by a SIGTRAP that is not its own", s.Tid, made, len(b.Calls))
	}
	runtime.KeepAlive(s.service)
	return cloned, s.failed(b, len(b.Calls)-r.left(), data)
}

// runParts runs the first calls of a batch and then the others, on the same data.
func (s *Stub) runParts(b *Batch, first int) (cloned []int, err error) {
	for _, bounds := range [][2]int{{0, first}, {first, len(b.Calls)}} {
		part := Batch{Calls: b.Calls[bounds[0]:bounds[1]], Data: b.Data, fixups: b.fixups}
		more, err := s.Run(&part)
		cloned = append(cloned, more...)
		var failed *CallError
		if errors.As(err, &failed) {
			failed.Index += bounds[0]
		}
		if err != nil {
			return cloned, err
		}
	}
	return cloned, nil
}

// failed finds the call that ended a batch of which made calls were made.
func (s *Stub) failed(b *Batch, made int, data uint64) error {
	if made == 0 {
		return nil
	}
	c := &b.Calls[made-1]
	if c.Tolerate || b.Err(made-1) == nil {
		return nil
	}
	e := &CallError{Tid: s.Tid, Index: made - 1, Nr: c.Nr, Errno: unix.Errno(-c.Ret)}
	for i, a := range c.Args {
		e.Args[i] = a.resolve(data)
	}
	return e
}

// Step makes one call by stopping at its entry and exit instead of at an INT3.
// It is for the last calls of a stub, whose SIGTRAP action and service area
// are already the task's own: the stub rests in the stop at the call's exit,
// and no code of ours need be left under its instruction pointer.
func (s *Stub) Step(nr uintptr, args ...uint64) (int64, error) {
	return s.step(s.regs.forCall(s.code+serviceCall, nr, six(args)))
}

// StepNarrow is Step for a call of 32-bit code.
func (s *Stub) StepNarrow(nr uintptr, args ...uint64) (int64, error) {
	return s.step(s.regs.forNarrowCall(s.code+serviceNarrow, nr, six(args)))
}

func six(args []uint64) (a [6]uint64) {
	copy(a[:], args)
	return a
}

func (s *Stub) step(call Regs) (int64, error) {
	if err := s.SetRegs(call); err != nil {
		return 0, err
	}
	for range 2 {
		if err := s.toSyscallStop(); err != nil {
			return 0, err
		}
	}
	r, err := s.Thread.Regs()
	if err != nil {
		return 0, err
	}
	return r.result(), (&Batch{Calls: []Call{{Ret: r.result()}}}).Err(0)
}

func (s *Stub) toSyscallStop() error {
	for {
		if err := s.ContSyscall(0); err != nil {
			return err
		}
		stop, err := s.Wait()
		if err != nil {
			return err
		}
		if stop.Exited {
			return fmt.Errorf("task %d: %w", s.Tid, ErrGone)
		}
		if stop.Syscall() {
			return nil
		}
	}
}

// Stop brings the stub, the only thread of its process, into a group stop by a
// signal, under trace: it goes on to work for us, but when it is detached, the
// kernel puts it back there. A process whose group is orphaned cannot be stopped
// by any signal but SIGSTOP (setpgid(2)); it is stopped by that, and exact is false.
func (s *Stub) Stop(sig unix.Signal) (exact bool, err error) {
	// Sent is SIGSTOP, which nothing can block, and the other put in its place
	// when it is delivered. The interrupt is for the case that this stops nothing.
	if err := unix.Kill(s.Pid, unix.SIGSTOP); err != nil {
		return false, fmt.Errorf("task %d: kill: %w", s.Tid, err)
	}
	if err := s.contTo(Stop{Signal: unix.SIGSTOP}); err != nil {
		return false, err
	}
	if err := s.SetSigMask(allSignalsButTrap &^ sigbit(sig)); err != nil {
		return false, err
	}
	if err := s.Interrupt(); err != nil {
		return false, err
	}
	if err := s.Cont(sig); err != nil {
		return false, err
	}
	if _, err := s.Wait(); err != nil {
		return false, err
	}
	if err := s.SetSigMask(allSignalsButTrap); err != nil {
		return false, err
	}
	if got := s.GroupStop(); got == sig {
		return true, nil
	}
	if sig == unix.SIGSTOP {
		return false, fmt.Errorf("task %d does not stop for SIGSTOP", s.Tid)
	}
	_, err = s.Stop(unix.SIGSTOP)
	return false, err
}

// Continue ends the group stop. The SIGCONT stays pending, since the stub blocks it.
func (s *Stub) Continue() error {
	if err := unix.Kill(s.Pid, unix.SIGCONT); err != nil {
		return fmt.Errorf("task %d: kill: %w", s.Tid, err)
	}
	return s.contTo(Stop{Signal: unix.SIGTRAP, Event: eventStop})
}

// contTo lets the stub run to a stop that must be the one given.
func (s *Stub) contTo(want Stop) error {
	if err := s.Cont(0); err != nil {
		return err
	}
	got, err := s.Wait()
	if err == nil && got != want {
		err = fmt.Errorf("task %d: %v instead of %v", s.Tid, got, want)
	}
	return err
}

// Scratch is the address of a few bytes that no batch uses.
func (s *Stub) Scratch() uint64 { return s.base + ServiceSize - 64 }

// Interrupted makes a call that would sleep and interrupts it at once; it
// returns the kernel's own result, of which user space sees only the effect
// (-ERESTART_RESTARTBLOCK). There is no race to lose: an interrupt that comes
// before the thread sleeps stays pending, and keeps it from sleeping. The kernel
// notes by which kind of call, that of 64-bit or of 32-bit code, it will go on.
func (s *Stub) Interrupted(narrow bool, nr uintptr, args [6]uint64) (int64, error) {
	call := s.regs.forCall(s.code+serviceCall, nr, args)
	if narrow {
		call = s.regs.forNarrowCall(s.code+serviceNarrow, nr, args)
	}
	if err := s.SetRegs(call); err != nil {
		return 0, err
	}
	if err := s.toSyscallStop(); err != nil {
		return 0, err
	}
	if err := s.ContSyscall(0); err != nil {
		return 0, err
	}
	if err := s.Interrupt(); err != nil {
		return 0, err
	}
	stop, err := s.Wait()
	if err != nil {
		return 0, err
	}
	if !stop.Syscall() {
		return 0, fmt.Errorf("task %d: %v instead of the end of system call %d", s.Tid, stop, nr)
	}
	r, err := s.Thread.Regs()
	return r.result(), err
}

// Vfork makes a call that clones a child and waits for it, and leaves the stub in
// the stop between the two (PTRACE_EVENT_VFORK): its registers can be set there,
// nothing can be run any more. It returns the child's id.
func (s *Stub) Vfork(nr uintptr, args ...uint64) (int, error) {
	var a [6]uint64
	copy(a[:], args)
	if err := s.SetRegs(s.regs.forCall(s.code+serviceCall, nr, a)); err != nil {
		return 0, err
	}
	if err := s.Cont(0); err != nil {
		return 0, err
	}
	stop, err := s.Wait()
	switch {
	case err != nil:
		return 0, err
	case stop.Event == unix.PTRACE_EVENT_VFORK:
		return s.EventMessage()
	case stop.Event == 0 && stop.Signal == unix.SIGTRAP:
		r, err := s.Thread.Regs()
		if err != nil {
			return 0, err
		}
		return 0, (&Batch{Calls: []Call{{Ret: r.result()}}}).Err(0)
	}
	return 0, fmt.Errorf("task %d: %v instead of a vfork", s.Tid, stop)
}

// Leave ends one thread of a stub's process, and not the process.
func (s *Stub) Leave() error {
	if err := s.SetRegs(s.regs.forCall(s.code+serviceCall, unix.SYS_EXIT, [6]uint64{})); err != nil {
		return err
	}
	for {
		if err := s.Cont(0); err != nil {
			return err
		}
		stop, err := s.Wait()
		if err != nil {
			return err
		}
		if stop.Exited {
			return s.Reap()
		}
	}
}

// WaitExec waits until a seized thread executes a new program, delivering the
// signals that come before. It rests at the event.
func (t *Thread) WaitExec() error {
	for {
		stop, err := t.Wait()
		if err != nil {
			return err
		}
		var sig unix.Signal
		switch {
		case stop.Exited:
			return fmt.Errorf("task %d: %w before it executed the stub", t.Tid, ErrGone)
		case stop.Event == unix.PTRACE_EVENT_EXEC:
			return nil
		case stop.Event == 0 && !stop.Syscall():
			sig = stop.Signal
		}
		if err := t.Cont(sig); err != nil {
			return err
		}
	}
}

// Exit ends the stub with a wait status: an exit code, or a signal. The kernel
// tells its tracer first; only then its parent.
func (s *Stub) Exit(status unix.WaitStatus) error {
	var b Batch
	if _, err := s.Run(b.nop()); err != nil { // bring it to its INT3, a stop that takes a signal
		return err
	}
	var err error
	if status.Signaled() {
		// A new process has every signal's default action but SIGCHLD's.
		none := unix.Rlimit{}
		_ = unix.Prlimit(s.Pid, unix.RLIMIT_CORE, &none, nil)
		if err = s.SetSigMask(0); err == nil {
			err = s.Cont(status.Signal())
		}
	} else {
		r := s.regs.forCall(s.code+serviceCall, unix.SYS_EXIT_GROUP, [6]uint64{uint64(status.ExitStatus())})
		if err = s.SetRegs(r); err == nil {
			err = s.Cont(0)
		}
	}
	for err == nil {
		var stop Stop
		if stop, err = s.Wait(); err == nil && stop.Exited {
			return s.Reap()
		}
		if err == nil {
			err = s.Cont(0)
		}
	}
	return err
}

// ExitThread ends the stub's thread alone, a leader that others outlive: it stays
// as a zombie until they have ended. Detached, it is no longer ours to wait for;
// but in a group stop only a traced one runs.
func (s *Stub) ExitThread(code uint32, detach bool) error {
	var b Batch
	if _, err := s.Run(b.nop()); err != nil { // bring it to its INT3, a stop that takes registers
		return err
	}
	err := s.SetRegs(s.regs.forCall(s.code+serviceCall, unix.SYS_EXIT, [6]uint64{uint64(code)}))
	if err == nil && detach {
		err = s.Detach(0)
	} else if err == nil {
		err = s.Cont(0)
	}
	for begin := time.Now(); err == nil; time.Sleep(20 * time.Microsecond) {
		var dead bool
		if dead, err = s.dead(); dead {
			return nil
		}
		if err == nil && time.Since(begin) > guestPatience {
			err = fmt.Errorf("task %d: its thread does not end", s.Tid)
		}
	}
	return err
}

func (b *Batch) nop() *Batch {
	b.Add(unix.SYS_GETPID)
	return b
}

// Take opens one of the stub's descriptors in this process as well
// (pidfd_getfd(2)).
func (s *Stub) Take(fd int) (*os.File, error) {
	return TakeFD(s.Tid, fd)
}

// TakeFD opens a descriptor of a task in this process as well. A thread that
// does not lead its process may have a table of its own, which takes a pidfd of
// the thread (PIDFD_THREAD, Linux 6.9).
func TakeFD(tid, fd int) (*os.File, error) {
	pidfd, err := Pidfd(tid)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	n, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_getfd of fd %d in task %d: %w", fd, tid, err)
	}
	return os.NewFile(uintptr(n), fmt.Sprintf("fd %d of task %d", fd, tid)), nil
}

// Pidfd opens a pidfd of a process, or of a thread that is no leader (Linux 6.9).
func Pidfd(tid int) (int, error) {
	pidfd, err := unix.PidfdOpen(tid, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		pidfd, err = unix.PidfdOpen(tid, unix.PIDFD_THREAD)
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd of task %d: %w", tid, err)
	}
	return pidfd, nil
}
