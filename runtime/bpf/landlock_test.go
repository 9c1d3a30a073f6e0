package bpf

import (
	"os"
	"testing"
)

// A thread in a domain is found, and none of ours besides.
func TestLandlock(t *testing.T) {
	if !HasLandlock() {
		t.Fatal("this kernel has no Landlock")
	}
	q, err := NewLandlock()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	ask := func() map[int]bool {
		tids, err := q.Threads()
		if err != nil {
			t.Fatal(err)
		}
		return tids
	}
	if tids := ask(); tids[os.Getpid()] {
		t.Errorf("we are not confined, but among %v", tids)
	}
	err = whileConfined(func(tid int) error {
		if tids := ask(); !tids[tid] || tids[os.Getpid()] {
			t.Errorf("%d is confined, the answer is %v", tid, tids)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func BenchmarkLandlock(b *testing.B) {
	for b.Loop() {
		q, err := NewLandlock()
		if err != nil {
			b.Fatal(err)
		}
		_ = q.Close()
	}
}
