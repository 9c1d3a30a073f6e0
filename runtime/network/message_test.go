package network

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAttributes(t *testing.T) {
	b := put(nil, text(1, "abc"), number(2, 7), nested(3, number(4, 5)))
	list, err := attrs(b)
	must(t, err)
	if len(list) != 3 || unix.ByteSliceToString(list[0].data) != "abc" || list[1].u32() != 7 || find(list, 3) == nil {
		t.Errorf("%v", list)
	}
	inner, err := attrs(find(list, 3).data)
	must(t, err)
	if find(inner, 4).u32() != 5 {
		t.Errorf("%v", inner)
	}
	if again := put(nil, list...); !bytes.Equal(again, b) {
		t.Errorf("%x became %x", b, again)
	}
	for _, bad := range [][]byte{{3, 0, 1, 0}, {9, 0, 1, 0, 1, 2, 3, 4}, {0, 0, 0, 0}} {
		if _, err := attrs(bad); !errors.Is(err, errTruncated) {
			t.Errorf("%x: %v", bad, err)
		}
	}
}

func TestAnswer(t *testing.T) {
	reply := func(errno int32, flags uint16, rest ...byte) []byte {
		b := make([]byte, unix.NLMSG_HDRLEN+4+unix.NLMSG_HDRLEN)
		ne.PutUint16(b[4:], unix.NLMSG_ERROR)
		ne.PutUint16(b[6:], flags)
		ne.PutUint32(b[unix.NLMSG_HDRLEN:], uint32(-errno))
		return append(b, rest...)
	}
	must(t, answer(reply(0, 0)))
	err := answer(reply(int32(unix.EPERM), unix.NLM_F_ACK_TLVS, put(nil, text(unix.NLMSGERR_ATTR_MSG, "no"))...))
	if !errors.Is(err, unix.EPERM) || err.Error() != "operation not permitted (no)" {
		t.Errorf("%v", err)
	}
	if err := answer(reply(1, 0)[:10]); !errors.Is(err, errTruncated) {
		t.Errorf("%v", err)
	}
}

// TestTables reads what tools have made, and finds nothing to do about it.
func TestTables(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test must run as root")
	}
	must(t, nsutil.Inside("", func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		const script = `ip link set lo up; ip addr add 10.0.0.1/24 dev lo; ip addr add fd00::1/64 dev lo valid_lft 500 preferred_lft 400
			ip route add 10.9.0.0/24 via 10.0.0.7 expires 100 2>/dev/null; ip route add 10.9.0.0/24 via 10.0.0.7; ip route append 10.9.0.0/24 via 10.0.0.8`
		if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		all := func(index int32) (int32, bool) { return index, true }
		for _, one := range tablesOf(&image.Network{}) {
			list, err := one.table.read(all)
			if err != nil {
				return err
			}
			if ops, _ := one.table.difference(list, list); len(ops) != 0 {
				t.Errorf("%s: %d things to do", one.table.name, len(ops))
			}
			for _, m := range list {
				again, err := one.table.entry(m, all)
				if err != nil || !bytes.Equal(again, m) {
					t.Errorf("%s: %x became %x, %v", one.table.name, m, again, err)
				}
			}
			if one.table != &routes {
				continue
			}
			turned := slices.Clone(list)
			slices.Reverse(turned)
			if ops, _ := routes.disorder(turned, list); len(ops) != 4 {
				t.Errorf("two routes in the wrong order take %d steps", len(ops))
			}
			nobody, err := routes.read(func(int32) (int32, bool) { return 0, false })
			if err != nil || len(nobody) != 0 {
				t.Errorf("%d routes of other devices, %v", len(nobody), err)
			}
		}
		return nil
	}))
}

// FuzzMessages takes apart what an image may hold.
func FuzzMessages(f *testing.F) {
	f.Add(put(make([]byte, unix.SizeofRtMsg), number(unix.RTA_OIF, 1), attr{unix.RTA_MULTIPATH, make([]byte, 9)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, one := range tablesOf(&image.Network{}) {
			m, err := one.table.entry(b, func(i int32) (int32, bool) { return i, true })
			if err == nil && m != nil {
				one.table.same(m)
				describe(one.table, m)
			}
		}
		_, _ = parseDevice(b)
		_ = answer(b)
		if len(b) >= nfgenmsg {
			tableKey(image.Netfilter{Message: b})
		}
	})
}
