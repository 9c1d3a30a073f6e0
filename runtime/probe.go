package runtime

import (
	"errors"
	"fmt"
	"os"
	goruntime "runtime"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// ProbeResult says whether one thing works here that ocickpt uses: a feature of
// the kernel, or a capability of this process.
type ProbeResult struct {
	Name     string // as the manual pages and the kernel's headers have it
	Since    string // Linux version that brought it, empty for a capability
	Required bool   // without it nothing can be checkpointed, or nothing restored
	Without  string // what is lost or refused without it
	Err      error  // why it does not work, nil if it does
}

// probe is how a feature is tried out: in this process, or in a task of our own.
// It leaves nothing behind.
type probe struct {
	ProbeResult
	here func() error
	in   func(*probeTask) error
}

// Probes tries the kernel features that ocickpt uses, in the order in which a
// journey meets them. It goes by what the kernel does, not by its version:
// distributions move features to older kernels and configure others away.
// The caller needs the privileges of a checkpoint, or the results say EPERM.
func Probes() []ProbeResult {
	// A tracer is a thread, not a process (ptrace(2)).
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	t, startErr := startProbeTask()
	if t != nil {
		defer t.close()
	}
	var results []ProbeResult
	for _, p := range features() {
		switch {
		case p.here != nil:
			p.Err = p.here()
		case startErr != nil:
			p.Err = startErr
		case p.in != nil:
			p.Err = p.in(t)
		}
		results = append(results, p.ProbeResult)
	}
	return results
}

func features() []probe {
	const required = true
	feature := func(name, since string, required bool, without string) ProbeResult {
		return ProbeResult{Name: name, Since: since, Required: required, Without: without}
	}
	freezer, freezerSince := "cgroup v1 freezer", "2.6.28"
	if unifiedCgroups() {
		freezer, freezerSince = "cgroup v2 freezer", "5.2"
	}
	return []probe{
		{ProbeResult: feature(freezer, freezerSince, required, "no checkpoint: tasks fork away from under us"), here: probeFreezer},
		{ProbeResult: feature("PTRACE_SEIZE, PTRACE_SETSIGMASK", "3.11", required, "no checkpoint, no restore"), in: (*probeTask).probeRemoteCall},
		{ProbeResult: feature("PTRACE_O_SUSPEND_SECCOMP", "4.3", false, "tasks with a seccomp filter are refused"), in: (*probeTask).probeSuspendSeccomp},
		{ProbeResult: feature("PTRACE_SECCOMP_GET_FILTER, _METADATA", "4.16", false, "tasks with a seccomp filter are refused"), in: (*probeTask).probeGetFilter},
		{ProbeResult: feature("PTRACE_GET_RSEQ_CONFIGURATION", "5.13", required, "no checkpoint: restartable sequences would be lost"), in: (*probeTask).probeRseq},
		{ProbeResult: feature("PTRACE_GET_SYSCALL_USER_DISPATCH", "6.4", false, "tasks that use it (Wine) are not recognized"), in: (*probeTask).probeUserDispatch},
		{ProbeResult: feature("process_vm_readv, process_vm_writev", "3.2", required, "no checkpoint, no restore: memory"), in: (*probeTask).probeMemory},
		{ProbeResult: feature("/proc/PID/pagemap", "2.6.25", required, "no checkpoint: memory"), in: (*probeTask).probePagemap},
		{ProbeResult: feature("PAGEMAP_SCAN", "6.7", false, "slower: the page map is read entry by entry"), in: (*probeTask).probePagemapScan},
		{ProbeResult: feature("/proc/PID/map_files", "3.3", false, "shared memory fails: it cannot be opened"), in: (*probeTask).probeMapFiles},
		{ProbeResult: feature("/proc/PID/timers", "3.10", required, "no checkpoint: timers"), in: (*probeTask).probeTimersFile},
		{ProbeResult: feature("kcmp", "3.5", required, "no checkpoint: what tasks share is not seen"), in: (*probeTask).probeKcmp},
		{ProbeResult: feature("kcmp KCMP_EPOLL_TFD", "4.13", false, "tasks that use epoll are refused"), here: probeKcmpEpoll},
		{ProbeResult: feature("pidfd_getfd", "5.6", required, "no checkpoint, no restore: open files"), in: (*probeTask).probePidfdGetfd},
		{ProbeResult: feature("openat2 RESOLVE_IN_ROOT", "5.6", required, "no checkpoint: paths inside the container"), here: probeOpenat2},
		{ProbeResult: feature("unix_diag", "3.3", false, "listening unix sockets are refused"), here: probeUnixDiag},
		{ProbeResult: feature("SO_BUF_LOCK", "5.15", false, "sizes that programs gave to socket buffers are lost"), here: probeBufLock},
		{ProbeResult: feature("TCP_REPAIR_WINDOW", "4.8", false, "connections of TCP cannot be kept"), here: sock.ProbeRepair},
		{ProbeResult: feature("nf_tables", "3.13", false, "connections of TCP cannot be kept but with --leave-running"), here: sock.ProbeHold},
		{ProbeResult: feature("clone3 set_tid", "5.5", required, "no restore: pids"), in: (*probeTask).probeSetTid},
		{ProbeResult: feature("time namespace", "5.6", false, "CLOCK_MONOTONIC and CLOCK_BOOTTIME jump at a restore"), in: (*probeTask).probeTimeNamespace},
		{ProbeResult: feature("ARCH_MAP_VDSO_64", "4.8", required, "no restore: the vdso's address"), in: (*probeTask).probeMapVDSO},
		{ProbeResult: feature("PR_SET_MM_MAP", "3.18", required, "no restore: heap, arguments, /proc/PID/exe"), here: probeSetMM},
		{ProbeResult: feature("PR_TIMER_CREATE_RESTORE_IDS", "6.15", false, "slower: timers get their ids by using up those before"), here: probeTimerIDs},
		{ProbeResult: feature("MFD_EXEC", "6.3", false, "nothing: before it every memfd can be executed"), here: probeMemfdExec},
		{ProbeResult: feature("PIDFD_THREAD", "6.9", false, "nothing yet: for threads with files of their own"), here: probePidfdThread},
		{ProbeResult: feature("/dev/userfaultfd", "6.1", false, "nothing yet: for memory copied while a container runs"), here: probeUserfaultfdDevice},
		{ProbeResult: feature("UFFD_FEATURE_WP_ASYNC", "6.7", false, "nothing yet: for memory copied while a container runs"), here: probeWriteProtectAsync},
		{ProbeResult: feature("BPF task iterators, BTF of the kernel", "5.8", false, "poll, futex waits and some sleeps wait their full time again after a restore"), here: probeRestartBlocks},
	}
}

// errNotEffective is why a capability is missing; a ProbeResult wraps it.
var errNotEffective = errors.New("not in the effective set")

// CapabilityProbes tells which capabilities this process has of those that
// matter (capabilities(7)), and what the lack of each costs. Besides these,
// restore needs every capability that a container's processes are to have.
func CapabilityProbes() ([]ProbeResult, error) {
	have, err := task.Capabilities(os.Getpid())
	if err != nil {
		return nil, err
	}
	var results []ProbeResult
	for _, c := range []ProbeResult{
		{Name: "CAP_SYS_ADMIN", Required: true, Without: "no restore: namespaces and mounts; tasks with a seccomp filter are refused"},
		{Name: "CAP_DAC_OVERRIDE", Required: true, Without: "no restore: cgroups"},
		{Name: "CAP_NET_ADMIN", Required: true, Without: "no restore: lo in a network namespace; sizes of socket buffers"},
		{Name: "CAP_SETGID", Required: true, Without: "no restore: groups"},
		{Name: "CAP_SETPCAP", Required: true, Without: "no restore: bounding sets, securebits"},
		{Name: "CAP_SYS_CHROOT", Required: true, Without: "no restore: mount namespaces are not entered"},
		{Name: "CAP_SYS_TIME", Required: true, Without: "no restore: clocks of a time namespace"},
		{Name: "CAP_SETUID", Without: "tasks of other users are not restored"},
		{Name: "CAP_SYS_PTRACE", Without: "tasks of other users, or with capabilities that are missing here, are not checkpointed"},
		{Name: "CAP_KILL", Without: "tasks of other users cannot be ended"},
		{Name: "CAP_CHECKPOINT_RESTORE", Without: "nothing while there is CAP_SYS_ADMIN"},
		{Name: "CAP_SYS_RESOURCE", Without: "tasks with hard limits above ours are not restored; a lowered oom_score_adj is lost"},
		{Name: "CAP_SYS_NICE", Without: "raised priorities and real-time policies are not restored"},
		{Name: "CAP_CHOWN", Without: "unix sockets of other users are not restored"},
		{Name: "CAP_NET_BIND_SERVICE", Without: "sockets that listen below port 1024 are not restored"},
		{Name: "CAP_MKNOD", Without: "a restored container's devices are the host's, mounted into its /dev"},
	} {
		if have&(1<<capabilities[c.Name]) == 0 {
			c.Err = errNotEffective
		}
		results = append(results, c)
	}
	return results, nil
}

// errnoOf is how a failed system call is reported: 0 is success.
func errnoOf(what string, errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w", what, errno)
}
