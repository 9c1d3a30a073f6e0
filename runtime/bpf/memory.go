package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// memory reads the kernel's memory, a piece at a time. What follows pointers of
// which nobody knows how many there are, a list or a tree, is better walked from
// here than by a program, whose loops the kernel wants to see the end of. The
// program is run by bpf(2) itself (BPF_PROG_TYPE_SYSCALL, Linux 5.14).
type memory struct {
	*kernel
	program *ebpf.Program
	answers *ebpf.Map
	answer  *ebpf.Memory // of the map
}

// request is the program's context.
type request struct {
	Addr   uint64 // 0: the address of the calling thread's task_struct is the answer
	Length uint64
}

// answerSize is how much is read at a time.
const answerSize = 4096

func newMemory() (*memory, error) {
	if off {
		return nil, ErrOff
	}
	m := &memory{kernel: remembered()}
	if err := m.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("load a program that reads the kernel's memory: %w", err), m.Close())
	}
	return m, nil
}

func (m *memory) load() (err error) {
	if m.answers, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "answer", Type: ebpf.Array, KeySize: 4, ValueSize: answerSize, MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE,
	}); err != nil {
		return err
	}
	if m.answer, err = m.answers.Memory(); err != nil {
		return err
	}
	const atKey = -4 // of the map's entry
	m.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "memory", Type: ebpf.Syscall, Flags: unix.BPF_F_SLEEPABLE, License: license,
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.StoreImm(asm.RFP, atKey, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, m.answers.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atKey),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, endOfProgram),
			asm.Mov.Reg(asm.R7, asm.R0),
			asm.Mov.Reg(asm.R1, asm.R0),
			asm.LoadMem(asm.R3, asm.R6, 0, asm.DWord),
			asm.LoadMem(asm.R2, asm.R6, 8, asm.DWord),
			asm.JEq.Imm(asm.R3, 0, "task"),
			asm.JGT.Imm(asm.R2, answerSize, endOfProgram),
			asm.FnProbeReadKernel.Call(),
			asm.Return(),
			asm.FnGetCurrentTask.Call().WithSymbol("task"),
			asm.StoreMem(asm.R7, 0, asm.R0, asm.DWord),
			asm.Mov.Imm(asm.R0, 0).WithSymbol(endOfProgram),
			asm.Return(),
		},
	})
	return err
}

func (m *memory) Close() error {
	m.keep()
	return errors.Join(m.program.Close(), m.answers.Close())
}

// read copies n bytes from an address.
func (m *memory) read(addr uint64, n int) ([]byte, error) {
	out := make([]byte, n)
	for done := 0; done < n; done += answerSize {
		r := request{addr + uint64(done), uint64(min(n-done, answerSize))}
		if r.Addr == 0 {
			return nil, errors.New("a pointer that leads nowhere")
		}
		if err := m.ask(r, out[done:][:r.Length]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (m *memory) ask(r request, to []byte) error {
	ret, err := m.program.Run(&ebpf.RunOptions{Context: r})
	if err == nil && ret != 0 {
		err = unix.Errno(-int32(ret))
	}
	if err == nil {
		_, err = m.answer.ReadAt(to, 0)
	}
	if err != nil {
		return fmt.Errorf("read %d bytes of the kernel's memory at %#x: %w", r.Length, r.Addr, err)
	}
	return nil
}

// word reads a pointer's worth.
func (m *memory) word(addr uint64) (uint64, error) {
	b, err := m.read(addr, 8)
	if err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint64(b), nil
}

// follow reads a pointer, and at each of the offsets from where it leads the next.
func (m *memory) follow(addr uint64, offsets ...int32) (uint64, error) {
	for _, off := range offsets {
		var err error
		if addr, err = m.word(addr + uint64(off)); err != nil {
			return 0, err
		}
	}
	return addr, nil
}

// inode is the address of the inode behind one of this process's descriptors.
func (m *memory) inode(fd int) (uint64, error) {
	at, err := m.offsets(map[string][]string{
		"files": {"task_struct", "files"}, "table": {"files_struct", "fdt"}, "list": {"fdtable", "fd"}, "inode": {"file", "f_inode"},
	})
	if err != nil {
		return 0, err
	}
	self := make([]byte, 8)
	if err := m.ask(request{}, self); err != nil {
		return 0, err
	}
	return m.follow(binary.NativeEndian.Uint64(self), at["files"], at["table"], at["list"], int32(8*fd), at["inode"])
}
