package mm

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// chunkSize is how many bytes of pages go into one record: large enough that a
// system call costs nothing beside the copying, small enough to stay in the
// second-level cache between the read and the write.
const chunkSize = 1 << 20

// maxRuns bounds the head of a record when pages are scattered.
const maxRuns = 4096

var zeroPage [PageSize]byte

// Saver gathers pages into records of the contents section, for one object at
// a time. Its memory is a few chunks, whatever the container's size: while one
// is written, the next is read.
type Saver struct {
	w    *image.Writer
	ref  image.Ref
	runs []image.Run
	buf  []byte
	used int

	free    chan []byte
	full    chan chunk
	written chan error
	// Progress, if set, is called before each record with its bytes.
	Progress func(bytes int) error
}

// chunk is a record on its way to the writer.
type chunk struct {
	ref  image.Ref
	runs []image.Run
	raw  []byte
	sum  uint32
}

// chunks is how many there are: one being read, one being written, and one to
// even out the difference.
const chunks = 3

// NewSaver returns a Saver that writes to w until Close. Nobody else may write
// to it meanwhile.
func NewSaver(w *image.Writer) *Saver {
	s := &Saver{w: w, free: make(chan []byte, chunks), full: make(chan chunk, chunks), written: make(chan error, 1)}
	for range chunks {
		s.free <- make([]byte, chunkSize)
	}
	s.buf = <-s.free
	go s.write()
	return s
}

// write is the writer's side. After an error it only hands buffers back, and
// the reader's side learns of it at its next flush, or in Close.
func (s *Saver) write() {
	var err error
	for c := range s.full {
		if err == nil {
			err = s.w.Pages(c.ref, c.runs, c.raw, c.sum)
			if err != nil {
				s.written <- err
			}
		}
		s.free <- c.raw[:chunkSize]
	}
	close(s.written)
}

// Close waits until everything is written. It returns the writer's error
// unless flush has returned it already.
func (s *Saver) Close() error {
	close(s.full)
	return <-s.written
}

// For makes the pages that follow belong to object ref.
func (s *Saver) For(ref image.Ref) *Saver {
	s.ref = ref
	return s
}

// add saves the pages of an extent, which read copies. Pages of zeros are left
// out, or noted as such where keepZero says that something lies under them.
func (s *Saver) add(e extent, keepZero bool, read func(addr uint64, b []byte) error) error {
	for at := e.start; at < e.end; {
		n := min(e.end-at, uint64(len(s.buf)-s.used))
		b := s.buf[s.used : s.used+int(n)]
		if err := read(at, b); err != nil {
			return err
		}
		s.keep(at, b, keepZero)
		at += n
		if s.used == len(s.buf) || len(s.runs) >= maxRuns {
			if err := s.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// keep takes the pages of b, which stands at the end of what is used, into
// runs, closing the gaps that pages of zeros leave.
func (s *Saver) keep(at uint64, b []byte, keepZero bool) {
	for off := 0; off < len(b); off += PageSize {
		page := b[off : off+PageSize]
		zero := bytes.Equal(page, zeroPage[:])
		if zero && !keepZero {
			continue
		}
		s.run(at+uint64(off), zero)
		if zero {
			continue
		}
		if dst := s.buf[s.used : s.used+PageSize]; &dst[0] != &page[0] {
			copy(dst, page)
		}
		s.used += PageSize
	}
}

// run appends a page to the last run, or begins another.
func (s *Saver) run(addr uint64, zero bool) {
	if n := len(s.runs); n > 0 {
		last := &s.runs[n-1]
		if last.Zero == zero && !last.Guard && !last.Borrowed && last.Addr+uint64(last.Count)*PageSize == addr {
			last.Count++
			return
		}
	}
	s.runs = append(s.runs, image.Run{Addr: addr, Count: 1, Zero: zero})
}

// note adds pages of which nothing is stored, as runs like kind.
func (s *Saver) note(e extent, kind image.Run) error {
	for e.start < e.end {
		n := min((e.end-e.start)/PageSize, math.MaxUint32)
		kind.Addr, kind.Count = e.start, uint32(n)
		s.runs = append(s.runs, kind)
		e.start += n * PageSize
		if len(s.runs) >= maxRuns {
			if err := s.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Saver) flush() error {
	if len(s.runs) == 0 {
		return nil
	}
	if s.Progress != nil {
		if err := s.Progress(s.used); err != nil {
			return err
		}
	}
	raw := s.buf[:s.used]
	c := chunk{s.ref, s.runs, raw, image.Checksum(raw)} // here, while they are in this processor's cache
	select {
	case err := <-s.written:
		return err
	case s.full <- c:
	}
	s.runs, s.buf, s.used = nil, <-s.free, 0
	return nil
}

// own yields the pages that are the address space's own, and guards wherever
// they are.
func (s *Space) own(yield func(src *source, f found) error) error {
	pm, err := openPagemap(s.Pid)
	if err != nil {
		return err
	}
	defer pm.Close()
	ranges := make([]extent, len(s.pages))
	for i, src := range s.pages {
		a := &s.Record.Areas[src.area]
		ranges[i] = extent{a.Start, a.End}
	}
	return pm.own(ranges, func(f found) error {
		src := &s.pages[f.in]
		if src.shared && !f.guard {
			return nil // saved once, from its inode
		}
		return yield(src, f)
	})
}

// Save writes the pages of the address space that are its own.
func (s *Space) Save(out *Saver) error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", s.Pid))
	if err != nil {
		return gone(s.Pid, err)
	}
	defer mem.Close()
	defer s.closeFrames()
	err = s.own(func(src *source, f found) error {
		if f.guard {
			return out.note(f.extent, image.Run{Guard: true})
		}
		err := s.holdings(f.extent, func(e extent, how holding) error {
			if how == borrowed {
				return out.note(e, image.Run{Borrowed: true})
			}
			return out.add(e, src.file, func(addr uint64, b []byte) error {
				return s.read(mem, addr, b, src.readable && how == alone)
			})
		})
		if err != nil {
			return fail.On(describe(&s.Record.Areas[src.area]), err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return out.flush()
}

// read copies pages, the direct way if it may. /proc/PID/mem copies twice, but
// reads what the task itself may not, and leaves shared by fork what is:
// process_vm_readv(2) pins pages, and for that each is made the process's own
// (gup_must_unshare in mm/internal.h).
func (s *Space) read(mem *os.File, addr uint64, b []byte, quick bool) error {
	if quick {
		if err := tracee.ReadMemory(s.Pid, addr, b); !errors.Is(err, unix.EFAULT) {
			return err
		}
	}
	_, err := mem.ReadAt(b, int64(addr))
	return err
}

// Resident estimates the bytes that saving a process's memory takes at most:
// what is present or swapped out and not a file's, from /proc/PID/status.
func Resident(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, gone(pid, err)
	}
	var total int64
	for line := range bytes.Lines(b) {
		for _, key := range []string{"RssAnon:", "RssShmem:", "VmSwap:", "HugetlbPages:"} {
			var kib int64
			if rest, ok := bytes.CutPrefix(line, []byte(key)); ok {
				if _, err := fmt.Sscanf(string(rest), "%d", &kib); err == nil {
					total += kib << 10
				}
			}
		}
	}
	return total, nil
}
