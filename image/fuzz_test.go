package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"testing"
	"testing/iotest"
)

// seeds gives a fuzzer short images, good and bad, of every kind of record.
func seeds(f *testing.F) {
	f.Helper()
	f.Add(smallImage(f))
	for _, contents := range [][]Content{sampleContents()[:1], sampleContents()[1:2], sampleContents()[4:5]} {
		var image bytes.Buffer
		w := NewWriter(&image)
		writeHead(f, w)
		for _, c := range contents {
			check(f, writeContent(w, c))
		}
		if w.Close() != nil { // a pipe's bytes are missing
			check(f, w.Fail(Error{Phase: "write", Cause: "no space left on device"}))
		}
		f.Add(image.Bytes())
	}
	forged := newForge()
	forged.contents(f)
	f.Add(bytes.Clone(forged.image()))
	f.Add([]byte{})
}

// mend corrects every checksum that still stands where a record ends, so that
// what a fuzzer changed is looked at and not only detected.
func mend(image []byte) []byte {
	image = bytes.Clone(image)
	for at := uint64(0); uint64(len(image))-at > preHeaderSize; {
		n := decodePreHeader(image[at:]).Length
		if n > uint64(len(image)) {
			break
		}
		end := at + preHeaderSize + n + uint64(padding(n))
		if end+crcSize > uint64(len(image)) {
			break
		}
		binary.LittleEndian.PutUint32(image[end:], crc32.Checksum(image[at:end], castagnoli))
		at = end + crcSize
	}
	return image
}

// FuzzReader checks that the Reader never fails otherwise than with an error,
// that how the bytes arrive makes no difference, and that it never confirms
// what it did not read to the end.
func FuzzReader(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, image []byte) {
		for _, image := range [][]byte{image, mend(image)} {
			n, err := drain(NewReader(bytes.NewReader(image)))
			m, again := drain(NewReader(iotest.HalfReader(bytes.NewReader(image))))
			if n != m || (err == nil) != (again == nil) {
				t.Fatalf("read at once: %d records, %v; read in pieces: %d, %v", n, err, m, again)
			}
			if r, verr := Verify(bytes.NewReader(image)); verr == nil && r.Bytes != uint64(len(image)) {
				t.Fatalf("%d bytes are good, but only %d were counted", len(image), r.Bytes)
			}
		}
	})
}

// drain reads a stream to its end and counts the bulk records.
func drain(r *Reader) (n int, err error) {
	for {
		c, err := r.Next()
		if err != nil {
			if _, again := r.Next(); again == nil {
				return n, errors.New("an error was not final")
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return n, err
		}
		n++
		c.Release()
	}
}

// FuzzInspect checks that what passes can also be shown, without a control
// character from the image.
func FuzzInspect(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, image []byte) {
		for _, image := range [][]byte{image, mend(image)} {
			s, err := Inspect(bytes.NewReader(image))
			if err != nil {
				continue
			}
			var b bytes.Buffer
			check(t, s.WriteText(&b))
			if i := bytes.IndexFunc(b.Bytes(), func(r rune) bool { return r != '\n' && (r < ' ' || r >= 0x7f && r < 0xa0) }); i >= 0 {
				t.Fatalf("control character at %d of\n%q", i, b.String())
			}
			check(t, s.WriteJSON(&b))
		}
	})
}
