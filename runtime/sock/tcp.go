package sock

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// States of a TCP socket (include/net/tcp_states.h).
const (
	tcpEstablished = 1 + iota
	tcpSynSent
	tcpSynReceived
	tcpFinWait1
	tcpFinWait2
	tcpTimeWait
	tcpClose
	tcpCloseWait
	tcpLastAck
	tcpListen
	tcpClosing
)

const (
	ipprotoMPTCP   = 262
	tcpDelackMaxUS = 46 // TCP_DELACK_MAX_US, Linux 6.17
	tcpAOInfo      = 40 // TCP_AO_INFO, Linux 6.7
)

// tcp is TCP over IPv4 and IPv6, and sockets of MPTCP that listen.
var tcp = family{
	types: [][2]int32{{unix.SOCK_STREAM, unix.IPPROTO_TCP}, {unix.SOCK_STREAM, ipprotoMPTCP}},
	options: append([]option{
		{unix.SOL_TCP, unix.TCP_NODELAY, 4},
		{unix.SOL_TCP, unix.TCP_MAXSEG, 4},
		{unix.SOL_TCP, unix.TCP_CORK, 4},
		{unix.SOL_TCP, unix.TCP_KEEPIDLE, 4},
		{unix.SOL_TCP, unix.TCP_KEEPINTVL, 4},
		{unix.SOL_TCP, unix.TCP_KEEPCNT, 4},
		{unix.SOL_TCP, unix.TCP_SYNCNT, 4},
		{unix.SOL_TCP, unix.TCP_LINGER2, 4},
		{unix.SOL_TCP, unix.TCP_DEFER_ACCEPT, 4},
		{unix.SOL_TCP, unix.TCP_WINDOW_CLAMP, 4},
		{unix.SOL_TCP, unix.TCP_QUICKACK, 4},
		{unix.SOL_TCP, unix.TCP_CONGESTION, 16}, // TCP_CA_NAME_MAX
		{unix.SOL_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS, 4},
		{unix.SOL_TCP, unix.TCP_USER_TIMEOUT, 4},
		{unix.SOL_TCP, unix.TCP_FASTOPEN, 4},
		{unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 4},
		{unix.SOL_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 4},
		{unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT, 4},
		{unix.SOL_TCP, unix.TCP_SAVE_SYN, 4},
		{unix.SOL_TCP, unix.TCP_INQ, 4},
		{unix.SOL_TCP, unix.TCP_TX_DELAY, 4},
		{unix.SOL_TCP, unix.TCP_RTO_MAX_MS, 4},
		{unix.SOL_TCP, unix.TCP_RTO_MIN_US, 4},
		{unix.SOL_TCP, tcpDelackMaxUS, 4},
	}, ipOptions...),
	fresh:   true,
	read:    readTCP,
	prepare: prepareIP,
	settle:  settleIP,
}

func readTCP(in *Inside, fd int, inode uint64, s *image.Socket) error {
	if err := plainTCP(in, fd, inode, s); err != nil {
		return err
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err)
	}
	if err := unconnected(fd); err != nil {
		return err
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

// plainTCP refuses what stands between a socket and TCP and cannot be read back:
// upper layer protocols and keys.
func plainTCP(in *Inside, fd int, inode uint64, s *image.Socket) error {
	if s.Protocol == ipprotoMPTCP {
		return nil // what its subflows have is its own affair
	}
	name, err := unix.GetsockoptString(fd, unix.SOL_TCP, unix.TCP_ULP)
	if err == nil && name != "" {
		return fail.Refuse("", fmt.Sprintf("it has the upper layer protocol %q (TCP_ULP), whose keys and records the kernel does not give back", name), "close it before the checkpoint")
	}
	const aoInfo = 128 // more than struct tcp_ao_info_opt
	if ao, err := get(fd, unix.SOL_TCP, tcpAOInfo, make([]byte, aoInfo)); err == nil && ao != nil {
		return fail.Refuse("", "it signs its segments (TCP_AO), and the kernel does not give the keys back", "close it before the checkpoint")
	}
	d, err := in.diagnosis(int(s.Family))
	if err != nil {
		return err
	}
	if d.signed[inode] {
		return fail.Refuse("", "it signs its segments (TCP_MD5SIG), and the kernel does not give the keys back", "close it before the checkpoint")
	}
	return nil
}
