package file

import (
	"encoding/binary"
	"errors"
	"iter"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Identity is who the kernel takes a task for when it opens a file: the file
// system ids and the effective capabilities (credentials(7)).
type Identity struct {
	UID, GID     uint32
	Groups       []uint32
	Capabilities uint64
}

func (i Identity) equal(o Identity) bool {
	return i.UID == o.UID && i.GID == o.GID && i.Capabilities == o.Capabilities && slices.Equal(i.Groups, o.Groups)
}

// stubIdentity is the init stub's own: everything it was given.
func stubIdentity(s *tracee.Stub) (Identity, error) {
	full, err := task.Capabilities(s.Pid)
	return Identity{Capabilities: full}, err
}

// opener is the identity of a task that holds a file.
func (m *Maker) opener(f *image.File) Identity {
	if inode := m.head.Removed(f.Removed); inode != nil && inode.Link == "" {
		return m.self // nobody else has it
	}
	if f.Kind == image.KindMqueue && f.Path == "" {
		return m.self // it is as new as its queue, and may have come from anybody
	}
	return m.identityOf(f.Opener)
}

// identityOf is the identity of a task.
func (m *Maker) identityOf(pid int32) Identity {
	t := m.head.Task(pid)
	if t == nil { // mapped files: any task may have them mapped
		return m.bundle
	}
	c := &t.Threads[0].Creds
	if m.head.UserOf(t.Pid) != nil { // its capabilities are not about the container
		return Identity{UID: c.UID[3], GID: c.GID[3], Groups: c.Groups}
	}
	return Identity{UID: c.UID[3], GID: c.GID[3], Groups: c.Groups, Capabilities: c.Effective & m.bundle.Capabilities}
}

// sameOpener yields the bounds of runs of files with the same opener.
func (m *Maker) sameOpener(refs []image.Ref) iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		for start := 0; start < len(refs); {
			who := m.opener(m.head.File(refs[start]))
			end := start + 1
			for end < len(refs) && m.opener(m.head.File(refs[end])).equal(who) {
				end++
			}
			if !yield(start, end) {
				return
			}
			start = end
		}
	}
}

// become adds the calls that make the stub somebody for opening files. Its
// permitted capabilities and real ids stay, so that it can become another; the
// file system uid comes before the capabilities, for a change of it changes
// them (capabilities(7), "Effect of user ID changes").
func (m *Maker) become(b *tracee.Batch, who Identity) {
	if m.stays { // in a user namespace of a task's it is that already
		return
	}
	task.Capset(b, m.self.Capabilities, m.self.Capabilities, 0)
	groups := make([]byte, 0, 4*len(who.Groups))
	for _, g := range who.Groups {
		groups = binary.LittleEndian.AppendUint32(groups, g)
	}
	b.Add(unix.SYS_SETGROUPS, tracee.W(len(who.Groups)), b.Put(groups))
	b.Add(unix.SYS_SETFSGID, tracee.W(who.GID))
	b.Add(unix.SYS_SETFSUID, tracee.W(who.UID))
	task.Capset(b, m.self.Capabilities, who.Capabilities, 0)
}

// restoreSelf makes the stub itself again after a batch that did not get there.
func (m *Maker) restoreSelf() error {
	var b tracee.Batch
	m.become(&b, m.self)
	_, err := m.stub.Run(&b)
	return err
}

// AsBundle runs the calls that fill adds with the rights of the bundle's own
// process.
func (m *Maker) AsBundle(fill func(b *tracee.Batch)) (*tracee.Batch, error) {
	b := &tracee.Batch{}
	m.become(b, m.bundle)
	fill(b)
	m.become(b, m.self)
	_, err := m.stub.Run(b)
	if err != nil {
		if e := m.restoreSelf(); e != nil {
			err = errors.Join(err, e)
		}
	}
	return b, err
}

// AsItself runs them with all rights of a stub.
func (m *Maker) AsItself(fill func(b *tracee.Batch)) (*tracee.Batch, error) {
	b := &tracee.Batch{}
	fill(b)
	_, err := m.stub.Run(b)
	return b, err
}
