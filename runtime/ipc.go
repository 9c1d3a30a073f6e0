package runtime

import (
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"

	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/namespace"
)

// checkIPC refuses System V objects and message queues in an ipc namespace that
// is the container's own.
func (c *container) checkIPC(*libcontainer.State, *configs.Config) error {
	for i := range c.record.Namespaces {
		if n := &c.record.Namespaces[i]; n.Type == "ipc" && (n.Host || n.Path != "") {
			return nil
		}
	}
	return nsutil.Inside(nsutil.Path(c.initPid, "ipc"), namespace.CheckIPC)
}
