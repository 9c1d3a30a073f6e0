package file

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// nsfs is a namespace that is held by a descriptor (namespaces(7)), as opened
// below /proc/PID/ns: one that some task of the container is in, or has its
// children begin in.
var nsfs = kind{
	name: image.KindNamespace,
	is: func(_ *Set, one *seen) bool {
		name, _, ok := strings.Cut(one.link, ":[")
		return ok && one.format() == unix.S_IFREG && slices.Contains(nsutil.Types, name)
	},
	read: func(s *Set, d *Description) error {
		d.Record.Kind = image.KindNamespace
		name, _, _ := strings.Cut(d.seen.link, ":[")
		if pid, link := s.member(name, d.seen.link); pid != 0 {
			d.Record.Pid, d.Record.Path = pid, fmt.Sprintf("/proc/%d/ns/%s", pid, link)
			return nil
		}
		if pid, tid, err := s.inThread(d.seen.link); pid != 0 || err != nil {
			d.Record.Pid, d.Record.Path = pid, image.ThreadNamespacePath(pid, tid, name)
			return err
		}
		if own, err := os.Readlink(nsutil.Path(os.Getpid(), name)); err == nil && own == d.seen.link {
			return fail.Refuse("", "it is a namespace of the host", "close it before the checkpoint")
		}
		return fail.Refuse("", "no task of the container is in this namespace, which only descriptors or mounts keep; it is not supported yet", "close it before the checkpoint")
	},
	obtain: func(m *Maker, host int, f *image.File) (*os.File, error) {
		if keeper := m.Keeper(m.head.NamespaceOf(f)); keeper != 0 { // its threads are not there yet
			host = keeper
		}
		return os.Open(nsutil.Path(host, f.NamespaceLink()))
	},
}

// inThread finds a thread that is in a namespace its process is not in.
func (s *Set) inThread(link string) (pid, tid int32, err error) {
	inode, err := nsutil.Parse(link)
	if err != nil || s.Apart == nil {
		return 0, 0, err
	}
	host := s.Apart(inode)
	if host == 0 {
		return 0, 0, nil
	}
	tid, pid, err = s.Task(host)
	return pid, tid, err
}

// member finds a task in a namespace, and the link by which it leads there.
func (s *Set) member(name, target string) (int32, string) {
	for _, t := range s.tables {
		for _, link := range []string{name, name + "_for_children"} {
			if now, err := os.Readlink(nsutil.Path(t.proc.Pid, link)); err == nil && now == target {
				return int32(t.proc.Inner), link
			}
		}
	}
	return 0, ""
}
