package network

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Attributes of a tun device (include/uapi/linux/if_link.h).
const (
	tunOwner      = 1 // IFLA_TUN_OWNER
	tunGroup      = 2
	tunType       = 3
	tunPI         = 4
	tunVnetHdr    = 5
	tunPersist    = 6
	tunMultiQueue = 7
)

const noOwner = ^uint32(0)

// describeTun makes the record of a tun or tap device. One that goes with its
// descriptors, when these are held outside, is the engine's.
func (s *Scan) describeTun(sp *Space, d *device, l *image.NetLink) {
	data := d.data()
	on := func(kind uint16) bool {
		a := find(data, kind)
		return a != nil && len(a.data) > 0 && a.data[0] != 0
	}
	t := &image.Tun{Flags: unix.IFF_TUN, Owner: noOwner, Group: noOwner, Persist: on(tunPersist)}
	if !t.Persist && !s.Tuns[sp.Inode][d.name] {
		l.Outside = true
		return
	}
	if a := find(data, tunType); a != nil && len(a.data) > 0 && a.data[0] == unix.IFF_TAP {
		t.Flags = unix.IFF_TAP
	}
	if !on(tunPI) {
		t.Flags |= unix.IFF_NO_PI
	}
	if on(tunVnetHdr) {
		t.Flags |= unix.IFF_VNET_HDR
	}
	if on(tunMultiQueue) {
		t.Flags |= unix.IFF_MULTI_QUEUE
	}
	if a := find(data, tunOwner); a != nil {
		t.Owner = s.IDs.User(a.u32())
	}
	if a := find(data, tunGroup); a != nil {
		t.Group = s.IDs.Group(a.u32())
	}
	l.Tun = t
	l.Change = put(nil, append(pick(d.list, commonLink...), pick(d.list, unix.IFLA_MASTER, unix.IFLA_IFALIAS, unix.IFLA_PROP_LIST)...)...)
	if mode := d.addrGenMode(); mode != 0 {
		l.Change = put(l.Change, addrGenMode(mode))
	}
}

// TunDevice is the device that makes tun devices, in the container.
const TunDevice = "/dev/net/tun"

// createTun makes a tun device that stays, for whoever has it open to attach to.
// Who attaches last takes that away where it went with its descriptors.
func (n *made) createTun(l *image.NetLink) error {
	var open, set tracee.Batch
	open.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), open.String(TunDevice), tracee.W(unix.O_RDWR|unix.O_CLOEXEC))
	if _, err := n.stub.Run(&open); err != nil {
		return fmt.Errorf("%s cannot be opened in the container: %w", TunDevice, err)
	}
	fd := open.Calls[0].Ret
	index := set.Put(ne.AppendUint32(nil, uint32(l.Index)))
	set.Try(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.TUNSETIFINDEX), index)
	at := AttachTun(&set, int(fd), l.Name, l.Tun.Flags)
	if l.Tun.Owner != noOwner {
		set.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.TUNSETOWNER), tracee.W(l.Tun.Owner))
	}
	if l.Tun.Group != noOwner {
		set.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.TUNSETGROUP), tracee.W(l.Tun.Group))
	}
	set.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.TUNSETPERSIST), tracee.W(1))
	set.Add(unix.SYS_CLOSE, tracee.W(fd))
	if _, err := n.stub.Run(&set); err != nil {
		if set.Err(at) != nil {
			err = set.Err(at)
		}
		return n.allowed(err)
	}
	return nil
}

// AttachTun adds the call that makes an open /dev/net/tun the device of a name,
// or a queue of it (TUNSETIFF), and returns its index.
func AttachTun(b *tracee.Batch, fd int, name string, flags uint32) int {
	req := make([]byte, 40) // sizeof(struct ifreq)
	copy(req[:unix.IFNAMSIZ-1], name)
	ne.PutUint16(req[unix.IFNAMSIZ:], uint16(flags))
	return b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.TUNSETIFF), b.Put(req))
}
