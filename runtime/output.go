package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/guardian"
)

// ImageFile is the name of the stream in an image directory.
const ImageFile = "checkpoint.img"

// output is where the stream goes: a file that is written beside its name and
// renamed into place when it is whole, or a stream of the caller's.
type output struct {
	io.Writer
	path string // final name, "" for a stream
	file *os.File
	// replaced is the image that had the name before.
	replaced *os.File
	entry    guardian.Entry
}

// openOutput opens the output; path "" means w.
func openOutput(path string, w io.Writer, guard *guardian.Guardian) (*output, error) {
	if path == "" {
		return &output{Writer: w}, nil
	}
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		// A fifo or device is written as it is; a fifo must have its reader.
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		return &output{Writer: f, file: f}, err
	}
	if err := makeDir(filepath.Dir(path), guard); err != nil {
		return nil, err
	}
	beside := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid()))
	entry, err := guard.Promise(guardian.Remove(beside))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &output{Writer: f, path: path, file: f, entry: entry}, nil
}

// makeDir makes the image directory, and takes it back if nothing comes of it.
func makeDir(dir string, guard *guardian.Guardian) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if _, err := guard.Promise(guardian.Remove(dir)); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("image path: %w", err)
	}
	return nil
}

// spare is how much room an image takes besides page contents.
const spare = 16 << 20

// room refuses early when the file system cannot hold size more bytes.
func (o *output) room(size int64) error {
	if o.path == "" {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(o.file.Fd()), &st); err != nil {
		return fmt.Errorf("space for the image: %w", err)
	}
	free := int64(st.Bavail) * st.Bsize
	if need := size + spare; free < need {
		return fail.On(o.path, &fail.Error{
			Cause:  fmt.Errorf("the image may take %d MiB and the file system has %d MiB left: %w", need>>20, free>>20, unix.ENOSPC),
			Remedy: "free some, or write the image elsewhere",
		})
	}
	return nil
}

// commit gives a whole image its name.
func (o *output) commit(guard *guardian.Guardian) error {
	if o.path == "" {
		return nil
	}
	// Freeing an old image's blocks takes long; held open, it goes later.
	o.replaced, _ = os.Open(o.path)
	if err := os.Rename(o.file.Name(), o.path); err != nil {
		return err
	}
	return guard.Strike(o.entry)
}

// sync makes the image durable. That takes time, and comes when the container
// no longer waits.
func (o *output) sync() error {
	if o.path == "" {
		return nil
	}
	err := o.file.Sync()
	dir, e := os.Open(filepath.Dir(o.path))
	if e != nil {
		return errors.Join(err, e)
	}
	defer dir.Close()
	return errors.Join(err, dir.Sync())
}

func (o *output) Close() error {
	if o.replaced != nil {
		_ = o.replaced.Close()
	}
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}
