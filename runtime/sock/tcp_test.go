package sock

import (
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

func has(s *image.Socket, level, name int) bool {
	return slices.ContainsFunc(s.Options, func(o image.SocketOpt) bool { return int(o.Level) == level && int(o.Name) == name })
}

// TestOptionsSaved: what was set is in the record, what a new socket has is not.
func TestOptionsSaved(t *testing.T) {
	f := open(t, unix.AF_INET, unix.SOCK_STREAM, 0)
	s, err := read(f)
	must(t, err)
	if len(s.Options) != 0 {
		t.Errorf("a new socket has the options %+v", s.Options)
	}
	set(t, f, tcpMore)
	must(t, unix.SetsockoptString(fd(f), unix.SOL_TCP, unix.TCP_CONGESTION, "reno"))
	s, err = read(f)
	must(t, err)
	for o := range tcpMore {
		if !has(s, o[0], o[1]) {
			t.Errorf("option %v is not saved", o)
		}
	}
	if !has(s, unix.SOL_TCP, unix.TCP_CONGESTION) {
		t.Error("the congestion control is not saved")
	}
	if s, err := read(remake(t, s)); err != nil || !has(s, unix.SOL_TCP, unix.TCP_CONGESTION) {
		t.Errorf("the congestion control is not restored: %v", err)
	}
}

// TestReusePortGroup makes a group of listeners at one address again.
func TestReusePortGroup(t *testing.T) {
	first := open(t, unix.AF_INET, unix.SOCK_STREAM, 0)
	set(t, first, map[[2]int]int{{unix.SOL_SOCKET, unix.SO_REUSEPORT}: 1})
	must(t, unix.Bind(fd(first), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	must(t, unix.Listen(fd(first), 1))
	s, err := read(first)
	must(t, err)
	if got, err := read(remake(t, s)); err != nil || string(got.Address) != string(s.Address) {
		t.Errorf("a second one: %v, %v", got, err)
	}
}

// TestSignedRefused refuses keys that cannot be read back.
func TestSignedRefused(t *testing.T) {
	f := open(t, unix.AF_INET, unix.SOCK_STREAM, 0)
	// struct tcp_md5sig of include/uapi/linux/tcp.h
	type md5sig struct {
		address unix.RawSockaddrInet4
		_       [128 - unsafe.Sizeof(unix.RawSockaddrInet4{})]byte
		flags   uint8
		prefix  uint8
		length  uint16
		index   int32
		key     [80]byte
	}
	sig := md5sig{address: unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: [4]byte{192, 0, 2, 1}}, length: 3, key: [80]byte{'k', 'e', 'y'}}
	value := unsafe.Slice((*byte)(unsafe.Pointer(&sig)), unsafe.Sizeof(sig))
	must(t, unix.SetsockoptString(fd(f), unix.SOL_TCP, unix.TCP_MD5SIG, string(value)))
	must(t, unix.Bind(fd(f), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	must(t, unix.Listen(fd(f), 1))
	if _, err := read(f); err == nil || !strings.Contains(err.Error(), "TCP_MD5SIG") {
		t.Errorf("%v", err)
	}
}

// TestMPTCPListener: the default of Go's servers.
func TestMPTCPListener(t *testing.T) {
	f := open(t, unix.AF_INET6, unix.SOCK_STREAM, ipprotoMPTCP)
	must(t, unix.Bind(fd(f), &unix.SockaddrInet6{}))
	must(t, unix.Listen(fd(f), 23))
	s, err := read(f)
	must(t, err)
	must(t, f.Close())
	got, err := read(remake(t, s))
	must(t, err)
	if got.Protocol != ipprotoMPTCP || got.Backlog != 23 || !got.Listening {
		t.Errorf("%+v", got)
	}
}

// TestMPTCPConnections refuses what TCP_REPAIR does not know, and takes what has
// fallen back to TCP at a listener's.
func TestMPTCPConnections(t *testing.T) {
	inNewNetwork(t, func(netns string) {
		for _, server := range []int{ipprotoMPTCP, unix.IPPROTO_TCP} {
			l := open(t, unix.AF_INET, unix.SOCK_STREAM, server)
			must(t, unix.Bind(fd(l), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
			must(t, unix.Listen(fd(l), 1))
			at, err := unix.Getsockname(fd(l))
			must(t, err)
			for _, client := range []int{ipprotoMPTCP, unix.IPPROTO_TCP} {
				c := open(t, unix.AF_INET, unix.SOCK_STREAM, client)
				must(t, unix.Connect(fd(c), at))
				n, _, err := unix.Accept(fd(l))
				must(t, err)
				accepted := os.NewFile(uintptr(n), "accepted")
				defer accepted.Close()
				for f, own := range map[*os.File]int{c: client, accepted: server} {
					in := &Inside{NetNS: netns, Choices: Choices{Established: true}}
					_, err := Read(in, fd(f), 0)
					want := map[bool]string{true: "fallen back", false: "a connection of MPTCP"}[client != server]
					if protocol, e := number(fd(f), unix.SOL_SOCKET, unix.SO_PROTOCOL); e != nil || protocol == unix.IPPROTO_TCP {
						if err != nil {
							t.Errorf("a connection of TCP: %v", err)
						}
					} else if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("%d of %d and %d: %v, want %q", own, client, server, err, want)
					}
				}
			}
		}
	})
}

// TestInFlight tells how many connections nobody has accepted.
func TestInFlight(t *testing.T) {
	l, at := listening(t, unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, 5)
	for range 2 {
		must(t, unix.Connect(fd(open(t, unix.AF_INET, unix.SOCK_STREAM, 0)), at))
	}
	refused(t, l, "2 connections to 127.0.0.1:")
	var warned string
	in := here()
	in.SkipInFlight, in.Warn = true, func(format string, args ...any) { warned += format }
	if s, err := Read(in, fd(l), 0); err != nil || !s.Listening || !strings.Contains(warned, "they are reset") {
		t.Errorf("%+v, %v, %q", s, err, warned)
	}
}
