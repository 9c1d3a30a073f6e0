package bpf

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// factsDir is where what has been found out about the kernel is kept until the
// host boots again. Only root can look into it.
var factsDir = "/run/ocickpt"

// landlockFacts are what takes long to find out for the question about Landlock:
// numbers only, that are the same until the host boots again.
type landlockFacts struct {
	Boot string // which boot they hold for
	Iter btf.TypeID
	// Where members of structures are, and the domain in what security modules share.
	Pid, Tgid, Cred, Security int32
	Place                     uint64
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

func factsFile() string { return filepath.Join(factsDir, "landlock.json") }

// save keeps the facts. Whoever reads them meanwhile sees all or nothing.
func (f landlockFacts) save() (err error) {
	if f.Boot, err = bootID(); err != nil {
		return err
	}
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
	t, err := os.CreateTemp(factsDir, "landlock-") // for its owner only
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
func readFacts() (f landlockFacts, err error) {
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
	const most = 1 << 10
	text, err := io.ReadAll(io.LimitReader(r, most))
	if err == nil {
		err = json.Unmarshal(text, &f)
	}
	boot, e := bootID()
	if err = errors.Join(err, e); err != nil {
		return f, err
	}
	if f.Boot != boot || f.Iter == 0 || f.Place%8 != 0 || f.Place >= 8*words {
		return f, errors.New("not what is known of this kernel")
	}
	for _, at := range []int32{f.Pid, f.Tgid, f.Cred, f.Security} {
		if at < 0 || at > 1<<15-1 { // as far as an instruction reaches
			return f, errors.New("not what is known of this kernel")
		}
	}
	return f, nil
}

// remembered makes the question of what is kept. That it finds a thread in a
// domain, and not our main thread, is tried each time, as a wrong place could
// let confined threads pass.
func remembered() (*Landlock, error) {
	facts, err := readFacts()
	if err != nil {
		return nil, err
	}
	l, err := unplaced()
	if err != nil {
		return nil, err
	}
	l.facts = facts
	if err = l.put(facts.Place); err == nil {
		begin, _ := (*kernel).everyone(nil)
		l.Question, err = loadRaw(facts.Iter, append(append(begin, l.body()...), end()...))
	}
	if err != nil {
		return nil, errors.Join(err, l.place.Close())
	}
	err = whileConfined(func(tid int) error {
		tids, err := l.Threads()
		if err == nil && (!tids[tid] || tids[os.Getpid()]) {
			err = errors.New("what is known of this kernel is wrong")
		}
		return err
	})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// loadRaw loads a program for an iterator whose number in BTF is known, which
// the library would read all BTF for.
func loadRaw(iter btf.TypeID, ins asm.Instructions) (*Question, error) {
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
	copy(attr.name[:], "landlock")
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
