package bpf

import (
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// Thread is what the kernel keeps of a thread and tells nobody else.
type Thread struct {
	TidAddress   uint64 // set_tid_address(2)
	DeathSig     int32  // PR_SET_PDEATHSIG
	DefaultSlack uint64 // of its timers, nanoseconds
	// The signal stack, as sigaltstack(2) takes it.
	StackSP, StackSize uint64
	StackFlags         uint32
	// HasPolicy tells of a memory policy of its own (set_mempolicy(2)).
	HasPolicy bool
	Alike     Alike
}

// Alike is what the rest of what a thread may ask about itself hangs on: threads of
// one process with the same words, ids and capabilities get the same answers to PR_GET_TSC,
// PR_MCE_KILL_GET, PR_GET_IO_FLUSHER, PR_GET_SPECULATION_CTRL, PR_GET_SECUREBITS,
// PR_SCHED_CORE, ARCH_GET_CPUID, personality(2) and keyctl(2). What each bit means is not
// asked, as that changes from kernel to kernel.
type Alike struct {
	info, atomic, flags uint64 // thread_info.flags, atomic_flags, flags
	personality, core   uint64
	securebits          uint64
	keyrings            [3]uint64 // where they are: the thread's, the process's, the session's
	user, userNS        uint64    // likewise
}

// threadFields are the members of structures that are read, in the order of the
// words that are put out behind the tid, with their sizes in bytes: of struct
// task_struct, and of the struct cred that it points to. Those that a kernel may be
// built without are zero there.
var threadFields = []struct {
	size     int32
	optional bool
	path     []string
}{
	{8, false, []string{"task_struct", "clear_child_tid"}},
	{4, false, []string{"task_struct", "pdeath_signal"}},
	{8, false, []string{"task_struct", "default_timer_slack_ns"}},
	{8, false, []string{"task_struct", "sas_ss_sp"}},
	{8, false, []string{"task_struct", "sas_ss_size"}},
	{4, false, []string{"task_struct", "sas_ss_flags"}},
	{8, true, []string{"task_struct", "mempolicy"}},
	{8, false, []string{"task_struct", "thread_info", "flags"}},
	{8, false, []string{"task_struct", "atomic_flags"}},
	{4, false, []string{"task_struct", "flags"}},
	{4, false, []string{"task_struct", "personality"}},
	{8, true, []string{"task_struct", "core_cookie"}},
	{4, false, []string{"cred", "securebits"}},
	{8, true, []string{"cred", "thread_keyring"}},
	{8, true, []string{"cred", "process_keyring"}},
	{8, true, []string{"cred", "session_keyring"}},
	{8, false, []string{"cred", "user"}},
	{8, false, []string{"cred", "user_ns"}},
}

// Threads asks about every thread that we trace.
func Threads() (*Question, error) { return load("threads", "task", (*kernel).traced, threads) }

func threads(k *kernel) (asm.Instructions, error) {
	words := len(threadFields) + 1
	data := int16(-8 * words)
	task, err := k.offsets(map[string][]string{"pid": {"task_struct", "pid"}, "cred": {"task_struct", "cred"}})
	if err != nil {
		return nil, err
	}
	read := func(at int16, size int32, from asm.Register, off int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, at, asm.R1, asm.DWord),
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(at)),
			asm.Mov.Imm(asm.R2, size),
			asm.Mov.Reg(asm.R3, from), asm.Add.Imm(asm.R3, off),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, endOfProgram),
		}
	}
	ins := append(read(data, 8, asm.R7, task["cred"]),
		asm.LoadMem(asm.R8, asm.RFP, data, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, int16(task["pid"]), asm.Word),
		asm.StoreMem(asm.RFP, data, asm.R1, asm.DWord))
	in := map[string]asm.Register{"task_struct": asm.R7, "cred": asm.R8}
	for i, f := range threadFields {
		at := data + 8*int16(i+1)
		off, err := k.offset(f.path[0], f.path[1:]...)
		switch {
		case err == nil:
			ins = append(ins, read(at, f.size, in[f.path[0]], off)...)
		case f.optional:
			ins = append(ins, asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, at, asm.R1, asm.DWord))
		default:
			return nil, err
		}
	}
	return append(ins, write(data, int32(8*words))...), nil
}

// Threads answers the question of that name, by host tid.
func (q *Question) Threads() (map[int]Thread, error) {
	out, err := q.read()
	if err != nil {
		return nil, err
	}
	size := 8 * (len(threadFields) + 1)
	if len(out)%size != 0 {
		return nil, fmt.Errorf("read tasks by BPF: %d bytes, not lines of %d", len(out), size)
	}
	all := make(map[int]Thread, len(out)/size)
	for ; len(out) > 0; out = out[size:] {
		word := func(i int) uint64 { return binary.LittleEndian.Uint64(out[8*i:]) }
		all[int(word(0))] = Thread{
			TidAddress: word(1), DeathSig: int32(word(2)), DefaultSlack: word(3),
			StackSP: word(4), StackSize: word(5), StackFlags: uint32(word(6)),
			HasPolicy: word(7) != 0,
			Alike:     Alike{info: word(8), atomic: word(9), flags: word(10), personality: word(11), core: word(12), securebits: word(13), keyrings: [3]uint64{word(14), word(15), word(16)}, user: word(17), userNS: word(18)},
		}
	}
	return all, nil
}
