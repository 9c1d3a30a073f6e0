package tracee

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	rseqCSPointer = 8  // offset of rseq_cs in struct rseq (include/uapi/linux/rseq.h)
	rseqCSSize    = 32 // struct rseq_cs: u32 version, flags; u64 start_ip, post_commit_offset, abort_ip
)

// ResumeRegs returns registers r of the stopped thread as it must get them back
// once its instruction pointer has been elsewhere, or in a restored thread.
//
// They differ from r in one case only. A thread that is stopped inside a
// restartable sequence is to go on at the sequence's abort handler, and the
// kernel sees to that when the thread returns to user space (kernel/rseq.c).
// But it compares the instruction pointer of that moment: if it lies outside
// the sequence, the kernel takes the sequence to be over and clears the thread's
// rseq_cs. Put back afterwards, the thread would finish the sequence as if
// nothing had interrupted it. So the abort has to be made in the registers.
func (t *Thread) ResumeRegs(r Regs) (Regs, error) {
	area, err := t.Rseq()
	switch {
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EINVAL): // Linux before 5.13 cannot say
		return r, nil
	case err != nil:
		return r, err
	case area.Addr == 0:
		return r, nil
	}
	var pointer [8]byte
	if err := t.Read(area.Addr+rseqCSPointer, pointer[:]); err != nil {
		return r, fmt.Errorf("rseq area: %w", err)
	}
	at := binary.LittleEndian.Uint64(pointer[:])
	if at == 0 {
		return r, nil
	}
	var cs [rseqCSSize]byte
	if err := t.Read(at, cs[:]); err != nil {
		return r, fmt.Errorf("rseq_cs: %w", err)
	}
	start, length := binary.LittleEndian.Uint64(cs[8:]), binary.LittleEndian.Uint64(cs[16:])
	if r.Rip-start < length {
		r.Rip = binary.LittleEndian.Uint64(cs[24:])
	}
	return r, nil
}
