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
		var err error
		n.Record.UTS, err = ReadUTS(n.path)
		return err
	},
	fill: func(_ *Maker, s *stub, n *image.NestedNamespace) error {
		var b tracee.Batch
		SetUTS(&b, n.UTS)
		_, err := s.Run(&b)
		return err
	},
}

// ReadUTS reads the names of the uts namespace at path, or of the caller's own.
func ReadUTS(path string) (*image.UTSNamespace, error) {
	var name unix.Utsname
	if err := nsutil.Inside(path, func() error { return unix.Uname(&name) }); err != nil {
		return nil, err
	}
	return &image.UTSNamespace{
		Hostname: unix.ByteSliceToString(name.Nodename[:]), Domainname: unix.ByteSliceToString(name.Domainname[:]),
	}, nil
}

// SetUTS adds the calls that give a stub's uts namespace its names.
func SetUTS(b *tracee.Batch, n *image.UTSNamespace) {
	b.Add(unix.SYS_SETHOSTNAME, b.String(n.Hostname), tracee.W(len(n.Hostname)))
	b.Add(unix.SYS_SETDOMAINNAME, b.String(n.Domainname), tracee.W(len(n.Domainname)))
}
