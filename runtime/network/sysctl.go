package network

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
)

// sysctlDir shows the network namespace of the thread that looks at it.
const sysctlDir = "/proc/sys/net"

// readSysctls reads what can be set in the calling thread's namespace. The
// kernel lets nobody outside the first one set what is everybody's.
func readSysctls() (map[string]string, error) {
	out := map[string]string{}
	buf := make([]byte, os.Getpagesize())
	err := filepath.WalkDir(sysctlDir, func(file string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil // it can only be written, to have something done
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IWUSR == 0 {
			return err
		}
		if n, err := unix.Read(fd, buf); err == nil && n < len(buf) { // else it has no value yet
			out[file[len(sysctlDir)+1:]] = string(bytes.TrimSuffix(buf[:n], []byte("\n")))
		}
		return nil
	})
	return out, err
}

// ofDevice splits the name of a sysctl that each device has.
func ofDevice(name string) (device, general string, ok bool) {
	p := strings.Split(name, "/")
	if len(p) < 4 || p[1] != "conf" && p[1] != "neigh" {
		return "", "", false
	}
	device = p[2]
	p[2] = "default"
	return device, strings.Join(p, "/"), device != "all" && device != "default"
}

// changedSysctls lists those that a new namespace, or a new device, would not
// have.
func (s *Scan) changedSysctls(sp *Space) ([]image.Sysctl, error) {
	now := s.Sysctls[sp.Inode]
	if now == nil {
		var err error
		if now, err = readSysctls(); err != nil {
			return nil, fmt.Errorf("sysctls: %w", err)
		}
		s.Sysctls[sp.Inode] = now
	}
	ours := map[string]bool{}
	for _, l := range sp.Record.Links {
		ours[l.Name] = !l.Outside
	}
	var out []image.Sysctl
	for _, name := range slices.Sorted(maps.Keys(now)) {
		value := now[name]
		was, known := s.usual.sysctls[name]
		if device, general, ok := ofDevice(name); ok {
			if !ours[device] {
				continue
			}
			if !known {
				was, known = s.usual.sysctls[general]
			}
			known = known && value == now[general]
		}
		if !known || value != was {
			out = append(out, image.Sysctl{Name: name, Value: value})
		}
	}
	return out, nil
}

// setSysctls sets those of the image that have another value and whose device is
// there. Some change others: a second look finds these.
func (n *made) setSysctls() error {
	list := slices.DeleteFunc(slices.Clone(n.rec.Sysctls), func(s image.Sysctl) bool {
		device, _, ok := ofDevice(s.Name)
		return ok && !n.names[device]
	})
	return eachSysctl(n, append(list, list...), func(root *os.Root, s image.Sysctl) error {
		if err := setSysctl(root, s); err != nil {
			n.maker.Warn("a sysctl of a network namespace is not set", "name", path.Join("net", s.Name), "value", s.Value, "error", err)
		}
		return nil
	})
}

// eachSysctl calls f, on a thread in the namespace, for each of a list.
func eachSysctl[T any](n *made, list []T, f func(root *os.Root, one T) error) error {
	if len(list) == 0 {
		return nil
	}
	return nsutil.Inside(n.path, func() error {
		root, err := os.OpenRoot(sysctlDir)
		if err != nil {
			return err
		}
		defer root.Close()
		for _, one := range list {
			if err := f(root, one); err != nil {
				return err
			}
		}
		return nil
	})
}

func setSysctl(root *os.Root, s image.Sysctl) error {
	now, err := root.ReadFile(s.Name)
	if err == nil && string(bytes.TrimSuffix(now, []byte("\n"))) == s.Value {
		return nil
	}
	if err != nil && !errors.Is(err, unix.EIO) { // that one has no value yet
		return err
	}
	f, err := root.OpenFile(s.Name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(s.Value)
	return errors.Join(err, f.Close())
}

// quiet keeps devices that come up from looking for others that have their IPv6
// addresses already, until loud: they did so once, and while they did it again
// programs could not send from them (accept_dad in ip-sysctl.rst).
func (n *made) quiet() error {
	var names []string
	for i := range n.rec.Links {
		l := &n.rec.Links[i]
		if n.ours(l) && l.Kind != image.LinkLoopback && l.Flags&unix.IFF_UP != 0 && n.flags[n.index[l.Index]]&unix.IFF_UP == 0 {
			names = append(names, l.Name)
		}
	}
	return eachSysctl(n, names, func(root *os.Root, device string) error {
		name := "ipv6/conf/" + device + "/accept_dad"
		value, err := root.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // without IPv6
		}
		if err != nil {
			return err
		}
		n.louder = append(n.louder, image.Sysctl{Name: name, Value: string(bytes.TrimSpace(value))})
		return setSysctl(root, image.Sysctl{Name: name, Value: "0"})
	})
}

// loud undoes quiet.
func (n *made) loud() error {
	list := n.louder
	n.louder = nil
	return eachSysctl(n, list, func(root *os.Root, s image.Sysctl) error { return setSysctl(root, s) })
}
