package tracee

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxSlots bounds the slots used of a cave; the vdso's tail has room for two.
const maxSlots = 8

// cave is a run of executable bytes of a process that nothing uses: the zeros
// between the end of an ELF image and the end of its last page. Of the [vdso]
// every process has its own copy; writing there through /proc/PID/mem costs one
// private page. A process without one may have room behind the text of a mapped
// file, whose private copy of the page then is what we write to; so may one in
// whose vdso an ocickpt that died has left something.
//
// Code put there needs no mapping that is writable and executable at once, which
// PR_SET_MDWE or SELinux's execmem would refuse.
type cave struct {
	pid   int
	mem   *os.File // /proc/PID/mem
	slots []uint64
	wide  int // how many of them are in the first room, if there is another; else 0
}

// NoCaveError says that a process has no room for our code.
type NoCaveError struct{ Pid int }

func (e *NoCaveError) Error() string {
	return fmt.Sprintf("process %d: no %d unused bytes behind a vdso or behind the text of a mapped file", e.Pid, slotSize)
}

// NoSlotError says that ocickpts which died left every slot of a process's cave
// in use, as far as can be seen: a signal handler of thread Tid may still return
// into the last one that was looked at. Trying again later is the remedy.
type NoSlotError struct{ Pid, Tid int }

func (e *NoSlotError) Error() string {
	return fmt.Sprintf("process %d: thread %d may still need what an earlier ocickpt left in its cave; try again later", e.Pid, e.Tid)
}

// area is a line of /proc/PID/maps.
type area struct {
	start, end, offset uint64
	perms, path        string
}

func (a area) contains(addr uint64) bool { return addr >= a.start && addr < a.end }

func readAreas(pid int) (areas []area, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		a, err := parseArea(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("%s: %q: %w", f.Name(), lines.Text(), err)
		}
		areas = append(areas, a)
	}
	return areas, lines.Err()
}

func parseArea(line string) (a area, err error) {
	from, rest, _ := strings.Cut(line, "-")
	to, rest, _ := strings.Cut(rest, " ")
	a.perms, rest, _ = strings.Cut(rest, " ")
	offset, _, _ := strings.Cut(rest, " ")
	for text, at := range map[*string]*uint64{&from: &a.start, &to: &a.end, &offset: &a.offset} {
		v, e := strconv.ParseUint(*text, 16, 64)
		*at, err = v, errors.Join(err, e)
	}
	if i := strings.IndexAny(line, "/["); i >= 0 {
		a.path = line[i:]
	}
	return a, err
}

// findCave looks at the process and changes nothing.
func findCave(pid int, mem *os.File) (*cave, error) {
	areas, err := readAreas(pid)
	if err != nil {
		return nil, err
	}
	c := &cave{pid: pid, mem: mem}
	for _, vdso := range []bool{true, false} {
		for i, a := range areas {
			if a.perms != "r-xp" || (a.path == "[vdso]") != vdso {
				continue
			}
			end, ok := imageEnd(mem, areas, i)
			if !ok {
				continue
			}
			before := len(c.slots)
			left, err := c.measure((end+63)&^63, a.end)
			if err != nil {
				return nil, err
			}
			if c.wide == 0 && len(c.slots) > before {
				c.wide = before
			}
			if len(c.slots) > 0 && !left || len(c.slots) == maxSlots {
				return c, nil
			}
		}
	}
	if len(c.slots) == 0 {
		return nil, &NoCaveError{pid}
	}
	return c, nil
}

// imageEnd returns the address in area i behind which its ELF image has nothing
// more to say. Bytes that merely are zero would not do: they may be data.
func imageEnd(mem io.ReaderAt, areas []area, i int) (uint64, bool) {
	a := areas[i]
	if a.path == "[vdso]" {
		end, _, err := elfEnds(mem, a.start)
		return a.start + end, err == nil
	}
	if !strings.HasPrefix(a.path, "/") {
		return 0, false
	}
	for _, head := range areas[:i+1] {
		if head.path == a.path && head.offset == 0 {
			_, text, err := elfEnds(mem, head.start)
			end := head.start + text
			return end, err == nil && a.contains(end)
		}
	}
	return 0, false
}

// elfEnds reads the ELF headers at base and returns, as offsets from base, the
// end of the file as far as the headers know it, and the end of the executable
// segment in memory.
func elfEnds(mem io.ReaderAt, base uint64) (file, text uint64, err error) {
	h, progs, err := elfHeaders(mem, base)
	if err != nil {
		return 0, 0, err
	}
	file = h.Shoff + uint64(h.Shnum)*uint64(h.Shentsize)
	var first uint64 // address of file offset 0, as linked
	for _, p := range progs {
		if elf.ProgType(p.Type) != elf.PT_LOAD {
			continue
		}
		file = max(file, p.Off+p.Filesz)
		if p.Off == 0 {
			first = p.Vaddr
		}
		if elf.ProgFlag(p.Flags)&elf.PF_X != 0 {
			text = p.Vaddr + p.Filesz - first
		}
	}
	return file, text, nil
}

// elfHeaders reads an ELF header and the program headers that it leads to, those
// of a 32-bit image as 64-bit ones.
func elfHeaders(mem io.ReaderAt, base uint64) (h elf.Header64, progs []elf.Prog64, err error) {
	read := func(at uint64, into any) error {
		return binary.Read(io.NewSectionReader(mem, int64(base+at), int64(binary.Size(into))), binary.LittleEndian, into)
	}
	if err := read(0, &h); err != nil {
		return h, nil, err
	}
	narrow := h.Ident[elf.EI_CLASS] == byte(elf.ELFCLASS32)
	if narrow {
		var h32 elf.Header32
		if err := read(0, &h32); err != nil {
			return h, nil, err
		}
		h = elf.Header64{Ident: h.Ident, Phoff: uint64(h32.Phoff), Phnum: h32.Phnum, Shoff: uint64(h32.Shoff), Shnum: h32.Shnum, Shentsize: h32.Shentsize}
	}
	if string(h.Ident[:4]) != elf.ELFMAG || !narrow && h.Ident[elf.EI_CLASS] != byte(elf.ELFCLASS64) || h.Phnum > 64 {
		return h, nil, errors.New("no ELF image")
	}
	progs = make([]elf.Prog64, h.Phnum)
	if !narrow {
		return h, progs, read(h.Phoff, progs)
	}
	progs32 := make([]elf.Prog32, h.Phnum)
	err = read(h.Phoff, progs32)
	for i, p := range progs32 {
		progs[i] = elf.Prog64{Type: p.Type, Flags: p.Flags, Off: uint64(p.Off), Vaddr: uint64(p.Vaddr), Filesz: uint64(p.Filesz)}
	}
	return h, progs, err
}

// measure adds the slots from start to limit that are empty or hold what an
// earlier ocickpt left, and says whether there are such.
func (c *cave) measure(start, limit uint64) (left bool, err error) {
	for at := start; at+slotSize <= limit && len(c.slots) < maxSlots; at += slotSize {
		s, err := c.read(at)
		if err != nil {
			return left, err
		}
		if !s.empty && s.Magic != slotMagic {
			return left, nil
		}
		left = left || !s.empty
		c.slots = append(c.slots, at)
	}
	return left, nil
}

// contains reports whether addr lies in a slot.
func (c *cave) contains(addr uint64) bool {
	return slices.ContainsFunc(c.slots, func(at uint64) bool { return addr-at < slotSize })
}

// slot is what was found in a slot.
type slot struct {
	slotHeader
	empty bool
}

func (c *cave) read(at uint64) (s slot, err error) {
	b := make([]byte, slotSize)
	if _, err := c.mem.ReadAt(b, int64(at)); err != nil {
		return s, fmt.Errorf("cave of process %d: %w", c.pid, gone(err))
	}
	s.empty = len(bytes.Trim(b, "\x00")) == 0
	_, err = binary.Decode(b, binary.LittleEndian, &s.slotHeader)
	return s, err
}

func (c *cave) write(at uint64, b []byte) error {
	if _, err := c.mem.WriteAt(b, int64(at)); err != nil {
		return fmt.Errorf("cave of process %d: %w", c.pid, gone(err))
	}
	return nil
}

// clear empties the slot at. What is left in the first room says that the others
// have been used too: there may be threads in them, and handlers that return there.
func (c *cave) clear(at uint64, tgid uint32) error {
	b := make([]byte, slotSize)
	if i := slices.Index(c.slots, at); i < c.wide {
		_, _ = binary.Encode(b, binary.LittleEndian, &slotHeader{Magic: slotMagic, Tgid: tgid})
	}
	return c.write(at, b)
}

// gone makes ErrGone of what reading or writing /proc/PID/mem returns once the
// process has given up its memory: nothing.
func gone(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrShortWrite) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w (%w)", ErrGone, err)
	}
	return err
}

// take returns the address of a slot that may be written.
//
// Leaving empties a slot, so one that is not empty and not in use is from an
// ocickpt that died. Its thread has long left the code of the
// slot by then, or it would be busy, but a signal handler that interrupted it
// there may still return to it. So an empty slot is taken if there is any, and
// else one to which nothing points any more.
func (c *cave) take(id ids) (uint64, error) {
	var used []uint64
	for _, at := range c.slots {
		s, err := c.read(at)
		if err != nil {
			return 0, err
		}
		if s.empty {
			return at, nil
		}
		used = append(used, at)
	}
	var none *NoSlotError
	for _, at := range used {
		err := c.abandoned(at, id.tgid)
		if err == nil {
			return at, nil
		}
		if !errors.As(err, &none) {
			return 0, err
		}
	}
	return 0, none
}

// abandoned proves that nobody returns to the slot at: its thread is gone, or has no
// signal frame on its stack that leads there. It returns a *NoSlotError if it cannot.
func (c *cave) abandoned(at uint64, tgid uint32) error {
	s, err := c.read(at)
	if err != nil {
		return err
	}
	none := &NoSlotError{Pid: c.pid, Tid: int(s.Tid)}
	if s.Tgid != tgid {
		// Inherited by fork(2), perhaps inside such a handler, or the slot of
		// another process in the same address space (CLONE_VM).
		return none
	}
	if s.Tid == 0 {
		return nil // cleared
	}
	owner, err := threadByNamespaceID(c.pid, s.Tid)
	if owner == nil || err != nil {
		return err
	}
	pointed, err := c.onStack(owner, at, s.SP)
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err == nil && pointed {
		err = none
	}
	return err
}

// onStack looks for the frame of a signal that interrupted the thread in the
// slot at, when its stack pointer was sp. Frames of handlers that still run lie
// above the present stack pointer: up to sp, or on an alternate stack, whose
// size is bounded here by a guess that is far above what anybody uses. What is left
// of the frame of a handler that has returned makes the slot wait, no more.
func (c *cave) onStack(t *Thread, at, sp uint64) (bool, error) {
	const altStack, most = 256 << 10, 8 << 20
	r, err := t.Regs()
	if err != nil {
		return false, err
	}
	areas, err := readAreas(c.pid)
	if err != nil {
		return false, err
	}
	for _, a := range areas {
		if !a.contains(r.Rsp) {
			continue
		}
		end := r.Rsp + altStack
		if a.contains(sp) && sp > end {
			end = sp
		}
		if end = min(end, a.end); end-r.Rsp > most {
			return true, nil
		}
		return c.pointed(at, sp, r.Rsp&^7, end&^7)
	}
	return true, nil // a stack pointer that points nowhere proves nothing
}

// pointed reports whether there is a signal frame in [from, to) that returns to the
// slot at: with the stack pointer that the slot's thread has had all the time, and
// in 64-bit mode. In struct sigcontext_64 sp, ip, flags and cs stand in that order;
// in struct sigcontext_32, of handlers of 32-bit code, ip, cs, flags and sp.
func (c *cave) pointed(at, sp, from, to uint64) (bool, error) {
	b := make([]byte, to-from)
	if _, err := c.mem.ReadAt(b, int64(from)); err != nil {
		return false, fmt.Errorf("stack of process %d: %w", c.pid, gone(err))
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	for i := 1; i+2 < len(b)/8; i++ {
		if word(i)-at < slotSize && word(i-1) == sp && uint16(word(i+2)) == userCS64 {
			return true, nil
		}
	}
	half := func(i int) uint64 { return uint64(binary.LittleEndian.Uint32(b[4*i:])) }
	for i := 0; i+3 < len(b)/4; i++ {
		if half(i)-at < slotSize && uint16(half(i+1)) == userCS64 && half(i+3) == sp {
			return true, nil
		}
	}
	return false, nil
}
