package task

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Some state of a thread belongs to the machine it is on and not to an image.
// It is not lost silently: Unsaved says what there was, for a warning.

// keyrings are the special ids of keyctl(2) that name a keyring of the caller.
var keyrings = [...]struct {
	id   int32
	what string
}{{-1, "thread"}, {-2, "process"}, {-3, "session"}}

const (
	keyctlGetKeyringID = 0
	keyctlDescribe     = 6
	keyctlRead         = 11

	keySize         = 4 // bytes of an id in the content of a keyring
	descriptionSize = 128

	schedCoreGet = 0 // PR_SCHED_CORE_GET
)

// askUnsaved adds the calls that look for it. Nothing is created: the thread
// and process keyrings are only named if they exist, and a thread without a
// session keyring falls back to that of its user, as in every use of it.
func askUnsaved(b *tracee.Batch) func() []string {
	var id, size [len(keyrings)]int
	var name [len(keyrings)]tracee.Word
	for i, k := range keyrings {
		ring := tracee.W(k.id)
		id[i] = b.Try(unix.SYS_KEYCTL, tracee.W(keyctlGetKeyringID), ring)
		size[i] = b.Try(unix.SYS_KEYCTL, tracee.W(keyctlRead), ring)
		name[i] = b.Reserve(descriptionSize)
		b.Try(unix.SYS_KEYCTL, tracee.W(keyctlDescribe), ring, name[i], tracee.W(descriptionSize))
	}
	cookie := b.Reserve(8)
	b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_SCHED_CORE), tracee.W(schedCoreGet), tracee.W(0), tracee.W(0), cookie)
	return func() (found []string) {
		for i, k := range keyrings {
			n := b.Calls[size[i]].Ret / keySize
			description, _, _ := bytes.Cut(b.At(name[i], descriptionSize), []byte{0})
			// A user's own keyrings outlive its processes.
			_, ring, _ := strings.Cut(string(description[bytes.LastIndexByte(description, ';')+1:]), "_uid")
			if b.Err(size[i]) == nil && n > 0 && ring == "" {
				found = append(found, fmt.Sprintf("%s keyring %d with %d keys is not in the image: a restored container has new keyrings", k.what, b.Calls[id[i]].Ret, n))
			}
		}
		if binary.LittleEndian.Uint64(b.At(cookie, 8)) != 0 {
			found = append(found, "a core scheduling cookie (PR_SCHED_CORE) is not in the image")
		}
		return found
	}
}

// outsideUnsaved is the same for what is seen from outside, and refuses what
// would be lost.
func outsideUnsaved(t *tracee.Thread, s *Status) (found []string, err error) {
	const capSysRawIO = 17
	// Nobody else can have asked for ports.
	if s.CapBnd&(1<<capSysRawIO) != 0 && t.PortAccess() {
		return nil, fail.Refuse("I/O ports (ioperm, iopl)", "access to them is not supported", "")
	}
	dr7, err := t.DebugControl()
	if err == nil && dr7 != 0 {
		found = append(found, fmt.Sprintf("breakpoints in debug registers (DR7 %#x), which a debugger has left, are not in the image", dr7))
	}
	return found, err
}
