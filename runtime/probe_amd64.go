package runtime

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// probeMapVDSO asks for a vdso where there is one: a kernel that knows the
// request refuses a second (arch/x86/entry/vdso/vma.c). Without
// CONFIG_CHECKPOINT_RESTORE it is EINVAL.
func (p *probeTask) probeMapVDSO() error {
	const mapVDSO64 = 0x2003 // ARCH_MAP_VDSO_64
	var b tracee.Batch
	b.Try(unix.SYS_ARCH_PRCTL, tracee.W(mapVDSO64), tracee.W(0))
	if _, err := p.Run(&b); err != nil {
		return err
	}
	if err := b.Err(0); !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// Addresses in a running heartbeat.
const (
	heartText = 0x10000 // the lowest that vm.mmap_min_addr allows by default
	heartData = 0x20000
	heartBeat = heartData        // the number of the last beat, 8 bytes
	heartNap  = heartData + 0x10 // a struct timespec
)

const (
	heartNapTime = 10e6 // nanoseconds between two beats
	heartBeats   = 6000 // in its life: no more than a minute is left of it if we are killed
)

// heartELF is a static executable that counts, in a register and in its memory,
// and sleeps in between. It ends when the two differ.
func heartELF() []byte {
	const (
		page    = 4096
		header  = 64 // of the file
		segment = 56 // one program header
		entry   = header + 3*segment
	)
	le := binary.LittleEndian
	b := make([]byte, 2*page)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)  // ET_EXEC
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint32(b[20:], 1)  // EV_CURRENT
	le.PutUint64(b[24:], heartText+entry)
	le.PutUint64(b[32:], header) // program headers follow
	le.PutUint16(b[52:], header)
	le.PutUint16(b[54:], segment)
	le.PutUint16(b[56:], 3)
	load := func(b []byte, flags uint32, offset, addr uint64) {
		le.PutUint32(b, 1) // PT_LOAD
		le.PutUint32(b[4:], flags)
		for i, v := range []uint64{offset, addr, addr, page, page, page} {
			le.PutUint64(b[8+8*i:], v)
		}
	}
	load(b[header:], 5, 0, heartText)            // r-x
	load(b[header+segment:], 6, page, heartData) // rw-
	stack := b[header+2*segment:]
	le.PutUint32(stack, 0x6474e551) // PT_GNU_STACK
	le.PutUint32(stack[4:], 6)      // rw-
	copy(b[entry:], heartCode())
	le.PutUint64(b[page+heartNap-heartData+8:], heartNapTime)
	return b
}

func heartCode() []byte {
	le := binary.LittleEndian
	code := []byte{0x31, 0xdb} //           xor    %ebx, %ebx
	code = append(code,
		0x48, 0xff, 0xc3, //          beat: inc    %rbx
		0x48, 0x89, 0x1c, 0x25) //          mov    %rbx, heartBeat
	code = le.AppendUint32(code, heartBeat)
	code = append(code, 0xb8) //            mov    $SYS_nanosleep, %eax
	code = le.AppendUint32(code, unix.SYS_NANOSLEEP)
	code = append(code, 0xbf) //            mov    $heartNap, %edi
	code = le.AppendUint32(code, heartNap)
	code = append(code,
		0x31, 0xf6, //                      xor    %esi, %esi
		0x0f, 0x05, //                      syscall
		0x48, 0x3b, 0x1c, 0x25) //          cmp    heartBeat, %rbx
	code = le.AppendUint32(code, heartBeat)
	code = append(code,
		0x75, 0x09, //                      jne    end
		0x48, 0x81, 0xfb) //                cmp    $heartBeats, %rbx
	code = le.AppendUint32(code, heartBeats)
	code = append(code,
		0x72, 0xd4, //                      jb     beat
		0xb8) //                       end: mov    $SYS_exit_group, %eax
	code = le.AppendUint32(code, unix.SYS_EXIT_GROUP)
	return append(code,
		0x31, 0xff, //                      xor    %edi, %edi
		0x0f, 0x05) //                      syscall
}
