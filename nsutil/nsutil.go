// Package nsutil identifies and enters namespaces.
package nsutil

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Types are the kinds of namespace by their names under /proc/PID/ns
// (namespaces(7)).
var Types = []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"}

// Of returns the inode of each namespace that a process is in, by type. A type
// that this kernel does not have is left out.
func Of(pid int) (map[string]uint64, error) {
	out := map[string]uint64{}
	for _, t := range Types {
		inode, err := One(pid, t)
		if os.IsNotExist(err) && t != "mnt" {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[t] = inode
	}
	return out, nil
}

// One returns the inode of the namespace of one type that a process is in.
func One(pid int, kind string) (uint64, error) {
	link, err := os.Readlink(Path(pid, kind))
	if err != nil {
		return 0, err
	}
	return Parse(link)
}

// Path is the link to a process's namespace.
func Path(pid int, kind string) string {
	return "/proc/" + strconv.Itoa(pid) + "/ns/" + kind
}

// Parse reads "mnt:[4026531841]".
func Parse(link string) (uint64, error) {
	_, rest, ok := strings.Cut(link, ":[")
	if !ok {
		return 0, fmt.Errorf("strange namespace link %q", link)
	}
	return strconv.ParseUint(strings.TrimSuffix(rest, "]"), 10, 64)
}

// Owner returns the inode of the user namespace that owns a namespace
// (ioctl_ns(2) NS_GET_USERNS), 0 if it lies above the caller's own.
func Owner(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return relative(f, unix.NS_GET_USERNS)
}

// Kin are the namespaces that one stands in relation to (ioctl_ns(2)).
type Kin struct {
	Owner    uint64 // inode of the owning user namespace, of a user namespace its parent
	Parent   uint64 // of a pid or user namespace: inode of its parent
	OwnerUID uint32 // of a user namespace: the creator's uid, as the caller's numbers it
}

// Relatives returns who owns a namespace and what it lies in; zero stands for
// what is above the caller's own.
func Relatives(path, kind string) (k Kin, err error) {
	f, err := os.Open(path)
	if err != nil {
		return k, err
	}
	defer f.Close()
	if k.Owner, err = relative(f, unix.NS_GET_USERNS); err != nil {
		return k, err
	}
	if kind == "pid" || kind == "user" {
		if k.Parent, err = relative(f, unix.NS_GET_PARENT); err != nil {
			return k, err
		}
	}
	if kind == "user" {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.NS_GET_OWNER_UID, uintptr(unsafe.Pointer(&k.OwnerUID)))
		if errno != 0 {
			return k, fmt.Errorf("owner of %s: %w", path, errno)
		}
	}
	return k, nil
}

// relative asks for a related namespace's inode.
func relative(f *os.File, request uint) (uint64, error) {
	fd, err := unix.IoctlRetInt(int(f.Fd()), request)
	if err == unix.EPERM {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("relatives of %s: %w", f.Name(), err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	return st.Ino, err
}

// Unborn stands for a pid namespace that has no process yet: it has an inode
// only once it has an init (pidns_for_children_get in kernel/pid_namespace.c).
const Unborn = 1

// ForChildren returns the inodes of the pid and time namespaces that a process's
// children begin in; 0 for a type that this kernel does not have.
func ForChildren(pid int) (forPids, forTime uint64, err error) {
	for kind, to := range map[string]*uint64{"pid_for_children": &forPids, "time_for_children": &forTime} {
		link, err := os.Readlink(Path(pid, kind))
		if os.IsNotExist(err) {
			if _, gone := os.Stat("/proc/" + strconv.Itoa(pid)); gone != nil {
				return 0, 0, gone
			}
			if kind == "pid_for_children" {
				*to = Unborn
			}
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		if *to, err = Parse(link); err != nil {
			return 0, 0, err
		}
	}
	return forPids, forTime, nil
}

// TimeOffsets returns how far a process's CLOCK_MONOTONIC and CLOCK_BOOTTIME
// stand from the host's, nanoseconds (time_namespaces(7)).
func TimeOffsets(pid int) (monotonic, boottime int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timens_offsets", pid))
	if os.IsNotExist(err) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		var clock string
		var sec, nsec int64
		if n, _ := fmt.Sscanf(line, "%s %d %d", &clock, &sec, &nsec); n != 3 {
			continue
		}
		switch clock {
		case "monotonic", "1":
			monotonic = sec*1e9 + nsec
		case "boottime", "7":
			boottime = sec*1e9 + nsec
		}
	}
	return monotonic, boottime, nil
}

// Inside runs f on a thread of its own inside the namespace at path (setns(2)).
// With no path it stays where it is, for f to leave. The thread ends afterwards instead of coming back, so that nothing else ever
// runs in the wrong namespace.
func Inside(path string, f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() { // the main thread would not end
			err = Inside(path, f)
			runtime.UnlockOSThread()
			return
		}
		if path != "" {
			err = enter(path)
		}
		if err == nil {
			err = f()
		}
	}()
	<-done
	return err
}

func enter(path string) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), 0); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return nil
}
