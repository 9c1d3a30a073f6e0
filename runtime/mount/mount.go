// Package mount holds the mounts of a container that its bundle does not make:
// those the container has mounted itself, on top of others too, those of the
// bundle's that it has unmounted or changed, and how mounts hand on events. Out:
// each mount is told to be the bundle's, a file system mounted anew, or a part of
// one that is mounted elsewhere. In: the init stub makes them with the rights of
// the bundle's own process, through descriptors, so that it does not matter what
// covers what.
package mount

import (
	"fmt"
	"os"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// Read reads the mounts that a process sees (proc_pid_mountinfo(5)).
func Read(pid int) ([]*mountinfo.Info, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return mountinfo.GetMountsFromReader(f, nil)
}

// Records are mounts as the image has them.
func Records(list []*mountinfo.Info) []image.Mount {
	out := make([]image.Mount, len(list))
	for i, m := range list {
		out[i] = image.Mount{
			ID: m.ID, Parent: m.Parent, Root: m.Root, Point: m.Mountpoint, Options: m.Options, Optional: m.Optional,
			FSType: m.FSType, Source: m.Source, Super: m.VFSOptions,
		}
	}
	return out
}

// attributes are the options of a mount by their flags of mount_setattr(2).
var attributes = map[string]uint64{
	"rw": 0, "ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
	"noatime": unix.MOUNT_ATTR_NOATIME, "nodiratime": unix.MOUNT_ATTR_NODIRATIME, "relatime": 0, "nosymfollow": unix.MOUNT_ATTR_NOSYMFOLLOW,
	idmapped: 0, // the bundle's to make
}

const idmapped = "idmapped"

// allAttributes are those that a mount_setattr(2) of ours decides on.
const allAttributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC |
	unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME | unix.MOUNT_ATTR_NOSYMFOLLOW

func attributesOf(options string) (attr uint64, err error) {
	atime := uint64(unix.MOUNT_ATTR_STRICTATIME)
	for o := range strings.SplitSeq(options, ",") {
		a, ok := attributes[o]
		if !ok {
			return 0, fail.Refuse("", "its option "+o+" is not supported", "")
		}
		attr |= a
		if o == "relatime" || o == "noatime" {
			atime = 0
		}
	}
	return attr | atime, nil
}

// option is one of a file system; without a value it is a flag.
type option struct{ key, value string }

// fresh are the types of file systems that are mounted anew.
var fresh = map[string]bool{
	"tmpfs": true, "proc": true, "sysfs": true, "mqueue": true, "devpts": true, "cgroup": true, "cgroup2": true, "overlay": true,
	"hugetlbfs": true, // an empty one
}

// ofKernel are those through which the kernel shows what is its own: one for all
// who mount it, with options that are no one container's to set.
var ofKernel = map[string]bool{
	"fusectl": true, "debugfs": true, "tracefs": true, "securityfs": true, "configfs": true, "pstore": true, "efivarfs": true, "binfmt_misc": true,
}

// perNamespace reports a type of which all mounts in one namespace are the same
// file system: a new mount of it and a part of another differ in their source only.
func perNamespace(fsType string) bool {
	switch fsType {
	case "sysfs", "mqueue", "cgroup", "cgroup2":
		return true
	}
	return ofKernel[fsType]
}

// maxOption is how long an option may be (vfs_fsconfig_locked in fs/fsopen.c).
const maxOption = 255

// optionsOf are the options to mount a file system with, ids as the container
// numbers them. What /proc shows of overlays cannot be told apart once it had to
// be escaped.
func optionsOf(m *image.Mount, ids task.IDMaps) (out []option, err error) {
	if ofKernel[m.FSType] {
		return nil, nil
	}
	for o := range strings.SplitSeq(m.Super, ",") {
		key, value, _ := strings.Cut(o, "=")
		var n uint32
		switch {
		case key == "" || key == "rw" || key == "ro":
			continue
		case len(value) > maxOption:
			return nil, fail.Refuse("", fmt.Sprintf("its option %s is longer than the %d bytes that fsconfig(2) takes", key, maxOption), "unmount it before the checkpoint")
		case strings.Contains(o, `\`):
			return nil, fail.Refuse("", "its option "+o+" has a character that mount(2) cannot be given again", "")
		case key == "uid":
			_, err = fmt.Sscan(value, &n)
			value = fmt.Sprint(ids.User(n))
		case key == "gid":
			_, err = fmt.Sscan(value, &n)
			value = fmt.Sprint(ids.Group(n))
		}
		if err != nil {
			return nil, fmt.Errorf("its option %s: %w", o, err)
		}
		out = append(out, option{key, value})
	}
	return out, nil
}

// readOnly reports a file system that is mounted read-only, all its mounts with it.
func readOnly(super string) bool {
	first, _, _ := strings.Cut(super, ",")
	return first == "ro"
}

// sharing is how a mount hands on events (mount_namespaces(7), shared subtrees):
// the peer group that it is in and the one that it gets events from, 0 for none.
type sharing struct {
	peers, master int
	unbindable    bool
}

func sharingOf(optional string) (s sharing) {
	for f := range strings.FieldsSeq(optional) {
		key, value, _ := strings.Cut(f, ":")
		switch key {
		case "shared":
			_, _ = fmt.Sscan(value, &s.peers)
		case "master":
			_, _ = fmt.Sscan(value, &s.master)
		case "unbindable":
			s.unbindable = true
		}
	}
	return s
}

// like reports that a mount hands on events in the same way as another; numbers
// of groups are the kernel's.
func (s sharing) like(o sharing) bool {
	return (s.peers != 0) == (o.peers != 0) && (s.master != 0) == (o.master != 0) && s.unbindable == o.unbindable
}

// within reports a root directory that lies in another one's.
func within(root, in string) bool {
	return in == "/" || root == in || strings.HasPrefix(root, in+"/")
}
