package tracee

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Segments of a thread's own in the global descriptor table, as
// set_thread_area(2) makes them; 64-bit programs have them only by 32-bit calls.
const (
	ptraceGetThreadArea = 25
	ptraceSetThreadArea = 26

	firstThreadArea = 12 // GDT_ENTRY_TLS_MIN
	threadAreas     = 3
	userDescSize    = 16 // struct user_desc

	// seg_not_present, read_exec_only: how an empty entry is shown
	emptyDesc = 1<<5 | 1<<3

	debugControl = 848 + 7*8 // of struct user: u_debugreg[7], DR7
)

// ThreadAreas reads the thread's own segments, as struct user_desc each.
func (t *Thread) ThreadAreas() (areas [][]byte, err error) {
	for i := range uintptr(threadAreas) {
		b := make([]byte, userDescSize)
		if _, err := ptrace(ptraceGetThreadArea, t.Tid, firstThreadArea+i, uintptr(unsafe.Pointer(&b[0]))); err != nil {
			return nil, err
		}
		if le := binary.LittleEndian; le.Uint64(b[4:]) != 0 || le.Uint32(b[12:])&0xff != emptyDesc {
			areas = append(areas, b)
		}
	}
	return areas, nil
}

// SetThreadArea writes one of them.
func (t *Thread) SetThreadArea(desc []byte) error {
	entry := uintptr(binary.LittleEndian.Uint32(desc))
	_, err := ptrace(ptraceSetThreadArea, t.Tid, entry, uintptr(unsafe.Pointer(&desc[0])))
	return err
}

// DebugControl reads the thread's DR7: zero unless a debugger has left
// breakpoints or watchpoints in its debug registers.
func (t *Thread) DebugControl() (dr7 uint64, err error) {
	_, err = ptrace(unix.PTRACE_PEEKUSR, t.Tid, debugControl, uintptr(unsafe.Pointer(&dr7)))
	return dr7, err
}

// PortAccess reports a thread that may use I/O ports (ioperm(2), iopl(2)).
func (t *Thread) PortAccess() bool {
	const (
		nt386IOPerm = 0x201
		bitmap      = 65536 / 8
	)
	b, err := t.RegSet(nt386IOPerm, make([]byte, bitmap))
	return err == nil && len(b) > 0
}
