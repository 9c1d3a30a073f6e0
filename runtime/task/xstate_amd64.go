package task

import (
	"encoding/binary"
	"fmt"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/cpu"
)

// The xsave area as ptrace(2) shows it (Intel manual, volume 1, 13.4): the
// legacy region, a header that begins with the components that are not in their
// initial state, and the components at the offsets that cpuid tells. Those
// depend on the processor: PKRU is at 2688 here and at 2432 there.
const (
	xstateBV     = 512
	xstateHeader = 576 // its end

	firstXComponent = 2 // x87 and SSE are in the legacy region
	xComponents     = 63
)

// xNames are the components that user space may have.
var xNames = map[int]string{
	0: "x87", 1: "SSE", 2: "AVX", 3: "MPX bounds", 4: "MPX configuration", 5: "AVX-512 masks", 6: "AVX-512 upper halves",
	7: "AVX-512 registers 16 to 31", 9: "protection keys", 17: "AMX configuration", 18: "AMX tiles", 19: "APX registers",
}

// XFeatureNames names the components of a set.
func XFeatureNames(set uint64) (names []string) {
	for i := range xComponents {
		if set&(1<<i) == 0 {
			continue
		}
		name := xNames[i]
		if name == "" {
			name = fmt.Sprintf("component %d", i)
		}
		names = append(names, name)
	}
	return names
}

// MachineXState describes the extended state of this machine's threads.
func MachineXState() (features uint64, size uint32, layout []image.XComponent) {
	const (
		leafFeatures, osxsave = 1, 1 << 27
		leafXState            = 0xd
	)
	if _, _, c, _ := cpu.CPUID(leafFeatures, 0); c&osxsave == 0 {
		return 0, 0, nil
	}
	features = cpu.XCR0()
	_, size, _, _ = cpu.CPUID(leafXState, 0)
	for i := firstXComponent; i < xComponents; i++ {
		if features&(1<<i) != 0 {
			n, at, _, _ := cpu.CPUID(leafXState, uint32(i))
			layout = append(layout, image.XComponent{Number: uint32(i), Offset: at, Size: n})
		}
	}
	return features, size, layout
}

// UsedXFeatures are the components of a thread's extended state that are not in
// their initial state.
func UsedXFeatures(x []byte) uint64 {
	if len(x) < xstateHeader {
		return 0
	}
	return binary.LittleEndian.Uint64(x[xstateBV:])
}

// MoveXState lays the extended state of a thread out for another processor.
func MoveXState(x []byte, from, to []image.XComponent, size uint32) ([]byte, error) {
	if len(x) < xstateHeader || int(size) < xstateHeader {
		return x, nil // a processor without xsave
	}
	used := UsedXFeatures(x)
	out := make([]byte, size)
	copy(out, x[:xstateHeader])
	have := map[uint32]image.XComponent{}
	for _, c := range from {
		have[c.Number] = c
	}
	for _, c := range to {
		if used&(1<<c.Number) == 0 {
			continue
		}
		was, ok := have[c.Number]
		if !ok || was.Size != c.Size || uint64(was.Offset)+uint64(was.Size) > uint64(len(x)) || uint64(c.Offset)+uint64(c.Size) > uint64(size) {
			return nil, fmt.Errorf("extended state: %s have another size on this processor", xNames[int(c.Number)])
		}
		copy(out[c.Offset:], x[was.Offset:was.Offset+was.Size])
	}
	return out, nil
}
