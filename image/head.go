package image

import (
	"errors"
	"fmt"
	"slices"
)

// Head is the metadata of a stream, sections 1 to 5. One returned by
// Reader.Head has been checked whole: every reference resolves to an object
// of the type it should have, and every live process has its task.
type Head struct {
	Header    Header
	Arch      Arch
	Container Container
	Tree      Tree
	Tasks     []*Task     // in the order of the stream
	Objects   map[Ref]any // *File, *Files, *FS, *Pipe, *Pty, *Inode, *Removed, *MM, *Shmem, *Sighand, *Namespace, *NestedNamespace, *SemSet, *Messages, *Mqueue, *Network, *Connection, *Queue

	tasks     map[int32]*Task
	networks  map[Ref]*Network   // by namespace
	processes map[int32]*Process // by pid
}

// object returns the object that ref names, or nil where it has another type.
func object[T any](h *Head, ref Ref) *T {
	o, _ := h.Objects[ref].(*T)
	return o
}

// File returns the open file description ref, or nil if there is none.
func (h *Head) File(ref Ref) *File { return object[File](h, ref) }

// Files returns the descriptor table ref, or nil if there is none.
func (h *Head) Files(ref Ref) *Files { return object[Files](h, ref) }

// FS returns the file system context ref, or nil if there is none.
func (h *Head) FS(ref Ref) *FS { return object[FS](h, ref) }

// Pty returns the terminal ref, or nil if there is none.
func (h *Head) Pty(ref Ref) *Pty { return object[Pty](h, ref) }

// Pipe returns the pipe buffer ref, or nil if there is none.
func (h *Head) Pipe(ref Ref) *Pipe { return object[Pipe](h, ref) }

// Inode returns the inode ref, or nil if there is none.
func (h *Head) Inode(ref Ref) *Inode { return object[Inode](h, ref) }

// Removed returns the file without a name ref, or nil if there is none.
func (h *Head) Removed(ref Ref) *Removed { return object[Removed](h, ref) }

// Mqueue returns the POSIX message queue ref, or nil if there is none.
func (h *Head) Mqueue(ref Ref) *Mqueue { return object[Mqueue](h, ref) }

// MM returns the address space ref, or nil if there is none.
func (h *Head) MM(ref Ref) *MM { return object[MM](h, ref) }

// Shmem returns the shared memory ref, or nil if there is none.
func (h *Head) Shmem(ref Ref) *Shmem { return object[Shmem](h, ref) }

// Sighand returns the table of signal actions ref, or nil if there is none.
func (h *Head) Sighand(ref Ref) *Sighand { return object[Sighand](h, ref) }

// Namespace returns the namespace ref, or nil if there is none.
func (h *Head) Namespace(ref Ref) *Namespace { return object[Namespace](h, ref) }

// Nested returns the namespace ref that tasks have made, or nil if there is none.
func (h *Head) Nested(ref Ref) *NestedNamespace { return object[NestedNamespace](h, ref) }

// Network returns what is in the network namespace ns, or nil if the image does
// not have it.
func (h *Head) Network(ns Ref) *Network { return h.networks[ns] }

// Task returns the task of the process pid, or nil for a zombie or a pid that
// the image does not have.
func (h *Head) Task(pid int32) *Task { return h.tasks[pid] }

// Process returns the process pid of the tree, or nil if there is none.
func (h *Head) Process(pid int32) *Process { return h.processes[pid] }

// Mount returns the mount with an id, of the container or of a namespace that a
// task has made; nil for none.
func (h *Head) Mount(id int) *Mount {
	lists := [][]Mount{h.Container.Mounts}
	for i := range h.Tree.Namespaces {
		lists = append(lists, h.Tree.Namespaces[i].Mounts)
	}
	for _, list := range lists {
		if i := slices.IndexFunc(list, func(m Mount) bool { return m.ID == id }); i >= 0 {
			return &list[i]
		}
	}
	return nil
}

// UserOf returns the user namespace that the process pid is in, or nil if that
// is the container's own.
func (h *Head) UserOf(pid int32) *NestedNamespace {
	p := h.Process(pid)
	if p == nil {
		return nil
	}
	for _, ref := range p.Namespaces {
		if n := h.Nested(ref); n != nil && n.Type == "user" {
			return n
		}
	}
	return nil
}

// NamespaceOf returns the namespace that tasks have made which a descriptor of one
// leads to, as far as its process or a thread of that is in it, else 0.
func (h *Head) NamespaceOf(f *File) Ref {
	p, kind := h.Process(f.Pid), f.NamespaceLink()
	if p == nil || f.Kind != KindNamespace {
		return 0
	}
	of := func(in []Ref) Ref {
		for _, ref := range in {
			if n := h.Nested(ref); n != nil && n.Type == kind {
				return ref
			}
		}
		return 0
	}
	if f.Path == fmt.Sprintf("/proc/%d/ns/%s", p.Pid, kind) {
		return of(p.Namespaces)
	}
	for i := range p.Apart {
		if a := &p.Apart[i]; f.Path == ThreadNamespacePath(p.Pid, a.Tid, kind) {
			return of(a.Namespaces)
		}
	}
	return 0
}

// builder checks the records of a stream one by one and assembles the head
// from them. Writer and Reader each own one, so that both hold a stream to the
// same rules.
type builder struct {
	Head
	section  section
	last     Ref                 // highest reference defined so far
	metadata uint64              // payload bytes of sections 1 to 5
	spaceOf  map[Ref]Ref         // the address space of those who have these signal actions
	progress map[Ref]uint64      // where the next TypeBytes of an object may begin, or pages of one with a donor
	places   map[Ref]place       // of inodes
	names    map[Name]bool       // taken, or gone
	points   map[fileSystem]bool // that are taken
	lent     map[Ref]bool        // address spaces of which others have borrowed
	ipc      map[ipcName]bool    // ids and keys that are taken
	mqueues  map[queueName]bool  // that are taken
	keys     map[string]bool     // of open files that are left out
	subs     map[[2]string]bool  // cgroups that tasks have made, by hierarchy and path
	sockets  socketsSeen
}

func newBuilder() *builder {
	return &builder{
		Head:     Head{Objects: map[Ref]any{}, tasks: map[int32]*Task{}, networks: map[Ref]*Network{}, processes: map[int32]*Process{}},
		spaceOf:  map[Ref]Ref{},
		progress: map[Ref]uint64{},
		places:   map[Ref]place{},
		names:    map[Name]bool{},
		points:   map[fileSystem]bool{},
		lent:     map[Ref]bool{},
		ipc:      map[ipcName]bool{},
		mqueues:  map[queueName]bool{},
		keys:     map[string]bool{},
		subs:     map[[2]string]bool{},
		sockets:  socketsSeen{peer: map[Ref]bool{}, queue: map[Ref]bool{}},
	}
}

// place checks that a record of type t with reference ref may stand next.
func (b *builder) place(t Type, ref Ref) error {
	info, ok := types[t]
	if !ok {
		return errors.New("this record type is not known to this program")
	}
	if err := b.order(info.section); err != nil {
		return err
	}
	switch {
	case info.object && ref <= b.last:
		return fmt.Errorf("reference %d does not ascend: %d is already taken", ref, b.last)
	case !info.object && !t.bulk() && ref != 0:
		return fmt.Errorf("it must not carry a reference, but carries %d", ref)
	}
	return nil
}

// order checks that section next may follow the one the stream is in. The
// first four hold one record each.
func (b *builder) order(next section) error {
	switch {
	case b.section >= sectionTrailer:
		return errors.New("it stands after the stream's last record")
	case next == sectionError:
		return nil
	case b.section < sectionTree && next != b.section+1:
		return errors.New("it is out of order: a stream begins with header, arch, container and tree")
	case next <= sectionTree && next != b.section+1:
		return errors.New("it is out of order: it may stand only once, at the beginning")
	case next < b.section:
		return errors.New("it is out of order: objects stand before contents")
	}
	if next > sectionObjects && b.section <= sectionObjects {
		return b.complete()
	}
	return nil
}

// commit takes note of a record that passed its checks.
func (b *builder) commit(t Type, ref Ref) {
	b.section = types[t].section
	if types[t].object {
		b.last = ref
	}
}

// add checks a metadata record, v pointing to its structure and size being the
// bytes of its payload, and takes it into the head. A record that is refused
// changes nothing.
func (b *builder) add(t Type, ref Ref, v any, size uint64) error {
	if err := first(b.place(t, ref), b.room(t, size), checkStrings(v)); err != nil {
		return err
	}
	if err := b.check(v); err != nil {
		return err
	}
	b.metadata += size
	b.keep(ref, v)
	b.commit(t, ref)
	return nil
}

// check applies the rules of the record's own type.
func (b *builder) check(v any) error {
	switch v := v.(type) {
	case *Header:
		return checkHeader(v)
	case *Arch:
		return checkArch(v)
	case *Container:
		return checkContainer(v)
	case *Tree:
		return first(checkTree(v), b.checkNested(v))
	case *Task:
		return b.checkTask(v)
	case *File:
		return b.checkFile(v)
	case *Files:
		return b.checkFiles(v)
	case *FS:
		return b.checkFS(v)
	case *Removed:
		return b.checkRemovedFile(v)
	case *Pipe:
		return b.checkPipe(v)
	case *Pty:
		return checkPty(v)
	case *Inode:
		return b.checkInode(v)
	case *MM:
		return b.checkMM(v)
	case *Shmem:
		return b.checkShmem(v)
	case *SemSet:
		return b.checkSemaphores(v)
	case *Messages:
		return b.checkMessages(v)
	case *Mqueue:
		return b.checkMqueue(v)
	case *Sighand:
		return checkSighand(v)
	case *Network:
		return b.checkNetwork(v)
	case *Connection:
		return b.checkConnection(v)
	case *Queue:
		return b.checkQueue(v)
	}
	return nil
}

// keep takes a checked record into the head.
func (b *builder) keep(ref Ref, v any) {
	switch v := v.(type) {
	case *Header:
		b.Header = *v
	case *Arch:
		b.Arch = *v
	case *Container:
		b.Container = *v
		for _, s := range v.Subs {
			b.subs[[2]string{s.Hierarchy, s.Path}] = true
		}
		for i := range v.Namespaces {
			ns := &b.Container.Namespaces[i]
			b.Objects[ns.Ref] = ns
			b.last = ns.Ref
		}
	case *Tree:
		b.Tree = *v
		for i := range v.Namespaces {
			ns := &b.Tree.Namespaces[i]
			b.Objects[ns.Ref] = ns
			b.last = ns.Ref
		}
		b.index()
	case *Task:
		b.Tasks = append(b.Tasks, v)
		b.tasks[v.Pid] = v
		b.spaceOf[v.Sighand] = v.MM
	case *Inode:
		b.keepInode(ref, v)
	case *Shmem, *SemSet, *Messages:
		b.Objects[ref] = v
		b.keepIPC(v)
	case *File:
		b.Objects[ref] = v
		if v.Key != "" {
			b.keys[v.Key] = true
		}
	case *Mqueue:
		b.Objects[ref] = v
		b.keepMqueue(v)
	case *Network:
		b.Objects[ref], b.networks[v.Namespace] = v, v
	case *Connection, *Queue:
		b.Objects[ref] = v
		b.keepSocket(v)
	case *Trailer, *Error:
	default:
		b.Objects[ref] = v
	}
}

// index makes the tree's processes known by their pids.
func (b *builder) index() {
	for i := range b.Tree.Processes {
		p := &b.Tree.Processes[i]
		b.processes[p.Pid] = p
	}
}

// complete checks what can be known only at the end of section 5.
func (b *builder) complete() error {
	for i := range b.Tree.Processes {
		p := &b.Tree.Processes[i]
		if !p.Zombie && b.tasks[p.Pid] == nil {
			return fmt.Errorf("the image has no task record for process %d", p.Pid)
		}
	}
	return first(b.checkVforks(), b.checkNotified())
}

// finish checks what can be known only at the end of the contents.
func (b *builder) finish() error {
	for ref, o := range b.Objects {
		if p, ok := o.(*Pipe); ok && b.progress[ref] != uint64(p.Length) {
			return fmt.Errorf("pipe #%d holds %d bytes, the image has %d of them", ref, p.Length, b.progress[ref])
		}
		if q, ok := o.(*Messages); ok && b.progress[ref] != q.Bytes() {
			return fmt.Errorf("message queue #%d holds %d bytes, the image has %d of them", ref, q.Bytes(), b.progress[ref])
		}
		if q, ok := o.(*Mqueue); ok && b.progress[ref] != q.Bytes() {
			return fmt.Errorf("message queue #%d holds %d bytes, the image has %d of them", ref, q.Bytes(), b.progress[ref])
		}
		if q, ok := o.(*Queue); ok && b.progress[ref] != q.Bytes() {
			return fmt.Errorf("queue #%d holds %d bytes, the image has %d of them", ref, q.Bytes(), b.progress[ref])
		}
		if p, ok := o.(*Pty); ok && b.progress[ref] != p.unread() {
			return fmt.Errorf("terminal #%d holds %d bytes, the image has %d of them", ref, p.unread(), b.progress[ref])
		}
	}
	return nil
}

// room checks that a payload of n bytes fits into the stream's metadata. The
// last record always fits, so that a failure can be told.
func (b *builder) room(t Type, n uint64) error {
	if types[t].section < sectionTrailer && n > MaxMetadata-b.metadata {
		return fmt.Errorf("the metadata is larger than %d bytes", MaxMetadata)
	}
	return nil
}
