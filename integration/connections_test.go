package integration

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/nsutil"
)

// network is two network namespaces: one for a container, and one for its peers,
// with a bridge.
type network struct {
	t               testing.TB
	inside, outside string // paths
	hook            string // a program that connects a container's own namespace
	mu              sync.Mutex
	resets          []string
	packets         atomic.Int64
}

const (
	insideV4, outsideV4 = "10.77.0.1", "10.77.0.2"
	insideV6, outsideV6 = "fd77::1", "fd77::2"
	insideOther         = "10.77.0.9"
)

// newNetwork makes both. The container's is connected by the hook, or at once.
func newNetwork(t *testing.T, byHook bool) *network {
	t.Helper()
	n := &network{t: t}
	n.outside = n.namespace(t, "outside")
	n.ip(n.outside, "link", "add", "br0", "type", "bridge")
	n.ip(n.outside, "link", "set", "br0", "up")
	n.ip(n.outside, "addr", "add", outsideV4+"/24", "dev", "br0")
	n.ip(n.outside, "addr", "add", outsideV6+"/64", "dev", "br0", "nodad")
	n.hook = filepath.Join(t.TempDir(), "hook")
	// The address of the device must stay, for peers remember it.
	script := `#!/bin/sh -e
		export PATH=/usr/sbin:/usr/bin:/sbin:/bin
		net=$1
		[ -n "$net" ] || net=/proc/$(sed 's/.*"pid":\([0-9]*\).*/\1/')/ns/net
		outside() { nsenter --net=OUT ip "$@"; }
		inside() { nsenter --net=$net ip "$@"; }
		while outside link show dev peer >/dev/null 2>&1; do sleep 0.01; done
		outside link add peer type veth peer name eth0 address 02:00:0a:4d:00:01 netns $net
		outside link set peer master br0 up
		inside link set lo up
		inside link set eth0 up
		inside addr add V4/24 dev eth0
		inside addr add OTHER/24 dev eth0
		inside addr add V6/64 dev eth0 nodad
	`
	script = strings.NewReplacer("OUT", n.outside, "V4", insideV4, "V6", insideV6, "OTHER", insideOther).Replace(script)
	if err := os.WriteFile(n.hook, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	n.watch(n.outside)
	if byHook {
		return n
	}
	n.inside = n.namespace(t, "inside")
	if err := run(n.hook, n.inside); err != nil {
		t.Fatal(err)
	}
	n.watch(n.inside)
	return n
}

// namespace makes one, and a file that leads to it.
func (n *network) namespace(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	err := os.WriteFile(path, nil, 0o600)
	if err == nil {
		err = nsutil.Inside("", func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

// ip runs ip(8) in one of them.
func (n *network) ip(netns string, args ...string) {
	n.t.Helper()
	if err := run("nsenter", append([]string{"--net=" + netns, "ip"}, args...)...); err != nil {
		n.t.Fatal(err)
	}
}

// join puts a container into the namespace, or lets its engine's hook connect it.
func (n *network) join(byHook bool) option {
	return func(_ *container, spec *specs.Spec) {
		if byHook {
			spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: n.hook}}}
			return
		}
		for i := range spec.Linux.Namespaces {
			if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				spec.Linux.Namespaces[i].Path = n.inside
			}
		}
	}
}

// watch looks at every packet of a namespace, as tcpdump does, and notes resets.
func (n *network) watch(name string) {
	n.t.Helper()
	var fd int
	err := nsutil.Inside(name, func() (err error) {
		const all = 0x0300 // htons(ETH_P_ALL)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "packets")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 256); ; {
			got, err := f.Read(buf)
			if err != nil && !errors.Is(err, unix.ENETDOWN) {
				return
			}
			n.packets.Add(1)
			if what, reset := isReset(buf[:max(got, 0)]); reset {
				n.mu.Lock()
				n.resets = append(n.resets, name+": "+what)
				n.mu.Unlock()
			}
		}
	}()
	n.t.Cleanup(func() { f.Close(); <-done })
}

// isReset tells a segment with RST of others.
func isReset(p []byte) (string, bool) {
	const rst = 4
	header := 40
	switch {
	case len(p) > 40 && p[0]>>4 == 4 && p[9] == unix.IPPROTO_TCP:
		header = int(p[0]&15) * 4
	case len(p) > 60 && p[0]>>4 == 6 && p[6] == unix.IPPROTO_TCP:
	default:
		return "", false
	}
	if len(p) < header+14 || p[header+13]&rst == 0 {
		return "", false
	}
	return fmt.Sprintf("%x", p[:header+14]), true
}

// noReset asserts that no reset was seen so far.
func (n *network) noReset(t testing.TB) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.resets) > 0 {
		t.Fatalf("resets: %q", n.resets)
	}
	if n.packets.Load() == 0 {
		t.Fatal("no packets were seen at all")
	}
}

// peer is a client outside of the container.
type peer struct {
	*net.TCPConn
	count  atomic.Uint32 // numbers that have gone through it
	failed atomic.Pointer[error]
	done   chan struct{}
}

// dial connects to the test program from the outside, and says what it wants.
func (n *network) dial(t testing.TB, address, what string) *peer {
	t.Helper()
	p := n.dialPort(t, address, "7000")
	if _, err := p.Write([]byte(what)); err != nil {
		t.Fatal(err)
	}
	return p
}

// dialPort connects from the outside.
func (n *network) dialPort(t testing.TB, address, port string) *peer {
	t.Helper()
	p := &peer{done: make(chan struct{})}
	err := nsutil.Inside(n.outside, func() error {
		c, err := net.Dial("tcp", net.JoinHostPort(address, port))
		if err == nil {
			p.TCPConn = c.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func (p *peer) fail(err error) { p.failed.CompareAndSwap(nil, &err) }

// download reads numbers and checks each.
func (p *peer) download() *peer {
	go func() {
		defer close(p.done)
		var next uint32
		for buf := make([]byte, 64<<10); ; {
			if _, err := io.ReadFull(p, buf); err != nil {
				if !errors.Is(err, net.ErrClosed) {
					p.fail(err)
				}
				return
			}
			for at := 0; at < len(buf); at += 4 {
				if got := binary.LittleEndian.Uint32(buf[at:]); got != next {
					p.fail(fmt.Errorf("number %d instead of %d", got, next))
					return
				}
				next++
			}
			p.count.Store(next)
		}
	}()
	return p
}

// upload sends numbers until finish.
func (p *peer) upload() *peer {
	go func() {
		defer close(p.done)
		var next uint32
		for buf := make([]byte, 64<<10); ; p.count.Store(next) {
			for at := 0; at < len(buf); at += 4 {
				binary.LittleEndian.PutUint32(buf[at:], next)
				next++
			}
			if _, err := p.Write(buf); err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					p.fail(err)
				}
				return
			}
		}
	}()
	return p
}

// flows asserts that numbers go on through it.
func (p *peer) flows(t testing.TB) {
	t.Helper()
	before := p.count.Load()
	if !waitFor(func() bool { return p.count.Load() > before+100_000 || p.failed.Load() != nil }) {
		t.Fatalf("the stream stands still at %d", before)
	}
	if err := p.failed.Load(); err != nil {
		t.Fatalf("after %d numbers: %v", p.count.Load(), *err)
	}
}

// echoes asserts that a line comes back.
func (p *peer) echoes(t testing.TB, line string) {
	t.Helper()
	p.asks(t, line, line)
}

// asks asserts what is answered.
func (p *peer) asks(t testing.TB, line, answer string) {
	t.Helper()
	p.SetDeadline(time.Now().Add(patience))
	got := make([]byte, len(answer))
	if _, err := p.Write([]byte(line)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p, got); err != nil || string(got) != answer {
		t.Fatalf("%q came back for %q: %v", got, line, err)
	}
}

// clients are connections of every kind.
type clients struct {
	n                    *network
	down, down6, up, lag *peer
	echo                 []*peer
	half, late           *peer
}

func (n *network) clients(t *testing.T, idle int) *clients {
	c := &clients{n: n}
	if !waitFor(func() bool {
		return nsutil.Inside(n.outside, func() error {
			p, err := net.Dial("tcp", net.JoinHostPort(insideV6, "7000"))
			if err == nil {
				p.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, p)
				p.Close()
			}
			return err
		}) == nil
	}) {
		t.Fatal("nobody listens")
	}
	c.down, c.down6 = n.dial(t, insideV4, "D").download(), n.dial(t, insideV6, "D").download()
	c.up = n.dial(t, insideV4, "U").upload()
	c.lag = n.dial(t, insideV4, "D") // nobody reads it
	for i := range idle {
		c.echo = append(c.echo, n.dial(t, []string{insideV4, insideV6}[i%2], "E"))
	}
	c.half, c.late = n.dial(t, insideV4, "H"), n.dial(t, insideV6, "W")
	if _, err := c.half.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	if err := c.late.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	c.good(t)
	return c
}

// good asserts that all live, the fast ones first: the others wait for them.
func (c *clients) good(t testing.TB) {
	t.Helper()
	for _, p := range []*peer{c.down, c.down6, c.up} {
		p.flows(t)
	}
	for i, p := range c.echo {
		p.echoes(t, fmt.Sprintf("line %d\n", i))
	}
	var block [4096]byte
	if _, err := c.half.Write(block[:0]); err != nil {
		t.Fatal(err)
	}
	c.n.noReset(t)
}

// finish ends all and looks at what comes at the end.
func (c *clients) finish(t testing.TB, box *container) {
	t.Helper()
	c.up.SetWriteDeadline(time.Now())
	<-c.up.done
	// What was written in part is sent to the end of its number.
	var half [4]byte
	sent := c.up.count.Load()
	c.lag.download().flows(t)
	for i := range uint32(1000) {
		binary.LittleEndian.PutUint32(half[:], i)
		if _, err := c.half.Write(half[:]); err != nil {
			t.Fatal(err)
		}
	}
	c.n.noReset(t)
	box.must(os.WriteFile(box.out("connections.go"), nil, 0o600))
	c.late.SetDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(c.late); string(got) != "late\n" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	_ = sent
	box.progress(5)
}

// TestConnections keeps connections to peers outside over a checkpoint, in a network
// namespace that stays, and in one of the container's own that hooks connect.
func TestConnections(t *testing.T) {
	for name, byHook := range map[string]bool{"namespace that stays": false, "namespace of its own": true} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(t, byHook)
			c := newContainer(t, withReport("connections"), withArgs("/bin/connections"), withVaryingThreads(), n.join(byHook)).run()
			c.progress(5)
			peers := n.clients(t, 100)
			for range 2 {
				c.checkpoint("--tcp-established")
				c.mustBeGone()
				if held := n.tables(); !byHook && !strings.Contains(held, "ocickpt-") {
					t.Errorf("nothing holds the packets: %q", held)
				}
				time.Sleep(100 * time.Millisecond)
				c.restore()
				if held := n.tables(); strings.Contains(held, "ocickpt-") {
					t.Errorf("packets are still held: %q", held)
				}
				c.progress(10)
				peers.good(t)
			}
			c.checkpoint("--tcp-established", "--leave-running")
			c.progress(10)
			peers.good(t)
			peers.finish(t, c)
		})
	}
}

// TestConnectionFaults kills ocickpt where connections are in repair mode or held.
func TestConnectionFaults(t *testing.T) {
	n := newNetwork(t, false)
	c := newContainer(t, withReport("connections"), withArgs("/bin/connections"), withVaryingThreads(), n.join(false)).run()
	c.progress(5)
	peers := n.clients(t, 4)
	for _, fault := range []string{"tcp.read#1:kill", "tcp.read#5:kill", "tcp.read#3:fail", "write the contents:kill", "tcp.silent:fail", "tcp.silent:kill"} {
		c.step(t, fault, func(t *testing.T) {
			t.Setenv(envFault, fault)
			if r := c.ocickpt("checkpoint", "--tcp-established", "--image", filepath.Join(c.dir, "faulty"), c.id); r.code == 0 {
				t.Error("the checkpoint worked")
			}
			t.Setenv(envFault, "")
			c.progress(5)
			peers.good(t)
			if !waitFor(func() bool { return n.tables() == "" }) {
				t.Errorf("packets are still held: %s", n.tables())
			}
		})
	}
	// Behind this point the container has gone, and the image is whole.
	t.Setenv(envFault, "tcp.sealed:kill")
	c.ocickpt("checkpoint", "--tcp-established", "--image-path", c.newImage(), c.id)
	t.Setenv(envFault, "")
	<-c.gone
	c.runc("delete", "--force", c.id)
	for _, fault := range []string{"finish tasks:kill", "restore.detach:fail"} {
		t.Setenv(envFault, fault)
		if r := c.tryRestore(); r.code == 0 {
			t.Errorf("%s: the restore worked", fault)
		}
		t.Setenv(envFault, "")
		// A guardian takes away what is left.
		if !waitFor(func() bool { return len(survivors(c)) == 0 && c.tryRunc("state", c.id).code != 0 }) {
			t.Fatalf("%s: processes survive: %v", fault, survivors(c))
		}
		n.noReset(t)
	}
	t.Setenv(envFault, "restore.sealed:kill")
	c.tryRestore()
	t.Setenv(envFault, "")
	c.adopt()
	c.progress(5)
	peers.good(t)
	if n.tables() != "" {
		t.Errorf("packets are still held: %s", n.tables())
	}
}

// TestConnectionChoices asks for the other ways to treat connections.
func TestConnectionChoices(t *testing.T) {
	n := newNetwork(t, false)
	c := newContainer(t, withReport("connections"), withArgs("/bin/connections", "alone"), withVaryingThreads(), n.join(false)).run()
	c.progress(5)
	p := n.dial(t, insideV4, "E")
	p.echoes(t, "before\n")
	c.step(t, "not asked for", func(t *testing.T) {
		c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "survey", "connections)", insideV4, outsideV4, "--tcp-established")
		p.echoes(t, "refused\n")
	})
	var late *peer
	dial := func() { late = n.dial(t, insideV4, "E") }
	c.step(t, "in flight", func(t *testing.T) {
		c.runc("pause", c.id)
		dial()
		c.ocickpt("checkpoint", "--tcp-established", "--image-path", c.newImage(), c.id).mustRefuse(t, "1 connections to [::]:7000", "--tcp-skip-in-flight")
	})
	c.step(t, "skipped", func(t *testing.T) {
		r := c.checkpoint("--tcp-established", "--tcp-skip-in-flight")
		if !strings.Contains(r.stderr, "they are reset") {
			t.Errorf("no warning: %s", r.stderr)
		}
		c.mustBeGone()
		late.SetDeadline(time.Now().Add(patience))
		if _, err := late.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the connection in flight: %v", err)
		}
	})
	c.step(t, "address", func(t *testing.T) {
		// To the peer nothing may change: it has somebody who translates.
		nft := exec.Command("nsenter", "--net="+n.outside, "nft", "-f", "-")
		nft.Stdin = strings.NewReader(strings.NewReplacer("OLD", insideV4, "NEW", insideOther).Replace(`table ip moved {
			chain out { type route hook output priority -300; ip daddr OLD ip daddr set NEW; }
			chain in { type filter hook prerouting priority -300; ip saddr NEW ip saddr set OLD; }
		}`))
		c.must(runCmd(nft))
		n.ip(n.inside, "addr", "del", insideV4+"/24", "dev", "eth0")
		n.ip(n.inside, "addr", "add", insideOther+"/24", "dev", "eth0")
		c.tryRestoreFile(filepath.Join(c.image(), "checkpoint.img"), c.bundle).mustRefuse(t, insideV4, outsideV4)
		c.restore("--address-map", insideV4+"="+insideOther)
		p.echoes(t, "moved\n")
		c.progress(5)
	})
	c.step(t, "closed", func(t *testing.T) {
		c.checkpoint("--tcp-established")
		c.mustBeGone()
		c.restore("--tcp-close")
		c.progress(5)
		if !waitFor(func() bool { return established(c.state().Pid) == 0 }) {
			t.Errorf("%d connections are left", established(c.state().Pid))
		}
	})
}

// TestManyConnections keeps as many as OCICKPT_TEST_CONNECTIONS says.
func TestManyConnections(t *testing.T) {
	count, err := strconv.Atoi(cmp.Or(os.Getenv("OCICKPT_TEST_CONNECTIONS"), "500"))
	if err != nil {
		t.Fatal(err)
	}
	n := newNetwork(t, false)
	c := newContainer(t, withReport("connections"), withArgs("/bin/connections", "many"), withNofile(), n.join(false)).run()
	c.progress(5)
	var peers []*peer
	for i := range count {
		peers = append(peers, n.dial(t, []string{insideV4, insideV6}[i%2], "x"))
	}
	all := func() {
		t.Helper()
		for i, p := range peers {
			p.echoes(t, fmt.Sprintf("x%d", i)[1:])
		}
	}
	for _, p := range peers {
		p.SetDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(p, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	all()
	c.checkpoint("--tcp-established", "--leave-running")
	all()
	c.checkpoint("--tcp-established")
	c.mustBeGone()
	r := c.restore("--tcp-established")
	t.Logf("restored in %v", r.took)
	all()
	c.progress(5)
	n.noReset(t)
}

// withNofile lets processes have as many descriptors as this one could.
func withNofile() option {
	return func(c *container, spec *specs.Spec) {
		var limit unix.Rlimit
		c.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: limit.Max, Soft: limit.Max}}
	}
}

// TestRedisTransaction leaves a client in the middle of a transaction.
func TestRedisTransaction(t *testing.T) {
	n := newNetwork(t, true)
	c := newContainer(t, withHostPrograms(), withVaryingThreads(), n.join(true),
		withArgs("/usr/bin/redis-server", "--port", "7000", "--protected-mode", "no", "--save", "", "--daemonize", "no")).run()
	var p *peer
	answers := func(command, want string) {
		t.Helper()
		p.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(p, command+"\r\n"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(p, got); err != nil || string(got) != want {
			t.Fatalf("%s: %q, %v", command, got, err)
		}
	}
	if !waitFor(func() bool {
		return nsutil.Inside(n.outside, func() error {
			conn, err := net.Dial("tcp", insideV4+":7000")
			if err == nil {
				conn.Close()
			}
			return err
		}) == nil
	}) {
		t.Fatal("redis does not listen")
	}
	p = n.dial(t, insideV4, "")
	answers("SET a 1", "+OK\r\n")
	answers("MULTI", "+OK\r\n")
	answers("INCR a", "+QUEUED\r\n")
	c.checkpoint("--tcp-established")
	c.mustBeGone()
	c.restore()
	answers("INCR a", "+QUEUED\r\n")
	answers("EXEC", "*2\r\n:2\r\n:3\r\n")
	n.noReset(t)
}

// tables lists the nftables of the container's namespace.
func (n *network) tables() string {
	out, _ := exec.Command("nsenter", "--net="+n.inside, "nft", "list", "tables").CombinedOutput()
	return string(bytes.TrimSpace(out))
}
