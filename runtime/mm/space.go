package mm

import (
	"debug/elf"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// PageSize is the size of a page here.
const PageSize = 4096

// Files is what an address space needs of the room of open files: an object
// for a file that is mapped.
type Files interface {
	// Mapped returns the object of the file at path inside the container,
	// which is mapped under the name link in /proc/PID/map_files.
	Mapped(pid int, path, link string, write bool) (*object.Object, error)
	// Removed reports whether link leads to a file that was removed from a
	// tmpfs of the container, where it was called path.
	Removed(path, link string) bool
}

// Shared finds shared anonymous memory again that several address spaces map.
// It is known by the inode of the tmpfs file behind it.
type Shared struct {
	segments map[inode]*Segment
	sysv     map[sysvKey]*Segment
	order    []*Segment
}

type inode struct {
	dev string
	ino uint64
}

// NewShared returns an empty set.
func NewShared() *Shared {
	return &Shared{segments: map[inode]*Segment{}, sysv: map[sysvKey]*Segment{}}
}

// Segments lists what was found, in the order in which it was.
func (s *Shared) Segments() []*Segment { return s.order }

// Space is the address space of a process as Scan found it.
type Space struct {
	object.Object
	Pid    int
	Record *image.MM

	files []*object.Object // by area, nil for none
	exe   *object.Object
	ipc   uint64   // inode of the ipc namespace
	pages []source // areas with pages that must be saved
	bound []int    // areas with a memory policy of their own
	rings []int    // of asynchronous I/O

	donor  *Space // whose pages are shared, see lend.go
	frames *frames

	related bool // others may share pages by fork
	merges  bool // or by KSM
	cousins uint64
	Brk     uint64
}

// source is an area with pages of its own.
type source struct {
	area     int
	readable bool // by process_vm_readv(2), which respects PROT_NONE
	file     bool // a file lies under it: pages of zeros count
	shared   bool // only its guards are of interest
}

// The VmFlags (show_smap_vma_flags in fs/proc/task_mmu.c) that mean more here
// than a flag of mmap(2) or madvise(2).
const (
	accounted  = "ac" // VM_ACCOUNT
	locked     = "lo" // mlock(2)
	lockedLate = "lf" // with locked: mlock2(2) MLOCK_ONFAULT
	droppable  = "dp" // mmap(2) MAP_DROPPABLE
	writable   = "mw" // VM_MAYWRITE: mprotect(2) may make it writable
	sealed     = "sl" // mseal(2)
	hugetlb    = "ht"
)

// restorable are the VmFlags that a mapping is given again, with the call that
// sets them.
var restorable = []string{"gd", "sr", "rr", "dc", "wf", "dd", "hg", "nh", "mg", "nr", "sf", accounted, locked, lockedLate, droppable, sealed}

// refused are the VmFlags of mappings that cannot be made again.
var refused = map[string]string{
	"io": "memory of a device",
	"pf": "memory of a device",
	"mm": "memory of a device",
	"um": "memory registered with userfaultfd",
	"uw": "memory registered with userfaultfd",
	"ui": "memory registered with userfaultfd",
	"ss": "a shadow stack",
}

// Scan reads the areas of a process. It changes nothing and works on a running
// process too, to find out early what cannot be saved.
// ipc is the inode of its ipc namespace.
func Scan(pid int, ipc uint64, maps *Mappings, files Files, shared *Shared) (*Space, error) {
	if maps.err != nil {
		return nil, maps.err
	}
	s := &Space{Pid: pid, ipc: ipc, Record: &image.MM{}}
	s.Object = object.Object{Type: image.TypeMM, Record: s.Record, Complete: s.complete}
	for i := range maps.all {
		m := &maps.all[i]
		if err := s.add(m, files, shared); err != nil {
			return nil, fail.On(fmt.Sprintf("memory at %x-%x %s", m.start, m.end, m.name), err)
		}
	}
	if err := s.checkAttached(); err != nil {
		return nil, err
	}
	return s, s.readExe(files)
}

func (s *Space) add(m *mapping, files Files, shared *Shared) error {
	switch {
	case m.name == "[vsyscall]":
		return nil
	case m.name == "[vdso]" || strings.HasPrefix(m.name, "[vvar"):
		return s.addVDSO(m)
	}
	for _, f := range m.flags {
		if why := refused[f]; why != "" && !(f == "mm" && m.inode == 0) {
			return fail.Refuse("", why+" is not supported", "unmap it before the checkpoint")
		}
	}
	// Memory that may only be executed has a key by the kernel's own doing, and
	// will have one again (execute_only_pkey in arch/x86/mm/pkeys.c).
	if m.key != 0 && protection(m.perms) != unix.PROT_EXEC {
		return fail.Refuse("", "memory with a protection key is not supported: which keys are allocated cannot be asked", "unmap it before the checkpoint")
	}
	a := image.Area{Start: m.start, End: m.end, Prot: protection(m.perms), Shared: m.shared(), Offset: m.offset, Name: m.name}
	for _, f := range m.flags {
		if slices.Contains(restorable, f) {
			a.Flags = append(a.Flags, f)
		}
	}
	s.merges = s.merges || m.has("mg")
	if m.has(hugetlb) {
		a.HugePage = m.pageSize
	}
	under, err := s.classify(&a, m, files, shared)
	if err != nil {
		return err
	}
	s.pages = append(s.pages, source{area: len(s.Record.Areas), readable: a.Prot&unix.PROT_READ != 0, file: a.Kind != image.AreaAnon, shared: a.Shared})
	s.Record.Areas = append(s.Record.Areas, a)
	s.files = append(s.files, under)
	return nil
}

// classify finds the area's kind and what lies under it.
func (s *Space) classify(a *image.Area, m *mapping, files Files, shared *Shared) (*object.Object, error) {
	if !m.shared() && (m.inode == 0 || m.name == hugeMemory) {
		a.Kind, a.Offset = image.AreaAnon, 0
		return nil, nil
	}
	link := fmt.Sprintf("/proc/%d/map_files/%x-%x", s.Pid, m.start, m.end)
	switch {
	case a.HugePage != 0 && m.name != hugeMemory && !isMemfd(m.name) && !strings.HasPrefix(m.name, sysvPrefix):
		return nil, fail.Refuse("", "a mapping of a file of a hugetlbfs is not supported: its contents are not in the image", "unmap it before the checkpoint")
	case m.shared() && anonymousShared(m.name), isMemfd(m.name), m.deleted() && files.Removed(strings.TrimSuffix(m.name, deletedSuffix), link):
		a.Kind = image.AreaShmem
		if m.shared() && m.has(writable) {
			a.Flags = append(a.Flags, writable)
		}
		seg, err := shared.segment(inode{m.dev, m.inode}, link, m.name)
		if err != nil {
			return nil, err
		}
		return &seg.Object, nil
	case m.name == "/secretmem"+deletedSuffix:
		return nil, fail.Refuse("", "secret memory (memfd_secret) is not supported: nobody but its owner can read it", "unmap it before the checkpoint")
	case strings.HasPrefix(m.name, sysvPrefix):
		return shared.attached(s.ipc, a, m, link)
	case strings.HasPrefix(m.name, aioRing):
		a.Kind = image.AreaAIO
		s.rings = append(s.rings, len(s.Record.Areas))
		return nil, nil
	case strings.HasPrefix(m.name, "anon_inode:"):
		return nil, fail.Refuse("", "a mapping of "+m.name+" is not supported", "close it before the checkpoint")
	case !strings.HasPrefix(m.name, "/"):
		return nil, fail.Refuse("", "an unknown kind of mapping", "")
	}
	a.Kind = image.AreaFile
	return files.Mapped(s.Pid, m.name, link, m.shared() && m.has("mw"))
}

// addVDSO joins [vvar], [vvar_vclock] and [vdso], which the kernel maps
// together in one call, into one area.
func (s *Space) addVDSO(m *mapping) error {
	if n := len(s.Record.Areas); n > 0 && s.Record.Areas[n-1].Kind == image.AreaVDSO && s.Record.Areas[n-1].End == m.start {
		s.Record.Areas[n-1].End = m.end
	} else {
		s.Record.Areas = append(s.Record.Areas, image.Area{Start: m.start, End: m.end, Kind: image.AreaVDSO, Prot: protection(m.perms), Name: "[vdso]"})
		s.files = append(s.files, nil)
	}
	if m.name != "[vdso]" || m.end > narrowSize {
		return nil
	}
	var class [1]byte
	err := tracee.ReadMemory(s.Pid, m.start+uint64(elf.EI_CLASS), class[:])
	if elf.Class(class[0]) == elf.ELFCLASS32 {
		s.Record.Areas[len(s.Record.Areas)-1].Kind = image.AreaVDSO32
	}
	return err
}

// Narrow reports the address space of a 32-bit program, which is known by its vdso.
func (s *Space) Narrow() bool {
	return slices.ContainsFunc(s.Record.Areas, func(a image.Area) bool { return a.Kind == image.AreaVDSO32 })
}

func protection(perms string) (prot uint32) {
	for i, p := range []uint32{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if perms[i] != '-' {
			prot |= p
		}
	}
	return prot
}

func (s *Space) readExe(files Files) error {
	link := fmt.Sprintf("/proc/%d/exe", s.Pid)
	path, err := os.Readlink(link)
	if err != nil {
		return gone(s.Pid, err)
	}
	s.exe, err = files.Mapped(s.Pid, path, link, false)
	return fail.On("executable "+path, err)
}

// Layout fields of /proc/PID/stat in the order of struct prctl_mm_map:
// start_code, end_code, start_data, end_data, start_brk, brk, start_stack,
// arg_start, arg_end, env_start, env_end. brk (0 here) stands nowhere in /proc.
var layoutFields = [11]int{26, 27, 45, 46, 47, 0, 28, 48, 49, 50, 51}

// Details reads what only a stopped process tells reliably: the layout of its
// code, arguments and heap, and the auxiliary vector.
func (s *Space) Details(field func(n int) uint64, brk uint64) (err error) {
	for i, n := range layoutFields {
		if n != 0 {
			s.Record.Layout[i] = field(n)
		} else {
			s.Record.Layout[i] = brk
		}
	}
	s.Record.Auxv, err = os.ReadFile(fmt.Sprintf("/proc/%d/auxv", s.Pid))
	return gone(s.Pid, err)
}

// complete fills in the references once the files have theirs.
func (s *Space) complete() {
	for i, f := range s.files {
		s.Record.Areas[i].File = object.RefOf(f)
	}
	s.Record.Exe = object.RefOf(s.exe)
	if s.donor != nil {
		s.Record.Donor = s.donor.Ref
	}
}
