package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A pty is a pseudo-terminal of the container's devpts: a master, which opening
// ptmx has made, and a slave that anybody opens by its number. The container's
// own terminal is one whose master the engine holds.
type pty struct {
	object.Object
	record        *image.Pty
	master, slave *Description // one that holds it, or nil
	content       []byte       // Output, Input and Behind of the record
}

// Device numbers of terminals (Documentation/admin-guide/devices.txt).
const (
	ptsMajor = 136
	devTTY   = 5 << 8
	devPtmx  = 5<<8 | 2
)

// Requests of ioctl_tty(2) that x/sys does not have under these names, or whose
// arguments it has no type for.
const (
	termiosSize = 44 // struct termios2
	winsizeSize = 8
	tioGPacket  = 0x80045438 // TIOCGPKT
	tioGLocked  = 0x80045439 // TIOCGPTLCK
	tioGExcl    = 0x80045440 // TIOCGEXCL
)

// ptmx is the master's side.
var ptmx = kind{
	name: image.KindPtmx,
	is: func(s *Set, one *seen) bool {
		return one.format() == unix.S_IFCHR && one.stat.Rdev == devPtmx && !s.external(one)
	},
	read: func(s *Set, d *Description) error {
		p := s.pty(int(d.seen.number("tty-index", 10)))
		p.master = d
		d.Record.Kind, d.Record.Path = image.KindPtmx, d.seen.link
		d.Complete = func() { d.Record.Pipe = p.Ref }
		return nil
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		p := m.ptys[f.Pipe]
		if p == nil || p.master == 0 {
			return 0, errors.New("the master of a terminal that has none")
		}
		return b.Add(unix.SYS_FCNTL, tracee.W(p.master), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0)), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) { setFlags(b, fd, f.Flags) },
}

// tty is the slave's side, or /dev/tty: whatever terminal the process has that
// opens it, and therefore opened late.
var tty = kind{
	name: image.KindTTY,
	is: func(s *Set, one *seen) bool {
		return one.format() == unix.S_IFCHR && !s.external(one) &&
			(one.stat.Rdev == devTTY || unix.Major(one.stat.Rdev) == ptsMajor)
	},
	read: func(s *Set, d *Description) error {
		d.Record.Kind, d.Record.Path = image.KindTTY, strings.TrimSuffix(d.seen.link, deletedSuffix)
		if d.seen.stat.Rdev == devTTY {
			d.Record.Pid = int32(d.seen.proc.Inner)
			return nil
		}
		p := s.pty(int(unix.Minor(d.seen.stat.Rdev)))
		p.slave = d
		p.record.Mode, p.record.UID, p.record.GID = d.seen.stat.Mode&0o777, d.seen.stat.Uid, d.seen.stat.Gid
		d.Complete = func() { d.Record.Pipe = p.Ref }
		return nil
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return openPath(b, f.Path, f.Flags|unix.O_NONBLOCK), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) { setFlags(b, fd, f.Flags) },
}

// pty is the terminal of a number, met for the first time or again.
func (s *Set) pty(index int) *pty {
	p := s.ptys[index]
	if p == nil {
		p = &pty{record: &image.Pty{Index: int32(index), Mode: 0o620}}
		p.Object = object.Object{Type: image.TypePty, Record: p.record}
		s.ptys[index] = p
		s.terminals = append(s.terminals, p)
	}
	return p
}

// Control notes that a process has the terminal of a device number, as field 7
// of proc_pid_stat(5) shows it. Ids are the container's; foreground is 0 if no
// process group is.
func (s *Set) Control(device uint64, session, foreground int) error {
	const ours = "its controlling terminal"
	if unix.Major(device) != ptsMajor {
		return fail.Refuse(ours, "it is a device of the host", "")
	}
	p := s.ptys[int(unix.Minor(device))]
	if p == nil {
		return fail.Refuse(ours, fmt.Sprintf("nobody in the container has /dev/pts/%d open", unix.Minor(device)), "")
	}
	p.record.Session, p.record.Foreground = int32(session), int32(foreground)
	return nil
}

// Uncontrolled notes that a process of a session has no controlling terminal.
func (s *Set) Uncontrolled(pid, session int) {
	for _, p := range s.terminals {
		if session != 0 && p.record.Session == int32(session) {
			p.record.Without = append(p.record.Without, int32(pid))
		}
	}
}

// readTerminals reads the state of every terminal.
func (s *Set) readTerminals() error {
	for _, p := range s.terminals {
		d := p.master
		if d == nil {
			d = p.slave
		}
		if err := s.readTerminal(p); err != nil {
			return fail.In(d.seen.proc.Name, fail.On(d.seen.object(), err))
		}
	}
	return nil
}

// readTerminal asks both sides, each for what it alone tells.
func (s *Set) readTerminal(p *pty) error {
	if p.slave != nil {
		f, err := p.slave.seen.own()
		if err != nil {
			return err
		}
		defer f.Close()
		if err := p.askSlave(f); err != nil || p.record.HungUp {
			return err
		}
	}
	if p.master != nil {
		f, err := p.master.seen.own()
		if err != nil {
			return err
		}
		defer f.Close()
		return p.askMaster(f)
	}
	if p.record.Console = s.Console == fmt.Sprintf("/%d", p.record.Index); !p.record.Console {
		return fail.Refuse("", "the other side of this terminal is held outside the container", "close it before the checkpoint")
	}
	return nil
}

func (p *pty) askSlave(f *os.File) error {
	termios := make([]byte, termiosSize)
	if err := ioctl(f, unix.TCGETS2, unsafe.Pointer(&termios[0])); errors.Is(err, unix.EIO) {
		// hung_up_tty_ioctl in drivers/tty/tty_io.c
		p.record.HungUp, p.record.Mode, p.record.UID, p.record.GID = true, 0, 0, 0
		return nil
	}
	var excl int32
	err := ioctl(f, tioGExcl, unsafe.Pointer(&excl))
	p.record.Exclusive = excl != 0
	return errors.Join(err, p.askBoth(f))
}

func (p *pty) askMaster(f *os.File) error {
	var packet, locked int32
	err := errors.Join(ioctl(f, tioGPacket, unsafe.Pointer(&packet)), ioctl(f, tioGLocked, unsafe.Pointer(&locked)))
	p.record.Packet, p.record.Locked = packet != 0, locked != 0
	// Without a slave the master reads EIO, once there has been one.
	fds := []unix.PollFd{{Fd: int32(f.Fd())}}
	if _, e := unix.Poll(fds, 0); e != nil && !errors.Is(e, unix.EINTR) {
		err = errors.Join(err, fmt.Errorf("poll: %w", e))
	}
	p.record.Closed = fds[0].Revents&unix.POLLHUP != 0
	return errors.Join(err, p.askBoth(f))
}

// askBoth reads what the sides have in common: asked for its settings, a master
// tells its slave's.
func (p *pty) askBoth(f *os.File) error {
	p.record.Termios = make([]byte, termiosSize)
	return errors.Join(ioctl(f, unix.TCGETS2, unsafe.Pointer(&p.record.Termios[0])), ioctl(f, unix.TIOCGWINSZ, unsafe.Pointer(&p.record.Winsize)))
}

// HasTerminals reports that somebody has a terminal open.
func (s *Set) HasTerminals() bool { return len(s.terminals) > 0 }

// Unread takes note of what waits in the terminals of the stopped container. nil
// says that it cannot be told: nobody can look at it without taking it out.
func (s *Set) Unread(all map[bpf.Side]bpf.Unread) error {
	for _, p := range s.terminals {
		if all == nil {
			if err := p.checkQuiet(); err != nil {
				return err
			}
			continue
		}
		index := int(p.record.Index)
		out, in := all[bpf.Side{Index: index, Master: true}], all[bpf.Side{Index: index}]
		p.content = slices.Concat(out.Data, out.Rest, in.Data, in.Rest)
		p.record.Output, p.record.Input, p.record.Behind = uint32(len(out.Data)+len(out.Rest)), uint32(len(in.Data)), uint32(len(in.Rest))
		if len(in.Data) > 0 {
			p.record.Ends = make([]byte, (len(in.Data)+7)/8)
		}
		for i, end := range in.Ends {
			if end {
				p.record.Ends[i/8] |= 1 << (i % 8)
			}
		}
	}
	return nil
}

// checkQuiet refuses a terminal in which something is under way. A line that is
// still being typed does not show.
func (p *pty) checkQuiet() error {
	for _, d := range []*Description{p.master, p.slave} {
		if d == nil || p.record.HungUp {
			continue
		}
		f, err := d.seen.own()
		if err != nil {
			return err
		}
		n, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
		_ = f.Close()
		if err == nil && n > 0 {
			err = fail.Refuse("", fmt.Sprintf("%d bytes wait to be read from it, and this kernel does not let them be looked at (BPF)", n), "let the reader take them")
		}
		if err != nil {
			return fail.In(d.seen.proc.Name, fail.On(d.seen.object(), err))
		}
	}
	return nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return fmt.Errorf("ioctl %#x of a terminal: %w", request, errno)
	}
	return nil
}

// madePty is a terminal in the making. The stubs inherit both sides.
type madePty struct {
	ref           image.Ref
	record        *image.Pty
	master, slave int // 0 if there is none
	content       []byte
}

// side is the descriptor by which a terminal takes its settings.
func (p *madePty) side() int {
	if p.slave != 0 {
		return p.slave
	}
	return p.master
}

// makePtys makes the terminals of the image under their numbers: the kernel
// gives the lowest that is free, so all below are taken for a moment.
func (m *Maker) makePtys() error {
	last, open := -1, map[image.Ref]bool{}
	for _, ref := range Refs(m.head) {
		switch o := m.head.Objects[ref].(type) {
		case *image.Pty:
			m.ptys[ref] = &madePty{ref: ref, record: o}
			if o.Console {
				m.ptys[ref].slave = m.stdio[0]
			} else {
				last = max(last, int(o.Index))
			}
		case *image.File:
			if o.Kind == image.KindTTY && o.Pipe != 0 {
				open[o.Pipe] = true
			}
		}
	}
	if err := m.checkConsole(); err != nil || last < 0 {
		return err
	}
	masters, err := m.openMasters(last + 1)
	if err != nil {
		return err
	}
	for _, p := range m.inOrder() {
		if p.record.Console {
			continue
		}
		if p.master = masters[p.record.Index]; p.master == 0 {
			return fail.On(fmt.Sprintf("terminal /dev/pts/%d", p.record.Index), errors.New("its number is taken in the new container"))
		}
		if open[p.ref] || p.record.Session != 0 || p.record.Closed || p.record.Input+p.record.Behind > 0 {
			if err := m.openSlave(p); err != nil {
				return fail.On(fmt.Sprintf("terminal /dev/pts/%d", p.record.Index), err)
			}
		}
	}
	return nil
}

// inOrder lists the terminals in the order of their references.
func (m *Maker) inOrder() []*madePty {
	var all []*madePty
	for _, ref := range Refs(m.head) {
		if p := m.ptys[ref]; p != nil {
			all = append(all, p)
		}
	}
	return all
}

// checkConsole holds the terminal that the bundle has given the init against
// the image's.
func (m *Maker) checkConsole() error {
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", m.stub.Pid, m.stdio[0]))
	if err != nil {
		return err
	}
	for _, p := range m.inOrder() {
		if want := fmt.Sprintf("/dev/pts/%d", p.record.Index); p.record.Console && link != want {
			return fail.Refuse("terminal "+want, "the image's container has a terminal of its own, and the new one has "+link+" instead", "restore into a bundle with process.terminal true")
		}
	}
	return nil
}

// openMasters opens ptmx n times and returns the descriptors, moved into the
// table, of those that the image wants, by their numbers.
func (m *Maker) openMasters(n int) (map[int32]int, error) {
	wanted := map[int32]bool{}
	for _, p := range m.ptys {
		wanted[p.record.Index] = !p.record.Console
	}
	var b tracee.Batch
	for range n {
		b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String("/dev/ptmx"), tracee.W(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC))
	}
	if _, err := m.stub.Run(&b); err != nil {
		return nil, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	var ask tracee.Batch
	numbers := ask.Reserve(8 * n)
	for i := range n {
		ask.Add(unix.SYS_IOCTL, tracee.W(b.Calls[i].Ret), tracee.W(unix.TIOCGPTN), numbers.Plus(8*i))
	}
	if _, err := m.stub.Run(&ask); err != nil {
		return nil, fmt.Errorf("number of a terminal: %w", err)
	}
	var low []int
	var indexes []int32
	var drop tracee.Batch
	for i := range n {
		fd, index := int(b.Calls[i].Ret), int32(binary.LittleEndian.Uint32(ask.At(numbers.Plus(8*i), 4)))
		if wanted[index] {
			low, indexes = append(low, fd), append(indexes, index)
		} else {
			drop.Add(unix.SYS_CLOSE, tracee.W(fd))
		}
	}
	if _, err := m.stub.Run(&drop); err != nil {
		return nil, err
	}
	up, err := m.moveUp(low)
	masters := map[int32]int{}
	for i := range up {
		masters[indexes[i]] = up[i]
	}
	return masters, err
}

// openSlave opens a terminal's slave for the maker's own use, and gives its node
// back to whom it belonged.
func (m *Maker) openSlave(p *madePty) error {
	var b tracee.Batch
	unlock := b.Put(make([]byte, 4))
	b.Add(unix.SYS_IOCTL, tracee.W(p.master), tracee.W(unix.TIOCSPTLCK), unlock)
	peer := b.Add(unix.SYS_IOCTL, tracee.W(p.master), tracee.W(unix.TIOCGPTPEER), tracee.W(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC))
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	up, err := m.moveUp([]int{int(b.Calls[peer].Ret)})
	if err != nil {
		return err
	}
	p.slave = up[0]
	if p.record.HungUp {
		return nil
	}
	var own tracee.Batch
	own.Add(unix.SYS_FCHOWN, tracee.W(p.slave), tracee.W(p.record.UID), tracee.W(p.record.GID))
	own.Add(unix.SYS_FCHMOD, tracee.W(p.slave), tracee.W(p.record.Mode))
	_, err = m.stub.Run(&own)
	return err
}

// setTerminals gives the terminals their settings, once all their sides are
// open: what is locked, exclusive or hung up could not be opened any more. The
// init loses the terminal that libcontainer gave it, unless it is its own.
func (m *Maker) setTerminals() error {
	var b tracee.Batch
	mine := false
	for _, p := range m.inOrder() {
		p.set(&b)
		mine = mine || p.record.Console && p.record.Session == m.initPid
	}
	if !mine { // else ENOTTY, if there is none
		b.Try(unix.SYS_IOCTL, tracee.W(m.stdio[0]), tracee.W(unix.TIOCNOTTY))
	}
	if _, err := m.stub.Run(&b); err != nil {
		return fmt.Errorf("settings of a terminal: %w", err)
	}
	return nil
}

func (p *madePty) set(b *tracee.Batch) {
	if p.record.HungUp {
		b.Add(unix.SYS_CLOSE, tracee.W(p.master))
		p.master = 0
		return
	}
	b.Add(unix.SYS_IOCTL, tracee.W(p.side()), tracee.W(unix.TCSETS2), b.Put(p.record.Termios))
	if !p.record.Console { // whose size is that of the window it is shown in now
		var size []byte
		for _, n := range p.record.Winsize {
			size = binary.LittleEndian.AppendUint16(size, n)
		}
		b.Add(unix.SYS_IOCTL, tracee.W(p.side()), tracee.W(unix.TIOCSWINSZ), b.Put(size))
	}
	if p.record.Locked {
		b.Add(unix.SYS_IOCTL, tracee.W(p.master), tracee.W(unix.TIOCSPTLCK), b.Put([]byte{1, 0, 0, 0}))
	}
	if p.record.Exclusive {
		b.Add(unix.SYS_IOCTL, tracee.W(p.side()), tracee.W(unix.TIOCEXCL))
	}
}

// refillTerminals puts back what lay unread. Packet mode comes behind it: the
// master is told of changes of the settings then (TIOCPKT in ioctl_tty(2)).
func (m *Maker) refillTerminals() error {
	var b tracee.Batch
	for _, p := range m.inOrder() {
		if err := m.refill(p); err != nil {
			return fail.On(fmt.Sprintf("terminal /dev/pts/%d", p.record.Index), err)
		}
		if p.record.Packet {
			b.Add(unix.SYS_IOCTL, tracee.W(p.master), tracee.W(unix.TIOCPKT), b.Put([]byte{1, 0, 0, 0}))
		}
	}
	_, err := m.stub.Run(&b)
	return err
}

// refill puts back what lay unread in a terminal. TIOCSTI hands a byte to the line
// discipline as if it had come from the other side, at once: settings that let
// everything pass unchanged are in force meanwhile, and lines end where they
// ended. What the line discipline had no room for follows by the plain way.
func (m *Maker) refill(p *madePty) error {
	if len(p.content) == 0 {
		return nil
	}
	slave, err := m.stub.Take(p.side())
	if err != nil {
		return err
	}
	defer slave.Close()
	rec := p.record
	plain := slices.Clone(rec.Termios)
	for i := range termiosCC + termiosNCC {
		if i != termiosLine && (i < termiosCflag || i >= termiosCflag+4) {
			plain[i] = 0
		}
	}
	plain[termiosCC+unix.VMIN] = 1
	canonical := binary.LittleEndian.Uint32(rec.Termios[termiosLflag:])&unix.ICANON != 0
	if canonical {
		binary.LittleEndian.PutUint32(plain[termiosLflag:], unix.ICANON)
	}
	if err := ioctl(slave, unix.TCSETS2, unsafe.Pointer(&plain[0])); err != nil {
		return err
	}
	output, input, behind := p.content[:rec.Output], p.content[rec.Output:rec.Output+rec.Input], p.content[rec.Output+rec.Input:]
	if err := m.refillOutput(p, slave, output); err != nil {
		return err
	}
	for i, c := range input {
		if err := typeByte(slave, plain, c, canonical && rec.Ends[i/8]>>(i%8)&1 != 0); err != nil {
			return err
		}
	}
	if err := ioctl(slave, unix.TCSETS2, unsafe.Pointer(&rec.Termios[0])); err != nil || len(behind) == 0 {
		return err
	}
	return m.writeTo(p.master, behind)
}

// Places in struct termios2 (asm-generic/termbits.h).
const (
	termiosCflag = 8
	termiosLflag = 12
	termiosLine  = 16
	termiosCC    = 17
	termiosNCC   = 19
)

// roomOfLine is how many bytes a line discipline holds (N_TTY_BUF_SIZE less one).
const roomOfLine = 4095

func (m *Maker) refillOutput(p *madePty, slave *os.File, output []byte) error {
	if len(output) == 0 {
		return nil
	}
	master, err := m.stub.Take(p.master)
	if err != nil {
		return err
	}
	defer master.Close()
	n := min(len(output), roomOfLine)
	for _, c := range output[:n] {
		if err := typeByte(master, nil, c, false); err != nil {
			return err
		}
	}
	if n == len(output) {
		return nil
	}
	return m.writeTo(p.side(), output[n:])
}

// typeByte types a byte. One that ends a line without being a newline is the end
// of a file, or a character that the program has chosen (VEOF, VEOL): it is made
// that for a moment.
func typeByte(f *os.File, plain []byte, c byte, end bool) error {
	if !end || c == '\n' {
		return ioctl(f, unix.TIOCSTI, unsafe.Pointer(&c))
	}
	special := slices.Clone(plain)
	if c == 0 {
		const eot = 4
		special[termiosCC+unix.VEOF], c = eot, eot
	} else {
		special[termiosCC+unix.VEOL] = c
	}
	return errors.Join(
		ioctl(f, unix.TCSETS2, unsafe.Pointer(&special[0])),
		ioctl(f, unix.TIOCSTI, unsafe.Pointer(&c)),
		ioctl(f, unix.TCSETS2, unsafe.Pointer(&plain[0])),
	)
}

// writeTo writes to a terminal as the stub would, without waiting for a reader.
func (m *Maker) writeTo(fd int, data []byte) error {
	var b tracee.Batch
	flags := b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_GETFL))
	b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_SETFL), tracee.W(unix.O_NONBLOCK))
	n := b.Add(unix.SYS_WRITE, tracee.W(fd), b.Put(data), tracee.W(len(data)))
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	if b.Calls[n].Ret != int64(len(data)) {
		return fmt.Errorf("a terminal takes %d of %d bytes", b.Calls[n].Ret, len(data))
	}
	var back tracee.Batch
	back.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_SETFL), tracee.W(b.Calls[flags].Ret))
	_, err := m.stub.Run(&back)
	return err
}

// TakeTerminal adds the call by which the leader of a session that has just
// begun takes its controlling terminal, before it has children: they inherit it,
// and nothing gives it to them later (TIOCSCTTY in ioctl_tty(2)).
func (m *Maker) TakeTerminal(b *tracee.Batch, leader int) {
	for _, p := range m.inOrder() {
		if p.record.Session == int32(leader) && !(p.record.Console && p.record.Session == m.initPid) {
			b.Add(unix.SYS_IOCTL, tracee.W(p.slave), tracee.W(unix.TIOCSCTTY), tracee.W(0))
		}
	}
}

// SettleTerminals says which process group is in the foreground, and takes the
// terminal away from those who had given it up: when every process is there, in
// its group.
func (m *Maker) SettleTerminals(stubs map[int]*tracee.Stub) error {
	for _, p := range m.inOrder() {
		var b tracee.Batch
		if leader := stubs[int(p.record.Session)]; leader != nil && p.record.Foreground != 0 {
			b.Add(unix.SYS_IOCTL, tracee.W(p.slave), tracee.W(unix.TIOCSPGRP), b.Put(binary.LittleEndian.AppendUint32(nil, uint32(p.record.Foreground))))
			if _, err := leader.Run(&b); err != nil {
				return fail.On(fmt.Sprintf("terminal /dev/pts/%d", p.record.Index), err)
			}
		}
		for _, pid := range p.record.Without {
			var b tracee.Batch
			b.Try(unix.SYS_IOCTL, tracee.W(p.slave), tracee.W(unix.TIOCNOTTY))
			if s := stubs[int(pid)]; s != nil {
				if _, err := s.Run(&b); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ConsoleRoot is the root of the mount of /dev/console, which is the number of
// the container's terminal, or "".
func ConsoleRoot(mounts []image.Mount) string {
	for i := range mounts {
		if m := &mounts[i]; m.Point == "/dev/console" && m.FSType == "devpts" {
			if _, err := strconv.Atoi(strings.TrimPrefix(m.Root, "/")); err == nil {
				return m.Root
			}
		}
	}
	return ""
}
