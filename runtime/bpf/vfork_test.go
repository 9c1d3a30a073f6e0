package bpf

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// vforker waits in vfork with known things set.
const vforker = `
#include <unistd.h>
#include <signal.h>
#include <sys/prctl.h>
static char stack[65536];
static void handler(int sig) { (void)sig; }
int main(void)
{
	stack_t ss = { .ss_sp = stack, .ss_size = sizeof(stack) };
	sigaltstack(&ss, 0);
	signal(SIGUSR1, handler);
	signal(SIGUSR2, SIG_IGN);
	signal(SIGHUP, SIG_DFL); /* who runs the test may ignore it, and that is inherited */
	prctl(PR_SET_PDEATHSIG, SIGHUP);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (!vfork())
		for (;;)
			pause();
	return 0;
}`

func TestVforkParents(t *testing.T) {
	dir := t.TempDir()
	source, program := filepath.Join(dir, "v.c"), filepath.Join(dir, "v")
	if err := os.WriteFile(source, []byte(vforker), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-static", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pid := asleep(t, unix.SYS_VFORK, program)
	if parents, err := VforkParents(nil); err != nil || len(parents) != 0 {
		t.Errorf("nobody is asked about: %v, %v", parents, err)
	}
	parents, err := VforkParents([]int{pid})
	if err != nil {
		t.Fatal(err)
	}
	p, ok := parents[pid]
	if !ok || len(parents) != 1 {
		t.Fatalf("parents %v, want %d", parents, pid)
	}
	child, err := os.FindProcess(p.Child)
	if err != nil || p.Child == 0 {
		t.Fatalf("child %d: %v", p.Child, err)
	}
	defer child.Kill()
	action := func(sig int) uint64 { return binary.LittleEndian.Uint64(p.Actions[32*(sig-1):]) }
	const origRax = 15 * 8
	switch {
	case binary.LittleEndian.Uint64(p.Regs[origRax:]) != unix.SYS_VFORK:
		t.Errorf("registers %x", p.Regs)
	case p.FSBase == 0 || p.StackSize != 65536 || p.DeathSig != 1 || !p.Subreaper || p.Timers:
		t.Errorf("%+v", p)
	case action(10) < 4096 || action(12) != 1 || action(1) != 0:
		t.Errorf("actions %x", p.Actions)
	case p.XFeatures&3 != 3 || len(p.FPU) == 0:
		t.Errorf("features %#x", p.XFeatures)
	}
}
