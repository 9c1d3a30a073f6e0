package sock

import (
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// option is a socket option of size bytes that is set the way it is read.
type option struct{ level, name, size int }

// Options that package unix does not have, of include/uapi/asm-generic/socket.h.
const (
	soBufLock     = 72 // Linux 5.15
	soReserveMem  = 73 // Linux 5.17
	soRcvMark     = 75 // Linux 6.0
	soPassPidfd   = 76 // Linux 6.5
	soRcvPriority = 82 // Linux 6.14
	soPassRights  = 83 // Linux 6.16
	soInq         = 84 // Linux 6.17
	soTxRehash    = 74 // Linux 6.0
)

// generic are the options that sockets of every family have, or know nothing of.
var generic = []option{
	{unix.SOL_SOCKET, unix.SO_DEBUG, 4},
	{unix.SOL_SOCKET, unix.SO_REUSEADDR, 4},
	{unix.SOL_SOCKET, unix.SO_REUSEPORT, 4},
	{unix.SOL_SOCKET, unix.SO_DONTROUTE, 4},
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 4},
	{unix.SOL_SOCKET, unix.SO_OOBINLINE, 4},
	{unix.SOL_SOCKET, unix.SO_NO_CHECK, 4},
	{unix.SOL_SOCKET, unix.SO_BROADCAST, 4},
	{unix.SOL_SOCKET, unix.SO_LINGER, 8},
	{unix.SOL_SOCKET, unix.SO_RCVLOWAT, 4},
	{unix.SOL_SOCKET, unix.SO_MARK, 4},
	{unix.SOL_SOCKET, soRcvMark, 4},
	{unix.SOL_SOCKET, soRcvPriority, 4},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMP, 4},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 4},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMP_NEW, 4},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 4},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMPING, 8},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMPING_NEW, 8},
	{unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 4},
	{unix.SOL_SOCKET, unix.SO_WIFI_STATUS, 4},
	{unix.SOL_SOCKET, unix.SO_NOFCS, 4},
	{unix.SOL_SOCKET, unix.SO_SELECT_ERR_QUEUE, 4},
	{unix.SOL_SOCKET, unix.SO_BUSY_POLL, 4},
	{unix.SOL_SOCKET, unix.SO_PREFER_BUSY_POLL, 4},
	{unix.SOL_SOCKET, unix.SO_BUSY_POLL_BUDGET, 4},
	{unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, 8},
	{unix.SOL_SOCKET, unix.SO_ZEROCOPY, 4},
	{unix.SOL_SOCKET, unix.SO_TXTIME, 8},
	{unix.SOL_SOCKET, soReserveMem, 4},
	{unix.SOL_SOCKET, unix.SO_INCOMING_CPU, 4},
	{unix.SOL_SOCKET, unix.SO_RCVTIMEO, 16},
	{unix.SOL_SOCKET, unix.SO_SNDTIMEO, 16},
}

// final are those that others overwrite (IP_TOS sets the priority), or that
// change what is received: what lies in the queues must be back before.
var final = []option{
	{unix.SOL_SOCKET, unix.SO_PRIORITY, 4},
	{unix.SOL_SOCKET, unix.SO_PASSCRED, 4},
	{unix.SOL_SOCKET, unix.SO_PASSSEC, 4},
	{unix.SOL_SOCKET, soPassPidfd, 4},
	{unix.SOL_SOCKET, soPassRights, 4},
	{unix.SOL_SOCKET, soInq, 4},
	{unix.SOL_SOCKET, unix.SO_PEEK_OFF, 4},
	{unix.SOL_SOCKET, unix.SO_LOCK_FILTER, 4},
}

// odd are options that are not set the way they are read: buffer sizes, and
// those whose size varies, here the largest.
var odd = []option{
	{unix.SOL_SOCKET, unix.SO_SNDBUF, 4},
	{unix.SOL_SOCKET, unix.SO_RCVBUF, 4},
	{unix.SOL_SOCKET, unix.SO_BINDTODEVICE, unix.IFNAMSIZ},
	{unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, maxFilter},
}

// varying are options whose values may also be shorter.
var varying = []option{
	{unix.SOL_IP, unix.IP_OPTIONS, 40},
	{unix.SOL_IPV6, unix.IPV6_HOPOPTS, maxExtension},
	{unix.SOL_IPV6, unix.IPV6_RTHDRDSTOPTS, maxExtension},
	{unix.SOL_IPV6, unix.IPV6_RTHDR, maxExtension},
	{unix.SOL_IPV6, unix.IPV6_DSTOPTS, maxExtension},
	{unix.SOL_TCP, unix.TCP_FASTOPEN_KEY, 32}, // with a second key
}

// maxExtension is the largest extension header of IPv6, whose length is a byte.
const maxExtension = 256 * 8

// unset are the values of a new socket that are not zero.
var unset = map[option]int64{
	{unix.SOL_SOCKET, unix.SO_RCVLOWAT, 4}:        1,
	{unix.SOL_SOCKET, soPassRights, 4}:            1,
	{unix.SOL_SOCKET, unix.SO_PEEK_OFF, 4}:        -1,
	{unix.SOL_SOCKET, unix.SO_INCOMING_CPU, 4}:    -1,
	{unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, 8}: -1,
}

// defaults reports an option that a new socket has as well: to set some of them
// takes a capability even to the value that they have. Usual are those of one that
// was asked. IPV6_V6ONLY is never one, for a sysctl of the next host decides, and
// programs depend on it.
func defaults(usual map[option]string, o option, value []byte) bool {
	if o.level == unix.SOL_IPV6 && o.name == unix.IPV6_V6ONLY {
		return false
	}
	if known, ok := usual[o]; ok {
		return known == string(value)
	}
	want := make([]byte, o.size)
	for i := range min(o.size, 8) {
		want[i] = byte(unset[o] >> (8 * i))
	}
	return slices.Equal(value, want[:len(value)])
}

// get is getsockopt(2) into value, of which it returns what was filled; nil for
// an option that the socket, or the kernel, does not have.
func get(fd, level, name int, value []byte) ([]byte, error) {
	n := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&n)), 0)
	switch {
	case errno == unix.ENOPROTOOPT || errno == unix.EOPNOTSUPP:
		return nil, nil
	case errno != 0:
		return nil, fmt.Errorf("getsockopt %d/%d: %w", level, name, errno)
	}
	return value[:min(n, uint32(len(value)))], nil
}

// usual are the options of a new socket like s in its network namespace, where
// they hang on that.
func (in *Inside) usual(fam *family, s *image.Socket) (map[option]string, error) {
	kind := [3]int32{s.Family, s.Type, s.Protocol}
	if in.fresh[kind] != nil || !fam.fresh {
		return in.fresh[kind], nil
	}
	values := map[option]string{}
	err := nsutil.Inside(in.NetNS, func() error {
		fd, err := unix.Socket(int(s.Family), int(s.Type)|unix.SOCK_CLOEXEC, int(s.Protocol))
		if err != nil {
			return fmt.Errorf("a new socket of its kind: %w", err)
		}
		defer unix.Close(fd)
		for _, o := range slices.Concat(generic, fam.options, final) {
			value, err := get(fd, o.level, o.name, make([]byte, o.size))
			if err != nil {
				return err
			}
			if value != nil {
				values[o] = string(value)
			}
		}
		return nil
	})
	if in.fresh == nil {
		in.fresh = map[[3]int32]map[option]string{}
	}
	in.fresh[kind] = values
	return values, err
}

// readOptions records the options that are not those of a new socket.
func readOptions(in *Inside, fd int, fam *family, s *image.Socket) error {
	usual, err := in.usual(fam, s)
	if err != nil {
		return err
	}
	for _, read := range []func(int, *image.Socket) error{readBuffers, readDevice, readFilter} {
		if err := read(fd, s); err != nil {
			return err
		}
	}
	for _, list := range [][]option{generic, fam.options, final} {
		if err := readList(list, usual, fd, s); err != nil {
			return err
		}
	}
	oneTimestamping(s)
	return nil
}

// readList records those of a list of options that are not the usual ones.
func readList(list []option, usual map[option]string, fd int, s *image.Socket) error {
	for _, o := range list {
		if s.TCP != nil && slices.Contains(before, [2]int{o.level, o.name}) {
			continue
		}
		value, err := get(fd, o.level, o.name, make([]byte, o.size))
		if err != nil {
			return err
		}
		if value != nil && !defaults(usual, o, value) {
			s.Options = append(s.Options, image.SocketOpt{Level: int32(o.level), Name: int32(o.name), Value: value})
		}
	}
	return nil
}

// oneTimestamping drops SO_TIMESTAMPING where it was set as SO_TIMESTAMPING_NEW,
// for the kernel then answers to both.
func oneTimestamping(s *image.Socket) {
	has := func(name int32) func(o image.SocketOpt) bool {
		return func(o image.SocketOpt) bool { return o.Level == unix.SOL_SOCKET && o.Name == name }
	}
	if slices.ContainsFunc(s.Options, has(unix.SO_TIMESTAMPING_NEW)) {
		s.Options = slices.DeleteFunc(s.Options, has(unix.SO_TIMESTAMPING))
	}
}

// readBuffers records buffer sizes that the program has set itself; the others
// follow the system's rules wherever the container runs. The kernel doubles
// what it is given.
func readBuffers(fd int, s *image.Socket) error {
	locked, err := number(fd, unix.SOL_SOCKET, soBufLock)
	if err != nil {
		return nil // before 5.15: as the system sizes them
	}
	for i, name := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} { // SOCK_SNDBUF_LOCK, SOCK_RCVBUF_LOCK
		if locked&(1<<i) == 0 {
			continue
		}
		size, err := number(fd, unix.SOL_SOCKET, name)
		if err != nil {
			return err
		}
		value := make([]byte, 4)
		put32(value, uint32(size/2))
		s.Options = append(s.Options, image.SocketOpt{Level: unix.SOL_SOCKET, Name: int32(name), Value: value})
	}
	return nil
}

// readDevice records the network device that a socket is bound to.
func readDevice(fd int, s *image.Socket) error {
	name, err := get(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, make([]byte, unix.IFNAMSIZ))
	if errors.Is(err, unix.ENODEV) {
		return fail.Refuse("", "the network device that it is bound to (SO_BINDTODEVICE) is gone", "close it before the checkpoint")
	}
	if name = []byte(unix.ByteSliceToString(name)); err == nil && len(name) > 0 {
		s.Options = append(s.Options, image.SocketOpt{Level: unix.SOL_SOCKET, Name: unix.SO_BINDTODEVICE, Value: name})
	}
	return err
}

const (
	filterStep = 8                 // sizeof(struct sock_filter)
	maxFilter  = 4096 * filterStep // BPF_MAXINSNS
)

// readFilter records the classic filter of a socket, instruction by instruction
// as it was attached. Of one that is eBPF the kernel has nothing to give
// (sk_get_filter in net/core/filter.c).
func readFilter(fd int, s *image.Socket) error {
	var steps uint32 // in this one option a length is a number of instructions
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER, 0, uintptr(unsafe.Pointer(&steps)), 0)
	if errno == unix.EACCES {
		return fail.Refuse("", "an eBPF program is attached to it (SO_ATTACH_BPF), which the kernel does not give back", "detach it before the checkpoint")
	}
	if errno == unix.ENOPROTOOPT || errno == unix.EOPNOTSUPP || errno == 0 && steps == 0 {
		return nil
	}
	program := make([]byte, maxFilter)
	steps = maxFilter / filterStep
	if errno == 0 {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER,
			uintptr(unsafe.Pointer(&program[0])), uintptr(unsafe.Pointer(&steps)), 0)
	}
	if errno != 0 {
		return fmt.Errorf("SO_GET_FILTER: %w", errno)
	}
	s.Options = append(s.Options, image.SocketOpt{Level: unix.SOL_SOCKET, Name: unix.SO_ATTACH_FILTER, Value: program[:steps*filterStep]})
	return nil
}

// allowedOptions refuses options that no checkpoint writes: one can reach beyond
// the container. What takes a capability is set with the rights of the task or
// of the bundle.
func allowedOptions(fam *family, s *image.Socket) error {
	known := slices.Concat(generic, fam.options, final, odd)
	for _, o := range s.Options {
		if !slices.ContainsFunc(known, given(o).fits) {
			return fail.Refuse("", fmt.Sprintf("socket option %d/%d of %d bytes is not supported", o.Level, o.Name, len(o.Value)), "restore with a newer ocickpt")
		}
	}
	return nil
}

// given is an option of an image.
type given image.SocketOpt

// fits reports whether an option of an image is a known one of the right size.
func (o given) fits(known option) bool {
	if int(o.Level) != known.level || int(o.Name) != known.name {
		return false
	}
	switch n := len(o.Value); {
	case slices.Contains(varying, known):
		return n > 0 && n <= known.size
	case o.Level != unix.SOL_SOCKET:
	case o.Name == unix.SO_ATTACH_FILTER:
		return n > 0 && n <= known.size && n%filterStep == 0
	case o.Name == unix.SO_BINDTODEVICE:
		return n > 0 && n < known.size
	}
	return len(o.Value) == known.size
}

// setOptions adds the calls that set a socket's options: the last ones, which
// change what is received, or all others.
func setOptions(b *tracee.Batch, fd int, s *image.Socket, last bool) {
	late := func(o image.SocketOpt) bool {
		return s.TCP != nil && o.Level == unix.SOL_TCP || o.Level == unix.SOL_SOCKET && (o.Name == unix.SO_ATTACH_FILTER || slices.ContainsFunc(final, given(o).fits))
	}
	for _, o := range s.Options {
		switch {
		case late(o) != last, s.TCP != nil && o.Level == unix.SOL_SOCKET && o.Name == unix.SO_REUSEADDR: // repair has it
		case o.Level == unix.SOL_SOCKET && o.Name == unix.SO_ATTACH_FILTER:
			attachFilter(b, fd, o.Value)
		default:
			setOption(b, fd, int(o.Level), int(o.Name), o.Value)
		}
	}
}

func attachFilter(b *tracee.Batch, fd int, program []byte) {
	head := make([]byte, 8) // struct sock_fprog
	put32(head, uint32(len(program)/filterStep))
	b.Add(unix.SYS_SETSOCKOPT, tracee.W(fd), tracee.W(unix.SOL_SOCKET), tracee.W(unix.SO_ATTACH_FILTER), b.PutPointer(head, b.Put(program)), tracee.W(16))
}

// forced are the options without the system's limit on a buffer's size, which
// take CAP_NET_ADMIN: a program that had it may have used them.
var forced = map[int]int{unix.SO_SNDBUF: unix.SO_SNDBUFFORCE, unix.SO_RCVBUF: unix.SO_RCVBUFFORCE}

func setOption(b *tracee.Batch, fd, level, name int, value []byte) {
	b.Add(unix.SYS_SETSOCKOPT, tracee.W(fd), tracee.W(level), tracee.W(name), b.Put(value), tracee.W(len(value)))
	if f, ok := forced[name]; ok && level == unix.SOL_SOCKET {
		b.Try(unix.SYS_SETSOCKOPT, tracee.W(fd), tracee.W(level), tracee.W(f), b.Put(value), tracee.W(len(value)))
	}
}
