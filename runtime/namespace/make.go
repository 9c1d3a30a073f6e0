package namespace

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/network"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Maker makes the namespaces of an image again. Everything is done by stubs,
// with no more rights than a task of the container could have: in the
// container's own user namespace with the bundle's capabilities and under its
// seccomp filters, in one that the container has made with what the kernel
// gives in there.
type Maker struct {
	Head *image.Head
	// Allowed are the capabilities of the bundle's bounding set, Full those of
	// the stubs.
	Allowed, Full uint64
	// Proc and LastPid are numbers under which every stub holds the container's
	// /proc and the kernel's /proc/sys/kernel/ns_last_pid.
	Proc, LastPid int
	// Networks fills network namespaces.
	Networks *network.Maker
	// Offsets are those of the container's clocks from the host's.
	Offsets map[int32]int64

	stays map[int]*stay
	kept  map[image.Ref]int // who has made a namespace, in the container's pid namespace
}

// stay is where a stub is and who.
type stay struct {
	user  image.Ref // its user namespace, 0 for the container's
	taken bool      // its ids are those of its task
}

// stub is a stub with its pid in the container's namespace.
type stub struct {
	*tracee.Stub
	pid int
	*stay
}

func (m *Maker) at(s *tracee.Stub, pid int) *stub {
	if m.stays == nil {
		m.stays = map[int]*stay{}
	}
	if m.stays[pid] == nil {
		m.stays[pid] = &stay{}
	}
	return &stub{s, pid, m.stays[pid]}
}

// User is the user namespace that a task's stub has entered, 0 for the
// container's own.
func (m *Maker) User(pid int) image.Ref {
	if s := m.stays[pid]; s != nil {
		return s.user
	}
	return 0
}

// Fork makes a stub clone a child as a step says, with the flags of tables that
// they share, and returns the child's pid on the host.
func (m *Maker) Fork(s *tracee.Stub, step forest.Step, flags uint64, exitSignal int32, writers func(pid int) *tracee.Stub) (int, error) {
	me := m.at(s, step.Pid)
	if step.Nested.Space != 0 {
		flags |= unix.CLONE_NEWPID
		if step.Nested.User == 0 {
			if err := m.mayMake(me, unix.CLONE_NEWPID); err != nil {
				return 0, err
			}
		}
	}
	user := m.Head.Nested(image.Ref(step.Nested.User))
	if user != nil {
		flags |= unix.CLONE_NEWUSER
		if err := m.mayMake(me, unix.CLONE_NEWUSER); err != nil {
			return 0, err
		}
		if err := m.become(me, m.creator(step.Child, user)); err != nil {
			return 0, err
		}
	}
	if err := hint(step.Nested.Hints, m.LastPid, writers); err != nil {
		return 0, err
	}
	var b tracee.Batch
	if t := m.Head.Task(int32(step.Child)); t != nil {
		task.SlackForChild(&b, &t.Threads[0].Controls)
	}
	task.CloneProcess(&b, narrow(step.Nested.IDs), exitSignal, flags)
	cloned, err := s.Run(&b)
	if err != nil {
		return 0, err
	}
	if len(cloned) != 1 {
		return 0, fmt.Errorf("task %d made %d children instead of one", s.Pid, len(cloned))
	}
	m.stays[step.Child] = &stay{user: me.user, taken: me.user != 0}
	if user != nil {
		m.stays[step.Child].user, m.stays[step.Child].taken = user.Ref, true
	}
	return cloned[0], nil
}

// Born ends a fork into a new user namespace, once the child is held: its maps
// are written by its parent, who is itself again afterwards.
func (m *Maker) Born(s, child *tracee.Stub, step forest.Step) error {
	user := m.Head.Nested(image.Ref(step.Nested.User))
	if user == nil {
		return nil
	}
	me, c := m.at(s, step.Pid), m.at(child, step.Child)
	if err := m.writeMaps(me, c, user); err != nil {
		return err
	}
	if err := m.become(me, m.self(me)); err != nil {
		return err
	}
	return m.amend(c, user)
}

// Hint prepares a clone as a step says and returns the ids that are for set_tid.
func (m *Maker) Hint(step forest.Step, writers func(pid int) *tracee.Stub) ([]int32, error) {
	return narrow(step.Nested.IDs), hint(step.Nested.Hints, m.LastPid, writers)
}

// hint writes the numbers that pid namespaces are to give next.
func hint(hints []forest.Hint, fd int, writers func(pid int) *tracee.Stub) error {
	for _, h := range hints {
		w := writers(h.Writer)
		if w == nil {
			return fmt.Errorf("task %d, which is to choose a pid, is not there", h.Writer)
		}
		text := strconv.Itoa(h.Next - 1)
		var b tracee.Batch
		b.Add(unix.SYS_PWRITE64, tracee.W(fd), b.String(text), tracee.W(len(text)), tracee.W(0))
		if _, err := w.Run(&b); err != nil {
			return fmt.Errorf("ns_last_pid: %w", err)
		}
	}
	return nil
}

// Unshare makes a namespace and puts into it what the image has of it. via is
// the stub that writes the maps of a user namespace.
func (m *Maker) Unshare(s *tracee.Stub, step forest.Step, via *tracee.Stub) error {
	return m.unshare(m.at(s, step.Pid), step, via)
}

func (m *Maker) unshare(me *stub, step forest.Step, via *tracee.Stub) error {
	n := m.Head.Nested(image.Ref(step.Nested.NS))
	if n == nil {
		return errors.New("the image does not have the namespace")
	}
	k := kindOf(n.Type)
	if k == &user {
		if err := m.become(me, ownerOf(n)); err != nil {
			return err
		}
	}
	if err := m.asBundle(me, func(b *tracee.Batch) { b.Add(unix.SYS_UNSHARE, tracee.W(k.flag)) }); err != nil {
		return m.refusal(n.Type, err)
	}
	if m.kept == nil {
		m.kept = map[image.Ref]int{}
	}
	if k != &user {
		m.kept[n.Ref] = me.pid
	}
	switch {
	case k == &user:
		return m.adopt(me, m.at(via, step.Nested.Via), n)
	case n.Dead:
		return die(me.Stub)
	case k.fill == nil:
		return nil
	}
	if k == &netns { // it takes rights away by itself
		return k.fill(m, me, n)
	}
	return m.limited(me, func() error { return k.fill(m, me, n) })
}

// adopt ends the making of a user namespace by a ghost. Maps are written by
// one who has stayed in the parent (user_namespaces(7)).
func (m *Maker) adopt(ghost, via *stub, n *image.NestedNamespace) error {
	ghost.user = n.Ref
	if err := m.become(via, ownerOf(n)); err != nil {
		return err
	}
	if err := m.writeMaps(via, ghost, n); err != nil {
		return err
	}
	return m.become(via, m.self(via))
}

// die gives the pid namespace that a stub's children are to begin in an init
// that ends at once: from then on nobody can be made there. It tells nobody of its
// end by a signal, and the stub reaps it.
func die(s *tracee.Stub) error {
	var b, reap tracee.Batch
	task.CloneProcess(&b, nil, 0, 0)
	cloned, err := s.Run(&b)
	if err != nil {
		return err
	}
	child, err := s.NewChild(cloned[0], cloned[0])
	if err == nil {
		err = child.Exit(0)
	}
	if err != nil {
		return err
	}
	reap.Add(unix.SYS_WAIT4, tracee.W(b.Calls[0].Ret), tracee.W(0), tracee.W(unix.WALL), tracee.W(0))
	_, err = s.Run(&reap)
	return err
}

// Join makes a stub enter a namespace that another is in.
func (m *Maker) Join(s *tracee.Stub, step forest.Step) error {
	me := m.at(s, step.Pid)
	kind := strings.TrimSuffix(step.Nested.As, "_for_children")
	fd, err := m.open(me, step.Nested.Via, step.Nested.As)
	if err != nil {
		return err
	}
	run := func() error {
		var b tracee.Batch
		b.Add(unix.SYS_SETNS, tracee.W(fd), tracee.W(Flag(kind)))
		b.Add(unix.SYS_CLOSE, tracee.W(fd))
		_, err := s.Run(&b)
		return err
	}
	if kind == "pid" { // for growing the forest, which is our business
		return run()
	}
	// Most tasks are born into what they are in, so no filter is asked.
	if err := m.limited(me, run); err != nil {
		return m.refusal(kind, err)
	}
	return nil
}

// Way opens, in the stub of a process, the namespace that one of its threads is to
// enter.
func (m *Maker) Way(s *tracee.Stub, step forest.Step) (fd int, err error) {
	return m.open(m.at(s, step.Pid), step.Nested.Via, step.Nested.As)
}

// Part makes a thread enter the namespace to which way leads, or without one make
// it. tid is its id in the container.
func (m *Maker) Part(s *tracee.Stub, step forest.Step, tid int32, way int) error {
	me := &stub{s, int(tid), m.at(s, step.Pid).stay}
	if step.Nested.Via == 0 {
		return m.unshare(me, step, nil)
	}
	err := m.limited(me, func() error {
		var b tracee.Batch
		b.Add(unix.SYS_SETNS, tracee.W(way), tracee.W(Flag(step.Nested.As)))
		_, err := s.Run(&b)
		return err
	})
	if err != nil {
		return m.refusal(step.Nested.As, err)
	}
	return nil
}

// Enter makes a stub enter a user namespace, with the ids of its task: inside
// not all of them need have a number.
func (m *Maker) Enter(s *tracee.Stub, step forest.Step) error {
	me := m.at(s, step.Pid)
	if t := m.Head.Task(int32(step.Pid)); t != nil && !me.taken {
		if err := m.become(me, &t.Threads[0].Creds); err != nil {
			return err
		}
	}
	fd, err := m.open(me, step.Nested.Via, "user")
	if err != nil {
		return err
	}
	for range step.Nested.Up {
		var b tracee.Batch
		b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.NS_GET_PARENT))
		b.Add(unix.SYS_CLOSE, tracee.W(fd))
		if _, err := s.Run(&b); err != nil {
			return err
		}
		fd = int(b.Calls[0].Ret)
	}
	var b tracee.Batch
	b.Add(unix.SYS_SETNS, tracee.W(fd), tracee.W(unix.CLONE_NEWUSER))
	b.Add(unix.SYS_CLOSE, tracee.W(fd))
	task.KeepCapabilities(&b)
	visible(&b)
	if _, err := s.Run(&b); err != nil {
		return err
	}
	me.user, me.taken = image.Ref(step.Nested.NS), true
	return nil
}

// Keeper is who is in a namespace from when the forest has grown until descriptors
// are in place, 0 for nobody.
func (m *Maker) Keeper(ns image.Ref) int { return m.kept[ns] }

// open opens a link of /proc/PID/ns in a stub.
func (m *Maker) open(s *stub, pid int, link string) (int, error) {
	var b tracee.Batch
	b.Add(unix.SYS_OPENAT, tracee.W(m.Proc), b.String(fmt.Sprintf("%d/ns/%s", pid, link)), tracee.W(unix.O_RDONLY|unix.O_CLOEXEC))
	if _, err := s.Run(&b); err != nil {
		return 0, err
	}
	return int(b.Calls[0].Ret), nil
}

// rights are the capabilities that a stub may use for the container.
func (m *Maker) rights(s *stub) (full, allowed uint64) {
	if s.user != 0 {
		return everything, everything
	}
	return m.Full, m.Full & m.Allowed
}

// everything is what a process has that has just entered a user namespace; the
// kernel takes away what it does not know of.
const everything = 1<<41 - 1

// asBundle runs calls with no more rights than the bundle gives, under its
// seccomp filters, which are not suspended meanwhile: so what no task could
// have done is not done.
func (m *Maker) asBundle(s *stub, add func(*tracee.Batch)) error {
	return m.limited(s, func() error {
		var b tracee.Batch
		add(&b)
		if err := s.SetOptions(tracee.FilteredOptions); err != nil {
			return err
		}
		_, err := s.Run(&b)
		return errors.Join(err, s.SetOptions(tracee.StubOptions))
	})
}

// limited runs f with the bundle's capabilities only.
func (m *Maker) limited(s *stub, f func() error) error {
	if s.user != 0 {
		return f()
	}
	full, allowed := m.rights(s)
	var less, more tracee.Batch
	task.Capset(&less, full, allowed, 0)
	if _, err := s.Run(&less); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if s.user == 0 {
		task.Capset(&more, full, full, 0)
	}
	_, err := s.Run(&more)
	return err
}

func (m *Maker) refusal(kind string, err error) error {
	return fail.On(kind+" namespace", &fail.Error{
		Cause:  fmt.Errorf("the container may not make it: %w", err),
		Remedy: "restore into a bundle whose capabilities and seccomp filters allow it",
	})
}

// mayMake asks the kernel, by a ghost's unshare(2), whether the bundle allows a
// namespace that is then made by clone3(2): seccomp filters do not see the flags
// of that.
func (m *Maker) mayMake(s *stub, flag uint64) error {
	var b tracee.Batch
	task.CloneProcess(&b, nil, int32(unix.SIGCHLD), 0)
	cloned, err := s.Run(&b)
	if err != nil {
		return err
	}
	child, err := s.NewChild(cloned[0], cloned[0])
	if err != nil {
		return err
	}
	ghost := &stub{child, 0, &stay{user: s.user}}
	err = m.asBundle(ghost, func(b *tracee.Batch) { b.Add(unix.SYS_UNSHARE, tracee.W(flag)) })
	if err != nil {
		return m.refusal(nameOf(flag), err)
	}
	return child.Exit(0)
}

func nameOf(flag uint64) string {
	i := slices.IndexFunc(kinds, func(k *kind) bool { return k.flag == flag })
	return kinds[i].name
}

// become gives a stub ids, which are those of the container's user namespace.
func (m *Maker) become(s *stub, c *image.Credentials) error {
	var b tracee.Batch
	task.KeepCapabilities(&b)
	if s.user == 0 {
		full, _ := m.rights(s)
		task.Capset(&b, full, full, 0)
		task.SetIDs(&b, c)
	} else {
		// Groups stay those of the task, which may not be allowed to set them.
		u := m.Head.Nested(s.user).User
		var ids [6]uint32
		for i := range 3 {
			var ok [2]bool
			ids[i], ok[0] = inward(u.GIDMap, c.GID[i], 1)
			ids[3+i], ok[1] = inward(u.UIDMap, c.UID[i], 1)
			for j, known := range ok {
				if !known {
					ids[i+3*j] = ^uint32(0) // unchanged
				}
			}
		}
		b.Add(unix.SYS_SETRESGID, tracee.W(ids[0]), tracee.W(ids[1]), tracee.W(ids[2]))
		b.Add(unix.SYS_SETRESUID, tracee.W(ids[3]), tracee.W(ids[4]), tracee.W(ids[5]))
	}
	_, err := s.Run(&b)
	return err
}

// self are the ids that a stub has when it is nobody else: its task's once
// these are taken, else root's.
func (m *Maker) self(s *stub) *image.Credentials {
	if t := m.Head.Task(int32(s.pid)); t != nil && s.taken {
		return &t.Threads[0].Creds
	}
	return &image.Credentials{}
}

// creator are the ids with which a task's user namespace is made: the task's,
// but for the effective uid, which becomes the owner.
func (m *Maker) creator(pid int, n *image.NestedNamespace) *image.Credentials {
	c := *ownerOf(n)
	if t := m.Head.Task(int32(pid)); t != nil {
		c = t.Threads[0].Creds
		c.UID[1], c.UID[3] = n.User.OwnerUID, n.User.OwnerUID
	}
	return &c
}

// ownerOf are the ids of the one who made a user namespace, as far as they
// matter: its owner, and a group that the owner may map.
func ownerOf(n *image.NestedNamespace) *image.Credentials {
	uid, gid := n.User.OwnerUID, uint32(0)
	if len(n.User.GIDMap) > 0 {
		gid = n.User.GIDMap[0].Host
	}
	return &image.Credentials{UID: [4]uint32{uid, uid, uid, uid}, GID: [4]uint32{gid, gid, gid, gid}}
}

// amend gives a task that was born into a user namespace its effective ids,
// where these are not the owner's.
func (m *Maker) amend(s *stub, n *image.NestedNamespace) error {
	var b tracee.Batch
	task.KeepCapabilities(&b)
	if t := m.Head.Task(int32(s.pid)); t != nil {
		if c := &t.Threads[0].Creds; c.UID[1] != n.User.OwnerUID {
			id, ok := inward(n.User.UIDMap, c.UID[1], 1)
			if !ok {
				return fmt.Errorf("its uid %d has no number in its user namespace", c.UID[1])
			}
			b.Add(unix.SYS_SETRESUID, tracee.W(^uint32(0)), tracee.W(id), tracee.W(^uint32(0)))
		}
	}
	_, err := s.Run(&b)
	return err
}

// writeMaps writes the maps of the user namespace that child is in, as somebody
// of its parent, which s is in.
func (m *Maker) writeMaps(s, child *stub, n *image.NestedNamespace) error {
	var open tracee.Batch
	visible(&open)
	if _, err := child.Run(&open); err != nil {
		return err
	}
	u := n.User
	var outer *image.UserNamespace
	if s.user != 0 {
		outer = m.Head.Nested(s.user).User
	}
	return m.limited(s, func() error {
		if !u.Setgroups {
			if err := m.write(s, child, "setgroups", "deny"); err != nil {
				return err
			}
		}
		for _, one := range []struct {
			name string
			m    []image.IDMap
			in   func(*image.UserNamespace) []image.IDMap
		}{
			{"uid_map", u.UIDMap, func(o *image.UserNamespace) []image.IDMap { return o.UIDMap }},
			{"gid_map", u.GIDMap, func(o *image.UserNamespace) []image.IDMap { return o.GIDMap }},
		} {
			var text strings.Builder
			for _, r := range one.m {
				if outer != nil {
					var ok bool
					if r.Host, ok = inward(one.in(outer), r.Host, r.Size); !ok {
						return fmt.Errorf("%s: ids that its parent does not have", one.name)
					}
				}
				fmt.Fprintf(&text, "%d %d %d\n", r.Container, r.Host, r.Size)
			}
			if text.Len() > 0 {
				if err := m.write(s, child, one.name, text.String()); err != nil {
					return m.refusal("user", fmt.Errorf("%s: %w", one.name, err))
				}
			}
		}
		return nil
	})
}

// visible adds the call that opens a stub's files in /proc to others of its user
// namespace: a change of credentials has closed them, to all but those who have
// capabilities where the stub was executed (ptrace(2), access mode checking).
func visible(b *tracee.Batch) {
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_DUMPABLE), tracee.W(1))
}

// write writes to a file of another stub in /proc.
func (m *Maker) write(s, of *stub, name, text string) error {
	return writeAt(s.Stub, m.Proc, fmt.Sprintf("%d/%s", of.pid, name), text)
}

// writeAt makes a stub write a file.
func writeAt(s *tracee.Stub, dir int, path, text string) error {
	var open tracee.Batch
	open.Add(unix.SYS_OPENAT, tracee.W(dir), open.String(path), tracee.W(unix.O_WRONLY|unix.O_CLOEXEC))
	if _, err := s.Run(&open); err != nil {
		return err
	}
	fd := open.Calls[0].Ret
	var b tracee.Batch
	b.Add(unix.SYS_WRITE, tracee.W(fd), b.String(text), tracee.W(len(text)))
	b.Add(unix.SYS_CLOSE, tracee.W(fd))
	_, err := s.Run(&b)
	return err
}

func narrow(ids []int) []int32 {
	out := make([]int32, len(ids))
	for i, id := range ids {
		out[i] = int32(id)
	}
	return out
}
