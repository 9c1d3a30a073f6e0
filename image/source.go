package image

import (
	"errors"
	"io"
	"unsafe"
)

const (
	headAhead = 64 << 10 // bytes read ahead in the head
	poolSize  = 8        // raw buffers kept for reuse
)

// source reads a stream through a small buffer and counts its bytes.
//
// How far it reads ahead differs. In the head, records are small and a large
// buffer saves system calls. Among the contents it reads to the next page
// boundary of the stream and no further: that is where raw bytes begin, so one
// read takes in everything between the raw bytes of two records and the next
// one reads raw bytes straight to where they are wanted.
type source struct {
	r        io.Reader
	buf      []byte // read but not yet taken
	store    []byte
	offset   uint64 // of the next byte to be taken
	contents bool
}

func newSource(r io.Reader) *source {
	return &source{r: r, store: make([]byte, headAhead)}
}

// read fills p. It returns io.EOF where the stream ends before the first byte
// and io.ErrUnexpectedEOF where it ends within p, and in p[:n] what there was.
func (s *source) read(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		if len(s.buf) == 0 && len(p)-n < s.ahead() {
			err = s.refill(len(p) - n)
		}
		if len(s.buf) > 0 {
			c := copy(p[n:], s.buf)
			s.buf = s.buf[c:]
			s.offset += uint64(c)
			n += c
			continue
		}
		if err == nil {
			n, err = s.direct(p, n)
		}
	}
	if errors.Is(err, io.EOF) && n > 0 {
		err = io.ErrUnexpectedEOF
	}
	if n == len(p) {
		err = nil
	}
	return n, err
}

// ahead returns how many bytes a refill asks for.
func (s *source) ahead() int {
	if !s.contents {
		return len(s.store)
	}
	return PageSize - int(s.offset%PageSize)
}

// refill reads at least need bytes, unless the stream ends before.
func (s *source) refill(need int) error {
	n, err := io.ReadAtLeast(s.r, s.store[:s.ahead()], need)
	s.buf = s.store[:n]
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return err
}

// direct reads the rest of p, from n on, without the buffer.
func (s *source) direct(p []byte, n int) (int, error) {
	c, err := io.ReadFull(s.r, p[n:])
	s.offset += uint64(c)
	return n + c, err
}

// pool keeps raw buffers for reuse between the reader and its consumer, which
// may be different goroutines.
type pool chan []byte

// get returns a page-aligned buffer of n bytes with any contents.
func (p pool) get(n int) []byte {
	select {
	case b := <-p:
		if cap(b) >= n {
			return b[:n]
		}
	default:
	}
	return alignedBuffer(n)
}

// put takes a buffer back, or leaves it to the garbage collector.
func (p pool) put(b []byte) {
	select {
	case p <- b:
	default:
	}
}

// alignedBuffer returns n bytes that begin on a page boundary in memory, as
// direct I/O and vmsplice want them. Sizes are rounded up, so that a buffer
// serves later records that are a little larger.
func alignedBuffer(n int) []byte {
	const step = 256 << 10
	size := (n + step - 1) / step * step
	b := make([]byte, size+PageSize)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) % PageSize)
	return b[skip : skip+n : skip+size]
}
