package bpf

import (
	"fmt"
	"math"

	"github.com/cilium/ebpf/asm"
)

// MaxSemUndo is how many semaphores of a set are looked at.
const MaxSemUndo = 4 * undoWords

// Bounds on the walk along a thread's list: words of four values in each entry,
// and words of all entries together.
const (
	undoWords = 16
	undoSteps = 320
)

// SemUndos asks for the semaphore adjustments of every thread that we trace
// (struct sem_undo_list in ipc/sem.c).
func SemUndos() (*Question, error) { return load("sem_undos", "task", (*kernel).traced, semUndos) }

func semUndos(k *kernel) (asm.Instructions, error) {
	at, err := k.offsets(map[string][]string{
		"pid": {"task_struct", "pid"}, "lists": {"task_struct", "sysvsem", "undo_list"},
		"head": {"sem_undo_list", "list_proc"},
		"node": {"sem_undo", "list_proc"}, "semid": {"sem_undo", "semid"}, "semadj": {"sem_undo", "semadj"},
	})
	if err != nil {
		return nil, err
	}
	const (
		head  = -8  // where the list ends, which is a ring
		index = -16 // of the word in the entry
		data  = -48 // tid, set, index and word
		loop  = "loop"
		skip  = "skip"
		step  = "step"
	)
	// read reads from an offset from R6, which points to an entry's node.
	read := func(to int16, off, size int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R3, asm.R6), asm.Add.Imm(asm.R3, off), asm.Add.Reg(asm.R3, asm.R4),
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(to)),
			asm.Mov.Imm(asm.R2, size),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, endOfProgram),
		}
	}
	zero := asm.Mov.Imm(asm.R4, 0)
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R7, int16(at["lists"]), asm.DWord),
		asm.JEq.Imm(asm.R6, 0, endOfProgram),
		asm.Add.Imm(asm.R6, at["head"]), asm.StoreMem(asm.RFP, head, asm.R6, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, int16(at["pid"]), asm.Word), asm.StoreMem(asm.RFP, data, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R8, 0),
		asm.StoreMem(asm.RFP, index, asm.R8, asm.DWord), asm.StoreMem(asm.RFP, data+8, asm.R8, asm.DWord),
		zero,
	}
	ins = append(ins, read(data+24, 0, 8)...)
	ins = append(ins,
		asm.LoadMem(asm.R6, asm.RFP, data+24, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, head, asm.DWord).WithSymbol(loop), asm.JEq.Reg(asm.R6, asm.R1, endOfProgram),
		zero)
	ins = append(ins, read(data+8, at["semid"]-at["node"], 4)...)
	ins = append(ins, asm.LoadMem(asm.R4, asm.RFP, index, asm.DWord), asm.StoreMem(asm.RFP, data+16, asm.R4, asm.DWord), asm.LSh.Imm(asm.R4, 3))
	ins = append(ins, read(data+24, at["semadj"]-at["node"], 8)...)
	ins = append(ins, asm.LoadMem(asm.R1, asm.RFP, data+24, asm.DWord), asm.JEq.Imm(asm.R1, 0, skip))
	ins = append(ins, print("%d %d %d %lld\n", data, 4)...)
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, index, asm.DWord).WithSymbol(skip), asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, index, asm.R1, asm.DWord),
		asm.JLT.Imm(asm.R1, undoWords, step),
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, index, asm.R1, asm.DWord),
		zero)
	ins = append(ins, read(data+24, 0, 8)...)
	ins = append(ins,
		asm.LoadMem(asm.R6, asm.RFP, data+24, asm.DWord),
		asm.Add.Imm(asm.R8, 1).WithSymbol(step),
		asm.JLT.Imm(asm.R8, undoSteps, loop),
		asm.Mov.Imm(asm.R1, -1), asm.StoreMem(asm.RFP, data+8, asm.R1, asm.DWord))
	return append(ins, print("%d %d %d %lld\n", data, 4)...), nil
}

// SemUndos answers the question of that name: by host tid and id of the set, the
// adjustments that are not zero. What stands behind a set's last semaphore is
// without meaning.
func (q *Question) SemUndos() (map[int]map[int32]map[int]int16, error) {
	all := map[int]map[int32]map[int]int16{}
	err := q.ask(func(f [][]byte) error {
		n, err := numbers(f, 4)
		if err != nil {
			return err
		}
		tid, set := int(n[0]), int32(n[1])
		if set < 0 {
			return fmt.Errorf("thread %d has adjustments in too many sets", tid)
		}
		if all[tid] == nil {
			all[tid] = map[int32]map[int]int16{}
		}
		if all[tid][set] == nil {
			all[tid][set] = map[int]int16{}
		}
		for i := range 4 {
			if v := int16(uint64(n[3]) >> (16 * i) & math.MaxUint16); v != 0 {
				all[tid][set][4*int(n[2])+i] = v
			}
		}
		return nil
	})
	return all, err
}
