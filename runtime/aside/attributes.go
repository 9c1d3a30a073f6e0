package aside

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func now() int64 { return time.Now().UnixNano() }

// attributes are what an inode has besides its content, as the host numbers ids.
type attributes struct {
	Mode, UID, GID uint32
	Times          [2]unix.Timespec
	Xattrs         map[string][]byte `json:",omitempty"` // names are ASCII in practice, values are not
}

// magic is a path that leads to what fd is open on, and no further.
func magic(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func readAttributes(fd int) (*attributes, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	a := &attributes{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Times: [2]unix.Timespec{st.Atim, st.Mtim}, Xattrs: map[string][]byte{}}
	names, err := xattrNames(fd)
	if err != nil {
		return nil, err
	}
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for _, name := range names {
		n, err := unix.Getxattr(magic(fd), name, value)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		a.Xattrs[name] = slices.Clone(value[:n])
	}
	return a, nil
}

func xattrNames(fd int) ([]string, error) {
	list := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Listxattr(magic(fd), list)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00"), nil
}

// restore makes an inode have the attributes and no others. Times come last.
func (a *attributes) restore(fd int) error {
	isLink := a.Mode&unix.S_IFMT == unix.S_IFLNK
	errs := []error{unix.Fchownat(fd, "", int(a.UID), int(a.GID), unix.AT_EMPTY_PATH)}
	if !isLink {
		errs = append(errs, unix.Chmod(magic(fd), a.Mode&0o7777), a.restoreXattrs(fd))
	}
	errs = append(errs, unix.UtimesNanoAt(fd, "", a.Times[:], unix.AT_EMPTY_PATH))
	return errors.Join(errs...)
}

func (a *attributes) restoreXattrs(fd int) error {
	names, err := xattrNames(fd)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if _, had := a.Xattrs[name]; !had {
			errs = append(errs, unix.Removexattr(magic(fd), name))
		}
	}
	for name, value := range a.Xattrs {
		errs = append(errs, unix.Setxattr(magic(fd), name, value, 0))
	}
	return errors.Join(errs...)
}
