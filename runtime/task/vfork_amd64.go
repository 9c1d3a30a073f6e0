package task

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ocickpt/ocickpt/runtime/cpu"
)

// Further places in an xsave area.
const (
	xsaveSoftware = 464 // what the kernel tells of the area in its own words
	compacted     = 1 << 63
	pkruComponent = 9
)

// standardXState makes the extended state that ptrace(2) would show of the kernel's
// own form of it, in which components follow one another without gaps. pkru the
// kernel keeps apart. like is the state of another thread here.
func standardXState(like, kernel []byte, features uint64, pkru uint32) ([]byte, error) {
	if len(like) < xstateHeader || len(kernel) < xstateHeader {
		return nil, errors.New("an extended state without a header")
	}
	le := binary.LittleEndian
	have, form := le.Uint64(kernel[xstateBV:])&features, le.Uint64(kernel[xstateBV+8:])
	out := make([]byte, len(like))
	copy(out, kernel[:xsaveSoftware])
	copy(out[xsaveSoftware:xstateBV], like[xsaveSoftware:])
	at := uint32(xstateHeader)
	for i := uint32(2); i < 63; i++ {
		size, offset, traits, _ := cpu.CPUID(0xd, i)
		from := offset
		if form&compacted != 0 {
			if form>>i&1 == 0 {
				continue
			}
			if traits&2 != 0 {
				at = (at + 63) &^ 63
			}
			from = at
			at += size
		}
		if have>>i&1 == 0 || i == pkruComponent {
			continue
		}
		if int(from+size) > len(kernel) || int(offset+size) > len(out) {
			return nil, fmt.Errorf("component %d of the extended state lies beyond what can be read", i)
		}
		copy(out[offset:], kernel[from:from+size])
	}
	if _, offset, _, _ := cpu.CPUID(0xd, pkruComponent); features>>pkruComponent&1 != 0 && int(offset)+4 <= len(out) {
		le.PutUint32(out[offset:], pkru)
		have |= 1 << pkruComponent
	}
	le.PutUint64(out[xstateBV:], have)
	return out, nil
}
