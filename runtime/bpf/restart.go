package bpf

import (
	"errors"

	"github.com/cilium/ebpf/asm"
)

// RestartBlock is what the kernel keeps of a call that ended with
// ERESTART_RESTARTBLOCK (include/linux/restart_block.h). Which of the three
// parts holds is told by the function that continues the call.
type RestartBlock struct {
	Fn        string // name of the kernel's function
	Nanosleep struct {
		Clock     int32  // of the timer, in the kernel's terms
		Compat    bool   // a remainder is written as a time of 32 bits
		Remainder uint64 // where the program wants the rest, or 0
		Expires   int64
	}
	Futex struct{ Expires int64 }
	Poll  struct {
		Timed   bool
		Expires int64 // by CLOCK_MONOTONIC
	}
}

// timeCompat is TT_COMPAT of enum timespec_type.
const timeCompat = 2

// RestartBlocks asks for the restart block of every thread that we trace.
func RestartBlocks() (*Question, error) {
	return load("restart_blocks", "task", (*kernel).traced, restartBlocks)
}

func restartBlocks(k *kernel) (asm.Instructions, error) {
	const (
		blockSize = 64 // at least sizeof(struct restart_block)
		block     = -blockSize
	)
	// The fields, in the order of the line, by their place and size.
	fields := []struct {
		path []string
		size asm.Size
	}{
		{[]string{"fn"}, asm.DWord},
		{[]string{"nanosleep", "clockid"}, asm.Word},
		{[]string{"nanosleep", "type"}, asm.Word},
		{[]string{"nanosleep", "rmtp"}, asm.DWord},
		{[]string{"nanosleep", "expires"}, asm.DWord},
		{[]string{"futex", "time"}, asm.DWord},
		{[]string{"poll", "has_timeout"}, asm.Word},
		{[]string{"poll", "tv_sec"}, asm.DWord},
		{[]string{"poll", "tv_nsec"}, asm.DWord},
	}
	task, err := k.offsets(map[string][]string{"pid": {"task_struct", "pid"}, "block": {"task_struct", "restart_block"}})
	if err != nil {
		return nil, err
	}
	data := int16(block - 8*(len(fields)+1))
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R3, asm.R7), asm.Add.Imm(asm.R3, task["block"]),
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, block),
		asm.Mov.Imm(asm.R2, blockSize),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, endOfProgram),
		asm.LoadMem(asm.R1, asm.R7, int16(task["pid"]), asm.Word),
		asm.StoreMem(asm.RFP, data, asm.R1, asm.DWord),
	}
	for i, f := range fields {
		off, err := k.offset("restart_block", f.path...)
		if err != nil {
			return nil, err
		}
		if off+8 > blockSize {
			return nil, errors.New("the restart block of this kernel is larger than known")
		}
		ins = append(ins,
			asm.LoadMem(asm.R1, asm.RFP, block+int16(off), f.size),
			asm.StoreMem(asm.RFP, data+8*int16(i+1), asm.R1, asm.DWord))
	}
	return append(ins, print("%d %ps %d %d %llu %lld %lld %d %lld %lld\n", data, len(fields)+1)...), nil
}

// RestartBlocks answers the question of that name, by host tid.
func (q *Question) RestartBlocks() (map[int]RestartBlock, error) {
	blocks := map[int]RestartBlock{}
	err := q.ask(func(f [][]byte) error {
		if len(f) != 10 {
			return errors.New("not the line of a restart block")
		}
		n, err := numbers(append(f[:1:1], f[2:]...), 9) // all but the name
		if err != nil {
			return err
		}
		b := RestartBlock{Fn: string(f[1])}
		b.Nanosleep.Clock, b.Nanosleep.Compat, b.Nanosleep.Remainder, b.Nanosleep.Expires = int32(n[1]), n[2] == timeCompat, uint64(n[3]), n[4]
		b.Futex.Expires = n[5]
		b.Poll.Timed, b.Poll.Expires = n[6] != 0, n[7]*1e9+n[8]
		blocks[int(n[0])] = b
		return nil
	})
	return blocks, err
}
