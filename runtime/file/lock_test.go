package file

import (
	"math"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

func TestParseLock(t *testing.T) {
	for line, want := range map[string]image.Lock{
		"POSIX ADVISORY WRITE 123 08:01:4711 10 19": {Kind: image.LockPosix, Write: true, Start: 10, End: 19},
		"OFDLCK ADVISORY READ -1 08:01:4711 5 EOF":  {Kind: image.LockOFD, Start: 5, End: math.MaxInt64},
		"FLOCK ADVISORY WRITE 123 08:01:4711 0 EOF": {Kind: image.LockFlock, Write: true, End: math.MaxInt64},
		"LEASE ACTIVE READ 123 08:01:4711 0 EOF":    {Kind: image.LockLease, End: math.MaxInt64},
	} {
		if got, err := parseLock(line); err != nil || got != want {
			t.Errorf("%s: %+v, %v", line, got, err)
		}
	}
	for line, why := range map[string]string{
		"LEASE BREAKING WRITE 123 08:01:4711 0 EOF": "being broken",
		"DELEG ACTIVE READ 123 08:01:4711 0 EOF":    "of this kind",
	} {
		_, err := parseLock(line)
		refusal(t, err, why)
	}
}

// A lock outlives its last descriptor where the file stays mapped. Nothing shows
// then where it belongs.
func TestLockOfMappedFile(t *testing.T) {
	fd, err := unix.Open(filepath.Join(t.TempDir(), "f"), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	must(t, err)
	must(t, unix.Ftruncate(fd, 4096))
	must(t, unix.Flock(fd, unix.LOCK_EX))
	s := world(t)
	one := looked(t, self(), fd)
	s.tables = []*Table{{proc: self(), record: &image.Files{}, entries: []entry{{seen: one, desc: &Description{}}}}}
	must(t, s.readLocks())
	if locks := s.tables[0].record.Locks; len(locks) != 1 || locks[0].Kind != image.LockFlock || int(locks[0].FD) != fd {
		t.Errorf("locks %+v", locks)
	}
	must(t, s.CheckLocks())
	mapping, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	must(t, unix.Close(fd))
	s.tables[0].entries = nil
	refusal(t, s.CheckLocks(), "only mapped")
	must(t, unix.Munmap(mapping))
	must(t, s.CheckLocks())
}
