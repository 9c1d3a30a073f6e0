package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// VforkParent is what the kernel keeps of a thread that waits in vfork(2) for its
// child, where nobody can stop it to ask (kernel_clone in kernel/fork.c).
type VforkParent struct {
	Child int // host tid of the child that it waits for

	Regs           []byte // struct pt_regs: as the thread entered the call
	FSBase, GSBase uint64
	Selectors      [4]uint16 // of ds, es, fs, gs
	PKRU           uint32
	XFeatures      uint64 // of FPU that a program may use
	FPU            []byte // its xsave area in the kernel's own, compacted form

	TidAddress uint64
	DeathSig   int32
	Securebits uint32
	Rseq       uint64
	RseqSize   uint32
	RseqSig    uint32
	StackSP    uint64 // sigaltstack(2)
	StackSize  uint64
	StackFlags uint32
	Slack      uint64 // the default of its timer slack

	Actions   []byte // struct sigaction of signals 1 to 64, of 32 bytes each
	Subreaper bool
	Timers    bool // an interval timer is armed
}

// A piece is some bytes of the kernel: the way from the task by pointers, and how
// many at its end.
type piece struct {
	way  []int32
	size int32
}

const (
	ptRegsSize  = 168
	actionsSize = 64 * 32
	fpuSize     = 4096 // the kernel's room in a task for everything but AMX

	atOnce = 256 // bytes that are copied at once, on the program's stack
)

// VforkParents asks about the threads given, by host tid.
func VforkParents(tids []int) (map[int]VforkParent, error) {
	var pieces []piece
	q, err := load("vfork_parents", "task", (*kernel).everyone, func(k *kernel) (asm.Instructions, error) {
		var err error
		if pieces, err = k.vforkPieces(); err != nil {
			return nil, err
		}
		return k.vforkProgram(tids, pieces)
	})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	out, err := q.read()
	if err != nil {
		return nil, err
	}
	return decodeParents(out, pieces)
}

// vforkPieces are the fields of VforkParent, in the order in which decodeParent
// takes them.
func (k *kernel) vforkPieces() ([]piece, error) {
	var pieces []piece
	var errs error
	add := func(size int32, way ...[]string) {
		p := piece{size: size}
		for _, step := range way {
			at, err := k.offset(step[0], step[1:]...)
			errs = errors.Join(errs, err)
			p.way = append(p.way, at)
		}
		pieces = append(pieces, p)
	}
	task := func(path ...string) []string { return append([]string{"task_struct"}, path...) }
	add(8, task("thread", "fsbase"))
	add(8, task("thread", "gsbase"))
	add(4, task("thread", "pkru"))
	add(8, task("clear_child_tid"))
	add(4, task("pdeath_signal"))
	add(4, task("cred"), []string{"cred", "securebits"})
	add(8, task("rseq"))
	add(4, task("rseq_len"))
	add(4, task("rseq_sig"))
	add(8, task("sas_ss_sp"))
	add(8, task("sas_ss_size"))
	add(4, task("sas_ss_flags"))
	add(8, task("default_timer_slack_ns"))
	add(4, task("signal"), []string{"signal_struct", "is_child_subreaper"})
	add(8, task("signal"), []string{"signal_struct", "it_real_incr"})
	add(1, task("signal"), []string{"signal_struct", "real_timer", "state"})
	add(32, task("signal"), []string{"signal_struct", "it"})
	add(actionsSize, task("sighand"), []string{"sighand_struct", "action"})
	fpu, err := k.fpu()
	errs = errors.Join(errs, err)
	add(8, task("pid"), []string{"fpstate", "user_xfeatures"})
	pieces[len(pieces)-1].way[0] = fpu
	add(fpuSize, task("pid"), []string{"fpstate", "regs"})
	pieces[len(pieces)-1].way[0] = fpu
	for _, selector := range []string{"ds", "es", "fsindex", "gsindex"} {
		add(2, task("thread", selector))
	}
	return pieces, errs
}

// fpu is where in a task the pointer to its extended registers lies: in its
// thread_struct, since Linux 6.16 behind the task.
func (k *kernel) fpu() (int32, error) {
	in, err := k.offset("fpu", "fpstate")
	if err != nil {
		return 0, err
	}
	if at, err := k.offset("task_struct", "thread", "fpu"); err == nil {
		return at + in, nil
	}
	size, err := k.sizeOf("task_struct")
	return size + in, err
}

// vforkProgram puts out, for each task whose parent is to be found, 1 with both
// tids, and for each of the threads given 2 with its tid and the pieces.
func (k *kernel) vforkProgram(tids []int, pieces []piece) (asm.Instructions, error) {
	pid, err := k.offset("task_struct", "pid")
	if err != nil {
		return nil, err
	}
	done, err := k.offset("task_struct", "vfork_done")
	if err != nil {
		return nil, err
	}
	parent, err := k.offset("task_struct", "real_parent")
	if err != nil {
		return nil, err
	}
	ins := asm.Instructions{
		asm.LoadMem(asm.R1, asm.R7, int16(pid), asm.Word),
		asm.StoreMem(asm.RFP, -16, asm.R1, asm.DWord),
		asm.LoadMem(asm.R2, asm.R7, int16(done), asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "parents"),
		asm.LoadMem(asm.R2, asm.R7, int16(parent), asm.DWord),
		asm.LoadMem(asm.R2, asm.R2, int16(pid), asm.Word),
		asm.StoreMem(asm.RFP, -8, asm.R2, asm.DWord),
		asm.Mov.Imm(asm.R2, 1),
		asm.StoreMem(asm.RFP, -24, asm.R2, asm.DWord),
	}
	ins = append(ins, write(-24, 24)...)
	ins = append(ins, asm.LoadMem(asm.R1, asm.RFP, -16, asm.DWord).WithSymbol("parents"))
	for _, tid := range append(tids, 0) { // nobody's, so that what follows is reached
		ins = append(ins, asm.JEq.Imm(asm.R1, int32(tid), "found"))
	}
	ins = append(ins, asm.Ja.Label(endOfProgram),
		asm.Mov.Imm(asm.R2, 2).WithSymbol("found"),
		asm.StoreMem(asm.RFP, -24, asm.R2, asm.DWord))
	ins = append(ins, write(-24, 16)...)
	ins = append(ins, asm.Mov.Reg(asm.R1, asm.R7), asm.FnTaskPtRegs.Call(), asm.Mov.Reg(asm.R6, asm.R0))
	ins = append(ins, copyOut(ptRegsSize)...)
	for _, p := range pieces {
		ins = append(ins, asm.Mov.Reg(asm.R6, asm.R7))
		for i, at := range p.way {
			ins = append(ins, asm.Add.Imm(asm.R6, at))
			if i < len(p.way)-1 {
				ins = append(ins,
					asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, -8), asm.Mov.Imm(asm.R2, 8), asm.Mov.Reg(asm.R3, asm.R6),
					asm.FnProbeReadKernel.Call(),
					asm.LoadMem(asm.R6, asm.RFP, -8, asm.DWord))
			}
		}
		ins = append(ins, copyOut(p.size)...)
	}
	return ins, nil
}

// write puts out n bytes at R10+at.
func write(at int16, n int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(at)), asm.Mov.Imm(asm.R3, n),
		asm.FnSeqWrite.Call(),
	}
}

// copyOut puts out size bytes of the kernel at R6. What cannot be read is zero.
func copyOut(size int32) (ins asm.Instructions) {
	for size > 0 {
		n := min(size, atOnce)
		ins = append(ins,
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, -atOnce-32), asm.Mov.Imm(asm.R2, n), asm.Mov.Reg(asm.R3, asm.R6),
			asm.FnProbeReadKernel.Call())
		ins = append(ins, write(-atOnce-32, n)...)
		ins = append(ins, asm.Add.Imm(asm.R6, n))
		size -= n
	}
	return ins
}

// decodeParents takes apart what the program has put out.
func decodeParents(out []byte, pieces []piece) (map[int]VforkParent, error) {
	size := ptRegsSize
	for _, p := range pieces {
		size += int(p.size)
	}
	le := binary.LittleEndian
	children, parents := map[int]int{}, map[int]VforkParent{}
	for len(out) > 0 {
		kind := uint64(0)
		if len(out) >= 24 {
			kind = le.Uint64(out)
		}
		switch {
		case kind == 1:
			children[int(le.Uint64(out[16:]))] = int(le.Uint64(out[8:]))
			out = out[24:]
		case kind == 2 && len(out) >= 16+size:
			parents[int(le.Uint64(out[8:]))] = decodeParent(out[16:16+size], pieces)
			out = out[16+size:]
		default:
			return nil, fmt.Errorf("read tasks by BPF: %d bytes that are not known", len(out))
		}
	}
	for tid, p := range parents {
		p.Child = children[tid]
		parents[tid] = p
	}
	return parents, nil
}

func decodeParent(b []byte, pieces []piece) (p VforkParent) {
	take := func(n int32) []byte {
		part := b[:n:n]
		b = b[n:]
		return part
	}
	p.Regs = take(ptRegsSize)
	var v [][]byte
	var n []uint64
	for _, one := range pieces {
		raw := take(one.size)
		v = append(v, raw)
		var word [8]byte
		copy(word[:], raw)
		n = append(n, binary.LittleEndian.Uint64(word[:]))
	}
	p.FSBase, p.GSBase, p.PKRU, p.TidAddress, p.DeathSig, p.Securebits = n[0], n[1], uint32(n[2]), n[3], int32(n[4]), uint32(n[5])
	p.Rseq, p.RseqSize, p.RseqSig = n[6], uint32(n[7]), uint32(n[8])
	p.StackSP, p.StackSize, p.StackFlags, p.Slack = n[9], n[10], uint32(n[11]), n[12]
	p.Subreaper = n[13]&1 != 0
	p.Timers = n[14] != 0 || n[15] != 0
	for _, x := range v[16] {
		p.Timers = p.Timers || x != 0
	}
	p.Actions, p.XFeatures, p.FPU = v[17], n[18], v[19]
	for i := range p.Selectors {
		p.Selectors[i] = uint16(n[20+i])
	}
	return p
}
