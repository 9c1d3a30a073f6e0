package runtime

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/cgroupfreeze"
	"github.com/ocickpt/ocickpt/runtime/bpf"
)

// unifiedCgroups reports a host whose containers are in cgroup v2 alone.
func unifiedCgroups() bool { return cgroups.IsCgroup2UnifiedMode() }

// probeFreezer freezes and thaws an empty cgroup of its own, made where
// libcontainer makes a container's.
func probeFreezer() (err error) {
	controller, parent, err := cgroupParent()
	if err != nil {
		return err
	}
	dir := filepath.Join(parent, fmt.Sprintf("ocickpt-probe-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cgroups.RemovePath(dir)) }()
	c, err := cgroupfreeze.Open(map[string]string{controller: dir})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := c.Freeze(ctx); err != nil {
		return err
	}
	return c.Thaw(ctx)
}

// cgroupParent is the directory in which containers get their cgroup, in the
// hierarchy that freezes: on v2 beside this process's own cgroup, on v1 below.
func cgroupParent() (controller, dir string, err error) {
	if !unifiedCgroups() {
		dir, err = cgroups.GetOwnCgroupPath("freezer")
		return "freezer", dir, err
	}
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		return "", "", err
	}
	return "", filepath.Join("/sys/fs/cgroup", filepath.Dir(own[""])), nil
}

// probeKcmpEpoll asks for the file behind an epoll's only entry.
func probeKcmpEpoll() error {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	defer unix.Close(epoll)
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	defer unix.Close(event)
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, event, &unix.EpollEvent{Fd: int32(event)}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	const epollTFD = 7 // KCMP_EPOLL_TFD
	slot := struct{ efd, tfd, toff uint32 }{efd: uint32(epoll), tfd: uint32(event)}
	self := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, self, self, epollTFD, uintptr(event), uintptr(unsafe.Pointer(&slot)), 0)
	if errno == 0 && order != 0 {
		return errors.New("kcmp does not know the file of an epoll's entry")
	}
	return errnoOf("kcmp", errno)
}

func probeOpenat2() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return fmt.Errorf("openat2: %w", err)
	}
	return unix.Close(fd)
}

// probeUnixDiag asks sock_diag(7) for a unix socket. The kernel loads the module
// unix_diag at the first question, and answers ENOENT if there is none.
func probeUnixDiag() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	defer unix.Close(fd)
	subject, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(subject)
	var st unix.Stat_t
	if err := unix.Fstat(subject, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if err := unix.Sendto(fd, unixDiagRequest(uint32(st.Ino)), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	return netlinkError(answer[:n])
}

// unixDiagRequest is a struct nlmsghdr and a struct unix_diag_req.
func unixDiagRequest(inode uint32) []byte {
	le := binary.LittleEndian
	b := make([]byte, unix.NLMSG_HDRLEN+24)
	le.PutUint32(b, uint32(len(b)))
	le.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	le.PutUint16(b[6:], unix.NLM_F_REQUEST)
	request := b[unix.NLMSG_HDRLEN:]
	request[0] = unix.AF_UNIX
	le.PutUint32(request[4:], ^uint32(0)) // sockets of any state
	le.PutUint32(request[8:], inode)
	le.PutUint64(request[16:], ^uint64(0)) // with any cookie
	return b
}

// netlinkError is the error in a struct nlmsgerr, if that is what b holds.
func netlinkError(b []byte) error {
	le := binary.LittleEndian
	if len(b) < unix.NLMSG_HDRLEN+4 {
		return errors.New("sock_diag: short answer")
	}
	if le.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return nil
	}
	return fmt.Errorf("sock_diag: %w", unix.Errno(-int32(le.Uint32(b[unix.NLMSG_HDRLEN:]))))
}

func probeBufLock() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUF_LOCK)
	return err
}

// probeSetMM asks for the size of the structure that PR_SET_MM_MAP takes: it is
// there under the same conditions, and asking changes nothing.
func probeSetMM() error {
	var size uint32
	_, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP_SIZE, uintptr(unsafe.Pointer(&size)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func probeTimerIDs() error {
	return unix.Prctl(unix.PR_TIMER_CREATE_RESTORE_IDS, unix.PR_TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0)
}

func probeMemfdExec() error {
	fd, err := unix.MemfdCreate("ocickpt-probe", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func probePidfdThread() error {
	fd, err := unix.PidfdOpen(unix.Gettid(), unix.PIDFD_THREAD)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// probeUserfaultfdDevice makes a descriptor through the device, which gives it
// without a capability to whoever may open it.
func probeUserfaultfdDevice() error {
	const iocNew = 0xaa00 // USERFAULTFD_IOC_NEW
	device, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), iocNew, unix.O_CLOEXEC)
	if errno != 0 {
		return errnoOf("USERFAULTFD_IOC_NEW", errno)
	}
	return unix.Close(int(fd))
}

// probeWriteProtectAsync asks a userfaultfd for the feature (ioctl_userfaultfd(2)
// UFFDIO_API).
func probeWriteProtectAsync() error {
	const (
		uffdioAPI = 0xc018aa3f // _IOWR(0xaa, 0x3f, struct uffdio_api)
		api       = 0xaa
		wpAsync   = 1 << 15 // UFFD_FEATURE_WP_ASYNC
	)
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return errnoOf("userfaultfd", errno)
	}
	defer unix.Close(int(fd))
	arg := struct{ api, features, ioctls uint64 }{api: api, features: wpAsync}
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(&arg)))
	return errnoOf("UFFDIO_API", errno)
}

// probeRestartBlocks reads out of the kernel where calls of stopped threads stand.
func probeRestartBlocks() error {
	q, err := bpf.RestartBlocks()
	if err != nil {
		return err
	}
	return q.Close()
}
