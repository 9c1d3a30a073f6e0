package tracee

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFilteredOptions has a stub judged by its own seccomp filter for one batch,
// and not before and after.
func TestFilteredOptions(t *testing.T) {
	s := newStub(t)
	program := []byte{
		0x20, 0, 0, 0, 0, 0, 0, 0, // load the number of the system call
		0x15, 0, 0, 1, unix.SYS_GETPPID & 0xff, unix.SYS_GETPPID >> 8, 0, 0, // is it getppid?
		0x06, 0, 0, 0, byte(unix.EDOM), 0, 5, 0, // SECCOMP_RET_ERRNO
		0x06, 0, 0, 0, 0, 0, 0xff, 0x7f, // SECCOMP_RET_ALLOW
	}
	var install Batch
	install.Add(unix.SYS_PRCTL, W(unix.PR_SET_NO_NEW_PRIVS), W(1))
	install.Add(unix.SYS_SECCOMP, W(unix.SECCOMP_SET_MODE_FILTER), W(0), install.PutPointer([]byte{4, 0, 0, 0, 0, 0, 0, 0}, install.Put(program)))
	if _, err := s.Run(&install); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options uintptr
		want    error
	}{{StubOptions, nil}, {FilteredOptions, unix.EDOM}, {StubOptions, nil}} {
		if err := s.SetOptions(c.options); err != nil {
			t.Fatal(err)
		}
		var b Batch
		b.Add(unix.SYS_GETPPID)
		if _, err := s.Run(&b); !errors.Is(err, c.want) {
			t.Errorf("with options %#x: %v, want %v", c.options, err, c.want)
		}
	}
}
