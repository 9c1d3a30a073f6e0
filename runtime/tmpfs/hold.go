package tmpfs

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

// What a running container goes on changing can be held as it was: where the file
// system shares blocks (XFS, Btrfs, an overlay upon them), the contents of all files
// are cloned, one behind the other, into a file without a name
// (ioctl_ficlonerange(2)). That takes microseconds a file, whatever its size, and
// they are written when the container runs again.

// holding is where in the file without a name a clone may begin: at a block of any
// file system.
const holding = 64 << 10

// Hold sets aside what the files hold now. What cannot be held is left for Save.
func (t *Tree) Hold() {
	if t.openHeld() != nil {
		return
	}
	var at uint64
	for _, n := range t.others {
		if n.record.Size == 0 {
			continue
		}
		if n.isHeld = t.clone(n, at) == nil; n.isHeld {
			n.heldAt = int64(at)
			at += (n.record.Size + holding - 1) &^ (holding - 1)
		}
	}
}

// Flush writes what is still on its way to the disk, if the files can be held: a
// clone has to wait for that.
func (t *Tree) Flush() {
	if t.openHeld() != nil {
		return
	}
	for _, n := range t.others {
		if n.record.Size == 0 {
			continue
		}
		f, err := t.within(n.path, unix.O_RDONLY)
		if err != nil {
			continue // of a container that runs
		}
		shares := t.share(f, 0) == nil
		if shares {
			_ = unix.Fdatasync(int(f.Fd()))
		}
		_ = f.Close()
		if !shares {
			return
		}
	}
}

func (t *Tree) openHeld() error {
	fd, err := unix.Openat(int(t.root.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		t.held = os.NewFile(uintptr(fd), "held contents of the "+t.Name())
	}
	return err
}

func (t *Tree) clone(n *inode, at uint64) error {
	f, err := t.within(n.path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	return t.share(f, at)
}

// share makes the bytes of a file stand in the held ones, too.
func (t *Tree) share(f *os.File, at uint64) error {
	return unix.IoctlFileCloneRange(int(t.held.Fd()), &unix.FileCloneRange{Src_fd: int64(f.Fd()), Dest_offset: at})
}

// SaveHeld writes the bytes of the files that are held.
func (t *Tree) SaveHeld(w *image.Writer, progress func() error) error {
	return t.save(w, true, progress)
}
