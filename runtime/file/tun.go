package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/network"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	tunGetDevNetNS = 0x54e3 // TUNGETDEVNETNS, Linux 5.3
	tunDetached    = 0x0400 // IFF_DETACH_QUEUE
	tunPersistent  = 0x0800 // IFF_PERSIST
	// tunChosen are the flags that TUNSETIFF takes.
	tunChosen = unix.IFF_TUN | unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
)

// tun is a queue of a tun or tap device, which the room of networks makes.
// Packets that wait in it are dropped, as any network may.
var tun = kind{
	name: image.KindTun,
	is: func(_ *Set, one *seen) bool {
		return one.format() == unix.S_IFCHR && one.stat.Rdev == unix.Mkdev(10, 200)
	},
	read: func(s *Set, d *Description) error {
		f, err := d.seen.own()
		if err != nil {
			return err
		}
		defer f.Close()
		d.Record.Kind, d.Record.Path, d.Record.Tun = image.KindTun, d.seen.link, &image.TunFile{}
		if err := s.inPlace(d); err != nil {
			return err
		}
		return s.readTun(int(f.Fd()), d.Record.Tun)
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return openPath(b, network.TunDevice, f.Flags), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) {
		if t := f.Tun; t.Device != "" {
			network.AttachTun(b, fd, t.Device, t.Flags&tunChosen)
			number := func(request uint, v int32) {
				b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(request), b.Put(binary.LittleEndian.AppendUint32(nil, uint32(v))))
			}
			number(unix.TUNSETSNDBUF, t.SndBuf)
			if t.Flags&unix.IFF_VNET_HDR != 0 {
				number(unix.TUNSETVNETHDRSZ, t.Header)
			}
			if !t.Persist { // it was made so that it waits for this one
				b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.TUNSETPERSIST), tracee.W(0))
			}
		}
		setFlags(b, fd, f.Flags)
	},
}

func (s *Set) readTun(fd int, t *image.TunFile) error {
	var req [40]byte // struct ifreq
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNGETIFF, uintptr(unsafe.Pointer(&req[0])))
	if errno == unix.EBADFD {
		return nil // of no device yet
	}
	if errno != 0 {
		return fmt.Errorf("TUNGETIFF: %w", errno)
	}
	t.Device, t.Flags = unix.ByteSliceToString(req[:unix.IFNAMSIZ]), uint32(binary.LittleEndian.Uint16(req[unix.IFNAMSIZ:]))
	t.Persist = t.Flags&tunPersistent != 0
	if t.Flags&tunDetached != 0 {
		return fail.Refuse("", "it is a queue that its device does not use (TUNSETQUEUE), which is not supported", "close it before the checkpoint")
	}
	t.Flags &= tunChosen
	ns, err := unix.IoctlRetInt(fd, tunGetDevNetNS)
	if err != nil {
		return fmt.Errorf("TUNGETDEVNETNS: %w", err)
	}
	defer unix.Close(ns)
	var st unix.Stat_t
	if err := unix.Fstat(ns, &st); err != nil {
		return fmt.Errorf("TUNGETDEVNETNS: %w", err)
	}
	if st.Ino != s.NetNS {
		return fail.Refuse("", "the device "+t.Device+" belongs to another network namespace than the container's; that is not supported yet", "close it before the checkpoint")
	}
	if s.tuns == nil {
		s.tuns = map[uint64]map[string]bool{s.NetNS: {}}
	}
	s.tuns[s.NetNS][t.Device] = true
	sndbuf, err := unix.IoctlGetInt(fd, unix.TUNGETSNDBUF)
	header, e := unix.IoctlGetInt(fd, unix.TUNGETVNETHDRSZ)
	t.SndBuf, t.Header = int32(sndbuf), int32(header)
	return errors.Join(err, e)
}

// Tuns are the names of tun devices that are open, by the inode of their network
// namespace.
func (s *Set) Tuns() map[uint64]map[string]bool { return s.tuns }
