package runtime

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/sysv"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// An image grants nothing. Everything in it is a claim, and what the operator's
// bundle does not allow is refused before anything is made.

// grants is what a bundle allows the processes of its container.
type grants struct {
	capabilities uint64
	uid, gid     uint32
	groups       []uint32
	anyID        bool // set-uid programs could have given others
	noNewPrivs   bool
	cgroups      bool              // tasks may make cgroups
	filtered     bool              // has seccomp filters
	sysctls      bool              // /proc/sys can be written to
	given        map[string]string // sysctls that the bundle sets, by path
	rlimits      map[int]uint64    // hard limits that the bundle sets
	oomScoreAdj  int32
	nice         int32 // of this process, which a container inherits
}

// checkImage refuses an image that claims more than the bundle gives.
func (g *grants) checkImage(head *image.Head) error {
	if err := g.checkNested(head); err != nil {
		return err
	}
	if err := g.checkCgroups(head); err != nil {
		return err
	}
	if err := g.checkMounts(head); err != nil {
		return err
	}
	if err := g.checkLimits(head.Container.IPC); err != nil {
		return err
	}
	for _, o := range head.Objects {
		if err := g.checkIPC(o); err != nil {
			return err
		}
		if err := g.checkSocket(o); err != nil {
			return err
		}
	}
	for _, t := range head.Tasks {
		err := g.checkProcess(t, head.UserOf(t.Pid))
		if err == nil {
			err = g.checkLocked(head.MM(t.MM))
		}
		if err != nil {
			return fail.In(fmt.Sprintf("task %d", t.Pid), err)
		}
	}
	return nil
}

func (g *grants) checkProcess(t *image.Task, user *image.NestedNamespace) error {
	if err := g.checkTask(t); err != nil {
		return fail.In(fmt.Sprintf("task %d", t.Pid), err)
	}
	for i := range t.Threads {
		if err := g.check(&t.Threads[i], user); err != nil {
			return fail.In(fmt.Sprintf("task %d, thread %d", t.Pid, t.Threads[i].Tid), err)
		}
	}
	return nil
}

// checkIPC refuses System V objects that no task of the container can have
// created (to whom it gives one is the creator's business), and segments that
// none can have locked.
func (g *grants) checkIPC(o any) error {
	if q, ok := o.(*image.Mqueue); ok {
		return fail.On("message queue /"+q.Name, g.checkQueue(q))
	}
	p := sysv.Perm(o)
	if p == nil {
		return nil
	}
	what := fmt.Sprintf("System V object %d", p.ID)
	if g.capabilities&(1<<unix.CAP_SETUID) == 0 && !g.anyID && p.CUID != g.uid {
		return fail.Refuse(what, fmt.Sprintf("uid %d has created it, which the bundle (user %d, without CAP_SETUID) does not give", p.CUID, g.uid), "change the bundle if it may have it")
	}
	if g.capabilities&(1<<unix.CAP_SETGID) == 0 && !g.anyID && !slices.Contains(g.groups, p.CGID) {
		return fail.Refuse(what, fmt.Sprintf("gid %d has created it, which the bundle (group %d, without CAP_SETGID) does not give", p.CGID, g.gid), "change the bundle if it may have it")
	}
	if s, ok := o.(*image.Shmem); ok && (s.SysV.Locked || s.HugePage != 0) {
		return fail.On(what, g.mayLock(s.Size))
	}
	return nil
}

// checkQueue refuses POSIX message queues of users that no task of the container
// can have been.
func (g *grants) checkQueue(q *image.Mqueue) error {
	for _, uid := range []uint32{q.Creator, q.UID} {
		if !g.mayBe(uid) {
			return fail.Refuse("", fmt.Sprintf("it is uid %d's, which the bundle (user %d, without CAP_SETUID) does not give", uid, g.uid), "change the bundle if it may have it")
		}
	}
	if !g.mayBeIn(q.GID) {
		return fail.Refuse("", fmt.Sprintf("it is gid %d's, which the bundle (group %d, without CAP_SETGID) does not give", q.GID, g.gid), "change the bundle if it may have it")
	}
	return nil
}

// checkSocket refuses credentials of a unix socket, or of what is unread in one,
// that no task of the container can have had.
func (g *grants) checkSocket(o any) error {
	var all []*image.PeerCreds
	switch o := o.(type) {
	case *image.File:
		if o.Socket != nil && o.Socket.Unix != nil {
			all = append(all, o.Socket.Unix.Creds)
		}
	case *image.Queue:
		for i := range o.Messages {
			all = append(all, o.Messages[i].Creds)
		}
	}
	for _, c := range all {
		if c == nil {
			continue
		}
		if !g.mayBe(c.UID) || !g.mayBeIn(c.GID) || slices.ContainsFunc(c.Groups, func(gid uint32) bool { return !g.mayBeIn(gid) }) {
			return fail.Refuse("unix socket", fmt.Sprintf("its peer's user %d or groups %d are not what the bundle gives", c.UID, append([]uint32{c.GID}, c.Groups...)), "change the bundle if there may be such a one")
		}
	}
	return nil
}

// checkTask refuses limits beyond those that the bundle sets, or that the
// container would inherit from us.
func (g *grants) checkTask(t *image.Task) error {
	for i, l := range t.Rlimits {
		allowed, err := g.hardLimit(i)
		if err != nil {
			return err
		}
		if l.Max > allowed && g.capabilities&(1<<unix.CAP_SYS_RESOURCE) == 0 {
			return fail.Refuse(fmt.Sprintf("resource limit %d", i), fmt.Sprintf("its hard limit is %d and the container may have %d", l.Max, allowed), "raise it in the bundle (process.rlimits) or here (ulimit -H)")
		}
	}
	if t.OOMScoreAdj < g.oomScoreAdj && g.capabilities&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return fail.Refuse("", fmt.Sprintf("its oom_score_adj %d is below the container's %d", t.OOMScoreAdj, g.oomScoreAdj), "lower it in the bundle (process.oomScoreAdj)")
	}
	return nil
}

// hardLimit is what the bundle sets, or what a container inherits from us.
func (g *grants) hardLimit(resource int) (uint64, error) {
	if set, ok := g.rlimits[resource]; ok {
		return set, nil
	}
	var own unix.Rlimit
	if err := unix.Getrlimit(resource, &own); err != nil {
		return 0, fmt.Errorf("getrlimit: %w", err)
	}
	return own.Max, nil
}

// checkLocked refuses more locked memory than the container's programs could
// lock themselves (mlock(2)).
func (g *grants) checkLocked(m *image.MM) error {
	if m == nil {
		return nil
	}
	return g.mayLock(mm.Locked(m))
}

func (g *grants) mayLock(n uint64) error {
	if g.capabilities&(1<<unix.CAP_IPC_LOCK) != 0 {
		return nil
	}
	allowed, err := g.hardLimit(unix.RLIMIT_MEMLOCK)
	if err == nil && n > allowed {
		return fail.Refuse("locked memory", fmt.Sprintf("%d bytes are locked and the container may lock %d", n, allowed), "raise RLIMIT_MEMLOCK in the bundle (process.rlimits), or give it CAP_IPC_LOCK")
	}
	return err
}

// checkScheduling refuses priorities that take CAP_SYS_NICE.
func (g *grants) checkScheduling(t *image.Thread) error {
	const (
		ioprioClassShift = 13
		ioprioClassRT    = 1
	)
	if g.capabilities&(1<<unix.CAP_SYS_NICE) != 0 {
		return nil
	}
	realtime := t.Sched.Policy == unix.SCHED_FIFO || t.Sched.Policy == unix.SCHED_RR || t.Sched.Policy == unix.SCHED_DEADLINE
	if realtime || t.Sched.Nice < g.nice || t.IOPrio>>ioprioClassShift == ioprioClassRT {
		return fail.Refuse("", "it has a priority that takes CAP_SYS_NICE, which the bundle does not give", "add it to the bundle's bounding set if it may have it")
	}
	return nil
}

// mayLogIn refuses login uids to containers that could not have set them
// themselves: whoever has one may not change it without CAP_AUDIT_CONTROL
// (audit_set_loginuid in kernel/auditsc.c).
func (g *grants) mayLogIn() error {
	own, err := task.LoginUID(os.Getpid())
	if err != nil || own == task.NoLoginUID || g.capabilities&(1<<unix.CAP_AUDIT_CONTROL) != 0 {
		return err
	}
	return fail.Refuse("", "the restore has one itself, and the bundle does not give CAP_AUDIT_CONTROL", "")
}

// identity is who the bundle's own process is when it opens a file. One that
// may change its uid may as well be root.
func (g *grants) identity() file.Identity {
	who := file.Identity{UID: g.uid, GID: g.gid, Groups: g.groups, Capabilities: g.capabilities}
	if g.capabilities&(1<<unix.CAP_SETUID) != 0 {
		who.UID = 0
	}
	return who
}

func grantsOf(spec *specs.Spec) (*grants, error) {
	p := spec.Process
	g := &grants{uid: p.User.UID, gid: p.User.GID, groups: append([]uint32{p.User.GID}, p.User.AdditionalGids...), anyID: !p.NoNewPrivileges, noNewPrivs: p.NoNewPrivileges}
	g.cgroups = mayMakeCgroups(spec)
	g.filtered = spec.Linux != nil && spec.Linux.Seccomp != nil
	if spec.Linux != nil {
		g.given = sysctlsOf(spec.Linux.Sysctl)
		hidden := func(path string) bool { return path == "/proc/sys" || path == "/proc" }
		g.sysctls = !slices.ContainsFunc(slices.Concat(spec.Linux.ReadonlyPaths, spec.Linux.MaskedPaths), hidden) &&
			!slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return hidden(m.Destination) && slices.Contains(m.Options, "ro") })
	}
	if p.ApparmorProfile != "" || p.SelinuxLabel != "" {
		return nil, fail.Refuse("bundle", "AppArmor profiles and SELinux labels are not supported yet", "")
	}
	if err := g.inherit(p); err != nil {
		return nil, err
	}
	if p.Capabilities == nil {
		return g, nil
	}
	for _, name := range p.Capabilities.Bounding {
		n, ok := capabilities[strings.ToUpper(name)]
		if !ok {
			return nil, fmt.Errorf("bundle: unknown capability %q", name)
		}
		g.capabilities |= 1 << n
	}
	return g, nil
}

// inherit notes what a container has from its bundle or else from this process.
func (g *grants) inherit(p *specs.Process) error {
	g.rlimits = map[int]uint64{}
	for _, l := range p.Rlimits {
		if n, ok := rlimitNumbers[l.Type]; ok {
			g.rlimits[n] = l.Hard
		}
	}
	if p.OOMScoreAdj != nil {
		g.oomScoreAdj = int32(*p.OOMScoreAdj)
	} else if own, err := task.OOMScoreAdj(os.Getpid()); err == nil {
		g.oomScoreAdj = own
	}
	own, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return fmt.Errorf("getpriority: %w", err)
	}
	g.nice = int32(20 - own) // the raw call returns 20 - nice
	return nil
}

// rlimitNumbers are the RLIMIT_* by the names of the OCI specification.
var rlimitNumbers = map[string]int{
	"RLIMIT_CPU": 0, "RLIMIT_FSIZE": 1, "RLIMIT_DATA": 2, "RLIMIT_STACK": 3, "RLIMIT_CORE": 4, "RLIMIT_RSS": 5,
	"RLIMIT_NPROC": 6, "RLIMIT_NOFILE": 7, "RLIMIT_MEMLOCK": 8, "RLIMIT_AS": 9, "RLIMIT_LOCKS": 10,
	"RLIMIT_SIGPENDING": 11, "RLIMIT_MSGQUEUE": 12, "RLIMIT_NICE": 13, "RLIMIT_RTPRIO": 14, "RLIMIT_RTTIME": 15,
}

// check refuses what one thread claims. In a user namespace of the container's
// own making capabilities are only about what that has made.
func (g *grants) check(t *image.Thread, user *image.NestedNamespace) error {
	if t.Controls.IOFlusher && g.capabilities&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return fail.Refuse("", "it is an I/O flusher (PR_SET_IO_FLUSHER), which takes CAP_SYS_RESOURCE, and the bundle does not give it", "add it to the bundle's bounding set if it may have it")
	}
	if err := g.checkScheduling(t); err != nil {
		return err
	}
	if t.SeccompMode == task.SeccompStrict && g.filtered {
		return fail.Refuse("seccomp strict mode", "a thread has it instead of filters, and the bundle gives filters", "take linux.seccomp out of the bundle")
	}
	c := &t.Creds
	if extra := (c.Bounding | c.Permitted | c.Effective | c.Inheritable | c.Ambient) &^ g.capabilities; extra != 0 && user == nil {
		return fail.Refuse("", "it has capabilities that the bundle does not give: "+capabilityNames(extra), "add them to the bundle's bounding set if it may have them")
	}
	for _, uid := range c.UID {
		if !g.mayBe(uid) {
			return fail.Refuse("", fmt.Sprintf("it has uid %d, which the bundle (user %d, without CAP_SETUID) does not give", uid, g.uid), "change the bundle if it may have it")
		}
	}
	for _, gid := range slices.Concat(c.GID[:], c.Groups) {
		if !g.mayBeIn(gid) {
			return fail.Refuse("", fmt.Sprintf("it has gid %d, which the bundle (group %d, without CAP_SETGID) does not give", gid, g.gid), "change the bundle if it may have it")
		}
	}
	if g.noNewPrivs && !c.NoNewPrivs {
		return fail.Refuse("", "it may gain privileges, which the bundle forbids (noNewPrivileges)", "change the bundle if it may")
	}
	return nil
}

func (g *grants) has(capability uint) bool { return g.capabilities&(1<<capability) != 0 }

// mayBe and mayBeIn say whether a task of the container could have got an id.
func (g *grants) mayBe(uid uint32) bool { return g.has(unix.CAP_SETUID) || g.anyID || uid == g.uid }

func (g *grants) mayBeIn(gid uint32) bool {
	return g.has(unix.CAP_SETGID) || g.anyID || slices.Contains(g.groups, gid)
}

// checkNested refuses namespaces that no task of the container could have made.
// What is made inside a user namespace of the container's own making the kernel
// judges, for there the stubs have what anybody would have had.
func (g *grants) checkNested(head *image.Head) error {
	for i := range head.Tree.Namespaces {
		n := &head.Tree.Namespaces[i]
		if head.Nested(n.Owner) != nil {
			continue
		}
		var err error
		switch {
		case n.Type == "user":
			err = g.checkUser(n.User)
		case !g.has(unix.CAP_SYS_ADMIN):
			err = fail.Refuse("", "making it takes CAP_SYS_ADMIN, which the bundle does not give", "add it to the bundle's bounding set if it may be made")
		case n.Type == "time" && !g.has(unix.CAP_SYS_TIME):
			err = fail.Refuse("", "setting its clocks takes CAP_SYS_TIME, which the bundle does not give", "add it to the bundle's bounding set if they may be set")
		}
		if err != nil {
			return fail.On(fmt.Sprintf("%s namespace #%d", n.Type, n.Ref), err)
		}
	}
	return nil
}

// checkUser refuses a user namespace with another's owner, or with maps that
// only the privileged may write (user_namespaces(7)).
func (g *grants) checkUser(u *image.UserNamespace) error {
	own := func(m []image.IDMap, may func(uint32) bool) bool {
		return len(m) == 0 || len(m) == 1 && m[0].Size == 1 && may(m[0].Host)
	}
	switch {
	case !g.mayBe(u.OwnerUID):
		return fail.Refuse("", fmt.Sprintf("its owner is uid %d, which the bundle does not give", u.OwnerUID), "change the bundle if there may be such a one")
	case !g.has(unix.CAP_SETUID) && !own(u.UIDMap, func(id uint32) bool { return id == u.OwnerUID }):
		return fail.Refuse("", "its uid_map takes CAP_SETUID, which the bundle does not give", "add it to the bundle's bounding set if it may be written")
	case !g.has(unix.CAP_SETGID) && !own(u.GIDMap, g.mayBeIn):
		return fail.Refuse("", "its gid_map takes CAP_SETGID, which the bundle does not give", "add it to the bundle's bounding set if it may be written")
	}
	return nil
}

func capabilityNames(set uint64) string {
	var names []string
	for name, n := range capabilities {
		if set&(1<<n) != 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// capabilities are the names of capabilities(7).
var capabilities = map[string]uint{
	"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_DAC_READ_SEARCH": 2, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5,
	"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_LINUX_IMMUTABLE": 9, "CAP_NET_BIND_SERVICE": 10,
	"CAP_NET_BROADCAST": 11, "CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_IPC_LOCK": 14, "CAP_IPC_OWNER": 15,
	"CAP_SYS_MODULE": 16, "CAP_SYS_RAWIO": 17, "CAP_SYS_CHROOT": 18, "CAP_SYS_PTRACE": 19, "CAP_SYS_PACCT": 20,
	"CAP_SYS_ADMIN": 21, "CAP_SYS_BOOT": 22, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24, "CAP_SYS_TIME": 25,
	"CAP_SYS_TTY_CONFIG": 26, "CAP_MKNOD": 27, "CAP_LEASE": 28, "CAP_AUDIT_WRITE": 29, "CAP_AUDIT_CONTROL": 30,
	"CAP_SETFCAP": 31, "CAP_MAC_OVERRIDE": 32, "CAP_MAC_ADMIN": 33, "CAP_SYSLOG": 34, "CAP_WAKE_ALARM": 35,
	"CAP_BLOCK_SUSPEND": 36, "CAP_AUDIT_READ": 37, "CAP_PERFMON": 38, "CAP_BPF": 39, "CAP_CHECKPOINT_RESTORE": 40,
}
