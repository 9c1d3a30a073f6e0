package runtime

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// checkABI refuses a program whose system calls are those of x32, neither of 64-bit
// nor of 32-bit code.
func checkABI(pid int) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return goneIs(pid, err)
	}
	defer f.Close()
	const machine = 18 // e_machine in struct elf32_hdr
	head := make([]byte, machine+2)
	if _, err := io.ReadFull(f, head); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	if string(head[:len(elf.ELFMAG)]) == elf.ELFMAG && elf.Class(head[elf.EI_CLASS]) == elf.ELFCLASS32 &&
		elf.Machine(binary.LittleEndian.Uint16(head[machine:])) == elf.EM_X86_64 {
		return fail.Refuse("", "it is an x32 program (64-bit code with addresses of 32 bits), whose system calls are not supported", "")
	}
	return nil
}
