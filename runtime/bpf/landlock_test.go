package bpf

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// keepFacts keeps them where nothing is kept yet.
func keepFacts(t testing.TB) {
	was := factsDir
	t.Cleanup(func() { factsDir = was })
	factsDir = filepath.Join(t.TempDir(), "facts")
}

// A thread in a domain is found, and none of ours besides, by a question that is
// learned and by one that is remembered.
func TestLandlock(t *testing.T) {
	if !HasLandlock() {
		t.Fatal("this kernel has no Landlock")
	}
	keepFacts(t)
	if q, err := remembered(); err == nil {
		t.Error("remembered what was not kept")
		_ = q.Close()
	}
	q, err := NewLandlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("learned", func(t *testing.T) { testLandlock(t, q) })
	if q, err = remembered(); err != nil {
		t.Fatal(err)
	}
	t.Run("remembered", func(t *testing.T) { testLandlock(t, q) })
}

// Facts that are damaged or wrong, of another boot or others' are not relied on.
func TestLandlockForgets(t *testing.T) {
	keepFacts(t)
	q, err := NewLandlock()
	if err != nil {
		t.Fatal(err)
	}
	facts := q.facts
	_ = q.Close()
	keep := func(change func(f *landlockFacts)) func() error {
		return func() error {
			f, err := readFacts()
			if err != nil {
				return err
			}
			change(&f)
			text, err := json.Marshal(f)
			if err != nil {
				return err
			}
			return os.WriteFile(factsFile(), text, 0o600)
		}
	}
	for name, spoil := range map[string]func() error{
		"another boot":    keep(func(f *landlockFacts) { f.Boot = "another" }),
		"no pointer":      keep(func(f *landlockFacts) { f.Security = 0 }), // where cred counts its users
		"a far place":     keep(func(f *landlockFacts) { f.Place = 8 * words }),
		"another member":  keep(func(f *landlockFacts) { f.Cred += 4 }),
		"a far member":    keep(func(f *landlockFacts) { f.Cred = 1 << 20 }),
		"others' file":    func() error { return os.Chmod(factsFile(), 0o644) },
		"others' folder":  func() error { return os.Chmod(factsDir, 0o755) },
		"nothing in it":   func() error { return os.Truncate(factsFile(), 0) },
		"half of it":      func() error { return os.Truncate(factsFile(), 20) },
		"another program": keep(func(f *landlockFacts) { f.Iter++ }),
	} {
		if err := errors.Join(os.RemoveAll(factsDir), facts.save(), spoil()); err != nil {
			t.Fatal(err)
		}
		if q, err := remembered(); err == nil {
			t.Errorf("%s: relied on", name)
			_ = q.Close()
		}
		if q, err := NewLandlock(); err != nil {
			t.Errorf("%s: %v", name, err)
		} else {
			_ = q.Close()
		}
	}
}

func testLandlock(t *testing.T, q *Landlock) {
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
	err := whileConfined(func(tid int) error {
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
	keepFacts(b)
	for b.Loop() {
		q, err := NewLandlock()
		if err != nil {
			b.Fatal(err)
		}
		_ = q.Close()
	}
}
