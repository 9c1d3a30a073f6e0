// Package sysv holds System V shared memory, semaphores and message queues: the
// objects of an ipc namespace (svipc(7)). One file a kind, both directions. The
// memory of segments and who has it attached is the business of package mm.
package sysv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// IDs translate what the host shows into the container's own numbers.
type IDs interface {
	User(host uint32) uint32
	Group(host uint32) uint32
}

// Set is every object of one ipc namespace.
type Set struct {
	// Attached are, by segment, how often they are attached.
	Attached []uint64

	Segments []*image.Shmem
	Sets     []*image.SemSet
	queues   []*queue
	objects  []*object.Object
	ns       func() image.Ref
}

// Scan reads the calling thread's ipc namespace and changes nothing in it. ns
// tells the namespace's reference when the records are written, 0 for the
// container's own.
func Scan(ids IDs, ns func() image.Ref) (*Set, error) {
	s := &Set{ns: ns}
	for kind, read := range map[string]func(id int, ids IDs) error{"shm": s.readSegment, "sem": s.readSet, "msg": s.readQueue} {
		all, err := list(kind)
		if err != nil {
			return nil, err
		}
		for _, id := range all {
			if err := read(id, ids); err != nil {
				return nil, fail.On(fmt.Sprintf("System V %s %d", kind, id), err)
			}
		}
	}
	return s, nil
}

// list reads the ids of a kind. The file shows the namespace of the thread that
// opens it.
func list(kind string) (ids []int, err error) {
	b, err := os.ReadFile("/proc/sysvipc/" + kind)
	if err != nil {
		return nil, fmt.Errorf("reading System V ipc: %w", err)
	}
	for i, line := range bytes.Split(b, []byte{'\n'}) {
		f := bytes.Fields(line)
		if i == 0 || len(f) < 2 {
			continue
		}
		id, err := strconv.Atoi(string(f[1]))
		if err != nil {
			return nil, fmt.Errorf("strange line in /proc/sysvipc/%s: %q", kind, line)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// Objects lists the objects but for segments, which are shared memory.
func (s *Set) Objects() []*object.Object { return s.objects }

// permSize is the size of struct ipc64_perm, which the structures of all three
// kinds begin with (asm-generic/ipcbuf.h).
const permSize = 48

// control makes one of the calls shmctl, semctl and msgctl, which differ in the
// place of the pointer.
func control(nr uintptr, id, command int, b []byte) error {
	var errno unix.Errno
	if nr == unix.SYS_SEMCTL {
		_, _, errno = unix.Syscall6(nr, uintptr(id), 0, uintptr(command), uintptr(unsafe.Pointer(&b[0])), 0, 0)
	} else {
		_, _, errno = unix.Syscall(nr, uintptr(id), uintptr(command), uintptr(unsafe.Pointer(&b[0])))
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// perm reads struct ipc64_perm.
func perm(id int, b []byte, ids IDs) image.IPCPerm {
	word := func(i int) uint32 { return binary.NativeEndian.Uint32(b[4*i:]) }
	return image.IPCPerm{
		ID: int32(id), Key: int32(word(0)), UID: ids.User(word(1)), GID: ids.Group(word(2)),
		CUID: ids.User(word(3)), CGID: ids.Group(word(4)), Mode: word(5) & 0o777,
	}
}

// Stub is what the room needs of the task that makes the objects.
type Stub interface {
	AsItself(fill func(b *tracee.Batch)) (*tracee.Batch, error)
}

// Maker makes the objects of an ipc namespace of an image.
type Maker struct {
	// Stub makes them, in the namespace.
	Stub Stub
	// Choose makes id that of the next object of a kind in the namespace.
	Choose func(kind string, id int32) error
	// MaxBytes bounds what the bundle allows a queue to hold.
	MaxBytes uint64

	head  *image.Head
	refs  []image.Ref
	texts map[image.Ref][]byte
}

// NewMaker prepares to make the objects of an image that are in the ipc namespace
// ns, 0 for the container's own; refs are the image's objects and ascend.
func NewMaker(head *image.Head, ns image.Ref, refs []image.Ref) *Maker {
	m := &Maker{head: head, texts: map[image.Ref][]byte{}}
	for _, ref := range refs {
		if p := Perm(head.Objects[ref]); p != nil && p.NS == ns {
			m.refs = append(m.refs, ref)
		}
	}
	return m
}

// Perm is who a System V object belongs to, nil for another object.
func Perm(o any) *image.IPCPerm {
	switch o := o.(type) {
	case *image.Shmem:
		if o.SysV != nil {
			return &o.SysV.Perm
		}
	case *image.SemSet:
		return &o.Perm
	case *image.Messages:
		return &o.Perm
	}
	return nil
}

// Needed reports whether there are any.
func (m *Maker) Needed() bool { return len(m.refs) > 0 }

// ChooseHere makes id that of the next object of a kind in the calling thread's
// namespace (Linux 3.9).
func ChooseHere(kind string, id int32) error {
	if err := os.WriteFile("/proc/sys/kernel/"+kind+"_next_id", []byte(strconv.Itoa(int(id))), 0); err != nil {
		return fmt.Errorf("choose an id: %w", err)
	}
	return nil
}

// LongestQueue is kernel.msgmnb of the calling thread's namespace.
func LongestQueue() (uint64, error) { return limit("msgmnb") }

func limit(name string) (uint64, error) {
	b, err := os.ReadFile("/proc/sys/kernel/" + name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// Make creates every object, empty.
func (m *Maker) Make() error {
	for _, ref := range m.refs {
		var err error
		var what string
		switch o := m.head.Objects[ref].(type) {
		case *image.Shmem:
			what = fmt.Sprintf("System V shm %d", o.SysV.Perm.ID)
			err = m.makeSegment(o)
		case *image.SemSet:
			what = fmt.Sprintf("System V sem %d", o.Perm.ID)
			err = m.makeSet(o)
		case *image.Messages:
			what = fmt.Sprintf("System V msg %d", o.Perm.ID)
			err = m.makeQueue(o)
		}
		if err != nil {
			return fail.On(what, err)
		}
	}
	return nil
}

// create makes one object with its id, as its creator, and gives it to its
// owner. get adds the call that makes it.
func (m *Maker) create(kind string, p *image.IPCPerm, get func(b *tracee.Batch) int) error {
	if err := m.Choose(kind, p.ID); err != nil {
		return err
	}
	made := 0
	b, err := m.Stub.AsItself(func(b *tracee.Batch) {
		// The creator is who has the effective ids. The real ones stay, and with
		// them the way back and the permitted capabilities.
		keep := tracee.W(^uint32(0))
		b.Add(unix.SYS_SETRESGID, keep, tracee.W(p.CGID), keep)
		b.Add(unix.SYS_SETRESUID, keep, tracee.W(p.CUID), keep)
		made = get(b)
		b.Calls[made].Tolerate = true
		b.Add(unix.SYS_SETRESUID, keep, tracee.W(0), keep)
		b.Add(unix.SYS_SETRESGID, keep, tracee.W(0), keep)
	})
	if err != nil {
		return err
	}
	if err := b.Err(made); err != nil {
		return fmt.Errorf("cannot be made again: %w", err)
	}
	if got := b.Calls[made].Ret; got != int64(p.ID) {
		return fmt.Errorf("cannot be made again: it came to have the id %d", got)
	}
	return nil
}

// permBytes is struct ipc64_perm as IPC_SET reads it.
func permBytes(p *image.IPCPerm, size int) []byte {
	b := make([]byte, size)
	binary.NativeEndian.PutUint32(b[4:], p.UID)
	binary.NativeEndian.PutUint32(b[8:], p.GID)
	binary.NativeEndian.PutUint32(b[20:], p.Mode)
	return b
}

func given(p *image.IPCPerm) bool { return p.UID != p.CUID || p.GID != p.CGID }

const (
	ipcSet   = 1
	ipcStat  = 2
	ipcFlags = unix.IPC_CREAT | unix.IPC_EXCL
)
