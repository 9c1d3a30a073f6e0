package runtime

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// probeTask is a task for trying out what is done to tasks: a stub as restore
// has them, a child of this process, with a page of shared memory. It dies with
// this process.
type probeTask struct {
	*tracee.Stub
	service *tracee.Service
	page    uint64 // where its memory lies
}

// startProbeTask starts one. The caller has locked its OS thread, and calls
// close when there is no error.
func startProbeTask() (*probeTask, error) {
	service, err := tracee.NewService()
	if err != nil {
		return nil, err
	}
	pid, err := spawnStub(service)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a task for the probes: %w", err), service.Close())
	}
	p := &probeTask{service: service}
	if p.Stub, err = takeStub(pid, service); err == nil {
		err = p.mapPage()
	}
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		reapAll([]int{pid})
		return nil, errors.Join(fmt.Errorf("take hold of the task for the probes: %w", err), service.Close())
	}
	return p, nil
}

// Descriptors of the stub.
const (
	probeExeFD     = 0
	probeServiceFD = 1
)

// spawnStub executes a stub that stops before its first instruction: it asks
// for PTRACE_TRACEME, and execve(2) then raises a SIGTRAP.
func spawnStub(service *tracee.Service) (pid int, err error) {
	exe, err := tracee.StubExecutable()
	if err != nil {
		return 0, err
	}
	defer exe.Close()
	return syscall.ForkExec(fmt.Sprintf("/proc/self/fd/%d", probeExeFD), []string{"ocickpt-probe"}, &syscall.ProcAttr{
		Dir: "/", Files: []uintptr{probeExeFD: exe.Fd(), probeServiceFD: service.File().Fd()},
		Sys: &syscall.SysProcAttr{Ptrace: true, Setsid: true},
	})
}

// takeStub turns the trace that the child has asked for into one by
// PTRACE_SEIZE, as all others are. In between a SIGSTOP in place of the SIGTRAP
// holds the child where it is.
func takeStub(pid int, service *tracee.Service) (*tracee.Stub, error) {
	t := &tracee.Thread{Pid: pid, Tid: pid}
	if err := awaitStop(t, func(tracee.Stop) bool { return true }); err != nil {
		return nil, err
	}
	if err := t.Detach(unix.SIGSTOP); err != nil {
		return nil, err
	}
	t, err := tracee.Seize(pid, pid, tracee.StubOptions)
	if err != nil {
		return nil, err
	}
	if err := awaitStop(t, tracee.Stop.Interrupted); err != nil {
		return nil, err
	}
	return tracee.NewStub(t, service)
}

func awaitStop(t *tracee.Thread, right func(tracee.Stop) bool) error {
	stop, err := t.Wait()
	if err == nil && (stop.Exited || !right(stop)) {
		err = fmt.Errorf("task %d: unexpected %v", t.Tid, stop)
	}
	return err
}

// mapPage gives the task its service area and its page.
func (p *probeTask) mapPage() error {
	const at = 0x100000000
	if err := p.AttachService(probeServiceFD, at); err != nil {
		return err
	}
	var b tracee.Batch
	b.Add(unix.SYS_MMAP, tracee.W(0), tracee.W(os.Getpagesize()), tracee.W(unix.PROT_READ|unix.PROT_WRITE),
		tracee.W(unix.MAP_SHARED|unix.MAP_ANONYMOUS), tracee.W(-1), tracee.W(0))
	_, err := p.Run(&b)
	p.page = uint64(b.Calls[0].Ret)
	return err
}

func (p *probeTask) close() {
	_ = unix.Kill(p.Pid, unix.SIGKILL)
	reapAll([]int{p.Pid})
	_ = p.service.Close()
}

func (p *probeTask) probeRemoteCall() error {
	var b tracee.Batch
	b.Add(unix.SYS_GETPID)
	_, err := p.Run(&b)
	if err == nil && b.Calls[0].Ret != int64(p.Pid) {
		err = fmt.Errorf("getpid returned %d in task %d", b.Calls[0].Ret, p.Pid)
	}
	return err
}

// probeSuspendSeccomp sets the options of every stub, without the way out that
// tracee has for kernels that refuse this one.
func (p *probeTask) probeSuspendSeccomp() error {
	return unix.PtraceSetOptions(p.Tid, tracee.StubOptions)
}

// probeGetFilter installs a filter that allows everything, and reads it back.
func (p *probeTask) probeGetFilter() error {
	const setModeFilter = 1 // SECCOMP_SET_MODE_FILTER
	allow := binary.LittleEndian.AppendUint16(nil, unix.BPF_RET|unix.BPF_K)
	allow = binary.LittleEndian.AppendUint32(append(allow, 0, 0), 0x7fff0000) // SECCOMP_RET_ALLOW
	var b tracee.Batch
	program := b.PutPointer(binary.LittleEndian.AppendUint64(nil, 1), b.Put(allow))
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_NO_NEW_PRIVS), tracee.W(1))
	b.Add(unix.SYS_SECCOMP, tracee.W(setModeFilter), tracee.W(0), program)
	if _, err := p.Run(&b); err != nil {
		return err
	}
	got, _, ok, err := p.SeccompFilter(0)
	if err == nil && !ok {
		// What the kernel says without CONFIG_CHECKPOINT_RESTORE.
		err = fmt.Errorf("PTRACE_SECCOMP_GET_FILTER: %w", unix.EINVAL)
	}
	if err == nil && !bytes.Equal(got, allow) {
		err = fmt.Errorf("the filter reads % x instead of % x", got, allow)
	}
	return err
}

func (p *probeTask) probeRseq() error {
	_, err := p.Rseq()
	return err
}

func (p *probeTask) probeUserDispatch() error {
	const getConfig = 0x4211 // PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
	var config struct{ mode, selector, offset, length uint64 }
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, getConfig, uintptr(p.Tid), unsafe.Sizeof(config), uintptr(unsafe.Pointer(&config)), 0, 0)
	return errnoOf("ptrace", errno)
}

func (p *probeTask) probeMemory() error {
	want, got := []byte("ocickpt"), make([]byte, 7)
	if err := p.Write(p.page, want); err != nil {
		return err
	}
	if err := p.Read(p.page, got); err != nil {
		return err
	}
	if !bytes.Equal(want, got) {
		return fmt.Errorf("wrote %q and read %q", want, got)
	}
	return nil
}

func (p *probeTask) probePagemap() error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", p.Pid))
	if err != nil {
		return err
	}
	defer f.Close()
	entry := make([]byte, 8)
	_, err = f.ReadAt(entry, int64(p.page)/int64(os.Getpagesize())*int64(len(entry)))
	return err
}

// probePagemapScan asks for the present pages of one page (struct pm_scan_arg of
// include/uapi/linux/fs.h).
func (p *probeTask) probePagemapScan() error {
	const pagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", p.Pid))
	if err != nil {
		return err
	}
	defer f.Close()
	const present = 1 << 3 // PAGE_IS_PRESENT
	var region [3]uint64
	arg := struct {
		size, flags, start, end, walkEnd uint64
		vec                              unsafe.Pointer // keeps region where it is
		vecLen, maxPages                 uint64
		inverted, mask, anyOf, returned  uint64
	}{
		start: p.page, end: p.page + uint64(os.Getpagesize()),
		vec: unsafe.Pointer(&region), vecLen: 1, mask: present, returned: present,
	}
	arg.size = uint64(unsafe.Sizeof(arg))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
	return errnoOf("PAGEMAP_SCAN", errno)
}

// probeMapFiles opens memory that has no name through the mapping. Following
// these links takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (proc_pid_map_files(5)).
func (p *probeTask) probeMapFiles() error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/map_files/%x-%x", p.Pid, p.page, p.page+uint64(os.Getpagesize())), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// probeTimersFile reads a file that kernels without CONFIG_CHECKPOINT_RESTORE
// do not have.
func (p *probeTask) probeTimersFile() error {
	_, err := os.ReadFile(fmt.Sprintf("/proc/%d/timers", p.Pid))
	return err
}

func (p *probeTask) probeKcmp() error {
	order, err := kcmp(os.Getpid(), p.Pid, kcmpVM)
	if err == nil && order == 0 {
		err = errors.New("it takes two address spaces for one")
	}
	return err
}

func (p *probeTask) probePidfdGetfd() error {
	pidfd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, probeServiceFD, 0)
	if err != nil {
		return fmt.Errorf("pidfd_getfd: %w", err)
	}
	return unix.Close(fd)
}

// probeSetTid makes two children in a new pid namespace: its init, and one with
// a pid of our choice, which nobody else can have there.
func (p *probeTask) probeSetTid() error {
	const chosen = 4711
	var b tracee.Batch
	task.ChildSignals(&b, true) // they leave no zombies
	b.Add(unix.SYS_UNSHARE, tracee.W(unix.CLONE_NEWPID))
	task.CloneProcess(&b, []int32{1}, int32(unix.SIGCHLD), 0)
	task.CloneProcess(&b, []int32{chosen}, int32(unix.SIGCHLD), 0)
	children, err := p.Run(&b)
	defer func() {
		for _, pid := range children {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		reapAll(children)
	}()
	if err != nil {
		return err
	}
	status, err := task.ReadStatus(children[len(children)-1])
	if err != nil {
		return err
	}
	if pid := task.Innermost(status.NSpid); pid != chosen {
		return fmt.Errorf("the child has pid %d instead of %d", pid, chosen)
	}
	return nil
}

// probeTimeNamespace sets a clock of the namespace that the task's next child
// would be in, which takes CAP_SYS_TIME (time_namespaces(7)).
func (p *probeTask) probeTimeNamespace() error {
	var b tracee.Batch
	b.Add(unix.SYS_UNSHARE, tracee.W(unix.CLONE_NEWTIME))
	if _, err := p.Run(&b); err != nil {
		return err
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/timens_offsets", p.Pid), []byte("monotonic 1 0\n"), 0)
}
