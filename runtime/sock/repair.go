package sock

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// TCP_REPAIR (tcp(7) has little of it, net/ipv4/tcp.c all) lets sequence numbers,
// queues and what was agreed on at the handshake be read and written. A socket in
// repair mode connects and closes without a word to its peer.

// Values of TCP_REPAIR and TCP_REPAIR_QUEUE, options of TCP_REPAIR_OPTIONS
// (include/uapi/linux/tcp.h, include/net/tcp.h).
const (
	repairOff        = 0
	repairOn         = 1
	repairOffNoProbe = -1

	noQueue      = 0
	receiveQueue = 1
	sendQueue    = 2

	optMSS       = 2
	optScale     = 3
	optSACK      = 4
	optTimestamp = 8
)

// Bits of tcpi_options.
const (
	agreedTimestamps = 1
	agreedSACK       = 2
	agreedScale      = 4
)

// finSent and finReceived are the states in which a FIN has gone out or come in.
func finSent(state uint8) bool {
	return slices.Contains([]uint8{tcpFinWait1, tcpFinWait2, tcpClosing, tcpLastAck}, state)
}

func finReceived(state uint8) bool {
	return slices.Contains([]uint8{tcpCloseWait, tcpClosing, tcpLastAck}, state)
}

// moving are the counters of a connection that change whenever its queues do.
type moving struct {
	state                 uint8
	acked, received, sent uint64
	unsent                uint32
}

func readMoving(fd int) (moving, error) {
	i, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return moving{}, fmt.Errorf("TCP_INFO: %w", err)
	}
	return movingOf(i), nil
}

func movingOf(i *unix.TCPInfo) moving {
	return moving{i.State, i.Bytes_acked, i.Bytes_received, i.Bytes_sent, i.Notsent_bytes}
}

// Held is a socket of the container.
type Held struct {
	// Pid and FD say where it is open, in a task of the container.
	Pid, FD int
	// Named names it in an error.
	Named  func(error) error
	Record *image.Socket
}

func (h *Held) open() (*os.File, error) { return tracee.TakeFD(h.Pid, h.FD) }

// Connection is a connection of the container, on its way into the image. Its
// tasks are stopped and frozen as long as it is worked on.
type Connection struct {
	Held
	// Content are the bytes of both queues, as they stand in the image.
	Content []byte
	read    moving // when it was
	steady  bool   // it is read for good
}

// Reusable reports whether SO_REUSEADDR is set, which TCP_REPAIR clears.
func Reusable(s *image.Socket) bool {
	return slices.ContainsFunc(s.Options, func(o image.SocketOpt) bool {
		return o.Level == unix.SOL_SOCKET && o.Name == unix.SO_REUSEADDR
	})
}

// Reusable reports whether the connection's socket has SO_REUSEADDR.
func (c *Connection) Reusable() bool { return Reusable(c.Record) }

// readTries bounds how often a connection is read that changes meanwhile: what
// its peer may still send ends with the window, which nobody opens.
const readTries = 200

// ReadConnections reads the queues and the state of connections, each of one moment,
// and both ends of one inside the container of the same. Each is in repair mode for
// microseconds.
func ReadConnections(all []*Connection) error {
	ends := map[Pair]bool{}
	for _, c := range all {
		ends[PairOf(c.Record)] = true
	}
	for range readTries {
		var moved atomic.Bool
		err := eachOpen(all, func(c *Connection, fd int) error {
			p := PairOf(c.Record)
			same, err := c.readOnce(fd, !ends[Pair{Local: p.Peer, Peer: p.Local}])
			if !same {
				moved.Store(true)
			}
			return err
		})
		if err != nil || !moved.Load() {
			return err
		}
	}
	return &fail.Error{Cause: errors.New("TCP connections do not come to rest"), Remedy: "try again"}
}

// share is how many connections are worth a thread of their own.
const share = 256

// eachOpen calls f for all connections, each with a descriptor of our own, by several
// threads if they are many.
func eachOpen(all []*Connection, f func(c *Connection, fd int) error) (err error) {
	pidfds := map[int]int{}
	defer func() {
		for _, fd := range pidfds {
			_ = unix.Close(fd)
		}
	}()
	for _, c := range all {
		if _, ok := pidfds[c.Pid]; !ok {
			if pidfds[c.Pid], err = tracee.Pidfd(c.Pid); err != nil {
				delete(pidfds, c.Pid)
				return c.Named(err)
			}
		}
	}
	one := func(c *Connection) error {
		fd, err := unix.PidfdGetfd(pidfds[c.Pid], c.FD, 0)
		if err != nil {
			return c.Named(fmt.Errorf("pidfd_getfd of fd %d in task %d: %w", c.FD, c.Pid, err))
		}
		defer unix.Close(fd)
		return c.Named(f(c, fd))
	}
	threads := min(1+len(all)/share, runtime.GOMAXPROCS(0))
	errs := make([]error, threads)
	var wait sync.WaitGroup
	for i := range threads {
		wait.Go(func() {
			for _, c := range all[len(all)*i/threads : len(all)*(i+1)/threads] {
				if errs[i] = one(c); errs[i] != nil {
					return
				}
			}
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// readOnce reads a connection, unless nothing has changed since the last time. One
// whose other end is not read is good if nothing changed while it was: its peer may
// go on for as long as it likes.
func (c *Connection) readOnce(fd int, alone bool) (same bool, err error) {
	if c.steady {
		return true, nil
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return false, fmt.Errorf("TCP_INFO: %w", err)
	}
	now := movingOf(info)
	if now == c.read {
		return true, nil
	}
	if c.Content, err = readConnection(fd, info, c.Record); err != nil {
		return false, err
	}
	c.read = now
	if alone {
		now, err = readMoving(fd)
		c.steady = err == nil && now == c.read
	}
	return c.steady, err
}

// readConnection completes the record of a connection and returns the bytes of
// its queues.
func readConnection(fd int, info *unix.TCPInfo, s *image.Socket) (content []byte, err error) {
	t := s.TCP
	*t = image.TCP{Peer: t.Peer}
	readAgreed(info, t)
	if err := readShut(fd, t); err != nil {
		return nil, err
	}
	if err := readBufferSizes(fd, t); err != nil {
		return nil, err
	}
	waiting, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	if err != nil {
		return nil, fmt.Errorf("SIOCINQ: %w", err)
	}
	received, err := peekFromStart(fd, waiting)
	if err != nil {
		return nil, fmt.Errorf("what waits to be read: %w", err)
	}
	t.Receive.Bytes = uint32(len(received))
	if t.State == tcpClose {
		return received, nil // nothing else is left of it
	}
	if err := setRepair(fd, repairOn); err != nil {
		return nil, err
	}
	sent, err := readRepaired(fd, t)
	if e := unrepair(fd, Reusable(s)); err == nil {
		err = e
	}
	return append(received, sent...), err
}

// readBufferSizes reads the sizes to which the buffers have grown.
func readBufferSizes(fd int, t *image.TCP) error {
	const receive, send, words = 1, 3, 9 // SK_MEMINFO_RCVBUF, SK_MEMINFO_SNDBUF, SK_MEMINFO_VARS
	var sizes [words]uint32
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&sizes[0])), unsafe.Sizeof(sizes))
	got, err := get(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, raw)
	if err == nil && len(got) <= 4*send {
		err = fmt.Errorf("SO_MEMINFO: %d bytes", len(got))
	}
	t.Buffers = [2]uint32{sizes[send], sizes[receive]}
	return err
}

// readAgreed notes what the handshake has agreed on. The scales are two halves of
// a byte that package unix leaves out.
func readAgreed(info *unix.TCPInfo, t *image.TCP) {
	const scales = 6
	t.State = info.State
	t.Agreed = info.Options & (agreedTimestamps | agreedSACK | agreedScale)
	if t.Agreed&agreedScale != 0 {
		both := unsafe.Slice((*byte)(unsafe.Pointer(info)), scales+1)[scales]
		t.SendScale, t.ReceiveScale = both&0xf, both>>4
	}
}

// readShut reads what poll(2) tells of the end of a connection. Which error waits
// for the program cannot be asked without taking it away: nearly always it is this.
func readShut(fd int, t *image.TCP) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP | unix.POLLPRI}}
	_, err := unix.Poll(fds, 0)
	for err == unix.EINTR { // Go interrupts its threads
		_, err = unix.Poll(fds, 0)
	}
	if err != nil {
		return fmt.Errorf("poll: %w", err)
	}
	switch {
	case fds[0].Revents&unix.POLLPRI != 0:
		return fail.Refuse("", "urgent data (MSG_OOB) waits to be read, and no call puts it back", "let the program read it")
	case t.State != tcpClose && fds[0].Revents&unix.POLLERR != 0:
		return fail.Refuse("", "its error queue (MSG_ERRQUEUE) holds something, and no call puts it back", "let the program read it")
	case t.State == tcpClose && fds[0].Revents&unix.POLLERR != 0:
		t.Error = int32(unix.ECONNRESET)
	}
	t.ShutRead = t.State != tcpClose && !finReceived(t.State) && fds[0].Revents&unix.POLLRDHUP != 0
	return nil
}

// peekFromStart is peek for a queue that the program may look at from elsewhere
// (SO_PEEK_OFF of socket(7), which TCP has since Linux 6.9).
func peekFromStart(fd, n int) (data []byte, err error) {
	if n == 0 {
		return nil, nil
	}
	offset, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	if err != nil || offset < 0 {
		return peek(fd, n)
	}
	if err := setInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, -1); err != nil {
		return nil, err
	}
	data, err = peek(fd, n)
	return data, errors.Join(err, setInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, offset))
}

// peek reads n bytes, or all there are, of the queue that is chosen, and leaves them there.
func peek(fd, n int) ([]byte, error) {
	buf := make([]byte, n)
	if n == 0 {
		return buf, nil
	}
	n, _, err := unix.Recvfrom(fd, buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) {
		n, err = 0, nil
	}
	return buf[:max(n, 0)], err
}

// readRepaired reads what a socket in repair mode tells, and returns what waits to
// be sent or acknowledged.
func readRepaired(fd int, t *image.TCP) ([]byte, error) {
	if err := fault.Point("tcp.read"); err != nil {
		return nil, err
	}
	var err error
	if t.Window, err = readWindow(fd); err != nil {
		return nil, err
	}
	for _, one := range []struct {
		option int
		to     *uint32
	}{{unix.TCP_TIMESTAMP, &t.Timestamp}, {unix.TCP_MAXSEG, &t.MSS}} {
		v, err := number(fd, unix.SOL_TCP, one.option)
		if err != nil {
			return nil, err
		}
		*one.to = uint32(v)
	}
	next, err := sequence(fd, receiveQueue)
	if err != nil {
		return nil, err
	}
	t.Receive.Seq = next - t.Receive.Bytes - one(finReceived(t.State))
	last, err := sequence(fd, sendQueue)
	if err != nil {
		return nil, err
	}
	unacked, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	if err != nil {
		return nil, fmt.Errorf("SIOCOUTQ: %w", err)
	}
	sent, err := peek(fd, unacked)
	if err != nil {
		return nil, fmt.Errorf("what waits to be sent: %w", err)
	}
	unsent := 0
	if unacked > 0 {
		if unsent, err = unix.IoctlGetInt(fd, siocOutqNsd); err != nil {
			return nil, fmt.Errorf("SIOCOUTQNSD: %w", err)
		}
	}
	t.Send.Bytes = uint32(len(sent))
	t.Unsent = min(uint32(unsent), t.Send.Bytes)
	t.Send.Seq = last - t.Send.Bytes - one(finSent(t.State))
	return sent, setInt(fd, unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, noQueue)
}

// readWindow reads struct tcp_repair_window.
func readWindow(fd int) (window [5]uint32, err error) {
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&window[0])), unsafe.Sizeof(window))
	got, err := get(fd, unix.SOL_TCP, unix.TCP_REPAIR_WINDOW, raw)
	if err == nil && len(got) != len(raw) {
		err = fmt.Errorf("TCP_REPAIR_WINDOW: %d bytes", len(got))
	}
	return window, err
}

const siocOutqNsd = 0x894b // SIOCOUTQNSD: bytes not sent yet

func one(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

func setInt(fd, level, name, value int) error {
	if err := unix.SetsockoptInt(fd, level, name, value); err != nil {
		return fmt.Errorf("setsockopt %d/%d: %w", level, name, err)
	}
	return nil
}

func setRepair(fd, mode int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, mode); err != nil {
		return fmt.Errorf("TCP_REPAIR: %w", err)
	}
	return nil
}

// unrepair ends the repair of a connection without a word to its peer. Repair
// takes SO_REUSEADDR for its own purposes and leaves it off.
func unrepair(fd int, reuse bool) error {
	err := setRepair(fd, repairOffNoProbe)
	if err == nil && reuse {
		err = setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return err
}

// sequence is the next number of a queue of a socket in repair mode; it leaves
// the queue chosen.
func sequence(fd, queue int) (uint32, error) {
	if err := setInt(fd, unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
		return 0, err
	}
	v, err := number(fd, unix.SOL_TCP, unix.TCP_QUEUE_SEQ)
	return uint32(v), err
}

func setSequence(fd, queue int, seq uint32) error {
	if err := setInt(fd, unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
		return err
	}
	return setInt(fd, unix.SOL_TCP, unix.TCP_QUEUE_SEQ, int(int32(seq)))
}

// Silence puts connections into repair mode, in which their end is not told to
// their peers.
func Silence(all []*Connection) error {
	return eachOpen(all, func(c *Connection, fd int) error {
		if c.Record.TCP.State == tcpClose {
			return nil
		}
		return setRepair(fd, repairOn)
	})
}

// Unrepair ends the repair of a socket that is open as fd in a task, if it is in
// repair mode.
func Unrepair(pid, fd int, reuse bool) error {
	f, err := tracee.TakeFD(pid, fd)
	if err != nil {
		return err
	}
	defer f.Close()
	on, err := number(int(f.Fd()), unix.SOL_TCP, unix.TCP_REPAIR)
	if err != nil || on == 0 {
		return err
	}
	return unrepair(int(f.Fd()), reuse)
}

// LargestBuffers reads the sizes that the kernel gives in a network namespace by
// itself (tcp_wmem and tcp_rmem of tcp(7)), or that a program may ask for.
func LargestBuffers(netns string) (b Buffers, err error) {
	err = errors.Join(largest("core/wmem_max", &b.Send), largest("core/rmem_max", &b.Receive))
	if err != nil {
		return b, err
	}
	err = nsutil.Inside(netns, func() error {
		return errors.Join(largest("ipv4/tcp_wmem", &b.Send), largest("ipv4/tcp_rmem", &b.Receive))
	})
	return b, err
}

// largest raises a size to the last number of a file of sysctls.
func largest(name string, size *uint32) error {
	text, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil {
		return err
	}
	fields := strings.Fields(string(text))
	if len(fields) == 0 {
		return fmt.Errorf("%s is empty", name)
	}
	n, err := strconv.ParseUint(fields[len(fields)-1], 10, 32)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	*size = max(*size, uint32(n))
	return nil
}

// Remade is a connection that is made again, in this process by a copy of the
// descriptor that its task will have: Begin, then Bind in a stub, Connect when all are
// bound, Fill as the bytes come, Shut, Settle in a stub, Release.
type Remade struct {
	File   *os.File
	Record *image.Socket
	filled uint32
	narrow func() error // gives its buffers their sizes again
}

// Bind adds the calls that bind the socket, with the rights that a program needs for
// that, and set the options that decide about its way to the peer.
func Bind(b *tracee.Batch, fd int, s *image.Socket) {
	setOptions(b, fd, s, false)
	if s.TCP.State != tcpClose {
		bind(b, fd, s)
	}
}

// Settle adds the calls for the other options, some of which would end a
// connection that is held for too long.
func Settle(b *tracee.Batch, fd int, s *image.Socket) {
	setOptions(b, fd, s, true)
	if s.TCP.State == tcpClose && bound(s) { // its port is still its own
		bind(b, fd, s)
	}
}

func (r *Remade) fd() int { return int(r.File.Fd()) }

// Begin puts a new socket into repair mode, before it is bound.
func (r *Remade) Begin(limits Buffers) error {
	t := r.Record.TCP
	if err := setRepair(r.fd(), repairOn); err != nil {
		return err
	}
	if err := r.setBuffers(limits); err != nil {
		return err
	}
	if err := setSequence(r.fd(), receiveQueue, t.Receive.Seq); err != nil {
		return err
	}
	seq := t.Send.Seq
	if t.State == tcpSynSent {
		seq-- // of the SYN
	}
	return setSequence(r.fd(), sendQueue, seq)
}

// Buffers are the largest sizes that the kernel gives buffers by itself, in bytes.
type Buffers struct{ Send, Receive uint32 }

// setBuffers gives the buffers the sizes that they had grown to, so that the window
// that was promised to the peer is there. What the program has not set itself stays
// the kernel's affair.
func (r *Remade) setBuffers(limits Buffers) error {
	t := r.Record.TCP
	for _, b := range []struct {
		option      int
		size, limit uint32
	}{{unix.SO_SNDBUFFORCE, t.Buffers[0], limits.Send}, {unix.SO_RCVBUFFORCE, t.Buffers[1], limits.Receive}} {
		if err := setInt(r.fd(), unix.SOL_SOCKET, b.option, int(min(b.size, b.limit)/2)); err != nil {
			return err
		}
	}
	return r.lockBuffers(0)
}

// lockBuffers says which sizes the kernel leaves alone, if it can be told.
func (r *Remade) lockBuffers(which int) error {
	err := unix.SetsockoptInt(r.fd(), unix.SOL_SOCKET, soBufLock, which)
	if errors.Is(err, unix.ENOPROTOOPT) { // before Linux 5.15
		return nil
	}
	return err
}

// Connect connects it, when it is bound.
func (r *Remade) Connect() error {
	t := r.Record.TCP
	if t.State == tcpSynSent {
		return r.connectAgain()
	}
	if t.State == tcpClose {
		return r.connect(r.nobody())
	}
	if err := r.connect(t.Peer); err != nil {
		return err
	}
	options := []uint32{optMSS, t.MSS}
	if t.Agreed&agreedScale != 0 {
		options = append(options, optScale, uint32(t.SendScale)|uint32(t.ReceiveScale)<<16)
	}
	if t.Agreed&agreedSACK != 0 {
		options = append(options, optSACK, 0)
	}
	if t.Agreed&agreedTimestamps != 0 {
		options = append(options, optTimestamp, 0)
	}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&options[0])), 4*len(options))
	if err := unix.SetsockoptString(r.fd(), unix.SOL_TCP, unix.TCP_REPAIR_OPTIONS, string(raw)); err != nil {
		return fmt.Errorf("TCP_REPAIR_OPTIONS: %w", err)
	}
	return setInt(r.fd(), unix.SOL_TCP, unix.TCP_TIMESTAMP, int(int32(t.Timestamp)))
}

// nobody is a peer for a connection that has ended, and has none any more, on
// loopback.
func (r *Remade) nobody() []byte {
	v6only := slices.ContainsFunc(r.Record.Options, func(o image.SocketOpt) bool {
		return o.Level == unix.SOL_IPV6 && o.Name == unix.IPV6_V6ONLY && o.Value[0] != 0
	})
	switch {
	case r.Record.Family == unix.AF_INET:
		return rawAddress(netip.MustParseAddrPort("127.0.0.1:1"))
	case v6only:
		return rawAddress(netip.MustParseAddrPort("[::1]:1"))
	}
	return rawAddress(netip.MustParseAddrPort("[::ffff:127.0.0.1]:1"))
}

func (r *Remade) connect(peer []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(r.fd()), uintptr(unsafe.Pointer(&peer[0])), uintptr(len(peer)))
	if errno != 0 {
		return fmt.Errorf("connect to %s: %w", describeRaw(peer), errno)
	}
	return nil
}

// connectAgain sends the SYN of a connection that nobody had answered yet, with the
// number that it had: to the peer it is one that was lost.
func (r *Remade) connectAgain() error {
	if err := unrepair(r.fd(), false); err != nil {
		return err
	}
	if err := unix.SetNonblock(r.fd(), true); err != nil {
		return err
	}
	if err := r.connect(r.Record.TCP.Peer); !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	return nil
}

// chunk is how much goes into a queue by one call: the kernel makes one buffer of
// it, of at most 17 pages.
const chunk = 32 << 10

// Fill puts bytes of the image back into the queues. What has not been sent before
// goes in as any program sends it; it is held back on its way (Hold).
func (r *Remade) Fill(data []byte) error {
	t := r.Record.TCP
	if r.narrow == nil {
		if err := r.widen(); err != nil {
			return err
		}
	}
	acked := t.Receive.Bytes + t.Send.Bytes - t.Unsent // the first that was never sent
	for len(data) > 0 {
		n := uint32(min(len(data), chunk))
		queue := noQueue
		switch {
		case t.State == tcpClose && r.filled >= t.Receive.Bytes:
			return nil // nobody takes it any more
		case r.filled < t.Receive.Bytes:
			queue, n = receiveQueue, min(n, t.Receive.Bytes-r.filled)
		case r.filled < acked:
			queue, n = sendQueue, min(n, acked-r.filled)
		}
		sent, err := r.put(queue, data[:n])
		if err != nil {
			return fmt.Errorf("queue of %s: %w", describeRaw(t.Peer), err)
		}
		r.filled += uint32(sent)
		data = data[sent:]
	}
	return nil
}

// widen gives the buffers room to fill them: the same bytes may take more than they
// did, those of sendfile(2) for instance took none beside the file's pages, and another
// host may give less. Their memory is the container's.
func (r *Remade) widen() error {
	t := r.Record.TCP
	locked, err := number(r.fd(), unix.SOL_SOCKET, soBufLock)
	if err != nil {
		locked = 0 // cannot be set either
	}
	var sizes [2]int
	set := func(by func(i int) int) error {
		for i, option := range []int{unix.SO_SNDBUFFORCE, unix.SO_RCVBUFFORCE} {
			// The kernel doubles what it is given.
			if err := setInt(r.fd(), unix.SOL_SOCKET, option, min(sizes[i]+by(i), math.MaxInt32)/2); err != nil {
				return err
			}
		}
		return r.lockBuffers(locked)
	}
	for i, name := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
		if sizes[i], err = number(r.fd(), unix.SOL_SOCKET, name); err != nil {
			return err
		}
	}
	r.narrow = func() error { return set(func(int) int { return 0 }) }
	queued := []uint32{t.Send.Bytes, t.Receive.Bytes}
	return set(func(i int) int { return 2 * int(queued[i]) })
}

func (r *Remade) put(queue int, data []byte) (int, error) {
	if queue != noQueue {
		if err := setInt(r.fd(), unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
			return 0, err
		}
		return unix.SendmsgN(r.fd(), data, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
	if err := setRepair(r.fd(), repairOffNoProbe); err != nil {
		return 0, err
	}
	n, err := unix.SendmsgN(r.fd(), data, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if e := setRepair(r.fd(), repairOn); err == nil {
		err = e
	}
	return n, err
}

// Shut brings a connection that was being closed to where it was, when its queues
// are filled: our FIN comes of shutdown(2), the peer's FIN or its answer to ours of
// a segment that inject passes in.
func (r *Remade) Shut(inject func(*Segment) error) error {
	t := r.Record.TCP
	answer := func(flags byte, acked uint32, reached uint8) func() error {
		return func() error {
			seg, err := r.segment()
			if err != nil {
				return err
			}
			seg.Flags, seg.Seq, seg.Ack = flags, t.Receive.Seq+t.Receive.Bytes, t.Send.Seq+acked
			seg.Window = uint16(min(t.Window[1]>>t.SendScale, 0xffff))
			if err := inject(seg); err != nil {
				return err
			}
			return r.reach(reached)
		}
	}
	steps := map[uint8][]func() error{
		tcpFinWait1:  {r.shutWrite},
		tcpFinWait2:  {r.shutWrite, answer(flagACK, 1, tcpFinWait2)},
		tcpClosing:   {r.shutWrite, answer(flagACK|flagFIN, 0, tcpClosing)},
		tcpCloseWait: {answer(flagACK|flagFIN, 0, tcpCloseWait)},
		tcpLastAck:   {answer(flagACK|flagFIN, 0, tcpCloseWait), r.shutWrite},
		tcpClose:     {answer(flagRST, 0, tcpClose), r.forgive},
	}[t.State]
	if t.State != tcpClose && t.State != tcpSynSent {
		steps = append(steps, r.setWindow)
	}
	if r.narrow != nil {
		steps = append(steps, r.narrow)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if t.ShutRead {
		return unix.Shutdown(r.fd(), unix.SHUT_RD)
	}
	return nil
}

// shutWrite queues our FIN: as sent, unless there is something before it that was
// never sent.
func (r *Remade) shutWrite() error {
	queue := sendQueue
	if r.Record.TCP.Unsent > 0 {
		queue = noQueue
	}
	if err := setInt(r.fd(), unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
		return err
	}
	if err := unix.Shutdown(r.fd(), unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	return nil
}

// forgive takes away the error that comes with a reset from a connection that had
// ended without one.
func (r *Remade) forgive() error {
	if r.Record.TCP.Error != 0 {
		return nil
	}
	_, err := number(r.fd(), unix.SOL_SOCKET, unix.SO_ERROR) // reading it clears it
	return err
}

// reach waits until a segment has had its effect.
func (r *Remade) reach(state uint8) error {
	const patience = 2 * time.Second
	for begin := time.Now(); ; time.Sleep(100 * time.Microsecond) {
		now, err := readMoving(r.fd())
		if err != nil || now.state == state {
			return err
		}
		if time.Since(begin) > patience {
			return fmt.Errorf("the connection to %s is in state %d and not, as it was, in %d: is its local address there, and loopback up?", describeRaw(r.Record.TCP.Peer), now.state, state)
		}
	}
}

// setWindow comes last, for every segment has a window. What is pushed from here on
// is not to count as sent.
func (r *Remade) setWindow() error {
	if err := setInt(r.fd(), unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, noQueue); err != nil {
		return err
	}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&r.Record.TCP.Window[0])), unsafe.Sizeof(r.Record.TCP.Window))
	if err := unix.SetsockoptString(r.fd(), unix.SOL_TCP, unix.TCP_REPAIR_WINDOW, string(raw)); err != nil {
		return fmt.Errorf("TCP_REPAIR_WINDOW %d: %w", r.Record.TCP.Window, err)
	}
	return nil
}

// Release ends the repair: from now on the connection lives, and asks its peer
// how things are.
func (r *Remade) Release() error {
	mode := repairOff
	if r.Record.TCP.State == tcpClose {
		mode = repairOffNoProbe
	}
	if r.Record.TCP.State != tcpSynSent {
		if err := setRepair(r.fd(), mode); err != nil {
			return err
		}
	}
	if Reusable(r.Record) {
		return setInt(r.fd(), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return nil
}

// Reset makes of a connection of an image one that its peer has reset.
func Reset(s *image.Socket) {
	s.TCP.State, s.TCP.Peer, s.TCP.Error = tcpClose, nil, int32(unix.ECONNRESET)
	clear(s.Address[2:4]) // its port is nobody's any more
}
