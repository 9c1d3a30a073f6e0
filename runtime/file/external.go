package file

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// external is an open file that the operator has left out of the image by a key
// and gives anew at the restore: a pipe or socket of the host, one of its files.
// What it is then is the operator's business, but for what programs could not
// bear: another type of file, or less access.
var external = kind{
	name: image.KindExternal,
	is:   func(*Set, *seen) bool { return false }, // findExternal says
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return b.Add(unix.SYS_FCNTL, tracee.W(m.given[f.Key]), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0)), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) {
		if f.Flags&unix.O_PATH == 0 {
			setFlags(b, fd, f.Flags)
		}
	},
}

// keyForm is fd[PID:N], pipe[INO], socket[INO], file[DEV:INO] or tty[DEV:INO].
var keyForm = regexp.MustCompile(`^(fd|file|tty)\[(\w+):(\w+)\]$|^(pipe|socket)\[(\w+)\]$`)

// Key names an open file of a container.
type Key struct {
	text string
	kind string
	a, b uint64 // pid and descriptor, or device and inode
}

// ParseKey reads a key. Numbers are decimal, or hexadecimal after 0x.
func ParseKey(text string) (Key, error) {
	m := keyForm.FindStringSubmatch(text)
	if m == nil {
		return Key{}, fmt.Errorf("%q is no key of an open file: fd[PID:N], pipe[INODE], socket[INODE], file[DEVICE:INODE] or tty[DEVICE:INODE]", text)
	}
	k := Key{text: text, kind: m[1] + m[4]}
	for to, digits := range map[*uint64]string{&k.a: m[2], &k.b: m[3] + m[5]} {
		if digits == "" {
			continue
		}
		n, err := strconv.ParseUint(digits, 0, 64)
		if err != nil {
			return Key{}, fmt.Errorf("key %q: %w", text, err)
		}
		*to = n
	}
	return k, nil
}

// names reports whether the key is that of a descriptor.
func (k Key) names(one *seen) bool {
	st := &one.stat
	switch k.kind {
	case "fd":
		return uint64(one.proc.Inner) == k.a && uint64(one.fd) == k.b
	case "pipe":
		return strings.HasPrefix(one.link, "pipe:") && st.Ino == k.b
	case "socket":
		return one.format() == unix.S_IFSOCK && st.Ino == k.b
	case "tty":
		return one.format() == unix.S_IFCHR && st.Dev == k.a && st.Ino == k.b
	}
	return strings.HasPrefix(one.link, "/") && st.Dev == k.a && st.Ino == k.b
}

// findExternal gives the open files that keys name to these. A key stands for one
// open file description, for one descriptor is given for it.
func (s *Set) findExternal(groups [][]*seen) error {
	for _, key := range s.External {
		found := -1
		for i, g := range groups {
			at := slices.IndexFunc(g, key.names)
			if at < 0 {
				continue
			}
			if found >= 0 {
				return fail.On("external "+key.text, fail.Refuse("", fmt.Sprintf("more than one open file is meant: %s of %s, and %s of %s",
					s.descs[found].seen.object(), s.descs[found].seen.proc.Name, g[at].object(), g[at].proc.Name), "name each by fd[PID:N]"))
			}
			found = i
		}
		if found < 0 {
			return fail.On("external "+key.text, fail.Refuse("", "no open file of the container is meant by it", "see `ls -l /proc/PID/fd` and `stat -L`"))
		}
		if other := s.descs[found].Record.Key; other != "" {
			return fail.On("external "+key.text, fail.Refuse("", "it means the same open file as "+other, "name it once"))
		}
		s.descs[found].Record.Key = key.text
	}
	return nil
}

// readExternal notes what a file that is left out was.
func (s *Set) readExternal(d *Description) {
	d.Record.Kind, d.Record.Path, d.Record.Mode, d.Record.Pos = image.KindExternal, d.seen.link, d.seen.stat.Mode, 0
	s.Warnings = append(s.Warnings, fmt.Sprintf("%s: fd %d, %s, is left out: restore takes it by --fd '%s=N'", d.seen.proc.Name, d.seen.fd, d.seen.link, d.Record.Key))
}

// CheckGiven compares the files that are given at a restore, by their keys, with
// those that an image leaves out.
func CheckGiven(head *image.Head, given map[string]int) error {
	wanted := map[string]bool{}
	for _, ref := range Refs(head) {
		f, ok := head.Objects[ref].(*image.File)
		if !ok || f.Kind != image.KindExternal {
			continue
		}
		wanted[f.Key] = true
		what := fmt.Sprintf("external %s (%s)", f.Key, f.Path)
		fd, ok := given[f.Key]
		if !ok {
			return fail.Refuse(what, fmt.Sprintf("task %d has it open, the image leaves it out, and nothing is given for it", f.Opener), "give it by --fd '"+f.Key+"=N', N being a descriptor of ocickpt's")
		}
		if err := fits(f, fd); err != nil {
			return fail.On(what, err)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if !wanted[key] {
			return fail.Refuse("external "+key, "a descriptor is given for it, and the image has no such key", cmp.Or(strings.Join(slices.Sorted(maps.Keys(wanted)), " "), "it has none")+" (see `ocickpt inspect`)")
		}
	}
	return nil
}

// fits refuses a descriptor that programs could not go on with.
func fits(f *image.File, given int) error {
	unix.CloseOnExec(given) // nobody else whom we start is to have it
	var st unix.Stat_t
	if err := unix.Fstat(given, &st); err != nil {
		return &fail.Error{Cause: fmt.Errorf("descriptor %d: %w", given, err), Remedy: "have it open when ocickpt starts"}
	}
	flags, err := unix.FcntlInt(uintptr(given), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", given, err)
	}
	if was, is := f.Mode&unix.S_IFMT, st.Mode&unix.S_IFMT; was != is {
		return fail.Refuse("", fmt.Sprintf("descriptor %d is a file of another type (st_mode %#o instead of %#o)", given, is, was), "give one of the same")
	}
	has := uint32(flags)
	if reads(f.Flags) && !reads(has) || writes(f.Flags) && !writes(has) || (f.Flags^has)&unix.O_PATH != 0 {
		return fail.Refuse("", fmt.Sprintf("descriptor %d is not open for what the container does with it (flags %#o instead of %#o)", given, has, f.Flags), "open it for reading and writing")
	}
	return nil
}

// takeGiven hands what is given to the stub.
func (m *Maker) takeGiven() error {
	for key, ours := range m.Given {
		fd, err := m.send(m.stub, ours, key)
		if err != nil {
			return fail.On("external "+key, err)
		}
		up, err := m.moveUp([]int{fd})
		if err != nil {
			return err
		}
		m.given[key] = up[0]
	}
	return nil
}
