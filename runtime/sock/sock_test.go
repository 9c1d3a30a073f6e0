package sock

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests must run as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func here() *Inside {
	return &Inside{NetNS: "/proc/self/ns/net", Lstat: func(path string) (*unix.Stat_t, error) {
		var st unix.Stat_t
		return &st, unix.Lstat(path, &st)
	}, Pid: func(pid int32) int32 { return pid }, IDs: task.IDMaps{}}
}

func open(t *testing.T, domain, kind, protocol int) *os.File {
	t.Helper()
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
	must(t, err)
	f := os.NewFile(uintptr(fd), "socket")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func fd(f *os.File) int { return int(f.Fd()) }

func read(f *os.File) (*image.Socket, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd(f), &st); err != nil {
		return nil, err
	}
	return Read(here(), fd(f), st.Ino)
}

// listening returns a socket that listens at an address of its own.
func listening(t *testing.T, domain int, address unix.Sockaddr, backlog int) (*os.File, unix.Sockaddr) {
	t.Helper()
	f := open(t, domain, unix.SOCK_STREAM, 0)
	must(t, unix.Bind(fd(f), address))
	must(t, unix.Listen(fd(f), backlog))
	at, err := unix.Getsockname(fd(f))
	must(t, err)
	return f, at
}

func refused(t *testing.T, f *os.File, why string) {
	t.Helper()
	s, err := read(f)
	var r *fail.Refused
	if !errors.As(err, &r) || !strings.Contains(err.Error(), why) {
		t.Errorf("got %+v, %v; want a refusal that says %q", s, err, why)
	}
}

func TestConnectedRefused(t *testing.T) {
	l, at := listening(t, unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, 5)
	client := open(t, unix.AF_INET, unix.SOCK_STREAM, 0)
	must(t, unix.Connect(fd(client), at))
	refused(t, client, fmt.Sprintf("connected to 127.0.0.1:%d", at.(*unix.SockaddrInet4).Port))
	refused(t, l, fmt.Sprintf("1 connections to 127.0.0.1:%d wait to be accepted", at.(*unix.SockaddrInet4).Port))
	n, _, err := unix.Accept(fd(l))
	must(t, err)
	accepted := os.NewFile(uintptr(n), "accepted")
	defer accepted.Close()
	refused(t, accepted, "connected to")
	if s, err := read(l); err != nil || !s.Listening || s.Backlog != 5 {
		t.Errorf("with its queue empty again: %+v, %v", s, err)
	}
}

func TestUnixBacklog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, name := range []string{path, "@ocickpt-test-" + filepath.Base(t.TempDir())} {
		l, at := listening(t, unix.AF_UNIX, &unix.SockaddrUnix{Name: name}, 17)
		if s, err := read(l); err != nil || !s.Listening || s.Backlog != 17 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
		for i := range 3 {
			must(t, unix.Connect(fd(open(t, unix.AF_UNIX, unix.SOCK_STREAM, 0)), at))
			if d, err := diagnose(l); err != nil || len(d.Pending) != i+1 {
				t.Errorf("%s: %+v, %v; want %d pending connections", name, d, err, i+1)
			}
		}
	}
}

func diagnose(f *os.File) (*Diagnosis, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd(f), &st); err != nil {
		return nil, err
	}
	return here().Diagnose(st.Ino)
}

// A pair knows its peers, who made it and what it is shut down for.
func TestUnixPair(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	a, b := os.NewFile(uintptr(pair[0]), "a"), os.NewFile(uintptr(pair[1]), "b")
	defer a.Close()
	must(t, unix.Shutdown(pair[0], unix.SHUT_WR))
	var st unix.Stat_t
	must(t, unix.Fstat(pair[1], &st))
	s, err := read(a)
	if err != nil || s.Unix.Shutdown != 2 || s.Unix.Creds.Pid != int32(os.Getpid()) || s.Unix.Reset {
		t.Errorf("%+v, %v", s.Unix, err)
	}
	if d, err := diagnose(a); err != nil || d.Peer != st.Ino {
		t.Errorf("%+v, %v; want peer %d", d, err, st.Ino)
	}
	_, err = unix.Write(pair[1], []byte("x"))
	must(t, err)
	must(t, b.Close())
	if s, err := read(a); err != nil || s.Unix.Shutdown != 3 {
		t.Errorf("%+v, %v", s.Unix, err)
	}
	if d, err := diagnose(a); err != nil || !d.HasPeer || d.Peer != 0 {
		t.Errorf("%+v, %v; want a peer that is closed", d, err)
	}
}

func TestUnsupported(t *testing.T) {
	refused(t, open(t, unix.AF_VSOCK, unix.SOCK_STREAM, 0), "sockets of AF_VSOCK are not")
	corked := open(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
	must(t, unix.SetsockoptInt(fd(corked), unix.SOL_UDP, udpCork, 1))
	refused(t, corked, "UDP_CORK")
	told := open(t, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	must(t, unix.Sendto(fd(told), append([]byte{20, 0, 0, 0, 0xff, 0xff, unix.NLM_F_REQUEST, unix.NLM_F_ACK >> 8}, make([]byte, 12)...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	if s, err := read(told); err != nil || !Queues(s) || readLost(fd(told), s, func(string, ...any) {}) != nil || !s.Lost {
		t.Errorf("%v, %+v", err, s)
	}
	ring := open(t, unix.AF_PACKET, unix.SOCK_RAW, 0)
	must(t, unix.SetsockoptTpacketReq(fd(ring), unix.SOL_PACKET, unix.PACKET_RX_RING, &unix.TpacketReq{Block_size: 4096, Block_nr: 1, Frame_size: 2048, Frame_nr: 2}))
	refused(t, ring, "it has a ring")
	for _, s := range []image.Socket{{Family: unix.AF_VSOCK, Type: unix.SOCK_STREAM}, {Family: unix.AF_PACKET, Type: unix.SOCK_PACKET}} {
		if _, err := Open(&tracee.Batch{}, &s); err == nil {
			t.Errorf("a socket of family %d, type %d was opened", s.Family, s.Type)
		}
	}
}

// TestQueue looks at datagrams twice, and leaves all in place.
func TestQueue(t *testing.T) {
	f, from := open(t, unix.AF_INET, unix.SOCK_DGRAM, 0), open(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
	for _, one := range []*os.File{f, from} {
		must(t, unix.Bind(fd(one), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	}
	at, err := unix.Getsockname(fd(f))
	must(t, err)
	for _, text := range []string{"one", "", "three"} {
		must(t, unix.Sendto(fd(from), []byte(text), 0, at))
	}
	sender, err := boundAddress(fd(from))
	must(t, err)
	for _, want := range [][]string{{"one", "", "three"}, {"one", "three"}} { // the kernel shows an empty one once
		s, err := read(f)
		must(t, err)
		must(t, ReadQueue(fd(f), s, func(format string, args ...any) { t.Errorf(format, args...) }))
		var got []string
		for _, d := range s.Datagrams {
			got = append(got, string(d.Data))
			if addressOf(d.From) != addressOf(sender) {
				t.Errorf("from %v", addressOf(d.From))
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

// TestOverrun has netlink sockets tell of lost messages, once and nothing else.
func TestOverrun(t *testing.T) {
	for _, protocol := range []int{unix.NETLINK_ROUTE, unix.NETLINK_SOCK_DIAG, unix.NETLINK_XFRM, unix.NETLINK_NETFILTER, unix.NETLINK_KOBJECT_UEVENT, unix.NETLINK_GENERIC} {
		for _, brief := range []int{0, 1} {
			f := open(t, unix.AF_NETLINK, unix.SOCK_RAW, protocol)
			must(t, unix.SetsockoptInt(fd(f), unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, brief))
			must(t, Overrun(f))
			for _, want := range []error{unix.ENOBUFS, unix.EAGAIN} {
				if _, _, err := unix.Recvfrom(fd(f), make([]byte, 64), unix.MSG_DONTWAIT); !errors.Is(err, want) {
					t.Errorf("protocol %d: %v, not %v", protocol, err, want)
				}
			}
			if n, err := number(fd(f), unix.SOL_NETLINK, unix.NETLINK_CAP_ACK); err != nil || n != brief {
				t.Errorf("NETLINK_CAP_ACK %d, %v", n, err)
			}
		}
	}
}

// TestRefillDropped puts datagrams back where one arrives and no more.
func TestRefillDropped(t *testing.T) {
	f := open(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
	must(t, unix.Bind(fd(f), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	s, err := read(f)
	must(t, err)
	s.Datagrams = []image.Datagram{{From: s.Address, Data: []byte("one")}, {From: s.Address}, {From: s.Address, Data: []byte("three")}}
	lost := 0
	refill := func() {
		must(t, Refill("/proc/self/ns/net", []Waiting{{File: f, Record: s}}, func(string, ...any) { lost++ }))
	}
	if refill(); lost > 0 {
		t.Error("datagrams are lost")
	}
	must(t, unix.SetsockoptSockFprog(fd(f), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET}})) // drop all
	if refill(); lost != 1 {
		t.Errorf("%d warnings of datagrams that were dropped", lost)
	}
}

func TestParseGroups(t *testing.T) {
	four := parseIGMP("Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n2\teth0      :     2      V3\n\t\t\t\t030201EF     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n")
	six := parseIGMP6("3    eth1            ff020000000000000000000000000077     1 00000004 0\nx\n4 e ff 1\n")
	want := []membership{{2, netip.MustParseAddr("239.1.2.3")}, {3, netip.MustParseAddr("ff02::77")}}
	if got := append(four, six...); !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

func TestDatagram(t *testing.T) {
	from, to := netip.MustParseAddrPort("192.0.2.1:7"), netip.MustParseAddrPort("127.0.0.1:9")
	p := datagram(unix.IPPROTO_UDP, from, to, &image.Datagram{Data: []byte("odd"), TTL: 3, Service: 8})
	pseudo := slices.Concat(p[12:20], []byte{0, unix.IPPROTO_UDP, 0, 11}, p[20:])
	if len(p) != 31 || p[8] != 3 || p[1] != 8 || checksum(pseudo) != 0 {
		t.Errorf("%x, %#x", p, checksum(pseudo))
	}
	if p := datagram(unix.IPPROTO_UDP, from, netip.MustParseAddrPort("239.1.1.1:9"), &image.Datagram{TTL: 3}); p[8] != 0 {
		t.Errorf("a datagram to many lives for %d hops", p[8])
	}
}

func TestUnixPath(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	path := filepath.Join(dir, "s")
	f := open(t, unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, unix.Bind(fd(f), &unix.SockaddrUnix{Name: path}))
	must(t, os.Chmod(path, 0o620))
	must(t, os.Chown(path, 12, 34))
	if s, err := read(f); err != nil || s.Path != path || s.Mode&0o7777 != 0o620 || s.UID != 12 || s.GID != 34 {
		t.Errorf("%+v, %v", s, err)
	}
	at := func(want string) {
		t.Helper()
		if s, err := read(f); err != nil || s.Path != want || UnixName(s.Address) != path {
			t.Errorf("%+v, %v; want %s", s, err, want)
		}
	}
	must(t, os.Rename(path, path+"2"))
	at(path + "2")
	must(t, os.WriteFile(path, nil, 0o600))
	at(path + "2")
	must(t, os.Remove(path+"2"))
	at("")
	relative := open(t, unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	must(t, unix.Bind(fd(relative), &unix.SockaddrUnix{Name: "r"}))
	if s, err := read(relative); err != nil || s.Path != dir+"/r" || UnixName(s.Address) != "r" {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := read(open(t, unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)); err != nil || s.Path != "" || bound(s) {
		t.Errorf("unnamed: %+v, %v", s, err)
	}
}

// set gives a socket options that are not the defaults.
func set(t *testing.T, f *os.File, options map[[2]int]int) {
	t.Helper()
	for o, v := range options {
		if err := unix.SetsockoptInt(fd(f), o[0], o[1], v); err != nil {
			t.Fatalf("option %v: %v", o, err)
		}
	}
}

var (
	anyFamily = map[[2]int]int{
		{unix.SOL_SOCKET, unix.SO_SNDBUF}: 30_000, {unix.SOL_SOCKET, unix.SO_RCVBUF}: 40_000,
		{unix.SOL_SOCKET, unix.SO_PRIORITY}: 3, {unix.SOL_SOCKET, unix.SO_MARK}: 77, {unix.SOL_SOCKET, unix.SO_TIMESTAMP}: 1,
		{unix.SOL_SOCKET, unix.SO_DEBUG}: 1, {unix.SOL_SOCKET, unix.SO_DONTROUTE}: 1, {unix.SOL_SOCKET, unix.SO_RCVLOWAT}: 5,
		{unix.SOL_SOCKET, soRcvMark}: 1, {unix.SOL_SOCKET, unix.SO_RXQ_OVFL}: 1, {unix.SOL_SOCKET, unix.SO_SELECT_ERR_QUEUE}: 1,
		{unix.SOL_SOCKET, unix.SO_BUSY_POLL}: 50, {unix.SOL_SOCKET, unix.SO_PREFER_BUSY_POLL}: 1, {unix.SOL_SOCKET, unix.SO_BUSY_POLL_BUDGET}: 16,
		{unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE}: 1 << 20, {unix.SOL_SOCKET, unix.SO_OOBINLINE}: 1, {unix.SOL_SOCKET, unix.SO_TIMESTAMPING}: unix.SOF_TIMESTAMPING_RX_SOFTWARE,
	}
	newer = map[[2]int]int{
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW}: 1, {unix.SOL_SOCKET, unix.SO_TIMESTAMPING_NEW}: unix.SOF_TIMESTAMPING_RX_SOFTWARE,
		{unix.SOL_SOCKET, unix.SO_ZEROCOPY}: 1, {unix.SOL_SOCKET, unix.SO_NO_CHECK}: 1,
	}
	localOnly = map[[2]int]int{
		{unix.SOL_SOCKET, unix.SO_PASSCRED}: 1, {unix.SOL_SOCKET, unix.SO_PASSSEC}: 1, {unix.SOL_SOCKET, soPassPidfd}: 1,
		{unix.SOL_SOCKET, unix.SO_PEEK_OFF}: 3,
	}
	plain = map[[2]int]int{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR}: 1, {unix.SOL_SOCKET, unix.SO_REUSEPORT}: 1, {unix.SOL_SOCKET, unix.SO_KEEPALIVE}: 1,
		{unix.SOL_TCP, unix.TCP_NODELAY}: 1, {unix.SOL_TCP, unix.TCP_DEFER_ACCEPT}: 7, {unix.SOL_TCP, unix.TCP_KEEPIDLE}: 33,
		{unix.SOL_TCP, unix.TCP_KEEPINTVL}: 44, {unix.SOL_TCP, unix.TCP_KEEPCNT}: 5, {unix.SOL_TCP, unix.TCP_USER_TIMEOUT}: 6000,
	}
	// tcpMore are options of TCP that a listener may have all at once.
	tcpMore = map[[2]int]int{
		{unix.SOL_TCP, unix.TCP_MAXSEG}: 1200, {unix.SOL_TCP, unix.TCP_CORK}: 1, {unix.SOL_TCP, unix.TCP_SYNCNT}: 3, {unix.SOL_TCP, unix.TCP_LINGER2}: 17,
		{unix.SOL_TCP, unix.TCP_WINDOW_CLAMP}: 20_000, {unix.SOL_TCP, unix.TCP_QUICKACK}: 0, {unix.SOL_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS}: 1,
		{unix.SOL_TCP, unix.TCP_FASTOPEN}: 9, {unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT}: 16384, {unix.SOL_TCP, unix.TCP_SAVE_SYN}: 1,
		{unix.SOL_TCP, unix.TCP_INQ}: 1, {unix.SOL_TCP, unix.TCP_RTO_MAX_MS}: 5000, {unix.SOL_TCP, unix.TCP_FASTOPEN_NO_COOKIE}: 1,
		{unix.SOL_IP, unix.IP_MTU_DISCOVER}: unix.IP_PMTUDISC_DO, {unix.SOL_IP, unix.IP_MINTTL}: 3, {unix.SOL_IP, unix.IP_TRANSPARENT}: 1,
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}: 1, {unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE}: 40_000<<16 | 30_000,
	}
	tcp6 = map[[2]int]int{
		{unix.SOL_IPV6, unix.IPV6_TCLASS}: 0x20, {unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS}: 7, {unix.SOL_IPV6, unix.IPV6_MINHOPCOUNT}: 2,
		{unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER}: unix.IPV6_PMTUDISC_DO, {unix.SOL_IPV6, unix.IPV6_AUTOFLOWLABEL}: 0, {unix.SOL_IPV6, unix.IPV6_V6ONLY}: 0,
	}
	ip  = map[[2]int]int{{unix.SOL_IP, unix.IP_TTL}: 9, {unix.SOL_IP, unix.IP_FREEBIND}: 1, {unix.SOL_SOCKET, unix.SO_BROADCAST}: 1}
	ip6 = map[[2]int]int{{unix.SOL_IPV6, unix.IPV6_V6ONLY}: 1}
)

// TestRoundTrip makes sockets again in a stub and reads them in the same way.
func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	loopback := unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	for name, c := range map[string]struct {
		domain, kind int
		options      []map[[2]int]int
		address      unix.Sockaddr
		backlog      int
	}{
		"tcp listener":     {unix.AF_INET, unix.SOCK_STREAM, []map[[2]int]int{anyFamily, plain, ip}, &loopback, 7},
		"tcp options":      {unix.AF_INET, unix.SOCK_STREAM, []map[[2]int]int{tcpMore}, &loopback, 7},
		"tcp6 options":     {unix.AF_INET6, unix.SOCK_STREAM, []map[[2]int]int{tcpMore, tcp6}, &unix.SockaddrInet6{}, 7},
		"tcp default":      {unix.AF_INET, unix.SOCK_STREAM, nil, nil, 0},
		"tcp bound":        {unix.AF_INET, unix.SOCK_STREAM, nil, &loopback, 0},
		"tcp6 listener":    {unix.AF_INET6, unix.SOCK_STREAM, []map[[2]int]int{anyFamily, plain, ip6}, &unix.SockaddrInet6{}, 1},
		"udp":              {unix.AF_INET, unix.SOCK_DGRAM, []map[[2]int]int{anyFamily, ip}, &loopback, 0},
		"udp6":             {unix.AF_INET6, unix.SOCK_DGRAM, []map[[2]int]int{ip6, newer}, &unix.SockaddrInet6{}, 0},
		"foreign address":  {unix.AF_INET, unix.SOCK_DGRAM, []map[[2]int]int{ip}, &unix.SockaddrInet4{Addr: [4]byte{203, 0, 113, 9}, Port: 12345}, 0},
		"unix listener":    {unix.AF_UNIX, unix.SOCK_STREAM, []map[[2]int]int{anyFamily}, &unix.SockaddrUnix{Name: filepath.Join(dir, "l")}, 3},
		"unix abstract":    {unix.AF_UNIX, unix.SOCK_SEQPACKET, nil, &unix.SockaddrUnix{Name: "@ocickpt\xff " + filepath.Base(dir)}, 3},
		"unix datagrams":   {unix.AF_UNIX, unix.SOCK_DGRAM, []map[[2]int]int{localOnly}, &unix.SockaddrUnix{Name: filepath.Join(dir, "d")}, 0},
		"unix unconnected": {unix.AF_UNIX, unix.SOCK_STREAM, nil, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := open(t, c.domain, c.kind, 0)
			for _, o := range c.options {
				set(t, f, o)
			}
			if c.options != nil {
				tv := unix.Timeval{Sec: 5, Usec: 8000}
				must(t, unix.SetsockoptTimeval(fd(f), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
				must(t, unix.SetsockoptLinger(fd(f), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 12}))
			}
			if c.address != nil {
				must(t, unix.Bind(fd(f), c.address))
			}
			if c.backlog > 0 {
				must(t, unix.Listen(fd(f), c.backlog))
			}
			want, err := read(f)
			must(t, err)
			must(t, f.Close()) // its address is free again
			got, err := read(remake(t, want))
			must(t, err)
			if want.Unix != nil && want.Listening { // by the stub
				want.Unix.Creds, got.Unix.Creds = nil, nil
			}
			if d := cmp.Diff(want, got, cmpopts.SortSlices(func(a, b image.SocketOpt) bool {
				return a.Level < b.Level || a.Level == b.Level && a.Name < b.Name
			})); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

// A filter, a device and the lock on the filter come back; an eBPF program is
// refused.
func TestFilter(t *testing.T) {
	f := open(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
	filter := []unix.SockFilter{{Code: 0x80}, {Code: 0x35, Jt: 1, K: 100}, {Code: 6, K: 1 << 18}, {Code: 6}}
	must(t, unix.SetsockoptSockFprog(fd(f), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}))
	must(t, unix.SetsockoptInt(fd(f), unix.SOL_SOCKET, unix.SO_LOCK_FILTER, 1))
	must(t, unix.BindToDevice(fd(f), "lo"))
	want, err := read(f)
	must(t, err)
	got, err := read(remake(t, want))
	must(t, err)
	if d := cmp.Diff(want, got); d != "" || len(want.Options) != 3 || len(want.Options[1].Value) != len(filter)*filterStep {
		t.Errorf("%+v (-want +got)\n%s", want.Options, d)
	}
	e := open(t, unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "Apache-2.0", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	must(t, err)
	defer program.Close()
	must(t, unix.SetsockoptInt(fd(e), unix.SOL_SOCKET, unix.SO_ATTACH_BPF, program.FD()))
	refused(t, e, "eBPF")
}

// An image may not set what no checkpoint reads, nor in another size.
func TestForeignOptions(t *testing.T) {
	for _, o := range []image.SocketOpt{
		{Level: unix.SOL_SOCKET, Name: unix.SO_ATTACH_BPF, Value: make([]byte, 4)},
		{Level: unix.SOL_SOCKET, Name: unix.SO_ATTACH_FILTER, Value: make([]byte, 12)},
		{Level: unix.SOL_SOCKET, Name: unix.SO_ATTACH_FILTER},
		{Level: unix.SOL_SOCKET, Name: unix.SO_BINDTODEVICE, Value: make([]byte, 17)},
		{Level: unix.SOL_SOCKET, Name: unix.SO_MARK, Value: make([]byte, 8)},
		{Level: unix.SOL_TCP, Name: unix.TCP_NODELAY, Value: make([]byte, 4)},
	} {
		s := &image.Socket{Family: unix.AF_UNIX, Type: unix.SOCK_STREAM, Unix: &image.UnixState{}, Options: []image.SocketOpt{o}}
		if _, err := Open(&tracee.Batch{}, s); err == nil {
			t.Errorf("option %+v was taken", o)
		}
	}
}

// remake opens a socket in a stub and takes it over.
func remake(t *testing.T, s *image.Socket) *os.File {
	t.Helper()
	stub := traceetest.Stub(t, traceetest.ServiceAt)
	var b, finish tracee.Batch
	i, err := Open(&b, s)
	must(t, err)
	_, err = stub.Run(&b)
	must(t, err)
	n := int(b.Calls[i].Ret)
	Finish(&finish, n, s)
	if s.Family == unix.AF_UNIX {
		Receive(&finish, n, s)
		BindUnix(&finish, n, s)
		if s.Listening {
			finish.Add(unix.SYS_LISTEN, tracee.W(n), tracee.W(s.Backlog))
		}
	}
	_, err = stub.Run(&finish)
	must(t, err)
	pidfd, err := unix.PidfdOpen(stub.Pid, 0)
	must(t, err)
	defer unix.Close(pidfd)
	ours, err := unix.PidfdGetfd(pidfd, n, 0)
	must(t, err)
	f := os.NewFile(uintptr(ours), "remade")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// unixMessage is a sock_diag message about socket 77 with attributes behind it.
func unixMessage(attributes ...byte) []byte {
	b := make([]byte, 16, 64)
	b[4] = 77
	return append(b, attributes...)
}

func TestNoteDiagnosis(t *testing.T) {
	queue := []byte{12, 0, netlink.UNIX_DIAG_RQLEN, 0, 3, 0, 0, 0, 128, 0, 0, 0}
	pending := []byte{12, 0, netlink.UNIX_DIAG_ICONS, 0, 5, 0, 0, 0, 0, 0, 0, 0}
	peer, shutdown := []byte{8, 0, netlink.UNIX_DIAG_PEER, 0, 9, 0, 0, 0}, []byte{5, 0, netlink.UNIX_DIAG_SHUTDOWN, 0, 2, 0, 0, 0}
	all := map[uint64]*Diagnosis{}
	noteDiagnosis(all, unixMessage(slices.Concat(queue, pending, peer, shutdown)...))
	want := &Diagnosis{HasPeer: true, Peer: 9, Shutdown: 2, Pending: []uint64{5, 0}, Backlog: 128, unread: 3}
	if d := cmp.Diff(want, all[77], cmp.AllowUnexported(Diagnosis{})); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if _, err := here().Diagnose(1); !errors.Is(err, tracee.ErrGone) {
		t.Errorf("a socket that is not there: %v", err)
	}
}
