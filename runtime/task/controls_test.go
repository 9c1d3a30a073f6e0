package task

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

// What the kernel makes of a struct user_desc is read back as the same.
func TestUserDesc(t *testing.T) {
	le := binary.LittleEndian
	var want [][]byte
	for i, flags := range []uint32{
		1 | 1<<4 | 1<<6,        // seg_32bit, limit_in_pages, useable
		1 << 3,                 // read_exec_only
		1 | 2<<1 | 1<<3,        // code
		1 | 3<<1 | 1<<4 | 1<<5, // conforming code, which the kernel takes if it is not present
		1 | 1<<1 | 1<<5,        // grows down, not present
	} {
		var b []byte
		for _, v := range []uint32{uint32(3 * i), 0x89abcdef << i, 0x54321, flags} {
			b = le.AppendUint32(b, v)
		}
		want = append(want, b)
	}
	s := traceetest.Stub(t, traceetest.ServiceAt)
	check(t, RestoreLDT(s, want))
	var b tracee.Batch
	at := b.Reserve(ldtEntries * descriptorSize)
	b.Add(unix.SYS_MODIFY_LDT, tracee.W(ldtRead), at, tracee.W(ldtEntries*descriptorSize))
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
	for i, w := range want {
		entry := le.Uint32(w)
		if got := userDesc(entry, le.Uint64(b.At(at.Plus(int(entry)*descriptorSize), 8))); !bytes.Equal(got, w) {
			t.Errorf("descriptor %d is % x, want % x", i, got, w)
		}
	}
	bad := slices.Clone(want[0])
	le.PutUint32(bad, ldtEntries)
	if RestoreLDT(s, [][]byte{bad}) == nil {
		t.Error("an entry beyond the table was taken")
	}
}

func TestCPUMask(t *testing.T) {
	for list, want := range map[string][]byte{
		"0-1": {3}, "0": {1}, "8\n": {0, 1}, "1-3,7,9": {0x8e, 2}, "": nil, "x": nil, "0-99999999": nil,
	} {
		if got := cpuMask(list); !bytes.Equal(got, want) {
			t.Errorf("%q is %x, want %x", list, got, want)
		}
	}
}

// A thread that has asked for nothing must not be tied to the cpus, or the
// slice, of the machine that it is on.
func TestUsualScheduling(t *testing.T) {
	usual, err := NewUsual("/nowhere")
	check(t, err)
	pid := startChild(t, "own")
	var rec image.Thread
	check(t, scheduling(pid, &rec, &usual))
	if rec.Affinity != nil || rec.Sched.Runtime != 0 {
		t.Errorf("affinity %x, slice %d; want neither", rec.Affinity, rec.Sched.Runtime)
	}
	var one unix.CPUSet
	one.Set(0)
	check(t, unix.SchedSetaffinity(pid, &one))
	check(t, scheduling(pid, &rec, &usual))
	if len(rec.Affinity) == 0 || rec.Affinity[0] != 1 {
		t.Errorf("affinity %x, want the first cpu", rec.Affinity)
	}
}

func TestNotifies(t *testing.T) {
	insn := func(code uint16, k uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, uint32(code)), k)
	}
	for _, c := range []struct {
		program []byte
		want    bool
	}{
		{insn(6, 0x7fff0000), false}, {insn(6, 0x7fc00000), true}, {insn(6, 0x7fc00005), true},
		{insn(0x15, 0x7fc00000), false}, {append(insn(0x20, 0), insn(6, 0x7fc00000)...), true},
	} {
		if got := notifies(c.program); got != c.want {
			t.Errorf("% x: %v", c.program, got)
		}
	}
}

func TestRestricted(t *testing.T) {
	for _, c := range []struct {
		which int
		state int64
		want  bool
	}{
		{0, 0, false}, {0, 2, false}, {0, 4, false}, {0, 3, false}, {0, 5, true}, {1, 9, true}, {0, 17, true},
		{specL1DFlush, 3, true}, {specL1DFlush, 5, false}, {0, -19, false},
	} {
		if got := restricted(c.which, c.state); got != c.want {
			t.Errorf("control %d in state %d: %v", c.which, c.state, got)
		}
	}
}
