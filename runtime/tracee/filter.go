package tracee

import (
	"encoding/binary"
	"errors"
)

// Filter is a seccomp filter as ptrace(2) tells it.
type Filter struct {
	Program []byte // struct sock_filter, 8 bytes each
	Flags   uint64 // SECCOMP_FILTER_FLAG_*
}

// What a filter returns (seccomp(2)), as far as it matters here.
const (
	retActionFull = 0xffff0000
	retAllow      = 0x7fff0000
	retLog        = 0x7ffc0000
	retTrace      = 0x7ff00000 // without a tracer: ENOSYS
	retErrno      = 0x00050000
)

// Filters reads the thread's seccomp filters, oldest first. They do not change
// while it is stopped, and are read once.
func (t *Thread) Filters() ([]Filter, error) {
	if t.filters != nil {
		return t.filters, nil
	}
	for i := 0; ; i++ {
		program, flags, ok, err := t.SeccompFilter(i)
		if err != nil || !ok {
			return t.filters, err
		}
		t.filters = append(t.filters, Filter{program, flags})
	}
}

// punishes reports a system call for which a thread with these filters would be
// killed, get a SIGSYS or wait for a listener. An error of the call is none: it
// is nothing to a thread that has lost its tracer.
func punishes(filters []Filter, nr uintptr, args [6]uint64) bool {
	const auditArch = 0xc000003e // AUDIT_ARCH_X86_64
	var data [64]byte            // struct seccomp_data
	le := binary.LittleEndian
	le.PutUint32(data[0:], uint32(nr))
	le.PutUint32(data[4:], auditArch)
	for i, a := range args {
		le.PutUint64(data[16+8*i:], a)
	}
	// The strongest answer counts, which is the smallest as a signed number.
	answer := int32(retAllow)
	for _, f := range filters {
		got, err := runFilter(f.Program, data[:])
		if err != nil {
			return true
		}
		answer = min(answer, int32(got&retActionFull))
	}
	switch uint32(answer) {
	case retAllow, retLog, retTrace, retErrno:
		return false
	}
	return true
}

var errFilter = errors.New("not a seccomp filter")

// runFilter interprets a program of classic BPF as seccomp has it: words of data
// by absolute address, no packet (net/core/filter.c, kernel/seccomp.c).
func runFilter(program, data []byte) (uint32, error) {
	const (
		ld, ldx, st, stx, alu, jmp, ret, misc = 0, 1, 2, 3, 4, 5, 6, 7

		imm, abs, mem, length = 0x00, 0x20, 0x60, 0x80
		fromX, fromA          = 0x08, 0x10
		txa                   = 0x80
	)
	le := binary.LittleEndian
	var a, x uint32
	var scratch [16]uint32
	for pc := 0; pc >= 0 && 8*pc+8 <= len(program); pc++ {
		insn := program[8*pc:]
		code, jt, jf, k := le.Uint16(insn), insn[2], insn[3], le.Uint32(insn[4:])
		operand := k
		if code&fromX != 0 {
			operand = x
		}
		switch code & 7 {
		case ld, ldx:
			var v uint32
			switch code & 0xe0 {
			case imm:
				v = k
			case abs:
				if k%4 != 0 || int(k)+4 > len(data) {
					return 0, errFilter
				}
				v = le.Uint32(data[k:])
			case mem:
				v = scratch[k%16]
			case length:
				v = uint32(len(data))
			default:
				return 0, errFilter
			}
			if code&7 == ld {
				a = v
			} else {
				x = v
			}
		case st:
			scratch[k%16] = a
		case stx:
			scratch[k%16] = x
		case alu:
			var err error
			if a, err = compute(code&0xf0, a, operand); err != nil {
				return 0, err
			}
		case jmp:
			if code&0xf0 == 0 { // JA
				pc += int(k)
			} else if holds(code&0xf0, a, operand) {
				pc += int(jt)
			} else {
				pc += int(jf)
			}
		case ret:
			if code&0x18 == fromA {
				return a, nil
			}
			return k, nil
		case misc:
			if code&txa != 0 {
				a = x
			} else {
				x = a
			}
		}
	}
	return 0, errFilter
}

func compute(op uint16, a, b uint32) (uint32, error) {
	switch op {
	case 0x00:
		return a + b, nil
	case 0x10:
		return a - b, nil
	case 0x20:
		return a * b, nil
	case 0x30, 0x90:
		if b == 0 {
			return 0, errFilter
		}
		if op == 0x30 {
			return a / b, nil
		}
		return a % b, nil
	case 0x40:
		return a | b, nil
	case 0x50:
		return a & b, nil
	case 0x60:
		return a << (b & 31), nil
	case 0x70:
		return a >> (b & 31), nil
	case 0x80:
		return -a, nil
	case 0xa0:
		return a ^ b, nil
	}
	return 0, errFilter
}

func holds(op uint16, a, b uint32) bool {
	switch op {
	case 0x10:
		return a == b
	case 0x20:
		return a > b
	case 0x30:
		return a >= b
	}
	return a&b != 0 // JSET
}
