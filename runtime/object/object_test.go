package object

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/ocickpt/ocickpt/image"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// References are given in the order of writing, before the record is completed
// by those that refer to it.
func TestWrite(t *testing.T) {
	var stream bytes.Buffer
	w := image.NewWriter(&stream)
	check(t, w.Record(image.TypeHeader, 0, image.Header{Magic: image.HeaderMagic, Revision: image.Revision, ByteOrder: "little"}))
	check(t, w.Record(image.TypeArch, 0, image.Arch{PageSize: image.PageSize}))
	check(t, w.Record(image.TypeContainer, 0, image.Container{}))
	check(t, w.Record(image.TypeTree, 0, image.Tree{Processes: []image.Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}}))
	pipe := &Object{Type: image.TypePipe, Record: &image.Pipe{Capacity: 4096}}
	rec := &image.File{Kind: image.KindPipe}
	end := &Object{Type: image.TypeFile, Record: rec, Complete: func() { rec.Pipe = RefOf(pipe) }}
	if RefOf(nil) != 0 || RefOf(end) != 0 {
		t.Error("a reference before it is written")
	}
	for _, o := range []*Object{pipe, end} {
		check(t, o.Write(w))
	}
	check(t, w.Close())
	head, err := image.NewReader(&stream).Head()
	check(t, err)
	if f := head.File(end.Ref); pipe.Ref != 1 || end.Ref != 2 || f == nil || f.Pipe != pipe.Ref {
		t.Errorf("pipe %d, end %d: %+v", pipe.Ref, end.Ref, f)
	}
}

func TestWriteRefused(t *testing.T) {
	o := &Object{Type: image.TypePipe, Record: &image.Pipe{}}
	if err := o.Write(image.NewWriter(&bytes.Buffer{})); err == nil {
		t.Error("an object stands first in a stream")
	}
}

func TestSame(t *testing.T) {
	compared := 0
	got := Same([]string{"b1", "a1", "b2", "c1", "a2", "b3"}, func(a, b string) int {
		compared++
		return int(a[0]) - int(b[0])
	})
	if want := "[[a1 a2] [b1 b2 b3] [c1]]"; fmt.Sprint(got) != want {
		t.Errorf("groups %v, want %s", got, want)
	}
	Same(make([]int, 1000), func(int, int) int { compared++; return 0 })
	if compared > 2100 {
		t.Errorf("%d comparisons of what is equal", compared)
	}
}
