package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// alone holds off other tests of the same kind, which run in other processes,
// until this one is over: they change what the host has only once.
func alone(t *testing.T, kind string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(fixtures, kind+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		t.Cleanup(func() { f.Close() })
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestHugePages takes huge pages through a journey. It sets some aside on the
// host for as long as it takes, and makes sure that all are given back.
func TestHugePages(t *testing.T) {
	const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
	alone(t, "hugepages")
	read := func(name string) int {
		t.Helper()
		text, err := os.ReadFile(pool + name)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	set := func(n int) {
		t.Helper()
		if err := os.WriteFile(pool+"nr_hugepages", []byte(strconv.Itoa(n)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before := read("nr_hugepages")
	free := read("free_hugepages")
	set(before + 10)
	t.Cleanup(func() { set(before) })
	if n := read("nr_hugepages"); n != before+10 {
		t.Fatalf("the host gives %d huge pages of 2 MiB, %d are needed", n, before+10)
	}
	t.Run("journey", program{name: "hugepages", options: []option{withArgs("/bin/hugepages"), withCapabilities("CAP_IPC_LOCK")}}.journey)
	if n := read("free_hugepages"); n != free+10 {
		t.Errorf("%d huge pages are free, %d were", n, free+10)
	}
}

// TestHugePagesMissing restores where no huge pages are left: the refusal says so.
func TestHugePagesMissing(t *testing.T) {
	const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
	alone(t, "hugepages")
	before, err := os.ReadFile(pool)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(pool, []byte("10"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(pool, before, 0o644) })
	c := newContainer(t, withReport("hugepages"), withArgs("/bin/hugepages"), withCapabilities("CAP_IPC_LOCK")).run()
	c.progress(3)
	c.checkpoint()
	c.mustBeGone()
	c.must(os.WriteFile(pool, []byte("0"), 0o644))
	c.tryRestoreFile(c.image()+"/checkpoint.img", c.bundle).mustRefuse(t, "huge pages of 2048 KiB", "vm.nr_hugepages")
	c.must(os.WriteFile(pool, []byte("10"), 0o644))
	c.restore()
	c.progress(3)
}
