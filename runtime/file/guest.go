package file

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// Guest notes the table of a process that was brought into the container (runc exec). Its
// standard streams are a pipe, say, to whoever did that. They are not the
// container's, as those of its init are, to be given anew by whoever restores
// it; and a program would be killed by SIGPIPE if it went on with a pipe
// without another end. So they become /dev/null, in all who share them.
func (s *Set) Guest(t *Table) { s.guests = append(s.guests, t) }

// fromGuest reports a file that is, or was, a guest's standard stream.
func (s *Set) fromGuest(one *seen) bool {
	if s.streams == nil {
		s.streams = map[identity]bool{}
		for _, t := range s.guests {
			for _, e := range t.entries {
				if e.seen.fd <= 2 {
					s.streams[identity{e.seen.stat.Dev, e.seen.stat.Ino}] = true
				}
			}
		}
	}
	return s.streams[identity{one.stat.Dev, one.stat.Ino}]
}

// identity is what tells one inode from another.
type identity struct{ dev, ino uint64 }

// toNull makes a description one of /dev/null.
func (s *Set) toNull(d *Description) {
	s.Warnings = append(s.Warnings, fmt.Sprintf("%s: fd %d, %s, belongs to whoever brought the process in: restored as /dev/null",
		d.seen.proc.Name, d.seen.fd, d.seen.link))
	*d.Record = image.File{
		Kind: image.KindDevice, Path: "/dev/null", Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3),
		Flags: d.Record.Flags &^ unix.O_DIRECT, Opener: d.Record.Opener,
	}
	d.pipe, d.Complete, d.null = nil, nil, true
}

// unwatched refuses to put /dev/null where epoll watches: it cannot be.
func unwatched(d *Description) error {
	if d.null {
		return fail.Refuse("", fmt.Sprintf("it watches fd %d, %s, whose other end is outside the container", d.seen.fd, d.seen.link),
			"end the process that was brought in, or bring it in without standard streams")
	}
	return nil
}
