package task

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Commands of membarrier(2), bits of one mask.
const (
	barrierRegisterGlobal = 1 << 2
	barrierRegistrations  = 1 << 9 // MEMBARRIER_CMD_GET_REGISTRATIONS, Linux 6.3
)

// privateBarriers are the commands that fail with EPERM in an address space that
// has not registered for them; registering is the next bit.
var privateBarriers = [...]uint32{1 << 3, 1 << 5, 1 << 7} // PRIVATE_EXPEDITED, its SYNC_CORE, its RSEQ

// tellsBarriers reports whether the kernel tells what an address space has
// registered for. OCICKPT_NO_MEMBARRIER_QUERY makes it look like one that does not.
var tellsBarriers = sync.OnceValue(func() bool {
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, barrierRegistrations, 0, 0)
	return errno == 0 && os.Getenv("OCICKPT_NO_MEMBARRIER_QUERY") == ""
})

// askMembarrier adds the calls that read which barriers the process has
// registered for. Where the kernel does not say, trying one tells, and a barrier
// more hurts nobody. Only the registration for the global one cannot be tried:
// there everyone is taken to have it, for all it does is to take part.
func askMembarrier(b *tracee.Batch) func() uint32 {
	if tellsBarriers() {
		i := b.Try(unix.SYS_MEMBARRIER, tracee.W(barrierRegistrations))
		return func() uint32 { return uint32(max(b.Calls[i].Ret, 0)) }
	}
	var tries [len(privateBarriers)]int
	for i, command := range privateBarriers {
		tries[i] = b.Try(unix.SYS_MEMBARRIER, tracee.W(command))
	}
	return func() uint32 {
		registered := uint32(barrierRegisterGlobal)
		for i, command := range privateBarriers {
			if b.Err(tries[i]) == nil {
				registered |= command << 1
			}
		}
		return registered
	}
}

// restoreMembarrier adds the calls that register again. It is much cheaper while
// the process has one thread. A processor or kernel without one of the barriers
// fails it, and the program, which may have found out long ago, must not run.
func restoreMembarrier(b *tracee.Batch, registered uint32) {
	for command := uint32(1); command < barrierRegistrations; command <<= 1 {
		if registered&command != 0 {
			b.Add(unix.SYS_MEMBARRIER, tracee.W(command))
		}
	}
}
