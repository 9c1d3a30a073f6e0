package sock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/bpf"
)

func inodeOf(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Fstat(fd(f), &st))
	return st.Ino
}

// change gives an option another value, if it can: it returns the one it had.
func change(f *os.File, o option) (was []byte, changed bool) {
	read := func() []byte {
		value, _ := get(fd(f), o.level, o.name, make([]byte, o.size))
		return slices.Clone(value)
	}
	was = read()
	for _, to := range []uint64{1, 0, 2, 3, 5, 8, 64, 100, 1000, 5000, 100_000, 1<<32 | 1} {
		value := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, to), 0)[:min(o.size, 16)]
		if o.name == unix.TCP_CONGESTION && o.level == unix.SOL_TCP {
			value = []byte("reno")
		}
		if unix.SetsockoptString(fd(f), o.level, o.name, string(value)) == nil && !bytes.Equal(was, read()) {
			return was, true
		}
	}
	return was, false
}

// TestAlike changes every option of one of two connections that are alike: they must
// not be alike then, or the other one's would be taken for its own.
func TestAlike(t *testing.T) {
	q, err := bpf.NewTCPSockets()
	if errors.Is(err, bpf.ErrOff) {
		return
	}
	must(t, err)
	defer q.Close()
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		inNewNetwork(t, func(netns string) {
			alike := func() (all map[uint64]int) {
				must(t, nsutil.Inside(netns, func() (err error) { all, err = q.Alike(); return err }))
				return all
			}
			_, a := tcpPair(t, domain)
			_, b := tcpPair(t, domain)
			one, other := inodeOf(t, a), inodeOf(t, b)
			if all := alike(); all[one] != all[other] || len(all) < 4 {
				t.Fatalf("two new connections are not alike: %v, %d and %d", all, one, other)
			}
			seen := 0
			for _, o := range slices.Concat(generic, tcp.options, final, odd) {
				if slices.Contains(before, [2]int{o.level, o.name}) || slices.Contains(single, o) {
					continue
				}
				was, changed := change(a, o)
				if !changed {
					t.Logf("option %d/%d cannot be changed from %x", o.level, o.name, was)
					continue
				}
				seen++
				buffers := o.level == unix.SOL_SOCKET && (o.name == unix.SO_SNDBUF || o.name == unix.SO_RCVBUF)
				if all := alike(); all[one] == all[other] && !buffers {
					t.Errorf("option %d/%d is another, and they are still alike", o.level, o.name)
				}
				_ = unix.SetsockoptString(fd(a), o.level, o.name, string(was))
			}
			if seen < 45 {
				t.Errorf("only %d options were changed", seen)
			}
		})
	}
}

// TestReadAlike reads connections that are alike, and finds what each is.
func TestReadAlike(t *testing.T) {
	q, err := bpf.NewTCPSockets()
	if errors.Is(err, bpf.ErrOff) {
		return
	}
	must(t, err)
	defer q.Close()
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		inNewNetwork(t, func(netns string) {
			quick := &Inside{NetNS: netns, met: worthLooking, Choices: Choices{Established: true, Warn: t.Logf}}
			quick.Alike = func(string) (all map[uint64]int, err error) {
				err = nsutil.Inside(netns, func() error { all, err = q.Alike(); return err })
				return all, err
			}
			slow := &Inside{NetNS: netns, Choices: Choices{Established: true, Warn: t.Logf}}
			like := 0
			var all []*os.File
			for i := range 6 {
				_, f := tcpPair(t, domain)
				all = append(all, f)
				if i%2 == 1 {
					must(t, setInt(fd(f), unix.SOL_TCP, unix.TCP_KEEPIDLE, 77))
				}
				if i%3 == 2 {
					must(t, setInt(fd(f), unix.SOL_IPV6*(domain/unix.AF_INET6), map[int]int{unix.AF_INET: unix.IP_TTL, unix.AF_INET6: unix.IPV6_UNICAST_HOPS}[domain], 7))
				}
			}
			for _, f := range all {
				ino := inodeOf(t, f)
				if quick.Like(ino) {
					like++
				}
				got, err := Read(quick, fd(f), ino)
				must(t, err)
				want, err := Read(slow, fd(f), ino)
				must(t, err)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("(-by itself +by its likes)\n%s", diff)
				}
			}
			if like == 0 {
				t.Error("none is like another one")
			}
		})
	}
}
