package bpf

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestQueues fills a queue of its own with messages of many priorities, some of
// several pages, and reads them without taking any out.
func TestQueues(t *testing.T) {
	lock(t)
	q, err := NewQueues()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	const size, count = 8192, 10 // fs.mqueue.msgsize_max and msg_max as they come
	fd := openQueue(t, size, count)
	var want []QueueMessage
	for i := range count {
		m := QueueMessage{Priority: rand.Uint32N(4) * 10922, Text: bytes.Repeat([]byte{byte('a' + i)}, rand.IntN(size+1))}
		if i < 3 {
			m.Text = m.Text[:0]
			for range []int{0, 4048, size}[i] { // nothing, exactly a page, as long as may be
				m.Text = append(m.Text, byte(rand.Uint32()))
			}
		}
		text := append(slices.Clone(m.Text), 0)
		if _, _, errno := unix.Syscall6(unix.SYS_MQ_TIMEDSEND, uintptr(fd), uintptr(unsafe.Pointer(&text[0])), uintptr(len(m.Text)), uintptr(m.Priority), 0, 0); errno != 0 {
			t.Fatal(errno)
		}
		want = append(want, m)
	}
	slices.SortStableFunc(want, func(a, b QueueMessage) int { return cmp.Compare(b.Priority, a.Priority) })
	event := struct {
		value          uint64
		signal, method int32
		_              [48]byte
	}{value: 1 << 40, signal: int32(unix.SIGURG)}
	if _, _, errno := unix.Syscall(unix.SYS_MQ_NOTIFY, uintptr(fd), uintptr(unsafe.Pointer(&event)), 0); errno != 0 {
		t.Fatal(errno)
	}
	got, err := q.Read(fd, true)
	if err != nil {
		t.Fatal(err)
	}
	if got.Owner != os.Getpid() || got.Signal != event.signal || got.Method != 0 || got.Value != event.value || got.Creator != uint32(os.Getuid()) {
		t.Errorf("who is to be told: %+v", got)
	}
	if !slices.EqualFunc(got.Messages, want, func(a, b QueueMessage) bool { return a.Priority == b.Priority && bytes.Equal(a.Text, b.Text) }) {
		t.Errorf("%d messages are not those that were sent", len(got.Messages))
	}
}

// openQueue makes a queue that goes with its descriptor.
func openQueue(t *testing.T, size, count int64) int {
	t.Helper()
	name := append(fmt.Appendf(nil, "ocickpt-test-%d", os.Getpid()), 0)
	attr := [8]int64{1: count, 2: size}
	fd, _, errno := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(&name[0])), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NONBLOCK, 0o600, uintptr(unsafe.Pointer(&attr)), 0, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
	t.Cleanup(func() { _ = unix.Close(int(fd)) })
	if _, _, errno := unix.Syscall(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(&name[0])), 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	return int(fd)
}
