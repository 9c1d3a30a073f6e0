package integration

import (
	"os"
	"testing"
	"time"
)

// program is a test program and what it needs around it.
type program struct {
	name    string
	options []option
	// loopback: the program uses the network namespace's lo.
	loopback bool
	// connect names a file below /out; making it asks the program to connect
	// to its own listeners and to remove the file when that went well.
	connect string
	// neverPaused: a pause by cgroup v1's freezer alone ends epoll_wait and
	// rt_sigtimedwait with EINTR and takes a turn from threads, which this program does not put up with.
	// (A checkpoint restarts those calls, so it must.)
	neverPaused bool
}

var programs = []program{
	{name: "tree", options: []option{withArgs("/bin/tree.sh")}},
	{name: "threads", options: []option{withArgs("/bin/threads"), withVaryingThreads()}},
	{name: "memory", options: []option{withArgs("/bin/memory")}},
	{name: "prefork", options: []option{withArgs("/bin/prefork")}},
	{name: "aio", neverPaused: true, options: []option{withArgs("/bin/aio")}},
	{name: "areas", options: []option{withArgs("/bin/areas")}},
	{name: "sleepers", neverPaused: true, options: []option{
		withArgs(append([]string{"/bin/sleepers"}, sleeps...)...), withVaryingThreads(),
	}},
	{name: "shared", options: []option{withArgs("/bin/shared")}},
	{name: "shared-threads", options: []option{withArgs("/bin/shared", "threads")}},
	{name: "locks", options: []option{withArgs("/bin/locks"), withVaryingThreads()}},
	{name: "vfork", options: []option{withArgs("/bin/vfork"), withCapabilities("CAP_SETUID", "CAP_SETGID"), withVaryingThreads()}, connect: "vfork.go"},
	{name: "signals", options: []option{withArgs("/bin/signals", "handlers", "pending", "itimers", "posix", "standers")}},
	{name: "terminal", options: []option{withArgs("/bin/terminal")}},
	{name: "files", options: []option{withArgs("/bin/files")}, loopback: true, connect: "files.connect"},
	{name: "nameless", options: []option{withArgs("/bin/nameless")}, connect: "nameless.connect"},
	{name: "locks", options: []option{withArgs("/bin/locks")}},
	{name: "unixes", neverPaused: true, options: []option{withArgs("/bin/unixes")}},
	{name: "overlay", options: []option{
		withReport("nameless"), withHostPrograms(), withArgs("/out/bin/nameless", "overlay"),
	}},
	{name: "creds", options: []option{
		withArgs("/bin/creds"), withNewPrivileges(),
		withCapabilities("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_CHROOT"),
	}},
	{name: "attributes", options: []option{
		withArgs("/bin/attributes"), withNewPrivileges(), withRealtime(),
		withCapabilities("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_NICE"),
	}},
	{name: "tmpfs", options: []option{
		withArgs("/bin/tmpfs", "chown"), withTmpfs("/run"), withNewPrivileges(),
		withCapabilities("CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE"),
	}},
	{name: "cursors", options: []option{
		withHostPrograms(), withTmpfs("/run"), withNewPrivileges(), withCapabilities("CAP_DAC_OVERRIDE"),
		withArgs("/out/bin/cursors", "/dev/shm", "/run", "/out", "/var/tmp", "rm=/usr/include/linux"),
	}},
	{name: "datagrams", loopback: true, options: []option{withArgs("/bin/datagrams", "ping"), withNewPrivileges(), withCapabilities("CAP_NET_RAW"), withPing()}},
	{name: "tun", options: []option{withArgs("/bin/tun"), withTun(), withNewPrivileges(), withCapabilities("CAP_NET_ADMIN")}},
	{name: "mounts", connect: "mounts.connect", options: []option{withArgs("/bin/mounts"), withMounting()}},
	{name: "mounts", connect: "mounts.connect", options: []option{withArgs("/bin/mounts", "shared"), withMounting()}},
	{name: "sandboxed", options: []option{withArgs("/bin/sandboxed")}},
	{name: "sysv", neverPaused: true, options: []option{withArgs("/bin/sysv")}},
	{name: "mqueues", neverPaused: true, options: []option{withArgs("/bin/mqueues")}},
	{name: "sysv", neverPaused: true, options: append([]option{withArgs("/bin/sysv", "apart", "user"), unmasked}, nobody...)},
	{name: "mqueues", neverPaused: true, options: append([]option{withArgs("/bin/mqueues", "apart", "user"), unmasked}, nobody...)},
	{name: "undisturbed", options: []option{withArgs("/bin/undisturbed", "moved")}, neverPaused: true},
	{name: "gopause", options: []option{withArgs("/bin/gopause"), withVaryingThreads()}, connect: "gopause.connect"},
	{name: "leaders", connect: "leaders.connect", options: []option{withArgs("/bin/leaders"), withCapabilities("CAP_SETUID")}},
	{name: "jobs", options: []option{withArgs("/bin/jobs")}, connect: "jobs.connect"},
	{name: "descriptors", options: []option{withHostPrograms(), withArgs("/out/bin/descriptors"), withCapabilities("CAP_SYS_ADMIN")}},
	{name: "connections", loopback: true, options: []option{withArgs("/bin/connections"), withConnections()}},
	{name: "python", options: []option{
		withHostPrograms(), withArgs("/usr/bin/python3", "/out/bin/threads.py"),
	}},
}

// sleeps are the kinds of sleep of the sleepers program.
var sleeps = []string{
	"nanosleep", "clock-relative", "clock-absolute", "clock-boottime", "clock-tai", "clock-realtime",
	"poll", "poll-forever", "ppoll", "select", "pselect", "epoll", "epoll-pwait2", "recv", "accept",
	"futex", "futex-timed", "futex-absolute", "futex-realtime", "futex-waitv", "cond-monotonic", "cond-realtime",
	"sigtimedwait", "read", "wait4", "pause", "sigsuspend", "semtimedop",
}

// mapped are the programs that run in a user namespace of their own too, where
// nothing may be done that takes root on the host.
var mapped = []program{
	{name: "tree", options: []option{withUserNamespace(), withArgs("/bin/tree.sh")}},
	{name: "unixes", options: []option{withUserNamespace(), withArgs("/bin/unixes")}},
	{name: "memory", options: []option{withUserNamespace(), withArgs("/bin/memory")}},
	{name: "nameless", options: []option{withUserNamespace(), withArgs("/bin/nameless")}, connect: "nameless.connect"},
	{name: "files", options: []option{withUserNamespace(), withArgs("/bin/files")}, loopback: true, connect: "files.connect"},
	{name: "connections", loopback: true, options: []option{withUserNamespace(), withArgs("/bin/connections"), withConnections()}},
	{name: "sysv", options: []option{withUserNamespace(), withArgs("/bin/sysv")}},
	{name: "mqueues", options: []option{withUserNamespace(), withArgs("/bin/mqueues")}},
	{name: "tmpfs", options: []option{withUserNamespace(), withArgs("/bin/tmpfs"), withTmpfs("/run")}},
	{name: "cursors", options: []option{withUserNamespace(), withArgs("/bin/cursors", "/dev/shm", "/out"), withTmpfs("/run")}},
	{name: "mounts", connect: "mounts.connect", options: []option{withUserNamespace(), withArgs("/bin/mounts"), withMounting()}},
	{name: "vfork", options: []option{
		withUserNamespace(), withArgs("/bin/vfork"), withCapabilities("CAP_SETUID", "CAP_SETGID"), withVaryingThreads(),
	}, connect: "vfork.go"},
	{name: "descriptors", options: []option{withUserNamespace(), withArgs("/bin/descriptors")}},
	{name: "creds", options: []option{
		withUserNamespace(), withArgs("/bin/creds"), withNewPrivileges(),
		withCapabilities("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_CHROOT"),
	}},
}

// start runs the program in a new container and lets it do some rounds.
func (p program) start(t *testing.T) *container {
	t.Helper()
	c := newContainer(t, append([]option{withReport(p.name)}, p.options...)...).run()
	if p.loopback {
		c.raiseLoopback()
	}
	c.progress(30)
	p.checkConnect(c)
	return c
}

// checkConnect has the program connect to its own listeners.
func (p program) checkConnect(c *container) {
	c.t.Helper()
	if p.connect == "" {
		return
	}
	c.must(os.WriteFile(c.out(p.connect), nil, 0o600))
	if !waitFor(func() bool { _, err := os.Stat(c.out(p.connect)); return os.IsNotExist(err) }) {
		c.t.Fatalf("%s could not connect to its listeners (round %d)", p.name, c.rounds())
	}
}

// TestProgramsAlone runs every program without a checkpoint, through a pause,
// so that a failure elsewhere is not the program's own.
func TestProgramsAlone(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			c := p.start(t)
			before := c.stableTree()
			if !p.neverPaused {
				c.runc("pause", c.id)
				c.mustBe("paused")
				time.Sleep(400 * time.Millisecond)
				c.runc("resume", c.id)
			}
			c.progress(30)
			c.sameTree(before)
		})
	}
}
