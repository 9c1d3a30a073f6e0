package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// AIOContext is what the kernel keeps of a context of io_setup(2) (struct kioctx
// in fs/aio.c) and does not show in the ring that it shares with the program.
type AIOContext struct {
	Requests uint32 // as many were asked for
	Tail     uint32 // where the next event goes
	// Busy is how many requests have been submitted and are not complete.
	Busy int
	// Waits tells of one among them that can be cancelled: it waits for something
	// that need not come (IOCB_CMD_POLL), while input and output end by themselves.
	Waits bool
}

// mostContexts bounds the walk along the table of one process's contexts. Each
// takes a few instructions for each processor, and the kernel follows no more
// than a million.
func mostContexts(processors int) int32 {
	return int32(max(4, min(256, 500_000/(200+30*processors))))
}

// AIO asks for the AIO contexts of every process that we trace.
type AIO struct {
	q *Question
	// own is a variable of which each processor has its own. What the kernel calls
	// its address is as far from where it is on a processor as with any other.
	own *ebpf.Map
}

// NewAIO loads the question.
func NewAIO() (*AIO, error) {
	if off {
		return nil, ErrOff
	}
	a := &AIO{}
	var err error
	if a.own, err = ebpf.NewMap(&ebpf.MapSpec{Name: "own", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		return nil, fmt.Errorf("make a map: %w", err)
	}
	if a.q, err = load("aio_contexts", "task", (*kernel).traced, a.body); err != nil {
		return nil, errors.Join(err, a.own.Close())
	}
	return a, nil
}

// Close frees the program and its map.
func (a *AIO) Close() error { return errors.Join(a.q.Close(), a.own.Close()) }

func (a *AIO) body(k *kernel) (asm.Instructions, error) {
	at, err := k.offsets(map[string][]string{
		"tgid": {"task_struct", "tgid"}, "leader": {"task_struct", "group_leader"}, "mm": {"task_struct", "mm"},
		"table": {"mm_struct", "ioctx_table"}, "nr": {"kioctx_table", "nr"}, "contexts": {"kioctx_table", "table"},
		"id": {"kioctx", "user_id"}, "cpu": {"kioctx", "cpu"}, "requests": {"kioctx", "max_reqs"}, "size": {"kioctx", "nr_events"},
		"free": {"kioctx", "reqs_available"}, "active": {"kioctx", "active_reqs"}, "tail": {"kioctx", "tail"},
		"completed": {"kioctx", "completed_events"}, "aside": {"kioctx_cpu", "reqs_available"}, "own": {"bpf_array", "pptrs"},
	})
	if err != nil {
		return nil, err
	}
	processors, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("processors of this host: %w", err)
	}
	const (
		table   = -8
		nr      = -16
		context = -24
		base    = -32 // of what processors have put aside
		word    = -40 // what was read last
		own     = -48 // what the kernel calls the address of our variable
		key     = -56 // 0
		data    = key - 8*8
		loop    = "loop"
		next    = "next"
	)
	value := func(i int) int16 { return int16(data + 8*i) }
	// read reads size bytes at R3.
	read := func(to int16, size int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(to)),
			asm.Mov.Imm(asm.R2, size),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, endOfProgram),
		}
	}
	set := func(to int16, v int32) asm.Instructions {
		return asm.Instructions{asm.Mov.Imm(asm.R1, v), asm.StoreMem(asm.RFP, to, asm.R1, asm.DWord)}
	}
	// member reads one of the context.
	member := func(to int16, name string, size int32) asm.Instructions {
		ins := append(set(to, 0), asm.LoadMem(asm.R3, asm.RFP, context, asm.DWord), asm.Add.Imm(asm.R3, at[name]))
		return append(ins, read(to, size)...)
	}
	ins := asm.Instructions{
		// Once a process: by the leader, or by all others where it has ended.
		asm.LoadMem(asm.R1, asm.R7, int16(at["leader"]), asm.DWord),
		asm.JEq.Reg(asm.R1, asm.R7, "mine"),
		asm.LoadMem(asm.R1, asm.R1, int16(at["mm"]), asm.DWord),
		asm.JNE.Imm(asm.R1, 0, endOfProgram),
		asm.LoadMem(asm.R3, asm.R7, int16(at["mm"]), asm.DWord).WithSymbol("mine"),
		asm.JEq.Imm(asm.R3, 0, endOfProgram),
		asm.Add.Imm(asm.R3, at["table"]),
	}
	ins = append(ins, read(table, 8)...)
	ins = append(ins, set(nr, 0)...)
	ins = append(ins, asm.LoadMem(asm.R3, asm.RFP, table, asm.DWord), asm.JEq.Imm(asm.R3, 0, endOfProgram), asm.Add.Imm(asm.R3, at["nr"]))
	ins = append(ins, read(nr, 4)...)
	// A pointer becomes a number by being read like any other memory.
	ins = append(ins, asm.LoadMapPtr(asm.R1, a.own.FD()), asm.StoreMem(asm.RFP, word, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, word))
	ins = append(ins, read(own, 8)...)
	ins = append(ins, asm.LoadMem(asm.R3, asm.RFP, own, asm.DWord), asm.Add.Imm(asm.R3, at["own"]))
	ins = append(ins, read(own, 8)...)
	ins = append(ins, set(key, 0)...)
	ins = append(ins, asm.Mov.Imm(asm.R8, 0),

		asm.Mov.Reg(asm.R4, asm.R8).WithSymbol(loop),
		asm.LoadMem(asm.R1, asm.RFP, nr, asm.DWord), asm.JGE.Reg(asm.R4, asm.R1, endOfProgram),
		asm.LSh.Imm(asm.R4, 3),
		asm.LoadMem(asm.R3, asm.RFP, table, asm.DWord), asm.Add.Reg(asm.R3, asm.R4), asm.Add.Imm(asm.R3, at["contexts"]))
	ins = append(ins, read(context, 8)...)
	ins = append(ins, asm.LoadMem(asm.R1, asm.RFP, context, asm.DWord), asm.JEq.Imm(asm.R1, 0, next),
		asm.LoadMem(asm.R1, asm.R7, int16(at["tgid"]), asm.Word), asm.StoreMem(asm.RFP, value(0), asm.R1, asm.DWord))
	for i, name := range []string{"id", "requests", "tail", "size", "free", "completed"} {
		size := int32(4)
		if name == "id" {
			size = 8
		}
		ins = append(ins, member(value(i+1), name, size)...)
	}
	ins = append(ins, member(word, "active", 8)...)
	ins = append(ins,
		// Nothing waits if the list's head points to itself.
		asm.LoadMem(asm.R1, asm.RFP, context, asm.DWord), asm.Add.Imm(asm.R1, at["active"]),
		asm.LoadMem(asm.R2, asm.RFP, word, asm.DWord), asm.Sub.Reg(asm.R2, asm.R1),
		asm.StoreMem(asm.RFP, value(7), asm.R2, asm.DWord))
	ins = append(ins, member(base, "cpu", 8)...)

	// What processors have put aside is free too.
	for cpu := range processors {
		ins = append(ins,
			asm.LoadMapPtr(asm.R1, a.own.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
			asm.Mov.Imm(asm.R3, int32(cpu)),
			asm.FnMapLookupPercpuElem.Call(),
			asm.JEq.Imm(asm.R0, 0, endOfProgram),
			asm.StoreMem(asm.RFP, word, asm.R0, asm.DWord),
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, word))
		ins = append(ins, read(word, 8)...)
		ins = append(ins,
			asm.LoadMem(asm.R3, asm.RFP, word, asm.DWord),
			asm.LoadMem(asm.R4, asm.RFP, own, asm.DWord), asm.Sub.Reg(asm.R3, asm.R4),
			asm.LoadMem(asm.R4, asm.RFP, base, asm.DWord), asm.Add.Reg(asm.R3, asm.R4), asm.Add.Imm(asm.R3, at["aside"]))
		ins = append(ins, set(word, 0)...)
		ins = append(ins, read(word, 4)...)
		ins = append(ins,
			asm.LoadMem(asm.R1, asm.RFP, word, asm.DWord), asm.LoadMem(asm.R2, asm.RFP, value(5), asm.DWord),
			asm.Add.Reg(asm.R2, asm.R1), asm.StoreMem(asm.RFP, value(5), asm.R2, asm.DWord))
	}
	ins = append(ins, print("%d %llu %u %u %u %d %u %lld\n", data, 8)...)
	return append(ins,
		asm.Add.Imm(asm.R8, 1).WithSymbol(next),
		asm.JLT.Imm(asm.R8, mostContexts(processors), loop)), nil
}

// Contexts answers the question, by host pid and the context's id,
// which is its ring's address. One that is not there is beyond what could be read.
func (a *AIO) Contexts() (map[int]map[uint64]AIOContext, error) {
	all := map[int]map[uint64]AIOContext{}
	err := a.q.ask(func(f [][]byte) error {
		n, err := numbers(f, 8)
		if err != nil {
			return err
		}
		pid := int(n[0])
		if all[pid] == nil {
			all[pid] = map[uint64]AIOContext{}
		}
		// What is neither free nor put aside is either under way or in the ring. One
		// place of the ring stays empty.
		size, free, completed := n[4], n[5], n[6]
		all[pid][uint64(n[1])] = AIOContext{Requests: uint32(n[2]), Tail: uint32(n[3]), Busy: int(size - 1 - free - completed), Waits: n[7] != 0}
		return nil
	})
	return all, err
}
