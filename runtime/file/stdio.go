package file

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// stdio is what the engine passed in as the container's standard input, output
// and error: a pipe, a socket, a file of the host. Its other side is not the
// container's, so it is taken from whoever restores the container.
var stdio = kind{
	name: image.KindStdio,
	is:   func(s *Set, one *seen) bool { return s.stdioNumber(one) >= 0 },
	read: func(s *Set, d *Description) error {
		d.Record.Kind, d.Record.Stdio, d.Record.Path = image.KindStdio, int32(s.stdioNumber(d.seen)), d.seen.link
		return nil
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return b.Add(unix.SYS_FCNTL, tracee.W(m.stdio[f.Stdio]), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0)), nil
	},
}

// stdioNumber is which of the three a descriptor is, or -1. The best match is
// the one that init still holds under its number; a pipe or host file that was
// opened again is known by its name.
func (s *Set) stdioNumber(one *seen) int {
	match := -1
	order := []int{0, 1, 2}
	if writes(one.flags) { // one description as all three is an output above all
		order = []int{1, 2, 0}
	}
	for _, i := range order[:min(len(order), len(s.Stdio))] {
		if i >= len(s.Stdio) || !s.engineGave(one) {
			continue
		}
		// A host file may have been renamed since (a log that is rotated).
		named := s.Stdio[i] == strings.TrimSuffix(one.link, deletedSuffix)
		if !named && !(s.external(one) && strings.HasPrefix(one.link, "/")) {
			continue
		}
		same, err := kcmp(s.Init.Pid, one.proc.Pid, kcmpFile, uintptr(i), uintptr(one.fd))
		held := err == nil && same == 0
		if !named && !held {
			continue
		}
		if held {
			return i
		}
		if match < 0 && (i == 0) == !writes(one.flags) {
			match = i
		}
	}
	if match >= 0 && one.format() == unix.S_IFCHR {
		return -1 // the container's own /dev/null, opened by itself
	}
	return match
}

// engineGave reports a file that cannot have been opened inside the container,
// or may not have been: /dev/null, which every engine passes for nothing.
func (s *Set) engineGave(one *seen) bool {
	return strings.HasPrefix(one.link, "pipe:") || strings.HasPrefix(one.link, "socket:") ||
		one.stat.Rdev == unix.Mkdev(1, 3) && one.format() == unix.S_IFCHR || s.external(one)
}
