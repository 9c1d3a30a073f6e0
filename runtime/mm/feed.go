package mm

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A feeder puts pages into a stub's anonymous memory with UFFDIO_COPY
// (ioctl_userfaultfd(2)): the kernel copies into a page that it has just
// allocated, and neither clears it first nor takes a fault for it. That is
// twice as fast as writing into memory that is not there yet.
//
// The stub makes the descriptor, for it belongs to its address space; we take
// it over and do the rest from outside. Nobody touches the memory meanwhile:
// there are no faults to serve.
type feeder struct {
	file       *os.File
	space      *image.MM
	registered map[uint64]bool // areas, by their start
}

// Requests of include/uapi/linux/userfaultfd.h.
const (
	uffdAPI          = 0xaa
	uffdioAPI        = 0xc018aa3f
	uffdioRegister   = 0xc020aa00
	uffdioCopy       = 0xc028aa03
	registerMissing  = 1
	maxRegistrations = 1024 // areas beyond are filled the plain way
)

type uffdioAPIArg struct{ api, features, ioctls uint64 }

type uffdioRegisterArg struct{ start, length, mode, ioctls uint64 }

type uffdioCopyArg struct {
	dst          uint64
	src          unsafe.Pointer
	length, mode uint64
	copied       int64
}

// newFeeder returns nil where the stub may not have a userfaultfd (a user
// namespace, a kernel without it): then pages are written the plain way.
func newFeeder(s *tracee.Stub, m *image.MM) (*feeder, error) {
	var b tracee.Batch
	b.Try(unix.SYS_USERFAULTFD, tracee.W(unix.O_CLOEXEC|unix.O_NONBLOCK))
	if _, err := s.Run(&b); err != nil {
		return nil, err
	}
	if b.Err(0) != nil {
		return nil, nil
	}
	file, err := s.Take(int(b.Calls[0].Ret))
	if err != nil {
		return nil, err
	}
	f := &feeder{file: file, space: m, registered: map[uint64]bool{}}
	var done tracee.Batch
	done.Add(unix.SYS_CLOSE, tracee.W(b.Calls[0].Ret))
	if _, err := s.Run(&done); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if err := f.ioctl(uffdioAPI, unsafe.Pointer(&uffdioAPIArg{api: uffdAPI})); err != nil {
		return nil, file.Close()
	}
	return f, nil
}

func (f *feeder) ioctl(request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.file.Fd(), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// feed copies as much of b as lies in one area that takes it, and returns how
// many bytes of it are dealt with; 0 means that they must be written otherwise.
func (f *feeder) feed(addr uint64, b []byte) (int, error) {
	a := f.space.Area(addr)
	if a == nil || !f.register(a) {
		return 0, nil
	}
	n := min(uint64(len(b)), a.End-addr)
	for done := uint64(0); done < n; {
		arg := uffdioCopyArg{dst: addr + done, src: unsafe.Pointer(&b[done]), length: n - done}
		err := f.ioctl(uffdioCopy, unsafe.Pointer(&arg))
		switch {
		case arg.copied > 0:
			done += uint64(arg.copied)
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EEXIST): // the page is there already
			return int(done), nil
		case err != nil:
			return 0, fmt.Errorf("UFFDIO_COPY to %#x: %w", addr+done, err)
		}
	}
	return int(n), nil
}

// register makes an area's missing pages ours to bring.
func (f *feeder) register(a *image.Area) bool {
	if known, ok := f.registered[a.Start]; ok {
		return known
	}
	if a.Kind != image.AreaAnon || a.Shared || a.HugePage != 0 || len(f.registered) >= maxRegistrations {
		return false
	}
	arg := uffdioRegisterArg{start: a.Start, length: a.End - a.Start, mode: registerMissing}
	err := f.ioctl(uffdioRegister, unsafe.Pointer(&arg))
	f.registered[a.Start] = err == nil
	return err == nil
}
