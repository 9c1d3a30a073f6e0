package mm

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// recordSize is how many bytes of pages go into one record: large enough that a
// system call costs nothing beside the copying, small enough to stay in a
// processor's own cache from the reading to the writing.
const recordSize = 512 << 10

// maxParts bounds the head of a record when pages are scattered.
const maxParts = 2048

var zeroPage [PageSize]byte

// Saver puts pages into records of the contents section, for one object at a
// time. The caller plans records; a few workers carry them out, each from the
// reading to the writing, so that one reads while another writes and no page goes
// from one processor to another in between. They are written in the order in which
// they were planned. The Saver's memory is a record for each worker.
type Saver struct {
	w       *image.Writer
	ref     image.Ref
	plan    record
	latest  <-chan struct{} // closed when all that was planned is written
	records chan record
	workers sync.WaitGroup
	small   []byte

	broken atomic.Bool // nothing more is to be read or written
	err    error       // why; changed by whose turn it is to write
	// Progress, if set, is called for each record that is planned, with how many
	// bytes of pages it is about.
	Progress func(bytes int) error
}

// savers is how many workers there are: while one writes, the other reads.
const savers = 2

// smallSize is the size up to which a record is carried out at once: to wake
// somebody takes longer.
const smallSize = 64 << 10

// NewSaver returns a Saver that writes to w until Close. Nobody else may write
// to it meanwhile.
func NewSaver(w *image.Writer) *Saver {
	none := make(chan struct{})
	close(none)
	s := &Saver{w: w, latest: none, records: make(chan record, savers)}
	for range savers {
		s.workers.Go(s.work)
	}
	return s
}

func (s *Saver) work() {
	var buf []byte
	for r := range s.records {
		if buf == nil {
			buf = make([]byte, recordSize)
		}
		s.carryOut(r, buf)
	}
}

// Close waits until everything is written. It returns the first error unless
// finish has returned it already.
func (s *Saver) Close() error {
	close(s.records)
	s.workers.Wait()
	return s.err
}

// For makes the pages that follow belong to object ref.
func (s *Saver) For(ref image.Ref) *Saver {
	s.ref = ref
	return s
}

// record is what is planned to become one.
type record struct {
	ref   image.Ref
	parts []part
	size  int             // bytes of pages to be read
	turn  <-chan struct{} // closed when those before it are written
	done  chan<- struct{} // to be closed when it is
}

// part is a run of pages of a record.
type part struct {
	run      image.Run                         // if nothing of it is stored; else where it is
	size     int                               // bytes to be read
	keepZero bool                              // something lies under it
	read     func(addr uint64, b []byte) error // nil if nothing is stored
}

// add plans to save the pages of an extent, which read copies; it is called by
// several workers at once. Pages of zeros are left out, or noted as such where
// keepZero says that something lies under them.
func (s *Saver) add(e extent, keepZero bool, read func(addr uint64, b []byte) error) error {
	for at := e.start; at < e.end; {
		n := min(e.end-at, uint64(recordSize-s.plan.size))
		s.plan.size += int(n)
		if err := s.put(part{image.Run{Addr: at}, int(n), keepZero, read}); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// note adds pages of which nothing is stored, as runs like kind.
func (s *Saver) note(e extent, kind image.Run) error {
	for e.start < e.end {
		n := min((e.end-e.start)/PageSize, math.MaxUint32)
		kind.Addr, kind.Count = e.start, uint32(n)
		e.start += n * PageSize
		if err := s.put(part{run: kind}); err != nil {
			return err
		}
	}
	return nil
}

func (s *Saver) put(p part) error {
	s.plan.parts = append(s.plan.parts, p)
	if s.plan.size == recordSize || len(s.plan.parts) == maxParts {
		return s.flush()
	}
	return nil
}

// errBroken ends the planning after an error of a worker, which finish tells.
var errBroken = errors.New("an earlier record could not be saved")

// flush hands over what is planned.
func (s *Saver) flush() error {
	r := s.plan
	s.plan = record{}
	if s.broken.Load() {
		return errBroken
	}
	if len(r.parts) == 0 {
		return nil
	}
	if s.Progress != nil {
		if err := s.Progress(r.size); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	r.ref, r.turn, r.done = s.ref, s.latest, done
	s.latest = done
	if r.size > smallSize {
		s.records <- r
		return nil
	}
	if s.small == nil {
		s.small = make([]byte, smallSize)
	}
	s.carryOut(r, s.small)
	return nil
}

// finish waits until all that was planned is written, after planning has come to
// an end with err. It returns the first error there was.
func (s *Saver) finish(err error) error {
	if err != nil {
		s.plan = record{}
	} else {
		err = s.flush()
	}
	<-s.latest
	if s.err != nil {
		err, s.err = s.err, nil
	}
	return err
}

// carryOut reads a record into buf and writes it when it is its turn.
func (s *Saver) carryOut(r record, buf []byte) {
	defer close(r.done)
	var g gathered
	var sum uint32
	var err error
	if !s.broken.Load() {
		g.buf = buf
		err = g.gather(r.parts)
		sum = image.Checksum(buf[:g.used]) // here, while they are in this processor's cache
	}
	<-r.turn
	if s.broken.Load() {
		return
	}
	if err == nil && len(g.runs) > 0 {
		err = s.w.Pages(r.ref, g.runs, buf[:g.used], sum)
	}
	if err != nil {
		s.err = err
		s.broken.Store(true)
	}
}

// gathered is what has been read of a record.
type gathered struct {
	runs []image.Run
	buf  []byte
	used int
}

func (g *gathered) gather(parts []part) error {
	for _, p := range parts {
		if p.read == nil {
			g.runs = append(g.runs, p.run)
			continue
		}
		b := g.buf[g.used : g.used+p.size]
		if err := p.read(p.run.Addr, b); err != nil {
			return err
		}
		g.keep(p.run.Addr, b, p.keepZero)
	}
	return nil
}

// keep takes the pages of b, which stands at the end of what is used, into
// runs, closing the gaps that pages of zeros leave.
func (g *gathered) keep(at uint64, b []byte, keepZero bool) {
	for off := 0; off < len(b); off += PageSize {
		page := b[off : off+PageSize]
		zero := bytes.Equal(page, zeroPage[:])
		if zero && !keepZero {
			continue
		}
		g.run(at+uint64(off), zero)
		if zero {
			continue
		}
		if dst := g.buf[g.used : g.used+PageSize]; &dst[0] != &page[0] {
			copy(dst, page)
		}
		g.used += PageSize
	}
}

// run appends a page to the last run, or begins another.
func (g *gathered) run(addr uint64, zero bool) {
	if n := len(g.runs); n > 0 {
		last := &g.runs[n-1]
		if last.Zero == zero && !last.Guard && !last.Borrowed && last.Addr+uint64(last.Count)*PageSize == addr {
			last.Count++
			return
		}
	}
	g.runs = append(g.runs, image.Run{Addr: addr, Count: 1, Zero: zero})
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
		area := &s.Record.Areas[src.area]
		err := s.holdings(f.extent, func(e extent, how holding) error {
			if how == borrowed {
				return out.note(e, image.Run{Borrowed: true})
			}
			return out.add(e, src.file, func(addr uint64, b []byte) error {
				return fail.On(describe(area), s.read(mem, addr, b, src.readable && how == alone))
			})
		})
		return fail.On(describe(area), err)
	})
	return out.finish(err)
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
