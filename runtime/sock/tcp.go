package sock

import (
	"errors"
	"fmt"
	"unsafe"

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
		{unix.SOL_TCP, unix.TCP_FASTOPEN_KEY, 32},
		{unix.SOL_SOCKET, soTxRehash, 4},
		{unix.SOL_IP, unix.IP_OPTIONS, 40},
	}, ipOptions...),
	fresh:   true,
	read:    readTCP,
	prepare: prepareIP,
	settle:  settleIP,
}

// before are options that mean something before there is a connection only, and of
// one that there is tell what has become of them.
var before = [][2]int{
	{unix.SOL_TCP, unix.TCP_MAXSEG}, {unix.SOL_TCP, unix.TCP_WINDOW_CLAMP}, {unix.SOL_TCP, unix.TCP_QUICKACK}, {unix.SOL_TCP, unix.TCP_FASTOPEN},
	{unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT}, {unix.SOL_TCP, unix.TCP_FASTOPEN_KEY}, {unix.SOL_TCP, unix.TCP_SAVE_SYN},
	{unix.SOL_SOCKET, unix.SO_INCOMING_CPU}, // every packet sets it anew
}

func readTCP(in *Inside, fd int, inode uint64, s *image.Socket) error {
	if err := plainTCP(in, fd, inode, s); err != nil {
		return err
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err)
	}
	switch {
	case info.State == tcpListen:
		// For a listener these two are its accept queue and its backlog
		// (tcp_get_info in net/ipv4/tcp.c).
		s.Backlog = int32(info.Sacked)
		return in.inFlight(s, info.Unacked)
	case s.Protocol == ipprotoMPTCP:
		return mptcpUnused(fd, info.State)
	case info.State == tcpClose && info.Segs_in == 0 && info.Segs_out == 0:
		return nil // never used
	}
	s.TCP = &image.TCP{State: info.State}
	if info.State == tcpClose {
		return nil // it has ended, and its peer is forgotten
	}
	if !in.Like(inode) { // others would not be like one with a SYN of its own
		in.warnOfSavedSYN(fd, s)
	}
	return in.readPeer(fd, inode, s)
}

// warnOfSavedSYN tells of a SYN that the listener has kept for who accepted the
// connection (TCP_SAVE_SYN). To read it would take it away, and nobody can put it
// back; without room for it the kernel says only how long it is.
func (in *Inside) warnOfSavedSYN(fd int, s *image.Socket) {
	var n uint32
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_TCP, unix.TCP_SAVED_SYN, uintptr(unsafe.Pointer(&n)), uintptr(unsafe.Pointer(&n)), 0)
	if errno == unix.EINVAL && n > 0 {
		in.Warn("the SYN that was saved of a connection to %s (TCP_SAVED_SYN) is left out", describeRaw(s.Address))
	}
}

// CheckInFlight looks once more whether connections wait to be accepted.
func (in *Inside) CheckInFlight(l *Held) error {
	f, err := l.open()
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := unix.GetsockoptTCPInfo(int(f.Fd()), unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err)
	}
	return l.Named(in.inFlight(l.Record, info.Unacked))
}

// Orphans says which connections no descriptor leads to: none of them can be saved.
func (in *Inside) Orphans() (what []string) {
	names := []struct {
		name   string
		states []int
	}{
		{"being made by peers (SYN_RECV)", []int{tcpSynReceived}},
		{"waiting for time to pass (TIME_WAIT)", []int{tcpTimeWait}},
		{"closed by their programs, which still had something to tell", []int{tcpFinWait1, tcpFinWait2, tcpClosing, tcpLastAck}},
	}
	for _, n := range names {
		sum := 0
		for _, d := range in.diagnoses {
			for _, state := range n.states {
				sum += d.orphans[state]
			}
		}
		if sum > 0 {
			what = append(what, fmt.Sprintf("%d %s", sum, n.name))
		}
	}
	return what
}

// inFlight refuses connections that the kernel has made and nobody has accepted:
// none can be put back into that queue.
func (in *Inside) inFlight(s *image.Socket, n uint32) error {
	switch {
	case n == 0:
		return nil
	case in.SkipInFlight:
		in.Warn("%d connections to %s that wait to be accepted are not saved: they are reset", n, describeRaw(s.Address))
		return nil
	}
	return fail.Refuse("", fmt.Sprintf("%d connections to %s wait to be accepted, and none can be put back into that queue", n, describeRaw(s.Address)),
		"let the program accept them, stop the clients, or have them reset by --tcp-skip-in-flight")
}

// readPeer records whom a connection is with. Of one that is only being made, the
// socket itself does not tell.
func (in *Inside) readPeer(fd int, inode uint64, s *image.Socket) (err error) {
	if s.TCP.State == tcpSynSent {
		d, err := in.diagnosis(int(s.Family))
		if err != nil {
			return err
		}
		if s.TCP.Peer = d.peers[inode]; s.TCP.Peer == nil {
			return fmt.Errorf("sock_diag does not know the connection that is being made")
		}
	} else if s.TCP.Peer, err = peerAddress(fd); err != nil {
		return err
	}
	if in.Established {
		return nil
	}
	return fail.Refuse("", fmt.Sprintf("%s is connected to %s", describeRaw(s.Address), describeRaw(s.TCP.Peer)), "keep the connection with --tcp-established, or close it before the checkpoint")
}

const (
	solMPTCP  = 284 // SOL_MPTCP
	mptcpInfo = 1   // MPTCP_INFO
)

// mptcpUnused refuses MPTCP sockets with a peer. (Those that a listener has accepted
// from a client that speaks plain TCP are sockets of TCP.)
func mptcpUnused(fd int, state uint8) error {
	if _, err := peerAddress(fd); errors.Is(err, unix.ENOTCONN) && state == tcpClose {
		return nil
	}
	// One that has fallen back takes the options of TCP only (mptcp_getsockopt in
	// net/mptcp/sockopt.c).
	if info, err := get(fd, solMPTCP, mptcpInfo, make([]byte, 8)); err == nil && info == nil {
		return fail.Refuse("", "it is a socket of MPTCP whose connection has fallen back to TCP: the kernel has no TCP_REPAIR for it", "close it, or let the program connect by TCP (GODEBUG=multipathtcp=0)")
	}
	return fail.Refuse("", "it is a connection of MPTCP, for which the kernel has no TCP_REPAIR", "close it, or let the program connect by TCP (GODEBUG=multipathtcp=0)")
}

// plainTCP refuses what stands between a socket and TCP and cannot be read back:
// upper layer protocols and keys.
func plainTCP(in *Inside, fd int, inode uint64, s *image.Socket) error {
	if s.Protocol == ipprotoMPTCP {
		return nil // what its subflows have is its own affair
	}
	if !in.Like(inode) {
		if err := nothingBetween(fd); err != nil {
			return err
		}
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

// nothingBetween refuses what options tell to stand there.
func nothingBetween(fd int) error {
	name, err := unix.GetsockoptString(fd, unix.SOL_TCP, unix.TCP_ULP)
	if err == nil && name != "" {
		return fail.Refuse("", fmt.Sprintf("it has the upper layer protocol %q (TCP_ULP), whose keys and records the kernel does not give back", name), "close it before the checkpoint")
	}
	const aoInfo = 128 // more than struct tcp_ao_info_opt
	if ao, err := get(fd, unix.SOL_TCP, tcpAOInfo, make([]byte, aoInfo)); err == nil && ao != nil {
		return fail.Refuse("", "it signs its segments (TCP_AO), and the kernel does not give the keys back", "close it before the checkpoint")
	}
	return nil
}
