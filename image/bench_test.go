package image

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

const benchRaw = 1 << 20

var benchRuns = []Run{{Addr: 0x100000, Count: 100}, {Addr: 0x200000, Count: 156}}

// benchHead begins an image with one address space that has room for
// everything and returns its reference.
func benchHead(b *testing.B, w *Writer) Ref {
	b.Helper()
	writeHead(b, w)
	ref := w.NewRef()
	check(b, w.Record(TypeMM, ref, MM{Exe: refExe, Areas: []Area{{Start: 0, End: 1 << 40, Kind: AreaAnon}}}))
	return ref
}

func BenchmarkWriterPages(b *testing.B) {
	w := NewWriter(io.Discard)
	ref := benchHead(b, w)
	raw := make([]byte, benchRaw)
	b.SetBytes(benchRaw)
	b.ReportAllocs()
	for b.Loop() {
		check(b, w.Pages(ref, benchRuns, raw, Checksum(raw)))
	}
}

// looped repeats one record for ever.
type looped struct {
	record []byte
	at     int
}

func (l *looped) Read(p []byte) (int, error) {
	n := copy(p, l.record[l.at:])
	l.at = (l.at + n) % len(l.record)
	return n, nil
}

func BenchmarkReader(b *testing.B) {
	var image bytes.Buffer
	w := NewWriter(&image)
	ref := benchHead(b, w)
	raw := make([]byte, benchRaw)
	// The second record of two, and those after it, have the same length and
	// fill, because each begins at the same distance from a page boundary.
	check(b, w.Pages(ref, benchRuns, raw, Checksum(raw)))
	check(b, w.flush())
	first := image.Len()
	check(b, w.Pages(ref, benchRuns, raw, Checksum(raw)))
	check(b, w.flush())
	r := NewReader(io.MultiReader(bytes.NewReader(bytes.Clone(image.Bytes()[:first])), &looped{record: image.Bytes()[first:]}))
	if _, err := r.Head(); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(benchRaw)
	b.ReportAllocs()
	for b.Loop() {
		c, err := r.Next()
		if err != nil {
			b.Fatal(err)
		}
		c.Release()
	}
}

// BenchmarkHead reads the sample's head.
func BenchmarkHead(b *testing.B) {
	image := sampleImage(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := NewReader(bytes.NewReader(image)).Head(); err != nil && !errors.Is(err, io.EOF) {
			b.Fatal(err)
		}
	}
}
