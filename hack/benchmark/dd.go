package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ddTook matches the time in dd's last line: "1073741824 bytes (1.1 GB, 1.0 GiB)
// copied, 0.481 s, 2.2 GB/s".
var ddTook = regexp.MustCompile(`copied, ([0-9.e-]+) s,`)

// ddRate is what dd writes to a new file in dir, in bytes a second, by its own
// watch. It does not sync, and neither do the phases it is compared with: an
// image is synced when nobody waits for it any more.
func ddRate(dir string, mib int) (float64, error) {
	if err := warmUp(dir, mib); err != nil {
		return 0, err
	}
	return dd(dir, mib)
}

func dd(dir string, mib int) (float64, error) {
	target := filepath.Join(dir, "dd")
	defer os.Remove(target)
	cmd := exec.Command("dd", "if=/dev/zero", "of="+target, "bs=1M", "count="+strconv.Itoa(mib))
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("dd: %w: %s", err, bytes.TrimSpace(out))
	}
	m := ddTook.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("dd does not say how long it took: %s", bytes.TrimSpace(out))
	}
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	return float64(mib) * (1 << 20) / seconds, err
}

// reporting is how long it takes until pages freed before are the hypervisor's
// again: two seconds, and the work itself (mm/page_reporting.c).
const reporting = 4 * time.Second

// warmUp makes the same start for whatever is measured next: nothing dirty in the
// page cache, no pages on their way to the hypervisor, and free memory that has
// just been used, by a dd whose file is removed. In a virtual machine the first
// touch of a page is the hypervisor's work, ten times slower than the copying.
func warmUp(dir string, mib int) error {
	unix.Sync()
	if mib > 0 {
		time.Sleep(reporting)
	}
	_, err := dd(dir, mib+mib/4+64)
	return err
}
