package tracee

import (
	"errors"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"
)

// ReadFile is os.ReadFile for the files of /proc that are read for every thread
// of a stopped container. The package os finds out of every file it opens
// whether it can be waited for, which takes twice as many calls as reading it.
func ReadFile(path string) ([]byte, error) {
	return ReadFileAt(unix.AT_FDCWD, path, make([]byte, 4096))
}

// ReadFileAt is ReadFile for a path from the directory dir, with the memory of buf,
// of which the result keeps nothing.
func ReadFileAt(dir int, path string, buf []byte) ([]byte, error) {
	return readAt(dir, path, buf, false)
}

// ReadPieceAt is ReadFileAt for a file that the kernel shows in one piece
// (single_open in fs/seq_file.c): behind what does not fill the buffer comes nothing.
func ReadPieceAt(dir int, path string, buf []byte) ([]byte, error) {
	return readAt(dir, path, buf, true)
}

func readAt(dir int, path string, buf []byte, piece bool) ([]byte, error) {
	fd, err := retry(func() (int, error) { return unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	b := buf[:0]
	for {
		n, err := retry(func() (int, error) { return unix.Read(fd, b[len(b):cap(b)]) })
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if b = b[:len(b)+n]; n == 0 || piece && len(b) < cap(b) {
			return slices.Clone(b), nil
		}
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

func retry(call func() (int, error)) (n int, err error) {
	for {
		if n, err = call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
