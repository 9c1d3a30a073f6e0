package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// envMixture and envMixtures choose the mixtures of TestMixture: the first seed, and how
// many.
const (
	envMixture  = "OCICKPT_TEST_MIXTURE"
	envMixtures = "OCICKPT_TEST_MIXTURES"
)

// TestMixture opens a random mix of files of every kind, shared across a random
// forest, and compares before and after, from outside, all that /proc shows of
// every descriptor and which of them are the same open file (kcmp). From inside
// the program looks whether each does what it is for. A seed that fails is named.
func TestMixture(t *testing.T) {
	seed, seeds := number(envMixture, uint64(os.Getpid())), number(envMixtures, 2)
	for n := range seeds {
		t.Run(fmt.Sprintf("seed %d", seed+n), func(t *testing.T) {
			c := newContainer(t, withReport("mixture"), withArgs("/bin/mixture", fmt.Sprint(seed+n))).run()
			c.progress(3)
			for range 2 {
				c.runc("pause", c.id)
				before := c.descriptors()
				c.checkpoint()
				c.mustBeGone()
				c.restore("--leave-frozen")
				compare(t, before, c.descriptors())
				c.runc("resume", c.id)
				c.progress(3)
			}
			c.checkpoint("--leave-running")
			c.progress(3)
		})
	}
}

func number(env string, otherwise uint64) uint64 {
	if n, err := strconv.ParseUint(os.Getenv(env), 10, 64); err == nil {
		return n
	}
	return otherwise
}

// descriptors describes every descriptor of a paused container by its process and
// number.
func (c *container) descriptors() map[string]string {
	c.t.Helper()
	found := map[string]string{}
	var first []descriptor // of each open file
	for _, d := range c.allDescriptors() {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", d.pid, d.fd))
		c.must(err)
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", d.pid, d.fd))
		c.must(err)
		i := slices.IndexFunc(first, func(o descriptor) bool { return o.same(d) })
		if i < 0 {
			i, first = len(first), append(first, d)
		}
		found[d.name] = fmt.Sprintf("same as %s, %s\n%s", first[i].name, inodes.ReplaceAllString(link, ":[]"), lasting(string(info)))
	}
	return found
}

type descriptor struct {
	name    string
	pid, fd int
}

// same asks kcmp(2) whether two descriptors are one open file.
func (d descriptor) same(o descriptor) bool {
	const kcmpFile = 0
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(d.pid), uintptr(o.pid), kcmpFile, uintptr(d.fd), uintptr(o.fd), 0)
	return errno == 0 && r == 0
}

func (c *container) allDescriptors() (all []descriptor) {
	for _, pid := range c.pids() {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		c.must(err)
		_, rest, _ := strings.Cut(string(status), "NSpid:")
		ids := strings.Fields(strings.SplitN(rest, "\n", 2)[0])
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		c.must(err)
		for _, e := range entries {
			fd, err := strconv.Atoi(e.Name())
			c.must(err)
			all = append(all, descriptor{fmt.Sprintf("%4s:%03d", ids[len(ids)-1], fd), pid, fd})
		}
	}
	slices.SortFunc(all, func(a, b descriptor) int { return strings.Compare(a.name, b.name) })
	return all
}

// pids are the host pids of the container's processes.
func (c *container) pids() (pids []int) {
	for _, word := range strings.FieldsFunc(strings.Trim(c.runc("ps", "--format", "json", c.id), "[]\n"), func(r rune) bool { return r == ',' }) {
		pid, err := strconv.Atoi(word)
		c.must(err)
		pids = append(pids, pid)
	}
	return pids
}

// inodes are numbers that are new after a restore, in links of /proc/PID/fd.
var inodes = regexp.MustCompile(`:\[\d+\]|/#\d+`)

// passing are the lines, and parts of lines, of an fdinfo that are new after a
// restore: inode and mount numbers, ids that the kernel gives out, times left.
var passing = regexp.MustCompile(`(?m)^(mnt_id|ino|eventfd-id|it_value|scm_fds|Pid|NSpid):.*\n| ?\b(ino|sdev|ignored_mask|fhandle-bytes|fhandle-type|f_handle):\S+`)

var flagsLine = regexp.MustCompile(`(?m)^flags:\s*\d+$`)

func lasting(info string) string {
	// O_LARGEFILE, which 64-bit programs do not know, is missing where the kernel
	// itself has opened a file: queues, slaves of terminals.
	info = flagsLine.ReplaceAllStringFunc(info, func(line string) string {
		flags, _ := strconv.ParseUint(strings.Fields(line)[1], 8, 64)
		return fmt.Sprintf("flags: %#o", flags&^0o100000)
	})
	lines := strings.Split(passing.ReplaceAllString(info, ""), "\n")
	slices.Sort(lines) // an epoll's entries have no order
	return strings.Join(lines, "\n")
}

func compare(t *testing.T, before, after map[string]string) {
	t.Helper()
	names := maps.Clone(before)
	maps.Copy(names, after)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if before[name] != after[name] {
			t.Errorf("descriptor %s was\n%s\nand is\n%s", name, before[name], after[name])
		}
	}
	if len(before) < 4 {
		t.Errorf("only %d descriptors were found", len(before))
	}
}

// TestListFiles lists every descriptor of a mixture from its image.
func TestListFiles(t *testing.T) {
	c := newContainer(t, withReport("mixture"), withArgs("/bin/mixture", "7")).run()
	c.progress(1)
	c.runc("pause", c.id)
	all := c.allDescriptors()
	c.checkpoint("--leave-running")
	r := c.ocickpt("inspect", "--files", filepath.Join(c.image(), "checkpoint.img"))
	for _, d := range all {
		pid, fd, _ := strings.Cut(strings.TrimSpace(d.name), ":")
		n, _ := strconv.Atoi(fd)
		line := regexp.MustCompile(fmt.Sprintf(`(?m)^([0-9]+,)*%s(,[0-9]+)* mixture +%d +\S`, pid, n))
		if !line.MatchString(r.stdout) {
			t.Errorf("descriptor %s is not in the list:\n%s", d.name, r.stdout)
		}
	}
	if strings.Count(r.stdout, "\n") < 10 || r.code != 0 {
		t.Errorf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
