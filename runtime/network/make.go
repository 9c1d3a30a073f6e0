package network

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Maker makes what is in network namespaces again. All of it is done by stubs
// that are in them, with no more rights than a task of the container could
// have; the kernel judges. Only sysctls, which the container's /proc shows
// read-only as a rule, are written from outside.
type Maker struct {
	Head *image.Head
	Warn func(msg string, args ...any)

	made map[image.Ref]*made
}

// Place is where a stub stands that fills a namespace.
type Place struct {
	Stub *tracee.Stub
	// Limited runs f while the stub has what the bundle gives, and no more.
	Limited func(f func() error) error
	// Open opens, in the stub, the network namespace that another one is in.
	Open func(other *Place) (fd int, err error)
	Pid  int  // of the stub, in the container's pid namespace
	Own  bool // the namespace is the container's own
}

// made is a namespace that is being filled.
type made struct {
	*Place
	maker   *Maker
	rec     *image.Network
	stub    *tracee.Stub
	path    string
	route   *wire
	index   map[int32]int32  // the image's numbers of devices -> those here
	flags   map[int32]uint32 // by number here
	names   map[string]bool
	all     map[int32]*device // by number here
	given   map[int32]bool    // numbers of devices that were there before, the engine's or a hook's
	changed map[int32]bool    // by the image's number
	joined  []*made           // other ends of veths lie in
	louder  []image.Sysctl    // what quiet has changed
	// attached: tun devices are held open by those who did so, and carry.
	attached bool
}

// Fill puts into the namespace that a stub is in what the image has of ns.
// Devices come first, all down; then packet filters; then addresses, and only
// then they come up.
func (m *Maker) Fill(ns image.Ref, at *Place) error {
	rec := m.Head.Network(ns)
	if rec == nil {
		return nil
	}
	n := &made{
		Place: at, maker: m, rec: rec, stub: at.Stub, path: nsutil.Path(at.Stub.Pid, "net"),
		index: map[int32]int32{}, given: map[int32]bool{}, changed: map[int32]bool{},
	}
	if m.made == nil {
		m.made = map[image.Ref]*made{}
	}
	if err := n.start(); err != nil {
		return err
	}
	m.made[ns] = n
	err := n.setSysctls()
	if err == nil {
		err = n.limited(n.createLinks)
	}
	if err == nil {
		err = n.limited(n.restoreFilters)
	}
	if err != nil {
		return err
	}
	all := append([]*made{n}, n.joined...)
	for _, step := range []func(*made) error{(*made).configure, (*made).raise, (*made).settle, (*made).enter} {
		for _, one := range all {
			if err := step(one); err != nil {
				return err
			}
		}
	}
	return nil
}

// Finish makes sure that nothing is missing, once all namespaces are there.
func (m *Maker) Finish() error {
	for _, n := range m.made {
		if n.waits() {
			return errors.New("the other end of a veth has not been made")
		}
	}
	return nil
}

func (n *made) limited(f func() error) error { return n.Limited(f) }

// start opens the socket through which all goes, and tells the devices that are
// there already.
func (n *made) start() error {
	err := n.limited(func() (err error) {
		n.route, err = openWire(n.stub, unix.NETLINK_ROUTE)
		return err
	})
	if err == nil {
		err = n.look()
	}
	if err != nil {
		return err
	}
	for i := range n.rec.Links {
		l := &n.rec.Links[i]
		if at := n.index[l.Index]; at != 0 && (l.Create != nil || l.Tun != nil) {
			n.given[at] = true
			n.maker.Warn("a network device was there before and stays as it is", "device", l.Name)
		}
	}
	return nil
}

// look tells which devices there are.
func (n *made) look() error {
	n.flags, n.names, n.all = map[int32]uint32{}, map[string]bool{}, map[int32]*device{}
	var list []*device
	err := nsutil.Inside(n.path, func() (err error) {
		list, err = devices()
		return err
	})
	if err != nil {
		return err
	}
	byName := map[string]int32{}
	for _, d := range list {
		at := int32(d.index)
		byName[d.name], n.flags[at], n.names[d.name], n.all[at] = at, d.flags&linkFlags, true, d
	}
	for _, l := range n.rec.Links {
		if at := byName[l.Name]; at != 0 {
			n.index[l.Index] = at
		}
	}
	return nil
}

// ours reports whether a device is there and what is set on it is the image's.
func (n *made) ours(l *image.NetLink) bool {
	at := n.index[l.Index]
	return at != 0 && !l.Outside && !n.given[at]
}

// has reports whether a device has an attribute already.
func (n *made) has(at int32, a attr) bool {
	d := n.all[at]
	if d == nil {
		return false
	}
	now := d.attr(a.number())
	return now != nil && string(now.data) == string(a.data)
}

// allowed says what it means that the kernel forbids something.
func (n *made) allowed(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return err
	}
	return &fail.Error{
		Cause:  fmt.Errorf("the container may not make it: %w", err),
		Remedy: "restore into a bundle that gives what it takes (CAP_NET_ADMIN), or leave the network to the engine (--empty-ns network)",
	}
}

// inOrder does one thing after another.
func inOrder(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// configure gives devices what is set on them.
func (n *made) configure() error {
	return inOrder(
		func() error { return n.limited(n.changeLinks) },
		n.look, n.setSysctls, n.quiet,
		func() error { return n.table(&addresses) },
	)
}

// raise brings devices up, that their addresses can be used at once.
func (n *made) raise() error {
	return inOrder(func() error { return n.limited(n.raiseLinks) }, func() error { return n.table(&addresses) })
}

// enter puts in what goes through devices that are up.
func (n *made) enter() error {
	for _, one := range tablesOf(n.rec) {
		if err := n.table(one.table); err != nil {
			return err
		}
	}
	return n.setSysctls()
}

// table makes the entries of one table those of the image, as far as the devices
// are there that they need.
func (n *made) table(t *table) error {
	here := map[int32]bool{}
	for i := range n.rec.Links {
		if l := &n.rec.Links[i]; n.ours(l) {
			here[n.index[l.Index]] = true
		}
	}
	var want [][]byte
	for _, one := range tablesOf(n.rec) {
		if one.table != t {
			continue
		}
		for _, m := range *one.list {
			e, err := t.entry(m, func(index int32) (int32, bool) { to := n.index[index]; return to, here[to] })
			if err != nil {
				return err
			}
			if e != nil {
				want = append(want, e)
			}
		}
	}
	err := n.limited(func() error {
		return n.allowed(t.restore(n.route, want, func() (list [][]byte, err error) {
			err = nsutil.Inside(n.path, func() error {
				list, err = t.read(func(index int32) (int32, bool) { return index, here[index] })
				return err
			})
			return list, err
		}))
	})
	if n.waits() { // for what it may need too
		return nil
	}
	return err
}

// waits reports whether a device is still to come: a pair whose other end lies
// in a namespace that is made later.
func (n *made) waits() bool {
	return slices.ContainsFunc(n.rec.Links, func(l image.NetLink) bool { return l.PeerNS != 0 && n.index[l.Index] == 0 })
}

// settlePatience bounds the waiting for devices to carry.
const settlePatience = 2 * time.Second

// settle waits until the addresses of IPv6 can be used: that is when their
// device is known to carry (addrconf_notify in net/ipv6/addrconf.c), of which
// the kernel hears up to a second later, or when it is asked about the device
// (rtnl_getlink in net/core/rtnetlink.c).
func (n *made) settle() (err error) {
	for begin, nap := time.Now(), time.Millisecond; ; nap = min(2*nap, 50*time.Millisecond) {
		waiting := false
		err = nsutil.Inside(n.path, func() error {
			list, err := dump(unix.NETLINK_ROUTE, unix.RTM_GETADDR, []byte{0: unix.AF_INET6, unix.SizeofIfAddrmsg - 1: 0})
			for _, m := range list {
				if len(m) < unix.SizeofIfAddrmsg || m[2]&unix.IFA_F_TENTATIVE == 0 || m[2]&unix.IFA_F_DADFAILED != 0 {
					continue
				}
				if at := int32(ne.Uint32(m[4:])); n.carries(at) {
					waiting = true
					err = errors.Join(err, ask(at))
				}
			}
			return err
		})
		if err != nil || !waiting || time.Since(begin) > settlePatience {
			break
		}
		time.Sleep(nap)
	}
	if n.hasTuns() && !n.attached {
		return err
	}
	return errors.Join(err, n.loud())
}

// hasTuns reports whether there are tun devices that carry once somebody has
// them open.
func (n *made) hasTuns() bool {
	return slices.ContainsFunc(n.rec.Links, func(l image.NetLink) bool { return l.Tun != nil && l.Running && n.ours(&l) })
}

// Attached is called when those who had tun devices open have them again.
func (m *Maker) Attached() error {
	for _, n := range m.made {
		if !n.Own || !n.hasTuns() {
			continue
		}
		n.attached = true
		if err := nsutil.Inside(n.path, func() error {
			for i := range n.rec.Links {
				if l := &n.rec.Links[i]; l.Tun != nil && n.ours(l) {
					if err := ask(n.index[l.Index]); err != nil {
						return fail.On("network device "+l.Name, err)
					}
				}
			}
			return nil
		}); err != nil {
			return err
		}
		if err := inOrder(n.settle, n.enter); err != nil {
			return err
		}
	}
	return nil
}

// ask has the kernel look at a device.
func ask(at int32) error {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddRawData(link(at, 0, 0))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// carries reports whether a device is ours, up, and carried at the checkpoint.
func (n *made) carries(at int32) bool {
	return slices.ContainsFunc(n.rec.Links, func(l image.NetLink) bool {
		return n.index[l.Index] == at && n.ours(&l) && l.Flags&unix.IFF_UP != 0 && l.Running && (l.Tun == nil || n.attached)
	})
}

// end is one by whom a pair is made, and the namespaces of its ends as this one
// has them open.
type end struct {
	n           *made
	here, there int
}

// between finds who can make a pair between n and another namespace: who is in
// the container's own, else who is in n.
func (n *made) between(other *made) (e end, err error) {
	e = end{n: n}
	switch {
	case other == n:
	case other.Own:
		e.n = other
		e.here, err = other.Open(n.Place)
	default:
		err = n.limited(func() error {
			e.there, err = n.Open(other.Place)
			return err
		})
	}
	return e, err
}

func (e end) close() error {
	var b tracee.Batch
	for _, fd := range []int{e.here, e.there} {
		if fd != 0 {
			b.Add(unix.SYS_CLOSE, tracee.W(fd))
		}
	}
	if len(b.Calls) == 0 {
		return nil
	}
	_, err := e.n.stub.Run(&b)
	return err
}
