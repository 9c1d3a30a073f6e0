package task

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

// What the processor tells of the xsave area is what ptrace(2) shows.
func TestMachineXState(t *testing.T) {
	const xcr0 = 464 // in the bytes that the area leaves to software
	features, size, layout := MachineXState()
	x, err := traceetest.Stub(t, traceetest.ServiceAt).XState()
	check(t, err)
	if len(x) != int(size) || binary.LittleEndian.Uint64(x[xcr0:]) != features {
		t.Errorf("%d bytes of %#x, want %d of %#x", size, features, len(x), binary.LittleEndian.Uint64(x[xcr0:]))
	}
	for _, c := range layout {
		if c.Offset < xstateHeader || c.Offset+c.Size > size || features&(1<<c.Number) == 0 {
			t.Errorf("component %+v in %d bytes", c, size)
		}
	}
}

// There and back again: a component keeps its bytes wherever it lies.
func TestMoveXState(t *testing.T) {
	_, size, layout := MachineXState()
	var other []image.XComponent
	end := uint32(xstateHeader + 64)
	for i := len(layout) - 1; i >= 0; i-- { // in the other order
		c := layout[i]
		c.Offset = end
		end += c.Size + 64
		other = append(other, c)
	}
	x := make([]byte, size)
	for i := range x {
		x[i] = byte(i * 7)
	}
	binary.LittleEndian.PutUint64(x[xstateBV:], 3)
	for _, c := range layout {
		x[xstateBV+c.Number/8] |= 1 << (c.Number % 8)
	}
	moved, err := MoveXState(x, layout, other, end)
	check(t, err)
	back, err := MoveXState(moved, other, layout, size)
	check(t, err)
	if !bytes.Equal(back[:xstateHeader], x[:xstateHeader]) || bytes.Equal(moved, x) {
		t.Error("the header changed, or nothing moved")
	}
	for _, c := range layout {
		if !bytes.Equal(back[c.Offset:c.Offset+c.Size], x[c.Offset:c.Offset+c.Size]) {
			t.Errorf("component %d changed", c.Number)
		}
	}
}
