package image

import (
	"bytes"
	"errors"
	"testing"
)

// TestWriterRefuses checks that the Writer refuses what a Reader would, writes
// nothing of it and goes on.
func TestWriterRefuses(t *testing.T) {
	for name, write := range map[string]func(w *Writer) error{
		"out of order":     func(w *Writer) error { return w.Record(TypeTree, 0, sampleTree()) },
		"unresolved ref":   func(w *Writer) error { return w.Record(TypeFile, 90, File{Kind: KindPipe, Pipe: 80}) },
		"wrong structure":  func(w *Writer) error { return w.Record(TypeFile, 90, Pipe{}) },
		"nil":              func(w *Writer) error { return w.Record(TypeFile, 90, nil) },
		"nil pointer":      func(w *Writer) error { return w.Record(TypeFile, 90, (*File)(nil)) },
		"bulk as metadata": func(w *Writer) error { return w.Record(TypePages, refMMInit, Pages{}) },
		"unknown type":     func(w *Writer) error { return w.Record(777, 90, File{}) },
		"trailer":          func(w *Writer) error { return w.Record(TypeTrailer, 0, Trailer{}) },
		"error":            func(w *Writer) error { return w.Record(TypeError, 0, Error{}) },
		"ref used":         func(w *Writer) error { return w.Record(TypePipe, refPipe, Pipe{}) },
		"pages outside": func(w *Writer) error {
			return w.Pages(refMMInit, []Run{{Addr: 0, Count: 1, Zero: true}}, nil, Checksum(nil))
		},
		"pages without raw": func(w *Writer) error {
			return w.Pages(refMMInit, []Run{{Addr: areaHeap, Count: 1}}, nil, Checksum(nil))
		},
		"too much raw":        func(w *Writer) error { return w.Bytes(refLog, 0, make([]byte, MaxRaw+1)) },
		"bytes outside":       func(w *Writer) error { return w.Bytes(refPipe, 0, []byte("hello!")) },
		"incomplete contents": func(w *Writer) error { return w.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			w := NewWriter(&b)
			writeHead(t, w)
			at := w.Offset()
			err := write(w)
			var format *FormatError
			if !errors.As(err, &format) || format.Offset != at || w.Offset() != at {
				t.Fatalf("error %v, offset %d to %d", err, at, w.Offset())
			}
			check(t, w.Bytes(refPipe, 0, []byte("hello")))
			check(t, w.Close())
			if err := w.Close(); !errors.Is(err, ErrClosed) {
				t.Errorf("second Close: %v", err)
			}
			if _, err := Verify(bytes.NewReader(b.Bytes())); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestNamesNotUTF8 checks that names which are not UTF-8 are encoded as CBOR
// byte strings, so that any CBOR decoder accepts the payload.
func TestNamesNotUTF8(t *testing.T) {
	for s, head := range map[string]byte{"\xff\xfe": 0x42, "ok": 0x62} {
		p, err := encode(FS{Cwd: s})
		check(t, err)
		if p[2] != head {
			t.Errorf("%q is encoded as %#x", s, p)
		}
		var f FS
		check(t, decode(p, &f))
		if f.Cwd != s {
			t.Errorf("%q came back as %q", s, f.Cwd)
		}
	}
	c := Container{Cgroups: map[string]string{"\xff": "\xfe"}}
	p, err := encode(c)
	check(t, err)
	var got Container
	check(t, decode(p, &got))
	compare(t, c, got)
}

// TestEncoding pins the encoding of one structure byte for byte.
func TestEncoding(t *testing.T) {
	p, err := encode(Pipe{Capacity: 65536, Length: 5, Packet: true})
	check(t, err)
	if want := []byte{0xa3, 1, 0x1a, 0, 1, 0, 0, 2, 5, 4, 0xf5}; !bytes.Equal(p, want) {
		t.Errorf("%#x, want %#x", p, want)
	}
}

// TestLargeHead writes a task of many threads, so that the Reader has to grow
// its buffer.
func TestLargeHead(t *testing.T) {
	const n = 300
	p := Process{Pid: 1, Pids: []int32{1}}
	var threads []Thread
	for tid := int32(1); tid <= n; tid++ {
		p.Threads = append(p.Threads, tid)
		threads = append(threads, sampleThread(tid, "t"))
	}
	f := newForge()
	f.NewRef()
	f.NewRef()
	for _, r := range []sampleRecord{{TypeHeader, sampleHeader()}, {TypeArch, sampleArch()}, {TypeContainer, sampleContainer()}, {TypeTree, Tree{Processes: []Process{p}}}} {
		check(t, f.Record(r.t, 0, r.v))
	}
	for _, r := range sampleObjects() {
		if types[r.t].object {
			check(t, f.Record(r.t, f.NewRef(), r.v))
		}
	}
	check(t, f.Record(TypeTask, 0, sampleTask(1, refMMInit, refFilesInit, threads...)))
	check(t, f.Writer.Bytes(refPipe, 0, []byte("hello")))
	check(t, f.Close())
	h, _ := readAll(t, bytes.NewReader(f.Buffer.Bytes()))
	compare(t, threads, h.Task(1).Threads)
}

// TestMetadataBound fills the head to its limit, after which only the error
// record fits.
func TestMetadataBound(t *testing.T) {
	w := NewWriter(&sizes{})
	check(t, w.Record(TypeHeader, 0, sampleHeader()))
	check(t, w.Record(TypeArch, 0, sampleArch()))
	check(t, w.Record(TypeContainer, 0, Container{}))
	check(t, w.Record(TypeTree, 0, Tree{Processes: []Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}}))
	w.state.metadata = MaxMetadata - 20
	if err := w.Record(TypeFS, w.NewRef(), FS{Cwd: "a directory far away"}); err == nil {
		t.Error("the limit does not hold")
	}
	check(t, w.Fail(Error{Cause: "the metadata is too large"}))
}
