package bpf

import (
	"encoding/json"
	"errors"
	"maps"
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
	if k := remembered(); len(k.known) > 0 {
		t.Errorf("remembered what was not kept: %v", k.known)
	}
	for _, how := range []string{"learned", "remembered"} {
		q, err := NewLandlock()
		if err != nil {
			t.Fatal(err)
		}
		t.Run(how, func(t *testing.T) { testLandlock(t, q) })
		if _, ok := remembered().known[placeName]; !ok {
			t.Errorf("%s: not remembered", how)
		}
	}
}

// Facts that are damaged or wrong, of another boot or others' are not relied on.
func TestForgets(t *testing.T) {
	keepFacts(t)
	q, err := NewLandlock()
	if err != nil {
		t.Fatal(err)
	}
	_ = q.Close()
	good, err := readFacts()
	if err != nil {
		t.Fatal(err)
	}
	write := func(f facts) error {
		text, err := json.Marshal(f)
		if err != nil {
			return err
		}
		return os.WriteFile(factsFile(), text, 0o600)
	}
	// wrong keeps a number that is not true, as if it had been found out.
	wrong := func(name string, n int32) func() error {
		return func() error {
			f := facts{Boot: good.Boot, Numbers: maps.Clone(good.Numbers)}
			f.Numbers[name] = n
			f.Sum = f.sum()
			return write(f)
		}
	}
	unread := map[string]func() error{
		"another boot":   func() error { return write(facts{"another", good.Numbers, good.Sum}) },
		"another number": func() error { return write(facts{good.Boot, map[string]int32{"cred.security": 8}, good.Sum}) },
		"others' file":   func() error { return os.Chmod(factsFile(), 0o644) },
		"others' folder": func() error { return os.Chmod(factsDir, 0o755) },
		"nothing in it":  func() error { return os.Truncate(factsFile(), 0) },
		"half of it":     func() error { return os.Truncate(factsFile(), 20) },
	}
	spoils := maps.Clone(unread)
	maps.Copy(spoils, map[string]func() error{
		"a far place":     wrong(placeName, 8*words),
		"another place":   wrong(placeName, good.Numbers[placeName]^8),
		"a far member":    wrong("task_struct.cred", 1<<20),
		"another program": wrong("iterator task", good.Numbers["iterator task"]+1),
	})
	for name, spoil := range spoils {
		if err := errors.Join(os.RemoveAll(factsDir), good.save(), spoil()); err != nil {
			t.Fatal(err)
		}
		if k := remembered(); unread[name] != nil && len(k.known) > 0 {
			t.Errorf("%s: relied on", name)
		}
		q, err := NewLandlock()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		t.Run(name, func(t *testing.T) { testLandlock(t, q) })
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
