package bpf

import (
	"maps"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const undoEnv = "OCICKPT_TEST_SEM_UNDOS"

// haveUndos makes a process with adjustments in two sets of an ipc namespace of
// its own, and says by its output that they are there.
func haveUndos() {
	sets := []uintptr{}
	for range 2 {
		id, _, errno := unix.Syscall(unix.SYS_SEMGET, 0, 7, 0o600)
		if errno != 0 {
			panic(errno)
		}
		sets = append(sets, id)
	}
	for i, op := range []struct {
		num uint16
		op  int16
		flg int16
	}{{6, 5, 0x1000}, {1, 3, 0x1000}, {6, -2, 0x1000}, {0, 9, 0}} {
		if _, _, errno := unix.Syscall(unix.SYS_SEMOP, sets[i/3], uintptr(unsafe.Pointer(&op)), 1); errno != 0 {
			panic(errno)
		}
	}
	one := struct{ num, op, flg int16 }{5, 32767, 0x1000}
	if _, _, errno := unix.Syscall(unix.SYS_SEMOP, sets[1], uintptr(unsafe.Pointer(&one)), 1); errno != 0 {
		panic(errno)
	}
	_, _ = os.Stdout.Write([]byte{byte(sets[0]), byte(sets[1])})
	time.Sleep(time.Hour)
}

func TestSemUndos(t *testing.T) {
	lock(t)
	q, err := SemUndos()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	pid, ids := helper(t, undoEnv, unix.CLONE_NEWIPC)
	all, err := q.SemUndos()
	if err != nil {
		t.Fatal(err)
	}
	got := all[pid]
	for i, want := range []map[int]int16{{6: -3, 1: -3}, {5: -32767}} {
		have := maps.Clone(got[int32(ids[i])])
		maps.DeleteFunc(have, func(n int, _ int16) bool { return n >= 7 })
		if !maps.Equal(have, want) {
			t.Errorf("set %d: %v, want %v", i, have, want)
		}
	}
}
