package sock

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

// inNewNetwork runs f in a network namespace of its own with nothing but loopback.
func inNewNetwork(t *testing.T, f func(netns string)) {
	t.Helper()
	must(t, inOwnNetwork(func(netns string) error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err == nil {
			f(netns)
		}
		return err
	}))
}

// tcpPair makes a connection over loopback.
func tcpPair(t *testing.T, domain int) (client, server *os.File) {
	t.Helper()
	l := open(t, domain, unix.SOCK_STREAM, 0)
	var at unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if domain == unix.AF_INET6 {
		at = &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
	}
	must(t, unix.Bind(fd(l), at))
	must(t, unix.Listen(fd(l), 1))
	at, err := unix.Getsockname(fd(l))
	must(t, err)
	client = open(t, domain, unix.SOCK_STREAM, 0)
	must(t, unix.Connect(fd(client), at))
	n, _, err := unix.Accept(fd(l))
	must(t, err)
	server = os.NewFile(uintptr(n), "server")
	t.Cleanup(func() { _ = server.Close() })
	must(t, l.Close())
	return client, server
}

// connectionOf reads a connection's record as far as Read does.
func connectionOf(t *testing.T, f *os.File) *Connection {
	t.Helper()
	s := &image.Socket{Type: unix.SOCK_STREAM, Protocol: unix.IPPROTO_TCP, TCP: &image.TCP{}}
	family, err := number(fd(f), unix.SOL_SOCKET, unix.SO_DOMAIN)
	must(t, err)
	s.Family = int32(family)
	s.Address, err = boundAddress(fd(f))
	must(t, err)
	if s.TCP.Peer, err = peerAddress(fd(f)); err != nil && !errors.Is(err, unix.ENOTCONN) {
		t.Fatal(err)
	}
	return &Connection{Held: Held{Record: s, Pid: os.Getpid(), FD: fd(f), Named: func(err error) error { return err }}}
}

// again makes connections again as a restore does.
func again(t *testing.T, all ...*Connection) []*Remade {
	t.Helper()
	var out []*Remade
	for _, c := range all {
		r := &Remade{File: open(t, int(c.Record.Family), unix.SOCK_STREAM, 0), Record: c.Record}
		// The next host may give them less room.
		must(t, r.Begin(Buffers{1 << 20, 1 << 20}))
		if c.Record.TCP.State != tcpClose {
			a, err := sockaddr(c.Record.Address)
			must(t, err)
			must(t, unix.Bind(r.fd(), a))
		}
		must(t, r.Connect())
		out = append(out, r)
	}
	for i, r := range out {
		must(t, r.Fill(all[i].Content))
	}
	for _, r := range out {
		must(t, r.Shut(Inject))
	}
	return out
}

func sockaddr(raw []byte) (unix.Sockaddr, error) {
	a := addressOf(raw)
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}, nil
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}, nil
}

func pattern(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8 + seed)
	}
	return b
}

// receive reads until n bytes have come, or the end.
func receive(t *testing.T, f *os.File, n int) []byte {
	t.Helper()
	var got []byte
	buf := make([]byte, 1<<16)
	for len(got) < n {
		must(t, await(f, unix.POLLIN))
		m, err := unix.Read(fd(f), buf[:min(len(buf), n-len(got))])
		must(t, err)
		if m == 0 {
			break
		}
		got = append(got, buf[:m]...)
	}
	return got
}

func await(f *os.File, events int16) error {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: events}}
	if n, err := unix.Poll(fds, 5000); n != 1 {
		return fmt.Errorf("nothing comes: %w", err)
	}
	return nil
}

// fills are ways to send until all queues are full, which say how much has gone in.
var fills = map[string]func(t *testing.T, f *os.File) int{
	"write": func(_ *testing.T, f *os.File) (sent int) {
		for {
			n, err := unix.Write(fd(f), pattern(1<<20, sent)[:1<<20])
			if err != nil {
				return sent
			}
			sent += n
		}
	},
	// Pages of a file take less room in the queue than what is written.
	"sendfile": func(t *testing.T, f *os.File) (sent int) {
		n, err := unix.MemfdCreate("content", unix.MFD_CLOEXEC)
		must(t, err)
		content := os.NewFile(uintptr(n), "content")
		defer content.Close()
		_, err = content.Write(pattern(64<<20, 0))
		must(t, err)
		offset := int64(0)
		for {
			n, err := unix.Sendfile(fd(f), fd(content), &offset, 1<<20)
			if err != nil {
				return sent
			}
			sent += n
		}
	},
}

// TestRepairPair takes a pair with data in all queues apart and puts it together.
func TestRepairPair(t *testing.T) {
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		for name, fill := range fills {
			t.Run(fmt.Sprint(domain, name), func(t *testing.T) { repairPair(t, domain, fill) })
		}
	}
}

func repairPair(t *testing.T, domain int, fill func(*testing.T, *os.File) int) {
	inNewNetwork(t, func(netns string) {
		client, server := tcpPair(t, domain)
		must(t, unix.SetNonblock(fd(client), true))
		must(t, unix.SetsockoptInt(fd(client), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2<<20))
		sent := fill(t, client)
		back := pattern(3000, 5)
		_, err := unix.Write(fd(server), back)
		must(t, err)
		a, b := connectionOf(t, client), connectionOf(t, server)
		must(t, ReadConnections([]*Connection{a, b}))
		t.Logf("client %+v", a.Record.TCP)
		t.Logf("server %+v", b.Record.TCP)
		if a.Record.TCP.Unsent == 0 || a.Record.TCP.Receive.Bytes != 3000 {
			t.Errorf("%+v", a.Record.TCP)
		}
		hold := &Hold{Table: "ocickpt-test", NetNS: netns}
		must(t, hold.Put([]Pair{PairOf(a.Record), PairOf(b.Record)}))
		must(t, Silence([]*Connection{a, b}))
		must(t, client.Close())
		must(t, server.Close())
		r := again(t, a, b)
		must(t, hold.Lift())
		must(t, r[0].Release())
		must(t, r[1].Release())
		got := receive(t, r[1].File, sent)
		want := append([]byte{}, b.Content[:b.Record.TCP.Receive.Bytes]...)
		overlap := b.Record.TCP.Receive.Seq + b.Record.TCP.Receive.Bytes - a.Record.TCP.Send.Seq
		want = append(want, a.Content[a.Record.TCP.Receive.Bytes+overlap:]...)
		if len(got) != sent || !bytes.Equal(got, want) {
			t.Errorf("%d of %d bytes, %d", len(got), sent, len(want))
		}
		if got := receive(t, r[0].File, len(back)); !bytes.Equal(got, back) {
			t.Errorf("%d bytes came back", len(got))
		}
		must(t, unix.Shutdown(r[0].fd(), unix.SHUT_WR))
		if got := receive(t, r[1].File, 1); len(got) != 0 {
			t.Errorf("%d bytes behind the end", len(got))
		}
	})
}

// TestRepairStates goes through the states of a connection that is being closed.
func TestRepairStates(t *testing.T) {
	for _, name := range []string{"half-closed", "closing", "read shut", "last ack", "reset", "ended"} {
		t.Run(name, func(t *testing.T) {
			inNewNetwork(t, func(netns string) {
				client, server := tcpPair(t, unix.AF_INET)
				_, err := unix.Write(fd(client), []byte("last words"))
				must(t, err)
				all := []*os.File{client, server}
				switch name {
				case "half-closed":
					must(t, unix.Shutdown(fd(client), unix.SHUT_WR))
				case "read shut":
					must(t, unix.Shutdown(fd(server), unix.SHUT_RD))
				case "closing", "last ack": // FINs that are not answered
					a, b := connectionOf(t, client), connectionOf(t, server)
					hold := &Hold{Table: "ocickpt-other", NetNS: netns}
					if name == "last ack" {
						must(t, unix.Shutdown(fd(client), unix.SHUT_WR))
					}
					must(t, hold.Put([]Pair{PairOf(a.Record), PairOf(b.Record)}))
					must(t, unix.Shutdown(fd(client), unix.SHUT_WR))
					must(t, unix.Shutdown(fd(server), unix.SHUT_WR))
				case "reset":
					must(t, unix.SetsockoptLinger(fd(client), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
					must(t, client.Close())
					all = all[1:]
				case "ended":
					must(t, unix.Shutdown(fd(client), unix.SHUT_WR))
					must(t, unix.Shutdown(fd(server), unix.SHUT_WR))
				}
				var connections []*Connection
				var before []moving
				var pairs []Pair
				for _, f := range all {
					c := connectionOf(t, f)
					connections = append(connections, c)
					m, err := readMoving(fd(f))
					must(t, err)
					before = append(before, m)
					if m.state != tcpClose {
						pairs = append(pairs, PairOf(c.Record))
					}
				}
				must(t, ReadConnections(connections))
				hold := &Hold{Table: "ocickpt-test", NetNS: netns}
				must(t, hold.Put(pairs))
				for i, c := range connections {
					must(t, Silence([]*Connection{c}))
					must(t, all[i].Close())
				}
				remade := again(t, connections...)
				must(t, (&Hold{Table: "ocickpt-other", NetNS: netns}).Lift())
				must(t, hold.Lift())
				for i, r := range remade {
					now, err := readMoving(r.fd())
					must(t, err)
					t.Logf("%+v %+v", before[i], connections[i].Record.TCP)
					if now.state != before[i].state && i == 0 {
						t.Errorf("end %d is in state %d, was in %d", i, now.state, before[i].state)
					}
					must(t, r.Release())
					if all[i] == client {
						continue
					}
					buf := make([]byte, 100)
					if n, err := unix.Read(r.fd(), buf); string(buf[:max(n, 0)]) != "last words" {
						t.Errorf("%q, %v", buf[:max(n, 0)], err)
					}
					n, err := unix.Read(r.fd(), buf)
					if want := map[bool]error{true: unix.ECONNRESET}[name == "reset"]; name != "closing" && !errors.Is(err, want) || n > 0 {
						t.Errorf("then %d, %v", n, err)
					}
				}
			})
		})
	}
}

// TestSynSent makes a connection again that nobody has answered.
func TestSynSent(t *testing.T) {
	inNewNetwork(t, func(netns string) {
		c := open(t, unix.AF_INET, unix.SOCK_STREAM, 0)
		must(t, unix.SetNonblock(fd(c), true))
		must(t, unix.Bind(fd(c), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 4000}))
		peer := netip.MustParseAddrPort("127.0.0.1:5000")
		hold := &Hold{Table: "ocickpt-test", NetNS: netns}
		must(t, hold.Put([]Pair{{netip.MustParseAddrPort("127.0.0.1:4000"), peer}}))
		if err := unix.Connect(fd(c), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 5000}); err != unix.EINPROGRESS {
			t.Fatal(err)
		}
		one := connectionOf(t, c)
		one.Record.TCP.Peer = rawAddress(peer)
		must(t, ReadConnections([]*Connection{one}))
		must(t, Silence([]*Connection{one}))
		must(t, c.Close())
		l := open(t, unix.AF_INET, unix.SOCK_STREAM, 0)
		must(t, unix.Bind(fd(l), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 5000}))
		must(t, unix.Listen(fd(l), 1))
		r := again(t, one)[0]
		other := connectionOf(t, r.File)
		other.Record.TCP.Peer = one.Record.TCP.Peer
		must(t, ReadConnections([]*Connection{other}))
		if other.Record.TCP.Send.Seq != one.Record.TCP.Send.Seq {
			t.Errorf("its SYN was before %d and is before %d", one.Record.TCP.Send.Seq, other.Record.TCP.Send.Seq)
		}
		must(t, hold.Lift())
		must(t, r.Release())
		must(t, await(r.File, unix.POLLOUT))
		if n, _, err := unix.Accept(fd(l)); err != nil {
			t.Error(err)
		} else {
			unix.Close(n)
		}
	})
}
