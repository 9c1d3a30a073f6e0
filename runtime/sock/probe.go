package sock

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
)

// inOwnNetwork runs f in a network namespace that is gone afterwards.
func inOwnNetwork(f func(netns string) error) error {
	return nsutil.Inside("", func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		return f(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	})
}

// ProbeRepair takes a socket into repair mode.
func ProbeRepair() error {
	return inOwnNetwork(func(string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		defer unix.Close(fd)
		if err := setRepair(fd, repairOn); err != nil {
			return err
		}
		_, err = readWindow(fd)
		return err
	})
}

// ProbeHold makes a table that holds packets off.
func ProbeHold() error {
	return inOwnNetwork(func(netns string) error {
		at := netip.MustParseAddrPort("127.0.0.1:1")
		h := &Hold{Table: HoldName([16]byte{}), NetNS: netns}
		if err := h.Put([]Pair{{at, at}}); err != nil {
			return err
		}
		h.Table += "-new"
		return h.PutArrivals([]*image.Socket{{Address: rawAddress(at)}})
	})
}
