package runtime

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/sock"
)

// A connection of TCP has a peer that goes on. Nothing may be lost to it between the
// moment at which the connection is read and the one at which it lives again, and it
// must not hear of an end:
//
//	checkpoint   hold packets │ freeze, read in repair mode, thaw │ ... commit │ freeze, repair mode, seal │ kill
//	restore      hold packets │ create, connect in repair mode, fill ... detach │ seal, lift, end repair │ thaw
//
// With --leave-running nothing is held: each is read until it has not changed meanwhile.

// readConnections completes the records of connections. The tasks are frozen as long
// as one may be in repair mode, in which a read from it would fail.
func (k *checkpoint) readConnections(ctx context.Context) error {
	k.warnOfOrphans()
	all := k.census.files.Connections()
	if err := k.holdPackets(all); err != nil {
		return err
	}
	if len(all) == 0 {
		return nil
	}
	return k.frozen(ctx, all, func() error { return sock.ReadConnections(all) })
}

// warnOfOrphans tells of connections that end with the container's network namespace.
func (k *checkpoint) warnOfOrphans() {
	in := k.census.files.Inside()
	if in == nil || k.LeaveRunning || k.c.netns() != nsutil.Path(k.c.initPid, "net") {
		return
	}
	for _, what := range in.Orphans() {
		k.c.warn("connections of TCP are left out: %s", what)
	}
}

// holdPackets keeps the packets of the connections off, and new ones.
func (k *checkpoint) holdPackets(all []*sock.Connection) error {
	if k.LeaveRunning || !k.TCPEstablished {
		return nil
	}
	if pairs := pairsOf(records(all)); len(pairs) > 0 {
		hold := &sock.Hold{Table: sock.HoldName(k.head.header.ID), NetNS: k.c.netns()}
		if _, err := k.guard.Promise(guardian.Lift(hold.NetNS, hold.Table)); err != nil {
			return err
		}
		k.c.record.Hold = hold.Table
		if err := hold.Put(pairs); err != nil {
			return err
		}
	}
	return k.holdArrivals()
}

// holdArrivals keeps peers from making connections that would be reset at once, as
// long as the container is stopped. They try again.
func (k *checkpoint) holdArrivals() error {
	listeners := k.census.files.Listeners()
	if len(listeners) == 0 {
		return nil
	}
	var sockets []*image.Socket
	for _, l := range listeners {
		sockets = append(sockets, l.Record)
	}
	k.arrivals = &sock.Hold{Table: sock.HoldName(k.head.header.ID) + "-new", NetNS: k.c.netns()}
	if _, err := k.guard.Promise(guardian.Lift(k.arrivals.NetNS, k.arrivals.Table)); err != nil {
		return err
	}
	if err := k.arrivals.PutArrivals(sockets); err != nil {
		return err
	}
	for i := range listeners {
		if err := k.census.files.Inside().CheckInFlight(&listeners[i]); err != nil {
			return err
		}
	}
	return nil
}

func records(all []*sock.Connection) (out []*image.Socket) {
	for _, c := range all {
		out = append(out, c.Record)
	}
	return out
}

// pairsOf are the addresses of those that have a peer.
func pairsOf(all []*image.Socket) (pairs []sock.Pair) {
	for _, s := range all {
		if s.TCP.Peer != nil {
			pairs = append(pairs, sock.PairOf(s))
		}
	}
	return pairs
}

// netns is the path of the container's network namespace, one that is there for as
// long as the namespace.
func (c *container) netns() string {
	for i := range c.record.Namespaces {
		switch n := &c.record.Namespaces[i]; {
		case n.Type != "net":
		case n.Host:
			return "/proc/self/ns/net"
		case n.Path != "":
			return n.Path
		}
	}
	return nsutil.Path(c.initPid, "net")
}

// frozen freezes the tasks, so that none runs on if we die, and promises to end the
// repair of their connections.
func (k *checkpoint) frozen(ctx context.Context, all []*sock.Connection, act func() error) error {
	if err := k.halt.Freeze(ctx); err != nil {
		return err
	}
	var entries []guardian.Entry
	open := map[int][]guardian.Repaired{}
	for _, c := range all {
		open[c.Pid] = append(open[c.Pid], guardian.NewRepaired(c.FD, c.Reusable()))
	}
	err := promiseRepair(open, func(u guardian.Undo) error {
		e, err := k.guard.Promise(u)
		entries = append(entries, e)
		return err
	})
	if err == nil {
		err = act()
	}
	if k.sealed {
		return err
	}
	for _, e := range entries {
		if e != 0 {
			err = errors.Join(err, k.guard.Strike(e))
		}
	}
	return errors.Join(err, k.halt.Thaw(ctx))
}

// promiseRepair makes the promises for sockets, by the pids of those who have them.
func promiseRepair(open map[int][]guardian.Repaired, promise func(guardian.Undo) error) error {
	for _, pid := range slices.Sorted(maps.Keys(open)) {
		for some := range slices.Chunk(open[pid], guardian.MaxRepaired) {
			undo, err := guardian.Unrepair(pid, some)
			if err == nil {
				err = promise(undo)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// silence puts all connections into repair mode, in which they end without a word,
// and makes the end of the container the only way out of it.
func (k *checkpoint) silence(ctx context.Context) error {
	all := k.census.files.Connections()
	if len(all) == 0 {
		return nil
	}
	return k.frozen(ctx, all, func() error {
		err := k.silenceAll(all)
		if err != nil {
			for _, c := range all {
				err = errors.Join(err, sock.Unrepair(c.Pid, c.FD, c.Reusable()))
			}
		}
		return err
	})
}

func (k *checkpoint) silenceAll(all []*sock.Connection) error {
	if err := sock.Silence(all); err != nil {
		return err
	}
	if err := fault.Point("tcp.silent"); err != nil {
		return err
	}
	_, err := k.guard.Prepare(guardian.RemoveCgroups(slices.Collect(maps.Values(k.c.cgroupPaths))))
	if err == nil && k.arrivals != nil {
		_, err = k.guard.Prepare(guardian.Lift(k.arrivals.NetNS, k.arrivals.Table))
	}
	if err == nil {
		err = k.guard.Seal()
	}
	if err != nil {
		return err
	}
	k.sealed = true
	return fault.Point("tcp.sealed")
}

// admitArrivals lets others have the container's ports when it has gone.
func (k *checkpoint) admitArrivals() error {
	if k.arrivals == nil || k.c.netns() == nsutil.Path(k.c.initPid, "net") {
		return nil // gone with it
	}
	return k.arrivals.Lift()
}

// changeConnections makes of the image's connections what the caller wants.
func (r *restore) changeConnections() {
	connections := r.connections()
	inside := map[sock.Pair]bool{}
	for _, s := range connections {
		inside[sock.PairOf(s)] = true
	}
	for _, s := range connections {
		p := sock.PairOf(s)
		if inside[sock.Pair{Local: p.Peer, Peer: p.Local}] {
			s.TCP.Peer = sock.Readdress(s.TCP.Peer, r.AddressMap)
		}
	}
	for _, o := range r.head.Objects {
		if f, ok := o.(*image.File); ok && f.Socket != nil && (f.Socket.Family == unix.AF_INET || f.Socket.Family == unix.AF_INET6) {
			f.Socket.Address, f.Socket.Peer = sock.Readdress(f.Socket.Address, r.AddressMap), sock.Readdress(f.Socket.Peer, r.AddressMap)
		}
	}
	if r.TCPClose {
		for _, s := range connections {
			sock.Reset(s)
		}
	}
}

// connections are those of the image that have a peer.
func (r *restore) connections() (all []*image.Socket) {
	for _, o := range r.head.Objects {
		if f, ok := o.(*image.File); ok && f.Socket != nil && f.Socket.TCP != nil && f.Socket.TCP.Peer != nil {
			all = append(all, f.Socket)
		}
	}
	return all
}

// holdIn keeps the packets of connections off in a network namespace that they are
// going to be made in.
func (r *restore) holdIn(netns string) error {
	hold := &sock.Hold{Table: sock.HoldName(r.head.Header.ID) + "-restore", NetNS: netns}
	if _, err := r.guard.Promise(guardian.Lift(netns, hold.Table)); err != nil {
		return err
	}
	r.holds = append(r.holds, hold)
	if r.head.Container.Hold != "" { // may still be there
		r.holds = append(r.holds, &sock.Hold{Table: sock.HoldName(r.head.Header.ID), NetNS: netns})
	}
	return hold.Put(pairsOf(r.connections()))
}

// holdPackets sees to it that the packets are kept off before the container is on a
// network: one that it joins or shares is here now, in one of its own the first thing
// that can be done is the first hook, before those that bring devices in.
func (r *restore) holdPackets(config *configs.Config) error {
	if len(r.connections()) == 0 {
		return nil
	}
	switch path := config.Namespaces.PathOf(configs.NEWNET); {
	case path != "":
		return r.holdIn(path)
	case !config.Namespaces.Contains(configs.NEWNET):
		return r.holdIn("/proc/self/ns/net")
	}
	first := configs.NewFunctionHook(func(s *specs.State) error { return r.holdIn(nsutil.Path(s.Pid, "net")) })
	if config.HasHook(configs.Prestart, configs.CreateRuntime) {
		config.Hooks[configs.Prestart] = append(configs.HookList{first}, config.Hooks[configs.Prestart]...)
	}
	return nil
}

// holdLate is holdPackets for a network namespace of the container's own that no hook
// has worked on: its devices come when it is there.
func (r *restore) holdLate(pid int) error {
	if len(r.connections()) == 0 || len(r.holds) > 0 {
		return nil
	}
	return r.holdIn(nsutil.Path(pid, "net"))
}

// quietly runs what makes libcontainer warn of a hook that it cannot write down.
func quietly(act func() error) error {
	level := logrus.GetLevel()
	logrus.SetLevel(logrus.ErrorLevel)
	defer logrus.SetLevel(level)
	return act()
}

// revive lets the connections live, which cannot be undone: what they take from their
// peers is in no image. From here on the guardian would go on, too.
func (r *restore) revive() error {
	if len(r.holds) == 0 && !r.maker.HasConnections() {
		return nil
	}
	if err := r.prepareRevival(); err != nil {
		return err
	}
	if err := r.guard.Seal(); err != nil {
		return err
	}
	if err := fault.Point("restore.sealed"); err != nil {
		return err
	}
	for _, h := range r.holds {
		if err := h.Lift(); err != nil {
			return err
		}
	}
	return r.maker.Revive()
}

func (r *restore) prepareRevival() error {
	var undos []guardian.Undo
	if !r.LeaveFrozen {
		undos = append(undos, guardian.Write(r.cgroup.ThawWrite()))
	}
	for _, h := range r.holds {
		undos = append(undos, guardian.Lift(h.NetNS, h.Table))
	}
	err := promiseRepair(r.repaired(), func(u guardian.Undo) error { undos = append(undos, u); return nil })
	if err != nil {
		return err
	}
	for _, u := range undos {
		if _, err := r.guard.Prepare(u); err != nil {
			return err
		}
	}
	return nil
}

// repaired lists the descriptors of connections by the pids of the tasks that have
// them, threads with tables of their own included.
func (r *restore) repaired() map[int][]guardian.Repaired {
	open := map[int][]guardian.Repaired{}
	add := func(pid int, table image.Ref) {
		for _, d := range r.head.Files(table).Descriptors {
			if s := r.head.File(d.File).Socket; s != nil && s.TCP != nil {
				open[pid] = append(open[pid], guardian.NewRepaired(int(d.FD), sock.Reusable(s)))
			}
		}
	}
	for _, t := range r.head.Tasks {
		if stub := r.stubs[int(t.Pid)]; stub != nil {
			add(stub.Pid, t.Files)
		}
		threads := r.threads[int(t.Pid)] // without a leader that has ended
		for i := range threads {
			if table := t.Threads[len(t.Threads)-len(threads)+i].Files; table != 0 {
				add(threads[i].Tid, table)
			}
		}
	}
	return open
}

// ParseAddressMap reads pairs OLD=NEW.
func ParseAddressMap(pairs []string) (map[netip.Addr]netip.Addr, error) {
	out := map[netip.Addr]netip.Addr{}
	for _, p := range pairs {
		from, to, _ := strings.Cut(p, "=")
		old, err := netip.ParseAddr(from)
		now, e := netip.ParseAddr(to)
		if err != nil || e != nil || old.Is4() != now.Is4() {
			return nil, fmt.Errorf("address map %q: it is OLD=NEW, two addresses of IPv4 or two of IPv6", p)
		}
		out[old] = now
	}
	return out, nil
}
