package runtime

import (
	"bytes"
	"fmt"
	"os"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"

	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// checkIPC refuses System V objects in an ipc namespace that is the container's
// own: they would be gone after the restore, whoever has them attached or not.
func (c *container) checkIPC(*libcontainer.State, *configs.Config) error {
	for i := range c.record.Namespaces {
		if n := &c.record.Namespaces[i]; n.Type == "ipc" && (n.Host || n.Path != "") {
			return nil
		}
	}
	return nsutil.Inside(nsutil.Path(c.initPid, "ipc"), func() error {
		for _, kind := range []string{"shm", "sem", "msg"} {
			// The file shows the namespace of the thread that opens it.
			b, err := os.ReadFile("/proc/sysvipc/" + kind)
			if err != nil {
				return fmt.Errorf("reading System V ipc: %w", err)
			}
			if n := bytes.Count(b, []byte{'\n'}) - 1; n > 0 {
				return fail.Refuse("System V ipc", fmt.Sprintf("the container has %d objects of type %s; they are not supported yet", n, kind), "remove them before the checkpoint (ipcrm)")
			}
		}
		return nil
	})
}
