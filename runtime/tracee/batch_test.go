package tracee

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

const somewhere = 0x7f1234560000 // where a task would see the batch's memory

func TestBatchLayout(t *testing.T) {
	var b Batch
	text := b.String("abc")
	room := b.Reserve(5)
	pointer := b.PutPointer([]byte{1, 2, 3, 4, 5, 6, 7, 8}, room, 9, 9)
	b.Fix(room, text)
	dst := make([]byte, 256)
	b.fill(dst, somewhere)
	le := binary.LittleEndian
	switch {
	case text.value%16 != 0 || room.value%16 != 0 || pointer.value%16 != 0:
		t.Error("places are not aligned")
	case !bytes.Equal(dst[text.value:][:4], []byte("abc\x00")):
		t.Errorf("string is %q", dst[text.value:][:4])
	case le.Uint64(dst[pointer.value+8:]) != somewhere+room.value || dst[pointer.value+16] != 9 || dst[pointer.value] != 1:
		t.Errorf("pointer structure is %x", dst[pointer.value:][:18])
	case le.Uint64(dst[room.value:]) != somewhere+text.value:
		t.Error("the place is not fixed up")
	case room.Plus(3).resolve(somewhere) != somewhere+room.value+3 || W(7).Plus(3).resolve(somewhere) != 10:
		t.Error("addresses behind a place")
	case W(int32(-1)).resolve(0) != ^uint64(0) || W(uint32(1<<31)).resolve(0) != 1<<31:
		t.Error("numbers are not extended by their sign")
	}
}

func TestBatchEncode(t *testing.T) {
	var b Batch
	p := b.Reserve(8)
	b.Add(unix.SYS_READ, W(3), p, W(8), W(4), W(5), W(6))
	b.Try(unix.SYS_CLOSE, W(-1))
	dst := bytes.Repeat([]byte{0xee}, 2*entrySize)
	b.encode(dst, somewhere)
	word := func(call, n int) uint64 { return binary.LittleEndian.Uint64(dst[call*entrySize+8*n:]) }
	for call, want := range [][9]uint64{
		{unix.SYS_READ, 3, somewhere + p.value, 8, 4, 5, 6, 0, 0}, {unix.SYS_CLOSE, ^uint64(0), 0, 0, 0, 0, 0, 0, 1},
	} {
		for n, v := range want {
			if word(call, n) != v {
				t.Errorf("word %d of call %d is %#x, want %#x", n, call, word(call, n), v)
			}
		}
	}
	results := []int64{-int64(unix.EBADF), 77}
	for i, r := range results {
		binary.LittleEndian.PutUint64(dst[i*entrySize+56:], uint64(r))
	}
	b.decode(dst)
	if b.Calls[0].Ret != results[0] || !errors.Is(b.Err(0), unix.EBADF) || b.Calls[1].Ret != 77 || b.Err(1) != nil {
		t.Errorf("results %+v", b.Calls)
	}
}

func TestBatchErrno(t *testing.T) {
	for ret, fails := range map[int64]bool{0: false, 1: false, -1: true, -4095: true, -4096: false, -1 << 40: false, 1 << 47: false} {
		b := Batch{Calls: []Call{{Ret: ret}}}
		if got := b.Err(0) != nil; got != fails {
			t.Errorf("result %d is an error: %v, want %v", ret, got, fails)
		}
	}
}

// A batch that is used again must not show what it held before.
func TestBatchReset(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var b Batch
	for round := range 200 {
		var places []Word
		for range random.IntN(20) {
			w := b.Reserve(random.IntN(300))
			places = append(places, w)
			b.Fix(b.Reserve(8), w)
			b.Try(1, W(1), W(2), W(3), W(4), W(5), W(6))
		}
		b.Add(uintptr(round))
		last := b.Calls[len(b.Calls)-1]
		if last != (Call{Nr: uintptr(round)}) {
			t.Fatalf("round %d: a new call is %+v", round, last)
		}
		for _, c := range b.Data {
			if c != 0 {
				t.Fatalf("round %d: reserved memory is not zero", round)
			}
		}
		for i := range places {
			if i > 0 && places[i].value < places[i-1].value {
				t.Fatalf("round %d: places overlap", round)
			}
		}
		for i := range b.Data {
			b.Data[i] = 0xff
		}
		for i := range b.Calls {
			b.Calls[i].Ret = -1
		}
		b.Reset()
		if len(b.Calls)+len(b.Data)+len(b.fixups) != 0 {
			t.Fatal("not empty")
		}
	}
}
