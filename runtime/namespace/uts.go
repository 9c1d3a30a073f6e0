package namespace

import (
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// uts is a pair of names (uts_namespaces(7)).
var uts = kind{
	name: "uts", flag: unix.CLONE_NEWUTS,
	read: func(_ *Set, n *Namespace) error {
		var name unix.Utsname
		if err := nsutil.Inside(n.path, func() error { return unix.Uname(&name) }); err != nil {
			return err
		}
		n.Record.UTS = &image.UTSNamespace{
			Hostname: unix.ByteSliceToString(name.Nodename[:]), Domainname: unix.ByteSliceToString(name.Domainname[:]),
		}
		return nil
	},
	fill: func(_ *Maker, s *stub, n *image.NestedNamespace) error {
		var b tracee.Batch
		b.Add(unix.SYS_SETHOSTNAME, b.String(n.UTS.Hostname), tracee.W(len(n.UTS.Hostname)))
		b.Add(unix.SYS_SETDOMAINNAME, b.String(n.UTS.Domainname), tracee.W(len(n.UTS.Domainname)))
		_, err := s.Run(&b)
		return err
	},
}
