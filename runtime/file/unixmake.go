package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// How unix sockets get their peers again. SO_PEERCRED and SO_PEERPIDFD tell who
// called socketpair(2), connect(2) and listen(2): the process itself, which its
// stub is as soon as the forest has grown. So a socket that connects or listens
// is made like every file, by the init stub, for all to inherit; but ends of
// pairs, and what accept(2) returns, come to be only then. They are given to
// all who hold them under numbers that were kept free.
//
// An accepted socket has the name of the listening one, which may be gone, or
// be reached by others already. Therefore connections are made over listening
// sockets of our own with the same name. Those with a path lie in a scratch file
// system that is mounted nowhere, into which a stub steps by chroot(2).

// unixMaker makes the connections of unix sockets.
type unixMaker struct {
	*Maker
	stubs   map[int]*tracee.Stub
	ghosts  map[int32]*tracee.Stub // for processes that have ended
	late    map[image.Ref]int      // sockets that come to be with their connections, and the numbers kept for them
	closed  map[image.Ref]int      // the other end of connections that have lost it, in the init stub until the queues are filled
	root    int                    // numbers of the container's root, and of the scratch file system
	scratch int
	names   int                   // given in it
	nodes   map[image.Ref]reached // listening sockets whose files have no name
	peers   map[image.Ref]int     // who sends to a connected socket: numbers in the init stub
	content map[image.Ref][]byte  // of queues
}

// links lists the connections of the image.
func (m *Maker) links() (out []*image.Connection) {
	for _, ref := range Refs(m.head) {
		if c, ok := m.head.Objects[ref].(*image.Connection); ok {
			out = append(out, c)
		}
	}
	return out
}

func (m *Maker) socketOf(ref image.Ref) *image.Socket {
	if f := m.head.File(ref); f != nil {
		return f.Socket
	}
	return nil
}

func named(address []byte) bool { return len(address) > 2 }

// asPair tells a connection that socketpair(2) makes, and byAccept one that takes
// accept(2). All others are made by connect(2) alone.
func (m *Maker) asPair(c *image.Connection) bool {
	from, to := m.socketOf(c.From), m.socketOf(c.To)
	if to != nil && to.Listening {
		return false
	}
	switch {
	case from != nil && to != nil:
		return c.Mutual && (from.Type == unix.SOCK_DGRAM || !named(to.Address))
	case to != nil:
		return !named(to.Address)
	}
	return !named(from.Unix.Peer)
}

func (m *Maker) byAccept(c *image.Connection) bool {
	from, to := m.socketOf(c.From), m.socketOf(c.To)
	if m.asPair(c) || from != nil && from.Type == unix.SOCK_DGRAM {
		return false
	}
	return to == nil || !to.Listening
}

// prepareUnix finds out which sockets come to be late and keeps numbers for them
// above all that the table takes.
func (m *Maker) prepareUnix() error {
	u := &unixMaker{Maker: m, ghosts: map[int32]*tracee.Stub{}, late: map[image.Ref]int{}, closed: map[image.Ref]int{}, nodes: map[image.Ref]reached{}, peers: map[image.Ref]int{}, content: map[image.Ref][]byte{}}
	m.unix = u
	next := m.lateNumbers()
	for _, c := range m.links() {
		refs := []image.Ref{c.From, c.To}
		if m.byAccept(c) {
			refs = refs[1:]
		} else if !m.asPair(c) {
			continue
		}
		for _, ref := range refs {
			if ref != 0 {
				u.late[ref] = next
				next++
			}
		}
	}
	if !u.needsScratch() {
		return nil
	}
	scratch, err := newScratch()
	if err != nil {
		return err
	}
	defer scratch.Close()
	fd, err := m.Send(m.stub, scratch)
	if err != nil {
		return err
	}
	var b tracee.Batch
	root := b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String("/"), tracee.W(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC))
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	up, err := m.moveUp([]int{int(b.Calls[root].Ret), fd})
	if err != nil {
		return err
	}
	u.root, u.scratch = up[0], up[1]
	m.kept = append(m.kept, up...)
	return nil
}

// lateNumbers is the first number that is free in every stub for as long as late
// sockets need them: files are opened low, which may reach into the table, before
// they are moved up.
func (m *Maker) lateNumbers() int { return m.base + 2*m.opens() + spareNumbers }

// needsScratch reports whether a socket has, or its peer had, a path as its name.
func (u *unixMaker) needsScratch() bool {
	byPath := func(address []byte) bool { return named(address) && address[2] != 0 }
	for _, o := range u.head.Objects {
		if f, ok := o.(*image.File); ok && f.Socket != nil && f.Socket.Unix != nil {
			if byPath(f.Socket.Address) && f.Socket.Path == "" || byPath(f.Socket.Unix.Peer) {
				return true
			}
		}
	}
	return false
}

// newScratch makes a file system in memory that is mounted nowhere (fsmount(2)).
// It is gone with the last who has a socket in it.
func newScratch() (*os.File, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fs)
	for key, value := range map[string]string{"mode": "0777", "size": "1m"} {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return nil, fmt.Errorf("fsconfig: %w", err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("fsconfig: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	return os.NewFile(uintptr(fd), "scratch file system"), nil
}

// ConnectSockets gives unix sockets their peers, names and queues of connections,
// once there is a stub for every process.
func (m *Maker) ConnectSockets(stubs map[int]*tracee.Stub) error {
	u := m.unix
	u.stubs = stubs
	for _, step := range []func() error{u.pairs, u.connections, u.settleLate, u.bindAll, u.listenAll, u.backlogs, u.outside, u.handOut} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// actor is the stub of the process that credentials name. For one that has ended
// a ghost takes its number for as long, and is gone as it is: nobody is to take
// a living process for it.
func (u *unixMaker) actor(c *image.PeerCreds) (*tracee.Stub, error) {
	if c == nil {
		return u.stub, nil
	}
	if s := u.stubs[int(c.Pid)]; s != nil && c.Pid != 0 {
		return s, nil
	}
	if g := u.ghosts[c.Pid]; g != nil {
		return g, nil
	}
	pid := c.Pid
	if pid == 0 || u.taken(pid) {
		for pid = 2; u.taken(pid); pid++ {
		}
	}
	var b tracee.Batch
	task.CloneProcess(&b, []int32{pid}, int32(unix.SIGCHLD), 0)
	cloned, err := u.stub.Run(&b)
	if err == nil && len(cloned) != 1 {
		err = errors.New("clone3 made no process")
	}
	if err != nil {
		return nil, fmt.Errorf("a process in place of %d, which has ended: %w", c.Pid, err)
	}
	u.ghosts[c.Pid], err = u.stub.NewChild(cloned[0], cloned[0])
	return u.ghosts[c.Pid], err
}

// taken reports a number that a task, a group or a ghost has.
func (u *unixMaker) taken(pid int32) bool {
	for i := range u.head.Tree.Processes {
		p := &u.head.Tree.Processes[i]
		if p.Pid == pid || p.Pgid == pid || p.Sid == pid || slices.Contains(p.Threads, pid) {
			return true
		}
	}
	for other := range u.ghosts {
		if other == pid {
			return true
		}
	}
	return false
}

// as adds the calls of do with the ids of somebody's credentials, which the kernel
// notes with the socket (prepare_peercred in net/unix/af_unix.c). The ids are
// effective ones only, and all capabilities stay.
func (u *unixMaker) as(b *tracee.Batch, c *image.PeerCreds, do func()) {
	if c == nil || u.head.UserOf(c.Pid) != nil {
		do()
		return
	}
	full := u.self.Capabilities
	become := func(uid, gid uint32, groups []uint32) {
		raw := make([]byte, 0, 4*len(groups))
		for _, g := range groups {
			raw = binary.LittleEndian.AppendUint32(raw, g)
		}
		add := b.Add
		if c.Pid == 0 { // ids of somebody outside need not exist here
			add = b.Try
		}
		add(unix.SYS_SETGROUPS, tracee.W(len(groups)), b.Put(raw))
		add(unix.SYS_SETRESGID, tracee.W(-1), tracee.W(gid), tracee.W(-1))
		add(unix.SYS_SETRESUID, tracee.W(-1), tracee.W(uid), tracee.W(-1))
		task.Capset(b, full, full, 0)
	}
	become(c.UID, c.GID, c.Groups)
	do()
	become(0, 0, nil)
}

// connectAtOnce is how many connections are made by one batch.
const connectAtOnce = 200

// pairs makes those that socketpair(2) has made.
func (u *unixMaker) pairs() error {
	var all []*image.Connection
	for _, c := range u.links() {
		if u.asPair(c) {
			all = append(all, c)
		}
	}
	return u.grouped(all, u.pairCreds, func(creds *image.PeerCreds, group []*image.Connection) error {
		s, err := u.actor(creds)
		if err != nil {
			return err
		}
		var b tracee.Batch
		ends := make([]tracee.Word, len(group))
		u.as(&b, creds, func() {
			for i, c := range group {
				ends[i] = b.Reserve(8)
				kind := u.eitherEnd(c).Type
				b.Add(unix.SYS_SOCKETPAIR, tracee.W(unix.AF_UNIX), tracee.W(kind|unix.SOCK_CLOEXEC), tracee.W(0), ends[i])
			}
		})
		if _, err := s.Run(&b); err != nil {
			return fmt.Errorf("socketpair: %w", err)
		}
		var low []int
		var refs, others []image.Ref
		for i, c := range group {
			raw := b.At(ends[i], 8)
			low = append(low, int(binary.LittleEndian.Uint32(raw)), int(binary.LittleEndian.Uint32(raw[4:])))
			refs, others = append(refs, c.From, c.To), append(others, c.To, c.From)
		}
		return u.adopt(s, low, refs, others)
	})
}

func (u *unixMaker) eitherEnd(c *image.Connection) *image.Socket {
	if s := u.socketOf(c.From); s != nil {
		return s
	}
	return u.socketOf(c.To)
}

func (u *unixMaker) pairCreds(c *image.Connection) *image.PeerCreds { return u.eitherEnd(c).Unix.Creds }

// grouped calls do for runs of connections that have the same credentials.
func (u *unixMaker) grouped(all []*image.Connection, of func(*image.Connection) *image.PeerCreds, do func(*image.PeerCreds, []*image.Connection) error) error {
	for len(all) > 0 {
		n := 1
		for n < len(all) && n < connectAtOnce && sameCreds(of(all[0]), of(all[n])) {
			n++
		}
		if err := do(of(all[0]), all[:n]); err != nil {
			return fail.On("unix sockets", err)
		}
		all = all[n:]
	}
	return nil
}

func sameCreds(a, b *image.PeerCreds) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Pid == b.Pid && a.UID == b.UID && a.GID == b.GID && slices.Equal(a.Groups, b.Groups)
}

// adopt takes new sockets of a stub into the init stub's table, under their
// numbers. refs[i] is 0 for an end that the container has no more; others[i]
// then is the end that it has.
func (u *unixMaker) adopt(s *tracee.Stub, low []int, refs, others []image.Ref) error {
	if s != u.stub {
		files := make([]*os.File, len(low))
		defer closeAll(files)
		var b tracee.Batch
		var err error
		for i, fd := range low {
			if files[i], err = s.Take(fd); err != nil {
				return err
			}
			b.Add(unix.SYS_CLOSE, tracee.W(fd))
		}
		if _, err := s.Run(&b); err != nil {
			return err
		}
		if low, err = u.SendAll(u.stub, files); err != nil {
			return err
		}
	}
	var b tracee.Batch
	var closed []int
	for i, ref := range refs {
		if ref == 0 {
			closed = append(closed, i)
			continue
		}
		b.Add(unix.SYS_DUP3, tracee.W(low[i]), tracee.W(u.late[ref]), tracee.W(unix.O_CLOEXEC))
		b.Add(unix.SYS_CLOSE, tracee.W(low[i]))
		u.fds[ref] = u.late[ref]
	}
	if _, err := u.stub.Run(&b); err != nil {
		return err
	}
	for _, i := range closed {
		up, err := u.moveUp(low[i : i+1])
		if err != nil {
			return err
		}
		u.closed[others[i]] = up[0]
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// connections makes those that accept(2) is needed for.
func (u *unixMaker) connections() error {
	var all []*image.Connection
	for _, c := range u.links() {
		if u.byAccept(c) {
			all = append(all, c)
		}
	}
	for len(all) > 0 {
		name, by, kind := u.listenerOf(all[0])
		n := 1
		for n < len(all) {
			if other, creds, k := u.listenerOf(all[n]); !slices.Equal(other, name) || !sameCreds(creds, by) || k != kind {
				break
			}
			n++
		}
		if err := u.connectTo(name, by, kind, all[:n]); err != nil {
			return fail.On("unix:"+sock.UnixName(name), err)
		}
		all = all[n:]
	}
	return nil
}

// listenerOf tells at what name a connection was accepted, who listened and of
// what type it is.
func (u *unixMaker) listenerOf(c *image.Connection) (name []byte, by *image.PeerCreds, kind int32) {
	from, to := u.socketOf(c.From), u.socketOf(c.To)
	if from != nil {
		name, by = from.Unix.Peer, from.Unix.Creds
	}
	if to != nil {
		name = to.Address
	}
	return name, by, u.eitherEnd(c).Type
}

// connectTo makes connections over one listening socket.
func (u *unixMaker) connectTo(name []byte, by *image.PeerCreds, kind int32, all []*image.Connection) error {
	var b tracee.Batch
	i := b.Add(unix.SYS_SOCKET, tracee.W(unix.AF_UNIX), tracee.W(kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK), tracee.W(0))
	if _, err := u.stub.Run(&b); err != nil {
		return err
	}
	up, err := u.moveUp([]int{int(b.Calls[i].Ret)})
	if err != nil {
		return err
	}
	listener := up[0]
	at, err := u.bindScratch(listener, name)
	if err != nil {
		return err
	}
	if err := u.listenAs(listener, connectAtOnce, by, false); err != nil {
		return err
	}
	connector := func(c *image.Connection) *image.PeerCreds {
		if to := u.socketOf(c.To); to != nil {
			return to.Unix.Creds
		}
		return nil
	}
	err = u.grouped(all, connector, func(creds *image.PeerCreds, group []*image.Connection) error {
		if err := u.connectAs(creds, at, group); err != nil {
			return err
		}
		return u.accept(listener, group)
	})
	if err != nil {
		return err
	}
	var done tracee.Batch
	done.Add(unix.SYS_CLOSE, tracee.W(listener))
	if _, err := u.stub.Run(&done); err != nil || !at.scratch {
		return err
	}
	return u.unlink(at)
}

// reached is where a socket is reached: an abstract name, or a file in the scratch
// file system.
type reached struct {
	address []byte
	scratch bool
}

// inScratch adds calls that are made in the scratch directory.
func (u *unixMaker) inScratch(b *tracee.Batch, do func()) {
	b.Add(unix.SYS_FCHDIR, tracee.W(u.scratch))
	do()
	b.Add(unix.SYS_FCHDIR, tracee.W(u.root))
}

// bindScratch binds a socket of the init stub to a name that nobody reaches it
// by, and returns one that our stubs do.
func (u *unixMaker) bindScratch(fd int, name []byte) (reached, error) {
	var b tracee.Batch
	if name[2] == 0 {
		b.Add(unix.SYS_BIND, tracee.W(fd), b.Put(name), tracee.W(len(name)))
		_, err := u.stub.Run(&b)
		return reached{address: name}, err
	}
	u.names++
	short := fmt.Sprintf("/%d", u.names)
	u.inScratch(&b, func() {
		b.Add(unix.SYS_CHROOT, b.String("."))
		bound := unix.ByteSliceToString(name[2:])
		for i, c := range bound {
			if c == '/' && i > 0 {
				b.Try(unix.SYS_MKDIRAT, tracee.W(unix.AT_FDCWD), b.String(bound[:i]), tracee.W(0o777))
			}
		}
		b.Add(unix.SYS_BIND, tracee.W(fd), b.Put(name), tracee.W(len(name)))
		b.Add(unix.SYS_RENAMEAT2, tracee.W(unix.AT_FDCWD), b.String(bound), tracee.W(unix.AT_FDCWD), b.String(short), tracee.W(0))
		b.Add(unix.SYS_FCHMODAT, tracee.W(unix.AT_FDCWD), b.String(short), tracee.W(0o777))
		b.Add(unix.SYS_FCHDIR, tracee.W(u.root))
		b.Add(unix.SYS_CHROOT, b.String("."))
	})
	address := append([]byte{unix.AF_UNIX, 0}, short[1:]...)
	if _, err := u.stub.Run(&b); err != nil {
		return reached{}, errors.Join(err, u.leaveScratch())
	}
	return reached{address: append(address, 0), scratch: true}, nil
}

// leaveScratch brings the init stub back to the container's root.
func (u *unixMaker) leaveScratch() error {
	var b tracee.Batch
	b.Add(unix.SYS_FCHDIR, tracee.W(u.root))
	b.Add(unix.SYS_CHROOT, b.String("."))
	_, err := u.stub.Run(&b)
	return err
}

// listenAs makes a socket of the init stub listen, as somebody who may not have
// inherited it.
func (u *unixMaker) listenAs(fd, backlog int, creds *image.PeerCreds, inherited bool) error {
	s, err := u.actor(creds)
	if err != nil {
		return err
	}
	if s != u.stub && !inherited {
		f, err := u.stub.Take(fd)
		if err != nil {
			return err
		}
		defer f.Close()
		if fd, err = u.Send(s, f); err != nil {
			return err
		}
	}
	var b tracee.Batch
	u.as(&b, creds, func() { b.Add(unix.SYS_LISTEN, tracee.W(fd), tracee.W(backlog)) })
	if s != u.stub && !inherited {
		b.Add(unix.SYS_CLOSE, tracee.W(fd))
	}
	if _, err := s.Run(&b); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return nil
}

// connectAs connects the sockets of a group as the one who had connected them.
func (u *unixMaker) connectAs(creds *image.PeerCreds, at reached, group []*image.Connection) error {
	s, err := u.actor(creds)
	if err != nil {
		return err
	}
	clients, strangers, err := u.clients(s, group)
	if err != nil {
		return err
	}
	var b tracee.Batch
	connect := func() {
		for _, fd := range clients {
			b.Add(unix.SYS_CONNECT, tracee.W(fd), b.Put(at.address), tracee.W(len(at.address)))
		}
	}
	u.as(&b, creds, func() {
		if at.scratch {
			u.inScratch(&b, connect)
		} else {
			connect()
		}
	})
	if _, err := s.Run(&b); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if len(strangers) == 0 {
		return nil
	}
	low, none, others := make([]int, len(strangers)), make([]image.Ref, len(strangers)), make([]image.Ref, len(strangers))
	for i, k := range strangers {
		low[i], others[i] = clients[k], group[k].To
	}
	return u.adopt(s, low, none, others)
}

// clients lists the connecting sockets of a group in a stub: inherited, or new
// where the container has lost them (strangers, by their places in the group).
func (u *unixMaker) clients(s *tracee.Stub, group []*image.Connection) (clients, strangers []int, err error) {
	var b tracee.Batch
	for i, c := range group {
		if c.From == 0 {
			strangers = append(strangers, i)
			b.Add(unix.SYS_SOCKET, tracee.W(unix.AF_UNIX), tracee.W(u.socketOf(c.To).Type|unix.SOCK_CLOEXEC), tracee.W(0))
		}
	}
	if _, err := s.Run(&b); err != nil {
		return nil, nil, err
	}
	for _, c := range group {
		if c.From != 0 {
			clients = append(clients, u.fds[c.From])
			continue
		}
		clients = append(clients, int(b.Calls[0].Ret))
		b.Calls = b.Calls[1:]
	}
	return clients, strangers, nil
}

// accept takes the connections of a group from the listening socket, in their
// order.
func (u *unixMaker) accept(listener int, group []*image.Connection) error {
	var b tracee.Batch
	calls := make([]int, len(group))
	for i, c := range group {
		if f := u.head.File(c.To); f != nil {
			u.become(&b, u.opener(f))
		}
		calls[i] = b.Add(unix.SYS_ACCEPT4, tracee.W(listener), tracee.W(0), tracee.W(0), tracee.W(unix.SOCK_CLOEXEC))
	}
	u.become(&b, u.self)
	if _, err := u.stub.Run(&b); err != nil {
		return fmt.Errorf("accept: %w", errors.Join(err, u.restoreSelf()))
	}
	low, refs, others := make([]int, len(group)), make([]image.Ref, len(group)), make([]image.Ref, len(group))
	for i, c := range group {
		low[i], refs[i], others[i] = int(b.Calls[calls[i]].Ret), c.To, c.From
	}
	return u.adopt(u.stub, low, refs, others)
}

// settleLate gives the late sockets their options and flags. Now epolls can have
// all that they watch.
func (u *unixMaker) settleLate() error {
	var refs []image.Ref
	for ref := range u.late {
		refs = append(refs, ref)
	}
	slices.Sort(refs)
	for start, end := range u.sameOpener(refs) {
		if err := u.finish(u.opener(u.head.File(refs[start])), refs[start:end], u.finishKind); err != nil {
			return err
		}
	}
	return u.registerAll()
}

// bindAll gives sockets their names.
func (u *unixMaker) bindAll() error {
	accepted := map[image.Ref]bool{}
	for _, c := range u.links() {
		if u.byAccept(c) {
			accepted[c.To] = true
		}
	}
	for _, ref := range Refs(u.head) {
		s := u.socketOf(ref)
		if s == nil || s.Unix == nil || !named(s.Address) || accepted[ref] {
			continue
		}
		if err := u.bind(ref, s); err != nil {
			return fail.On("unix:"+sock.UnixName(s.Address), fmt.Errorf("cannot be bound again: %w", err))
		}
	}
	return nil
}

func (u *unixMaker) bind(ref image.Ref, s *image.Socket) error {
	name, fd, f := sock.UnixName(s.Address), u.fds[ref], u.head.File(ref)
	if f.Inside != 0 {
		return u.bindInside(fd, f, s)
	}
	if s.Address[2] != 0 && s.Path == "" {
		at, err := u.bindScratch(fd, s.Address)
		if err != nil {
			return err
		}
		if s.Listening {
			u.nodes[ref] = at
			return nil
		}
		return u.unlink(at)
	}
	if s.Path == "" || s.Path == name {
		return u.asOpener(f, func(b *tracee.Batch) { sock.BindUnix(b, fd, s) })
	}
	if dir, ok := strings.CutSuffix(s.Path, "/"+name); ok && !path.IsAbs(name) {
		return u.asOpener(f, func(b *tracee.Batch) {
			b.Add(unix.SYS_CHDIR, b.String(dir+"/"))
			sock.BindUnix(b, fd, s)
			b.Add(unix.SYS_CHDIR, b.String("/"))
		})
	}
	return u.bindBeside(fd, f, s)
}

// bindInside binds a socket in a mount namespace that a task has made.
func (u *unixMaker) bindInside(fd int, f *image.File, s *image.Socket) error {
	by, nested := u.insider(u.stubs, f)
	if by == nil {
		return errors.New("no task is in the mount namespace that its file is in")
	}
	mine, err := u.stub.Take(fd)
	if err != nil {
		return err
	}
	defer mine.Close()
	at, err := u.Send(by, mine)
	if err != nil {
		return err
	}
	own := *s
	if owner := u.head.UserOf(u.pidOf(by)); nested && owner != nil {
		ids := task.IDMaps{UID: owner.User.UIDMap, GID: owner.User.GIDMap}
		own.UID, own.GID = ids.User(s.UID), ids.Group(s.GID)
	}
	m := *u.Maker
	m.stub, m.stays = by, nested
	there := *u
	there.Maker = &m
	if err := there.asOpener(f, func(b *tracee.Batch) { sock.BindUnix(b, at, &own) }); err != nil {
		return err
	}
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE, tracee.W(at))
	_, err = by.Run(&b)
	return err
}

// pidOf is the pid of a stub's task.
func (u *unixMaker) pidOf(s *tracee.Stub) int32 {
	for pid, one := range u.stubs {
		if one == s {
			return int32(pid)
		}
	}
	return 0
}

// bindBeside binds a socket by a name that does not lead to its file any more: in
// a directory made beside the file's place, into which the stub steps, and from
// which the file is then moved there.
func (u *unixMaker) bindBeside(fd int, f *image.File, s *image.Socket) error {
	name := sock.UnixName(s.Address)
	dir := fmt.Sprintf("%s/.ocickpt-%d", path.Dir(s.Path), fd)
	err := u.asOpener(f, func(b *tracee.Batch) { b.Add(unix.SYS_MKDIR, b.String(dir), tracee.W(0o700)) })
	if err != nil {
		return err
	}
	var made []string
	for i, c := range name {
		if c == '/' && i > 0 {
			made = append(made, name[:i])
		}
	}
	err = u.asOpener(f, func(b *tracee.Batch) {
		b.Add(unix.SYS_CHDIR, b.String(dir))
		u.chroot(b, f)
		for _, one := range made {
			b.Try(unix.SYS_MKDIRAT, tracee.W(unix.AT_FDCWD), b.String(one), tracee.W(0o700))
		}
		b.Add(unix.SYS_BIND, tracee.W(fd), b.Put(s.Address), tracee.W(len(s.Address)))
		b.Add(unix.SYS_RENAMEAT2, tracee.W(unix.AT_FDCWD), b.String(name), tracee.W(unix.AT_FDCWD), b.String("/s"), tracee.W(0))
		for _, one := range slices.Backward(made) {
			b.Try(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.String(one), tracee.W(unix.AT_REMOVEDIR))
		}
		b.Add(unix.SYS_FCHDIR, tracee.W(u.root))
		u.chroot(b, f)
		b.Add(unix.SYS_RENAMEAT2, tracee.W(unix.AT_FDCWD), b.String(dir+"/s"), tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(0))
		sock.OwnUnix(b, s)
	})
	if err != nil {
		err = errors.Join(err, u.leaveScratch())
	}
	return errors.Join(err, u.asOpener(f, func(b *tracee.Batch) { b.Add(unix.SYS_RMDIR, b.String(dir)) }))
}

// chroot adds a chroot(2) to the working directory, for which the stub becomes
// itself for a moment.
func (u *unixMaker) chroot(b *tracee.Batch, f *image.File) {
	u.become(b, u.self)
	b.Add(unix.SYS_CHROOT, b.String("."))
	u.become(b, u.opener(f))
}

// unlink removes a file of the scratch file system.
func (u *unixMaker) unlink(at reached) error {
	var b tracee.Batch
	u.inScratch(&b, func() { b.Add(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.Put(at.address[2:]), tracee.W(0)) })
	_, err := u.stub.Run(&b)
	return err
}

// asOpener runs calls as the task that holds a file, or as the bundle's own
// process what that one may not.
func (u *unixMaker) asOpener(f *image.File, fill func(b *tracee.Batch)) (err error) {
	for _, who := range []Identity{u.opener(f), u.bundle} {
		var b tracee.Batch
		u.become(&b, who)
		fill(&b)
		u.become(&b, u.self)
		if _, err = u.stub.Run(&b); err == nil {
			return nil
		}
		if e := u.restoreSelf(); e != nil || !denied(err) {
			return errors.Join(err, e)
		}
	}
	return err
}

// listenAll makes sockets listen, each by the process that did.
func (u *unixMaker) listenAll() error {
	for _, ref := range Refs(u.head) {
		s := u.socketOf(ref)
		if s == nil || s.Unix == nil || !s.Listening {
			continue
		}
		_, ghost := u.ghosts[pidOf(s.Unix.Creds)]
		if err := u.listenAs(u.fds[ref], int(s.Backlog), s.Unix.Creds, !ghost); err != nil {
			return fail.On("unix:"+sock.UnixName(s.Address), err)
		}
	}
	return nil
}

func pidOf(c *image.PeerCreds) int32 {
	if c == nil {
		return 0
	}
	return c.Pid
}

// backlogs makes the connections that wait to be accepted, in their order, each
// by the process that has the client.
func (u *unixMaker) backlogs() error {
	for _, c := range u.links() {
		to := u.socketOf(c.To)
		if to == nil || !to.Listening {
			continue
		}
		at, ok := u.nodes[c.To]
		if !ok {
			at = reached{address: to.Address}
		}
		if to.Path != "" {
			at.address = append(append([]byte{unix.AF_UNIX, 0}, to.Path...), 0)
		}
		if err := u.connectPending(c, at); err != nil {
			return fail.On("unix:"+sock.UnixName(to.Address), err)
		}
	}
	for _, at := range u.nodes {
		if err := u.unlink(at); err != nil {
			return err
		}
	}
	return nil
}

func (u *unixMaker) connectPending(c *image.Connection, at reached) error {
	creds := u.holder(c.From)
	s, err := u.actor(creds)
	if err != nil {
		return err
	}
	clients, strangers, err := u.clients(s, []*image.Connection{c})
	if err != nil {
		return err
	}
	var b tracee.Batch
	u.as(&b, creds, func() {
		connect := func() {
			b.Add(unix.SYS_CONNECT, tracee.W(clients[0]), b.Put(at.address), tracee.W(len(at.address)))
		}
		if at.scratch {
			u.inScratch(&b, connect)
		} else {
			connect()
		}
	})
	for range strangers {
		b.Add(unix.SYS_CLOSE, tracee.W(clients[0]))
	}
	if _, err := s.Run(&b); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return nil
}

// outside connects sockets again whose peers are not the container's, each as the
// task that has it.
func (u *unixMaker) outside() error {
	for _, ref := range Refs(u.head) {
		s := u.socketOf(ref)
		if s == nil || s.Unix == nil || !s.Unix.Reconnect {
			continue
		}
		creds := u.holder(ref)
		by, err := u.actor(creds)
		if err != nil {
			return err
		}
		var b tracee.Batch
		u.as(&b, creds, func() {
			if creds != nil { // no more rights than the task has
				task.Capset(&b, u.self.Capabilities, u.identityOf(creds.Pid).Capabilities, 0)
			}
			b.Add(unix.SYS_CONNECT, tracee.W(u.fds[ref]), b.Put(s.Unix.Peer), tracee.W(len(s.Unix.Peer)))
			task.Capset(&b, u.self.Capabilities, u.self.Capabilities, 0)
		})
		if _, err := by.Run(&b); err != nil {
			return fail.On("unix:"+sock.UnixName(s.Unix.Peer), &fail.Error{Cause: fmt.Errorf("cannot be connected to again: %w", err), Remedy: "start who listens there, or checkpoint with --ext-unix-sk=disconnect"})
		}
	}
	return nil
}

// holder is who a task is that holds a socket, nil for none.
func (u *unixMaker) holder(ref image.Ref) *image.PeerCreds {
	f := u.head.File(ref)
	if f == nil {
		return nil
	}
	t := u.head.Task(f.Opener)
	if t == nil {
		return nil
	}
	who := &t.Threads[0].Creds
	return &image.PeerCreds{Pid: t.Pid, UID: who.UID[1], GID: who.GID[1], Groups: who.Groups}
}

// handOut gives the late sockets to the stubs whose tables, or whose threads' or
// vforked children's, have them.
func (u *unixMaker) handOut() error {
	if len(u.late) == 0 {
		return nil
	}
	given := map[image.Ref]bool{} // tables
	for _, t := range u.head.Tasks {
		s := u.stubs[int(t.Pid)]
		if s == nil || s == u.stub {
			s = u.parentOf(t.Pid)
		}
		tables := []image.Ref{t.Files}
		for i := range t.Threads {
			tables = append(tables, t.Threads[i].Files)
		}
		var refs []image.Ref
		for _, table := range tables {
			files := u.head.Files(table)
			if files == nil || s == nil || given[table] {
				continue
			}
			given[table] = true
			for _, d := range files.Descriptors {
				if u.late[d.File] != 0 && !slices.Contains(refs, d.File) {
					refs = append(refs, d.File)
				}
			}
		}
		if err := u.give(s, refs); err != nil {
			return fail.In(fmt.Sprintf("task %d", t.Pid), err)
		}
	}
	return nil
}

// parentOf is the stub of the process that has yet to vfork another; nil for the
// init stub, which has everything.
func (u *unixMaker) parentOf(pid int32) *tracee.Stub {
	for _, t := range u.head.Tasks {
		for i := range t.Threads {
			if t.Threads[i].Vfork == pid && u.stubs[int(t.Pid)] != u.stub {
				return u.stubs[int(t.Pid)]
			}
		}
	}
	return nil
}

func (u *unixMaker) give(s *tracee.Stub, refs []image.Ref) error {
	for some := range slices.Chunk(refs, connectAtOnce) {
		files := make([]*os.File, len(some))
		err := u.giveSome(s, some, files)
		closeAll(files)
		if err != nil {
			return err
		}
	}
	return nil
}

func (u *unixMaker) giveSome(s *tracee.Stub, refs []image.Ref, files []*os.File) (err error) {
	for i, ref := range refs {
		if files[i], err = u.stub.Take(u.fds[ref]); err != nil {
			return err
		}
	}
	low, err := u.SendAll(s, files)
	if err != nil {
		return err
	}
	var b tracee.Batch
	for i, ref := range refs {
		b.Add(unix.SYS_DUP3, tracee.W(low[i]), tracee.W(u.late[ref]), tracee.W(unix.O_CLOEXEC))
		b.Add(unix.SYS_CLOSE, tracee.W(low[i]))
	}
	_, err = s.Run(&b)
	return err
}

// SettleSockets does what comes after the queues are filled: peers of datagram
// sockets, what is shut down or closed, and options that change what is received.
//
// It comes before zombies end: ghosts are not to be among them.
func (m *Maker) SettleSockets() error {
	u := m.unix
	for _, c := range u.links() {
		if c.Mutual {
			u.peers[c.From], u.peers[c.To] = u.fds[c.To], u.fds[c.From]
		}
	}
	for ref, fd := range u.closed {
		u.peers[ref] = fd
	}
	for _, ref := range Refs(u.head) {
		q, ok := u.head.Objects[ref].(*image.Queue)
		if !ok {
			continue
		}
		if err := u.fill(ref, q); err != nil {
			return fail.On("unix:"+sock.UnixName(u.socketOf(q.Socket).Address), fmt.Errorf("what was unread cannot be put back: %w", err))
		}
	}
	for _, g := range u.ghosts {
		if err := g.Exit(0); err != nil {
			return err
		}
	}
	for _, c := range u.links() {
		from := u.socketOf(c.From)
		if from == nil || from.Type != unix.SOCK_DGRAM || u.asPair(c) {
			continue
		}
		if err := u.connectDatagram(c, from); err != nil {
			return fail.On("unix:"+sock.UnixName(from.Address), err)
		}
	}
	var b tracee.Batch
	for _, ref := range Refs(u.head) {
		s := u.socketOf(ref)
		if s == nil || s.Unix == nil {
			continue
		}
		if s.Unix.Reset {
			if err := u.reset(ref); err != nil {
				return fmt.Errorf("ECONNRESET: %w", err)
			}
		}
		if how := s.Unix.Shutdown; how != 0 {
			b.Add(unix.SYS_SHUTDOWN, tracee.W(u.fds[ref]), tracee.W(uint32(how-1)))
		}
		if !s.Listening {
			sock.Receive(&b, u.fds[ref], s)
		}
	}
	for _, fd := range u.closed {
		b.Add(unix.SYS_CLOSE, tracee.W(fd))
	}
	_, err := u.stub.Run(&b)
	return err
}

// reset leaves something unread in the end of a connection that is going to be
// closed, for which the kernel tells the other end of ECONNRESET.
func (u *unixMaker) reset(ref image.Ref) error {
	if u.closed[ref] == 0 {
		return errors.New("it has a peer")
	}
	f, err := u.stub.Take(u.fds[ref])
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Send(int(f.Fd()), []byte{0}, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// connectDatagram gives a datagram socket its peer. The kernel notes no
// credentials there, so it may as well be done from here.
func (u *unixMaker) connectDatagram(c *image.Connection, from *image.Socket) error {
	f, err := u.stub.Take(u.fds[c.From])
	if err != nil {
		return err
	}
	defer f.Close()
	number := u.fds[c.To]
	if c.To == 0 {
		var b tracee.Batch
		i := b.Add(unix.SYS_SOCKET, tracee.W(unix.AF_UNIX), tracee.W(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), tracee.W(0))
		if _, err := u.stub.Run(&b); err != nil {
			return err
		}
		number = int(b.Calls[i].Ret)
		if _, err := u.bindScratch(number, from.Unix.Peer); err != nil {
			return err
		}
	}
	to, err := u.stub.Take(number)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := sock.Connect(f, to); err != nil || c.To != 0 {
		return err
	}
	var done tracee.Batch
	done.Add(unix.SYS_CLOSE, tracee.W(number))
	_, err = u.stub.Run(&done)
	return err
}
