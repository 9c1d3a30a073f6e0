// Package mm holds address spaces: their areas, the pages in them and shared
// memory, in both directions.
package mm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// mapping is one entry of /proc/PID/smaps (proc_pid_smaps(5)).
type mapping struct {
	start, end, offset uint64
	perms              string // "rw-p"
	dev                string // "08:01"
	inode              uint64
	name               string   // as shown, escapes undone
	flags              []string // VmFlags
	pageSize           uint64   // bytes
	key                uint64   // protection key
}

func (m *mapping) has(flag string) bool { return slices.Contains(m.flags, flag) }
func (m *mapping) shared() bool         { return m.perms[3] == 's' }
func (m *mapping) deleted() bool        { return strings.HasSuffix(m.name, deletedSuffix) }

// deletedSuffix is how the kernel marks the path of a file with no name left.
const deletedSuffix = " (deleted)"

// Mappings are the mappings of a process.
type Mappings struct {
	all []mapping
	err error
}

// ReadMappings reads them, or finds out why not, for Scan.
func ReadMappings(pid int) *Mappings {
	all, err := readMappings(pid)
	return &Mappings{all, err}
}

// readMappings reads a process's mappings with their flags.
func readMappings(pid int) ([]mapping, error) { return readMaps(pid, "smaps") }

// readMaps reads one of the two lists; "maps" is quick and has no flags.
func readMaps(pid int, list string) ([]mapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, list))
	if err != nil {
		return nil, gone(pid, err)
	}
	defer f.Close()
	out, err := parseMappings(f)
	return out, gone(pid, err)
}

func gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("task %d: %w", pid, tracee.ErrGone)
	}
	return err
}

func parseMappings(r io.Reader) ([]mapping, error) {
	var out []mapping
	known := map[string][]string{} // flags: of thousands of areas, few differ
	scan := bufio.NewScanner(r)
	scan.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for scan.Scan() {
		line := scan.Bytes()
		if flags, ok := bytes.CutPrefix(line, []byte("VmFlags:")); ok && len(out) > 0 {
			if known[string(flags)] == nil {
				known[string(flags)] = strings.Fields(string(flags))
			}
			out[len(out)-1].flags = known[string(flags)]
			continue
		}
		if len(out) > 0 && out[len(out)-1].attribute(line) {
			continue
		}
		if !mappingLine(line) {
			continue
		}
		m, err := parseMapping(string(line))
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, scan.Err()
}

// attribute reads what is wanted of the lines with numbers.
func (m *mapping) attribute(line []byte) bool {
	if rest, ok := bytes.CutPrefix(line, []byte("KernelPageSize:")); ok {
		kib, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(string(rest)), " kB"), 10, 54)
		m.pageSize = kib << 10
		return true
	}
	if rest, ok := bytes.CutPrefix(line, []byte("ProtectionKey:")); ok {
		m.key, _ = strconv.ParseUint(strings.TrimSpace(string(rest)), 10, 64)
		return true
	}
	return false
}

// mappingLine tells "7f00-7f01 r--p ..." from "Size: 4 kB".
func mappingLine(b []byte) bool {
	dash := bytes.IndexByte(b, '-')
	if dash < 1 {
		return false
	}
	for _, c := range b[:dash] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func parseMapping(line string) (m mapping, err error) {
	fields := strings.SplitN(line, " ", 6)
	if len(fields) < 5 || len(fields[1]) != 4 {
		return m, fmt.Errorf("strange line in smaps: %q", line)
	}
	start, end, _ := strings.Cut(fields[0], "-")
	number := func(s string, base int) uint64 {
		v, e := strconv.ParseUint(s, base, 64)
		err = errors.Join(err, e)
		return v
	}
	m = mapping{
		start: number(start, 16), end: number(end, 16), perms: fields[1],
		offset: number(fields[2], 16), dev: fields[3], inode: number(fields[4], 10),
	}
	if len(fields) == 6 {
		m.name = strings.ReplaceAll(strings.TrimLeft(fields[5], " "), `\012`, "\n")
	}
	return m, err
}
