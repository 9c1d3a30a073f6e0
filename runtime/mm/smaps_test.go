package mm

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const sampleMaps = `00400000-00402000 r-xp 00001000 08:01 1234                               /usr/bin/a b\012c
Size:                  8 kB
VmFlags: rd ex mr mw me sd
7f00-8000 rw-s 00000000 00:01 99 /memfd:x (deleted)
VmFlags: rd wr sh
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
7fff00000000-7fff00001000 rw-p 00000000 00:00 0 
VmFlags: rd wr gd ac
`

func TestParseMappings(t *testing.T) {
	got, err := parseMappings(strings.NewReader(sampleMaps))
	if err != nil || len(got) != 4 {
		t.Fatalf("%d mappings, %v", len(got), err)
	}
	a, b, anon := got[0], got[1], got[3]
	if a.start != 0x400000 || a.end != 0x402000 || a.offset != 0x1000 || a.dev != "08:01" || a.inode != 1234 || a.name != "/usr/bin/a b\nc" || a.shared() || a.deleted() || !a.has("ex") {
		t.Errorf("%+v", a)
	}
	if !b.shared() || !b.deleted() || b.has("ex") || anon.name != "" || !anon.has("gd") || got[2].flags != nil {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"0-1", "0-1 rw-p", "0-1 rwx 0 0 0", "0-g rw-p 0 0:0 0", "0-1 rw-p 0 0:0 x", "0-1 rw-p 0 0:0 "} {
		if m, err := parseMappings(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is %+v", bad, m)
		}
	}
}

func FuzzParseMappings(f *testing.F) {
	f.Add(sampleMaps)
	f.Add("0-1 rw-p 0 0:0 0 x\nVmFlags:")
	f.Fuzz(func(t *testing.T, s string) {
		maps, err := parseMappings(strings.NewReader(s))
		for i := range maps {
			if err == nil && len(maps[i].perms) != 4 {
				t.Fatalf("%+v", maps[i])
			}
			maps[i].shared()
			protection(maps[i].perms)
		}
	})
}

func TestProtection(t *testing.T) {
	for perms, want := range map[string]uint32{
		"---p": 0, "r--p": unix.PROT_READ, "rw-s": unix.PROT_READ | unix.PROT_WRITE, "--xp": unix.PROT_EXEC, "rwxp": 7,
	} {
		if got := protection(perms); got != want {
			t.Errorf("%s is %d, want %d", perms, got, want)
		}
	}
}

func TestReadMappings(t *testing.T) {
	b := mapped(t, 3, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	must(t, unix.Madvise(b, unix.MADV_DONTFORK))
	maps, err := readMappings(os.Getpid())
	must(t, err)
	at := addressOf(b)
	i := slices.IndexFunc(maps, func(m mapping) bool { return m.start == at })
	if i < 0 || maps[i].end != at+3*PageSize || maps[i].perms != "rw-p" || !maps[i].has("dc") || !maps[i].has("nr") || maps[i].has("ac") {
		t.Errorf("mapping %d of %+v", i, maps)
	}
	if !slices.IsSortedFunc(maps, func(a, b mapping) int { return int(int64(a.start>>12) - int64(b.start>>12)) }) {
		t.Error("not in order")
	}
}
