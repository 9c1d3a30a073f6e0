package image

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		check(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	check(t, err)
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got)\n%s", path, d)
	}
}

func TestInspectText(t *testing.T) {
	s, err := Inspect(bytes.NewReader(sampleImage(t)))
	check(t, err)
	var b bytes.Buffer
	check(t, s.WriteText(&b))
	golden(t, "testdata/inspect.txt", b.Bytes())
}

func TestInspectFailed(t *testing.T) {
	var b, text bytes.Buffer
	w := NewWriter(&b)
	check(t, w.Record(TypeHeader, 0, sampleHeader()))
	check(t, w.Record(TypeArch, 0, sampleArch()))
	check(t, w.Record(TypeContainer, 0, sampleContainer()))
	check(t, w.Record(TypeTree, 0, sampleTree()))
	check(t, w.Fail(Error{Phase: "collect", Task: "pid 7", Object: "fd 3", Cause: "io_uring cannot be saved\x1b[2J", Remedy: "close it first"}))
	s, err := Inspect(bytes.NewReader(b.Bytes()))
	check(t, err)
	check(t, s.WriteText(&text))
	golden(t, "testdata/failed.txt", text.Bytes())
}

func TestInspectJSON(t *testing.T) {
	s, err := Inspect(bytes.NewReader(sampleImage(t)))
	check(t, err)
	var b bytes.Buffer
	check(t, s.WriteJSON(&b))
	if strings.ContainsFunc(b.String(), func(r rune) bool { return r != '\n' && (r < ' ' || r >= 0x7f && r < 0xa0) }) {
		t.Error("the JSON has control characters in it")
	}
	var back Summary
	check(t, json.Unmarshal(b.Bytes(), &back))
	if back.Processes[1].Comm != "wor\x1b[31mker" || back.Records != s.Records || back.Memory[0].Total != s.Memory[0].Total {
		t.Errorf("JSON lost something: %+v", back)
	}
}

// TestInspectDeepTree draws a chain of very many processes.
func TestInspectDeepTree(t *testing.T) {
	var s Summary
	for pid := int32(1); pid <= 20000; pid++ {
		s.Processes = append(s.Processes, ProcessSummary{Pid: pid, Ppid: pid - 1})
	}
	var b bytes.Buffer
	check(t, s.WriteText(&b))
	if n := b.Len(); n > 6<<20 {
		t.Errorf("20000 processes take %d bytes", n)
	}
}

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"plain name": "plain name", "größe": "größe", "a\x1bb": `"a\x1bb"`, "tab\t": `"tab\t"`,
		"\u202egpj": `"\u202egpj"`, "\u009b1m": `"\u009b1m"`, "\xff": `"\xff"`, "": "",
	} {
		if got := printable(s); got != want {
			t.Errorf("printable(%q) = %s, want %s", s, got, want)
		}
	}
}

func TestTargets(t *testing.T) {
	v6 := append([]byte{afInet6, 0, 0, 80, 0, 0, 0, 0}, make([]byte, 16)...)
	v6[23] = 1
	for want, s := range map[string]*Socket{
		"inet6 stream listening [::1]:80": {Family: afInet6, Type: 1, Listening: true, Address: v6},
		"unix dgram /run/x":               {Family: afUnix, Type: 2, Path: "/run/x"},
		"inet6 stream [::1]:80 to [::1]:80 state 4, 5 bytes to read, 0 to send": {Family: afInet6, Type: 1, Address: v6, TCP: &TCP{State: 4, Peer: v6, Receive: Stream{Bytes: 5}}},
		"netlink raw": {Family: afNetlink, Type: 3},
		"family 77":   {Family: 77},
	} {
		if got := socketTarget(s); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	for flags, want := range map[uint32]string{0: "r", 1: "w", 0o2002: "rw,append", 0o4010000 | 0o4000: "r,sync,nonblock", 0o10000: "r,dsync", 3: "ioctl"} {
		if got := openFlags(flags, false); got != want {
			t.Errorf("flags %#o: %q, want %q", flags, got, want)
		}
	}
	for status, want := range map[uint32]string{0: "exit status 0", 0x300: "exit status 3", 9: "killed by signal 9", 0x8b: "killed by signal 11"} {
		if got := waitStatus(status); got != want {
			t.Errorf("status %#x: %q, want %q", status, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 4 << 20: "4.0 MiB", 1 << 62: "4.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("%d bytes: %q, want %q", n, got, want)
		}
	}
}

func TestListFiles(t *testing.T) {
	s, err := Inspect(bytes.NewReader(sampleImage(t)))
	check(t, err)
	var text, b bytes.Buffer
	check(t, s.WriteFiles(&text))
	golden(t, "testdata/files.txt", text.Bytes())
	check(t, s.WriteFilesJSON(&b))
	var back []Listed
	check(t, json.Unmarshal(b.Bytes(), &back))
	if len(back) != strings.Count(text.String(), "\n")-1 || back[0].Kind != KindStdio || back[0].Tasks[0] != 1 {
		t.Errorf("as JSON the list is %+v", back)
	}
}

// TestDescribe lists a kind of file that nobody has found words for.
func TestDescribe(t *testing.T) {
	if got := describe(&File{Kind: "new", Pipe: 7, Eventfd: &Eventfd{Count: 5}}); got != `eventfd {"Count":5,"Semaphore":false}, #7` {
		t.Error(got)
	}
}
