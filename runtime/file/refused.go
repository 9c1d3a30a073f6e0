package file

import (
	"strings"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// unknown refuses a descriptor that no kind is for, with the reason where that is
// known by what it is.
func unknown(one *seen) error {
	for _, u := range []struct{ link, why string }{
		{"anon_inode:[io_uring]", "an io_uring: how it was set up and how far it has come in its rings only the kernel knows, and a new one begins at 0"},
		{"anon_inode:[userfaultfd]", "a userfaultfd: which address space it serves, and how, only the kernel knows"},
		{"anon_inode:[perf_event]", "a performance counter, which belongs to the processors of this host"},
		{"anon_inode:bpf", "an object of BPF, which others may share, in the kernel"},
		{"anon_inode:btf", "type information of BPF"},
		{"anon_inode:seccomp notify", "it answers system calls of others, which would wait for it while it is stopped"},
		{"anon_inode:[landlock-ruleset]", "a Landlock ruleset: the kernel tells nobody the rules"},
		{"anon_inode:[fscontext]", "a file system that is being made (fsopen)"},
		{"anon_inode:kvm", "a virtual machine"},
		{"/dmabuf:", "memory of a device"},
	} {
		if strings.HasPrefix(one.link, u.link) {
			return fail.Refuse("", u.why, "close it before the checkpoint")
		}
	}
	return fail.Refuse("", "this kind of file is not supported yet", "close it before the checkpoint")
}
