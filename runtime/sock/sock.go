// Package sock holds sockets: one file a family, both directions.
package sock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Inside says where sockets live: what only the container's own namespaces tell.
type Inside struct {
	NetNS string // path of the network namespace, /proc/PID/ns/net
	// Lstat looks at a path as the container's root sees it.
	Lstat func(path string) (*unix.Stat_t, error)
	// Elsewhere reports whether a path leads to a socket's file, which is open, in a
	// mount namespace that a task has made.
	Elsewhere func(fd int, path string) bool
	// Pid is the number of a process in the container, by its number here; 0
	// for one that is not, or not any more, in it.
	Pid func(host int32) int32
	IDs IDs

	Choices

	joined    []membership
	diagnoses map[int]*diagnosis // by family
	fresh     map[[3]int32]map[option]string
	unix      map[uint64]*Diagnosis // by inode
	met       int                   // connections of TCP that were read
	classes   map[uint64]int        // of those that are alike, by inode
	models    map[int]*image.Socket // of each class
}

// IDs translate what the host shows into the container's own numbers.
type IDs interface {
	User(host uint32) uint32
	Group(host uint32) uint32
}

// Choices are what the caller wants of the container's connections.
type Choices struct {
	// Established: those of TCP are saved; else they are refused.
	Established bool
	// SkipInFlight: those that nobody has accepted yet are left out.
	SkipInFlight bool
	// Outside is one of Outsides, for unix sockets.
	Outside string
	Warn    func(format string, args ...any)
	// Alike is nil where it cannot be told.
	Alike Alike
}

// family is one address family, both directions.
type family struct {
	// read fills in the record of a socket that is open here as fd.
	read func(in *Inside, fd int, inode uint64, s *image.Socket) error
	// types are the pairs of type and protocol that there are; nil: any.
	types [][2]int32
	// options are the socket options to read and set again.
	options []option
	// fresh: they are saved where they differ from those of a new socket of its
	// kind, so that the others follow the host's settings wherever it goes.
	fresh bool
	// prepare adds calls between socket(2) and bind(2), settle those after.
	prepare func(b *tracee.Batch, fd int, s *image.Socket)
	settle  func(b *tracee.Batch, fd int, s *image.Socket)
}

func familyOf(s *image.Socket) *family {
	switch s.Family {
	case unix.AF_INET, unix.AF_INET6:
		if s.Type == unix.SOCK_RAW {
			return &raw
		}
		for _, f := range []*family{&tcp, &udp, &ping} {
			if slices.Contains(f.types, [2]int32{s.Type, s.Protocol}) {
				return f
			}
		}
	case unix.AF_UNIX:
		return &local
	case unix.AF_PACKET:
		return &packet
	case unix.AF_NETLINK:
		return &netlinkSockets
	}
	return nil
}

// names are those of families that are not supported.
var names = map[int32]string{
	unix.AF_VSOCK: "AF_VSOCK", unix.AF_ALG: "AF_ALG", unix.AF_XDP: "AF_XDP", unix.AF_TIPC: "AF_TIPC", unix.AF_BLUETOOTH: "AF_BLUETOOTH",
	unix.AF_CAN: "AF_CAN", unix.AF_KEY: "AF_KEY", unix.AF_PPPOX: "AF_PPPOX", unix.AF_RDS: "AF_RDS", unix.AF_KCM: "AF_KCM", unix.AF_QIPCRTR: "AF_QIPCRTR",
	unix.AF_SMC: "AF_SMC",
}

// unsupported refuses a socket by its kind.
func unsupported(s *image.Socket) error {
	name := names[s.Family]
	switch {
	case s.Protocol == unix.IPPROTO_SCTP && name == "":
		name = "SCTP"
	case name == "":
		name = fmt.Sprintf("family %d, type %d, protocol %d", s.Family, s.Type, s.Protocol)
	}
	return fail.Refuse("", "sockets of "+name+" are not supported", "close it before the checkpoint, or leave it out (--external)")
}

func number(fd, level, name int) (int, error) {
	v, err := unix.GetsockoptInt(fd, level, name)
	if err != nil {
		return 0, fmt.Errorf("getsockopt %d/%d: %w", level, name, err)
	}
	return v, nil
}

// Read describes the socket that fd is. Sockets with a peer or with data on the
// way are refused: they come with a later version.
func Read(in *Inside, fd int, inode uint64) (*image.Socket, error) {
	model := in.model(inode)
	s, err := readKind(fd, model)
	if err != nil {
		return nil, err
	}
	fam := familyOf(s)
	if fam == nil {
		return nil, unsupported(s)
	}
	if s.Address, err = boundAddress(fd); err != nil {
		return nil, err
	}
	if err := fam.read(in, fd, inode, s); err != nil {
		return nil, err
	}
	if model != nil {
		err = readSingle(in, fd, fam, s)
	} else if err = readOptions(in, fd, fam, s); err == nil {
		in.keepModel(inode, s)
	}
	if err != nil {
		return nil, err
	}
	if s.Family == unix.AF_UNIX {
		return s, nil
	}
	return s, in.nameDevices(s)
}

// readKind begins a record, with all that the socket has in common with a model.
func readKind(fd int, model *image.Socket) (*image.Socket, error) {
	if model != nil {
		return likeModel(model), nil
	}
	s := &image.Socket{}
	for name, to := range map[int]*int32{unix.SO_DOMAIN: &s.Family, unix.SO_TYPE: &s.Type, unix.SO_PROTOCOL: &s.Protocol} {
		v, err := number(fd, unix.SOL_SOCKET, name)
		if err != nil {
			return nil, err
		}
		*to = int32(v)
	}
	if v, err := number(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil {
		s.Listening = v != 0
	}
	return s, nil
}

// boundAddress and peerAddress are the raw struct sockaddr of getsockname(2) and
// getpeername(2): abstract names may hold any byte.
func boundAddress(fd int) ([]byte, error) { return rawName(fd, unix.SYS_GETSOCKNAME, "getsockname") }
func peerAddress(fd int) ([]byte, error)  { return rawName(fd, unix.SYS_GETPEERNAME, "getpeername") }

// PeerAddress is that of getpeername(2).
func PeerAddress(f *os.File) ([]byte, error) { return peerAddress(int(f.Fd())) }

func rawName(fd int, call uintptr, name string) ([]byte, error) {
	buf := make([]byte, 128)
	n := uint32(len(buf))
	_, _, errno := unix.Syscall(call, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return nil, fmt.Errorf("%s: %w", name, errno)
	}
	return buf[:min(n, uint32(len(buf)))], nil
}

func put32(b []byte, v uint32) { *(*uint32)(unsafe.Pointer(&b[0])) = v }

// Open adds the call that makes the socket.
func Open(b *tracee.Batch, s *image.Socket) (int, error) {
	if err := allowed(s); err != nil {
		return 0, err
	}
	return b.Add(unix.SYS_SOCKET, tracee.W(s.Family), tracee.W(s.Type|unix.SOCK_CLOEXEC), tracee.W(s.Protocol)), nil
}

// allowed refuses sockets of an image that no checkpoint writes: an image may
// come from anywhere, and a socket option can reach beyond the container.
func allowed(s *image.Socket) error {
	fam := familyOf(s)
	if fam == nil || fam.types != nil && !slices.Contains(fam.types, [2]int32{s.Type, s.Protocol}) {
		return fail.Refuse("", fmt.Sprintf("sockets of family %d, type %d, protocol %d are not supported", s.Family, s.Type, s.Protocol), "restore with a newer ocickpt")
	}
	if err := allowedOptions(fam, s); err != nil {
		return err
	}
	if s.Path != "" && (len(s.Address) < 3 || s.Address[2] == 0) {
		return fmt.Errorf("unix socket bound to %q with a file at %q", s.Address, s.Path)
	}
	if s.Family == unix.AF_UNIX && s.Unix == nil {
		return errors.New("unix socket without its state")
	}
	return nil
}

// Finish adds the calls that give it its options, address and backlog. Those of a
// connection come by Bind and Settle. A unix socket gets its address by BindUnix, and
// what changes its receiving by Receive.
func Finish(b *tracee.Batch, fd int, s *image.Socket) {
	setOptions(b, fd, s, false)
	if s.Family == unix.AF_UNIX {
		return
	}
	setOptions(b, fd, s, true)
	bind(b, fd, s)
	if s.Listening {
		b.Add(unix.SYS_LISTEN, tracee.W(fd), tracee.W(s.Backlog))
	}
}

// Receive adds the calls that set the options that change what is received.
func Receive(b *tracee.Batch, fd int, s *image.Socket) { setOptions(b, fd, s, true) }

// BindUnix adds the calls that give a unix socket its address.
func BindUnix(b *tracee.Batch, fd int, s *image.Socket) { bind(b, fd, s) }

func bind(b *tracee.Batch, fd int, s *image.Socket) {
	fam := familyOf(s)
	if fam.prepare != nil {
		fam.prepare(b, fd, s)
	}
	if bound(s) {
		b.Add(unix.SYS_BIND, tracee.W(fd), b.Put(s.Address), tracee.W(len(s.Address)))
	}
	if fam.settle != nil {
		fam.settle(b, fd, s)
	}
}

// bound reports whether the socket has an address of its own: a port, or a
// unix name.
func bound(s *image.Socket) bool {
	switch s.Family {
	case unix.AF_INET, unix.AF_INET6:
		// A raw socket has an address without a port.
		return slices.ContainsFunc(s.Address[min(2, len(s.Address)):], func(b byte) bool { return b != 0 })
	case unix.AF_NETLINK:
		return len(s.Address) >= sockaddrNL && binary.NativeEndian.Uint32(s.Address[nlPid:]) != 0
	}
	return len(s.Address) > 2
}
