package task

import (
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// queueable refuses pending signals that cannot be queued again: those that
// would stop the stub while it does it, and the one it needs itself.
func queueable(pending uint64) error {
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGTRAP} {
		if pending&(1<<(sig-1)) != 0 {
			return fail.Refuse("pending "+unix.SignalName(sig), "it is not supported yet", "try again when it is delivered")
		}
	}
	return nil
}
