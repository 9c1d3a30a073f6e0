// Package bpf asks the kernel about stopped tasks what no system call tells: a
// program of a few instructions is run by the kernel for every task (a task
// iterator, Linux 5.8) and prints a line for each that the question is about. One
// file asks one question. The programs are assembled here; where a field lies in
// a structure of the running kernel its own type information (BTF) tells.
//
// It takes CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN. Whoever asks must have an
// answer for hosts where nobody may.
package bpf

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
)

// off makes the kernel look like one that answers nothing, for tests.
var off = os.Getenv("OCICKPT_NO_BPF") != ""

// ErrOff is why there is no answer while OCICKPT_NO_BPF is set.
var ErrOff = errors.New("switched off by OCICKPT_NO_BPF")

// Question is a loaded program. Loading takes some ten milliseconds, most of
// them for reading BTF; asking takes as long as the host has tasks.
type Question struct {
	program *ebpf.Program
	iter    *link.Iter
}

// load assembles the body of a question about every task, or "task_file", between
// a prologue, which says about
// whom it is, and the end. The body finds the task in R7 and the sequence file
// to print to in R9, and may use everything but these.
//
// What was remembered of the kernel is found out anew where that does not do.
func load(name, over string, whom, body func(k *kernel) (asm.Instructions, error)) (*Question, error) {
	if off {
		return nil, ErrOff
	}
	var first error
	for _, k := range []*kernel{remembered(), {}} {
		q, err := k.load(name, over, whom, body)
		if err == nil {
			k.keep()
			return q, nil
		}
		first = cmp.Or(first, err)
	}
	return nil, first
}

func (k *kernel) load(name, over string, whom, body func(k *kernel) (asm.Instructions, error)) (*Question, error) {
	begin, err := whom(k)
	if err != nil {
		return nil, err
	}
	ask, err := body(k)
	if err != nil {
		return nil, err
	}
	iter, err := k.iterator(over)
	if err != nil {
		return nil, err
	}
	return loadRaw(name, iter, slices.Concat(begin, ask, end()))
}

const license = "Dual MIT/GPL"

func end() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, 0).WithSymbol(endOfProgram), asm.Return()}
}

// attach attaches a program, or frees it.
func attach(program *ebpf.Program) (*Question, error) {
	q := &Question{program: program}
	var err error
	if q.iter, err = link.AttachIter(link.IterOptions{Program: q.program}); err != nil {
		return nil, errors.Join(fmt.Errorf("attach a program to the tasks: %w", err), q.program.Close())
	}
	return q, nil
}

// Close frees the program.
func (q *Question) Close() error { return errors.Join(q.iter.Close(), q.program.Close()) }

// ask runs the program and hands the fields of each line that it prints to f.
func (q *Question) ask(f func(fields [][]byte) error) error {
	out, err := q.read()
	if err != nil {
		return err
	}
	for line := range bytes.Lines(out) {
		if err := f(bytes.Fields(line)); err != nil {
			return fmt.Errorf("read tasks by BPF: %q: %w", line, err)
		}
	}
	return nil
}

// read runs the program and returns what it has put out.
func (q *Question) read() ([]byte, error) {
	r, err := q.iter.Open()
	if err != nil {
		return nil, fmt.Errorf("read tasks by BPF: %w", err)
	}
	defer r.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read tasks by BPF: %w", err)
	}
	return out, nil
}

// numbers reads the n fields of a line.
func numbers(fields [][]byte, n int) ([]int64, error) {
	if len(fields) != n {
		return nil, fmt.Errorf("%d fields instead of %d", len(fields), n)
	}
	values := make([]int64, n)
	for i, f := range fields {
		v, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			return nil, err
		}
		values[i] = v
	}
	return values, nil
}

const endOfProgram = "end"

// everyone is the prologue of a question about every task. The iterator's context
// holds where to print to and the task, which is nil at the end.
func (k *kernel) everyone() (asm.Instructions, error) {
	return asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 8, asm.DWord),
		asm.JEq.Imm(asm.R7, 0, endOfProgram),
		asm.LoadMem(asm.R9, asm.R1, 0, asm.DWord), // meta
		asm.LoadMem(asm.R9, asm.R9, 0, asm.DWord), // meta->seq
	}, nil
}

// traced is the prologue of one about the threads that we trace. Who we are is
// told by the pid that BPF itself uses, as ours may be another in a namespace.
func (k *kernel) traced() (asm.Instructions, error) {
	ins, _ := k.everyone()
	at, err := k.offsets(map[string][]string{
		"ptrace": {"task_struct", "ptrace"}, "parent": {"task_struct", "parent"}, "tgid": {"task_struct", "tgid"},
	})
	return append(ins,
		asm.LoadMem(asm.R2, asm.R7, int16(at["ptrace"]), asm.Word),
		asm.JEq.Imm(asm.R2, 0, endOfProgram),
		asm.LoadMem(asm.R2, asm.R7, int16(at["parent"]), asm.DWord),
		asm.LoadMem(asm.R8, asm.R2, int16(at["tgid"]), asm.Word),
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.JNE.Reg(asm.R0, asm.R8, endOfProgram),
	), err
}

// offset finds a member of a structure, through structures without a name.
func (k *kernel) offset(name string, path ...string) (int32, error) {
	return k.number(name+"."+strings.Join(path, "."), func(spec *btf.Spec) (int32, error) {
		var s *btf.Struct
		if err := spec.TypeByName(name, &s); err != nil {
			return 0, fmt.Errorf("structure %s of this kernel: %w", name, err)
		}
		at, t := int32(0), btf.Type(s)
		for _, want := range path {
			m, off, ok := member(t, want)
			if !ok {
				return 0, fmt.Errorf("structure %s of this kernel has no %v", name, path)
			}
			at, t = at+off, m
		}
		return at, nil
	})
}

// sizeOf is the size of a structure.
func (k *kernel) sizeOf(name string) (int32, error) {
	return k.number(name, func(spec *btf.Spec) (int32, error) {
		var s *btf.Struct
		if err := spec.TypeByName(name, &s); err != nil {
			return 0, fmt.Errorf("structure %s of this kernel: %w", name, err)
		}
		return int32(s.Size), nil
	})
}

// iterator is the number that an iterator has in BTF.
func (k *kernel) iterator(over string) (btf.TypeID, error) {
	id, err := k.number("iterator "+over, func(spec *btf.Spec) (int32, error) {
		var f *btf.Func
		if err := spec.TypeByName("bpf_iter_"+over, &f); err != nil {
			return 0, fmt.Errorf("iterator of this kernel: %w", err)
		}
		id, err := spec.TypeID(f)
		return int32(id), err
	})
	return btf.TypeID(id), err
}

// offsets finds many, each by the name of a structure and the path in it.
func (k *kernel) offsets(wanted map[string][]string) (map[string]int32, error) {
	at := map[string]int32{}
	for name, path := range wanted {
		off, err := k.offset(path[0], path[1:]...)
		if err != nil {
			return nil, err
		}
		at[name] = off
	}
	return at, nil
}

func member(t btf.Type, name string) (btf.Type, int32, bool) {
	var members []btf.Member
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members = t.Members
	case *btf.Union:
		members = t.Members
	}
	for _, m := range members {
		if m.Name == name {
			return m.Type, int32(m.Offset.Bytes()), true
		}
		if m.Name == "" {
			if t, off, ok := member(m.Type, name); ok {
				return t, int32(m.Offset.Bytes()) + off, true
			}
		}
	}
	return nil, 0, false
}

// print prints n words at R10+data by a format, whose text goes on the stack
// below them.
func print(format string, data int16, n int) asm.Instructions {
	text := append([]byte(format), 0)
	for len(text)%8 != 0 {
		text = append(text, 0)
	}
	at := data - int16(len(text))
	var ins asm.Instructions
	for i := 0; i < len(text); i += 8 {
		var v uint64
		for j := range 8 {
			v |= uint64(text[i+j]) << (8 * j)
		}
		ins = append(ins, asm.LoadImm(asm.R1, int64(v), asm.DWord), asm.StoreMem(asm.RFP, at+int16(i), asm.R1, asm.DWord))
	}
	return append(ins,
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(at)),
		asm.Mov.Imm(asm.R3, int32(len(format)+1)),
		asm.Mov.Reg(asm.R4, asm.RFP), asm.Add.Imm(asm.R4, int32(data)),
		asm.Mov.Imm(asm.R5, int32(8*n)),
		asm.FnSeqPrintf.Call(),
	)
}
