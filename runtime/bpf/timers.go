package bpf

import (
	"errors"

	"github.com/cilium/ebpf/asm"
)

// Timer is what the kernel keeps of a timer of timer_create(2) and tells nobody
// (struct k_itimer in include/linux/posix-timers.h).
type Timer struct {
	// Base is the clock that its time is counted by: CLOCK_REALTIME or CLOCK_TAI
	// for an absolute time by such a clock; a relative one by CLOCK_REALTIME is
	// counted by CLOCK_MONOTONIC (kernel/time/hrtimer.c). Of no meaning for a
	// timer on a cpu clock.
	Base    int32
	Expires int64 // by that clock
	// Overrun is how often it has expired while its signal waited, less one, as
	// of the last timer_gettime(2).
	Overrun int64
	// Tid is whose cpu clock it is on, outside; of no meaning for another timer.
	Tid int
}

// maxTimers bounds the walk along one process's list.
const maxTimers = 512

// Timers asks for the POSIX timers of every process that we trace.
func Timers() (*Question, error) { return load("posix_timers", "task", (*kernel).traced, timers) }

func timers(k *kernel) (asm.Instructions, error) {
	at, err := k.offsets(map[string][]string{
		"task": {"task_struct", "pid"}, "tgid": {"task_struct", "tgid"}, "signal": {"task_struct", "signal"},
		"head": {"signal_struct", "posix_timers"},
		"list": {"k_itimer", "list"}, "id": {"k_itimer", "it_id"}, "overrun": {"k_itimer", "it_overrun"},
		"expires": {"k_itimer", "it", "real", "timer", "node", "expires"}, "base": {"k_itimer", "it", "real", "timer", "base"},
		"pid":   {"k_itimer", "it", "cpu", "pid"},
		"clock": {"hrtimer_clock_base", "clockid"}, "number": {"pid", "numbers"},
	})
	if err != nil {
		return nil, err
	}
	const (
		itimer     = -320 // the part of a timer from "list" on that holds the others
		itimerSize = 320
		chased     = itimer - 8 // what one of its pointers leads to
		end        = chased - 8 // where the list ends that is a ring, before Linux 6.13
		words      = 6
		data       = end - 8*words
		loop       = "loop"
	)
	for _, f := range []string{"id", "overrun", "expires", "base", "pid"} {
		if off := at[f] - at["list"]; off < 0 || off+8 > itimerSize {
			return nil, errors.New("the timers of this kernel are larger than known")
		}
	}
	field := func(name string) int16 { return int16(itimer + at[name] - at["list"]) }
	word := func(i int, r asm.Register) asm.Instruction {
		return asm.StoreMem(asm.RFP, int16(data+8*i), r, asm.DWord)
	}
	chase := func(i int, pointer, off string) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, chased, asm.R1, asm.DWord),
			asm.LoadMem(asm.R3, asm.RFP, field(pointer), asm.DWord), asm.Add.Imm(asm.R3, at[off]),
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, chased),
			asm.Mov.Imm(asm.R2, 4),
			asm.FnProbeReadKernel.Call(), // it may be no such pointer, and read nothing
			asm.LoadMem(asm.R1, asm.RFP, chased, asm.Word),
			word(i, asm.R1),
		}
	}
	ins := asm.Instructions{
		asm.LoadMem(asm.R1, asm.R7, int16(at["task"]), asm.Word),
		asm.LoadMem(asm.R2, asm.R7, int16(at["tgid"]), asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, endOfProgram), // once a process
		asm.LoadMem(asm.R1, asm.R7, int16(at["signal"]), asm.DWord),
		asm.LoadMem(asm.R6, asm.R1, int16(at["head"]), asm.DWord),
		asm.Add.Imm(asm.R1, at["head"]), asm.StoreMem(asm.RFP, end, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R8, 0),

		asm.JEq.Imm(asm.R6, 0, endOfProgram).WithSymbol(loop),
		asm.LoadMem(asm.R1, asm.RFP, end, asm.DWord), asm.JEq.Reg(asm.R6, asm.R1, endOfProgram),
		asm.Mov.Reg(asm.R3, asm.R6),
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, itimer),
		asm.Mov.Imm(asm.R2, itimerSize),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, endOfProgram),
		asm.LoadMem(asm.R1, asm.R7, int16(at["tgid"]), asm.Word), word(0, asm.R1),
		asm.LoadMem(asm.R1, asm.RFP, field("id"), asm.Word), word(1, asm.R1),
		asm.LoadMem(asm.R1, asm.RFP, field("expires"), asm.DWord), word(2, asm.R1),
		asm.LoadMem(asm.R1, asm.RFP, field("overrun"), asm.DWord), word(3, asm.R1),
	}
	ins = append(ins, chase(4, "base", "clock")...)
	ins = append(ins, chase(5, "pid", "number")...)
	ins = append(ins, print("%d %d %lld %lld %d %d\n", data, words)...)
	return append(ins,
		asm.LoadMem(asm.R6, asm.RFP, itimer, asm.DWord), // list.next
		asm.Add.Imm(asm.R8, 1),
		asm.JLT.Imm(asm.R8, maxTimers, loop),
	), nil
}

// Timers answers the question of that name, by host pid and timer id.
func (q *Question) Timers() (map[int]map[int32]Timer, error) {
	all := map[int]map[int32]Timer{}
	err := q.ask(func(f [][]byte) error {
		n, err := numbers(f, 6)
		if err != nil {
			return err
		}
		pid := int(n[0])
		if all[pid] == nil {
			all[pid] = map[int32]Timer{}
		}
		all[pid][int32(n[1])] = Timer{Expires: n[2], Overrun: n[3], Base: int32(n[4]), Tid: int(n[5])}
		return nil
	})
	return all, err
}
