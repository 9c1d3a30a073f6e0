package namespace

import (
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// mnt is a set of mounts of its own (mount_namespaces(7)).
var mnt = kind{
	name: "mnt", flag: unix.CLONE_NEWNS,
	read: func(*Set, *Namespace) error {
		return fail.Refuse("", "mount namespaces of tasks are not supported yet", "")
	},
}
