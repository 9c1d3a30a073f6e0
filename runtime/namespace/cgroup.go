package namespace

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// cgroup is a place in the cgroup hierarchies that is shown as their root
// (cgroup_namespaces(7)). All tasks being in the container's cgroup, no other
// place is to be had.
var cgroup = kind{
	name: "cgroup", flag: unix.CLONE_NEWCGROUP,
	read: func(_ *Set, n *Namespace) error {
		return nsutil.Inside(n.path, func() error {
			// Paths are shown from the root of the thread that opens the file.
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", n.pid))
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(b)) {
				f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
				if len(f) == 3 && f[2] != "/" {
					return fail.Refuse("", "its root is not the container's cgroup: of "+f[1]+" it sees "+f[2], "")
				}
			}
			return nil
		})
	},
}
