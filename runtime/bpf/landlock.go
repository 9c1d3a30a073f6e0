package bpf

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// HasLandlock reports a kernel on which threads can confine themselves by
// Landlock (landlock(7)).
func HasLandlock() bool {
	const version = 1 // LANDLOCK_CREATE_RULESET_VERSION
	_, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, version)
	return errno == 0
}

// words is how much of what security modules keep is looked through: as many
// words as fit into a line.
const words = 11

// Landlock asks which threads of the host are in a Landlock domain.
type Landlock struct {
	*Question
	place *ebpf.Map // where the domain is; all ones before that is known
}

// unplaced stands for a place that is not known.
const unplaced = ^uint64(0)

// placeName is what the place is remembered by.
const placeName = "place of Landlock domains"

// NewLandlock prepares the question. No file and no system call tells: the
// domain is a pointer in the part of a thread's credentials that security
// modules share, at a place that depends on which of them the kernel has. So a
// thread of our own enters a domain first, to see which word that changes, or,
// where the place is known since the host booted, whether it is right, as a wrong
// one could let confined threads pass.
func NewLandlock() (*Landlock, error) {
	if off {
		return nil, ErrOff
	}
	place, err := ebpf.NewMap(&ebpf.MapSpec{Name: "place", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("make a map: %w", err)
	}
	l := &Landlock{place: place}
	if l.Question, err = load("landlock", "task", (*kernel).everyone, l.body); err != nil {
		return nil, errors.Join(err, l.place.Close())
	}
	k := remembered()
	if at, ok := k.known[placeName]; ok && at >= 0 && at%8 == 0 && at < 8*words && l.holds(uint64(at)) {
		return l, nil
	}
	if err := l.learn(k); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// learn finds the place.
func (l *Landlock) learn(k *kernel) error {
	if err := l.put(unplaced); err != nil {
		return err
	}
	at, err := l.find()
	if err != nil {
		return err
	}
	if !l.holds(at) {
		return errors.New("the place of Landlock domains changes")
	}
	k.learn(placeName, int32(at))
	k.keep()
	return nil
}

// holds reports that the domain of a thread of ours is found at a place, and none
// of our main thread.
func (l *Landlock) holds(at uint64) bool {
	if l.put(at) != nil {
		return false
	}
	err := whileConfined(func(tid int) error {
		tids, err := l.Threads()
		if err == nil && (!tids[tid] || tids[os.Getpid()]) {
			err = errors.New("it is wrong")
		}
		return err
	})
	return err == nil
}

func (l *Landlock) put(place uint64) error { return l.place.Put(uint32(0), place) }

// Close frees the program and its map.
func (l *Landlock) Close() error { return errors.Join(l.Question.Close(), l.place.Close()) }

// Threads are the threads in a domain, by their host tids.
func (l *Landlock) Threads() (map[int]bool, error) {
	tids := map[int]bool{}
	err := l.ask(func(f [][]byte) error {
		tid, err := strconv.Atoi(string(f[0]))
		tids[tid] = true
		return err
	})
	return tids, err
}

// find has a thread enter a domain and compares it with the others of ours.
func (l *Landlock) find() (at uint64, err error) {
	seen := map[int][][]byte{}
	var confined int
	err = whileConfined(func(tid int) error {
		confined = tid
		return l.ask(func(f [][]byte) error {
			tid, err := strconv.Atoi(string(f[0]))
			seen[tid] = f[1:]
			return err
		})
	})
	if err != nil {
		return 0, err
	}
	inside := seen[confined]
	delete(seen, confined)
	for _, outside := range seen {
		for i := range min(len(inside), len(outside)) {
			if string(outside[i]) == "0" && string(inside[i]) != "0" {
				return uint64(8 * i), nil
			}
		}
	}
	return 0, errors.New("the place of Landlock domains cannot be told")
}

// body prints the words of our own threads while the place is not known, and
// then the threads that have one there.
func (l *Landlock) body(k *kernel) (asm.Instructions, error) {
	at, err := k.offsets(map[string][]string{
		"pid": {"task_struct", "pid"}, "tgid": {"task_struct", "tgid"},
		"cred": {"task_struct", "cred"}, "security": {"cred", "security"},
	})
	if err != nil {
		return nil, err
	}
	const (
		data = -8 * (words + 1)
		key  = data - 8
	)
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, key, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, l.place.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, endOfProgram),
		asm.LoadMem(asm.R8, asm.R0, 0, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, int16(at["pid"]), asm.Word),
		asm.StoreMem(asm.RFP, data, asm.R1, asm.DWord),
		asm.LoadMem(asm.R3, asm.R7, int16(at["cred"]), asm.DWord),
		asm.LoadMem(asm.R3, asm.R3, int16(at["security"]), asm.DWord),
		asm.JEq.Imm(asm.R3, 0, endOfProgram),
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, data+8),
		asm.JEq.Imm(asm.R8, -1, "find"),

		asm.Add.Reg(asm.R3, asm.R8),
		asm.Mov.Imm(asm.R2, 8),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, endOfProgram),
		asm.LoadMem(asm.R1, asm.RFP, data+8, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, endOfProgram),
	}
	ins = append(ins, print("%d\n", data, 1)...)
	ins = append(ins,
		asm.Ja.Label(endOfProgram),

		asm.Mov.Imm(asm.R2, 8*words).WithSymbol("find"),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, endOfProgram),
		asm.LoadMem(asm.R8, asm.R7, int16(at["tgid"]), asm.Word),
		asm.FnGetCurrentPidTgid.Call(), // our pid as BPF knows it, not as our pid namespace does
		asm.RSh.Imm(asm.R0, 32),
		asm.JNE.Reg(asm.R0, asm.R8, endOfProgram))
	return append(ins, print("%d"+strings.Repeat(" %llx", words)+"\n", data, words+1)...), nil
}

// whileConfined calls f while a thread, which ends afterwards, is in a domain
// that forbids nothing but to make block devices.
func whileConfined(f func(tid int) error) error {
	ready, done := make(chan error), make(chan struct{})
	var tid int
	var stay func()
	stay = func() {
		runtime.LockOSThread()
		if tid = unix.Gettid(); tid == os.Getpid() {
			// The main thread never ends: it waits here until another has.
			go stay()
			<-done
			runtime.UnlockOSThread()
			return
		}
		ready <- confine()
		<-done // never unlocked, the thread ends with this function
	}
	go stay()
	err := <-ready
	if err == nil {
		err = f(tid)
	}
	close(done)
	return err
}

func confine() error {
	attr := struct{ fs uint64 }{unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("landlock_create_ruleset: %w", errno)
	}
	defer unix.Close(int(fd))
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("landlock_restrict_self: %w", errno)
	}
	return nil
}
