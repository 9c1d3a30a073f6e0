package bpf

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const aioEnv = "OCICKPT_TEST_AIO"

// iocb is struct iocb of linux/aio_abi.h.
type iocb struct {
	_      [2]uint64
	opcode uint16
	_      int16
	fd     uint32
	buf    uint64
	_      [4]uint64
}

func submit(ctx uint64, cb *iocb) {
	list := []*iocb{cb}
	if n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, uintptr(ctx), 1, uintptr(unsafe.Pointer(&list[0]))); n != 1 {
		panic(errno)
	}
}

// haveAIO makes two contexts, one idle with an event in its ring, one with a
// request that waits, and says by its output where they are.
func haveAIO() {
	const pread, poll = 0, 5
	var ctx [2]uint64
	for i := range ctx {
		if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(10*(i+1)), uintptr(unsafe.Pointer(&ctx[i])), 0); errno != 0 {
			panic(errno)
		}
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		panic(err)
	}
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		panic(err)
	}
	for range 3 {
		submit(ctx[0], &iocb{opcode: pread, fd: uint32(null.Fd())})
		submit(ctx[1], &iocb{opcode: poll, fd: uint32(pipe[0]), buf: unix.POLLIN})
	}
	var events [2][32]byte
	if n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, uintptr(ctx[0]), 2, 2, uintptr(unsafe.Pointer(&events)), 0, 0); n != 2 {
		panic(errno)
	}
	_ = binary.Write(os.Stdout, binary.LittleEndian, ctx)
	time.Sleep(time.Hour)
}

func TestAIO(t *testing.T) {
	lock(t)
	q, err := NewAIO()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	pid, said := helper(t, aioEnv, 0)
	var ctx [2]uint64
	if err := binary.Read(bytes.NewReader(said), binary.LittleEndian, &ctx); err != nil {
		t.Fatal(err)
	}
	all, err := q.Contexts()
	if err != nil {
		t.Fatal(err)
	}
	got := all[pid]
	want := [2]AIOContext{{Requests: 10, Tail: 3}, {Requests: 20, Busy: 3, Waits: true}}
	for i := range ctx {
		if got[ctx[i]] != want[i] {
			t.Errorf("context %d: %+v, want %+v", i, got[ctx[i]], want[i])
		}
	}
	if len(got) != 2 {
		t.Errorf("contexts %+v", got)
	}
}
