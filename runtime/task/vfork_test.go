package task

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"testing"
	"time"

	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// TestReadByBPF compares what BPF reads of a stopped thread's registers with what
// ptrace(2) tells.
func TestReadByBPF(t *testing.T) {
	lock(t)
	cmd := exec.Command("python3", "-c", "import time\nx = 1.5 ** 7\ntime.sleep(1000)")
	check(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	time.Sleep(200 * time.Millisecond)
	pid := cmd.Process.Pid
	th := stop(t, pid, pid)
	want, err := th.XState()
	check(t, err)
	parents, err := bpf.VforkParents([]int{pid})
	check(t, err)
	p := parents[pid]
	got, err := standardXState(want, p.FPU, p.XFeatures, p.PKRU)
	check(t, err)
	if have := binary.LittleEndian.Uint64(want[xstateBV:]); have&2 == 0 {
		t.Errorf("the program uses no more than %#x", have)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("extended state\n%x, want\n%x", got, want)
	}
	regs, err := th.Regs()
	check(t, err)
	now, err := tracee.KernelRegs(p.Regs, p.FSBase, p.GSBase, p.Selectors)
	check(t, err)
	if now.Rip != regs.Rip || now.Rsp != regs.Rsp || now.Fs_base != regs.Fs_base || now.R12 != regs.R12 {
		t.Errorf("registers %+v, want %+v", now, regs)
	}
}
