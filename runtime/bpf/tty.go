package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Side is one side of a pseudo-terminal.
type Side struct {
	Index  int
	Master bool
}

// Unread is what waits to be read at one side of a terminal. No system call
// shows it without taking it out, nor where a line ends that has not been read.
type Unread struct {
	Data []byte // as the reader will get it
	Ends []bool // Data[i] ends a line; 0 that does is an end of file, and no byte
	Rest []byte // behind it, not yet looked at by the line discipline
}

const (
	ptsMajor      = 136
	ptmxDevice    = 5<<20 | 2 // as the kernel numbers devices (include/linux/kdev_t.h)
	ttyBufferSize = 4096      // N_TTY_BUF_SIZE
	// A pty takes 8 KiB (tty_buffer_set_limit in drivers/tty/pty.c) in buffers of
	// at least 256 bytes.
	mostFlip    = 40
	largestFlip = 8191
	scratchSize = 16 << 10
)

// line is where the fields of struct n_tty_data (drivers/tty/n_tty.c) lie.
type line struct{ size, head, tail, data, ends int32 }

func (k *kernel) line() (l line, err error) {
	for name, at := range map[string]*int32{"read_head": &l.head, "read_tail": &l.tail, "read_buf": &l.data, "read_flags": &l.ends} {
		off, e := k.offset("n_tty_data", name)
		*at, err = off, errors.Join(err, e)
	}
	l.size = max(l.head, l.tail, l.data+ttyBufferSize, l.ends+ttyBufferSize/8) + 8
	if err == nil && l.size > scratchSize {
		err = errors.New("the line discipline of this kernel is larger than known")
	}
	return l, err
}

// Terminals asks what waits in the terminals that the tasks which we trace have
// open.
type Terminals struct {
	q       *Question
	scratch *ebpf.Map
	line    line
}

// NewTerminals loads the question.
func NewTerminals() (*Terminals, error) {
	t := &Terminals{}
	var err error
	if off {
		return nil, ErrOff
	}
	t.scratch, err = ebpf.NewMap(&ebpf.MapSpec{Name: "terminal", Type: ebpf.Array, KeySize: 4, ValueSize: scratchSize, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("memory for a program that reads terminals: %w", err)
	}
	if t.q, err = load("terminals", "task_file", tracedFile, t.body); err != nil {
		return nil, errors.Join(err, t.scratch.Close())
	}
	return t, nil
}

// Close frees the program.
func (t *Terminals) Close() error { return errors.Join(t.q.Close(), t.scratch.Close()) }

// tracedFile is traced, and keeps the context, which leads to the file, in R6.
func tracedFile(k *kernel) (asm.Instructions, error) {
	ins, err := k.traced()
	return append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, ins...), err
}

// Places on the program's stack.
const (
	atPointer = -8  // what was read last
	atLine    = -16 // the line discipline's data
	atPort    = -24 // the port, whose buffers come before the line discipline
	atKey     = -28 // of the scratch map: 0
	atHead    = -40 // device and index, the head of an answer
	atFlip    = -72 // struct tty_buffer
	atLength  = -80 // of a buffer
	flipSize  = 32  // of struct tty_buffer without its data
)

func (t *Terminals) body(k *kernel) (asm.Instructions, error) {
	var err error
	if t.line, err = k.line(); err != nil {
		return nil, err
	}
	var failed error
	at := func(name string, path ...string) int32 {
		off, err := k.offset(name, path...)
		failed = errors.Join(failed, err)
		return off
	}
	// read copies n bytes of kernel memory from R3 to a place on the stack.
	read := func(to, n int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, to), asm.Mov.Imm(asm.R2, n),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, endOfProgram),
		}
	}
	// field reads a pointer's worth at an offset from a register.
	field := func(to int32, from asm.Register, off, n int32) asm.Instructions {
		return append(asm.Instructions{asm.Mov.Reg(asm.R3, from), asm.Add.Imm(asm.R3, off)}, read(to, n)...)
	}
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R6, 24, asm.DWord), // the file, which is nil at the end
		asm.JEq.Imm(asm.R6, 0, endOfProgram),
		asm.LoadMem(asm.R1, asm.R6, int16(at("file", "f_inode")), asm.DWord),
		asm.LoadMem(asm.R2, asm.R1, int16(at("inode", "i_rdev")), asm.Word),
		asm.StoreMem(asm.RFP, atHead, asm.R2, asm.Word),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.RSh.Imm(asm.R3, 20),
		asm.JEq.Imm(asm.R3, ptsMajor, "terminal"),
		asm.JNE.Imm(asm.R2, ptmxDevice, endOfProgram),
		asm.LoadMem(asm.R8, asm.R6, int16(at("file", "private_data")), asm.DWord).WithSymbol("terminal"),
	}
	ins = append(ins, field(atPointer, asm.R8, at("tty_file_private", "tty"), 8)...)
	ins = append(ins, asm.LoadMem(asm.R8, asm.RFP, atPointer, asm.DWord))
	ins = append(ins, field(atHead+4, asm.R8, at("tty_struct", "index"), 4)...)
	ins = append(ins, field(atLine, asm.R8, at("tty_struct", "disc_data"), 8)...)
	ins = append(ins, field(atPort, asm.R8, at("tty_struct", "port"), 8)...)
	ins = append(ins,
		asm.StoreImm(asm.RFP, atKey, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, t.scratch.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, endOfProgram),
		asm.Mov.Reg(asm.R6, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, t.line.size),
		asm.LoadMem(asm.R3, asm.RFP, atLine, asm.DWord),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, endOfProgram),
		asm.LoadMem(asm.R8, asm.RFP, atPort, asm.DWord),
	)
	ins = append(ins, field(atPointer, asm.R8, at("tty_port", "buf")+at("tty_bufhead", "head"), 8)...)
	ins = append(ins, asm.LoadMem(asm.R8, asm.RFP, atPointer, asm.DWord))
	ins = append(ins, field(atFlip, asm.R8, 0, flipSize)...)
	next, commit, done := at("tty_buffer", "next"), at("tty_buffer", "commit"), at("tty_buffer", "read")
	ins = append(ins,
		// Most terminals are quiet, and many descriptors may lead to one.
		asm.LoadMem(asm.R1, asm.R6, int16(t.line.head), asm.DWord),
		asm.LoadMem(asm.R2, asm.R6, int16(t.line.tail), asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R2, "answer"),
		asm.LoadMem(asm.R1, asm.RFP, int16(atFlip+commit), asm.Word),
		asm.LoadMem(asm.R2, asm.RFP, int16(atFlip+done), asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, "answer"),
		asm.LoadMem(asm.R1, asm.RFP, int16(atFlip+next), asm.DWord),
		asm.JEq.Imm(asm.R1, 0, endOfProgram),
		asm.Mov.Reg(asm.R1, asm.R9).WithSymbol("answer"),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atHead), asm.Mov.Imm(asm.R3, 8),
		asm.FnSeqWrite.Call(),
		asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Reg(asm.R2, asm.R6), asm.Mov.Imm(asm.R3, t.line.size),
		asm.FnSeqWrite.Call(),
	)
	for i := range mostFlip {
		ins = append(ins, asm.JEq.Imm(asm.R8, 0, "last").WithSymbol(fmt.Sprint("flip", i)))
		ins = append(ins, field(atFlip, asm.R8, 0, flipSize)...)
		ins = append(ins,
			asm.LoadMem(asm.R7, asm.RFP, int16(atFlip+commit), asm.Word),
			asm.LoadMem(asm.R1, asm.RFP, int16(atFlip+done), asm.Word),
			asm.Sub.Reg(asm.R7, asm.R1),
			asm.JSLE.Imm(asm.R7, 0, fmt.Sprint("next", i)),
			asm.JGT.Imm(asm.R7, largestFlip, endOfProgram),
			asm.StoreMem(asm.RFP, atLength, asm.R7, asm.Word),
			asm.Mov.Reg(asm.R3, asm.R8), asm.Add.Reg(asm.R3, asm.R1), asm.Add.Imm(asm.R3, at("tty_buffer", "data")),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R7),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, endOfProgram),
			asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atLength), asm.Mov.Imm(asm.R3, 4),
			asm.FnSeqWrite.Call(),
			asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Reg(asm.R2, asm.R6), asm.Mov.Reg(asm.R3, asm.R7),
			asm.FnSeqWrite.Call(),
			asm.LoadMem(asm.R8, asm.RFP, int16(atFlip+next), asm.DWord).WithSymbol(fmt.Sprint("next", i)),
		)
	}
	return append(ins,
		asm.StoreImm(asm.RFP, atLength, 0, asm.Word).WithSymbol("last"),
		asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, atLength), asm.Mov.Imm(asm.R3, 4),
		asm.FnSeqWrite.Call(),
	), failed
}

// Unread answers, for every side at which something waits.
func (t *Terminals) Unread() (map[Side]Unread, error) {
	r, err := t.q.iter.Open()
	if err != nil {
		return nil, fmt.Errorf("read terminals by BPF: %w", err)
	}
	defer r.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read terminals by BPF: %w", err)
	}
	all := map[Side]Unread{}
	for in := bytes.NewBuffer(out); in.Len() > 0; {
		side, u, err := t.answer(in)
		if err != nil {
			return nil, fmt.Errorf("read terminals by BPF: %w", err)
		}
		all[side] = u
	}
	return all, nil
}

// answer takes one answer from a buffer: device and index, the line discipline's
// data, and buffers with their lengths before them until one of none.
func (t *Terminals) answer(in *bytes.Buffer) (s Side, u Unread, err error) {
	le := binary.LittleEndian
	head, l := in.Next(8), in.Next(int(t.line.size))
	if len(l) != int(t.line.size) {
		return s, u, io.ErrUnexpectedEOF
	}
	s = Side{Index: int(le.Uint32(head[4:])), Master: le.Uint32(head) == ptmxDevice}
	begin, end := le.Uint64(l[t.line.tail:]), le.Uint64(l[t.line.head:])
	if end-begin > ttyBufferSize {
		return s, u, fmt.Errorf("%d bytes in a buffer of %d", end-begin, ttyBufferSize)
	}
	for i := begin; i != end; i++ {
		at := i % ttyBufferSize
		u.Data = append(u.Data, l[uint64(t.line.data)+at])
		u.Ends = append(u.Ends, l[uint64(t.line.ends)+at/8]>>(at%8)&1 != 0)
	}
	for {
		length := in.Next(4)
		if len(length) != 4 {
			return s, u, errors.New("more buffers than known")
		}
		n := int(le.Uint32(length))
		if n == 0 {
			return s, u, nil
		}
		u.Rest = append(u.Rest, in.Next(n)...)
	}
}
