package bpf

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// factsDir is where what has been found out about the kernel is kept until the
// host boots again. Only root can look into it.
var factsDir = "/run/ocickpt"

// facts are what takes long to find out about the running kernel: numbers, that
// are the same until the host boots again.
type facts struct {
	Boot    string // which boot they hold for
	Numbers map[string]int32
	Sum     [sha256.Size]byte // over the numbers
}

// none is the number of what this kernel does not have.
const none = -1

// kernel knows the structures of the running kernel. Its type information (BTF),
// which takes tens of milliseconds to read, is needed only for what nobody has
// asked before.
type kernel struct {
	known   map[string]int32
	learned bool      // more than was remembered
	spec    *btf.Spec // once something had to be found out
}

// number is one that is known, or found out.
func (k *kernel) number(name string, find func(*btf.Spec) (int32, error)) (int32, error) {
	if n, ok := k.known[name]; ok && n != none {
		return n, nil
	} else if ok {
		return 0, fmt.Errorf("this kernel has no %s", name)
	}
	if k.spec == nil {
		var err error
		if k.spec, err = btf.LoadKernelSpec(); err != nil {
			return 0, fmt.Errorf("type information of the kernel: %w", err)
		}
	}
	n, err := find(k.spec)
	if err != nil {
		k.learn(name, none)
		return 0, err
	}
	k.learn(name, n)
	return n, nil
}

func (k *kernel) learn(name string, n int32) {
	if k.known == nil {
		k.known = map[string]int32{}
	}
	k.known[name], k.learned = n, true
}

// remembered is what is kept of this kernel, which may be nothing.
func remembered() *kernel {
	f, err := readFacts()
	if err != nil {
		return &kernel{}
	}
	return &kernel{known: f.Numbers}
}

// keeping keeps two of us from forgetting what the other has learned. (Of two
// processes the last one's is kept: the other learns it again.)
var keeping sync.Mutex

// keep keeps what was found out, if it can.
func (k *kernel) keep() {
	if !k.learned {
		return
	}
	keeping.Lock()
	defer keeping.Unlock()
	f, err := readFacts()
	if err != nil {
		f.Numbers = map[string]int32{}
	}
	maps.Copy(f.Numbers, k.known)
	if f.save() == nil {
		k.learned = false
	}
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

func factsFile() string { return filepath.Join(factsDir, "kernel.json") }

// sum is over the numbers in the order of their names.
func (f *facts) sum() [sha256.Size]byte {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(f.Numbers)) {
		fmt.Fprintf(h, "%s %d\n", name, f.Numbers[name])
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// save keeps the facts. Whoever reads them meanwhile sees all or nothing.
func (f *facts) save() (err error) {
	if f.Boot, err = bootID(); err != nil {
		return err
	}
	f.Sum = f.sum()
	text, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(factsDir, 0o700); err != nil {
		return err
	}
	if err := private(factsDir, unix.S_IFDIR); err != nil {
		return err
	}
	t, err := os.CreateTemp(factsDir, "kernel-") // for its owner only
	if err != nil {
		return err
	}
	_, err = t.Write(text)
	if err = errors.Join(err, t.Close()); err == nil {
		err = os.Rename(t.Name(), factsFile())
	}
	if err != nil {
		return errors.Join(err, os.Remove(t.Name()))
	}
	return nil
}

// private makes sure that nobody but us can have made what is at a path.
func private(path string, kind uint32) error {
	var s unix.Stat_t
	if err := unix.Lstat(path, &s); err != nil {
		return err
	}
	if s.Mode&unix.S_IFMT != kind || s.Mode&0o077 != 0 || int(s.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is not ours alone", path)
	}
	return nil
}

// readFacts reads those of this boot.
func readFacts() (f facts, err error) {
	if err := private(factsDir, unix.S_IFDIR); err != nil {
		return f, err
	}
	if err := private(factsFile(), unix.S_IFREG); err != nil {
		return f, err
	}
	r, err := os.Open(factsFile())
	if err != nil {
		return f, err
	}
	defer r.Close()
	const most = 64 << 10
	text, err := io.ReadAll(io.LimitReader(r, most))
	if err == nil {
		err = json.Unmarshal(text, &f)
	}
	boot, e := bootID()
	if err = errors.Join(err, e); err != nil {
		return f, err
	}
	if f.Boot != boot || f.Sum != f.sum() {
		return f, errors.New("not what is known of this kernel")
	}
	return f, nil
}

// loadRaw loads a program for an iterator whose number in BTF is known, which
// the library would read all BTF for.
func loadRaw(name string, iter btf.TypeID, ins asm.Instructions) (*Question, error) {
	var code bytes.Buffer
	// As all the machines have it that this runs on; another refuses the program.
	if err := ins.Marshal(&code, binary.LittleEndian); err != nil {
		return nil, err
	}
	text, gpl := code.Bytes(), append([]byte(license), 0)
	attr := struct { // union bpf_attr for BPF_PROG_LOAD
		kind, count      uint32
		code, license    unsafe.Pointer
		_                [2]uint32 // log
		_                uint64
		_                [2]uint32 // version, flags
		name             [unix.BPF_OBJ_NAME_LEN]byte
		_                uint32
		attachType       uint32
		_                [2]uint32 // its own BTF
		_                uint64
		_                [2]uint32
		_                uint64
		_                uint32
		attachTo, attach uint32
	}{
		kind: uint32(ebpf.Tracing), count: uint32(len(text) / asm.InstructionSize),
		code: unsafe.Pointer(&text[0]), license: unsafe.Pointer(&gpl[0]),
		attachType: uint32(ebpf.AttachTraceIter), attachTo: uint32(iter),
	}
	copy(attr.name[:unix.BPF_OBJ_NAME_LEN-1], name)
	var fd uintptr
	errno := unix.EAGAIN
	for try := 0; errno == unix.EAGAIN && try < 5; try++ { // a signal ends the verification
		fd, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}
	if errno != 0 {
		return nil, fmt.Errorf("load a program that reads tasks: %w", errno)
	}
	program, err := ebpf.NewProgramFromFD(int(fd))
	if err != nil {
		return nil, err
	}
	return attach(program)
}
