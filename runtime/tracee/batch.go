package tracee

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Batch is a list of system calls that a stopped thread runs in one go, with
// the memory they work on. Building it needs no thread; the same batch can be
// run in many threads, one after the other.
type Batch struct {
	Calls []Call
	Data  []byte // what the calls' pointers point into, in and out

	fixups []fixup
}

// fixup is a pointer inside Data: its place and what it points to.
type fixup struct {
	at uint64
	to Word
}

// Call is one system call of a batch.
type Call struct {
	Nr       uintptr
	Args     [6]Word
	Ret      int64 // as the kernel returns it: -errno on failure
	Tolerate bool  // go on with the next call if this one fails
	Narrow   bool  // a call of 32-bit code by its number there, which only stubs make
}

// Word is an argument of a call: a number, or the address of a place in the
// batch's Data, which is known only once the batch has memory in the task.
type Word struct {
	value   uint64
	pointer bool
	page    bool
}

// W makes an argument of a number.
func W[T ~int | ~int32 | ~int64 | ~uint | ~uint32 | ~uint64 | ~uintptr](v T) Word {
	return Word{value: uint64(v)}
}

// Add appends a call and returns its index. Missing arguments are zero.
func (b *Batch) Add(nr uintptr, args ...Word) int {
	c := Call{Nr: nr}
	copy(c.Args[:], args)
	b.Calls = append(b.Calls, c)
	return len(b.Calls) - 1
}

// Try is Add for a call that may fail without ending the batch.
func (b *Batch) Try(nr uintptr, args ...Word) int {
	i := b.Add(nr, args...)
	b.Calls[i].Tolerate = true
	return i
}

// AddNarrow is Add for a call of 32-bit code, which only stubs make.
func (b *Batch) AddNarrow(nr uintptr, args ...Word) int {
	i := b.Add(nr, args...)
	b.Calls[i].Narrow = true
	return i
}

// Reserve makes room for n bytes, zeroed and 16-aligned, and returns their address.
func (b *Batch) Reserve(n int) Word {
	at := (len(b.Data) + 15) &^ 15
	b.Data = slices.Grow(b.Data, at+n-len(b.Data))[:at+n]
	return Word{value: uint64(at), pointer: true}
}

// Put copies p into the batch's memory and returns its address.
func (b *Batch) Put(p []byte) Word {
	w := b.Reserve(len(p))
	copy(b.Data[w.value:], p)
	return w
}

// String copies s and a terminating NUL and returns its address.
func (b *Batch) String(s string) Word { return b.Put(append([]byte(s), 0)) }

// At returns the n bytes at w, which Reserve or Put returned. Before a run it
// is the input, afterwards the output.
func (b *Batch) At(w Word, n int) []byte { return b.Data[w.value:][:n] }

// Plus is the address off bytes behind w.
func (w Word) Plus(off int) Word { return Word{value: w.value + uint64(off), pointer: w.pointer} }

// Page is the address of the page that w, a place in the batch's memory, is in.
func (w Word) Page() Word { return Word{value: w.value, pointer: w.pointer, page: true} }

// Reset empties the batch and keeps its memory.
func (b *Batch) Reset() {
	clear(b.Data)
	b.Calls, b.Data, b.fixups = b.Calls[:0], b.Data[:0], b.fixups[:0]
}

// Err is the error of call i, or nil.
func (b *Batch) Err(i int) error {
	if ret := b.Calls[i].Ret; ret < 0 && ret > -4096 {
		return unix.Errno(-ret)
	}
	return nil
}

// CallError says which call of a batch failed in a task.
type CallError struct {
	Tid   int
	Index int
	Nr    uintptr
	Args  [6]uint64
	Errno unix.Errno
}

func (e *CallError) Error() string {
	return fmt.Sprintf("system call %d(%#x) of a batch of task %d: %v", e.Nr, e.Args, e.Tid, e.Errno)
}

func (e *CallError) Unwrap() error { return e.Errno }

// resolve is the word's value once the batch's memory is at data.
func (w Word) resolve(data uint64) uint64 {
	switch {
	case w.page:
		return (data + w.value) &^ 0xfff
	case w.pointer:
		return data + w.value
	}
	return w.value
}

// PutPointer copies head, the address w and tail behind each other, as
// structures that hold a pointer have it.
func (b *Batch) PutPointer(head []byte, w Word, tail ...byte) Word {
	at := b.Put(slices.Concat(head, make([]byte, 8), tail))
	b.fixups = append(b.fixups, fixup{at: at.value + uint64(len(head)), to: w})
	return at
}

// fill copies the batch's memory to dst, which the task sees at data.
func (b *Batch) fill(dst []byte, data uint64) {
	copy(dst, b.Data)
	for _, f := range b.fixups {
		binary.LittleEndian.PutUint64(dst[f.at:], f.to.resolve(data))
	}
}

// Fix puts the address to into the batch's memory at at.
func (b *Batch) Fix(at, to Word) { b.fixups = append(b.fixups, fixup{at: at.value, to: to}) }
