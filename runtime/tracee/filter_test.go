package tracee

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

type insn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

func program(insns ...insn) (b []byte) {
	for _, i := range insns {
		b = binary.LittleEndian.AppendUint16(b, i.code)
		b = append(b, i.jt, i.jf)
		b = binary.LittleEndian.AppendUint32(b, i.k)
	}
	return b
}

const (
	ldAbs, ldImm, ldxImm, ldMem, ldxMem, st, tax, txa = 0x20, 0x00, 0x01, 0x60, 0x61, 0x02, 0x07, 0x87
	jeq, jgt, jge, jset, ja, retK, retA               = 0x15, 0x25, 0x35, 0x45, 0x05, 0x06, 0x16
)

func TestRunFilter(t *testing.T) {
	data := make([]byte, 64)
	binary.LittleEndian.PutUint32(data, 39)
	binary.LittleEndian.PutUint32(data[16:], 0xdeadbeef)
	for name, c := range map[string]struct {
		program []byte
		want    uint32
	}{
		"return":            {program(insn{retK, 0, 0, 7}), 7},
		"load":              {program(insn{ldAbs, 0, 0, 16}, insn{retA, 0, 0, 0}), 0xdeadbeef},
		"length":            {program(insn{0x80, 0, 0, 0}, insn{retA, 0, 0, 0}), 64},
		"equal":             {program(insn{ldAbs, 0, 0, 0}, insn{jeq, 0, 1, 39}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 1},
		"not equal":         {program(insn{ldAbs, 0, 0, 0}, insn{jeq, 0, 1, 40}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 2},
		"greater":           {program(insn{ldAbs, 0, 0, 0}, insn{jgt, 0, 1, 38}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 1},
		"as great":          {program(insn{ldAbs, 0, 0, 0}, insn{jge, 0, 1, 39}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 1},
		"bits":              {program(insn{ldAbs, 0, 0, 0}, insn{jset, 0, 1, 8}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 2},
		"jump":              {program(insn{ja, 0, 0, 1}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 2},
		"and, shift":        {program(insn{ldAbs, 0, 0, 16}, insn{0x54, 0, 0, 0xff00}, insn{0x74, 0, 0, 8}, insn{retA, 0, 0, 0}), 0xbe},
		"register":          {program(insn{ldxImm, 0, 0, 5}, insn{ldImm, 0, 0, 6}, insn{0x0c, 0, 0, 0}, insn{retA, 0, 0, 0}), 11},
		"compare registers": {program(insn{ldxImm, 0, 0, 39}, insn{ldAbs, 0, 0, 0}, insn{0x1d, 0, 1, 0}, insn{retK, 0, 0, 1}, insn{retK, 0, 0, 2}), 1},
		"scratch":           {program(insn{ldImm, 0, 0, 9}, insn{st, 0, 0, 3}, insn{ldxMem, 0, 0, 3}, insn{txa, 0, 0, 0}, insn{retA, 0, 0, 0}), 9},
		"move":              {program(insn{ldImm, 0, 0, 9}, insn{tax, 0, 0, 0}, insn{ldImm, 0, 0, 1}, insn{0x2c, 0, 0, 0}, insn{retA, 0, 0, 0}), 9},
		"negate":            {program(insn{ldImm, 0, 0, 1}, insn{0x84, 0, 0, 0}, insn{retA, 0, 0, 0}), 0xffffffff},
	} {
		if got, err := runFilter(c.program, data); got != c.want || err != nil {
			t.Errorf("%s: %#x, %v; want %#x", name, got, err, c.want)
		}
	}
	for name, bad := range map[string][]byte{
		"empty": nil, "no end": program(insn{ldImm, 0, 0, 1}), "beyond": program(insn{ldAbs, 0, 0, 64}, insn{retA, 0, 0, 0}),
		"askew": program(insn{ldAbs, 0, 0, 2}, insn{retA, 0, 0, 0}), "out": program(insn{ja, 0, 0, 0xffffffff}),
		"by zero": program(insn{0x34, 0, 0, 0}, insn{retA, 0, 0, 0}),
	} {
		if _, err := runFilter(bad, data); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// The strongest answer of all filters counts.
func TestPunishes(t *testing.T) {
	on := func(nr, answer, other uint32) Filter {
		return Filter{Program: program(insn{ldAbs, 0, 0, 0}, insn{jeq, 0, 1, nr}, insn{retK, 0, 0, answer}, insn{retK, 0, 0, other})}
	}
	const kill, killThread, trap, notify, errno = 0x80000000, 0, 0x30000, 0x7fc00000, retErrno | 1
	for _, c := range []struct {
		filters []Filter
		want    bool
	}{
		{nil, false},
		{[]Filter{on(unix.SYS_PRCTL, kill, retAllow)}, true},
		{[]Filter{on(unix.SYS_PRCTL, killThread, retAllow)}, true},
		{[]Filter{on(unix.SYS_PRCTL, trap, retAllow)}, true},
		{[]Filter{on(unix.SYS_PRCTL, notify, retAllow)}, true},
		{[]Filter{on(unix.SYS_PRCTL, errno, retAllow)}, false},
		{[]Filter{on(unix.SYS_PRCTL, retTrace, retAllow)}, false},
		{[]Filter{on(unix.SYS_PRCTL, retLog, kill)}, false},
		{[]Filter{on(unix.SYS_PRCTL, retAllow, kill), on(unix.SYS_READ, kill, retAllow)}, false},
		{[]Filter{on(unix.SYS_PRCTL, errno, kill), on(unix.SYS_PRCTL, kill, errno)}, true},
		{[]Filter{{Program: program(insn{ldImm, 0, 0, 0})}}, true},
	} {
		if got := punishes(c.filters, unix.SYS_PRCTL, [6]uint64{}); got != c.want {
			t.Errorf("%v: %v", c.filters, got)
		}
	}
}
