package image

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Summary describes an image for people and, as JSON, for programs. Names in
// it are as the image has them; WriteText escapes them.
type Summary struct {
	Report
	Revision  uint32           `json:"revision"`
	Time      time.Time        `json:"time"`
	Tool      string           `json:"tool"`
	Kernel    string           `json:"kernel"`
	Machine   string           `json:"machine"`
	Options   []string         `json:"options"`
	Failure   *Failure         `json:"failure,omitempty"` // the image ends in an error record
	Container ContainerSummary `json:"container"`
	Processes []ProcessSummary `json:"processes"` // parents before children
	Tables    []TableSummary   `json:"files"`
	// Loose are open files that no table has.
	Loose      []DescriptorSummary `json:"loose,omitempty"`
	Memory     []MemorySummary     `json:"memory"`
	Shared     []SharedSummary     `json:"sharedMemory"`
	Sections   []SectionSummary    `json:"sections"`
	External   []ExternalSummary   `json:"external,omitempty"`
	Warnings   []string            `json:"warnings"`
	Namespaces []NamespaceSummary  `json:"namespaces"`
	Nested     []NestedSummary     `json:"nested,omitempty"`
	// Hold is the table of nftables that holds the packets of its connections off.
	Hold string `json:"hold,omitempty"`
}

// ExternalSummary is an open file that is left out and has to be given anew.
type ExternalSummary struct {
	Key  string `json:"key"`
	Was  string `json:"was"` // as /proc/PID/fd showed it
	Task int32  `json:"task"`
}

// Failure is the error record of a checkpoint that failed.
type Failure struct {
	Phase  string `json:"phase"`
	Task   string `json:"task,omitempty"`
	Object string `json:"object,omitempty"`
	Cause  string `json:"cause"`
	Remedy string `json:"remedy,omitempty"`
}

// ContainerSummary is the container the image was taken of.
type ContainerSummary struct {
	ID       string            `json:"id"`
	Runtime  string            `json:"runtime"`
	Bundle   string            `json:"bundle"`
	Hostname string            `json:"hostname"`
	Paused   bool              `json:"paused"`
	Cgroups  map[string]string `json:"cgroups"`
	Subs     int               `json:"subCgroups,omitempty"` // that tasks have made
	Mounts   int               `json:"mounts"`
	Links    []string          `json:"links"`
	// FileSystems are those of which something is in the image.
	FileSystems []FileSystemSummary `json:"fileSystems,omitempty"`
}

// FileSystemSummary is what the image has of a file system: all of one in memory,
// of the root what has changed.
type FileSystemSummary struct {
	Point  string `json:"point"`
	Inodes int    `json:"inodes"`
	Gone   int    `json:"gone,omitempty"` // names that were removed
	Bytes  uint64 `json:"bytes"`          // sizes together, holes included
}

// NamespaceSummary is one namespace.
type NamespaceSummary struct {
	Type  string `json:"type"`
	Inode uint64 `json:"inode"`
	Path  string `json:"path,omitempty"`
	Host  bool   `json:"host,omitempty"`
}

// ProcessSummary is one process of the tree.
type ProcessSummary struct {
	Pid     int32           `json:"pid"`
	HostPid int32           `json:"hostPid"`
	Ppid    int32           `json:"ppid"`
	Pgid    int32           `json:"pgid"`
	Sid     int32           `json:"sid"`
	Comm    string          `json:"comm"`
	Threads []ThreadSummary `json:"threads,omitempty"`
	State   string          `json:"state"` // "running", "stopped by ..." or "zombie, ..."
	// Namespaces are those that are not init's, by their references in Nested.
	Namespaces []string `json:"namespaces,omitempty"`
}

// NestedSummary is one namespace that tasks have made.
type NestedSummary struct {
	Ref    Ref    `json:"ref"`
	Type   string `json:"type"`
	Inode  uint64 `json:"inode,omitempty"`
	Owner  Ref    `json:"owner"` // user namespace
	Holds  string `json:"holds,omitempty"`
	Parent Ref    `json:"parent,omitempty"`
}

// ThreadSummary is one thread of a process.
type ThreadSummary struct {
	Tid  int32  `json:"tid"`
	Comm string `json:"comm"`
}

// TableSummary is one descriptor table with the processes that use it.
type TableSummary struct {
	Ref         Ref                 `json:"ref"`
	Pids        []int32             `json:"pids"`
	Descriptors []DescriptorSummary `json:"descriptors"`
}

// DescriptorSummary is one open file as a table has it.
type DescriptorSummary struct {
	FD     int32    `json:"fd"`
	Ref    Ref      `json:"ref"`
	Kind   string   `json:"kind"`
	Target string   `json:"target"` // path, or what the kind has instead
	Flags  string   `json:"flags"`
	Pos    int64    `json:"position"`
	Shared []string `json:"shared,omitempty"` // "PID:FD" of other descriptors of the same open file
}

// MemorySummary is one address space with the processes that use it.
type MemorySummary struct {
	Ref   Ref           `json:"ref"`
	Pids  []int32       `json:"pids"`
	Kinds []KindSummary `json:"kinds"`
	Total KindSummary   `json:"total"`
}

// KindSummary is what an address space has of one kind of area.
type KindSummary struct {
	Kind   string `json:"kind,omitempty"`
	Areas  int    `json:"areas"`
	Mapped uint64 `json:"mapped"` // bytes
	Stored uint64 `json:"stored"` // bytes of pages in the image
}

// SharedSummary is one piece of shared memory.
type SharedSummary struct {
	Ref    Ref    `json:"ref"`
	Name   string `json:"name"`
	Size   uint64 `json:"size"`   // bytes
	Stored uint64 `json:"stored"` // bytes of pages in the image
}

// SectionSummary is the size of one kind of record.
type SectionSummary struct {
	Section string `json:"section"`
	Record  string `json:"record"`
	Records uint64 `json:"records"`
	Bytes   uint64 `json:"bytes"`
}

// Inspect reads a whole stream, verifies it as Verify does, and summarizes it.
// A stream that ends in a good error record is summarized as far as it goes,
// with Failure set.
func Inspect(r io.Reader) (*Summary, error) {
	rd := NewReader(r)
	stored := storage{}
	err := rd.each(func(c *Content) { stored.add(&rd.state.Head, c) })
	var failed *FailedError
	if err != nil && !errors.As(err, &failed) {
		return nil, err
	}
	s := summarize(&rd.state.Head, stored)
	s.Report = *rd.report()
	s.Sections = sectionSizes(&rd.tally)
	if failed != nil {
		f := Failure(failed.Record)
		s.Failure = &f
	}
	return s, nil
}

// storage counts the bytes of pages stored for each object, and for address
// spaces by the kind of area.
type storage map[Ref]map[string]uint64

func (s storage) add(h *Head, c *Content) {
	kinds := s[c.Ref]
	if kinds == nil {
		kinds = map[string]uint64{}
		s[c.Ref] = kinds
	}
	mm := h.MM(c.Ref)
	for _, run := range c.Runs {
		if !run.Stored() {
			continue
		}
		end, _ := run.end()
		if mm == nil {
			kinds[""] += end - run.Addr
			continue
		}
		for at := run.Addr; at < end; {
			a := mm.Area(at)
			stop := min(a.End, end)
			kinds[a.Kind] += stop - at
			at = stop
		}
	}
}

func summarize(h *Head, stored storage) *Summary {
	s := &Summary{
		Revision:   h.Header.Revision,
		Time:       time.Unix(0, h.Header.Time).UTC(),
		Tool:       h.Header.Tool,
		Kernel:     strings.TrimSpace(h.Header.Uname.Sysname + " " + h.Header.Uname.Release),
		Machine:    h.Arch.Machine,
		Options:    []string{},
		Hold:       h.Container.Hold,
		Container:  containerSummary(h),
		Namespaces: namespaceSummaries(&h.Container),
		Nested:     nestedSummaries(&h.Tree),
		Processes:  processSummaries(h),
		Memory:     memorySummaries(h, stored),
		Shared:     sharedSummaries(h, stored),
		External:   externalSummaries(h),
		Warnings:   append([]string{}, h.Container.Warnings...),
	}
	s.Tables, s.Loose = tableSummaries(h)
	if h.Header.Options.TCPEstablished {
		s.Options = append(s.Options, "tcp established")
	}
	if h.Header.Options.LeaveRunning {
		s.Options = append(s.Options, "leave-running")
	}
	return s
}

func externalSummaries(h *Head) (list []ExternalSummary) {
	for _, o := range h.Objects {
		if f, ok := o.(*File); ok && f.Kind == KindExternal {
			list = append(list, ExternalSummary{f.Key, f.Path, f.Opener})
		}
	}
	slices.SortFunc(list, func(a, b ExternalSummary) int { return cmp.Compare(a.Key, b.Key) })
	return list
}

func containerSummary(h *Head) ContainerSummary {
	c := &h.Container
	s := ContainerSummary{
		ID: c.ID, Runtime: c.Runtime, Bundle: c.Bundle, Hostname: c.Hostname,
		Paused: c.Paused, Cgroups: c.Cgroups, Subs: len(c.Subs), Mounts: len(c.Mounts), Links: []string{},
	}
	for _, l := range c.Links {
		s.Links = append(s.Links, strings.TrimSpace(l.Name+" "+strings.Join(l.Addresses, " ")))
	}
	s.FileSystems = fileSystemSummaries(h)
	return s
}

func fileSystemSummaries(h *Head) (list []FileSystemSummary) {
	at := map[Ref]int{} // of directories, their file system in the list
	for _, ref := range slices.Sorted(maps.Keys(h.Objects)) {
		n := h.Inode(ref)
		if n == nil {
			continue
		}
		if n.Point != "" {
			at[ref] = len(list)
			list = append(list, FileSystemSummary{Point: n.Point})
		} else {
			at[ref] = at[n.Names[0].Dir]
		}
		fs := &list[at[ref]]
		fs.Inodes, fs.Gone, fs.Bytes = fs.Inodes+1, fs.Gone+len(n.Gone), fs.Bytes+n.Size
	}
	return list
}

func namespaceSummaries(c *Container) []NamespaceSummary {
	list := []NamespaceSummary{}
	for _, ns := range c.Namespaces {
		list = append(list, NamespaceSummary{Type: ns.Type, Inode: ns.Inode, Path: ns.Path, Host: ns.Host})
	}
	return list
}

func nestedSummaries(t *Tree) (list []NestedSummary) {
	for i := range t.Namespaces {
		n := &t.Namespaces[i]
		list = append(list, NestedSummary{Ref: n.Ref, Type: n.Type, Inode: n.Inode, Owner: n.Owner, Parent: n.Parent, Holds: n.holds()})
	}
	return list
}

// holds says in short what is in a namespace.
func (n *NestedNamespace) holds() string {
	switch {
	case n.UTS != nil:
		return n.UTS.Hostname
	case n.User != nil:
		ranges := func(m []IDMap) (s []string) {
			for _, r := range m {
				s = append(s, fmt.Sprintf("%d=%d+%d", r.Container, r.Host, r.Size))
			}
			return s
		}
		return fmt.Sprintf("of uid %d, uids %v, gids %v", n.User.OwnerUID, ranges(n.User.UIDMap), ranges(n.User.GIDMap))
	case n.Time != nil:
		return fmt.Sprintf("monotonic %v", time.Duration(n.Time.Monotonic))
	case n.Dead:
		return "dead"
	case n.Mounts != nil:
		return count(uint64(len(n.Mounts)), "mount")
	}
	return ""
}

// nestedTexts names the namespaces that a process and its children are in.
func nestedTexts(h *Head, p *Process) (list []string) {
	for _, ref := range p.Namespaces {
		n := h.Nested(ref)
		s := fmt.Sprintf("%s #%d", n.Type, ref)
		if n.Type == "pid" && p.Inner != nil {
			leader := p.Inner.Threads[0]
			s += fmt.Sprintf(" as %d", leader[len(leader)-1])
		}
		list = append(list, s)
	}
	for _, ref := range p.Children {
		list = append(list, fmt.Sprintf("children in %s #%d", h.Nested(ref).Type, ref))
	}
	for i := range p.Apart {
		a := &p.Apart[i]
		at := fmt.Sprintf("thread %d in", a.Tid)
		for _, ref := range a.Namespaces {
			at += fmt.Sprintf(" %s #%d", h.Nested(ref).Type, ref)
		}
		for _, ref := range a.Children {
			at += fmt.Sprintf(" children in %s #%d", h.Nested(ref).Type, ref)
		}
		list = append(list, at)
	}
	return list
}

func processSummaries(h *Head) []ProcessSummary {
	list := []ProcessSummary{}
	for i := range h.Tree.Processes {
		p := &h.Tree.Processes[i]
		s := ProcessSummary{
			Pid: p.Pid, HostPid: p.Pids[0], Ppid: p.Ppid, Pgid: p.Pgid, Sid: p.Sid,
			Comm: string(p.Comm), State: "running", Namespaces: nestedTexts(h, p),
		}
		if p.Zombie {
			s.State = "zombie, " + waitStatus(p.Status)
		}
		if t := h.Task(p.Pid); t != nil {
			for j := range t.Threads {
				s.Threads = append(s.Threads, ThreadSummary{t.Threads[j].Tid, string(t.Threads[j].Comm)})
			}
			if t.Stopped != 0 {
				s.State = fmt.Sprintf("stopped by signal %d", t.Stopped)
			}
		}
		list = append(list, s)
	}
	return list
}

// waitStatus reads a wait status as wait(2) encodes it.
func waitStatus(status uint32) string {
	if sig := status & 0x7f; sig != 0 {
		return fmt.Sprintf("killed by signal %d", sig)
	}
	return fmt.Sprintf("exit status %d", status>>8&0xff)
}

// users returns the pids, or tids, that share each object that parts tells of a
// task, ordered, and the objects in the order of those.
func users(h *Head, parts func(t *Task, has func(Ref, int32))) (refs []Ref, pids map[Ref][]int32) {
	pids = map[Ref][]int32{}
	for _, t := range h.Tasks {
		parts(t, func(ref Ref, id int32) { pids[ref] = append(pids[ref], id) })
	}
	for _, list := range pids {
		slices.Sort(list)
	}
	refs = slices.SortedFunc(maps.Keys(pids), func(a, b Ref) int { return cmp.Compare(pids[a][0], pids[b][0]) })
	return refs, pids
}

// tables are the descriptor tables of a task and who of it has them.
func (t *Task) tables(has func(Ref, int32)) {
	has(t.Files, t.Pid)
	for i := range t.Threads {
		if t.Threads[i].Files != 0 {
			has(t.Threads[i].Files, t.Threads[i].Tid)
		}
	}
}

func tableSummaries(h *Head) ([]TableSummary, []DescriptorSummary) {
	list := []TableSummary{}
	refs, pids := users(h, (*Task).tables)
	holders := fileHolders(h, refs, pids)
	for _, ref := range refs {
		s := TableSummary{Ref: ref, Pids: pids[ref], Descriptors: []DescriptorSummary{}}
		for _, d := range h.Files(ref).Descriptors {
			s.Descriptors = append(s.Descriptors, descriptorSummary(h, d, pids[ref][0], holders[d.File]))
		}
		slices.SortFunc(s.Descriptors, func(a, b DescriptorSummary) int { return cmp.Compare(a.FD, b.FD) })
		list = append(list, s)
	}
	return list, looseFiles(h, holders)
}

// holder is one descriptor of an open file, in the table of process pid.
type holder struct{ pid, fd int32 }

// fileHolders returns the descriptors of every open file, of each table those
// of one process.
func fileHolders(h *Head, tables []Ref, pids map[Ref][]int32) map[Ref][]holder {
	holders := map[Ref][]holder{}
	for _, table := range tables {
		for _, d := range h.Files(table).Descriptors {
			holders[d.File] = append(holders[d.File], holder{pids[table][0], d.FD})
		}
	}
	return holders
}

func descriptorSummary(h *Head, d Descriptor, pid int32, holders []holder) DescriptorSummary {
	const most = 16 // a file that thousands hold needs no thousand names in each
	f := h.File(d.File)
	s := DescriptorSummary{
		FD: d.FD, Ref: d.File, Kind: f.Kind, Pos: f.Pos,
		Target: target(h, f), Flags: openFlags(f.Flags, d.CloExec),
	}
	for _, o := range holders {
		if (o == holder{pid, d.FD}) {
			continue
		}
		if len(s.Shared) == most {
			s.Shared = append(s.Shared, fmt.Sprintf("and %d more", len(holders)-1-most))
			break
		}
		s.Shared = append(s.Shared, fmt.Sprintf("%d:%d", o.pid, o.fd))
	}
	return s
}

// target says what an open file leads to: its path, or what its kind has
// instead of one.
func target(h *Head, f *File) string {
	switch f.Kind {
	case KindPipe, KindFifo:
		p := h.Pipe(f.Pipe)
		return strings.TrimSpace(fmt.Sprintf("%s #%d, %d of %d bytes", p.Path, f.Pipe, p.Length, p.Capacity))
	case KindShmem:
		m := h.Shmem(f.Pipe)
		return strings.TrimSpace(fmt.Sprintf("%s #%d, %d bytes", m.Name, f.Pipe, m.Size))
	case KindExternal:
		return f.Key + ", was " + f.Path
	case KindMqueue:
		q := h.Mqueue(f.Pipe)
		return fmt.Sprintf("/%s #%d, %d of %d messages", q.Name, f.Pipe, len(q.Messages), q.MaxCount)
	case KindPtmx:
		return fmt.Sprintf("master of /dev/pts/%d", h.Pty(f.Pipe).Index)
	case KindEpoll:
		return epollTarget(f.Epoll)
	case KindEventfd:
		return fmt.Sprintf("count %d", f.Eventfd.Count)
	case KindTimerfd:
		return fmt.Sprintf("clock %d, %v left, every %v", f.Timerfd.Clock, time.Duration(f.Timerfd.Left), time.Duration(f.Timerfd.Interval))
	case KindSignalfd:
		return fmt.Sprintf("signals %#x", f.Signalfd.Mask)
	case KindPidfd:
		if f.Gone != nil {
			return "a task that is gone"
		}
		return fmt.Sprintf("task %d", f.Pid)
	case KindFanotify:
		return fmt.Sprintf("%d marks", len(f.Fanotify.Marks))
	case KindInotify:
		return inotifyTarget(f.Inotify)
	case KindSocket:
		return socketTarget(f.Socket)
	case KindStdio:
		return [...]string{"standard input", "standard output", "standard error"}[f.Stdio]
	}
	switch {
	case f.Path == "":
		return describe(f)
	case f.Removed != 0:
		return f.Path + " (deleted)"
	}
	return f.Path
}

func epollTarget(e *Epoll) string {
	const most = 8
	s := "watches"
	for i, entry := range e.Entries {
		if i == most {
			return s + fmt.Sprintf(" and %d more", len(e.Entries)-most)
		}
		s += fmt.Sprintf(" %d", entry.FD)
	}
	if len(e.Entries) == 0 {
		return "watches nothing"
	}
	return s
}

func inotifyTarget(n *Inotify) string {
	s := fmt.Sprintf("%d watches", len(n.Watches))
	if n.Overflow {
		s += ", events lost"
	}
	return s
}

// Linux address families (linux/socket.h).
const (
	afUnix    = 1
	afInet    = 2
	afInet6   = 10
	afNetlink = 16
)

func socketTarget(s *Socket) string {
	family := fmt.Sprintf("family %d", s.Family)
	if name, ok := map[int32]string{afUnix: "unix", afInet: "inet", afInet6: "inet6", afNetlink: "netlink"}[s.Family]; ok {
		family = name
	}
	types := map[int32]string{1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket"}
	words := []string{family, types[s.Type]}
	if s.Listening {
		words = append(words, "listening")
	}
	words = append(words, socketAddress(s.Family, s.Address, s.Path))
	if t := s.TCP; t != nil {
		if t.Peer != nil {
			words = append(words, "to", socketAddress(s.Family, t.Peer, ""))
		}
		words = append(words, fmt.Sprintf("state %d, %d bytes to read, %d to send", t.State, t.Receive.Bytes, t.Send.Bytes))
	}
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " ")
}

// socketAddress shows the address of a struct sockaddr_in, _in6 or a unix
// socket's path; other families have none that people read.
func socketAddress(family int32, a []byte, path string) string {
	switch {
	case family == afUnix:
		return path
	case family == afInet && len(a) >= 8:
		ip := netip.AddrFrom4([4]byte(a[4:8]))
		return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(a[2:])).String()
	case family == afInet6 && len(a) >= 24:
		ip := netip.AddrFrom16([16]byte(a[8:24]))
		return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(a[2:])).String()
	}
	return ""
}

// flagNames are the open(2) flags that people know, as x86 and arm64 share
// them (asm-generic/fcntl.h), larger ones before those they contain.
var flagNames = []struct {
	flag uint32
	name string
}{
	{0o4010000, "sync"}, {0o10000, "dsync"}, {0o2000, "append"}, {0o4000, "nonblock"}, {0o20000, "async"},
	{0o40000, "direct"}, {0o1000000, "noatime"}, {0o10000000, "path"},
}

// openFlags shows open(2) flags and close-on-exec as words.
func openFlags(flags uint32, cloexec bool) string {
	words := []string{[...]string{"r", "w", "rw", "ioctl"}[flags&3]}
	for _, f := range flagNames {
		if flags&f.flag == f.flag {
			words = append(words, f.name)
			flags &^= f.flag
		}
	}
	if cloexec {
		words = append(words, "cloexec")
	}
	return strings.Join(words, ",")
}

func memorySummaries(h *Head, stored storage) []MemorySummary {
	list := []MemorySummary{}
	refs, pids := users(h, func(t *Task, has func(Ref, int32)) { has(t.MM, t.Pid) })
	for _, ref := range refs {
		list = append(list, memorySummary(h.MM(ref), ref, pids[ref], stored[ref]))
	}
	return list
}

func memorySummary(mm *MM, ref Ref, pids []int32, stored map[string]uint64) MemorySummary {
	s := MemorySummary{Ref: ref, Pids: pids, Kinds: []KindSummary{}}
	for _, kind := range []string{AreaAnon, AreaFile, AreaShmem, AreaVDSO, AreaVDSO32, AreaAIO} {
		k := KindSummary{Kind: kind, Stored: stored[kind]}
		for i := range mm.Areas {
			if mm.Areas[i].Kind == kind {
				k.Areas++
				k.Mapped += mm.Areas[i].Size()
			}
		}
		if k.Areas > 0 {
			s.Kinds = append(s.Kinds, k)
		}
		s.Total.Areas += k.Areas
		s.Total.Mapped += k.Mapped
		s.Total.Stored += k.Stored
	}
	return s
}

func sharedSummaries(h *Head, stored storage) []SharedSummary {
	list := []SharedSummary{}
	for _, ref := range slices.Sorted(maps.Keys(h.Objects)) {
		if m := h.Shmem(ref); m != nil {
			list = append(list, SharedSummary{Ref: ref, Name: m.Name, Size: m.Size, Stored: stored[ref][""]})
		}
	}
	return list
}

// sectionSizes lists what was read by record type, in the order of a stream.
func sectionSizes(t *tally) []SectionSummary {
	names := [...]string{
		sectionHeader: "header", sectionArch: "arch", sectionContainer: "container", sectionTree: "tree",
		sectionObjects: "objects", sectionContents: "contents", sectionTrailer: "trailer", sectionError: "error",
	}
	order := slices.SortedFunc(maps.Keys(t.counts), func(a, b Type) int {
		return cmp.Or(cmp.Compare(types[a].section, types[b].section), cmp.Compare(a, b))
	})
	list := []SectionSummary{}
	for _, ty := range order {
		list = append(list, SectionSummary{names[types[ty].section], ty.String(), t.counts[ty], t.sizes[ty]})
	}
	return list
}
