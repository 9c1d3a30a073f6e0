package task

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

func TestIDMaps(t *testing.T) {
	m := []image.IDMap{{Container: 0, Host: 100000, Size: 10}, {Container: 1000, Host: 5, Size: 1}, {Container: 20, Host: 0xfffffff0, Size: 15}}
	for host, want := range map[uint32]uint32{
		100000: 0, 100009: 9, 100010: overflowID, 99999: overflowID, 5: 1000, 6: overflowID, 0xfffffff0: 20, 0xfffffffe: 34, 0: overflowID,
	} {
		if got := toContainer(m, host); got != want {
			t.Errorf("host id %d is %d, want %d", host, got, want)
		}
	}
	if toContainer(nil, 1234) != 1234 {
		t.Error("without a map ids are their own")
	}
	c := Credentials(&Status{UID: [4]uint32{100001, 100002, 5, 5}, GID: [4]uint32{7, 7, 7, 7}, Groups: []uint32{100003, 1}},
		IDMaps{UID: m, GID: []image.IDMap{{Container: 3, Host: 1, Size: 10}}})
	want := image.Credentials{UID: [4]uint32{1, 2, 1000, 1000}, GID: [4]uint32{9, 9, 9, 9}, Groups: []uint32{overflowID, 3}}
	if d := cmp.Diff(want, c); d != "" {
		t.Error(d)
	}
}

// place is where the first call stands that fits, -1 for none.
func place(b *tracee.Batch, nr uintptr, args ...tracee.Word) int {
next:
	for i, c := range b.Calls {
		if c.Nr != nr {
			continue
		}
		for j, a := range args {
			if c.Args[j] != a {
				continue next
			}
		}
		return i
	}
	return -1
}

func TestCredentialsOrder(t *testing.T) {
	const full, kept = 0x1ff, 1 << unix.CAP_SETUID
	c := &image.Credentials{UID: [4]uint32{1, 2, 3, 4}, GID: [4]uint32{5, 6, 7, 8}, Groups: []uint32{9}, Bounding: kept, Ambient: 1, Securebits: 0x2f, NoNewPrivs: true}
	var b tracee.Batch
	restoreCredentials(&b, c, Held{Capabilities: full})
	order := []int{
		place(&b, unix.SYS_PRCTL, tracee.W(unix.PR_SET_SECUREBITS), tracee.W(noSetuidFixup)),
		place(&b, unix.SYS_CAPSET),
		place(&b, unix.SYS_PRCTL, tracee.W(unix.PR_CAPBSET_DROP), tracee.W(0)),
		place(&b, unix.SYS_SETGROUPS, tracee.W(1)),
		place(&b, unix.SYS_SETRESGID, tracee.W(5), tracee.W(6), tracee.W(7)),
		place(&b, unix.SYS_SETFSGID, tracee.W(8)),
		place(&b, unix.SYS_SETRESUID, tracee.W(1), tracee.W(2), tracee.W(3)),
		place(&b, unix.SYS_SETFSUID, tracee.W(4)),
		place(&b, unix.SYS_PRCTL, tracee.W(unix.PR_CAP_AMBIENT), tracee.W(unix.PR_CAP_AMBIENT_RAISE), tracee.W(0)),
		place(&b, unix.SYS_PRCTL, tracee.W(unix.PR_SET_SECUREBITS), tracee.W(0x2f)),
		len(b.Calls) - 2, // the capabilities themselves
		place(&b, unix.SYS_PRCTL, tracee.W(unix.PR_SET_NO_NEW_PRIVS), tracee.W(1)),
	}
	for i := 1; i < len(order); i++ {
		if order[i-1] < 0 || order[i] <= order[i-1] {
			t.Fatalf("calls stand at %v, which is not their order", order)
		}
	}
	if b.Calls[len(b.Calls)-2].Nr != unix.SYS_CAPSET || order[len(order)-1] != len(b.Calls)-1 {
		t.Error("the capabilities are not last but for no_new_privs")
	}
	for i := range lastCap + 1 {
		dropped := place(&b, unix.SYS_PRCTL, tracee.W(unix.PR_CAPBSET_DROP), tracee.W(i)) >= 0
		if want := full&(1<<i) != 0 && kept&(1<<i) == 0; dropped != want {
			t.Errorf("capability %d dropped from the bounding set: %v, want %v", i, dropped, want)
		}
	}
}

// TestCredentials gives real tasks credentials and reads them back.
func TestCredentials(t *testing.T) {
	const few = 1<<unix.CAP_CHOWN | 1<<unix.CAP_SETUID | 1<<unix.CAP_NET_BIND_SERVICE
	full, err := Capabilities(unix.Getpid())
	check(t, err)
	for name, want := range map[string]image.Credentials{
		"root":          {Permitted: full, Effective: full, Bounding: full},
		"bounded root":  {Permitted: few, Effective: few, Bounding: few, Groups: []uint32{1, 2, 4294967294}},
		"user":          {UID: [4]uint32{1000, 1000, 1000, 1000}, GID: [4]uint32{100, 100, 100, 100}, Bounding: few, NoNewPrivs: true},
		"set-uid":       {UID: [4]uint32{1000, 0, 33, 0}, GID: [4]uint32{1, 2, 3, 2}, Permitted: few, Effective: few, Bounding: full},
		"file system":   {UID: [4]uint32{0, 0, 0, 33}, GID: [4]uint32{0, 0, 0, 34}, Permitted: full, Effective: few, Bounding: full},
		"ambient":       {UID: [4]uint32{5, 5, 5, 5}, Inheritable: few, Permitted: few, Effective: 1, Bounding: full, Ambient: 1},
		"inheritable":   {UID: [4]uint32{5, 5, 5, 5}, Inheritable: few, Bounding: 1},
		"locked secure": {Permitted: few, Effective: few, Bounding: few, Securebits: 0x2f},
	} {
		t.Run(name, func(t *testing.T) {
			s := traceetest.Stub(t, traceetest.ServiceAt)
			var b tracee.Batch
			restoreCredentials(&b, &want, Held{Capabilities: full})
			secure := b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_SECUREBITS))
			if _, err := s.Run(&b); err != nil {
				t.Fatal(err)
			}
			status, err := ReadStatus(s.Pid)
			check(t, err)
			got := Credentials(status, IDMaps{})
			got.Securebits = uint32(b.Calls[secure].Ret)
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}
