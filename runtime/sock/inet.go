package sock

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	tcpClose     = 7 // TCP_CLOSE of include/net/tcp_states.h
	tcpListen    = 10
	ipprotoMPTCP = 262
)

// inet is TCP and UDP over IPv4 and IPv6, as far as there is no peer.
var inet = family{
	types: [][2]int32{
		{unix.SOCK_STREAM, unix.IPPROTO_TCP}, {unix.SOCK_STREAM, ipprotoMPTCP}, {unix.SOCK_DGRAM, unix.IPPROTO_UDP},
	},
	options: []option{
		{unix.SOL_IPV6, unix.IPV6_V6ONLY, 4},
		{unix.SOL_IP, unix.IP_TOS, 4},
		{unix.SOL_IP, unix.IP_TTL, 4},
		{unix.SOL_IP, unix.IP_TRANSPARENT, 4},
		{unix.SOL_IP, unix.IP_FREEBIND, 4},
		{unix.SOL_IP, unix.IP_PKTINFO, 4},
		{unix.SOL_IP, unix.IP_RECVERR, 4},
		{unix.SOL_IP, unix.IP_RECVTTL, 4},
		{unix.SOL_IP, unix.IP_RECVTOS, 4},
		{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 4},
		{unix.SOL_IPV6, unix.IPV6_RECVERR, 4},
		{unix.SOL_TCP, unix.TCP_CORK, 4},
		{unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT, 4},
		{unix.SOL_TCP, unix.TCP_NODELAY, 4},
		{unix.SOL_TCP, unix.TCP_DEFER_ACCEPT, 4},
		{unix.SOL_TCP, unix.TCP_KEEPIDLE, 4},
		{unix.SOL_TCP, unix.TCP_KEEPINTVL, 4},
		{unix.SOL_TCP, unix.TCP_KEEPCNT, 4},
		{unix.SOL_TCP, unix.TCP_USER_TIMEOUT, 4},
		{unix.SOL_TCP, unix.TCP_FASTOPEN, 4},
	},
	read: func(_ *Inside, fd int, _ uint64, s *image.Socket) error {
		if s.Type == unix.SOCK_STREAM && (s.Protocol == unix.IPPROTO_TCP || s.Protocol == ipprotoMPTCP) {
			return readTCP(fd, s)
		}
		if s.Type == unix.SOCK_DGRAM && s.Protocol == unix.IPPROTO_UDP {
			return emptyQueue(fd)
		}
		return fail.Refuse("", fmt.Sprintf("internet sockets of type %d, protocol %d are not supported yet", s.Type, s.Protocol), "close it before the checkpoint")
	},
	// The address may belong to a device that comes up later, or be still
	// tentative: free binding takes it all the same.
	prepare: func(b *tracee.Batch, fd int, _ *image.Socket) { freebind(b, fd, 1) },
	settle: func(b *tracee.Batch, fd int, s *image.Socket) {
		for _, o := range s.Options {
			if o.Level == unix.SOL_IP && o.Name == unix.IP_FREEBIND {
				return // its own, set already
			}
		}
		freebind(b, fd, 0)
	},
}

func freebind(b *tracee.Batch, fd int, on uint32) {
	value := make([]byte, 4)
	put32(value, on)
	setOption(b, fd, unix.SOL_IP, unix.IP_FREEBIND, value)
}

func readTCP(fd int, s *image.Socket) error {
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err)
	}
	switch info.State {
	case tcpListen:
		// For a listener these two are its accept queue and its backlog
		// (tcp_get_info in net/ipv4/tcp.c).
		s.Backlog = int32(info.Sacked)
		if info.Unacked != 0 {
			return fail.Refuse("", fmt.Sprintf("%d connections wait to be accepted", info.Unacked), "let the program accept them, or stop the clients")
		}
	case tcpClose:
		if info.Segs_in != 0 || info.Segs_out != 0 {
			return fail.Refuse("", "a TCP connection that has ended but is not closed is not supported yet", "let the program close it")
		}
	default:
		return fail.Refuse("", fmt.Sprintf("a TCP connection in state %d is not supported yet", info.State), "close it before the checkpoint")
	}
	return nil
}

func emptyQueue(fd int) error {
	// SIOCINQ would not tell a datagram of no bytes from none.
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll: %w", err)
	}
	if fds[0].Revents&(unix.POLLIN|unix.POLLERR) != 0 {
		return fail.Refuse("", "datagrams wait to be read; they are not supported yet", "let the program read them")
	}
	return nil
}
